//! The tar reader: uncompressed bytes in, entries out, nothing kept of the data.
//!
//! It accepts what Go's archive/tar accepts and reads it the same way, because that is what decides the bytes of a zTOC
//! and what container runtimes unpack. It is pushed ([`TarReader::push`]), takes everything it is given, and can be cut
//! anywhere. Extended headers (PAX, GNU long names) are folded into the entry they precede.
//!
//! Where the AWS tools index wrongly or give up, this reader does better, and reports in [`Table::obstacle`] that a
//! zTOC cannot represent the result:
//!
//! | in the archive | AWS | here |
//! |---|---|---|
//! | link, directory, device or fifo with a size field | later offsets are wrong, its own reader refuses | size 0: no data follow |
//! | PAX sparse file | same | stored pieces in [`Entry::sparse`], obstacle |
//! | old GNU sparse (`S`), contiguous (`7`) | refuses the layer | a regular file, obstacle |
//! | global PAX header (`g`), volume label (`V`) | refuses the layer | skipped, as container runtimes do; obstacle |

mod check;
mod error;
mod fields;
mod header;
mod pax;
mod sparse;
mod table;

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::format::entry::{Entry, EntryKind, Extra, PaxRecord};
use crate::format::limits::{ENTRY_MEMORY, Limits};
use fields::Fields;
use header::{BLOCK, Header};

pub use check::{HeaderMismatch, check_header};
pub use error::TarError;
pub use table::{Obstacle, Table};

#[derive(Debug)]
pub struct TarReader {
    limits: Limits,
    offset: u64,
    state: TarState,
    /// The header block that is being collected.
    block: Box<[u8; BLOCK]>,
    ahead: Ahead,
    entries: Vec<Entry>,
    /// How many entries were taken away.
    taken: usize,
    texts: Texts,
    obstacle: Option<Obstacle>,
}

/// What the next bytes are.
#[derive(Debug)]
enum TarState {
    /// A header block; `zero` if the one before was all zero.
    Block { have: usize, zero: bool },
    /// The content of an extended header.
    Extended { kind: Extended, data: Vec<u8>, left: u64, padding: u64 },
    /// Extension blocks of an old GNU sparse header.
    OldSparse { entry: Box<Entry>, stored: u64, map: sparse::Map, have: usize },
    /// Blocks of a sparse map in front of the data.
    SparseMap { entry: Box<Entry>, stored: u64, map: sparse::InData, have: usize },
    /// Data of an entry, then its padding.
    Skip { data: u64, padding: u64 },
    /// Behind the end of the tar.
    End { at: u64 },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Extended {
    Pax,
    LongName,
    LongLink,
}

/// What extended headers have said about the entry to come.
#[derive(Debug, Default)]
struct Ahead {
    /// Where the first of them begins.
    offset: Option<u64>,
    pax: pax::Records,
    long_name: Vec<u8>,
    long_link: Vec<u8>,
}

/// Counts text and shares the names of owners.
#[derive(Debug, Default)]
struct Texts {
    bytes: usize,
    names: BTreeSet<Arc<[u8]>>,
}

impl TarReader {
    /// Begins at offset 0.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self::at(0, limits)
    }

    /// Begins at the header of some entry, at `offset` in the layer.
    #[must_use]
    pub(crate) fn at(offset: u64, limits: Limits) -> Self {
        let (ahead, texts) = (Ahead::default(), Texts::default());
        let state = TarState::Block { have: 0, zero: false };
        let block = Box::new([0; BLOCK]);
        Self { limits, offset, state, block, ahead, entries: Vec::new(), taken: 0, texts, obstacle: None }
    }

