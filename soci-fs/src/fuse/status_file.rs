//! The one file of ours in a file system: what was fetched and what went wrong.
//!
//! Its directory is found by name and never listed, and where the layers have something of their own by the name of its directory,
//! they win. Its size is fixed, the text filled up with spaces, because a size that changes between `stat` and `read`
//! would cut the text. Why a file and not an extended attribute: most images have no extended attributes, and then the
//! kernel can be configured not to ask at all, which saves a round trip for nearly every `open` of many programs.
//!
//! An image has `/.soci/status.json` for everybody (see [`crate::layer::status`]), a layer of a forest
//! `/.soci-snapshotter/<layer digest>.json` for root, with the names that AWS's snapshotter uses.

use std::sync::OnceLock;

use serde::Serialize;
use soci_index::format::entry::Timestamp;
use soci_index::format::index::LayerIndex;
use soci_index::format::span::SpanId;

use crate::layer::reader::LayerReader;
use crate::layer::status::ImageStatus;
use crate::tree::NodeKind;
use crate::tree::attributes::Attributes;

/// Room for each layer of an image, generous.
const BYTES_PER_LAYER: usize = 2048;
/// Size of the file of a layer.
const LAYER_BYTES: usize = 1024;
/// Room for an error's text in it, so that the rest always fits, even if every character has to be escaped.
const LAYER_ERROR_BYTES: usize = 120;

/// Name, size and text of the file.
#[derive(Debug)]
pub(super) struct StatusFile {
    pub(super) directory: &'static [u8],
    pub(super) name: Vec<u8>,
    bytes: usize,
    /// Permission bits for reading, of those that may.
    readers: u16,
    form: Form,
}

#[derive(Debug)]
enum Form {
    Image(Vec<LayerReader>),
    /// With the spans that hold files' content, made when first asked for.
    Layer(LayerReader, OnceLock<Box<[SpanId]>>),
}

/// What the file of a layer says.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct LayerState<'text> {
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'text str>,
    digest: String,
    size: u64,
    fetched_size: u64,
    fetched_percent: f64,
}

impl StatusFile {
    pub(super) fn of_image(layers: &[LayerReader]) -> Self {
        let bytes = (layers.len() + 1) * BYTES_PER_LAYER;
        let form = Form::Image(layers.to_vec());
        Self { directory: b".soci", name: b"status.json".to_vec(), bytes, readers: 0o444, form }
    }

    pub(super) fn of_layer(layer: &LayerReader) -> Self {
        let name = format!("{}.json", layer.digest()).into_bytes();
        let form = Form::Layer(layer.clone(), OnceLock::new());
        Self { directory: b".soci-snapshotter", name, bytes: LAYER_BYTES, readers: 0o400, form }
    }

    /// What `stat` shows of the file, or of its directory.
    pub(super) fn attributes(&self, inode: u64, is_file: bool) -> Attributes {
        // Changed now, so that the kernel drops what it has cached of the file.
        if is_file {
            let size = self.bytes as u64;
            Attributes { size, ..Attributes::plain(inode, NodeKind::Regular, self.readers, now(), 1) }
        } else {
            Attributes::plain(inode, NodeKind::Directory, self.readers | self.readers >> 2, now(), 2)
        }
    }

    pub(super) fn text(&self) -> Vec<u8> {
        let mut text = match &self.form {
            Form::Image(layers) => image_text(layers, self.bytes),
            Form::Layer(layer, spans) => layer_text(layer, spans.get_or_init(|| content_spans(layer.index()))),
        };
        text.resize(self.bytes, b' ');
        if let Some(last) = text.last_mut() {
            *last = b'\n';
        }
        text
    }
}

fn image_text(layers: &[LayerReader], bytes_max: usize) -> Vec<u8> {
    let mut status = ImageStatus::of(layers);
    let text = serde_json::to_vec_pretty(&status).unwrap_or_default();
    if text.len() <= bytes_max {
        return text;
    }
    // Only error texts can be this long.
    status.shorten_errors(BYTES_PER_LAYER / 4);
    serde_json::to_vec(&status).unwrap_or_default()
}

fn layer_text(layer: &LayerReader, spans: &[SpanId]) -> Vec<u8> {
    let (index, store) = (layer.index(), layer.store());
    let present = spans.iter().filter(|span| store.is_present(**span)).count() as u64;
    // Counted in spans of content: what no file needs need not be fetched to have everything.
    let share = |whole: u64| match spans.len() as u64 {
        0 => whole,
        all => u64::try_from(u128::from(whole) * u128::from(present) / u128::from(all)).unwrap_or(whole),
    };
    let error = layer.health().last_error();
    let state = LayerState {
        error: error.as_deref().map(|error| shortened(error, LAYER_ERROR_BYTES)),
        digest: layer.digest().to_string(),
        size: index.compressed_size,
        fetched_size: share(index.compressed_size),
        // Ten thousandths are exact in a float.
        fetched_percent: f64::from(u32::try_from(share(1_000_000)).unwrap_or(u32::MAX)) / 10_000.0,
    };
    serde_json::to_vec(&state).unwrap_or_default()
}

/// The beginning of `text` that has at most `bytes` bytes.
fn shortened(text: &str, bytes: usize) -> &str {
    let end = (0..=bytes.min(text.len())).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    &text[..end]
}

/// The spans that must be present before every file can be read, ascending.
fn content_spans(index: &LayerIndex) -> Box<[SpanId]> {
    let mut spans = Vec::new();
    for entry in index.entries.iter().filter(|entry| entry.size > 0) {
        let whole = entry.data_offset..entry.data_offset.saturating_add(entry.size);
        let stored = match entry.sparse() {
            Some(pieces) => pieces.iter().fold(entry.data_offset..entry.data_offset, |range, piece| {
                range.start..range.end.max(piece.data_offset.saturating_add(piece.length))
            }),
            None => whole,
        };
        let header = entry.header_offset..entry.header_offset.saturating_add(1);
        spans.extend(index.spans.covering(header));
        spans.extend(index.spans.covering(stored));
    }
    spans.sort_unstable();
    spans.dedup();
    spans.into()
}

/// The time by the system's clock.
pub(super) fn now() -> Timestamp {
    soci_index::clock::timestamp(soci_index::clock::since_epoch())
}
