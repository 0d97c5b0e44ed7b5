//! Flights: one request for a run of absent spans, decoded and stored as they arrive.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::{FutureExt as _, StreamExt as _};
use soci_index::format::checkpoint::{WINDOW_BYTES, Window};
use soci_index::format::decode::{DecodeError, SpanDecoder};
use soci_index::format::digest::{Digest, hex};
use soci_index::format::index::{Compression, LayerIndex};
use soci_index::format::span::{Span, SpanId};
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::layer::budget;
use crate::layer::reader::error::Cause;
use crate::layer::reader::fetching::history::Windows;
use crate::layer::reader::fetching::{Fetching, FlightOutcome};
use crate::layer::reader::within;
use crate::layer::source::{OriginId, Source as _};
use crate::layer::store::{Parts, StoreError};

/// Pauses before a refused request is made again: credentials are renewed somewhere else, and mostly within seconds.
const PAUSES_AFTER_REFUSAL: [Duration; 3] =
    [Duration::from_millis(500), Duration::from_secs(1), Duration::from_secs(2)];

/// Origins that are tried, one after the other, when each delivers wrong bytes.
const ORIGINS_TRIED: usize = 4;

/// A span whose flight has not completed.
#[derive(Debug)]
pub(super) struct PendingSpan {
    pub(super) span: SpanId,
    pub(super) place: Span,
    pub(super) outcome: watch::Sender<FlightOutcome>,
}

/// A span that could not be fetched, and why.
type FailedSpan = (PendingSpan, Cause);

impl Fetching {
    /// Starts flights for those of `spans` that are neither present nor in progress. Gives the flight of the first one
    /// if it is new or in progress.
    pub(in crate::layer::reader) fn start_flights(
        self: &Arc<Self>,
        spans: impl Iterator<Item = SpanId>,
    ) -> Option<watch::Receiver<FlightOutcome>> {
        let mut spans = spans.peekable();
        let first = *spans.peek()?;
        let mut runs: Vec<Vec<PendingSpan>> = Vec::new();
        let mut flights = self.flights.lock();
        for span in spans {
            // A flight stores before it is removed from the map, so under the lock one of the two is true.
            if self.store.is_present(span) || flights.contains_key(&span) || self.spare.lock().get(span).is_some() {
                continue;
            }
            let Some(place) = self.index.spans.span(span).cloned() else {
                continue;
            };
            let (outcome, receiver) = watch::channel(None);
            flights.insert(span, receiver);
            let pending = PendingSpan { span, place, outcome };
            match runs.last_mut().filter(|run| self.continues(run, &pending)) {
                Some(run) => run.push(pending),
                None => runs.push(vec![pending]),
            }
        }
        let flight = flights.get(&first).cloned();
        drop(flights);
        for run in runs {
            self.runtime.spawn(Arc::clone(self).run_flight(run));
        }
        flight
    }

    /// The end of the batch of spans from `first` on whose compressed bytes are about `bytes`.
    pub(super) fn batch_end(&self, first: SpanId, bytes: u64) -> SpanId {
        let count = self.store.spans();
        let start = self.index.spans.span(first).map_or(0, |span| span.compressed.start);
        let fits = |span: &SpanId| {
            self.index.spans.span(*span).is_some_and(|span| span.compressed.end.saturating_sub(start) <= bytes)
        };
        (first + 1..count).take_while(fits).last().map_or(first, |last| last).saturating_add(1).min(count)
    }

    fn continues(&self, run: &[PendingSpan], next: &PendingSpan) -> bool {
        let (Some(first), Some(last)) = (run.first(), run.last()) else {
            return false;
        };
        let bytes = next.place.compressed.end.saturating_sub(first.place.compressed.start);
        last.span + 1 == next.span && bytes <= self.policy.request_bytes_max
    }

