//! The span reader over honest and faulty sources.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test that cannot go on stops, and says when it is skipped"
)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use soci_fs::layer::reader::{Cause, LayerReader, Policy};
use soci_fs::layer::source::Source;
use soci_fs::layer::source::faulty::{Fault, FaultySource};
use soci_fs::layer::source::file::FileSource;
use soci_fs::layer::source::memory::MemorySource;
use soci_fs::layer::store::{BootId, Store};
use soci_index::format::checkpoint::{WINDOW_BYTES, Window};
use soci_index::format::index::Windows;
use soci_tests::reading::{Layer, noise, plain_policy, quick, sample_tar};

const SPAN: u64 = 64 << 10;

fn layer() -> Layer {
    let layer = Layer::gzip(sample_tar(60, 20_000), SPAN);
    assert!(layer.index.spans.len() > 8, "{}", layer.index.spans.len());
    layer
}

struct Bench {
    layer: Layer,
    reader: LayerReader,
    _store: Store,
    _directory: tempfile::TempDir,
}

fn bench(layer: Layer, source: Arc<dyn Source>, policy: Policy) -> Bench {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path()).unwrap();
    let reader = layer.reader(&store, source, policy);
    Bench { layer, reader, _store: store, _directory: directory }
}

async fn assert_reads(bench: &Bench, offset: usize, length: usize) {
    let found = bench.reader.read(offset as u64, length).await.unwrap();
    assert!(found == bench.layer.tar[offset..offset + length], "{offset}+{length}");
}

#[tokio::test]
async fn every_range_is_the_range_of_the_tar() {
    for layer in [layer(), Layer::plain(sample_tar(60, 20_000), SPAN)] {
        let source = layer.memory();
        let bench = bench(layer, source, Policy::default());
        let size = usize::try_from(bench.layer.index.uncompressed_size).unwrap();
        for (offset, length) in [(0, 1), (0, 0), (size - 1, 1), (size, 0), (65_535, 2), (100, 300_000), (0, size)] {
            assert_reads(&bench, offset, length).await;
        }
        assert!(bench.reader.store().is_complete());
        let beyond = bench.reader.read(bench.layer.index.uncompressed_size, 1).await.unwrap_err();
        assert!(matches!(beyond.cause, Cause::OutOfRange { .. }), "{beyond}");
        assert!(bench.reader.read(u64::MAX, 2).await.is_err());
    }
}

#[tokio::test]
async fn every_file_is_read_and_its_header_checked() {
    let layer = layer();
    let source = layer.memory();
    let bench = bench(layer, source, Policy::default());
    for (number, entry) in (0..).zip(&bench.layer.index.entries) {
        let whole = bench.reader.read_file(number, 0, 1 << 20).await.unwrap();
        let start = usize::try_from(entry.data_offset).unwrap();
        assert!(whole == bench.layer.tar[start..start + usize::try_from(entry.size).unwrap()]);
        let mut again = Vec::new();
        assert!(bench.reader.try_read_file(number, 5, 10, &mut again).unwrap());
        assert_eq!(again, whole.iter().skip(5).take(10).copied().collect::<Vec<_>>());
    }
}

