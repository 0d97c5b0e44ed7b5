//! Opens single layers, the first time and again.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use bytes::Bytes;
use futures_util::StreamExt as _;
use soci_index::format::compact::{self, CompactError};
use soci_index::format::digest::Digest;
use soci_index::format::encoding::{Declared, SNIFF_BYTES, obstacle};
use soci_index::format::index::LayerIndex;
use soci_index::format::index_manifest::IndexManifest;
use soci_index::format::model::Descriptor;
use soci_index::format::ztoc::{Ztoc, ZtocError};
use soci_index::image::ImageSource;
use soci_index::image::layout::Layout;
use soci_index::image::store::Store as _;

use crate::layer::reader::LayerReader;
use crate::layer::source::Source;
use crate::layer::source::image::{ImageBlob, UrlBlob};
use crate::layer::source::origins::Origins;
use crate::layer::source::watched::WatchedSource;
use crate::layer::store::{Claim, Condemned, LayerStore, Record, Store, StoreError};
use crate::layer::unpack::{Encoding, LayerClaim, UnpackError, Unpacked, unpack};
use crate::open::find::OpenIndex;
use crate::open::{ImageOpener, LayerNote, OpenError, Way};

/// Why a layer without an index is read whole.
pub const NO_INDEX: &str = "the image has no index";

/// A layer that can be read.
#[derive(Debug)]
pub struct OpenedLayer {
    pub reader: LayerReader,
    /// How it was opened.
    pub note: LayerNote,
    /// Bytes of its TOC or zTOC, from wherever it came.
    pub index_bytes: u64,
    /// The TOC or zTOC of an index by which it is read; `None` for a layer that was fetched whole.
    pub table: Option<Descriptor>,
    /// The claim under which it is kept. It may be one that another image has made and this node has proven.
    pub claim: Claim,
    /// Where the parts of its index are, if they are not beside the image.
    pub index_from: Option<ImageSource>,
}

/// What a layer is read by.
#[derive(Debug)]
pub(super) struct Table {
    /// The TOC or zTOC.
    pub(super) descriptor: Descriptor,
    pub(super) bytes: Bytes,
    pub(super) index: LayerIndex,
    /// Has the windows of a span index.
    pub(super) windows: Option<Origins>,
    /// The repository that has its parts, if that is not the image's own.
    index_from: Option<ImageSource>,
}

/// A layer of the store that can be read.
pub(super) struct Stored {
    pub(super) index: Arc<LayerIndex>,
    pub(super) store: Arc<LayerStore>,
    pub(super) record: Record,
}

impl ImageOpener {
    /// Opens one layer of the image: by what was proven here, else lazily where there is a way, else by fetching all of
    /// it.
    ///
    /// # Errors
    /// [`OpenError`]; nothing of a layer that was not fetched whole is left then.
    pub async fn open_layer(&self, layer: &Descriptor, diff_id: Digest) -> Result<OpenedLayer, OpenError> {
        let start = Instant::now();
        let note = |way| LayerNote { layer: layer.clone(), way, time: start.elapsed() };
        if let Some(stored) = self.proven(layer, diff_id).await? {
            let way = if stored.store.is_complete() { Way::Kept } else { Way::Lazy };
            return self.opened(layer, stored, None, note(way));
        }
        if let Some(reason) = self.store.condemned(Condemned::Claim(Claim::whole(layer.digest, diff_id).id())) {
            return Err(OpenError::Condemned { layer: Box::new(layer.digest), reason });
        }
        let urls = self.urls(layer).await?;
        let lazy = match &urls {
            // Its place is not the image's, and only the image's is known after a restart.
            Some(_) => Err("it is a foreign layer, fetched from its URLs".to_owned()),
            None => self.lazy(layer, diff_id).await?,
        };
        let reason = match lazy {
            Ok((table, claim)) => {
                let (stored, table) = self.keep(layer, claim, table).await?;
                return self.opened(layer, stored, Some(table), note(Way::Lazy));
            }
            Err(reason) => reason,
        };
        let is_indexed = urls.is_none() && self.claim(layer, diff_id).table.is_some();
        let has_index = self.found.is_some() && self.doubt.is_none();
        if !(self.options.whole_layers || self.options.whole_beside_index && has_index) {
            return Err(OpenError::NotLazy { layer: Box::new(layer.digest), reason, is_indexed });
        }
        if is_indexed {
            self.options.stages.fallbacks.fetch_add(1, Ordering::Relaxed);
        }
        let stored = self.stream(layer, diff_id, urls).await?;
        self.opened(layer, stored, None, note(Way::Streamed(reason)))
    }

