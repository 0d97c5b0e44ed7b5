//! Reads any range of a layer: from the store where it is present, else by fetching and decoding the spans that hold
//! it.
//!
//! Each span is fetched by one *flight* (single-flight), however many readers wait for it; adjacent absent spans share
//! a request. A flight is a task of its own: a reader that gives up does not take it down, so the next try finds the
//! bytes. Bytes are decoded on the blocking pool and are not used before the decoder has verified digest and length,
//! and before the header of the file they belong to has been compared with the index.
//!
//! Invariants: no lock is held while waiting for anything; every wait has an end, after which there is a typed error; a
//! source's mistake costs one more fetch, never a wrong byte; a disk that is full or broken costs speed, not
//! correctness, because waiting readers get the decoded bytes from memory.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use soci_index::format::digest::Digest;
use soci_index::format::entry::Entry;
use soci_index::format::index::LayerIndex;
use soci_index::format::span::SpanId;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::layer::incoming::Incoming;
use crate::layer::readahead::ReadAhead;
use crate::layer::source::origins::Origins;
use crate::layer::stages::Stages;
use crate::layer::store::{LayerStore, Reading};

mod ahead;
mod chain;
mod error;
mod file;
mod flight;
mod health;
mod history;
mod line;
mod spare;
mod waits;
mod whole;

pub(crate) use ahead::Listener;
pub use error::{Cause, ReadError};

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

#[derive(Debug, Default)]
struct Counters {
    requests: AtomicU64,
    fetched_bytes: AtomicU64,
    decoded_spans: AtomicU64,
    failures: AtomicU64,
}

/// The file of a read that is of none.
const NO_FILE: Range<u64> = 0..0;

/// How a flight ended for one span; `None` while it is in progress.
type FlightOutcome = Option<Result<Bytes, Cause>>;

