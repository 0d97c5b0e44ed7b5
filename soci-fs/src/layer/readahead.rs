//! Read-ahead: which spans to fetch in addition to those that are read, as a pure function of earlier reads and of the
//! line.
//!
//! A layer is a tar. A program that starts reads some files nearly whole, shared objects mostly, though not in order:
//! it touches the pages of one here and there. It reads others that lie one behind the other in the tar. And it jumps.
//! So what is near to what was read is read next more often than not: first of all the rest of the file, then what
//! follows a stretch that was read without a gap, then what follows at all.
//!
//! A read that has to wait costs a round trip, and fetching adjacent spans along costs the transfer time of their
//! bytes: as many are worth it as pass over the line in about one round trip. A stretch that grows earns as much as it
//! has, up to a cap, and in pieces of half of that, since a request for each span is what reading ahead is to avoid.
//! `examples/src/bin/readahead` replays start-ups against this and other policies.
//!
//! Invariant: what was fetched ahead and is not read yet is at most a third of what was read, and a few hundred
//! kilobytes. So a program that jumps soon gets nothing ahead, and one that walks pays back what it walks over. Neither
//! I/O nor a clock is known here.

use std::ops::Range;
use std::time::Duration;

use soci_index::format::span::SpanId;

/// Compressed bytes that may be fetched speculatively before anything was read: four usual spans of a span index, none
/// of AWS's zTOC.
const CREDIT_BYTES: u64 = 384 << 10;
/// For this many spans read, one speculative span may go unread.
const READ_PER_UNREAD: u32 = 3;
/// Spans in a row that are taken for a walk which goes on beyond the end of a file.
const WALK: u32 = 8;

/// What the network takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Line {
    /// From a request to the first byte of its answer.
    pub round_trip: Duration,
    /// Bytes per second within an answer.
    pub bytes_per_second: u64,
}

impl Line {
    /// Bytes that pass in one round trip.
    #[must_use]
    pub fn bytes_per_round_trip(&self) -> u64 {
        let bytes = u128::from(self.bytes_per_second) * self.round_trip.as_micros() / 1_000_000;
        u64::try_from(bytes).unwrap_or(u64::MAX)
    }
}

/// What is known of a read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// The spans that hold the file, if it is of one; else an empty range.
    pub file: Range<SpanId>,
    /// Some of what is read has to be fetched, so that a request is made anyway.
    pub is_miss: bool,
    /// A file-level prefetch is active, so that spans behind a file's end do not count as near.
    pub is_foreseen: bool,
    /// The network.
    pub line: Line,
}

/// How much an active prefetch knows of future reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Foresight {
    /// All of it: nothing else is fetched.
    Bytes,
    /// Which files: within a file, read-ahead decides.
    Files,
}

/// Remembers what was read of one layer, and what was fetched ahead.
#[derive(Debug, Clone)]
pub struct ReadAhead {
    count: SpanId,
    span_bytes: u64,
    window_max: u32,
    read: Bits,
    asked: Bits,
    /// Fetched because it was read.
    missed: Bits,
    foreseen: Bits,
    counts: Counts,
}

/// How far reading ahead was right.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Spans that were read.
    pub read: u32,
    /// Spans that were named to be fetched ahead.
    pub ahead: u32,
    /// Those of them that were not read yet.
    pub unread: u32,
    /// Spans fetched for a profile or for named files.
    pub foreseen: u32,
    /// Those of them that were not read yet.
    pub foreseen_unread: u32,
}

#[derive(Debug, Clone)]
struct Bits(Box<[u64]>);

impl Bits {
    fn new(count: u32) -> Self {
        Self(vec![0; count.div_ceil(64) as usize].into())
    }

    fn has(&self, place: u32) -> bool {
        self.0.get(place as usize / 64).is_some_and(|word| word & (1 << (place % 64)) != 0)
    }

    /// Whether it is new.
    fn set(&mut self, place: u32) -> bool {
        let is_new = !self.has(place);
        if let Some(word) = self.0.get_mut(place as usize / 64) {
            *word |= 1 << (place % 64);
        }
        is_new
    }
}

