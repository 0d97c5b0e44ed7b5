//! When to retry: exponential backoff with jitter, `Retry-After`, and the deadline above both.
//!
//! The arithmetic is pure: randomness and the present time are arguments. Invariant: no wait ends after the deadline;
//! a wait that would is not begun, and the caller gets the last error instead.

use std::fmt::Display;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use tokio::time::Instant;

/// How waits grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backoff {
    /// The first wait, before jitter.
    pub first: Duration,
    /// No wait is longer, whatever the attempt.
    pub longest: Duration,
    /// How often to retry without having made any progress.
    pub retries_max: u32,
}

impl Default for Backoff {
    /// About ten seconds in all: long enough for a restart of a registry's front end, short enough for a reader.
    fn default() -> Self {
        Self { first: Duration::from_millis(200), longest: Duration::from_secs(10), retries_max: 6 }
    }
}

impl Backoff {
    /// The wait before retry number `retry` (from 0): half of it fixed, half of it random. `random` is in `0.0..1.0`.
    #[must_use]
    pub(crate) fn wait(&self, retry: u32, random: f64) -> Duration {
        let grown = self.first.saturating_mul(2_u32.saturating_pow(retry.min(20))).min(self.longest);
        (grown / 2) + (grown / 2).mul_f64(random.clamp(0.0, 1.0))
    }
}

/// A backoff long enough to report to the user.
const REPORTED_MIN: Duration = Duration::from_millis(500);

/// How often to retry, and what is said of it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RetryPolicy {
    pub(crate) backoff: Backoff,
    /// Whether a user waits.
    pub(crate) is_interactive: bool,
}

impl RetryPolicy {
    /// How often to retry. A user may have typed a wrong name: a host that never answered is retried once.
    pub(crate) fn retries_max(self, is_unknown_host: bool) -> u32 {
        let most = if self.is_interactive && is_unknown_host { 1 } else { u32::MAX };
        self.backoff.retries_max.min(most)
    }

    /// Reports a backoff and its reason.
    pub(crate) fn report(self, pause: Duration, why: &dyn Display) {
        if self.is_interactive && pause >= REPORTED_MIN {
            tracing::info!("retrying in {:.1} s: {why}", pause.as_secs_f32());
        } else {
            tracing::debug!(%why, ?pause, "retrying");
        }
    }
}

/// Longest wait that a server may ask for. A registry with hourly limits is retried, or given up, before that.
const ASKED_MAX: Duration = Duration::from_secs(300);

/// How long a server asks us to wait, within reason: `Retry-After` in seconds or as a date.
#[must_use]
pub(crate) fn retry_after(header: &str, now: SystemTime) -> Option<Duration> {
    let header = header.trim();
    if !header.is_empty() && header.bytes().all(|byte| byte.is_ascii_digit()) {
        // More digits than fit means "very long".
        return Some(Duration::from_secs(header.parse().unwrap_or(u64::MAX)).min(ASKED_MAX));
    }
    let date = httpdate::parse_http_date(header).ok()?;
    Some(date.duration_since(now).unwrap_or(Duration::ZERO).min(ASKED_MAX))
}

/// Slowest stream that is put up with, in bytes per second. It bounds how long a server that sends a byte now and then
/// can hold a reader; the slowest link we mean to serve is a hundred times faster.
const SLOWEST_BYTES_PER_SECOND: u64 = 10_000;

/// The moment by which an operation must have ended. Clones share it.
#[derive(Debug, Clone)]
pub(crate) struct Deadline {
    clock: Arc<Mutex<Clock>>,
    allowed: Duration,
}

#[derive(Debug, Clone, Copy)]
struct Clock {
    /// When it ends unless there is progress.
    at: Instant,
    /// When it ends in any case.
    last: Instant,
}

