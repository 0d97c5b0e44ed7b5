//! What a reader knows of a pack that is in flight: which bytes it will bring, how far it is, and how long to wait.
//!
//! A read of bytes that a pack is about to bring waits for them: fetching their span would send most of the same bytes
//! a second time, and take the line away from the pack. Waits are bounded: when by the pack's pace the bytes are
//! farther away than a span would be, when the pack stands still, or ends without them, the span is fetched.

use std::ops::Range;
use std::time::{Duration, Instant};

use tokio::sync::watch;

/// What fetching a span costs in addition to its bytes: a round trip, a request in a queue, decoding.
const SPAN_COST: Duration = Duration::from_millis(300);
/// How long to wait for the first bytes of a pack, of whose pace nothing is known yet.
const FIRST_BYTES: Duration = Duration::from_secs(1);

/// How far a pack is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Progress {
    /// When its request was made.
    pub(crate) start: Instant,
    /// Bytes of ranges that were verified and written.
    pub(crate) unpacked: u64,
    /// Compressed bytes that came.
    pub(crate) packed: u64,
    /// Whether nothing more will come.
    pub(crate) ended: bool,
}

impl Progress {
    pub(crate) fn new() -> Self {
        Self { start: Instant::now(), unpacked: 0, packed: 0, ended: false }
    }

    /// How long `bytes` take, when `done` took as long as has passed.
    fn time(&self, bytes: u64, done: u64, now: Instant) -> Option<Duration> {
        if done == 0 {
            return None;
        }
        let passed = now.saturating_duration_since(self.start).as_secs_f64();
        Duration::try_from_secs_f64(passed * bytes as f64 / done as f64).ok()
    }

    /// How long to wait for bytes that end at `position` of the unpacked stream, rather than fetch a span of so many
    /// compressed bytes; `None` when the span comes sooner.
    pub(crate) fn wait_limit(&self, position: u64, span_bytes: u64, now: Instant) -> Option<Duration> {
        if self.ended {
            return None;
        }
        let (Some(ahead), Some(span)) = (
            self.time(position.saturating_sub(self.unpacked), self.unpacked, now),
            self.time(2 * span_bytes, self.packed, now),
        ) else {
            return Some(FIRST_BYTES);
        };
        let instead = SPAN_COST + span;
        (ahead <= instead).then_some(2 * instead)
    }
}

/// What a pack will bring of one layer.
#[derive(Debug)]
pub(crate) struct Incoming {
    /// Its ranges, ascending, each with the place in the unpacked stream where it ends.
    ranges: Vec<(Range<u64>, u64)>,
    progress: watch::Receiver<Progress>,
}

impl Incoming {
    pub(crate) fn new(mut ranges: Vec<(Range<u64>, u64)>, progress: watch::Receiver<Progress>) -> Self {
        ranges.sort_unstable_by_key(|(range, _)| range.start);
        Self { ranges, progress }
    }

    /// Whether more may come.
    pub(crate) fn is_active(&self) -> bool {
        !self.progress.borrow().ended && self.progress.has_changed().is_ok()
    }

    /// Where in the unpacked stream the last of `bytes` ends; `None` when some of them are not in it.
    pub(crate) fn position(&self, bytes: &Range<u64>) -> Option<u64> {
        let first = self.ranges.partition_point(|(range, _)| range.end <= bytes.start);
        let (mut at, mut position) = (bytes.start, 0);
        for (range, end) in self.ranges.get(first..)? {
            if range.start > at {
                break;
            }
            position = position.max(*end);
            at = range.end;
            if at >= bytes.end {
                return Some(position);
            }
        }
        None
    }

    /// How far the pack is.
    pub(crate) fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_promised() {
        let (_sender, progress) = watch::channel(Progress::new());
        let incoming = Incoming::new(vec![(8192..12_288, 4096), (0..8192, 12_288), (20_000..30_000, 22_288)], progress);
        for (bytes, expected) in [
            (0..1, Some(12_288)),
            (8192..8200, Some(4096)),
            (8000..9000, Some(12_288)),
            (0..12_288, Some(12_288)),
            (0..12_289, None),
            (12_288..12_289, None),
            (19_999..20_001, None),
            (29_999..30_000, Some(22_288)),
            (29_999..30_001, None),
        ] {
            assert_eq!(incoming.position(&bytes), expected, "{bytes:?}");
        }
    }

    /// Waits while the pack is the faster way, and not for what is far behind.
    #[test]
    fn patience() {
        let start = Instant::now();
        let now = start + Duration::from_secs(1);
        let none = Progress { start, unpacked: 0, packed: 0, ended: false };
        assert_eq!(none.wait_limit(1 << 30, 100, now), Some(FIRST_BYTES));
        // A million bytes a second, packed to half of that.
        let some = Progress { unpacked: 1_000_000, packed: 500_000, ..none };
        assert_eq!(some.wait_limit(1_000_100, 50_000, now), Some(2 * Duration::from_millis(500)));
        assert_eq!(some.wait_limit(900_000, 0, now), Some(2 * SPAN_COST), "it came already, and will be seen at once");
        assert_eq!(some.wait_limit(3_000_000, 50_000, now), None, "two seconds away");
        assert_eq!(Progress { ended: true, ..some }.wait_limit(900_000, 0, now), None);
    }
}
