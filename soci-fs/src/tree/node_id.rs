//! Numbers that name a file to the kernel: computed from what the file is, never stored.
//!
//! A node id is `id map << 56 | layer slot << 40 | node + 1`. So there is no table from ids to files, nothing to
//! forget, and a new process that has the same layers in the same slots answers for the ids that the old one gave out.
//! The kernel demands that the root of a mount is 1: that is slot 0, node 0.

use crate::tree::NodeNumber;

/// Layer slots that fit into an id.
pub const SLOTS: u16 = u16::MAX;

const SLOT_SHIFT: u32 = 40;
const MAP_SHIFT: u32 = 56;

/// A node id taken apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NodeId {
    /// Which mapping of user and group ids applies; 0 is none.
    pub id_map: u8,
    /// Which tree.
    pub slot: u16,
    pub node: NodeNumber,
}

impl NodeId {
    /// The node of a mount that has only one tree.
    #[must_use]
    pub const fn single(node: NodeNumber) -> Self {
        Self { id_map: 0, slot: 0, node }
    }

    /// The number for the kernel.
    #[must_use]
    pub const fn pack(self) -> u64 {
        ((self.id_map as u64) << MAP_SHIFT) | ((self.slot as u64) << SLOT_SHIFT) | (self.node.0 as u64 + 1)
    }

    /// Takes a number from the kernel apart; `None` if [`NodeId::pack`] cannot have made it.
    #[must_use]
    pub const fn unpack(id: u64) -> Option<Self> {
        let node = id & ((1 << SLOT_SHIFT) - 1);
        if node == 0 || node > u32::MAX as u64 {
            return None;
        }
        #[expect(clippy::cast_possible_truncation, reason = "masked to the width of each field")]
        Some(Self {
            id_map: (id >> MAP_SHIFT) as u8,
            slot: (id >> SLOT_SHIFT) as u16,
            node: NodeNumber((node - 1) as u32),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_reversible() {
        assert_eq!(NodeId::single(NodeNumber::ROOT).pack(), 1);
        for (id_map, slot, node) in [(0, 0, 0), (1, 2, 3), (255, u16::MAX, u32::MAX - 1), (7, 0, 1 << 31)] {
            let id = NodeId { id_map, slot, node: NodeNumber(node) };
            assert_eq!(NodeId::unpack(id.pack()), Some(id));
        }
        for bad in [0, 1 << 40, 1 << 39] {
            assert_eq!(NodeId::unpack(bad), None);
        }
    }
}
