//! Inodes of 64 bytes, and what follows each: attributes, then the places of the file's chunks or the end of its data.

use crate::tree::NodeKind;
use crate::tree::attributes::Attributes;
use crate::tree::device::{BLOCK_BYTES, Chunks};
use crate::tree::erofs::xattr::XattrBody;

/// Inodes begin at multiples of this many bytes, which inode numbers count.
pub(super) const ALIGNMENT: u64 = 32;

const INODE_BYTES: usize = 64;

/// Size of a chunk's place, and of what it is aligned to.
const CHUNK_BYTES: usize = 8;

/// The place of a chunk of zeros.
const HOLE: u32 = u32::MAX;

/// Inodes have 64 bytes.
const EXTENDED: u16 = 1;

/// Places of chunks have 8 bytes, with the number of a device.
const CHUNK_INDEXES: u16 = 0x20;

/// Where a file's bytes are.
#[derive(Debug)]
pub(super) enum Content<'e> {
    /// It has none.
    Nothing,
    /// In a device: the one with this number, from 1.
    Chunks { chunks: Chunks<'e>, device: u16 },
    /// In the image: so many bytes.
    Data { bytes: u64 },
}

/// An inode with all that follows it, before it has a place.
#[derive(Debug)]
pub(super) struct Inode<'e> {
    pub(super) attributes: Attributes,
    pub(super) xattrs: XattrBody<'e>,
    pub(super) content: Content<'e>,
}

impl Inode<'_> {
    /// Where it begins if there is room from `position` on: an inode with data in it lies within one block.
    pub(super) fn place(&self, position: u64) -> u64 {
        let start = position.next_multiple_of(ALIGNMENT);
        let end = start + self.bytes();
        let crosses = start / BLOCK_BYTES != (end - 1) / BLOCK_BYTES;
        if crosses && self.inline_bytes() > 0 { start.next_multiple_of(BLOCK_BYTES) } else { start }
    }

    /// Bytes of it and of what follows it.
    pub(super) fn bytes(&self) -> u64 {
        let head = self.head_bytes();
        match &self.content {
            Content::Nothing => head,
            Content::Chunks { chunks, .. } => {
                head.next_multiple_of(CHUNK_BYTES as u64) + CHUNK_BYTES as u64 * u64::from(chunks.chunk_count())
            }
            Content::Data { .. } => head + self.inline_bytes(),
        }
    }

    /// How many bytes at the end of the data stand behind the inode: all that do not fill a block, if there is room for
    /// them in the inode's block.
    pub(super) fn inline_bytes(&self) -> u64 {
        match self.content {
            Content::Data { bytes } if self.head_bytes() + bytes % BLOCK_BYTES <= BLOCK_BYTES => bytes % BLOCK_BYTES,
            Content::Data { .. } | Content::Nothing | Content::Chunks { .. } => 0,
        }
    }

    /// Blocks of its data outside of the inode.
    pub(super) fn data_blocks(&self) -> u64 {
        match self.content {
            Content::Data { bytes } => (bytes - self.inline_bytes()).div_ceil(BLOCK_BYTES),
            Content::Nothing | Content::Chunks { .. } => 0,
        }
    }

    /// Encodes it and its attributes and chunks, not its data, which `data_address` says the place of: a block of the
    /// image.
    pub(super) fn encode(&self, data_address: u32) -> Vec<u8> {
        let Attributes { inode, kind, permissions, uid, gid, modified, links, device, .. } = self.attributes;
        let (layout, size, place) = match &self.content {
            Content::Nothing => (0, 0, device),
            Content::Chunks { chunks, .. } => {
                (4, self.attributes.size, u32::from(CHUNK_INDEXES | u16::from(chunks.bits())))
            }
            Content::Data { bytes } => {
                let place = if self.data_blocks() > 0 { data_address } else { 0 };
                (if self.inline_bytes() > 0 { 2 } else { 0 }, *bytes, place)
            }
        };
        let mut bytes = Vec::with_capacity(2 * INODE_BYTES);
        bytes.extend((EXTENDED | layout << 1).to_le_bytes());
        bytes.extend(self.xattrs.units().to_le_bytes());
        bytes.extend((format_bits(kind) | permissions).to_le_bytes());
        bytes.extend([0; 2]);
        bytes.extend(size.to_le_bytes());
        bytes.extend(place.to_le_bytes());
        // For programs that know inode numbers of 32 bits only.
        bytes.extend((inode as u32).to_le_bytes());
        bytes.extend(uid.to_le_bytes());
        bytes.extend(gid.to_le_bytes());
        bytes.extend(modified.seconds.to_le_bytes());
        bytes.extend(modified.nanoseconds.min(999_999_999).to_le_bytes());
        bytes.extend(links.to_le_bytes());
        bytes.resize(INODE_BYTES, 0);
        self.xattrs.encode(&mut bytes);
        if let Content::Chunks { chunks, device } = &self.content {
            bytes.resize(bytes.len().next_multiple_of(CHUNK_BYTES), 0);
            for start in chunks.clone() {
                bytes.extend([0; 2]);
                bytes.extend(if start.is_some() { *device } else { 0 }.to_le_bytes());
                bytes.extend(start.unwrap_or(HOLE).to_le_bytes());
            }
        }
        bytes
    }

    fn head_bytes(&self) -> u64 {
        (INODE_BYTES + self.xattrs.bytes()) as u64
    }
}

/// The kind of a file as modes state it.
const fn format_bits(kind: NodeKind) -> u16 {
    match kind {
        NodeKind::Regular | NodeKind::ForeignLink => 0o100_000,
        NodeKind::Directory => 0o040_000,
        NodeKind::Symlink => 0o120_000,
        NodeKind::CharDevice | NodeKind::Whiteout => 0o020_000,
        NodeKind::BlockDevice => 0o060_000,
        NodeKind::Fifo => 0o010_000,
    }
}
