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
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Mutex, MutexGuard};
use soci_index::format::profile::PAGE_BYTES;
use soci_index::format::span::SpanId;

#[cfg(test)]
mod tests;

/// The file that says which spans a pack has filled.
pub(super) const PACKED: &str = "packed";

/// Pages of the spans of one layer.
#[derive(Debug, Default)]
pub(super) struct Partial {
    /// Whether there ever was a page, so that an unused table costs nothing.
    pub(super) is_used: AtomicBool,
    pub(super) pages: Mutex<HashMap<SpanId, Pages>>,
    /// Held while a part of a span or a whole one is written, so that the two do not mix.
    pub(super) filling: Mutex<()>,
}

/// The pages of one span.
#[derive(Debug)]
pub(super) struct Pages {
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
    pub(super) fn of(span: &Range<u64>) -> Self {
        let pages = touching(span);
        let words = usize::try_from((pages.end - pages.start).div_ceil(64)).unwrap_or(0);
        Self { first: pages.start, bits: vec![0; words].into() }
    }

    fn place(&self, page: u64) -> Option<(usize, u64)> {
        let number = page.checked_sub(self.first)?;
        Some((usize::try_from(number / 64).ok()?, 1 << (number % 64)))
    }

    pub(super) fn set(&mut self, page: u64) {
        if let Some((word, bit)) = self.place(page)
            && let Some(word) = self.bits.get_mut(word)
        {
            *word |= bit;
        }
    }

    /// With every page there.
    pub(super) fn full(span: &Range<u64>) -> Self {
        let mut pages = Self::of(span);
        touching(span).for_each(|page| pages.set(page));
        pages
    }

    pub(super) fn has(&self, page: u64) -> bool {
        self.place(page).is_some_and(|(word, bit)| self.bits.get(word).is_some_and(|word| word & bit != 0))
    }
}

/// The pages that have bytes in a range.
pub(super) fn touching(range: &Range<u64>) -> Range<u64> {
    range.start / PAGE_BYTES..range.end.div_ceil(PAGE_BYTES)
}

impl Partial {
    /// Whether all pages of `bytes`, which lie in the span, are there.
    pub(super) fn has(&self, span: SpanId, bytes: &Range<u64>) -> bool {
        self.is_used.load(Ordering::Acquire)
            && self.pages.lock().get(&span).is_some_and(|pages| touching(bytes).all(|page| pages.has(page)))
    }

    /// Whether any page of the span is there.
    pub(super) fn has_any(&self, span: SpanId) -> bool {
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
