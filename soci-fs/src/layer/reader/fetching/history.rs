//! The history that decoding of a span starts from, when the index does not hold it itself.
//!
//! A span index keeps its windows in a blob of their own, of which a start-up needs a few. Where the span before is in
//! the store its end is the history, and nothing is asked for; else the window is fetched, beside the span's own bytes
//! and at the same time, so that it costs no round trip. Spans that are fetched together have their windows in one
//! piece of the blob, and others come along ([`together`]): those that a plan needs, or else as many bytes of adjacent
//! windows as were needed before, because a layer that is read here and there will be read between, unless many of
//! those are still unused. So most spans of a busy layer need no request for a window, and of a layer that is hardly
//! read hardly more than the windows in use are fetched.
//!
//! Invariants: a window is used only with the digest that the index states; what is held here is bounded; no window is
//! asked for while it is in flight; one that cannot be fetched is an error of its span, which the next attempt may
//! resolve.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::future::{self, BoxFuture, Shared};
use futures_util::{FutureExt as _, StreamExt as _};
use parking_lot::Mutex;
use soci_index::format::checkpoint::{WINDOW_BYTES, Window};
use soci_index::format::index::{LayerIndex, WindowPlace};
use soci_index::format::span::SpanId;
use tokio::time::{Instant, timeout};

use crate::layer::budget::{Share, WINDOWS};
use crate::layer::reader::error::Cause;
use crate::layer::reader::within;
use crate::layer::source::origins::Origins;
use crate::layer::source::{OriginId, Source as _};
use crate::layer::store::{LayerStore, Reading};

mod together;

use together::Blob;

/// Bytes of windows that are held, for spans that are in flight or may be wanted, and for comparing with the end of a
/// span that comes later: those of some eight hundred spans.
const HELD_BYTES_MAX: usize = 6 << 20;
/// As long as so much of it is of spans that did not come yet, no more windows come along with those that are wanted.
const UNUSED_BYTES_MAX: usize = HELD_BYTES_MAX / 3 * 2;
/// Most bytes of windows that come along with those that are wanted: a millisecond at 1 Gbit/s.
const ALONG_BYTES_MAX: u64 = 128 << 10;
/// The same when it is known which will be wanted.
const PLANNED_BYTES_MAX: u64 = 512 << 10;

/// How long windows that no origin had are not asked for again; spans are decoded in order meanwhile.
const LOST_FOR: Duration = Duration::from_secs(60);
/// How long a span whose own bytes are here waits for its window before it is decoded in order.
const PATIENCE: Duration = Duration::from_secs(5);

/// Windows, when they have come.
pub(super) type Windows = Shared<BoxFuture<'static, Result<(), Cause>>>;

/// Windows of one layer on their way to where they are used.
#[derive(Debug)]
pub(super) struct Histories {
    index: Arc<LayerIndex>,
    store: Arc<LayerStore>,
    /// Has the windows blob; none when the index holds its windows.
    source: Option<Origins>,
    held: Mutex<Held>,
    /// Until when no origin of the windows is asked, since none had them.
    lost_until: Mutex<Option<Instant>>,
}

#[derive(Debug)]
struct Held {
    frames: BTreeMap<SpanId, Frame>,
    bytes: Share,
    /// Of these, what no span was decoded with yet.
    unused_bytes: usize,
    /// Bytes of windows that were wanted for a span.
    wanted_bytes: u64,
    /// Spans that will be fetched, if a plan is known.
    planned: BTreeSet<SpanId>,
    /// The windows of which spans are in flight.
    coming: Vec<(Range<SpanId>, Windows)>,
}

/// A window as the blob has it.
#[derive(Debug)]
struct Frame {
    bytes: Bytes,
    from: Option<OriginId>,
    /// Its span was decoded: it is kept for comparing only.
    is_used: bool,
}

