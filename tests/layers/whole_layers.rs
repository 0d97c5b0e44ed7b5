//! Unpacking layers without an index, and proving layers that have one.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test that cannot go on stops, and says when it is skipped"
)]

use std::io::Write as _;
use std::sync::Arc;

use soci_fs::fuse::file_system::FileSystem as _;
use soci_fs::fuse::image::Image;
use soci_fs::layer::proof::{self, ProofError, Verdict};
use soci_fs::layer::reader::{LayerReader, Policy};
use soci_fs::layer::source::Source;
use soci_fs::layer::source::faulty::{Fault, FaultySource};
use soci_fs::layer::source::memory::MemorySource;
use soci_fs::layer::store::Store;
use soci_fs::layer::unpack::{Encoding, LayerClaim, UnpackError, unpack};
use soci_index::format::checkpoint::Window;
use soci_index::format::digest::Digest;
use soci_index::format::index::Windows;
use tokio::sync::watch;

use soci_tests::reading::{Layer, noise, plain_policy, sample_tar};

fn store() -> (tempfile::TempDir, Store) {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path()).unwrap();
    (directory, store)
}

fn claim(blob: &[u8], tar: &[u8]) -> LayerClaim {
    LayerClaim { digest: Digest::of(blob), size: blob.len() as u64, diff_id: Digest::of(tar) }
}

fn blobs() -> Vec<(Encoding, Vec<u8>, Vec<u8>)> {
    let tar = sample_tar(40, 300_000);
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&tar).unwrap();
    let (front, back) = tar.split_at(5_000_000);
    let frames = [zstd::bulk::compress(front, 1).unwrap(), zstd::bulk::compress(back, 1).unwrap()].concat();
    vec![
        (Encoding::Gzip, gzip.finish().unwrap(), tar.clone()),
        (Encoding::Zstd, frames, tar.clone()),
        (Encoding::Tar, tar.clone(), tar),
    ]
}

#[tokio::test]
async fn a_layer_without_an_index_is_streamed_into_the_store() {
    for (encoding, blob, tar) in blobs() {
        assert_eq!(Encoding::sniff(&blob), encoding);
        let (_directory, store) = store();
        let source = Arc::new(MemorySource::new(blob.clone()));
        let unpacked = unpack(&store, &*source, claim(&blob, &tar), encoding).await.unwrap();
        assert_eq!(source.requests(), 1);
        assert!(unpacked.store.is_complete() && unpacked.store.is_proven());
        let dead: Arc<dyn Source> = Arc::new(FaultySource::and_then_always(source, [], Fault::Refuse));
        let runtime = tokio::runtime::Handle::current();
        let reader =
            LayerReader::new(Digest::of(&blob), unpacked.index, unpacked.store, dead, Policy::default(), &runtime);
        let image = Image::new(vec![reader]).unwrap();
        let file = image.lookup(image.lookup(1, b"dir2").unwrap().inode, b"file25").unwrap();
        assert!(image.read(file.inode, 0, 1 << 20).await.unwrap() == noise(26, 300_400));
    }
}

#[tokio::test]
async fn a_layer_that_is_not_what_the_image_says_leaves_nothing() {
    for (encoding, blob, tar) in blobs() {
        let right = claim(&blob, &tar);
        let (_directory, store) = store();
        let memory = || Arc::new(MemorySource::new(blob.clone()));
        let other = Digest::of(b"other");
        let wrong_tar = unpack(&store, &*memory(), LayerClaim { diff_id: other, ..right }, encoding).await;
        assert!(matches!(wrong_tar, Err(UnpackError::WrongTar { .. })), "{wrong_tar:?}");
        assert!(!store.directory(&right.whole().id()).exists());
        let wrong_blob = unpack(&store, &*memory(), LayerClaim { digest: other, ..right }, encoding).await;
        assert!(matches!(wrong_blob, Err(UnpackError::WrongBlob { .. })), "{wrong_blob:?}");
        for fault in [Fault::Refuse, Fault::Short(100_000), Fault::Break(100_000), Fault::Flip(1_000_000)] {
            let faulty = FaultySource::new(memory(), [fault.clone()]);
            let failed = unpack(&store, &faulty, right, encoding).await;
            assert!(failed.is_err(), "{encoding:?} {fault:?}");
            assert!(!store.directory(&right.whole().id()).exists());
        }
    }
    let (_directory, store) = store();
    let garbage = noise(1, 10_000);
    let failed = unpack(&store, &MemorySource::new(garbage.clone()), claim(&garbage, &garbage), Encoding::Tar).await;
    assert!(matches!(failed, Err(UnpackError::Index { .. })), "{failed:?}");
}

