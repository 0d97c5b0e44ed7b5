//! A network's one direction, without a clock: when the bytes that are sent now will arrive.
//!
//! All connections share a rate; a sender waits while the line is busy, and what was sent arrives a fixed time after it
//! has left. Times are nanoseconds since a moment of the caller's choice. What is not simulated: loss, and the slow
//! start of TCP.
//!
//! Invariants: what was sent first arrives first; in no interval does more leave than the rate allows.

/// Nanoseconds of a second.
const SECOND: u128 = 1_000_000_000;

/// A direction of a line.
#[derive(Debug, Clone)]
pub struct Link {
    /// Nanoseconds from leaving to arriving.
    delay: u64,
    /// Bytes per second; `None` is no limit.
    rate: Option<u64>,
    /// When the last byte so far has left.
    free_at: u64,
}

/// What becomes of bytes that are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Passage {
    /// When the last of them has left: from then on the line is free for others.
    pub leaves: u64,
    /// When the last of them arrives.
    pub arrives: u64,
}

impl Link {
    /// A line that nothing was sent on yet. `delay` is in nanoseconds, `rate` in bytes per second and at least one.
    #[must_use]
    pub const fn new(delay: u64, rate: Option<u64>) -> Self {
        Self { delay, rate, free_at: 0 }
    }

    /// Sends `bytes` at the time `now`, after all that was sent before.
    pub fn send(&mut self, now: u64, bytes: u64) -> Passage {
        let starts = self.free_at.max(now);
        let takes = match self.rate {
            None => 0,
            // Rounded up, so that many small pieces are no faster than a large one.
            Some(rate) => (u128::from(bytes) * SECOND).div_ceil(u128::from(rate.max(1))),
        };
        self.free_at = starts.saturating_add(u64::try_from(takes).unwrap_or(u64::MAX));
        Passage { leaves: self.free_at, arrives: self.free_at.saturating_add(self.delay) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    #[test]
    fn bytes_take_their_time() {
        // 1 kB at 1 MB/s takes 1 ms; 10 ms to the other side.
        let mut link = Link::new(10 * MS, Some(1_000_000));
        assert_eq!(link.send(0, 1000), Passage { leaves: MS, arrives: 11 * MS });
        // The line is busy until then.
        assert_eq!(link.send(MS / 2, 1000), Passage { leaves: 2 * MS, arrives: 12 * MS });
        // And idle for a while: nothing is saved up.
        assert_eq!(link.send(50 * MS, 500), Passage { leaves: 50 * MS + MS / 2, arrives: 60 * MS + MS / 2 });
        let mut free = Link::new(MS, None);
        assert_eq!(free.send(7, 1 << 40), Passage { leaves: 7, arrives: 7 + MS });
    }

    #[test]
    fn order_is_kept_and_the_rate_is_never_exceeded() {
        let rate = 12_500_000;
        let mut link = Link::new(3, Some(rate));
        let (mut now, mut sent, mut last, mut state) = (0, 0_u128, 0, 7_u64);
        for _ in 0..10_000 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let (bytes, pause) = (state >> 50, (state >> 20) % 2_000_000);
            now += pause;
            let passage = link.send(now, bytes);
            sent += u128::from(bytes);
            assert!(passage.leaves >= now && passage.arrives >= last, "{passage:?}");
            assert!(sent * SECOND <= u128::from(passage.leaves) * u128::from(rate), "{sent} bytes at {passage:?}");
            last = passage.arrives;
        }
    }

    #[test]
    fn numbers_of_strangers_do_not_overflow() {
        let mut link = Link::new(u64::MAX, Some(1));
        link.send(u64::MAX, u64::MAX);
        assert_eq!(link.send(0, 1), Passage { leaves: u64::MAX, arrives: u64::MAX });
    }
}