impl Held {
    /// Makes room for a window and keeps it. What is only for comparing goes first, because the others would have to be
    /// fetched again if needed.
    fn put(&mut self, span: SpanId, bytes: Bytes, from: Option<OriginId>) {
        self.remove(span);
        if !self.has_room(bytes.len()) {
            self.frames.retain(|_, frame| !frame.is_used);
            self.bytes.set(self.unused_bytes);
        }
        if !self.has_room(bytes.len()) {
            // Left over from spans that never came.
            self.frames.clear();
            self.unused_bytes = 0;
            self.bytes.set(0);
        }
        self.bytes.set(self.bytes.bytes() + bytes.len());
        self.unused_bytes += bytes.len();
        self.frames.insert(span, Frame { bytes, from, is_used: false });
    }

    fn remove(&mut self, span: SpanId) {
        self.note_use(span);
        if let Some(frame) = self.frames.remove(&span) {
            self.bytes.set(self.bytes.bytes() - frame.bytes.len());
        }
    }

    /// Whether so many more bytes may be held: by this layer, and by all.
    fn has_room(&self, bytes: usize) -> bool {
        let held = self.bytes.bytes();
        held + bytes <= HELD_BYTES_MAX && (held == 0 || WINDOWS.fits(bytes))
    }

    fn note_use(&mut self, span: SpanId) {
        if let Some(frame) = self.frames.get_mut(&span)
            && !std::mem::replace(&mut frame.is_used, true)
        {
            self.unused_bytes -= frame.bytes.len();
        }
    }

    /// How many bytes of windows may come along with those that are wanted.
    fn along_bytes(&self) -> u64 {
        self.wanted_bytes.min(ALONG_BYTES_MAX).min(self.room())
    }

    /// How many bytes may come that no span in flight needs.
    const fn room(&self) -> u64 {
        UNUSED_BYTES_MAX.saturating_sub(self.unused_bytes) as u64
    }
}

impl Default for Held {
    fn default() -> Self {
        Self {
            frames: BTreeMap::new(),
            bytes: WINDOWS.share(),
            unused_bytes: 0,
            wanted_bytes: 0,
            planned: BTreeSet::new(),
            coming: Vec::new(),
        }
    }
}

impl Histories {
    pub(super) fn new(index: Arc<LayerIndex>, store: Arc<LayerStore>, source: Option<Origins>) -> Self {
        Self { index, store, source, held: Mutex::default(), lost_until: Mutex::default() }
    }

    pub(super) const fn source(&self) -> Option<&Origins> {
        self.source.as_ref()
    }

    /// Whether fetching the windows failed recently.
    pub(super) fn are_lost(&self) -> bool {
        self.lost_until.lock().is_some_and(|until| Instant::now() < until)
    }

    /// Waits for windows that a span needs whose own bytes have come. Those that are late are lost for a while, unless
    /// they come after all.
    pub(super) async fn arrival(&self, windows: Windows) -> Result<(), Cause> {
        timeout(PATIENCE, windows).await.unwrap_or_else(|_| {
            *self.lost_until.lock() = Some(Instant::now() + LOST_FOR);
            Err(Cause::Deadline { limit: PATIENCE })
        })
    }

    /// Whether the span needs a window from elsewhere that is not held.
    pub(super) fn lacks(&self, span: SpanId) -> bool {
        let follows_present = span.checked_sub(1).is_some_and(|before| self.store.is_present(before));
        self.index.window_place(span).is_some() && !follows_present && !self.held.lock().frames.contains_key(&span)
    }

    /// Plans these spans as well.
    pub(super) fn plan(&self, spans: Range<SpanId>) {
        self.held.lock().planned.extend(spans);
    }

    pub(super) fn forget_plans(&self) {
        self.held.lock().planned.clear();
    }

