//! A layer whose source serves no parts: one pass over the whole blob brings every span.
//!
//! The first answer that is the whole blob becomes the pass. It runs to the end, whether or not a reader waits: what
//! has passed is in the store, and nothing is transferred twice. A span that is asked for meanwhile waits for the pass
//! to reach it while the pass makes progress; one that the pass has already gone by (it was evicted at once) is fetched
//! by another pass. No window is fetched, since the end of each span is the history of the next.
//!
//! Invariants: one pass per layer at a time; a broken pass is retried a few times and skips what is stored; at its end
//! no reader waits for it.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use soci_index::format::checkpoint::Window;
use soci_index::format::index::Compression;
use soci_index::format::span::SpanId;
use tokio::sync::{MutexGuard, watch};
use tokio::time::{Duration, Instant, timeout, timeout_at};

use crate::layer::budget;
use crate::layer::reader::error::Cause;
use crate::layer::reader::fetching::chain::{Arriving, after};
use crate::layer::reader::fetching::flight::{PendingSpan, span_bytes};
use crate::layer::reader::fetching::{Fetching, FlightOutcome};
use crate::layer::source::origins::Origins;
use crate::layer::source::{Delivery, Source as _};

/// Passes that may break off without having brought a span.
const FRUITLESS_MAX: u32 = 4;
/// The pause before a pass is begun again.
const PAUSE: Duration = Duration::from_millis(500);

/// The pass over a layer, if one is in progress.
#[derive(Debug, Default)]
pub(super) struct Pass {
    state: Mutex<Option<Underway>>,
    /// Held by the request that finds out whether the source serves ranges.
    turn: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct Underway {
    waiting: BTreeMap<SpanId, PendingSpan>,
    /// Spans that it has come by, in all tries.
    passed: u64,
}

impl Pass {
    /// The permit to ask a source that may not serve ranges: one request at a time, until a response shows it. None is
    /// needed where that is known.
    pub(super) async fn turn(&self, source: &Origins) -> Option<MutexGuard<'_, ()>> {
        if source.serves_parts() {
            return None;
        }
        let turn = self.turn.lock().await;
        (!source.serves_parts()).then_some(turn)
    }

    /// Adds the spans to the pass in flight; returns them if there is none.
    fn join(&self, pending_spans: Vec<PendingSpan>) -> Vec<PendingSpan> {
        match &mut *self.state.lock() {
            Some(underway) => {
                underway.waiting.extend(pending_spans.into_iter().map(|pending| (pending.span, pending)));
                Vec::new()
            }
            None => pending_spans,
        }
    }

    /// Begins one with these spans, or adds them to the one in flight; returns whether it is new.
    fn begin(&self, pending_spans: Vec<PendingSpan>) -> bool {
        let mut state = self.state.lock();
        let is_new = state.is_none();
        let underway = state.get_or_insert_default();
        underway.waiting.extend(pending_spans.into_iter().map(|pending| (pending.span, pending)));
        is_new
    }

    /// The spans that are pending.
    fn waiting(&self) -> Vec<SpanId> {
        self.state.lock().as_ref().map_or_else(Vec::new, |underway| underway.waiting.keys().copied().collect())
    }

    /// The pending entry of a span that need not be waited for any more.
    fn withdraw(&self, span: SpanId) -> Option<PendingSpan> {
        self.state.lock().as_mut()?.waiting.remove(&span)
    }

    /// The pending entry of a span that the pass has reached.
    fn take_waiting(&self, span: SpanId) -> Option<PendingSpan> {
        let mut state = self.state.lock();
        let underway = state.as_mut()?;
        underway.passed += 1;
        underway.waiting.remove(&span)
    }

    /// Ends unless a span is pending that the pass has already gone by.
    fn end(&self) -> bool {
        let mut state = self.state.lock();
        let is_over = state.as_ref().is_none_or(|underway| underway.waiting.is_empty());
        if is_over {
            *state = None;
        }
        is_over
    }

    /// Ends the pass and returns what is still pending.
    fn give_up(&self) -> Vec<PendingSpan> {
        self.state.lock().take().map_or_else(Vec::new, |underway| underway.waiting.into_values().collect())
    }

    /// How far it has come; nothing when none is in progress.
    fn passed(&self) -> Option<u64> {
        self.state.lock().as_ref().map(|underway| underway.passed)
    }
}

impl Fetching {
    /// Makes a delivery of the whole blob the pass that brings these spans, unless one is in progress.
    pub(super) fn hand_to_pass(self: &Arc<Self>, delivery: Delivery, pending_spans: Vec<PendingSpan>) {
        let spans: Vec<SpanId> = pending_spans.iter().map(|pending| pending.span).collect();
        if self.pass.begin(pending_spans) {
            tracing::info!(layer = %self.digest, "its source serves no parts: the layer is fetched as a whole");
            self.runtime.spawn(Arc::clone(self).passes(delivery));
        } else {
            self.serve_stored(&spans);
        }
    }

