//! Mounts, end to end: publish to a registry, mount from it with the `soci` binary, compare with GNU tar.

use std::collections::BTreeMap;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use soci_tests::front::Front;
use soci_tests::image::{GZIP, Image, gzip, tar, text};
use soci_tests::mounting::{Mounting, can_mount};
use soci_tests::{run, soci, stdout};

const NODE: &str = "node";

/// With an index of 64 KiB spans.
const FINE: [&str; 2] = ["--span-size", "65536"];

/// Facts about a file that two trees must share.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Facts {
    mode: u32,
    owner: (u32, u32),
    time: (i64, i64),
    size: u64,
    links: u64,
    device: u64,
    content: Vec<u8>,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

fn tree(root: &Path) -> BTreeMap<PathBuf, Facts> {
    let mut facts = BTreeMap::new();
    let mut open = vec![root.to_path_buf()];
    while let Some(path) = open.pop() {
        let metadata = std::fs::symlink_metadata(&path).unwrap();
        let kind = metadata.file_type();
        if kind.is_dir() {
            open.extend(std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
        let content = match (kind.is_file(), kind.is_symlink()) {
            (true, _) => std::fs::read(&path).unwrap(),
            (_, true) => std::fs::read_link(&path).unwrap().as_os_str().as_bytes().to_vec(),
            _ => Vec::new(),
        };
        let name = path.strip_prefix(root).unwrap().to_path_buf();
        // The root is the mount point's own; a directory's size and link count are the file system's business.
        if !name.as_os_str().is_empty() {
            let directory = kind.is_dir();
            facts.insert(
                name,
                Facts {
                    mode: metadata.mode(),
                    owner: (metadata.uid(), metadata.gid()),
                    time: (metadata.mtime(), metadata.mtime_nsec()),
                    size: if directory { 0 } else { metadata.size() },
                    links: if directory { 0 } else { metadata.nlink() },
                    device: metadata.rdev(),
                    content,
                    xattrs: xattrs(&path),
                },
            );
        }
    }
    facts
}

fn xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut names = vec![0; 65_536];
    let length = rustix::fs::llistxattr(path, &mut names[..]).unwrap_or(0);
    let mut found = BTreeMap::new();
    for name in names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let mut value = vec![0; 65_536];
        let length = rustix::fs::lgetxattr(path, name, &mut value[..]).unwrap();
        found.insert(name.to_vec(), value[..length].to_vec());
    }
    found
}

/// A tree made with the system's own tools, packed with GNU tar.
fn made_tree(scratch: &Path) -> Vec<u8> {
    let script = r"
        set -eu
        mkdir -p tree/usr/bin tree/etc tree/dev tree/tmp tree/empty; cd tree
        head -c 700000 /dev/urandom > usr/bin/noise; seq 1 120000 > usr/bin/numbers; : > etc/nothing
        ln usr/bin/noise usr/bin/same; ln -s ../usr/bin/noise etc/link; ln -s /nowhere etc/dangling
        chmod 4755 usr/bin/noise; chmod 1777 tmp; chmod 0700 empty; chown 1234:4321 etc/nothing
        mknod dev/null c 1 3; mknod dev/disk b 8 1; mkfifo tmp/pipe
        touch -d '2001-02-03 04:05:06.789 UTC' etc/nothing; printf x > 'etc/with space and ü'
        setfattr -n user.color -v blue etc/nothing 2>/dev/null || true
        setfattr -n security.capability -v 0x0100000200040000000000000000000000000000 usr/bin/numbers 2>/dev/null || true
        long=$(printf 'd%.0s' $(seq 1 120)); mkdir -p $long/$long; printf deep > $long/$long/file
        tar --format=posix --xattrs --xattrs-include='*' --numeric-owner -cf ../layer.tar .
    ";
    let status = Command::new("sh").args(["-c", script]).current_dir(scratch).status().unwrap();
    assert!(status.success());
    std::fs::read(scratch.join("layer.tar")).unwrap()
}

