//! Opens single layers, the first time and again.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use futures_util::StreamExt as _;
use soci_index::compact::{self, CompactError};
use soci_index::digest::Digest;
use soci_index::image::ImageSource;
use soci_index::image::layout::Layout;
use soci_index::image::model::Descriptor;
use soci_index::image::store::{Store as BlobStore, StoreError as BlobStoreError};
use soci_index::index::LayerIndex;
use soci_index::index_manifest::IndexManifest;
use soci_index::limits::Limits;
use soci_index::ztoc::{Ztoc, ZtocError};
use tokio::runtime::Handle;

use super::find::{self, Found, open_layout};
use super::{ImageOpener, LayerNote, OpenError, OpenOptions, Way};
use crate::reader::LayerReader;
use crate::source::Source;
use crate::source::image::ImageBlob;
use crate::source::watched::WatchedSource;
use crate::store::{LayerStore, Store};
use crate::trust::Provisional;
use crate::unpack::{Encoding, LayerClaim, UnpackError, unpack};

/// The index of a streamed layer, beside its data.
const INDEX_FILE: &str = "index.ztoc";

/// A layer that can be read.
#[derive(Debug)]
pub struct OpenedLayer {
    /// Its reader.
    pub reader: LayerReader,
    /// How it was opened.
    pub note: LayerNote,
    /// Bytes of its zTOC, from wherever it came.
    pub index_bytes: u64,
    /// The zTOC by which it is read; `None` for a layer that was fetched whole.
    pub ztoc: Option<Descriptor>,
}

/// What is known of a layer that was open before.
#[derive(Debug, Clone)]
pub struct KeptLayer {
    /// Where its image is. Nobody is asked until a byte is missing.
    pub source: ImageSource,
    /// Its descriptor.
    pub layer: Descriptor,
    /// The zTOC by which it was read, see [`OpenedLayer::ztoc`].
    pub ztoc: Option<Descriptor>,
}

/// Opens a layer again from what is on this node; `None` when the node no longer has what that takes.
///
/// # Errors
/// [`OpenError`] when the local stores cannot be read.
pub async fn reopen_layer(
    kept_layer: &KeptLayer,
    store: &Store,
    options: &OpenOptions,
    runtime: &Handle,
) -> Result<Option<LayerReader>, OpenError> {
    let KeptLayer { source, layer, ztoc } = kept_layer;
    let only_proven = options.trust.provisional() != Provisional::Allow;
    let blob = Arc::new(ImageBlob::new(source.clone(), layer.clone()));
    let reader = |(index, store), windows| {
        crate::limits::count(&index);
        LayerReader::with_windows(layer.digest, index, store, blob, windows, options.policy, runtime)
    };
    // One that came whole needs no trust, and to look at it by another index would forget it.
    if (ztoc.is_none() || only_proven)
        && let Some(found) = kept(store, layer).await?
    {
        return Ok(Some(reader(found, None)));
    }
    let (Some(ztoc), Some(directory)) = (ztoc, &options.index_store) else { return Ok(None) };
    let layout = open_layout(directory).await?;
    if !layout.has_blob(&ztoc.digest) {
        return Ok(None);
    }
    let index = match decode(read_blob(&layout, ztoc).await?, ztoc, layer.size).await? {
        Ok(index) => index,
        Err(error) => {
            tracing::warn!(layer = %layer.digest, table = %ztoc.digest, %error, "the local index cannot be used");
            return Ok(None);
        }
    };
    let (kept, index) = (store.layer(&layer.digest, &index)?, Arc::new(index));
    // Whether the index was signed is not kept, for whom one trusts may have changed.
    if only_proven && !is_proven(&index, &kept).await? {
        return Ok(None);
    }
    let windows = find::windows(ztoc, Some(&layout), source).map(|windows| Arc::new(windows) as Arc<dyn Source>);
    Ok(Some(reader((index, kept), windows)))
}

