//! Indexes the layers of an image: each is streamed once, checked, and turned into a zTOC; nothing is kept on disk.
//!
//! An edge: it joins an image source to the [`crate::indexing::pipeline`]. Where the zTOCs go is not decided here: each
//! is handed on as soon as it is made, so that at most as many are in memory as layers are read at the same time.
//! Invariant: a zTOC is handed on only after the layer's digest (by the manifest) and the digest of its uncompressed
//! stream (by the image configuration) have been found right.

use std::collections::BTreeMap;
use std::str::FromStr;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt};

use crate::format::compact;
use crate::format::digest::Digest;
use crate::format::encoding::{Declared, Encoding};
use crate::format::limits::Limits;
use crate::format::manifest::ZtocReference;
use crate::format::model::Descriptor;
use crate::format::prefetch::{self, Wanted};
use crate::format::span_index::SpanReference;
use crate::format::ztoc::{EncodeError, Encoded};
use crate::image::urls::UrlFetcher;
use crate::image::{ImageSource, PlatformImage};
use crate::indexing::{Indexed, SPAN_BYTES};
use crate::publish::reuse::{REUSE_TAGS, Reuse};

mod error;
mod layer;

pub use error::{BuildError, Skip};
pub(crate) use layer::index_layer;

/// Default least size of a layer that gets an index, as AWS's tools have it: 10 MiB.
pub(crate) const LAYER_BYTES_MIN: u64 = 10 << 20;

/// Forms of an index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// zTOCs, for AWS's runtime and for ours.
    Aws,
    /// The span index, for ours.
    Span,
    Both,
}

impl Format {
    /// All, by their names, with what each means.
    pub const NAMES: [(&'static str, Self, &'static str); 3] = [
        ("aws", Self::Aws, "zTOCs, as AWS's tools make and read them"),
        (
            "span",
            Self::Span,
            "The span index: finer, a tenth of the size to start with, for this project's runtime only",
        ),
        ("both", Self::Both, "Both, side by side; each runtime uses its own"),
    ];

    /// Whether zTOCs are made.
    #[must_use]
    pub const fn has_ztoc(self) -> bool {
        matches!(self, Self::Aws | Self::Both)
    }

    /// Whether a span index is made.
    #[must_use]
    pub(crate) const fn has_spans(self) -> bool {
        matches!(self, Self::Span | Self::Both)
    }
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::NAMES.iter().find(|(name, ..)| *name == text).map(|(_, format, _)| *format);
        found.ok_or_else(|| format!("{text:?} is none of {}", Self::NAMES.map(|(name, ..)| name).join(", ")))
    }
}

#[derive(Debug, Clone)]
pub struct BuildOptions {
    /// Which forms of an index to make.
    pub format: Format,
    /// Uncompressed bytes between the checkpoints of a zTOC.
    pub span_bytes: u64,
    /// Least uncompressed bytes between those of a span index, see `compact::span_bytes`.
    pub index_span_bytes: u64,
    /// Layers below this many compressed bytes are left alone.
    pub layer_bytes_min: u64,
    /// Whether to note which layers have no extended attributes.
    pub note_xattrs: bool,
    /// Files whose spans a start-up shall have early: paths in the image.
    pub prefetch: Vec<String>,
    /// How many other tags of the repository are looked at for layers that are indexed already.
    pub reuse_tags: usize,
    /// What of that may be relied on.
    pub reuse: Reuse,
    /// Fetches foreign layers from their URLs, if that is allowed.
    pub urls: Option<UrlFetcher>,
    /// How many layers are read at the same time, at least 1.
    pub parallel: usize,
    /// Bounds on what a layer may make us hold.
    pub limits: Limits,
}

impl Default for BuildOptions {
    fn default() -> Self {
        let parallel = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
        Self {
            format: Format::Aws,
            span_bytes: SPAN_BYTES,
            index_span_bytes: compact::SPAN_BYTES,
            layer_bytes_min: LAYER_BYTES_MIN,
            note_xattrs: false,
            prefetch: Vec::new(),
            reuse_tags: REUSE_TAGS,
            reuse: Reuse::default(),
            urls: None,
            parallel,
            limits: Limits::INDEXING,
        }
    }
}

