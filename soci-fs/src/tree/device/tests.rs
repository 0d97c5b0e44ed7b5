//! Maps of made-up layers: where files are, and what a range of the device holds.

use proptest::prelude::*;
use soci_index::format::entry::Extra;

use super::*;
use crate::tree::tests::entry;

/// A regular file whose bytes stand at `data_offset`.
fn file(data_offset: u64, size: u64) -> Entry {
    Entry { data_offset, size, ..entry("f", EntryKind::Regular, "", 0) }
}

/// A sparse file of `size` bytes with pieces (offset in the file, offset in the layer, length).
fn sparse(data_offset: u64, size: u64, pieces: &[(u64, u64, u64)]) -> Entry {
    let piece = |&(file_offset, data_offset, length): &_| Piece { file_offset, data_offset, length };
    let extra = Extra { sparse: Some(pieces.iter().map(piece).collect()), ..Extra::default() };
    Entry { extra: Some(Box::new(extra)), ..file(data_offset, size) }
}

/// The chunks of a file: binary logarithm of their blocks, and the first block of each.
fn chunks(entries: &[Entry], map: &DeviceMap, number: u32) -> (u8, Vec<Option<u32>>) {
    let chunks = map.chunks(entries, number).unwrap();
    let (bits, count) = (chunks.bits(), chunks.chunk_count());
    let starts: Vec<_> = chunks.collect();
    assert_eq!(starts.len(), count as usize);
    (bits, starts)
}

/// Parts as text: `3@0+5` is five bytes from the start of entry 3, `+7` seven zeros.
fn parts(entries: &[Entry], map: &DeviceMap, offset: u64, length: u64) -> String {
    let show = |part| match part {
        Part::File { entry, offset, length } => format!("{entry}@{offset}+{length}"),
        Part::Zeros { length } => format!("+{length}"),
    };
    map.parts(entries, offset, length).map(show).collect::<Vec<_>>().join(" ")
}

#[test]
fn files_in_place() {
    let directory = Entry { data_offset: 512, ..entry("d", EntryKind::Directory, "", 0) };
    let entries = [directory, file(1024, 700), file(2560, 0), file(3072, 512), file(4096, 3)];
    let map = DeviceMap::of_layer(&entries, 5200).unwrap();
    // The last block is not whole in the layer.
    assert!(!map.is_plain() && DeviceMap::of_layer(&entries, 5632).unwrap().is_plain());
    assert_eq!((map.bytes(), map.blocks()), (5632, 11));
    assert_eq!(parts(&entries, &map, 0, u64::MAX), "+1024 1@0+700 +1348 3@0+512 +512 4@0+3 +1533");
    assert_eq!(chunks(&entries, &map, 1), (1, vec![Some(2)]));
    assert_eq!(chunks(&entries, &map, 3), (0, vec![Some(6)]));
    assert!(map.chunks(&entries, 0).is_none() && map.chunks(&entries, 2).is_none());
    assert!(map.chunks(&entries, 5).is_none());
}

#[test]
fn reads_at_boundaries() {
    let entries = [file(512, 512), file(1536, 100)];
    let map = DeviceMap::of_layer(&entries, 2048).unwrap();
    for (offset, length, expected) in [
        (0, 0, ""),
        (0, 512, "+512"),
        (511, 2, "+1 0@0+1"),
        (512, 512, "0@0+512"),
        (600, 1, "0@88+1"),
        (1023, 2, "0@511+1 +1"),
        (1024, 512, "+512"),
        (1635, 1, "1@99+1"),
        (1636, 1, "+1"),
        (2047, 100, "+1"),
        (2048, 1, ""),
        (u64::MAX, u64::MAX, ""),
    ] {
        assert_eq!(parts(&entries, &map, offset, length), expected, "{offset}+{length}");
    }
}

