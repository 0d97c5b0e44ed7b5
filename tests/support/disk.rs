//! A disk that is soon full.

use std::path::Path;
use std::process::Command;

use crate::run;

/// A small file system in memory, in a directory of its own. It is unmounted when this is dropped.
#[derive(Debug)]
pub struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    /// One of `size`, as mount(8) takes it; `None`, with a word on standard error, for others than root.
    ///
    /// # Panics
    /// When there is no directory available.
    #[must_use]
    pub fn new(size: &str) -> Option<Self> {
        let directory = tempfile::tempdir().expect("a directory");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"]).arg(directory.path());
        if !rustix::process::geteuid().is_root() || !run(&mut mount).status.success() {
            eprintln!("SKIPPED: a small file system needs root and mount(8)");
            return None;
        }
        Some(Self(directory))
    }

    /// Where it is mounted.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Leaves so many bytes free, or a page more.
    ///
    /// # Panics
    /// When that is refused.
    pub fn leave(&self, bytes: u64) {
        let now = rustix::fs::statvfs(self.path()).expect("a file system");
        self.resize(&((now.f_blocks - now.f_bfree) * now.f_frsize + bytes).to_string());
    }

    /// Makes it larger, or smaller.
    ///
    /// # Panics
    /// When that is refused.
    pub fn resize(&self, size: &str) {
        let resized = run(Command::new("mount").args(["-o", &format!("remount,size={size}")]).arg(self.path()));
        assert!(resized.status.success(), "{resized:?}");
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = run(Command::new("umount").arg("-l").arg(self.path()));
    }
}
