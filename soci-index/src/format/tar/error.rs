//! What can be wrong with a tar.

use crate::format::class::{Class, Classified};
#[cfg(doc)]
use crate::format::limits::Limits;

/// Why a stream is not a tar that we can read. Offsets are into the uncompressed layer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TarError {
    /// A header block with a field that cannot be read, its checksum included.
    #[error("not tar: the header at offset {offset} has an invalid {field}")]
    Header { offset: u64, field: &'static str },
    /// An extended header whose content is malformed.
    #[error("the extended tar header at offset {offset} is malformed")]
    Extended { offset: u64 },
    /// A sparse map that is malformed or does not fit the file.
    #[error("the sparse file {name:?} at offset {offset} has an invalid map")]
    Sparse { offset: u64, name: String },
    /// One zero block, then something else: some readers would stop here and others go on.
    #[error("a single zero block at offset {offset} is followed by data")]
    LoneZeroBlock { offset: u64 },
    /// An entry type that no runtime unpacks.
    #[error("the tar entry {name:?} at offset {offset} has the unsupported type {kind:?}")]
    UnsupportedType { offset: u64, name: String, kind: char },
    /// The stream ends within an entry.
    #[error("the tar stream is cut off at offset {offset}, inside {inside}")]
    Truncated { offset: u64, inside: &'static str },
    /// A cap of [`Limits`] is passed.
    #[error("the tar header at offset {offset} passes the limit {limit} ({cap})")]
    Limit { offset: u64, limit: &'static str, cap: u64 },
}

impl Classified for TarError {
    fn class(&self) -> Class {
        Class::Content
    }
}