/// What block addresses cannot reach stands behind the layer.
#[test]
fn rearranged_files() {
    for (entries, size, expected) in [
        // At an odd offset.
        (vec![file(513, 600), file(2048, 10)], 2560, "+2048 1@0+10 +502 0@0+600 +424"),
        // Over the next entry's contents, or the end of the layer.
        (vec![file(512, 600), file(1024, 10)], 1536, "+1024 1@0+10 +502 0@0+600 +424"),
        (vec![file(512, 600)], 1024, "+1024 0@0+600 +424"),
        (vec![file(1 << 40, 1)], 0, "0@0+1 +511"),
        // Not in order: none is in place.
        (vec![file(1024, 10), file(512, 10)], 1536, "+1536 0@0+10 +502 1@0+10 +502"),
        (vec![file(512, 10), file(512, 10)], 1024, "+1024 0@0+10 +502 1@0+10 +502"),
    ] {
        let map = DeviceMap::of_layer(&entries, size).unwrap();
        assert!(!map.is_plain());
        assert_eq!(parts(&entries, &map, 0, u64::MAX), expected);
    }
}

#[test]
fn sparse_files() {
    // In place: pieces begin and end at multiples of 4096, or at the end of the file.
    let entries = [sparse(512, 20_000, &[(4096, 512, 4096), (16_384, 4608, 3616), (20_000, 8224, 0)])];
    let map = DeviceMap::of_layer(&entries, 10_240).unwrap();
    assert_eq!(chunks(&entries, &map, 0), (3, vec![None, Some(1), None, None, Some(9)]));
    assert_eq!(parts(&entries, &map, 0, u64::MAX), "+512 0@4096+4096 0@16384+3616 +2016");
    // Nothing but a hole.
    let entries = [sparse(512, 1 << 50, &[])];
    let map = DeviceMap::of_layer(&entries, 512).unwrap();
    let (bits, starts) = chunks(&entries, &map, 0);
    assert_eq!((bits, starts.len(), starts.iter().all(Option::is_none)), (31, 1024, true));
    // Odd pieces, pieces out of order, over the end of the file or of the layer, and too many chunks.
    for (size, pieces) in [
        (2048, &[(100, 512, 512)][..]),
        (2048, &[(512, 512, 100)]),
        (2048, &[(512, 600, 512)]),
        (2048, &[(1024, 512, 512), (0, 1024, 512)]),
        (2048, &[(0, 1024, 512), (1024, 512, 512)]),
        (2048, &[(0, 512, 1024), (512, 1536, 512)]),
        (2048, &[(1536, 512, 1024)]),
        (8192, &[(0, 512, 4096)]),
        (2048, &[(u64::MAX - 511, 512, 1024)]),
        (1025 * 512, &[(512, 512, 512)]),
    ] {
        let entries = [sparse(512, size, pieces)];
        let map = DeviceMap::of_layer(&entries, 2560).unwrap();
        assert!(!map.is_plain(), "{pieces:?}");
        let whole = format!("+2560 0@0+{size}");
        assert_eq!(parts(&entries, &map, 0, u64::MAX).trim_end_matches(" +511"), whole, "{pieces:?}");
    }
}

#[test]
fn sizes_are_bounded() {
    let too_large = Err(DeviceError::TooLarge { limit: u32::MAX });
    let most = u64::from(u32::MAX) * 512;
    assert_eq!(DeviceMap::of_layer(&[], most).map(|map| map.bytes()), Ok(most));
    assert_eq!(DeviceMap::of_layer(&[], most + 1), too_large);
    assert_eq!(DeviceMap::of_layer(&[], u64::MAX), too_large);
    assert_eq!(DeviceMap::of_layer(&[file(513, u64::MAX)], 512), too_large);
    assert_eq!(DeviceMap::of_layer(&[file(513, most), file(1023, 1)], 512), too_large);
    // A file beyond the reach of one chunk.
    let entries = [file(512, (1 << 40) + 1)];
    let map = DeviceMap::of_layer(&entries, (1 << 40) + 1024).unwrap();
    assert_eq!(chunks(&entries, &map, 0), (31, vec![Some(1), Some((1 << 31) + 1)]));
    assert_eq!(DeviceMap::of_layer(&[], 0).map(|map| map.bytes()), Ok(0));
}

