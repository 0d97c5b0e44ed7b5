//! The policies that are compared.

use std::ops::Range;
use std::time::Duration;

use soci_fs::layer::readahead::{Facts, Line, ReadAhead};

use crate::log::{Log, Read};

/// Most uncompressed bytes that a stream is read ahead, as the reader's default has it.
const AHEAD_BYTES_MAX: u64 = 16 << 20;

/// Decides for all layers of an image.
pub trait Policy {
    /// Notes a read, and says which spans of its layer to fetch too.
    fn note(&mut self, read: &Read, is_miss: bool) -> Vec<Range<u32>>;
}

/// Fetches what is read, and nothing else.
pub struct Nothing;

impl Policy for Nothing {
    fn note(&mut self, _: &Read, _: bool) -> Vec<Range<u32>> {
        Vec::new()
    }
}

/// The product's policy.
pub struct Near {
    layers: Vec<ReadAhead>,
    line: Line,
}

impl Near {
    /// One that knows the line.
    pub fn new(log: &Log, round_trip: Duration, bytes_per_second: u64) -> Self {
        let near = |spans: &Vec<(u64, u64)>| {
            let (compressed, uncompressed) = sums(spans);
            let count = u32::try_from(spans.len()).unwrap_or(u32::MAX);
            ReadAhead::new(count, compressed / spans.len().max(1) as u64, ahead_spans(spans.len(), uncompressed))
        };
        Self { layers: log.layers.iter().map(near).collect(), line: Line { round_trip, bytes_per_second } }
    }
}

impl Policy for Near {
    fn note(&mut self, read: &Read, is_miss: bool) -> Vec<Range<u32>> {
        let facts = Facts { file: read.file.clone(), is_miss, is_foreseen: false, line: self.line };
        self.layers[read.layer].record_read(read.spans.clone(), &facts, &|_| true)
    }
}

/// Streams that begin when eight spans were read in a row, with windows that double: what suits spans of 4 MiB. It knows
/// neither files nor the line.
pub struct Streams {
    layers: Vec<Layer>,
}

struct Layer {
    count: u32,
    window_max: u32,
    streams: Vec<Stream>,
    reads: u64,
}

#[derive(Clone, Copy)]
struct Stream {
    next: u32,
    ahead: u32,
    run: u32,
    window: u32,
    touched: u64,
}

impl Streams {
    /// One that knows nothing.
    pub fn new(log: &Log) -> Self {
        let layer = |spans: &Vec<(u64, u64)>| {
            let count = u32::try_from(spans.len()).unwrap_or(u32::MAX);
            Layer { count, window_max: ahead_spans(spans.len(), sums(spans).1), streams: Vec::new(), reads: 0 }
        };
        Self { layers: log.layers.iter().map(layer).collect() }
    }
}

impl Policy for Streams {
    fn note(&mut self, read: &Read, _: bool) -> Vec<Range<u32>> {
        self.layers[read.layer].note(&read.spans).into_iter().collect()
    }
}

impl Layer {
    fn note(&mut self, read: &Range<u32>) -> Option<Range<u32>> {
        self.reads += 1;
        let found =
            self.streams.iter_mut().find(|stream| (stream.next.saturating_sub(1)..=stream.next).contains(&read.start));
        let Some(stream) = found else {
            let (run, touched) = (read.end - read.start, self.reads);
            let new = Stream { next: read.end, ahead: read.end, run, window: 0, touched };
            if self.streams.len() < 8 {
                self.streams.push(new);
            } else if let Some(oldest) = self.streams.iter_mut().min_by_key(|stream| stream.touched) {
                *oldest = new;
            }
            return None;
        };
        stream.touched = self.reads;
        let fresh = read.end.saturating_sub(stream.next);
        if fresh == 0 {
            return None;
        }
        (stream.next, stream.run) = (read.end, stream.run + fresh);
        if stream.run < 8 {
            stream.ahead = read.end;
            return None;
        }
        stream.window = (stream.window * 2).max(1).min(stream.run).min(self.window_max);
        if stream.ahead.saturating_sub(read.end) > stream.window / 2 {
            return None;
        }
        let start = stream.ahead.max(read.end);
        stream.ahead = read.end.saturating_add(stream.window).min(self.count).max(start);
        Some(start..stream.ahead)
    }
}

fn sums(spans: &[(u64, u64)]) -> (u64, u64) {
    spans.iter().fold((0, 0), |sum, span| (sum.0 + span.0, sum.1 + span.1))
}

fn ahead_spans(count: usize, uncompressed: u64) -> u32 {
    u32::try_from(AHEAD_BYTES_MAX * count as u64 / uncompressed.max(1)).unwrap_or(u32::MAX)
}
