//! Publishing: from an image in a registry to its SOCI index beside it, in one streaming step.
//!
//! Order of things, so that nothing half-done can be found: zTOC blobs while the layers are read, then the configuration
//! blob, then the manifest with the image as its `subject`, then the check that it is listed. An interrupted run leaves
//! blobs, never a manifest that misses one; the next run finds the blobs and goes on. A run that finds the same index
//! in place reads no layer and sends nothing.

use std::path::PathBuf;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures_util::TryStreamExt;
use tokio::io::AsyncReadExt;

use crate::build::{BuildError, BuildOptions, Finished, LayerReport, Observer, build};
use crate::digest::Digest;
use crate::discover::{self, Discovery, Which};
use crate::image::layout::{Layout, LayoutWriter};
use crate::image::model::{Descriptor, annotation, media_type};
use crate::image::store::{Store, StoreError};
use crate::image::{ImageError, ImageSource, PlatformImage};
use crate::limits::Limits;
use crate::manifest::{
    DISABLE_XATTRS, EMPTY_CONFIG, INDEX_V1, LAYER_MEDIA_TYPE, ManifestError, SPAN_SIZE, SociIndex, ZtocReference,
};
use crate::registry::referrers::{FoundBy, PushedReferrer, Visibility};
use crate::registry::{Body, Chunks, RegistryError, Repository};
use crate::ztoc::Encoded;

/// Why an index could not be published or stored.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// A layer could not be indexed.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// The image could not be read.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The registry.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The local index store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// What the local index store holds is no index.
    #[error("the local index {digest} cannot be read: {source}")]
    Manifest {
        /// Which.
        digest: Box<Digest>,
        /// Why.
        source: ManifestError,
    },
    /// No layer can be indexed.
    #[error("no ztocs created, all layers either skipped or produced errors")]
    NothingToIndex {
        /// Why, layer by layer.
        layers: Vec<LayerReport>,
    },
}

/// What became of an image.
#[derive(Debug, Clone)]
pub struct Report {
    /// Digest of the index.
    pub index: Digest,
    /// Size of the index manifest.
    pub index_size: u64,
    /// The layers, in the image's order.
    pub layers: Vec<LayerReport>,
    /// What was done.
    pub done: Done,
}

/// What was done with an index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Done {
    /// The same index was there.
    UpToDate,
    /// It was pushed, and consumers find it in this way; not all of them perhaps.
    Published(FoundBy, Visibility),
    /// It was put into the local store.
    Stored,
    /// It was made and thrown away: a dry run.
    Nothing,
}

/// Indexes `image` and publishes the index in `repository`. `known` are zTOCs that are in the repository already: those
/// of another platform of the image, say.
///
/// # Errors
/// [`PublishError`]. After an error no new manifest is in the repository.
pub async fn publish(
    source: &ImageSource,
    image: &PlatformImage,
    repository: &Repository,
    options: &BuildOptions,
    known: &[ZtocReference],
    force: bool,
    observer: &Observer,
) -> Result<Report, PublishError> {
    let mut existing = existing_on_registry(repository, image, options, force).await?;
    existing.ztocs.extend_from_slice(known);
    let keep = |finished: Finished| async move {
        repository.push_blob(&finished.reference.digest, body(&finished), None).await?;
        Ok::<(), PublishError>(())
    };
    let layers = build(source, image, options, &existing.ztocs, observer, keep).await?;
    let json = Bytes::from(index_of(image, &layers)?.to_json());
    let (index, index_size) = (Digest::of(&json), json.len() as u64);
    if existing.index == Some(index) {
        return Ok(Report { index, index_size, layers, done: Done::UpToDate });
    }
    for reused in layers.iter().filter_map(|layer| layer.outcome.as_ref().ok()).filter(|ztoc| ztoc.reused) {
        tracing::debug!(ztoc = %reused.reference.digest, layer = %reused.reference.layer, "the layer is indexed already");
    }
    repository.push_blob(&Digest::of(EMPTY_CONFIG), Body::Bytes(Bytes::from_static(EMPTY_CONFIG)), None).await?;
    let pushed = repository.push_referrer(media_type::MANIFEST, json).await?;
    Ok(Report { index, index_size, layers, done: Done::Published(pushed.found_by, pushed.visibility) })
}

