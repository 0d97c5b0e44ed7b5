//! Indexes that are in the registry and that it refuses to show: where a project admits signed content only, an index
//! that is not signed is taken, listed, and answered with 412.
//!
//! What is listed so is taken for what was published before: to build it again would read every layer, and change
//! nothing. Where only signed indexes are reused it is not taken for anything, since what it says is not known.

use crate::find::discover::Refused;
use crate::format::digest::Digest;
use crate::format::manifest::INDEX_V1;
use crate::format::reference::ManifestName;
use crate::format::span_index::SPAN_INDEX;
use crate::publish::{Done, Existing, Job, Report, SpanReport};
use crate::registry::referrers::Blemish;
use crate::registry::{RegistryError, Repository};

/// What the registry says if it refuses to show a manifest that is there, asked as a consumer asks.
pub async fn refusal(repository: &Repository, digest: &Digest) -> Option<String> {
    match repository.manifest(&ManifestName::Digest(*digest)).await {
        Ok(_) => None,
        Err(error @ (RegistryError::Status { .. } | RegistryError::Unauthorized { .. })) => Some(error.to_string()),
        Err(error) => {
            tracing::debug!(%repository, %digest, %error, "it is not known whether it can be read");
            None
        }
    }
}

impl Report {
    /// Asks for the indexes that were pushed as their consumers will, and notes what refuses them.
    pub async fn look_back(&mut self, repository: &Repository) {
        let spans = self.spans.as_mut().map(|spans| (spans.index, &mut spans.done));
        for (digest, done) in std::iter::once((self.index, &mut self.done)).chain(spans) {
            if let Done::Published(_, visibility) = done
                && let Some(reason) = refusal(repository, &digest).await
            {
                visibility.add(Blemish::Refused { reason });
            }
        }
    }
}

impl Existing {
    /// What is there of every form that is wanted, where the registry shows none of it.
    pub(super) fn hidden(&self, job: &Job<'_>) -> Option<Report> {
        if job.force || job.options.reuse.signed_by.is_some() || !self.indexes.is_empty() {
            return None;
        }
        let format = job.options.format;
        let of = |kind: &str| self.refused.iter().find(|refused| refused.kind == Some(kind));
        match (format.has_ztoc(), format.has_spans()) {
            (true, true) => Some(report(of(INDEX_V1)?, Some(of(SPAN_INDEX)?))),
            (true, false) => Some(report(of(INDEX_V1)?, None)),
            (false, _) => Some(report(of(SPAN_INDEX)?, None)),
        }
    }
}

fn report(index: &Refused, spans: Option<&Refused>) -> Report {
    let done = |refused: &Refused| Done::Hidden { reason: refused.error.to_string() };
    let spans_report = |spans: &Refused| SpanReport { index: spans.digest, index_size: spans.size, done: done(spans) };
    Report {
        index: index.digest,
        index_size: index.size,
        spans: spans.map(spans_report),
        layers: Vec::new(),
        prefetch: Vec::new(),
        missing: Vec::new(),
        done: done(index),
        reused: None,
        reused_from: Vec::new(),
        used_instead: Vec::new(),
    }
}
