//! SOCI index manifests and prefetch artifacts, in the exact JSON of AWS's tools.
//!
//! AWS's daemon decodes an index that it fetched, encodes it again, and stores the result under the *old* digest. An
//! index with any other key order, white space, escape or extra field is thus lost to it. So the documents are written
//! here as Go's encoder writes them, from structs whose fields are in the right order, and nothing is ever added: no
//! `artifactType`, no annotation of ours.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::format::class::{Class, Classified};
use crate::format::digest::Digest;
use crate::format::gojson;
use crate::format::limits::Limits;
use crate::format::model::{Descriptor, media_type};
use crate::format::ztoc::BUILD_TOOL;

/// Configuration media type of an index that names its image as `subject`.
pub const INDEX_V1: &str = "application/vnd.amazon.soci.index.v1+json";
/// Configuration media type of an index that the image names in an annotation.
pub const INDEX_V2: &str = "application/vnd.amazon.soci.index.v2+json";
/// Media type of a zTOC.
pub const ZTOC: &str = "application/octet-stream";
/// Media type of a prefetch artifact.
pub const PREFETCH: &str = "application/vnd.amazon.soci.prefetch.v1+json";
/// The configuration blob of every index.
pub const EMPTY_CONFIG: &[u8] = b"{}";

/// The document in messages.
const WHAT: &str = "SOCI index";

/// Annotation: digest of the layer that a zTOC or prefetch artifact is for.
pub const LAYER_DIGEST: &str = "com.amazon.soci.image-layer-digest";
/// Annotation: media type of that layer.
pub const LAYER_MEDIA_TYPE: &str = "com.amazon.soci.image-layer-mediaType";
/// Annotation: span size of a zTOC.
pub(crate) const SPAN_SIZE: &str = "com.amazon.soci.span-size";
/// Annotation: the layer has no extended attributes, so a runtime need not answer for them.
pub(crate) const DISABLE_XATTRS: &str = "com.amazon.soci.disable-xattrs";
/// Annotation of an image manifest: the digest of its version 2 index.
pub const INDEX_DIGEST: &str = "com.amazon.soci.index-digest";
/// Annotation of a version 2 index's entry: the digest of the image manifest that it is for.
pub(crate) const IMAGE_MANIFEST_DIGEST: &str = "com.amazon.soci.image-manifest-digest";
/// Annotation of the manifest: what made it.
pub(crate) const BUILD_TOOL_IDENTIFIER: &str = "com.amazon.soci.build-tool-identifier";

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SociIndex {
    schema_version: u32,
    media_type: String,
    config: Descriptor,
    /// zTOCs in the order of the image's layers, then prefetch artifacts.
    pub layers: Vec<Descriptor>,
    /// The image manifest that it is for (v1 only).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<Descriptor>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    annotations: BTreeMap<String, String>,
}

