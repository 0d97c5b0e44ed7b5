//! Names in the root of a forest: `12` is the layer in slot 12, `12-3` the same layer with owners mapped by id map 3,
//! `12.tar` the same layer as one file.

use crate::tree::node_id::SLOTS;

/// What a name in the root leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RootName {
    pub(super) slot: u16,
    /// 0 for owners as recorded.
    pub(super) id_map: u8,
    /// Whether it is the layer as one file.
    pub(super) is_device: bool,
}

/// The end of the name of a layer as one file.
const DEVICE: &str = ".tar";

/// Reads a name. Only the one spelling that [`show`] gives is a name, so that no layer has two of them.
pub(super) fn parse(name: &[u8]) -> Option<RootName> {
    let text = std::str::from_utf8(name).ok()?;
    let (slot, id_map, is_device) = match (text.split_once('-'), text.strip_suffix(DEVICE)) {
        (_, Some(slot)) => (slot, 0, true),
        (Some((slot, id_map)), None) => (slot, id_map.parse().ok().filter(|id_map| *id_map != 0)?, false),
        (None, None) => (text, 0, false),
    };
    let slot = slot.parse().ok().filter(|slot| is_slot(*slot))?;
    let parsed = RootName { slot, id_map, is_device };
    (show(parsed) == text).then_some(parsed)
}

/// The name's spelling.
pub(super) fn show(name: RootName) -> String {
    match name {
        RootName { slot, is_device: true, .. } => format!("{slot}{DEVICE}"),
        RootName { slot, id_map: 0, .. } => slot.to_string(),
        RootName { slot, id_map, .. } => format!("{slot}-{id_map}"),
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
        for (text, slot, id_map, is_device) in [
            ("1", 1, 0, false),
            ("65534", 65534, 0, false),
            ("7-1", 7, 1, false),
            ("7-255", 7, 255, false),
            ("7.tar", 7, 0, true),
        ] {
            let name = RootName { slot, id_map, is_device };
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
            "\u{660}",
        ] {
            assert_eq!(parse(bad.as_bytes()), None, "{bad:?}");
        }
    }
}
