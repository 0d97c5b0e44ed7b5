//! A layer's bytes as a block device of 512-byte blocks, for file systems whose files are ranges of a device.
//!
//! The contents of a tar begin at multiples of 512 bytes, so the uncompressed layer itself is such a device: a file's
//! bytes stand *in place*, at the same offset as in the layer. What a block address cannot reach (contents at odd
//! offsets, as a table from elsewhere may state them; sparse files whose pieces lie across blocks; ranges that overlap)
//! is *rearranged*: it gets a region of its own behind the layer, in the order of the entries and as long as the file,
//! holes included. The road not taken is a table of the place of every file: it would cost memory for each of them,
//! and the entries say it already.
//!
//! Invariants: every byte of the device belongs to one file or is zero, so [`DeviceMap::parts`] tiles any range;
//! headers, padding and gaps are shown as zeros. A file is in place only if its bytes end before the next entry's
//! contents, so one binary search finds the only file that can own an offset. Nothing about offsets is assumed of the
//! entries: if they are not strictly ascending, all files are rearranged. Memory is 8 bytes per rearranged file.

use std::ops::Range;

use soci_index::format::class::{Class, Classified};
use soci_index::format::entry::{Entry, EntryKind, Piece};

#[cfg(test)]
mod tests;

/// Bytes of a block, and the binary logarithm of that: the unit of tar, and the smallest block of EROFS.
pub const BLOCK_BYTES: u64 = 512;
/// See [`BLOCK_BYTES`].
pub(crate) const BLOCK_BITS: u8 = 9;

/// Most blocks of a device: all have an address below the one that marks a hole.
const BLOCKS_MAX: u32 = u32::MAX;

/// Most chunks of a sparse file in place: 8 KiB of addresses. A file with finer pieces is rearranged.
const CHUNKS_MAX: u64 = 1024;

/// Largest chunk that EROFS knows, as a binary logarithm of blocks: 1 TiB.
const CHUNK_BITS_MAX: u8 = 31;

/// Why a layer cannot be a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// The layer and its rearranged files need more blocks than 32 bits can count (2 TiB).
    #[error("as a block device the layer has more than {limit} blocks")]
    TooLarge { limit: u32 },
    /// More entries than 32 bits can number.
    #[error("the layer has {entries} entries, more than can be numbered")]
    TooManyEntries { entries: usize },
}

impl Classified for DeviceError {
    fn class(&self) -> Class {
        Class::Content
    }
}

/// Where each byte of a layer's device comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceMap {
    /// Size of the uncompressed layer in bytes.
    layer_bytes: u64,
    /// All blocks: those of the layer and those of the rearranged files.
    blocks: u32,
    /// Whether the entries' contents are in order, so that a binary search finds what is in place.
    is_sorted: bool,
    /// Ascending in both fields.
    rearranged: Vec<Rearranged>,
}

/// A file behind the layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rearranged {
    entry: u32,
    /// First block of its region.
    first: u32,
}

/// A piece of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Bytes of a file: `length` of them, at `offset` in the file of the entry with this position. Holes of a
    /// rearranged sparse file are among its bytes.
    File { entry: u32, offset: u64, length: u64 },
    /// Zeros.
    Zeros { length: u64 },
}

impl Part {
    /// How many bytes of the device it is, never 0.
    #[must_use]
    pub const fn length(&self) -> u64 {
        match *self {
            Self::File { length, .. } | Self::Zeros { length } => length,
        }
    }
}

