//! What comes over the line to a source, and how the line is: running averages of what flights saw.
//!
//! A round trip is the time from a request to the first bytes of its answer, so it includes what the source takes to
//! find them. The rate is measured within responses that are long enough. Both change what is read ahead, nothing else.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::Mutex;

use crate::layer::readahead::Line;
use crate::layer::stages::Stages;

/// Before anything was seen: a registry in the same region.
const FIRST: Line = Line { round_trip: Duration::from_millis(2), bytes_per_second: 100_000_000 };
/// Each flight moves an average by one part in so many.
const PARTS: u32 = 4;
/// An outlier, a login on the way for instance, counts as so many times the average at most.
const OUTLIER: u32 = 4;
/// Bytes after the first ones from which a rate is computed: fewer come out of buffers.
const TELLING_BYTES: u64 = 64 << 10;

/// What came of a layer.
#[derive(Debug, Default)]
pub(super) struct Traffic {
    requests: AtomicU64,
    bytes: AtomicU64,
    /// Spans that were decoded.
    spans: AtomicU64,
    meter: Mutex<Meter>,
    /// Where times are noted.
    stages: OnceLock<Arc<Stages>>,
}

impl Traffic {
    pub(super) fn count(&self, requests: u64, bytes: u64) {
        self.requests.fetch_add(requests, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn count_span(&self) {
        self.spans.fetch_add(1, Ordering::Relaxed);
    }

    /// Requests, bytes and decoded spans so far.
    pub(super) fn so_far(&self) -> [u64; 3] {
        [&self.requests, &self.bytes, &self.spans].map(|number| number.load(Ordering::Relaxed))
    }

    /// Has the times of requests for spans noted in `stages`, from now on. The first that was given stays.
    pub(super) fn note_times(&self, stages: &Arc<Stages>) {
        self.stages.get_or_init(|| Arc::clone(stages));
    }

    /// Notes how long a request for spans took to be answered.
    pub(super) fn record_answer(&self, time: Duration) {
        if let Some(stages) = self.stages.get() {
            stages.requests.record(time);
        }
    }

    /// As [`Meter::record`].
    pub(super) fn record_line(&self, round_trip: Duration, bytes: u64, behind: Duration) {
        self.meter.lock().record(round_trip, bytes, behind);
    }

    pub(super) fn line(&self) -> Line {
        self.meter.lock().line()
    }
}

/// The averages.
#[derive(Debug, Clone, Copy, Default)]
struct Meter {
    line: Option<Line>,
}

impl Meter {
    fn line(&self) -> Line {
        self.line.unwrap_or(FIRST)
    }

    /// Notes an answer whose first bytes came after `round_trip`, and `bytes` more in the time `behind` after them.
    fn record(&mut self, round_trip: Duration, bytes: u64, behind: Duration) {
        let Some(line) = &mut self.line else {
            self.line = Some(Line { round_trip, ..FIRST });
            return self.note_rate(bytes, behind);
        };
        let seen = round_trip.min(line.round_trip.max(Duration::from_micros(100)) * OUTLIER);
        line.round_trip = (line.round_trip * (PARTS - 1) + seen) / PARTS;
        self.note_rate(bytes, behind);
    }

    fn note_rate(&mut self, bytes: u64, behind: Duration) {
        let micros = u64::try_from(behind.as_micros()).unwrap_or(u64::MAX);
        let Some(line) = self.line.as_mut().filter(|_| bytes >= TELLING_BYTES && micros > 0) else { return };
        let seen = bytes.saturating_mul(1_000_000) / micros;
        let seen = seen.min(line.bytes_per_second.saturating_mul(OUTLIER.into())).max(1);
        let parts = u64::from(PARTS);
        line.bytes_per_second = line.bytes_per_second / parts * (parts - 1) + seen / parts;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn averages_follow_what_is_seen() {
        let mut meter = Meter::default();
        assert_eq!(meter.line(), FIRST);
        for _ in 0..30 {
            meter.record(Duration::from_millis(20), 125_000, Duration::from_millis(10));
        }
        let near = |found: u64, wanted: u64| found.abs_diff(wanted) < wanted / 20;
        assert!(near(meter.line().bytes_per_second, 12_500_000), "{meter:?}");
        assert!(near(u64::try_from(meter.line().round_trip.as_micros()).unwrap(), 20_000), "{meter:?}");
        // A short response says nothing about the rate, and a late one must not change it much.
        let before = meter.line();
        meter.record(Duration::from_secs(30), 1000, Duration::from_nanos(1));
        assert_eq!(meter.line().bytes_per_second, before.bytes_per_second);
        assert!(meter.line().round_trip < Duration::from_millis(40), "{meter:?}");
        meter.record(Duration::ZERO, u64::MAX, Duration::from_nanos(1));
        meter.record(Duration::ZERO, u64::MAX, Duration::from_micros(1));
    }
}
