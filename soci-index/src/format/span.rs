//! Span arithmetic: which compressed bytes hold which uncompressed bytes.
//!
//! Only numbers here. A [`SpanTable`] is checked in its constructor: spans are in order, do not overlap in the
//! uncompressed layer, cover it from 0 to its end without a gap, and lie inside the blob. So lookups cannot fail and
//! nothing later needs to check again. In the *compressed* blob two adjacent spans may share one byte: a deflate block
//! may end inside it (see [`Span::bits`]).

use std::ops::Range;

use crate::format::class::{Class, Classified};
use crate::format::limits::Limits;

/// Number of a span in its layer, from 0.
pub type SpanId = u32;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// Bytes of the layer blob that are needed to decode the span, shared first byte included.
    pub compressed: Range<u64>,
    /// Bytes of the uncompressed layer that it yields.
    pub uncompressed: Range<u64>,
    /// 0, or how many bits (the top ones) of the first compressed byte belong to this span: 1 to 7.
    pub bits: u8,
    /// SHA-256 over the `compressed` range. `None` only in a table whose source has no digests.
    pub digest: Option<[u8; 32]>,
}

/// The spans of one layer, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpanTable {
    spans: Vec<Span>,
}

/// Why a list of spans is not a span table.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpanError {
    /// More spans than [`Limits::spans_max`].
    #[error("the layer has {count} spans, more than the limit of {limit}")]
    TooMany { count: usize, limit: usize },
    /// A span starts where it should not, or ends before it starts.
    #[error(
        "span {span} covers bytes {start}..{end} of the {space} layer, expected a range from {expected} on within {size}"
    )]
    Range {
        span: usize,
        start: u64,
        end: u64,
        /// Where it should start (uncompressed) or the least start allowed (compressed).
        expected: u64,
        /// Size of the layer in that space.
        size: u64,
        /// `compressed` or `uncompressed`.
        space: &'static str,
    },
    /// A span decodes to more than [`Limits::span_bytes_max`].
    #[error("span {span} decodes to {bytes} bytes, more than the limit of {limit} (max_span_bytes)")]
    TooLarge { span: usize, bytes: u64, limit: u64 },
    /// More than 7 bits of the shared byte.
    #[error("span {span} claims {bits} bits of its first byte; 0 to 7 are possible")]
    Bits { span: usize, bits: u8 },
}

impl Classified for SpanError {
    fn class(&self) -> Class {
        Class::Content
    }
}

impl SpanTable {
    /// Checks `spans` against the sizes of the layer.
    ///
    /// # Errors
    /// [`SpanError`] when a span leaves the layer, overlaps or leaves a gap, is empty, or exceeds a limit.
    pub fn new(
        spans: Vec<Span>,
        compressed_size: u64,
        uncompressed_size: u64,
        limits: &Limits,
    ) -> Result<Self, SpanError> {
        if spans.len() > limits.spans_max {
            return Err(SpanError::TooMany { count: spans.len(), limit: limits.spans_max });
        }
        let mut previous = Span { compressed: 0..0, uncompressed: 0..0, bits: 0, digest: None };
        for (span, this) in spans.iter().enumerate() {
            check(span, this, &previous, compressed_size, uncompressed_size, limits)?;
            previous = this.clone();
        }
        if previous.uncompressed.end != uncompressed_size {
            let (start, end) = (previous.uncompressed.end, uncompressed_size);
            let (expected, size) = (start, uncompressed_size);
            return Err(SpanError::Range { span: spans.len(), start, end, expected, size, space: "uncompressed" });
        }
        Ok(Self { spans })
    }

    /// How many spans there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.spans.len()
    }

    /// Whether the layer is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }

    /// All spans in order.
    #[must_use]
    pub fn spans(&self) -> &[Span] {
        &self.spans
    }

    /// One span, or `None` past the end.
    #[must_use]
    pub fn span(&self, id: SpanId) -> Option<&Span> {
        self.spans.get(id as usize)
    }

    /// The spans that hold the uncompressed bytes `range`; empty for an empty range or one past the end of the layer.
    #[must_use]
    pub fn covering(&self, range: Range<u64>) -> Range<SpanId> {
        if range.is_empty() {
            return 0..0;
        }
        let first = self.spans.partition_point(|span| span.uncompressed.end <= range.start);
        let last = self.spans.partition_point(|span| span.uncompressed.start < range.end);
        // The constructor bounds the number of spans far below 2^32.
        first as SpanId..last.max(first) as SpanId
    }
}

