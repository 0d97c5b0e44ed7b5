//! Foreground reads of a layer that wait for the network: whether there are any, whether their bytes were in flight
//! before, and when the last one ended. Prefetching uses this to yield to them and to see whether the program still
//! runs. How many there were, and how long they waited, is what lazy loading costs a program.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// The reads of one layer.
#[derive(Debug)]
pub(crate) struct Waits {
    since: Instant,
    all: AtomicUsize,
    /// Those for which a flight was started.
    new: AtomicUsize,
    /// When the last one ended: nanoseconds after `since`, and one; 0 for never.
    ended: AtomicU64,
    reads: AtomicU64,
    nanoseconds: AtomicU64,
}

/// A read blocked on the network; dropped when it completes or fails.
pub(super) struct BlockedRead<'a> {
    waits: &'a Waits,
    since: Instant,
}

/// Guard: a foreground read waits while this is held.
pub(super) struct Foreground<'a> {
    waits: &'a Waits,
    is_new: bool,
}

impl Waits {
    pub(super) fn new() -> Self {
        Self {
            since: Instant::now(),
            all: AtomicUsize::new(0),
            new: AtomicUsize::new(0),
            ended: AtomicU64::new(0),
            reads: AtomicU64::new(0),
            nanoseconds: AtomicU64::new(0),
        }
    }

    /// A read finds that its bytes are not here.
    pub(super) fn start_read(&self) -> BlockedRead<'_> {
        BlockedRead { waits: self, since: Instant::now() }
    }

    /// How many reads were late and are over, and how long they waited together. Concurrent reads count individually.
    pub(super) fn so_far(&self) -> (u64, Duration) {
        let waited = Duration::from_nanos(self.nanoseconds.load(Ordering::Relaxed));
        (self.reads.load(Ordering::Relaxed), waited)
    }

    /// A read begins to wait; `is_new` says that its bytes were not in flight before.
    pub(super) fn begin(&self, is_new: bool) -> Foreground<'_> {
        self.all.fetch_add(1, Ordering::AcqRel);
        self.new.fetch_add(usize::from(is_new), Ordering::AcqRel);
        Foreground { waits: self, is_new }
    }

    /// Whether a read waits for bytes that were not in flight before.
    pub(crate) fn any_unforeseen(&self) -> bool {
        self.new.load(Ordering::Acquire) > 0
    }

    /// Whether a read waits now, or did within the last `time`.
    pub(crate) fn any_within(&self, time: Duration) -> bool {
        if self.all.load(Ordering::Acquire) > 0 {
            return true;
        }
        let Some(ended) = self.ended.load(Ordering::Acquire).checked_sub(1) else { return false };
        self.since.elapsed().saturating_sub(Duration::from_nanos(ended)) < time
    }
}

impl BlockedRead<'_> {
    /// For how long it has waited.
    pub(super) fn waited(&self) -> Duration {
        self.since.elapsed()
    }
}

impl Drop for BlockedRead<'_> {
    fn drop(&mut self) {
        let waited = u64::try_from(self.waited().as_nanos()).unwrap_or(u64::MAX);
        self.waits.nanoseconds.fetch_add(waited, Ordering::Relaxed);
        self.waits.reads.fetch_add(1, Ordering::Relaxed);
    }
}

impl Foreground<'_> {
    /// Whether its bytes were not in flight before.
    pub(super) const fn is_unforeseen(&self) -> bool {
        self.is_new
    }
}

impl Drop for Foreground<'_> {
    fn drop(&mut self) {
        let ended = u64::try_from(self.waits.since.elapsed().as_nanos()).unwrap_or(u64::MAX - 1) + 1;
        // Before the counts drop: an observer sees either the wait or its end.
        self.waits.ended.fetch_max(ended, Ordering::AcqRel);
        self.waits.new.fetch_sub(usize::from(self.is_new), Ordering::AcqRel);
        self.waits.all.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_are_seen_while_and_after() {
        let (waits, long) = (Waits::new(), Duration::from_secs(1000));
        assert!(!waits.any_unforeseen() && !waits.any_within(long));
        let known = waits.begin(false);
        assert!(!waits.any_unforeseen() && waits.any_within(Duration::ZERO) && !known.is_unforeseen());
        let new = waits.begin(true);
        assert!(waits.any_unforeseen() && new.is_unforeseen());
        drop(new);
        assert!(!waits.any_unforeseen() && waits.any_within(Duration::ZERO));
        drop(known);
        assert!(waits.any_within(long) && !waits.any_within(Duration::ZERO));
    }

    #[test]
    fn late_reads_count_when_they_end() {
        let waits = Waits::new();
        let (one, other) = (waits.start_read(), waits.start_read());
        assert_eq!(waits.so_far(), (0, Duration::ZERO));
        std::thread::sleep(Duration::from_millis(2));
        drop(one);
        let (reads, waited) = waits.so_far();
        assert!(reads == 1 && waited >= Duration::from_millis(2), "{waited:?}");
        drop(other);
        assert!(waits.so_far().0 == 2 && waits.so_far().1 >= Duration::from_millis(4));
    }
}
