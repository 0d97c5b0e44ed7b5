//! Writing and comparing pages of spans that are not there as a whole ([`crate::layer::store::partial`]).

use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::Ordering;

use soci_index::format::profile::PAGE_BYTES;
use soci_index::format::span::SpanId;

use crate::layer::store::error::StoreError;
use crate::layer::store::layer::LayerStore;
use crate::layer::store::partial::{PACKED, Pages, Parts, touching};
use crate::layer::store::present::{Checksum, load};

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
