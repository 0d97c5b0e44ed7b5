//! Directory trees to compare, and what a mount needs.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

pub use crate::mounting::can_mount;
use crate::reading::noise;

/// What can be seen of a file, content included.
pub fn describe(path: &Path) -> String {
    let stat = fs::symlink_metadata(path).unwrap();
    let kind = stat.file_type();
    let mut text = format!(
        "mode {:o} owner {}:{} mtime {}.{} links {}",
        stat.mode(),
        stat.uid(),
        stat.gid(),
        stat.mtime(),
        stat.mtime_nsec(),
        stat.nlink()
    );
    if kind.is_file() {
        let content = fs::read(path).unwrap();
        text += &format!(" size {} sum {}", stat.size(), soci_index::format::digest::Digest::of(&content));
    } else if kind.is_symlink() {
        text += &format!(" size {} -> {}", stat.size(), fs::read_link(path).unwrap().display());
    } else if kind.is_char_device() || kind.is_block_device() {
        text += &format!(" device {:x}", stat.rdev());
    }
    let mut names = vec![0; 4096];
    let length = rustix::fs::llistxattr(path, &mut names[..]).unwrap_or(0);
    // In whatever order the file system lists them.
    let mut names: Vec<&[u8]> = names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()).collect();
    names.sort_unstable();
    for name in names {
        let mut value = vec![0; 1 << 16];
        let length = rustix::fs::lgetxattr(path, name, &mut value[..]).unwrap();
        text += &format!(" {}={}", name.escape_ascii(), value[..length].escape_ascii());
    }
    text
}

pub fn tree(root: &Path) -> BTreeMap<PathBuf, String> {
    let mut found = BTreeMap::new();
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            if fs::symlink_metadata(&path).unwrap().is_dir() {
                directories.push(path.clone());
            }
            found.insert(path.strip_prefix(root).unwrap().to_owned(), describe(&path));
        }
    }
    found
}

pub fn compare(expected: &BTreeMap<PathBuf, String>, found: &BTreeMap<PathBuf, String>) {
    for (path, text) in expected {
        assert_eq!(found.get(path), Some(text), "{}", path.display());
    }
    assert_eq!(found.len(), expected.len());
}

/// A directory with everything in it that a tar can hold.
pub fn populate(root: &Path) {
    use std::os::unix::fs::{PermissionsExt as _, chown, symlink};
    for directory in ["usr/bin", "usr/lib", "var/empty", "etc"] {
        fs::create_dir_all(root.join(directory)).unwrap();
    }
    for (number, (name, size)) in (0..).zip([
        ("usr/bin/tool", 300_000),
        ("usr/lib/lib.so", 1_200_000),
        ("etc/empty", 0),
        ("etc/one", 1),
        ("etc/x y", 4096),
    ]) {
        fs::write(root.join(name), noise(number, size)).unwrap();
        chown(root.join(name), Some(u32::try_from(number).unwrap() * 1000), Some(7)).unwrap();
    }
    fs::set_permissions(root.join("usr/bin/tool"), fs::Permissions::from_mode(0o4755)).unwrap();
    fs::set_permissions(root.join("var/empty"), fs::Permissions::from_mode(0o1777)).unwrap();
    fs::hard_link(root.join("usr/bin/tool"), root.join("usr/bin/alias")).unwrap();
    symlink("../lib/lib.so", root.join("usr/bin/link")).unwrap();
    symlink("/nowhere", root.join("etc/dangling")).unwrap();
    let special = [
        ("mknod", vec!["etc/null", "c", "1", "3"]),
        ("mknod", vec!["etc/disk", "b", "259", "300"]),
        ("mkfifo", vec!["etc/pipe"]),
    ];
    for (program, arguments) in special {
        assert!(Command::new(program).args(arguments).current_dir(root).status().unwrap().success());
    }
    for number in 0..3000 {
        fs::write(root.join(format!("var/many{number:04}")), [0, 1, 2]).unwrap();
    }
    let flags = rustix::fs::XattrFlags::empty();
    // Not every file system under a test has them.
    if rustix::fs::setxattr(root.join("etc/one"), "user.colour", b"blue\0green", flags).is_err() {
        eprintln!("SKIPPED: no extended attributes on this file system");
    }
    for (time, name) in [("2001-02-03 04:05:06.789012345", "etc/one"), ("1960-01-02 03:04:05.25", "etc/x y")] {
        assert!(Command::new("touch").args(["-d", time, name]).current_dir(root).status().unwrap().success());
    }
}