/// What the mount shows is what GNU tar extracts.
#[tokio::test(flavor = "multi_thread")]
async fn mounted_tree_equals_extraction() {
    if !can_mount() {
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    let layer = made_tree(scratch.path());
    let expected = scratch.path().join("expected");
    std::fs::create_dir(&expected).unwrap();
    let status = Command::new("tar")
        .args(["--xattrs", "--xattrs-include=*", "--numeric-owner", "-xpf", "layer.tar", "-C", "expected"])
        .current_dir(scratch.path())
        .status()
        .unwrap();
    assert!(status.success());
    let stage = Mounting::new(Image::gzip(vec![layer])).await;
    stage.publish(&FINE);
    let _serving = stage.mount(NODE, &[]);
    let (ours, theirs) = (tree(&stage.mountpoint(NODE)), tree(&expected));
    assert_eq!(ours.keys().collect::<Vec<_>>(), theirs.keys().collect::<Vec<_>>());
    for (name, facts) in &theirs {
        let (found, wanted) =
            (Facts { content: vec![], ..ours[name].clone() }, Facts { content: vec![], ..facts.clone() });
        assert_eq!(found, wanted, "{}", name.display());
        assert!(ours[name].content == facts.content, "{}: content", name.display());
    }
}

/// Only what is read is fetched; many readers at once get right bytes; a second mount fetches nothing again, even
/// without the registry.
#[tokio::test(flavor = "multi_thread")]
async fn lazy_concurrent_and_kept() {
    if !can_mount() {
        return;
    }
    let contents: Vec<Vec<u8>> = (0..20).map(|seed| text(seed, 500_000)).collect();
    let names: Vec<String> = (0..20).map(|number| format!("data/file{number}")).collect();
    let files: Vec<(&str, Vec<u8>)> = names.iter().map(String::as_str).zip(contents.iter().cloned()).collect();
    let stage = Mounting::new(Image::gzip(vec![tar(&files), tar(&[("small", b"tiny".to_vec())])])).await;
    stage.publish(&FINE);
    let all = stage.image.blobs[0].len() as u64;
    let before = stage.registry.traffic().bytes_sent;

    let serving = stage.mount(NODE, &[]);
    let at = stage.mountpoint(NODE);
    assert_eq!(std::fs::read_dir(at.join("data")).unwrap().count(), 20);
    assert_eq!(std::fs::read(at.join("small")).unwrap(), b"tiny");
    assert_eq!(std::fs::read(at.join("data/file7")).unwrap(), contents[7]);
    let fetched = stage.registry.traffic().bytes_sent - before;
    let index: u64 = 5_400_000; // 64 KiB spans make large zTOCs: 33 KB each for 153 spans
    assert!(fetched < all / 2 + index, "{fetched} bytes for one file of twenty ({all} in all)");

    std::thread::scope(|scope| {
        for thread in 0..8u64 {
            let (names, contents, at) = (&names, &contents, &at);
            scope.spawn(move || {
                let mut state = thread + 1;
                for _ in 0..300 {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    let which = (state >> 33) as usize % 20;
                    let offset = (state >> 20) % 499_000;
                    let mut buffer = vec![0; 900];
                    let file = std::fs::File::open(at.join(&names[which])).unwrap();
                    file.read_exact_at(&mut buffer, offset).unwrap();
                    assert!(buffer[..] == contents[which][offset as usize..offset as usize + 900]);
                }
            });
        }
    });
    let status: serde_json::Value =
        serde_json::from_slice(&std::fs::read(at.join(".soci/status.json")).unwrap()).unwrap();
    assert_eq!(status["layers"][0]["present_spans"], status["layers"][0]["spans"], "{status}");
    assert!(
        !std::fs::read_dir(&at).unwrap().any(|entry| entry.unwrap().file_name() == ".soci"),
        "hidden from listings"
    );

    let umount = run(&mut stage.soci(NODE, &["umount", at.to_str().unwrap()]));
    assert!(umount.status.success(), "{umount:?}");
    let (code, text) = serving.ended();
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("unmounted;"), "{text}");

    // Once more: only the documents of the image are asked for.
    let before = stage.registry.traffic().bytes_sent;
    let _serving = stage.mount(NODE, &[]);
    for (name, content) in names.iter().zip(&contents) {
        assert!(std::fs::read(at.join(name)).unwrap() == *content);
    }
    assert_eq!(std::fs::read(at.join("small")).unwrap(), b"tiny");
    let again = stage.registry.traffic().bytes_sent - before;
    assert!(again < 20_000, "{again} bytes were fetched again");
}

