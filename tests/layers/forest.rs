//! All layers side by side, asked without a mount.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on stops")]

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use soci_fs::fuse::errno;
use soci_fs::fuse::error::{FsError, OpenError};
use soci_fs::fuse::file_system::FileSystem as _;
use soci_fs::fuse::forest::{Forest, ForestError, ForestOptions, OpaqueAttribute, Opener};
use soci_fs::layer::reader::{LayerReader, Policy};
use soci_fs::layer::store::Store;
use soci_fs::tree::NodeKind;
use soci_fs::tree::id_map::{IdMap, IdRange};
use soci_index::format::digest::Digest;
use soci_tests::reading::{Layer, noise, quick, sample_tar};

const ROOT: u64 = 1;

/// A tar of `(name, kind letter, link or content)`.
fn tar_of(entries: &[(&str, char, &str)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (number, (name, kind, text)) in (1..).zip(entries) {
        let mut header = tar::Header::new_gnu();
        header.set_uid(number * 100);
        header.set_gid(number * 10);
        header.set_mode(0o750);
        header.set_size(0);
        header.set_entry_type(match kind {
            'd' => tar::EntryType::Directory,
            's' => tar::EntryType::Symlink,
            'h' => tar::EntryType::Link,
            _ => tar::EntryType::Regular,
        });
        if matches!(kind, 's' | 'h') {
            builder.append_link(&mut header, name, text).unwrap();
        } else {
            header.set_size(text.len() as u64);
            builder.append_data(&mut header, name, text.as_bytes()).unwrap();
        }
    }
    builder.into_inner().unwrap()
}

struct Bench {
    _directory: tempfile::TempDir,
    store: Store,
}

impl Bench {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        Self { _directory: directory, store }
    }

    fn reader(&self, layer: &Layer) -> LayerReader {
        layer.reader(&self.store, layer.memory(), quick())
    }
}

/// Walks a path from the forest's root.
fn find(forest: &Forest, path: &str) -> Result<u64, FsError> {
    path.split('/').try_fold(ROOT, |inode, name| Ok(forest.lookup(inode, name.as_bytes())?.inode))
}

fn names(forest: &Forest, inode: u64, from: u64) -> Vec<String> {
    let mut names = Vec::new();
    forest
        .list(inode, from, &mut |seen| {
            names.push(String::from_utf8(seen.name.to_vec()).unwrap());
            true
        })
        .unwrap();
    names
}

fn xattr_names(forest: &Forest, inode: u64) -> Vec<Vec<u8>> {
    forest.xattrs(inode).unwrap().into_iter().map(|xattr| xattr.name).collect()
}

fn number(error: &FsError) -> i32 {
    errno::of_fs(error).raw_os_error()
}

