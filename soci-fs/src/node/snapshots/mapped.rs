//! Snapshots for containers in user namespaces: what is below them, with mapped owners.
//!
//! The labels of such a snapshot say how owners are mapped (capability `remap-ids`). Layers of the provider have views
//! of their own for that. Directories that containerd unpacked are mounted once more, with an id mapping, at
//! `mapped/NUMBER-MAP`; these mounts outlive this process and are made again after a reboot, when the snapshot's mounts
//! are requested.
//!
//! Invariants: what is mounted there is never deleted through it (it is read-only, and only empty directories are
//! removed); a mount is used only if it shows the right directory with the right owner.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use parking_lot::Mutex;
use rustix::mount::{UnmountFlags, unmount};

use crate::fuse::mount::id_mapped;
use crate::node::snapshots::database::View;
use crate::node::snapshots::directories::{self, Owner};
use crate::node::snapshots::record::{Lower, Record};
use crate::node::snapshots::{SnapshotError, Snapshots, io_error};
use crate::tree::id_map::IdMap;

/// The mounts with mapped owners.
#[derive(Debug)]
pub(super) struct Mapped {
    top: PathBuf,
    /// Held while something is mounted or unmounted.
    busy: Mutex<()>,
}

impl Mapped {
    pub(super) fn open(top: PathBuf) -> Result<Self, SnapshotError> {
        directories::make(&top, 0o700)?;
        Ok(Self { top, busy: Mutex::default() })
    }

    /// Shows the directory `files` of snapshot `id` with the owners of map `number`.
    fn show(&self, id: u64, files: &Path, number: u8, map: &IdMap) -> Result<PathBuf, SnapshotError> {
        let _busy = self.busy.lock();
        let place = self.top.join(format!("{id}-{number}"));
        if is_shown(files, &place, map) {
            return Ok(place);
        }
        // Of another mapping, or of another boot.
        self.take_down(&place);
        directories::make(&place, 0o700)?;
        id_mapped::mount(files, &place, map).map_err(io_error("map the owners of", files))?;
        Ok(place)
    }

    /// Takes down what shows snapshots that are gone.
    pub(super) fn keep_snapshots(&self, known: &[u64]) {
        let known: BTreeSet<u64> = known.iter().copied().collect();
        self.keep(|id, _| known.contains(&id));
    }

    /// Takes down what shows by maps that are gone.
    fn keep_maps(&self, used: &BTreeSet<u8>) {
        self.keep(|_, map| used.contains(&map));
    }

    fn keep(&self, wanted: impl Fn(u64, u8) -> bool) {
        let _busy = self.busy.lock();
        let entries = fs::read_dir(&self.top).into_iter().flatten().flatten();
        for place in entries.map(|entry| entry.path()) {
            let name = place.file_name().and_then(|name| name.to_str()).and_then(|name| name.split_once('-'));
            let numbers = name.and_then(|(id, map)| Some((id.parse().ok()?, map.parse().ok()?)));
            if numbers.is_some_and(|(id, map)| !wanted(id, map)) {
                self.take_down(&place);
            }
        }
    }

    /// Users of a mount keep it until they end; its name is free at once.
    fn take_down(&self, place: &Path) {
        while unmount(place, UnmountFlags::DETACH).is_ok() {}
        match fs::remove_dir(place) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                tracing::warn!(path = %place.display(), %error, "a directory stays behind");
            }
            _ => {}
        }
    }
}

/// Whether `place` shows `files` as `map` wants it: it is the same directory, and its owner is the mapped one.
fn is_shown(files: &Path, place: &Path, map: &IdMap) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    let (Ok(original), Ok(shown)) = (files.metadata(), place.metadata()) else { return false };
    let same = (original.dev(), original.ino()) == (shown.dev(), shown.ino());
    same && (map.uid(original.uid()), map.gid(original.gid())) == (shown.uid(), shown.gid())
}

impl Snapshots {
    /// A number for the mapping of a snapshot that is to be.
    pub(super) fn assign_id_map(&self, key: &str, map: &IdMap) -> Result<u8, SnapshotError> {
        let assigned = self.provider.assign_id_map(map);
        assigned.map_err(|reason| SnapshotError::Unmappable { key: key.to_owned(), reason })
    }

    /// The directory that shows a snapshot to one above it whose owners are mapped by `id_map`.
    pub(super) fn lower(&self, key: &str, record: &Record, id_map: Option<u8>) -> Result<PathBuf, SnapshotError> {
        match (record.content, id_map) {
            (Lower::Layer { slot }, map) => Ok(self.provider.lower_directory(slot, map)),
            (Lower::Local, None) => Ok(self.files(record)),
            (Lower::Local, Some(number)) => {
                let map = self.provider.id_map(number).ok_or_else(|| SnapshotError::Unmappable {
                    key: key.to_owned(),
                    reason: format!("id map {number} is lost; remove the container and make it again"),
                })?;
                self.mapped.show(record.id, &self.files(record), number, &map)
            }
        }
    }

    /// Owner of what shows a snapshot to one above it, which must be there.
    pub(super) fn owner(&self, key: &str, record: &Record, id_map: Option<u8>) -> Result<Owner, SnapshotError> {
        self.present(key, record)?;
        let path = self.lower(key, record, id_map)?;
        directories::owner(&path).map_err(|cause| SnapshotError::Unavailable { key: key.to_owned(), path, cause })
    }

    /// Gives back the numbers of mappings that no snapshot needs. None may be created concurrently.
    pub(super) fn release_id_maps(&self) -> Result<(), SnapshotError> {
        let records = self.database.read(View::all)?;
        let used = records.iter().filter_map(|(_, record)| record.id_map).collect();
        self.mapped.keep_maps(&used);
        self.provider.keep_id_maps(&used);
        Ok(())
    }
}