    /// The claim under which a layer would be opened lazily, as far as is known without its table: what two images must
    /// have in common to share the opening.
    #[must_use]
    pub fn claim(&self, layer: &Descriptor, diff_id: Digest) -> Claim {
        let is_lazy = layer.size >= self.options.layer_bytes_min && self.doubt.is_none();
        let table = self.found.as_ref().filter(|_| is_lazy).and_then(|found| found.index.table(&layer.digest));
        let table = table.map(|table| table.digest);
        Claim { layer: layer.digest, diff_id, table, pack: table.and(self.pack) }
    }

    fn opened(
        &self,
        layer: &Descriptor,
        stored: Stored,
        table: Option<Table>,
        note: LayerNote,
    ) -> Result<OpenedLayer, OpenError> {
        let Stored { index, store, record } = stored;
        let full = |full: crate::layer::limits::Full| OpenError::NotLazy {
            layer: Box::new(layer.digest),
            reason: full.to_string(),
            is_indexed: true,
        };
        crate::layer::limits::admit(&index).map_err(full)?;
        let claim = *store.claim();
        // What is kept may be of another blob with the same tar.
        let blob = if claim.layer == layer.digest {
            layer.clone()
        } else {
            Descriptor { digest: claim.layer, size: record.layer_bytes, ..layer.clone() }
        };
        let place = self.source.place();
        let origins = Origins::new(place, Arc::new(ImageBlob::new(self.source.clone(), blob)));
        let index_bytes = table.as_ref().map_or(0, |table| table.descriptor.size);
        let descriptor = record.table_kept.clone().filter(|_| claim.table.is_some());
        let (kept_windows, index_from) = match table {
            Some(table) => (table.windows, table.index_from),
            None => (windows_of(&record, [&self.source]), None),
        };
        let policy = self.options.policy;
        let reader = LayerReader::with_windows(claim.layer, index, store, origins, kept_windows, policy, &self.runtime);
        reader.fetching().note_times(&self.options.stages);
        if matches!(note.way, Way::Streamed(_)) {
            reader.fetching().count(1, layer.size);
        }
        Ok(OpenedLayer { reader, note, index_bytes, table: descriptor, claim, index_from })
    }

    /// What this node has proven of the diff_id, whichever layer it was proven of.
    async fn proven(&self, layer: &Descriptor, diff_id: Digest) -> Result<Option<Stored>, OpenError> {
        let mut claims = self.store.proven(&diff_id);
        claims.sort_by_key(|claim| claim.layer != layer.digest);
        for claim in claims {
            let Some(stored) = stored(&self.store, claim).await? else { continue };
            let is_whole = stored.store.is_complete();
            let is_own = claim.layer == layer.digest;
            // Spans of a blob that this image does not have, or that are in no form to be fetched, must not be lost.
            if !is_own || stored.index.compressed_size != layer.size {
                if !is_whole {
                    continue;
                }
                stored.store.pin();
            }
            if stored.store.is_proven() && (is_whole || layer.size >= self.options.layer_bytes_min) {
                return Ok(Some(stored));
            }
        }
        Ok(None)
    }

    /// The table by which a layer can be read lazily, and the claim that this makes; or why there is none.
    async fn lazy(&self, layer: &Descriptor, diff_id: Digest) -> Result<Result<(Table, Claim), String>, OpenError> {
        if layer.size < self.options.layer_bytes_min {
            return Ok(Err("it is small".to_owned()));
        }
        if let Some(doubt) = &self.doubt {
            return Ok(Err(doubt.clone()));
        }
        let Some(found) = &self.found else { return Ok(Err(NO_INDEX.to_owned())) };
        let reason = match self.believed(found, layer, diff_id).await? {
            Ok(table) => return Ok(Ok(table)),
            Err(reason) => reason,
        };
        // Both leave out the same layers.
        let is_named = found.index.table(&layer.digest).is_some();
        if let (IndexManifest::Spans(_), true) = (&found.index, is_named)
            && let Some(fallback) = self.fallback().await
        {
            tracing::warn!(layer = %layer.digest, reason, "the span index cannot be used for this layer; trying AWS's");
            return self.believed(fallback, layer, diff_id).await;
        }
        Ok(Err(reason))
    }