impl ReadAhead {
    /// Starts with no history of a layer of `count` spans of about `span_bytes` compressed bytes. `window_max` caps how
    /// many spans are read ahead at once; 0 turns reading ahead off.
    #[must_use]
    pub fn new(count: SpanId, span_bytes: u64, window_max: u32) -> Self {
        let [read, asked, missed, foreseen] = [(); 4].map(|()| Bits::new(count));
        Self {
            count,
            span_bytes: span_bytes.max(1),
            window_max,
            read,
            asked,
            missed,
            foreseen,
            counts: Counts::default(),
        }
    }

    /// How far it was right until now.
    #[must_use]
    pub const fn counts(&self) -> Counts {
        self.counts
    }

    /// Records a read of the spans `read`, and nothing more: for when another prefetch decides what to fetch.
    pub fn note_only(&mut self, read: Range<SpanId>) {
        for span in read.start..read.end.min(self.count) {
            if self.read.set(span) {
                self.counts.read += 1;
                if self.foreseen.has(span) {
                    self.counts.foreseen_unread -= 1;
                } else {
                    self.counts.unread -= u32::from(self.asked.has(span));
                }
            }
        }
    }

    /// Records a prefetch of those of `spans` that are absent, neither read nor named before, and returns them. With
    /// file-level foresight, read-ahead within a file stays on; with byte-level foresight it is off.
    pub fn foresee(
        &mut self,
        spans: Range<SpanId>,
        foresight: Foresight,
        is_absent: &dyn Fn(SpanId) -> bool,
    ) -> Vec<SpanId> {
        let mut new = Vec::new();
        for span in spans.start..spans.end.min(self.count) {
            if self.read.has(span) || self.asked.has(span) || !is_absent(span) || !self.foreseen.set(span) {
                continue;
            }
            if foresight == Foresight::Files {
                self.asked.set(span);
            }
            new.push(span);
        }
        let count = u32::try_from(new.len()).unwrap_or(u32::MAX);
        self.counts.foreseen += count;
        self.counts.foreseen_unread += count;
        new
    }

    /// Notes a read of the spans `read` and says which others of those that are absent to fetch too, the likeliest
    /// first.
    ///
    /// What was read or named before is left out, and everything is within the layer.
    pub fn record_read(
        &mut self,
        read: Range<SpanId>,
        facts: &Facts,
        is_absent: &dyn Fn(SpanId) -> bool,
    ) -> Vec<Range<SpanId>> {
        let read = read.start..read.end.min(self.count);
        self.note_only(read.clone());
        if read.is_empty() || self.window_max == 0 {
            return Vec::new();
        }
        for span in read.clone().filter(|span| facts.is_miss && !self.asked.has(*span)) {
            self.missed.set(span);
        }
        if !read.clone().any(|span| self.asked.has(span) || self.missed.has(span)) {
            // Another prefetch has fetched it.
            return Vec::new();
        }
        let file = facts.file.start..facts.file.end.min(self.count);
        let is_in_file = file.start <= read.start && read.end < file.end;
        let worth = if facts.is_miss { self.worth(&facts.line) } else { 0 };
        let run = self.run(read.end);
        let mut ahead = Vec::new();
        if is_in_file {
            ahead.extend(self.forward(read.end, worth.max(run).min(file.end - read.end), facts.is_miss, is_absent));
        }
        // The nearest ones, if there is no credit for more.
        let before = worth.min(self.window_max).min(self.limit() - self.counts.unread);
        let before = before.min(read.start.saturating_sub(file.start));
        if file.contains(&read.start) {
            ahead.extend(self.name(read.start - before..read.start, is_absent));
        }
        let walk = if run >= WALK { run / 2 } else { 0 };
        let behind = if facts.is_foreseen { 0 } else { walk.max(worth / 2) };
        ahead.extend(self.forward(read.end, behind, facts.is_miss, is_absent));
        ahead
    }

    /// Spans whose bytes take about as long as a round trip.
    fn worth(&self, line: &Line) -> u32 {
        let spans = line.bytes_per_round_trip().saturating_add(self.span_bytes / 2) / self.span_bytes;
        u32::try_from(spans).unwrap_or(u32::MAX)
    }