#[tokio::test]
async fn a_layer_is_shown_as_overlayfs_wants_it() {
    let bench = Bench::new();
    let tar = tar_of(&[
        ("d/", 'd', ""),
        ("d/file", 'f', "content"),
        ("d/.wh.gone", 'f', ""),
        ("d/.wh.file", 'f', ""),
        ("o/", 'd', ""),
        ("o/.wh..wh..opq", 'f', ""),
        ("link", 's', "d/file"),
        ("hard", 'h', "elsewhere/in/a/lower/layer"),
    ]);
    let layer = Layer::gzip(tar, 64 << 10);
    for (opaque, name) in
        [(OpaqueAttribute::Trusted, "trusted.overlay.opaque"), (OpaqueAttribute::User, "user.overlay.opaque")]
    {
        let forest = Arc::new(Forest::new(ForestOptions { opaque, ..ForestOptions::default() }));
        forest.insert(7, bench.reader(&layer)).unwrap();
        assert_eq!(names(&forest, find(&forest, "7").unwrap(), 0), ["d", "link", "o"]);
        assert_eq!(names(&forest, find(&forest, "7/d").unwrap(), 0), ["file", "gone"]);
        let gone = forest.attributes(find(&forest, "7/d/gone").unwrap()).unwrap();
        let shown = (gone.kind, gone.permissions, gone.links, gone.uid, gone.gid, gone.device, gone.size);
        assert_eq!(shown, (NodeKind::Whiteout, 0, 1, 0, 0, 0, 0));
        let opaque = find(&forest, "7/o").unwrap();
        assert_eq!(forest.xattr(opaque, name.as_bytes()).unwrap(), b"y");
        assert_eq!(xattr_names(&forest, opaque), [name.as_bytes()]);
        let plain = find(&forest, "7/d").unwrap();
        assert!(matches!(forest.xattr(plain, name.as_bytes()), Err(FsError::NoAttribute)));
        assert!(matches!(forest.xattr(opaque, b"security.capability"), Err(FsError::NoAttribute)));
        assert_eq!(forest.read_link(find(&forest, "7/link").unwrap()).unwrap(), b"d/file");
        assert!(matches!(find(&forest, "7/hard"), Err(FsError::NotFound)));
        assert_eq!((forest.hidden_links(7), forest.hidden_links(8)), (Some(1), None));
        let file = find(&forest, "7/d/file").unwrap();
        assert_eq!(forest.read(file, 3, 100).await.unwrap(), b"tent");
        assert!(matches!(forest.read(plain, 0, 1).await, Err(FsError::IsDirectory)));
        assert!(matches!(forest.lookup(file, b"x"), Err(FsError::NotDirectory)));
        for (directory, above) in [("7/d", "7"), ("7/o", "7")] {
            assert_eq!(forest.parent(find(&forest, directory).unwrap()).unwrap(), find(&forest, above).unwrap());
        }
        assert_eq!(forest.parent(find(&forest, "7").unwrap()).unwrap(), ROOT);
    }
}

/// A layer's own word about overlayfs's attributes does not count.
#[tokio::test]
async fn a_layer_gives_overlayfs_no_orders() {
    let bench = Bench::new();
    let mut builder = tar::Builder::new(Vec::new());
    let records = [
        ("SCHILY.xattr.trusted.overlay.redirect", &b"/etc"[..]),
        ("SCHILY.xattr.user.overlay.opaque", b"y"),
        ("SCHILY.xattr.user.colour", b"blue"),
    ];
    builder.append_pax_extensions(records).unwrap();
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(tar::EntryType::Directory);
    header.set_size(0);
    builder.append_data(&mut header, "d/", &[][..]).unwrap();
    let forest = Forest::new(ForestOptions::default());
    forest.insert(1, bench.reader(&Layer::plain(builder.into_inner().unwrap(), 64 << 10))).unwrap();
    let directory = find(&forest, "1/d").unwrap();
    assert_eq!(xattr_names(&forest, directory), [b"user.colour"]);
    for name in ["trusted.overlay.redirect", "user.overlay.opaque"] {
        assert!(matches!(forest.xattr(directory, name.as_bytes()), Err(FsError::NoAttribute)), "{name}");
    }
}