impl Deadline {
    /// `allowed` from now, for an operation that moves about `bytes`: every byte that arrives starts the clock anew,
    /// within the time that the slowest tolerated stream would need.
    pub(crate) fn new(allowed: Duration, bytes: u64) -> Self {
        let at = Instant::now() + allowed;
        let last = at + Duration::from_secs(bytes / SLOWEST_BYTES_PER_SECOND);
        Self { clock: Arc::new(Mutex::new(Clock { at, last })), allowed }
    }

    /// Records progress of the operation.
    pub(crate) fn progress(&self) {
        let mut clock = self.clock.lock();
        clock.at = (Instant::now() + self.allowed).min(clock.last);
    }

    /// Records that no caller waited for the operation for so long: that time does not count.
    pub(crate) fn postpone(&self, idle: Duration) {
        let mut clock = self.clock.lock();
        *clock = Clock { at: clock.at + idle, last: clock.last + idle };
    }

    /// When it ends.
    pub(crate) fn at(&self) -> Instant {
        self.clock.lock().at
    }

    /// What the caller allowed, for messages.
    pub(crate) fn allowed(&self) -> Duration {
        self.allowed
    }

    /// How long it is until then.
    pub(crate) fn left(&self) -> Duration {
        self.at().saturating_duration_since(Instant::now())
    }

    pub(crate) fn is_over(&self) -> bool {
        Instant::now() >= self.at()
    }

    /// Waits until it is over, however often it moves.
    pub(crate) async fn expired(&self) {
        while !self.is_over() {
            tokio::time::sleep_until(self.at()).await;
        }
    }

    /// Waits for `pause`, or says `false` at once when the deadline comes first.
    pub(crate) async fn pause(&self, pause: Duration) -> bool {
        match Instant::now().checked_add(pause) {
            Some(end) if end < self.at() => {
                tokio::time::sleep(pause).await;
                true
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_and_stop_growing() {
        let backoff = Backoff { first: Duration::from_millis(100), longest: Duration::from_secs(1), retries_max: 9 };
        for (retry, random, expected) in [
            (0, 0.0, 50),
            (0, 1.0, 100),
            (1, 0.0, 100),
            (2, 0.5, 300),
            (3, 1.0, 800),
            (4, 1.0, 1000),
            (u32::MAX, 1.0, 1000),
            (0, 7.0, 100),
        ] {
            assert_eq!(backoff.wait(retry, random), Duration::from_millis(expected), "{retry} {random}");
        }
    }

    #[test]
    fn retry_after_forms() {
        let now = httpdate::parse_http_date("Sun, 06 Nov 1994 08:49:37 GMT").unwrap();
        for (header, expected) in [
            ("0", Some(0)),
            (" 120 ", Some(120)),
            ("3600", Some(300)),
            ("99999999999999999999", Some(300)),
            ("Sun, 06 Nov 1994 08:50:07 GMT", Some(30)),
            ("Sun, 06 Nov 1994 08:00:00 GMT", Some(0)),
            ("Sun, 06 Nov 1994 20:00:00 GMT", Some(300)),
            ("-1", None),
            ("soon", None),
            ("", None),
        ] {
            assert_eq!(retry_after(header, now), expected.map(Duration::from_secs), "{header}");
        }
    }

    #[tokio::test]
    async fn deadline_moves_with_progress_up_to_a_limit() {
        let start = Instant::now();
        let deadline = Deadline::new(Duration::from_secs(10), 50_000);
        assert!(!deadline.pause(Duration::from_secs(10)).await);
        assert!(!deadline.pause(Duration::from_secs(u64::MAX)).await);
        assert!(deadline.pause(Duration::from_millis(1)).await);
        let before = deadline.at();
        deadline.clone().progress();
        assert!(deadline.at() > before);
        let last = deadline.clock.lock().last;
        assert!(last - start < Duration::from_secs(16) && last - start >= Duration::from_secs(15));
        deadline.postpone(Duration::from_secs(7));
        assert_eq!(deadline.clock.lock().last - last, Duration::from_secs(7));
        let short = Deadline::new(Duration::from_millis(1), 0);
        short.expired().await;
        short.progress();
        assert!(short.is_over());
    }
}
