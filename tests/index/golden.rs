//! The judge of compatibility: layers with every feature, and what AWS's own tool made of them.
//!
//! The data are in `tests/golden` of the workspace; `SOCI_GOLDEN` names another directory of the same shape.

#![allow(clippy::unwrap_used, reason = "a test says no by panicking")]

use std::collections::BTreeMap;
use std::path::Path;

use bytes::Bytes;
use soci_index::format::access::LayerReader;
use soci_index::format::decode::decode_span;
use soci_index::format::digest::Digest;
use soci_index::format::entry::{Entry, EntryKind};
use soci_index::format::index::{Compression, LayerIndex};
use soci_index::format::limits::Limits;
use soci_index::format::tar::check_header;
use soci_index::format::ztoc::Ztoc;
use soci_index::indexing::{self, Indexer, Options};
use soci_tests::golden::{Case, cases, golden};

fn options(case: &Case, span_bytes: u64) -> Options {
    Options { compression: case.compression, span_bytes, compact: None, limits: Limits::DEFAULT }
}

/// Our zTOC of a layer, or why there is none.
fn build(layer: &[u8], options: Options) -> Result<Vec<u8>, String> {
    let indexed = indexing::index_bytes(layer, options).map_err(|error| error.to_string())?;
    let ztoc = indexed.into_ztoc().map_err(|obstacle| obstacle.to_string())?;
    Ok(ztoc.encode().map_err(|error| error.to_string())?.to_vec())
}

/// zTOCs that AWS writes and then refuses to read, and that we write differently, or refuse to write.
const DIFFERENT: [&str; 10] = [
    // Several checkpoints at offset 0: one is enough.
    "empty-block-first",
    "empty-blocks-first",
    "member-empty-first",
    "member-empty-thrice-first",
    // A size without data: theirs puts every later file in the wrong place.
    "hardlink-with-size",
    "link-dir-fifo-with-size",
    // No zTOC can say where the pieces of a sparse file are.
    "sparse-pax-0.0",
    "sparse-pax-0.1",
    "sparse-pax-1.0",
    "sparse-pax-1.0-last",
];

/// Every zTOC that AWS wrote and can read back is written again, byte for byte.
#[test]
fn ztocs_are_identical() {
    let mut compared = 0;
    let mut different = Vec::new();
    for case in cases() {
        for (span_bytes, golden) in &case.ztocs {
            let ours = build(&case.layer, options(&case, *span_bytes));
            if !case.aws_reads_it {
                different.extend((ours.as_ref() != Ok(golden)).then(|| case.name[4..].to_owned()));
                continue;
            }
            let ours = ours.unwrap_or_else(|error| panic!("{}: {error}", case.name));
            assert!(
                ours == *golden,
                "{} with span size {span_bytes}: {} bytes, AWS wrote {}",
                case.name,
                ours.len(),
                golden.len()
            );
            compared += 1;
        }
    }
    if std::env::var_os("SOCI_GOLDEN").is_none() {
        assert_eq!(different, DIFFERENT, "zTOCs that AWS wrote and cannot read");
    }
    assert!(compared >= 115 || std::env::var_os("SOCI_GOLDEN").is_some(), "only {compared} zTOCs were compared");
}

/// What AWS refuses, or writes and cannot read, we refuse with a reason, or read right.
#[test]
fn refusals_have_reasons_or_are_better() {
    for case in cases().into_iter().filter(|case| !case.aws_reads_it) {
        let span_bytes = case.ztocs.keys().copied().next().unwrap_or(65_536);
        let Ok(bytes) = build(&case.layer, options(&case, span_bytes)) else { continue };
        let ztoc = Ztoc::decode(&Bytes::from(bytes), &Limits::DEFAULT).unwrap();
        let index = ztoc.into_index(case.layer.len() as u64, &Limits::DEFAULT).unwrap();
        check_files(&case, &index, &case.layer, true);
    }
}

