//! Writes a tree as an EROFS image that has names and attributes but no contents: those are in devices beside it.
//!
//! The kernel mounts the image with one extra device per layer ([`crate::tree::device`]) and answers lookups, `stat`,
//! `readdir`, `readlink` and `getxattr` by itself; the bytes of a regular file are chunks of its layer's device. The
//! format is that of <https://docs.kernel.org/filesystems/erofs.html> and `fs/erofs/erofs_fs.h` of Linux: blocks of 512
//! bytes, which make every offset of a tar a block address, inodes of 64 bytes, chunk-based files, a device table
//! (Linux 5.16). No crate writes that: `composefs` has blocks of 4096 bytes and no devices, `erofs-rs` only reads.
//!
//! What is shown is what FUSE shows ([`Attributes::of_node`], [`xattrs`]): with overlayfs above, white-outs are character
//! devices 0:0 and opaque directories have an attribute. Only images that were written here may be mounted: to the
//! kernel an image from elsewhere is an attack surface.
//!
//! The image in its order, each part beginning at a block: superblock and device table; shared attributes; inodes, the
//! root first, each with its attributes and the places of its chunks, and with its data if these are short; data of
//! long directories and links. Invariants: the same tree, layers and devices give the same bytes; the output is
//! sequential; memory is 4 bytes per node, the attributes that differ, and one inode; no inode number is 0, which
//! programs take for a deleted name.

use std::io;

use soci_index::format::class::{Class, Classified};
use soci_index::format::entry::Entry;

use crate::tree::attributes::{Attributes, xattrs};
use crate::tree::device::{BLOCK_BITS, BLOCK_BYTES, DeviceMap};
use crate::tree::erofs::inode::{ALIGNMENT, Content, Inode};
use crate::tree::erofs::output::Output;
use crate::tree::erofs::superblock::{SUPERBLOCK_OFFSET, Superblock};
use crate::tree::erofs::xattr::{SharedXattrs, Xattr};
use crate::tree::{Node, NodeKind, NodeNumber, Tree};

mod directory;
mod inode;
mod output;
mod superblock;
#[cfg(test)]
mod tests;
mod xattr;

/// A layer that a tree was made of.
#[derive(Debug, Clone, Copy)]
pub struct Layer<'a> {
    /// Its file table.
    pub entries: &'a [Entry],
    /// Its device, made of the same entries.
    pub device: &'a DeviceMap,
}

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Summary {
    /// Size of the image: a multiple of 512.
    pub bytes: u64,
    /// Number of inodes: files and directories, hard links counted once.
    pub inodes: u64,
    /// Extended attributes that are not in the image: Linux cannot have them on such a file (another name space than
    /// `user.`, `trusted.`, `security.` or that of access control lists, a malformed list, a value of more than 65,535
    /// bytes), or the file has more than the format holds.
    pub xattrs_left_out: u64,
}

/// Why no image was written, or not all of it.
#[derive(Debug, thiserror::Error)]
pub enum ErofsError {
    /// More layers than 16 bits can number.
    #[error("{layers} layers are more than the {limit} devices that an image can have")]
    TooManyLayers { layers: usize, limit: u16 },
    /// The image has more blocks or inodes than 32 bits can address.
    #[error("the image has more than {limit} blocks or inode addresses")]
    TooLarge { limit: u32 },
    /// The tree names an entry that the layers do not have: it was not made of them.
    #[error("layer {layer} has no entry {entry} for the file tree")]
    NoEntry { layer: u16, entry: u32 },
    /// The tree has a regular file where the layer's device has none.
    #[error("entry {entry} of layer {layer} has no place in the layer's device")]
    NoPlace { layer: u16, entry: u32 },
    /// The output failed.
    #[error("cannot write the image")]
    Write(#[from] io::Error),
}

impl Classified for ErofsError {
    fn class(&self) -> Class {
        match self {
            Self::TooManyLayers { .. } | Self::TooLarge { .. } => Class::Content,
            Self::NoEntry { .. } | Self::NoPlace { .. } => Class::Other,
            Self::Write(_) => Class::Local,
        }
    }
}

const fn too_large() -> ErofsError {
    ErofsError::TooLarge { limit: u32::MAX }
}

fn no_entry(node: &Node) -> ErofsError {
    ErofsError::NoEntry { layer: node.layer(), entry: node.entry().unwrap_or(u32::MAX) }
}

/// Writes the image of `tree`, which was made of `layers`, the lowest first. The device of a node's layer has the
/// number [`Node::layer`] + 1. With `opaque`, the image is a layer of an overlayfs that marks opaque directories by the
/// attribute of this name, and the layers' own attributes for overlayfs are hidden.
///
/// # Errors
/// [`ErofsError`]; what was written until then is no image.
pub fn write(
    tree: &Tree,
    layers: &[Layer<'_>],
    opaque: Option<&[u8]>,
    out: &mut impl io::Write,
) -> Result<Summary, ErofsError> {
    let limit = u16::MAX;
    let devices = u16::try_from(layers.len()).map_err(|_| ErofsError::TooManyLayers { layers: layers.len(), limit })?;
    let input = Input { tree, layers, opaque };
    let (shared, unknown) = input.shared_xattrs()?;
    let plan = Plan::new(&input, &shared, devices)?;
    let mut output = Output::new(out);
    plan.write_head(layers, &shared, &mut output)?;
    plan.write_inodes(&input, &shared, &mut output)?;
    plan.write_data(&input, &shared, &mut output)?;
    output.flush()?;
    let bytes = u64::from(plan.superblock.blocks) * BLOCK_BYTES;
    Ok(Summary { bytes, inodes: plan.superblock.inodes, xattrs_left_out: unknown + plan.left_out })
}

/// What an image is made of.
struct Input<'a> {
    tree: &'a Tree,
    layers: &'a [Layer<'a>],
    opaque: Option<&'a [u8]>,
}

