//! Names in the root of a forest: `12` is the layer in slot 12, `12-3` the same layer with owners mapped by id map 3.

use crate::tree::node_id::SLOTS;

/// What a name in the root leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RootName {
    pub(super) slot: u16,
    /// 0 for owners as recorded.
    pub(super) id_map: u8,
}

/// Reads a name. Only the one spelling that [`show`] gives is a name, so that no layer has two of them.
pub(super) fn parse(name: &[u8]) -> Option<RootName> {
    let text = std::str::from_utf8(name).ok()?;
    let (slot, id_map) = match text.split_once('-') {
        Some((slot, id_map)) => (slot, id_map.parse().ok().filter(|id_map| *id_map != 0)?),
        None => (text, 0),
    };
    let slot = slot.parse().ok().filter(|slot| is_slot(*slot))?;
    let parsed = RootName { slot, id_map };
    (show(parsed) == text).then_some(parsed)
}

/// The name's spelling.
pub(super) fn show(name: RootName) -> String {
    let RootName { slot, id_map } = name;
    if id_map == 0 { slot.to_string() } else { format!("{slot}-{id_map}") }
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
        for (text, slot, id_map) in [("1", 1, 0), ("65534", 65534, 0), ("7-1", 7, 1), ("7-255", 7, 255)] {
            let name = RootName { slot, id_map };
            assert_eq!((parse(text.as_bytes()), show(name).as_str()), (Some(name), text));
        }
        for bad in ["", "0", "65535", "01", "+1", "-1", "1-", "1-0", "1-256", "1-01", "1-1-1", "1 ", "a", "\u{660}"] {
            assert_eq!(parse(bad.as_bytes()), None, "{bad:?}");
        }
    }
}
