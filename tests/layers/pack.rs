//! Packs, as they are made.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on stops")]

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use soci_fs::foresight::profile::pack;
use soci_fs::layer::reader::LayerReader;
use soci_fs::layer::source::memory::MemorySource;
use soci_fs::layer::source::{Chunks, Source, SourceError};
use soci_fs::layer::store::Store;
use soci_index::format::digest::Digest;
use soci_index::format::limits::Limits;
use soci_index::format::profile::{PAGE_BYTES, Profile, Touched};
use soci_tests::reading::{Layer, plain_policy, sample_tar};

const SPAN: u64 = 64 << 10;
/// Of the pages that the profile names.
const COUNT: u64 = 40;

/// Takes its time, the earlier of the ranges more of it, and counts how many answers it owes.
#[derive(Debug)]
struct Slow {
    inner: Arc<MemorySource>,
    owed: AtomicUsize,
    owed_max: AtomicUsize,
}

impl Source for Slow {
    fn read(&self, range: Range<u64>) -> BoxFuture<'_, Result<Chunks, SourceError>> {
        async move {
            let owed = self.owed.fetch_add(1, Ordering::SeqCst) + 1;
            self.owed_max.fetch_max(owed, Ordering::SeqCst);
            tokio::time::sleep(Duration::from_millis(20 + 10 * (3 - range.start / SPAN % 4))).await;
            let answer = self.inner.read(range).await;
            self.owed.fetch_sub(1, Ordering::SeqCst);
            answer
        }
        .boxed()
    }
}

/// A page of every span, from the last to the first.
fn profile(layer: &Layer) -> Profile {
    let page = |number: u64| number * SPAN + PAGE_BYTES..number * SPAN + 2 * PAGE_BYTES;
    let ranges = (0..COUNT).rev().map(|number| Touched { layer: 0, bytes: page(number) });
    Profile::new(vec![layer.digest()], ranges.collect(), &Limits::DEFAULT).unwrap()
}

async fn made(profile: &Profile, reader: &LayerReader) -> (Profile, Vec<u8>) {
    let mut packed = Vec::new();
    let made = pack::make(profile, std::slice::from_ref(reader), &mut packed).await.unwrap();
    (made, packed)
}

/// Several ranges are read at a time, a bounded number, and stand in the pack as if each had waited for the one before.
#[tokio::test]
async fn ranges_are_read_side_by_side_and_packed_in_order() {
    let layer = Layer::plain(sample_tar(200, 20_000), SPAN);
    assert!(layer.index.spans.len() as u64 > COUNT, "{}", layer.index.spans.len());
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path()).unwrap();
    let slow = Arc::new(Slow { inner: layer.memory(), owed: AtomicUsize::new(0), owed_max: AtomicUsize::new(0) });
    let reader = layer.reader(&store, Arc::clone(&slow) as Arc<dyn Source>, plain_policy());
    let profile = profile(&layer);
    let (with_digests, packed) = made(&profile, &reader).await;
    let most = slow.owed_max.load(Ordering::SeqCst);
    assert!((8..=16).contains(&most), "{most}");

    let content = |range: &Touched| &layer.tar[range.bytes.start as usize..range.bytes.end as usize];
    assert_eq!(with_digests.ranges(), profile.ranges());
    let expected: Vec<u8> = profile.ranges().iter().flat_map(content).copied().collect();
    assert!(zstd::decode_all(&packed[..]).unwrap() == expected, "in another order");
    for (range, digest) in profile.ranges().iter().zip(with_digests.digests()) {
        assert_eq!(Digest::of(content(range)).bytes(), digest);
    }
    // With all here nothing waits for anything, and the pack is the same, byte for byte.
    assert_eq!(made(&profile, &reader).await, (with_digests, packed));
}
