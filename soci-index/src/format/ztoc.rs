//! zTOC 0.9, the index file of AWS's tools: model, and the way to a [`LayerIndex`] and back.
//!
//! The model keeps what the file says; [`Ztoc::into_index`] is where it is judged. Anything that a reader could stumble
//! over is refused there, so that a hostile file yields an error or right bytes, never wrong ones: offsets that overlap
//! or leave the layer, checkpoints out of order, spans larger than deflate can make them. What no check of the file
//! alone can find (a forged window, a shifted checkpoint) is found while decoding ([`crate::format::decode`]) or by the
//! proof of the whole layer against the image's `diff_id`.
//!
//! Layout and history of the format: see [`crate::format::layout`].

pub(crate) mod compare;
mod flat_read;
mod flat_write;
pub mod rfc3339;
mod zinfo;

use bytes::Bytes;

use crate::format::checkpoint::{Checkpoint, Window};
use crate::format::class::{Class, Classified};
use crate::format::entry::{Entry, EntryKind};
use crate::format::index::{Compression, LayerIndex, Windows};
use crate::format::limits::{INFLATION_MAX, Limits};
use crate::format::span::{Span, SpanError, SpanTable};

pub use flat_write::EncodeError;

/// The version that every zTOC so far has.
pub(crate) const VERSION: &str = "0.9";

/// The build tool that AWS's command writes. It is part of the bytes, so we write the same.
pub(crate) const BUILD_TOOL: &str = "AWS SOCI CLI v0.2";

/// A zTOC.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ztoc {
    /// Version text, usually `VERSION`.
    pub version: String,
    /// The tool that built it.
    pub build_tool: String,
    /// Size of the layer blob.
    pub compressed_size: i64,
    /// Where the tar ends in the uncompressed layer.
    pub uncompressed_size: i64,
    /// The files, in tar order.
    pub entries: Vec<Entry>,
    /// Last span number as written; -1 for none.
    pub max_span_id: i32,
    /// SHA-256 of each span's compressed bytes; `None` for a text that is no such digest (it can match nothing).
    pub digests: Vec<Option<[u8; 32]>>,
    pub spans: Spans,
}

/// Where the spans of a zTOC are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Spans {
    /// At checkpoints of a gzip stream.
    Gzip {
        /// Span size that was asked for.
        span_bytes: i64,
        /// One per span.
        checkpoints: Vec<Checkpoint>,
        /// Written in the older layout, which leaves the first checkpoint out.
        first_implied: bool,
    },
    /// At multiples of the span size in a plain tar.
    Plain {
        /// Size of each span but the last.
        span_bytes: i64,
        /// Size of the layer.
        size: i64,
    },
}

