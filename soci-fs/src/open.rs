//! From an image to readers of its layers: finds the index, and streams the layers that have none.
//!
//! Every layer ends in the same place, the layer store, by one of three ways, chosen here and noted for the user:
//!
//! | layer | way |
//! |---|---|
//! | has a zTOC that is sound, and is not small | lazy: spans on demand |
//! | was streamed before and is complete | kept: nothing is read |
//! | all others: small, without zTOC, zTOC malformed | streamed whole, checked, indexed on the fly |
//!
//! All layers are opened at the same time. The index comes from the local index store when it has one, so a mounted
//! image can be mounted again without asking for it; an index from a registry is put there. Invariant: a zTOC that does
//! not fit its layer never stops a mount, it only costs laziness, and the note says so.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _};
use soci_index::digest::Digest;
use soci_index::discover::{self, Discovery, Which};
use soci_index::image::layout::Layout;
use soci_index::image::model::{Descriptor, media_type};
use soci_index::image::store::{Store as BlobStore, StoreError as BlobStoreError};
use soci_index::image::{ImageError, ImageSource, PlatformImage};
use soci_index::index::LayerIndex;
use soci_index::limits::Limits;
use soci_index::manifest::{EMPTY_CONFIG, INDEX_V1, ManifestError, SociIndex};
use soci_index::publish::IMAGE_NAME;
use soci_index::registry::RegistryError;
use soci_index::ztoc::Ztoc;
use tokio::runtime::Handle;

use crate::reader::{LayerReader, Policy};
use crate::source::Source;
use crate::source::image::ImageBlob;
use crate::source::watched::{Observer, WatchedSource};
use crate::store::{Store, StoreError};
use crate::unpack::{Encoding, LayerClaim, UnpackError, unpack};

/// The index of a streamed layer, beside its data.
const INDEX_FILE: &str = "index.ztoc";

/// How to open an image.
#[derive(Clone)]
pub struct OpenOptions {
    /// Told of the bytes of layers that are fetched whole.
    pub observer: Observer,
    /// Layers below this many compressed bytes are streamed whole.
    pub layer_bytes_min: u64,
    /// How readers wait and fetch.
    pub policy: Policy,
    /// Use this index and no other.
    pub index: Option<Digest>,
    /// The local index store; `None` keeps no index.
    pub index_store: Option<PathBuf>,
    /// How many layers are worked on at the same time, at least 1.
    pub parallel: usize,
}

impl fmt::Debug for OpenOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { observer: _, layer_bytes_min, policy, index, index_store, parallel } = self;
        f.debug_struct("OpenOptions")
            .field("layer_bytes_min", layer_bytes_min)
            .field("policy", policy)
            .field("index", index)
            .field("index_store", index_store)
            .field("parallel", parallel)
            .finish_non_exhaustive()
    }
}

/// Why an image could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The image could not be read.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The registry could not be asked for an index.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The local index store is broken.
    #[error("the local index store: {0}")]
    IndexStore(#[from] BlobStoreError),
    /// The index that was asked for is not there.
    #[error("there is no index {digest} of the image in the local store or beside the image")]
    NoSuchIndex {
        /// What was asked for.
        digest: Box<Digest>,
    },
    /// The index that was found cannot be read.
    #[error("index {digest}: {source}")]
    Index {
        /// Which.
        digest: Box<Digest>,
        /// Why.
        source: ManifestError,
    },
    /// A layer could not be streamed.
    #[error(transparent)]
    Unpack(#[from] UnpackError),
    /// The layer store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The work was cut off: the process is shutting down.
    #[error("opening was abandoned")]
    Abandoned,
}

/// How a layer was opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Way {
    /// Its files are fetched when they are read.
    Lazy,
    /// It was here already, whole.
    Kept,
    /// It was fetched whole, for this reason.
    Streamed(String),
}

/// What became of a layer.
#[derive(Debug, Clone)]
pub struct LayerNote {
    /// The layer.
    pub layer: Descriptor,
    /// How it was opened.
    pub way: Way,
    /// How long that took.
    pub time: Duration,
}

/// An image whose layers can be read.
#[derive(Debug)]
pub struct OpenedImage {
    /// The layers, lowest first.
    pub readers: Vec<LayerReader>,
    /// How each was opened, in the same order.
    pub notes: Vec<LayerNote>,
    /// The index that is used, if any.
    pub index: Option<Digest>,
    /// Bytes of the index manifest and of all zTOCs that were read, from wherever.
    pub index_bytes: u64,
}

/// The index of an image, and where its zTOCs are.
struct Found {
    digest: Digest,
    index: SociIndex,
    layout: Option<Layout>,
}

