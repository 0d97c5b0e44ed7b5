//! Spans that could not be stored, kept in memory for a while: a full disk must not make every read fetch again.

use std::collections::VecDeque;

use bytes::Bytes;
use soci_index::span::SpanId;

/// The latest spans within a number of bytes.
#[derive(Debug)]
pub(super) struct Spare {
    spans: VecDeque<(SpanId, Bytes)>,
    bytes: usize,
    bytes_max: usize,
}

impl Spare {
    pub(super) const fn new(bytes_max: usize) -> Self {
        Self { spans: VecDeque::new(), bytes: 0, bytes_max }
    }

    pub(super) fn get(&self, span: SpanId) -> Option<Bytes> {
        self.spans.iter().find_map(|(held, bytes)| (*held == span).then(|| bytes.clone()))
    }

    /// Keeps a span; the oldest ones make room. The newest is kept whatever its size.
    pub(super) fn put(&mut self, span: SpanId, bytes: Bytes) {
        if self.get(span).is_some() {
            return;
        }
        self.bytes += bytes.len();
        self.spans.push_back((span, bytes));
        while self.bytes > self.bytes_max && self.spans.len() > 1 {
            self.bytes -= self.spans.pop_front().map_or(0, |(_, bytes)| bytes.len());
        }
    }
}
