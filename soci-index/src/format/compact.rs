//! The span index: our own, compact form of what a zTOC says, in two blobs per layer.
//!
//! A zTOC keeps 32 KiB of history for every span, of which a tenth is ever referred to, and a table in which every file
//! repeats the names of its directories. Here the *TOC blob* has the table in columns, one zstd frame in all, and the
//! *windows blob* has each window by itself, with zeros where nothing is referenced, compressed, so that a reader
//! fetches the few windows of the spans that it touches. Spans can then be small: at 256 KiB both blobs are two or
//! three per cent of a layer.
//!
//! # The TOC blob
//!
//! One zstd frame that states the size of its content. The content, numbers little-endian:
//!
//! | bytes | what |
//! |--:|---|
//! | 8 | `SOCI-TOC` |
//! | 2 | version, 1 |
//! | 1 | compression of the layer: 0 none (a plain tar), 1 gzip |
//! | 5 | zeros |
//! | 8 | size of the layer blob |
//! | 8 | size of the uncompressed layer, up to the end of its tar |
//! | 8 | where the last span ends in the layer blob: the blob's end, unless what follows belongs to no file |
//! | 8 | number of spans, *s* |
//! | 8 | number of entries, *e* |
//! | … | the columns of [`Column`], in that order, each preceded by its length in bytes (8) |
//!
//! *varint*: seven bits per byte, lowest first, the top bit set on all bytes but the last. *signed*: a varint of twice
//! the number, or of twice its complement plus one when it is negative (zigzag).
//!
//! | column | content |
//! |---|---|
//! | span starts | *s* varints: first compressed byte, less that of the span before |
//! | span outputs | *s* varints: first uncompressed byte, less that of the span before |
//! | span bits | *s* bytes: how many top bits of the first compressed byte belong to the span, 0 for all |
//! | span digests | *s* × 32 bytes: SHA-256 of the compressed bytes |
//! | window lengths | *s* varints: bytes in the windows blob, 0 for a window of zeros |
//! | window digests | 32 bytes for each window that has a length: SHA-256 of those bytes |
//! | kinds | *e* bytes: 0 regular, 1 directory, 2 hard link, 3 symbolic link, 4 character device, 5 block device, 6 fifo |
//! | names shared | *e* varints: how many first bytes the name has in common with the one before |
//! | names lengths | *e* varints: how many bytes follow these |
//! | names | the bytes that follow |
//! | link lengths, links | *e* varints; the bytes |
//! | words | a varint count, then for each word a varint length and its bytes |
//! | users, groups | *e* varints each: number of the owner's and the group's name among the words |
//! | header places | *e* signed: first header block, less where the entry before ends (its data, rounded up to 512) |
//! | data places | *e* varints: first byte of the data, less the first header block |
//! | sizes | *e* varints |
//! | modes | *e* signed |
//! | seconds | *e* signed: modification time, less that of the entry before; 0 when there is none |
//! | fractions | *e* varints: 0 when there is no time, else nanoseconds plus one |
//! | uids, gids | *e* varints each |
//! | rarities | for each entry that has one: varint distance from the one before (from −1 at first), signed device major and minor, varint count of PAX records and for each a word number and a word number, varint 0 or count of sparse pieces plus one and for each three varints: place in the file, place in the layer, length |
//!
//! A span ends where the next begins, in the compressed layer one byte later when that one shares its first byte.
//!
//! # The windows blob
//!
//! `SOCI-WIN`, then the windows in the order of their spans, each one zstd frame of 32,768 bytes. A window's place is
//! the sum of the lengths before it, plus 8.
//!
//! # Reading
//!
//! Pure. Every number is judged before it is used; what is read is a [`crate::format::index::LayerIndex`] like that of
//! any other format, with [`crate::format::index::WindowPlace`]s in place of windows.

mod columns;
mod decode;
mod encode;
mod file;
mod unpack;
pub mod used;
mod window;

pub use decode::decode;
pub use encode::{EncodeError, Encoded, encode};
pub use window::{WindowError, WindowsBlob};

use crate::format::class::{Class, Classified};
use crate::format::span::SpanError;

