//! What is fetched before it is read: speculation on the next reads, unless a profile is active, and a pack that comes.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;
use soci_index::format::index::LayerIndex;
use soci_index::format::span::SpanId;

use crate::layer::incoming::Incoming;
use crate::layer::readahead::{self, Facts, Foresight, Line, ReadAhead};
use crate::layer::reader::LayerReader;
use crate::layer::store::LayerStore;

/// Foresees reads of one layer.
#[derive(Debug)]
pub struct Ahead {
    index: Arc<LayerIndex>,
    store: Arc<LayerStore>,
    guesses: Mutex<ReadAhead>,
    /// Planned prefetches in progress; while there are any, speculation is off.
    planners: AtomicUsize,
    /// File-level prefetches in progress.
    followers: AtomicUsize,
    /// A pack that brings bytes of the layer.
    incoming: Mutex<Option<Arc<Incoming>>>,
}

/// Guard: disables speculation while held.
#[derive(Debug)]
pub(crate) struct Plan(LayerReader, Foresight);

impl Plan {
    pub(super) fn new(reader: &LayerReader, foresight: Foresight) -> Self {
        reader.ahead().planners(foresight).fetch_add(1, Ordering::AcqRel);
        Self(reader.clone(), foresight)
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        let before = self.0.ahead().planners(self.1).fetch_sub(1, Ordering::AcqRel);
        if before == 1 && self.1 == Foresight::Bytes {
            self.0.fetching().forget_plans();
        }
    }
}

impl Ahead {
    /// Reads at most `bytes_max` bytes ahead of a sequential reader.
    pub(super) fn new(index: Arc<LayerIndex>, store: Arc<LayerStore>, bytes_max: u64) -> Self {
        let span_bytes = index.uncompressed_size.checked_div(index.spans.len() as u64).unwrap_or(0).max(1);
        let ahead_spans = u32::try_from(bytes_max / span_bytes).unwrap_or(u32::MAX);
        let count = store.spans();
        let fetched_mean = index.compressed_size / u64::from(count.max(1));
        Self {
            index,
            store,
            guesses: Mutex::new(ReadAhead::new(count, fetched_mean, ahead_spans)),
            planners: AtomicUsize::new(0),
            followers: AtomicUsize::new(0),
            incoming: Mutex::default(),
        }
    }

    /// Registers an incoming pack.
    pub(crate) fn expect(&self, incoming: Arc<Incoming>) {
        *self.incoming.lock() = Some(incoming);
    }

    fn planners(&self, foresight: Foresight) -> &AtomicUsize {
        match foresight {
            Foresight::Bytes => &self.planners,
            Foresight::Files => &self.followers,
        }
    }

    /// Registers a prefetch of those of `spans` that are absent and not named before; returns their compressed bytes.
    pub(crate) fn foresee(&self, spans: Range<SpanId>, foresight: Foresight) -> u64 {
        let new = self.guesses.lock().foresee(spans, foresight, &|span| !self.store.is_present(span));
        self.compressed_bytes(new)
    }

    /// Compressed bytes of `spans`.
    pub(super) fn compressed_bytes(&self, spans: impl IntoIterator<Item = SpanId>) -> u64 {
        let size = |span| self.index.spans.span(span).map_or(0, |span| span.compressed.end - span.compressed.start);
        spans.into_iter().map(size).sum()
    }

    /// Compressed bytes, about, that were foreseen: read since, and not read yet.
    pub(crate) fn foreseen_bytes(&self) -> (u64, u64) {
        let counts = self.counts();
        let mean = self.index.compressed_size / u64::from(self.store.spans().max(1));
        (u64::from(counts.foreseen - counts.foreseen_unread) * mean, u64::from(counts.foreseen_unread) * mean)
    }

    /// How far reading ahead was right until now.
    #[must_use]
    pub fn counts(&self) -> readahead::Counts {
        self.guesses.lock().counts()
    }

    /// Records a read of `spans` of the file in the bytes `file`, and returns what to read ahead over a line like `line`.
    pub(super) fn of_read(
        &self,
        spans: Range<SpanId>,
        file: &Range<u64>,
        is_miss: bool,
        line: Line,
    ) -> impl Iterator<Item = SpanId> {
        let ranges = if self.planners.load(Ordering::Acquire) > 0 || self.incoming().is_some() {
            self.guesses.lock().note_only(spans);
            Vec::new()
        } else {
            let is_foreseen = self.followers.load(Ordering::Acquire) > 0;
            let facts = Facts { file: self.index.spans.covering(file.clone()), is_miss, is_foreseen, line };
            self.guesses.lock().record_read(spans, &facts, &|span| !self.store.is_readable(span))
        };
        ranges.into_iter().flatten()
    }

    /// The pack that is in flight; one that has ended is forgotten.
    pub(super) fn incoming(&self) -> Option<Arc<Incoming>> {
        let mut incoming = self.incoming.lock();
        if incoming.as_ref().is_some_and(|incoming| !incoming.is_active()) {
            *incoming = None;
        }
        incoming.clone()
    }
}