#[tokio::test]
async fn slots_come_and_go() {
    let bench = Bench::new();
    let first = Layer::gzip(tar_of(&[("first", 'f', "1")]), 64 << 10);
    let second = Layer::gzip(tar_of(&[("second", 'f', "2")]), 64 << 10);
    let forest = Arc::new(Forest::new(ForestOptions::default()));
    assert_eq!(names(&forest, ROOT, 0), [""; 0]);
    for slot in [0, u16::MAX] {
        assert_eq!(forest.insert(slot, bench.reader(&first)), Err(ForestError::Slot { slot }));
    }
    let mut times = vec![forest.attributes(ROOT).unwrap().modified];
    for slot in [300, 2, 65534] {
        assert!(matches!(find(&forest, &slot.to_string()), Err(FsError::NotFound)));
        forest.insert(slot, bench.reader(&first)).unwrap();
        times.push(forest.attributes(ROOT).unwrap().modified);
    }
    assert_eq!(names(&forest, ROOT, 0), ["2", "300", "65534"]);
    // Positions stay when others go.
    assert_eq!(names(&forest, ROOT, 3), ["300", "65534"]);
    assert_eq!(forest.attributes(ROOT).unwrap().links, 5);
    let file = find(&forest, "2/first").unwrap();
    assert_eq!(file, 2 << 40 | 2);
    assert_eq!(forest.read(file, 0, 9).await.unwrap(), b"1");
    let generation = forest.generation(file);
    assert!(generation > 0 && i32::try_from(generation).is_ok());
    assert!(forest.remove(2) && !forest.remove(2));
    times.push(forest.attributes(ROOT).unwrap().modified);
    let errors = [
        forest.read(file, 0, 9).await.unwrap_err(),
        forest.attributes(file).unwrap_err(),
        forest.try_read(file, 0, 9, &mut Vec::new()).unwrap_err(),
    ];
    for error in errors {
        assert!(matches!(error, FsError::NoSlot { slot: 2 }));
        assert_eq!(number(&error), 5);
    }
    // The slot's next layer has other files under the same numbers, and says so.
    forest.insert(2, bench.reader(&second)).unwrap();
    times.push(forest.attributes(ROOT).unwrap().modified);
    assert_eq!(find(&forest, "2/second").unwrap(), file);
    assert_ne!(forest.generation(file), generation);
    assert_eq!(forest.generation(ROOT), 0);
    assert!(
        times
            .windows(2)
            .all(|pair| { (pair[0].seconds, pair[0].nanoseconds) < (pair[1].seconds, pair[1].nanoseconds) })
    );
    assert!(!forest.is_constant(ROOT) && !forest.names_last(ROOT));
    assert!(forest.is_constant(file) && forest.names_last(find(&forest, "2").unwrap()));
}

#[tokio::test]
async fn a_mapped_view_has_other_owners() {
    let bench = Bench::new();
    let layer = Layer::gzip(tar_of(&[("a", 'f', ""), (".wh.b", 'f', ""), ("c/", 'd', "")]), 64 << 10);
    let forest = Forest::new(ForestOptions::default());
    forest.insert(5, bench.reader(&layer)).unwrap();
    let map = |host| IdMap {
        uids: vec![IdRange { container: 0, host, size: 200 }],
        gids: vec![IdRange { container: 0, host: host + 1, size: 30 }],
    };
    assert_eq!(forest.define_id_map(0, map(1)), Err(ForestError::IdMap));
    assert!(matches!(find(&forest, "5-3"), Err(FsError::NotFound)));
    forest.define_id_map(3, map(100_000)).unwrap();
    let owners = |path: &str| {
        let attributes = forest.attributes(find(&forest, path).unwrap()).unwrap();
        (attributes.uid, attributes.gid)
    };
    assert_eq!(owners("5/a"), (100, 10));
    assert_eq!(owners("5-3/a"), (100_100, 100_011));
    assert_eq!(owners("5-3/b"), (0, 0));
    assert_eq!(owners("5-3/c"), (65534, 65534));
    assert_eq!(owners("5-3"), (100_000, 100_001));
    assert_eq!(find(&forest, "5-3/a").unwrap(), 3 << 56 | 5 << 40 | (find(&forest, "5/a").unwrap() & 0xff_ffff));
    // A view is found and not listed.
    assert_eq!(names(&forest, ROOT, 0), ["5"]);
    let file = find(&forest, "5-3/a").unwrap();
    assert!(forest.remove_id_map(3));
    assert!(matches!(forest.attributes(file), Err(FsError::NoIdMap { id_map: 3, slot: 5 })));
    assert_eq!(owners("5/a"), (100, 10));
}

async fn state(forest: &Arc<Forest>, path: &str) -> serde_json::Value {
    let inode = find(forest, path).unwrap();
    let attributes = forest.attributes(inode).unwrap();
    let text = forest.read(inode, 0, 1 << 20).await.unwrap();
    assert_eq!(text.len() as u64, attributes.size);
    serde_json::from_slice(&text).unwrap()
}

