//! What the kernel has asked of each layer, counted by slot.
//!
//! Every question passes through here, so counting takes no lock: the counters of 256 neighbouring slots are one block,
//! made when the first of these slots is asked about. A slot that gets another layer begins at zero.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Slots of one block.
const BLOCK: usize = 256;
/// Upper bounds of the buckets of short times, in microseconds, as AWS has them.
pub(crate) const MICROSECONDS: [u64; 11] = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024];
/// A failure within so many seconds of another one belongs to the same state of failure, as with AWS.
const STATE_SECONDS: u64 = 300;

/// What the kernel asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operation {
    Getattr,
    Getxattr,
    Listxattr,
    Lookup,
    Open,
    Readdir,
    Readlink,
    Read,
    FileGetattr,
    WhiteoutGetattr,
}

/// Operations with their names in AWS's figures, and the name of their failures if there is one.
pub(crate) const NAMES: [(Operation, &str, Option<&str>); 10] = [
    (Operation::Getattr, "node.Getattr", Some("fuse_node_getattr_failure_count")),
    (Operation::Getxattr, "node.Getxattr", None),
    (Operation::Listxattr, "node.Listxattr", Some("fuse_node_listxattr_failure_count")),
    (Operation::Lookup, "node.Lookup", Some("fuse_node_lookup_failure_count")),
    (Operation::Open, "node.Open", Some("fuse_node_open_failure_count")),
    (Operation::Readdir, "node.Readdir", Some("fuse_node_readdir_failure_count")),
    (Operation::Readlink, "node.Readlink", None),
    (Operation::Read, "file.Read", None),
    (Operation::FileGetattr, "file.Getattr", Some("fuse_file_getattr_failure_count")),
    (Operation::WhiteoutGetattr, "whiteout.Getattr", Some("fuse_whiteout_getattr_failure_count")),
];

/// Short times.
#[derive(Debug, Default)]
pub(crate) struct Times {
    buckets: [AtomicU64; MICROSECONDS.len()],
    count: AtomicU64,
    nanoseconds: AtomicU64,
}

impl Times {
    fn record(&self, time: Duration) {
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        for (bucket, bound) in self.buckets.iter().zip(MICROSECONDS) {
            if nanoseconds <= bound * 1000 {
                bucket.fetch_add(1, Ordering::Relaxed);
            }
        }
        self.count.fetch_add(1, Ordering::Relaxed);
        self.nanoseconds.fetch_add(nanoseconds, Ordering::Relaxed);
    }

    fn reset(&self) {
        self.buckets
            .iter()
            .chain([&self.count, &self.nanoseconds])
            .for_each(|number| number.store(0, Ordering::Relaxed));
    }

    /// Counts by bucket, all of them, and microseconds in all.
    pub(crate) fn read(&self) -> ([u64; MICROSECONDS.len()], u64, f64) {
        let buckets = std::array::from_fn(|bucket| self.buckets[bucket].load(Ordering::Relaxed));
        let microseconds = self.nanoseconds.load(Ordering::Relaxed) as f64 / 1000.0;
        (buckets, self.count.load(Ordering::Relaxed), microseconds)
    }
}

/// The counters of a slot.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    asked: [AtomicU64; NAMES.len()],
    failed: [AtomicU64; NAMES.len()],
    bytes: AtomicU64,
    pub(crate) reads: Times,
    pub(crate) listings: Times,
}

impl Counts {
    pub(crate) fn asked(&self) -> [u64; NAMES.len()] {
        std::array::from_fn(|operation| self.asked[operation].load(Ordering::Relaxed))
    }

    pub(crate) fn failed(&self) -> [u64; NAMES.len()] {
        std::array::from_fn(|operation| self.failed[operation].load(Ordering::Relaxed))
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    fn reset(&self) {
        self.asked
            .iter()
            .chain(&self.failed)
            .chain([&self.bytes])
            .for_each(|number| number.store(0, Ordering::Relaxed));
        self.reads.reset();
        self.listings.reset();
    }
}

/// The counters of all slots.
#[derive(Debug)]
pub struct Counters {
    blocks: [OnceLock<Box<[Counts]>>; BLOCK],
    began: Instant,
    /// States of failure, and when the latest began, in seconds after the beginning.
    states: AtomicU64,
    latest: AtomicU64,
}

impl Default for Counters {
    fn default() -> Self {
        let (states, latest) = (AtomicU64::new(0), AtomicU64::new(0));
        Self { blocks: std::array::from_fn(|_| OnceLock::new()), began: Instant::now(), states, latest }
    }
}

impl Counters {
    /// The counters of a slot, if it was ever asked about.
    pub(crate) fn get(&self, slot: u16) -> Option<&Counts> {
        let (block, place) = (usize::from(slot) / BLOCK, usize::from(slot) % BLOCK);
        self.blocks.get(block)?.get()?.get(place)
    }

