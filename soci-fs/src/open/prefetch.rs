//! AWS's prefetch artifacts, as profiles: they name spans of the layers of an index of AWS's form.
//!
//! They count in the spans of the zTOCs beside which they are listed. A layer that is read by another table, a span
//! index's say, has the zTOC fetched for the places of its spans in the uncompressed layer, which are the same by any
//! table; that is done for layers that have an artifact only. Like a profile they are hints: one that cannot be
//! obtained, or names spans that there are not, is left out.

use std::collections::BTreeSet;
use std::sync::Arc;

use soci_index::format::digest::Digest;
use soci_index::format::index::LayerIndex;
use soci_index::format::index_manifest::IndexManifest;
use soci_index::format::limits::Limits;
use soci_index::format::manifest::{LAYER_DIGEST, PREFETCH, Prefetch};
use soci_index::format::model::Descriptor;
use soci_index::format::profile::{PAGE_BYTES, Profile, RANGE_BYTES_MAX, Touched};

use crate::foresight::profile::Wanted;
use crate::layer::reader::LayerReader;
use crate::open::ImageOpener;
use crate::open::find::{OpenIndex, find_aws};

impl ImageOpener {
    /// What the artifacts beside AWS's index name of these layers, each layer's as a profile of its own.
    pub(crate) async fn prefetched(&self, readers: &[LayerReader]) -> Vec<Wanted> {
        let beside;
        let found = match &self.found {
            Some(found) if matches!(found.index, IndexManifest::Soci(_)) => found,
            Some(_) => match find_aws(&self.source, &self.image, &self.options).await {
                Some(found) => {
                    beside = found;
                    &beside
                }
                None => return Vec::new(),
            },
            None => return Vec::new(),
        };
        let mut all = Vec::new();
        for blob in found.index.blobs().iter().filter(|blob| blob.media_type == PREFETCH) {
            let layer = blob.annotations.get(LAYER_DIGEST).and_then(|digest| digest.parse::<Digest>().ok());
            let Some(reader) = readers.iter().find(|reader| Some(reader.digest()) == layer) else { continue };
            let layer = reader.digest().to_string();
            match self.artifact(found, blob, reader).await {
                Ok((artifact, wanted)) => {
                    let spans = artifact.spans().to_string();
                    tracing::info!(layer, spans, "Successfully loaded prefetch artifact");
                    all.push(wanted);
                }
                Err(error) => {
                    tracing::warn!(layer, error, "Failed to execute prefetch, continuing without prefetch");
                }
            }
        }
        all
    }

    /// One artifact, and what it says as a profile.
    async fn artifact(
        &self,
        found: &OpenIndex,
        blob: &Descriptor,
        reader: &LayerReader,
    ) -> Result<(Prefetch, Wanted), String> {
        let bytes = found.blob(blob, Limits::DEFAULT.manifest_bytes_max).await.map_err(|error| error.to_string())?;
        let artifact = Prefetch::parse(&bytes, &Limits::DEFAULT).map_err(|error| error.to_string())?;
        let ranges = touched(&artifact, &*self.counted_in(found, reader).await?);
        let profile = Profile::new(vec![reader.digest()], ranges, &Limits::DEFAULT);
        let profile = Arc::new(profile.map_err(|error| error.to_string())?);
        Ok((artifact, Wanted { name: "of a prefetch artifact".to_owned(), profile, published: None }))
    }

    /// The table of a layer in whose spans an artifact counts.
    async fn counted_in(&self, found: &OpenIndex, reader: &LayerReader) -> Result<Arc<LayerIndex>, String> {
        let layer = self.image.manifest.layers.iter().find(|layer| layer.digest == reader.digest());
        let table = found.index.table(&reader.digest());
        let (layer, table) = layer.zip(table).ok_or_else(|| "the index has no zTOC of the layer".to_owned())?;
        let used = reader.store().record().and_then(|record| record.table_kept);
        if used.is_some_and(|used| used.digest == table.digest) {
            return Ok(Arc::clone(reader.index()));
        }
        Ok(Arc::new(self.table(found, layer, table).await.map_err(|error| error.to_string())??.index))
    }
}

/// The bytes that an artifact names, span by span, as a profile has them: from a page's beginning on, and not too many
/// in one range. Spans that the layer does not have are passed over.
fn touched(artifact: &Prefetch, index: &LayerIndex) -> Vec<Touched> {
    let table = &index.spans;
    let count = u32::try_from(table.len()).unwrap_or(u32::MAX);
    let named = artifact.prefetch_spans.iter().flat_map(|range| range.start_span..=range.end_span.min(count));
    let spans: BTreeSet<u32> = named.collect();
    let mut touched = Vec::new();
    for span in spans.into_iter().filter_map(|span| table.span(span)) {
        let mut start = span.uncompressed.start.next_multiple_of(PAGE_BYTES);
        while start < span.uncompressed.end {
            let end = span.uncompressed.end.min(start + RANGE_BYTES_MAX);
            touched.push(Touched { layer: 0, bytes: start..end });
            start = end.next_multiple_of(PAGE_BYTES);
        }
    }
    touched
}
