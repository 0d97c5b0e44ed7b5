//! Mutation fuzzing of every parser, bounded and seeded: the short form of a night's run.
//!
//! Each target takes the golden data as its corpus, damages them, and judges what comes out: no panic, no hang, memory
//! within a bound, the same result however the input is cut, and a text that was read is written and read the same. By
//! default a target runs for two seconds; `SOCI_FUZZ_SECONDS` says otherwise. `SOCI_FUZZ_SEED` repeats a run: every
//! failure names the seed of its input.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test says no by panicking, and which seed it was")]
#![allow(unsafe_code, reason = "a counting allocator can only be had by implementing the unsafe trait")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io::{Read as _, Write as _};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use soci_fs::tree::Tree;
use soci_fs::tree::device::{DeviceError, DeviceMap};
use soci_fs::tree::erofs::Layer;
use soci_index::format::access::LayerReader;
use soci_index::format::entry::EntryKind;
use soci_index::format::gzip::GzipError;
use soci_index::format::index::{Compression, LayerIndex};
use soci_index::format::limits::Limits;
use soci_index::format::ztoc::Ztoc;
use soci_index::indexing::{IndexError, Indexed, Indexer, Options, index_bytes};
use soci_tests::erofs_model::checked;

mod documents;

/// Counts what the calling thread holds.
struct Counting;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    let _ = HELD.try_with(|held| {
        held.set(held.get() + bytes);
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(held.get())));
    });
}

// SAFETY: every call goes on to the system's allocator unchanged; the counters are plain cells without destructors.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size().cast_signed());
        // SAFETY: the caller's promises are handed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size().cast_signed());
        // SAFETY: the caller's promises are handed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-layout.size().cast_signed());
        // SAFETY: the caller's promises are handed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Memory that any input may take, and how much more per byte of input.
const PEAK_BYTES: usize = 64 << 20;

const PEAK_PER_BYTE: usize = 40;

/// Longest time for one input, with room for a busy machine and a debug build.
const INPUT_TIME_MAX: Duration = Duration::from_secs(60);

/// A small random source.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Below `bound`, or 0 when that is 0.
    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() >> 16).unwrap().checked_rem(bound).unwrap_or(0)
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }
}

/// Runs `check` on inputs that `make` makes until the time is over; checks time and memory of each.
fn fuzz<I: AsRef<[u8]>>(target: &str, mut make: impl FnMut(&mut Random) -> I, mut check: impl FnMut(&I, &mut Random)) {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let time = Duration::from_secs(number("SOCI_FUZZ_SECONDS").unwrap_or(2));
    let first = number("SOCI_FUZZ_SEED").unwrap_or(0x5eed);
    eprintln!("{target}: seeds from {first:#x} for {time:?}");
    let watch = Watch::start(target);
    let (start, mut seed, mut inputs) = (Instant::now(), first, 0u64);
    while start.elapsed() < time || inputs == 0 {
        seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let named = Named { target, seed: seed.wrapping_sub(0x9e37_79b9_7f4a_7c15) };
        watch.now(named.seed);
        let mut random = Random(seed | 1);
        let input = make(&mut random);
        let base = HELD.get();
        PEAK.set(base);
        check(&input, &mut random);
        let (peak, bytes) = ((PEAK.get() - base).cast_unsigned(), input.as_ref().len());
        assert!(peak < PEAK_BYTES + PEAK_PER_BYTE * bytes, "{peak} bytes of memory for {bytes} bytes of input");
        inputs += 1;
        drop(named);
    }
    watch.stop();
    eprintln!("{target}: {inputs} inputs");
}

/// Says on panic which seed it was.
struct Named<'a> {
    target: &'a str,
    seed: u64,
}

impl Drop for Named<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}: failed with SOCI_FUZZ_SEED={}", self.target, self.seed);
        }
    }
}

/// Ends the process when an input takes too long.
struct Watch(Arc<Mutex<Option<(Instant, u64)>>>);