/// A layer and what became of it.
#[derive(Debug, Clone)]
pub struct LayerReport {
    pub layer: Descriptor,
    /// Its zTOC, or why it has none.
    pub outcome: Result<LayerZtoc, Skip>,
    /// Its part of the span index, if one is built and lists the layer.
    pub spans: Option<LayerSpans>,
}

/// A layer's part of the span index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerSpans {
    /// How the span index refers to it.
    pub reference: SpanReference,
    pub origin: IndexOrigin,
}

/// Where a layer's index comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IndexOrigin {
    /// From the layer, for the first time.
    Built,
    /// From the layer; an index that existed already turned out to be the same.
    BuiltAgain,
    /// An index that existed already; the layer was not read.
    Reused,
}

impl IndexOrigin {
    /// Of something built from the layer: `digest`, where `known` existed before.
    fn built(digest: Digest, known: Option<Digest>) -> Self {
        if known == Some(digest) { Self::BuiltAgain } else { Self::Built }
    }

    /// Whether the layer was not read for it.
    #[must_use]
    pub fn is_reused(self) -> bool {
        self == Self::Reused
    }

    /// Whether the same index existed before.
    #[must_use]
    pub fn existed(self) -> bool {
        self != Self::Built
    }
}

/// The zTOC of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerZtoc {
    /// How an index refers to it.
    pub reference: ZtocReference,
    pub origin: IndexOrigin,
    /// Where the layer has the files of [`BuildOptions::prefetch`], one by one. Empty for a zTOC that was there before.
    pub wanted: Vec<Wanted>,
}

/// What happens while an image is indexed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Compressed bytes of layers are in flight: one piece.
    Read {
        /// Its length.
        bytes: u64,
    },
    LayerDone {
        layer: Digest,
    },
}

/// Told of [`Progress`]; called from several tasks.
pub type Observer = Arc<dyn Fn(Progress) + Send + Sync>;

/// What was made of a layer, on its way to where it is kept.
#[derive(Debug)]
pub(crate) enum Finished {
    /// A zTOC: how an index will refer to it, and the file.
    Ztoc(ZtocReference, Arc<Encoded>),
    /// The two blobs of a span index.
    Spans { toc: Bytes, windows: Bytes },
}

/// What exists already.
#[derive(Debug, Clone, Default)]
pub(crate) struct Existing {
    /// zTOCs.
    pub ztocs: Vec<ZtocReference>,
    /// Blobs of span indexes.
    pub spans: Vec<SpanReference>,
}

impl Existing {
    fn ztoc(&self, layer: &Descriptor, options: &BuildOptions) -> Option<LayerZtoc> {
        let same = |known: &&ZtocReference| known.layer == layer.digest && known.span_bytes == options.span_bytes;
        let known = self.ztocs.iter().find(same)?.clone();
        // The same layer may be named with another media type elsewhere.
        let reference = ZtocReference { layer_media_type: layer.media_type.clone(), ..known };
        Some(LayerZtoc { reference, origin: IndexOrigin::Reused, wanted: Vec::new() })
    }

    fn spans(&self, layer: &Descriptor, options: &BuildOptions) -> Option<LayerSpans> {
        let wanted = options.index_span_bytes;
        let same = |known: &&SpanReference| known.layer == layer.digest && known.span_bytes == wanted;
        Some(LayerSpans { reference: self.spans.iter().find(same)?.clone(), origin: IndexOrigin::Reused })
    }
}

/// How a layer is compressed, by its media type, as far as an index is possible. Its bytes may say otherwise.
///
/// # Errors
/// [`Skip::Compression`].
pub fn compression(media_type: &str) -> Result<Encoding, Skip> {
    match Declared::by_media_type(media_type) {
        Declared::Layer(encoding @ (Encoding::Gzip | Encoding::Tar)) => Ok(encoding),
        _ => Err(no_compression(media_type)),
    }
}

