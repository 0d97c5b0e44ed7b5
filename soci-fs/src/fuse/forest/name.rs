//! Names in the root of a forest: `12` is the layer in slot 12, `12-3` the same layer with owners mapped by id map 3,
//! `12.tar` the same layer as one file, `12.state` a directory that has the layer's status file only.

use crate::tree::node_id::SLOTS;

/// What a name in the root leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RootName {
    pub(super) slot: u16,
    /// 0 for owners as recorded.
    pub(super) id_map: u8,
    pub(super) what: What,
}

/// What is shown of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum What {
    Tree,
    /// The layer as one file.
    Device,
    /// The directory of the status file, in a directory that lists nothing.
    State,
}

/// The ends of names of what is not the tree.
const ENDS: [(&str, What); 2] = [(".tar", What::Device), (".state", What::State)];

/// Reads a name. Only the one spelling that [`show`] gives is a name, so that no layer has two of them.
pub(super) fn parse(name: &[u8]) -> Option<RootName> {
    let text = std::str::from_utf8(name).ok()?;
    let other = ENDS.into_iter().find_map(|(end, what)| Some((text.strip_suffix(end)?, what)));
    let (slot, id_map, what) = match (text.split_once('-'), other) {
        (_, Some((slot, what))) => (slot, 0, what),
        (Some((slot, id_map)), None) => (slot, id_map.parse().ok().filter(|id_map| *id_map != 0)?, What::Tree),
        (None, None) => (text, 0, What::Tree),
    };
    let slot = slot.parse().ok().filter(|slot| is_slot(*slot))?;
    let parsed = RootName { slot, id_map, what };
    (show(parsed) == text).then_some(parsed)
}

/// The name's spelling.
pub(super) fn show(name: RootName) -> String {
    match name {
        RootName { slot, what: What::Device, .. } => format!("{slot}.tar"),
        RootName { slot, what: What::State, .. } => format!("{slot}.state"),
        RootName { slot, id_map: 0, what: What::Tree } => slot.to_string(),
        RootName { slot, id_map, what: What::Tree } => format!("{slot}-{id_map}"),
    }
}

/// Slot 0 is the root's own, and the last one is kept free.
pub(super) const fn is_slot(slot: u16) -> bool {
    slot != 0 && slot != SLOTS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_one_spelling() {
        for (text, slot, id_map, what) in [
            ("1", 1, 0, What::Tree),
            ("65534", 65534, 0, What::Tree),
            ("7-1", 7, 1, What::Tree),
            ("7-255", 7, 255, What::Tree),
            ("7.tar", 7, 0, What::Device),
            ("7.state", 7, 0, What::State),
        ] {
            let name = RootName { slot, id_map, what };
            assert_eq!((parse(text.as_bytes()), show(name).as_str()), (Some(name), text));
        }
        for bad in [
            "",
            "0",
            "65535",
            "01",
            "+1",
            "-1",
            "1-",
            "1-0",
            "1-256",
            "1-01",
            "1-1-1",
            "1 ",
            "a",
            ".tar",
            "0.tar",
            "07.tar",
            "7-1.tar",
            "7.tar.tar",
            "7.state.tar",
            "\u{660}",
        ] {
            assert_eq!(parse(bad.as_bytes()), None, "{bad:?}");
        }
    }
}
