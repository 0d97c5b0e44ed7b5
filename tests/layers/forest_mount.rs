//! A forest on a real mount, under overlayfs, compared with what GNU tar extracts. Needs /dev/fuse and root, and says
//! so when it has neither.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on stops")]

use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use soci_fs::fuse::forest::{Forest, ForestOptions};
use soci_fs::fuse::mount::device::{self, DeviceOptions, ServeOptions};
use soci_fs::fuse::mount::{Lazy, mounts, unmount};
use soci_fs::layer::reader::Policy;
use soci_fs::layer::store::Store;
use soci_fs::tree::id_map::{IdMap, IdRange};
use soci_tests::reading::{Layer, noise, sample_tar};
use soci_tests::trees::{can_mount, compare, populate, tree};

/// A forest on a mount, and all that it needs. Everything is unmounted in the end, whatever happens.
struct Bench {
    forest: Arc<Forest>,
    overlays: Vec<PathBuf>,
    directory: tempfile::TempDir,
    store: Store,
    runtime: tokio::runtime::Runtime,
}

impl Bench {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(&directory.path().join("store")).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let root = directory.path().join("fs");
        fs::create_dir(&root).unwrap();
        let options = DeviceOptions { subtype: "soci-forest".to_owned(), ..DeviceOptions::default() };
        let kept = device::mount(&root, &options).unwrap();
        let forest = Arc::new(Forest::new(ForestOptions::default()));
        let bench = Self { forest, overlays: Vec::new(), directory, store, runtime };
        let handle = bench.runtime.handle().clone();
        device::serve(Arc::clone(&bench.forest), kept, &ServeOptions::default(), handle).unwrap();
        bench
    }

    fn insert(&self, slot: u16, layer: &Layer) {
        let reader = layer.reader_on(&self.store, layer.memory(), Policy::default(), self.runtime.handle());
        self.forest.insert(slot, reader).unwrap();
    }

    fn root(&self) -> PathBuf {
        self.directory.path().join("fs")
    }

    /// Stacks lower directories, topmost first, with an upper one above.
    fn overlay(&mut self, name: &str, lower: &[String]) -> PathBuf {
        let place = |part: &str| {
            let path = self.directory.path().join(format!("{name}-{part}"));
            fs::create_dir(&path).unwrap();
            path
        };
        let (upper, work, merged) = (place("upper"), place("work"), place("merged"));
        let lower: Vec<String> = lower.iter().map(|slot| self.root().join(slot).display().to_string()).collect();
        let options = format!("lowerdir={},upperdir={},workdir={}", lower.join(":"), upper.display(), work.display());
        let mount = ["-t", "overlay", "overlay", "-o", &options];
        assert!(Command::new("mount").args(mount).arg(&merged).status().unwrap().success());
        self.overlays.push(merged.clone());
        merged
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        for path in self.overlays.drain(..).chain([self.directory.path().join("fs")]) {
            let _ = unmount(&path, Lazy::Yes);
        }
    }
}

fn run(program: &str, arguments: &[&str], directory: &Path) {
    assert!(Command::new(program).args(arguments).current_dir(directory).status().unwrap().success(), "{program}");
}

/// Packs a directory, with all that a tar can hold.
fn pack(source: &Path) -> Vec<u8> {
    let archive = source.with_extension("tar");
    let create = ["--format=posix", "--xattrs", "--xattrs-include=*", "--pax-option=delete=atime,delete=ctime", "-cf"];
    assert!(Command::new("tar").args(create).arg(&archive).arg(".").current_dir(source).status().unwrap().success());
    fs::read(archive).unwrap()
}