/// Reads every regular file of the index through its spans and compares with the independent reading.
fn check_files(case: &Case, index: &LayerIndex, layer: &[u8], all: bool) {
    let tar = read_all(index, layer).unwrap_or_else(|error| panic!("{}: {error}", case.name));
    for entry in &index.entries {
        let header = &tar[entry.header_offset as usize..entry.data_offset as usize];
        check_header(entry, header).unwrap_or_else(|error| panic!("{}: {error}", case.name));
    }
    let files: Vec<_> = index.entries.iter().filter(|entry| entry.kind == EntryKind::Regular).collect();
    let expected: Vec<_> = case.files.iter().filter(|file| file.kind == "reg").collect();
    // The independent parser gives up on a few odd archives.
    if all && !case.files.is_empty() {
        assert_eq!(files.len(), expected.len(), "{}: number of regular files", case.name);
    }
    for (entry, file) in files.iter().zip(expected) {
        let data = &tar[entry.data_offset as usize..(entry.data_offset + entry.size) as usize];
        assert_eq!(Digest::of(data).hex(), file.sha256, "{}: {}", case.name, file.path);
    }
}

/// The uncompressed layer, span by span.
fn read_all(index: &LayerIndex, layer: &[u8]) -> Result<Vec<u8>, String> {
    let mut tar = Vec::new();
    for (id, span) in index.spans.spans().iter().enumerate() {
        let compressed = &layer[span.compressed.start as usize..span.compressed.end as usize];
        tar.extend(decode_span(index, id as u32, compressed).map_err(|error| error.to_string())?);
    }
    Ok(tar)
}

/// AWS's files, read by us, lead to right contents.
#[test]
fn their_ztocs_are_read() {
    for case in cases().into_iter().filter(|case| case.aws_reads_it) {
        for golden in case.ztocs.values() {
            let ztoc = Ztoc::decode(&Bytes::copy_from_slice(golden), &Limits::DEFAULT);
            let ztoc = ztoc.unwrap_or_else(|error| panic!("{}: {error}", case.name));
            assert!(ztoc.encode().unwrap().to_vec() == *golden, "{}: decode and encode is not the identity", case.name);
            match ztoc.into_index(case.layer.len() as u64, &Limits::DEFAULT) {
                Ok(index) => check_files(&case, &index, &case.layer, true),
                Err(error) => panic!("{}: {error}", case.name),
            }
        }
    }
}

/// A layer cut into single bytes gives the same index as the layer whole; so do cuts of other sizes.
#[test]
fn pieces_do_not_matter() {
    for case in cases() {
        let span_bytes = case.ztocs.keys().copied().next().unwrap_or(65_536);
        let options = options(&case, span_bytes);
        let whole = build(&case.layer, options);
        // Single bytes for the small ones: the large ones would take minutes in debug builds.
        let piece = if case.layer.len() < 30_000 { 1 } else { 1021 };
        let mut pieces = Ok(());
        let mut tar = Vec::new();
        let Ok(mut indexer) = Indexer::new(options) else { continue };
        for piece in case.layer.chunks(piece) {
            pieces = pieces.and_then(|()| indexer.push(piece, &mut |bytes| tar.extend_from_slice(bytes)));
        }
        let cut = pieces.and_then(|()| indexer.finish()).map_err(|error| error.to_string());
        if let Ok(indexed) = &cut {
            assert_eq!(indexed.layer_digest, Digest::of(&case.layer), "{}", case.name);
            assert_eq!(indexed.diff_id, Digest::of(&tar), "{}", case.name);
            if let Some(sha256) = &case.tar_sha256 {
                assert_eq!(indexed.diff_id.hex(), *sha256, "{}", case.name);
            }
        }
        let cut = cut.and_then(|indexed| indexed.into_ztoc().map_err(|error| error.to_string()));
        let cut = cut.and_then(|ztoc| Ok(ztoc.encode().map_err(|error| error.to_string())?.to_vec()));
        // How far a decoder came before it noticed damage may differ.
        let outcome = |result: Result<Vec<u8>, String>| {
            result.map(|bytes| Digest::of(&bytes)).map_err(|error| error.replace(|c: char| c.is_ascii_digit(), ""))
        };
        assert_eq!(outcome(cut), outcome(whole), "{}", case.name);
    }
}

