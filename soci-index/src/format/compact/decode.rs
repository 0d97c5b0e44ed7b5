//! Reading a TOC blob.

use std::sync::Arc;

use crate::format::checkpoint::WINDOW_BYTES;
use crate::format::compact::columns::Reader;
use crate::format::compact::encode::{begins, ends};
use crate::format::compact::file::File;
use crate::format::compact::unpack::{FREE_BYTES, unpack};
use crate::format::compact::{Column, CompactError, WINDOWS_MAGIC};
use crate::format::entry::{Entry, EntryKind, Extra, PaxRecord, Piece, Timestamp};
use crate::format::index::{LayerIndex, WindowPlace, Windows};
use crate::format::limits::Limits;
use crate::format::span::{Span, SpanTable};

/// Bytes of memory overhead of a shared text.
const SHORT_MEMORY: usize = 48;

/// A compressed window is never much longer than the window: what is longer was made to take memory.
const WINDOW_LENGTH_MAX: usize = 2 * WINDOW_BYTES;

/// Reads a TOC blob. The index's windows have places in the windows blob.
///
/// # Errors
/// [`CompactError`]. Time and memory are bounded by the limits: with those of the layer ([`Limits::for_layer`]), by the
/// layer. The head is unpacked and judged before anything else is.
pub fn decode(toc: &[u8], limits: &Limits) -> Result<LayerIndex, CompactError> {
    let (content, limits) = unpack(toc, limits)?;
    let limits = &limits;
    let mut file = File::open(&content, limits)?;
    let mut columns = Vec::new();
    for column in Column::ALL {
        columns.push(file.column(column)?);
    }
    if !file.rest.is_empty() {
        return Err(CompactError::Frame { reason: "it goes on after its last column".to_owned() });
    }
    let mut columns = columns.into_iter();
    let mut next = || columns.next().ok_or_else(|| CompactError::Frame { reason: "a column is missing".to_owned() });
    let spans = read_spans([next()?, next()?, next()?, next()?], &file, limits)?;
    let windows = read_windows([next()?, next()?], spans.len())?;
    let entries = read_entries(next, &file, limits)?;
    Ok(LayerIndex {
        compression: file.compression,
        compressed_size: file.compressed_size,
        uncompressed_size: file.uncompressed_size,
        entries,
        spans,
        windows: Windows::Placed(windows),
    })
}

fn read_spans(columns: [Reader<'_>; 4], file: &File<'_>, limits: &Limits) -> Result<SpanTable, CompactError> {
    let [mut starts, mut outputs, mut bits, mut digests] = columns;
    let mut spans: Vec<Span> = Vec::with_capacity(file.span_count);
    let (mut start, mut output) = (0_u64, 0_u64);
    for _ in 0..file.span_count {
        start = start.checked_add(starts.number()?).ok_or_else(|| starts.fault("it is beyond all numbers"))?;
        output = output.checked_add(outputs.number()?).ok_or_else(|| outputs.fault("it is beyond all numbers"))?;
        let span = Span {
            compressed: start..file.last_span_end,
            uncompressed: output..file.uncompressed_size,
            bits: bits.byte()?,
            digest: Some(digests.digest()?),
        };
        let end = begins(&span);
        if let Some(before) = spans.last_mut() {
            (before.compressed.end, before.uncompressed.end) = end;
        }
        spans.push(span);
    }
    [starts, outputs, bits, digests].into_iter().try_for_each(Reader::end)?;
    Ok(SpanTable::new(spans, file.compressed_size, file.uncompressed_size, limits)?)
}

fn read_windows(columns: [Reader<'_>; 2], count: usize) -> Result<Vec<WindowPlace>, CompactError> {
    let [mut lengths, mut digests] = columns;
    let mut places = Vec::with_capacity(count);
    let mut offset = WINDOWS_MAGIC.len() as u64;
    for _ in 0..count {
        let length = lengths.length(WINDOW_LENGTH_MAX, "a window is longer than windows are")? as u32;
        let digest = if length == 0 { [0; 32] } else { digests.digest()? };
        places.push(WindowPlace { offset, length, digest });
        offset += u64::from(length);
    }
    lengths.end()?;
    digests.end()?;
    Ok(places)
}

/// The columns of entries, by name.
struct Columns<'a> {
    kinds: Reader<'a>,
    shared: Reader<'a>,
    lengths: Reader<'a>,
    names: Reader<'a>,
    link_lengths: Reader<'a>,
    links: Reader<'a>,
    /// Texts that others name by their number.
    words: Vec<Arc<[u8]>>,
    users: Reader<'a>,
    groups: Reader<'a>,
    headers: Reader<'a>,
    data: Reader<'a>,
    sizes: Reader<'a>,
    modes: Reader<'a>,
    seconds: Reader<'a>,
    fractions: Reader<'a>,
    uids: Reader<'a>,
    gids: Reader<'a>,
    rarities: Reader<'a>,
}

/// What reading an entry needs of those before it.
struct Before {
    name: Vec<u8>,
    expected: u64,
    header: u64,
    seconds: i64,
    /// Text of all entries so far.
    text: usize,
    /// Entries until the next one with a rarity; `None` when there is no further one.
    rare_in: Option<u64>,
}

fn read_entries<'a>(
    mut next: impl FnMut() -> Result<Reader<'a>, CompactError>,
    file: &File<'_>,
    limits: &Limits,
) -> Result<Vec<Entry>, CompactError> {
    // In the order in which they are written.
    let mut columns = Columns {
        kinds: next()?,
        shared: next()?,
        lengths: next()?,
        names: next()?,
        link_lengths: next()?,
        links: next()?,
        words: read_words(next()?, limits)?,
        users: next()?,
        groups: next()?,
        headers: next()?,
        data: next()?,
        sizes: next()?,
        modes: next()?,
        seconds: next()?,
        fractions: next()?,
        uids: next()?,
        gids: next()?,
        rarities: next()?,
    };
    let mut before = Before { name: Vec::new(), expected: 0, header: 0, seconds: 0, text: 0, rare_in: None };
    before.rare_in = columns.next_rarity()?;
    let mut entries = Vec::with_capacity(file.entry_count);
    for _ in 0..file.entry_count {
        let entry = columns.entry(&mut before, file, limits)?;
        entries.push(entry);
    }
    if before.rare_in.is_some() {
        return Err(columns.rarities.fault("it is about an entry that does not exist"));
    }
    columns.end()?;
    Ok(entries)
}