/// Opens all layers of `image`. Readers run their work on `runtime`.
///
/// # Errors
/// [`OpenError`]; what was fetched until then stays in the store.
pub async fn open_image(
    source: &ImageSource,
    image: &PlatformImage,
    store: &Store,
    options: &OpenOptions,
    runtime: &Handle,
) -> Result<OpenedImage, OpenError> {
    let found = find_index(source, image, options).await?;
    let opener = Opener { source, store, options, runtime, found: found.as_ref() };
    let layers = image.manifest.layers.iter().zip(&image.config.diff_ids);
    let mut unique: HashMap<Digest, (&Descriptor, &Digest)> = HashMap::new();
    for (layer, diff_id) in layers {
        unique.insert(layer.digest, (layer, diff_id));
    }
    let work = unique.into_values().map(|(layer, diff_id)| opener.open(layer, *diff_id)).collect::<Vec<_>>();
    let opened = futures_util::stream::iter(work).buffer_unordered(options.parallel.max(1));
    let opened: Vec<Opened> = opened.try_collect().await?;
    let index_bytes = opened.iter().map(|layer| layer.index_bytes).sum();
    let opened: HashMap<Digest, Opened> = opened.into_iter().map(|layer| (layer.note.layer.digest, layer)).collect();
    let in_order = || image.manifest.layers.iter().filter_map(|layer| opened.get(&layer.digest));
    Ok(OpenedImage {
        readers: in_order().map(|layer| layer.reader.clone()).collect(),
        notes: in_order().map(|layer| layer.note.clone()).collect(),
        index: found.map(|found| found.digest),
        index_bytes,
    })
}

