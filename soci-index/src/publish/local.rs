//! The local index store: an OCI layout in which indexes wait to be pushed.
//!
//! The two-step way of AWS's tool: `create` here, `push` later. Other tools can read the store, since it is a plain
//! layout whose index.json names every index and says, in annotations, of which image it is and when it was made. An
//! index whose parts are kept elsewhere, in containerd or in the registry that a converted image went to, is listed
//! here, too, with its manifest and where its parts are.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::TryStreamExt;

use crate::find::{Search, origin};
use crate::format::digest::Digest;
use crate::format::icon;
use crate::format::index_manifest::IndexManifest;
use crate::format::limits::Limits;
use crate::format::manifest::INDEX_V1;
use crate::format::model::{Descriptor, ImageManifest, annotation, media_type};
use crate::format::platform::Platform;
use crate::format::span_index::{SPAN_INDEX, SpanIndex};
use crate::image::ImageSource;
use crate::image::foreign::ContentSink;
use crate::image::layout::{Layout, LayoutWriter};
use crate::image::sink::{ForeignSink, Sink, file_body, on_disk, source_body};
use crate::image::store::{Store as _, StoreError};
use crate::publish::build::BuildOptions;
use crate::publish::known::Known;
use crate::publish::{Document, Done, Job, PublishError, Report, parse, put_blobs};
use crate::registry::referrers::PushedReferrer;
use crate::registry::upload::PushedBlob;
use crate::registry::{Body, Repository};

pub use crate::find::origin::{IMAGE_NAME, KEPT_IN};

/// Annotation in the local store's index.json: all parts were built, or verified, on this machine. Such an index may
/// become part of an image.
pub(crate) const BUILT_HERE: &str = "dev.soci.built-here";

/// What [`KEPT_IN`] begins with where the place is containerd's content.
const CONTAINERD_PLACE: &str = "containerd://";

/// The value of [`KEPT_IN`] for containerd's content in a namespace.
#[must_use]
pub fn containerd_place(namespace: &str) -> String {
    format!("{CONTAINERD_PLACE}{namespace}")
}

/// The namespace of a [`containerd_place`], if it is one.
#[must_use]
pub fn containerd_namespace(place: &str) -> Option<&str> {
    place.strip_prefix(CONTAINERD_PLACE)
}

/// Where an index and its parts are kept.
#[derive(Debug, Clone)]
pub enum Keep {
    /// In the local store.
    Here,
    /// In another program's store; the local one lists it.
    There {
        /// That store.
        sink: Arc<dyn ContentSink>,
        /// Its name, for [`KEPT_IN`].
        place: String,
    },
}

impl Keep {
    /// The value of [`KEPT_IN`].
    fn place(&self) -> Option<&str> {
        match self {
            Self::Here => None,
            Self::There { place, .. } => Some(place),
        }
    }
}

/// What the local store notes beside an index.
#[derive(Debug, Clone)]
pub struct StoreLabels {
    /// The image as the user named it.
    pub name: String,
    /// When the index was made, RFC 3339.
    pub created: String,
}

/// Indexes an image into the local index store, or into another store with an entry in the local one.
///
/// # Errors
/// [`PublishError`].
pub async fn store(job: &Job<'_>, layout: &Layout, keep: &Keep, labels: &StoreLabels) -> Result<Report, PublishError> {
    let existing = if job.force { Existing::default() } else { Existing::read(job, layout, keep).await? };
    let sink: Box<dyn Sink> = match keep {
        Keep::Here => Box::new(layout.clone()),
        Keep::There { sink, .. } => Box::new(ForeignSink(Arc::clone(sink))),
    };
    let blobs = put_blobs(job, &existing.known, &*sink).await?;
    let is_built = job.options.reuse.verified || blobs.reused_from.iter().all(|from| from.built_here);
    let mut made = Vec::new();
    for json in blobs.documents(job)? {
        let digest = Digest::of(&json);
        let done = if existing.indexes.contains(&digest) { Done::UpToDate } else { Done::Stored };
        if let Keep::There { .. } = keep {
            for blob in icon::constant_blobs(&json) {
                sink.put_bytes(Bytes::from_static(blob)).await?;
            }
            sink.put_manifest(media_type::MANIFEST, &digest, json.clone()).await?;
        }
        let mut entry = Descriptor::of(media_type::MANIFEST, &json);
        entry.platform = Some(job.image.platform.clone());
        if is_built {
            entry.annotations.insert(BUILT_HERE.to_owned(), "true".to_owned());
        }
        list(layout, entry, labels, keep.place(), json.clone()).await?;
        made.push(Document { json, done });
    }
    Ok(blobs.report_all(made))
}

