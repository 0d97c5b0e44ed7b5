//! Where the bytes of a layer blob come from: the one seam between the network and the logic.
//!
//! A [`Source`] answers one question: give me these bytes of the blob. Everything above it (reader, unpacking, proof) is
//! written against this trait, so it runs the same over a registry, a file, or a test peer that fails on purpose. The
//! answer is a stream, not a buffer, because a reader wants to decode the first span of a range while the last one is
//! still on its way.
//!
//! Invariants: a stream yields the bytes of the range in order, each once, and never more than asked for by an honest
//! source; a reader must nevertheless survive one that is not. Retrying, tokens and mirrors are a source's own business:
//! an error here is final for this range.

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use soci_index::image::store::StoreError;
use soci_index::registry::RegistryError;

pub mod containerd;
pub mod faulty;
pub mod file;
pub mod image;
pub mod memory;
pub mod origins;
pub mod watched;

/// The bytes of one range, as they arrive.
pub type Chunks = BoxStream<'static, Result<Bytes, SourceError>>;

/// One of the places that a source may deliver from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct OriginId(pub(crate) u64);

/// The bytes of one range, and where they come from.
pub struct Delivery {
    /// The bytes.
    pub chunks: Chunks,
    /// Which of several places delivers; `None` for a source that has one.
    pub from: Option<OriginId>,
}

impl fmt::Debug for Delivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Delivery").field("from", &self.from).finish_non_exhaustive()
    }
}

/// Reads ranges of one layer blob.
pub trait Source: fmt::Debug + Send + Sync + 'static {
    /// Asks for the compressed bytes `range`.
    fn read(&self, range: Range<u64>) -> BoxFuture<'_, Result<Chunks, SourceError>>;

    /// The same, with the place that delivers.
    fn fetch(&self, range: Range<u64>) -> BoxFuture<'_, Result<Delivery, SourceError>> {
        async move { Ok(Delivery { chunks: self.read(range).await?, from: None }) }.boxed()
    }

    /// Notes that what a place delivered were not the bytes that were indexed: the next request goes elsewhere if it can.
    fn blame(&self, _from: OriginId) {}

    /// How many places there are to ask.
    fn choices(&self) -> usize {
        1
    }
}

/// Why a source did not deliver.
///
/// Texts are for people: credentials and signed query strings are removed before one is made.
#[derive(Debug, Clone, thiserror::Error)]
pub enum SourceError {
    /// A local file could not be read.
    #[error("cannot read {origin}: {cause}")]
    Local {
        /// The file.
        origin: String,
        /// What the system said.
        cause: Arc<io::Error>,
    },
    /// The range does not lie inside the blob.
    #[error("bytes {start}..{end} lie outside the blob of {size} bytes")]
    OutOfRange {
        /// First byte asked for.
        start: u64,
        /// One past the last byte asked for.
        end: u64,
        /// Size of the blob.
        size: u64,
    },
    /// A registry did not deliver.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// A layout or archive does not have the blob, or not as it should be.
    #[error(transparent)]
    Stored(#[from] StoreError),
    /// Nobody answered, or not in time, or with a failure that may pass.
    #[error("{origin} is unavailable: {what}")]
    Unavailable {
        /// Who was asked.
        origin: String,
        /// What happened.
        what: String,
    },
    /// We may not read the blob.
    #[error("{origin} refuses access: {what}")]
    Denied {
        /// Who was asked.
        origin: String,
        /// What it said.
        what: String,
    },
    /// The blob is not there.
    #[error("{origin} does not have the blob")]
    Missing {
        /// Who was asked.
        origin: String,
    },
    /// The answer had no bytes.
    #[error("the answer was empty")]
    Empty,
    /// No origin delivered.
    #[error("no origin of the blob delivered: {}", causes.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Everywhere {
        /// What each said, in the order in which they were asked.
        causes: Arc<[Self]>,
    },
    /// The answer makes no sense.
    #[error("{origin} answered nonsense: {what}")]
    Protocol {
        /// Who was asked.
        origin: String,
        /// What is wrong with the answer.
        what: String,
    },
}

impl SourceError {
    /// Whether somebody did not let us, which other credentials may change.
    #[must_use]
    pub fn is_refusal(&self) -> bool {
        match self {
            Self::Denied { .. } => true,
            Self::Registry(error) => error.is_refusal(),
            Self::Everywhere { causes } => causes.iter().any(Self::is_refusal),
            Self::Local { .. }
            | Self::Stored(_)
            | Self::OutOfRange { .. }
            | Self::Unavailable { .. }
            | Self::Missing { .. }
            | Self::Empty
            | Self::Protocol { .. } => false,
        }
    }
}