    /// AWS's index, if it may be used.
    async fn fallback(&self) -> Option<&OpenIndex> {
        let find = crate::open::find::find_trusted_aws(&self.source, &self.image, &self.options);
        self.fallback.get_or_init(|| find).await.as_ref()
    }

    /// What an index says of a layer, unless that was found to be a lie.
    async fn believed(
        &self,
        found: &OpenIndex,
        layer: &Descriptor,
        diff_id: Digest,
    ) -> Result<Result<(Table, Claim), String>, OpenError> {
        let Some(descriptor) = found.index.table(&layer.digest) else {
            return Ok(Err("the index leaves it out".to_owned()));
        };
        let claim = Claim { layer: layer.digest, diff_id, table: Some(descriptor.digest), pack: None };
        if let Some(reason) = self.store.condemned(Condemned::Claim(claim.id())) {
            return Ok(Err(format!("its index was found to be wrong: {reason}")));
        }
        let table = self.table(found, layer, descriptor).await?;
        Ok(table.map(|table| (table, Claim { pack: self.pack, ..claim })))
    }

    /// What an index says of a layer; or why that is of no use.
    pub(super) async fn table(
        &self,
        found: &OpenIndex,
        layer: &Descriptor,
        table: &Descriptor,
    ) -> Result<Result<Table, String>, OpenError> {
        let what = if table.media_type == compact::TOC { "TOC" } else { "zTOC" };
        let limit = crate::layer::limits::for_layer(layer.size).ztoc_bytes_max;
        let bytes = match self.table_bytes(found, table, limit).await {
            Ok(bytes) => bytes,
            Err(error) => {
                tracing::warn!(layer = %layer.digest, table = %table.digest, %error, "the {what} is not available");
                return Ok(Err(format!("its {what} cannot be had: {error}")));
            }
        };
        let start = Instant::now();
        let decoded = decode(bytes.clone(), table, layer.size).await?;
        self.options.stages.table_decode.record(start.elapsed());
        match decoded {
            Ok(index) => {
                let places = found.windows(table);
                let windows = origins(places.into_iter().map(|blob| (blob.place(), Arc::new(blob) as Arc<dyn Source>)));
                let index_from = found.elsewhere(&self.source);
                Ok(Ok(Table { descriptor: table.clone(), bytes, index, windows, index_from }))
            }
            Err(error) => {
                tracing::warn!(layer = %layer.digest, table = %table.digest, %error, "the {what} cannot be used");
                Ok(Err(format!("its {what} cannot be used: {error}")))
            }
        }
    }

    /// A TOC or zTOC from the local store, else from where the index is.
    async fn table_bytes(&self, found: &OpenIndex, table: &Descriptor, limit: u64) -> Result<Bytes, OpenError> {
        if let Some(layout) = found.layout.as_ref().filter(|layout| layout.has_blob(&table.digest)) {
            match read_blob(layout, table, limit).await {
                Ok(bytes) => return Ok(bytes),
                Err(error) => tracing::warn!(table = %table.digest, %error, "a local part of an index is damaged"),
            }
        }
        let start = Instant::now();
        let bytes = found.blob(table, limit).await;
        if bytes.is_ok() {
            self.options.stages.table_fetch.record(start.elapsed());
        }
        bytes
    }

    /// Puts the table of a claim into the store, and opens the claim's part of it.
    async fn keep(&self, layer: &Descriptor, claim: Claim, table: Table) -> Result<(Stored, Table), OpenError> {
        let table_kept = Some(table.descriptor.clone());
        let record = Record { claim, layer_bytes: layer.size, table_kept, from_elsewhere: false };
        let store = Arc::clone(&self.store);
        let kept = tokio::task::spawn_blocking(move || {
            if store.record(&claim.id()).is_none_or(|known| known != record) {
                store.keep_table(&record, &table.bytes)?;
            }
            let layer = store.layer(&claim, &table.index)?;
            Ok::<_, StoreError>((layer, record, table))
        });
        let (store, record, table) = kept.await.map_err(|_| OpenError::Abandoned)??;
        Ok((Stored { index: Arc::new(table.index.clone()), store, record }, table))
    }

