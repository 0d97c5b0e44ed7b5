//! What an EROFS image of a tree has to say: the tree itself, read beside the image.

use std::collections::{BTreeMap, HashSet, VecDeque};

use soci_fs::tree::attributes::Attributes;
use soci_fs::tree::device::{DeviceMap, Part};
use soci_fs::tree::erofs::{Layer, Summary, write};
use soci_fs::tree::{Node, NodeKind, NodeNumber, Tree};
use soci_index::format::entry::{Entry, EntryKind};

use crate::erofs::{Content, Image, Inode, read};

/// Writes the image of a tree and has it read: every name, attribute and block is that of the tree. Gives the image.
///
/// # Panics
/// When the image is not what it has to be.
#[must_use]
pub fn checked(tree: &Tree, layers: &[Layer<'_>], opaque: Option<&[u8]>) -> (Vec<u8>, Summary) {
    let mut bytes = Vec::new();
    let summary = write(tree, layers, opaque, &mut bytes).unwrap();
    let image = read(&bytes).unwrap_or_else(|error| panic!("{error:#}"));
    assert_eq!((summary.bytes, summary.inodes), (bytes.len() as u64, image.inodes.len() as u64));
    assert_eq!(summary.xattrs_left_out, compare(tree, layers, opaque, &image));
    (bytes, summary)
}

/// Compares what an image says with the tree; gives the number of attributes that it cannot have.
///
/// # Panics
/// When they differ.
pub fn compare(tree: &Tree, layers: &[Layer<'_>], opaque: Option<&[u8]>, image: &Image) -> u64 {
    let blocks: Vec<u32> = layers.iter().map(|layer| layer.device.blocks()).collect();
    assert_eq!(image.devices, blocks);
    Model { tree, layers, opaque }.check(image)
}

/// The same of a single layer.
///
/// # Panics
/// When the image is not what it has to be, or the layer is too large for one.
#[must_use]
pub fn checked_layer(entries: &[Entry], uncompressed_size: u64, opaque: Option<&[u8]>) -> (Vec<u8>, DeviceMap) {
    let tree = Tree::of_layer(entries).unwrap();
    let device = DeviceMap::of_layer(entries, uncompressed_size).unwrap();
    let (bytes, _) = checked(&tree, &[Layer { entries, device: &device }], opaque);
    (bytes, device)
}

/// The attributes that Linux can have, and how many it cannot.
#[must_use]
pub fn xattrs(node: &Node, entry: Option<&Entry>, opaque: Option<&[u8]>) -> (BTreeMap<Vec<u8>, Vec<u8>>, u64) {
    let (mut found, mut left_out) = (BTreeMap::new(), 0);
    for record in entry.map_or(&[][..], Entry::pax) {
        let Some(name) = record.key.strip_prefix(b"SCHILY.xattr.") else { continue };
        let hidden: [&[u8]; 2] = [b"user.overlay.", b"trusted.overlay."];
        if opaque.is_some() && hidden.iter().any(|space| name.starts_with(space)) {
            continue;
        }
        if is_possible(node.kind(), name, &record.value) {
            found.insert(name.to_vec(), record.value.to_vec());
        } else {
            left_out += 1;
        }
    }
    if let Some(name) = opaque.filter(|_| node.is_opaque()) {
        found.insert(name.to_vec(), b"y".to_vec());
    }
    (found, left_out)
}

fn is_possible(kind: NodeKind, name: &[u8], value: &[u8]) -> bool {
    let fits = name.len() <= 255 && !name.contains(&0) && value.len() <= 65_535;
    let is_list = name == b"system.posix_acl_access" && kind != NodeKind::Symlink
        || name == b"system.posix_acl_default" && kind == NodeKind::Directory;
    let is_user = name.starts_with(b"user.") && matches!(kind, NodeKind::Regular | NodeKind::Directory);
    let is_other = name.starts_with(b"trusted.") || name.starts_with(b"security.");
    fits && (is_list && is_acl(value) || (is_user || is_other) && is_long(name))
}

/// Whether something follows the name space.
fn is_long(name: &[u8]) -> bool {
    name.iter().position(|byte| *byte == b'.').is_some_and(|dot| dot + 1 < name.len())
}

fn is_acl(value: &[u8]) -> bool {
    let Some(rest) = value.strip_prefix(&[2, 0, 0, 0]) else { return false };
    let tags: Vec<u8> = rest.chunks(8).map(|entry| entry[0]).collect();
    let count = |tag| tags.iter().filter(|found| **found == tag).count();
    let names = count(2) + count(8);
    rest.len().is_multiple_of(8)
        && rest.chunks(8).all(|entry| entry[1] == 0 && entry[2] < 8 && entry[3] == 0)
        && rest.chunks(8).all(|entry| !matches!(entry[0], 2 | 8) || entry[4..] != [0xff; 4])
        && tags.is_sorted()
        && [1, 4, 32].iter().all(|tag| count(*tag) == 1)
        && count(16) <= 1
        && (names == 0 || count(16) == 1)
        && tags.len() == names + count(16) + 3
}

struct Model<'a> {
    tree: &'a Tree,
    layers: &'a [Layer<'a>],
    opaque: Option<&'a [u8]>,
}

