//! The snapshots of a node: which exist, what lies below each, where its files are, and how it is mounted.
//!
//! ```text
//! ROOT/snapshotter/lock          the process that works here
//! ROOT/snapshotter/soci.redb     records: see `database`
//! ROOT/snapshotter/snapshots/    files: see `directories`
//! ROOT/snapshotter/mapped/       files with mapped owners: see `mapped`
//! ```
//!
//! A snapshot is *active* (written through an overlay), a *view* (read only) or *committed* (unchangeable, and what
//! others stand on). The files of a committed one are either in its own directory, unpacked by containerd, or in a
//! layer that a [`provider::LayerProvider`] shows; the rest of this module hardly knows the difference.
//!
//! Rules live in pure functions on records (`record`, `labels`, `filter`, `mounts`); this file puts them between one
//! transaction and a few directory operations. Why a database and not a file per snapshot: one commit takes a key away,
//! adds a name, and moves an edge of the tree, and a crash must not leave half of that. Why not memory with a log:
//! nothing here is asked often enough to be worth it.
//!
//! Invariants: a parent exists and is committed; what has children is not removed; a number is given once; a recorded
//! local snapshot has its directory (made before, deleted after); no call of ours goes back to containerd.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

mod database;
mod directories;
mod error;
mod filter;
mod labels;
mod mapped;
mod mounts;
pub mod provider;
mod record;
mod remote;
mod support;
#[cfg(test)]
mod tests;
mod usage;

pub use error::SnapshotError;
pub use filter::{Filter, FilterError, FilterProblem};
pub use labels::LABEL_BYTES_MAX;
pub use mounts::Mount;
pub use record::{Info, Kind, Lower};
pub use remote::Prepared;
pub use support::{SnapshotOptions, check_overlay};
pub use usage::Usage;

use crate::layer::lock::Lock;
use database::{Database, View};
use directories::{Directories, Owner};
use mapped::Mapped;
use provider::LayerProvider;
use record::{Commit, Record};

/// The store of snapshots.
#[derive(Debug)]
pub struct Snapshots {
    database: Database,
    directories: Directories,
    mapped: Mapped,
    options: SnapshotOptions,
    provider: Arc<dyn LayerProvider>,
    releases: remote::SharedReleases,
    _lock: Lock,
}

/// Labels as requests bring them.
pub type Labels = BTreeMap<String, String>;

impl Snapshots {
    /// Opens the snapshots below `root`, creating what is missing.
    ///
    /// # Errors
    /// [`SnapshotError::Lock`] when another process works there, [`SnapshotError::Format`] when a later program did,
    /// and whatever the file system says.
    pub fn open(
        root: &Path,
        options: SnapshotOptions,
        provider: Arc<dyn LayerProvider>,
    ) -> Result<Self, SnapshotError> {
        root_text(root)?;
        let home = root.join("snapshotter");
        directories::make(&home, 0o700)?;
        let lock = crate::layer::store::lock(&home).map_err(SnapshotError::Lock)?;
        let database = Database::open(&home.join("soci.redb"))?;
        let directories = Directories::open(home.join("snapshots"))?;
        let mapped = Mapped::open(home.join("mapped"))?;
        let releases = remote::SharedReleases::default();
        let snapshots = Self { database, directories, mapped, options, provider, releases, _lock: lock };
        snapshots.release_id_maps()?;
        snapshots.name_missing()?;
        Ok(snapshots)
    }

    /// Says which snapshots lost their files: all others work, and these say so again when they are mounted.
    fn name_missing(&self) -> Result<(), SnapshotError> {
        let records = self.database.read(View::all)?;
        for (key, record) in records.iter().filter(|(_, record)| record.content == Lower::Local) {
            if let Err(error) = self.present(key, record) {
                tracing::error!(key, %error, "a snapshot lost its files");
            }
        }
        Ok(())
    }

    /// The layers that snapshots stand on.
    ///
    /// # Errors
    /// [`SnapshotError::Database`].
    pub fn layers_in_use(&self) -> Result<BTreeSet<u16>, SnapshotError> {
        let records = self.database.read(View::all)?;
        Ok(records.iter().filter_map(|(_, record)| record.slot()).collect())
    }

    /// Makes an active snapshot on top of `parent`.
    ///
    /// # Errors
    /// [`SnapshotError::Exists`], [`SnapshotError::NotFound`] for the parent, [`SnapshotError::ParentNotCommitted`],
    /// [`SnapshotError::LabelTooLong`], [`SnapshotError::Unavailable`] if the files of the parent are not there.
    pub fn prepare(&self, key: &str, parent: &str, labels: Labels) -> Result<Vec<Mount>, SnapshotError> {
        self.create(Kind::Active, key, parent, labels)
    }

    /// Makes a view of `parent`.
    ///
    /// # Errors
    /// As [`Snapshots::prepare`].
    pub fn view(&self, key: &str, parent: &str, labels: Labels) -> Result<Vec<Mount>, SnapshotError> {
        self.create(Kind::View, key, parent, labels)
    }

