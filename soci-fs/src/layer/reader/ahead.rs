//! The reader's side of prefetching: it speculates on the next reads unless a profile is active, notifies listeners of
//! reads, waits for an incoming pack, and reports foreground reads.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant as Clock};

use soci_index::format::span::SpanId;
use tokio::time::Instant;

use crate::layer::incoming::Incoming;
use crate::layer::readahead::{self, Facts, Foresight};
use crate::layer::reader::waits::Foreground;
use crate::layer::reader::{LayerReader, ReadError};
use crate::layer::store::Reading;

/// Hears of every read of a layer that it listens to.
pub(crate) trait Listener: fmt::Debug + Send + Sync {
    /// Called after `length` bytes from `offset` on were read; returns whether to keep this listener. Readers wait for
    /// it.
    fn on_read(&self, offset: u64, length: usize) -> bool;
}

/// Guard: disables speculation while held.
#[derive(Debug)]
pub(crate) struct Plan(LayerReader, Foresight);

impl Drop for Plan {
    fn drop(&mut self) {
        let before = self.0.planners(self.1).fetch_sub(1, Ordering::AcqRel);
        if before == 1 && self.1 == Foresight::Bytes {
            self.0.shared.histories.forget_plans();
        }
    }
}

impl LayerReader {
    /// Notifies `listener` of every read from now on.
    pub(crate) fn listen(&self, listener: Box<dyn Listener>) {
        self.shared.listeners.lock().push(listener);
        self.shared.is_heard.store(true, Ordering::Release);
    }

    /// Registers an incoming pack.
    pub(crate) fn expect(&self, incoming: Arc<Incoming>) {
        *self.shared.incoming.lock() = Some(incoming);
    }

    /// Whether a foreground read waits for bytes that were not in flight before it. Prefetching yields meanwhile.
    #[must_use]
    pub fn is_waited_for(&self) -> bool {
        self.shared.waits.any_unforeseen()
    }

    /// Whether anything of the layer was read in this process.
    #[must_use]
    pub fn is_used(&self) -> bool {
        self.shared.is_used.load(Ordering::Relaxed)
    }

    /// Whether a read waits for the network, or did within the last `time`.
    pub(crate) fn waited_within(&self, time: Duration) -> bool {
        self.shared.waits.any_within(time)
    }

    /// Disables speculation, as far as `foresight` reaches, while the returned guard is held.
    pub(crate) fn follow_plan(&self, foresight: Foresight) -> Plan {
        self.planners(foresight).fetch_add(1, Ordering::AcqRel);
        Plan(self.clone(), foresight)
    }

    fn planners(&self, foresight: Foresight) -> &AtomicUsize {
        match foresight {
            Foresight::Bytes => &self.shared.planners,
            Foresight::Files => &self.shared.followers,
        }
    }

    /// Registers a prefetch of those of `spans` that are absent and not named before; returns their compressed bytes.
    pub(crate) fn foresee(&self, spans: Range<SpanId>, foresight: Foresight) -> u64 {
        let shared = &self.shared;
        let new = shared.ahead.lock().foresee(spans, foresight, &|span| !shared.store.is_present(span));
        let size = |span| shared.index.spans.span(span).map_or(0, |span| span.compressed.end - span.compressed.start);
        new.into_iter().map(size).sum()
    }

    /// Plans these spans as well, so that their windows come in few requests. Plans end with the last profile that is
    /// followed.
    pub fn plan(&self, spans: Range<SpanId>) {
        self.shared.histories.plan(spans);
    }

    /// How the line to the source is.
    pub(crate) fn line(&self) -> readahead::Line {
        self.shared.meter.lock().line()
    }

    /// Compressed bytes, about, that were foreseen: read since, and not read yet.
    pub(crate) fn foreseen_bytes(&self) -> (u64, u64) {
        let counts = self.ahead_counts();
        let mean = self.shared.index.compressed_size / u64::from(self.shared.store.spans().max(1));
        (u64::from(counts.foreseen - counts.foreseen_unread) * mean, u64::from(counts.foreseen_unread) * mean)
    }

    /// Bytes of the layer, fetched if need be, for internal use: listeners are not notified.
    pub(crate) async fn peek(&self, bytes: Range<u64>) -> Option<Vec<u8>> {
        let spans = self.shared.index.spans.covering(bytes.clone());
        self.foresee(spans.clone(), Foresight::Files);
        self.fetch_spans(spans).await.ok()?;
        let mut buffer = vec![0; usize::try_from(bytes.end.checked_sub(bytes.start)?).ok()?];
        matches!(self.shared.store.read(bytes.start, &mut buffer), Ok(Reading::Done)).then_some(buffer)
    }

    /// How far reading ahead was right until now.
    #[must_use]
    pub fn ahead_counts(&self) -> readahead::Counts {
        self.shared.ahead.lock().counts()
    }

    /// Records a read of `spans` of the file in the bytes `file`, and returns what to read ahead.
    pub(super) fn ahead_of(&self, spans: Range<SpanId>, file: &Range<u64>, is_miss: bool) -> Vec<Range<SpanId>> {
        let shared = &self.shared;
        if shared.planners.load(Ordering::Acquire) > 0 || self.incoming().is_some() {
            shared.ahead.lock().note_only(spans);
            return Vec::new();
        }
        let line = shared.meter.lock().line();
        let is_foreseen = shared.followers.load(Ordering::Acquire) > 0;
        let facts = Facts { file: shared.index.spans.covering(file.clone()), is_miss, is_foreseen, line };
        shared.ahead.lock().record_read(spans, &facts, &|span| !shared.store.is_readable(span))
    }

    pub(super) fn notify_listeners(&self, offset: u64, length: usize) {
        self.shared.is_used.store(true, Ordering::Relaxed);
        if !self.shared.is_heard.load(Ordering::Acquire) {
            return;
        }
        let mut listeners = self.shared.listeners.lock();
        listeners.retain(|listener| listener.on_read(offset, length));
        self.shared.is_heard.store(!listeners.is_empty(), Ordering::Release);
    }

    /// The pack that is in flight; one that has ended is forgotten.
    pub(super) fn incoming(&self) -> Option<Arc<Incoming>> {
        let mut incoming = self.shared.incoming.lock();
        if incoming.as_ref().is_some_and(|incoming| !incoming.is_active()) {
            *incoming = None;
        }
        incoming.clone()
    }

    /// Counts a read among those that wait, as a new one if some of its spans are neither here nor in progress.
    pub(super) fn foreground(&self, spans: &Range<SpanId>) -> Foreground<'_> {
        let is_new = {
            let flights = self.shared.flights.lock();
            spans.clone().any(|span| !self.shared.store.is_present(span) && !flights.contains_key(&span))
        };
        self.shared.waits.begin(is_new)
    }

    /// Fills `buffer` from what a pack brings, if it will bring that sooner than spans would come.
    pub(super) async fn comes_with_pack(
        &self,
        offset: u64,
        buffer: &mut [u8],
        file: &Range<u64>,
        deadline: Instant,
    ) -> Result<bool, ReadError> {
        let Some(incoming) = self.incoming() else { return Ok(false) };
        let bytes = offset..offset + buffer.len() as u64;
        let Some(position) = incoming.position(&bytes) else { return Ok(false) };
        let spans = self.shared.index.spans.covering(bytes);
        let compressed =
            |span| self.shared.index.spans.span(span).map_or(0, |span| span.compressed.end - span.compressed.start);
        let span_bytes = spans.map(compressed).sum();
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
}