    /// Brings a run of adjacent spans in, retrying what failed, and without windows what cannot come with
    /// them.
    pub(super) async fn run_flight(self: Arc<Self>, run: Vec<PendingSpan>) {
        let run = self.join_pass(run);
        let lost = self.histories.are_lost();
        let needs_lost = |pending: &PendingSpan| lost && self.histories.lacks(pending.span);
        let (mut alone, mut waiting): (Vec<_>, Vec<_>) = run.into_iter().partition(needs_lost);
        let mut attempts = 0;
        while !waiting.is_empty() {
            let failed = self.attempt(std::mem::take(&mut waiting)).await;
            let mut longest = Duration::ZERO;
            for (pending, cause) in failed {
                if self.can_chain(&cause, attempts) {
                    tracing::warn!(layer = %self.digest, span = pending.span, %cause, "decoding from the nearest span in the store instead");
                    alone.push(pending);
                    continue;
                }
                let pause = self.pause_before_next(&cause, attempts);
                match pause.filter(|_| self.health.out_of_service().is_none()) {
                    Some(pause) => {
                        tracing::warn!(layer = %self.digest, span = pending.span, %cause, "fetching a span failed; retrying");
                        longest = longest.max(pause);
                        waiting.push(pending);
                    }
                    None => self.finish(&pending, Err(cause)),
                }
            }
            waiting.sort_by_key(|pending| pending.span);
            attempts += 1;
            tokio::time::sleep(longest).await;
        }
        alone.sort_by_key(|pending| pending.span);
        for pending in alone {
            let outcome = self.chain(pending.span).await;
            self.finish(&pending, outcome);
        }
    }

    /// Whether the bytes of a span are well, and only what it is decoded from is not. What was damaged on the way is
    /// worth one more try.
    fn can_chain(&self, cause: &Cause, attempts: usize) -> bool {
        let is_gzip = self.index.compression == Compression::Gzip;
        let is_of_history = match cause {
            Cause::Windows(cause) => attempts > 0 || matches!(**cause, Cause::Source(_) | Cause::Deadline { .. }),
            Cause::WindowBlob(_) | Cause::NoWindow { .. } => attempts > 0,
            Cause::Store(StoreError::Unproven { .. }) | Cause::Decode(DecodeError::Gzip { .. }) => true,
            _ => false,
        };
        is_gzip && is_of_history && self.health.out_of_service().is_none()
    }

    /// How long to wait before a span that did not come is asked for again, after so many attempts before this one; `None`
    /// when that is of no use. What may pass by itself was tried often enough by the source; what is left are an answer
    /// that was damaged on the way, which is fetched once more from each origin, and a refusal. With retries that the
    /// operator has limited, a source that gave up is not asked again.
    fn pause_before_next(&self, cause: &Cause, attempts: usize) -> Option<Duration> {
        if let Cause::Source(error) = cause {
            if error.is_refusal() {
                return PAUSES_AFTER_REFUSAL.get(attempts).copied();
            }
            if !self.policy.asks_again {
                return None;
            }
        }
        (attempts < self.source.choices().clamp(1, ORIGINS_TRIED)).then_some(Duration::ZERO)
    }

    /// Distinguishes an origin's wrong bytes from everything else.
    pub(super) fn blame(&self, cause: &Cause, from: Option<OriginId>) {
        if let (Cause::Decode(DecodeError::Digest { .. } | DecodeError::Input { .. }), Some(from)) = (cause, from) {
            self.source.blame(from);
        }
    }

    /// One attempt: requests for the runs of adjacent spans among `pending_spans`, one after another.
    async fn attempt(self: &Arc<Self>, pending_spans: Vec<PendingSpan>) -> Vec<FailedSpan> {
        let mut failed_spans = Vec::new();
        let mut decoding = JoinSet::new();
        let mut rest = VecDeque::from(pending_spans);
        while let Some(first) = rest.pop_front() {
            let mut run = VecDeque::from([first]);
            let follows = |run: &VecDeque<PendingSpan>, next: &PendingSpan| {
                run.back().is_some_and(|last| last.span + 1 == next.span)
            };
            while rest.front().is_some_and(|next| follows(&run, next)) {
                run.extend(rest.pop_front());
            }
            let limit = self.policy.flight_limit;
            let request = tokio::time::timeout(limit, self.request(&mut run, &mut decoding)).await;
            let cause = match request {
                Ok(Ok(())) => continue,
                Ok(Err(cause)) => cause,
                Err(_) => Cause::Deadline { limit },
            };
            failed_spans.extend(run.into_iter().map(|pending| (pending, cause.clone())));
        }
        while let Some(decoded) = decoding.join_next().await {
            // A decoder that panicked dropped its span; the closed channel wakes the waiters.
            if let Ok(Some(failed)) = decoded {
                failed_spans.push(failed);
            }
        }
        failed_spans
    }