/// `soci pull` brings all of an image, with an index and without one; a mount then requests no byte of a layer.
#[tokio::test(flavor = "multi_thread")]
async fn pulled_whole() {
    for with_index in [true, false] {
        let content = text(1, 3_000_000);
        let stage = Mounting::new(Image::gzip(vec![tar(&[("file", content.clone())])])).await;
        if with_index {
            stage.publish(&FINE);
        }
        let name = stage.name();
        let pull = ["pull", &name, "--min-layer-size", "1000", "--json"];
        let pulled: serde_json::Value = serde_json::from_str(&stdout(&mut stage.soci(NODE, &pull))).unwrap();
        assert_eq!(pulled["index"].is_string(), with_index, "{pulled}");
        assert!(pulled["bytesUnpacked"].as_u64() >= Some(3_000_000), "{pulled}");
        assert!(pulled["bytesFetched"].as_u64() >= Some(stage.image.blobs[0].len() as u64), "{pulled}");
        let again: serde_json::Value = serde_json::from_str(&stdout(&mut stage.soci(NODE, &pull))).unwrap();
        assert_eq!(again["bytesFetched"], 0, "{again}");
        if can_mount() {
            let before = stage.registry.traffic().bytes_sent;
            let _serving = stage.mount(NODE, &["--no-profile"]);
            assert!(std::fs::read(stage.mountpoint(NODE).join("file")).unwrap() == content);
            let cost = stage.registry.traffic().bytes_sent - before;
            assert!(cost < 20_000, "{cost} bytes for what is here");
        }
    }
}

/// What refers to an image is listed once for each mount, for index and profile together: an index that is here is only
/// a copy of what the repository has.
#[tokio::test(flavor = "multi_thread")]
async fn referrers_are_listed_once() {
    let stage = Mounting::new(Image::gzip(vec![tar(&[("file", text(1, 600_000))])])).await;
    stage.publish(&FINE);
    let front = Front::start(&stage.registry.host()).await.unwrap();
    let name = stage.name().replace(&stage.registry.host(), &front.host());
    let (_, repository) = name.split_once('/').unwrap();
    let repository = repository.trim_end_matches(":v1");
    let lists = || front.requests(&format!("/v2/{repository}/referrers/"));
    let pulled = stdout(&mut stage.soci("pulling", &["pull", &name, "--min-layer-size", "1000", "--json"]));
    assert!(pulled.contains("\"index\": \"sha256:"), "{pulled}");
    assert_eq!(lists(), 1);
    if !can_mount() {
        return;
    }
    let at = stage.mountpoint(NODE);
    std::fs::create_dir(&at).unwrap();
    for (more, lists_now) in [(None, 2), (Some("--no-profile"), 3)] {
        let at = at.to_str().unwrap();
        let mut command = stage.soci(NODE, &["mount", &name, at, "--detach", "--min-layer-size", "1000"]);
        let _ = stdout(command.args(more));
        assert_eq!(std::fs::read(stage.mountpoint(NODE).join("file")).unwrap().len(), 600_000);
        assert_eq!(lists(), lists_now, "{more:?}");
        let _ = stdout(&mut stage.soci(NODE, &["umount", at]));
    }
}

/// A zTOC that was lost or damaged in the local store is asked for again.
#[tokio::test(flavor = "multi_thread")]
async fn lost_ztoc_is_fetched_again() {
    if !can_mount() {
        return;
    }
    let content = text(1, 600_000);
    let stage = Mounting::new(Image::gzip(vec![tar(&[("file", content.clone())])])).await;
    stage.publish(&FINE);
    drop(stage.mount(NODE, &[]));
    let spans = stdout(&mut stage.soci(NODE, &["index", "list", "-q", "--span-indexes"])).trim().to_owned();
    let spans: serde_json::Value =
        serde_json::from_str(&stdout(&mut stage.soci(NODE, &["index", "info", &spans]))).unwrap();
    let ztoc = spans["layers"][0]["digest"].as_str().unwrap().replace("sha256:", "");
    let blob = stage.scratch.path().join("node/content/blobs/sha256").join(ztoc);
    let good = std::fs::read(&blob).unwrap();
    for damage in [None, Some(vec![0; good.len()])] {
        match damage {
            None => std::fs::remove_file(&blob).unwrap(),
            Some(bytes) => std::fs::write(&blob, bytes).unwrap(),
        }
        let _serving = stage.mount(NODE, &[]);
        assert!(std::fs::read(stage.mountpoint(NODE).join("file")).unwrap() == content);
        let status = std::fs::read(stage.mountpoint(NODE).join(".soci/status.json")).unwrap();
        let status: serde_json::Value = serde_json::from_slice(&status).unwrap();
        assert_eq!(status["layers"][0]["proven"], false, "lazy, not streamed: {status}");
    }
}