fn check(
    span: usize,
    this: &Span,
    previous: &Span,
    compressed_size: u64,
    uncompressed_size: u64,
    limits: &Limits,
) -> Result<(), SpanError> {
    let range = |space, range: &Range<u64>, expected, size| {
        Err(SpanError::Range { span, start: range.start, end: range.end, expected, size, space })
    };
    if this.bits > 7 {
        return Err(SpanError::Bits { span, bits: this.bits });
    }
    let (c, u) = (&this.compressed, &this.uncompressed);
    if u.start != previous.uncompressed.end
        || u.end < u.start
        || u.end > uncompressed_size
        || (u.is_empty() && span > 0)
    {
        return range("uncompressed", u, previous.uncompressed.end, uncompressed_size);
    }
    // The first span may begin anywhere (behind a gzip header); later ones begin where the one before ended, or one
    // byte earlier when the two share a byte.
    let expected = if span == 0 { c.start } else { previous.compressed.end - u64::from(this.bits > 0) };
    if c.start != expected || c.end <= c.start || c.end > compressed_size {
        return range("compressed", c, expected, compressed_size);
    }
    let bytes = u.end - u.start;
    if bytes > limits.span_bytes_max {
        return Err(SpanError::TooLarge { span, bytes, limit: limits.span_bytes_max });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(compressed: Range<u64>, uncompressed: Range<u64>, bits: u8) -> Span {
        Span { compressed, uncompressed, bits, digest: None }
    }

    /// Three spans; the second and the third share byte 59.
    fn table() -> SpanTable {
        let spans = vec![span(10..30, 0..100, 0), span(30..60, 100..250, 0), span(59..90, 250..300, 3)];
        SpanTable::new(spans, 90, 300, &Limits::DEFAULT).unwrap()
    }

    #[test]
    fn ranges_are_covered() {
        for (range, spans) in [
            (0..1, 0..1),
            (0..300, 0..3),
            (99..100, 0..1),
            (100..101, 1..2),
            (99..101, 0..2),
            (250..300, 2..3),
            (299..1000, 2..3),
            (300..400, 3..3),
            (5..5, 0..0),
            (0..u64::MAX, 0..3),
        ] {
            assert_eq!(table().covering(range.clone()), spans, "{range:?}");
        }
        let empty = SpanTable::new(vec![], 0, 0, &Limits::DEFAULT).unwrap();
        assert!(empty.is_empty() && empty.covering(0..10).is_empty());
    }

    #[test]
    fn unsound_tables_are_refused() {
        let good = || table().spans().to_vec();
        let refused = |change: &dyn Fn(&mut Vec<Span>)| {
            let mut spans = good();
            change(&mut spans);
            SpanTable::new(spans, 90, 300, &Limits::DEFAULT).unwrap_err()
        };
        // A gap, an overlap, an end beyond the layer, an empty span, an end before the start.
        assert!(matches!(refused(&|spans| spans[1].uncompressed.start = 101), SpanError::Range { span: 1, .. }));
        assert!(matches!(refused(&|spans| spans[1].uncompressed.start = 99), SpanError::Range { span: 1, .. }));
        assert!(matches!(refused(&|spans| spans[2].uncompressed.end = 301), SpanError::Range { span: 2, .. }));
        assert!(matches!(refused(&|spans| spans[1].uncompressed.end = 100), SpanError::Range { .. }));
        assert!(matches!(refused(&|spans| spans[0].uncompressed.start = 1), SpanError::Range { span: 0, .. }));
        // In the compressed layer: a gap, a shared byte without bits, one beyond the end, nothing at all.
        assert!(matches!(refused(&|spans| spans[1].compressed.start = 31), SpanError::Range { span: 1, .. }));
        assert!(matches!(refused(&|spans| spans[2].bits = 0), SpanError::Range { span: 2, .. }));
        assert!(matches!(refused(&|spans| spans[2].compressed.end = 91), SpanError::Range { span: 2, .. }));
        assert!(matches!(refused(&|spans| spans[0].compressed.end = 10), SpanError::Range { span: 0, .. }));
        assert!(matches!(refused(&|spans| spans[2].bits = 8), SpanError::Bits { span: 2, bits: 8 }));
        assert!(matches!(refused(&|spans| spans.truncate(2)), SpanError::Range { span: 2, .. }));

        let few = Limits { spans_max: 2, ..Limits::DEFAULT };
        assert!(matches!(SpanTable::new(good(), 90, 300, &few), Err(SpanError::TooMany { count: 3, limit: 2 })));
        let small = Limits { span_bytes_max: 149, ..Limits::DEFAULT };
        assert!(matches!(
            SpanTable::new(good(), 90, 300, &small),
            Err(SpanError::TooLarge { span: 1, bytes: 150, .. })
        ));
    }
}
