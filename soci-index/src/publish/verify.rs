//! Verifying: whether an index says of an image what the image's layers say.
//!
//! An edge. Every zTOC is built again from its layer, whose digest and `diff_id` are checked on the way, and compared:
//! bit by bit, and where bits differ, by what they mean. A zTOC that differs only in form (another tool's name, a time
//! zone) is accepted and distinguished from one with different content. So a published index can be trusted, or not,
//! without knowing its publisher.

use crate::format::compact;
use crate::format::digest::Digest;
use crate::format::limits::Limits;
use crate::format::manifest::{PREFETCH, Prefetch, SociIndex};
use crate::format::model::Descriptor;
use crate::format::span_index::{SpanIndex, SpanReference};
use crate::format::ztoc::compare::{Difference, first_difference};
use crate::format::ztoc::{EncodeError, Ztoc};
use crate::image::urls::UrlFetcher;
use crate::image::{ImageSource, PlatformImage};
use crate::indexing::Indexed;
use crate::publish::PublishError;
use crate::publish::build::{self, BuildError, BuildOptions, Format, Observer, Skip, index_layer};

/// What a zTOC turned out to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// What we would build ourselves, bit by bit.
    Identical,
    /// The same facts in other bytes.
    SameFacts {
        /// The tool that it names.
        tool: String,
    },
    /// It says something else than the layer.
    Differs(Difference),
    /// It cannot be read, or is for something that it cannot be for.
    Unusable { reason: String },
}

impl Verdict {
    /// Whether the zTOC may be relied on.
    #[must_use]
    pub fn is_good(&self) -> bool {
        matches!(self, Self::Identical | Self::SameFacts { .. })
    }
}

/// A blob of an index and what it turned out to be.
#[derive(Debug, Clone)]
pub struct Checked {
    /// The zTOC or prefetch artifact.
    pub blob: Digest,
    pub layer: Digest,
    /// The judgement.
    pub verdict: Verdict,
}

/// Checks all that `index` says of `image`, in the order of the index. Blobs of the index are in `origin`, which need
/// not be where the image is; foreign layers come by `urls`, if the operator allows that.
///
/// # Errors
/// [`PublishError`] when the image or a blob cannot be read, or the image is not what its own digests say.
pub async fn verify(
    source: &ImageSource,
    image: &PlatformImage,
    index: &SociIndex,
    origin: &ImageSource,
    urls: Option<&UrlFetcher>,
    observer: &Observer,
) -> Result<Vec<Checked>, PublishError> {
    let layers = Layers { source, urls, observer };
    let mut checked = Vec::new();
    for (layer, blob) in index.ztocs() {
        let verdict = match image.manifest.layers.iter().zip(&image.config.diff_ids).find(|(of, _)| of.digest == layer)
        {
            None => Verdict::Unusable { reason: "the image has no such layer".to_owned() },
            Some((descriptor, diff_id)) => check(layers, descriptor, diff_id, blob, origin).await?,
        };
        checked.push(Checked { blob: blob.digest, layer, verdict });
    }
    for blob in index.layers.iter().filter(|blob| blob.media_type == PREFETCH) {
        checked.extend(check_prefetch(index, blob, origin).await?);
    }
    Ok(checked)
}

/// Checks all that a span index says of `image`: the TOC and the windows of each layer, which are the same on every
/// machine.
///
/// # Errors
/// As [`verify`].
pub async fn verify_spans(
    source: &ImageSource,
    image: &PlatformImage,
    index: &SpanIndex,
    origin: &ImageSource,
    urls: Option<&UrlFetcher>,
    observer: &Observer,
) -> Result<Vec<Checked>, PublishError> {
    let read = Layers { source, urls, observer };
    let mut checked = Vec::new();
    for reference in index.references() {
        let layers = || image.manifest.layers.iter().zip(&image.config.diff_ids);
        let verdicts = match layers().find(|(of, _)| of.digest == reference.layer) {
            None => [(); 2].map(|()| Verdict::Unusable { reason: "the image has no such layer".to_owned() }),
            Some((layer, diff_id)) => check_spans(read, layer, diff_id, &reference, origin).await?,
        };
        for (blob, verdict) in [reference.toc.0, reference.windows.0].into_iter().zip(verdicts) {
            checked.push(Checked { blob, layer: reference.layer, verdict });
        }
    }
    Ok(checked)
}

/// How the layers of the image are read.
#[derive(Clone, Copy)]
struct Layers<'a> {
    source: &'a ImageSource,
    urls: Option<&'a UrlFetcher>,
    observer: &'a Observer,
}

impl Layers<'_> {
    /// Indexes one of them again.
    async fn index(self, layer: &Descriptor, options: BuildOptions) -> Result<Result<Indexed, Skip>, BuildError> {
        let options = BuildOptions { layer_bytes_min: 0, urls: self.urls.cloned(), ..options };
        index_layer(self.source, layer, &options, self.observer).await
    }
}

