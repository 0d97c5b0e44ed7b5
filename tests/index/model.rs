//! Properties: any tar in any gzip is indexed and read right, and damage is refused or harmless.
//!
//! The model is the archive's writer ([`archive`]), which knows what it wrote. Two independent readers stand beside it:
//! the `tar` crate and flate2's decoder. `SOCI_PROPTEST_CASES` (or `PROPTEST_CASES`) raises the number of cases.

#![allow(clippy::unwrap_used, reason = "a test says no by panicking")]

use std::io::Read as _;
use std::ops::Range;

use bytes::Bytes;
use proptest::prelude::*;
use proptest::sample::Index;
use soci_index::format::access::{AccessError, LayerReader};
use soci_index::format::checkpoint::{WINDOW_BYTES, Window};
use soci_index::format::decode::{DecodeError, decode_span};
use soci_index::format::digest::Digest;
use soci_index::format::entry::{Entry, EntryKind, Timestamp};
use soci_index::format::index::{Compression, LayerIndex};
use soci_index::format::limits::Limits;
use soci_index::format::ztoc::Ztoc;
use soci_index::indexing::{Indexed, Indexer, Options, index_bytes};
use soci_tests::archive::{Archive, Dialect, Ending, Known, Layer, Wrapping, layer, plain, write_gzip, write_tar};

fn config(cases: u32) -> ProptestConfig {
    let number = |name| std::env::var(name).ok()?.parse().ok();
    let cases = number("SOCI_PROPTEST_CASES").or_else(|| number("PROPTEST_CASES")).unwrap_or(cases);
    // A shrunk failure becomes a test of its own, not a file of seeds.
    ProptestConfig { cases, failure_persistence: None, max_shrink_iters: 2000, ..ProptestConfig::default() }
}

fn span_bytes() -> impl Strategy<Value = u64> {
    prop_oneof![Just(0u64), Just(1), 100u64..5000, 5000u64..60_000, Just(4 << 20)]
}

/// Whether two indexes have the same windows, held in whatever form.
fn same_windows(one: &LayerIndex, other: &LayerIndex) -> bool {
    let loaded = |index: &LayerIndex, span| index.window(span).map(Window::load);
    let spans = one.windows.len() as u32;
    one.windows.len() == other.windows.len() && (0..spans).all(|span| loaded(one, span) == loaded(other, span))
}

const fn gzip_options(span_bytes: u64) -> Options {
    Options { compression: Compression::Gzip, span_bytes, compact: None, limits: Limits::DEFAULT }
}

/// A way to fetch ranges of a blob in memory. Like any server's answer, it may be shorter than what was asked for.
fn fetch(blob: &[u8]) -> impl FnMut(Range<u64>) -> Result<Bytes, std::convert::Infallible> + '_ {
    |range| {
        let within = |offset: u64| usize::try_from(offset).unwrap().min(blob.len());
        Ok(Bytes::copy_from_slice(&blob[within(range.start)..within(range.end)]))
    }
}

type Access = AccessError<std::convert::Infallible>;

fn read_file(index: &LayerIndex, blob: &[u8], entry: &Entry, range: Range<u64>) -> Result<Vec<u8>, Access> {
    let mut output = Vec::new();
    LayerReader::new(index, fetch(blob)).read_file(entry, range, &mut |bytes| output.extend_from_slice(bytes))?;
    Ok(output)
}

fn read_layer(index: &LayerIndex, blob: &[u8], range: Range<u64>) -> Result<Vec<u8>, Access> {
    let mut output = Vec::new();
    LayerReader::new(index, fetch(blob)).read_layer(range, &mut |bytes| output.extend_from_slice(bytes))?;
    Ok(output)
}

/// Indexes in pieces; hands back the uncompressed stream as well.
fn index_pieces(blob: &[u8], options: Options, cuts: &[Index]) -> (Indexed, Vec<u8>) {
    let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(blob.len() + 1)).collect();
    cuts.push(blob.len());
    cuts.sort_unstable();
    let (mut indexer, mut stream, mut start) = (Indexer::new(options).unwrap(), Vec::new(), 0);
    for end in cuts {
        indexer.push(&blob[start..end], &mut |bytes| stream.extend_from_slice(bytes)).unwrap();
        start = end;
    }
    (indexer.finish().unwrap(), stream)
}