impl<'a> Model<'a> {
    /// How many attributes are not in the image.
    fn check(&self, image: &Image) -> u64 {
        let mut left_out = 0;
        let mut numbers = BTreeMap::from([(NodeNumber::ROOT, image.root)]);
        let mut queue = VecDeque::from([(NodeNumber::ROOT, image.root)]);
        while let Some((number, found)) = queue.pop_front() {
            let (node, inode) = (self.tree.node(number).unwrap(), &image.inodes[&found]);
            left_out += self.check_inode(number, node, inode);
            let Content::Directory(names) = &inode.content else { continue };
            let expected: Vec<_> = self.tree.children(number, 0).map(|(_, child)| child).collect();
            assert_eq!(names.len(), expected.len());
            for ((name, found), child) in names.iter().zip(expected) {
                assert_eq!(name.escape_ascii().to_string(), child.name.escape_ascii().to_string());
                let known = numbers.insert(child.node, *found);
                assert!(known.is_none_or(|known| known == *found), "{} is another file", name.escape_ascii());
                if known.is_none() {
                    queue.push_back((child.node, *found));
                }
            }
        }
        assert_eq!(numbers.len(), image.inodes.len());
        assert_eq!(numbers.into_values().collect::<HashSet<_>>().len(), image.inodes.len());
        left_out
    }

    fn entry(&self, layer: u16, entry: u32) -> Option<&'a Entry> {
        self.layers.get(usize::from(layer))?.entries.get(entry as usize)
    }

    fn check_inode(&self, number: NodeNumber, node: &Node, inode: &Inode) -> u64 {
        let entry = node.entry().map(|entry| self.entry(node.layer(), entry).unwrap());
        let expected = Attributes::of_node(1, self.tree, number, |layer, entry| self.entry(layer, entry)).unwrap();
        let kind = match node.kind() {
            NodeKind::Directory => 0o040_000,
            NodeKind::Regular => 0o100_000,
            NodeKind::Symlink => 0o120_000,
            NodeKind::CharDevice | NodeKind::Whiteout => 0o020_000,
            NodeKind::BlockDevice => 0o060_000,
            NodeKind::Fifo => 0o010_000,
            NodeKind::ForeignLink => panic!("a foreign link is shown"),
        };
        assert_eq!(inode.mode, kind | expected.permissions);
        assert_eq!((inode.uid, inode.gid, inode.links), (expected.uid, expected.gid, expected.links));
        assert_eq!(inode.modified, (expected.modified.seconds, expected.modified.nanoseconds));
        assert_eq!(inode.device, expected.device);
        match (node.kind(), &inode.content) {
            (NodeKind::Symlink, Content::Symlink(target)) => assert_eq!(target[..], entry.unwrap().link[..]),
            (NodeKind::Regular, Content::File { chunk_bytes, chunks }) => {
                assert_eq!(inode.size, expected.size);
                self.check_chunks(node, *chunk_bytes, chunks);
            }
            (NodeKind::Directory, Content::Directory(_)) => {}
            (NodeKind::Regular, Content::Nothing) => assert_eq!((inode.size, expected.size), (0, 0)),
            (_, content) => assert!(matches!(content, Content::Nothing)),
        }
        let (xattrs, left_out) = xattrs(node, entry, self.opaque);
        assert_eq!(inode.xattrs, xattrs);
        left_out
    }

    /// What the chunks lead to is the file, byte for byte; where they are holes, the file has no stored bytes.
    fn check_chunks(&self, node: &Node, chunk_bytes: u64, chunks: &[Option<(u16, u32)>]) {
        let (layer, number) = (&self.layers[usize::from(node.layer())], node.entry().unwrap());
        let entry = &layer.entries[number as usize];
        assert_eq!(entry.kind, EntryKind::Regular);
        let mut start = 0;
        for chunk in chunks {
            let length = chunk_bytes.min(entry.size - start);
            match chunk {
                Some((device, block)) => {
                    assert_eq!(*device, node.layer() + 1);
                    let mut at = start;
                    for part in layer.device.parts(layer.entries, u64::from(*block) * 512, length) {
                        let whole = Part::File { entry: number, offset: at, length: part.length() };
                        assert_eq!(part, whole, "{:?}", entry.name.escape_ascii());
                        at += part.length();
                    }
                    assert_eq!(at, start + length);
                }
                None => {
                    let mut pieces = entry.sparse().unwrap().iter().filter(|piece| piece.length > 0);
                    let is_free = |offset: u64, length: u64, piece: u64, of: u64| {
                        piece >= offset + length || piece + of <= offset
                    };
                    assert!(pieces.all(|piece| is_free(start, length, piece.file_offset, piece.length)));
                }
            }
            start += length;
        }
        assert_eq!(start, entry.size);
    }
}
