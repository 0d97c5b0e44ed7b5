//! The system's clock. A clock before 1970 is taken for 1970: no caller can do better.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::format::entry::Timestamp;

/// The time since 1970.
#[must_use]
pub fn since_epoch() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Seconds since 1970.
#[must_use]
pub fn seconds() -> u64 {
    since_epoch().as_secs()
}

/// The moment that is so long after 1970.
#[must_use]
pub fn timestamp(since_epoch: Duration) -> Timestamp {
    let seconds = i64::try_from(since_epoch.as_secs()).unwrap_or(i64::MAX);
    Timestamp { seconds, nanoseconds: since_epoch.subsec_nanos() }
}