    /// The windows that the flight of `spans`, which are adjacent, needs from the blob. `fetch` starts to fetch those
    /// of the spans that it is given, immediately and whether or not a caller waits.
    pub(super) fn for_flight(&self, spans: Range<SpanId>, fetch: impl FnOnce(Range<SpanId>) -> Windows) -> Windows {
        let mut held = self.held.lock();
        held.coming.retain(|(_, windows)| windows.peek().is_none());
        let (mut awaited, mut lacking): (Vec<Windows>, Vec<SpanId>) = (Vec::new(), Vec::new());
        for span in spans {
            let Some(place) = self.index.window_place(span) else { continue };
            let follows_present = span.checked_sub(1).is_some_and(|before| self.store.is_present(before));
            if follows_present {
                continue;
            }
            held.wanted_bytes += u64::from(place.length);
            if held.frames.contains_key(&span) {
                continue;
            }
            match held.coming.iter().find(|(coming, _)| coming.contains(&span)) {
                Some((_, windows)) if awaited.iter().any(|known| known.ptr_eq(windows)) => {}
                Some((_, windows)) => awaited.push(windows.clone()),
                None => lacking.push(span),
            }
        }
        if let (Some(first), Some(last)) = (lacking.first(), lacking.last()) {
            let is_lacking = |span: SpanId| {
                !held.frames.contains_key(&span) && !held.coming.iter().any(|(coming, _)| coming.contains(&span))
            };
            let place = |span: SpanId| self.index.window_place(span).map(|place| place.offset..end_of(place));
            let blob = Blob { count: self.store.spans(), place: &place };
            let range = if held.planned.is_empty() {
                blob.with_near(*first..*last + 1, held.along_bytes(), &is_lacking)
            } else {
                let room = held.room().min(PLANNED_BYTES_MAX);
                blob.with_planned(*first..*last + 1, room, &is_lacking, &held.planned)
            };
            let windows = fetch(range.clone());
            held.coming.push((range, windows.clone()));
            awaited.push(windows);
        }
        match awaited.len() {
            0 => future::ready(Ok(())).boxed().shared(),
            1 => awaited.remove(0),
            _ => future::try_join_all(awaited).map(|done| done.map(drop)).boxed().shared(),
        }
    }

    /// Fetches the windows of `spans`; says how many bytes came.
    pub(super) async fn fetch(&self, spans: Range<SpanId>, stall_limit: Duration) -> Result<u64, Cause> {
        let places = |spans: Range<SpanId>| spans.filter_map(|span| Some((span, *self.index.window_place(span)?)));
        let last = places(spans.clone()).next_back();
        let (Some(first), Some(end)) = (places(spans.clone()).next(), last.map(|(_, place)| end_of(&place))) else {
            return Ok(0);
        };
        let Some(source) = &self.source else { return Err(Cause::NoWindow { span: first.0 }) };
        let start = first.1.offset;
        let read = read(source, start..end, stall_limit).await;
        *self.lost_until.lock() = read.is_err().then(|| Instant::now() + LOST_FOR);
        let (bytes, from) = read?;
        let mut held = self.held.lock();
        for (span, place) in places(spans) {
            let at = within(&(place.offset..place.offset + u64::from(place.length)), start);
            // A copy: a slice would keep all of the answer in memory for one window.
            held.put(span, Bytes::copy_from_slice(bytes.get(at).unwrap_or_default()), from);
        }
        Ok(bytes.len() as u64)
    }

    /// The history of a span.
    pub(super) fn window(&self, span: SpanId) -> Result<Window, Cause> {
        if let Some(window) = self.index.window(span) {
            return Ok(window.clone());
        }
        if let Some(window) = self.end_before(span) {
            return Ok(window);
        }
        self.fetched(span)?.ok_or(Cause::NoWindow { span })
    }

    /// The history of a span whose predecessor is here, or whose window the index holds.
    pub(super) fn of_neighbour(&self, span: SpanId) -> Result<Window, Cause> {
        let window = self.end_before(span).or_else(|| self.index.window(span).cloned());
        window.ok_or(Cause::NoWindow { span })
    }

    /// The window that was fetched for a span, if it was.
    fn fetched(&self, span: SpanId) -> Result<Option<Window>, Cause> {
        let frame = self.held.lock().frames.get(&span).map(|frame| (frame.bytes.clone(), frame.from));
        let (Some((frame, from)), Some(place)) = (frame, self.index.window_place(span)) else { return Ok(None) };
        let window = place.window(&frame);
        if window.is_err() {
            self.held.lock().remove(span);
            if let (Some(source), Some(from)) = (&self.source, from) {
                source.blame(from);
            }
        }
        Ok(Some(window?))
    }

