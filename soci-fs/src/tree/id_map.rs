//! Owners of files as a user namespace needs them: ids of the container become ids of the host.
//!
//! A layer in a mapped view is the same layer with other owners, computed when asked for. The road not taken is to copy
//! the layer and change the owner of every file. As text a mapping is what containerd's labels say:
//! `CONTAINER:HOST:SIZE`, several with commas in between. Pure.

use serde::{Deserialize, Serialize};

/// The kernel's own id for unmapped users.
const NOBODY: u32 = 65534;

/// Ranges of one mapping: the kernel takes no more.
const RANGES_MAX: usize = 340;

/// A run of ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct IdRange {
    /// First id inside the container: what the layer says.
    pub container: u32,
    /// First id on the host: what is shown.
    pub host: u32,
    pub size: u32,
}

/// A mapping of user ids and one of group ids.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
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

/// The extended attribute that holds a program's capabilities.
pub(crate) const CAPABILITY: &[u8] = b"security.capability";

/// A program's capabilities as a user namespace needs them: bound to the host's id of the container's root, without
/// which the kernel ignores them there. What is of no known form stays as it is. Source: `vfs_ns_cap_data` in
/// `linux/capability.h`, little-endian: 4 bytes of revision and flags, 16 of capabilities, and in revision 3 the root's
/// id.
#[must_use]
pub(crate) fn capability(value: &[u8], map: &IdMap) -> Vec<u8> {
    const REVISION_2: u32 = 0x0200_0000;
    const REVISION_3: u32 = 0x0300_0000;
    const REVISION_MASK: u32 = 0xff00_0000;
    let mut value = value.to_vec();
    let Some((head, rest)) = value.split_first_chunk::<4>() else { return value };
    let (magic, length) = (u32::from_le_bytes(*head), rest.len());
    let root = match (magic & REVISION_MASK, length) {
        (REVISION_2, 16) => 0,
        (REVISION_3, 20) => rest.last_chunk::<4>().map_or(0, |id| u32::from_le_bytes(*id)),
        _ => return value,
    };
    value.truncate(20);
    value[..4].copy_from_slice(&(magic & !REVISION_MASK | REVISION_3).to_le_bytes());
    value.extend_from_slice(&map.uid(root).to_le_bytes());
    value
}

/// Reads the ranges of a label.
///
/// # Errors
/// What is wrong, in words: not of that form, empty, ids beyond 32 bits, or two ranges with the same id.
pub fn parse(text: &str) -> Result<Vec<IdRange>, String> {
    let ranges = text.split(',').map(|range| {
        let wrong = || format!("{range:?} is not CONTAINER:HOST:SIZE");
        let numbers: Result<Vec<u32>, _> = range.split(':').map(str::parse).collect();
        match numbers.as_deref() {
            Ok([container, host, size]) if *size > 0 => {
                let fits = container.checked_add(size - 1).is_some() && host.checked_add(size - 1).is_some();
                let range = IdRange { container: *container, host: *host, size: *size };
                if fits { Ok(range) } else { Err(wrong()) }
            }
            _ => Err(wrong()),
        }
    });
    let ranges: Vec<IdRange> = ranges.collect::<Result<_, String>>()?;
    if ranges.len() > RANGES_MAX {
        return Err(format!("{} ranges are more than {RANGES_MAX}", ranges.len()));
    }
    let overlap = |first: fn(&IdRange) -> u32| {
        let mut starts: Vec<(u32, u32)> = ranges.iter().map(|range| (first(range), range.size)).collect();
        starts.sort_unstable();
        starts.windows(2).any(|pair| pair[1].0 - pair[0].0 < pair[0].1)
    };
    if overlap(|range| range.container) || overlap(|range| range.host) {
        return Err("two ranges have an id in common".to_owned());
    }
    Ok(ranges)
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
    fn capabilities_are_bound_to_the_mapped_root() {
        let ranges = parse("0:100000:65536").unwrap();
        let map = IdMap { uids: ranges.clone(), gids: ranges };
        let sets = [0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let with = |revision: u8, root: &[u8]| [&[1, 0, 0, revision][..], &sets, root].concat();
        for (value, expected) in [
            (with(2, &[]), with(3, &100_000_u32.to_le_bytes())),
            (with(3, &7_u32.to_le_bytes()), with(3, &100_007_u32.to_le_bytes())),
            (with(3, &70_000_u32.to_le_bytes()), with(3, &NOBODY.to_le_bytes())),
            (with(1, &[]), with(1, &[])),
            (with(2, &[0]), with(2, &[0])),
            (vec![1, 0], vec![1, 0]),
            (vec![], vec![]),
        ] {
            assert_eq!(capability(&value, &map), expected, "{value:?}");
        }
    }

    #[test]
    fn labels() {
        let range = |container, host, size| IdRange { container, host, size };
        for (text, expected) in [
            ("0:100000:65536", Some(vec![range(0, 100_000, 65_536)])),
            ("0:1000:1,1:100000:65535", Some(vec![range(0, 1000, 1), range(1, 100_000, 65_535)])),
            ("0:0:4294967295", Some(vec![range(0, 0, u32::MAX)])),
            ("4294967295:4294967295:1", Some(vec![range(u32::MAX, u32::MAX, 1)])),
            ("", None),
            ("0:1", None),
            ("0:1:0", None),
            ("0:1:1,", None),
            ("a:1:1", None),
            ("-1:1:1", None),
            ("1:0:4294967295,0:1:1", None),
            ("2:0:4294967295", None),
            ("0:0:2,1:5:1", None),
            ("0:5:2,7:6:1", None),
        ] {
            assert_eq!(parse(text).ok(), expected, "{text}");
        }
    }

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
