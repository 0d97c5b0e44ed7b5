//! The layer store: one sparse file per layer that holds its uncompressed tar, filled span by span.
//!
//! ```text
//! ROOT/lock                       the process that writes here
//! ROOT/layers/sha256-HEX/data     the uncompressed layer, with holes
//! ROOT/layers/sha256-HEX/present  a checksum per span: see `present`
//! ```
//!
//! Everything else a caller wants to keep about a layer (its index, say) may live in the same directory, which is
//! removed as a whole. Keyed by layer digest, so images share layers and a restart finds them.
//!
//! Why not a file per span or a database: a read of a present file must be one `pread`, and a crash must not lose what
//! was fetched. A span is published by one aligned eight-byte write after its bytes were written, both into the page
//! cache, which outlives the process. What does not outlive a power cut is told apart by the boot id: after a reboot the
//! checksum of each span is compared at its first use. So nothing is ever synced.
//!
//! Invariants: one process per root (a lock file names it); bytes are never handed out unless their span was published,
//! and, if it was published in another boot, its checksum has been compared; an eviction that overlaps a read makes the
//! read start again, never yields zeros.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use soci_index::digest::Digest;
use soci_index::index::LayerIndex;

use crate::lock::{Lock, LockError};
use crate::private::ensure_private_dir;

mod evict;
mod identity;
mod layer;
mod partial;
mod present;
mod second_copy;
#[cfg(test)]
mod tests;

pub use evict::Evicted;
pub use layer::{LayerStore, Reading};
pub use second_copy::Looks;

/// Why the store could not do its work.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// A system call failed.
    #[error("cannot {operation} {}: {cause}", path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        cause: Arc<io::Error>,
    },
    /// Another process writes to this root.
    #[error("{} is in use by process {}", path.display(), pid.map_or_else(|| "unknown".to_owned(), |pid| pid.to_string()))]
    Busy {
        /// The root.
        path: PathBuf,
        /// The process, if it could write its number down.
        pid: Option<u32>,
    },
    /// A span's bytes have another length than its place.
    #[error("span {span} holds {expected} bytes, {found} were given")]
    Length {
        /// The span.
        span: u32,
        /// Its length by the table.
        expected: u64,
        /// What came.
        found: u64,
    },
}

/// Names the operation and the file of a failed system call.
fn io_error(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    move |cause| StoreError::Io { operation, path: path.to_owned(), cause: Arc::new(cause) }
}

/// Identifies one run of the kernel: what was only in the page cache is gone in another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BootId(pub [u8; 16]);

impl BootId {
    /// The boot id of this system; where it has none, one that equals no stored one, so that everything is checked.
    #[must_use]
    pub fn current() -> Self {
        let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
        let number = u128::from_str_radix(&digits, 16).unwrap_or_else(|_| {
            let time = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            time.map_or(1, |time| time.as_nanos())
        });
        Self(number.to_be_bytes())
    }
}

/// A layer store.
pub struct Store {
    root: PathBuf,
    boot: BootId,
    layers: Mutex<HashMap<Digest, Weak<LayerStore>>>,
    clock: Arc<Clock>,
    _lock: Lock,
}

/// Counts uses, for eviction of what was not used for longest.
#[derive(Debug, Default)]
struct Clock {
    ticks: AtomicU32,
    removals: AtomicU64,
    written: AtomicU64,
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
        let layers = root.join("layers");
        ensure_private_dir(root)
            .and_then(|()| ensure_private_dir(&layers))
            .map_err(|error| io_error("use", root)(error.into()))?;
        let lock = lock(root)?;
        // What a process before has not come to delete.
        let removed = root.join(REMOVED);
        Removed { directory: removed.exists().then(|| removed.clone()) }.delete();
        ensure_private_dir(&removed).map_err(|error| io_error("use", &removed)(error.into()))?;
        let (layers, clock) = (Mutex::new(HashMap::new()), Arc::default());
        Ok(Self { root: root.to_owned(), boot, layers, clock, _lock: lock })
    }

    /// The root directory.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The part of the store that belongs to one layer. All callers share one object per layer.
    ///
    /// Spans kept under another index are forgotten: their borders mean nothing any more, and an index vouches only for
    /// what was decoded by itself.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn layer(&self, digest: &Digest, index: &LayerIndex) -> Result<Arc<LayerStore>, StoreError> {
        let fingerprint = present::fingerprint(index);
        let mut layers = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(open) = layers.get(digest).and_then(Weak::upgrade)
            && open.fingerprint() == fingerprint
        {
            return Ok(open);
        }
        let layer =
            LayerStore::open(&self.layer_directory(digest), index, fingerprint, self.boot, Arc::clone(&self.clock))?;
        let layer = Arc::new(layer);
        layers.retain(|_, layer| layer.strong_count() > 0);
        layers.insert(*digest, Arc::downgrade(&layer));
        Ok(layer)
    }

    /// Where the files of a layer are.
    #[must_use]
    pub fn layer_directory(&self, digest: &Digest) -> PathBuf {
        self.root.join("layers").join(format!("{}-{}", digest.algorithm().name(), digest.hex()))
    }

    /// Removes all that is kept of a layer. Readers that have it open keep their files.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn remove(&self, digest: &Digest) -> Result<(), StoreError> {
        self.set_aside(digest).map(|removed| removed.delete())
    }

    /// Removes a layer from the store at once, and leaves the freeing of the disk, which takes a while, to the caller.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn set_aside(&self, digest: &Digest) -> Result<Removed, StoreError> {
        let mut layers = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        layers.remove(digest);
        let directory = self.layer_directory(digest);
        let aside = self.root.join(REMOVED).join(self.clock.removals.fetch_add(1, Ordering::Relaxed).to_string());
        match std::fs::rename(&directory, &aside) {
            Ok(()) => Ok(Removed { directory: Some(aside) }),
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(Removed { directory: None }),
            Err(cause) => Err(io_error("remove", &directory)(cause)),
        }
    }
}

/// Takes the lock of a directory that one process at a time may write to.
pub(crate) fn lock(root: &Path) -> Result<Lock, StoreError> {
    let path = root.join("lock");
    Lock::take(&path).map_err(|error| match error {
        LockError::Busy { pid } => StoreError::Busy { path: root.to_owned(), pid },
        LockError::Io { action, cause } => io_error(action, &path)(cause),
    })
}

/// Where removed layers wait for their space to be freed.
const REMOVED: &str = "removed";

/// A layer that is out of the store, still on the disk.
#[derive(Debug)]
#[must_use]
pub struct Removed {
    directory: Option<PathBuf>,
}

impl Removed {
    /// Frees the disk. What cannot be deleted is tried again when the store is opened next.
    pub fn delete(self) {
        if let Some(directory) = &self.directory
            && let Err(cause) = std::fs::remove_dir_all(directory)
        {
            tracing::warn!(directory = %directory.display(), %cause, "the data of a removed layer stay behind");
        }
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").field("root", &self.root).finish_non_exhaustive()
    }
}
