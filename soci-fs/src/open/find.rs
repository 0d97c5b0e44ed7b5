//! Finds the index of an image by the rules of [`soci_index::find`], and keeps one that comes from a registry locally
//! together with its zTOCs, so that the next mount fetches none of them.
//!
//! A blob of an index is asked for where the index came from first, then where the image is, then in the other
//! repositories that were named for it ([`Parts`]).

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use futures_util::FutureExt as _;
use soci_index::find::Search;
use soci_index::find::choose::{Candidate, Choice, IndexPlace, Ordered};
use soci_index::find::discover::Refused;
use soci_index::find::keep::Keep;
use soci_index::find::parts::Parts;
use soci_index::format::digest::Digest;
use soci_index::format::index_manifest::{IndexManifest, REFERRING};
use soci_index::format::manifest::{INDEX_DIGEST, INDEX_V1};
use soci_index::format::model::Descriptor;
use soci_index::format::profile::artifact::ARTIFACT as PROFILE;
use soci_index::format::span_index::{SPAN_INDEX, SpanReference};
use soci_index::image::layout::Layout;
use soci_index::image::{ImageSource, PlatformImage};
use soci_index::registry::Repository;
use soci_index::registry::referrers::Listing;
use tokio::runtime::Handle;

use crate::layer::source::image::ImageBlob;
use crate::open::trust::Provisional;
use crate::open::{OpenError, OpenOptions};

/// The index of an image, and where its blobs are.
#[derive(Debug)]
pub(super) struct OpenIndex {
    pub(super) digest: Digest,
    pub(super) index: IndexManifest,
    pub(super) layout: Option<Layout>,
    /// Where it came from; `None` if it was made on this machine.
    origin: Option<ImageSource>,
    /// Where its blobs may be, besides the local index store.
    parts: Parts,
    /// What was passed over for it.
    pub(super) choice: Choice,
}

impl OpenIndex {
    /// One of its blobs, of at most `limit` bytes, from the first place that has it.
    pub(super) async fn blob(&self, blob: &Descriptor, limit: u64) -> Result<Bytes, OpenError> {
        let bytes = self.parts.first(blob.size, |place| place.blob_bytes(blob, limit).boxed()).await;
        bytes.map_err(|error| OpenError::NoPart { blob: Box::new(blob.digest), tried: error.to_string() })
    }

    /// Where the windows may be that a span index's TOC names, in the order in which to ask. None for a zTOC.
    pub(super) fn windows(&self, table: &Descriptor) -> Vec<ImageBlob> {
        let Some(blob) = windows_blob(table) else { return Vec::new() };
        let local = self.layout.iter().filter(|layout| layout.has_blob(&blob.digest)).map(ImageSource::of_layout);
        let places = local.chain(self.parts.sources().cloned());
        places.map(|place| ImageBlob::new(place, blob.clone())).collect()
    }

    /// The place that it came from, if that is not the image's own, `source`.
    pub(super) fn elsewhere(&self, source: &ImageSource) -> Option<ImageSource> {
        self.origin.clone().filter(|origin| origin.place() != source.place())
    }
}

/// The windows blob that a TOC's descriptor names; none for a zTOC.
pub(crate) fn windows_blob(table: &Descriptor) -> Option<Descriptor> {
    Some(SpanReference::of(table)?.windows_descriptor())
}

/// The index of the image, with the reason for which it may be used only where it was proven. One that may be used at
/// once goes before one that may not.
pub(super) async fn find_trusted(
    source: &ImageSource,
    image: &PlatformImage,
    options: &OpenOptions,
) -> Result<(Option<OpenIndex>, Option<String>), OpenError> {
    let referring = if options.index.is_some() || options.modes.referring { REFERRING } else { &[] };
    find(source, image, options, referring, Keeping::All).await
}

/// AWS's index alone, if it may be used at once: what is left when the span index is of no use.
pub(super) async fn find_trusted_aws(
    source: &ImageSource,
    image: &PlatformImage,
    options: &OpenOptions,
) -> Option<OpenIndex> {
    aws(source, image, options, Keeping::All).await
}

