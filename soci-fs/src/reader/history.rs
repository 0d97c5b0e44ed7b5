//! The history that decoding of a span starts from, when the index does not hold it itself.
//!
//! A span index keeps its windows in a blob of their own, of which a start-up needs a few. Where the span before is in
//! the store its end is the history, and nothing is asked for; else the window is fetched, beside the span's own bytes
//! and at the same time, so that it costs no round trip. Spans that are fetched together have their windows in one piece
//! of the blob.
//!
//! Invariants: a window is used only with the digest that the index states; what is held here is bounded; a window that
//! does not come is an error of its span, which the next try may mend.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt as _;
use soci_index::checkpoint::{WINDOW_BYTES, Window};
use soci_index::index::LayerIndex;
use soci_index::span::SpanId;
use tokio::time::timeout;

use super::{Cause, Policy, lock};
use crate::source::Source;
use crate::store::{LayerStore, Reading};

/// Bytes of windows that are held, for spans which are on their way and for comparing with the end of a span that comes
/// later. A request of 8 MiB has about a hundred spans.
const HELD_BYTES_MAX: usize = 1 << 20;
/// A windows blob of no more than this is fetched whole when the first window is wanted.
const WHOLE_BYTES_MAX: u64 = 32 << 10;

/// Windows of one layer on their way to where they are used.
#[derive(Debug)]
pub(super) struct Histories {
    /// Has the windows blob; none when the index holds its windows.
    source: Option<Arc<dyn Source>>,
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    frames: BTreeMap<SpanId, Bytes>,
    bytes: usize,
}

impl Held {
    fn put(&mut self, span: SpanId, frame: Bytes) {
        if self.bytes + frame.len() > HELD_BYTES_MAX {
            // Left over from spans that never came: whoever still wants one fetches it again.
            *self = Self::default();
        }
        self.bytes += frame.len();
        if let Some(old) = self.frames.insert(span, frame) {
            self.bytes -= old.len();
        }
    }

    fn remove(&mut self, span: SpanId) {
        if let Some(old) = self.frames.remove(&span) {
            self.bytes -= old.len();
        }
    }
}

impl Histories {
    pub(super) fn new(source: Option<Arc<dyn Source>>) -> Self {
        Self { source, held: Mutex::default() }
    }

    /// The spans of `spans`, neighbours, whose windows have to be fetched: from the first one to behind the last.
    pub(super) fn lacking(
        &self,
        index: &LayerIndex,
        store: &LayerStore,
        spans: Range<SpanId>,
    ) -> Option<Range<SpanId>> {
        let held = lock(&self.held);
        let lacks = |span: &SpanId| {
            let follows_present = span.checked_sub(1).is_some_and(|before| store.is_present(before));
            index.window_place(*span).is_some() && !held.frames.contains_key(span) && !follows_present
        };
        let first = spans.clone().find(lacks)?;
        let last = spans.rev().find(lacks)?;
        Some(first..last + 1)
    }

    /// Fetches the windows of `spans`; says how many bytes came.
    pub(super) async fn fetch(&self, index: &LayerIndex, spans: Range<SpanId>, policy: &Policy) -> Result<u64, Cause> {
        let places = |spans: Range<SpanId>| spans.filter_map(|span| Some((span, *index.window_place(span)?)));
        let end_of = |(_, place): (SpanId, soci_index::compact::WindowPlace)| place.offset + u64::from(place.length);
        let count = SpanId::try_from(index.spans.len()).unwrap_or(SpanId::MAX);
        let whole = places(0..count).next_back().map_or(0, end_of) <= WHOLE_BYTES_MAX;
        let spans = if whole { 0..count } else { spans };
        let (Some(first), Some(end)) = (places(spans.clone()).next(), places(spans.clone()).next_back().map(end_of))
        else {
            return Ok(0);
        };
        let Some(source) = &self.source else { return Err(Cause::NoWindow { span: first.0 }) };
        let start = first.1.offset;
        let bytes = read(&**source, start..end, policy).await?;
        let mut held = lock(&self.held);
        for (span, place) in places(spans) {
            let at = super::within(&(place.offset..place.offset + u64::from(place.length)), start);
            // A copy: a slice would keep all of the answer in memory for one window.
            held.put(span, Bytes::copy_from_slice(bytes.get(at).unwrap_or_default()));
        }
        Ok(bytes.len() as u64)
    }

    /// The history of a span.
    pub(super) fn of(&self, index: &LayerIndex, store: &LayerStore, span: SpanId) -> Result<Window, Cause> {
        if let Some(window) = index.window(span) {
            return Ok(window.clone());
        }
        if let Some(window) = end_before(index, store, span) {
            return Ok(window);
        }
        self.fetched(index, span)?.ok_or(Cause::NoWindow { span })
    }

    /// The window that was fetched for a span, if it was.
    fn fetched(&self, index: &LayerIndex, span: SpanId) -> Result<Option<Window>, Cause> {
        let frame = lock(&self.held).frames.get(&span).cloned();
        let (Some(frame), Some(place)) = (frame, index.window_place(span)) else { return Ok(None) };
        let window = place.window(&frame);
        if window.is_err() {
            lock(&self.held).remove(span);
        }
        Ok(Some(window?))
    }

    /// The window of a span as far as it is known without fetching it.
    pub(super) fn known(&self, index: &LayerIndex, span: SpanId) -> Option<Window> {
        index.window(span).cloned().or_else(|| self.fetched(index, span).ok().flatten())
    }

    /// The span was decoded: its window is of use only as long as nobody knows what it should be.
    pub(super) fn done(&self, store: &LayerStore, span: SpanId) {
        if span.checked_sub(1).is_none_or(|before| store.is_present(before)) {
            lock(&self.held).remove(span);
        }
    }
}

/// The end of what comes before a span, if that is in the store.
fn end_before(index: &LayerIndex, store: &LayerStore, span: SpanId) -> Option<Window> {
    let start = index.spans.span(span)?.uncompressed.start;
    let length = usize::try_from(start).unwrap_or(usize::MAX).min(WINDOW_BYTES);
    let mut window = vec![0; WINDOW_BYTES];
    let reading = store.read(start - length as u64, window.get_mut(WINDOW_BYTES - length..)?);
    // What is not there, or cannot be read, is fetched.
    matches!(reading, Ok(Reading::Done)).then(|| Window::from_bytes(window.into())).flatten()
}

async fn read(source: &dyn Source, range: Range<u64>, policy: &Policy) -> Result<Bytes, Cause> {
    let limit = policy.stall_limit;
    let late = |_| Cause::Deadline { limit };
    let expected = range.end - range.start;
    let mut chunks = timeout(limit, source.read(range)).await.map_err(late)??;
    let mut bytes = BytesMut::new();
    while (bytes.len() as u64) < expected {
        let chunk = timeout(limit, chunks.next()).await.map_err(late)?;
        bytes.extend_from_slice(&chunk.ok_or(Cause::Short { expected, found: bytes.len() as u64 })??);
    }
    Ok(bytes.freeze())
}