const fn kind(flag: u8) -> EntryKind {
    match flag {
        b'1' => EntryKind::Hardlink,
        b'2' => EntryKind::Symlink,
        b'3' => EntryKind::CharDevice,
        b'4' => EntryKind::BlockDevice,
        b'5' => EntryKind::Directory,
        b'6' => EntryKind::Fifo,
        _ => EntryKind::Regular,
    }
}

/// The entry is what was written.
fn check_entry(entry: &Entry, known: &Known) {
    assert_eq!(*entry.name, *known.name);
    assert_eq!(*entry.link, *known.link, "{:?}", known.name);
    assert_eq!(entry.kind, kind(known.flag));
    assert_eq!((entry.header_offset, entry.data_offset), (known.header_offset as u64, known.data_offset as u64));
    assert_eq!(entry.size, known.content.len() as u64);
    assert_eq!((entry.mode, (entry.uid, entry.gid)), (known.mode.into(), known.owner));
    assert_eq!(entry.modified, Some(Timestamp { seconds: known.time.0, nanoseconds: known.time.1 }));
    assert_eq!(entry.device(), (known.device.0.into(), known.device.1.into()));
    let xattrs: Vec<_> = known.xattrs.iter().map(|(key, value)| (key.as_bytes(), &value[..])).collect();
    assert_eq!(entry.xattrs().collect::<Vec<_>>(), xattrs);
}

/// The `tar` crate reads the same. Intended differences, which the caller keeps out of its input:
///
/// * it takes a size field of a link, directory or device for data; here nothing follows such an entry;
/// * it stops at one zero block, where we ask for a second one or the end of the stream (the same here, as nothing
///   follows the end of the archives);
/// * it asks for the padding of the last file: so zeros are added for it;
/// * it ends a PAX record at a newline inside its value, so names and records of such entries are not compared;
/// * it knows no fractions of PAX times, so times are compared in seconds;
/// * it hands out PAX records in the order of the file and with duplicates; ours are sorted and unique.
fn check_against_tar_crate(entries: &[Entry], tar: &[u8]) {
    let padded = [tar, &[0; 2048]].concat();
    let mut reader = tar::Archive::new(&padded[..]);
    let mut ours = entries.iter();
    for theirs in reader.entries().unwrap() {
        let (mut theirs, ours) = (theirs.unwrap(), ours.next().expect("as many entries"));
        assert_eq!(theirs.raw_file_position(), ours.data_offset);
        assert_eq!(theirs.size(), ours.size);
        if !ours.pax().iter().any(|record| record.value.contains(&b'\n')) {
            check_texts_against_tar_crate(&mut theirs, ours);
        }
        let header = theirs.header();
        assert_eq!(
            header.entry_type().as_byte().max(b'0'),
            match ours.kind {
                EntryKind::Regular => b'0',
                EntryKind::Hardlink => b'1',
                EntryKind::Symlink => b'2',
                EntryKind::CharDevice => b'3',
                EntryKind::BlockDevice => b'4',
                EntryKind::Directory => b'5',
                EntryKind::Fifo => b'6',
            }
        );
        assert_eq!(i64::from(header.mode().unwrap()), ours.mode);
        assert_eq!((header.uid().unwrap(), header.gid().unwrap()), (ours.uid.into(), ours.gid.into()));
        assert_eq!(header.mtime().unwrap().cast_signed(), ours.modified.unwrap().seconds);
        let device = (header.device_major().unwrap(), header.device_minor().unwrap());
        assert_eq!(device.0.map_or(0, i64::from), ours.device().0);
        assert_eq!(device.1.map_or(0, i64::from), ours.device().1);
    }
    assert!(ours.next().is_none(), "as many entries");
}

fn check_texts_against_tar_crate(theirs: &mut tar::Entry<'_, &[u8]>, ours: &Entry) {
    assert_eq!(*theirs.path_bytes(), *ours.name);
    assert_eq!(theirs.link_name_bytes().as_deref().unwrap_or_default(), &*ours.link);
    let mut records: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
    for record in theirs.pax_extensions().unwrap().into_iter().flatten() {
        let record = record.unwrap();
        records.push((record.key_bytes().to_vec(), record.value_bytes().to_vec()));
    }
    records.sort();
    let ours: Vec<_> = ours.pax().iter().map(|record| (record.key.to_vec(), record.value.to_vec())).collect();
    assert_eq!(records, ours);
}