    /// Requests the bytes of `run` and sends each span off to be decoded as soon as it is whole. What is left in `run`
    /// at the end was not fetched.
    async fn request(
        self: &Arc<Self>,
        run: &mut VecDeque<PendingSpan>,
        decoding: &mut JoinSet<Option<FailedSpan>>,
    ) -> Result<(), Cause> {
        let turn = self.pass.turn(&self.source).await;
        *run = self.join_pass(std::mem::take(run).into()).into();
        if turn.is_some() {
            // A pass may have brought them, and ended, while this waited for its turn.
            run.retain(|pending| !self.finish_if_stored(pending));
        }
        let (Some(first), Some(last)) = (run.front(), run.back()) else {
            return Ok(());
        };
        let range = first.place.compressed.start..last.place.compressed.end;
        let expected = range.end - range.start;
        self.traffic.count(1, 0);
        let stall = self.policy.stall_limit;
        let stalled = |_| Cause::Deadline { limit: stall };
        let windows = self.windows_of(first.span..last.span + 1);
        let asked = Instant::now();
        let mut first_bytes: Option<(Instant, u64)> = None;
        let delivery = tokio::time::timeout(stall, self.source.fetch(range.clone())).await.map_err(stalled)??;
        self.traffic.record_answer(asked.elapsed());
        if delivery.is_whole {
            self.hand_to_pass(delivery, run.drain(..).collect());
            return Ok(());
        }
        drop(turn);
        let (mut chunks, from) = (delivery.chunks, delivery.from);
        let mut held = BytesMut::new();
        let mut held_from = range.start;
        let mut found = 0;
        while let Some(next) = run.front() {
            let end = next.place.compressed.end;
            let have = held_from + held.len() as u64;
            if have < end {
                let chunk = tokio::time::timeout(stall, chunks.next()).await.map_err(stalled)?;
                let chunk = chunk.ok_or(Cause::Short { expected, found })??;
                found += chunk.len() as u64;
                first_bytes.get_or_insert_with(|| (Instant::now(), found));
                self.traffic.count(0, chunk.len() as u64);
                held.extend_from_slice(&chunk);
                continue;
            }
            let Some(pending) = run.pop_front() else {
                break;
            };
            let start = pending.place.compressed.start;
            let room = budget::in_flight(span_bytes(&pending.place)).await;
            let span = Bytes::copy_from_slice(&held[within(&(start..end), held_from)]);
            // The next span may begin in the last byte of this one.
            let keep_from = run.front().map_or(end, |next| next.place.compressed.start);
            let _ = held.split_to(within(&(held_from..keep_from), held_from).end);
            held_from = keep_from;
            decoding.spawn(Arc::clone(self).decode(pending, span, windows.clone(), from, room));
        }
        if let Some((came, bytes)) = first_bytes {
            self.traffic.record_line(came - asked, found - bytes, came.elapsed());
            let (first_ms, whole_ms) = ((came - asked).as_millis(), asked.elapsed().as_millis());
            tracing::debug!(layer = %self.digest, range = ?range, first_ms, whole_ms, "spans came");
        }
        Ok(())
    }

    /// The windows of `spans`, as far as they come from a blob of their own.
    fn windows_of(self: &Arc<Self>, spans: Range<SpanId>) -> Windows {
        self.histories.for_flight(spans, |spans| {
            let shared = Arc::clone(self);
            let fetching = self.runtime.spawn(async move {
                shared.traffic.count(1, 0);
                let bytes = shared.histories.fetch(spans, shared.policy.stall_limit).await?;
                shared.traffic.count(0, bytes);
                Ok(())
            });
            fetching.map(|fetched| fetched.unwrap_or(Err(Cause::Abandoned))).boxed().shared()
        })
    }

