//! The compact span index: what goes in comes out, sparse windows decode to the same bytes, damage is refused.

#![allow(clippy::unwrap_used, reason = "a test says no by panicking")]

use bytes::Bytes;
use soci_index::format::checkpoint::{WINDOW_BYTES, Window, WindowBytes};
use soci_index::format::compact::used::{keep, used};
use soci_index::format::compact::{CompactError, Encoded, WindowError, WindowsBlob, decode, encode};
use soci_index::format::decode::decode_span;
use soci_index::format::index::{Compression, LayerIndex, WindowPlace, Windows};
use soci_index::format::limits::Limits;
use soci_index::format::ztoc::Ztoc;
use soci_index::indexing::choice::{Candidate, Chooser};
use soci_index::indexing::{self, IndexError, Indexer, Options};
use soci_tests::golden::{Case, cases};

/// The windows of an index that came with them.
fn held(index: &LayerIndex) -> &[Window] {
    match &index.windows {
        Windows::Held(windows) => windows,
        Windows::Placed(_) => panic!("the windows are elsewhere"),
    }
}

/// The window of a span, without what no later byte refers to.
fn sparse(index: &LayerIndex, layer: &[u8], span: usize) -> WindowBytes {
    let mut window = held(index)[span].load();
    let place = &index.spans.spans()[span];
    let compressed = &layer[place.compressed.start as usize..place.compressed.end as usize];
    if let Some(mask) = used(compressed, place.bits) {
        keep(&mut window, &mask);
    }
    window
}

fn encoded(index: &LayerIndex, layer: &[u8]) -> Encoded {
    let mut blob = WindowsBlob::default();
    (0..index.spans.len()).for_each(|span| blob.push(&sparse(index, layer, span)).unwrap());
    let (windows, places) = blob.finish();
    let placed = LayerIndex { windows: Windows::Placed(places), ..index.clone() };
    Encoded { toc: encode(&placed).unwrap(), windows }
}

/// An index of the case, by our own indexer; none where the layer is none.
fn index(case: &Case, span_bytes: u64) -> Option<LayerIndex> {
    let options = Options { compression: case.compression, span_bytes, compact: None, limits: Limits::DEFAULT };
    let ztoc = indexing::index_bytes(&case.layer, options).ok()?.into_ztoc().ok()?;
    ztoc.into_index(case.layer.len() as u64, &Limits::DEFAULT).ok()
}

fn places(index: &LayerIndex) -> &[WindowPlace] {
    match &index.windows {
        Windows::Held(_) => panic!("the windows are here"),
        Windows::Placed(places) => places,
    }
}

/// What `decode` and the windows blob give, put together.
fn back(encoded: &Encoded) -> LayerIndex {
    let index = decode(&encoded.toc, &Limits::DEFAULT).unwrap();
    let window = |place: &WindowPlace| {
        let (start, length) = (place.offset as usize, place.length as usize);
        place.window(&encoded.windows[start..start + length]).unwrap()
    };
    let windows = places(&index).iter().map(window).collect();
    LayerIndex { windows: Windows::Held(windows), ..index }
}

/// Every golden layer, at several span sizes: the same table, and every span decodes, digest checked, to the same
/// bytes.
#[test]
fn golden_layers() {
    let (mut compared, mut referred, mut whole) = (0, 0, 0);
    for case in cases() {
        for span_bytes in [4_096, 32_768, 262_144] {
            let Some(index) = index(&case, span_bytes) else { continue };
            let encoded = encoded(&index, &case.layer);
            let read = back(&encoded);
            assert_eq!(read.entries, index.entries, "{}", case.name);
            assert_eq!(read.spans, index.spans, "{}", case.name);
            let facts = |index: &LayerIndex| (index.compression, index.compressed_size, index.uncompressed_size);
            assert_eq!(facts(&read), facts(&index), "{}", case.name);
            for (number, span) in index.spans.spans().iter().enumerate() {
                let compressed = &case.layer[span.compressed.start as usize..span.compressed.end as usize];
                let decoded =
                    |index: &LayerIndex| decode_span(index, number as u32, compressed).map(|bytes| bytes.to_vec());
                assert!(decoded(&read) == decoded(&index), "{}, span {number} of {span_bytes}", case.name);
                referred += held(&read)[number].load().iter().filter(|byte| **byte != 0).count();
                whole += held(&index)[number].load().iter().filter(|byte| **byte != 0).count();
            }
            compared += 1;
        }
    }
    assert!(compared > 200, "{compared}");
    assert!(referred * 2 < whole, "most bytes are not referred to: {referred} of {whole}");
}

