//! Files of a layer: their bytes are a range of the layer, or several for a sparse file, behind a header to be checked.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use soci_index::format::entry::{Entry, Piece};
use soci_index::format::tar::check_header;

use crate::layer::reader::LayerReader;
use crate::layer::reader::error::{Cause, ReadError};

/// One bit per entry: its header in the layer was compared with the index.
#[derive(Debug)]
pub(super) struct Headers(Box<[AtomicU64]>);

impl Headers {
    pub(super) fn new(entries: usize) -> Self {
        Self((0..entries.div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }

    fn is_checked(&self, number: u32) -> bool {
        let word = self.0.get(number as usize / 64);
        word.is_some_and(|word| word.load(Ordering::Relaxed) & (1 << (number % 64)) != 0)
    }

    fn note_checked(&self, number: u32) {
        if let Some(word) = self.0.get(number as usize / 64) {
            word.fetch_or(1 << (number % 64), Ordering::Relaxed);
        }
    }
}

impl LayerReader {
    /// Reads at most `length` bytes of the file that entry `number` describes, from `offset` on, if no network is
    /// needed; `false` if it is. What `buffer` held is replaced.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn try_read_file(
        &self,
        number: u32,
        offset: u64,
        length: usize,
        buffer: &mut Vec<u8>,
    ) -> Result<bool, ReadError> {
        let entry = self.entry(number)?;
        let file = extent(entry);
        if !self.parts.headers.is_checked(number) {
            // Headers are small, and when the file is present its header mostly is too.
            let mut header = vec![0; header_length(entry)];
            if !self.try_read_into(entry.header_offset, &mut header, &file)? {
                return Ok(false);
            }
            self.check(number, entry, &header)?;
        }
        // What an earlier read has left is overwritten, unless there are holes: to clear it first would cost a quarter
        // of what copying costs.
        buffer.resize(readable(entry, offset, length), 0);
        if entry.sparse().is_some() {
            buffer.fill(0);
        }
        for (piece, at) in pieces(entry, offset, buffer.len()) {
            let part = &mut buffer[at..at + usize::try_from(piece.length).unwrap_or(0)];
            if !self.try_read_into(piece.data_offset, part, &file).map_err(|error| named(error, entry))? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Reads at most `length` bytes of the file that entry `number` describes, from `offset` on.
    ///
    /// # Errors
    /// [`ReadError`], at the latest after the read deadline.
    pub async fn read_file(&self, number: u32, offset: u64, length: usize) -> Result<Vec<u8>, ReadError> {
        let deadline = self.deadline();
        let entry = self.entry(number)?;
        let file = extent(entry);
        let mut buffer = vec![0; readable(entry, offset, length)];
        if !self.parts.headers.is_checked(number) {
            let mut header = vec![0; header_length(entry)];
            let read = self.read_into(entry.header_offset, &mut header, &file, deadline).await;
            read.map_err(|error| named(error, entry))?;
            self.check(number, entry, &header)?;
        }
        for (piece, at) in pieces(entry, offset, buffer.len()) {
            let part = &mut buffer[at..at + usize::try_from(piece.length).unwrap_or(0)];
            let read = self.read_into(piece.data_offset, part, &file, deadline).await;
            read.map_err(|error| named(error, entry))?;
        }
        Ok(buffer)
    }

    fn check(&self, number: u32, entry: &Entry, header: &[u8]) -> Result<(), ReadError> {
        if let Err(mismatch) = check_header(entry, header) {
            let error = self.health().failed(None, entry.header_offset, Cause::Header(mismatch));
            return Err(named(error, entry));
        }
        self.parts.headers.note_checked(number);
        Ok(())
    }
}

fn named(error: ReadError, entry: &Entry) -> ReadError {
    ReadError { file: Some(String::from_utf8_lossy(&entry.name).into_owned()), ..error }
}

/// The bytes of the layer that a file lies in, its header included.
fn extent(entry: &Entry) -> Range<u64> {
    let end = match entry.sparse() {
        Some(pieces) => pieces.last().map_or(entry.data_offset, |piece| piece.data_offset.saturating_add(piece.length)),
        None => entry.data_offset.saturating_add(entry.size),
    };
    entry.header_offset..end.max(entry.header_offset)
}

fn header_length(entry: &Entry) -> usize {
    // The index bounds both offsets by the layer and a header by Limits::extended_header_bytes_max.
    usize::try_from(entry.data_offset.saturating_sub(entry.header_offset)).unwrap_or(0)
}

/// How many bytes a read yields: up to the end of the file.
fn readable(entry: &Entry, offset: u64, length: usize) -> usize {
    usize::try_from(entry.size.saturating_sub(offset)).map_or(length, |rest| rest.min(length))
}

/// The stored pieces of a file's range, each with its place in the buffer. What is between them is zero.
fn pieces(entry: &Entry, offset: u64, length: usize) -> Vec<(Piece, usize)> {
    let end = offset + length as u64;
    let whole = [Piece { file_offset: 0, data_offset: entry.data_offset, length: entry.size }];
    let all = entry.sparse().unwrap_or(&whole);
    let clipped = all.iter().filter_map(|piece| {
        let start = piece.file_offset.max(offset);
        let stop = piece.file_offset.saturating_add(piece.length).min(end);
        if start >= stop {
            return None;
        }
        let data_offset = piece.data_offset + (start - piece.file_offset);
        let at = usize::try_from(start - offset).ok()?;
        Some((Piece { file_offset: start, data_offset, length: stop - start }, at))
    });
    clipped.collect()
}

#[cfg(test)]
mod tests {
    use soci_index::format::entry::{EntryKind, Extra};

    use super::*;
    use crate::tree::tests::entry;

    #[test]
    fn sparse_ranges() {
        let mut file = entry("sparse", EntryKind::Regular, "", 0);
        file.size = 1000;
        let piece = |file_offset, data_offset, length| Piece { file_offset, data_offset, length };
        let sparse = Some(vec![piece(100, 5000, 50), piece(500, 5050, 100)].into());
        file.extra = Some(Box::new(Extra { sparse, ..Extra::default() }));
        for (offset, length, expected) in [
            (0, 100, vec![]),
            (0, 1000, vec![(piece(100, 5000, 50), 100), (piece(500, 5050, 100), 500)]),
            (120, 10, vec![(piece(120, 5020, 10), 0)]),
            (140, 400, vec![(piece(140, 5040, 10), 0), (piece(500, 5050, 40), 360)]),
            (600, 400, vec![]),
        ] {
            assert_eq!(pieces(&file, offset, length), expected, "{offset}+{length}");
        }
        assert_eq!((readable(&file, 990, 100), readable(&file, 1000, 5), readable(&file, 2000, 5)), (10, 0, 0));
    }
}