/// Why a layer of this media type has no index.
fn no_compression(media_type: &str) -> Skip {
    let name = media_type.rsplit(['+', '.', '/']).next().unwrap_or(media_type);
    Skip::Compression { name: name.to_owned() }
}

/// Indexes the layers of `image`. `known` is what exists already; `keep` stores what is new.
///
/// The reports are in the order of the image's layers. A layer that occurs twice is read once.
///
/// # Errors
/// [`BuildError`], or what `keep` says. zTOCs that were handed on before the error stay where they are.
pub(crate) async fn build<E, F>(
    source: &ImageSource,
    image: &PlatformImage,
    options: &BuildOptions,
    known: &Existing,
    observer: &Observer,
    keep: impl Fn(Finished) -> F,
) -> Result<Vec<LayerReport>, E>
where
    E: From<BuildError>,
    F: Future<Output = Result<(), E>>,
{
    let layers = image.manifest.layers.iter().zip(&image.config.diff_ids);
    let unique: BTreeMap<Digest, (&Descriptor, &Digest)> =
        layers.map(|(layer, id)| (layer.digest, (layer, id))).collect();
    let work = unique.into_values().map(|(layer, diff_id)| {
        let keep = &keep;
        async move {
            let made = LayerJob { source, layer, options, known, observer }.one(diff_id, keep).await?;
            Ok::<_, E>((layer.digest, made))
        }
    });
    let work = futures_util::stream::iter(work.collect::<Vec<_>>()).buffer_unordered(options.parallel.max(1));
    let made: BTreeMap<Digest, Made> = work.try_collect().await?;
    only_damage(&made)?;
    let report = |layer: &Descriptor| {
        let Made { outcome, spans } = made.get(&layer.digest)?.clone();
        Some(LayerReport { layer: layer.clone(), outcome, spans })
    };
    Ok(image.manifest.layers.iter().filter_map(report).collect())
}

/// A layer that cannot be indexed costs the others nothing; but where there are no others, it is an error.
fn only_damage(made: &BTreeMap<Digest, Made>) -> Result<(), BuildError> {
    let is_indexed = |made: &Made| made.outcome.is_ok() || made.spans.is_some();
    let damaged = made.iter().find_map(|(layer, made)| match &made.outcome {
        Err(Skip::Damaged { error }) => Some((layer, error)),
        _ => None,
    });
    match damaged {
        Some((layer, error)) if !made.values().any(is_indexed) => {
            Err(BuildError::Layer { layer: Box::new(*layer), source: error.clone() })
        }
        _ => Ok(()),
    }
}

/// What became of one layer.
#[derive(Debug, Clone)]
struct Made {
    outcome: Result<LayerZtoc, Skip>,
    spans: Option<LayerSpans>,
}

/// One layer to be indexed.
struct LayerJob<'a> {
    source: &'a ImageSource,
    layer: &'a Descriptor,
    options: &'a BuildOptions,
    known: &'a Existing,
    observer: &'a Observer,
}