/// A zTOC of what was indexed, read back.
fn through_ztoc(indexed: Indexed, layer_bytes: usize) -> (Vec<u8>, LayerIndex) {
    let ztoc = indexed.into_ztoc().unwrap();
    let bytes = ztoc.encode().unwrap().to_vec();
    let decoded = Ztoc::decode(&Bytes::from(bytes.clone()), &Limits::DEFAULT).unwrap();
    assert_eq!(decoded.entries.len(), ztoc.entries.len());
    assert!(decoded.encode().unwrap().to_vec() == bytes, "decode and encode is not the identity");
    (bytes, decoded.into_index(layer_bytes as u64, &Limits::DEFAULT).unwrap())
}

/// Every file read whole is right or refused; says how many were read.
fn check_files(index: &LayerIndex, blob: &[u8], archive: &Archive) -> usize {
    let mut read = 0;
    for entry in index.entries.iter().filter(|entry| entry.kind == EntryKind::Regular) {
        let Ok(found) = read_file(index, blob, entry, 0..u64::MAX) else { continue };
        let known = archive.files.iter().find(|known| known.data_offset as u64 == entry.data_offset);
        let known = known.unwrap_or_else(|| panic!("{entry:?} is not in the archive and was read"));
        assert!(*entry.name == *known.name && found == known.content, "{:?} has wrong bytes", known.name);
        read += 1;
    }
    read
}

fn file_count(archive: &Archive) -> usize {
    archive.files.iter().filter(|known| kind(known.flag) == EntryKind::Regular).count()
}