    fn create(&self, kind: Kind, key: &str, parent: &str, labels: Labels) -> Result<Vec<Mount>, SnapshotError> {
        let (labels, parent) = (labels::checked(labels)?, non_empty(parent));
        let map = labels::id_map(&labels)?;
        // No number that is given here is taken back before it is recorded.
        let _mapping = map.is_some().then(|| remote::Providing::begin(self));
        let id_map = map.as_ref().map(|map| self.assign_id_map(key, map)).transpose()?;
        let below = self.database.read(|view| {
            require_free(key, view.get(key)?.as_ref())?;
            require_committed(key, parent, |name| view.get(name))?;
            parent.map_or(Ok(Vec::new()), |parent| view.chain(parent))
        })?;
        let owner = match (below.first(), &map) {
            (Some((name, record)), _) => Some(self.owner(name, record, id_map)?),
            (None, Some(map)) => Some((map.uid(0), map.gid(0))),
            (None, None) => None,
        };
        let draft = self.directories.draft(kind, owner)?;
        let record = self.database.write(|edit| {
            require_free(key, edit.get(key)?.as_ref())?;
            require_committed(key, parent, |name| edit.get(name))?;
            let record = Record::new(edit.next_id()?, kind, parent, Lower::Local, labels.clone(), now());
            let record = Record { id_map, ..record };
            draft.publish(record.id)?;
            edit.put(key, &record)?;
            Ok(record)
        })?;
        self.mounts_of(&record, &below)
    }

    /// The mounts that show an active snapshot or a view.
    ///
    /// # Errors
    /// [`SnapshotError::NotFound`], [`SnapshotError::NotMountable`], [`SnapshotError::Unavailable`].
    pub fn mounts(&self, key: &str) -> Result<Vec<Mount>, SnapshotError> {
        let mut chain = self.database.read(|view| view.chain(key))?;
        let (key, record) = chain.remove(0);
        if record.kind == Kind::Committed {
            return Err(SnapshotError::NotMountable { key });
        }
        self.present(&key, &record)?;
        self.mounts_of(&record, &chain)
    }

    fn mounts_of(&self, record: &Record, below: &[(String, Record)]) -> Result<Vec<Mount>, SnapshotError> {
        for (key, record) in below.iter().filter(|(_, record)| record.content == Lower::Local) {
            self.present(key, record)?;
        }
        let (own, work) = (self.directories.files(record.id), self.directories.work(record.id));
        let lower = below.iter().map(|(key, below)| self.lower(key, below, record.id_map));
        let mut lower = lower.collect::<Result<Vec<_>, _>>()?;
        if record.kind == Kind::Active {
            let slots = below.iter().filter_map(|(_, below)| match below.content {
                Lower::Layer { slot } => Some(slot),
                Lower::Local => None,
            });
            lower.extend(slots.filter_map(|slot| self.provider.state_directory(slot)).take(1));
        }
        Ok(mounts::mounts(&mounts::Parts { kind: record.kind, own, work, lower, options: self.options }))
    }

    /// Turns the active snapshot `key` into the committed one `name`, on top of `parent` if it was prepared without
    /// one.
    ///
    /// # Errors
    /// [`SnapshotError::Exists`] for the name, [`SnapshotError::NotFound`], [`SnapshotError::NotActive`],
    /// [`SnapshotError::ParentChanged`], [`SnapshotError::ParentNotCommitted`], [`SnapshotError::LabelTooLong`].
    pub fn commit(&self, name: &str, key: &str, labels: Labels, parent: &str) -> Result<(), SnapshotError> {
        let (labels, parent) = (labels::checked(labels)?, non_empty(parent));
        let active = self.database.read(|view| {
            require_free(name, view.get(name)?.as_ref())?;
            require(key, view.get(key)?)
        })?;
        let usage = if active.kind == Kind::Active { self.measure(key, &active)? } else { Usage::default() };
        self.database.write(|edit| {
            require_free(name, edit.get(name)?.as_ref())?;
            let active = require(key, edit.get(key)?)?;
            let commit = Commit { parent, labels: labels.clone(), usage, now: now() };
            let committed = active.clone().committed(key, commit)?;
            require_committed(key, committed.parent.as_deref(), |name| edit.get(name))?;
            edit.remove(key, &active)?;
            edit.put(name, &committed)
        })
    }

    /// Removes a snapshot. Its name can be used again at once; [`Snapshots::cleanup`] deletes its files.
    ///
    /// # Errors
    /// [`SnapshotError::NotFound`], [`SnapshotError::HasChildren`].
    pub fn remove(&self, key: &str) -> Result<(), SnapshotError> {
        let removed = self.database.write(|edit| {
            let record = require(key, edit.get(key)?)?;
            if let Some(child) = edit.child(key)? {
                return Err(SnapshotError::HasChildren { key: key.to_owned(), child });
            }
            edit.remove(key, &record)?;
            Ok(record)
        })?;
        self.release(removed.slot(), removed.id_map);
        Ok(())
    }

    /// What is known of a snapshot.
    ///
    /// # Errors
    /// [`SnapshotError::NotFound`].
    pub fn stat(&self, key: &str) -> Result<Info, SnapshotError> {
        let record = self.database.read(|view| require(key, view.get(key)?))?;
        Ok(record.info(key))
    }