impl LayerJob<'_> {
    async fn one<E, F>(&self, diff_id: &Digest, keep: &impl Fn(Finished) -> F) -> Result<Made, E>
    where
        E: From<BuildError>,
        F: Future<Output = Result<(), E>>,
    {
        let (layer, options) = (self.layer, self.options);
        let none = |skip| Ok(Made { outcome: Err(skip), spans: None });
        match Declared::by_media_type(&layer.media_type) {
            Declared::Layer(_) if layer.size < options.layer_bytes_min => {
                return none(Skip::Small { least: options.layer_bytes_min });
            }
            Declared::Layer(_) => {}
            Declared::Encrypted | Declared::Other => return none(no_compression(&layer.media_type)),
        }
        let known = (self.known.ztoc(layer, options), self.known.spans(layer, options));
        let lacks = |wanted: bool, has: bool| wanted && !has;
        if !lacks(options.format.has_ztoc(), known.0.is_some()) && !lacks(options.format.has_spans(), known.1.is_some())
        {
            let ztoc = known.0.filter(|_| options.format.has_ztoc());
            let spans = known.1.filter(|_| options.format.has_spans());
            return Ok(Made { outcome: ztoc.ok_or(Skip::NotWanted), spans });
        }
        let mut indexed = match index_layer(self.source, layer, options, self.observer).await? {
            Ok(indexed) => indexed,
            Err(skip) => {
                (self.observer)(Progress::LayerDone { layer: layer.digest });
                return none(skip);
            }
        };
        check_diff_id(layer, diff_id, &indexed)?;
        let spans = match indexed.compact.take() {
            Some(Ok(blobs)) => {
                let spans = self.keep_spans(blobs, keep).await?;
                let before = known.1.map(|known| known.reference.toc.0);
                Some(LayerSpans { origin: IndexOrigin::built(spans.toc.0, before), reference: spans })
            }
            Some(Err(error)) => {
                tracing::warn!(layer = %layer.digest, %error, "the layer is left out of the span index");
                None
            }
            None => None,
        };
        let outcome = if options.format.has_ztoc() {
            self.ztoc(indexed, known.0.map(|known| known.reference.digest), keep).await?
        } else {
            Err(Skip::NotWanted)
        };
        (self.observer)(Progress::LayerDone { layer: layer.digest });
        Ok(Made { outcome, spans })
    }

    async fn keep_spans<E, F>(&self, blobs: compact::Encoded, keep: &impl Fn(Finished) -> F) -> Result<SpanReference, E>
    where
        F: Future<Output = Result<(), E>>,
    {
        let (toc, windows) = (Bytes::from(blobs.toc), Bytes::from(blobs.windows));
        let named = |blob: &Bytes| (Digest::of(blob), blob.len() as u64);
        let reference = SpanReference {
            layer: self.layer.digest,
            toc: named(&toc),
            windows: named(&windows),
            span_bytes: self.options.index_span_bytes,
        };
        keep(Finished::Spans { toc, windows }).await?;
        Ok(reference)
    }

    async fn ztoc<E, F>(
        &self,
        indexed: Indexed,
        known: Option<Digest>,
        keep: &impl Fn(Finished) -> F,
    ) -> Result<Result<LayerZtoc, Skip>, E>
    where
        F: Future<Output = Result<(), E>>,
    {
        let (layer, options) = (self.layer, self.options);
        let inexpressible = |reason: String| Ok(Err(Skip::Inexpressible { reason }));
        let ztoc = match indexed.into_ztoc() {
            Ok(ztoc) => ztoc,
            Err(obstacle) => return inexpressible(obstacle.to_string()),
        };
        let disable_xattrs = options.note_xattrs && ztoc.has_no_xattrs();
        let wanted = prefetch::find(&ztoc, &options.prefetch);
        let encoded = match ztoc.encode() {
            Ok(encoded) => Arc::new(encoded),
            Err(error @ (EncodeError::Sparse { .. } | EncodeError::TooLarge { .. })) => {
                return inexpressible(error.to_string());
            }
        };
        let reference = ZtocReference {
            digest: encoded.digest(),
            size: encoded.len(),
            layer: layer.digest,
            layer_media_type: layer.media_type.clone(),
            span_bytes: options.span_bytes,
            disable_xattrs,
        };
        keep(Finished::Ztoc(reference.clone(), encoded)).await?;
        Ok(Ok(LayerZtoc { origin: IndexOrigin::built(reference.digest, known), reference, wanted }))
    }
}

/// Whether the layer unpacked to what the image configuration says.
pub(crate) fn check_diff_id(layer: &Descriptor, diff_id: &Digest, indexed: &Indexed) -> Result<(), BuildError> {
    if indexed.diff_id == *diff_id {
        return Ok(());
    }
    let (expected, found) = (Box::new(*diff_id), Box::new(indexed.diff_id));
    Err(BuildError::DiffId { layer: Box::new(layer.digest), expected, found })
}