impl DeviceMap {
    /// The device of a layer of `uncompressed_size` bytes with these entries.
    ///
    /// # Errors
    /// [`DeviceError::TooLarge`] when it has more than 2^32 - 1 blocks, [`DeviceError::TooManyEntries`] when the
    /// entries cannot be numbered.
    pub fn of_layer(entries: &[Entry], uncompressed_size: u64) -> Result<Self, DeviceError> {
        if u32::try_from(entries.len()).is_err() {
            return Err(DeviceError::TooManyEntries { entries: entries.len() });
        }
        let is_sorted = entries.windows(2).all(|pair| pair[0].data_offset < pair[1].data_offset);
        let mut blocks = uncompressed_size.div_ceil(BLOCK_BYTES);
        let mut rearranged = Vec::new();
        for (number, entry) in (0_u32..).zip(entries).filter(|(_, entry)| has_data(entry)) {
            let next = entries.get(number as usize + 1).map_or(u64::MAX, |entry| entry.data_offset);
            if !(is_sorted && is_in_place(entry, next.min(uncompressed_size))) {
                rearranged.push(Rearranged { entry: number, first: counted(blocks)? });
                blocks = u64::from(counted(blocks)?) + entry.size.div_ceil(BLOCK_BYTES);
            }
        }
        rearranged.shrink_to_fit();
        Ok(Self { layer_bytes: uncompressed_size, blocks: counted(blocks)?, is_sorted, rearranged })
    }

    /// Size of the device: a multiple of 512. A file that serves as the device is no shorter.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.blocks as u64 * BLOCK_BYTES
    }

    /// Number of blocks of 512 bytes.
    #[must_use]
    pub const fn blocks(&self) -> u32 {
        self.blocks
    }

    /// Whether the uncompressed layer itself serves as the device: all files are in place, and it ends with a block, as
    /// tars do (the kernel refuses to read a block that is not there as a whole). What is zero here belongs to no file
    /// there.
    #[must_use]
    pub const fn is_plain(&self) -> bool {
        self.rearranged.is_empty() && self.layer_bytes.is_multiple_of(BLOCK_BYTES)
    }

    /// Where the bytes of a file are: entry `number` of the same entries that the map was made of. `None` if it is no
    /// regular file, or an empty one.
    #[must_use]
    pub fn chunks<'e>(&self, entries: &'e [Entry], number: u32) -> Option<Chunks<'e>> {
        let entry = entries.get(number as usize).filter(|entry| has_data(entry))?;
        let run = |first| Chunks { bits: covering(entry.size), size: entry.size, next: 0, place: Place::Run { first } };
        if let Some(first) = self.rearranged(number) {
            return Some(run(first));
        }
        let Some(pieces) = entry.sparse() else {
            return Some(run(u32::try_from(entry.data_offset / BLOCK_BYTES).ok()?));
        };
        Some(Chunks { bits: piece_bits(entry, pieces)?, size: entry.size, next: 0, place: Place::Pieces(pieces) })
    }

    /// What the device holds from `offset` on, `length` bytes of it, as far as it goes: without a gap, in order, no
    /// part empty. `entries` are those that the map was made of.
    #[must_use]
    pub fn parts<'e>(&'e self, entries: &'e [Entry], offset: u64, length: u64) -> Parts<'e> {
        let end = offset.saturating_add(length).min(self.bytes());
        Parts { map: self, entries, position: offset.min(end), end }
    }

    /// First block of a rearranged file's region.
    fn rearranged(&self, number: u32) -> Option<u32> {
        let found = self.rearranged.binary_search_by_key(&number, |file| file.entry).ok()?;
        Some(self.rearranged[found].first)
    }

    /// What stands at `position`, and as far as that goes.
    fn segment(&self, entries: &[Entry], position: u64) -> Segment {
        let layer_end = self.layer_bytes.next_multiple_of(BLOCK_BYTES);
        if position >= layer_end {
            return self.rearranged_segment(entries, position);
        }
        if !self.is_sorted {
            return Segment { file: None, end: layer_end };
        }
        let behind = entries.partition_point(|entry| entry.data_offset <= position);
        let gap_end = entries.get(behind).map_or(layer_end, |entry| entry.data_offset.min(layer_end));
        let gap = Segment { file: None, end: gap_end };
        let number = behind.checked_sub(1).and_then(|at| u32::try_from(at).ok());
        let found = number.and_then(|number| Some((number, entries.get(number as usize)?)));
        let Some((number, entry)) =
            found.filter(|(number, entry)| has_data(entry) && self.rearranged(*number).is_none())
        else {
            return gap;
        };
        let Some(pieces) = entry.sparse() else {
            return within(number, position, entry.data_offset..entry.data_offset.saturating_add(entry.size), 0, gap);
        };
        let behind = pieces.partition_point(|piece| piece.data_offset <= position);
        let gap =
            Segment { file: None, end: pieces.get(behind).map_or(gap_end, |piece| piece.data_offset.min(gap_end)) };
        behind.checked_sub(1).and_then(|at| pieces.get(at)).map_or(gap, |piece| {
            let range = piece.data_offset..piece.data_offset.saturating_add(piece.length);
            within(number, position, range, piece.file_offset, gap)
        })
    }

    fn rearranged_segment(&self, entries: &[Entry], position: u64) -> Segment {
        let start = |file: &Rearranged| u64::from(file.first) * BLOCK_BYTES;
        let behind = self.rearranged.partition_point(|file| start(file) <= position);
        let end = self.rearranged.get(behind).map_or(self.bytes(), start);
        let gap = Segment { file: None, end };
        let found = behind.checked_sub(1).and_then(|at| self.rearranged.get(at));
        let Some((file, entry)) = found.and_then(|file| Some((file, entries.get(file.entry as usize)?))) else {
            return gap;
        };
        within(file.entry, position, start(file)..start(file).saturating_add(entry.size), 0, gap)
    }
}