/// Sparse files of every format, which no zTOC can describe, are read right through an index of our own: whole and in
/// parts.
#[test]
fn sparse_files_are_read() {
    let mut formats = 0;
    for case in cases().into_iter().filter(|case| case.name[4..].starts_with("sparse-")) {
        let indexed = indexing::index_bytes(&case.layer, options(&case, 16_384)).unwrap();
        let mut sparse = 0;
        for (entry, file) in indexed.entries().iter().zip(&case.files) {
            assert_eq!(String::from_utf8_lossy(&entry.name), file.path, "{}", case.name);
            let whole = read_file(&indexed.index, &case.layer, entry, 0..u64::MAX);
            assert_eq!(Digest::of(&whole).hex(), file.sha256, "{}: {}", case.name, file.path);
            for start in (0..entry.size).step_by(7919) {
                let range = start..(start + 5000).min(entry.size);
                let part = read_file(&indexed.index, &case.layer, entry, range.clone());
                assert!(part == whole[range.start as usize..range.end as usize], "{}: {range:?}", case.name);
            }
            sparse += usize::from(entry.sparse().is_some());
        }
        assert!(sparse > 0 && indexed.obstacle.is_some(), "{}", case.name);
        formats += 1;
        // The map counts as memory.
        let limits = Limits { text_bytes_max: 150, ..Limits::DEFAULT };
        assert!(indexing::index_bytes(&case.layer, Options { limits, ..options(&case, 16_384) }).is_err());
    }
    assert!(formats >= 5 || std::env::var_os("SOCI_GOLDEN").is_some(), "{formats} sparse layers");
}

fn read_file(index: &LayerIndex, layer: &[u8], entry: &Entry, range: std::ops::Range<u64>) -> Vec<u8> {
    let mut output = Vec::new();
    let fetch = |range: std::ops::Range<u64>| {
        Ok::<_, std::convert::Infallible>(Bytes::copy_from_slice(&layer[range.start as usize..range.end as usize]))
    };
    LayerReader::new(index, fetch).read_file(entry, range, &mut |bytes| output.extend_from_slice(bytes)).unwrap();
    output
}

/// What each hostile zTOC must come to, by its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Refused,
    Right,
    /// Passes every check of the file, and only the proof of the whole layer finds it.
    Forged,
}

/// No hostile zTOC panics, hangs or yields a wrong byte.
#[test]
fn hostile_ztocs_yield_errors_or_right_bytes() {
    let directory = golden().join("hostile");
    let mut fates: BTreeMap<String, Fate> = BTreeMap::new();
    for (name, layer_name) in soci_tests::golden::hostile(&directory) {
        let extension = if layer_name == "plain" { "tar" } else { "tar.gz" };
        let layer = std::fs::read(directory.join(format!("layer-{layer_name}.{extension}"))).unwrap();
        let bytes = Bytes::from(std::fs::read(directory.join(&name)).unwrap());
        fates.insert(name.clone(), fate(&name, bytes, &layer, layer_name != "plain"));
    }
    assert!(fates.len() > 100, "{} hostile files", fates.len());
    let forged: Vec<_> = fates.iter().filter(|(_, fate)| **fate == Fate::Forged).map(|(name, _)| &name[4..]).collect();
    assert_eq!(forged, ["window-changed.ztoc", "window-zero.ztoc"]);
    for (name, fate) in &fates {
        if name.contains("-good-") || name.contains("-ok-") {
            assert_eq!(*fate, Fate::Right, "{name}");
        }
    }
    let refused = fates.values().filter(|fate| **fate == Fate::Refused).count();
    assert!(refused > 80, "only {refused} refused: {fates:#?}");
}

