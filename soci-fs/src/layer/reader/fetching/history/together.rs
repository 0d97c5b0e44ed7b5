//! Which windows are fetched with those that are wanted. A request costs a registry as much as hundreds of kilobytes
//! do, and most windows have a few: so they are fetched in batches, as far as they are likely to be needed.
//!
//! Pure: places of windows in their blob in, a range of spans out, which has all that were wanted.

use std::collections::BTreeSet;
use std::ops::Range;

use soci_index::format::span::SpanId;

/// A windows blob of no more than this is fetched whole when the first window is wanted.
const WHOLE_BYTES_MAX: u64 = 32 << 10;
/// Bytes of unneeded windows between two needed ones.
const GAP_BYTES_MAX: u64 = 8 << 10;

/// The windows of a layer, as their blob has them.
pub(super) struct Blob<'a> {
    /// Spans of the layer.
    pub(super) count: SpanId,
    /// Where the window of a span is; not every span has one. They are in the order of the spans.
    pub(super) place: &'a dyn Fn(SpanId) -> Option<Range<u64>>,
}

impl Blob<'_> {
    fn bytes(&self, spans: &Range<SpanId>) -> Range<u64> {
        let start = spans.clone().find_map(self.place).map_or(0, |place| place.start);
        let end = spans.clone().rev().find_map(self.place).map_or(start, |place| place.end);
        start..end
    }

    /// With adjacent windows on both sides that `is_lacking`, `bytes` in all: when no plan is known.
    pub(super) fn with_near(
        &self,
        spans: Range<SpanId>,
        bytes: u64,
        is_lacking: &dyn Fn(SpanId) -> bool,
    ) -> Range<SpanId> {
        if self.bytes(&(0..self.count)).end <= WHOLE_BYTES_MAX {
            return 0..self.count;
        }
        let wanted = self.bytes(&spans);
        let (lowest, highest) = (wanted.start.saturating_sub(bytes / 2), wanted.end.saturating_add(bytes / 2));
        let fits = |place: Range<u64>| place.start >= lowest && place.end <= highest;
        let is_near = |span: &SpanId| is_lacking(*span) && (self.place)(*span).is_none_or(fits);
        let first = (0..spans.start).rev().take_while(is_near).last().unwrap_or(spans.start);
        let last = (spans.end..self.count).take_while(is_near).last().map_or(spans.end, |last| last + 1);
        first..last
    }

    /// With others that are `planned`, over small gaps of what `is_lacking`, as long as no more than `bytes` are added:
    /// when a plan is known.
    pub(super) fn with_planned(
        &self,
        spans: Range<SpanId>,
        bytes: u64,
        is_lacking: &dyn Fn(SpanId) -> bool,
        planned: &BTreeSet<SpanId>,
    ) -> Range<SpanId> {
        let (mut first, mut last, mut all) = (spans.start, spans.end, self.bytes(&spans));
        let most = all.end.saturating_sub(all.start).saturating_add(bytes);
        for (span, place) in (spans.end..self.count).filter_map(|span| Some((span, (self.place)(span)?))) {
            let (gap, length) = (place.start.saturating_sub(all.end), place.end.saturating_sub(all.start));
            if !is_lacking(span) || gap > GAP_BYTES_MAX || length > most {
                break;
            }
            if planned.contains(&span) {
                (last, all.end) = (span + 1, place.end);
            }
        }
        for (span, place) in (0..spans.start).rev().filter_map(|span| Some((span, (self.place)(span)?))) {
            let (gap, length) = (all.start.saturating_sub(place.end), all.end.saturating_sub(place.start));
            if !is_lacking(span) || gap > GAP_BYTES_MAX || length > most {
                break;
            }
            if planned.contains(&span) {
                (first, all.start) = (span, place.start);
            }
        }
        first..last
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LENGTH: u64 = 4 << 10;

    /// A hundred spans; the first has no window.
    fn place(span: SpanId) -> Option<Range<u64>> {
        let number = u64::from(span.checked_sub(1)?);
        Some(number * LENGTH..(number + 1) * LENGTH)
    }

    const BLOB: Blob<'_> = Blob { count: 100, place: &place };

    #[test]
    fn neighbours_come_along_as_far_as_they_lack_theirs() {
        for (bytes, lacking, expected) in [
            (0, 0..100, 50..52),
            (LENGTH * 4, 0..100, 48..54),
            (LENGTH * 4, 50..100, 50..54),
            (LENGTH * 4, 49..52, 49..52),
            (u64::MAX, 0..100, 0..100),
        ] {
            let found = BLOB.with_near(50..52, bytes, &|span| lacking.contains(&span));
            assert_eq!(found, expected, "{bytes} {lacking:?}");
        }
        let small = Blob { count: 8, place: &place };
        assert_eq!(small.with_near(3..4, 0, &|_| false), 0..8, "all of a small blob");
    }

    #[test]
    fn planned_ones_come_over_gaps() {
        let far = |planned: &[SpanId], lacking: Range<SpanId>, bytes: u64| {
            let planned = planned.iter().copied().collect();
            BLOB.with_planned(50..52, bytes, &|span| lacking.contains(&span), &planned)
        };
        assert_eq!(far(&[], 0..100, u64::MAX), 50..52);
        assert_eq!(far(&[54, 47], 0..100, u64::MAX), 47..55, "over two unneeded windows");
        assert_eq!(far(&[55, 46], 0..100, u64::MAX), 50..52, "not over three");
        assert_eq!(far(&[54, 48], 49..53, u64::MAX), 50..52, "not over those that are here or on their way");
        assert_eq!(far(&[52, 53, 54, 49], 0..100, 3 * LENGTH), 50..55);
        assert_eq!(far(&[52, 53, 54, 49], 0..100, 4 * LENGTH), 49..55);
    }

    proptest! {
        /// Whatever is planned and lacking: what was wanted is in it, and what is added is bounded.
        #[test]
        fn nothing_wanted_is_left_out(
            first in 0_u32..99,
            more in 1_u32..20,
            bytes in 0_u64..100_000,
            lacking in any::<u128>(),
            planned in prop::collection::btree_set(0_u32..100, 0..100),
        ) {
            let wanted = first..(first + more).min(100);
            let is_lacking = |span: SpanId| lacking & (1 << span) != 0;
            let length = |spans: &Range<SpanId>| {
                let all = BLOB.bytes(spans);
                all.end - all.start
            };
            for found in [
                BLOB.with_near(wanted.clone(), bytes, &is_lacking),
                BLOB.with_planned(wanted.clone(), bytes, &is_lacking, &planned),
            ] {
                prop_assert!(found.start <= wanted.start && wanted.end <= found.end && found.end <= 100);
                prop_assert!(length(&found) <= length(&wanted) + bytes);
                let mut added = (found.start..wanted.start).chain(wanted.end..found.end);
                prop_assert!(added.all(|span| is_lacking(span) || place(span).is_none()));
            }
        }
    }
}
