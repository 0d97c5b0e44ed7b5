//! The index of one layer as a reader uses it: file table, spans and windows, checked as a whole.
//!
//! This is the meeting point of the formats. A zTOC becomes a [`LayerIndex`] ([`crate::ztoc::Ztoc::into_index`]), the
//! [`crate::indexer`] makes one straight from a layer, and any later format decodes to the same. Whoever reads files
//! needs nothing else. Invariants: the span table covers the uncompressed layer without a gap; every entry's header and
//! data lie inside it, headers in order; there is one window per span.

use crate::checkpoint::Window;
use crate::entry::Entry;
use crate::span::{SpanId, SpanTable};

/// How a layer is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Compression {
    /// gzip, of any number of members.
    Gzip,
    /// Not at all: a plain tar. Spans are then equal pieces, and compressed and uncompressed offsets agree.
    None,
}

/// Everything that is needed to read any range of any file of one layer.
#[derive(Debug, Clone)]
pub struct LayerIndex {
    /// How the layer is compressed.
    pub compression: Compression,
    /// Size of the layer blob in bytes.
    pub compressed_size: u64,
    /// Size in bytes of the uncompressed layer as far as it is indexed: up to where the tar ends. Padding behind the
    /// end of the tar may be missing here, as it is in a zTOC.
    pub uncompressed_size: u64,
    /// The entries in tar order.
    pub entries: Vec<Entry>,
    /// The spans.
    pub spans: SpanTable,
    /// The decoder's history at the start of each span.
    pub windows: Vec<Window>,
}

impl LayerIndex {
    /// The history that decoding of `span` starts from; empty history for a span that does not exist.
    #[must_use]
    pub fn window(&self, span: SpanId) -> &Window {
        self.windows.get(span as usize).unwrap_or(&Window::EMPTY)
    }
}