/// Lists a version 2 index whose parts are in `place`, as `soci convert` has put them there.
///
/// # Errors
/// [`PublishError`].
pub async fn record_index(
    layout: &Layout,
    labels: &StoreLabels,
    platform: &Platform,
    json: Bytes,
    place: &str,
) -> Result<(), PublishError> {
    let mut entry = Descriptor::of(media_type::MANIFEST, &json);
    entry.platform = Some(platform.clone());
    list(layout, entry, labels, Some(place), json).await
}

/// Puts an index in the catalogue. `entry` has its platform.
async fn list(
    layout: &Layout,
    mut entry: Descriptor,
    labels: &StoreLabels,
    place: Option<&str>,
    json: Bytes,
) -> Result<(), PublishError> {
    let manifest = serde_json::from_slice::<ImageManifest>(&json);
    entry.artifact_type = manifest.ok().map(|manifest| manifest.kind().to_owned());
    entry.annotations.insert(IMAGE_NAME.to_owned(), labels.name.clone());
    entry.annotations.insert(annotation::CREATED.to_owned(), labels.created.clone());
    entry.annotations.extend(place.map(|place| (KEPT_IN.to_owned(), place.to_owned())));
    let layout = layout.clone();
    on_disk(move || {
        let mut writer: LayoutWriter = layout.lock()?;
        for blob in icon::constant_blobs(&json) {
            writer.add_blob(blob)?;
        }
        writer.add_manifest(entry, &json).map(|_| ())
    })
    .await?;
    Ok(())
}

/// Indexes that the local store lists, and what need not be built again because of them.
#[derive(Default)]
struct Existing {
    /// Those of the image itself.
    indexes: Vec<Digest>,
    known: Known,
}

impl Existing {
    /// Images share layers, so the indexes of any will do that were made here or come from the image's own repository.
    async fn read(job: &Job<'_>, layout: &Layout, keep: &Keep) -> Result<Self, PublishError> {
        let mut existing = Self::default();
        let beside = job.source.keeps_indexes_as();
        let origin_of = |entry: &Descriptor| match (keep, entry.annotations.get(KEPT_IN)) {
            (Keep::There { sink, place }, Some(there)) if there == place => ImageSource::foreign(sink.store()),
            (Keep::Here, Some(there)) if beside.as_ref() == Some(there) => job.source.clone(),
            (Keep::Here | Keep::There { .. }, _) => ImageSource::of_layout(layout),
        };
        let entries = layout.entries()?;
        let search = Search { local: Some(layout), thorough: true, ..Search::of(job.image.descriptor.digest) };
        for index in search.gather().await?.order(None).candidates {
            let entry = entries.iter().find(|entry| entry.digest == index.digest);
            let origin = entry.map_or_else(|| ImageSource::of_layout(layout), origin_of);
            existing.add(entry, index.digest, &index.index, &origin, job.options);
            existing.indexes.push(index.digest);
        }
        let own = job.source.repository().map(ToString::to_string);
        let is_ours = |entry: &&Descriptor| {
            let is_own = |origins: Vec<String>| own.as_ref().is_some_and(|own| origins.contains(own));
            matches!(entry.kind(), INDEX_V1 | SPAN_INDEX) && origin::origins(entry).is_none_or(is_own)
        };
        for entry in entries.iter().filter(is_ours) {
            if let Some(index) = read_index(layout, entry)? {
                existing.add(Some(entry), entry.digest, &index, &origin_of(entry), job.options);
            }
        }
        existing.known.confirm(job.image).await;
        existing.known.verify(job).await?;
        Ok(existing)
    }