#[tokio::test]
async fn the_state_file() {
    let bench = Bench::new();
    let layer = Layer::gzip(sample_tar(10, 100_000), 64 << 10);
    let forest = Arc::new(Forest::new(ForestOptions::default()));
    forest.insert(9, layer.reader(&bench.store, layer.memory(), soci_tests::reading::plain_policy())).unwrap();
    let path = format!("9/.soci-snapshotter/{}.json", layer.digest());
    let before = state(&forest, &path).await;
    assert_eq!(before["digest"], layer.digest().to_string());
    assert_eq!((before["size"].as_u64(), before["fetchedSize"].as_u64()), (Some(layer.blob.len() as u64), Some(0)));
    assert_eq!((before["fetchedPercent"].as_f64(), before.get("error")), (Some(0.0), None));
    let directory = find(&forest, "9/.soci-snapshotter").unwrap();
    assert_eq!(forest.attributes(directory).unwrap().permissions, 0o500);
    let file = forest.attributes(find(&forest, &path).unwrap()).unwrap();
    assert_eq!((file.permissions, file.kind), (0o400, NodeKind::Regular));
    assert!(!forest.is_constant(file.inode) && forest.is_constant(directory));
    assert_eq!(names(&forest, find(&forest, "9").unwrap(), 0), ["dir0"]);
    assert_eq!(names(&forest, directory, 0), [format!("{}.json", layer.digest())]);
    assert_eq!(names(&forest, directory, 1), [""; 0]);
    assert!(matches!(forest.lookup(directory, b"other.json"), Err(FsError::NotFound)));
    for number in 0..10 {
        let inode = find(&forest, &format!("9/dir0/file{number}")).unwrap();
        let expected = noise(number + 1, 100_000 + usize::try_from(number % 7).unwrap() * 100);
        assert!(forest.read(inode, 0, 1 << 20).await.unwrap() == expected);
        let percent = state(&forest, &path).await["fetchedPercent"].as_f64().unwrap();
        assert!(percent > 0.0 && (percent < 100.0 || number >= 8), "{number}: {percent}");
    }
    let after = state(&forest, &path).await;
    assert_eq!(
        (after["fetchedSize"].as_u64(), after["fetchedPercent"].as_f64()),
        (after["size"].as_u64(), Some(100.0))
    );
    // Where the layer has the name itself, it wins.
    let own = Layer::gzip(tar_of(&[(".soci-snapshotter/x", 'f', "mine")]), 64 << 10);
    forest.insert(10, bench.reader(&own)).unwrap();
    assert_eq!(names(&forest, find(&forest, "10").unwrap(), 0), [".soci-snapshotter"]);
    assert!(matches!(find(&forest, &format!("10/.soci-snapshotter/{}.json", own.digest())), Err(FsError::NotFound)));
}

/// Opens layers slowly, and counts.
#[derive(Debug)]
struct SlowOpener {
    readers: Mutex<BTreeMap<u16, LayerReader>>,
    opened: AtomicUsize,
    delay: Duration,
}

impl Opener for SlowOpener {
    fn open(&self, slot: u16, digest: Digest) -> BoxFuture<'_, Result<LayerReader, OpenError>> {
        async move {
            self.opened.fetch_add(1, Ordering::SeqCst);
            tokio::time::sleep(self.delay).await;
            self.readers.lock().unwrap().get(&slot).cloned().ok_or(OpenError::Unknown { digest })
        }
        .boxed()
    }
}

