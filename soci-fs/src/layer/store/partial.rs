//! Pages of spans that are there before their spans are.
//!
//! A start-up pack brings the pages that a program will touch, not whole spans. They are written where they belong in
//! the layer's file at once, and a bit for each page in memory says so; a read whose pages all have their bit is
//! answered. A span stays absent however many of its pages are there: a pack is believed only until the span itself
//! comes, with which its pages are compared.
//!
//! The bits are in memory only. But a span of which a pack has brought every page is recorded in the file `packed`,
//! which has the form of `present`, so that another mount of the same claim need not fetch the pack again; other pages
//! are forgotten by a restart, which costs bytes and no trust. A page that two spans share has a bit in each, for the
//! part that lies in it. Invariants: bytes of a present span are never written here, nor any of a proven layer; a span
//! that is evicted, distrusted or written as a whole has no bits left; no lock is held over anything but local file
//! calls.

use std::collections::HashMap;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Mutex, MutexGuard};
use soci_index::format::profile::PAGE_BYTES;
use soci_index::format::span::SpanId;

use crate::layer::store::StoreError;
use crate::layer::store::layer::{LayerStore, PACKED, load};
use crate::layer::store::present::Checksum;

#[cfg(test)]
mod tests;

/// Pages of the spans of one layer.
#[derive(Debug, Default)]
pub(super) struct Partial {
    /// Whether there ever was a page, so that an unused table costs nothing.
    is_used: AtomicBool,
    pages: Mutex<HashMap<SpanId, Pages>>,
    /// Held while a part of a span or a whole one is written, so that the two do not mix.
    filling: Mutex<()>,
}

/// The pages of one span.
#[derive(Debug)]
struct Pages {
    /// Number of its first page in the layer.
    first: u64,
    bits: Box<[u64]>,
}

/// What became of a span's pages when the span came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Parts {
    /// There were none, or they were the same.
    Agree,
    /// A page had other bytes: the pack that brought it is forged or damaged.
    Differ {
        /// Where in the layer the page begins, as far as it lies in the span.
        offset: u64,
    },
}

impl Pages {
    fn of(span: &Range<u64>) -> Self {
        let pages = touching(span);
        let words = usize::try_from((pages.end - pages.start).div_ceil(64)).unwrap_or(0);
        Self { first: pages.start, bits: vec![0; words].into() }
    }

    fn place(&self, page: u64) -> Option<(usize, u64)> {
        let number = page.checked_sub(self.first)?;
        Some((usize::try_from(number / 64).ok()?, 1 << (number % 64)))
    }

    fn set(&mut self, page: u64) {
        if let Some((word, bit)) = self.place(page)
            && let Some(word) = self.bits.get_mut(word)
        {
            *word |= bit;
        }
    }

    /// With every page there.
    fn full(span: &Range<u64>) -> Self {
        let mut pages = Self::of(span);
        touching(span).for_each(|page| pages.set(page));
        pages
    }

    fn has(&self, page: u64) -> bool {
        self.place(page).is_some_and(|(word, bit)| self.bits.get(word).is_some_and(|word| word & bit != 0))
    }
}

/// The pages that have bytes in a range.
fn touching(range: &Range<u64>) -> Range<u64> {
    range.start / PAGE_BYTES..range.end.div_ceil(PAGE_BYTES)
}

impl Partial {
    /// Whether all pages of `bytes`, which lie in the span, are there.
    pub(super) fn has(&self, span: SpanId, bytes: &Range<u64>) -> bool {
        self.is_used.load(Ordering::Acquire)
            && self.pages.lock().get(&span).is_some_and(|pages| touching(bytes).all(|page| pages.has(page)))
    }

    /// Whether any page of the span is there.
    fn has_any(&self, span: SpanId) -> bool {
        self.is_used.load(Ordering::Acquire) && self.pages.lock().contains_key(&span)
    }

    /// Forgets the pages of a span. Whether there were any.
    pub(super) fn forget(&self, span: SpanId) -> bool {
        self.is_used.load(Ordering::Acquire) && self.pages.lock().remove(&span).is_some()
    }

    /// Keeps parts from being written while a whole span is.
    pub(super) fn filling(&self) -> Option<MutexGuard<'_, ()>> {
        let is_used = self.is_used.load(Ordering::Acquire);
        is_used.then(|| self.filling.lock())
    }
}

impl LayerStore {
    /// Makes ready for [`LayerStore::write_part`]: waits for writers that started before parts were in use.
    pub fn expect_parts(&self) {
        let _exclusive = self.writing.write();
        self.partial.is_used.store(true, Ordering::Release);
    }

    /// Whether a part of the span is there, though not the whole of it.
    #[must_use]
    pub fn has_parts(&self, span: SpanId) -> bool {
        self.partial.has_any(span)
    }

    /// Whether all bytes of the span can be read: it is present, or each of its pages is there.
    #[must_use]
    pub fn is_readable(&self, span: SpanId) -> bool {
        self.is_present(span) || self.partial.has(span, &self.place(span))
    }

