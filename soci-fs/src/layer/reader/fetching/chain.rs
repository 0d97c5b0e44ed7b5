//! Decoding without windows: from the nearest span whose history is here, one span after the other.
//!
//! The windows of a span index are in a blob of their own, which may go while a container runs: the index is deleted,
//! its repository removed, its rights withdrawn. The table with the digest of every span is on this node all the same,
//! so the layer's own blob is enough: decoded in order, the end of each span is the history of the next. The same way
//! is taken for a span whose window turned out to be wrong. It costs up to the whole layer before the wanted span,
//! once: what is decoded on the way is stored.
//!
//! Invariants: one chain per layer at a time, and a span that one brings ends the wait of all; every span is compared
//! with its digest as any other is.

use std::ops::Range;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt as _;
use soci_index::format::checkpoint::{WINDOW_BYTES, Window};
use soci_index::format::index::Windows as IndexWindows;
use soci_index::format::span::SpanId;
use tokio::time::timeout;

use crate::layer::budget;
use crate::layer::reader::error::Cause;
use crate::layer::reader::fetching::Fetching;
use crate::layer::reader::fetching::flight::span_bytes;
use crate::layer::reader::within;
use crate::layer::source::{Chunks, OriginId, Source as _};
use crate::layer::store::Reading;

impl Fetching {
    /// Brings a span by decoding everything from the nearest known history up to it.
    pub(super) async fn chain(self: &Arc<Self>, span: SpanId) -> Result<Bytes, Cause> {
        let _turn = self.chaining.lock().await;
        let mut tries = self.source.choices().clamp(1, 4) + 1;
        loop {
            if let Some(bytes) = self.stored(span) {
                return Ok(bytes);
            }
            let first = self.chain_start(span);
            match self.decode_run(first, span).await {
                Ok(bytes) => return Ok(bytes),
                // What was decoded until then is stored; the next origin goes on from there.
                Err(cause)
                    if tries == 1 || self.chain_start(span) == first && self.health.out_of_service().is_some() =>
                {
                    return Err(cause);
                }
                Err(cause) => {
                    tracing::warn!(layer = %self.digest, first, span, %cause, "fetching spans in order failed; retrying");
                    tries -= 1;
                }
            }
        }
    }

    /// The last span up to `span` whose history is known without a window from elsewhere.
    fn chain_start(&self, span: SpanId) -> SpanId {
        let is_known = |at: &SpanId| {
            at.checked_sub(1).is_none_or(|before| self.store.is_present(before)) || self.needs_no_history(*at)
        };
        (0..=span).rev().find(is_known).unwrap_or(0)
    }

    /// Whether the span begins without history, by an index that may be believed: not once the layer is proven, for
    /// then the index may be what is wrong.
    fn needs_no_history(&self, span: SpanId) -> bool {
        let is_placed = matches!(self.index.windows, IndexWindows::Placed(_));
        is_placed && self.index.window_place(span).is_none() && !self.store.is_proven()
    }

    pub(super) fn stored(&self, span: SpanId) -> Option<Bytes> {
        let place = self.index.spans.span(span)?.uncompressed.clone();
        let mut bytes = vec![0; usize::try_from(place.end - place.start).ok()?];
        (self.store.is_present(span) && matches!(self.store.read(place.start, &mut bytes), Ok(Reading::Done)))
            .then(|| bytes.into())
    }

    /// Fetches the spans from `first` to `last` in one request after the other and decodes them in order.
    async fn decode_run(self: &Arc<Self>, first: SpanId, last: SpanId) -> Result<Bytes, Cause> {
        let mut history = self.known_history(first)?;
        let mut next = first;
        loop {
            let end = self.batch_end(next, self.policy.request_bytes_max).min(last + 1);
            let place = |span: SpanId| self.index.spans.span(span).map_or(0..0, |span| span.compressed.clone());
            let range = place(next).start..place(end - 1).end;
            self.traffic.count(1, 0);
            let limit = self.policy.stall_limit;
            let late = |_| Cause::Deadline { limit };
            let delivery = timeout(limit, self.source.fetch(range.clone())).await.map_err(late)??;
            if delivery.is_whole {
                return self.await_pass(last, delivery).await;
            }
            let mut arriving = Arriving::new(self, delivery.chunks, range);
            while next < end {
                let _room = match self.index.spans.span(next) {
                    Some(place) => budget::in_flight(span_bytes(place)).await,
                    None => None,
                };
                let compressed = arriving.take(place(next)).await?;
                let bytes = self.decode_next(next, history.clone(), compressed, delivery.from).await?;
                if next == last {
                    return Ok(bytes);
                }
                history = after(&history, &bytes).ok_or(Cause::NoWindow { span: next + 1 })?;
                next += 1;
            }
        }
    }

    pub(super) fn known_history(&self, span: SpanId) -> Result<Window, Cause> {
        match span {
            0 => Ok(Window::EMPTY),
            _ => self.histories.of_neighbour(span),
        }
    }

    pub(super) async fn decode_next(
        self: &Arc<Self>,
        span: SpanId,
        history: Window,
        compressed: Bytes,
        from: Option<OriginId>,
    ) -> Result<Bytes, Cause> {
        let permit = Arc::clone(budget::decoders()).acquire_owned().await;
        let shared = Arc::clone(self);
        let decoded = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            shared.decode_with(span, &history, &compressed)
        });
        decoded.await.map_err(|_| Cause::Abandoned)?.inspect_err(|cause| self.blame(cause, from))
    }
}

/// The compressed bytes of spans, one span after the other.
pub(super) struct Arriving<'a> {
    fetching: &'a Fetching,
    chunks: Chunks,
    /// What comes.
    range: Range<u64>,
    found: u64,
    held: BytesMut,
    held_from: u64,
}

impl<'a> Arriving<'a> {
    pub(super) fn new(fetching: &'a Fetching, chunks: Chunks, range: Range<u64>) -> Self {
        let held_from = range.start;
        Self { fetching, chunks, range, found: 0, held: BytesMut::new(), held_from }
    }

    /// The bytes of the next span, which may begin in the last byte of the one before.
    pub(super) async fn take(&mut self, wanted: Range<u64>) -> Result<Bytes, Cause> {
        let limit = self.fetching.policy.stall_limit;
        while self.held_from + (self.held.len() as u64) < wanted.end {
            let chunk = timeout(limit, self.chunks.next()).await.map_err(|_| Cause::Deadline { limit })?;
            let expected = self.range.end - self.range.start;
            let chunk = chunk.ok_or(Cause::Short { expected, found: self.found })??;
            self.found += chunk.len() as u64;
            self.fetching.traffic.count(0, chunk.len() as u64);
            self.held.extend_from_slice(&chunk);
        }
        let _ = self.held.split_to(within(&(self.held_from..wanted.start), self.held_from).end);
        self.held_from = wanted.start;
        Ok(Bytes::copy_from_slice(&self.held[within(&wanted, self.held_from)]))
    }
}

/// The last 32 KiB of what was decoded until now.
pub(super) fn after(history: &Window, bytes: &[u8]) -> Option<Window> {
    if bytes.len() >= WINDOW_BYTES {
        return Window::from_bytes(Bytes::copy_from_slice(&bytes[bytes.len() - WINDOW_BYTES..]));
    }
    let before = history.load();
    Window::from_bytes([&before[bytes.len()..], bytes].concat().into())
}
