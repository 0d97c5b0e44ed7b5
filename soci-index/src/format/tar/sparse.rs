//! Sparse maps: which parts of a file are stored, in GNU's four ways of saying so.
//!
//! | format | where the map is |
//! |---|---|
//! | old GNU (type `S`) | four pairs in the header, then extension blocks of 21 pairs |
//! | PAX 0.0 and 0.1 | record `GNU.sparse.map`: `offset,length,offset,length,...` |
//! | PAX 1.0 | decimal lines in whole blocks before the data |
//!
//! A map is accepted only if its parts ascend, do not overlap and end within the file, and together are as long as the
//! stored data.

use crate::format::entry::Piece;
use crate::format::tar::header::{self, BLOCK};
use crate::format::tar::pax::{self, Records};

/// Offset and length of one stored part, in file order.
pub(super) type Map = Vec<(u64, u64)>;

/// How an entry's records describe a sparse file.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Declared {
    /// Not at all.
    No,
    Map(Map),
    /// The map stands before the data (format 1.0).
    InData,
}

/// What PAX records say; `None` when they are malformed.
pub(super) fn declared(records: &Records) -> Option<Declared> {
    let version = (pax::find(records, b"GNU.sparse.major"), pax::find(records, b"GNU.sparse.minor"));
    match version {
        (Some(b"1"), Some(b"0")) => return Some(Declared::InData),
        (Some(b"0"), Some(b"0" | b"1")) => {}
        (None, None) if pax::find(records, pax::SPARSE_MAP).is_some() => {}
        _ => return Some(Declared::No),
    }
    let mut numbers = Vec::new();
    for number in pax::find(records, pax::SPARSE_MAP).unwrap_or_default().split(|byte| *byte == b',') {
        if !number.is_empty() {
            numbers.push(u64::try_from(pax::integer(number)?).ok()?);
        }
    }
    let count = usize::try_from(pax::integer(pax::find(records, b"GNU.sparse.numblocks")?)?).ok()?;
    pairs(&numbers).filter(|map| map.len() == count).map(Declared::Map)
}

/// Name and size that a sparse file's records give in place of the header's.
pub(super) fn renamed(records: &Records) -> (Option<&[u8]>, Option<&[u8]>) {
    let size = pax::find(records, b"GNU.sparse.size").or_else(|| pax::find(records, b"GNU.sparse.realsize"));
    (pax::find(records, b"GNU.sparse.name"), size)
}

/// The map of an old GNU header, whether extension blocks follow, and the size of the file.
pub(super) fn old_header(block: &[u8; BLOCK]) -> Option<(Map, bool, u64)> {
    let map = old_pairs(&block[386..482])?;
    let size = u64::try_from(header::number(&block[483..495], "").ok()?).ok()?;
    Some((map, block[482] != 0, size))
}

/// The map of an old GNU extension block, and whether another one follows.
pub(super) fn old_extension(block: &[u8; BLOCK]) -> Option<(Map, bool)> {
    Some((old_pairs(&block[..504])?, block[504] != 0))
}

fn old_pairs(fields: &[u8]) -> Option<Map> {
    let mut map = Map::new();
    for pair in fields.chunks_exact(24) {
        // The first empty pair ends the list.
        if pair[0] == 0 {
            break;
        }
        let number = |field: &[u8]| u64::try_from(header::number(field, "").ok()?).ok();
        map.push((number(&pair[..12])?, number(&pair[12..])?));
    }
    Some(map)
}

/// A format 1.0 map that comes in blocks: a count, then so many pairs, one decimal number per line.
#[derive(Debug, Default)]
pub(super) struct InData {
    line: Vec<u8>,
    numbers: Vec<u64>,
}

impl InData {
    /// Takes the next block; the map when it is complete. `Err` when the lines are malformed or `pieces_max` is passed.
    pub(super) fn block(&mut self, block: &[u8], pieces_max: usize) -> Result<Option<Map>, ()> {
        for byte in block {
            if *byte != b'\n' {
                self.line.push(*byte);
                // More digits than any 64-bit number has.
                if self.line.len() > 20 {
                    return Err(());
                }
                continue;
            }
            let number = pax::integer(&self.line).and_then(|number| u64::try_from(number).ok()).ok_or(())?;
            self.line.clear();
            self.numbers.push(number);
            let count = usize::try_from(self.numbers[0]).ok().filter(|count| *count <= pieces_max).ok_or(())?;
            if self.numbers.len() == 1 + 2 * count {
                return pairs(&self.numbers[1..]).map(Some).ok_or(());
            }
        }
        Ok(None)
    }
}

fn pairs(numbers: &[u64]) -> Option<Map> {
    numbers.len().is_multiple_of(2).then(|| numbers.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect())
}

/// Places the parts in the layer, behind one another from `data_offset` on. `None` unless the map is sound: ascending,
/// within `size`, and `stored` bytes long.
pub(super) fn place(map: &Map, size: u64, stored: u64, data_offset: u64) -> Option<Box<[Piece]>> {
    let (mut file_end, mut used) = (0, 0);
    let mut pieces = Vec::with_capacity(map.len());
    for &(file_offset, length) in map {
        let end = file_offset.checked_add(length)?;
        if file_offset < file_end || end > size {
            return None;
        }
        if length > 0 {
            pieces.push(Piece { file_offset, data_offset: data_offset.checked_add(used)?, length });
        }
        file_end = end;
        used += length;
    }
    (used == stored).then(|| pieces.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_are_checked() {
        assert!(place(&vec![(0, 5), (5, 5)], 10, 10, 512).is_some());
        assert!(place(&vec![(5, 0)], 5, 0, 512).is_some_and(|pieces| pieces.is_empty()));
        for bad in [vec![(0, 6), (5, 5)], vec![(0, 11)], vec![(0, 5)], vec![(u64::MAX, 2)], vec![(5, 5), (0, 5)]] {
            assert!(place(&bad, 10, 10, 512).is_none(), "{bad:?}");
        }
    }

    #[test]
    fn map_in_data() {
        let text = b"2\n0\n5\n100\n7\n";
        let mut whole = InData::default();
        assert_eq!(whole.block(text, 10), Ok(Some(vec![(0, 5), (100, 7)])));
        let mut pieces = InData::default();
        assert_eq!(pieces.block(&text[..6], 10), Ok(None));
        assert_eq!(pieces.block(&text[6..], 10), Ok(Some(vec![(0, 5), (100, 7)])));
        assert_eq!(InData::default().block(text, 1), Err(()));
        assert_eq!(InData::default().block(b"x\n", 1), Err(()));
        assert_eq!(InData::default().block(b"111111111111111111111111", 1), Err(()));
        assert_eq!(InData::default().block(b"0\n", 1), Ok(Some(vec![])));
    }
}
