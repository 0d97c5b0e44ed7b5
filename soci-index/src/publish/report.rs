//! What became of an image that was published.

use crate::format::digest::Digest;
use crate::publish::build::LayerReport;
use crate::publish::reuse::{Relied, ReusedFrom};
use crate::registry::referrers::{FoundBy, Visibility};

/// A span index that was made beside another one.
#[derive(Debug, Clone)]
pub struct SpanReport {
    /// Digest of its manifest.
    pub index: Digest,
    /// Size of its manifest.
    pub index_size: u64,
    pub done: Done,
}

/// What became of an image.
#[derive(Debug, Clone)]
pub struct Report {
    /// Digest of the index: AWS's, or the span index where that alone was asked for.
    pub index: Digest,
    /// Size of the index manifest.
    pub index_size: u64,
    /// The span index, where both were asked for.
    pub spans: Option<SpanReport>,
    /// The layers, in the image's order.
    pub layers: Vec<LayerReport>,
    /// Prefetch artifacts: the layer of each, and its digest.
    pub prefetch: Vec<(Digest, Digest)>,
    /// Files that were asked for early and are in no layer.
    pub missing: Vec<String>,
    pub done: Done,
    /// Why that is relied on which was not built in this run, if there is any.
    pub reused: Option<Relied>,
    /// The indexes that list what was reused so.
    pub reused_from: Vec<ReusedFrom>,
    /// Indexes of the image beside it that are used instead of what was made.
    pub used_instead: Vec<Digest>,
}

impl Report {
    /// Whether all was there already.
    #[must_use]
    pub fn is_up_to_date(&self) -> bool {
        let spans = self.spans.as_ref().is_none_or(|spans| spans.done == Done::UpToDate);
        self.done == Done::UpToDate && spans
    }

    /// The manifests that were made.
    pub fn indexes(&self) -> impl Iterator<Item = Digest> {
        std::iter::once(self.index).chain(self.spans.as_ref().map(|spans| spans.index))
    }
}

/// What was done with an index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Done {
    /// The same index was there.
    UpToDate,
    /// It was pushed, and consumers find it in this way; not all of them perhaps.
    Published(FoundBy, Visibility),
    /// One is there, and the registry refuses to show it, so it is left alone.
    Hidden { reason: String },
    /// It was put into the local store.
    Stored,
    /// It was made and thrown away: a dry run.
    Nothing,
}