/// Why a zTOC cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ZtocError {
    /// Not a flatbuffer of this schema.
    #[error("not a zTOC: field {field} of table {table} at byte {offset} cannot be read ({cause})")]
    Malformed {
        table: &'static str,
        field: &'static str,
        /// Where the table is in the file.
        offset: usize,
        cause: String,
    },
    /// The checkpoint blob has no layout that we know.
    #[error("the zTOC's checkpoints are malformed: {what} ({bytes} bytes)")]
    Checkpoints { what: &'static str, bytes: usize },
    /// A cap of [`Limits`] is passed.
    #[error("the zTOC passes the limit {limit} ({cap})")]
    Limit { limit: &'static str, cap: u64 },
    /// A number is negative or beyond what the layer can hold.
    #[error("the zTOC says {what} is {value}, which cannot be")]
    Number { what: &'static str, value: i64 },
    /// The zTOC is of a layer of another size.
    #[error("the zTOC is for a layer of {expected} bytes, this layer has {found}")]
    LayerSize { expected: i64, found: u64 },
    /// Counts of spans, digests and checkpoints differ.
    #[error("the zTOC counts {spans} spans, {digests} span digests and {checkpoints} checkpoints")]
    Counts { spans: i64, digests: usize, checkpoints: usize },
    /// The spans do not add up.
    #[error("the zTOC's spans are wrong: {0}")]
    Spans(#[from] SpanError),
    /// A span claims more output than deflate can make of its bytes.
    #[error("span {span} claims {uncompressed} bytes from {compressed}, more than deflate can yield")]
    Inflation { span: usize, compressed: u64, uncompressed: u64 },
    /// A file overlaps the one before it or leaves the layer.
    #[error("the zTOC places {name:?} at {offset} with {size} bytes; it must lie between {least} and {most}")]
    Entry {
        name: String,
        offset: i64,
        size: u64,
        /// The least offset its data can have.
        least: u64,
        most: u64,
    },
    /// An entry of an unknown type.
    #[error("the zTOC gives {name:?} the unknown type {kind:?}")]
    Kind { name: String, kind: String },
}

impl Classified for ZtocError {
    fn class(&self) -> Class {
        Class::Content
    }
}

/// What a zTOC calls the kinds of entries.
const KINDS: [(EntryKind, &str); 7] = [
    (EntryKind::Regular, "reg"),
    (EntryKind::Directory, "dir"),
    (EntryKind::Hardlink, "hardlink"),
    (EntryKind::Symlink, "symlink"),
    (EntryKind::CharDevice, "char"),
    (EntryKind::BlockDevice, "block"),
    (EntryKind::Fifo, "fifo"),
];

/// What a zTOC calls a kind of entry.
#[must_use]
pub fn kind_name(kind: EntryKind) -> &'static str {
    KINDS.iter().find(|(known, _)| *known == kind).map_or("", |(_, name)| name)
}

impl Ztoc {
    /// Reads a zTOC. Windows stay slices of `bytes`; nothing else refers to it.
    ///
    /// # Errors
    /// [`ZtocError`] when the bytes are malformed or pass a limit. Time and memory are bounded by the limits and the
    /// length of `bytes`.
    pub fn decode(bytes: &Bytes, limits: &Limits) -> Result<Self, ZtocError> {
        flat_read::decode(bytes, limits)
    }

    /// Writes the zTOC as AWS's tools would.
    ///
    /// # Errors
    /// [`EncodeError`] when a zTOC cannot represent an entry, or the file would pass 2 GiB.
    pub fn encode(&self) -> Result<Encoded, EncodeError> {
        flat_write::encode(self)
    }

    /// How the layer is compressed.
    #[must_use]
    pub(crate) const fn compression(&self) -> Compression {
        match self.spans {
            Spans::Gzip { .. } => Compression::Gzip,
            Spans::Plain { .. } => Compression::None,
        }
    }

    /// The span size that was asked for.
    #[must_use]
    pub const fn span_bytes(&self) -> i64 {
        match self.spans {
            Spans::Gzip { span_bytes, .. } | Spans::Plain { span_bytes, .. } => span_bytes,
        }
    }

    /// Number of the span that holds a byte of the uncompressed layer, by the checkpoints as they stand in the file.
    /// For a byte past the end of a plain tar it may be the number of a span that does not exist.
    #[must_use]
    pub fn span_of(&self, offset: u64) -> u32 {
        let span = match &self.spans {
            Spans::Gzip { checkpoints, .. } => {
                checkpoints.partition_point(|checkpoint| checkpoint.uncompressed <= offset).saturating_sub(1) as u64
            }
            Spans::Plain { span_bytes, .. } => offset / span_bytes.cast_unsigned().max(1),
        };
        u32::try_from(span).unwrap_or(u32::MAX)
    }

    /// Whether a runtime may answer that no file has an extended attribute: none is recorded, and no opaque directory
    /// needs one.
    #[must_use]
    pub fn has_no_xattrs(&self) -> bool {
        !self.entries.iter().any(|entry| entry.name.ends_with(b".wh..wh..opq") || entry.xattrs().next().is_some())
    }

    /// Judges the zTOC against a layer of `layer_size` bytes and makes an index of it.
    ///
    /// # Errors
    /// [`ZtocError`] names what cannot be.
    pub fn into_index(self, layer_size: u64, limits: &Limits) -> Result<LayerIndex, ZtocError> {
        // Older tools, and damaged files, have other sizes here; the layer itself is the judge.
        if self.compressed_size.cast_unsigned() != layer_size {
            return Err(ZtocError::LayerSize { expected: self.compressed_size, found: layer_size });
        }
        let uncompressed_size = unsigned("the size of the uncompressed layer", self.uncompressed_size)?;
        let count = i64::from(self.max_span_id) + 1;
        let compression = self.compression();
        let (spans, windows, end) = match self.spans {
            Spans::Gzip { checkpoints, .. } => {
                let counts = (self.digests.len(), checkpoints.len());
                if count != counts.0 as i64 || counts.0 != counts.1 || count == 0 {
                    return Err(ZtocError::Counts { spans: count, digests: counts.0, checkpoints: counts.1 });
                }
                let (spans, windows) = gzip_spans(checkpoints, &self.digests, layer_size, uncompressed_size)?;
                (spans, windows, uncompressed_size)
            }
            Spans::Plain { span_bytes, size } => {
                let spans = plain_spans(span_bytes, size, layer_size, &self.digests, count, limits)?;
                let windows = vec![Window::EMPTY; spans.len()];
                (spans, windows, layer_size)
            }
        };
        let spans = SpanTable::new(spans, layer_size, end, limits)?;
        let entries = place_entries(self.entries, uncompressed_size.min(end))?;
        Ok(LayerIndex {
            compression,
            compressed_size: layer_size,
            uncompressed_size: end,
            entries,
            spans,
            windows: Windows::Held(windows),
        })
    }
}

/// An encoded zTOC in three parts: the checkpoints, which make up nearly all of it, are unpacked only while it is
/// written, so that a layer of many gigabytes needs little memory.
#[derive(Debug, Clone)]
pub struct Encoded {
    before: Bytes,
    checkpoints: zinfo::Pieces,
    after: Bytes,
}

impl Encoded {
    /// Length of the file.
    #[must_use]
    pub fn len(&self) -> u64 {
        (self.before.len() + self.checkpoints.len() + self.after.len()) as u64
    }

    /// Whether the file has no bytes: it always has some.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many pieces [`Encoded::piece`] knows.
    #[must_use]
    pub(crate) fn piece_count(&self) -> usize {
        2 + self.checkpoints.count()
    }

    /// One piece of the file, unpacked now; nothing past the last one.
    #[must_use]
    pub(crate) fn piece(&self, index: usize) -> Bytes {
        match index.checked_sub(1) {
            None => self.before.clone(),
            Some(index) if index < self.checkpoints.count() => self.checkpoints.piece(index),
            Some(index) if index == self.checkpoints.count() => self.after.clone(),
            Some(_) => Bytes::new(),
        }
    }

    /// The file, piece by piece, in order.
    pub fn pieces(&self) -> impl Iterator<Item = Bytes> + '_ {
        (0..self.piece_count()).map(|index| self.piece(index))
    }

    /// The file as one.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        self.pieces().fold(Vec::new(), |mut all, piece| {
            all.extend_from_slice(&piece);
            all
        })
    }

    /// SHA-256 of the file.
    #[must_use]
    pub fn digest(&self) -> crate::format::digest::Digest {
        let mut hasher = crate::format::digest::Hasher::new(crate::format::digest::Algorithm::Sha256);
        self.pieces().for_each(|piece| hasher.update(&piece));
        hasher.finish()
    }
}

