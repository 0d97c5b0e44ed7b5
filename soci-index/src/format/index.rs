//! The index of one layer as a reader uses it: file table, spans and windows, checked as a whole.
//!
//! This is the meeting point of the formats. A zTOC becomes a [`LayerIndex`]
//! ([`crate::format::ztoc::Ztoc::into_index`]), the room `indexing` makes one straight from a layer, and our own
//! [`crate::format::compact`] form decodes to the same. A file reader needs nothing else, except windows that are kept
//! elsewhere. Invariants: the span table covers the uncompressed layer without a gap; every entry's header and data lie
//! inside it, headers in order; there is one window per span.

use crate::format::checkpoint::Window;
use crate::format::entry::Entry;
use crate::format::span::{SpanId, SpanTable};

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
    pub spans: SpanTable,
    /// The decoder's history at the start of each span.
    pub windows: Windows,
}

/// The windows of a layer's spans, in their order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Windows {
    /// They are here.
    Held(Vec<Window>),
    /// They are in a separate blob; the window of a span is fetched when the span is decoded.
    Placed(Vec<WindowPlace>),
}

/// Where a window stands in the blob of windows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WindowPlace {
    /// Its first byte.
    pub offset: u64,
    /// How many bytes it has; 0 for a window of zeros, which stands nowhere.
    pub length: u32,
    /// SHA-256 of these bytes.
    pub digest: [u8; 32],
}

impl Windows {
    /// How many there are.
    #[must_use]
    pub const fn len(&self) -> usize {
        match self {
            Self::Held(windows) => windows.len(),
            Self::Placed(places) => places.len(),
        }
    }

    /// Whether there is none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl LayerIndex {
    /// The history that decoding of `span` starts from; empty history for a span that does not exist. `None` when it
    /// has to be fetched: see [`LayerIndex::window_place`].
    #[must_use]
    pub fn window(&self, span: SpanId) -> Option<&Window> {
        match &self.windows {
            Windows::Held(windows) => Some(windows.get(span as usize).unwrap_or(&Window::EMPTY)),
            Windows::Placed(_) => self.window_place(span).is_none().then_some(&Window::EMPTY),
        }
    }

    /// Where the history of `span` has to be fetched from; `None` when that is not needed.
    #[must_use]
    pub fn window_place(&self, span: SpanId) -> Option<&WindowPlace> {
        match &self.windows {
            Windows::Held(_) => None,
            Windows::Placed(places) => places.get(span as usize).filter(|place| place.length > 0),
        }
    }
}
