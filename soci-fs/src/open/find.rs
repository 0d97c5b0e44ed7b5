//! Finds the index of an image: in the local index store, in repositories that hold indexes of others, beside the image.
//!
//! An index that comes from a registry is kept locally together with its zTOCs, so that the next mount asks nobody.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::StreamExt as _;
use soci_index::digest::Digest;
use soci_index::discover::{self, Discovery, Which};
use soci_index::image::layout::Layout;
use soci_index::image::model::{Descriptor, media_type};
use soci_index::image::reference::ManifestName;
use soci_index::image::store::Store as BlobStore;
use soci_index::image::{ImageSource, PlatformImage};
use soci_index::index_manifest::{IndexManifest, REFERRING};
use soci_index::limits::Limits;
use soci_index::manifest::{EMPTY_CONFIG, INDEX_DIGEST, INDEX_V1, SociIndex};
use soci_index::profile::artifact::ARTIFACT as PROFILE;
use soci_index::publish::local::IMAGE_NAME;
use soci_index::registry::referrers::Listing;
use soci_index::registry::{RegistryError, Repository};
use soci_index::span_index::{SPAN_INDEX, SpanReference};
use tokio::runtime::Handle;

use super::{OpenError, OpenOptions};
use crate::source::image::ImageBlob;
use crate::trust::Provisional;

/// The blobs that are kept locally: those that opening takes, and, from where nobody will look again, the windows.
fn kept_blobs(index: &IndexManifest, elsewhere: bool) -> Vec<Descriptor> {
    match index {
        IndexManifest::Soci(index) => index.ztocs().map(|(_, ztoc)| ztoc.clone()).collect(),
        IndexManifest::Spans(index) => {
            let windows = |reference: &SpanReference| elsewhere.then(|| reference.windows_descriptor());
            let blobs = |reference: SpanReference| [Some(reference.toc_descriptor()), windows(&reference)];
            index.references().flat_map(blobs).flatten().collect()
        }
    }
}

/// The index of an image, and where its blobs are.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) digest: Digest,
    /// The manifest, byte for byte.
    raw: Bytes,
    pub(super) index: IndexManifest,
    pub(super) layout: Option<Layout>,
    /// The repository that it and its blobs are in, if that is not the image's own.
    elsewhere: Option<Repository>,
}

impl Found {
    /// One of its blobs from where the index came from; `source` is the image's.
    pub(super) async fn blob(&self, source: &ImageSource, blob: &Descriptor) -> Result<Bytes, OpenError> {
        let limit = Limits::DEFAULT.ztoc_bytes_max;
        Ok(match &self.elsewhere {
            Some(repository) => repository.blob_bytes(blob, limit).await?,
            None => source.blob_bytes(blob, limit).await?,
        })
    }

    /// The repository that has its blobs, if that is not the image's own.
    pub(super) fn elsewhere(&self) -> Option<ImageSource> {
        self.elsewhere.as_ref().map(ImageSource::of_repository)
    }

    /// Where the windows are that a span index's TOC names; `source` is the image's. None for a zTOC.
    pub(super) fn windows(&self, source: &ImageSource, table: &Descriptor) -> Option<ImageBlob> {
        let own = self.elsewhere.as_ref().map_or_else(|| source.clone(), ImageSource::of_repository);
        windows(table, self.layout.as_ref(), &own)
    }

    /// Why it may be used only where it was proven, by the policy of the options.
    ///
    /// A signature may be wherever the index may have come from, for one from the local store does not say. An index that
    /// the image's own manifest names is part of the image: who has signed that has signed both.
    pub(super) async fn doubt(
        &self,
        source: &ImageSource,
        image: &PlatformImage,
        options: &OpenOptions,
    ) -> Option<String> {
        let own = match source {
            ImageSource::Registry { repository, .. } => Some(repository),
            ImageSource::Store { .. } | ImageSource::Foreign(_) => None,
        };
        let others = options.index_repositories.iter();
        let mut signed: Vec<(&Repository, Digest)> =
            own.into_iter().chain(others).map(|repository| (repository, self.digest)).collect();
        let named = image.manifest.annotations.get(INDEX_DIGEST);
        if named.is_some_and(|named| *named == self.digest.to_string()) {
            signed.extend(own.map(|repository| (repository, image.descriptor.digest)));
        }
        options.trust.doubt(&self.digest, &signed).await
    }
}

/// The windows blob that a TOC's descriptor names; none for a zTOC.
pub(super) fn windows_blob(table: &Descriptor) -> Option<Descriptor> {
    Some(SpanReference::of(table)?.windows_descriptor())
}