fn unsigned(what: &'static str, value: i64) -> Result<u64, ZtocError> {
    u64::try_from(value).map_err(|_| ZtocError::Number { what, value })
}

/// Spans between checkpoints. Checkpoints behind the end of the tar (in its padding), and all but the last of several
/// at the same place, lead nowhere and are dropped; their digests with them.
fn gzip_spans(
    checkpoints: Vec<Checkpoint>,
    digests: &[Option<[u8; 32]>],
    layer_size: u64,
    uncompressed_size: u64,
) -> Result<(Vec<Span>, Vec<Window>), ZtocError> {
    let ends: Vec<(u64, u64)> = checkpoints.iter().skip(1).map(|next| (next.compressed, next.uncompressed)).collect();
    let (mut spans, mut windows) = (Vec::with_capacity(checkpoints.len()), Vec::with_capacity(checkpoints.len()));
    for (index, checkpoint) in checkpoints.into_iter().enumerate() {
        let (compressed_end, uncompressed_end) = ends.get(index).copied().unwrap_or((layer_size, uncompressed_size));
        let bits = checkpoint.bits;
        let start = checkpoint.compressed.checked_sub(u64::from(bits > 0));
        let start = start.ok_or(ZtocError::Number { what: "the place of the first checkpoint", value: 0 })?;
        let uncompressed = checkpoint.uncompressed..uncompressed_end.min(uncompressed_size);
        // The first span stays even when it is empty: an empty layer has one.
        let leads_nowhere = uncompressed.is_empty()
            && (checkpoint.uncompressed >= uncompressed_size || checkpoint.uncompressed == uncompressed_end)
            && (checkpoint.uncompressed == 0 || checkpoint.uncompressed >= uncompressed_size)
            && !(uncompressed_size == 0 && spans.is_empty());
        if leads_nowhere {
            continue;
        }
        let compressed = start..compressed_end;
        let (from, to) = (compressed_end.saturating_sub(start), uncompressed.end.saturating_sub(uncompressed.start));
        if to > from.saturating_mul(INFLATION_MAX) {
            return Err(ZtocError::Inflation { span: index, compressed: from, uncompressed: to });
        }
        spans.push(Span { compressed, uncompressed, bits, digest: digests.get(index).copied().flatten() });
        windows.push(checkpoint.window);
    }
    Ok((spans, windows))
}