    /// Takes the entries so far away, for a caller that looks at each once: memory stays bounded by what comes between
    /// two calls. They are missing from [`Table::entries`].
    pub fn take_entries(&mut self) -> std::vec::Drain<'_, Entry> {
        self.taken += self.entries.len();
        self.entries.drain(..)
    }

    /// The size of the file within whose data the reader stands, if it does.
    #[must_use]
    pub(crate) fn inside(&self) -> Option<u64> {
        match self.state {
            TarState::Skip { data: 1.., .. } => self.entries.last().map(|entry| entry.size),
            _ => None,
        }
    }

    /// Takes the next bytes, all of them.
    ///
    /// # Errors
    /// [`TarError`]; the reader is of no use afterwards.
    pub fn push(&mut self, mut bytes: &[u8]) -> Result<(), TarError> {
        while !bytes.is_empty() {
            let taken = self.take(bytes);
            self.offset += taken as u64;
            bytes = &bytes[taken..];
            self.complete()?;
        }
        Ok(())
    }

    /// Ends the stream.
    ///
    /// # Errors
    /// [`TarError::Truncated`] when it ends within an entry. A missing end marker or missing padding is accepted.
    pub fn finish(self) -> Result<Table, TarError> {
        let truncated = |inside| Err(TarError::Truncated { offset: self.offset, inside });
        let end = match self.state {
            TarState::Block { have: 0, .. } | TarState::Skip { data: 0, .. } | TarState::Extended { left: 0, .. } => {
                self.offset
            }
            TarState::End { at } => at,
            TarState::Block { .. } => return truncated("a header"),
            TarState::Skip { .. } => return truncated("the data of an entry"),
            TarState::Extended { .. } => return truncated("an extended header"),
            TarState::OldSparse { .. } | TarState::SparseMap { .. } => return truncated("a sparse map"),
        };
        Ok(Table { entries: self.entries, end, obstacle: self.obstacle })
    }

    /// Moves as many bytes as the state wants; says how many.
    fn take(&mut self, bytes: &[u8]) -> usize {
        let wanted = |left: u64| usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len());
        match &mut self.state {
            TarState::End { .. } => bytes.len(),
            TarState::Skip { data, padding } => {
                let taken = wanted(data.saturating_add(*padding));
                let of_data = (*data).min(taken as u64);
                *data -= of_data;
                *padding -= taken as u64 - of_data;
                taken
            }
            TarState::Extended { data, left, padding, .. } => {
                let of_data = wanted(*left);
                data.extend_from_slice(&bytes[..of_data]);
                *left -= of_data as u64;
                let of_padding = wanted(*padding).min(bytes.len() - of_data);
                *padding -= of_padding as u64;
                of_data + of_padding
            }
            TarState::Block { have, .. } | TarState::OldSparse { have, .. } | TarState::SparseMap { have, .. } => {
                let taken = bytes.len().min(BLOCK - *have);
                self.block[*have..*have + taken].copy_from_slice(&bytes[..taken]);
                *have += taken;
                taken
            }
        }
    }

    /// Goes on to the next state when this one has all it wants.
    fn complete(&mut self) -> Result<(), TarError> {
        let next = TarState::Block { have: 0, zero: false };
        match &self.state {
            TarState::Skip { data: 0, padding: 0 } => self.state = next,
            TarState::Extended { left: 0, padding: 0, .. } => {
                if let TarState::Extended { kind, data, .. } = std::mem::replace(&mut self.state, next) {
                    self.extend(kind, &data)?;
                }
            }
            TarState::Block { have: BLOCK, zero } => {
                let zero = *zero;
                let block = *self.block;
                self.state = self.header(&block, zero)?;
            }
            TarState::OldSparse { have: BLOCK, .. } | TarState::SparseMap { have: BLOCK, .. } => {
                let state = std::mem::replace(&mut self.state, next);
                let block = *self.block;
                self.state = self.sparse_block(state, &block)?;
            }
            _ => {}
        }
        Ok(())
    }

    /// A whole header block; `self.offset` is behind it.
    fn header(&mut self, block: &[u8; BLOCK], after_zero: bool) -> Result<TarState, TarError> {
        let offset = self.offset - BLOCK as u64;
        let zero = block.iter().all(|byte| *byte == 0);
        match (zero, after_zero) {
            (true, false) => return Ok(TarState::Block { have: 0, zero: true }),
            (true, true) => return Ok(TarState::End { at: self.offset }),
            (false, true) => return Err(TarError::LoneZeroBlock { offset: offset - BLOCK as u64 }),
            (false, false) => {}
        }
        let header = Header::parse(block).map_err(|field| TarError::Header { offset, field })?;
        let extended = match header.flag {
            b'x' => Some(Extended::Pax),
            b'L' => Some(Extended::LongName),
            b'K' => Some(Extended::LongLink),
            _ => None,
        };
        match extended {
            Some(kind) => self.extended(kind, header.size, offset),
            None => self.entry(&header, block, offset),
        }
    }

    fn extended(&mut self, kind: Extended, size: i64, offset: u64) -> Result<TarState, TarError> {
        let left = u64::try_from(size).map_err(|_| TarError::Header { offset, field: "size" })?;
        let cap = self.limits.extended_header_bytes_max;
        if left > cap {
            return Err(TarError::Limit { offset, limit: "extended_header_bytes_max", cap });
        }
        self.ahead.offset.get_or_insert(offset);
        if left == 0 {
            self.extend(kind, &[])?;
            return Ok(TarState::Block { have: 0, zero: false });
        }
        Ok(TarState::Extended { kind, data: Vec::new(), left, padding: padding(left) })
    }

    fn extend(&mut self, kind: Extended, data: &[u8]) -> Result<(), TarError> {
        match kind {
            Extended::Pax => {
                let offset = self.ahead.offset.unwrap_or_default();
                self.ahead.pax = pax::parse(data).ok_or(TarError::Extended { offset })?;
            }
            Extended::LongName => self.ahead.long_name = header::text(data).to_vec(),
            Extended::LongLink => self.ahead.long_link = header::text(data).to_vec(),
        }
        Ok(())
    }

    /// A header that is not an extended one: an entry, or something to skip.
    fn entry(&mut self, header: &Header<'_>, block: &[u8; BLOCK], offset: u64) -> Result<TarState, TarError> {
        let ahead = std::mem::take(&mut self.ahead);
        let fields = Fields::merge(header, ahead, offset)?;
        let kind = match header.flag {
            b'0' | b'7' | b'S' => EntryKind::Regular,
            0 if fields.name.ends_with(b"/") => EntryKind::Directory,
            0 => EntryKind::Regular,
            b'1' => EntryKind::Hardlink,
            b'2' => EntryKind::Symlink,
            b'3' => EntryKind::CharDevice,
            b'4' => EntryKind::BlockDevice,
            b'5' => EntryKind::Directory,
            b'6' => EntryKind::Fifo,
            b'g' | b'V' => {
                let what = if header.flag == b'g' { "a global PAX header" } else { "a volume label" };
                self.obstacle.get_or_insert_with(|| Obstacle { what: what.to_owned(), offset });
                let size = if header.flag == b'g' { header.size } else { fields.size };
                return Ok(skip(u64::try_from(size).map_err(|_| TarError::Header { offset, field: "size" })?));
            }
            flag => {
                return Err(TarError::UnsupportedType { offset, name: lossy(&fields.name), kind: char::from(flag) });
            }
        };
        let stored = if kind == EntryKind::Regular { fields.size } else { 0 };
        let stored = u64::try_from(stored).map_err(|_| TarError::Header { offset, field: "size" })?;
        if matches!(header.flag, b'7' | b'S') {
            let what = if header.flag == b'7' { "the contiguous file" } else { "the sparse file" };
            self.obstruct(what, &fields.name, offset);
        }
        let mut entry = self.build(fields, kind, stored)?;
        if header.flag == b'S' {
            return self.old_sparse(entry, block, stored, offset);
        }
        match sparse::declared(&entry.extra.as_mut().map(|extra| extra.pax.to_vec()).unwrap_or_default()) {
            Some(sparse::Declared::No) => {
                self.keep(entry)?;
                Ok(skip(stored))
            }
            _ if kind != EntryKind::Regular => Err(TarError::Sparse { offset, name: lossy(&entry.name) }),
            None => Err(TarError::Sparse { offset, name: lossy(&entry.name) }),
            Some(sparse::Declared::Map(map)) => self.sparse_pax(entry, offset, stored, map),
            Some(sparse::Declared::InData) => {
                self.sparse_fields(&mut entry, offset)?;
                Ok(TarState::SparseMap { entry: Box::new(entry), stored, map: sparse::InData::default(), have: 0 })
            }
        }
    }

    /// Makes the entry; its data begin at `self.offset`.
    fn build(&mut self, fields: Fields<'_>, kind: EntryKind, size: u64) -> Result<Entry, TarError> {
        let offset = fields.header_offset;
        self.check_path(&fields.name, offset)?;
        self.check_path(&fields.link, offset)?;
        let names = fields.name.len() + fields.link.len() + fields.user_name.len() + fields.group_name.len();
        // Short records weigh more than their texts.
        let weight = |record: &PaxRecord| record.key.len() + record.value.len() + size_of::<PaxRecord>();
        self.count(names + fields.pax.iter().map(weight).sum::<usize>(), offset)?;
        let (device_major, device_minor) = fields.device;
        let plain = fields.pax.is_empty() && fields.device == (0, 0);
        let extra = Extra { device_major, device_minor, pax: fields.pax.into(), sparse: None };
        // The AWS tools cut ids to 32 bits.
        let (uid, gid) = (fields.uid as u32, fields.gid as u32);
        Ok(Entry {
            name: fields.name.into(),
            link: fields.link.into(),
            user_name: self.texts.share(&fields.user_name),
            group_name: self.texts.share(&fields.group_name),
            header_offset: offset,
            data_offset: self.offset,
            size,
            mode: fields.mode,
            modified: Some(fields.modified),
            uid,
            gid,
            kind,
            extra: (!plain).then(|| Box::new(extra)),
        })
    }

    fn check_path(&self, path: &[u8], offset: u64) -> Result<(), TarError> {
        let cap = self.limits.path_bytes_max;
        if path.len() > cap {
            return Err(TarError::Limit { offset, limit: "path_bytes_max", cap: cap as u64 });
        }
        Ok(())
    }

    /// Counts what an entry makes us hold.
    fn count(&mut self, bytes: usize, offset: u64) -> Result<(), TarError> {
        let cap = self.limits.text_bytes_max;
        self.texts.bytes = self.texts.bytes.saturating_add(bytes);
        if self.texts.bytes > cap {
            return Err(TarError::Limit { offset, limit: "text_bytes_max", cap: cap as u64 });
        }
        Ok(())
    }

    fn keep(&mut self, entry: Entry) -> Result<(), TarError> {
        if self.taken + self.entries.len() >= self.limits.entries_max {
            let (offset, cap) = (entry.header_offset, self.limits.entries_max as u64);
            return Err(TarError::Limit { offset, limit: "entries_max", cap });
        }
        let cap = self.limits.table_bytes_max;
        if (self.entries.len() as u64 + 1).saturating_mul(ENTRY_MEMORY).saturating_add(self.texts.bytes as u64) > cap {
            return Err(TarError::Limit { offset: entry.header_offset, limit: "max_table_bytes", cap });
        }
        self.entries.push(entry);
        Ok(())
    }

    fn obstruct(&mut self, what: &str, name: &[u8], offset: u64) {
        self.obstacle.get_or_insert_with(|| Obstacle { what: format!("{what} {:?}", lossy(name)), offset });
    }

    fn old_sparse(
        &mut self,
        mut entry: Entry,
        block: &[u8; BLOCK],
        stored: u64,
        offset: u64,
    ) -> Result<TarState, TarError> {
        let invalid = |entry: &Entry| TarError::Sparse { offset, name: lossy(&entry.name) };
        let (map, more, size) = sparse::old_header(block).ok_or_else(|| invalid(&entry))?;
        entry.size = size;
        if more {
            return Ok(TarState::OldSparse { entry: Box::new(entry), stored, map, have: 0 });
        }
        self.sparse_done(entry, stored, &map)
    }

    fn sparse_pax(
        &mut self,
        mut entry: Entry,
        offset: u64,
        stored: u64,
        map: sparse::Map,
    ) -> Result<TarState, TarError> {
        self.sparse_fields(&mut entry, offset)?;
        self.sparse_done(entry, stored, &map)
    }

    /// Name and size of a PAX sparse file stand in records of their own.
    fn sparse_fields(&mut self, entry: &mut Entry, offset: u64) -> Result<(), TarError> {
        let records = entry.pax().to_vec();
        let (name, size) = sparse::renamed(&records);
        if let Some(name) = name {
            self.check_path(name, offset)?;
            entry.name = name.into();
        }
        if let Some(size) = size {
            let size = pax::integer(size).and_then(|size| u64::try_from(size).ok());
            entry.size = size.ok_or_else(|| TarError::Sparse { offset, name: lossy(&entry.name) })?;
        }
        self.obstruct("the sparse file", &entry.name, offset);
        Ok(())
    }

    /// A whole block of a sparse map.
    fn sparse_block(&mut self, state: TarState, block: &[u8; BLOCK]) -> Result<TarState, TarError> {
        let cap = self.limits.sparse_pieces_max;
        let invalid = |entry: &Entry| TarError::Sparse { offset: entry.header_offset, name: lossy(&entry.name) };
        match state {
            TarState::OldSparse { entry, stored, mut map, .. } => {
                let (pairs, more) = sparse::old_extension(block).ok_or_else(|| invalid(&entry))?;
                map.extend(pairs);
                if map.len() > cap {
                    let (offset, cap) = (entry.header_offset, cap as u64);
                    return Err(TarError::Limit { offset, limit: "sparse_pieces_max", cap });
                }
                if more {
                    Ok(TarState::OldSparse { entry, stored, map, have: 0 })
                } else {
                    self.sparse_done(*entry, stored, &map)
                }
            }
            TarState::SparseMap { entry, stored, mut map, .. } => {
                // The map is part of the stored data.
                let stored = stored.checked_sub(BLOCK as u64).ok_or_else(|| invalid(&entry))?;
                match map.block(block, cap).map_err(|()| invalid(&entry))? {
                    Some(map) => self.sparse_done(*entry, stored, &map),
                    None => Ok(TarState::SparseMap { entry, stored, map, have: 0 }),
                }
            }
            other => Ok(other),
        }
    }

    fn sparse_done(&mut self, mut entry: Entry, stored: u64, map: &sparse::Map) -> Result<TarState, TarError> {
        entry.data_offset = self.offset;
        let pieces = sparse::place(map, entry.size, stored, self.offset)
            .ok_or_else(|| TarError::Sparse { offset: entry.header_offset, name: lossy(&entry.name) })?;
        self.count(size_of_val(&*pieces), entry.header_offset)?;
        entry.extra.get_or_insert_default().sparse = Some(pieces);
        self.keep(entry)?;
        Ok(skip(stored))
    }
}

impl Texts {
    fn share(&mut self, name: &[u8]) -> Arc<[u8]> {
        if let Some(known) = self.names.get(name) {
            return Arc::clone(known);
        }
        let name: Arc<[u8]> = name.into();
        self.names.insert(Arc::clone(&name));
        name
    }
}

const fn padding(size: u64) -> u64 {
    size.wrapping_neg() % BLOCK as u64
}

const fn skip(stored: u64) -> TarState {
    if stored == 0 {
        TarState::Block { have: 0, zero: false }
    } else {
        TarState::Skip { data: stored, padding: padding(stored) }
    }
}

fn lossy(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}