    fn add(
        &mut self,
        entry: Option<&Descriptor>,
        digest: Digest,
        index: &IndexManifest,
        origin: &ImageSource,
        options: &BuildOptions,
    ) {
        if entry.is_some_and(|entry| entry.annotations.contains_key(BUILT_HERE)) {
            self.known.add_own(digest, index, origin, options);
        } else {
            self.known.add(digest, index, origin, options);
        }
    }
}

/// What a conversion need not build again: what `soci create` has built on this machine, from its first byte on.
/// `there` is the store that is written to, and its name, which may have the parts.
pub(crate) fn built_here(
    layout: &Layout,
    there: Option<(&ImageSource, &str)>,
    options: &BuildOptions,
    known: &mut Known,
) -> Result<(), StoreError> {
    let is_built = |entry: &&Descriptor| entry.kind() == INDEX_V1 && entry.annotations.contains_key(BUILT_HERE);
    for entry in layout.entries()?.iter().filter(is_built) {
        let kept_in = entry.annotations.get(KEPT_IN);
        let origin = match there {
            Some((source, place)) if kept_in.is_some_and(|kept| kept == place) => source.clone(),
            _ => ImageSource::of_layout(layout),
        };
        if let Some(index) = read_index(layout, entry)? {
            known.add_own(entry.digest, &index, &origin, options);
        }
    }
    Ok(())
}

/// An index that the store lists; `None` if its manifest is gone or damaged, which costs only the work of building
/// again.
fn read_index(layout: &Layout, entry: &Descriptor) -> Result<Option<IndexManifest>, StoreError> {
    let bytes = match layout.blob_bytes(entry, Limits::DEFAULT.manifest_bytes_max) {
        Ok(bytes) => bytes.unwrap_or_default(),
        Err(error @ StoreError::Io { .. }) => return Err(error),
        Err(error) => {
            tracing::debug!(%error, "an index of the local store is not reused");
            return Ok(None);
        }
    };
    Ok(IndexManifest::parse(entry.kind(), &bytes, &Limits::DEFAULT).ok())
}

/// Pushes an index of the local store, with its blobs, into `repository`. Blobs that the store lacks come from
/// `elsewhere`. `note` is called for each finished blob.
///
/// # Errors
/// [`PublishError`].
pub async fn push(
    layout: &Layout,
    elsewhere: Option<&ImageSource>,
    index: &Descriptor,
    repository: &Repository,
    parallel: usize,
    note: impl Fn(&Digest, PushedBlob),
) -> Result<PushedReferrer, PublishError> {
    let (reader, descriptor) = (layout.clone(), index.clone());
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
    let constant = icon::constant_blobs(&json);
    let is_constant = |blob: &&Descriptor| constant.iter().any(|bytes| Digest::of(bytes) == blob.digest);
    let blobs = layers.iter().filter(|blob| !is_constant(blob)).map(Ok::<_, PublishError>);
    let note = &note;
    futures_util::stream::iter(blobs)
        .try_for_each_concurrent(parallel.max(1), |blob| async move {
            let body = match elsewhere.filter(|_| !layout.has_blob(&blob.digest)) {
                Some(source) => source_body(source, blob),
                None => file_body(layout.blob_path(&blob.digest), blob.size),
            };
            note(&blob.digest, repository.push_blob(&blob.digest, body, None).await?);
            Ok(())
        })
        .await?;
    for blob in constant {
        let digest = Digest::of(blob);
        note(&digest, repository.push_blob(&digest, Body::Bytes(Bytes::from_static(blob)), None).await?);
    }
    Ok(repository.push_referrer(media_type::MANIFEST, json).await?)
}