/// Equal pieces of a plain tar.
fn plain_spans(
    span_bytes: i64,
    size: i64,
    layer_size: u64,
    digests: &[Option<[u8; 32]>],
    count: i64,
    limits: &Limits,
) -> Result<Vec<Span>, ZtocError> {
    let step = unsigned("the span size", span_bytes)?;
    if size.cast_unsigned() != layer_size {
        return Err(ZtocError::LayerSize { expected: size, found: layer_size });
    }
    if step == 0 {
        return Err(ZtocError::Number { what: "the span size", value: 0 });
    }
    let expected = layer_size.div_ceil(step);
    if count.cast_unsigned() != expected || digests.len() as u64 != expected {
        let checkpoints = usize::try_from(expected).unwrap_or(usize::MAX);
        return Err(ZtocError::Counts { spans: count, digests: digests.len(), checkpoints });
    }
    if expected > limits.spans_max as u64 {
        return Err(ZtocError::Limit { limit: "spans_max", cap: limits.spans_max as u64 });
    }
    let span = |(index, digest): (usize, &Option<[u8; 32]>)| {
        let start = index as u64 * step;
        let range = start..(start + step).min(layer_size);
        Span { compressed: range.clone(), uncompressed: range, bits: 0, digest: *digest }
    };
    Ok(digests.iter().enumerate().map(span).collect())
}

/// Sorts entries by place and works out where their headers begin: each directly behind the data before it.
fn place_entries(mut entries: Vec<Entry>, end: u64) -> Result<Vec<Entry>, ZtocError> {
    if !entries.is_sorted_by_key(|entry| entry.data_offset) {
        entries.sort_by_key(|entry| entry.data_offset);
    }
    let mut header_offset: u64 = 0;
    for entry in &mut entries {
        let stored = if entry.kind == EntryKind::Regular { entry.size } else { 0 };
        let least = header_offset.saturating_add(512);
        let data_end = entry.data_offset.checked_add(stored).filter(|data_end| *data_end <= end);
        let Some(data_end) = data_end.filter(|_| entry.data_offset >= least && entry.data_offset % 512 == 0) else {
            return Err(ZtocError::Entry {
                name: String::from_utf8_lossy(&entry.name).chars().take(200).collect(),
                offset: entry.data_offset.cast_signed(),
                size: entry.size,
                least,
                most: end,
            });
        };
        entry.header_offset = header_offset;
        header_offset = data_end.next_multiple_of(512);
    }
    Ok(entries)
}