proptest! {
    #![proptest_config(config(400))]

    /// Cuts do not matter; the entries are those that were written, and those that other readers find; the zTOC says it
    /// all.
    #[test]
    fn any_layer_is_indexed(
        Layer { archive, blob, .. } in layer(true),
        span_bytes in span_bytes(),
        cuts in prop::collection::vec(any::<Index>(), 0..40),
    ) {
        let whole = index_bytes(&blob, gzip_options(span_bytes)).unwrap();
        let (pieces, stream) = index_pieces(&blob, gzip_options(span_bytes), &cuts);
        assert!(stream == archive.tar, "the uncompressed stream");
        let mut theirs = Vec::new();
        // flate2 refuses padding behind the last member only if it is not zero.
        flate2::read::MultiGzDecoder::new(&blob[..]).read_to_end(&mut theirs).ok();
        assert!(theirs == archive.tar, "flate2 agrees");
        assert_eq!(whole.diff_id, Digest::of(&archive.tar));
        assert_eq!(whole.layer_digest, Digest::of(&blob));
        assert_eq!(pieces.index.entries, whole.index.entries);
        assert_eq!(pieces.index.spans, whole.index.spans);
        assert_eq!(pieces.index.windows, whole.index.windows);
        assert_eq!(whole.entries().len(), archive.files.len());
        for (entry, known) in whole.entries().iter().zip(&archive.files) {
            check_entry(entry, known);
        }
        if !archive.idle_sizes {
            check_against_tar_crate(whole.entries(), &archive.tar);
        }
        let (index, obstacle) = (whole.index.clone(), whole.obstacle.clone());
        prop_assert_eq!(obstacle, None);
        let (bytes, read_back) = through_ztoc(whole, blob.len());
        let (other, _) = through_ztoc(pieces, blob.len());
        assert!(bytes == other, "pieces give the same zTOC");
        assert_eq!(read_back.spans, index.spans);
        assert_eq!(read_back.entries, index.entries);
        assert!(same_windows(&read_back, &index), "windows survive");
    }

    /// Any range of any file, and of the layer, is the slice of the plain tar.
    #[test]
    fn any_range_is_right(
        Layer { archive, blob, .. } in layer(true),
        span_bytes in span_bytes(),
        ranges in prop::collection::vec((any::<Index>(), any::<Index>(), any::<Index>()), 1..10),
    ) {
        let indexed = index_bytes(&blob, gzip_options(span_bytes)).unwrap();
        let own = indexed.index.clone();
        let (_, index) = through_ztoc(indexed, blob.len());
        for index in [&own, &index] {
            assert_eq!(check_files(index, &blob, &archive), file_count(&archive));
        }
        let size = usize::try_from(index.uncompressed_size).unwrap();
        for (which, start, length) in ranges {
            let (start, length) = (start.index(size + 1), length.index(40_000));
            let range = start as u64..(start + length) as u64;
            let expected = &archive.tar[start..size.min(start + length)];
            assert!(read_layer(&index, &blob, range).unwrap() == expected);
            let files: Vec<_> = index.entries.iter().filter(|entry| entry.kind == EntryKind::Regular).collect();
            if files.is_empty() {
                continue;
            }
            let entry = files[which.index(files.len())];
            let content = &archive.files.iter().find(|known| known.data_offset as u64 == entry.data_offset).unwrap().content;
            let within = start.min(content.len())..(start % 5000 + length).clamp(start.min(content.len()), content.len());
            let found = read_file(&index, &blob, entry, within.start as u64..within.end as u64).unwrap();
            assert!(found == content[within]);
        }
    }

    /// The same for plain tars.
    #[test]
    fn plain_tars_are_read(
        archive in soci_tests::archive::archive(true),
        span_bytes in 1u64..20_000,
        cuts in prop::collection::vec(any::<Index>(), 0..10),
    ) {
        // Without any byte there is no layer to speak of.
        prop_assume!(!archive.tar.is_empty());
        let options = Options { compression: Compression::None, span_bytes: span_bytes.max(archive.tar.len() as u64 / 100), compact: None, limits: Limits::DEFAULT };
        let (pieces, _) = index_pieces(&archive.tar, options, &cuts);
        let whole = index_bytes(&archive.tar, options).unwrap();
        assert_eq!(pieces.index.spans, whole.index.spans);
        assert_eq!(whole.diff_id, Digest::of(&archive.tar));
        assert_eq!(check_files(&whole.index, &archive.tar, &archive), file_count(&archive));
        let (_, index) = through_ztoc(whole, archive.tar.len());
        assert_eq!(check_files(&index, &archive.tar, &archive), file_count(&archive));
    }

    /// Damage to the layer never yields a wrong byte.
    #[test]
    fn damaged_layers_are_refused(
        Layer { archive, blob, .. } in layer(false),
        span_bytes in span_bytes(),
        flips in prop::collection::vec((any::<Index>(), 0u8..8), 1..6),
        cut in any::<Index>(),
    ) {
        let (_, index) = through_ztoc(index_bytes(&blob, gzip_options(span_bytes)).unwrap(), blob.len());
        check_files(&index, &blob[..cut.index(blob.len())], &archive);
        for (place, bit) in flips {
            let mut damaged = blob.clone();
            let place = place.index(blob.len());
            damaged[place] ^= 1 << bit;
            check_files(&index, &damaged, &archive);
            for (id, span) in index.spans.spans().iter().enumerate() {
                let range = usize::try_from(span.compressed.start).unwrap()..usize::try_from(span.compressed.end).unwrap();
                let result = decode_span(&index, id as u32, &damaged[range.clone()]);
                if range.contains(&place) {
                    assert!(matches!(result, Err(DecodeError::Digest { .. } | DecodeError::Gzip { .. })), "{result:?}");
                } else {
                    assert!(result.is_ok(), "{result:?}");
                }
            }
        }
    }

    /// Damage to the zTOC yields errors or right bytes; inside a window it may yield wrong ones, which the layer's own
    /// digest then shows.
    #[test]
    fn damaged_ztocs_are_refused(
        Layer { archive, blob, .. } in layer(false),
        span_bytes in prop_oneof![100u64..5000, 5000u64..60_000],
        damages in prop::collection::vec(prop::collection::vec((any::<Index>(), any::<u8>(), any::<bool>()), 1..4), 1..12),
    ) {
        let indexed = index_bytes(&blob, gzip_options(span_bytes)).unwrap();
        let (bytes, truth) = through_ztoc(indexed, blob.len());
        let sizes = bytes.len() - truth.windows.len() * WINDOW_BYTES;
        for damage in damages {
            let mut bytes = bytes.clone();
            for (place, value, outside) in damage {
                // Windows are most of the file: aim past them too.
                let place = if outside { place.index(sizes) } else { place.index(bytes.len()) };
                let place = if outside && place > 4096 { bytes.len() - 1 - (sizes - 1 - place) } else { place };
                bytes[place] = value;
            }
            let Ok(ztoc) = Ztoc::decode(&Bytes::from(bytes), &Limits::DEFAULT) else { continue };
            // Whatever could be decoded can be encoded or is refused with a reason.
            let _ = ztoc.encode().map(|encoded| encoded.to_vec());
            let Ok(index) = ztoc.into_index(blob.len() as u64, &Limits::DEFAULT) else { continue };
            if same_windows(&index, &truth) {
                check_files(&index, &blob, &archive);
            } else {
                check_proof(&index, &blob, &archive);
            }
        }
    }
}