/// What one pass over a layer makes, pushed in pieces of so many bytes.
fn in_one_pass(case: &Case, span_bytes: u64, piece: usize) -> Option<Result<Encoded, IndexError>> {
    let compact = Some(span_bytes);
    let options = Options { compact, ..Options::of(case.compression) };
    let mut indexer = Indexer::new(options).unwrap();
    case.layer.chunks(piece).try_for_each(|piece| indexer.push(piece, &mut |_| {})).ok()?;
    indexer.finish().ok()?.compact
}

/// Spans of our own choice, made while the layer is read: every span decodes, the file table is the usual one, and how
/// the layer comes in changes nothing.
#[test]
fn one_pass() {
    let (mut compared, mut spans) = (0, 0);
    for case in cases() {
        for span_bytes in [1_000, 16_384, 262_144] {
            let Some(made) = in_one_pass(&case, span_bytes, usize::MAX) else { continue };
            let made = made.unwrap_or_else(|error| panic!("{}: {error}", case.name));
            for piece in [1_013, 65_536] {
                let again = in_one_pass(&case, span_bytes, piece).unwrap().unwrap();
                assert!(again == made, "{} in pieces of {piece}, spans of {span_bytes}", case.name);
            }
            let read = back(&made);
            let usual = indexing::index_bytes(&case.layer, Options::of(case.compression)).unwrap().index;
            assert_eq!(read.entries, usual.entries, "{}", case.name);
            let whole = |index: &LayerIndex| -> Vec<u8> {
                let all = index.spans.spans().iter().enumerate();
                let decoded = all.flat_map(|(number, span)| {
                    let compressed = &case.layer[span.compressed.start as usize..span.compressed.end as usize];
                    decode_span(index, number as u32, compressed)
                        .unwrap_or_else(|error| panic!("{}, spans of {span_bytes}: {error}", case.name))
                });
                decoded.collect()
            };
            assert!(whole(&read) == whole(&usual), "{}", case.name);
            (compared, spans) = (compared + 1, spans + read.spans.len());
        }
    }
    assert!(compared > 200 && spans > 1_000, "{compared} {spans}");
}

/// Layers whose span indexes are kept as files, as the first version wrote them.
const KEPT: [&str; 6] =
    ["001-", "065-hardlinks", "098-xattrs", "120-sparse-gnu", "127-plain-tar", "027-members-at-files"];

/// Files of the first version are read for ever, and what is written today has the same content: `SOCI_WRITE_GOLDEN=1`
/// writes them anew, for a new version of the format. How zstd packs it is up to zstd.
#[test]
fn golden_files() {
    let directory = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("index/compact");
    let cases = cases();
    for prefix in KEPT {
        let case = cases.iter().find(|case| case.name.starts_with(prefix)).unwrap();
        let file = |kind: &str| directory.join(format!("{}.{kind}", case.name));
        let made = in_one_pass(case, 16_384, usize::MAX).unwrap().unwrap();
        if std::env::var_os("SOCI_WRITE_GOLDEN").is_some() {
            std::fs::create_dir_all(&directory).unwrap();
            std::fs::write(file("toc"), &made.toc).unwrap();
            std::fs::write(file("windows"), &made.windows).unwrap();
        }
        let kept =
            Encoded { toc: std::fs::read(file("toc")).unwrap(), windows: std::fs::read(file("windows")).unwrap() };
        let (read, today) = (back(&kept), back(&made));
        assert_eq!((&read.entries, &read.spans), (&today.entries, &today.spans), "{}", case.name);
        for (number, span) in read.spans.spans().iter().enumerate() {
            assert!(held(&read)[number].load() == held(&today)[number].load(), "{}, window {number}", case.name);
            let compressed = &case.layer[span.compressed.start as usize..span.compressed.end as usize];
            decode_span(&read, number as u32, compressed).unwrap();
        }
        // All but the columns of the windows, whose lengths and digests are zstd's, is the same byte for byte.
        if made.windows == kept.windows {
            assert!(unpacked(&made.toc) == unpacked(&kept.toc), "{}", case.name);
        }
    }
}

