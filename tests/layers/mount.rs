//! Real mounts, compared with what GNU tar extracts. They need /dev/fuse and root, and say so when they have neither.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on stops")]

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use soci_fs::fuse::image::Image;
use soci_fs::fuse::mount::{Lazy, MountError, MountOptions, Mounted, is_stale, mount, mounts, unmount};
use soci_fs::layer::reader::Policy;
use soci_fs::layer::source::Source;
use soci_fs::layer::source::faulty::{Fault, FaultySource};
use soci_fs::layer::store::Store;
use soci_tests::reading::{Layer, files_tar, noise, quick, sample_tar};
use soci_tests::trees::{can_mount, compare, populate, tree};

/// A mounted image and all that it needs.
struct Bench {
    mounted: Option<Mounted>,
    image: Arc<Image>,
    directory: tempfile::TempDir,
    runtime: tokio::runtime::Runtime,
    _store: Store,
}

impl Bench {
    fn new(layers: &[(Layer, Arc<dyn Source>)], policy: Policy) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(&directory.path().join("store")).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let reader = |(layer, source): &(Layer, Arc<dyn Source>)| {
            layer.reader_on(&store, Arc::clone(source), policy, runtime.handle())
        };
        let image = Arc::new(Image::new(layers.iter().map(reader).collect()).unwrap());
        let mountpoint = directory.path().join("mnt");
        fs::create_dir(&mountpoint).unwrap();
        let options = MountOptions { subtype: "soci-test".to_owned(), ..MountOptions::default() };
        let mounted = mount(Arc::clone(&image), &mountpoint, &options, runtime.handle().clone()).unwrap();
        Self { mounted: Some(mounted), image, directory, runtime, _store: store }
    }

    fn of_layer(layer: &Layer) -> Self {
        Self::new(&[(layer.clone(), layer.memory())], Policy::default())
    }

    fn root(&self) -> PathBuf {
        self.directory.path().join("mnt")
    }
}

#[test]
fn a_mount_shows_what_tar_extracts() {
    if !can_mount() {
        return;
    }
    let work = tempfile::tempdir().unwrap();
    let (source, extracted) = (work.path().join("source"), work.path().join("extracted"));
    fs::create_dir(&source).unwrap();
    fs::create_dir(&extracted).unwrap();
    populate(&source);
    let archive = work.path().join("layer.tar");
    let create = ["--format=posix", "--xattrs", "--xattrs-include=*", "--pax-option=delete=atime,delete=ctime", "-cf"];
    assert!(Command::new("tar").args(create).arg(&archive).arg(".").current_dir(&source).status().unwrap().success());
    let extract = ["--xattrs", "--xattrs-include=*", "--numeric-owner", "-pxf"];
    assert!(Command::new("tar").args(extract).arg(&archive).current_dir(&extracted).status().unwrap().success());
    for layer in
        [Layer::gzip(fs::read(&archive).unwrap(), 64 << 10), Layer::plain(fs::read(&archive).unwrap(), 64 << 10)]
    {
        let bench = Bench::of_layer(&layer);
        compare(&tree(&extracted), &tree(&bench.root()));
        // Again, from the kernel's caches and from the store.
        compare(&tree(&extracted), &tree(&bench.root()));
        assert_eq!(bench.image.status().layers[0].failures, 0);
        let listed = Command::new("ls").arg("-lR").arg(bench.root()).output().unwrap();
        assert!(listed.status.success(), "{}", String::from_utf8_lossy(&listed.stderr));
        assert_eq!(fs::write(bench.root().join("new"), "x").unwrap_err().raw_os_error(), Some(30));
    }
}

#[test]
fn random_reads_by_many_threads() {
    if !can_mount() {
        return;
    }
    let layer = Layer::gzip(sample_tar(20, 2_000_000), 256 << 10);
    let bench = Bench::of_layer(&layer);
    std::thread::scope(|scope| {
        for thread in 0..8_usize {
            let (bench, layer) = (&bench, &layer);
            scope.spawn(move || {
                for step in 0..60_usize {
                    let number = (thread * 3 + step) % 20;
                    let path = bench.root().join(format!("dir{}/file{number}", number / 10));
                    let entry = layer
                        .index
                        .entries
                        .iter()
                        .find(|entry| entry.name.ends_with(format!("/file{number}").as_bytes()))
                        .unwrap();
                    let length = 1 + (step * 40_503) % 300_000;
                    let offset = (step * 1_299_721 + thread * 77_777) % (usize::try_from(entry.size).unwrap() - length);
                    let mut buffer = vec![0; length];
                    fs::File::open(path).unwrap().read_exact_at(&mut buffer, offset as u64).unwrap();
                    let start = usize::try_from(entry.data_offset).unwrap() + offset;
                    assert!(buffer == layer.tar[start..start + length]);
                }
            });
        }
    });
    let counts = bench.image.layers()[0].counts();
    assert!(counts.decoded_spans <= layer.index.spans.len() as u64 && counts.failures == 0, "{counts:?}");
}

