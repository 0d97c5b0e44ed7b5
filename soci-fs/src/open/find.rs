//! Finds the index of an image: in the local index store, else beside the image.
//!
//! An index that comes from a registry is kept locally together with its zTOCs, so that the next mount asks nobody.

use std::path::Path;

use bytes::Bytes;
use futures_util::StreamExt as _;
use soci_index::digest::Digest;
use soci_index::discover::{self, Discovery, Which};
use soci_index::image::layout::Layout;
use soci_index::image::model::{Descriptor, media_type};
use soci_index::image::store::Store as BlobStore;
use soci_index::image::{ImageSource, PlatformImage};
use soci_index::limits::Limits;
use soci_index::manifest::{EMPTY_CONFIG, INDEX_V1, SociIndex};
use soci_index::publish::IMAGE_NAME;

use super::{OpenError, OpenOptions};

/// The index of an image, and where its zTOCs are.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) digest: Digest,
    pub(super) index: SociIndex,
    pub(super) layout: Option<Layout>,
}

/// The index from the local store, else from beside the image; one from a registry is then kept locally.
pub(super) async fn find_index(
    source: &ImageSource,
    image: &PlatformImage,
    options: &OpenOptions,
) -> Result<Option<Found>, OpenError> {
    let subject = image.descriptor.digest;
    let which = options.index.as_ref().map_or(Which::Newest, Which::Named);
    let local = match &options.index_store {
        Some(directory) => Some(open_layout(directory).await?),
        None => None,
    };
    if let Some(found) = local.as_ref().map(|layout| discover::in_layout(layout, &subject, which)).transpose()?
        && let Some(found) = accept(found, options, local.as_ref())?
    {
        return Ok(Some(found));
    }
    let (discovery, layout) = match source {
        ImageSource::Registry { repository, .. } => (discover::on_registry(repository, &subject, which).await?, None),
        ImageSource::Store { store: BlobStore::Layout(layout), .. } => {
            (discover::in_layout(layout, &subject, which)?, Some(layout))
        }
        ImageSource::Store { .. } => {
            (Discovery::None { reason: "archives hold none".to_owned(), rejected: Vec::new() }, None)
        }
    };
    if let Discovery::None { reason, rejected } = &discovery {
        tracing::debug!(reason, rejected = rejected.len(), "no index beside the image");
    }
    let Some(mut found) = accept(discovery, options, layout)? else {
        return match options.index {
            Some(digest) => Err(OpenError::NoSuchIndex { digest: Box::new(digest) }),
            None => Ok(None),
        };
    };
    if found.layout.is_none()
        && let (Some(local), ImageSource::Registry { .. }) = (&local, source)
    {
        fetch_index(source, image, &found.index, local).await?;
        found.layout = Some(local.clone());
    }
    Ok(Some(found))
}

pub(super) async fn open_layout(directory: &Path) -> Result<Layout, OpenError> {
    let directory = directory.to_owned();
    let layout = tokio::task::spawn_blocking(move || Layout::open_or_create(&directory)).await;
    Ok(layout.map_err(|_| OpenError::Abandoned)??)
}

fn accept(discovery: Discovery, options: &OpenOptions, layout: Option<&Layout>) -> Result<Option<Found>, OpenError> {
    let Discovery::Found(found) = discovery else { return Ok(None) };
    let index = match SociIndex::parse(&found.raw, &Limits::DEFAULT) {
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
    Ok(Some(Found { digest: found.digest, index, layout: layout.cloned() }))
}

/// Copies an index and its zTOCs from beside the image into the local store.
async fn fetch_index(
    source: &ImageSource,
    image: &PlatformImage,
    index: &SociIndex,
    local: &Layout,
) -> Result<(), OpenError> {
    let wanted = index.ztocs().map(|(_, ztoc)| ztoc.clone()).filter(|ztoc| !local.has_blob(&ztoc.digest));
    let fetched = futures_util::stream::iter(wanted.collect::<Vec<_>>())
        .map(|ztoc| async move {
            let bytes = source.blob_bytes(&ztoc, Limits::DEFAULT.ztoc_bytes_max).await;
            // Its layer will be streamed, unless a later try has better luck.
            bytes.inspect_err(|error| tracing::warn!(ztoc = %ztoc.digest, %error, "a zTOC did not come")).ok()
        })
        .buffer_unordered(4);
    let fetched: Vec<Bytes> = fetched.filter_map(std::future::ready).collect().await;
    let json = index.to_json();
    let mut entry = Descriptor::of(media_type::MANIFEST, &json);
    entry.artifact_type = Some(INDEX_V1.to_owned());
    entry.platform = Some(image.platform.clone());
    entry.annotations.insert(IMAGE_NAME.to_owned(), source.to_string());
    let local = local.clone();
    let kept = tokio::task::spawn_blocking(move || {
        let mut writer = local.lock()?;
        fetched.iter().try_for_each(|ztoc| writer.add_blob(ztoc).map(|_| ()))?;
        writer.add_blob(EMPTY_CONFIG)?;
        writer.add_manifest(entry, &json).map(|_| ())
    });
    Ok(kept.await.map_err(|_| OpenError::Abandoned)??)
}