/// What stands at a position of the device: a file and the offset in it, or zeros; and where that ends.
#[derive(Debug, Clone, Copy)]
struct Segment {
    file: Option<(u32, u64)>,
    end: u64,
}

/// The file's bytes if `range` of the device, which begins at `file_offset` of the file, has the position; else the gap.
fn within(entry: u32, position: u64, range: Range<u64>, file_offset: u64, gap: Segment) -> Segment {
    if range.contains(&position) {
        Segment { file: Some((entry, file_offset.saturating_add(position - range.start))), end: range.end.min(gap.end) }
    } else {
        gap
    }
}

/// What a range of a device holds; see [`DeviceMap::parts`].
#[derive(Debug, Clone)]
pub struct Parts<'e> {
    map: &'e DeviceMap,
    entries: &'e [Entry],
    position: u64,
    end: u64,
}

impl Iterator for Parts<'_> {
    type Item = Part;

    fn next(&mut self) -> Option<Part> {
        let start = self.position;
        while self.position < self.end {
            let segment = self.map.segment(self.entries, self.position);
            // Goes on whatever the entries are, even others than the map was made of.
            let end = segment.end.max(self.position + 1).min(self.end);
            if let Some((entry, offset)) = segment.file {
                if self.position > start {
                    break;
                }
                self.position = end;
                return Some(Part::File { entry, offset, length: self.position - start });
            }
            self.position = end;
        }
        (self.position > start).then(|| Part::Zeros { length: self.position - start })
    }
}

/// The chunks of a file in order: the first block of each, `None` for a hole. All but the last are equally long.
#[derive(Debug, Clone)]
pub struct Chunks<'e> {
    bits: u8,
    /// Size of the file in bytes.
    size: u64,
    next: u32,
    place: Place<'e>,
}

#[derive(Debug, Clone)]
enum Place<'e> {
    /// One run of blocks.
    Run { first: u32 },
    /// Pieces that begin and end where chunks do.
    Pieces(&'e [Piece]),
}

impl Chunks<'_> {
    /// Blocks of a chunk, as a binary logarithm: at most 31.
    #[must_use]
    pub const fn bits(&self) -> u8 {
        self.bits
    }

    /// How many chunks the file has.
    #[must_use]
    pub fn chunk_count(&self) -> u32 {
        // At most 2^32 blocks, or CHUNKS_MAX.
        u32::try_from(self.size.div_ceil(self.chunk_bytes())).unwrap_or(u32::MAX)
    }

    const fn chunk_bytes(&self) -> u64 {
        BLOCK_BYTES << self.bits
    }
}