impl Watch {
    fn start(target: &str) -> Self {
        let (shared, target) = (Arc::new(Mutex::new(Some((Instant::now(), 0)))), target.to_owned());
        let seen = Arc::clone(&shared);
        std::thread::spawn(move || {
            loop {
                // The lock must not be held while this thread sleeps.
                let now = *seen.lock().unwrap_or_else(PoisonError::into_inner);
                let Some((since, seed)) = now else { break };
                if since.elapsed() > INPUT_TIME_MAX {
                    eprintln!("{target}: SOCI_FUZZ_SEED={seed} does not come to an end");
                    std::process::exit(101);
                }
                std::thread::sleep(Duration::from_millis(200));
            }
        });
        Self(shared)
    }

    fn now(&self, seed: u64) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((Instant::now(), seed));
    }

    fn stop(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop();
    }
}

const NUMBERS: [u64; 12] =
    [0, 1, 7, 0x7f, 0xff, 0x7fff, 0xffff, 0x7fff_ffff, 0xffff_ffff, u64::MAX >> 1, u64::MAX, 1 << 40];

/// Damages `data` in one to eight places.
fn mutate(data: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    for _ in 0..=random.below(8) {
        let at = random.below(data.len());
        let scale = random.below(12);
        let length = 1 + random.below(1 << scale);
        let end = data.len().min(at + length);
        match random.below(10) {
            0 | 1 if !data.is_empty() => data[at] ^= 1 << random.below(8),
            2 if !data.is_empty() => data[at] = random.next() as u8,
            3 => {
                let number = random.pick(&NUMBERS).to_le_bytes();
                let width = *random.pick(&[1, 2, 4, 8]);
                let end = data.len().min(at + width);
                data[at..end].copy_from_slice(&number[..end - at]);
            }
            4 => drop(data.drain(at..end)),
            5 => {
                let part = data[at..end].to_vec();
                let to = random.below(data.len());
                data.splice(to..to, part);
            }
            6 => {
                let from = random.below(other.len());
                let part = &other[from..other.len().min(from + length)];
                data.splice(at..end, part.iter().copied());
            }
            7 if random.below(8) == 0 => data.truncate(at),
            8 => {
                let byte = *random.pick(b"\0 019-/.:@\"{}[],=\n\x7f\xff");
                data[at..end].fill(byte);
            }
            _ => data.splice(at..at, std::iter::repeat_n(random.next() as u8, length.min(64))).for_each(drop),
        }
    }
}

/// Golden layers and their tars.
fn layers() -> Vec<(Vec<u8>, Vec<u8>)> {
    let cases = soci_tests::golden::cases().into_iter().filter(|case| case.layer.len() < 60_000);
    let tar = |case: &soci_tests::golden::Case| match case.compression {
        Compression::None => case.layer.clone(),
        Compression::Gzip => {
            let mut tar = Vec::new();
            // As far as it can be inflated.
            let _ = flate2::read::MultiGzDecoder::new(&case.layer[..]).take(200_000).read_to_end(&mut tar);
            tar
        }
    };
    cases.map(|case| (case.layer.clone(), tar(&case))).collect()
}