#[tokio::test]
async fn closed_slots_are_opened_once_when_touched() {
    let bench = Bench::new();
    let layer = Layer::gzip(tar_of(&[("a", 'f', "text")]), 64 << 10);
    let other = Layer::gzip(tar_of(&[("b", 'f', "else")]), 64 << 10);
    let opener = Arc::new(SlowOpener {
        readers: Mutex::new([(4, bench.reader(&layer)), (6, bench.reader(&other))].into()),
        opened: AtomicUsize::new(0),
        delay: Duration::from_millis(100),
    });
    let options = ForestOptions { opener: Some(Arc::clone(&opener) as _), ..ForestOptions::default() };
    let forest = Arc::new(Forest::new(options));
    for slot in [4, 5, 6] {
        forest.expect(slot, layer.digest()).unwrap();
    }
    // Listing names opens nothing.
    assert_eq!(names(&forest, ROOT, 0), ["4", "5", "6"]);
    assert_eq!(forest.closed_slot(ROOT, None), None);
    assert_eq!(forest.closed_slot(ROOT, Some(b"4")), Some(4));
    assert_eq!(forest.closed_slot(ROOT, Some(b"3")), None);
    let file = 4 << 40 | 2;
    assert_eq!(forest.closed_slot(file, None), Some(4));
    assert!(matches!(forest.attributes(file), Err(FsError::Closed { slot: 4 })));
    assert!(!forest.try_read(file, 0, 1, &mut Vec::new()).unwrap());
    assert_eq!(opener.opened.load(Ordering::SeqCst), 0);
    let reads = (0..20).map(|_| forest.read(file, 0, 10));
    for bytes in futures_util::future::join_all(reads).await {
        assert_eq!(bytes.unwrap(), b"text");
    }
    assert_eq!(opener.opened.load(Ordering::SeqCst), 1);
    assert_eq!(forest.closed_slot(file, None), None);
    // A failure is reported to all waiting callers, and not remembered.
    let (one, two) = tokio::join!(forest.open(5), forest.open(5));
    for error in [one.unwrap_err(), two.unwrap_err()] {
        assert!(error.to_string().contains("slot 5") && number(&error) == 5, "{error}");
    }
    assert_eq!(opener.opened.load(Ordering::SeqCst), 2);
    opener.readers.lock().unwrap().insert(5, bench.reader(&layer));
    forest.open(5).await.unwrap();
    assert_eq!(find(&forest, "5/a").unwrap(), 5 << 40 | 2);
    let wrong = forest.open(6).await.unwrap_err();
    let FsError::Open { cause, .. } = wrong else { panic!("{wrong}") };
    assert!(matches!(*cause, OpenError::Mismatch { .. }), "{cause}");
    assert!(matches!(forest.open(77).await, Err(FsError::NoSlot { slot: 77 })));
}

#[tokio::test]
async fn opening_has_an_end_and_respects_what_happens_meanwhile() {
    let bench = Bench::new();
    let layer = Layer::gzip(tar_of(&[("a", 'f', "text")]), 64 << 10);
    let reader = layer.reader(&bench.store, layer.memory(), Policy::default());
    let slow = |delay| {
        Arc::new(SlowOpener {
            readers: Mutex::new([(4, reader.clone())].into()),
            opened: AtomicUsize::new(0),
            delay: Duration::from_millis(delay),
        })
    };
    let options =
        ForestOptions { opener: Some(slow(60_000)), open_limit: Duration::from_millis(50), ..ForestOptions::default() };
    let forest = Arc::new(Forest::new(options));
    forest.expect(4, layer.digest()).unwrap();
    let late = forest.open(4).await.unwrap_err();
    let FsError::Open { cause, .. } = late else { panic!("{late}") };
    assert!(matches!(*cause, OpenError::Deadline { .. }));
    // Removed while it is being opened: it stays removed.
    let options = ForestOptions { opener: Some(slow(100)), ..ForestOptions::default() };
    let forest = Arc::new(Forest::new(options));
    forest.expect(4, layer.digest()).unwrap();
    let opening = tokio::spawn({
        let forest = Arc::clone(&forest);
        async move { forest.open(4).await }
    });
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert!(forest.remove(4));
    opening.await.unwrap().unwrap();
    assert!(forest.slots().is_empty() && forest.reader(4).is_none());
    let lonely = Arc::new(Forest::new(ForestOptions::default()));
    lonely.expect(4, layer.digest()).unwrap();
    let FsError::Open { cause, .. } = lonely.open(4).await.unwrap_err() else { panic!() };
    assert!(matches!(*cause, OpenError::NoOpener { .. }));
}