    /// Adds the spans to the pass in flight; returns them if there is none.
    pub(super) fn join_pass(self: &Arc<Self>, pending_spans: Vec<PendingSpan>) -> Vec<PendingSpan> {
        let spans: Vec<SpanId> = pending_spans.iter().map(|pending| pending.span).collect();
        let rest = self.pass.join(pending_spans);
        if rest.is_empty() {
            self.serve_stored(&spans);
        }
        rest
    }

    /// Completes what the pass stored after its absence was noticed and before it was added: the pass would end with it
    /// pending, and another one would transfer the layer again. A pass stores a span before it looks for its pending
    /// entry, so that one of the two sees the other.
    fn serve_stored(self: &Arc<Self>, spans: &[SpanId]) {
        for span in spans.iter().filter(|span| self.store.is_present(**span)) {
            let Some(pending) = self.pass.withdraw(*span) else { continue };
            if !self.finish_if_stored(&pending) {
                // It was evicted at this moment, and the pass may have ended.
                let rest = self.pass.join(vec![pending]);
                if !rest.is_empty() {
                    self.runtime.spawn(Arc::clone(self).run_flight(rest));
                }
            }
        }
    }

    /// The same for one span that is waited for here.
    pub(super) async fn await_pass(self: &Arc<Self>, span: SpanId, delivery: Delivery) -> Result<Bytes, Cause> {
        let place = self.index.spans.span(span).cloned().ok_or(Cause::Abandoned)?;
        let (outcome, receiver) = watch::channel(None);
        self.hand_to_pass(delivery, vec![PendingSpan { span, place, outcome }]);
        let limit = self.policy.flight_limit;
        let outcome = self.flight_outcome(receiver, Instant::now() + limit, limit).await?;
        outcome.ok_or(Cause::Abandoned)
    }

    /// Waits for a flight to complete until `deadline`, and longer while a pass carries it that progresses within
    /// `limit`.
    pub(super) async fn flight_outcome(
        &self,
        mut flight: watch::Receiver<FlightOutcome>,
        mut deadline: Instant,
        limit: Duration,
    ) -> Result<Option<Bytes>, Cause> {
        let mut passed = self.pass.passed();
        loop {
            match timeout_at(deadline, flight.wait_for(Option::is_some)).await {
                Ok(Ok(outcome)) => return outcome.clone().transpose(),
                Ok(Err(_)) => return Err(Cause::Abandoned),
                Err(_) => {}
            }
            let now = self.pass.passed();
            if now.is_none() || now == passed {
                return Err(Cause::Deadline { limit });
            }
            (passed, deadline) = (now, Instant::now() + limit);
        }
    }