#[test]
fn layers_are_merged() {
    if !can_mount() {
        return;
    }
    let tars = [
        sample_tar(30, 1000),
        files_tar([("dir0/.wh.file1", b"")]),
        files_tar([("dir1/file10", b"new")]),
        files_tar([("dir2/.wh..wh..opq", b"")]),
    ];
    let layers: Vec<(Layer, Arc<dyn Source>)> = tars
        .into_iter()
        .map(|tar| {
            let layer = Layer::gzip(tar, 64 << 10);
            let source = layer.memory();
            (layer, source as _)
        })
        .collect();
    let bench = Bench::new(&layers, Policy::default());
    assert!(!bench.root().join("dir0/file1").exists() && !bench.root().join("dir0/.wh.file1").exists());
    assert_eq!(fs::read(bench.root().join("dir1/file10")).unwrap(), b"new");
    assert_eq!(fs::read(bench.root().join("dir0/file2")).unwrap(), noise(3, 1200));
    assert_eq!(fs::read_dir(bench.root().join("dir2")).unwrap().count(), 0);
}

#[test]
fn failures_are_eio_and_pass() {
    if !can_mount() {
        return;
    }
    let layer = Layer::gzip(sample_tar(10, 100_000), 64 << 10);
    let source = Arc::new(FaultySource::and_then_always(layer.memory(), [], Fault::Refuse));
    let bench = Bench::new(&[(layer.clone(), Arc::clone(&source) as _)], quick());
    let path = bench.root().join("dir0/file3");
    assert_eq!(fs::read(&path).map(|content| content.len()).unwrap_err().raw_os_error(), Some(5));
    let status: serde_json::Value =
        serde_json::from_slice(&fs::read(bench.root().join(".soci/status.json")).unwrap()).unwrap();
    let error = status["layers"][0]["last_error"].as_str().unwrap();
    assert!(error.contains("dir0/file3") || error.contains("refused"), "{error}");
    source.heal();
    assert!(fs::read(&path).unwrap() == noise(4, 100_300));
    // The status file is found by name, hidden from listings, and fresh at every look.
    assert_eq!(fs::read_dir(bench.root()).unwrap().count(), 1);
    let status: serde_json::Value =
        serde_json::from_slice(&fs::read(bench.root().join(".soci/status.json")).unwrap()).unwrap();
    assert!(status["layers"][0]["present_spans"].as_u64().unwrap() >= 1, "{status}");
    assert_eq!(fs::read(bench.root().join(".soci/other")).unwrap_err().raw_os_error(), Some(2));
}

#[test]
fn a_slow_source_delays_no_other_reader() {
    if !can_mount() {
        return;
    }
    let slow = Layer::gzip(files_tar([("slow", noise(1, 500_000))]), 64 << 10);
    let fast = Layer::gzip(files_tar([("fast", noise(2, 500_000))]), 64 << 10);
    let delay = Fault::Delay(Duration::from_millis(1500));
    let source: Arc<dyn Source> = Arc::new(FaultySource::and_then_always(slow.memory(), [], delay));
    let fast_source = fast.memory();
    let bench = Bench::new(&[(slow, source), (fast, fast_source)], Policy::default());
    std::thread::scope(|scope| {
        // More readers than FUSE threads.
        for number in 0..8_u64 {
            let path = bench.root().join("slow");
            scope.spawn(move || {
                let mut buffer = [0; 10];
                fs::File::open(path).unwrap().read_exact_at(&mut buffer, number * 60_000).unwrap();
            });
        }
        std::thread::sleep(Duration::from_millis(100));
        let started = std::time::Instant::now();
        assert!(fs::read(bench.root().join("fast")).unwrap() == noise(2, 500_000));
        assert!(started.elapsed() < Duration::from_millis(1000), "{:?}", started.elapsed());
    });
}

#[test]
fn mounts_end_in_every_way() {
    if !can_mount() {
        return;
    }
    let layer = Layer::gzip(files_tar([("a", b"hello")]), 64 << 10);
    // By the caller.
    let mut bench = Bench::of_layer(&layer);
    let root = bench.root();
    let listed = mounts("soci-test").unwrap();
    assert!(listed.iter().any(|entry| entry.mountpoint == root && entry.source == "soci"), "{listed:?}");
    let held = fs::File::open(root.join("a")).unwrap();
    let busy = bench.mounted.as_ref().unwrap().unmounter().unmount(Lazy::No);
    assert!(matches!(busy, Err(MountError::Unmount { .. })), "{busy:?}");
    drop(held);
    bench.mounted.take().unwrap().unmount().unwrap();
    assert!(!root.join("a").exists() && !is_stale(&root));
    // By another read while the caller waits.
    let mut bench = Bench::of_layer(&layer);
    let root = bench.root();
    let waiting = bench.mounted.take().unwrap();
    let waiter = std::thread::spawn(move || waiting.wait());
    assert_eq!(fs::read(root.join("a")).unwrap(), b"hello");
    unmount(&root, Lazy::No).unwrap();
    waiter.join().unwrap().unwrap();
    // Replaced by another mount before the caller notices, which must survive.
    let mut bench = Bench::of_layer(&layer);
    let root = bench.root();
    unmount(&root, Lazy::No).unwrap();
    let other = ["-t", "tmpfs", "none"];
    assert!(Command::new("mount").args(other).arg(&root).status().unwrap().success());
    fs::write(root.join("mine"), "x").unwrap();
    bench.mounted.take().unwrap().wait().unwrap();
    assert!(root.join("mine").exists());
    unmount(&root, Lazy::No).unwrap();
    // By dropping, even when in use.
    let mut bench = Bench::of_layer(&layer);
    let root = bench.root();
    let held = fs::File::open(root.join("a")).unwrap();
    drop(bench.mounted.take());
    assert!(!root.join("a").exists());
    drop(held);
    assert!(unmount(&root, Lazy::No).is_err());
    drop(bench.runtime);
}
