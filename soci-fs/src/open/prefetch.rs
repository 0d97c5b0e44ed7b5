//! AWS's prefetch artifacts, as a profile: they name spans of the layers of an index of AWS's form.
//!
//! They are of use only with the index that lists them, since they count in its spans; where the span index is used a
//! published profile is what says the same. Like a profile they are hints: one that cannot be had, or names spans that
//! there are not, is left out.

use std::collections::BTreeSet;
use std::sync::Arc;

use soci_index::digest::Digest;
use soci_index::index_manifest::IndexManifest;
use soci_index::limits::Limits;
use soci_index::manifest::{LAYER_DIGEST, PREFETCH, Prefetch};
use soci_index::profile::{PAGE_BYTES, Profile, RANGE_BYTES_MAX, Touched};

use super::ImageOpener;
use crate::profile::Wanted;
use crate::reader::LayerReader;

impl ImageOpener {
    /// What the artifacts of the index that is used name of these layers, as a profile; `None` if there are none.
    pub(crate) async fn prefetched(&self, readers: &[LayerReader]) -> Option<Wanted> {
        let found = self.found.as_ref().filter(|found| matches!(found.index, IndexManifest::Soci(_)))?;
        let (mut layers, mut ranges) = (Vec::new(), Vec::new());
        for blob in found.index.blobs().iter().filter(|blob| blob.media_type == PREFETCH) {
            let layer = blob.annotations.get(LAYER_DIGEST).and_then(|digest| digest.parse::<Digest>().ok());
            let Some(reader) = readers.iter().find(|reader| Some(reader.digest()) == layer) else { continue };
            let artifact = match found.blob(blob, Limits::DEFAULT.manifest_bytes_max).await {
                Ok(bytes) => Prefetch::parse(&bytes, &Limits::DEFAULT).map_err(|error| error.to_string()),
                Err(error) => Err(error.to_string()),
            };
            let layer = reader.digest().to_string();
            match artifact {
                Ok(artifact) => {
                    let spans = artifact.spans().to_string();
                    tracing::info!(layer, spans, "Successfully loaded prefetch artifact");
                    let number = u32::try_from(layers.len()).ok()?;
                    layers.push(reader.digest());
                    ranges.extend(touched(&artifact, reader, number));
                }
                Err(error) => {
                    tracing::warn!(layer, error, "Failed to execute prefetch, continuing without prefetch");
                }
            }
        }
        if ranges.is_empty() {
            return None;
        }
        let profile = Profile::new(layers, ranges, &Limits::DEFAULT);
        let profile =
            profile.inspect_err(|error| tracing::warn!(%error, "the prefetch artifacts make no profile")).ok()?;
        Some(Wanted { name: "of prefetch artifacts".to_owned(), profile: Arc::new(profile), published: None })
    }
}

/// The bytes that an artifact names, span by span, as a profile has them: from a page's beginning on, and not too many in
/// one range. Spans that the layer does not have are passed over.
fn touched(artifact: &Prefetch, reader: &LayerReader, layer: u32) -> Vec<Touched> {
    let table = &reader.index().spans;
    let count = u32::try_from(table.len()).unwrap_or(u32::MAX);
    let named = artifact.prefetch_spans.iter().flat_map(|range| range.start_span..=range.end_span.min(count));
    let spans: BTreeSet<u32> = named.collect();
    let mut touched = Vec::new();
    for span in spans.into_iter().filter_map(|span| table.span(span)) {
        let mut start = span.uncompressed.start.next_multiple_of(PAGE_BYTES);
        while start < span.uncompressed.end {
            let end = span.uncompressed.end.min(start + RANGE_BYTES_MAX);
            touched.push(Touched { layer, bytes: start..end });
            start = end.next_multiple_of(PAGE_BYTES);
        }
    }
    touched
}
