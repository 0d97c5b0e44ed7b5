//! What `stat` and `listxattr` show of a file, in our own words: no FUSE type is known here, and no other file system's.
//!
//! Attributes are computed when asked for, from a node of the tree and the entry it names. An entry is a statement of
//! the archive; a few of those are brought into what a kernel can hold: permission bits are cut to twelve, device
//! numbers to 12 and 20 bits, a time that the index could not say is 0.

use soci_index::format::entry::{Entry, Timestamp};

use crate::tree::{Node, NodeKind, NodeNumber, Tree};

/// Size of a block as `stat` counts blocks.
const BLOCK_BYTES: u64 = 512;

/// Permission bits of a directory that no entry describes, as every extractor makes it.
const IMPLIED_PERMISSIONS: u16 = 0o755;

/// Permission bits of every symbolic link on Linux.
const SYMLINK_PERMISSIONS: u16 = 0o777;

/// Name spaces of overlayfs's own attributes.
const OVERLAY_NAMES: [&[u8]; 2] = [b"trusted.overlay.", b"user.overlay."];

/// What `stat` shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attributes {
    /// Inode number.
    pub inode: u64,
    pub kind: NodeKind,
    /// The twelve permission bits.
    pub permissions: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Size in bytes: content of a file, length of a link's target, 0 for all else.
    pub size: u64,
    /// Blocks of 512 bytes.
    pub blocks: u64,
    /// Modification time, shown as the other times too.
    pub modified: Timestamp,
    /// Link count.
    pub links: u32,
    /// Device number of a device, as the kernel packs it into 32 bits; 0 for all else.
    pub device: u32,
}

impl Attributes {
    /// The attributes of a node of `tree` under the inode number `inode`: those of its own entry, with the header of
    /// the hard link to it that was extracted last. `entry` finds an entry by its layer and its position there. `None`
    /// if the tree has no such node.
    #[must_use]
    pub fn of_node<'e>(
        inode: u64,
        tree: &Tree,
        number: NodeNumber,
        entry: impl Fn(u16, u32) -> Option<&'e Entry>,
    ) -> Option<Self> {
        let node = tree.node(number)?;
        let own = node.entry().and_then(|own| entry(node.layer(), own));
        let header = tree.header(number).and_then(|header| entry(header.layer, header.entry));
        Some(Self::new(inode, node, own).with_header(header))
    }

    /// The attributes of `node`, which `entry` describes.
    #[must_use]
    pub fn new(inode: u64, node: &Node, entry: Option<&Entry>) -> Self {
        let kind = node.kind();
        let size = match (kind, entry) {
            (NodeKind::Regular, Some(entry)) => entry.size,
            (NodeKind::Symlink, Some(entry)) => entry.link.len() as u64,
            _ => 0,
        };
        let device = match (kind, entry) {
            (NodeKind::CharDevice | NodeKind::BlockDevice, Some(entry)) => pack_device(entry.device()),
            _ => 0,
        };
        // A white-out, where it is shown at all, is shown as overlayfs wants it: a device 0:0 without permissions.
        let implied = if kind == NodeKind::Whiteout { 0 } else { IMPLIED_PERMISSIONS };
        let permissions = match kind {
            // Archives made elsewhere have other modes; Linux has no others.
            NodeKind::Symlink => SYMLINK_PERMISSIONS,
            _ => entry.map_or(implied, Entry::permissions),
        };
        Self {
            inode,
            kind,
            permissions,
            uid: entry.map_or(0, |entry| entry.uid),
            gid: entry.map_or(0, |entry| entry.gid),
            size,
            blocks: size.div_ceil(BLOCK_BYTES),
            modified: entry.and_then(|entry| entry.modified).unwrap_or_default(),
            links: node.links(),
            device,
        }
    }

    /// The attributes of a file or directory of our own, which root owns.
    #[must_use]
    pub const fn plain(inode: u64, kind: NodeKind, permissions: u16, modified: Timestamp, links: u32) -> Self {
        Self { inode, kind, permissions, uid: 0, gid: 0, size: 0, blocks: 0, modified, links, device: 0 }
    }

    /// The same with the mode, owner and time of another entry: a hard link to the file that was extracted after it.
    #[must_use]
    pub fn with_header(self, header: Option<&Entry>) -> Self {
        let Some(header) = header else { return self };
        let permissions = if self.kind == NodeKind::Symlink { self.permissions } else { header.permissions() };
        let modified = header.modified.unwrap_or_default();
        Self { permissions, uid: header.uid, gid: header.gid, modified, ..self }
    }
}

/// The extended attributes of `node`, which `entry` describes: name and value. For overlayfs, which has opaque
/// directories marked by the attribute `opaque`, its own are hidden: they are instructions to the kernel, and a layer
/// has no business to give them.
pub fn xattrs<'e>(
    node: &Node,
    entry: Option<&'e Entry>,
    opaque: Option<&'e [u8]>,
) -> impl Iterator<Item = (&'e [u8], &'e [u8])> + use<'e> {
    let own = entry.into_iter().flat_map(Entry::xattrs);
    let is_hidden = move |name: &[u8]| opaque.is_some() && OVERLAY_NAMES.iter().any(|space| name.starts_with(space));
    let mark = opaque.filter(|_| node.is_opaque()).map(|name| (name, &b"y"[..]));
    own.filter(move |(name, _)| !is_hidden(name)).chain(mark)
}

/// Packs a device number as the kernel's `new_encode_dev` does: 12 bits of major, 20 bits of minor.
fn pack_device((major, minor): (i64, i64)) -> u32 {
    let (major, minor) = ((major & 0xfff) as u32, (minor & 0xf_ffff) as u32);
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::Tree;
    use crate::tree::tests::script;

    /// A link whose header says 0755, and a file of which a hard link was extracted last.
    #[test]
    fn modes_of_links() {
        let mut entries = script("s l t; f a; h b a");
        entries[0].mode = 0o755;
        entries[2].mode = 0o600;
        let tree = Tree::of_layer(&entries).unwrap();
        let shown = |name: &[u8]| {
            let number = tree.find(name).unwrap();
            let node = tree.node(number).unwrap();
            let entry = |number: u32| &entries[number as usize];
            let header = tree.header(number).map(|header| entry(header.entry));
            let attributes = Attributes::new(1, node, node.entry().map(entry)).with_header(header);
            (attributes.permissions, attributes.uid)
        };
        assert_eq!(shown(b"l"), (0o777, 0));
        assert_eq!((shown(b"a"), shown(b"b")), ((0o600, 2), (0o600, 2)));
    }

    #[test]
    fn device_numbers() {
        for (device, packed) in
            [((1, 3), 0x103), ((8, 0), 0x800), ((0xfff, 0xf_ffff), u32::MAX), ((0x1001, -1), 0xfff0_01ff)]
        {
            assert_eq!(pack_device(device), packed, "{device:?}");
        }
    }
}
