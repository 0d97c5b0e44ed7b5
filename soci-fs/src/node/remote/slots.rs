//! Which claim of a layer is in which slot, and which images use it, kept across restarts and reboots.
//!
//! A slot's number is part of every inode number that the kernel has seen, and of the lower directories of running
//! containers, so it must mean the same layer to the next process. One small file per slot, replaced atomically by a
//! rename: a database would bring nothing but a second writer's lock. With the claim's directory in the layer store a
//! record holds what it takes to open the layer again without a registry, and every place that its bytes can be
//! obtained from.
//!
//! Invariants: a slot is on disk before its number is returned; a number is not given again while others are free, so
//! that what still points at an old layer fails instead of finding a new one; a record that cannot be read costs its
//! own layer only, and is left for a person to look at. All calls that write a file block: they are for threads that
//! may.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use soci_index::format::class::{Class, Classified};
use soci_index::format::digest::Digest;
use soci_index::format::model::Descriptor;

use crate::layer::store::Claim;

/// Slots are 1 to this.
const SLOT_MAX: u16 = u16::MAX - 1;

/// Images that are remembered of one slot. Stops a thousand images on one layer from making a record of a thousand
/// lines.
const ORIGINS_MAX: usize = 64;

/// What is known of the layer in a slot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", from = "AnyRecord")]
pub struct SlotRecord {
    /// What is claimed of it.
    pub claim: Claim,
    /// The images that use it, the first one first. There is at least one.
    pub origins: Vec<SlotOrigin>,
}

/// An image that uses a layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SlotOrigin {
    /// The image, as `host/repository@digest`.
    pub image: String,
    /// The layer as the image names it: another blob with the same tar, perhaps.
    pub layer: Descriptor,
    /// The index by which the image would be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub index: Option<Digest>,
    /// Where that index and its parts are, as `host/repository`, if not beside the image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub index_from: Option<String>,
    /// Headers that its client wants to be sent to the registry.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub headers: BTreeMap<String, String>,
}

impl SlotRecord {
    /// The image that it was first wanted for.
    #[must_use]
    pub fn image(&self) -> &str {
        self.origins.first().map_or("", |origin| &origin.image)
    }

    /// The manifests of all images that use it.
    pub fn manifests(&self) -> impl Iterator<Item = Digest> {
        let digest = |origin: &SlotOrigin| origin.image.rsplit_once('@')?.1.parse().ok();
        self.origins.iter().filter_map(digest)
    }
}

/// A record as this version writes it, or as one before did: one image, whatever others used the layer.
#[derive(Deserialize)]
#[serde(untagged)]
#[expect(clippy::large_enum_variant, reason = "one is made while a file is read, and taken apart at once")]
enum AnyRecord {
    Now {
        claim: Claim,
        origins: Vec<SlotOrigin>,
    },
    #[serde(rename_all = "camelCase")]
    Before {
        layer: Descriptor,
        diff_id: Digest,
        image: String,
        #[serde(default)]
        ztoc: Option<Descriptor>,
    },
}

impl From<AnyRecord> for SlotRecord {
    fn from(record: AnyRecord) -> Self {
        match record {
            AnyRecord::Now { claim, origins } => Self { claim, origins },
            AnyRecord::Before { layer, diff_id, image, ztoc } => {
                let claim = Claim { layer: layer.digest, diff_id, table: ztoc.map(|ztoc| ztoc.digest), pack: None };
                Self {
                    claim,
                    origins: vec![SlotOrigin { image, layer, index: None, index_from: None, headers: BTreeMap::new() }],
                }
            }
        }
    }
}

/// Why slots could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    /// A system call failed.
    #[error("cannot {operation} {}: {cause}", path.display())]
    Io {
        operation: &'static str,
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    /// All slots are taken.
    #[error("all {SLOT_MAX} slots for layers are taken; remove images that are not used")]
    Full,
}

impl Classified for SlotError {
    fn class(&self) -> Class {
        Class::Local
    }
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SlotError {
    move |cause| SlotError::Io { operation, path: path.to_owned(), cause }
}

/// The table of slots.
#[derive(Debug)]
pub struct Slots {
    directory: PathBuf,
    table: Mutex<Table>,
    /// Held while a file is written, so that of two versions of a record the later one stays.
    writing: Mutex<()>,
}

#[derive(Debug, Default)]
struct Table {
    records: BTreeMap<u16, SlotRecord>,
    /// Numbers whose file cannot be read: taken, and of no use.
    damaged: Vec<u16>,
    /// Numbers whose file is about to go: not free yet.
    leaving: BTreeSet<u16>,
    last: u16,
}

impl Slots {
    /// Reads the table kept in `directory`, which is made if need be.
    ///
    /// # Errors
    /// [`SlotError::Io`] when the directory cannot be used.
    pub fn open(directory: &Path) -> Result<Self, SlotError> {
        crate::layer::private::ensure_private_dir(directory).map_err(|error| failed("use", directory)(error.into()))?;
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
        Ok(Self { directory: directory.to_owned(), table: Mutex::new(table), writing: Mutex::default() })
    }

