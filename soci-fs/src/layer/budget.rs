//! The memory that this process may use for bytes in flight, whatever the number of layers and cores.
//!
//! Each flight, window and spare span is bounded by itself, but a node serves hundreds of layers, and how large a span
//! or a window is was chosen by the maker of the index. So what is in flight at the same time is counted for the
//! process as a whole:
//!
//! | what | bound | beyond it |
//! |---|---|---|
//! | spans between the network and the store, compressed and decoded | [`IN_FLIGHT_BYTES`] | the next one waits, and its download with it |
//! | windows that are held for spans to come | [`WINDOW_BYTES`] | windows are fetched again |
//! | spans that a full disk did not take | [`SPARE_BYTES`] | they are fetched again |
//! | packs | two at a time | the next one waits, and reads of its pages go on without it |
//! | zstd layers with a window beyond 8 MiB | one at a time | the next one waits |
//!
//! A single span larger than the bound goes alone. Nothing that waits here holds anything that others wait for.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Bytes of spans in flight: six spans of 4 MiB compressed, or two hundred of 256 KiB.
const IN_FLIGHT_BYTES: usize = 64 << 20;
/// Bytes of windows that are held.
const WINDOW_BYTES: usize = 24 << 20;
/// Bytes of spans that are kept in memory for want of disk.
const SPARE_BYTES: usize = 32 << 20;
/// Counted in these: a semaphore has 32 bits on some machines.
const UNIT: usize = 1024;

static IN_FLIGHT: LazyLock<Arc<Semaphore>> = LazyLock::new(|| Arc::new(Semaphore::new(IN_FLIGHT_BYTES / UNIT)));
static LARGE: LazyLock<Arc<Semaphore>> = LazyLock::new(|| Arc::new(Semaphore::new(1)));
static PACKS: LazyLock<Arc<Semaphore>> = LazyLock::new(|| Arc::new(Semaphore::new(2)));
static DECODERS: LazyLock<Arc<Semaphore>> = LazyLock::new(|| {
    let cores = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
    Arc::new(Semaphore::new(cores))
});

/// Memory of which all holders together have a bounded number of bytes.
#[derive(Debug)]
pub(crate) struct Pool {
    used: AtomicUsize,
    most: usize,
}

/// Windows that are held.
pub(crate) static WINDOWS: Pool = Pool { used: AtomicUsize::new(0), most: WINDOW_BYTES };
/// Spans for want of disk.
pub(crate) static SPARE: Pool = Pool { used: AtomicUsize::new(0), most: SPARE_BYTES };

impl Pool {
    /// Whether so many more bytes fit.
    pub(crate) fn fits(&self, bytes: usize) -> bool {
        self.used.load(Ordering::Relaxed).saturating_add(bytes) <= self.most
    }

    /// No bytes yet.
    pub(crate) const fn share(&'static self) -> Share {
        Share { pool: self, bytes: 0 }
    }
}

/// What one holder has of a pool; given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Share {
    pool: &'static Pool,
    bytes: usize,
}

impl Share {
    /// The bytes that are held.
    pub(crate) const fn bytes(&self) -> usize {
        self.bytes
    }

    /// Counts other bytes than until now, whether they fit or not.
    pub(crate) fn set(&mut self, bytes: usize) {
        self.pool.used.fetch_add(bytes, Ordering::Relaxed);
        self.pool.used.fetch_sub(std::mem::replace(&mut self.bytes, bytes), Ordering::Relaxed);
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.set(0);
    }
}

/// Waits until a span of so many bytes, compressed and decoded together, may be in flight.
pub(crate) async fn in_flight(bytes: u64) -> Option<OwnedSemaphorePermit> {
    let units = usize::try_from(bytes).unwrap_or(usize::MAX).div_ceil(UNIT).clamp(1, IN_FLIGHT_BYTES / UNIT);
    Arc::clone(&IN_FLIGHT).acquire_many_owned(u32::try_from(units).unwrap_or(u32::MAX)).await.ok()
}

/// Waits for the one place of work that takes tens of megabytes.
pub(crate) async fn large() -> Option<OwnedSemaphorePermit> {
    Arc::clone(&LARGE).acquire_owned().await.ok()
}

/// Waits for one of the places of start-up packs.
pub(crate) async fn pack() -> Option<OwnedSemaphorePermit> {
    Arc::clone(&PACKS).acquire_owned().await.ok()
}

/// The cores that decode, for all layers together.
pub(crate) fn decoders() -> &'static Arc<Semaphore> {
    &DECODERS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pools_are_bounded() {
        static POOL: Pool = Pool { used: AtomicUsize::new(0), most: 100 };
        assert!(POOL.fits(100) && !POOL.fits(101) && !POOL.fits(usize::MAX));
        let (mut one, mut other) = (POOL.share(), POOL.share());
        one.set(60);
        assert!(POOL.fits(40) && !POOL.fits(41));
        other.set(70);
        other.set(10);
        assert!(POOL.fits(30) && !POOL.fits(31));
        drop(one);
        assert!(POOL.fits(90) && !POOL.fits(91) && other.bytes() == 10);
    }

    #[tokio::test]
    async fn a_span_beyond_the_bound_goes_alone() {
        let alone = in_flight(u64::MAX).await;
        assert!(alone.is_some());
        let next = tokio::time::timeout(std::time::Duration::from_millis(50), in_flight(1)).await;
        assert!(next.is_err(), "there is no room for another one");
        drop(alone);
        assert!(in_flight(1).await.is_some());
    }
}
