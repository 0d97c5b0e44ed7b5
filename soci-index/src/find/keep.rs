//! Keeps an index that was fetched in the local index store, so that the next use of the image fetches none of its
//! parts.
//!
//! An edge. Only blobs of the image's own layers are fetched, each written as it arrives, a few at a time: what else an
//! index lists is nothing that this image can use. A part that cannot be fetched is no error: it is fetched again when
//! it is needed.

use std::time::{Duration, Instant};

use futures_util::{FutureExt as _, StreamExt as _};

use crate::find::choose::{Candidate, IndexPlace};
use crate::find::origin::{self, IMAGE_NAME};
use crate::find::parts::Parts;
use crate::format::icon;
use crate::format::index_manifest::IndexManifest;
use crate::format::limits::Limits;
use crate::format::model::{Descriptor, media_type};
use crate::format::span_index::SpanReference;
use crate::image::layout::Layout;
use crate::image::sink::{SinkError, on_disk, read_blocking};
use crate::image::store::StoreError;
use crate::image::{ImageSource, PlatformImage};

/// Blobs of an index that are fetched at the same time: each costs a round trip.
const PARALLEL: usize = 8;

/// Callback that receives a duration.
pub(crate) type Timed = dyn Fn(Duration) + Send + Sync;

/// An index that is to be kept.
#[derive(Debug, Clone, Copy)]
pub struct Keep<'a> {
    /// The index.
    pub found: &'a Candidate,
    /// The image, as it is to be called.
    pub name: &'a str,
    pub image: &'a PlatformImage,
    /// `HOST/REPOSITORY` that it was fetched from.
    pub origin: &'a str,
    /// Where its blobs are.
    pub parts: &'a Parts,
}

impl Keep<'_> {
    /// Puts the index and its parts in `layout`; `timed` receives the duration of each successful fetch.
    ///
    /// # Errors
    /// [`SinkError`] when the layout cannot be read or written.
    pub async fn into_layout(&self, layout: &Layout, timed: &Timed) -> Result<(), SinkError> {
        let wanted = self.blobs().into_iter().filter(|blob| !layout.has_blob(&blob.digest));
        let fetching: Vec<_> = wanted.map(|blob| self.fetch(layout, blob, timed)).collect();
        futures_util::stream::iter(fetching).buffer_unordered(PARALLEL).collect::<()>().await;
        let mut entry = Descriptor::of(media_type::MANIFEST, &self.found.raw);
        entry.artifact_type = Some(self.found.index.kind().to_owned());
        entry.platform = Some(self.image.platform.clone());
        entry.annotations.insert(IMAGE_NAME.to_owned(), self.name.to_owned());
        entry.annotations.insert(origin::IMAGE.to_owned(), self.image.descriptor.digest.to_string());
        let (layout, raw, origin) = (layout.clone(), self.found.raw.clone(), self.origin.to_owned());
        on_disk(move || enter(&layout, entry, &raw, &origin)).await
    }

    /// The blobs that opening takes and, from where no later start of this image will look, the windows.
    fn blobs(&self) -> Vec<Descriptor> {
        let is_elsewhere = matches!(self.found.place, IndexPlace::Named { .. });
        let mut blobs: Vec<Descriptor> = Vec::new();
        for table in self.image.manifest.layers.iter().filter_map(|layer| self.found.index.table(&layer.digest)) {
            let windows = match &self.found.index {
                IndexManifest::Spans(_) if is_elsewhere => SpanReference::of(table),
                IndexManifest::Spans(_) | IndexManifest::Soci(_) => None,
            };
            let windows = windows.map(|reference| reference.windows_descriptor());
            blobs.extend(std::iter::once(table.clone()).chain(windows));
        }
        blobs.sort_by_key(|blob| blob.digest);
        blobs.dedup_by_key(|blob| blob.digest);
        blobs.retain(|blob| blob.size <= Limits::DEFAULT.ztoc_bytes_max);
        blobs
    }

    async fn fetch(&self, layout: &Layout, blob: Descriptor, timed: &Timed) {
        let start = Instant::now();
        let write = |source: &ImageSource| {
            let (to, digest) = (layout.clone(), blob.digest);
            read_blocking(source.open_blob(&blob), move |reader| to.add_early(&digest, reader)).boxed()
        };
        match self.parts.first(blob.size, write).await {
            Ok(_) => timed(start.elapsed()),
            Err(error) => tracing::warn!(blob = %blob.digest, %error, "a part of an index could not be fetched"),
        }
    }
}

/// Names the index in index.json, with the place that it was fetched from beside those that are noted.
fn enter(layout: &Layout, mut entry: Descriptor, raw: &[u8], origin: &str) -> Result<(), StoreError> {
    let mut writer = layout.lock()?;
    let before = layout.entries()?.into_iter().find(|before| before.digest == entry.digest);
    if let Some(before) = &before
        && origin::origins(before).is_none_or(|known| known.iter().any(|known| known == origin))
        && layout.has_blob(&before.digest)
    {
        return Ok(());
    }
    origin::annotate(&mut entry, origin, before.as_ref());
    for blob in icon::constant_blobs(raw) {
        writer.add_blob(blob)?;
    }
    writer.add_manifest(entry, raw).map(|_| ())
}
