//! Directories: blocks of records followed by names, sorted by name over the whole directory, `.` and `..` among them.

use crate::tree::device::BLOCK_BYTES;
use crate::tree::{Child, NodeKind, NodeNumber, Tree};

/// Size of a record: inode number, offset of the name, kind, a reserved byte.
const RECORD_BYTES: usize = 12;

/// The names that a directory has in an image, in their order.
pub(super) fn names(tree: &Tree, directory: NodeNumber) -> impl Iterator<Item = Child<'_>> {
    let own = [Child { name: b".", node: directory }, Child { name: b"..", node: tree.parent(directory) }];
    let mut own = own.into_iter().peekable();
    let mut children = tree.children(directory, 0).map(|(_, child)| child).peekable();
    // `-`, for one, sorts before them.
    std::iter::from_fn(move || match (own.peek(), children.peek()) {
        (Some(dot), Some(child)) if child.name < dot.name => children.next(),
        (Some(_), _) => own.next(),
        (None, _) => children.next(),
    })
}

/// Size of a directory in bytes: whole blocks, and what is used of the last one.
pub(super) fn size(tree: &Tree, directory: NodeNumber) -> u64 {
    let (mut full, mut used) = (0, 0);
    for child in names(tree, directory) {
        let bytes = RECORD_BYTES + child.name.len();
        if used + bytes > BLOCK_BYTES as usize {
            full += 1;
            used = 0;
        }
        used += bytes;
    }
    full * BLOCK_BYTES + used as u64
}

/// Gives the blocks of a directory one by one to `sink`, the last one as far as it is used.
pub(super) fn blocks<E>(
    tree: &Tree,
    directory: NodeNumber,
    numbers: &[u32],
    mut sink: impl FnMut(&[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let (mut pending, mut used) = (Vec::new(), 0);
    for child in names(tree, directory) {
        let bytes = RECORD_BYTES + child.name.len();
        if used + bytes > BLOCK_BYTES as usize {
            let mut block = encode(tree, &pending, numbers);
            block.resize(BLOCK_BYTES as usize, 0);
            sink(&block)?;
            pending.clear();
            used = 0;
        }
        used += bytes;
        pending.push(child);
    }
    sink(&encode(tree, &pending, numbers))
}

fn encode(tree: &Tree, children: &[Child<'_>], numbers: &[u32]) -> Vec<u8> {
    let mut block = Vec::with_capacity(BLOCK_BYTES as usize);
    let mut name_offset = RECORD_BYTES * children.len();
    for Child { name, node } in children {
        let number = numbers.get(node.0 as usize).copied().unwrap_or(0);
        block.extend(u64::from(number).to_le_bytes());
        // A block has 512 bytes.
        block.extend((name_offset as u16).to_le_bytes());
        block.extend([tree.node(*node).map_or(0, |node| file_type(node.kind())), 0]);
        name_offset += name.len();
    }
    children.iter().for_each(|child| block.extend(child.name));
    block
}

/// The kind of a file as directories state it.
const fn file_type(kind: NodeKind) -> u8 {
    match kind {
        NodeKind::Regular => 1,
        NodeKind::Directory => 2,
        NodeKind::CharDevice | NodeKind::Whiteout => 3,
        NodeKind::BlockDevice => 4,
        NodeKind::Fifo => 5,
        NodeKind::Symlink => 7,
        NodeKind::ForeignLink => 0,
    }
}
