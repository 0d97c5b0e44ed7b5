//! Which layer is in which slot, kept across restarts and reboots.
//!
//! A slot's number is part of every inode number that the kernel has seen, and of the lower directories of running
//! containers, so it must mean the same layer to the next process. One small file per slot, written beside and renamed:
//! a database would bring nothing but a second writer's lock. What a record holds is what it takes to open the layer
//! again without asking anybody.
//!
//! Invariants: a slot is on disk before anybody learns its number; a number is not given again while others are free,
//! so that what still points at an old layer fails instead of finding a new one; a record that cannot be read costs its
//! own layer only, and is left for a person to look at.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use soci_index::digest::Digest;
use soci_index::image::model::Descriptor;

/// Slots are 1 to this.
const SLOT_MAX: u16 = u16::MAX - 1;

/// What is known of the layer in a slot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SlotRecord {
    /// The layer.
    pub layer: Descriptor,
    /// Digest of its uncompressed tar.
    pub diff_id: Digest,
    /// The image it was first wanted for, as `host/repository@digest`.
    pub image: String,
    /// The zTOC by which it is read; none for a layer that was fetched whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ztoc: Option<Descriptor>,
}

/// Why slots could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    /// A system call failed.
    #[error("cannot {operation} {}: {cause}", path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        #[source]
        cause: io::Error,
    },
    /// All slots are taken.
    #[error("all {SLOT_MAX} slots for layers are taken; remove images that are not used")]
    Full,
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SlotError {
    move |cause| SlotError::Io { operation, path: path.to_owned(), cause }
}

/// The table of slots.
#[derive(Debug)]
pub struct Slots {
    directory: PathBuf,
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    records: BTreeMap<u16, SlotRecord>,
    /// Numbers whose file cannot be read: taken, and of no use.
    damaged: Vec<u16>,
    last: u16,
}

impl Slots {
    /// Reads the table kept in `directory`, which is made if need be.
    ///
    /// # Errors
    /// [`SlotError::Io`] when the directory cannot be used.
    pub fn open(directory: &Path) -> Result<Self, SlotError> {
        crate::private::ensure_private_dir(directory).map_err(|error| failed("use", directory)(error.into()))?;
        let mut table = Table::default();
        for entry in std::fs::read_dir(directory).map_err(failed("list", directory))? {
            let path = entry.map_err(failed("list", directory))?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let Some(slot) = name.strip_suffix(".json").and_then(|number| number.parse::<u16>().ok()) else {
                // What a crash left half written.
                let _ = std::fs::remove_file(&path);
                continue;
            };
            table.last = table.last.max(slot);
            let read = std::fs::read(&path).map_err(|error| error.to_string());
            match read.and_then(|text| serde_json::from_slice(&text).map_err(|error| error.to_string())) {
                Ok(record) => drop(table.records.insert(slot, record)),
                Err(error) => {
                    tracing::error!(file = %path.display(), error, "the layer in this slot is lost: remove its image");
                    table.damaged.push(slot);
                }
            }
        }
        Ok(Self { directory: directory.to_owned(), table: Mutex::new(table) })
    }

    /// All slots with their layers.
    #[must_use]
    pub fn all(&self) -> Vec<(u16, SlotRecord)> {
        self.lock().records.iter().map(|(slot, record)| (*slot, record.clone())).collect()
    }

    /// The layer in a slot.
    #[must_use]
    pub fn get(&self, slot: u16) -> Option<SlotRecord> {
        self.lock().records.get(&slot).cloned()
    }

    /// The slot of a layer.
    #[must_use]
    pub fn find(&self, layer: &Digest) -> Option<u16> {
        self.lock().records.iter().find(|(_, record)| record.layer.digest == *layer).map(|(slot, _)| *slot)
    }