#[tokio::test]
async fn an_entry_that_lies_is_not_served() {
    let mut layer = layer();
    let mut index = (*layer.index).clone();
    index.entries[3].mode = 0o4755;
    layer.index = Arc::new(index);
    let source = layer.memory();
    let bench = bench(layer, source, Policy::default());
    let error = bench.reader.read_file(3, 0, 10).await.unwrap_err();
    assert!(matches!(error.cause, Cause::Header(_)), "{error}");
    assert!(error.to_string().contains("dir0/file2"), "{error}");
    assert!(bench.reader.read_file(4, 0, 10).await.is_ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn one_flight_for_many_readers() {
    let layer = layer();
    let source = layer.memory();
    let slow: Arc<dyn Source> =
        Arc::new(FaultySource::and_then_always(Arc::clone(&source) as _, [], Fault::Delay(Duration::from_millis(50))));
    let bench = Arc::new(bench(layer, slow, plain_policy()));
    let readers = (0..64).map(|_| {
        let bench = Arc::clone(&bench);
        tokio::spawn(async move { assert_reads(&bench, 200_000, 5).await })
    });
    for reader in readers.collect::<Vec<_>>() {
        reader.await.unwrap();
    }
    assert_eq!(source.requests(), 1);
    assert_eq!(bench.reader.counts().decoded_spans, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_readers_of_everything_fetch_each_span_once() {
    let layer = layer();
    let source = layer.memory();
    let bench = Arc::new(bench(layer, Arc::clone(&source) as _, Policy::default()));
    let size = usize::try_from(bench.layer.index.uncompressed_size).unwrap();
    let readers = (0..16).map(|reader| {
        let bench = Arc::clone(&bench);
        tokio::spawn(async move {
            for step in 0..100 {
                let offset = (step * 7919 * (reader + 3) * 31) % (size - 30_000);
                assert_reads(&bench, offset, 1 + (step * 331) % 30_000).await;
            }
        })
    });
    for reader in readers.collect::<Vec<_>>() {
        reader.await.unwrap();
    }
    assert!(bench.reader.counts().decoded_spans <= bench.layer.index.spans.len() as u64);
}

#[tokio::test]
async fn neighbours_share_a_request() {
    let layer = layer();
    let source = layer.memory();
    let bench = bench(layer, Arc::clone(&source) as _, plain_policy());
    assert_reads(&bench, 0, 300_000).await;
    assert_eq!(source.requests(), 1);
    // What is present splits the rest into two.
    assert_reads(&bench, 600_000, 1).await;
    assert_reads(&bench, 400_000, 500_000).await;
    assert_eq!(source.requests(), 4);
}

#[tokio::test]
async fn faults_that_pass_are_survived() {
    let faults = [
        Fault::Short(100),
        Fault::Short(0),
        Fault::Break(30_000),
        Fault::Flip(70),
        Fault::Flip(40_000),
        Fault::Refuse,
        Fault::Long(5000),
        Fault::Hang,
        Fault::Delay(Duration::from_millis(20)),
    ];
    for fault in faults {
        let layer = layer();
        let faulty = Arc::new(FaultySource::new(layer.memory(), [fault.clone()]));
        let bench = bench(layer, Arc::clone(&faulty) as _, quick());
        assert_reads(&bench, 1000, 400_000).await;
        assert!(faulty.requests() <= 12, "{fault:?}: {}", faulty.requests());
    }
}

#[tokio::test]
async fn faults_that_stay_are_typed_errors_in_time() {
    for (fault, expected) in [
        (Fault::Short(100), "delivered"),
        (Fault::Break(100), "cut"),
        (Fault::Flip(70), "SHA-256"),
        (Fault::Refuse, "refused"),
        (Fault::Hang, "no answer"),
        (Fault::Delay(Duration::from_secs(60)), "no answer"),
    ] {
        let layer = layer();
        let faulty = Arc::new(FaultySource::and_then_always(layer.memory(), [], fault.clone()));
        // A neighbour fetched along may well come whole, and stay.
        let bench = bench(layer, faulty, Policy { ahead_bytes_max: 0, ..quick() });
        let started = Instant::now();
        let error = bench.reader.read(200_000, 10).await.unwrap_err();
        assert!(started.elapsed() < Duration::from_secs(3));
        let text = error.to_string();
        assert!(text.contains(expected) && text.contains("span 2") && text.contains("200000"), "{fault:?}: {text}");
        assert!(text.contains(&bench.layer.digest().to_string()));
        assert_eq!(bench.reader.store().present_spans(), 0);
        assert_eq!(bench.reader.health().last_error().as_deref(), Some(&*text));
    }
}

#[tokio::test]
async fn a_source_that_recovers_is_used_again() {
    let layer = layer();
    let faulty = Arc::new(FaultySource::new(layer.memory(), [Fault::Refuse, Fault::Refuse]));
    let bench = bench(layer, faulty, quick());
    assert!(bench.reader.read(0, 10).await.is_err());
    assert_reads(&bench, 0, 10).await;
}

#[tokio::test]
async fn what_is_present_needs_no_source() {
    let layer = layer();
    let directory = tempfile::tempdir().unwrap();
    let dead: Arc<dyn Source> = Arc::new(FaultySource::and_then_always(layer.memory(), [], Fault::Refuse));
    {
        let store = Store::open(directory.path()).unwrap();
        let source = layer.memory();
        layer.reader(&store, source, Policy::default()).fetching().complete().await.unwrap();
    }
    // Another process, as after a kill: nothing was closed in order, and nothing needs to be.
    let store = Store::open(directory.path()).unwrap();
    let reader = layer.reader(&store, Arc::clone(&dead), quick());
    let size = usize::try_from(layer.index.uncompressed_size).unwrap();
    assert!(reader.read(0, size).await.unwrap() == layer.tar[..size]);
    drop((reader, store));
    // Another boot, and the disk has lost a byte: found at first use, and fetched again.
    let data = Store::open(directory.path()).unwrap().directory(&layer.indexed().id()).join("data");
    let mut bytes = std::fs::read(&data).unwrap();
    bytes[150_000] ^= 1;
    std::fs::write(&data, bytes).unwrap();
    let store = Store::open_in_boot(directory.path(), BootId([7; 16])).unwrap();
    let reader = layer.reader(&store, dead, quick());
    assert!(reader.read(0, 1000).await.unwrap() == layer.tar[..1000]);
    assert!(reader.read(150_000, 10).await.is_err());
    drop(reader);
    let source = layer.memory();
    let reader = layer.reader(&store, Arc::clone(&source) as _, plain_policy());
    assert!(reader.read(150_000, 10).await.unwrap() == layer.tar[150_000..150_010]);
    assert_eq!(source.requests(), 1);
}

#[tokio::test]
async fn a_full_disk_costs_no_reads() {
    let layer = layer();
    let directory = tempfile::tempdir().unwrap();
    let mount = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=256k", "none"])
        .arg(directory.path())
        .output();
    if !mount.is_ok_and(|output| output.status.success()) {
        eprintln!("SKIPPED: cannot mount a small tmpfs here");
        return;
    }
    {
        let store = Store::open(directory.path()).unwrap();
        let source = layer.memory();
        let reader = layer.reader(&store, Arc::clone(&source) as _, plain_policy());
        let size = usize::try_from(layer.index.uncompressed_size).unwrap();
        assert!(reader.read(0, size).await.unwrap() == layer.tar[..size]);
        assert!(reader.store().present_bytes() < layer.index.uncompressed_size);
        // What could not be stored is at hand for a while.
        let requests = source.requests();
        assert!(reader.read(size as u64 - 10, 10).await.unwrap() == layer.tar[size - 10..size]);
        assert_eq!(source.requests(), requests);
    }
    // Read-ahead may still be busy in it.
    soci_fs::fuse::mount::unmount(directory.path(), soci_fs::fuse::mount::Lazy::Yes).unwrap();
}

/// An index whose windows were changed passes every digest. The neighbour that was decoded shows it.
#[tokio::test]
async fn a_forged_window_takes_the_layer_out_of_service() {
    let mut layer = layer();
    let mut index = (*layer.index).clone();
    let Windows::Held(windows) = &mut index.windows else { panic!("the windows are elsewhere") };
    let mut window = *windows[3].load();
    for byte in &mut window[WINDOW_BYTES - 2000..] {
        *byte = b'#';
    }
    windows[3] = Window::pack(&window);
    layer.index = Arc::new(index);
    let source = layer.memory();
    let bench = bench(layer, source, quick());
    let span = bench.layer.index.spans.spans()[2].uncompressed.clone();
    let error = bench.reader.read(span.start, 10).await.unwrap_err();
    assert!(matches!(error.cause, Cause::Window { span: 3 }), "{error}");
    assert!(bench.reader.health().condemned().is_some());
    assert!(bench.reader.read(0, 10).await.is_err());
}

#[tokio::test]
async fn walking_reads_ahead_and_jumping_does_not() {
    let layer = Layer::plain(sample_tar(200, 20_000), SPAN);
    let source = layer.memory();
    let bench = bench(layer, Arc::clone(&source) as _, Policy::default());
    let spans = bench.layer.index.spans.len() as u64;
    let jumps = spans.div_ceil(3);
    let jump = async |reader: &LayerReader| {
        for span in (0..spans).rev().step_by(3) {
            reader.read(span * SPAN + 5, 10).await.unwrap();
        }
    };
    jump(&bench.reader).await;
    // How many neighbours a jump is worth depends on how soon this machine answers: none, if it is not busy. How many
    // there may be in all does not: a third of what was read, and the 384 KiB that are credit. Nothing else is fetched.
    let (counts, requested) = (bench.reader.ahead().counts(), source.requested_bytes().div_ceil(SPAN));
    assert_eq!(u64::from(counts.read), jumps);
    assert!(u64::from(counts.unread) <= jumps / 3 + (384 << 10) / SPAN, "{counts:?}");
    assert!((jumps..=jumps + u64::from(counts.unread)).contains(&requested), "{requested} {counts:?}");
    // Where nothing is guessed, a jump costs its span.
    let jumped = tempfile::tempdir().unwrap();
    let store = Store::open(jumped.path()).unwrap();
    let source = Arc::new(MemorySource::new(bench.layer.blob.clone()));
    jump(&bench.layer.reader(&store, Arc::clone(&source) as _, plain_policy())).await;
    assert_eq!(source.requested_bytes().div_ceil(SPAN), jumps);
    let walked = tempfile::tempdir().unwrap();
    let store = Store::open(walked.path()).unwrap();
    let source = Arc::new(MemorySource::new(bench.layer.blob.clone()));
    let reader = bench.layer.reader(&store, Arc::clone(&source) as _, Policy::default());
    for span in 0..spans - 1 {
        reader.read(span * SPAN + 5, 10).await.unwrap();
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    // The first eight one by one at worst: bytes of no file, from a source that is as near as can be. From then on in
    // pieces of at least half of what was walked.
    assert!(source.requests() < 8 + (spans - 8) / 4, "{} requests for {spans} spans", source.requests());
    assert_eq!(reader.counts().decoded_spans, spans);
}

#[tokio::test]
async fn file_and_memory_sources_agree() {
    use futures_util::StreamExt as _;
    let bytes = noise(1, 1_000_000);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &bytes).unwrap();
    let sources: [Arc<dyn Source>; 2] =
        [Arc::new(FileSource::open(file.path()).unwrap()), Arc::new(MemorySource::new(bytes.clone()))];
    for source in sources {
        for range in [0..0, 0..1, 999_999..1_000_000, 5..900_000, 0..1_000_000] {
            let mut found = Vec::new();
            let mut chunks = source.read(range.clone()).await.unwrap();
            while let Some(chunk) = chunks.next().await {
                found.extend_from_slice(&chunk.unwrap());
            }
            assert!(found == bytes[usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()]);
        }
        assert!(source.read(5..1_000_001).await.is_err());
    }
}

/// A quota smaller than the layer: everything is read right, and the store stays small.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_quota_smaller_than_the_layer() {
    let layer = layer();
    let directory = tempfile::tempdir().unwrap();
    let store = Arc::new(Store::open(directory.path()).unwrap());
    let reader = layer.reader(&store, layer.memory(), Policy::default());
    let quota = 300_000;
    let keeper = tokio::spawn(Arc::clone(&store).keep_within(quota, Duration::from_millis(1)));
    let size = usize::try_from(layer.index.uncompressed_size).unwrap();
    for step in 0..300_usize {
        let offset = (step * 1_299_721) % (size - 100_000);
        let read = reader.read(offset as u64, 100_000).await.unwrap();
        assert!(read == layer.tar[offset..offset + 100_000], "{step}");
    }
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(store.disk_bytes().unwrap() <= quota + 100_000, "{}", store.disk_bytes().unwrap());
    keeper.abort();
}

/// The data file was cut short by another program.
#[tokio::test]
async fn a_store_that_cannot_be_read_is_filled_again() {
    let layer = layer();
    let source = layer.memory();
    let bench = bench(layer, Arc::clone(&source) as _, plain_policy());
    bench.reader.fetching().complete().await.unwrap();
    let requests = source.requests();
    let data = bench.reader.store().directory().join("data");
    std::fs::File::options().write(true).open(data).unwrap().set_len(100_000).unwrap();
    assert_reads(&bench, 200_000, 100_000).await;
    assert!(source.requests() > requests);
    let requests = source.requests();
    assert_reads(&bench, 200_000, 100_000).await;
    assert_eq!(source.requests(), requests);
}