#[tokio::test]
async fn good_layers_are_proven_both_ways() {
    let (_directory, store) = store();
    for layer in [Layer::gzip(sample_tar(40, 50_000), 64 << 10), Layer::plain(sample_tar(41, 50_000), 64 << 10)] {
        let reader = layer.reader(&store, layer.memory(), Policy::default());
        let incomplete = proof::by_data(&reader, layer.claim.diff_id).await;
        assert!(matches!(incomplete, Err(ProofError::Incomplete { span: 0, .. })), "{incomplete:?}");
        // A part is enough for the proof by source.
        reader.read(100_000, 10).await.unwrap();
        assert_eq!(proof::by_source(&reader, layer.claim).await.unwrap(), Verdict::Proven);
        assert!(reader.store().is_proven());
        reader.fetching().complete().await.unwrap();
        assert_eq!(proof::by_data(&reader, layer.claim.diff_id).await.unwrap(), Verdict::Proven);
        assert_eq!(proof::by_data(&reader, Digest::of(b"other")).await.unwrap(), Verdict::Undecided);
    }
}

/// A layer is hashed beside the task that fetches it. What did not come when that one has ended is missed.
#[tokio::test]
async fn a_layer_is_proven_as_it_comes() {
    let (_directory, store) = store();
    for (seed, (diff_id, expected)) in [(42, (None, Verdict::Proven)), (43, (Some(b"other"), Verdict::Undecided))] {
        let layer = Layer::gzip(sample_tar(seed, 50_000), 64 << 10);
        let diff_id = diff_id.map_or(layer.claim.diff_id, |other| Digest::of(other));
        let reader = layer.reader(&store, layer.memory(), Policy::default());
        let (landed, so_far) = watch::channel(0);
        let proving = tokio::spawn({
            let reader = reader.clone();
            async move { proof::by_data_as_it_comes(&reader, diff_id, so_far).await }
        });
        reader.fetching().complete_telling(&landed).await.unwrap();
        assert_eq!(*landed.borrow(), reader.store().size());
        assert_eq!(proving.await.unwrap().unwrap(), expected);
        assert_eq!(reader.store().is_proven(), expected == Verdict::Proven);
    }
    let layer = Layer::gzip(sample_tar(44, 50_000), 64 << 10);
    let reader = layer.reader(&store, layer.memory(), Policy::default());
    reader.read(0, 10).await.unwrap();
    let (landed, so_far) = watch::channel(10);
    drop(landed);
    let failed = proof::by_data_as_it_comes(&reader, layer.claim.diff_id, so_far).await;
    assert!(matches!(failed, Err(ProofError::Incomplete { span, .. }) if span > 0), "{failed:?}");
}

/// The attack that digests of spans do not see: right compressed bytes, a changed window. The last span has no
/// neighbour to be compared with, so only the proof can show it.
#[tokio::test]
async fn a_forged_window_fails_the_proof() {
    let mut layer = Layer::gzip(sample_tar(40, 50_000), 64 << 10);
    let mut index = (*layer.index).clone();
    let last = index.windows.len() - 1;
    let Windows::Held(windows) = &mut index.windows else { panic!("the windows are elsewhere") };
    let mut window = *windows[last].load();
    for byte in &mut window {
        *byte = if *byte == b'0' { b'1' } else { *byte };
    }
    windows[last] = Window::pack(&window);
    layer.index = Arc::new(index);
    let (_directory, store) = store();
    let reader = layer.reader(&store, layer.memory(), plain_policy());
    let span = layer.index.spans.spans()[last].uncompressed.clone();
    let length = usize::try_from(span.end - span.start).unwrap();
    let read = reader.read(span.start, length).await.unwrap();
    assert!(read != layer.tar[usize::try_from(span.start).unwrap()..usize::try_from(span.end).unwrap()]);
    let failed = proof::by_source(&reader, layer.claim).await;
    assert!(matches!(failed, Err(ProofError::Content { offset, .. }) if span.contains(&offset)), "{failed:?}");
    assert!(reader.read(0, 10).await.is_err() && reader.health().condemned().is_some());
}

#[tokio::test]
async fn a_forged_table_fails_the_proof() {
    let mut layer = Layer::gzip(sample_tar(10, 5000), 64 << 10);
    let mut index = (*layer.index).clone();
    index.entries[4].uid = 77;
    layer.index = Arc::new(index);
    let (_directory, store) = store();
    let reader = layer.reader(&store, layer.memory(), Policy::default());
    let failed = proof::by_source(&reader, layer.claim).await;
    assert!(matches!(failed, Err(ProofError::Table { entry: 4, .. })), "{failed:?}");
    assert!(reader.read(0, 10).await.is_err());
}
