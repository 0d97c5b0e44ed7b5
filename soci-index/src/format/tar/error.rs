//! What can be wrong with a tar.

#[cfg(doc)]
use crate::format::limits::Limits;

/// Why a stream is not a tar that we can read. Offsets are into the uncompressed layer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TarError {
    /// A header block with a field that cannot be read, its checksum included.
    #[error("not tar: the header at offset {offset} has an invalid {field}")]
    Header {
        /// Where the block begins.
        offset: u64,
        /// Which field.
        field: &'static str,
    },
    /// An extended header whose content is malformed.
    #[error("the extended tar header at offset {offset} is malformed")]
    Extended {
        /// Where its header block begins.
        offset: u64,
    },
    /// A sparse map that is malformed or does not fit the file.
    #[error("the sparse file {name:?} at offset {offset} has an invalid map")]
    Sparse {
        /// Where its header block begins.
        offset: u64,
        /// The file.
        name: String,
    },
    /// One zero block, then something else: some readers would stop here and others go on.
    #[error("a single zero block at offset {offset} is followed by data")]
    LoneZeroBlock {
        /// Where the zero block begins.
        offset: u64,
    },
    /// An entry type that no runtime unpacks.
    #[error("the tar entry {name:?} at offset {offset} has the unsupported type {kind:?}")]
    UnsupportedType {
        /// Where its header block begins.
        offset: u64,
        /// The file.
        name: String,
        /// The type flag.
        kind: char,
    },
    /// The stream ends within an entry.
    #[error("the tar stream is cut off at offset {offset}, inside {inside}")]
    Truncated {
        /// Its length.
        offset: u64,
        /// What was being read.
        inside: &'static str,
    },
    /// A cap of [`Limits`] is passed.
    #[error("the tar header at offset {offset} passes the limit {limit} ({cap})")]
    Limit {
        /// Where.
        offset: u64,
        /// Which cap.
        limit: &'static str,
        /// Its value.
        cap: u64,
    },
}