    /// Fetches a layer whole, and proves it as it comes.
    async fn stream(
        &self,
        layer: &Descriptor,
        diff_id: Digest,
        urls: Option<Arc<dyn Source>>,
    ) -> Result<Stored, OpenError> {
        let blob = urls.unwrap_or_else(|| Arc::new(ImageBlob::new(self.source.clone(), layer.clone())));
        // Two images may come to this at the same time, and need it once.
        let _turn = self.store.turn(&Claim::whole(layer.digest, diff_id)).await;
        if let Some(stored) = self.proven(layer, diff_id).await? {
            return Ok(stored);
        }
        let claim = LayerClaim { digest: layer.digest, size: layer.size, diff_id };
        let unpacked = self.unpacked(layer, claim, blob).await?;
        let (index, store, record) = (unpacked.index, unpacked.store, unpacked.record);
        Ok(Stored { index, store, record })
    }

    /// The URLs of a foreign layer as its source, if it is not beside the image.
    async fn urls(&self, layer: &Descriptor) -> Result<Option<Arc<dyn Source>>, OpenError> {
        if !layer.is_foreign() || !matches!(self.source.has_blob(layer).await, Ok(false)) {
            return Ok(None);
        }
        match &self.options.urls {
            Some(urls) if !layer.urls.is_empty() => Ok(Some(Arc::new(UrlBlob::new(urls.clone(), layer.clone())))),
            _ => {
                let (media_type, urls) = (layer.media_type.clone(), layer.urls.clone());
                Err(OpenError::Foreign { layer: Box::new(layer.digest), media_type, urls })
            }
        }
    }

    /// Unpacks a blob as what its media type says, and if it is not that, as what its first bytes are: the media types
    /// are mostly right, and a question saved is a round trip saved.
    async fn unpacked(
        &self,
        layer: &Descriptor,
        claim: LayerClaim,
        blob: Arc<dyn Source>,
    ) -> Result<Unpacked, OpenError> {
        let media_type = layer.media_type.clone();
        let not_a_layer = |reason: String| OpenError::NotALayer { layer: Box::new(layer.digest), media_type, reason };
        if let Some(reason) = obstacle(&layer.media_type) {
            return Err(not_a_layer(reason.to_owned()));
        }
        let declared = match Declared::by_media_type(&layer.media_type) {
            Declared::Layer(encoding) => Some(encoding),
            Declared::Encrypted | Declared::Other => None,
        };
        let watched = WatchedSource::new(Arc::clone(&blob), Arc::clone(&self.options.observer));
        if let Some(packed @ (Encoding::Gzip | Encoding::Zstd)) = declared {
            match unpack(&self.store, &watched, claim, packed).await {
                Err(UnpackError::Index { .. } | UnpackError::Zstd { .. })
                    if first_bytes(layer, &*blob).await? != packed => {}
                unpacked => return Ok(unpacked?),
            }
        }
        let encoding = first_bytes(layer, &*blob).await?;
        if declared.is_some_and(|declared| declared != encoding) {
            let (found, media_type) = (encoding.name(), &layer.media_type);
            tracing::warn!(layer = %layer.digest, media_type, "the layer is {found}, whatever its media type says");
        }
        match unpack(&self.store, &watched, claim, encoding).await {
            Err(UnpackError::Index { cause, .. }) if declared.is_none() => Err(not_a_layer(cause.to_string())),
            unpacked => Ok(unpacked?),
        }
    }
}

/// What a blob's first bytes say that it is.
async fn first_bytes(layer: &Descriptor, blob: &dyn Source) -> Result<Encoding, OpenError> {
    let failed = |cause| OpenError::Unpack(UnpackError::Source { layer: layer.digest, cause });
    let mut start = Vec::new();
    let mut chunks = blob.read(0..layer.size.min(SNIFF_BYTES)).await.map_err(failed)?;
    while let Some(chunk) = chunks.next().await {
        start.extend_from_slice(&chunk.map_err(failed)?);
    }
    Ok(Encoding::sniff(&start))
}