impl<'a> Input<'a> {
    /// The nodes that are shown, in the order of their numbers: the root first.
    fn nodes(&self) -> impl Iterator<Item = (NodeNumber, &'a Node)> + use<'a> {
        let nodes = (0_u32..).map(NodeNumber).zip(self.tree.nodes());
        nodes.filter(|(_, node)| node.kind() != NodeKind::ForeignLink)
    }

    fn entry(&self, layer: u16, entry: u32) -> Option<&'a Entry> {
        self.layers.get(usize::from(layer))?.entries.get(entry as usize)
    }

    /// The entry that describes a node, if one does.
    fn own_entry(&self, node: &Node) -> Result<Option<&'a Entry>, ErofsError> {
        let Some(entry) = node.entry() else { return Ok(None) };
        self.entry(node.layer(), entry).map(Some).ok_or_else(|| no_entry(node))
    }

    /// A node's attributes, each `None` that Linux cannot have.
    fn xattrs(&self, node: &Node) -> Result<impl Iterator<Item = Option<Xattr<'a>>> + use<'a>, ErofsError> {
        let kind = node.kind();
        let shown = xattrs(node, self.own_entry(node)?, self.opaque);
        Ok(shown.map(move |(name, value)| Xattr::new(kind, name, value)))
    }

    /// What is shared, and how many attributes Linux cannot have.
    fn shared_xattrs(&self) -> Result<(SharedXattrs<'a>, u64), ErofsError> {
        let (mut shared, mut unknown) = (SharedXattrs::default(), 0);
        for (_, node) in self.nodes() {
            let known = self.xattrs(node)?.filter_map(|xattr| {
                unknown += u64::from(xattr.is_none());
                xattr
            });
            shared.note(known)?;
        }
        shared.finish();
        Ok((shared, unknown))
    }

    fn inode(&self, number: NodeNumber, node: &Node, shared: &SharedXattrs<'a>) -> Result<Inode<'a>, ErofsError> {
        // A number of its own for each node, from 1.
        let inode = u64::from(number.0) + 1;
        let attributes = Attributes::of_node(inode, self.tree, number, |layer, entry| self.entry(layer, entry));
        let attributes = attributes.ok_or_else(|| no_entry(node))?;
        let content = self.content(number, node, attributes.size)?;
        Ok(Inode { attributes, xattrs: shared.body(self.xattrs(node)?.flatten()), content })
    }

    /// Where a file of `size` bytes has them.
    fn content(&self, number: NodeNumber, node: &Node, size: u64) -> Result<Content<'a>, ErofsError> {
        Ok(match node.kind() {
            NodeKind::Directory => Content::Data { bytes: directory::size(self.tree, number) },
            NodeKind::Symlink => Content::Data { bytes: size },
            NodeKind::Regular if size > 0 => {
                let (Some(layer), Some(entry)) = (self.layers.get(usize::from(node.layer())), node.entry()) else {
                    return Err(no_entry(node));
                };
                let chunks = layer.device.chunks(layer.entries, entry);
                let chunks = chunks.ok_or(ErofsError::NoPlace { layer: node.layer(), entry })?;
                // `write` bounds the number of layers.
                Content::Chunks { chunks, device: node.layer() + 1 }
            }
            NodeKind::Regular
            | NodeKind::CharDevice
            | NodeKind::BlockDevice
            | NodeKind::Fifo
            | NodeKind::Whiteout
            | NodeKind::ForeignLink => Content::Nothing,
        })
    }

    /// Gives a directory's or a link's data to `sink`, block by block, the last one as far as it is used.
    fn data(
        &self,
        number: NodeNumber,
        node: &Node,
        numbers: &[u32],
        mut sink: impl FnMut(&[u8]) -> Result<(), ErofsError>,
    ) -> Result<(), ErofsError> {
        if node.kind() == NodeKind::Directory {
            return directory::blocks(self.tree, number, numbers, sink);
        }
        let target = self.own_entry(node)?.map_or(&[][..], |entry| &entry.link);
        target.chunks(BLOCK_BYTES as usize).try_for_each(&mut sink)
    }
}