    /// Decodes and stores one span on the blocking pool and wakes the waiters.
    async fn decode(
        self: Arc<Self>,
        pending: PendingSpan,
        compressed: Bytes,
        windows: Windows,
        from: Option<OriginId>,
        _room: Option<OwnedSemaphorePermit>,
    ) -> Option<FailedSpan> {
        if let Err(cause) = self.histories.arrival(windows).await {
            return Some((pending, Cause::Windows(Box::new(cause))));
        }
        let permit = Arc::clone(budget::decoders()).acquire_owned().await;
        let span = pending.span;
        let shared = Arc::clone(&self);
        let decoded = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            shared.decode_now(span, &compressed)
        });
        match decoded.await {
            Ok(Ok(bytes)) => {
                self.finish(&pending, Ok(bytes));
                None
            }
            Ok(Err(cause)) => {
                self.blame(&cause, from);
                Some((pending, cause))
            }
            Err(_) => Some((pending, Cause::Abandoned)),
        }
    }

    fn decode_now(self: &Arc<Self>, span: SpanId, compressed: &[u8]) -> Result<Bytes, Cause> {
        let history = self.histories.window(span)?;
        self.decode_with(span, &history, compressed)
    }

    /// Decodes a span, compares what comes with what is known of it, and stores it.
    pub(super) fn decode_with(
        self: &Arc<Self>,
        span: SpanId,
        history: &Window,
        compressed: &[u8],
    ) -> Result<Bytes, Cause> {
        let bytes = Bytes::from(decode_span(&self.index, span, history, compressed)?);
        self.traffic.count_span();
        self.histories.done(span);
        let next = self.index.spans.span(span + 1).and_then(|_| self.histories.known(span + 1));
        let is_gzip = self.index.compression == Compression::Gzip;
        if is_gzip && next.is_some_and(|window| !follows(&window, &bytes)) && !self.store.is_proven() {
            let cause = Cause::Window { span: span + 1 };
            self.health.condemn_for(cause.clone());
            return Err(cause);
        }
        match self.store.write(span, &bytes) {
            Ok(Parts::Agree) => {}
            Ok(Parts::Differ { offset }) => self.health.condemn_pack(offset),
            // Not what was proven: nothing of it may be shown.
            Err(error @ StoreError::Unproven { .. }) => return Err(error.into()),
            Err(error) => {
                let (layer, why) = (self.digest, error.clone());
                if self.spare.lock().put(span, bytes.clone(), why) {
                    tracing::warn!(%layer, span, %error, "what is fetched of a layer is not kept but in memory, for a while");
                } else {
                    tracing::debug!(%layer, span, %error, "a span stays in memory");
                }
            }
        }
        Ok(bytes)
    }

    /// Completes the flight of a span that is in the store; `false` if it is not.
    pub(super) fn finish_if_stored(&self, pending: &PendingSpan) -> bool {
        self.stored(pending.span).map(|bytes| self.finish(pending, Ok(bytes))).is_some()
    }

    pub(super) fn finish(&self, pending: &PendingSpan, outcome: Result<Bytes, Cause>) {
        self.flights.lock().remove(&pending.span);
        // A lack of waiters is no failure.
        let _ = pending.outcome.send(Some(outcome));
    }
}

/// What a span takes in memory, compressed and decoded.
pub(super) fn span_bytes(place: &Span) -> u64 {
    let length = |range: &Range<u64>| range.end.saturating_sub(range.start);
    length(&place.compressed).saturating_add(length(&place.uncompressed))
}

/// Decodes a span and checks it against the index.
fn decode_span(index: &LayerIndex, span: SpanId, history: &Window, compressed: &[u8]) -> Result<Vec<u8>, DecodeError> {
    let length = index.spans.span(span).map_or(0, |span| span.uncompressed.end - span.uncompressed.start);
    // Limits::span_bytes_max bounds the length.
    let mut output = Vec::with_capacity(usize::try_from(length).unwrap_or(0));
    let mut decoder = SpanDecoder::with_window(index, span, history)?;
    let decoded = decoder.push(compressed, &mut output).and_then(|()| decoder.finish());
    decoded.map_err(|error| compressed_first(index, span, compressed, error))?;
    Ok(output)
}

/// What is wrong with a span that cannot be decoded: its compressed bytes, if they are not the indexed ones, which is
/// the mistake of the origin that delivered them; else what it is decoded from.
fn compressed_first(index: &LayerIndex, span: SpanId, compressed: &[u8], error: DecodeError) -> DecodeError {
    let expected = index.spans.span(span).and_then(|span| span.digest);
    let found = Digest::of(compressed);
    match expected {
        Some(expected) if found.bytes() != expected => {
            DecodeError::Digest { span, expected: hex(&expected), found: found.hex() }
        }
        _ => error,
    }
}

/// Whether the window of the next span agrees with the end of this one, `bytes`. An index may leave out (as zeros) the
/// bytes of a window that nothing refers to, so only the others count.
fn follows(window: &Window, bytes: &[u8]) -> bool {
    let window = window.load();
    let length = bytes.len().min(WINDOW_BYTES);
    let (said, found) = (&window[WINDOW_BYTES - length..], &bytes[bytes.len() - length..]);
    said == found || said.iter().zip(found).all(|(said, found)| *said == 0 || said == found)
}
