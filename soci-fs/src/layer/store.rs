//! The layer store: one sparse file per claim of a layer that holds its uncompressed tar, filled span by span.
//!
//! ```text
//! ROOT/lock                   the process that writes here
//! ROOT/layers/ID/record.json  the claim, and which table is kept: see `record`
//! ROOT/layers/ID/table        the TOC or zTOC by which the layer is read
//! ROOT/layers/ID/data         the uncompressed layer, with holes
//! ROOT/layers/ID/present      a checksum per span: see `present`
//! ROOT/layers/ID/packed       the same for spans that a pack has filled: see `partial`
//! ROOT/layers/ID/proof        the layer was proven: see `proven`
//! ROOT/condemned              claims and packs that are not believed again: see `condemned`
//! ```
//!
//! A directory is removed as a whole. It is named by the identity of its [`Claim`], so images share what they would
//! have got by themselves and nothing else; what was proven is found by diff_id ([`Store::proven`]) and shared by all.
//!
//! Why not a file per span or a database: a read of a present file must be one `pread`, and a crash must not lose what
//! was fetched. A span is published by one aligned eight-byte write after its bytes were written, both into the page
//! cache, which outlives the process. What may not survive a power cut is recognised by the boot id: after a reboot the
//! checksum of each span is compared at its first use. So nothing is ever synced but verdicts.
//!
//! Invariants: one process per root (a lock file names it); bytes are never handed out unless their span was published,
//! and, if it was published in another boot, its checksum has been compared; an eviction that overlaps a read makes the
//! read start again, never yields zeros; a proven layer takes no bytes but those that were proven.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use bytes::Bytes;
use parking_lot::Mutex;
use soci_index::format::digest::Digest;
use soci_index::format::index::LayerIndex;

use crate::layer::lock::{Lock, LockError};
use crate::layer::private::ensure_private_dir;
use crate::layer::store::error::io_error;
use crate::layer::store::layer::Common;

mod claim;
mod condemned;
mod error;
mod evict;
mod layer;
mod marks;
mod partial;
mod present;
mod proven;
mod record;
mod second_copy;
#[cfg(test)]
mod tests;

pub use claim::{Claim, ClaimId, ClaimIdError};
pub use condemned::Condemned;
pub use error::StoreError;
pub use evict::Evicted;
pub use layer::{LayerStore, Reading};
pub(crate) use marks::Mark;
pub use partial::Parts;
pub use present::BootId;
pub(crate) use proven::Proof;
pub use record::Record;
pub use second_copy::Looks;

/// A layer store.
pub struct Store {
    root: PathBuf,
    boot: BootId,
    layers: Mutex<HashMap<ClaimId, Weak<LayerStore>>>,
    /// Claims that are being read whole.
    turns: Mutex<HashMap<ClaimId, Weak<tokio::sync::Mutex<()>>>>,
    common: Arc<Common>,
    _lock: Lock,
}

