//! Writing a TOC blob.

use std::collections::HashMap;

use crate::format::class::{Class, Classified};
use crate::format::compact::columns::Writer;
use crate::format::compact::{Column, TOC_MAGIC, VERSION};
use crate::format::entry::{Entry, EntryKind};
use crate::format::index::{Compression, LayerIndex, WindowPlace, Windows};
use crate::format::span::Span;

/// The two blobs of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// The TOC blob.
    pub toc: Vec<u8>,
    /// The windows blob.
    pub windows: Vec<u8>,
}

/// How hard to compress what is made once and read often. Level 19 gains a twentieth, in ten times the time and with
/// tens of MiB.
const LEVEL: i32 = 12;

/// Why an index cannot be written in this form.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// The windows have no places.
    #[error("the windows of the index are not in a blob of their own")]
    WindowsHeld,
    /// More spans than a decoder accepts.
    #[error("the layer has more than {limit} spans of the span index")]
    Spans { limit: usize },
    /// A span has no digest.
    #[error("span {span} has no digest")]
    NoDigest { span: usize },
    /// A span does not end where the next one begins.
    #[error("span {span} does not end where the next one begins")]
    Gap { span: usize },
    /// The library refuses.
    #[error("it cannot be compressed: {reason}")]
    Compress { reason: String },
}

impl Classified for EncodeError {
    fn class(&self) -> Class {
        Class::Content
    }
}

/// The TOC blob of an index whose windows stand in a blob of their own.
///
/// # Errors
/// [`EncodeError`].
pub fn encode(index: &LayerIndex) -> Result<Vec<u8>, EncodeError> {
    let Windows::Placed(places) = &index.windows else { return Err(EncodeError::WindowsHeld) };
    let mut content = Vec::new();
    content.extend_from_slice(&TOC_MAGIC);
    content.extend_from_slice(&VERSION.to_le_bytes());
    content.push(match index.compression {
        Compression::None => 0,
        Compression::Gzip => 1,
    });
    content.extend_from_slice(&[0; 5]);
    let counts = [index.spans.len() as u64, index.entries.len() as u64];
    let last = index.spans.spans().last().map_or(index.compressed_size, |last| last.compressed.end);
    for number in [index.compressed_size, index.uncompressed_size, last].into_iter().chain(counts) {
        content.extend_from_slice(&number.to_le_bytes());
    }
    let mut columns = Columns::default();
    spans(&mut columns, index, places)?;
    entries(&mut columns, &index.entries);
    for column in Column::ALL {
        let bytes = columns.0.remove(&column).unwrap_or_default().0;
        content.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
        content.extend_from_slice(&bytes);
    }
    compress(&content)
}

/// Columns that are being written.
#[derive(Default)]
struct Columns(HashMap<Column, Writer>);

impl Columns {
    fn at(&mut self, column: Column) -> &mut Writer {
        self.0.entry(column).or_default()
    }
}

fn compress(bytes: &[u8]) -> Result<Vec<u8>, EncodeError> {
    zstd::bulk::compress(bytes, LEVEL).map_err(|error| EncodeError::Compress { reason: error.to_string() })
}

fn spans(columns: &mut Columns, index: &LayerIndex, places: &[WindowPlace]) -> Result<(), EncodeError> {
    let (mut start, mut output) = (0, 0);
    let all = index.spans.spans();
    for (number, (span, place)) in all.iter().zip(places).enumerate() {
        let next = all.get(number + 1);
        let ends = next.map_or((span.compressed.end, index.uncompressed_size), begins);
        if (span.compressed.end, span.uncompressed.end) != ends {
            return Err(EncodeError::Gap { span: number });
        }
        let digest = span.digest.as_ref().ok_or(EncodeError::NoDigest { span: number })?;
        columns.at(Column::SpanStarts).number(span.compressed.start - start);
        columns.at(Column::SpanOutputs).number(span.uncompressed.start - output);
        columns.at(Column::SpanBits).bytes(&[span.bits]);
        columns.at(Column::SpanDigests).bytes(digest);
        columns.at(Column::WindowLengths).number(place.length.into());
        if place.length > 0 {
            columns.at(Column::WindowDigests).bytes(&place.digest);
        }
        (start, output) = (span.compressed.start, span.uncompressed.start);
    }
    Ok(())
}