    /// The window of a span as far as it is known without fetching it.
    pub(super) fn known(&self, span: SpanId) -> Option<Window> {
        self.index.window(span).cloned().or_else(|| self.fetched(span).ok().flatten())
    }

    /// The span was decoded: its window is needed only as long as its digest is unknown.
    pub(super) fn done(&self, span: SpanId) {
        let is_known = span.checked_sub(1).is_none_or(|before| self.store.is_present(before));
        let mut held = self.held.lock();
        if is_known { held.remove(span) } else { held.note_use(span) }
    }

    /// The end of what comes before a span, if that is in the store.
    fn end_before(&self, span: SpanId) -> Option<Window> {
        let start = self.index.spans.span(span)?.uncompressed.start;
        let length = usize::try_from(start).unwrap_or(usize::MAX).min(WINDOW_BYTES);
        let mut window = vec![0; WINDOW_BYTES];
        let reading = self.store.read(start - length as u64, window.get_mut(WINDOW_BYTES - length..)?);
        // What is not there, or cannot be read, is fetched.
        matches!(reading, Ok(Reading::Done)).then(|| Window::from_bytes(window.into())).flatten()
    }
}

fn end_of(place: &WindowPlace) -> u64 {
    place.offset + u64::from(place.length)
}

async fn read(source: &Origins, range: Range<u64>, limit: Duration) -> Result<(Bytes, Option<OriginId>), Cause> {
    let late = |_| Cause::Deadline { limit };
    let expected = range.end - range.start;
    let delivery = timeout(limit, source.fetch(range.clone())).await.map_err(late)??;
    let from = delivery.from;
    let mut chunks = delivery.part(range);
    let mut bytes = BytesMut::new();
    while (bytes.len() as u64) < expected {
        let chunk = timeout(limit, chunks.next()).await.map_err(late)?;
        bytes.extend_from_slice(&chunk.ok_or(Cause::Short { expected, found: bytes.len() as u64 })??);
    }
    Ok((bytes.freeze(), from))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FRAME: usize = 64 << 10;
    const FIT: u32 = (HELD_BYTES_MAX / FRAME) as u32;

    fn full() -> Held {
        let mut held = Held { wanted_bytes: u64::MAX, ..Held::default() };
        for span in 0..FIT {
            held.put(span, Bytes::from(vec![0; FRAME]), None);
        }
        held
    }

    #[test]
    fn room_is_made_of_windows_that_were_used() {
        let mut held = full();
        assert_eq!(held.bytes.bytes(), HELD_BYTES_MAX);
        held.note_use(3);
        held.note_use(3);
        held.put(FIT, Bytes::from(vec![1; FRAME]), None);
        assert_eq!(held.bytes.bytes(), HELD_BYTES_MAX);
        assert_eq!(held.unused_bytes, HELD_BYTES_MAX);
        assert!(!held.frames.contains_key(&3), "what was used is gone");
        assert_eq!(held.frames.len(), FIT as usize, "and nothing else");
    }

    #[test]
    fn what_never_came_does_not_stay_for_ever() {
        let mut held = full();
        held.put(FIT, Bytes::from(vec![1; FRAME]), None);
        assert_eq!((held.frames.len(), held.bytes.bytes(), held.unused_bytes), (1, FRAME, FRAME));
    }

    #[test]
    fn nothing_comes_along_while_much_is_unused() {
        let mut held = full();
        assert_eq!(held.along_bytes(), 0);
        for span in 0..FIT {
            held.note_use(span);
        }
        assert_eq!(held.along_bytes(), ALONG_BYTES_MAX);
        held.put(0, Bytes::from(vec![0; FRAME]), None);
        held.remove(1);
        assert_eq!((held.unused_bytes, held.bytes.bytes()), (FRAME, HELD_BYTES_MAX - FRAME));
        let nearly = Held { unused_bytes: UNUSED_BYTES_MAX - 1, wanted_bytes: u64::MAX, ..Held::default() };
        assert_eq!(nearly.along_bytes(), 1);
    }
}