/// What a forged index yields is either refused, right, or not what the image's `diff_id` says.
fn check_proof(index: &LayerIndex, blob: &[u8], archive: &Archive) {
    let Ok(mut all) = read_layer(index, blob, 0..u64::MAX) else { return };
    let indexed = all.len();
    if all != archive.tar[..indexed.min(archive.tar.len())] {
        all.resize(all.len().max(archive.tar.len()), 0);
        assert_ne!(Digest::of(&all), Digest::of(&archive.tar));
    }
}

/// A forged window yields other bytes and passes every check of the zTOC: only the proof finds it.
#[test]
fn forged_window_is_found_by_the_proof() {
    // The second half repeats the first, so the second span is made of references into its window.
    let text: Vec<u8> = (0..20_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let content = [&text[..], &text].concat();
    let archive = write_tar(&[plain(Dialect::Ustar, b"file", content)], Ending::Blocks(512));
    let wrapping = Wrapping { level: 9, flags: 0, flushes: vec![] };
    let mut gzip = write_gzip(&archive.tar, &[], &[wrapping], 0);
    if index_bytes(&gzip, gzip_options(10_000)).unwrap().index.spans.len() < 2 {
        let mut flushed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(9));
        std::io::Write::write_all(&mut flushed, &archive.tar[..20_512]).unwrap();
        std::io::Write::flush(&mut flushed).unwrap();
        std::io::Write::write_all(&mut flushed, &archive.tar[20_512..]).unwrap();
        gzip = flushed.finish().unwrap();
    }
    let (bytes, truth) = through_ztoc(index_bytes(&gzip, gzip_options(10_000)).unwrap(), gzip.len());
    assert!(truth.spans.len() >= 2);
    let window = truth.window(truth.spans.len() as u32 - 1).unwrap().load();
    let place = bytes.windows(64).position(|part| *part == window[WINDOW_BYTES - 64..]).unwrap();
    let mut forged = bytes;
    forged[place..place + 64].fill(b'!');
    let index = Ztoc::decode(&Bytes::from(forged), &Limits::DEFAULT).unwrap();
    let index = index.into_index(gzip.len() as u64, &Limits::DEFAULT).unwrap();
    let found = read_file(&index, &gzip, &index.entries[0], 0..u64::MAX).unwrap();
    assert!(found != archive.files[0].content, "every check of the index passes, and the bytes are wrong");
    assert_ne!(Digest::of(&read_layer(&index, &gzip, 0..u64::MAX).unwrap()), Digest::of(&archive.tar));
    check_proof(&index, &gzip, &archive);
}

/// Records and sparse pieces of a few bytes count as what they take in memory: a small layer must not fill it.
#[test]
fn many_short_records_are_counted() {
    let mut file = plain(Dialect::Pax, b"file", Vec::new());
    file.xattrs = (0..2000).map(|number| (format!("user.{number:04}"), Vec::new())).collect();
    let archive = write_tar(&[file], Ending::Blocks(512));
    let index = |text_bytes_max| {
        let limits = Limits { text_bytes_max, ..Limits::DEFAULT };
        index_bytes(&archive.tar, Options { compression: Compression::None, span_bytes: 1000, compact: None, limits })
            .map(|_| ())
    };
    assert_eq!(index(200_000), Ok(()));
    let error = index(80_000).unwrap_err();
    assert!(error.to_string().contains("text_bytes_max"), "{error}");
}
