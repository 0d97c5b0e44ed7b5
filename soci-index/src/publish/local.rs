//! The local index store: an OCI layout in which indexes wait to be pushed.
//!
//! The two-step way of AWS's tool: `create` here, `push` later. Other tools can read the store, since it is a plain
//! layout whose index.json names every index and says, in annotations, of which image it is and when it was made.

use bytes::Bytes;
use futures_util::TryStreamExt;

use super::{Document, Done, Job, PublishError, Report, parse, put_blobs};
use crate::digest::Digest;
use crate::find::{Search, origin};
use crate::image::ImageSource;
use crate::image::layout::{Layout, LayoutWriter};
use crate::image::model::{Descriptor, ImageManifest, annotation, media_type};
use crate::image::store::Store;
use crate::index_manifest::IndexManifest;
use crate::known::Known;
use crate::limits::Limits;
use crate::manifest::{EMPTY_CONFIG, INDEX_V1};
use crate::registry::referrers::PushedReferrer;
use crate::registry::upload::PushedBlob;
use crate::registry::{Body, Repository};
use crate::sink::{Sink, file_body, on_disk};
use crate::span_index::{SPAN_INDEX, SpanIndex};

pub use crate::find::origin::IMAGE_NAME;

/// What the local store notes beside an index.
#[derive(Debug, Clone)]
pub struct StoreLabels {
    /// The image as the user named it.
    pub name: String,
    /// When the index was made, RFC 3339.
    pub created: String,
}

/// Indexes an image into the local index store.
///
/// # Errors
/// [`PublishError`].
pub async fn store(job: &Job<'_>, layout: &Layout, labels: &StoreLabels) -> Result<Report, PublishError> {
    let (there, known) = if job.force { (Vec::new(), Known::default()) } else { existing(job, layout).await? };
    let sink = Sink::Layout(layout.clone());
    let blobs = put_blobs(job, &known, &sink).await?;
    let mut made = Vec::new();
    for json in blobs.documents(job)? {
        let mut entry = Descriptor::of(media_type::MANIFEST, &json);
        let done = if there.contains(&entry.digest) { Done::UpToDate } else { Done::Stored };
        let manifest = serde_json::from_slice::<ImageManifest>(&json);
        entry.artifact_type = manifest.ok().map(|manifest| manifest.kind().to_owned());
        entry.platform = Some(job.image.platform.clone());
        entry.annotations.insert(IMAGE_NAME.to_owned(), labels.name.clone());
        entry.annotations.insert(annotation::CREATED.to_owned(), labels.created.clone());
        let (layout, content) = (layout.clone(), json.clone());
        on_disk(move || {
            let mut writer: LayoutWriter = layout.lock()?;
            writer.add_blob(EMPTY_CONFIG)?;
            writer.add_manifest(entry, &content).map(|_| ())
        })
        .await?;
        made.push(Document { json, done });
    }
    Ok(blobs.report_all(made))
}

/// The indexes of the image that were made here, and what the store's indexes tell of: images share layers, so those of
/// any will do that was made here or comes from the image's own repository.
async fn existing(job: &Job<'_>, layout: &Layout) -> Result<(Vec<Digest>, Known), PublishError> {
    let origin = ImageSource::Store { store: Store::Layout(layout.clone()), tag: None };
    let mut known = Known::default();
    let search = Search { local: Some(layout), thorough: true, ..Search::of(job.image.descriptor.digest) };
    let mut there = Vec::new();
    for index in search.gather().await?.order(None).candidates {
        known.add(index.digest, &index.index, &origin, job.options);
        there.push(index.digest);
    }
    let own = match job.source {
        ImageSource::Registry { repository, .. } => Some(repository.to_string()),
        ImageSource::Store { .. } | ImageSource::Foreign(_) => None,
    };
    let is_ours = |entry: &&Descriptor| {
        let is_own = |origins: Vec<String>| own.as_ref().is_some_and(|own| origins.contains(own));
        matches!(entry.kind(), INDEX_V1 | SPAN_INDEX) && origin::origins(entry).is_none_or(is_own)
    };
    for entry in layout.entries()?.iter().filter(is_ours) {
        let blobs = Store::Layout(layout.clone());
        let bytes = blobs.blob_bytes(entry, Limits::DEFAULT.manifest_bytes_max)?.unwrap_or_default();
        if let Ok(index) = IndexManifest::parse(entry.kind(), &bytes, &Limits::DEFAULT) {
            known.add(entry.digest, &index, &origin, job.options);
        }
    }
    known.confirm(job.image).await;
    known.verify(job).await?;
    Ok((there, known))
}

/// Pushes an index of the local store, with its blobs, into `repository`. `note` is told of each blob that is done.
///
/// # Errors
/// [`PublishError`].
pub async fn push(
    layout: &Layout,
    index: &Descriptor,
    repository: &Repository,
    parallel: usize,
    note: impl Fn(&Digest, PushedBlob),
) -> Result<PushedReferrer, PublishError> {
    let (reader, descriptor) = (Store::Layout(layout.clone()), index.clone());
    let json = on_disk(move || {
        let json = reader.blob_bytes(&descriptor, Limits::DEFAULT.manifest_bytes_max)?;
        json.ok_or_else(|| reader.missing(&descriptor.digest))
    });
    let json = json.await?;
    let layers = match index.kind() {
        SPAN_INDEX => {
            SpanIndex::parse(&json, &Limits::DEFAULT)
                .map_err(|source| PublishError::SpanIndex { digest: Box::new(index.digest), source })?
                .layers
        }
        _ => parse(&index.digest, &json)?.layers,
    };
    let blobs = layers.iter().map(|blob| Ok::<_, PublishError>((blob.digest, blob.size)));
    let note = &note;
    futures_util::stream::iter(blobs)
        .try_for_each_concurrent(parallel.max(1), |(digest, size)| async move {
            let path = layout.blob_path(&digest);
            note(&digest, repository.push_blob(&digest, file_body(path, size), None).await?);
            Ok(())
        })
        .await?;
    let config = Digest::of(EMPTY_CONFIG);
    note(&config, repository.push_blob(&config, Body::Bytes(Bytes::from_static(EMPTY_CONFIG)), None).await?);
    Ok(repository.push_referrer(media_type::MANIFEST, json).await?)
}
