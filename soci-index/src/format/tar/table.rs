//! What is found in a tar.

use crate::format::entry::Entry;

/// Something in a layer that a zTOC has no way to say.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} at offset {offset} of the uncompressed layer cannot be represented in a zTOC")]
pub struct Obstacle {
    /// What it is, with the name of the entry.
    pub what: String,
    /// Where its header block begins.
    pub offset: u64,
}

/// The file table of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// The entries, in tar order.
    pub entries: Vec<Entry>,
    /// Where the tar ends: behind its two zero blocks, or wherever the stream stopped. Padding is not counted.
    pub end: u64,
    /// The first thing that a zTOC could not say, if there is one.
    pub obstacle: Option<Obstacle>,
}
