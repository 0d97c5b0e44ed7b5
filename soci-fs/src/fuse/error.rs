//! Why a question about a file system has no answer.

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use soci_index::format::class::{Class, Classified};
use soci_index::format::digest::Digest;

use crate::layer::reader::ReadError;
use crate::tree::TreeError;
use crate::tree::device::DeviceError;

/// Why a question about a file system has no answer.
///
/// Exhaustive on purpose: [`crate::fuse::errno`] decides about every variant.
#[derive(Debug, Clone, thiserror::Error)]
pub enum FsError {
    /// There is no such name.
    #[error("no such file")]
    NotFound,
    /// The inode number is none of ours.
    #[error("inode {inode} does not exist")]
    NoInode { inode: u64 },
    /// Something other than a directory was to be searched.
    #[error("not a directory")]
    NotDirectory,
    /// A directory was to be read as a file.
    #[error("is a directory")]
    IsDirectory,
    /// Something other than a regular file was to be read.
    #[error("not a regular file")]
    NotRegular,
    /// Something other than a symbolic link was to be read as one.
    #[error("not a symbolic link")]
    NotLink,
    /// There is no such extended attribute.
    #[error("no such extended attribute")]
    NoAttribute,
    /// The bytes could not be obtained.
    #[error(transparent)]
    Read(Box<ReadError>),
    /// The layer was removed.
    #[error("the layer of slot {slot} was removed")]
    NoSlot { slot: u16 },
    /// The mapped view was removed.
    #[error("slot {slot} has no view by id map {id_map}: the map was removed")]
    NoIdMap { id_map: u8, slot: u16 },
    /// The layer cannot be shown as one file.
    #[error("layer {layer} cannot be one file: {cause}")]
    NoDevice { layer: Box<Digest>, cause: DeviceError },
    /// The layer was asked before it was open.
    #[error("the layer of slot {slot} is not open")]
    Closed { slot: u16 },
    /// The layer cannot be opened.
    #[error("cannot open slot {slot}: {cause}")]
    Open { slot: u16, cause: Box<OpenError> },
}

impl Classified for FsError {
    fn class(&self) -> Class {
        match self {
            Self::Read(error) => error.class(),
            Self::NotFound
            | Self::NoInode { .. }
            | Self::NotDirectory
            | Self::IsDirectory
            | Self::NotRegular
            | Self::NotLink
            | Self::NoAttribute
            | Self::NoSlot { .. }
            | Self::NoIdMap { .. }
            | Self::NoDevice { .. }
            | Self::Closed { .. }
            | Self::Open { .. } => Class::Other,
        }
    }
}

impl From<ReadError> for FsError {
    fn from(error: ReadError) -> Self {
        Self::Read(Box::new(error))
    }
}

/// Why the layer of a slot could not be opened.
#[derive(Debug, Clone, thiserror::Error)]
pub enum OpenError {
    /// The opener does not know how to get at the layer.
    #[error("nothing is known of layer {digest}")]
    Unknown { digest: Digest },
    /// The opener failed.
    #[error("layer {digest}: {cause}")]
    Failed { digest: Digest, cause: Arc<dyn Error + Send + Sync> },
    /// The opener gave another layer.
    #[error("layer {expected} was wanted and {found} was opened")]
    Mismatch {
        /// The layer that the slot is for.
        expected: Digest,
        found: Digest,
    },
    /// The layer's files cannot be numbered.
    #[error("layer {digest}: {cause}")]
    Tree { digest: Digest, cause: TreeError },
    /// It took too long.
    #[error("layer {digest} was not open within {} s", limit.as_secs_f32())]
    Deadline { digest: Digest, limit: Duration },
    /// No opener is configured.
    #[error("layer {digest} is not open, and there is no opener")]
    NoOpener { digest: Digest },
    /// The process is shutting down.
    #[error("the opening of layer {digest} was abandoned")]
    Abandoned { digest: Digest },
}

impl Classified for OpenError {
    fn class(&self) -> Class {
        Class::Other
    }
}
