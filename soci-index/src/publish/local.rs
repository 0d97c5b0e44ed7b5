//! The local index store: an OCI layout in which indexes wait to be pushed.
//!
//! The two-step way of AWS's tool: `create` here, `push` later. Other tools can read the store, since it is a plain
//! layout whose index.json names every index and says, in annotations, of which image it is and when it was made.

use bytes::Bytes;
use futures_util::TryStreamExt;

use super::{Done, Job, PublishError, Report, parse, put_blobs};
use crate::digest::Digest;
use crate::discover::{self, Discovery, Which};
use crate::image::ImageSource;
use crate::image::layout::{Layout, LayoutWriter};
use crate::image::model::{Descriptor, annotation, media_type};
use crate::image::store::Store;
use crate::known::Known;
use crate::limits::Limits;
use crate::manifest::{EMPTY_CONFIG, INDEX_V1, SociIndex};
use crate::registry::referrers::PushedReferrer;
use crate::registry::upload::PushedBlob;
use crate::registry::{Body, Repository};
use crate::sink::{Sink, file_body, on_disk};

/// Annotation in the local store's index.json: what the user called the image.
pub const IMAGE_NAME: &str = "io.containerd.image.name";

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
    let (existing, known) = if job.force { (None, Known::default()) } else { existing(job, layout).await? };
    let sink = Sink::Layout(layout.clone());
    let blobs = put_blobs(job, &known, &sink).await?;
    let json = blobs.v1(job)?.to_json();
    let mut entry = Descriptor::of(media_type::MANIFEST, &json);
    let done = if existing == Some(entry.digest) { Done::UpToDate } else { Done::Stored };
    entry.artifact_type = Some(INDEX_V1.to_owned());
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
    Ok(blobs.report(&json, done))
}

/// The newest index of the image, and all zTOCs of the store: images share layers, so one of any index will do.
async fn existing(job: &Job<'_>, layout: &Layout) -> Result<(Option<Digest>, Known), PublishError> {
    let origin = ImageSource::Store { store: Store::Layout(layout.clone()), tag: None };
    let mut known = Known::default();
    let mut newest = None;
    if let Discovery::Found(found) = discover::in_layout(layout, &job.image.descriptor.digest, Which::Newest)? {
        newest = Some(found.digest);
        if let Ok(index) = SociIndex::parse(&found.raw, &Limits::DEFAULT) {
            known.add(&index, &origin, job.options);
        }
    }
    for entry in layout.entries()?.iter().filter(|entry| entry.kind() == INDEX_V1) {
        let blobs = Store::Layout(layout.clone());
        let bytes = blobs.blob_bytes(entry, Limits::DEFAULT.manifest_bytes_max)?.unwrap_or_default();
        if let Ok(index) = SociIndex::parse(&bytes, &Limits::DEFAULT) {
            known.add(&index, &origin, job.options);
        }
    }
    known.confirm(job.image).await;
    Ok((newest, known))
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
    let parsed = parse(&index.digest, &json)?;
    let blobs = parsed.layers.iter().map(|blob| Ok::<_, PublishError>((blob.digest, blob.size)));
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
