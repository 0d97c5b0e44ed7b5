//! Random access: any range of any file of a layer, from its index and whatever can read ranges of its blob.
//!
//! No cache beyond the span decoded last, no read-ahead, no thread: those belong to `soci-fs`. This is the plain form,
//! for tools and tests, with all the checks: every span's digest and end, and the file's own tar header.

use std::ops::Range;

use bytes::Bytes;

use crate::format::decode::{DecodeError, decode_span};
use crate::format::entry::{Entry, EntryKind};
use crate::format::index::LayerIndex;
use crate::format::span::SpanId;
use crate::format::tar::{HeaderMismatch, check_header};

/// Why a range could not be read.
#[derive(Debug, thiserror::Error)]
pub enum AccessError<E> {
    /// The compressed bytes could not be obtained.
    #[error("bytes {start}..{end} of the layer could not be read: {source}")]
    Fetch { start: u64, end: u64, source: E },
    /// They are not what the index says.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// The layer's own header of the file is not what the index says.
    #[error(transparent)]
    Header(#[from] HeaderMismatch),
    /// The entry has no data.
    #[error("{name:?} is not a regular file")]
    NotAFile { name: String },
}

/// Reads files of one layer. `F` gets ranges of the layer blob and returns exactly their bytes.
#[derive(Debug)]
pub struct LayerReader<'i, F> {
    index: &'i LayerIndex,
    fetch: F,
    last: Option<(SpanId, Vec<u8>)>,
}

impl<'i, E, F: FnMut(Range<u64>) -> Result<Bytes, E>> LayerReader<'i, F> {
    /// A reader.
    #[must_use]
    pub const fn new(index: &'i LayerIndex, fetch: F) -> Self {
        Self { index, fetch, last: None }
    }

    /// Hands the bytes `range` of a file to `output`, piece by piece. A range that goes past the file's end is cut.
    ///
    /// # Errors
    /// [`AccessError`]. Bytes handed over before the error are right.
    pub fn read_file(
        &mut self,
        entry: &Entry,
        range: Range<u64>,
        output: &mut dyn FnMut(&[u8]),
    ) -> Result<(), AccessError<E>> {
        if entry.kind != EntryKind::Regular {
            return Err(AccessError::NotAFile { name: String::from_utf8_lossy(&entry.name).into_owned() });
        }
        let mut header = Vec::new();
        self.read_layer(entry.header_offset..entry.data_offset, &mut |piece| header.extend_from_slice(piece))?;
        check_header(entry, &header)?;
        let range = range.start.min(entry.size)..range.end.min(entry.size);
        let Some(pieces) = entry.sparse() else {
            return self.read_layer(entry.data_offset + range.start..entry.data_offset + range.end, output);
        };
        let mut at = range.start;
        for piece in pieces {
            let start = piece.file_offset.clamp(at, range.end);
            zeros(start - at, output);
            let end = (piece.file_offset + piece.length).clamp(start, range.end);
            let skipped = start - piece.file_offset.min(start);
            let data = piece.data_offset + skipped;
            self.read_layer(data..data + (end - start), output)?;
            at = end;
        }
        zeros(range.end.saturating_sub(at), output);
        Ok(())
    }

    /// Hands the bytes `range` of the uncompressed layer to `output`. What lies past the indexed end is left out.
    ///
    /// # Errors
    /// [`AccessError`].
    pub fn read_layer(&mut self, range: Range<u64>, output: &mut dyn FnMut(&[u8])) -> Result<(), AccessError<E>> {
        for id in self.index.spans.covering(range.clone()) {
            let decoded = match self.last.take() {
                Some((last, decoded)) if last == id => decoded,
                _ => self.decode(id)?,
            };
            let (_, decoded) = self.last.insert((id, decoded));
            let Some(span) = self.index.spans.span(id) else { continue };
            let start = range.start.max(span.uncompressed.start) - span.uncompressed.start;
            let end = range.end.min(span.uncompressed.end) - span.uncompressed.start;
            // The decoder has checked the length of what it yields against the span.
            let within = |offset: u64| usize::try_from(offset).unwrap_or(usize::MAX).min(decoded.len());
            output(&decoded[within(start)..within(end)]);
        }
        Ok(())
    }

    fn decode(&mut self, id: SpanId) -> Result<Vec<u8>, AccessError<E>> {
        let no_such = DecodeError::NoSuchSpan { span: id, count: self.index.spans.len() };
        let range = self.index.spans.span(id).ok_or(no_such)?.compressed.clone();
        let (start, end) = (range.start, range.end);
        let compressed = (self.fetch)(range).map_err(|source| AccessError::Fetch { start, end, source })?;
        Ok(decode_span(self.index, id, &compressed)?)
    }
}