    /// All slots with their layers.
    #[must_use]
    pub fn all(&self) -> Vec<(u16, SlotRecord)> {
        self.table.lock().records.iter().map(|(slot, record)| (*slot, record.clone())).collect()
    }

    /// The layer in a slot.
    #[must_use]
    pub fn get(&self, slot: u16) -> Option<SlotRecord> {
        self.table.lock().records.get(&slot).cloned()
    }

    /// The slot of a claim.
    #[must_use]
    pub fn find(&self, claim: &Claim) -> Option<u16> {
        self.table.lock().records.iter().find(|(_, record)| record.claim == *claim).map(|(slot, _)| *slot)
    }

    /// The slots that an image (`host/repository@digest`) uses for a layer.
    #[must_use]
    pub fn of_image(&self, image: &str, layer: &Digest) -> Vec<(u16, SlotOrigin)> {
        let table = self.table.lock();
        let is_it = |origin: &&SlotOrigin| origin.image == image && origin.layer.digest == *layer;
        let of =
            table.records.iter().filter_map(|(slot, record)| Some((*slot, record.origins.iter().find(is_it)?.clone())));
        of.collect()
    }

    /// Gives a claim a slot: the one that it has already, which the record's images join, or a new one.
    ///
    /// # Errors
    /// [`SlotError`].
    pub fn assign(&self, record: SlotRecord) -> Result<u16, SlotError> {
        let _writing = self.writing.lock();
        if let Some(slot) = self.find(&record.claim) {
            for origin in record.origins {
                self.join_now(slot, origin)?;
            }
            return Ok(slot);
        }
        let slot = self.table.lock().free().ok_or(SlotError::Full)?;
        self.write(slot, &record)?;
        let mut table = self.table.lock();
        table.last = table.last.max(slot);
        table.records.insert(slot, record);
        Ok(slot)
    }

    /// Records that an image uses the layer in a slot, too. `false` if that was known, or the slot is free.
    ///
    /// # Errors
    /// [`SlotError::Io`].
    pub fn join(&self, slot: u16, origin: SlotOrigin) -> Result<bool, SlotError> {
        let _writing = self.writing.lock();
        self.join_now(slot, origin)
    }

    fn join_now(&self, slot: u16, origin: SlotOrigin) -> Result<bool, SlotError> {
        let Some(mut record) = self.get(slot).filter(|record| !record.origins.contains(&origin)) else {
            return Ok(false);
        };
        record.origins.retain(|known| (&known.image, known.layer.digest) != (&origin.image, origin.layer.digest));
        if record.origins.len() >= ORIGINS_MAX {
            // The first one is the one that is displayed.
            record.origins.remove(1);
        }
        record.origins.push(origin);
        self.write(slot, &record)?;
        // Unless it was withdrawn meanwhile; then the file goes, too, as soon as this one is done.
        Ok(self.table.lock().records.get_mut(&slot).map(|known| *known = record).is_some())
    }

    fn write(&self, slot: u16, record: &SlotRecord) -> Result<(), SlotError> {
        let (path, new) = (self.path(slot), self.directory.join(format!(".{slot}.new")));
        let text = serde_json::to_vec_pretty(record).map_err(|error| failed("write", &new)(error.into()))?;
        write_through(&new, &text).map_err(failed("write", &new))?;
        std::fs::rename(&new, &path).map_err(failed("rename", &path))
    }

    /// Frees a slot, and says what was in it.
    ///
    /// # Errors
    /// [`SlotError::Io`]; the slot is still taken then.
    pub fn release(&self, slot: u16) -> Result<Option<SlotRecord>, SlotError> {
        let record = self.withdraw(slot);
        self.erase(slot, record.as_ref())?;
        Ok(record)
    }

    /// Takes the record out of the table, where nothing finds it from now on, and says what it was. It touches no file,
    /// so that locks may be held; [`Self::erase`] has to follow.
    pub fn withdraw(&self, slot: u16) -> Option<SlotRecord> {
        let mut table = self.table.lock();
        table.leaving.insert(slot);
        table.records.remove(&slot)
    }

    /// Removes the file of a slot that was withdrawn, whose number is free then.
    ///
    /// # Errors
    /// [`SlotError::Io`]; the record is in the table again then.
    pub fn erase(&self, slot: u16, record: Option<&SlotRecord>) -> Result<(), SlotError> {
        let _writing = self.writing.lock();
        let path = self.path(slot);
        let removed = match std::fs::remove_file(&path) {
            Err(cause) if cause.kind() != io::ErrorKind::NotFound => Err(failed("remove", &path)(cause)),
            _ => Ok(()),
        };
        let mut table = self.table.lock();
        table.leaving.remove(&slot);
        if let (Err(_), Some(record)) = (&removed, record) {
            table.records.insert(slot, record.clone());
        }
        removed
    }