/// Several origins as one; none if there is none.
pub(super) fn origins(places: impl IntoIterator<Item = (String, Arc<dyn Source>)>) -> Option<Origins> {
    let mut all: Option<Origins> = None;
    for (name, source) in places {
        match &all {
            Some(all) => all.add(name, source),
            None => all = Some(Origins::new(name, source)),
        }
    }
    all
}

/// Where the windows of a recorded layer are, if it is read by a span index.
pub(super) fn windows_of<'a>(record: &Record, places: impl IntoIterator<Item = &'a ImageSource>) -> Option<Origins> {
    let blob = crate::open::find::windows_blob(record.table_kept.as_ref()?)?;
    let source = |place: &ImageSource| Arc::new(ImageBlob::new(place.clone(), blob.clone())) as Arc<dyn Source>;
    origins(places.into_iter().map(|place| (place.place(), source(place))))
}

/// A claim's part of the store, opened by the table that is kept with it; `None` when that is not there.
pub(super) async fn stored(store: &Arc<Store>, claim: Claim) -> Result<Option<Stored>, OpenError> {
    let store = Arc::clone(store);
    let opened = tokio::task::spawn_blocking(move || {
        let Some(record) = store.record(&claim.id()) else { return Ok(None) };
        let (Some(table), Some(descriptor)) = (store.table(&record), &record.table_kept) else { return Ok(None) };
        match decode_now(&table, descriptor, None) {
            Ok(index) => {
                let layer = store.layer(&claim, &index)?;
                // Of another form than the blob (zstd), or from URLs: what is lost of it cannot be fetched again.
                if index.compressed_size != record.layer_bytes || record.from_elsewhere {
                    layer.pin();
                }
                Ok(Some(Stored { index: Arc::new(index), store: layer, record }))
            }
            Err(error) => {
                tracing::warn!(layer = %claim.layer, table = %descriptor.digest, %error, "a stored table cannot be used");
                Ok(None)
            }
        }
    });
    opened.await.map_err(|_| OpenError::Abandoned)?
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
    #[error("its size is negative")]
    Negative,
}

/// Decodes a TOC or zTOC on the blocking pool: a large one takes tens of milliseconds.
async fn decode(
    bytes: Bytes,
    table: &Descriptor,
    layer_bytes: u64,
) -> Result<Result<LayerIndex, TableError>, OpenError> {
    let table = table.clone();
    let decoded = tokio::task::spawn_blocking(move || decode_now(&bytes, &table, Some(layer_bytes)));
    decoded.await.map_err(|_| OpenError::Abandoned)
}

/// Decodes a TOC or zTOC of a layer of so many bytes; of as many as it says itself where that is `None`.
fn decode_now(bytes: &Bytes, table: &Descriptor, layer_bytes: Option<u64>) -> Result<LayerIndex, TableError> {
    // One whose layer is not known was kept here, under a layer that kept to the limits.
    let limits = crate::layer::limits::for_layer(layer_bytes.unwrap_or(u64::MAX));
    if table.media_type != compact::TOC {
        let ztoc = Ztoc::decode(bytes, &limits)?;
        let own = u64::try_from(ztoc.compressed_size).map_err(|_| TableError::Negative)?;
        return Ok(ztoc.into_index(layer_bytes.unwrap_or(own), &limits)?);
    }
    let index = compact::decode(bytes, &limits)?;
    let found = index.compressed_size;
    match layer_bytes {
        Some(expected) if expected != found => Err(TableError::LayerSize { expected, found }),
        _ => Ok(index),
    }
}

async fn read_blob(layout: &Layout, blob: &Descriptor, limit: u64) -> Result<Bytes, OpenError> {
    let (layout, blob) = (layout.clone(), blob.clone());
    let read = tokio::task::spawn_blocking(move || {
        layout.blob_bytes(&blob, limit)?.ok_or_else(|| layout.missing(&blob.digest))
    });
    Ok(read.await.map_err(|_| OpenError::Abandoned)??)
}
