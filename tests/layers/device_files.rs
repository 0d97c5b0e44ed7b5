//! A forest whose layers can be opened as one file each, for a file system of the kernel's; and what it says of those
//! that turn out to be wrong.

use std::sync::{Arc, Mutex};

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use soci_fs::fuse::error::{FsError, OpenError};
use soci_fs::fuse::file_system::{FileSystem as _, Opening};
use soci_fs::fuse::forest::{Forest, ForestOptions, Opener};
use soci_fs::layer::reader::LayerReader;
use soci_fs::layer::store::Store;
use soci_fs::tree::NodeKind;
use soci_index::format::digest::Digest;
use soci_index::format::entry::EntryKind;
use soci_tests::reading::{Layer, files_tar, noise, quick};

/// The root of a mount.
const ROOT: u64 = 1;

fn layer() -> Layer {
    Layer::gzip(files_tar([("a/first", noise(1, 100_000)), ("a/empty", Vec::new()), ("b", noise(2, 700))]), 16 << 10)
}

/// Knows no layer, and notes which are wrong.
#[derive(Debug, Default)]
struct Watcher(Mutex<Vec<u16>>);

impl Opener for Watcher {
    fn open(&self, _slot: u16, digest: Digest) -> BoxFuture<'_, Result<LayerReader, OpenError>> {
        async move { Err(OpenError::Unknown { digest }) }.boxed()
    }

    fn distrusted(&self, slot: u16) {
        self.0.lock().unwrap().push(slot);
    }
}

fn forest(opener: Option<Arc<Watcher>>) -> Arc<Forest> {
    let opener = opener.map(|opener| opener as Arc<dyn Opener>);
    Arc::new(Forest::new(ForestOptions { opener, devices: true, ..ForestOptions::default() }))
}

/// The files' bytes stand where they stand in the tar; what is between them is zeros.
#[tokio::test(flavor = "multi_thread")]
async fn bytes_of_files_and_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let (store, layer, forest) = (Store::open(directory.path()).unwrap(), layer(), forest(None));
    forest.insert(4, layer.reader(&store, layer.memory(), quick())).unwrap();
    let device = forest.lookup(ROOT, b"4.tar").unwrap();
    let size = layer.index.uncompressed_size.next_multiple_of(512);
    assert_eq!((device.kind, device.permissions, device.size), (NodeKind::Regular, 0o400, size));
    let mut expected = vec![0; usize::try_from(size).unwrap()];
    for entry in layer.index.entries.iter().filter(|entry| entry.kind == EntryKind::Regular) {
        let (start, length) = (usize::try_from(entry.data_offset).unwrap(), usize::try_from(entry.size).unwrap());
        expected[start..start + length].copy_from_slice(&layer.tar[start..start + length]);
    }
    assert!(expected != layer.tar[..expected.len()], "headers are no file's bytes");
    for (offset, length) in [(0, expected.len()), (500, 2000), (512, 512), (99_000, 4000), (expected.len() - 10, 10)] {
        let read = forest.read(device.inode, offset as u64, length).await.unwrap();
        assert!(read == expected[offset..offset + length], "{offset}+{length}");
        // All of it is here now.
        let mut buffer = b"left from before".to_vec();
        assert!(forest.try_read(device.inode, offset as u64, length, &mut buffer).unwrap());
        assert!(buffer == read, "{offset}+{length}");
    }
    assert_eq!(forest.read(device.inode, size, 10).await.unwrap(), b"");
    assert!(forest.has_direct_files());
    let mut listed = Vec::new();
    forest
        .list(ROOT, 0, &mut |seen| {
            listed.push(seen.name.to_vec());
            true
        })
        .unwrap();
    assert_eq!(listed, [b"4"]);
}

/// What opened a file of one layer gets nothing of the next one in the slot.
#[tokio::test]
async fn a_handle_is_of_one_layer() {
    let directory = tempfile::tempdir().unwrap();
    let (store, forest) = (Store::open(directory.path()).unwrap(), forest(None));
    let (one, other) = (layer(), Layer::gzip(files_tar([("c", noise(3, 1000))]), 16 << 10));
    forest.insert(4, one.reader(&store, one.memory(), quick())).unwrap();
    let device = forest.lookup(ROOT, b"4.tar").unwrap().inode;
    let handle = forest.opening(device);
    assert!(matches!(handle, Opening::Direct { handle } if handle != 0));
    assert_eq!(forest.opening(forest.lookup(ROOT, b"4").unwrap().inode), Opening::Cached);
    forest.remove(4);
    assert_ne!(forest.opening(device), handle);
    assert!(matches!(forest.read(device, 0, 1).await, Err(FsError::NoSlot { slot: 4 })));
    forest.insert(4, other.reader(&store, other.memory(), quick())).unwrap();
    assert_ne!(forest.opening(device), handle);
    forest.insert(4, one.reader(&store, one.memory(), quick())).unwrap();
    assert_eq!(forest.opening(device), handle);
}

/// The directory of the state, for containers that stand on other directories.
#[tokio::test]
async fn the_state_alone() {
    let directory = tempfile::tempdir().unwrap();
    let (store, layer, forest) = (Store::open(directory.path()).unwrap(), layer(), forest(None));
    forest.insert(4, layer.reader(&store, layer.memory(), quick())).unwrap();
    let root = forest.lookup(ROOT, b"4.state").unwrap();
    assert_eq!((root.kind, forest.parent(root.inode).unwrap()), (NodeKind::Directory, ROOT));
    forest.list(root.inode, 0, &mut |_| panic!("it lists nothing")).unwrap();
    assert_eq!(forest.xattrs(root.inode).unwrap(), []);
    assert!(matches!(forest.lookup(root.inode, b"a"), Err(FsError::NotFound)));
    let state = forest.lookup(root.inode, b".soci-snapshotter").unwrap();
    let file = forest.lookup(state.inode, format!("{}.json", layer.digest()).as_bytes()).unwrap();
    let text = forest.read(file.inode, 0, 4096).await.unwrap();
    assert!(String::from_utf8(text).unwrap().contains("fetchedPercent"));
    // Only where layers are opened as one file.
    let plain = Arc::new(Forest::new(ForestOptions::default()));
    plain.insert(4, layer.reader(&store, layer.memory(), quick())).unwrap();
    for name in [&b"4.tar"[..], b"4.state"] {
        assert!(matches!(plain.lookup(ROOT, name), Err(FsError::NotFound)));
    }
}

/// What the kernel has by itself of a layer that is proven wrong the forest cannot take back: the opener is to.
#[tokio::test(flavor = "multi_thread")]
async fn the_opener_hears_of_wrong_layers() {
    let directory = tempfile::tempdir().unwrap();
    let (store, mut layer, watcher) = (Store::open(directory.path()).unwrap(), layer(), Arc::default());
    let forest = forest(Some(Arc::clone(&watcher)));
    let mut index = soci_index::format::index::LayerIndex::clone(&layer.index);
    index.entries.last_mut().unwrap().mode = 0o4755;
    layer.index = Arc::new(index);
    let reader = layer.reader(&store, layer.memory(), quick());
    forest.insert(7, reader.clone()).unwrap();
    reader.fetching().complete().await.unwrap();
    soci_fs::layer::proof::prove(&reader, layer.claim).await.unwrap_err();
    assert_eq!(*watcher.0.lock().unwrap(), [7]);
    let device = forest.lookup(ROOT, b"7.tar").unwrap().inode;
    assert!(matches!(forest.read(device, 512, 512).await, Err(FsError::Read(_))));
}