fn zeros(mut count: u64, output: &mut dyn FnMut(&[u8])) {
    const ZEROS: [u8; 4096] = [0; 4096];
    while count > 0 {
        let length = count.min(4096);
        output(&ZEROS[..usize::try_from(length).unwrap_or(4096)]);
        count -= length;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::entry::{Extra, Piece};
    use crate::format::index::Compression;
    use crate::format::limits::Limits;
    use crate::indexing::{Options, index_bytes};

    fn header(name: &str, flag: u8, size: usize) -> Vec<u8> {
        let mut block = vec![0; 512];
        block[..name.len()].copy_from_slice(name.as_bytes());
        block[124..135].copy_from_slice(format!("{size:011o}").as_bytes());
        block[156] = flag;
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..154].copy_from_slice(format!("{sum:06o}").as_bytes());
        block
    }

    /// A directory, and a file of 700 bytes that begins in the third block.
    fn tar() -> Vec<u8> {
        let mut tar = [header("d/", b'5', 0), header("d/f", b'0', 700)].concat();
        tar.extend((0..700u32).map(|n| (n % 251) as u8));
        tar.resize(4096, 0);
        tar
    }

    fn index(tar: &[u8]) -> LayerIndex {
        let options =
            Options { compression: Compression::None, span_bytes: 100, compact: None, limits: Limits::DEFAULT };
        index_bytes(tar, options).unwrap().index
    }

    type Outcome = Result<Vec<u8>, AccessError<&'static str>>;

    fn read(index: &LayerIndex, tar: &[u8], entry: &Entry, range: Range<u64>) -> Outcome {
        let fetch = |range: Range<u64>| {
            let range = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
            tar.get(range).map(Bytes::copy_from_slice).ok_or("past the end")
        };
        let mut output = Vec::new();
        LayerReader::new(index, fetch).read_file(entry, range, &mut |piece| output.extend_from_slice(piece))?;
        Ok(output)
    }

    #[test]
    fn ranges() {
        let tar = tar();
        let index = index(&tar);
        for (range, expected) in
            [(0..700, 0..700), (99..101, 99..101), (650..5000, 650..700), (700..800, 0..0), (5..5, 0..0)]
        {
            let content = &tar[1024..1724];
            assert_eq!(read(&index, &tar, &index.entries[1], range.clone()).unwrap(), content[expected], "{range:?}");
        }
    }

    #[test]
    fn errors() {
        let tar = tar();
        let index = index(&tar);
        assert!(matches!(read(&index, &tar, &index.entries[0], 0..1), Err(AccessError::NotAFile { .. })));
        assert!(matches!(read(&index, &tar[..1100], &index.entries[1], 0..700), Err(AccessError::Fetch { .. })));
        let mut other = tar.clone();
        other[1500] ^= 1;
        assert!(matches!(read(&index, &other, &index.entries[1], 0..700), Err(AccessError::Decode(_))));
        let renamed = Entry { name: b"d/g"[..].into(), ..index.entries[1].clone() };
        assert!(matches!(read(&index, &tar, &renamed, 0..700), Err(AccessError::Header(_))));
    }

    /// Two stored pieces in a file of 10,000 bytes: holes before, between and behind them are zeros.
    #[test]
    fn sparse_pieces() {
        let map = "2\n1000\n300\n9000\n400\n";
        let records =
            ["22 GNU.sparse.major=1\n", "22 GNU.sparse.minor=0\n", "30 GNU.sparse.realsize=010000\n"].concat();
        let mut tar = [header("x", b'x', records.len()), records.into_bytes()].concat();
        tar.resize(1024, 0);
        tar.extend(header("f", b'0', 512 + 700));
        tar.extend(map.as_bytes());
        tar.resize(2048, 0);
        tar.extend((0..700u32).map(|n| (n % 251) as u8 | 1));
        tar.resize(4096, 0);
        let index = index(&tar);
        let entry = &index.entries[0];
        let mut expected = vec![0; 10_000];
        expected[1000..1300].copy_from_slice(&tar[2048..2348]);
        expected[9000..9400].copy_from_slice(&tar[2348..2748]);
        assert_eq!(entry.size, 10_000);
        for range in [0..10_000, 0..1000, 999..1001, 1299..9001, 9100..9999, 9400..20_000, 3000..3001] {
            let (start, end) = (range.start as usize, (range.end as usize).min(10_000));
            assert_eq!(read(&index, &tar, entry, range.clone()).unwrap(), expected[start..end], "{range:?}");
        }
        // The same entry with a piece elsewhere is not the layer's own.
        let piece = Piece { file_offset: 0, data_offset: 2048, length: 700 };
        let extra = Extra { sparse: Some([piece].into()), ..*entry.extra.clone().unwrap() };
        let forged = Entry { extra: Some(Box::new(extra)), ..entry.clone() };
        assert!(matches!(read(&index, &tar, &forged, 0..10), Err(AccessError::Header(_))));
    }
}
