//! Reading by a span index, whose windows come from a blob of their own.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on stops")]

use std::sync::Arc;

use bytes::Bytes;
use soci_fs::layer::reader::LayerReader;
use soci_fs::layer::source::Source;
use soci_fs::layer::source::faulty::{Fault, FaultySource};
use soci_fs::layer::source::memory::MemorySource;
use soci_fs::layer::store::Store;
use soci_index::format::compact;
use soci_index::format::index::{Compression, LayerIndex, Windows};
use soci_index::format::limits::Limits;
use soci_index::indexing::{Options, index_bytes};
use soci_tests::reading::{Layer, plain_policy, sample_tar};

const SPAN: u64 = 64 << 10;

/// A layer, and its windows blob.
fn layer(files: u64) -> (Layer, Vec<u8>) {
    let mut layer = Layer::gzip(sample_tar(files, 20_000), SPAN);
    let options = Options { compact: Some(SPAN), ..Options::of(Compression::Gzip) };
    let blobs = index_bytes(&layer.blob, options).unwrap().compact.unwrap().unwrap();
    layer.index = Arc::new(compact::decode(&blobs.toc, &Limits::DEFAULT).unwrap());
    assert!(layer.index.spans.len() > 8, "{}", layer.index.spans.len());
    (layer, blobs.windows)
}

fn reader(layer: &Layer, store: &Store, windows: Option<Arc<dyn Source>>) -> LayerReader {
    let kept = store.layer(&layer.indexed(), &layer.index).unwrap();
    let (index, runtime) = (Arc::clone(&layer.index), tokio::runtime::Handle::current());
    LayerReader::with_windows(
        layer.digest(),
        index,
        kept,
        layer.memory(),
        windows.map(Into::into),
        plain_policy(),
        &runtime,
    )
}

fn store() -> (tempfile::TempDir, Store) {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path()).unwrap();
    (directory, store)
}

fn span(layer: &Layer, span: usize) -> std::ops::Range<usize> {
    let place = &layer.index.spans.spans()[span].uncompressed;
    place.start as usize..place.end as usize
}

#[tokio::test]
async fn spans_in_any_order_and_all_at_once() {
    let (layer, windows) = layer(60);
    for order in [[7, 3, 5, 0], [1, 2, 3, 4]] {
        let (_directory, store) = store();
        let reader = reader(&layer, &store, Some(Arc::new(MemorySource::new(Bytes::from(windows.clone())))));
        for number in order {
            let place = span(&layer, number);
            let read = reader.read(place.start as u64, place.len()).await.unwrap();
            assert!(read == layer.tar[place], "span {number}");
        }
        reader.fetching().complete().await.unwrap();
        let size = layer.index.uncompressed_size as usize;
        assert!(reader.read(0, size).await.unwrap() == layer.tar[..size]);
    }
}

/// A span after one that is here needs no window; another one needs its own and no more.
#[tokio::test]
async fn only_the_windows_that_are_needed_are_fetched() {
    let (layer, windows) = layer(400);
    assert!(windows.len() > 64 << 10, "not fetched whole: {}", windows.len());
    let (_directory, store) = store();
    let reader = reader(&layer, &store, Some(Arc::new(MemorySource::new(Bytes::from(windows)))));
    let fetch = async |number: usize| {
        let (before, place) = (reader.counts(), span(&layer, number));
        assert!(reader.read(place.start as u64, place.len()).await.unwrap() == layer.tar[place]);
        let compressed = layer.index.spans.spans()[number].compressed.clone();
        let after = reader.counts();
        (
            after.requests - before.requests,
            after.fetched_bytes - before.fetched_bytes - (compressed.end - compressed.start),
        )
    };
    let length = u64::from(layer.index.window_place(20).unwrap().length);
    assert_eq!(fetch(20).await, (2, length));
    assert_eq!(fetch(21).await, (1, 0));
    assert_eq!(fetch(0).await, (1, 0));
}