/// The same, of which nothing is fetched yet but the manifest.
pub(super) async fn find_aws(source: &ImageSource, image: &PlatformImage, options: &OpenOptions) -> Option<OpenIndex> {
    aws(source, image, options, Keeping::Nothing).await
}

/// Whether the parts of an index are fetched at once, to be kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Keeping {
    All,
    Nothing,
}

async fn aws(
    source: &ImageSource,
    image: &PlatformImage,
    options: &OpenOptions,
    keeping: Keeping,
) -> Option<OpenIndex> {
    if options.index.is_some() {
        return None;
    }
    let referring: &[_] = if options.modes.referring { &[INDEX_V1] } else { &[] };
    let found = find(source, image, options, referring, keeping).await;
    let found = found.inspect_err(|error| tracing::warn!(%error, "AWS's index cannot be looked for"));
    let (found, doubt) = found.ok()?;
    found.filter(|_| doubt.is_none())
}

async fn find(
    source: &ImageSource,
    image: &PlatformImage,
    options: &OpenOptions,
    referring: &[&'static str],
    keeping: Keeping,
) -> Result<(Option<OpenIndex>, Option<String>), OpenError> {
    let start = Instant::now();
    let local = match &options.index_store {
        Some(directory) => Some(open_layout(directory).await?),
        None => None,
    };
    let whole = Search::new(source, image);
    let search = Search {
        annotated: whole.annotated.filter(|_| options.index.is_some() || options.modes.annotated),
        named: options.index.as_ref(),
        referring,
        repositories: &options.index_repositories,
        listing: options.listing.as_deref(),
        local: local.as_ref(),
        any_subject: options.any_subject,
        // Their parts cannot be obtained otherwise.
        listed: options.content.is_some(),
        content: options.content.as_ref(),
        // The first may be refused.
        thorough: options.trust.provisional() == Provisional::RequireSignature,
        is_optional: options.index.is_none(),
        ..whole
    };
    let gathered = search.gather().await?;
    let refused = gathered.refused().first().cloned();
    let failure = gathered.failure().cloned().or_else(|| Some(refused.as_ref()?.error.clone()));
    let ordered = gathered.order(options.index.as_ref());
    if let (true, Some(named)) = (ordered.candidates.is_empty(), options.index) {
        return Err(failure.map_or(OpenError::NoSuchIndex { digest: Box::new(named) }, OpenError::Registry));
    }
    let (choice, doubt) = prefer_trusted(source, image, options, ordered).await;
    let of = &image.descriptor.digest;
    for other in &choice.passed_over {
        match (other.reason.is_trouble(), other.reason.is_usual()) {
            (true, _) => tracing::warn!(image = %of, "{other}"),
            (false, true) => tracing::debug!(image = %of, "{other}"),
            (false, false) => tracing::info!(image = %of, "{other}"),
        }
    }
    let Some(chosen) = choice.chosen.clone() else { return Ok((None, refused.map(|refused| hidden(&refused)))) };
    tracing::info!(image = %of, index = %chosen.digest, form = chosen.index.form(), place = chosen.whereabouts());
    let found = keep(chosen, choice, source, image, options, local, keeping).await;
    if keeping == Keeping::All {
        options.stages.index_fetch.record(start.elapsed());
    }
    Ok((Some(found), doubt))
}

/// Why there is no index where there is one.
fn hidden(refused: &Refused) -> String {
    let Refused { digest, error, .. } = refused;
    format!("the registry has the index {digest} and refuses to show it: {error}")
}

/// The first candidate that may be used at once, else the first of all and why it may not.
async fn prefer_trusted(
    source: &ImageSource,
    image: &PlatformImage,
    options: &OpenOptions,
    ordered: Ordered,
) -> (Choice, Option<String>) {
    let mut doubts = Vec::new();
    for candidate in &ordered.candidates {
        match doubt(candidate, source, image, options).await {
            Some(doubt) => doubts.push(doubt),
            None => {
                let position = doubts.len();
                return (ordered.take(position, &doubts), None);
            }
        }
        if options.trust.provisional() != Provisional::RequireSignature {
            break;
        }
    }
    let doubt = doubts.into_iter().next();
    (ordered.first(), doubt)
}

/// Why an index may be used only where it was proven, by the policy of the options.
///
/// A signature may be wherever the index may have come from, for one from the local store does not say. An index that
/// the image's own manifest names is part of the image: a signature of that covers both.
async fn doubt(
    candidate: &Candidate,
    source: &ImageSource,
    image: &PlatformImage,
    options: &OpenOptions,
) -> Option<String> {
    let own = source.repository();
    let others = options.index_repositories.iter();
    let mut signed: Vec<(&Repository, Digest)> =
        own.into_iter().chain(others).map(|repository| (repository, candidate.digest)).collect();
    let named = image.manifest.annotations.get(INDEX_DIGEST);
    if named.is_some_and(|named| *named == candidate.digest.to_string()) {
        signed.extend(own.map(|repository| (repository, image.descriptor.digest)));
    }
    let image_is_in = own.map(ToString::to_string);
    options.trust.doubt(image_is_in.as_deref(), &candidate.digest, &signed).await
}

/// Starts the early referrers lookup of the image `image` of `source`, while its own documents are in flight. None
/// where that is no question for a registry.
#[must_use]
pub fn ask_early(source: &ImageSource, image: Digest, runtime: &Handle) -> Option<Arc<Listing>> {
    let listing = Arc::new(Listing::new(source.repository()?.clone(), image, wanted));
    let asking = Arc::clone(&listing);
    // Whatever needs it gets this error, or retries.
    runtime.spawn(async move { asking.ask().await.is_ok() });
    Some(listing)
}

/// Of all that refers to an image, what opening and starting it will want to see: span indexes, else AWS's, and
/// profiles.
fn wanted(entries: &[Descriptor]) -> Vec<Digest> {
    let of =
        |kind: &str| entries.iter().filter(|entry| entry.kind() == kind).map(|entry| entry.digest).collect::<Vec<_>>();
    let spans = of(SPAN_INDEX);
    let indexes = if spans.is_empty() { of(INDEX_V1) } else { spans };
    indexes.into_iter().chain(of(PROFILE)).collect()
}

/// Keeps an index that came from a registry, so that its parts are fetched once.
async fn keep(
    chosen: Candidate,
    choice: Choice,
    source: &ImageSource,
    image: &PlatformImage,
    options: &OpenOptions,
    local: Option<Layout>,
    keeping: Keeping,
) -> OpenIndex {
    let named = |position: usize| options.index_repositories.get(position).map(ImageSource::of_repository);
    let origin = match &chosen.place {
        IndexPlace::Named { position, .. } => named(*position),
        IndexPlace::Image | IndexPlace::Beside => Some(source.clone()),
        IndexPlace::Local => None,
    };
    let others: Vec<ImageSource> = options.index_repositories.iter().map(ImageSource::of_repository).collect();
    let (digest, index) = (chosen.digest, chosen.index.clone());
    // Programs keep AWS's form only.
    let content = options.content.iter().filter(|_| matches!(index, IndexManifest::Soci(_)));
    let parts = Parts::new(content.chain(&origin).chain([source]).chain(&others), source);
    let mut found = OpenIndex { digest, index, layout: None, origin, parts, choice };
    let origin = found.origin.as_ref();
    found.layout =
        match (origin.and_then(|origin| origin.layout()), origin.and_then(|origin| origin.repository()), local) {
            (Some(own), ..) => Some(own.clone()),
            (None, Some(repository), Some(local)) if !chosen.cached && keeping == Keeping::All => {
                let (name, origin) = (source.to_string(), repository.to_string());
                let keep = Keep { found: &chosen, name: &name, image, origin: &origin, parts: &found.parts };
                let stages = Arc::clone(&options.stages);
                match keep.into_layout(&local, &move |time| stages.table_fetch.record(time)).await {
                    Ok(()) => Some(local),
                    Err(error) => {
                        tracing::warn!(index = %digest, %error, "the index is not kept locally");
                        None
                    }
                }
            }
            (.., local) => local,
        };
    found
}

pub(super) async fn open_layout(directory: &Path) -> Result<Layout, OpenError> {
    let directory = directory.to_owned();
    let layout = tokio::task::spawn_blocking(move || Layout::open_or_create(&directory)).await;
    Ok(layout.map_err(|_| OpenError::Abandoned)??)
}
