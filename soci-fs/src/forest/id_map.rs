//! Owners of files as a user namespace needs them: ids of the container become ids of the host.
//!
//! A layer in a mapped view is the same layer with other owners, computed when asked for. The road not taken is to copy
//! the layer and change the owner of every file.

/// The kernel's own id for "nobody you know".
const NOBODY: u32 = 65534;

/// A run of ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdRange {
    /// First id inside the container: what the layer says.
    pub container: u32,
    /// First id on the host: what is shown.
    pub host: u32,
    /// How many.
    pub size: u32,
}

/// A mapping of user ids and one of group ids.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IdMap {
    /// For users. The first range that has an id decides.
    pub uids: Vec<IdRange>,
    /// For groups.
    pub gids: Vec<IdRange>,
}

impl IdMap {
    /// The user to show for the layer's user `id`.
    #[must_use]
    pub fn uid(&self, id: u32) -> u32 {
        map(&self.uids, id)
    }

    /// The group to show for the layer's group `id`.
    #[must_use]
    pub fn gid(&self, id: u32) -> u32 {
        map(&self.gids, id)
    }
}

fn map(ranges: &[IdRange], id: u32) -> u32 {
    let mapped = ranges.iter().find_map(|range| {
        let distance = id.checked_sub(range.container).filter(|distance| *distance < range.size)?;
        range.host.checked_add(distance)
    });
    mapped.unwrap_or(NOBODY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges() {
        let range = |container, host, size| IdRange { container, host, size };
        let map = IdMap { uids: vec![range(0, 100_000, 1000), range(2000, 5, 1)], gids: vec![range(5, u32::MAX, 2)] };
        for (id, shown) in [(0, 100_000), (999, 100_999), (1000, NOBODY), (1999, NOBODY), (2000, 5), (2001, NOBODY)] {
            assert_eq!(map.uid(id), shown, "{id}");
        }
        for (id, shown) in [(4, NOBODY), (5, u32::MAX), (6, NOBODY), (u32::MAX, NOBODY)] {
            assert_eq!(map.gid(id), shown, "{id}");
        }
    }
}
