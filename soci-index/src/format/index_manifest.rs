//! An index manifest of either form, for callers that accept both.

use std::collections::BTreeSet;

use crate::format::digest::Digest;
use crate::format::limits::Limits;
use crate::format::manifest::{INDEX_V1, INDEX_V2, ManifestError, SociIndex};
use crate::format::model::Descriptor;
use crate::format::span_index::{SPAN_INDEX, SpanIndex};

/// The artifact types of indexes that refer to an image, the better one first.
pub const REFERRING: &[&str] = &[SPAN_INDEX, INDEX_V1];

/// What an index manifest says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IndexManifest {
    /// AWS's.
    Soci(SociIndex),
    /// Ours.
    Spans(SpanIndex),
}

impl IndexManifest {
    /// Reads a manifest whose artifact type is `kind`; of any other kind than [`SPAN_INDEX`] it has to be AWS's.
    ///
    /// # Errors
    /// [`ManifestError`].
    pub fn parse(kind: &str, json: &[u8], limits: &Limits) -> Result<Self, ManifestError> {
        Ok(match kind {
            SPAN_INDEX => Self::Spans(SpanIndex::parse(json, limits)?),
            _ => Self::Soci(SociIndex::parse(json, limits)?),
        })
    }

    /// Its artifact type.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Spans(_) => SPAN_INDEX,
            Self::Soci(index) if index.version() == 2 => INDEX_V2,
            Self::Soci(_) => INDEX_V1,
        }
    }

    /// The name of its form, for display.
    #[must_use]
    pub fn form(&self) -> &'static str {
        match self {
            Self::Spans(_) => "spans",
            Self::Soci(index) if index.version() == 2 => "v2",
            Self::Soci(_) => "v1",
        }
    }

    /// The image manifest that it names as its subject.
    #[must_use]
    pub const fn subject(&self) -> Option<&Descriptor> {
        match self {
            Self::Soci(index) => index.subject.as_ref(),
            Self::Spans(index) => Some(&index.subject),
        }
    }

    /// The zTOC or TOC of a layer.
    #[must_use]
    pub fn table(&self, layer: &Digest) -> Option<&Descriptor> {
        match self {
            Self::Soci(index) => index.ztoc(layer),
            Self::Spans(index) => index.toc(layer),
        }
    }

    /// The zTOCs, each with its layer; none in a span index.
    #[must_use]
    pub fn ztocs(&self) -> Vec<(Digest, &Descriptor)> {
        match self {
            Self::Soci(index) => index.ztocs().collect(),
            Self::Spans(_) => Vec::new(),
        }
    }

    /// How many layers it has a table of.
    #[must_use]
    pub(crate) fn coverage(&self) -> usize {
        let layers: BTreeSet<Digest> = match self {
            Self::Soci(index) => index.ztocs().map(|(layer, _)| layer).collect(),
            Self::Spans(index) => index.references().map(|reference| reference.layer).collect(),
        };
        layers.len()
    }

    /// The blobs that it refers to.
    #[must_use]
    pub fn blobs(&self) -> &[Descriptor] {
        match self {
            Self::Soci(index) => &index.layers,
            Self::Spans(index) => &index.layers,
        }
    }

    /// The document.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        match self {
            Self::Soci(index) => index.to_json(),
            Self::Spans(index) => index.to_json(),
        }
    }
}
