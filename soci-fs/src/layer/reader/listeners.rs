//! Who is notified of reads, and whether there was one.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

/// Hears of every read of a layer that it listens to.
pub(crate) trait Listener: fmt::Debug + Send + Sync {
    /// Called after `length` bytes from `offset` on were read; returns whether to keep this listener. Readers wait for
    /// it.
    fn on_read(&self, offset: u64, length: usize) -> bool;
}

/// The listeners of one layer.
#[derive(Debug, Default)]
pub(super) struct Listeners {
    all: Mutex<Vec<Box<dyn Listener>>>,
    /// Whether there are any.
    is_heard: AtomicBool,
    /// Something was read.
    is_used: AtomicBool,
}

impl Listeners {
    pub(super) fn add(&self, listener: Box<dyn Listener>) {
        self.all.lock().push(listener);
        self.is_heard.store(true, Ordering::Release);
    }

    pub(super) fn is_used(&self) -> bool {
        self.is_used.load(Ordering::Relaxed)
    }

    pub(super) fn notify(&self, offset: u64, length: usize) {
        self.is_used.store(true, Ordering::Relaxed);
        if !self.is_heard.load(Ordering::Acquire) {
            return;
        }
        let mut all = self.all.lock();
        all.retain(|listener| listener.on_read(offset, length));
        self.is_heard.store(!all.is_empty(), Ordering::Release);
    }
}