/// Indexes `image` and throws the result away.
///
/// # Errors
/// [`PublishError`].
pub async fn rehearse(
    source: &ImageSource,
    image: &PlatformImage,
    repository: Option<&Repository>,
    options: &BuildOptions,
    force: bool,
    observer: &Observer,
) -> Result<Report, PublishError> {
    let existing = match repository {
        Some(repository) => existing_on_registry(repository, image, options, force).await?,
        None => Existing::default(),
    };
    let keep = |_: Finished| async { Ok::<(), PublishError>(()) };
    let layers = build(source, image, options, &existing.ztocs, observer, keep).await?;
    let json = index_of(image, &layers)?.to_json();
    let (index, index_size) = (Digest::of(&json), json.len() as u64);
    let done = if existing.index == Some(index) { Done::UpToDate } else { Done::Nothing };
    Ok(Report { index, index_size, layers, done })
}

/// Indexes `image` into the local index store; `name` is what the user calls the image, `created` when (RFC 3339).
///
/// # Errors
/// [`PublishError`].
pub async fn store(
    source: &ImageSource,
    image: &PlatformImage,
    layout: &Layout,
    labels: &StoreLabels,
    options: &BuildOptions,
    force: bool,
    observer: &Observer,
) -> Result<Report, PublishError> {
    let existing = if force { Existing::default() } else { existing_in_layout(layout, image, options)? };
    let keep = |finished: Finished| async move {
        let layout = layout.clone();
        on_disk(move || layout.lock()?.add_blob_from(Pieces::new(&finished.encoded)).map(|_| ())).await
    };
    let layers = build(source, image, options, &existing.ztocs, observer, keep).await?;
    let json = index_of(image, &layers)?.to_json();
    let (index, index_size) = (Digest::of(&json), json.len() as u64);
    let mut entry = Descriptor::of(media_type::MANIFEST, &json);
    entry.artifact_type = Some(INDEX_V1.to_owned());
    entry.platform = Some(image.platform.clone());
    entry.annotations.insert(IMAGE_NAME.to_owned(), labels.name.clone());
    entry.annotations.insert(annotation::CREATED.to_owned(), labels.created.clone());
    let same = existing.index == Some(index);
    let layout = layout.clone();
    on_disk(move || {
        let mut writer: LayoutWriter = layout.lock()?;
        writer.add_blob(EMPTY_CONFIG)?;
        writer.add_manifest(entry, &json).map(|_| ())
    })
    .await?;
    Ok(Report { index, index_size, layers, done: if same { Done::UpToDate } else { Done::Stored } })
}

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

/// Pushes an index of the local store, with its blobs, into `repository`.
///
/// # Errors
/// [`PublishError`].
pub async fn push(
    layout: &Layout,
    index: &Descriptor,
    repository: &Repository,
    parallel: usize,
) -> Result<PushedReferrer, PublishError> {
    let (reader, descriptor) = (Store::Layout(layout.clone()), index.clone());
    let json = on_disk(move || {
        let json = reader.blob_bytes(&descriptor, Limits::DEFAULT.manifest_bytes_max)?;
        json.ok_or_else(|| reader.missing(&descriptor.digest))
    });
    let json = json.await?;
    let parsed = SociIndex::parse(&json, &Limits::DEFAULT);
    let parsed = parsed.map_err(|source| PublishError::Manifest { digest: Box::new(index.digest), source })?;
    let blobs = parsed.layers.iter().map(|blob| Ok::<_, PublishError>((blob.digest, blob.size)));
    futures_util::stream::iter(blobs)
        .try_for_each_concurrent(parallel.max(1), |(digest, size)| async move {
            let path = layout.blob_path(&digest);
            repository.push_blob(&digest, file_body(path, size), None).await?;
            Ok(())
        })
        .await?;
    repository.push_blob(&Digest::of(EMPTY_CONFIG), Body::Bytes(Bytes::from_static(EMPTY_CONFIG)), None).await?;
    Ok(repository.push_referrer(media_type::MANIFEST, json).await?)
}

/// What is there already.
#[derive(Debug, Default)]
struct Existing {
    index: Option<Digest>,
    ztocs: Vec<ZtocReference>,
}

async fn existing_on_registry(
    repository: &Repository,
    image: &PlatformImage,
    options: &BuildOptions,
    force: bool,
) -> Result<Existing, PublishError> {
    if force {
        return Ok(Existing::default());
    }
    let mut existing =
        existing(discover::on_registry(repository, &image.descriptor.digest, Which::Newest).await?, options);
    // A zTOC that a clean-up has taken away is built again.
    let mut present = Vec::new();
    for ztoc in existing.ztocs {
        if repository.blob_size(&ztoc.digest).await? == Some(ztoc.size) {
            present.push(ztoc);
        } else {
            existing.index = None;
        }
    }
    existing.ztocs = present;
    Ok(existing)
}