/// Layers without an index, and layers of other compressions, are streamed; signals unmount.
#[tokio::test(flavor = "multi_thread")]
async fn streamed_layers_and_signals() {
    if !can_mount() {
        return;
    }
    let layers = [text(1, 300_000), text(2, 200_000), text(3, 100_000)];
    let (a, b, c) =
        (tar(&[("a", layers[0].clone())]), tar(&[("b", layers[1].clone())]), tar(&[("c", layers[2].clone())]));
    let zstd = "application/vnd.oci.image.layer.v1.tar+zstd";
    let plain = "application/vnd.oci.image.layer.v1.tar";
    let packed = zstd::bulk::compress(&b, 3).unwrap();
    let image = Image::new(vec![(GZIP, gzip(&a, 6), a), (zstd, packed, b), (plain, c.clone(), c)]);
    let stage = Mounting::new(image).await;
    for signal in [rustix::process::Signal::TERM, rustix::process::Signal::INT] {
        let serving = stage.mount(NODE, &[]);
        // What came as a whole was fetched as well; the second time all is here.
        let is_first = signal == rustix::process::Signal::TERM;
        for layer in serving.status()["layers"].as_array().unwrap() {
            let fetched = if is_first { layer["compressed_bytes"].as_u64() } else { Some(0) };
            let is_zstd = layer["digest"] == soci_index::format::digest::Digest::of(&stage.image.blobs[1]).to_string();
            let fetched = if is_zstd && is_first { Some(stage.image.blobs[1].len() as u64) } else { fetched };
            assert_eq!(layer["fetched_bytes"].as_u64(), fetched, "{layer}");
        }
        for (name, content) in ["a", "b", "c"].iter().zip(&layers) {
            assert!(std::fs::read(stage.mountpoint(NODE).join(name)).unwrap() == *content, "{name}");
        }
        serving.signal(signal);
        let (code, text) = serving.ended();
        assert_eq!(code, 0, "{text}");
        assert!(
            soci_fs::fuse::mount::mounts("soci")
                .unwrap()
                .iter()
                .all(|mount| mount.mountpoint != stage.mountpoint(NODE))
        );
    }
}

/// `--detach` returns when the mount is ready; an ordinary user can do all this too; a dead mount is recognised.
#[tokio::test(flavor = "multi_thread")]
async fn detached_and_unprivileged() {
    if !can_mount() {
        return;
    }
    let stage = Mounting::new(Image::gzip(vec![tar(&[("file", text(1, 300_000))])])).await;
    stage.publish(&FINE);
    let (name, at) = (stage.name(), stage.mountpoint(NODE));
    std::fs::create_dir(&at).unwrap();
    let at = at.to_str().unwrap();
    let said = stdout(&mut stage.soci(NODE, &["mount", &name, at, "--detach", "--min-layer-size", "1000"]));
    assert!(said.starts_with("mounted "), "{said}");
    assert_eq!(std::fs::read(stage.mountpoint(NODE).join("file")).unwrap().len(), 300_000);
    // A second mount elsewhere, with the first one's store in use.
    let other = stage.scratch.path().join("other");
    std::fs::create_dir(&other).unwrap();
    let _ = stdout(
        &mut stage.soci(NODE, &["mount", &name, other.to_str().unwrap(), "--detach", "--min-layer-size", "1000"]),
    );
    assert_eq!(std::fs::read(other.join("file")).unwrap().len(), 300_000);
    let _ = stdout(&mut stage.soci(NODE, &["umount", at]));
    let _ = stdout(&mut stage.soci(NODE, &["umount", other.to_str().unwrap()]));
    let failed = run(&mut stage.soci(NODE, &["umount", at]));
    assert_eq!(failed.status.code(), Some(1));

    if !Path::new("/usr/bin/fusermount3").exists() {
        eprintln!("SKIPPED: fusermount3 is not installed (apt-get install fuse3)");
        return;
    }
    // The same as the user nobody.
    std::fs::set_permissions(stage.scratch.path(), PermissionsExt::from_mode(0o777)).unwrap();
    let home = stage.scratch.path().join("home");
    let mine = home.join("mnt");
    std::fs::create_dir_all(&mine).unwrap();
    for directory in [&home, &mine] {
        std::os::unix::fs::chown(directory, Some(65_534), Some(65_534)).unwrap();
    }
    let program = stage.scratch.path().join("soci");
    std::fs::copy(soci_tests::soci_path(), &program).unwrap();
    std::fs::set_permissions("/dev/fuse", PermissionsExt::from_mode(0o666)).unwrap();
    let script = format!(
        "set -e; {0} mount {name} {1} --detach --min-layer-size 1000; wc -c < {1}/file; {0} umount {1}",
        program.display(),
        mine.display()
    );
    let command = ["--reuid=65534", "--regid=65534", "--clear-groups", "env", "-i", "PATH=/usr/bin:/bin", "CI=true"];
    let home = format!("HOME={}", home.display());
    let output = run(Command::new("setpriv").args(command).arg(home).args(["sh", "-c", &script]));
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("300000"), "{text}");
}