/// Where the span before ends: a shared byte belongs to both.
pub(super) fn begins(span: &Span) -> (u64, u64) {
    (span.compressed.start + u64::from(span.bits != 0), span.uncompressed.start)
}

fn entries(columns: &mut Columns, entries: &[Entry]) {
    let mut words = Words::default();
    let (mut name, mut expected, mut seconds, mut rare) = (&[][..], 0_u64, 0_i64, None);
    for (number, entry) in entries.iter().enumerate() {
        let shared = name.iter().zip(&*entry.name).take_while(|(one, other)| one == other).count();
        columns.at(Column::Kinds).bytes(&[kind(entry.kind)]);
        columns.at(Column::NamesShared).number(shared as u64);
        columns.at(Column::NamesLengths).number((entry.name.len() - shared) as u64);
        columns.at(Column::Names).bytes(entry.name.get(shared..).unwrap_or_default());
        columns.at(Column::LinkLengths).number(entry.link.len() as u64);
        columns.at(Column::Links).bytes(&entry.link);
        columns.at(Column::Users).number(words.number(&entry.user_name));
        columns.at(Column::Groups).number(words.number(&entry.group_name));
        columns.at(Column::HeaderPlaces).signed(entry.header_offset.wrapping_sub(expected).cast_signed());
        columns.at(Column::DataPlaces).number(entry.data_offset - entry.header_offset);
        columns.at(Column::Sizes).number(entry.size);
        columns.at(Column::Modes).signed(entry.mode);
        let modified = entry.modified.unwrap_or_default();
        let since = if entry.modified.is_some() { modified.seconds.wrapping_sub(seconds) } else { 0 };
        columns.at(Column::Seconds).signed(since);
        columns.at(Column::Fractions).number(entry.modified.map_or(0, |time| u64::from(time.nanoseconds) + 1));
        columns.at(Column::Uids).number(entry.uid.into());
        columns.at(Column::Gids).number(entry.gid.into());
        if entry.extra.is_some() {
            let distance = number - rare.map_or(0, |rare| rare + 1);
            rarity(columns.at(Column::Rarities), entry, distance as u64, &mut words);
            rare = Some(number);
        }
        if entry.modified.is_some() {
            seconds = modified.seconds;
        }
        (name, expected) = (&entry.name, ends(entry));
    }
    words.write(columns.at(Column::Words));
}

/// Where the next header is expected.
pub(super) fn ends(entry: &Entry) -> u64 {
    let stored = entry.sparse().map_or(entry.size, |pieces| pieces.iter().map(|piece| piece.length).sum());
    entry.data_offset.saturating_add(stored).checked_next_multiple_of(512).unwrap_or(u64::MAX)
}

const fn kind(kind: EntryKind) -> u8 {
    match kind {
        EntryKind::Regular => 0,
        EntryKind::Directory => 1,
        EntryKind::Hardlink => 2,
        EntryKind::Symlink => 3,
        EntryKind::CharDevice => 4,
        EntryKind::BlockDevice => 5,
        EntryKind::Fifo => 6,
    }
}

fn rarity(writer: &mut Writer, entry: &Entry, distance: u64, words: &mut Words) {
    let (major, minor) = entry.device();
    writer.number(distance);
    writer.signed(major);
    writer.signed(minor);
    writer.number(entry.pax().len() as u64);
    for record in entry.pax() {
        writer.number(words.number(&record.key));
        writer.number(words.number(&record.value));
    }
    match entry.sparse() {
        None => writer.number(0),
        Some(pieces) => {
            writer.number(pieces.len() as u64 + 1);
            for piece in pieces {
                [piece.file_offset, piece.data_offset, piece.length].iter().for_each(|number| writer.number(*number));
            }
        }
    }
}

/// Texts that get numbers in the order in which they are met first.
#[derive(Default)]
struct Words {
    numbers: HashMap<Box<[u8]>, u64>,
    all: Vec<Box<[u8]>>,
}

impl Words {
    fn number(&mut self, word: &[u8]) -> u64 {
        if let Some(number) = self.numbers.get(word) {
            return *number;
        }
        let number = self.all.len() as u64;
        self.numbers.insert(word.into(), number);
        self.all.push(word.into());
        number
    }

    fn write(&self, writer: &mut Writer) {
        writer.number(self.all.len() as u64);
        for word in &self.all {
            writer.number(word.len() as u64);
            writer.bytes(word);
        }
    }
}