fn existing_in_layout(
    layout: &Layout,
    image: &PlatformImage,
    options: &BuildOptions,
) -> Result<Existing, PublishError> {
    let mut found = existing(discover::in_layout(layout, &image.descriptor.digest, Which::Newest)?, options);
    // Images share layers: a zTOC of any index will do.
    for entry in layout.entries()?.iter().filter(|entry| entry.kind() == INDEX_V1) {
        let blobs = Store::Layout(layout.clone());
        let bytes = blobs.blob_bytes(entry, Limits::DEFAULT.manifest_bytes_max)?.unwrap_or_default();
        if let Ok(index) = SociIndex::parse(&bytes, &Limits::DEFAULT) {
            found.ztocs.extend(references(&index, options));
        }
    }
    found.ztocs.retain(|ztoc| layout.has_blob(&ztoc.digest));
    Ok(found)
}

fn existing(found: Discovery, options: &BuildOptions) -> Existing {
    let Discovery::Found(found) = found else { return Existing::default() };
    let Ok(index) = SociIndex::parse(&found.raw, &Limits::DEFAULT) else { return Existing::default() };
    Existing { index: Some(found.digest), ztocs: references(&index, options) }
}

/// The zTOCs of an index that a build by `options` would make again.
fn references(index: &SociIndex, options: &BuildOptions) -> Vec<ZtocReference> {
    let reference = |(layer, descriptor): (Digest, &Descriptor)| {
        let note = |key: &str| descriptor.annotations.get(key);
        let disable_xattrs = note(DISABLE_XATTRS).is_some_and(|value| value == "true");
        // Without the optimisation nothing is noted; with it, only a build can tell whether to.
        (disable_xattrs == options.note_xattrs).then_some(())?;
        Some(ZtocReference {
            digest: descriptor.digest,
            size: descriptor.size,
            layer,
            layer_media_type: note(LAYER_MEDIA_TYPE)?.clone(),
            span_bytes: note(SPAN_SIZE)?.parse().ok()?,
            disable_xattrs,
        })
    };
    index.ztocs().filter_map(reference).collect()
}

fn index_of(image: &PlatformImage, layers: &[LayerReport]) -> Result<SociIndex, PublishError> {
    let ztocs: Vec<ZtocReference> =
        layers.iter().filter_map(|layer| Some(layer.outcome.as_ref().ok()?.reference.clone())).collect();
    if ztocs.is_empty() {
        return Err(PublishError::NothingToIndex { layers: layers.to_vec() });
    }
    // The subject is named by the manifest's own media type and size: that is what runtimes compare.
    Ok(SociIndex::v1(&ztocs, &[], &image.raw.descriptor()))
}

fn body(finished: &Finished) -> Body {
    let encoded = Arc::clone(&finished.encoded);
    let length = encoded.len();
    let open = move || -> Chunks {
        // Pieces are unpacked one at a time, as they are sent.
        let encoded = Arc::clone(&encoded);
        Box::pin(futures_util::stream::iter((0..encoded.piece_count()).map(move |index| Ok(encoded.piece(index)))))
    };
    Body::Chunks { length, open: Arc::new(open) }
}

/// A file that is read while it is sent.
fn file_body(path: PathBuf, length: u64) -> Body {
    const PIECE_BYTES: usize = 256 << 10;
    enum Reading {
        NotOpen(PathBuf),
        Open(tokio::fs::File),
    }
    let open = move || -> Chunks {
        Box::pin(futures_util::stream::try_unfold(Reading::NotOpen(path.clone()), |reading| async {
            let mut file = match reading {
                Reading::NotOpen(path) => tokio::fs::File::open(path).await?,
                Reading::Open(file) => file,
            };
            let mut piece = BytesMut::with_capacity(PIECE_BYTES);
            let length = file.read_buf(&mut piece).await?;
            Ok((length > 0).then(|| (piece.freeze(), Reading::Open(file))))
        }))
    };
    Body::Chunks { length, open: Arc::new(open) }
}

async fn on_disk<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, PublishError> {
    Ok(tokio::task::spawn_blocking(work).await.map_err(|_| BuildError::Stopped)??)
}

/// Reads an encoded zTOC.
struct Pieces<'e> {
    encoded: &'e Encoded,
    next: usize,
    piece: Bytes,
}

impl<'e> Pieces<'e> {
    fn new(encoded: &'e Encoded) -> Self {
        Self { encoded, next: 0, piece: Bytes::new() }
    }
}

impl std::io::Read for Pieces<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        while self.piece.is_empty() && self.next < self.encoded.piece_count() {
            self.piece = self.encoded.piece(self.next);
            self.next += 1;
        }
        let length = buffer.len().min(self.piece.len());
        buffer[..length].copy_from_slice(&self.piece.split_to(length));
        Ok(length)
    }
}
