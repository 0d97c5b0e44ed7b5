//! Spans that could not be stored, kept in memory for a while: a full disk must not make every read fetch again.
//!
//! Invariant: there is a reason for as long as there was a span that was not stored; it is the latest.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use bytes::Bytes;
use soci_index::format::span::SpanId;

use crate::layer::budget::{SPARE, Share};
use crate::layer::store::StoreError;

/// Interval of warnings about a full disk: otherwise each span would log one.
const WARN_INTERVAL: Duration = Duration::from_secs(60);

/// The latest spans within a number of bytes, and within what the process has for all layers.
#[derive(Debug)]
pub(super) struct Spare {
    spans: VecDeque<(SpanId, Bytes)>,
    bytes: Share,
    bytes_max: usize,
    reason: Option<StoreError>,
    warned: Option<Instant>,
}

impl Spare {
    pub(super) const fn new(bytes_max: usize) -> Self {
        Self { spans: VecDeque::new(), bytes: SPARE.share(), bytes_max, reason: None, warned: None }
    }

    /// Why the latest span was not stored that was not.
    pub(super) const fn reason(&self) -> Option<&StoreError> {
        self.reason.as_ref()
    }

    pub(super) fn get(&self, span: SpanId) -> Option<Bytes> {
        self.spans.iter().find_map(|(held, bytes)| (*held == span).then(|| bytes.clone()))
    }

    /// Keeps a span that was not stored for this reason; the oldest ones make room. The newest is kept whatever its
    /// size. Returns whether a warning is due.
    pub(super) fn put(&mut self, span: SpanId, bytes: Bytes, reason: StoreError) -> bool {
        self.reason = Some(reason);
        self.keep(span, bytes);
        let is_due = self.warned.is_none_or(|warned| warned.elapsed() >= WARN_INTERVAL);
        if is_due {
            self.warned = Some(Instant::now());
        }
        is_due
    }

    fn keep(&mut self, span: SpanId, bytes: Bytes) {
        if self.get(span).is_some() {
            return;
        }
        self.bytes.set(self.bytes.bytes() + bytes.len());
        self.spans.push_back((span, bytes));
        while (self.bytes.bytes() > self.bytes_max || !SPARE.fits(0)) && self.spans.len() > 1 {
            let oldest = self.spans.pop_front().map_or(0, |(_, bytes)| bytes.len());
            self.bytes.set(self.bytes.bytes() - oldest);
        }
    }
}