#[test]
fn overlayfs_over_slots_shows_what_tar_extracts() {
    if !can_mount() {
        return;
    }
    let mut bench = Bench::new();
    let work = tempfile::tempdir().unwrap();
    let (lower, upper, extracted) =
        (work.path().join("lower"), work.path().join("upper"), work.path().join("extracted"));
    for directory in [&lower, &upper, &extracted] {
        fs::create_dir(directory).unwrap();
    }
    populate(&lower);
    for (name, content) in
        [("etc/one", "changed"), ("usr/bin/.wh.link", ""), ("var/.wh..wh..opq", ""), ("var/new", "new"), ("opt/x", "y")]
    {
        fs::create_dir_all(upper.join(name).parent().unwrap()).unwrap();
        fs::write(upper.join(name), content).unwrap();
    }
    let tars = [pack(&lower), pack(&upper)];
    bench.insert(11, &Layer::gzip(tars[0].clone(), 64 << 10));
    bench.insert(12, &Layer::plain(tars[1].clone(), 64 << 10));
    // One layer alone is what tar extracts.
    let extract = ["--xattrs", "--xattrs-include=*", "--numeric-owner", "-pxf"];
    let unpack = |name: &str| {
        let archive = work.path().join(name);
        assert!(Command::new("tar").args(extract).arg(archive).current_dir(&extracted).status().unwrap().success());
    };
    unpack("lower.tar");
    let single = tree(&bench.root().join("11"));
    compare(&tree(&extracted), &single);
    // Both: the marks done by hand. Their order is that of the specification: what is marked goes before what is new.
    fs::remove_file(extracted.join("usr/bin/link")).unwrap();
    fs::remove_dir_all(extracted.join("var")).unwrap();
    unpack("upper.tar");
    for mark in ["usr/bin/.wh.link", "var/.wh..wh..opq"] {
        fs::remove_file(extracted.join(mark)).unwrap();
    }
    // Directories got the time of the last change below them; overlayfs shows the topmost layer's.
    run(
        "tar",
        &["-xpf", work.path().join("upper.tar").to_str().unwrap(), "--no-recursion", "./usr/bin", "./var"],
        &extracted,
    );
    let merged = bench.overlay("both", &["12".to_owned(), "11".to_owned()]);
    let links = |text: &str| text.split(" links ").next().unwrap().to_owned();
    let strip = |found: std::collections::BTreeMap<PathBuf, String>| {
        // Overlayfs counts a directory's links its own way.
        found
            .into_iter()
            .map(|(path, text)| if text.starts_with("mode 4") { (path, links(&text)) } else { (path, text) })
            .collect()
    };
    compare(&strip(tree(&extracted)), &strip(tree(&merged)));
    // It can be written to, and what is below stays.
    fs::write(merged.join("etc/one"), "again").unwrap();
    assert_eq!(fs::read(bench.root().join("12/etc/one")).unwrap(), b"changed");
    assert_eq!(tree(&bench.root().join("11")), single);
    let whiteout = fs::symlink_metadata(bench.root().join("12/usr/bin/link")).unwrap();
    assert!(whiteout.file_type().is_char_device() && whiteout.rdev() == 0);
    assert_eq!(fs::write(bench.root().join("12/new"), "x").unwrap_err().raw_os_error(), Some(30));
}