impl ImageOpener {
    /// Opens one layer of the image: lazily where there is a way, else by fetching all of it.
    ///
    /// # Errors
    /// [`OpenError`]; nothing of a layer that was not fetched whole is left then.
    pub async fn open_layer(&self, layer: &Descriptor, diff_id: Digest) -> Result<OpenedLayer, OpenError> {
        let start = Instant::now();
        let blob: Arc<dyn Source> = Arc::new(ImageBlob::new(self.source.clone(), layer.clone()));
        let done = |index, store, way, table: Option<Table>| {
            let (ztoc, windows) = table.map_or((None, None), |table| (Some(table.descriptor), table.windows));
            let (source, policy) = (Arc::clone(&blob), self.options.policy);
            crate::limits::admit(&index)
                .map_err(|full| OpenError::NotLazy { layer: Box::new(layer.digest), reason: full.to_string() })?;
            let reader = LayerReader::with_windows(layer.digest, index, store, source, windows, policy, &self.runtime);
            let note = LayerNote { layer: layer.clone(), way, time: start.elapsed() };
            let index_bytes = ztoc.as_ref().map_or(0, |ztoc| ztoc.size);
            Ok(OpenedLayer { reader, note, index_bytes, ztoc })
        };
        // To look at the store by an index that may not be used would forget what is kept by another one.
        if self.doubt.is_some()
            && let Some((index, kept)) = kept(&self.store, layer).await?
        {
            return done(index, kept, Way::Kept, None);
        }
        let reason = match self.lazy_index(layer).await? {
            Ok((index, table)) => {
                let (kept, index) = (self.store.layer(&layer.digest, &index)?, Arc::new(index));
                match &self.doubt {
                    Some(doubt) if !is_proven(&index, &kept).await? => doubt.clone(),
                    _ => return done(index, kept, Way::Lazy, Some(table)),
                }
            }
            Err(reason) => reason,
        };
        if let Some((index, kept)) = kept(&self.store, layer).await? {
            return done(index, kept, Way::Kept, None);
        }
        if !self.options.whole_layers {
            return Err(OpenError::NotLazy { layer: Box::new(layer.digest), reason });
        }
        let claim = LayerClaim { digest: layer.digest, size: layer.size, diff_id };
        let encoding = self.encoding(layer, &*blob).await?;
        let watched = WatchedSource::new(Arc::clone(&blob), Arc::clone(&self.options.observer));
        let unpacked = unpack(&self.store, &watched, claim, encoding).await?;
        if let Some(ztoc) = unpacked.ztoc {
            self.keep_index(layer, &ztoc);
        }
        done(unpacked.index, unpacked.store, Way::Streamed(reason), None)
    }

    /// The index of a layer that can be read lazily, and what it was read from; or why there is none.
    async fn lazy_index(&self, layer: &Descriptor) -> Result<Result<(LayerIndex, Table), String>, OpenError> {
        if layer.size < self.options.layer_bytes_min {
            return Ok(Err("it is small".to_owned()));
        }
        // What is not here cannot have been proven here.
        if let Some(doubt) = self.doubt.as_ref().filter(|_| !self.store.layer_directory(&layer.digest).exists()) {
            return Ok(Err(doubt.clone()));
        }
        let Some(found) = &self.found else { return Ok(Err("the image has no index".to_owned())) };
        let reason = match self.table(found, layer).await? {
            Ok(table) => return Ok(Ok(table)),
            Err(reason) => reason,
        };
        // Both leave out the same layers.
        let is_told_of = found.index.table(&layer.digest).is_some();
        if let (IndexManifest::Spans(_), None, true) = (&found.index, &self.doubt, is_told_of)
            && let Some(fallback) = self.fallback().await
        {
            tracing::warn!(layer = %layer.digest, reason, "the span index is of no use for this layer; asking AWS's");
            return self.table(fallback, layer).await;
        }
        Ok(Err(reason))
    }

    /// AWS's index, if it may be used.
    async fn fallback(&self) -> Option<&Found> {
        let find = find::find_trusted_aws(&self.source, &self.image, &self.options);
        self.fallback.get_or_init(|| find).await.as_ref()
    }

    /// What an index says of a layer; or why that is of no use.
    async fn table(&self, found: &Found, layer: &Descriptor) -> Result<Result<(LayerIndex, Table), String>, OpenError> {
        let Some(table) = found.index.table(&layer.digest) else {
            return Ok(Err("the index leaves it out".to_owned()));
        };
        let what = if table.media_type == compact::TOC { "TOC" } else { "zTOC" };
        let bytes = match self.table_bytes(found, table).await {
            Ok(bytes) => bytes,
            Err(error) => {
                tracing::warn!(layer = %layer.digest, table = %table.digest, %error, "the {what} cannot be had");
                return Ok(Err(format!("its {what} cannot be had: {error}")));
            }
        };
        match decode(bytes, table, layer.size).await? {
            Ok(index) => {
                let windows = found.windows(&self.source, table);
                let windows = windows.map(|windows| Arc::new(windows) as Arc<dyn Source>);
                Ok(Ok((index, Table { descriptor: table.clone(), windows })))
            }
            Err(error) => {
                tracing::warn!(layer = %layer.digest, table = %table.digest, %error, "the {what} cannot be used");
                Ok(Err(format!("its {what} cannot be used: {error}")))
            }
        }
    }

