//! The content of a TOC blob: a fixed part, then one column after the other.

use crate::format::compact::columns::Reader;
use crate::format::compact::{Column, CompactError, TOC_MAGIC, VERSION};
use crate::format::index::Compression;
use crate::format::limits::Limits;

/// Bytes of the fixed part.
pub(super) const HEAD_BYTES: usize = 56;

/// The fixed part, and what follows it.
pub(super) struct File<'a> {
    pub(super) compression: Compression,
    pub(super) compressed_size: u64,
    pub(super) uncompressed_size: u64,
    pub(super) last_span_end: u64,
    pub(super) span_count: usize,
    pub(super) entry_count: usize,
    pub(super) rest: &'a [u8],
}

impl<'a> File<'a> {
    pub(super) fn open(content: &'a [u8], limits: &Limits) -> Result<Self, CompactError> {
        let short = || CompactError::Frame { reason: "it has no whole header".to_owned() };
        let (head, rest) = content.split_at_checked(HEAD_BYTES).ok_or_else(short)?;
        let found = head.get(..8).unwrap_or_default();
        if found != TOC_MAGIC {
            return Err(CompactError::Magic { found: found.escape_ascii().to_string() });
        }
        let version = u16::from_le_bytes([head[8], head[9]]);
        if version != VERSION {
            return Err(CompactError::Version { found: version });
        }
        let compression = match head[10] {
            0 => Compression::None,
            1 => Compression::Gzip,
            _ => return Err(CompactError::Frame { reason: "it names no compression that is known".to_owned() }),
        };
        let number =
            |at: usize| head.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_le_bytes);
        let count = |what, at, limit: usize| {
            let found = number(at);
            let fits = usize::try_from(found).ok().filter(|found| *found <= limit);
            fits.ok_or(CompactError::TooLarge { what, found, limit: limit as u64 })
        };
        Ok(Self {
            compression,
            compressed_size: number(16),
            uncompressed_size: number(24),
            last_span_end: number(32),
            span_count: count("spans", 40, limits.spans_max)?,
            entry_count: count("entries", 48, limits.entries_max)?,
            rest,
        })
    }

    pub(super) fn column(&mut self, column: Column) -> Result<Reader<'a>, CompactError> {
        let fault = |what| CompactError::Column { column, entry: None, what };
        let (length, rest) = self.rest.split_at_checked(8).ok_or_else(|| fault("it is missing"))?;
        let length = length.try_into().map_or(0, u64::from_le_bytes);
        let length = usize::try_from(length).map_err(|_| fault("it is longer than the file"))?;
        let (bytes, rest) = rest.split_at_checked(length).ok_or_else(|| fault("it is longer than the file"))?;
        self.rest = rest;
        Ok(Reader::new(column, bytes))
    }
}