    /// Does something with a slot's counters.
    fn with(&self, slot: u16, change: impl FnOnce(&Counts)) {
        let (block, place) = (usize::from(slot) / BLOCK, usize::from(slot) % BLOCK);
        let made = || (0..BLOCK).map(|_| Counts::default()).collect();
        if let Some(counts) = self.blocks.get(block).and_then(|block| block.get_or_init(made).get(place)) {
            change(counts);
        }
    }

    /// Notes a question.
    pub(crate) fn asked(&self, slot: u16, operation: Operation) {
        self.with(slot, |counts| {
            counts.asked[operation as usize].fetch_add(1, Ordering::Relaxed);
        });
    }

    /// Records that a question turned out to be another one.
    pub(crate) fn was_rather(&self, slot: u16, from: Operation, to: Operation) {
        self.with(slot, |counts| {
            counts.asked[from as usize].fetch_sub(1, Ordering::Relaxed);
            counts.asked[to as usize].fetch_add(1, Ordering::Relaxed);
        });
    }

    /// Records that a question could not be answered.
    pub(crate) fn failed(&self, slot: u16, operation: Operation) {
        self.with(slot, |counts| {
            counts.failed[operation as usize].fetch_add(1, Ordering::Relaxed);
        });
        let now = self.began.elapsed().as_secs() + 1;
        let begins = |latest: u64| (latest == 0 || now >= latest + STATE_SECONDS).then_some(now);
        if self.latest.fetch_update(Ordering::Relaxed, Ordering::Relaxed, begins).is_ok() {
            self.states.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Notes a read that gave so many bytes after that time.
    pub(crate) fn read(&self, slot: u16, bytes: usize, time: Duration) {
        self.with(slot, |counts| {
            counts.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
            counts.reads.record(time);
        });
    }

    /// Notes how long the listing of a directory took.
    pub(crate) fn listed(&self, slot: u16, time: Duration) {
        self.with(slot, |counts| counts.listings.record(time));
    }

    /// Forgets a slot's counts: another layer is in it.
    pub(crate) fn reset(&self, slot: u16) {
        if let Some(counts) = self.get(slot) {
            counts.reset();
        }
    }

    /// How many states of failure there were.
    pub(crate) fn states(&self) -> u64 {
        self.states.load(Ordering::Relaxed)
    }

    /// How often each operation was asked for, over several slots, by AWS's names.
    #[must_use]
    pub fn sum(&self, slots: &[u16]) -> Vec<(&'static str, u64)> {
        let all: Vec<[u64; NAMES.len()]> = slots.iter().filter_map(|slot| Some(self.get(*slot)?.asked())).collect();
        let sum = |operation: Operation| all.iter().map(|asked| asked[operation as usize]).sum();
        NAMES.iter().map(|(operation, name, _)| (*name, sum(*operation))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stand_in_order() {
        assert!(NAMES.iter().enumerate().all(|(place, (operation, ..))| *operation as usize == place));
    }

    #[test]
    fn slots_are_counted_apart() {
        let counters = Counters::default();
        counters.asked(7, Operation::Getattr);
        counters.asked(7, Operation::Getattr);
        counters.was_rather(7, Operation::Getattr, Operation::WhiteoutGetattr);
        counters.asked(65_534, Operation::Lookup);
        counters.read(7, 4096, Duration::from_micros(3));
        let of =
            |slots: &[u16], name: &str| counters.sum(slots).into_iter().find(|(found, _)| *found == name).unwrap().1;
        assert_eq!((of(&[7], "node.Getattr"), of(&[7], "whiteout.Getattr"), of(&[7], "node.Lookup")), (1, 1, 0));
        assert_eq!(of(&[7, 9, 65_534], "node.Lookup"), 1);
        let (buckets, count, sum) = counters.get(7).unwrap().reads.read();
        assert_eq!((buckets[1], buckets[2], count), (0, 1, 1));
        assert!((sum - 3.0).abs() < 1e-9);
        counters.reset(7);
        assert_eq!((of(&[7], "node.Getattr"), counters.get(7).unwrap().bytes()), (0, 0));
    }

    #[test]
    fn failures_close_together_are_one_state() {
        let counters = Counters::default();
        assert_eq!(counters.states(), 0);
        counters.failed(1, Operation::Read);
        counters.failed(2, Operation::Lookup);
        assert_eq!((counters.states(), counters.get(1).unwrap().failed()[Operation::Read as usize]), (1, 1));
    }
}