/// The index from the local store, else from beside the image; one from a registry is then kept locally.
async fn find_index(
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

async fn open_layout(directory: &Path) -> Result<Layout, OpenError> {
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

/// What opening a layer needs.
struct Opener<'o> {
    source: &'o ImageSource,
    store: &'o Store,
    options: &'o OpenOptions,
    runtime: &'o Handle,
    found: Option<&'o Found>,
}

struct Opened {
    reader: LayerReader,
    note: LayerNote,
    index_bytes: u64,
}

impl Opener<'_> {
    async fn open(&self, layer: &Descriptor, diff_id: Digest) -> Result<Opened, OpenError> {
        let start = Instant::now();
        let blob: Arc<dyn Source> = Arc::new(ImageBlob::new(self.source.clone(), layer.clone()));
        let done = |reader, way, index_bytes| {
            let note = LayerNote { layer: layer.clone(), way, time: start.elapsed() };
            Ok(Opened { reader, note, index_bytes })
        };
        let reason = match self.lazy_index(layer).await? {
            Ok((index, bytes)) => {
                let kept = self.store.layer(&layer.digest, &index)?;
                return done(self.reader(layer, Arc::new(index), kept, blob), Way::Lazy, bytes);
            }
            Err(reason) => reason,
        };
        if let Some((index, kept)) = self.kept(layer).await? {
            return done(self.reader(layer, index, kept, blob), Way::Kept, 0);
        }
        let claim = LayerClaim { digest: layer.digest, size: layer.size, diff_id };
        let encoding = self.encoding(layer, &*blob).await?;
        let watched = WatchedSource::new(Arc::clone(&blob), Arc::clone(&self.options.observer));
        let unpacked = unpack(self.store, &watched, claim, encoding).await?;
        if let Some(ztoc) = unpacked.ztoc {
            self.keep_index(layer, &ztoc);
        }
        done(self.reader(layer, unpacked.index, unpacked.store, blob), Way::Streamed(reason), 0)
    }

    fn reader(
        &self,
        layer: &Descriptor,
        index: Arc<LayerIndex>,
        store: Arc<crate::store::LayerStore>,
        source: Arc<dyn Source>,
    ) -> LayerReader {
        LayerReader::new(layer.digest, index, store, source, self.options.policy, self.runtime)
    }

    /// The index of a layer that can be read lazily, and its size; or why there is none.
    async fn lazy_index(&self, layer: &Descriptor) -> Result<Result<(LayerIndex, u64), String>, OpenError> {
        if layer.size < self.options.layer_bytes_min {
            return Ok(Err("it is small".to_owned()));
        }
        let Some(found) = self.found else { return Ok(Err("the image has no index".to_owned())) };
        let Some(ztoc) = found.index.ztoc(&layer.digest) else {
            return Ok(Err("the index leaves it out".to_owned()));
        };
        let bytes = match self.ztoc_bytes(found, ztoc).await {
            Ok(bytes) => bytes,
            Err(error) => {
                tracing::warn!(layer = %layer.digest, ztoc = %ztoc.digest, %error, "the zTOC cannot be had; the layer is streamed");
                return Ok(Err(format!("its zTOC cannot be had: {error}")));
            }
        };
        let size = layer.size;
        let length = bytes.len() as u64;
        let decoded = tokio::task::spawn_blocking(move || {
            Ztoc::decode(&bytes, &Limits::DEFAULT)?.into_index(size, &Limits::DEFAULT)
        });
        match decoded.await.map_err(|_| OpenError::Abandoned)? {
            Ok(index) => Ok(Ok((index, length))),
            Err(error) => {
                tracing::warn!(layer = %layer.digest, ztoc = %ztoc.digest, %error, "the zTOC cannot be used; the layer is streamed");
                Ok(Err(format!("its zTOC cannot be used: {error}")))
            }
        }
    }

    /// A zTOC from the local store, else from beside the image.
    async fn ztoc_bytes(&self, found: &Found, ztoc: &Descriptor) -> Result<Bytes, OpenError> {
        if let Some(layout) = found.layout.as_ref().filter(|layout| layout.has_blob(&ztoc.digest)) {
            match read_blob(layout, ztoc).await {
                Ok(bytes) => return Ok(bytes),
                Err(error) => tracing::warn!(ztoc = %ztoc.digest, %error, "the local zTOC is damaged"),
            }
        }
        Ok(self.source.blob_bytes(ztoc, Limits::DEFAULT.ztoc_bytes_max).await?)
    }

    /// A layer that was streamed before and is still complete.
    async fn kept(
        &self,
        layer: &Descriptor,
    ) -> Result<Option<(Arc<LayerIndex>, Arc<crate::store::LayerStore>)>, OpenError> {
        let file = self.store.layer_directory(&layer.digest).join(INDEX_FILE);
        // Anything wrong with it means streaming again, which replaces it.
        let read = tokio::task::spawn_blocking(move || {
            let ztoc = Ztoc::decode(&Bytes::from(std::fs::read(file).ok()?), &Limits::DEFAULT).ok()?;
            let size = u64::try_from(ztoc.compressed_size).ok()?;
            ztoc.into_index(size, &Limits::DEFAULT).ok()
        });
        let Some(index) = read.await.map_err(|_| OpenError::Abandoned)? else { return Ok(None) };
        let kept = self.store.layer(&layer.digest, &index)?;
        Ok((kept.is_complete() && kept.is_proven()).then(|| (Arc::new(index), kept)))
    }

    /// Writes the index of a streamed layer beside its data. Without it the layer is only streamed again.
    fn keep_index(&self, layer: &Descriptor, ztoc: &[u8]) {
        let directory = self.store.layer_directory(&layer.digest);
        let write = || {
            let temporary = directory.join(".index.ztoc.new");
            std::fs::write(&temporary, ztoc)?;
            std::fs::rename(&temporary, directory.join(INDEX_FILE))
        };
        if let Err(error) = write() {
            tracing::warn!(layer = %layer.digest, %error, "the layer's index is not kept: it will be streamed again");
        }
    }

    /// How the blob is compressed: its first bytes decide, since media types may be wrong.
    async fn encoding(&self, layer: &Descriptor, blob: &dyn Source) -> Result<Encoding, OpenError> {
        let failed = |cause| OpenError::Unpack(UnpackError::Source { layer: layer.digest, cause });
        // The usual media types are right, and a question saved is a round trip saved.
        if layer.media_type.ends_with("gzip") || layer.media_type.ends_with("zstd") {
            let gzip = layer.media_type.ends_with("gzip");
            return Ok(if gzip { Encoding::Gzip } else { Encoding::Zstd });
        }
        let mut start = Vec::new();
        let mut chunks = blob.read(0..layer.size.min(4)).await.map_err(failed)?;
        while let Some(chunk) = chunks.next().await {
            start.extend_from_slice(&chunk.map_err(failed)?);
        }
        Ok(Encoding::sniff(&start))
    }
}

async fn read_blob(layout: &Layout, blob: &Descriptor) -> Result<Bytes, OpenError> {
    let (store, blob) = (BlobStore::Layout(layout.clone()), blob.clone());
    let read = tokio::task::spawn_blocking(move || {
        let bytes = store.blob_bytes(&blob, Limits::DEFAULT.ztoc_bytes_max)?;
        bytes.ok_or_else(|| BlobStoreError::Missing { path: store.path().to_owned(), digest: Box::new(blob.digest) })
    });
    Ok(read.await.map_err(|_| OpenError::Abandoned)??)
}