    /// Spans before `end` that were read without a gap, as far as it matters.
    fn run(&self, end: SpanId) -> u32 {
        let start = end.saturating_sub(self.window_max.saturating_mul(2));
        let gap = (start..end).rev().find(|span| !self.read.has(*span));
        end - gap.map_or(start, |gap| gap + 1)
    }

    /// Spans that may be ahead and unread by now.
    fn limit(&self) -> u32 {
        let credit = u32::try_from(CREDIT_BYTES / self.span_bytes).unwrap_or(u32::MAX);
        credit.saturating_add(self.counts.read / READ_PER_UNREAD)
    }

    /// Names up to `window` spans from `start` on; nothing while half of that is there, if that would be a request of
    /// its own.
    fn forward(
        &mut self,
        start: SpanId,
        window: u32,
        is_miss: bool,
        is_absent: &dyn Fn(SpanId) -> bool,
    ) -> Vec<Range<SpanId>> {
        let window = window.min(self.window_max).min(self.count - start);
        let spans = start..start + window;
        let there = spans.clone().take_while(|span| self.asked.has(*span) || !is_absent(*span)).count();
        if is_miss || there <= window.min(self.limit()) as usize / 2 { self.name(spans, is_absent) } else { Vec::new() }
    }

    /// Names those of the spans that are new, as far as the limit allows.
    fn name(&mut self, spans: Range<SpanId>, is_absent: &dyn Fn(SpanId) -> bool) -> Vec<Range<SpanId>> {
        let mut ahead: Vec<Range<SpanId>> = Vec::new();
        for span in spans {
            if self.counts.unread >= self.limit() {
                break;
            }
            if self.read.has(span) || self.foreseen.has(span) || !is_absent(span) || !self.asked.set(span) {
                continue;
            }
            self.counts.unread += 1;
            self.counts.ahead += 1;
            match ahead.last_mut().filter(|range| range.end == span) {
                Some(range) => range.end += 1,
                None => ahead.push(span..span + 1),
            }
        }
        ahead
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    /// About three spans of 85 kB pass in a round trip.
    const LINE: Line = Line { round_trip: Duration::from_millis(2), bytes_per_second: 125_000_000 };
    const SPAN_BYTES: u64 = 85_000;

    fn facts(file: Range<u32>, is_miss: bool) -> Facts {
        Facts { file, is_miss, is_foreseen: false, line: LINE }
    }

    /// Runs single-span reads, all of them misses unless they were named before, and collects what each one asks for.
    fn ahead(readahead: &mut ReadAhead, file: Range<u32>, reads: &[u32]) -> Vec<Vec<Range<u32>>> {
        let mut there = BTreeSet::new();
        let mut answers = Vec::new();
        for span in reads {
            let is_miss = there.insert(*span);
            let answer = readahead.record_read(*span..*span + 1, &facts(file.clone(), is_miss), &|_| true);
            there.extend(answer.iter().cloned().flatten());
            answers.push(answer);
        }
        answers
    }

    #[test]
    fn table() {
        let new = || ReadAhead::new(1000, SPAN_BYTES, 64);
        // The rest of a file, then what is before the read in it.
        assert_eq!(ahead(&mut new(), 10..20, &[12]), [[13..16, 11..12]]);
        // Up to its borders.
        assert_eq!(ahead(&mut new(), 10..14, &[12]), [[13..14, 10..12]]);
        // Jumps: one adjacent span each, as long as there is credit.
        let jumps = ahead(&mut new(), 0..0, &[5, 900, 17, 400, 3, 77]);
        assert_eq!(jumps.iter().flatten().cloned().flatten().count(), 4 + 6 / 3);
        // A walk through a large file soon asks in pieces, and never for what it asked for before.
        let walk = ahead(&mut new(), 0..1000, &(0..60).collect::<Vec<_>>());
        let pieces: Vec<Range<u32>> = walk.into_iter().flatten().collect();
        assert!(pieces.len() < 20 && pieces.windows(2).all(|pair| pair[0].end == pair[1].start), "{pieces:?}");
        // The same through files smaller than a span.
        let walk: Vec<Vec<Range<u32>>> = {
            let mut readahead = new();
            (0..60).flat_map(|span| ahead(&mut readahead, span..span + 1, &[span])).collect()
        };
        assert!(walk.iter().flatten().cloned().flatten().count() >= 55, "{walk:?}");
        // What is here is not asked for.
        let mut readahead = new();
        assert_eq!(readahead.record_read(12..13, &facts(10..20, true), &|span| span > 14).first(), Some(&(15..16)));
        // Spans of another prefetch cause no read-ahead.
        let mut readahead = new();
        let mut brought =
            (0..60).flat_map(|span| readahead.record_read(span..span + 1, &facts(0..99, false), &|_| true));
        assert_eq!(brought.next(), None);
        // The end of the layer, and off.
        let at_end = ahead(&mut ReadAhead::new(14, SPAN_BYTES, 64), 12..14, &[12]).concat();
        assert_eq!((at_end.len(), at_end.first()), (1, Some(&(13..14))));
        assert!(ahead(&mut ReadAhead::new(1000, SPAN_BYTES, 0), 0..9, &[0, 1, 2, 3]).concat().is_empty());
    }

    #[test]
    fn the_line_decides() {
        let ask = |round_trip, bytes_per_second, span_bytes| {
            let line = Line { round_trip: Duration::from_micros(round_trip), bytes_per_second };
            let facts = Facts { file: 0..0, is_miss: true, is_foreseen: false, line };
            ReadAhead::new(1000, span_bytes, 64).worth(&facts.line)
        };
        assert_eq!((ask(200, 125_000_000, SPAN_BYTES), ask(2_000, 125_000_000, SPAN_BYTES)), (0, 3));
        assert_eq!((ask(20_000, 125_000_000, SPAN_BYTES), ask(20_000, 12_500_000, SPAN_BYTES)), (29, 3));
        // Spans of a zTOC are not worth it, nor is there credit for them.
        assert_eq!(ask(2_000, 125_000_000, 1_400_000), 0);
        assert_eq!(ReadAhead::new(1000, 1_400_000, 64).limit(), 0);
        assert_eq!(ask(u64::MAX, u64::MAX, 1), u32::MAX);
    }

    proptest! {
        /// For any reads, the speculative fetches that go unread are bounded, counted, within the layer and named once.
        #[test]
        fn over_fetch_is_bounded(
            reads in prop::collection::vec((0_u32..64, 1_u32..4, 0_u32..64, 0_u32..20, any::<bool>()), 1..200),
            window_max in 0_u32..20,
            span_bytes in 1_u64..1_000_000,
            round_trip in 0_u64..100_000,
        ) {
            let mut readahead = ReadAhead::new(64, span_bytes, window_max);
            let line = Line { round_trip: Duration::from_micros(round_trip), bytes_per_second: 125_000_000 };
            let (mut read_spans, mut asked) = (BTreeSet::new(), BTreeSet::new());
            for (start, length, file, file_length, is_miss) in reads {
                let read = start..(start + length).min(64);
                let facts = Facts { file: file..file + file_length, is_miss, is_foreseen: false, line };
                let ahead = readahead.record_read(read.clone(), &facts, &|span| span % 7 != 0);
                read_spans.extend(read);
                for span in ahead.into_iter().flatten() {
                    prop_assert!(span < 64 && span % 7 != 0 && window_max > 0);
                    prop_assert!(!read_spans.contains(&span) && asked.insert(span));
                }
                let unread = asked.difference(&read_spans).count();
                let limit = CREDIT_BYTES / span_bytes + read_spans.len() as u64 / 3;
                prop_assert!(unread as u64 <= limit, "{unread} of {}", read_spans.len());
                if window_max > 0 {
                    let counts = readahead.counts();
                    let found = (counts.read as usize, counts.ahead as usize, counts.unread as usize);
                    prop_assert_eq!(found, (read_spans.len(), asked.len(), unread));
                }
            }
        }
    }
}
