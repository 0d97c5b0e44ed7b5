//! What is done with start-up profiles. A section of our own: AWS's snapshotter has its prefetch artifacts, in
//! [prefetch].

use std::path::Path;

use serde::{Deserialize, Serialize};
use soci_fs::foresight::profile::Memory;
use soci_fs::node::remote::ProfileOptions;

use crate::daemon::config::Prefetch;

/// What is done with start-up profiles.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Profile {
    /// Fetch ahead what a profile names: the published default, else the one that this node recorded.
    pub replay: bool,
    /// Without a profile, fetch ahead the libraries and modules that files just read refer to.
    pub follow_names: bool,
    /// Record what start-ups read, and keep it below the root directory.
    pub record: bool,
    /// Compressed bytes that may be fetched by a profile and never read; 0 means a quarter of the image, at least 16
    /// MiB and at most 512 MiB.
    pub budget_bytes: u64,
}

impl Default for Profile {
    /// All: it costs bytes that are wanted soon anyway.
    fn default() -> Self {
        Self { replay: true, follow_names: true, record: true, budget_bytes: 0 }
    }
}

impl Profile {
    /// For the layers of a daemon with this root; `prefetch` says whether AWS's artifacts are used, too.
    #[must_use]
    pub fn options(&self, root: &Path, prefetch: &Prefetch) -> ProfileOptions {
        ProfileOptions {
            replay: self.replay,
            prefetch: prefetch.enable,
            prefetch_layers: usize::try_from(prefetch.max_concurrency).ok().filter(|limit| *limit > 0),
            follow_names: self.follow_names,
            record: self.record,
            memory: Some(Memory::new(root.join("profiles"))),
            budget_bytes: (self.budget_bytes > 0).then_some(self.budget_bytes),
            start_up: None,
        }
    }
}
