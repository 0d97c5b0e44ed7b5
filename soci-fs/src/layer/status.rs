//! What a mount has fetched and what went wrong, as JSON for users and monitoring.

use serde::{Deserialize, Serialize};

use crate::layer::reader::{Counts, LayerReader};

/// State of all layers of an image.
#[derive(Debug, Clone, Serialize)]
pub struct ImageStatus {
    /// The layers, lowest first.
    pub layers: Vec<LayerStatus>,
}

/// State of one layer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LayerStatus {
    pub digest: String,
    /// Size of the blob.
    pub compressed_bytes: u64,
    /// Size of its tar as far as it is indexed.
    pub uncompressed_bytes: u64,
    /// How much of the tar is on this node.
    pub present_bytes: u64,
    /// Number of spans.
    pub spans: u32,
    /// How many of them are on this node.
    pub present_spans: u32,
    /// Compressed bytes received by this process.
    pub fetched_bytes: u64,
    /// Requests made by this process.
    pub requests: u64,
    /// Spans that this process fetched ahead of reads: by a guess, or because a file that was read names them.
    #[serde(default)]
    pub ahead_spans: u32,
    /// How many of them were not read yet.
    #[serde(default)]
    pub unread_ahead_spans: u32,
    /// Reads whose bytes were not here, in this process.
    #[serde(default)]
    pub late_reads: u64,
    /// Seconds that these waited, together; concurrent reads count individually.
    #[serde(default)]
    pub waited_seconds: f64,
    /// Reads that failed in this process.
    pub failures: u64,
    /// Whether the content was proven against the image's own digest; else it is trusted as far as the index is.
    pub proven: bool,
    /// Why the layer was found wrong and is out of service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub condemned: Option<String>,
    /// Why the layer is out of service until it is proven.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suspended: Option<String>,
    /// Where its bytes come from, the place that is asked first first.
    #[serde(default)]
    pub origins: Vec<String>,
    /// The latest failure.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
}

impl ImageStatus {
    /// The state of `layers`.
    #[must_use]
    pub fn of(layers: &[LayerReader]) -> Self {
        Self { layers: layers.iter().map(LayerStatus::of).collect() }
    }

    /// Cuts error texts to `bytes` bytes.
    pub(crate) fn shorten_errors(&mut self, bytes: usize) {
        for layer in &mut self.layers {
            layer.origins.truncate(3);
        }
        for error in self.layers.iter_mut().flat_map(LayerStatus::errors) {
            let end = (0..=bytes.min(error.len())).rev().find(|end| error.is_char_boundary(*end)).unwrap_or(0);
            error.truncate(end);
        }
    }
}

impl LayerStatus {
    fn errors(&mut self) -> impl Iterator<Item = &mut String> {
        [&mut self.last_error, &mut self.condemned, &mut self.suspended].into_iter().flatten()
    }

    /// The state of the layer that `reader` reads.
    #[must_use]
    pub fn of(reader: &LayerReader) -> Self {
        let Counts { requests, fetched_bytes, failures, late_reads, waited, decoded_spans: _ } = reader.counts();
        let (index, store, ahead) = (reader.index(), reader.store(), reader.ahead().counts());
        Self {
            digest: reader.digest().to_string(),
            compressed_bytes: index.compressed_size,
            uncompressed_bytes: index.uncompressed_size,
            present_bytes: store.present_bytes(),
            spans: store.spans(),
            present_spans: store.present_spans(),
            fetched_bytes,
            requests,
            ahead_spans: ahead.ahead + ahead.foreseen,
            unread_ahead_spans: ahead.unread + ahead.foreseen_unread,
            late_reads,
            waited_seconds: waited.as_secs_f64(),
            failures,
            proven: store.is_proven(),
            condemned: reader.health().condemned().map(ToString::to_string),
            suspended: reader.health().suspended(),
            origins: reader.fetching().source().names(),
            last_error: reader.health().last_error(),
        }
    }
}
