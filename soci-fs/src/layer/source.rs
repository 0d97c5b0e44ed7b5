//! Where the bytes of a layer blob come from: the one seam between the network and the logic.
//!
//! A [`Source`] answers one question: give me these bytes of the blob. Everything above it (reader, unpacking, proof)
//! is written against this trait, so it runs the same over a registry, a file, or a test peer that fails on purpose.
//! The answer is a stream, not a buffer, because a reader wants to decode the first span of a range while the last one
//! is still in flight.
//!
//! Invariants: a stream yields the bytes of the range in order, each once, and never more than asked for by an honest
//! source; a reader must nevertheless survive one that is not. Retrying, tokens and mirrors are a source's own
//! business: an error here is final for this range.

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use futures_util::{FutureExt as _, StreamExt as _};
use soci_index::format::class::{Class, Classified};
use soci_index::image::store::StoreError;
use soci_index::registry::RegistryError;

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
    /// What comes is the whole blob from its first byte, though a part was asked for: the place serves no parts.
    pub is_whole: bool,
}

impl Delivery {
    /// The bytes `range` of it, which is what was asked for.
    #[must_use]
    pub fn part(self, range: Range<u64>) -> Chunks {
        if !self.is_whole {
            return self.chunks;
        }
        let cut = move |at: &mut u64, chunk: Result<Bytes, SourceError>| {
            let start = *at;
            let cut = chunk.map(|chunk| {
                *at += chunk.len() as u64;
                let place = |offset: u64| usize::try_from(offset.clamp(start, *at) - start).unwrap_or(chunk.len());
                chunk.slice(place(range.start)..place(range.end))
            });
            // What lies behind is not waited for.
            std::future::ready((start < range.end).then_some(cut))
        };
        let wanted = |chunk: &Result<Bytes, SourceError>| {
            std::future::ready(chunk.as_ref().map_or(true, |chunk| !chunk.is_empty()))
        };
        self.chunks.scan(0, cut).filter(wanted).boxed()
    }
}

impl fmt::Debug for Delivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Delivery").field("from", &self.from).field("is_whole", &self.is_whole).finish_non_exhaustive()
    }
}

/// Reads ranges of one layer blob.
pub trait Source: fmt::Debug + Send + Sync + 'static {
    /// Asks for the compressed bytes `range`.
    fn read(&self, range: Range<u64>) -> BoxFuture<'_, Result<Chunks, SourceError>>;

    /// The same, with the place that delivers; or the whole blob, where it serves no parts.
    fn fetch(&self, range: Range<u64>) -> BoxFuture<'_, Result<Delivery, SourceError>> {
        async move { Ok(Delivery { chunks: self.read(range).await?, from: None, is_whole: false }) }.boxed()
    }

    /// Records that what a place delivered were not the bytes that were indexed: the next request goes elsewhere if it
    /// can.
    fn blame(&self, _from: OriginId) {}

    /// Whether parts of blobs are known to be served here. Where that is not so, the first answer should be waited for
    /// before more is asked: it may be everything.
    fn serves_parts(&self) -> bool {
        true
    }

    /// Whether this is the image's place, which is known after a restart, too: what is lost of the blob can be obtained
    /// there again.
    fn is_remembered(&self) -> bool {
        true
    }

    /// How many places there are to ask.
    fn choices(&self) -> usize {
        1
    }
}

/// Why a source did not deliver.
///
/// Texts are for display: credentials and signed query strings are removed before one is made.
#[derive(Debug, Clone, thiserror::Error)]
pub enum SourceError {
    /// A local file could not be read.
    #[error("cannot read {origin}: {cause}")]
    Local { origin: String, cause: Arc<io::Error> },
    /// The range does not lie inside the blob.
    #[error("bytes {start}..{end} lie outside the blob of {size} bytes")]
    OutOfRange {
        start: u64,
        /// One past the last byte asked for.
        end: u64,
        size: u64,
    },
    /// A registry did not deliver.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// A layout or archive does not have the blob, or not as it should be.
    #[error(transparent)]
    Stored(#[from] StoreError),
    /// No answer, not in time, or a transient failure.
    #[error("{origin} is unavailable: {what}")]
    Unavailable { origin: String, what: String },
    /// We may not read the blob.
    #[error("{origin} refuses access: {what}")]
    Denied { origin: String, what: String },
    /// The blob is not there.
    #[error("{origin} does not have the blob")]
    Missing { origin: String },
    /// The answer had no bytes.
    #[error("the answer was empty")]
    Empty,
    /// The place serves whole blobs only, and another one may serve parts.
    #[error("it serves no parts of blobs")]
    NoParts,
    /// No origin delivered.
    #[error("no origin of the blob delivered: {}", causes.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Everywhere {
        /// What each said, in the order in which they were asked.
        causes: Arc<[Self]>,
    },
    /// The answer makes no sense.
    #[error("{origin} gave an invalid answer: {what}")]
    Protocol { origin: String, what: String },
}

impl Classified for SourceError {
    fn class(&self) -> Class {
        match self {
            Self::Local { .. } => Class::Local,
            Self::Registry(error) => error.class(),
            Self::Stored(error) => error.class(),
            Self::OutOfRange { .. } => Class::Content,
            Self::Denied { .. } => Class::Credentials,
            // The image's own place is asked first.
            Self::Everywhere { causes } => causes.first().map_or(Class::Registry, Classified::class),
            Self::Unavailable { .. } | Self::Missing { .. } | Self::Empty | Self::NoParts | Self::Protocol { .. } => {
                Class::Registry
            }
        }
    }
}

impl SourceError {
    /// Whether access was denied, which other credentials may change.
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
            | Self::NoParts
            | Self::Protocol { .. } => false,
        }
    }
}
