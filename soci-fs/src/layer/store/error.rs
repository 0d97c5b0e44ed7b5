//! Why the store could not do its work.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use soci_index::format::class::{Class, Classified};

#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// A system call failed.
    #[error("cannot {operation} {}: {cause}", path.display())]
    Io { operation: &'static str, path: PathBuf, cause: Arc<io::Error> },
    /// Another process writes to this root.
    #[error("{} is in use by process {}", path.display(), pid.map_or_else(|| "unknown".to_owned(), |pid| pid.to_string()))]
    Busy {
        path: PathBuf,
        /// The process, if it could write its number down.
        pid: Option<u32>,
    },
    /// A span's bytes are not those that were proven.
    #[error("span {span} of the proven layer {layer} was fetched again with other bytes")]
    Unproven { layer: soci_index::format::digest::Digest, span: u32 },
    /// A span's bytes have another length than its place.
    #[error("span {span} holds {expected} bytes, {found} were given")]
    Length { span: u32, expected: u64, found: u64 },
}

impl Classified for StoreError {
    fn class(&self) -> Class {
        Class::Local
    }
}

/// Names the operation and the file of a failed system call.
pub(super) fn io_error(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    move |cause| StoreError::Io { operation, path: path.to_owned(), cause: Arc::new(cause) }
}
