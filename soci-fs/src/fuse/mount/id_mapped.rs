//! Directories shown with other owners: mounts with an id mapping.
//!
//! A layer that containerd unpacked is an ordinary directory. For a container in a user namespace the kernel shows it
//! with mapped owners (`mount_setattr`, Linux 5.12; overlayfs on top of that since 5.19). It takes the mapping from a
//! user namespace, so one is made for the moment, by a process that does nothing else. The road not taken is to copy
//! the tree and change the owner of every file, which loses hard links and the point of sharing.
//!
//! Invariants: such a mount is read-only, so that nothing done to it can reach the original; the helper process ends
//! before this returns.

#![allow(unsafe_code, reason = "no library wraps this system call")]

use std::io::{self, Read as _};
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use crate::tree::id_map::{IdMap, IdRange};

/// Program that makes a namespace: of util-linux, and of busybox.
const UNSHARE: &str = "unshare";

/// Mounts `source` on the directory `target`, with owners mapped.
///
/// # Errors
/// What the system says. `Unsupported` if the kernel or the file system cannot do it.
pub(crate) fn mount(source: &Path, target: &Path, map: &IdMap) -> io::Result<()> {
    let namespace = namespace(map)?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = open_tree(CWD, source, flags)?;
    set_attributes(&tree, &namespace)?;
    Ok(move_mount(&tree, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
}

fn set_attributes(tree: &impl AsFd, namespace: &OwnedFd) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP | libc::MOUNT_ATTR_RDONLY,
        attr_clr: 0,
        propagation: 0,
        userns_fd: u64::try_from(namespace.as_raw_fd()).map_err(|_| io::ErrorKind::InvalidInput)?,
    };
    // SAFETY: the path is an empty C string, the structure is live and of the size that is passed, and the kernel reads
    // both during the call only. The descriptors are open for its length.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_fd().as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 {
        return Ok(());
    }
    let cause = io::Error::last_os_error();
    match cause.raw_os_error() {
        Some(libc::EINVAL | libc::ENOSYS | libc::EOPNOTSUPP) => Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "this kernel or this file system cannot show a directory with mapped owners",
        )),
        _ => Err(cause),
    }
}

/// A user namespace with this mapping.
fn namespace(map: &IdMap) -> io::Result<OwnedFd> {
    let mut holder = Command::new(UNSHARE)
        // A byte says that the namespace is there; then it waits for the end of its input.
        .args(["--user", "sh", "-c", "echo; read -r _"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| io::Error::new(error.kind(), format!("cannot start {UNSHARE} (of util-linux): {error}")))?;
    let namespace = take_namespace(&mut holder, map);
    drop(holder.stdin.take());
    holder.wait()?;
    namespace
}

fn take_namespace(holder: &mut Child, map: &IdMap) -> io::Result<OwnedFd> {
    let mut byte = [0];
    let output = holder.stdout.as_mut().ok_or(io::ErrorKind::BrokenPipe)?;
    if output.read(&mut byte)? == 0 {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "no user namespace can be made here"));
    }
    let at = format!("/proc/{}", holder.id());
    std::fs::write(format!("{at}/uid_map"), text(&map.uids))?;
    std::fs::write(format!("{at}/gid_map"), text(&map.gids))?;
    Ok(rustix::fs::open(format!("{at}/ns/user"), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?)
}

/// A mapping as `/proc/PID/uid_map` wants it.
fn text(ranges: &[IdRange]) -> String {
    ranges.iter().map(|range| format!("{} {} {}\n", range.container, range.host, range.size)).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt as _, chown};

    use super::*;
    use crate::tree::id_map::parse;

    #[test]
    fn owners_are_mapped_and_nothing_can_be_written() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("SKIPPED: mounts with an id mapping need root");
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let (source, target) = (directory.path().join("source"), directory.path().join("target"));
        std::fs::create_dir(&source).unwrap();
        std::fs::create_dir(&target).unwrap();
        for (name, uid, gid) in [("root", 0, 0), ("user", 7, 8), ("nobody", 70_000, 9)] {
            std::fs::write(source.join(name), name).unwrap();
            chown(source.join(name), Some(uid), Some(gid)).unwrap();
        }
        let map = IdMap { uids: parse("0:100000:65536").unwrap(), gids: parse("0:200000:65536").unwrap() };
        mount(&source, &target, &map).unwrap();
        let owners = |name: &str| {
            let metadata = std::fs::metadata(target.join(name)).unwrap();
            (metadata.uid(), metadata.gid())
        };
        assert_eq!(
            [owners("root"), owners("user"), owners("nobody")],
            [(100_000, 200_000), (100_007, 200_008), (65534, 200_009)]
        );
        let error = std::fs::remove_file(target.join("root")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem);
        rustix::mount::unmount(&target, rustix::mount::UnmountFlags::DETACH).unwrap();
        // A mapping that the kernel does not take.
        let map = IdMap { uids: parse("0:1:1").unwrap(), gids: Vec::new() };
        assert!(mount(&source, &target, &map).is_err());
    }
}