/// Where everything stands in an image.
struct Plan {
    superblock: Superblock,
    /// Inode numbers, by node; 0 for a node that is not shown.
    numbers: Vec<u32>,
    /// The first block behind the inodes.
    data_address: u32,
    /// Attributes for which inodes have no room.
    left_out: u64,
}

impl Plan {
    fn new<'a>(input: &Input<'a>, shared: &SharedXattrs<'a>, devices: u16) -> Result<Self, ErofsError> {
        let xattr_block = (SUPERBLOCK_OFFSET + superblock::length(devices)).div_ceil(BLOCK_BYTES);
        let inode_block = xattr_block + shared.bytes().div_ceil(BLOCK_BYTES);
        // Inode numbers count from the block before the first inode, so that none is 0.
        let base = (inode_block - 1) * BLOCK_BYTES;
        let mut numbers = vec![0; input.tree.len()];
        let (mut position, mut data_blocks, mut inodes, mut left_out) = (inode_block * BLOCK_BYTES, 0, 0, 0);
        for (number, node) in input.nodes() {
            let inode = input.inode(number, node, shared)?;
            let start = inode.place(position);
            let place = u32::try_from((start - base) / ALIGNMENT).map_err(|_| too_large())?;
            numbers[number.0 as usize] = place;
            position = start + inode.bytes();
            data_blocks += inode.data_blocks();
            inodes += 1;
            left_out += inode.xattrs.left_out;
        }
        let data_block = position.div_ceil(BLOCK_BYTES);
        let counted = |blocks: u64| u32::try_from(blocks).map_err(|_| too_large());
        let root = u16::try_from(numbers.first().copied().unwrap_or(0)).map_err(|_| too_large())?;
        let superblock = Superblock {
            blocks: counted(data_block + data_blocks)?,
            inodes,
            root,
            inode_address: counted(inode_block - 1)?,
            xattr_address: counted(xattr_block)?,
            devices,
        };
        Ok(Self { superblock, numbers, data_address: counted(data_block)?, left_out })
    }

    fn write_head(
        &self,
        layers: &[Layer<'_>],
        shared: &SharedXattrs<'_>,
        output: &mut Output<'_, impl io::Write>,
    ) -> Result<(), ErofsError> {
        output.pad_to(SUPERBLOCK_OFFSET)?;
        let device_blocks = layers.iter().map(|layer| layer.device.blocks());
        output.put(&superblock::encode(&self.superblock, BLOCK_BITS, device_blocks))?;
        output.pad_block()?;
        shared.encoded().try_for_each(|xattr| output.put(&xattr))?;
        output.pad_block()?;
        Ok(())
    }

    fn write_inodes<'a>(
        &self,
        input: &Input<'a>,
        shared: &SharedXattrs<'a>,
        output: &mut Output<'_, impl io::Write>,
    ) -> Result<(), ErofsError> {
        let base = u64::from(self.superblock.inode_address) * BLOCK_BYTES;
        let mut data_address = self.data_address;
        for (number, node) in input.nodes() {
            let inode = input.inode(number, node, shared)?;
            let place = self.numbers.get(number.0 as usize).copied().unwrap_or(0);
            output.pad_to(base + u64::from(place) * ALIGNMENT)?;
            output.put(&inode.encode(data_address))?;
            // The plan has counted them all.
            data_address = data_address.saturating_add(u32::try_from(inode.data_blocks()).unwrap_or(u32::MAX));
            if inode.inline_bytes() > 0 {
                let mut last = Vec::new();
                input.data(number, node, &self.numbers, |block| {
                    last = block.to_vec();
                    Ok(())
                })?;
                output.put(&last)?;
            }
        }
        output.pad_block()?;
        Ok(())
    }

    fn write_data<'a>(
        &self,
        input: &Input<'a>,
        shared: &SharedXattrs<'a>,
        output: &mut Output<'_, impl io::Write>,
    ) -> Result<(), ErofsError> {
        for (number, node) in input.nodes() {
            if !matches!(node.kind(), NodeKind::Directory | NodeKind::Symlink) {
                continue;
            }
            let mut blocks = input.inode(number, node, shared)?.data_blocks();
            if blocks == 0 {
                continue;
            }
            // The last block may stand in the inode.
            input.data(number, node, &self.numbers, |block| {
                if blocks > 0 {
                    blocks -= 1;
                    output.put(block)?;
                    output.pad_block()?;
                }
                Ok(())
            })?;
        }
        Ok(())
    }
}
