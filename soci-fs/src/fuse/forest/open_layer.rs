//! One layer in a forest: its tree as overlayfs wants it.
//!
//! Overlayfs reads a deleted name from a character device 0:0 and an opaque directory from an extended attribute, so
//! that is what the tree's white-outs and marks are shown as. Attributes in overlayfs's own name space that the layer
//! itself carries are not shown: they are instructions to the kernel (take this directory from elsewhere, this file has
//! no data), and a layer has no business to give them.

use std::sync::{Arc, OnceLock};
use std::time::Instant;

use soci_index::format::digest::Digest;

use crate::fuse::device_file::DeviceFile;
use crate::fuse::stack::{Stack, log_skipped};
use crate::fuse::status_file::StatusFile;
use crate::layer::reader::LayerReader;
use crate::layer::stages::Stages;
use crate::tree::device::DeviceError;
use crate::tree::id_map::IdMap;
use crate::tree::{Tree, TreeError};

/// A layer that can answer.
#[derive(Debug)]
pub(super) struct OpenLayer {
    reader: LayerReader,
    files: Stack,
    device: OnceLock<Result<DeviceFile, DeviceError>>,
}

impl OpenLayer {
    /// Builds the layer's tree, and notes how long that took: work for a thread that may be busy for a moment.
    pub(super) fn timed(reader: LayerReader, stages: &Stages) -> Result<Self, TreeError> {
        let start = Instant::now();
        let tree = Tree::of_layer(&reader.index().entries).map(Arc::new);
        stages.tree.record(start.elapsed());
        let tree = tree?;
        if let Some(first) = tree.foreign_links().first() {
            let target = String::from_utf8_lossy(&first.target).into_owned();
            let links = tree.foreign_links().len();
            tracing::warn!(layer = %reader.digest(), links, target, "hard links to files of lower layers are hidden");
        }
        log_skipped(&reader, &tree);
        let files = Stack::new(tree, vec![reader.clone()], StatusFile::of_layer(&reader));
        Ok(Self { reader, files, device: OnceLock::new() })
    }

    pub(super) const fn reader(&self) -> &LayerReader {
        &self.reader
    }

    pub(super) const fn files(&self) -> &Stack {
        &self.files
    }

    /// The layer as one file.
    pub(super) fn device(&self) -> Result<&DeviceFile, DeviceError> {
        self.device.get_or_init(|| DeviceFile::new(self.reader.clone())).as_ref().map_err(|error| *error)
    }
}

/// The generation, which distinguishes one layer in a slot from the next one there, and one mapping of owners from
/// another with the same number: taken from the digest and the mapping, and never 0.
pub(super) fn generation(digest: &Digest, map: Option<&IdMap>) -> u64 {
    let bytes = digest.bytes().iter().take(4).fold(0_u64, |number, byte| number << 8 | u64::from(*byte));
    // Of FNV, which spreads small differences and needs no table.
    let mix = |hash: u64, number: u32| (hash ^ u64::from(number)).wrapping_mul(0x0100_0000_01b3);
    let ranges = map.map(|map| map.uids.iter().chain(&map.gids)).into_iter().flatten();
    let numbers = ranges.flat_map(|range| [range.container, range.host, range.size]);
    let mapping = numbers.fold(0, mix);
    // 31 bits: the kernel keeps it in an `int`.
    ((bytes ^ mapping ^ (mapping >> 31)) & 0x7fff_ffff).max(1)
}
