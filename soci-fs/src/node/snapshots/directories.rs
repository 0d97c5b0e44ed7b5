//! The directories of snapshots.
//!
//! ```text
//! snapshots/NUMBER/fs        the files
//! snapshots/NUMBER/work      what overlay needs beside them, for writable snapshots
//! snapshots/new-N            made, but not yet recorded: belongs to a call in progress
//! snapshots/removed-NUMBER   no longer recorded: about to be deleted
//! ```
//!
//! A directory is complete before its record is written and is deleted after its record is gone, so a crash leaves at
//! worst a directory without a record, which the next cleaning finds. Taking it away begins with a rename, under the
//! same lock that allocates numbers; the deletion itself, which may take long, holds no lock.

use std::cell::RefCell;
use std::collections::HashSet;
use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::node::snapshots::record::Kind;
use crate::node::snapshots::{SnapshotError, io_error};

/// Only root may read other users' files from here.
const TOP_MODE: u32 = 0o700;
/// The root directory of a container, whatever the daemon's umask.
const FILES_MODE: u32 = 0o755;
const WORK_MODE: u32 = 0o711;

const NEW: &str = "new-";
const REMOVED: &str = "removed-";

/// The directory of all snapshot directories.
#[derive(Debug)]
pub(super) struct Directories {
    top: PathBuf,
    drafts: AtomicU64,
}

/// Owner and group of a directory.
pub(super) type Owner = (u32, u32);

impl Directories {
    /// Opens the directory, creating it if need be, and deletes what calls of an earlier process left half-made.
    pub(super) fn open(top: PathBuf) -> Result<Self, SnapshotError> {
        make(&top, TOP_MODE)?;
        let directories = Self { top, drafts: AtomicU64::new(0) };
        for name in directories.names()?.iter().filter(|name| name.starts_with(NEW)) {
            delete(&directories.top.join(name))?;
        }
        Ok(directories)
    }

    pub(super) fn files(&self, id: u64) -> PathBuf {
        self.top.join(id.to_string()).join("fs")
    }

    pub(super) fn work(&self, id: u64) -> PathBuf {
        self.top.join(id.to_string()).join("work")
    }

    /// Makes a directory for a snapshot that is not recorded yet.
    pub(super) fn draft(&self, kind: Kind, owner: Option<Owner>) -> Result<Draft<'_>, SnapshotError> {
        let number = self.drafts.fetch_add(1, Ordering::Relaxed);
        let path = self.top.join(format!("{NEW}{number}"));
        let draft = Draft { directories: self, place: RefCell::new((path.clone(), false)) };
        make(&path, TOP_MODE)?;
        let files = path.join("fs");
        make(&files, FILES_MODE)?;
        if let Some((user, group)) = owner {
            chown(&files, Some(user), Some(group)).map_err(io_error("change the owner of", &files))?;
        }
        if kind == Kind::Active {
            make(&path.join("work"), WORK_MODE)?;
        }
        Ok(draft)
    }

    /// Takes away all directories whose number is not among the `known` ones, and returns what is to be deleted. No
    /// number may be allocated concurrently.
    pub(super) fn take_unknown(&self, known: &[u64]) -> Result<Vec<PathBuf>, SnapshotError> {
        let known: HashSet<u64> = known.iter().copied().collect();
        let mut removed = Vec::new();
        for name in self.names()? {
            match name.parse::<u64>() {
                Ok(id) if !known.contains(&id) => removed.push(self.take(id)?),
                Err(_) if name.starts_with(REMOVED) => removed.push(self.top.join(name)),
                _ => {}
            }
        }
        Ok(removed)
    }

    fn take(&self, id: u64) -> Result<PathBuf, SnapshotError> {
        let (from, to) = (self.top.join(id.to_string()), self.top.join(format!("{REMOVED}{id}")));
        // Of a deletion that did not come to its end.
        delete(&to)?;
        fs::rename(&from, &to).map_err(io_error("rename", &from))?;
        Ok(to)
    }

    fn names(&self) -> Result<Vec<String>, SnapshotError> {
        let entries = fs::read_dir(&self.top).map_err(io_error("list", &self.top))?;
        let names = entries.map(|entry| entry.map(|entry| entry.file_name().into_string().unwrap_or_default()));
        names.collect::<io::Result<_>>().map_err(io_error("list", &self.top))
    }
}

/// The directory of a snapshot that is being made; gone if it is never published.
pub(super) struct Draft<'d> {
    directories: &'d Directories,
    /// Where it is, and whether it has its number.
    place: RefCell<(PathBuf, bool)>,
}

impl Draft<'_> {
    /// Gives the directory its number; another one than before, if the transaction is retried.
    pub(super) fn publish(&self, id: u64) -> Result<(), SnapshotError> {
        let to = self.directories.top.join(id.to_string());
        let mut place = self.place.borrow_mut();
        if place.0 == to {
            return Ok(());
        }
        if to.symlink_metadata().is_ok() {
            // Its record was never written, else the number would not be free.
            delete(&self.directories.take(id)?)?;
        }
        fs::rename(&place.0, &to).map_err(io_error("rename", &place.0))?;
        *place = (to, true);
        Ok(())
    }
}

impl Drop for Draft<'_> {
    fn drop(&mut self) {
        let (path, published) = &*self.place.borrow();
        // One with a number may be recorded even if the database said that it failed; the next cleaning knows.
        if !published && let Err(error) = delete(path) {
            tracing::warn!(%error, "a directory that was not used stays until the next start");
        }
    }
}

/// Owner of a directory.
pub(super) fn owner(path: &Path) -> io::Result<Owner> {
    path.metadata().map(|metadata| (metadata.uid(), metadata.gid()))
}

/// Deletes a directory and all below it; one that is not there is fine.
pub(super) fn delete(path: &Path) -> Result<(), SnapshotError> {
    match fs::remove_dir_all(path) {
        Err(cause) if cause.kind() != io::ErrorKind::NotFound => Err(io_error("delete", path)(cause)),
        _ => Ok(()),
    }
}

/// Makes a directory with this mode, whatever the umask; one that is there gets the mode.
pub(super) fn make(path: &Path, mode: u32) -> Result<(), SnapshotError> {
    DirBuilder::new().recursive(true).mode(mode).create(path).map_err(io_error("create", path))?;
    fs::set_permissions(path, Permissions::from_mode(mode)).map_err(io_error("change the mode of", path))
}