    /// Gives a layer a slot: the one that it has already, or a new one.
    ///
    /// # Errors
    /// [`SlotError`].
    pub fn assign(&self, record: SlotRecord) -> Result<u16, SlotError> {
        let mut table = self.lock();
        let known = table.records.iter().find(|(_, known)| known.layer.digest == record.layer.digest);
        let slot = match known.map(|(slot, _)| *slot) {
            Some(slot) => slot,
            None => table.free().ok_or(SlotError::Full)?,
        };
        let path = self.path(slot);
        let new = self.directory.join(format!(".{slot}.new"));
        let text = serde_json::to_vec_pretty(&record).map_err(|error| failed("write", &new)(error.into()))?;
        write_through(&new, &text).map_err(failed("write", &new))?;
        std::fs::rename(&new, &path).map_err(failed("rename", &path))?;
        table.last = table.last.max(slot);
        table.records.insert(slot, record);
        Ok(slot)
    }

    /// Frees a slot, and says what was in it.
    ///
    /// # Errors
    /// [`SlotError::Io`]; the slot is still taken then.
    pub fn release(&self, slot: u16) -> Result<Option<SlotRecord>, SlotError> {
        let mut table = self.lock();
        let path = self.path(slot);
        match std::fs::remove_file(&path) {
            Err(cause) if cause.kind() != io::ErrorKind::NotFound => Err(failed("remove", &path)(cause)),
            _ => Ok(table.records.remove(&slot)),
        }
    }

    fn path(&self, slot: u16) -> PathBuf {
        self.directory.join(format!("{slot}.json"))
    }

    /// Locks for the writing of a small file at most. A panic cannot leave the table half changed.
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    /// The number after the highest that was ever given, else the first gap.
    fn free(&self) -> Option<u16> {
        if self.last < SLOT_MAX {
            return Some(self.last + 1);
        }
        (1..=SLOT_MAX).find(|slot| !self.records.contains_key(slot) && !self.damaged.contains(slot))
    }
}

/// A slot must outlive a power cut, as the snapshot does that refers to it.
pub(super) fn write_through(path: &Path, text: &[u8]) -> io::Result<()> {
    use std::io::Write as _;
    let mut file = std::fs::File::create(path)?;
    file.write_all(text)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(name: &str) -> SlotRecord {
        SlotRecord {
            layer: Descriptor::of("application/vnd.oci.image.layer.v1.tar+gzip", name.as_bytes()),
            diff_id: Digest::of(b"tar"),
            image: "registry.example/team/app@sha256:00".to_owned(),
            ztoc: None,
        }
    }

    #[test]
    fn numbers_last_and_are_not_given_twice() {
        let directory = tempfile::tempdir().unwrap();
        let slots = Slots::open(directory.path()).unwrap();
        let (a, b) = (record("a"), record("b"));
        assert_eq!((slots.assign(a.clone()).unwrap(), slots.assign(b.clone()).unwrap()), (1, 2));
        assert_eq!(slots.assign(a.clone()).unwrap(), 1);
        assert_eq!(slots.release(2).unwrap(), Some(b.clone()));
        assert_eq!(slots.release(2).unwrap(), None);
        assert_eq!(slots.assign(record("c")).unwrap(), 3);
        drop(slots);
        let slots = Slots::open(directory.path()).unwrap();
        assert_eq!(slots.all(), [(1, a.clone()), (3, record("c"))]);
        assert_eq!((slots.get(1), slots.find(&a.layer.digest), slots.find(&b.layer.digest)), (Some(a), Some(1), None));
        assert_eq!(slots.assign(b).unwrap(), 4);
    }

    #[test]
    fn damage_costs_one_slot() {
        let directory = tempfile::tempdir().unwrap();
        let slots = Slots::open(directory.path()).unwrap();
        for name in ["a", "b"] {
            slots.assign(record(name)).unwrap();
        }
        std::fs::write(directory.path().join("1.json"), "{").unwrap();
        std::fs::write(directory.path().join(".3.new"), "{").unwrap();
        let slots = Slots::open(directory.path()).unwrap();
        assert_eq!(slots.all(), [(2, record("b"))]);
        assert!(directory.path().join("1.json").exists() && !directory.path().join(".3.new").exists());
        assert_eq!(slots.assign(record("a")).unwrap(), 3);
    }

    #[test]
    fn gaps_are_used_at_the_end() {
        let mut table = Table { last: SLOT_MAX, damaged: vec![1], ..Table::default() };
        table.records.insert(2, record("a"));
        assert_eq!(table.free(), Some(3));
        table.last = 7;
        assert_eq!(table.free(), Some(8));
    }
}