    /// A TOC or zTOC from the local store, else from where the index is.
    async fn table_bytes(&self, found: &Found, table: &Descriptor) -> Result<Bytes, OpenError> {
        if let Some(layout) = found.layout.as_ref().filter(|layout| layout.has_blob(&table.digest)) {
            match read_blob(layout, table).await {
                Ok(bytes) => return Ok(bytes),
                Err(error) => tracing::warn!(table = %table.digest, %error, "a local part of an index is damaged"),
            }
        }
        found.blob(&self.source, table).await
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

/// A layer that was streamed before and is still complete.
async fn kept(store: &Store, layer: &Descriptor) -> Result<Option<(Arc<LayerIndex>, Arc<LayerStore>)>, OpenError> {
    let file = store.layer_directory(&layer.digest).join(INDEX_FILE);
    // Anything wrong with it means streaming again, which replaces it.
    let read = tokio::task::spawn_blocking(move || {
        // It was made here, of a layer that kept to the limits.
        let limits = crate::limits::for_layer(u64::MAX);
        let ztoc = Ztoc::decode(&Bytes::from(std::fs::read(file).ok()?), &limits).ok()?;
        let size = u64::try_from(ztoc.compressed_size).ok()?;
        ztoc.into_index(size, &limits).ok()
    });
    let Some(index) = read.await.map_err(|_| OpenError::Abandoned)? else { return Ok(None) };
    let kept = store.layer(&layer.digest, &index)?;
    if index.compressed_size != layer.size {
        // The index is of another form than the blob (zstd): what is lost of it cannot be fetched again span by span.
        kept.pin();
    }
    Ok((kept.is_complete() && kept.is_proven()).then(|| (Arc::new(index), kept)))
}

/// Whether the layer was proven by this index, which to tell takes as long as hashing it.
async fn is_proven(index: &Arc<LayerIndex>, store: &Arc<LayerStore>) -> Result<bool, OpenError> {
    let (index, store) = (Arc::clone(index), Arc::clone(store));
    tokio::task::spawn_blocking(move || store.is_index_proven(&index)).await.map_err(|_| OpenError::Abandoned)
}

/// What a layer is read by.
struct Table {
    /// The TOC or zTOC.
    descriptor: Descriptor,
    /// Has the windows of a span index.
    windows: Option<Arc<dyn Source>>,
}

/// Why a TOC or zTOC is none.
#[derive(Debug, thiserror::Error)]
enum TableError {
    #[error(transparent)]
    Ztoc(#[from] ZtocError),
    #[error(transparent)]
    Toc(#[from] CompactError),
    #[error("it is for a layer of {found} bytes, not {expected}")]
    LayerSize { expected: u64, found: u64 },
}

/// Decodes a TOC or zTOC on the blocking pool: a large one takes tens of milliseconds.
async fn decode(
    bytes: Bytes,
    table: &Descriptor,
    layer_bytes: u64,
) -> Result<Result<LayerIndex, TableError>, OpenError> {
    let is_toc = table.media_type == compact::TOC;
    let decoded = tokio::task::spawn_blocking(move || {
        if !is_toc {
            let limits = crate::limits::for_layer(layer_bytes);
            return Ok(Ztoc::decode(&bytes, &limits)?.into_index(layer_bytes, &limits)?);
        }
        let index = compact::decode(&bytes, &crate::limits::for_layer(layer_bytes))?;
        let found = index.compressed_size;
        if found == layer_bytes { Ok(index) } else { Err(TableError::LayerSize { expected: layer_bytes, found }) }
    });
    decoded.await.map_err(|_| OpenError::Abandoned)
}

async fn read_blob(layout: &Layout, blob: &Descriptor) -> Result<Bytes, OpenError> {
    let (store, blob) = (BlobStore::Layout(layout.clone()), blob.clone());
    let read = tokio::task::spawn_blocking(move || {
        let bytes = store.blob_bytes(&blob, Limits::DEFAULT.ztoc_bytes_max)?;
        bytes.ok_or_else(|| BlobStoreError::Missing { path: store.path().to_owned(), digest: Box::new(blob.digest) })
    });
    Ok(read.await.map_err(|_| OpenError::Abandoned)??)
}