fn read_words(mut column: Reader<'_>, limits: &Limits) -> Result<Vec<Arc<[u8]>>, CompactError> {
    let count = column.length(limits.text_bytes_max, "more words than there can be")?;
    let mut words = Vec::with_capacity(count.min(1 << 16));
    let mut held = 0_usize;
    for _ in 0..count {
        let length = column.length(limits.text_bytes_max, "a word is longer than texts may be")?;
        held = held.saturating_add(length + SHORT_MEMORY);
        if held > limits.text_bytes_max.saturating_add(FREE_BYTES) {
            return Err(column.fault("more text than a layer may have"));
        }
        words.push(Arc::from(column.bytes(length)?));
    }
    column.end()?;
    Ok(words)
}

impl Columns<'_> {
    fn entry(&mut self, before: &mut Before, file: &File<'_>, limits: &Limits) -> Result<Entry, CompactError> {
        let kind = self.kind()?;
        self.name(before, limits)?;
        let link_length = self.link_lengths.length(limits.path_bytes_max, "a link is longer than paths may be")?;
        let link: Box<[u8]> = self.links.bytes(link_length)?.into();
        let extra = self.extra(before, limits)?;
        before.text = before.text.saturating_add(before.name.len() + link.len());
        let limit = limits.text_bytes_max;
        if before.text > limit {
            return Err(CompactError::TooLarge {
                what: "bytes of text",
                found: before.text as u64,
                limit: limit as u64,
            });
        }
        let header_offset = before.expected.wrapping_add(self.headers.signed()?.cast_unsigned());
        let data_offset = header_offset.checked_add(self.data.number()?);
        let data_offset = data_offset.ok_or_else(|| self.data.fault("it is beyond all numbers"))?;
        let small = |column: &mut Reader<'_>| {
            let number = column.number()?;
            u32::try_from(number).map_err(|_| column.fault("it has more than 32 bits"))
        };
        let entry = Entry {
            name: before.name.as_slice().into(),
            link,
            user_name: word(&mut self.users, &self.words)?,
            group_name: word(&mut self.groups, &self.words)?,
            header_offset,
            data_offset,
            size: self.sizes.number()?,
            mode: self.modes.signed()?,
            modified: self.modified(before)?,
            uid: small(&mut self.uids)?,
            gid: small(&mut self.gids)?,
            kind,
            extra,
        };
        self.check(&entry, before, file)?;
        (before.header, before.expected) = (entry.header_offset, ends(&entry));
        Ok(entry)
    }

    fn kind(&mut self) -> Result<EntryKind, CompactError> {
        Ok(match self.kinds.byte()? {
            0 => EntryKind::Regular,
            1 => EntryKind::Directory,
            2 => EntryKind::Hardlink,
            3 => EntryKind::Symlink,
            4 => EntryKind::CharDevice,
            5 => EntryKind::BlockDevice,
            6 => EntryKind::Fifo,
            _ => return Err(self.kinds.fault("it is no kind of entry")),
        })
    }

    /// The name, in the place of the one before.
    fn name(&mut self, before: &mut Before, limits: &Limits) -> Result<(), CompactError> {
        let shared = self.shared.length(before.name.len(), "more than the name before has")?;
        let length = self.lengths.length(limits.path_bytes_max, "a name is longer than paths may be")?;
        if shared + length > limits.path_bytes_max {
            return Err(self.lengths.fault("a name is longer than paths may be"));
        }
        before.name.truncate(shared);
        before.name.extend_from_slice(self.names.bytes(length)?);
        Ok(())
    }

    fn modified(&mut self, before: &mut Before) -> Result<Option<Timestamp>, CompactError> {
        let (since, fraction) = (self.seconds.signed()?, self.fractions.number()?);
        let Some(nanoseconds) = fraction.checked_sub(1) else {
            return if since == 0 { Ok(None) } else { Err(self.seconds.fault("a time that there is none of")) };
        };
        let nanoseconds = u32::try_from(nanoseconds).ok().filter(|nanoseconds| *nanoseconds < 1_000_000_000);
        let nanoseconds = nanoseconds.ok_or_else(|| self.fractions.fault("more than a second"))?;
        before.seconds = before.seconds.wrapping_add(since);
        Ok(Some(Timestamp { seconds: before.seconds, nanoseconds }))
    }

    /// How many entries there are before the next one with a rarity.
    fn next_rarity(&mut self) -> Result<Option<u64>, CompactError> {
        if self.rarities.is_at_end() { Ok(None) } else { self.rarities.number().map(Some) }
    }

    fn extra(&mut self, before: &mut Before, limits: &Limits) -> Result<Option<Box<Extra>>, CompactError> {
        match before.rare_in {
            Some(0) => {}
            others => {
                before.rare_in = others.map(|others| others - 1);
                return Ok(None);
            }
        }
        let column = &mut self.rarities;
        let (device_major, device_minor) = (column.signed()?, column.signed()?);
        let count = column.length(limits.text_bytes_max, "more records than there can be")?;
        let mut pax = Vec::with_capacity(count.min(64));
        for _ in 0..count {
            let (key, value) = (word(column, &self.words)?, word(column, &self.words)?);
            before.text = before.text.saturating_add(key.len() + value.len() + size_of::<PaxRecord>());
            if before.text > limits.text_bytes_max {
                return Err(column.fault("more text than a layer may have"));
            }
            pax.push(PaxRecord { key: (*key).into(), value: (*value).into() });
        }
        let left = limits.text_bytes_max.saturating_sub(before.text);
        let sparse = sparse(column, limits.sparse_pieces_max.min(left / size_of::<Piece>()))?;
        before.text += sparse.as_ref().map_or(0, |pieces| pieces.len() * size_of::<Piece>());
        before.rare_in = self.next_rarity()?;
        Ok(Some(Box::new(Extra { device_major, device_minor, pax: pax.into(), sparse })))
    }

    /// Places that a reader relies on.
    fn check(&self, entry: &Entry, before: &Before, file: &File<'_>) -> Result<(), CompactError> {
        if entry.header_offset < before.header || entry.data_offset > file.uncompressed_size {
            return Err(self.headers.fault("a header is out of order or outside the layer"));
        }
        let inside = |offset: u64, length: u64| {
            offset >= entry.data_offset && offset.checked_add(length).is_some_and(|end| end <= file.uncompressed_size)
        };
        let data_inside = match entry.sparse() {
            None => inside(entry.data_offset, entry.size),
            Some(pieces) => pieces.iter().all(|piece| {
                let end = piece.file_offset.checked_add(piece.length);
                inside(piece.data_offset, piece.length) && end.is_some_and(|end| end <= entry.size)
            }),
        };
        if !data_inside || (entry.kind != EntryKind::Regular && entry.size != 0) {
            return Err(self.sizes.fault("data are outside the layer"));
        }
        Ok(())
    }

    fn end(self) -> Result<(), CompactError> {
        [
            self.kinds,
            self.shared,
            self.lengths,
            self.names,
            self.link_lengths,
            self.links,
            self.users,
            self.groups,
            self.headers,
            self.data,
            self.sizes,
            self.modes,
            self.seconds,
            self.fractions,
            self.uids,
            self.gids,
            self.rarities,
        ]
        .into_iter()
        .try_for_each(Reader::end)
    }
}

fn word(column: &mut Reader<'_>, words: &[Arc<[u8]>]) -> Result<Arc<[u8]>, CompactError> {
    let number = column.length(usize::MAX, "a word that does not exist")?;
    words.get(number).cloned().ok_or_else(|| column.fault("a word that does not exist"))
}

fn sparse(column: &mut Reader<'_>, pieces_max: usize) -> Result<Option<Box<[Piece]>>, CompactError> {
    let count = column.length(pieces_max.saturating_add(1), "more pieces than a file may have")?;
    let Some(count) = count.checked_sub(1) else { return Ok(None) };
    let mut pieces: Vec<Piece> = Vec::with_capacity(count.min(1 << 10));
    for _ in 0..count {
        let piece = Piece { file_offset: column.number()?, data_offset: column.number()?, length: column.number()? };
        let end = pieces.last().map_or(0, |before| before.file_offset.saturating_add(before.length));
        if piece.file_offset < end {
            return Err(column.fault("pieces are out of order"));
        }
        pieces.push(piece);
    }
    Ok(Some(pieces.into()))
}
