//! A blob held in memory: for tests, and for layers so small that they came with the manifest.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::{FutureExt as _, StreamExt as _, stream};

use crate::layer::source::{Chunks, Source, SourceError};

/// Bytes of a chunk: about what a TLS record holds.
const CHUNK_BYTES: usize = 16 << 10;

/// A blob in memory. Counts what is asked of it.
#[derive(Debug)]
pub struct MemorySource {
    blob: Bytes,
    requests: AtomicU64,
    requested_bytes: AtomicU64,
}

impl MemorySource {
    #[must_use]
    pub fn new(blob: impl Into<Bytes>) -> Self {
        Self { blob: blob.into(), requests: AtomicU64::new(0), requested_bytes: AtomicU64::new(0) }
    }

    /// How many ranges were asked for.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// How many bytes were asked for.
    #[must_use]
    pub fn requested_bytes(&self) -> u64 {
        self.requested_bytes.load(Ordering::Relaxed)
    }

    fn slice(&self, range: &Range<u64>) -> Option<Bytes> {
        let (start, end) = (usize::try_from(range.start).ok()?, usize::try_from(range.end).ok()?);
        (start <= end && end <= self.blob.len()).then(|| self.blob.slice(start..end))
    }
}

impl Source for MemorySource {
    fn read(&self, range: Range<u64>) -> BoxFuture<'_, Result<Chunks, SourceError>> {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.requested_bytes.fetch_add(range.end.saturating_sub(range.start), Ordering::Relaxed);
        let slice = self.slice(&range);
        let size = self.blob.len() as u64;
        async move {
            let Some(mut rest) = slice else {
                return Err(SourceError::OutOfRange { start: range.start, end: range.end, size });
            };
            let chunks =
                std::iter::from_fn(move || (!rest.is_empty()).then(|| Ok(rest.split_to(CHUNK_BYTES.min(rest.len())))));
            Ok(stream::iter(chunks).boxed())
        }
        .boxed()
    }
}