/// Windows of spans that are about to be fetched come in one request, over others that are not needed.
#[tokio::test]
async fn planned_windows_come_together() {
    let (layer, windows) = layer(400);
    let requests = async |plan: &[u32]| {
        let (_directory, store) = store();
        let source = Arc::new(MemorySource::new(Bytes::from(windows.clone())));
        let reader = reader(&layer, &store, Some(source));
        plan.iter().for_each(|span| reader.fetching().plan(*span..*span + 1));
        for number in [20, 22, 24] {
            let place = span(&layer, number);
            assert!(reader.read(place.start as u64, place.len()).await.unwrap() == layer.tar[place]);
        }
        reader.counts().requests
    };
    let length = |span| u64::from(layer.index.window_place(span).unwrap().length);
    assert!(length(21) < 8 << 10 && length(23) < 8 << 10);
    // The spans, and their windows.
    assert_eq!(requests(&[20, 22, 24]).await, 3 + 1);
    // A plan of something else brings nothing along.
    assert_eq!(requests(&[2]).await, 3 + 3);
}

/// Windows that are wrong, or gone, cost bytes and never yield wrong ones: spans are decoded from the nearest one that
/// is here. One window that was damaged on the way is fetched again.
#[tokio::test]
async fn wrong_windows() {
    let (layer, windows) = layer(400);
    let (place, near) = (span(&layer, 20), span(&layer, 22));
    let read = async |source: Option<Arc<dyn Source>>| {
        let (_directory, store) = store();
        let reader = reader(&layer, &store, source);
        let read = reader.read(place.start as u64, place.len()).await.unwrap();
        assert!(read == layer.tar[place.clone()]);
        (reader.counts().decoded_spans, reader, store, _directory)
    };
    let mut forged = windows.clone();
    forged.iter_mut().for_each(|byte| *byte ^= 1);
    let wrong = [Some(forged), Some(windows[..100].to_vec()), None];
    for blob in wrong {
        let source = blob.map(|blob| Arc::new(MemorySource::new(Bytes::from(blob))) as Arc<dyn Source>);
        let (decoded, reader, _store, _directory) = read(source).await;
        assert_eq!(decoded, 21, "all that is before it");
        // And from there on only what lies between.
        assert!(reader.read(near.start as u64, near.len()).await.unwrap() == layer.tar[near.clone()]);
        assert_eq!(reader.counts().decoded_spans, 23);
        assert!(reader.health().condemned().is_none() && reader.health().last_error().is_none());
    }
    let honest: Arc<dyn Source> = Arc::new(MemorySource::new(Bytes::from(windows.clone())));
    for fault in [Fault::Flip(10), Fault::Short(3)] {
        let faulty = FaultySource::new(Arc::clone(&honest), [fault]);
        assert_eq!(read(Some(Arc::new(faulty))).await.0, 1);
    }
}

/// Many spans at once of a layer whose windows are gone: each is decoded once.
#[tokio::test]
async fn without_windows_all_is_decoded_once() {
    let (layer, _) = layer(400);
    let (_directory, store) = store();
    let reader = reader(&layer, &store, None);
    let count = layer.index.spans.len();
    let reads = [7, 3, count - 1, 11, 3].map(|number| {
        let (reader, place) = (reader.clone(), span(&layer, number));
        async move { (reader.read(place.start as u64, place.len()).await.unwrap(), place) }
    });
    for (read, place) in futures_util::future::join_all(reads).await {
        assert!(read == layer.tar[place]);
    }
    assert_eq!((reader.counts().decoded_spans, reader.store().is_complete()), (count as u64, true));
}

/// A window that the index vouches for and that is not the end of the span before: found when both are here.
#[tokio::test]
async fn a_forged_index_is_found_out() {
    let (mut layer, windows) = layer(60);
    let mut index = LayerIndex::clone(&layer.index);
    let Windows::Placed(places) = &mut index.windows else { panic!("held") };
    // The window of another span, in place of this one's.
    places[5] = places[7];
    layer.index = Arc::new(index);
    let (_directory, store) = store();
    let reader = reader(&layer, &store, Some(Arc::new(MemorySource::new(Bytes::from(windows)))));
    let _provisional = reader.read(span(&layer, 5).start as u64, 1).await.unwrap();
    // The span before shows what the window should have been.
    let error = reader.read(span(&layer, 4).start as u64, 1).await.unwrap_err();
    assert!(error.to_string().contains("out of service"), "{error}");
    assert!(reader.health().condemned().is_some());
}
