//! A source that reports how many bytes pass through it.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use futures_util::future::BoxFuture;
use futures_util::{FutureExt as _, StreamExt as _};

use crate::layer::source::{Chunks, Source, SourceError};

/// Told the length of each piece that comes.
pub type Observer = Arc<dyn Fn(u64) + Send + Sync>;

/// Another source, watched.
pub struct WatchedSource {
    inner: Arc<dyn Source>,
    observer: Observer,
}

impl WatchedSource {
    /// Reports the bytes to `observer`.
    #[must_use]
    pub const fn new(inner: Arc<dyn Source>, observer: Observer) -> Self {
        Self { inner, observer }
    }
}

impl Source for WatchedSource {
    fn read(&self, range: Range<u64>) -> BoxFuture<'_, Result<Chunks, SourceError>> {
        let observer = Arc::clone(&self.observer);
        async move {
            let chunks = self.inner.read(range).await?;
            let count = move |chunk: &Result<bytes::Bytes, SourceError>| {
                if let Ok(chunk) = chunk {
                    observer(chunk.len() as u64);
                }
            };
            Ok(chunks.inspect(count).boxed())
        }
        .boxed()
    }

    fn is_remembered(&self) -> bool {
        self.inner.is_remembered()
    }
}

impl fmt::Debug for WatchedSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}
