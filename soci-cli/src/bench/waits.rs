//! How long a program's reads waited for the network, as our daemon counts it: what lazy loading costs a start.
//!
//! Other snapshotters do not say; of their starts nothing is reported.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::daemon::ask;
use crate::daemon::operations::SlotStatus;

/// Reads whose bytes were not on this machine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Waits {
    pub reads: u64,
    /// How long they waited together. Concurrent reads count individually.
    pub seconds: f64,
}

impl Waits {
    /// What the daemon of `root` has counted for layers that come from `repository`, with its registry; `None` when
    /// none answers, or it serves nothing from there.
    #[must_use]
    pub fn of(root: &Path, repository: &str) -> Option<Self> {
        Self::among(&ask::status(root).ok()?.layers, repository)
    }

    fn among(layers: &[SlotStatus], repository: &str) -> Option<Self> {
        let mut found = None;
        for held in layers.iter().filter(|held| held.image.split('@').next() == Some(repository)) {
            let waits: &mut Self = found.get_or_insert_default();
            waits.reads += held.layer.late_reads;
            waits.seconds += held.layer.waited_seconds;
        }
        found
    }

    /// What was added since `before`.
    #[must_use]
    pub fn since(self, before: Self) -> Self {
        Self { reads: self.reads.saturating_sub(before.reads), seconds: (self.seconds - before.seconds).max(0.0) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_layers_of_the_repository_count() {
        let layer = |image: &str, reads: u64| -> SlotStatus {
            serde_json::from_value(serde_json::json!({
                "slot": 1, "image": image, "digest": "sha256:00", "compressed_bytes": 1, "uncompressed_bytes": 1,
                "present_bytes": 1, "spans": 1, "present_spans": 1, "fetched_bytes": 1, "requests": 1, "failures": 0,
                "proven": false, "late_reads": reads, "waited_seconds": 0.5,
            }))
            .unwrap()
        };
        let layers = [layer("a:1/b@sha256:12", 3), layer("a:1/b@sha256:34", 4), layer("a:1/b/c@sha256:12", 100)];
        let waits = Waits::among(&layers, "a:1/b").unwrap();
        assert_eq!(waits, Waits { reads: 7, seconds: 1.0 });
        assert_eq!(waits.since(Waits { reads: 3, seconds: 0.25 }), Waits { reads: 4, seconds: 0.75 });
        assert_eq!(Waits::among(&layers, "a:1"), None);
    }
}
