//! What is counted of a client's traffic.

use std::sync::atomic::AtomicU64;

/// Sums of what passed through a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Traffic {
    /// Requests sent, repeated ones and those to token services included.
    pub requests: u64,
    /// Bytes of bodies received.
    pub bytes_received: u64,
    /// Bytes of bodies sent.
    pub bytes_sent: u64,
}

impl std::iter::Sum for Traffic {
    fn sum<I: Iterator<Item = Self>>(several: I) -> Self {
        several.fold(Self::default(), |sum, one| Self {
            requests: sum.requests + one.requests,
            bytes_received: sum.bytes_received + one.bytes_received,
            bytes_sent: sum.bytes_sent + one.bytes_sent,
        })
    }
}

/// The same while it is being counted.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) requests: AtomicU64,
    pub(super) bytes_received: AtomicU64,
    pub(super) bytes_sent: AtomicU64,
}