/// Entries of a made-up layer of 64 blocks: in order or not, aligned or not, sparse or not.
fn entries() -> impl Strategy<Value = Vec<Entry>> {
    let offset = prop_oneof![4 => (0..64_u64).prop_map(|block| block * 512), 1 => 0..33_000_u64];
    let pieces = prop::collection::vec((0..8_u64, 0..64_u64, 0..3_u64), 0..4);
    let sparse_pieces = (pieces, any::<bool>()).prop_map(|(mut pieces, sorted)| {
        if sorted {
            pieces.sort_unstable();
        }
        pieces.into_iter().map(|(at, from, length)| (at * 512, from * 512, length * 512)).collect::<Vec<_>>()
    });
    let one = (offset, 0..3000_u64, prop::option::weighted(0.3, sparse_pieces));
    (prop::collection::vec(one, 0..12), any::<bool>()).prop_map(|(list, sorted)| {
        let mut entries: Vec<Entry> = list
            .into_iter()
            .map(|(offset, size, pieces)| match pieces {
                Some(pieces) => sparse(offset, size, &pieces),
                None => file(offset, size),
            })
            .collect();
        if sorted {
            entries.sort_by_key(|entry| entry.data_offset);
        }
        entries
    })
}

proptest! {
    /// Parts tile what was asked for, and say the same of each byte whatever the range.
    #[test]
    fn parts_tile_any_range(entries in entries(), size in 0..40_000_u64, offset in 0..60_000_u64, length in 0..30_000_u64) {
        let map = DeviceMap::of_layer(&entries, size).unwrap();
        let flat = |offset, length| {
            let mut bytes = Vec::new();
            for part in map.parts(&entries, offset, length) {
                prop_assert!(part.length() > 0);
                match part {
                    Part::File { entry, offset, length } => {
                        prop_assert!(offset + length <= entries[entry as usize].size);
                        bytes.extend((offset..offset + length).map(|at| Some((entry, at))));
                    }
                    Part::Zeros { length } => bytes.extend((0..length).map(|_| None)),
                }
            }
            Ok(bytes)
        };
        let all = flat(0, u64::MAX)?;
        prop_assert_eq!(all.len() as u64, map.bytes());
        let end = (offset + length).min(map.bytes());
        let expected = &all[usize::try_from(offset.min(end)).unwrap()..usize::try_from(end).unwrap()];
        prop_assert_eq!(&flat(offset, length)?[..], expected);
        // Each byte of each file is where the chunks say.
        for (number, entry) in (0_u32..).zip(&entries) {
            let Some(chunks) = map.chunks(&entries, number) else {
                prop_assert_eq!(entry.size, 0);
                continue;
            };
            let chunk_bytes = 512_u64 << chunks.bits();
            for (at, start) in (0_u64..).step_by(usize::try_from(chunk_bytes).unwrap()).zip(chunks) {
                let Some(start) = start else { continue };
                for byte in at..entry.size.min(at + chunk_bytes) {
                    let place = usize::try_from(u64::from(start) * 512 + byte - at).unwrap();
                    prop_assert_eq!(all[place], Some((number, byte)));
                }
            }
        }
        let shown = all.iter().flatten().count() as u64;
        let whole: u64 = entries.iter().map(|entry| entry.sparse().map_or(entry.size, |_| 0)).sum();
        prop_assert!(shown >= whole);
    }

    /// Other entries than those of the map are no reason to stop for ever.
    #[test]
    fn wrong_entries_are_survived(entries in entries(), other in entries(), size in 0..40_000_u64) {
        let map = DeviceMap::of_layer(&entries, size).unwrap();
        let total: u64 = map.parts(&other, 0, u64::MAX).map(|part| part.length()).sum();
        prop_assert_eq!(total, map.bytes());
    }
}