/// Spans are near the size that was asked for where the stream has boundaries.
#[test]
fn spans_are_even() {
    // Words in an order that repeats only after a long while, so that blocks have an ordinary size.
    let words = (0..1_000_000_u64).map(|word| format!("{} ", word.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 44));
    let text: String = words.collect();
    let mut archive = tar::Builder::new(flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default()));
    for (number, file) in text.as_bytes().chunks(100_000).enumerate() {
        let mut header = tar::Header::new_ustar();
        header.set_size(file.len() as u64);
        archive.append_data(&mut header, format!("file{number}"), file).unwrap();
    }
    let layer = archive.into_inner().unwrap().finish().unwrap();
    let options = Options { compact: Some(262_144), ..Options::of(Compression::Gzip) };
    let made = indexing::index_bytes(&layer, options).unwrap().compact.unwrap().unwrap();
    let index = decode(&made.toc, &Limits::DEFAULT).unwrap();
    let lengths = index.spans.spans().iter().map(|span| span.uncompressed.end - span.uncompressed.start);
    let lengths: Vec<u64> = lengths.collect();
    let near = lengths.iter().filter(|length| (131_072..=393_216 + 65_536).contains(*length)).count();
    assert!(near * 10 > lengths.len() * 9, "{near} of {}: {lengths:?}", lengths.len());
}

/// A stream that makes no output cannot make anything be held.
#[test]
fn empty_blocks_do_not_pile_up() {
    let mut chooser = Chooser::new(1 << 18, 1_000);
    let empty = [0_u8, 0, 0, 0xff, 0xff];
    let blocks = empty.repeat(20_000);
    for number in 0..100_u64 {
        let compressed = number * blocks.len() as u64 + 5;
        let window = Box::new([0; WINDOW_BYTES]);
        let candidate = Candidate { compressed, uncompressed: 0, bits: 0, cuts_file: false, window };
        chooser.push(&blocks, vec![candidate], 0);
        assert!(chooser.held_bytes() < 2 << 20, "{}", chooser.held_bytes());
    }
    assert_eq!(chooser.finish().unwrap().checkpoints.len(), 1);
}

/// From AWS's files, too.
#[test]
fn from_ztocs() {
    let mut compared = 0;
    for case in cases().into_iter().filter(|case| case.aws_reads_it) {
        for golden in case.ztocs.values() {
            let ztoc = Ztoc::decode(&Bytes::copy_from_slice(golden), &Limits::DEFAULT).unwrap();
            let index = ztoc.into_index(case.layer.len() as u64, &Limits::DEFAULT).unwrap();
            let read = back(&encoded(&index, &case.layer));
            assert_eq!((read.entries, read.spans), (index.entries, index.spans), "{}", case.name);
            compared += 1;
        }
    }
    assert!(compared > 100, "{compared}");
}

fn unpacked(toc: &[u8]) -> Vec<u8> {
    zstd::bulk::decompress(toc, 1 << 26).unwrap()
}

/// The content is the same on every machine, whatever the compressor makes of it.
#[test]
fn the_same_bytes_every_time() {
    let case = cases().into_iter().find(|case| case.name.starts_with("001-")).unwrap();
    let index = index(&case, 32_768).unwrap();
    let (one, other) = (encoded(&index, &case.layer), encoded(&index, &case.layer));
    assert!(one.toc == other.toc && one.windows == other.windows);
    let content = unpacked(&one.toc);
    assert_eq!(&content[..11], b"SOCI-TOC\x01\x00\x01");
    assert_eq!(&one.windows[..8], b"SOCI-WIN");
    assert!(one.toc.len() * 3 < case.ztocs.values().next().unwrap().len(), "{} bytes", one.toc.len());
}