    /// Stores bytes of the layer that have been checked and that need not be a whole span. What lies in spans that are
    /// present is passed over. Of a page that is not filled up to its end, or to its span's, nothing will be shown.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn write_part(&self, offset: u64, bytes: &[u8]) -> Result<(), StoreError> {
        if !self.partial.is_used.load(Ordering::Acquire) {
            self.expect_parts();
        }
        let end = offset.saturating_add(bytes.len() as u64).min(self.size());
        let mut at = offset;
        while at < end {
            let Some((span, place)) = self.span_at(at) else { return Ok(()) };
            let part = at..place.end.min(end);
            let within = |at: u64| usize::try_from(at - offset).unwrap_or(bytes.len());
            self.write_within(span, &place, &part, &bytes[within(part.start)..within(part.end)])?;
            at = part.end;
        }
        Ok(())
    }

    fn write_within(
        &self,
        span: SpanId,
        place: &Range<u64>,
        part: &Range<u64>,
        bytes: &[u8],
    ) -> Result<(), StoreError> {
        let _shared = self.writing.read();
        let _filling = self.partial.filling.lock();
        if self.is_present(span) || self.is_proven() {
            return Ok(());
        }
        self.data.write_all_at(bytes, part.start).map_err(self.failed("write", "data"))?;
        self.common.written.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        self.touch(span);
        let is_whole = {
            let mut all = self.partial.pages.lock();
            let pages = all.entry(span).or_insert_with(|| Pages::of(place));
            for page in touching(part) {
                let filled = within(page, place);
                if part.start <= filled.start && filled.end <= part.end {
                    pages.set(page);
                }
            }
            touching(place).all(|page| pages.has(page))
        };
        if is_whole && self.packed.is_some() {
            let checksum = Checksum::of(&self.bytes_of(place)?);
            self.note_packed(span, checksum)?;
        }
        Ok(())
    }

    fn bytes_of(&self, place: &Range<u64>) -> Result<Vec<u8>, StoreError> {
        let mut bytes = vec![0; usize::try_from(place.end - place.start).unwrap_or(0)];
        self.data.read_exact_at(&mut bytes, place.start).map_err(self.failed("read", "data"))?;
        Ok(bytes)
    }

    /// Records that a pack has filled a span, or that the span is not its pages any more.
    pub(super) fn note_packed(&self, span: SpanId, checksum: Checksum) -> Result<(), StoreError> {
        let Some(packed) = &self.packed else { return Ok(()) };
        let written = packed.write_all_at(&checksum.0.to_le_bytes(), Checksum::position(span));
        written.map_err(self.failed("write", PACKED))
    }

    /// Finds the spans that a pack had filled before: those of this boot, and of another one those that the disk has
    /// kept.
    pub(super) fn restore_packed(&self) -> Result<(), StoreError> {
        let Some(packed) = self.packed.as_ref().filter(|_| !self.is_proven()) else { return Ok(()) };
        let recorded = load(packed, &self.header).map_err(self.failed("read", PACKED))?;
        for (span, checksum) in (0..self.spans()).zip(recorded) {
            if checksum.is_absent() || self.is_present(span) {
                continue;
            }
            let place = self.place(span);
            if checksum.is_fresh() || checksum.matches(&self.bytes_of(&place)?) {
                self.partial.is_used.store(true, Ordering::Release);
                self.partial.pages.lock().insert(span, Pages::full(&place));
            }
        }
        Ok(())
    }

    /// Compares the pages of a span that are there with the span's own bytes.
    pub(super) fn compare_parts(&self, span: SpanId, place: &Range<u64>, bytes: &[u8]) -> Result<Parts, StoreError> {
        if !self.partial.has_any(span) {
            return Ok(Parts::Agree);
        }
        let stored = self.bytes_of(place)?;
        let all = self.partial.pages.lock();
        let Some(pages) = all.get(&span) else { return Ok(Parts::Agree) };
        let differs = |page: &u64| {
            let part = within(*page, place);
            let at = |offset: u64| usize::try_from(offset - place.start).unwrap_or(bytes.len());
            let part = at(part.start)..at(part.end);
            pages.has(*page) && stored.get(part.clone()) != bytes.get(part)
        };
        let differing = touching(place).find(differs);
        Ok(differing.map_or(Parts::Agree, |page| Parts::Differ { offset: within(page, place).start }))
    }

    /// Forgets the pages of all spans that are not there.
    ///
    /// # Errors
    /// [`StoreError::Io`]: in this process they are forgotten nevertheless.
    pub fn forget_parts(&self) -> Result<(), StoreError> {
        self.partial.pages.lock().clear();
        // A file that is too short is started over.
        let forgotten = self.packed.as_ref().map_or(Ok(()), |packed| packed.set_len(0));
        forgotten.map_err(self.failed("empty", PACKED))
    }
}

/// That of a page which lies in a span.
fn within(page: u64, span: &Range<u64>) -> Range<u64> {
    (page * PAGE_BYTES).max(span.start)..((page + 1) * PAGE_BYTES).min(span.end)
}
