//! Brings spans of a layer: requests to its sources, what is in flight, what waits for the store, and what came.
//!
//! Each span is fetched by one *flight* (single-flight), however many readers wait for it; adjacent absent spans share
//! a request. A flight is a task of its own: a reader that gives up does not take it down, so the next try finds the
//! bytes.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use soci_index::format::digest::Digest;
use soci_index::format::index::LayerIndex;
use soci_index::format::span::SpanId;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::layer::readahead::Line;
use crate::layer::reader::Policy;
use crate::layer::reader::error::{Cause, ReadError};
use crate::layer::reader::health::Health;
use crate::layer::source::origins::Origins;
use crate::layer::stages::Stages;
use crate::layer::store::LayerStore;

mod chain;
mod flight;
mod history;
mod line;
mod spare;
mod whole;

/// How a flight ended for one span; `None` while it is in progress.
type FlightOutcome = Option<Result<Bytes, Cause>>;

/// Brings spans of one layer into its store.
#[derive(Debug)]
pub struct Fetching {
    digest: Digest,
    index: Arc<LayerIndex>,
    store: Arc<LayerStore>,
    source: Origins,
    policy: Policy,
    /// Where flights run: reads that are answered at once come from threads that know no runtime.
    runtime: Handle,
    health: Arc<Health>,
    flights: Mutex<HashMap<SpanId, watch::Receiver<FlightOutcome>>>,
    histories: history::Histories,
    spare: Mutex<spare::Spare>,
    /// Brings all spans where the source serves no parts.
    pass: whole::Pass,
    /// Held while spans are decoded one after the other.
    chaining: tokio::sync::Mutex<()>,
    traffic: line::Traffic,
}

impl Fetching {
    pub(super) fn new(
        index: Arc<LayerIndex>,
        (source, windows): (Origins, Option<Origins>),
        policy: Policy,
        runtime: &Handle,
        health: Arc<Health>,
    ) -> Self {
        let store = Arc::clone(health.store());
        Self {
            digest: health.digest(),
            source,
            policy,
            runtime: runtime.clone(),
            flights: Mutex::default(),
            histories: history::Histories::new(Arc::clone(&index), Arc::clone(&store), windows),
            spare: Mutex::new(spare::Spare::new(policy.spare_bytes_max)),
            pass: whole::Pass::default(),
            chaining: tokio::sync::Mutex::default(),
            traffic: line::Traffic::default(),
            index,
            store,
            health,
        }
    }

    /// Where the layer's bytes come from; more origins may be added.
    #[must_use]
    pub const fn source(&self) -> &Origins {
        &self.source
    }

    /// Where the windows of its span index come from, if it is read by one.
    #[must_use]
    pub const fn windows(&self) -> Option<&Origins> {
        self.histories.source()
    }

    /// Whether a span is in flight.
    pub(super) fn is_busy(&self) -> bool {
        !self.flights.lock().is_empty()
    }

    /// Plans these spans as well, so that their windows come in few requests. Plans end with the last profile that is
    /// followed.
    pub fn plan(&self, spans: Range<SpanId>) {
        self.histories.plan(spans);
    }

    pub(super) fn forget_plans(&self) {
        self.histories.forget_plans();
    }

    /// How the line to the source is.
    pub(crate) fn line(&self) -> Line {
        self.traffic.line()
    }

    /// Has the times of requests for spans noted in `stages`, from now on.
    pub(crate) fn note_times(&self, stages: &Arc<Stages>) {
        self.traffic.note_times(stages);
    }

    /// Counts what came of the layer by another way than reads: as a whole before it could be read, or in a pack.
    pub(crate) fn count(&self, requests: u64, bytes: u64) {
        self.traffic.count(requests, bytes);
    }

    /// Requests, compressed bytes and decoded spans so far.
    pub(super) fn so_far(&self) -> [u64; 3] {
        self.traffic.so_far()
    }

