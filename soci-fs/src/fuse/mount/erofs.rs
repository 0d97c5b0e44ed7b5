//! Mounts of EROFS images that this program wrote: names in the image, bytes in another file.
//!
//! The image is a file, not a loop device (Linux 6.12). Only what [`crate::tree::erofs`] has written is ever mounted: an
//! image from elsewhere would have the kernel parse what a stranger says. Whether it works depends on the kernel, its
//! configuration and on the file systems below, so it is tried ([`probe`]), with an overlay on top as containers have it.
//!
//! Invariant: what is tried leaves nothing behind.

use std::collections::BTreeSet;
use std::ffi::{CString, OsString};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};
use soci_index::format::entry::{Entry, EntryKind};

use crate::tree::Tree;
use crate::tree::device::{BLOCK_BYTES, DeviceMap};
use crate::tree::erofs::{Layer, write};

/// Where the kernel lists what reads ahead.
const READERS_AHEAD: &str = "/sys/class/bdi";

/// Held while something is mounted, so that the entry in [`READERS_AHEAD`] that appears meanwhile is the mount's own.
static MOUNTING: Mutex<()> = Mutex::new(());

/// What the bytes of an image's files are in.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Device<'path> {
    /// A file that a FUSE process serves. It is read past the page cache, so that no byte is in memory twice, and without
    /// waiting for one piece after the other.
    Served(&'path Path),
    /// A file on a disk, read as any other: direct reads would have to begin where its blocks do.
    Local(&'path Path),
}

/// Mounts the image in the file `image` on the directory `target`, read-only. Its files' bytes are in `device`.
/// `read_ahead_kib` is the kernel's read-ahead in KiB.
///
/// # Errors
/// What the system says; `InvalidInput` for a path that mount options cannot express.
pub(crate) fn mount(image: &Path, device: Device<'_>, target: &Path, read_ahead_kib: Option<u32>) -> io::Result<()> {
    let _mounting = MOUNTING.lock();
    let before = readers_ahead();
    let attempt = |more: &str| {
        let (Device::Served(path) | Device::Local(path)) = device;
        let path = path.as_os_str().as_bytes();
        if path.contains(&b',') {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a comma in a path ends a mount option"));
        }
        let options = CString::new([b"device=", path, more.as_bytes()].concat())?;
        Ok(rustix::mount::mount(image, target, "erofs", MountFlags::RDONLY, &*options)?)
    };
    let is_unknown = |error: &io::Error| error.raw_os_error() == Some(Errno::INVAL.raw_os_error());
    match device {
        Device::Local(_) => attempt("")?,
        Device::Served(_) => match attempt(",directio") {
            // Some kernels do not know the option; that the device is opened for direct reads has to suffice.
            Err(error) if is_unknown(&error) => attempt("")?,
            result => result?,
        },
    }
    if let Some(kib) = read_ahead_kib {
        let new: Vec<OsString> = readers_ahead().difference(&before).cloned().collect();
        // Another process may have mounted something at the same time.
        let set = match new.as_slice() {
            [only] => fs::write(Path::new(READERS_AHEAD).join(only).join("read_ahead_kb"), kib.to_string()),
            _ => Err(io::ErrorKind::NotFound.into()),
        };
        if let Err(cause) = set {
            tracing::debug!(mountpoint = %target.display(), %cause, "the kernel's read-ahead stays as it is");
        }
    }
    Ok(())
}

fn readers_ahead() -> BTreeSet<OsString> {
    let entries = fs::read_dir(READERS_AHEAD).into_iter().flatten().flatten().map(|entry| entry.file_name());
    entries.filter(|name| name.as_bytes().starts_with(b"erofs")).collect()
}

/// Takes what is mounted on `target` out of the tree, and removes the directory. Users of a mount keep it until they end.
pub(crate) fn take_down(target: &Path) {
    while rustix::mount::unmount(target, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH).is_ok() {}
    match fs::remove_dir(target) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(path = %target.display(), %error, "a directory stays behind");
        }
        _ => {}
    }
}

/// Finds out whether images can be mounted below `directory`, and overlays on top of them.
///
/// # Errors
/// What the system says of the first step that failed, with that step.
pub(crate) fn probe(directory: &Path) -> io::Result<()> {
    let at = |name: &str| directory.join(name);
    let [target, merged] = [at("probe"), at("probe-overlay")];
    let tried = try_out(&at("probe.erofs"), &at("probe.tar"), &target, &merged);
    take_down(&merged);
    take_down(&target);
    for file in [at("probe.erofs"), at("probe.tar")] {
        let _ = fs::remove_file(file);
    }
    tried
}

fn try_out(image: &Path, device: &Path, target: &Path, merged: &Path) -> io::Result<()> {
    let step = |what: &'static str| move |cause: io::Error| io::Error::new(cause.kind(), format!("{what}: {cause}"));
    let text = b"bytes of a file";
    let entries = [
        entry(b"a/", EntryKind::Directory, 0, 0),
        entry(b"b/", EntryKind::Directory, 1, 0),
        entry(b"a/f", EntryKind::Regular, 2, text.len() as u64),
    ];
    let blocks = 4;
    let tree = Tree::of_layer(&entries).map_err(io::Error::other)?;
    let map = DeviceMap::of_layer(&entries, blocks * BLOCK_BYTES).map_err(io::Error::other)?;
    let mut bytes = Vec::new();
    write(&tree, &[Layer { entries: &entries, device: &map }], None, &mut bytes).map_err(io::Error::other)?;
    fs::write(image, bytes).map_err(step("cannot write an EROFS image"))?;
    let content = fs::File::create(device).and_then(|file| {
        file.set_len(blocks * BLOCK_BYTES)?;
        file.write_all_at(text, entries[2].data_offset)
    });
    content.map_err(step("cannot write a device"))?;
    for directory in [target, merged] {
        fs::create_dir_all(directory).map_err(step("cannot make a directory"))?;
    }
    mount(image, Device::Local(device), target, None).map_err(step("cannot mount an EROFS image that is a file"))?;
    let lower = format!("lowerdir={0}/a:{0}/b", target.display());
    let lower = CString::new(lower)?;
    rustix::mount::mount("overlay", merged, "overlay", MountFlags::RDONLY, &*lower)
        .map_err(|errno| step("cannot mount an overlay on an EROFS image")(errno.into()))?;
    let read = fs::read(merged.join("f")).map_err(step("cannot read a file of an EROFS image"))?;
    if read != text {
        return Err(io::Error::other("a file of an EROFS image has other bytes"));
    }
    Ok(())
}

/// An entry whose header is at a block.
fn entry(name: &[u8], kind: EntryKind, block: u64, size: u64) -> Entry {
    let nothing: Arc<[u8]> = Arc::default();
    Entry {
        name: name.into(),
        link: Box::default(),
        user_name: Arc::clone(&nothing),
        group_name: nothing,
        header_offset: block * BLOCK_BYTES,
        data_offset: (block + 1) * BLOCK_BYTES,
        size,
        mode: 0o755,
        modified: None,
        uid: 0,
        gid: 0,
        kind,
        extra: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trial_leaves_nothing() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("SKIPPED: mounts need root");
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        match probe(directory.path()) {
            Err(error) if error.to_string().contains("cannot mount") => eprintln!("SKIPPED: no EROFS here: {error}"),
            result => result.unwrap(),
        }
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        assert!(!mounts.contains(directory.path().to_str().unwrap()), "{mounts}");
        assert!(probe(Path::new("/proc")).is_err());
    }
}