/// Where the windows are that a TOC names: in the local store if it has them, else in `source`.
pub(super) fn windows(table: &Descriptor, local: Option<&Layout>, source: &ImageSource) -> Option<ImageBlob> {
    let blob = SpanReference::of(table)?.windows_descriptor();
    Some(match local.filter(|layout| layout.has_blob(&blob.digest)) {
        Some(layout) => {
            let store = BlobStore::Layout(layout.clone());
            ImageBlob::new(ImageSource::Store { store, tag: None }, blob)
        }
        None => ImageBlob::new(source.clone(), blob),
    })
}

/// The index from the local store, else from beside the image; one from a registry is then kept locally.
///
/// In this order: the one that was named, the span index, the one that the image's own manifest names (version 2), the
/// newest that names the image (version 1); of these, one in the repositories of the options goes before one beside the
/// image.
pub(super) async fn find_index(
    source: &ImageSource,
    image: &PlatformImage,
    options: &OpenOptions,
) -> Result<Option<Found>, OpenError> {
    let names_one = image.manifest.annotations.contains_key(INDEX_DIGEST);
    if options.index.is_some() || !(options.modes.annotated && names_one) {
        let looked_for = options.index.is_some() || options.modes.referring;
        return if looked_for { referring(source, image, options, REFERRING).await } else { Ok(None) };
    }
    let spans = async {
        match options.modes.referring {
            true => referring(source, image, options, &[SPAN_INDEX]).await,
            false => Ok(None),
        }
    };
    let (spans, annotated) = tokio::join!(spans, kept_annotated(source, image, options));
    match (spans, annotated?) {
        (Ok(Some(spans)), _) => Ok(Some(spans)),
        (_, Some(annotated)) => Ok(Some(annotated)),
        (Err(error), None) => Err(error),
        (Ok(None), None) if options.modes.referring => referring(source, image, options, &[INDEX_V1]).await,
        (Ok(None), None) => Ok(None),
    }
}

/// The same, with the reason for which it may be used only where it was proven. AWS's index goes first where it alone is
/// trusted: somebody may have signed only that, or the image that names it.
pub(super) async fn find_trusted(
    source: &ImageSource,
    image: &PlatformImage,
    options: &OpenOptions,
) -> Result<(Option<Found>, Option<String>), OpenError> {
    let Some(found) = find_index(source, image, options).await? else { return Ok((None, None)) };
    let doubt = found.doubt(source, image, options).await;
    if let (Some(doubt), IndexManifest::Spans(_)) = (&doubt, &found.index)
        && options.trust.provisional() == Provisional::RequireSignature
        && let Some(aws) = find_trusted_aws(source, image, options).await
    {
        tracing::info!(index = %aws.digest, doubt, "AWS's index is used, which is trusted");
        return Ok((Some(aws), None));
    }
    Ok((Some(found), doubt))
}

/// AWS's index alone, if it may be used at once: what is left when the span index is of no use.
pub(super) async fn find_trusted_aws(
    source: &ImageSource,
    image: &PlatformImage,
    options: &OpenOptions,
) -> Option<Found> {
    let found = find_aws(source, image, options).await;
    let found = found.inspect_err(|error| tracing::warn!(%error, "AWS's index cannot be looked for")).ok()??;
    found.doubt(source, image, options).await.is_none().then_some(found)
}

async fn find_aws(
    source: &ImageSource,
    image: &PlatformImage,
    options: &OpenOptions,
) -> Result<Option<Found>, OpenError> {
    if options.index.is_some() {
        return Ok(None);
    }
    if options.modes.annotated
        && let Some(found) = kept_annotated(source, image, options).await?
    {
        return Ok(Some(found));
    }
    if options.modes.referring { referring(source, image, options, &[INDEX_V1]).await } else { Ok(None) }
}

async fn local_store(options: &OpenOptions) -> Result<Option<Layout>, OpenError> {
    match &options.index_store {
        Some(directory) => open_layout(directory).await.map(Some),
        None => Ok(None),
    }
}

/// The index that the image itself names, kept locally.
async fn kept_annotated(
    source: &ImageSource,
    image: &PlatformImage,
    options: &OpenOptions,
) -> Result<Option<Found>, OpenError> {
    let local = local_store(options).await?;
    match annotated_index(source, image, local.as_ref()).await? {
        Some(found) => keep(found, source, image, local).await.map(Some),
        None => Ok(None),
    }
}

