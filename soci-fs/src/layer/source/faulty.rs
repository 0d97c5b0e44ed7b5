//! A source that misbehaves on purpose: the test peer for everything that reads layers.
//!
//! It stands here and not among the tests because the reader, the mount and the end-to-end tests in other crates all
//! need the same peer. Faults are a queue: the first request meets the first fault, and an empty queue is an honest
//! source again. So a test says exactly which request fails and how.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::future::BoxFuture;
use futures_util::{FutureExt as _, StreamExt as _, stream};
use parking_lot::Mutex;

use crate::layer::source::{Chunks, Source, SourceError};

/// What goes wrong with one request.
#[derive(Debug, Clone)]
pub enum Fault {
    /// Nothing: this request is served well.
    None,
    /// The request is refused.
    Refuse,
    /// The stream ends after so many bytes, without an error.
    Short(usize),
    /// The stream fails after so many bytes.
    Break(usize),
    /// One bit of the byte at this place of the range is wrong.
    Flip(usize),
    /// More bytes than asked for.
    Long(usize),
    /// The answer begins only after this time.
    Delay(Duration),
    /// The answer never comes.
    Hang,
}

/// A source with faults.
#[derive(Debug)]
pub struct FaultySource {
    inner: Arc<dyn Source>,
    faults: Mutex<VecDeque<Fault>>,
    always: Mutex<Fault>,
    requests: AtomicU64,
}

impl FaultySource {
    /// Puts `faults` in front of `inner`, one per request.
    pub fn new(inner: Arc<dyn Source>, faults: impl IntoIterator<Item = Fault>) -> Self {
        Self::and_then_always(inner, faults, Fault::None)
    }

    /// Puts `faults` in front of `inner`, and `always` for every request after them.
    pub fn and_then_always(inner: Arc<dyn Source>, faults: impl IntoIterator<Item = Fault>, always: Fault) -> Self {
        let faults = Mutex::new(faults.into_iter().collect());
        Self { inner, faults, always: Mutex::new(always), requests: AtomicU64::new(0) }
    }

    /// How many ranges were asked for.
    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// From now on there are no faults.
    pub fn heal(&self) {
        self.faults.lock().clear();
        *self.always.lock() = Fault::None;
    }

    fn next(&self) -> Fault {
        self.requests.fetch_add(1, Ordering::Relaxed);
        let queued = self.faults.lock().pop_front();
        queued.unwrap_or_else(|| self.always.lock().clone())
    }
}

impl Source for FaultySource {
    fn read(&self, range: Range<u64>) -> BoxFuture<'_, Result<Chunks, SourceError>> {
        let fault = self.next();
        async move {
            match fault {
                Fault::Refuse => return Err(failure("refused")),
                Fault::Delay(time) => tokio::time::sleep(time).await,
                Fault::Hang => std::future::pending().await,
                Fault::None | Fault::Short(_) | Fault::Break(_) | Fault::Flip(_) | Fault::Long(_) => {}
            }
            let chunks = self.inner.read(range).await?;
            Ok(match fault {
                Fault::Short(at) => rewrite(chunks, move |whole| vec![Ok(whole.slice(..at.min(whole.len())))]).boxed(),
                Fault::Break(at) => {
                    rewrite(chunks, move |whole| vec![Ok(whole.slice(..at.min(whole.len()))), Err(failure("cut"))])
                        .boxed()
                }
                Fault::Flip(at) => rewrite(chunks, move |whole| vec![Ok(flip(&whole, at))]).boxed(),
                Fault::Long(more) => rewrite(chunks, move |whole| vec![Ok(whole), Ok(vec![7; more].into())]).boxed(),
                Fault::None | Fault::Refuse | Fault::Delay(_) | Fault::Hang => chunks,
            })
        }
        .boxed()
    }
}

type ScriptedChunks = Vec<Result<Bytes, SourceError>>;

/// Collects the honest answer and yields what `change` makes of it.
fn rewrite(chunks: Chunks, change: impl FnOnce(Bytes) -> ScriptedChunks + Send + 'static) -> Chunks {
    let collected = async move {
        let mut chunks = chunks;
        let mut whole = BytesMut::new();
        while let Some(chunk) = chunks.next().await {
            match chunk {
                Ok(bytes) => whole.extend_from_slice(&bytes),
                Err(error) => return stream::iter(vec![Err(error)]),
            }
        }
        stream::iter(change(whole.freeze()))
    };
    collected.flatten_stream().boxed()
}

fn flip(whole: &Bytes, at: usize) -> Bytes {
    let mut bytes = whole.to_vec();
    if let Some(byte) = bytes.get_mut(at) {
        *byte ^= 0x10;
    }
    bytes.into()
}

fn failure(what: &str) -> SourceError {
    SourceError::Unavailable { origin: "the faulty source".to_owned(), what: what.to_owned() }
}