/// A registry that goes away: what is here stays readable, the rest fails with EIO in bounded time, and works again
/// when it is back.
#[tokio::test(flavor = "multi_thread")]
async fn registry_goes_away() {
    if !can_mount() {
        return;
    }
    let (first, second) = (text(1, 400_000), text(2, 4_000_000));
    let stage = Mounting::new(Image::gzip(vec![tar(&[("first", first.clone()), ("second", second)])])).await;
    stage.publish(&FINE);
    let serving = stage.mount(NODE, &["--read-timeout", "2s"]);
    let at = stage.mountpoint(NODE);
    let Mounting { registry, scratch, .. } = stage;
    assert!(std::fs::read(at.join("first")).unwrap() == first);
    drop(registry);
    let start = Instant::now();
    let error = tokio::task::spawn_blocking({
        let file = at.join("second");
        move || std::fs::File::open(file).unwrap().read_at(&mut [0; 100], 3_900_000).unwrap_err()
    });
    let error = error.await.unwrap();
    assert_eq!(error.raw_os_error(), Some(5), "{error}");
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    assert!(std::fs::read(at.join("first")).unwrap() == first, "what is here stays");
    drop(serving);
    drop(scratch);
}

/// Wrong places and names are refused with a hint.
#[tokio::test(flavor = "multi_thread")]
async fn refusals() {
    let scratch = tempfile::tempdir().unwrap();
    let at = scratch.path().join("mnt");
    let missing = run(soci().args(["mount", "127.0.0.1:1/a/b:c", at.to_str().unwrap()]));
    assert_eq!(missing.status.code(), Some(7), "{missing:?}");
    assert!(String::from_utf8_lossy(&missing.stderr).contains("create the directory first"));
    std::fs::write(&at, "").unwrap();
    assert_eq!(run(soci().args(["mount", "127.0.0.1:1/a/b:c", at.to_str().unwrap()])).status.code(), Some(2));
    let umount = run(soci().args(["umount", scratch.path().to_str().unwrap()]));
    assert_eq!(umount.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&umount.stderr).contains("no image is mounted"));
}

/// An index that is part of the image, and one that is in another repository: both make the mount lazy, and the second
/// only where it is named.
#[tokio::test(flavor = "multi_thread")]
async fn indexes_of_other_places() {
    if !can_mount() {
        return;
    }
    let content = text(1, 9_000_000);
    let image = || Image::gzip(vec![tar(&[("data", content.clone())])]);
    let building = ["--min-layer-size", "1000", "--span-size", "65536"];
    let lazy = |stage: &Mounting, more: &[&str]| {
        let serving = stage.mount(NODE, more);
        let before = stage.registry.traffic().bytes_sent;
        let mut part = [0; 1000];
        let file = std::fs::File::open(stage.mountpoint(NODE).join("data")).unwrap();
        file.read_exact_at(&mut part, 2_000_000).unwrap();
        assert_eq!(part, content[2_000_000..2_001_000]);
        let read = stage.registry.traffic().bytes_sent - before;
        drop(serving);
        read
    };

    let stage = Mounting::new(image()).await;
    let name = stage.name();
    let _ = stdout(stage.soci(NODE, &["publish", &name, "--v2"]).args(building));
    // Of 2.8 MB: a span or two of 33 kB, and the 384 KiB of neighbours that may be fetched before anything was read.
    let read = lazy(&stage, &[]);
    assert!((1..(384 << 10) + 2 * 35_000).contains(&read), "version 2: {read}");

    let stage = Mounting::new(image()).await;
    let (name, to) = (stage.name(), format!("{}/soci/index", stage.registry.host()));
    let _ = stdout(stage.soci(NODE, &["publish", &name, "--to", &to]).args(building));
    // The same by a span index: its spans are of 79 kB, and the window of each comes too, about 14 kB in this text.
    let read = lazy(&stage, &["--index-from", &to]);
    assert!((1..(384 << 10) + 2 * 80_000 + 7 * 16_000).contains(&read), "another repository: {read}");
    // The index was kept by the first mount; another place on disk knows nothing of it.
    let root = stage.scratch.path().join("another");
    let mut verify = soci();
    verify.arg("--root").arg(&root).args(["verify", &name]);
    assert_eq!(run(&mut verify).status.code(), Some(1), "found only where --index-from names it");
    assert!(stdout(verify.args(["--index-from", &to])).contains(" identical"));
}