    /// Fetches everything that is absent, a few requests at a time.
    ///
    /// # Errors
    /// The first [`ReadError`], which may be that the store did not take a span; what was fetched until then is kept.
    pub async fn complete(self: &Arc<Self>) -> Result<(), ReadError> {
        self.complete_telling(&watch::Sender::new(0)).await
    }

    /// The same, reporting how many bytes of the uncompressed layer are present from its start on.
    ///
    /// # Errors
    /// As [`Fetching::complete`].
    pub async fn complete_telling(self: &Arc<Self>, outcome: &watch::Sender<u64>) -> Result<(), ReadError> {
        let (count, most) = (self.store.spans(), self.policy.request_bytes_max);
        let mut started = 0;
        for span in 0..count {
            // Two requests are always ahead, so that the line is busy while cores decode.
            while started < self.batch_end(span, 2 * most) {
                let next = self.batch_end(started, most);
                self.start_flights(started..next);
                started = next;
            }
            let place = self.index.spans.span(span).map_or(0..0, |span| span.uncompressed.clone());
            let limit = Instant::now() + self.policy.flight_limit;
            let kept = self.outcome(span, limit).await.and_then(|_| self.is_kept(span));
            kept.map_err(|cause| self.health.failed(Some(span), place.start, cause))?;
            outcome.send_replace(place.end);
        }
        Ok(())
    }

    /// Whether a span that has come is in the store; if not, why.
    fn is_kept(&self, span: SpanId) -> Result<(), Cause> {
        let reason = self.spare.lock().reason().cloned();
        match reason.filter(|_| !self.store.is_present(span)) {
            Some(reason) => Err(Cause::Store(reason)),
            None => Ok(()),
        }
    }

    /// Fetches about `bytes` compressed bytes of what is absent, one span at least, and says how many spans.
    ///
    /// # Errors
    /// The first [`ReadError`]; what was fetched until then is kept.
    pub async fn fetch_some(self: &Arc<Self>, bytes: u64) -> Result<u32, ReadError> {
        let absent = |span: &SpanId| !self.store.is_present(*span);
        let Some(first) = (0..self.store.spans()).find(absent) else { return Ok(0) };
        let end = (first..self.batch_end(first, bytes)).take_while(absent).last().map_or(first, |span| span + 1);
        self.fetch_spans(first..end).await?;
        Ok(end - first)
    }

    /// Fetches those of `spans` that are absent.
    ///
    /// # Errors
    /// The first [`ReadError`]; what was fetched until then is kept.
    pub async fn fetch_spans(self: &Arc<Self>, spans: Range<SpanId>) -> Result<(), ReadError> {
        self.start_flights(spans.clone());
        for span in spans {
            let offset = self.index.spans.span(span).map_or(0, |span| span.uncompressed.start);
            let limit = Instant::now() + self.policy.flight_limit;
            let outcome = self.outcome(span, limit).await;
            outcome.map_err(|cause| self.health.failed(Some(span), offset, cause))?;
        }
        Ok(())
    }

    /// Whether some of `spans` are neither in the store nor in flight.
    pub(super) fn is_any_new(&self, mut spans: Range<SpanId>) -> bool {
        let flights = self.flights.lock();
        spans.any(|span| !self.store.is_present(span) && !flights.contains_key(&span))
    }

    /// Waits for a span's bytes; `None` when the store has them by now.
    pub(super) async fn outcome(self: &Arc<Self>, span: SpanId, deadline: Instant) -> Result<Option<Bytes>, Cause> {
        if let Some(bytes) = self.spare.lock().get(span) {
            return Ok(Some(bytes));
        }
        let flight = self.start_flights(span..span + 1).or_else(|| self.flights.lock().get(&span).cloned());
        let Some(flight) = flight else {
            return Ok(self.spare.lock().get(span));
        };
        self.flight_outcome(flight, deadline, self.policy.read_deadline).await
    }
}