/// The verdicts on a TOC and a windows blob.
async fn check_spans(
    layers: Layers<'_>,
    layer: &Descriptor,
    diff_id: &Digest,
    reference: &SpanReference,
    origin: &ImageSource,
) -> Result<[Verdict; 2], PublishError> {
    let unusable = |reason: String| Ok([(); 2].map(|()| Verdict::Unusable { reason: reason.clone() }));
    let options =
        BuildOptions { format: Format::Span, index_span_bytes: reference.span_bytes, ..BuildOptions::default() };
    let indexed = match layers.index(layer, options).await? {
        Ok(indexed) => indexed,
        Err(skip) => return unusable(format!("the layer is {}, which has no such index ({skip})", layer.media_type)),
    };
    build::check_diff_id(layer, diff_id, &indexed)?;
    let expected = match indexed.compact {
        Some(Ok(blobs)) => blobs,
        Some(Err(error)) => return unusable(error.to_string()),
        None => return unusable("none can be made of this layer".to_owned()),
    };
    let limits = Limits::INDEXING;
    let toc = origin.blob_bytes(&reference.toc_descriptor(), limits.ztoc_bytes_max).await?;
    let toc_verdict = if toc == expected.toc {
        Verdict::Identical
    } else {
        match (compact::decode(&toc, &limits), compact::decode(&expected.toc, &limits)) {
            (Ok(found), Ok(wanted)) if found.entries != wanted.entries => {
                Verdict::Unusable { reason: "its file table is not the layer's".to_owned() }
            }
            (Ok(_), Ok(_)) => Verdict::Unusable { reason: "its spans are not those that are made here".to_owned() },
            (Err(error), _) | (_, Err(error)) => Verdict::Unusable { reason: error.to_string() },
        }
    };
    let is_same = reference.windows.0 == Digest::of(&expected.windows);
    let is_there = is_same && origin.has_blob(&reference.windows_descriptor()).await?;
    let windows_verdict = match (is_same, is_there) {
        (true, true) => Verdict::Identical,
        (true, false) => Verdict::Unusable { reason: "it is not there".to_owned() },
        (false, _) => Verdict::Unusable { reason: "its windows are not those that are made here".to_owned() },
    };
    Ok([toc_verdict, windows_verdict])
}

async fn check(
    layers: Layers<'_>,
    layer: &Descriptor,
    diff_id: &Digest,
    blob: &Descriptor,
    origin: &ImageSource,
) -> Result<Verdict, PublishError> {
    let limits = Limits::INDEXING;
    let bytes = origin.blob_bytes(blob, limits.ztoc_bytes_max).await?;
    let unusable = |reason: String| Ok(Verdict::Unusable { reason });
    let found = match Ztoc::decode(&bytes, &limits) {
        Ok(found) => found,
        Err(error) => return unusable(error.to_string()),
    };
    let Ok(span_bytes) = u64::try_from(found.span_bytes()) else {
        return unusable(format!("its span size is {}", found.span_bytes()));
    };
    let options = BuildOptions { span_bytes, limits, ..BuildOptions::default() };
    let indexed = match layers.index(layer, options).await? {
        Ok(indexed) => indexed,
        Err(skip) => return unusable(format!("the layer is {}, which has no such index ({skip})", layer.media_type)),
    };
    build::check_diff_id(layer, diff_id, &indexed)?;
    let expected = match indexed.into_ztoc() {
        Ok(expected) => expected,
        Err(obstacle) => return unusable(format!("no zTOC can describe this layer: {obstacle}")),
    };
    if let Some(difference) = first_difference(&expected, &found) {
        return Ok(Verdict::Differs(difference));
    }
    match expected.encode() {
        Ok(encoded) if encoded.digest() == blob.digest => return Ok(Verdict::Identical),
        Ok(_) => {}
        Err(error @ (EncodeError::Sparse { .. } | EncodeError::TooLarge { .. })) => return unusable(error.to_string()),
    }
    Ok(Verdict::SameFacts { tool: found.build_tool.chars().take(100).collect() })
}

/// A prefetch artifact can only be checked for naming spans that exist: what is wanted early is a matter of taste.
async fn check_prefetch(
    index: &SociIndex,
    blob: &Descriptor,
    origin: &ImageSource,
) -> Result<Option<Checked>, PublishError> {
    let limits = Limits::INDEXING;
    let named =
        blob.annotations.get(crate::format::manifest::LAYER_DIGEST).and_then(|layer| layer.parse::<Digest>().ok());
    let checked = |layer: Digest, verdict| Ok(Some(Checked { blob: blob.digest, layer, verdict }));
    let Some(layer) = named else {
        return checked(blob.digest, Verdict::Unusable { reason: "it names no layer".to_owned() });
    };
    let Some(ztoc) = index.ztoc(&layer) else {
        return checked(layer, Verdict::Unusable { reason: "the index has no zTOC for this layer".to_owned() });
    };
    let parsed = Prefetch::parse(&origin.blob_bytes(blob, limits.manifest_bytes_max).await?, &limits);
    let decoded = Ztoc::decode(&origin.blob_bytes(ztoc, limits.ztoc_bytes_max).await?, &limits);
    let last = decoded.ok().and_then(|ztoc| u32::try_from(ztoc.max_span_id).ok());
    let verdict = match parsed {
        Err(error) => Verdict::Unusable { reason: error.to_string() },
        Ok(parsed) => match parsed.prefetch_spans.iter().find(|range| Some(range.end_span) > last) {
            Some(range) => Verdict::Unusable { reason: format!("there is no span {}", range.end_span) },
            None => Verdict::Identical,
        },
    };
    checked(layer, verdict)
}
