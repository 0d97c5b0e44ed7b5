//! What the system at hand can do, and which mount options it needs.
//!
//! Whether overlay works below a root is found out by mounting one: it depends on the kernel, on the file system below
//! and on where the process runs, and no list of these is ever complete.

use std::ffi::CString;
use std::fs;
use std::path::Path;

use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::node::snapshots::directories::{delete, make};
use crate::node::snapshots::{SnapshotError, io_error, root_text};

/// Directory of the trial, below the root.
const TRIAL: &str = "overlay-trial";

/// How snapshots are to be mounted.
#[derive(Debug, Clone, Copy, Default)]
pub struct SnapshotOptions {
    /// Overlay mounts carry `userxattr`: needed inside a user namespace.
    pub user_xattr: bool,
    /// Overlay mounts carry `index=off`: with an index a directory that was once a lower one of another overlay may be
    /// refused, and snapshots are lower directories of many.
    pub index_off: bool,
}

impl SnapshotOptions {
    /// What this process needs where it runs.
    #[must_use]
    pub fn of_this_system() -> Self {
        // The first user namespace maps every number onto itself.
        let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
        let numbers: Vec<&str> = map.split_whitespace().collect();
        let user_xattr = !matches!(numbers.as_slice(), [] | ["0", "0", "4294967295"]);
        // Kernels that do not know the option refuse it.
        Self { user_xattr, index_off: Path::new("/sys/module/overlay/parameters/index").exists() }
    }
}

/// Finds out whether overlay can be mounted below `root`. Without the right to mount anything that stays open, and is
/// no error: it is containerd that mounts snapshots.
///
/// # Errors
/// [`SnapshotError::NoOverlay`]; [`SnapshotError::Root`] and [`SnapshotError::Io`] if it could not even be tried.
pub fn check_overlay(root: &Path) -> Result<(), SnapshotError> {
    let trial = root.join(TRIAL);
    let text = root_text(root)?;
    for name in ["lower1", "lower2", "upper", "work", "merged"] {
        make(&trial.join(name), 0o700)?;
    }
    let at = |name: &str| format!("{text}/{TRIAL}/{name}");
    let options = format!("lowerdir={}:{},upperdir={},workdir={}", at("lower2"), at("lower1"), at("upper"), at("work"));
    let options = CString::new(options).map_err(|_| SnapshotError::Root { path: root.to_owned() })?;
    let merged = trial.join("merged");
    let result = match mount("overlay", &merged, "overlay", MountFlags::empty(), Some(options.as_c_str())) {
        Ok(()) => unmount(&merged, UnmountFlags::DETACH).map_err(|errno| io_error("unmount", &merged)(errno.into())),
        Err(Errno::PERM) => {
            tracing::warn!("without the right to mount it is unknown whether overlay works here");
            Ok(())
        }
        Err(errno) => Err(SnapshotError::NoOverlay { path: root.to_owned(), cause: errno.into() }),
    };
    delete(&trial)?;
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trial_leaves_nothing() {
        let root = tempfile::tempdir().unwrap();
        check_overlay(root.path()).unwrap();
        assert!(!root.path().join(TRIAL).exists());
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        assert!(!mounts.contains(root.path().to_str().unwrap()), "{mounts}");
    }

    #[test]
    fn where_overlay_cannot_work_it_says_so() {
        // No directory can be made there.
        let error = check_overlay(Path::new("/proc")).unwrap_err();
        assert!(matches!(error, SnapshotError::Io { .. }), "{error}");
        assert!(matches!(check_overlay(Path::new("/a:b")), Err(SnapshotError::Root { .. })));
    }
}