fn fate(name: &str, bytes: Bytes, layer: &[u8], gzip: bool) -> Fate {
    let compression = if gzip { Compression::Gzip } else { Compression::None };
    let truth = indexing::index_bytes(
        layer,
        Options { compression, span_bytes: 1 << 20, compact: None, limits: Limits::DEFAULT },
    )
    .unwrap();
    let tar = read_all(&truth.index, layer).unwrap();
    let Ok(ztoc) = Ztoc::decode(&bytes, &Limits::DEFAULT) else { return Fate::Refused };
    let Ok(index) = ztoc.into_index(layer.len() as u64, &Limits::DEFAULT) else { return Fate::Refused };
    let mut wrong = false;
    let mut refused = false;
    let mut view = Vec::new();
    for (id, span) in index.spans.spans().iter().enumerate() {
        let compressed = &layer[span.compressed.start as usize..span.compressed.end as usize];
        match decode_span(&index, id as u32, compressed) {
            Ok(output) => view.extend(output),
            Err(_) => {
                refused = true;
                view.resize(span.uncompressed.end as usize, 0xee);
            }
        }
    }
    for entry in &index.entries {
        let header = &view[entry.header_offset as usize..entry.data_offset as usize];
        if check_header(entry, header).is_err() {
            refused = true;
            continue;
        }
        // An entry whose header is confirmed is the layer's own; its data must be too.
        let range = entry.data_offset as usize..(entry.data_offset + entry.size) as usize;
        wrong |= !refused && view[range.clone()] != tar[range];
    }
    wrong |= !refused && view[..] != tar[..view.len()];
    match (wrong, refused) {
        (true, _) => {
            let proof = Digest::of(&view) == Digest::of(&tar);
            assert!(!proof, "{name}: the proof must fail");
            Fate::Forged
        }
        (false, true) => Fate::Refused,
        (false, false) => Fate::Right,
    }
}

/// The reference's test vectors (a tiny tar, and the same in stored blocks).
#[test]
fn reference_vectors() {
    let tar = soci_tests::golden::tiny_tar();
    assert_eq!(Digest::of(&tar).hex(), "fc0b74e38b1bf963fda0d0fa9316881ba0fa1dd31b45e92b25321750a0fe9667");
    for (lengths, span_bytes, size, sha256) in [
        (&[][..], 4_194_304, 456, "f55218af6614a7e0d09e4bcd9118ffbf8d346216e6943ceb22207504b4d3f6f7"),
        (&[2048], 4_194_304, 33_200, "8c5f2ea3725d3cbd8a7eb67d2a55bf076c163b0d7010dd8ca9a65332db2f0421"),
        (&[1024, 512, 512], 512, 66_064, "6d6f589ab2dda97d1dc1c24297cd10557058d358b4af78d3c4d7bacc47f6267c"),
        (&[1024, 512, 512], 511, 98_936, "11ee41a30b8379a234fd8f97f4543132dcf7e535d37427e73379ef11d4106c99"),
    ] {
        let (layer, compression) = match lengths {
            [] => (tar.clone(), Compression::None),
            lengths => (soci_tests::golden::stored_gzip(&tar, lengths), Compression::Gzip),
        };
        let ours = build(&layer, Options { compression, span_bytes, compact: None, limits: Limits::DEFAULT }).unwrap();
        assert_eq!((ours.len(), Digest::of(&ours).hex().as_str()), (size, sha256), "{lengths:?}, {span_bytes}");
    }
}

#[test]
fn golden_data_are_here() {
    assert!(
        Path::new(&golden()).join("README.md").is_file(),
        "golden data are missing: set SOCI_GOLDEN or check out tests/golden"
    );
}
