//! EROFS images of trees, mounted by the kernel with the layers' tars as devices, and compared with the trees and with
//! what GNU tar extracts. They need root and Linux 6.12, and say so when they have neither.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on stops")]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use proptest::prelude::*;
use soci_fs::tree::Tree;
use soci_fs::tree::device::DeviceMap;
use soci_fs::tree::erofs::Layer;
use soci_fs::tree::view::merge;
use soci_index::format::entry::{Entry, EntryKind};
use soci_tests::erofs_model::{checked, checked_layer};
use soci_tests::erofs_mount::{Mounted, can_mount_erofs, compare_mount, write_device};
use soci_tests::golden::cases;
use soci_tests::reading::{Layer as Tar, files_tar, index, noise, sample_tar};
use soci_tests::trees::{compare, populate, tree};

use crate::erofs::{config, layer};

/// How overlayfs marks opaque directories.
const OPAQUE: &[u8] = b"trusted.overlay.opaque";

/// A mounted image, and the directory that all of it is in.
struct Shown {
    _mounted: Mounted,
    root: PathBuf,
    _work: tempfile::TempDir,
}

/// Mounts a tree of layers, each given as entries, size and tar, and compares what the kernel shows with the tree.
fn show(tree: &Tree, layers: &[(&[Entry], u64, &[u8])], opaque: Option<&[u8]>) -> Shown {
    let work = tempfile::tempdir().unwrap();
    let maps: Vec<DeviceMap> =
        layers.iter().map(|(entries, size, _)| DeviceMap::of_layer(entries, *size).unwrap()).collect();
    let parts: Vec<Layer<'_>> =
        layers.iter().zip(&maps).map(|((entries, ..), device)| Layer { entries, device }).collect();
    let (image, root) = (work.path().join("image"), work.path().join("mnt"));
    fs::write(&image, checked(tree, &parts, opaque).0).unwrap();
    let mut devices = Vec::new();
    for (number, ((entries, _, tar), map)) in layers.iter().zip(&maps).enumerate() {
        let device = work.path().join(format!("device{number}"));
        write_device(&device, map, entries, tar).unwrap();
        devices.push(device);
    }
    fs::create_dir(&root).unwrap();
    let mounted = Mounted::new(&image, &devices, &root).unwrap();
    let with_tars: Vec<(Layer<'_>, &[u8])> = parts.iter().zip(layers).map(|(part, (.., tar))| (*part, *tar)).collect();
    compare_mount(&root, tree, &with_tars, opaque);
    Shown { _mounted: mounted, root, _work: work }
}

/// Extracts with GNU tar all that it knows; false if it complains.
fn extract(tar: &[u8], into: &Path) -> bool {
    use std::io::Write as _;
    let mut command = Command::new("tar");
    command.args(["--xattrs", "--xattrs-include=*", "--numeric-owner", "-pxf", "-", "-C"]).arg(into);
    let mut child = command.stdin(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    // It stops reading at the end that it sees.
    let _ = child.stdin.take().unwrap().write_all(tar);
    child.wait().unwrap().success()
}

/// The same without what tar does otherwise. A directory has a new time where an entry is missing or a name is made in
/// it later; a file with several names has the header of the first, where container engines apply the last.
fn comparable(files: BTreeMap<PathBuf, String>) -> BTreeMap<PathBuf, String> {
    let cut = |text: &str| {
        let words: Vec<&str> = text.split(' ').collect();
        // mode, owner, time and links, each after its name.
        match (&words[..6], words[7]) {
            ([_, mode, ..], _) if mode.starts_with('4') => [&words[..4], &words[6..]].concat().join(" "),
            (_, "1") => text.to_owned(),
            _ => words[6..].join(" "),
        }
    };
    files.into_iter().map(|(path, text)| (path, cut(&text))).collect()
}

/// Cases in which tar is no measure: see `TAR_DIFFERS` in `golden.rs`; and what the file system that it extracts to
/// cannot hold: an owner of 4294967295, which stands for none, and times after 2446.
const TAR_DIFFERS: &[&str] = &["078", "081", "082", "083", "084", "089", "091", "092", "102", "125", "126"];

/// All golden layers that can be indexed: the kernel shows the tree, and what tar extracts where that has no complaint.
#[test]
fn golden_layers_are_what_tar_extracts() {
    if !can_mount_erofs() {
        return;
    }
    let work = tempfile::tempdir().unwrap();
    let (mut mounted, mut compared) = (0, 0);
    for case in cases() {
        let Ok((indexed, tar)) = index(&case.layer, case.compression, 65_536) else { continue };
        let (entries, size) = (&indexed.index.entries, indexed.index.uncompressed_size);
        let of_layer = Tree::of_layer(entries).unwrap();
        let is_measure = !TAR_DIFFERS.iter().any(|number| case.name.starts_with(number));
        let shown = show(&of_layer, &[(entries, size, &tar)], Some(OPAQUE).filter(|_| !is_measure));
        mounted += 1;
        let extracted = work.path().join(&case.name);
        fs::create_dir(&extracted).unwrap();
        if !is_measure || !extract(&tar, &extracted) {
            continue;
        }
        eprintln!("{}", case.name);
        compare(&comparable(tree(&extracted)), &comparable(tree(&shown.root)));
        compared += 1;
    }
    assert!(mounted > 100 && compared > 70, "{compared} of {mounted} layers compared");
}

/// A tar of a directory with everything in it.
fn tar_of(directory: &Path, options: &[&str]) -> Vec<u8> {
    let create = ["--xattrs", "--xattrs-include=*", "--pax-option=delete=atime,delete=ctime"];
    let output =
        Command::new("tar").args(create).args(options).args(["-cf", "-", "."]).current_dir(directory).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// A directory with everything in it that a tar and a file system can hold, sparse files and long targets included.
#[test]
fn everything_is_what_tar_extracts() {
    if !can_mount_erofs() {
        return;
    }
    let work = tempfile::tempdir().unwrap();
    let source = work.path().join("source");
    fs::create_dir(&source).unwrap();
    populate(&source);
    let target = "t/".repeat(2047) + "t";
    assert_eq!(target.len(), 4095);
    for (length, name) in [(4095, "etc/longest"), (700, "etc/long"), (511, "etc/block"), (448, "etc/fits")] {
        std::os::unix::fs::symlink(&target[..length], source.join(name)).unwrap();
    }
    for (name, size, pieces) in [
        ("etc/sparse", 10_000_000, &[(0, 5000), (1_000_000, 100_000), (9_999_000, 1000)][..]),
        ("etc/hole", 5_000_000, &[]),
        ("etc/tail", 3_000_001, &[(2_999_000, 1001)]),
        ("etc/many", 40_000_000, &(0..500).map(|at| (at * 80_000, 10)).collect::<Vec<_>>()),
    ] {
        let file = fs::File::create(source.join(name)).unwrap();
        file.set_len(size).unwrap();
        for (at, length) in pieces {
            file.write_all_at(&noise(*at, *length), *at).unwrap();
        }
    }
    for tool in [["etc/x y", "security.capability"], ["usr", "trusted.mine"], ["etc/one", "user.colour2"]] {
        let value = b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
        let _ = rustix::fs::setxattr(source.join(tool[0]), tool[1], value, rustix::fs::XattrFlags::empty());
    }
    for options in
        [&["--sparse"][..], &["--sparse", "--sparse-version=0.1"], &["--sparse", "--sparse-version=0.0"], &[]]
    {
        let tar = tar_of(&source, options);
        let layer = Tar::plain(tar, 1 << 20);
        let (entries, size) = (&layer.index.entries, layer.index.uncompressed_size);
        let shown = show(&Tree::of_layer(entries).unwrap(), &[(entries, size, &layer.tar)], None);
        let extracted = tempfile::tempdir().unwrap();
        assert!(extract(&layer.tar, extracted.path()));
        compare(&tree(extracted.path()), &tree(&shown.root));
        assert_eq!(fs::write(shown.root.join("new"), "x").unwrap_err().raw_os_error(), Some(30));
    }
}

proptest! {
    #![proptest_config(config(40))]

    /// Any layer: names of any bytes, times of all ages, access control lists, holes, files at odd offsets.
    #[test]
    fn any_layer_is_mounted((entries, size) in layer(), overlay in any::<bool>()) {
        if can_mount_erofs() {
            let tar = noise(1, usize::try_from(size).unwrap());
            let tree = Tree::of_layer(&entries).unwrap();
            let _ = show(&tree, &[(&entries, size, &tar)], overlay.then_some(OPAQUE));
        }
    }

    /// Several layers merged, each with a device.
    #[test]
    fn any_merged_tree_is_mounted(layers in prop::collection::vec(layer(), 1..4)) {
        if can_mount_erofs() {
            let trees: Vec<Tree> = layers.iter().map(|(entries, _)| Tree::of_layer(entries).unwrap()).collect();
            let merged = merge(&trees.iter().collect::<Vec<_>>()).unwrap();
            let tars: Vec<Vec<u8>> =
                (0..).zip(&layers).map(|(seed, (_, size))| noise(seed, usize::try_from(*size).unwrap())).collect();
            let parts: Vec<(&[Entry], u64, &[u8])> =
                layers.iter().zip(&tars).map(|((entries, size), tar)| (&entries[..], *size, &tar[..])).collect();
            let _ = show(&merged, &parts, None);
        }
    }
}

/// Layers below an overlayfs, and the same merged into one image with a device for each.
#[test]
fn layers_stack_and_merge() {
    if !can_mount_erofs() {
        return;
    }
    let tars = [
        sample_tar(30, 1000),
        files_tar([("dir0/.wh.file1", b"")]),
        files_tar([("dir1/file10", b"new")]),
        files_tar([("dir2/.wh..wh..opq", &b""[..]), ("dir2/only", b"this")]),
    ];
    let layers: Vec<Tar> = tars.into_iter().map(|tar| Tar::plain(tar, 64 << 10)).collect();
    let trees: Vec<Tree> = layers.iter().map(|layer| Tree::of_layer(&layer.index.entries).unwrap()).collect();
    let parts: Vec<(&[Entry], u64, &[u8])> =
        layers.iter().map(|layer| (&layer.index.entries[..], layer.index.uncompressed_size, &layer.tar[..])).collect();
    let merged = show(&merge(&trees.iter().collect::<Vec<_>>()).unwrap(), &parts, None);
    let single: Vec<Shown> = trees.iter().zip(&parts).map(|(tree, part)| show(tree, &[*part], Some(OPAQUE))).collect();
    let overlay = tempfile::tempdir().unwrap();
    let lower: Vec<String> = single.iter().rev().map(|layer| layer.root.display().to_string()).collect();
    let options = format!("lowerdir={}", lower.join(":"));
    let mounted = Command::new("mount").args(["-t", "overlay", "overlay", "-o", &options]).arg(overlay.path()).status();
    assert!(mounted.unwrap().success());
    let found = std::panic::catch_unwind(|| tree(overlay.path()));
    assert!(Command::new("umount").arg(overlay.path()).status().unwrap().success());
    // A directory of an overlayfs says that it has one link, whatever it has in it.
    let links = |files: BTreeMap<PathBuf, String>| -> BTreeMap<PathBuf, String> {
        let cut = |text: String| match text.split_once(" links ") {
            Some((start, _)) if text.starts_with("mode 4") => format!("{start} links 1"),
            _ => text,
        };
        files.into_iter().map(|(path, text)| (path, cut(text))).collect()
    };
    // Where no entry describes a directory, overlayfs shows the upper layer's 0755 of 1970.
    compare(&comparable(links(tree(&merged.root))), &comparable(links(found.unwrap())));
}

fn entry(name: String, kind: EntryKind, at: u64) -> Entry {
    Entry {
        name: name.into_bytes().into(),
        link: [].into(),
        user_name: [].into(),
        group_name: [].into(),
        header_offset: at,
        data_offset: at + 512,
        size: 0,
        mode: 0o644,
        modified: None,
        uid: 0,
        gid: 0,
        kind,
        extra: None,
    }
}

/// 200,000 names in a directory, the longest target, and a file of more than 4 GiB.
#[test]
fn large_trees() {
    if !can_mount_erofs() {
        return;
    }
    const NAMES: u64 = 200_000;
    const LARGE: u64 = (5 << 30) + 3;
    let mut entries: Vec<Entry> =
        (0..NAMES).map(|number| entry(format!("many/{number:x}"), EntryKind::Regular, number * 512)).collect();
    let link = Entry { link: vec![b't'; 4095].into(), ..entry("link".to_owned(), EntryKind::Symlink, NAMES * 512) };
    let large = Entry { size: LARGE, ..entry("large".to_owned(), EntryKind::Regular, (NAMES + 1) * 512) };
    let start = large.data_offset;
    entries.extend([link, large]);
    let (image, map) = checked_layer(&entries, (start + LARGE).next_multiple_of(512), None);
    assert!(map.is_plain());
    let work = tempfile::tempdir().unwrap();
    let (path, device, root) = (work.path().join("image"), work.path().join("device"), work.path().join("mnt"));
    fs::write(&path, &image).unwrap();
    let file = fs::File::create(&device).unwrap();
    file.set_len(map.bytes()).unwrap();
    let marks = [0, (1 << 32) - 2, LARGE - 5];
    marks.iter().for_each(|at| file.write_all_at(b"mark", start + at).unwrap());
    fs::create_dir(&root).unwrap();
    let _mounted = Mounted::new(&path, &[device], &root).unwrap();
    let mut names: Vec<_> = fs::read_dir(root.join("many")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    names.dedup();
    assert_eq!(names.len() as u64, NAMES);
    for number in (0..NAMES).step_by(997) {
        assert_eq!(fs::metadata(root.join(format!("many/{number:x}"))).unwrap().len(), 0);
    }
    assert!(!root.join("many/zz").exists());
    assert_eq!(fs::read_link(root.join("link")).unwrap().as_os_str().len(), 4095);
    let large = fs::File::open(root.join("large")).unwrap();
    assert_eq!(large.metadata().unwrap().len(), LARGE);
    for at in marks {
        let mut found = [0; 5];
        large.read_exact_at(&mut found, at).unwrap();
        assert_eq!(&found, b"mark\0", "at {at}");
    }
}