/// Why a document is not the index, of either form, or the prefetch artifact that it should be.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// Not such JSON.
    #[error("not a {what}: {source}")]
    Json { what: &'static str, source: serde_json::Error },
    /// The configuration's media type is of something else.
    #[error("not a {what}: its configuration has the media type {found:?}")]
    Kind { what: &'static str, found: String },
    /// Larger than any registry takes.
    #[error("the {what} has {bytes} bytes, more than the limit of {cap}")]
    TooLarge { what: &'static str, bytes: usize, cap: u64 },
    /// A prefetch artifact with an unknown version or a range that is none.
    #[error("not a usable prefetch artifact: {what}")]
    Prefetch { what: String },
}

impl Classified for ManifestError {
    fn class(&self) -> Class {
        Class::Content
    }
}

/// Reads a document of at most a manifest's size.
pub(super) fn read<T: DeserializeOwned>(what: &'static str, bytes: &[u8], limits: &Limits) -> Result<T, ManifestError> {
    let cap = limits.manifest_bytes_max;
    if bytes.len() as u64 > cap {
        return Err(ManifestError::TooLarge { what, bytes: bytes.len(), cap });
    }
    serde_json::from_slice(bytes).map_err(|source| ManifestError::Json { what, source })
}

/// Whether a configuration is of one of these kinds.
pub(super) fn check_kind(what: &'static str, config: &Descriptor, kinds: &[&str]) -> Result<(), ManifestError> {
    let found = config.media_type.as_str();
    let wrong = || ManifestError::Kind { what, found: found.chars().take(100).collect() };
    kinds.contains(&found).then_some(()).ok_or_else(wrong)
}

/// A zTOC as an index refers to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ZtocReference {
    /// The zTOC blob.
    pub digest: Digest,
    pub size: u64,
    pub layer: Digest,
    pub layer_media_type: String,
    /// Span size that it was built with.
    pub span_bytes: u64,
    /// Whether to note that the layer has no extended attributes.
    pub disable_xattrs: bool,
}

impl ZtocReference {
    fn descriptor(&self) -> Descriptor {
        let mut descriptor = Descriptor::new(ZTOC, self.digest, self.size);
        let mut note = |key: &str, value: String| descriptor.annotations.insert(key.to_owned(), value);
        if self.disable_xattrs {
            note(DISABLE_XATTRS, "true".to_owned());
        }
        note(LAYER_DIGEST, self.layer.to_string());
        note(LAYER_MEDIA_TYPE, self.layer_media_type.clone());
        note(SPAN_SIZE, self.span_bytes.to_string());
        descriptor
    }
}

impl SociIndex {
    /// An index (v1) of the image whose manifest is `subject`. Of `subject` only media type, digest and size count.
    /// `prefetch` pairs the digest of a layer with its artifact.
    #[must_use]
    pub fn v1(ztocs: &[ZtocReference], prefetch: &[(Digest, Descriptor)], subject: &Descriptor) -> Self {
        let subject = Descriptor::new(&subject.media_type, subject.digest, subject.size);
        Self { subject: Some(subject), ..Self::of(INDEX_V1, ztocs, prefetch) }
    }

    /// An index (v2), which its image names in an annotation. `prefetch` is as for [`SociIndex::v1`].
    #[must_use]
    pub fn v2(ztocs: &[ZtocReference], prefetch: &[(Digest, Descriptor)]) -> Self {
        Self::of(INDEX_V2, ztocs, prefetch)
    }

    fn of(kind: &str, ztocs: &[ZtocReference], prefetch: &[(Digest, Descriptor)]) -> Self {
        Self {
            schema_version: 2,
            media_type: media_type::MANIFEST.to_owned(),
            config: Descriptor::of(kind, EMPTY_CONFIG),
            layers: ztocs.iter().map(ZtocReference::descriptor).chain(prefetch.iter().map(noted)).collect(),
            subject: None,
            annotations: BTreeMap::from([(BUILD_TOOL_IDENTIFIER.to_owned(), BUILD_TOOL.to_owned())]),
        }
    }

    /// The same index with these prefetch artifacts, in the order of the image's layers, instead of those that it has.
    #[must_use]
    pub(crate) fn with_prefetch(mut self, prefetch: &[(Digest, Descriptor)]) -> Self {
        self.layers.retain(|blob| blob.media_type != PREFETCH);
        self.layers.extend(prefetch.iter().map(noted));
        self
    }

    /// Reads an index of either version.
    ///
    /// # Errors
    /// [`ManifestError`].
    pub fn parse(bytes: &[u8], limits: &Limits) -> Result<Self, ManifestError> {
        let index: Self = read(WHAT, bytes, limits)?;
        check_kind(WHAT, &index.config, &[INDEX_V1, INDEX_V2])?;
        Ok(index)
    }

    /// 1 or 2.
    #[must_use]
    pub fn version(&self) -> u32 {
        if self.config.media_type == INDEX_V2 { 2 } else { 1 }
    }

    /// The zTOC of `layer`: the first one that names it.
    #[must_use]
    pub fn ztoc(&self, layer: &Digest) -> Option<&Descriptor> {
        self.ztocs().find(|(named, _)| named == layer).map(|(_, descriptor)| descriptor)
    }

    /// All zTOCs, each with the layer that it is for.
    pub fn ztocs(&self) -> impl Iterator<Item = (Digest, &Descriptor)> {
        let named = |descriptor: &Descriptor| descriptor.annotations.get(LAYER_DIGEST)?.parse().ok();
        self.layers
            .iter()
            .filter(|descriptor| descriptor.media_type == ZTOC)
            .filter_map(move |descriptor| Some((named(descriptor)?, descriptor)))
    }

    /// The document.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        gojson::encode(self)
    }
}

/// A prefetch artifact as an index refers to it.
fn noted((layer, artifact): &(Digest, Descriptor)) -> Descriptor {
    let mut artifact = Descriptor::new(PREFETCH, artifact.digest, artifact.size);
    artifact.annotations.insert(LAYER_DIGEST.to_owned(), layer.to_string());
    artifact
}

/// A prefetch artifact: which spans of one layer a start-up wants.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prefetch {
    version: String,
    /// The ranges, ascending.
    pub prefetch_spans: Vec<PrefetchRange>,
}

/// A range of spans, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrefetchRange {
    /// First span.
    pub start_span: u32,
    /// Last span.
    pub end_span: u32,
    /// Lower comes earlier; 0 is left out.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub priority: u32,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the form that serde asks for")]
const fn is_zero(number: &u32) -> bool {
    *number == 0
}

impl Prefetch {
    /// An artifact of the given ranges: sorted, and joined where they touch.
    #[must_use]
    pub(crate) fn new(mut ranges: Vec<(u32, u32)>) -> Self {
        ranges.sort_unstable();
        let mut joined: Vec<PrefetchRange> = Vec::new();
        for (start_span, end_span) in ranges {
            match joined.last_mut() {
                Some(last) if start_span <= last.end_span.saturating_add(1) => {
                    last.end_span = last.end_span.max(end_span)
                }
                _ => joined.push(PrefetchRange { start_span, end_span, priority: 0 }),
            }
        }
        Self { version: "1.0".to_owned(), prefetch_spans: joined }
    }

    /// How many spans it names.
    #[must_use]
    pub fn spans(&self) -> u64 {
        let count = |range: &PrefetchRange| u64::from(range.end_span.saturating_sub(range.start_span)) + 1;
        self.prefetch_spans.iter().map(count).sum()
    }

    /// Reads an artifact.
    ///
    /// # Errors
    /// [`ManifestError`] for other versions, an empty list, and ranges that end before they start.
    pub fn parse(bytes: &[u8], limits: &Limits) -> Result<Self, ManifestError> {
        let prefetch: Self = read(WHAT, bytes, limits)?;
        let refuse = |what: String| Err(ManifestError::Prefetch { what });
        if prefetch.version != "1.0" {
            return refuse(format!("version {:?} is not 1.0", prefetch.version.chars().take(50).collect::<String>()));
        }
        if prefetch.prefetch_spans.is_empty() {
            return refuse("it names no span".to_owned());
        }
        match prefetch.prefetch_spans.iter().find(|range| range.end_span < range.start_span) {
            Some(range) => refuse(format!("range {}..{} ends before it starts", range.start_span, range.end_span)),
            None => Ok(prefetch),
        }
    }

    /// The document.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        gojson::encode(self)
    }
}