impl Store {
    /// Opens the store at `root`, creating it if need be.
    ///
    /// # Errors
    /// [`StoreError::Busy`] when another process has it open, [`StoreError::Io`] when the file system refuses.
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        Self::open_in_boot(root, BootId::current())
    }

    /// [`Store::open`] with a given boot id.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open_in_boot(root: &Path, boot: BootId) -> Result<Self, StoreError> {
        make_directory(root)?;
        make_directory(&root.join(LAYERS))?;
        let lock = lock(root)?;
        // What a process before has not come to delete.
        let removed = root.join(REMOVED);
        Removed { directory: removed.exists().then(|| removed.clone()) }.delete();
        make_directory(&removed)?;
        make_directory(&root.join(condemned::DIRECTORY))?;
        let common = Common {
            root: root.to_owned(),
            ticks: AtomicU32::new(0),
            removals: AtomicU64::new(0),
            written: AtomicU64::new(0),
            proven: proven::Proven::default(),
        };
        let (layers, common) = (Mutex::new(HashMap::new()), Arc::new(common));
        let store = Self { root: root.to_owned(), boot, layers, turns: Mutex::default(), common, _lock: lock };
        store.take_stock()?;
        store.sweep_condemned()?;
        Ok(store)
    }

    /// Finds what was proven. What is no layer of this store, an older version's too, is removed: it can be fetched
    /// again.
    fn take_stock(&self) -> Result<(), StoreError> {
        let layers = self.root.join(LAYERS);
        for entry in std::fs::read_dir(&layers).map_err(io_error("list", &layers))? {
            let directory = entry.map_err(io_error("list", &layers))?.path();
            match record::read(&directory) {
                None => self.move_aside(&directory)?.delete(),
                Some(record) if proven::has_proof(&directory) => self.common.proven.add(record.claim),
                Some(_) => {}
            }
        }
        Ok(())
    }

    /// The root directory.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The part of the store that belongs to one claim, read by `index`. All callers share one object per claim.
    ///
    /// Spans kept under another index are forgotten: their borders mean nothing any more, and an index vouches only for
    /// what was decoded by itself.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn layer(&self, claim: &Claim, index: &LayerIndex) -> Result<Arc<LayerStore>, StoreError> {
        let (fingerprint, id) = (present::fingerprint(index), claim.id());
        let mut layers = self.layers.lock();
        if let Some(open) = layers.get(&id).and_then(Weak::upgrade)
            && open.fingerprint() == fingerprint
        {
            return Ok(open);
        }
        let directory = self.directory(&id);
        make_directory(&directory)?;
        let record =
            Record { claim: *claim, layer_bytes: index.compressed_size, table_kept: None, from_elsewhere: false };
        record::write_if_absent(&directory, &record)?;
        let layer = LayerStore::open(&directory, claim, index, fingerprint, self.boot, Arc::clone(&self.common))?;
        let layer = Arc::new(layer);
        layers.retain(|_, layer| layer.strong_count() > 0);
        layers.insert(id, Arc::downgrade(&layer));
        Ok(layer)
    }

    /// Waits until nothing else fills the claim's directory as a whole, and keeps others from it while the guard lives.
    pub async fn turn(&self, claim: &Claim) -> tokio::sync::OwnedMutexGuard<()> {
        let turn = {
            let mut turns = self.turns.lock();
            turns.retain(|_, turn| turn.strong_count() > 0);
            let known = turns.get(&claim.id()).and_then(Weak::upgrade);
            let turn = known.unwrap_or_default();
            turns.insert(claim.id(), Arc::downgrade(&turn));
            turn
        };
        turn.lock_owned().await
    }

    /// Where the files of a claim are.
    #[must_use]
    pub fn directory(&self, id: &ClaimId) -> PathBuf {
        self.root.join(LAYERS).join(id.to_string())
    }

    /// Keeps a layer's table in its directory, which is made if need be.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn keep_table(&self, record: &Record, table: &[u8]) -> Result<(), StoreError> {
        let directory = self.directory(&record.claim.id());
        make_directory(&directory)?;
        record::write_with_table(&directory, record, table)
    }

    /// What is recorded of a claim, if the store has it.
    #[must_use]
    pub fn record(&self, id: &ClaimId) -> Option<Record> {
        record::read(&self.directory(id))
    }

    /// The table of a layer; `None` when it is not kept, or damaged.
    #[must_use]
    pub fn table(&self, record: &Record) -> Option<Bytes> {
        record::read_table(&self.directory(&record.claim.id()), record)
    }

    /// The claims of this diff_id that were proven here.
    #[must_use]
    pub fn proven(&self, diff_id: &Digest) -> Vec<Claim> {
        self.common.proven.of(diff_id)
    }

    /// Removes all that is kept of a claim. Readers that have it open keep their files.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn remove(&self, claim: &Claim) -> Result<(), StoreError> {
        self.set_aside(claim).map(|removed| removed.delete())
    }

    /// Removes a claim from the store at once, and leaves the freeing of the disk, which takes a while, to the caller.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn set_aside(&self, claim: &Claim) -> Result<Removed, StoreError> {
        let mut layers = self.layers.lock();
        layers.remove(&claim.id());
        self.common.proven.forget(claim);
        self.move_aside(&self.directory(&claim.id()))
    }

    fn move_aside(&self, directory: &Path) -> Result<Removed, StoreError> {
        let aside = self.root.join(REMOVED).join(self.common.removals.fetch_add(1, Ordering::Relaxed).to_string());
        match std::fs::rename(directory, &aside) {
            Ok(()) => Ok(Removed { directory: Some(aside) }),
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(Removed { directory: None }),
            Err(cause) => Err(io_error("remove", directory)(cause)),
        }
    }
}

/// Makes a directory that may be there already, for its owner alone.
fn make_directory(directory: &Path) -> Result<(), StoreError> {
    ensure_private_dir(directory).map_err(|error| io_error("use", directory)(error.into()))
}

/// Takes the lock of a directory that one process at a time may write to.
pub(crate) fn lock(root: &Path) -> Result<Lock, StoreError> {
    let path = root.join("lock");
    Lock::take(&path).map_err(|error| match error {
        LockError::Busy { pid } => StoreError::Busy { path: root.to_owned(), pid },
        LockError::Io { action, cause } => io_error(action, &path)(cause),
    })
}

/// Where the directories of claims are.
const LAYERS: &str = "layers";
/// Where removed layers wait for their space to be freed.
const REMOVED: &str = "removed";

/// A layer that is out of the store, still on the disk.
#[derive(Debug)]
#[must_use]
pub struct Removed {
    directory: Option<PathBuf>,
}

impl Removed {
    /// Frees the disk. What cannot be deleted is retried when the store is opened next.
    pub fn delete(self) {
        let Some(directory) = &self.directory else { return };
        let removed = match std::fs::remove_dir_all(directory) {
            // Not everything that is in the way is a directory.
            Err(cause) if cause.kind() == io::ErrorKind::NotADirectory => std::fs::remove_file(directory),
            result => result,
        };
        if let Err(cause) = removed {
            tracing::warn!(directory = %directory.display(), %cause, "the data of a removed layer stay behind");
        }
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").field("root", &self.root).finish_non_exhaustive()
    }
}