/// An index of one of `kinds` whose subject is the image.
async fn referring(
    source: &ImageSource,
    image: &PlatformImage,
    options: &OpenOptions,
    kinds: &[&'static str],
) -> Result<Option<Found>, OpenError> {
    let local = local_store(options).await?;
    let subject = image.descriptor.digest;
    let which = options.index.as_ref().map_or(Which::Newest, Which::Named);
    let in_layout = |layout: &Layout| discover::preferred_in_layout(layout, &subject, which, kinds);
    if let Some(found) = local.as_ref().map(in_layout).transpose()?
        && let Some(found) = accept(found, options, local.as_ref())?
    {
        return Ok(Some(found));
    }
    for repository in &options.index_repositories {
        match discover::preferred_on_registry(repository, &subject, which, kinds).await {
            Ok(discovery) => {
                if let Some(found) = accept(discovery, options, None)? {
                    let found = Found { elsewhere: Some(repository.clone()), ..found };
                    return keep(found, source, image, local).await.map(Some);
                }
            }
            // The image's own repository may know better.
            Err(error) => tracing::warn!(%error, "a repository of indexes cannot be asked"),
        }
    }
    let (discovery, layout) = match source {
        ImageSource::Registry { repository, .. } => (beside(repository, &subject, options, kinds).await?, None),
        ImageSource::Store { store: BlobStore::Layout(layout), .. } => (in_layout(layout)?, Some(layout)),
        ImageSource::Store { .. } | ImageSource::Foreign(_) => {
            (Discovery::None { reason: "archives hold none".to_owned(), rejected: Vec::new() }, None)
        }
    };
    if let Discovery::None { reason, rejected } = &discovery {
        tracing::debug!(reason, rejected = rejected.len(), "no index beside the image");
    }
    match (accept(discovery, options, layout)?, options.index) {
        (Some(found), _) => keep(found, source, image, local).await.map(Some),
        (None, Some(digest)) => Err(OpenError::NoSuchIndex { digest: Box::new(digest) }),
        (None, None) => Ok(None),
    }
}

/// An index beside the image, by the list that was asked for early if there is one.
async fn beside(
    repository: &Repository,
    image: &Digest,
    options: &OpenOptions,
    kinds: &[&'static str],
) -> Result<Discovery, RegistryError> {
    match (&options.index, options.listing.as_deref().filter(|listing| listing.is_of(image))) {
        (None, Some(listing)) => discover::preferred_listed(listing, kinds).await,
        (None, None) => discover::preferred_on_registry(repository, image, Which::Newest, kinds).await,
        (Some(named), _) => discover::preferred_on_registry(repository, image, Which::Named(named), kinds).await,
    }
}

/// Begins to ask what refers to the image `image` of `source`, while its own documents are on their way. None where that is
/// no question for a registry.
#[must_use]
pub fn ask_early(source: &ImageSource, image: Digest, runtime: &Handle) -> Option<Arc<Listing>> {
    let ImageSource::Registry { repository, .. } = source else { return None };
    let listing = Arc::new(Listing::new(repository.clone(), image, wanted));
    let asking = Arc::clone(&listing);
    // Who needs it hears why this has failed, or asks again.
    runtime.spawn(async move { asking.ask().await.is_ok() });
    Some(listing)
}

/// Of all that refers to an image, what opening and starting it will want to see: span indexes, else AWS's, and profiles.
fn wanted(entries: &[Descriptor]) -> Vec<Digest> {
    let of =
        |kind: &str| entries.iter().filter(|entry| entry.kind() == kind).map(|entry| entry.digest).collect::<Vec<_>>();
    let spans = of(SPAN_INDEX);
    let indexes = if spans.is_empty() { of(INDEX_V1) } else { spans };
    indexes.into_iter().chain(of(PROFILE)).collect()
}

/// The version 2 index that the image's own manifest names, and which is thereby as much part of it as its layers.
async fn annotated_index(
    source: &ImageSource,
    image: &PlatformImage,
    local: Option<&Layout>,
) -> Result<Option<Found>, OpenError> {
    let Some(digest) = image.manifest.annotations.get(INDEX_DIGEST) else { return Ok(None) };
    let digest: Digest = match digest.parse() {
        Ok(digest) => digest,
        Err(error) => {
            tracing::warn!(image = %image.descriptor.digest, %error, "the image names no proper index");
            return Ok(None);
        }
    };
    let here = match source {
        ImageSource::Store { store: BlobStore::Layout(layout), .. } => Some(layout),
        ImageSource::Store { .. } | ImageSource::Registry { .. } | ImageSource::Foreign(_) => None,
    };
    let mut found = None;
    for layout in here.into_iter().chain(local) {
        let store = BlobStore::Layout(layout.clone());
        let entry = store.entries()?.into_iter().find(|entry| entry.digest == digest);
        if let Some(raw) = entry.map(|entry| store.manifest(&entry)).transpose()?.flatten() {
            found = Some((raw, Some(layout.clone())));
            break;
        }
    }
    if let (None, ImageSource::Registry { repository, .. }) = (&found, source) {
        found = repository.manifest(&ManifestName::Digest(digest)).await?.map(|raw| (raw, None));
    }
    let Some((raw, layout)) = found else {
        tracing::warn!(image = %image.descriptor.digest, index = %digest, "the image names an index that is not there");
        return Ok(None);
    };
    match SociIndex::parse(&raw.bytes, &Limits::DEFAULT) {
        Ok(index) if index.version() == 2 => {
            Ok(Some(Found { digest, raw: raw.bytes, index: IndexManifest::Soci(index), layout, elsewhere: None }))
        }
        Ok(_) => {
            tracing::warn!(image = %image.descriptor.digest, index = %digest, "the image names an index of version 1");
            Ok(None)
        }
        Err(error) => {
            tracing::warn!(image = %image.descriptor.digest, index = %digest, %error, "the index cannot be used");
            Ok(None)
        }
    }
}

/// Keeps an index that came from a registry.
async fn keep(
    mut found: Found,
    source: &ImageSource,
    image: &PlatformImage,
    local: Option<Layout>,
) -> Result<Found, OpenError> {
    if found.layout.is_none()
        && let (Some(local), ImageSource::Registry { .. }) = (local, source)
    {
        fetch_index(source, image, &found, &local).await?;
        found.layout = Some(local);
    }
    Ok(found)
}

pub(super) async fn open_layout(directory: &Path) -> Result<Layout, OpenError> {
    let directory = directory.to_owned();
    let layout = tokio::task::spawn_blocking(move || Layout::open_or_create(&directory)).await;
    Ok(layout.map_err(|_| OpenError::Abandoned)??)
}

fn accept(discovery: Discovery, options: &OpenOptions, layout: Option<&Layout>) -> Result<Option<Found>, OpenError> {
    let Discovery::Found(found) = discovery else { return Ok(None) };
    let index = match IndexManifest::parse(found.kind, &found.raw, &Limits::DEFAULT) {
        Ok(index) => index,
        // Only an index that was asked for is worth stopping for.
        Err(source) if options.index.is_some() => {
            return Err(OpenError::Index { digest: Box::new(found.digest), source });
        }
        Err(error) => {
            tracing::warn!(index = %found.digest, %error, "the index cannot be used");
            return Ok(None);
        }
    };
    tracing::debug!(digest = %found.digest, others = found.others, "using this index");
    Ok(Some(Found { digest: found.digest, raw: found.raw, index, layout: layout.cloned(), elsewhere: None }))
}

/// Blobs of an index that are fetched at the same time. Together they are small, and each costs a round trip.
const PARALLEL: usize = 8;

/// Copies an index and what opening takes of it into the local store.
async fn fetch_index(
    source: &ImageSource,
    image: &PlatformImage,
    found: &Found,
    local: &Layout,
) -> Result<(), OpenError> {
    let wanted = kept_blobs(&found.index, found.elsewhere.is_some());
    let wanted = wanted.into_iter().filter(|blob| !local.has_blob(&blob.digest));
    let fetched = futures_util::stream::iter(wanted.collect::<Vec<_>>())
        .map(|blob| async move {
            let bytes = found.blob(source, &blob).await;
            // Its layer will be streamed, unless a later try has better luck.
            bytes
                .inspect_err(|error| tracing::warn!(blob = %blob.digest, %error, "a part of an index did not come"))
                .ok()
        })
        .buffer_unordered(PARALLEL);
    let fetched: Vec<Bytes> = fetched.filter_map(std::future::ready).collect().await;
    let raw = found.raw.clone();
    let mut entry = Descriptor::of(media_type::MANIFEST, &raw);
    entry.artifact_type = Some(found.index.kind().to_owned());
    entry.platform = Some(image.platform.clone());
    entry.annotations.insert(IMAGE_NAME.to_owned(), source.to_string());
    let local = local.clone();
    let kept = tokio::task::spawn_blocking(move || {
        let mut writer = local.lock()?;
        fetched.iter().try_for_each(|ztoc| writer.add_blob(ztoc).map(|_| ()))?;
        writer.add_blob(EMPTY_CONFIG)?;
        writer.add_manifest(entry, &raw).map(|_| ())
    });
    Ok(kept.await.map_err(|_| OpenError::Abandoned)??)
}