    /// Runs passes until nothing is pending, or until several in a row have made no progress.
    async fn passes(self: Arc<Self>, delivery: Delivery) {
        let mut delivery = Some(delivery);
        let mut fruitless = 0;
        loop {
            let before = self.store.present_bytes();
            let passed = match delivery.take() {
                Some(delivery) => self.pass_once(delivery).await,
                None => self.pass_again().await,
            };
            let cause = match passed {
                Ok(()) => {
                    self.serve_stored(&self.pass.waiting());
                    if self.pass.end() {
                        return;
                    }
                    continue;
                }
                Err(cause) => cause,
            };
            fruitless = if self.store.present_bytes() > before { 0 } else { fruitless + 1 };
            if fruitless >= FRUITLESS_MAX || self.health.out_of_service().is_some() {
                for pending in self.pass.give_up() {
                    self.finish(&pending, Err(cause.clone()));
                }
                return;
            }
            tracing::warn!(layer = %self.digest, %cause, "a layer's transfer was incomplete; retrying");
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Another pass, or flights if the source serves parts by now.
    async fn pass_again(self: &Arc<Self>) -> Result<(), Cause> {
        let absent = (0..self.store.spans()).find(|span| !self.store.is_present(*span)).unwrap_or(0);
        let range = self.index.spans.span(absent).map_or(0..0, |span| span.compressed.clone());
        let limit = self.policy.stall_limit;
        self.traffic.count(1, 0);
        let fetching = timeout(limit, self.source.fetch(range)).await;
        let delivery = fetching.map_err(|_| Cause::Deadline { limit })??;
        if delivery.is_whole {
            return self.pass_once(delivery).await;
        }
        for pending in self.pass.give_up() {
            self.runtime.spawn(Arc::clone(self).run_flight(vec![pending]));
        }
        Ok(())
    }

    async fn pass_once(self: &Arc<Self>, delivery: Delivery) -> Result<(), Cause> {
        let mut arriving = Arriving::new(self, delivery.chunks, 0..self.index.compressed_size);
        let mut history: Option<Window> = None;
        for span in 0..self.store.spans() {
            let Some(place) = self.index.spans.span(span) else { continue };
            let _room = budget::in_flight(span_bytes(place)).await;
            let compressed = arriving.take(place.compressed.clone()).await?;
            if self.store.is_present(span) {
                history = None;
                self.arrived_before(span);
                continue;
            }
            let before = match history.take() {
                Some(history) => history,
                None => self.known_history(span)?,
            };
            let bytes = self.decode_next(span, before.clone(), compressed, delivery.from).await?;
            if self.index.compression == Compression::Gzip {
                history = after(&before, &bytes);
            }
            self.arrived(span, bytes);
        }
        Ok(())
    }

    /// The pass comes by a span that is in the store, unless it is evicted at this moment.
    fn arrived_before(&self, span: SpanId) {
        let Some(pending) = self.pass.take_waiting(span) else { return };
        match self.stored(span) {
            Some(bytes) => self.finish(&pending, Ok(bytes)),
            None => drop(self.pass.join(vec![pending])),
        }
    }

    fn arrived(&self, span: SpanId, bytes: Bytes) {
        if let Some(pending) = self.pass.take_waiting(span) {
            self.finish(&pending, Ok(bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;
    use std::sync::atomic::{AtomicU64, Ordering};

    use futures_util::future::BoxFuture;
    use futures_util::{FutureExt as _, StreamExt as _, stream};
    use soci_index::format::digest::Digest;
    use soci_index::format::limits::Limits;
    use soci_index::indexing::{Indexer, Options};
    use tokio::sync::Notify;

    use super::*;
    use crate::layer::reader::{LayerReader, Policy};
    use crate::layer::source::{Chunks, Source, SourceError};
    use crate::layer::store::{Claim, Store};

    const SPAN: u64 = 64 << 10;

    /// Answers every request with the whole blob: two spans at once, the rest when it is released.
    #[derive(Debug)]
    struct Gated {
        blob: Bytes,
        release: Arc<Notify>,
        requests: AtomicU64,
    }

    impl Source for Gated {
        fn read(&self, range: Range<u64>) -> BoxFuture<'_, Result<Chunks, SourceError>> {
            async move { Ok(self.fetch(range.clone()).await?.part(range)) }.boxed()
        }

        fn fetch(&self, _: Range<u64>) -> BoxFuture<'_, Result<Delivery, SourceError>> {
            self.requests.fetch_add(1, Ordering::Relaxed);
            let mut first = self.blob.clone();
            let rest = first.split_off(2 * SPAN as usize);
            let release = Arc::clone(&self.release);
            let rest = async move {
                release.notified().await;
                Ok(rest)
            };
            let chunks = stream::iter([Ok(first)]).chain(stream::once(rest)).boxed();
            async { Ok(Delivery { chunks, from: None, is_whole: true }) }.boxed()
        }

        fn serves_parts(&self) -> bool {
            false
        }
    }

    #[tokio::test]
    async fn a_span_that_a_pass_has_gone_by_is_served_from_the_store() {
        let blob = vec![0; 6 * SPAN as usize];
        let options =
            Options { compression: Compression::None, span_bytes: SPAN, compact: None, limits: Limits::DEFAULT };
        let mut indexer = Indexer::new(options).unwrap();
        indexer.push(&blob, &mut |_| {}).unwrap();
        let indexed = indexer.finish().unwrap();
        let (digest, index) = (indexed.layer_digest, Arc::new(indexed.index));

        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let claim = Claim { table: Some(Digest::of(b"its table")), ..Claim::whole(digest, indexed.diff_id) };
        let kept = store.layer(&claim, &index).unwrap();
        let release = Arc::new(Notify::new());
        let source = Arc::new(Gated { blob: blob.into(), release: Arc::clone(&release), requests: AtomicU64::new(0) });
        let origin: Arc<dyn Source> = Arc::clone(&source) as _;
        let reader =
            LayerReader::new(digest, index, kept, origin, Policy::default(), &tokio::runtime::Handle::current());
        let fetching = Arc::clone(reader.fetching());

        let last = tokio::spawn(async move { reader.read(5 * SPAN, 10).await });
        for _ in 0..1000 {
            if fetching.pass.passed() == Some(2) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(fetching.pass.passed(), Some(2), "it waits behind the second span");

        // The absence of the first span was noticed before the pass stored it.
        let (outcome, mut receiver) = watch::channel(None);
        let place = fetching.index.spans.span(0).cloned().unwrap();
        assert!(fetching.join_pass(vec![PendingSpan { span: 0, place, outcome }]).is_empty());
        let found = timeout(Duration::from_secs(5), receiver.wait_for(Option::is_some)).await;
        assert!(found.is_ok(), "the pass is not waited for");

        release.notify_one();
        assert_eq!(last.await.unwrap().unwrap().len(), 10);
        for _ in 0..1000 {
            if fetching.pass.passed().is_none() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!((fetching.pass.passed(), source.requests.load(Ordering::Relaxed)), (None, 1), "one transfer");
    }
}
