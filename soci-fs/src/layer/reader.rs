//! Reads any range of a layer: from the store where it is present, else by fetching and decoding the spans that hold
//! it.
//!
//! A [`LayerReader`] holds the parts together, each of which uses what it owns or is handed: [`Fetching`] brings spans,
//! [`Ahead`] says which of them before they are read, [`Health`] whether anything may be read at all. Bytes are decoded
//! on the blocking pool and are not used before the decoder has verified digest and length, and before the header of
//! the file they belong to has been compared with the index.
//!
//! Invariants: no lock is held while waiting for anything; every wait has an end, after which there is a typed error; a
//! source's mistake costs one more fetch, never a wrong byte; a disk that is full or broken costs speed, not
//! correctness, because waiting readers get the decoded bytes from memory.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant as Clock};

use soci_index::format::digest::Digest;
use soci_index::format::entry::Entry;
use soci_index::format::index::LayerIndex;
use tokio::runtime::Handle;
use tokio::time::Instant;

use crate::layer::readahead::Foresight;
use crate::layer::source::origins::Origins;
use crate::layer::store::{LayerStore, Reading};

mod ahead;
mod error;
mod fetching;
mod file;
mod health;
mod listeners;
mod waits;

pub use ahead::Ahead;
pub(crate) use ahead::Plan;
pub use error::{Cause, ReadError};
pub use fetching::Fetching;
pub use health::Health;
pub(crate) use listeners::Listener;
use listeners::Listeners;
pub(crate) use waits::Waits;

/// How long to wait and how much to ask for at once.
#[derive(Debug, Clone, Copy)]
pub struct Policy {
    /// How long one read may take. Programs cannot be interrupted while they wait for a page, so this is how long a
    /// dead network may freeze one.
    pub read_deadline: Duration,
    /// How long a source may be silent within an answer.
    pub stall_limit: Duration,
    /// How long one request may take in all, however busily its bytes drip.
    pub flight_limit: Duration,
    /// Most compressed bytes in one request.
    pub request_bytes_max: u64,
    /// Most uncompressed bytes to read ahead of a sequential reader.
    pub ahead_bytes_max: u64,
    /// Most bytes of spans to keep in memory when the store does not take them.
    pub spare_bytes_max: usize,
    /// Whether a span is asked for once more when its source has given up. Wrong bytes are always asked for again.
    pub asks_again: bool,
}

impl Default for Policy {
    /// 30 s per read: longer than a registry's fail-over, shorter than a user's patience. Requests of 8 MiB take 70 ms
    /// at 1 Gbit/s, so round trips do not count and a foreground read is not stuck behind more than that.
    fn default() -> Self {
        Self {
            read_deadline: Duration::from_secs(30),
            stall_limit: Duration::from_secs(15),
            flight_limit: Duration::from_secs(120),
            request_bytes_max: 8 << 20,
            ahead_bytes_max: 16 << 20,
            spare_bytes_max: 64 << 20,
            asks_again: true,
        }
    }
}

/// What a reader has done so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Requests to the source.
    pub requests: u64,
    /// Compressed bytes received.
    pub fetched_bytes: u64,
    pub decoded_spans: u64,
    /// Reads that failed.
    pub failures: u64,
    /// Reads whose bytes were not here, and which are over.
    pub late_reads: u64,
    /// How long these waited, together; concurrent reads count individually.
    pub waited: Duration,
}

/// The file of a read that is of none.
const NO_FILE: Range<u64> = 0..0;

/// Reads one layer. Clones share everything.
#[derive(Debug, Clone)]
pub struct LayerReader {
    parts: Arc<Parts>,
}

#[derive(Debug)]
struct Parts {
    index: Arc<LayerIndex>,
    read_deadline: Duration,
    health: Arc<Health>,
    fetching: Arc<Fetching>,
    ahead: Ahead,
    listeners: Listeners,
    waits: Waits,
    headers: file::Headers,
}

impl LayerReader {
    /// A reader of the layer `digest`, whose spans `store` keeps and `source` has. What it starts runs on `runtime`.
    #[must_use]
    pub fn new(
        digest: Digest,
        index: Arc<LayerIndex>,
        store: Arc<LayerStore>,
        source: impl Into<Origins>,
        policy: Policy,
        runtime: &Handle,
    ) -> Self {
        Self::with_windows(digest, index, store, source, None, policy, runtime)
    }