    /// Changes labels: those that `mask` names (`labels.KEY`), or all of them if it is empty or says `labels`.
    ///
    /// # Errors
    /// [`SnapshotError::NotFound`], [`SnapshotError::Unchangeable`], [`SnapshotError::LabelTooLong`].
    pub fn update(&self, key: &str, labels: &Labels, mask: &[String]) -> Result<Info, SnapshotError> {
        self.database.write(|edit| {
            let record = require(key, edit.get(key)?)?;
            let labels = labels::updated(record.labels.clone(), labels.clone(), mask)?;
            let record = Record { labels, updated: now(), ..record };
            edit.put(key, &record)?;
            Ok(record.info(key))
        })
    }

    /// All snapshots that at least one of the filters accepts; all if there is no filter.
    ///
    /// # Errors
    /// [`SnapshotError::Filter`].
    pub fn list(&self, filters: &[String]) -> Result<Vec<Info>, SnapshotError> {
        let filters = filters.iter().map(|text| Filter::parse(text)).collect::<Result<Vec<_>, _>>()?;
        let records = self.database.read(View::all)?;
        let infos = records.into_iter().map(|(name, record)| record.info(&name));
        Ok(infos.filter(|info| filters.is_empty() || filters.iter().any(|filter| filter.accepts(info))).collect())
    }

    /// The disk that a snapshot takes itself: nothing for views and for layers of the provider.
    ///
    /// # Errors
    /// [`SnapshotError::NotFound`], [`SnapshotError::Unavailable`].
    pub fn usage(&self, key: &str) -> Result<Usage, SnapshotError> {
        let record = self.database.read(|view| require(key, view.get(key)?))?;
        match record.kind {
            Kind::Active => self.measure(key, &record),
            Kind::View | Kind::Committed => Ok(record.usage),
        }
    }

    /// Deletes the files of removed snapshots, and what a crash left.
    ///
    /// # Errors
    /// [`SnapshotError::Io`] names the first that could not be deleted; the others are.
    pub fn cleanup(&self) -> Result<(), SnapshotError> {
        // A transaction that changes nothing: as long as it is open no number is allocated.
        let removed = self.database.write(|edit| {
            let known = edit.ids()?;
            self.mapped.keep_snapshots(&known);
            self.directories.take_unknown(&known)
        })?;
        let results: Vec<_> = removed.iter().map(|path| directories::delete(path)).collect();
        self.release(None, None);
        results.into_iter().collect()
    }

    fn measure(&self, key: &str, record: &Record) -> Result<Usage, SnapshotError> {
        self.present(key, record)?;
        usage::measure(&self.directories.files(record.id))
    }

    /// The directory that shows a snapshot's own files.
    fn files(&self, record: &Record) -> PathBuf {
        match record.content {
            Lower::Local => self.directories.files(record.id),
            Lower::Layer { slot } => self.provider.lower_directory(slot, None),
        }
    }

    /// Makes sure that a snapshot's files are there.
    fn present(&self, key: &str, record: &Record) -> Result<Owner, SnapshotError> {
        let path = self.files(record);
        directories::owner(&path).map_err(|cause| SnapshotError::Unavailable { key: key.to_owned(), path, cause })
    }
}

fn require(key: &str, record: Option<Record>) -> Result<Record, SnapshotError> {
    record.ok_or_else(|| SnapshotError::NotFound { key: key.to_owned() })
}

fn require_free(key: &str, record: Option<&Record>) -> Result<(), SnapshotError> {
    match record {
        _ if key.is_empty() => Err(SnapshotError::NoKey),
        Some(_) => Err(SnapshotError::Exists { key: key.to_owned() }),
        None => Ok(()),
    }
}

fn require_committed(
    key: &str,
    parent: Option<&str>,
    get: impl FnOnce(&str) -> Result<Option<Record>, SnapshotError>,
) -> Result<(), SnapshotError> {
    let Some(parent) = parent else { return Ok(()) };
    match require(parent, get(parent)?)?.kind {
        Kind::Committed => Ok(()),
        Kind::View | Kind::Active => {
            Err(SnapshotError::ParentNotCommitted { key: key.to_owned(), parent: parent.to_owned() })
        }
    }
}

/// A root as mount options can say it.
fn root_text(root: &Path) -> Result<&str, SnapshotError> {
    let text = root.to_str().filter(|text| root.is_absolute() && !text.contains([',', ':', '\\']));
    text.ok_or_else(|| SnapshotError::Root { path: root.to_owned() })
}

/// Requests say "none" by an empty text.
fn non_empty(text: &str) -> Option<&str> {
    (!text.is_empty()).then_some(text)
}

/// Nanoseconds since 1970; a clock before that is taken for 1970.
fn now() -> u64 {
    u64::try_from(soci_index::clock::since_epoch().as_nanos()).unwrap_or(u64::MAX)
}

/// Names the operation and the file of a failed system call.
fn io_error(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SnapshotError {
    move |cause| SnapshotError::Io { operation, path: path.to_owned(), cause }
}