/// Reads one layer. Clones share everything.
#[derive(Debug, Clone)]
pub struct LayerReader {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    digest: Digest,
    index: Arc<LayerIndex>,
    store: Arc<LayerStore>,
    source: Origins,
    histories: history::Histories,
    policy: Policy,
    /// Where flights run: reads that are answered at once come from threads that know no runtime.
    runtime: Handle,
    flights: Mutex<HashMap<SpanId, watch::Receiver<FlightOutcome>>>,
    ahead: Mutex<ReadAhead>,
    /// How the line to the source is.
    meter: Mutex<line::Meter>,
    /// Planned prefetches in progress; while there are any, speculation is off.
    planners: AtomicUsize,
    /// File-level prefetches in progress.
    followers: AtomicUsize,
    spare: Mutex<spare::Spare>,
    /// One bit per entry: its header in the layer was compared with the index.
    checked: Box<[AtomicU64]>,
    health: health::Health,
    /// Brings all spans where the source serves no parts.
    pass: whole::Pass,
    /// Held while spans are decoded one after the other.
    chaining: tokio::sync::Mutex<()>,
    counters: Counters,
    /// Where times are noted.
    stages: OnceLock<Arc<Stages>>,
    /// Listeners for reads, and whether there are any.
    listeners: Mutex<Vec<Box<dyn Listener>>>,
    is_heard: AtomicBool,
    /// Something was read.
    is_used: AtomicBool,
    /// A pack that brings bytes of the layer.
    incoming: Mutex<Option<Arc<Incoming>>>,
    /// Reads that wait for the network.
    waits: waits::Waits,
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
        let span_bytes = index.uncompressed_size.checked_div(index.spans.len() as u64).unwrap_or(0).max(1);
        let ahead_spans = u32::try_from(policy.ahead_bytes_max / span_bytes).unwrap_or(u32::MAX);
        let count = store.spans();
        let fetched_mean = index.compressed_size / u64::from(count.max(1));
        let shared = Shared {
            digest,
            checked: index.entries.chunks(64).map(|_| AtomicU64::new(0)).collect(),
            index,
            store,
            source: source.into(),
            histories: history::Histories::new(windows),
            policy,
            runtime: runtime.clone(),
            flights: Mutex::default(),
            ahead: Mutex::new(ReadAhead::new(count, fetched_mean, ahead_spans)),
            meter: Mutex::new(line::Meter::new()),
            planners: AtomicUsize::new(0),
            followers: AtomicUsize::new(0),
            spare: Mutex::new(spare::Spare::new(policy.spare_bytes_max)),
            health: health::Health::default(),
            pass: whole::Pass::default(),
            chaining: tokio::sync::Mutex::default(),
            counters: Counters::default(),
            stages: OnceLock::new(),
            listeners: Mutex::default(),
            is_heard: AtomicBool::new(false),
            is_used: AtomicBool::new(false),
            incoming: Mutex::default(),
            waits: waits::Waits::new(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// The layer's digest.
    #[must_use]
    pub fn digest(&self) -> Digest {
        self.shared.digest
    }

    /// The layer's index.
    #[must_use]
    pub fn index(&self) -> &Arc<LayerIndex> {
        &self.shared.index
    }

    /// Where the layer's bytes are kept.
    #[must_use]
    pub fn store(&self) -> &Arc<LayerStore> {
        &self.shared.store
    }

    /// Where the layer's bytes come from; more origins may be added.
    #[must_use]
    pub fn source(&self) -> &Origins {
        &self.shared.source
    }

    /// Where the windows of its span index come from, if it is read by one.
    #[must_use]
    pub fn windows(&self) -> Option<&Origins> {
        self.shared.histories.source()
    }

    /// What was done so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let counters = &self.shared.counters;
        let (late_reads, waited) = self.shared.waits.so_far();
        Counts {
            requests: counters.requests.load(Ordering::Relaxed),
            fetched_bytes: counters.fetched_bytes.load(Ordering::Relaxed),
            decoded_spans: counters.decoded_spans.load(Ordering::Relaxed),
            failures: counters.failures.load(Ordering::Relaxed),
            late_reads,
            waited,
        }
    }

    /// Has the times of requests for spans noted in `stages`, from now on.
    pub(crate) fn note_times(&self, stages: &Arc<Stages>) {
        // The first that was given stays.
        self.shared.stages.get_or_init(|| Arc::clone(stages));
    }

    /// Counts what came of the layer by another way than reads: as a whole before it could be read, or in a pack.
    pub(crate) fn count_fetched(&self, requests: u64, bytes: u64) {
        let counters = &self.shared.counters;
        counters.requests.fetch_add(requests, Ordering::Relaxed);
        counters.fetched_bytes.fetch_add(bytes, Ordering::Relaxed);
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

    /// Fetches everything that is absent, a few requests at a time.
    ///
    /// # Errors
    /// The first [`ReadError`], which may be that the store did not take a span; what was fetched until then is kept.
    pub async fn complete(&self) -> Result<(), ReadError> {
        self.complete_telling(&watch::Sender::new(0)).await
    }

    /// The same, reporting how many bytes of the uncompressed layer are present from its start on.
    ///
    /// # Errors
    /// As [`LayerReader::complete`].
    pub async fn complete_telling(&self, outcome: &watch::Sender<u64>) -> Result<(), ReadError> {
        let (count, most) = (self.shared.store.spans(), self.shared.policy.request_bytes_max);
        let mut started = 0;
        for span in 0..count {
            // Two requests are always ahead, so that the line is busy while cores decode.
            while started < self.shared.batch_end(span, 2 * most) {
                let next = self.shared.batch_end(started, most);
                self.shared.start_flights(started..next);
                started = next;
            }
            let place = self.shared.index.spans.span(span).map_or(0..0, |span| span.uncompressed.clone());
            let limit = Instant::now() + self.shared.policy.flight_limit;
            let kept = self.outcome(span, limit).await.and_then(|_| self.is_kept(span));
            kept.map_err(|cause| self.failed(Some(span), place.start, cause))?;
            outcome.send_replace(place.end);
        }
        Ok(())
    }

    /// Whether a span that has come is in the store; if not, why.
    fn is_kept(&self, span: SpanId) -> Result<(), Cause> {
        let reason = self.shared.spare.lock().reason().cloned();
        match reason.filter(|_| !self.shared.store.is_present(span)) {
            Some(reason) => Err(Cause::Store(reason)),
            None => Ok(()),
        }
    }

    /// Fetches about `bytes` compressed bytes of what is absent, one span at least, and says how many spans.
    ///
    /// # Errors
    /// The first [`ReadError`]; what was fetched until then is kept.
    pub async fn fetch_some(&self, bytes: u64) -> Result<u32, ReadError> {
        let count = self.shared.store.spans();
        let Some(first) = (0..count).find(|span| !self.shared.store.is_present(*span)) else { return Ok(0) };
        let absent = |span: &SpanId| !self.shared.store.is_present(*span);
        let end = (first..self.shared.batch_end(first, bytes)).take_while(absent).last().map_or(first, |span| span + 1);
        self.fetch_spans(first..end).await?;
        Ok(end - first)
    }

    /// Fetches those of `spans` that are absent.
    ///
    /// # Errors
    /// The first [`ReadError`]; what was fetched until then is kept.
    pub async fn fetch_spans(&self, spans: Range<SpanId>) -> Result<(), ReadError> {
        self.shared.start_flights(spans.clone());
        for span in spans {
            let offset = self.shared.index.spans.span(span).map_or(0, |span| span.uncompressed.start);
            let limit = Instant::now() + self.shared.policy.flight_limit;
            self.outcome(span, limit).await.map_err(|cause| self.failed(Some(span), offset, cause))?;
        }
        Ok(())
    }

    /// Whether something is being fetched.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        !self.shared.flights.lock().is_empty() || self.incoming().is_some()
    }

    fn deadline(&self) -> Instant {
        Instant::now() + self.shared.policy.read_deadline
    }

    /// Fills `buffer` if that is possible at once; does not wait for the network.
    fn try_read_into(&self, offset: u64, buffer: &mut [u8], file: &Range<u64>) -> Result<bool, ReadError> {
        self.in_service(offset)?;
        self.in_range(offset, buffer.len())?;
        let reading = self.shared.store.read(offset, buffer);
        // A store that cannot be read is as good as an empty one.
        let done = matches!(reading, Ok(Reading::Done));
        if done {
            self.notify_listeners(offset, buffer.len());
        }
        if done && self.shared.store.present_bytes() < self.shared.store.size() {
            let spans = self.shared.index.spans.covering(offset..offset + buffer.len() as u64);
            let ahead = self.ahead_of(spans, file, false);
            self.shared.start_flights(ahead.into_iter().flatten());
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
        let late = self.shared.waits.start_read();
        if self.comes_with_pack(offset, buffer, file, deadline).await? {
            return Ok(());
        }
        let end = offset + buffer.len() as u64;
        let spans = self.shared.index.spans.covering(offset..end);
        let foreground = self.foreground(&spans);
        // Requested together, so that adjacent spans share a request; foreground spans go first.
        let ahead = self.ahead_of(spans.clone(), file, foreground.is_unforeseen());
        self.shared.start_flights(spans.clone().chain(ahead.into_iter().flatten()));
        for span in spans {
            let Some(place) = self.shared.index.spans.span(span).map(|span| span.uncompressed.clone()) else {
                continue;
            };
            let part = place.start.max(offset)..place.end.min(end);
            let target = &mut buffer[within(&part, offset)];
            // Mostly once. Again only when the span was evicted between its arrival and this read.
            loop {
                match self.shared.store.read(part.start, target) {
                    Ok(Reading::Done) => break,
                    Ok(Reading::Absent(_)) => {}
                    Err(error) => {
                        tracing::warn!(layer = %self.shared.digest, span, %error, "the store is unreadable; fetching instead");
                        self.shared.store.distrust(span);
                    }
                }
                let outcome = self.outcome(span, deadline).await;
                if let Some(bytes) = outcome.map_err(|cause| self.failed(Some(span), part.start, cause))? {
                    target.copy_from_slice(&bytes[within(&part, place.start)]);
                    break;
                }
                if Instant::now() >= deadline {
                    return Err(self.failed(Some(span), part.start, Cause::Abandoned));
                }
                tokio::task::yield_now().await;
            }
            self.in_service(part.start)?;
        }
        self.notify_listeners(offset, buffer.len());
        let (length, is_new, waited_us) = (buffer.len(), foreground.is_unforeseen(), late.waited().as_micros());
        tracing::debug!(layer = %self.shared.digest, offset, length, ?file, is_new, waited_us, "a read waited");
        Ok(())
    }

    /// Waits for a span's bytes; `None` when the store has them by now.
    async fn outcome(&self, span: SpanId, deadline: Instant) -> Result<Option<Bytes>, Cause> {
        if let Some(bytes) = self.shared.spare.lock().get(span) {
            return Ok(Some(bytes));
        }
        let flight =
            self.shared.start_flights(span..span + 1).or_else(|| self.shared.flights.lock().get(&span).cloned());
        let Some(flight) = flight else {
            return Ok(self.shared.spare.lock().get(span));
        };
        self.shared.outcome(flight, deadline, self.shared.policy.read_deadline).await
    }

    fn in_service(&self, offset: u64) -> Result<(), ReadError> {
        match self.shared.out_of_service() {
            Some(cause) => Err(self.failed(None, offset, cause)),
            None => Ok(()),
        }
    }

    fn in_range(&self, offset: u64, length: usize) -> Result<(), ReadError> {
        let size = self.shared.index.uncompressed_size;
        match offset.checked_add(length as u64) {
            Some(end) if end <= size => Ok(()),
            _ => Err(self.failed(None, offset, Cause::OutOfRange { size })),
        }
    }

    fn failed(&self, span: Option<SpanId>, offset: u64, cause: Cause) -> ReadError {
        let error = ReadError { layer: self.shared.digest, span, offset, file: None, cause };
        self.shared.counters.failures.fetch_add(1, Ordering::Relaxed);
        self.shared.note_error(&error);
        error
    }

    fn entry(&self, number: u32) -> Result<&Entry, ReadError> {
        let size = self.shared.index.uncompressed_size;
        let entry = self.shared.index.entries.get(number as usize);
        entry.ok_or_else(|| self.failed(None, size, Cause::OutOfRange { size }))
    }
}

/// A range of offsets as places in a buffer that begins at `base`.
fn within(range: &Range<u64>, base: u64) -> Range<usize> {
    let place = |offset: u64| usize::try_from(offset - base).expect("a range of a buffer that exists");
    place(range.start)..place(range.end)
}
