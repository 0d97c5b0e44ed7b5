//! How much disk a directory takes.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::ops::AddAssign;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::node::snapshots::{SnapshotError, io_error};

/// Unit in which a file system counts the blocks of a file, whatever its own are.
const BLOCK_BYTES: u64 = 512;

/// Disk that a snapshot takes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Bytes in allocated blocks.
    pub bytes: u64,
    /// Files and directories; one for all names of a file.
    pub inodes: u64,
}

impl AddAssign for Usage {
    fn add_assign(&mut self, other: Self) {
        self.bytes += other.bytes;
        self.inodes += other.inodes;
    }
}

/// Measures a directory and all below it. What vanishes meanwhile is not counted.
pub(super) fn measure(directory: &Path) -> Result<Usage, SnapshotError> {
    let (mut usage, mut seen) = (Usage::default(), HashSet::new());
    let mut waiting = vec![directory.to_owned()];
    // The directory itself must be there: only what is below it may come and go.
    fs::symlink_metadata(directory).map_err(io_error("measure", directory))?;
    while let Some(path) = waiting.pop() {
        let Some(metadata) = present(fs::symlink_metadata(&path)).map_err(io_error("measure", &path))? else {
            continue;
        };
        if metadata.nlink() < 2 || metadata.is_dir() || seen.insert((metadata.dev(), metadata.ino())) {
            usage += Usage { bytes: metadata.blocks().saturating_mul(BLOCK_BYTES), inodes: 1 };
        }
        if metadata.is_dir() {
            push_entries(&path, &mut waiting).map_err(io_error("list", &path))?;
        }
    }
    Ok(usage)
}

fn push_entries(directory: &Path, waiting: &mut Vec<PathBuf>) -> io::Result<()> {
    let Some(entries) = present(fs::read_dir(directory))? else { return Ok(()) };
    for entry in entries {
        waiting.push(entry?.path());
    }
    Ok(())
}

fn present<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(cause) => Err(cause),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hard_links_count_once_and_links_are_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("fs");
        fs::create_dir_all(root.join("a/b")).unwrap();
        fs::write(directory.path().join("outside"), vec![1; 1 << 20]).unwrap();
        std::os::unix::fs::symlink("../../outside", root.join("a/link")).unwrap();
        let before = measure(&root).unwrap();
        assert_eq!(before.inodes, 4);
        fs::write(root.join("a/file"), vec![1; 64 << 10]).unwrap();
        let with_file = measure(&root).unwrap();
        let file = fs::metadata(root.join("a/file")).unwrap().blocks() * BLOCK_BYTES;
        assert_eq!((with_file.inodes, with_file.bytes >= before.bytes + file), (5, true));
        fs::hard_link(root.join("a/file"), root.join("a/b/again")).unwrap();
        assert_eq!(measure(&root).unwrap(), with_file);
        let sparse = fs::File::create(root.join("sparse")).unwrap();
        sparse.set_len(1 << 30).unwrap();
        assert!(measure(&root).unwrap().bytes < 1 << 29);
        assert!(measure(&directory.path().join("absent")).is_err());
    }
}
