//! Which mapping of owners has which number, kept across restarts.
//!
//! The number is part of inode numbers and of lower directories of running containers, as a slot's is, so it must mean
//! the same to the next process, and before that serves. The table is one small file, replaced atomically by a rename;
//! it holds as many mappings as there are pods with a user namespace on a node, at most 255.
//!
//! Invariants: a mapping is on disk before its number is returned; equal mappings share one; the number given next is
//! the one that has been free for longest.

use parking_lot::Mutex;
use soci_index::format::class::{Class, Classified};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::node::remote::{RemoteError, RemoteLayers};
use crate::tree::id_map::IdMap;

/// Why a mapping has no number.
#[derive(Debug, thiserror::Error)]
pub enum IdMapsError {
    /// A system call failed.
    #[error("cannot {operation} {}: {cause}", path.display())]
    Io { operation: &'static str, path: PathBuf, cause: io::Error },
    /// The table cannot be read.
    #[error("{} is damaged ({cause}): containers in user namespaces cannot read their layers; remove it when none runs", path.display())]
    Damaged { path: PathBuf, cause: serde_json::Error },
    /// All numbers are taken.
    #[error(
        "{} mappings of owners are in use, and there are no more numbers: remove containers with user namespaces",
        u8::MAX
    )]
    Full,
}

impl Classified for IdMapsError {
    fn class(&self) -> Class {
        Class::Local
    }
}

/// The table.
#[derive(Debug)]
pub struct IdMaps {
    path: PathBuf,
    table: Mutex<Table>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Table {
    last: u8,
    maps: BTreeMap<u8, IdMap>,
}

impl IdMaps {
    /// Reads the table `path`, which need not exist.
    ///
    /// # Errors
    /// [`IdMapsError`] when it is there and cannot be read.
    pub fn open(path: PathBuf) -> Result<Self, IdMapsError> {
        let table = match std::fs::read(&path) {
            Ok(text) => {
                serde_json::from_slice(&text).map_err(|cause| IdMapsError::Damaged { path: path.clone(), cause })?
            }
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => Table::default(),
            Err(cause) => return Err(IdMapsError::Io { operation: "read", path, cause }),
        };
        Ok(Self { path, table: Mutex::new(table) })
    }

    /// All mappings.
    #[must_use]
    pub fn all(&self) -> Vec<(u8, IdMap)> {
        self.table.lock().maps.iter().map(|(number, map)| (*number, map.clone())).collect()
    }

    /// The mapping with a number.
    #[must_use]
    pub fn get(&self, number: u8) -> Option<IdMap> {
        self.table.lock().maps.get(&number).cloned()
    }

    /// The number of a mapping: the one that it has already, or a new one.
    ///
    /// # Errors
    /// [`IdMapsError`].
    pub fn assign(&self, map: &IdMap) -> Result<u8, IdMapsError> {
        let mut table = self.table.lock();
        if let Some((number, _)) = table.maps.iter().find(|(_, known)| *known == map) {
            return Ok(*number);
        }
        let mut changed = table.clone();
        let number = changed.free().ok_or(IdMapsError::Full)?;
        changed.last = number;
        changed.maps.insert(number, map.clone());
        write(&self.path, &changed)?;
        *table = changed;
        Ok(number)
    }

    /// Frees the numbers that are not `used`, and says which.
    ///
    /// # Errors
    /// [`IdMapsError::Io`]; they are still taken then.
    pub fn keep_only(&self, used: &BTreeSet<u8>) -> Result<Vec<u8>, IdMapsError> {
        let mut table = self.table.lock();
        let freed: Vec<u8> = table.maps.keys().filter(|number| !used.contains(number)).copied().collect();
        if !freed.is_empty() {
            let mut changed = table.clone();
            changed.maps.retain(|number, _| used.contains(number));
            write(&self.path, &changed)?;
            *table = changed;
        }
        Ok(freed)
    }
}

impl Table {
    fn free(&self) -> Option<u8> {
        let after = self.last.saturating_add(1)..=u8::MAX;
        after.chain(1..=self.last).find(|number| *number != 0 && !self.maps.contains_key(number))
    }
}

fn write(path: &Path, table: &Table) -> Result<(), IdMapsError> {
    let failed = |operation, path: &Path| {
        let path = path.to_owned();
        move |cause| IdMapsError::Io { operation, path, cause }
    };
    let new = path.with_extension("new");
    let text = serde_json::to_vec_pretty(table).map_err(|cause| failed("write", &new)(cause.into()))?;
    crate::node::remote::slots::write_through(&new, &text).map_err(failed("write", &new))?;
    std::fs::rename(&new, path).map_err(failed("rename", &new))
}

impl RemoteLayers {
    /// A number for a mapping of owners, by which layers can be shown from now on.
    ///
    /// # Errors
    /// [`RemoteError::IdMaps`] when there is none.
    pub fn assign_id_map(&self, map: &IdMap) -> Result<u8, RemoteError> {
        let number = self.0.id_maps.assign(map)?;
        self.0.forest.define_id_map(number, map.clone())?;
        Ok(number)
    }

    /// The mapping with a number.
    #[must_use]
    pub fn id_map(&self, number: u8) -> Option<IdMap> {
        self.0.id_maps.get(number)
    }

    /// Forgets all mappings but these.
    pub fn keep_id_maps(&self, used: &BTreeSet<u8>) {
        if let Some(trees) = &self.0.options.trees {
            trees.keep_maps(used);
        }
        match self.0.id_maps.keep_only(used) {
            Ok(freed) => {
                for number in freed {
                    self.0.forest.remove_id_map(number);
                }
            }
            Err(error) => tracing::warn!(%error, "mappings of owners stay taken"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::id_map::parse;

    fn map(host: u32) -> IdMap {
        let ranges = parse(&format!("0:{host}:65536")).unwrap();
        IdMap { uids: ranges.clone(), gids: ranges }
    }

    #[test]
    fn numbers_last_and_return_late() {
        let directory = tempfile::tempdir().unwrap();
        let open = || IdMaps::open(directory.path().join("id-maps.json")).unwrap();
        let maps = open();
        assert_eq!((maps.assign(&map(1)).unwrap(), maps.assign(&map(2)).unwrap()), (1, 2));
        assert_eq!(maps.assign(&map(1)).unwrap(), 1);
        assert_eq!(maps.keep_only(&BTreeSet::from([2])).unwrap(), [1]);
        let maps = open();
        assert_eq!((maps.get(1), maps.get(2)), (None, Some(map(2))));
        assert_eq!(maps.assign(&map(3)).unwrap(), 3);
        for host in 4..=255 {
            maps.assign(&map(host)).unwrap();
        }
        // All the way round to the gap.
        assert_eq!(maps.assign(&map(1000)).unwrap(), 1);
        assert!(matches!(maps.assign(&map(1001)), Err(IdMapsError::Full)));
        assert_eq!(maps.assign(&map(255)).unwrap(), 255);
        assert_eq!(open().all().len(), 255);
    }

    #[test]
    fn damage_is_said() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("id-maps.json");
        std::fs::write(&path, "{").unwrap();
        assert!(matches!(IdMaps::open(path), Err(IdMapsError::Damaged { .. })));
    }
}