/// First bytes of a TOC blob's content.
const TOC_MAGIC: [u8; 8] = *b"SOCI-TOC";
/// First bytes of a windows blob.
pub const WINDOWS_MAGIC: [u8; 8] = *b"SOCI-WIN";
/// The only version so far.
const VERSION: u16 = 1;
/// Media type of a TOC blob.
pub const TOC: &str = "application/vnd.soci.toc.v1+zstd";
/// Media type of a windows blob.
pub(crate) const WINDOWS: &str = "application/vnd.soci.windows.v1";

/// Default span size: 256 KiB of uncompressed layer.
pub const SPAN_BYTES: u64 = 256 << 10;
/// Spans that a layer is not cut into more of: half a gigabyte and more of compressed layer gets larger ones.
const SPANS_WANTED_MAX: u64 = 8_192;

/// The distance of checkpoints in a layer of so many compressed bytes, when `span_bytes` are wanted: more in very large
/// layers, whose windows could not be held in memory while they are made. A tar shrinks to a quarter or so.
#[must_use]
pub(crate) fn span_bytes(compressed: u64, span_bytes: u64) -> u64 {
    span_bytes.max(compressed.saturating_mul(4) / SPANS_WANTED_MAX)
}

/// The columns of a TOC blob, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Column {
    /// First compressed bytes of the spans.
    SpanStarts,
    /// First uncompressed bytes of the spans.
    SpanOutputs,
    /// Bits of the shared bytes.
    SpanBits,
    /// SHA-256 of the spans.
    SpanDigests,
    /// Lengths of the windows in the windows blob.
    WindowLengths,
    /// SHA-256 of the windows there.
    WindowDigests,
    /// What the entries are.
    Kinds,
    /// Bytes that names share with those before.
    NamesShared,
    /// Lengths of what they do not share.
    NamesLengths,
    /// What they do not share.
    Names,
    /// Lengths of link targets.
    LinkLengths,
    /// Link targets.
    Links,
    /// Texts that occur more than once.
    Words,
    /// Owners' names.
    Users,
    /// Groups' names.
    Groups,
    HeaderPlaces,
    DataPlaces,
    Sizes,
    Modes,
    /// Modification times.
    Seconds,
    /// Their fractions.
    Fractions,
    /// Owners.
    Uids,
    /// Groups.
    Gids,
    /// What few entries have.
    Rarities,
}

impl Column {
    /// All of them.
    const ALL: [Self; 24] = [
        Self::SpanStarts,
        Self::SpanOutputs,
        Self::SpanBits,
        Self::SpanDigests,
        Self::WindowLengths,
        Self::WindowDigests,
        Self::Kinds,
        Self::NamesShared,
        Self::NamesLengths,
        Self::Names,
        Self::LinkLengths,
        Self::Links,
        Self::Words,
        Self::Users,
        Self::Groups,
        Self::HeaderPlaces,
        Self::DataPlaces,
        Self::Sizes,
        Self::Modes,
        Self::Seconds,
        Self::Fractions,
        Self::Uids,
        Self::Gids,
        Self::Rarities,
    ];
}

/// Why a TOC blob cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CompactError {
    /// It is no zstd frame, or does not state its size, or is damaged.
    #[error("not a span index: {reason}")]
    Frame { reason: String },
    /// It begins with other bytes.
    #[error("not a span index: its content begins with {found:?}")]
    Magic { found: String },
    /// A version that came later.
    #[error("the span index has version {found}; this program reads version {VERSION}")]
    Version { found: u16 },
    /// A column ends too early, goes on too long, or has a number that cannot be.
    #[error("the span index is damaged in its column {column:?}{}: {what}", at(*entry))]
    Column {
        column: Column,
        /// At which span or entry, from 0.
        entry: Option<usize>,
        what: &'static str,
    },
    /// More than we are willing to hold.
    #[error("the span index has {found} {what}, more than the limit of {limit}")]
    TooLarge { what: &'static str, found: u64, limit: u64 },
    /// A cap of [`crate::format::limits::Limits`] is passed, which may be that of the layer.
    #[error("the span index passes the limit {cap} ({limit})")]
    Cap { cap: &'static str, limit: u64 },
    /// The spans do not make up the layer.
    #[error(transparent)]
    Spans(#[from] SpanError),
}

impl Classified for CompactError {
    fn class(&self) -> Class {
        Class::Content
    }
}

fn at(entry: Option<usize>) -> String {
    entry.map(|entry| format!(", at {entry}")).unwrap_or_default()
}