    /// A reader by a span index, whose windows `windows` has.
    #[must_use]
    pub fn with_windows(
        digest: Digest,
        index: Arc<LayerIndex>,
        store: Arc<LayerStore>,
        source: impl Into<Origins>,
        windows: Option<Origins>,
        policy: Policy,
        runtime: &Handle,
    ) -> Self {
        let health = Arc::new(Health::new(digest, Arc::clone(&store), runtime.clone()));
        let origins = (source.into(), windows);
        let fetching = Fetching::new(Arc::clone(&index), origins, policy, runtime, Arc::clone(&health));
        let parts = Parts {
            read_deadline: policy.read_deadline,
            health,
            fetching: Arc::new(fetching),
            ahead: Ahead::new(Arc::clone(&index), store, policy.ahead_bytes_max),
            listeners: Listeners::default(),
            waits: Waits::new(),
            headers: file::Headers::new(index.entries.len()),
            index,
        };
        Self { parts: Arc::new(parts) }
    }

    /// The layer's digest.
    #[must_use]
    pub fn digest(&self) -> Digest {
        self.health().digest()
    }

    /// The layer's index.
    #[must_use]
    pub fn index(&self) -> &Arc<LayerIndex> {
        &self.parts.index
    }

    /// Where the layer's bytes are kept.
    #[must_use]
    pub fn store(&self) -> &Arc<LayerStore> {
        self.health().store()
    }

    /// Whether the layer may be read.
    #[must_use]
    pub fn health(&self) -> &Health {
        &self.parts.health
    }

    /// Where the layer's spans come from.
    #[must_use]
    pub fn fetching(&self) -> &Arc<Fetching> {
        &self.parts.fetching
    }

    /// What is fetched before it is read.
    #[must_use]
    pub fn ahead(&self) -> &Ahead {
        &self.parts.ahead
    }

    /// Reads that wait for the network.
    pub(crate) fn waits(&self) -> &Waits {
        &self.parts.waits
    }