impl Iterator for Chunks<'_> {
    type Item = Option<u32>;

    fn next(&mut self) -> Option<Self::Item> {
        let number = self.next;
        if number >= self.chunk_count() {
            return None;
        }
        self.next += 1;
        let offset = u64::from(number) * self.chunk_bytes();
        Some(match self.place {
            Place::Run { first } => u32::try_from(u64::from(first) + offset / BLOCK_BYTES).ok(),
            Place::Pieces(pieces) => {
                let behind = pieces.partition_point(|piece| piece.file_offset <= offset);
                let piece = behind.checked_sub(1).and_then(|at| pieces.get(at));
                let piece = piece.filter(|piece| offset - piece.file_offset < piece.length);
                let start = piece.map(|piece| piece.data_offset.saturating_add(offset - piece.file_offset));
                start.and_then(|start| u32::try_from(start / BLOCK_BYTES).ok())
            }
        })
    }
}

/// Whether an entry has bytes to show.
fn has_data(entry: &Entry) -> bool {
    entry.kind == EntryKind::Regular && entry.size > 0
}

/// Whether an entry's bytes can be addressed where they stand in the layer, all before `limit`.
fn is_in_place(entry: &Entry, limit: u64) -> bool {
    match entry.sparse() {
        None => {
            let end = entry.data_offset.checked_add(entry.size);
            entry.data_offset.is_multiple_of(BLOCK_BYTES) && end.is_some_and(|end| end <= limit)
        }
        Some(pieces) => pieces_fit(entry, pieces, limit) && piece_bits(entry, pieces).is_some(),
    }
}

/// Whether the pieces are in order in the file and in the layer, inside of both, and begin at blocks.
fn pieces_fit(entry: &Entry, pieces: &[Piece], limit: u64) -> bool {
    let (mut file_end, mut data_end) = (0, entry.data_offset);
    pieces.iter().all(|piece| {
        let fits = piece.file_offset >= file_end
            && piece.data_offset >= data_end
            && (piece.length == 0 || piece.data_offset.is_multiple_of(BLOCK_BYTES));
        let ends = piece.file_offset.checked_add(piece.length).zip(piece.data_offset.checked_add(piece.length));
        let Some(ends) = ends else { return false };
        (file_end, data_end) = ends;
        fits && file_end <= entry.size && data_end <= limit
    })
}

/// The largest chunk at whose multiples all pieces begin and end, as a binary logarithm of blocks; `None` if that is
/// less than a block, or the file would need too many of them. The end of the file is an end for a chunk, too.
fn piece_bits(entry: &Entry, pieces: &[Piece]) -> Option<u8> {
    let ends = pieces.iter().filter(|piece| piece.length > 0).flat_map(|piece| {
        let end = piece.file_offset.saturating_add(piece.length);
        [piece.file_offset, if end == entry.size { 0 } else { end }]
    });
    let zeros = ends.fold(0, |all, end| all | end).trailing_zeros();
    let bits = u8::try_from(zeros).unwrap_or(u8::MAX).checked_sub(BLOCK_BITS)?.min(covering(entry.size));
    (entry.size.div_ceil(BLOCK_BYTES << bits) <= CHUNKS_MAX).then_some(bits)
}

/// The smallest chunk that holds a file of `size` bytes, as a binary logarithm of blocks, and at most the largest.
fn covering(size: u64) -> u8 {
    let blocks = size.div_ceil(BLOCK_BYTES).max(1);
    let bits = u64::BITS - (blocks - 1).leading_zeros();
    u8::try_from(bits).unwrap_or(CHUNK_BITS_MAX).min(CHUNK_BITS_MAX)
}

fn counted(blocks: u64) -> Result<u32, DeviceError> {
    u32::try_from(blocks).map_err(|_| DeviceError::TooLarge { limit: BLOCKS_MAX })
}