/// Damaged content is refused, or is still a table that a reader may rely on; nothing panics.
#[test]
fn damage() {
    let case = cases().into_iter().find(|case| case.name.starts_with("098-")).unwrap();
    let index = index(&case, 16_384).unwrap();
    let encoded = encoded(&index, &case.layer);
    let content = unpacked(&encoded.toc);
    let judge = |content: &[u8]| decode(&zstd::bulk::compress(content, 1).unwrap(), &Limits::DEFAULT);
    assert_eq!(judge(&content).unwrap().entries, index.entries);
    let (mut refused, mut seed) = (0, 1_u64);
    for place in 0..content.len().min(6_000) {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        for byte in [content[place] ^ 0x80, content[place] ^ 1, (seed >> 56) as u8] {
            let mut damaged = content.clone();
            damaged[place] = byte;
            match judge(&damaged) {
                Err(_) => refused += 1,
                Ok(read) => {
                    let end = read.uncompressed_size;
                    let inside = |entry: &soci_index::format::entry::Entry| {
                        entry.sparse().is_some() || entry.data_offset + entry.size <= end
                    };
                    assert!(read.entries.iter().all(inside), "byte {place}");
                }
            }
        }
    }
    assert!(refused > 1_000, "{refused}");
    for length in 0..content.len().min(2_000) {
        assert!(judge(&content[..length]).is_err(), "cut at {length}");
    }
    let longer = [&content[..], b"x"].concat();
    assert!(matches!(judge(&longer), Err(CompactError::Frame { .. })));
}

#[test]
fn refusals_have_names() {
    let decode = |bytes: &[u8]| decode(bytes, &Limits::DEFAULT).map(|_| ()).unwrap_err().to_string();
    let pack = |content: &[u8]| zstd::bulk::compress(content, 1).unwrap();
    assert!(decode(b"").contains("not a span index"));
    assert!(decode(b"PK\x03\x04 something else").contains("no zstd frame"));
    assert!(decode(&pack(b"short")).contains("no whole header"));
    assert!(decode(&pack(&[7; 100])).contains("begins with"));
    let mut head = b"SOCI-TOC\x02\x00\x01".to_vec();
    head.resize(100, 0);
    assert!(decode(&pack(&head)).contains("version 2"));
    (head[8], head[10]) = (1, 9);
    assert!(decode(&pack(&head)).contains("no compression"));
    head[10] = 1;
    head[40..48].copy_from_slice(&u64::MAX.to_le_bytes());
    assert!(decode(&pack(&head)).contains("more than the limit"));
    // A frame that promises more than it may.
    let mut frame = pack(&[0; 1000]);
    let small = Limits { ztoc_bytes_max: 100, ..Limits::DEFAULT };
    assert!(matches!(soci_index::format::compact::decode(&frame, &small), Err(CompactError::TooLarge { .. })));
    frame.truncate(8);
    assert!(decode(&frame).contains("not a span index"));
}

/// A window is the one that the index means, or none.
#[test]
fn forged_windows() {
    let case = cases().into_iter().find(|case| case.name.starts_with("001-")).unwrap();
    let index = index(&case, 32_768).unwrap();
    let encoded = encoded(&index, &case.layer);
    let decoded = decode(&encoded.toc, &Limits::DEFAULT).unwrap();
    let place = places(&decoded).iter().find(|place| place.length > 0).unwrap();
    let (start, length) = (place.offset as usize, place.length as usize);
    let bytes = encoded.windows[start..start + length].to_vec();
    assert!(place.window(&bytes).is_ok());
    let mut forged = bytes.clone();
    forged[length / 2] ^= 1;
    assert!(matches!(place.window(&forged), Err(WindowError::Digest { .. })));
    // Of another length, with its right digest.
    let short = zstd::bulk::compress(&[1; 100], 1).unwrap();
    let mut other = *place;
    other.digest = soci_index::format::digest::Digest::of(&short).bytes().try_into().unwrap();
    assert!(matches!(other.window(&short), Err(WindowError::Frame { .. })));
}

/// What cannot be followed counts as used; what refers to nothing, as unused.
#[test]
fn streams_that_refer_to_nothing_or_are_none() {
    for bad in [&[][..], &[0xff; 64], &[0b110], &[0b001, 5, 0, 0, 0, 1]] {
        assert!(used(bad, 0).is_none(), "{bad:?}");
    }
    // One stored block that ends the member.
    let mut stored = vec![1, 3, 0, 0xfc, 0xff];
    stored.extend_from_slice(b"abc");
    let mask = used(&stored, 0).unwrap();
    assert!(mask.iter().all(|used| !used));
    let mut window = [7; WINDOW_BYTES];
    keep(&mut window, &mask);
    assert!(window.iter().all(|byte| *byte == 0));
}