/// Makes the checksums of all blocks that look like headers right again.
fn fix_checksums(tar: &mut [u8]) {
    for block in tar.chunks_exact_mut(512).filter(|block| &block[257..262] == b"ustar") {
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
}

/// Layers: the indexer gives the same whole and in pieces, and what it accepts can be read.
#[test]
fn layers_are_indexed_or_refused() {
    let corpus = layers();
    fuzz(
        "layers",
        |random| damaged_layer(&corpus, random),
        |layer, random| {
            let compression = if layer.starts_with(&[0x1f, 0x8b]) { Compression::Gzip } else { Compression::None };
            let span_bytes = *random.pick(&[1000, 4096, 65_536, 4 << 20]);
            let options = Options { compression, span_bytes, compact: None, limits: Limits::DEFAULT };
            let whole = index_bytes(layer, options);
            check_pieces(layer, options, &whole, random);
            if let Ok(indexed) = whole {
                check_reading(layer, indexed);
            }
        },
    );
}

fn damaged_layer(corpus: &[(Vec<u8>, Vec<u8>)], random: &mut Random) -> Vec<u8> {
    let ((layer, tar), (other, other_tar)) = (random.pick(corpus), random.pick(corpus));
    let how = random.below(4);
    if how == 0 {
        let mut layer = layer.clone();
        mutate(&mut layer, other, random);
        return layer;
    }
    let mut tar = tar.clone();
    mutate(&mut tar, other_tar, random);
    // Most damage is found by the checksum of a header; what lies behind that check is to be tried too.
    if random.below(4) > 0 {
        fix_checksums(&mut tar);
    }
    if how == 1 {
        return tar;
    }
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    for piece in tar.chunks(1 + random.below(100_000)) {
        encoder.write_all(piece).unwrap();
        encoder.flush().unwrap();
    }
    let mut layer = encoder.finish().unwrap();
    if random.below(8) == 0 {
        mutate(&mut layer, other, random);
    }
    layer
}

/// What kind of error it is, without the place.
fn class(error: &IndexError) -> String {
    error.to_string().replace(|c: char| c.is_ascii_digit(), "")
}

fn check_pieces(layer: &[u8], options: Options, whole: &Result<Indexed, IndexError>, random: &mut Random) {
    let mut indexer = Indexer::new(options).unwrap();
    let (mut rest, mut result) = (layer, Ok(()));
    let longest = *random.pick(&[64, 1000, 20_000]);
    while !rest.is_empty() && result.is_ok() {
        let (piece, behind) = rest.split_at(rest.len().min(1 + random.below(longest)));
        result = indexer.push(piece, &mut |_| {});
        rest = behind;
    }
    match (whole, result.and_then(|()| indexer.finish())) {
        (Ok(whole), Ok(pieces)) => {
            assert_eq!(whole.index.entries, pieces.index.entries);
            assert_eq!(whole.index.spans, pieces.index.spans);
            assert_eq!(whole.index.windows, pieces.index.windows);
            assert_eq!((whole.diff_id, whole.layer_digest), (pieces.diff_id, pieces.layer_digest));
            assert_eq!(whole.obstacle, pieces.obstacle);
        }
        // Of two kinds of damage that lie close together, either may be seen first.
        (Err(IndexError::Gzip(GzipError::Deflate { .. })), Err(IndexError::Tar(_))) => {}
        (Err(whole), Err(pieces)) => assert_eq!(class(whole), class(&pieces)),
        (whole, pieces) => panic!("whole: {:?}, in pieces: {:?}", whole.as_ref().err(), pieces.err()),
    }
}

/// What was indexed can be read, and its zTOC too.
fn check_reading(layer: &[u8], indexed: Indexed) {
    read_files(&indexed.index, layer).unwrap();
    check_image(&indexed.index);
    let Ok(ztoc) = indexed.into_ztoc() else { return };
    let bytes = Bytes::from(ztoc.encode().unwrap().to_vec());
    let decoded = Ztoc::decode(&bytes, &Limits::DEFAULT).unwrap();
    assert!(decoded.encode().unwrap().to_vec() == bytes);
    let index = decoded.into_index(layer.len() as u64, &Limits::DEFAULT).unwrap();
    read_files(&index, layer).unwrap();
}

/// Any index gives an EROFS image that a strict reader finds right, or the layer is too large for a block device.
fn check_image(index: &LayerIndex) {
    let tree = Tree::of_layer(&index.entries).unwrap();
    match DeviceMap::of_layer(&index.entries, index.uncompressed_size) {
        Ok(device) => drop(checked(&tree, &[Layer { entries: &index.entries, device: &device }], Some(b"user.o"))),
        Err(error) => assert!(matches!(error, DeviceError::TooLarge { .. }), "{error}"),
    }
}

/// Reads all files, each to its end; the bytes are not kept.
fn read_files(index: &LayerIndex, layer: &[u8]) -> Result<(), String> {
    let mut reader = LayerReader::new(index, |range: std::ops::Range<u64>| {
        let range = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
        layer.get(range).map(Bytes::copy_from_slice).ok_or("past the end")
    });
    let mut failed = Ok(());
    for entry in index.entries.iter().filter(|entry| entry.kind == EntryKind::Regular) {
        // A sparse file may be as long as it says; its holes are not worth the time.
        let (mut bytes, wanted) = (0, entry.size.min(1 << 20));
        let result = reader.read_file(entry, 0..wanted, &mut |piece| bytes += piece.len() as u64);
        match result {
            Ok(()) => assert_eq!(bytes, wanted, "{:?}", entry.name),
            Err(error) => failed = failed.and(Err(error.to_string())),
        }
    }
    failed
}
