//! One file per command: each has a `run` that takes the parsed arguments and returns when done. Beside them stands what
//! several share.
//!
//! Commands that show files are the feature `mount`, those of a node the feature `node`; where others meet a node
//! (`containerd`, `doctor/node`, `record/container`), `without_node` stands in for it.

#[cfg(feature = "node")]
pub mod bench;
pub mod build;
pub mod catalogue;
pub mod choice;
#[cfg(feature = "node")]
pub mod containerd;
pub mod convert;
pub mod create;
#[cfg(feature = "mount")]
pub mod demo;
pub mod doctor;
pub mod finding;
pub mod help;
pub mod image;
pub mod index;
pub mod layers;
#[cfg(feature = "mount")]
pub mod mount;
pub mod outcome;
pub mod prefetch;
pub mod profile;
pub mod publish;
#[cfg(feature = "mount")]
pub mod pull;
pub mod push;
pub mod rebuild_db;
#[cfg(feature = "mount")]
pub mod record;
#[cfg(feature = "node")]
pub mod reference;
#[cfg(feature = "node")]
pub mod rpull;
pub mod serve_webhook;
pub mod sign;
pub mod source;
#[cfg(feature = "node")]
pub mod status;
pub mod verify;
#[cfg(not(feature = "node"))]
pub mod without_node;
pub mod ztoc;

#[cfg(not(feature = "node"))]
use self::without_node as containerd;

use soci_index::clock;
use soci_index::format::ztoc::rfc3339;
use soci_index::registry::referrers::FoundBy;

/// Now, by RFC 3339.
#[must_use]
pub fn now() -> String {
    rfc3339::format(clock::timestamp(clock::since_epoch()))
}

/// How long ago that was: `1h2m3s ago`, as AWS's tool writes it; `n/a` for a text that is no time.
#[must_use]
pub fn age(created: &str) -> String {
    let Some(created) = rfc3339::parse(created.as_bytes()) else { return "n/a".to_owned() };
    let age = clock::seconds().saturating_sub(u64::try_from(created.seconds).unwrap_or_default());
    let (hours, minutes, seconds) = (age / 3600, age / 60 % 60, age % 60);
    match (hours, minutes) {
        (0, 0) => format!("{seconds}s ago"),
        (0, _) => format!("{minutes}m{seconds}s ago"),
        _ => format!("{hours}h{minutes}m{seconds}s ago"),
    }
}

/// How an index is found, in words.
#[must_use]
pub fn found_by(found_by: &FoundBy) -> &'static str {
    match found_by {
        FoundBy::Api => "the referrers API",
        FoundBy::FallbackTag => "the fallback tag",
        FoundBy::Nothing(_) => "nobody",
    }
}