    /// What was done so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let [requests, fetched_bytes, decoded_spans] = self.fetching().so_far();
        let (late_reads, waited) = self.waits().so_far();
        Counts { requests, fetched_bytes, decoded_spans, failures: self.health().failures(), late_reads, waited }
    }

    /// Whether something is being fetched.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.fetching().is_busy() || self.ahead().incoming().is_some()
    }

    /// Whether anything of the layer was read in this process.
    #[must_use]
    pub fn is_used(&self) -> bool {
        self.parts.listeners.is_used()
    }

    /// Notifies `listener` of every read from now on.
    pub(crate) fn listen(&self, listener: Box<dyn Listener>) {
        self.parts.listeners.add(listener);
    }

    /// Disables speculation, as far as `foresight` reaches, while the returned guard is held.
    pub(crate) fn follow_plan(&self, foresight: Foresight) -> Plan {
        Plan::new(self, foresight)
    }

    /// Reads `length` bytes of the uncompressed layer from `offset` on.
    ///
    /// # Errors
    /// [`ReadError`], at the latest after [`Policy::read_deadline`].
    pub async fn read(&self, offset: u64, length: usize) -> Result<Vec<u8>, ReadError> {
        let mut buffer = vec![0; length];
        self.read_into(offset, &mut buffer, &NO_FILE, self.deadline()).await?;
        Ok(buffer)
    }

    /// Bytes of the layer, fetched if need be, for internal use: listeners are not notified.
    pub(crate) async fn peek(&self, bytes: Range<u64>) -> Option<Vec<u8>> {
        let spans = self.index().spans.covering(bytes.clone());
        self.ahead().foresee(spans.clone(), Foresight::Files);
        self.fetching().fetch_spans(spans).await.ok()?;
        let mut buffer = vec![0; usize::try_from(bytes.end.checked_sub(bytes.start)?).ok()?];
        matches!(self.store().read(bytes.start, &mut buffer), Ok(Reading::Done)).then_some(buffer)
    }

    fn deadline(&self) -> Instant {
        Instant::now() + self.parts.read_deadline
    }

    /// Fills `buffer` if that is possible at once; does not wait for the network.
    fn try_read_into(&self, offset: u64, buffer: &mut [u8], file: &Range<u64>) -> Result<bool, ReadError> {
        self.health().in_service(offset)?;
        self.in_range(offset, buffer.len())?;
        let reading = self.store().read(offset, buffer);
        // A store that cannot be read is as good as an empty one.
        let done = matches!(reading, Ok(Reading::Done));
        if done {
            self.parts.listeners.notify(offset, buffer.len());
        }
        if done && self.store().present_bytes() < self.store().size() {
            let spans = self.index().spans.covering(offset..offset + buffer.len() as u64);
            self.fetching().start_flights(self.ahead().of_read(spans, file, false, self.fetching().line()));
        }
        Ok(done)
    }

    async fn read_into(
        &self,
        offset: u64,
        buffer: &mut [u8],
        file: &Range<u64>,
        deadline: Instant,
    ) -> Result<(), ReadError> {
        if self.try_read_into(offset, buffer, file)? {
            return Ok(());
        }
        let late = self.waits().start_read();
        if self.comes_with_pack(offset, buffer, file, deadline).await? {
            return Ok(());
        }
        let end = offset + buffer.len() as u64;
        let spans = self.index().spans.covering(offset..end);
        // Counted among those that wait until it is over.
        let foreground = self.waits().begin(self.fetching().is_any_new(spans.clone()));
        // Requested together, so that adjacent spans share a request; foreground spans go first.
        let ahead = self.ahead().of_read(spans.clone(), file, foreground.is_unforeseen(), self.fetching().line());
        self.fetching().start_flights(spans.clone().chain(ahead));
        let failed = |span, offset, cause| self.health().failed(Some(span), offset, cause);
        for span in spans {
            let Some(place) = self.index().spans.span(span).map(|span| span.uncompressed.clone()) else {
                continue;
            };
            let part = place.start.max(offset)..place.end.min(end);
            let target = &mut buffer[within(&part, offset)];
            // Mostly once. Again only when the span was evicted between its arrival and this read.
            loop {
                match self.store().read(part.start, target) {
                    Ok(Reading::Done) => break,
                    Ok(Reading::Absent(_)) => {}
                    Err(error) => {
                        tracing::warn!(layer = %self.digest(), span, %error, "the store is unreadable; fetching instead");
                        self.store().distrust(span);
                    }
                }
                let outcome = self.fetching().outcome(span, deadline).await;
                if let Some(bytes) = outcome.map_err(|cause| failed(span, part.start, cause))? {
                    target.copy_from_slice(&bytes[within(&part, place.start)]);
                    break;
                }
                if Instant::now() >= deadline {
                    return Err(failed(span, part.start, Cause::Abandoned));
                }
                tokio::task::yield_now().await;
            }
            self.health().in_service(part.start)?;
        }
        self.parts.listeners.notify(offset, buffer.len());
        let (length, is_new, waited_us) = (buffer.len(), foreground.is_unforeseen(), late.waited().as_micros());
        tracing::debug!(layer = %self.digest(), offset, length, ?file, is_new, waited_us, "a read waited");
        Ok(())
    }

    /// Fills `buffer` from what a pack brings, if it will bring that sooner than spans would come.
    async fn comes_with_pack(
        &self,
        offset: u64,
        buffer: &mut [u8],
        file: &Range<u64>,
        deadline: Instant,
    ) -> Result<bool, ReadError> {
        let Some(incoming) = self.ahead().incoming() else { return Ok(false) };
        let bytes = offset..offset + buffer.len() as u64;
        let Some(position) = incoming.position(&bytes) else { return Ok(false) };
        let span_bytes = self.ahead().compressed_bytes(self.index().spans.covering(bytes));
        let mut progress = incoming.progress();
        let start = Instant::now();
        loop {
            let now = *progress.borrow_and_update();
            // What came in the meantime is looked at before anything else is decided.
            if self.try_read_into(offset, buffer, file)? {
                return Ok(true);
            }
            let Some(wait_limit) = now.wait_limit(position, span_bytes, Clock::now()) else { return Ok(false) };
            let limit = (start + wait_limit).min(deadline);
            let changed = tokio::time::timeout_at(limit, progress.changed()).await;
            if !matches!(changed, Ok(Ok(()))) {
                return self.try_read_into(offset, buffer, file);
            }
        }
    }

    fn in_range(&self, offset: u64, length: usize) -> Result<(), ReadError> {
        let size = self.index().uncompressed_size;
        match offset.checked_add(length as u64) {
            Some(end) if end <= size => Ok(()),
            _ => Err(self.health().failed(None, offset, Cause::OutOfRange { size })),
        }
    }

    fn entry(&self, number: u32) -> Result<&Entry, ReadError> {
        let size = self.index().uncompressed_size;
        let entry = self.index().entries.get(number as usize);
        entry.ok_or_else(|| self.health().failed(None, size, Cause::OutOfRange { size }))
    }
}

/// A range of offsets as places in a buffer that begins at `base`.
fn within(range: &Range<u64>, base: u64) -> Range<usize> {
    let place = |offset: u64| usize::try_from(offset - base).expect("a range of a buffer that exists");
    place(range.start)..place(range.end)
}