#[test]
fn slots_are_seen_at_once() {
    if !can_mount() {
        return;
    }
    let bench = Bench::new();
    let names = || {
        let mut names: Vec<_> = fs::read_dir(bench.root())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    let layers = [Layer::gzip(sample_tar(1, 10_000), 64 << 10), Layer::gzip(sample_tar(12, 5_000), 64 << 10)];
    for round in 0..5 {
        assert_eq!(names(), [""; 0]);
        let path = bench.root().join("21");
        assert_eq!(fs::metadata(&path).unwrap_err().raw_os_error(), Some(2));
        // Another layer in the same slot: nothing that the kernel has kept of the first is shown of the second.
        let layer = &layers[round % 2];
        bench.insert(21, layer);
        assert_eq!(names(), ["21"]);
        let size = if round % 2 == 0 { 10_000 } else { 5_000 };
        assert!(fs::read(path.join("dir0/file0")).unwrap() == noise(1, size), "round {round}");
        assert_eq!(path.join("dir1").exists(), round % 2 == 1);
        let held = fs::File::open(path.join("dir0/file0")).unwrap();
        assert!(bench.forest.remove(21));
        assert_eq!(fs::metadata(&path).unwrap_err().raw_os_error(), Some(2));
        // A program that still has a file of it open gets EIO, unless the kernel has the bytes.
        let inode = held.metadata();
        assert!(inode.is_ok() || inode.unwrap_err().raw_os_error() == Some(5));
    }
    let listed = mounts("soci-forest").unwrap();
    assert!(listed.iter().any(|entry| entry.mountpoint == bench.root() && entry.source == "soci"), "{listed:?}");
}

#[test]
fn a_mapped_view_under_overlayfs() {
    if !can_mount() {
        return;
    }
    let mut bench = Bench::new();
    let work = tempfile::tempdir().unwrap();
    let source = work.path().join("source");
    fs::create_dir(&source).unwrap();
    populate(&source);
    bench.insert(31, &Layer::gzip(pack(&source), 64 << 10));
    let run = |host| vec![IdRange { container: 0, host, size: 3500 }];
    bench.forest.define_id_map(2, IdMap { uids: run(100_000), gids: run(200_000) }).unwrap();
    let merged = bench.overlay("mapped", &["31-2".to_owned()]);
    for (path, uid) in [("usr/bin/tool", 100_000), ("usr/lib/lib.so", 101_000), ("etc/x y", 65534), ("etc", 100_000)] {
        let (mapped, plain) = (
            fs::symlink_metadata(merged.join(path)).unwrap(),
            fs::symlink_metadata(bench.root().join("31").join(path)).unwrap(),
        );
        assert_eq!(mapped.uid(), uid, "{path}");
        assert_eq!(mapped.gid(), plain.gid() + 200_000, "{path}");
        assert_eq!((mapped.mode(), mapped.size(), mapped.mtime()), (plain.mode(), plain.size(), plain.mtime()));
    }
    assert!(fs::read(merged.join("usr/lib/lib.so")).unwrap() == fs::read(source.join("usr/lib/lib.so")).unwrap());
}

#[test]
fn the_state_file_follows() {
    if !can_mount() {
        return;
    }
    let bench = Bench::new();
    let layer = Layer::gzip(sample_tar(10, 200_000), 64 << 10);
    bench.insert(41, &layer);
    let slot = bench.root().join("41");
    let path = slot.join(format!(".soci-snapshotter/{}.json", layer.digest()));
    let percent = || {
        let state: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        state["fetchedPercent"].as_f64().unwrap()
    };
    assert!(percent() < 1.0);
    assert!(!fs::read_dir(&slot).unwrap().any(|entry| entry.unwrap().file_name() == ".soci-snapshotter"));
    run("sh", &["-c", "cat dir0/* > /dev/null"], &slot);
    assert_eq!(percent().to_bits(), 100.0_f64.to_bits());
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o400);
    assert_eq!(fs::metadata(path.parent().unwrap()).unwrap().mode() & 0o7777, 0o500);
}

/// What the kernel was shown of a layer that turns out to be wrong is gone from its caches: bytes, links and names.
#[test]
fn a_condemned_layer_is_forgotten_by_the_kernel() {
    if !can_mount() {
        return;
    }
    let mut bench = Bench::new();
    let mut builder = tar::Builder::new(soci_tests::reading::files_tar([("etc/file", noise(1, 100_000))]));
    let end = builder.get_ref().len() - 1024;
    builder.get_mut().truncate(end);
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Symlink);
    header.set_size(0);
    builder.append_link(&mut header, "etc/link", "file").unwrap();
    let mut layer = Layer::gzip(builder.into_inner().unwrap(), 32 << 10);
    let mut index = soci_index::format::index::LayerIndex::clone(&layer.index);
    let link = index.entries.iter_mut().find(|entry| &*entry.name == b"etc/link").unwrap();
    link.link = b"evil"[..].into();
    layer.index = Arc::new(index);
    bench.insert(7, &layer);
    for way in ["below the mount", "under overlayfs"] {
        let root = match way {
            "below the mount" => bench.root().join("7"),
            _ => bench.overlay("condemned", &["7".to_owned()]),
        };
        assert_eq!(fs::read_link(root.join("etc/link")).unwrap(), Path::new("evil"), "{way}");
        assert_eq!(fs::read(root.join("etc/file")).unwrap(), noise(1, 100_000), "{way}");
    }
    let reader = bench.forest.reader(7).unwrap();
    let proof = bench.runtime.block_on(async {
        reader.fetching().complete().await.unwrap();
        soci_fs::layer::proof::prove(&reader, layer.claim).await
    });
    assert!(matches!(proof, Err(soci_fs::layer::proof::ProofError::Table { .. })), "{proof:?}");
    let merged = bench.overlays[0].clone();
    let is_gone = || {
        [bench.root().join("7"), merged.clone()]
            .iter()
            .all(|root| fs::read_link(root.join("etc/link")).is_err() && fs::read(root.join("etc/file")).is_err())
    };
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while !is_gone() {
        assert!(std::time::Instant::now() < deadline, "the kernel still shows what it cached");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    // The state file says why.
    let name = format!(".soci-snapshotter/{}.json", layer.digest());
    let state = fs::read_to_string(bench.root().join("7").join(name)).unwrap();
    assert!(state.contains("proven wrong"), "{state}");
}
