//! How far to read ahead of a reader: a pure function of what was read before.
//!
//! A layer is a tar, so a program that reads a directory of files in archive order, or one large file from its start,
//! walks through the spans one after another, while the loader of a program jumps. Each walk is a *stream*; a handful is
//! remembered, since programs read from several places at once. A program that starts reads whole libraries, a few spans
//! in a row each, and goes on elsewhere; so a stream gets something ahead only when it is longer than that. From then on
//! its window grows, up to as many spans as it has read so far.
//!
//! Invariant, and the reason for this rule: what is fetched ahead and never read is at most what was read, plus nothing
//! for random access. Neither I/O nor a clock is known here.

use std::ops::Range;

use soci_index::span::SpanId;

/// Streams remembered. A build with eight compilers reads from about as many places.
const STREAMS: usize = 8;

/// Spans read in a row before anything is read ahead. A stream that goes on has lost some round trips by then; at four,
/// the start of an interpreter fetched a third more than it read.
const RUN_FIRST: u32 = 8;

/// Window a stream starts with.
const WINDOW_FIRST: u32 = 1;

/// Remembers the streams of one layer.
#[derive(Debug, Clone)]
pub struct ReadAhead {
    streams: Vec<Stream>,
    window_max: u32,
    reads: u64,
}

#[derive(Debug, Clone, Copy)]
struct Stream {
    /// The span after the last one read.
    next: SpanId,
    /// The span after the last one asked for ahead.
    ahead: SpanId,
    /// Spans read in a row.
    run: u32,
    /// Spans to be ahead of `next`.
    window: u32,
    /// The read that touched it last.
    touched: u64,
}

impl ReadAhead {
    /// Starts with no history. `window_max` caps how many spans are read ahead; 0 turns reading ahead off.
    #[must_use]
    pub fn new(window_max: u32) -> Self {
        Self { streams: Vec::with_capacity(STREAMS), window_max, reads: 0 }
    }

    /// Notes a read of the spans `read` and says which spans behind them to fetch too.
    ///
    /// The answer begins at or behind `read.end`, ends at `count` at the latest, and leaves out what an earlier answer
    /// of the same stream has named.
    pub fn note(&mut self, read: Range<SpanId>, count: SpanId) -> Range<SpanId> {
        let nothing = read.end..read.end;
        if read.is_empty() || self.window_max == 0 {
            return nothing;
        }
        self.reads += 1;
        let reads = self.reads;
        // A read that starts in the span a stream ended in continues it: files are smaller than spans.
        let found =
            self.streams.iter_mut().find(|stream| (stream.next.saturating_sub(1)..=stream.next).contains(&read.start));
        let Some(stream) = found else {
            self.begin(read, reads);
            return nothing;
        };
        stream.touched = reads;
        let fresh = read.end.saturating_sub(stream.next);
        if fresh == 0 {
            return nothing;
        }
        stream.next = read.end;
        stream.run = stream.run.saturating_add(fresh);
        if stream.run < RUN_FIRST {
            stream.ahead = read.end;
            return nothing;
        }
        stream.window = (stream.window * 2).max(WINDOW_FIRST).min(stream.run).min(self.window_max);
        // Not one span after each span read, but half a window at once: a request each is what reading ahead avoids.
        if stream.ahead.saturating_sub(read.end) > stream.window / 2 {
            return nothing;
        }
        let start = stream.ahead.max(read.end);
        let end = read.end.saturating_add(stream.window).min(count).max(start);
        stream.ahead = end;
        start..end
    }

    fn begin(&mut self, read: Range<SpanId>, touched: u64) {
        let stream = Stream { next: read.end, ahead: read.end, run: read.end - read.start, window: 0, touched };
        if self.streams.len() < STREAMS {
            self.streams.push(stream);
        } else if let Some(oldest) = self.streams.iter_mut().min_by_key(|stream| stream.touched) {
            *oldest = stream;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    /// Runs single-span reads and collects what each one asks for ahead.
    fn ahead(window_max: u32, count: u32, reads: &[u32]) -> Vec<Range<u32>> {
        let mut readahead = ReadAhead::new(window_max);
        reads.iter().map(|span| readahead.note(*span..*span + 1, count)).collect()
    }

    #[test]
    fn table() {
        // Random reads fetch nothing ahead.
        assert!(ahead(16, 1000, &[5, 900, 17, 400, 3, 77]).iter().all(Range::is_empty));
        // A short walk neither; a longer one lets the window grow, but never beyond what it has read.
        let walk = ahead(16, 1000, &(0..12).collect::<Vec<_>>());
        assert!(walk[..7].iter().all(Range::is_empty));
        assert_eq!(walk[7..], [8..9, 9..11, 11..14, 14..19, 12..12]);
        // Reading on inside a span neither grows the window nor starts a stream.
        let inside = ahead(16, 1000, &[0, 1, 2, 3, 4, 5, 6, 7, 7, 7, 8]);
        assert_eq!(inside[7..], [8..9, 8..8, 8..8, 9..11]);
        // Later in larger pieces.
        let walk = ahead(8, 1000, &(0..40).collect::<Vec<_>>());
        assert_eq!(walk.iter().skip(16).filter(|range| !range.is_empty()).map(Range::len).min(), Some(4));
        // Two walks at once.
        let both = ahead(16, 1000, &(0..9).flat_map(|span| [span, 500 + span]).collect::<Vec<_>>());
        assert_eq!(both[14..], [8..9, 508..509, 9..11, 509..511]);
        // The cap, the end of the layer, and off.
        let capped = ahead(2, 1000, &(0..12).collect::<Vec<_>>());
        assert!(capped.iter().all(|range| range.len() <= 2) && !capped[11].is_empty());
        assert_eq!(ahead(16, 9, &(0..9).collect::<Vec<_>>())[7..], [8..9, 9..9]);
        assert!(ahead(0, 1000, &[0, 1, 2, 3]).iter().all(Range::is_empty));
    }

    proptest! {
        /// Whatever is read, what was fetched for nothing is at most what was read; answers stay in bounds.
        #[test]
        fn over_fetch_is_bounded(
            reads in prop::collection::vec((0_u32..64, 1_u32..4), 1..200),
            window_max in 0_u32..20,
        ) {
            let mut readahead = ReadAhead::new(window_max);
            let mut read_spans = BTreeSet::new();
            let mut asked = BTreeSet::new();
            for (start, length) in reads {
                let read = start..(start + length).min(64);
                let ahead = readahead.note(read.clone(), 64);
                prop_assert!(ahead.start >= read.end && ahead.end <= 64 && ahead.len() <= window_max as usize);
                read_spans.extend(read);
                asked.extend(ahead);
                let wasted = asked.difference(&read_spans).count();
                prop_assert!(wasted <= read_spans.len() , "{wasted} of {}", read_spans.len());
            }
        }
    }
}