    fn path(&self, slot: u16) -> PathBuf {
        self.directory.join(format!("{slot}.json"))
    }
}

impl Table {
    /// The number after the highest that was ever given, else the first gap.
    fn free(&self) -> Option<u16> {
        if self.last < SLOT_MAX {
            return Some(self.last + 1);
        }
        let is_taken =
            |slot: &u16| self.records.contains_key(slot) || self.damaged.contains(slot) || self.leaving.contains(slot);
        (1..=SLOT_MAX).find(|slot| !is_taken(slot))
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

    fn origin(image: &str, name: &str) -> SlotOrigin {
        let layer = Descriptor::of("application/vnd.oci.image.layer.v1.tar+gzip", name.as_bytes());
        let image = format!("registry.example/{image}@sha256:00");
        SlotOrigin { image, layer, index: None, index_from: None, headers: BTreeMap::new() }
    }

    fn record(name: &str) -> SlotRecord {
        let origin = origin("team/app", name);
        SlotRecord { claim: Claim::whole(origin.layer.digest, Digest::of(b"tar")), origins: vec![origin] }
    }

    #[test]
    fn images_join() {
        let directory = tempfile::tempdir().unwrap();
        let slots = Slots::open(directory.path()).unwrap();
        assert_eq!(slots.assign(record("a")).unwrap(), 1);
        let other = origin("other/app", "a");
        assert!(slots.join(1, other.clone()).unwrap() && !slots.join(1, other.clone()).unwrap());
        assert!(!slots.join(7, other.clone()).unwrap(), "a slot that is free");
        // The same claim of another image joins; another claim of the same layer does not.
        let third = SlotRecord { origins: vec![origin("third/app", "a")], ..record("a") };
        assert_eq!(slots.assign(third).unwrap(), 1);
        let lie = Claim { diff_id: Digest::of(b"lie"), ..record("a").claim };
        assert_eq!(slots.assign(SlotRecord { claim: lie, origins: vec![other.clone()] }).unwrap(), 2);
        let slots = Slots::open(directory.path()).unwrap();
        assert_eq!(slots.get(1).unwrap().origins.len(), 3);
        assert_eq!(slots.get(1).unwrap().image(), record("a").origins[0].image);
        let of_other: Vec<u16> =
            slots.of_image(&other.image, &other.layer.digest).into_iter().map(|(slot, _)| slot).collect();
        assert_eq!((of_other, slots.find(&lie)), (vec![1, 2], Some(2)));
        for number in 0..2 * ORIGINS_MAX {
            slots.join(1, origin(&format!("many/{number}"), "a")).unwrap();
        }
        let all = slots.get(1).unwrap().origins;
        assert_eq!((all.len(), &all[0]), (ORIGINS_MAX, &record("a").origins[0]));
    }

    /// What a version before this one has written.
    #[test]
    fn records_of_one_image() {
        let now = record("a");
        let before = serde_json::json!({
            "layer": now.origins[0].layer, "diffId": now.claim.diff_id, "image": now.origins[0].image,
        });
        assert_eq!(serde_json::from_value::<SlotRecord>(before).unwrap(), now);
        assert_eq!(serde_json::from_str::<SlotRecord>(&serde_json::to_string(&now).unwrap()).unwrap(), now);
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
        assert_eq!((slots.find(&a.claim), slots.find(&b.claim)), (Some(1), None));
        assert_eq!(slots.get(1), Some(a));
        assert_eq!(slots.assign(b).unwrap(), 4);
    }

    /// A record that is withdrawn is found by nothing, and is back where its file stays.
    #[test]
    fn withdrawn_and_erased() {
        let directory = tempfile::tempdir().unwrap();
        let slots = Slots::open(directory.path()).unwrap();
        let file = directory.path().join("1.json");
        slots.assign(record("a")).unwrap();
        let withdrawn = slots.withdraw(1).unwrap();
        assert_eq!((slots.find(&withdrawn.claim), slots.get(1), slots.withdraw(1)), (None, None, None));
        assert!(!slots.join(1, origin("other/app", "a")).unwrap() && file.exists());
        // What cannot be removed: a directory.
        std::fs::remove_file(&file).unwrap();
        std::fs::create_dir(&file).unwrap();
        assert!(slots.erase(1, Some(&withdrawn)).is_err());
        assert_eq!(slots.get(1), Some(withdrawn));
        std::fs::remove_dir(&file).unwrap();
        assert_eq!(slots.release(1).unwrap(), Some(record("a")));
        assert_eq!(slots.all(), []);
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
        table.leaving.insert(3);
        assert_eq!(table.free(), Some(4));
        table.leaving.clear();
        table.last = 7;
        assert_eq!(table.free(), Some(8));
    }
}
