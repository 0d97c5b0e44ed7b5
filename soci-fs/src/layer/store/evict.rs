//! Keeps the store within a number of bytes: what was not used for longest goes first.
//!
//! The bytes of layers that are not open go first and whole, oldest first; their records and tables stay, so that they
//! can be opened again. Of open layers single spans go, by the store's clock of uses. If that is not enough, layers
//! that are not open go altogether. Space is counted as the file system counts it, so holes and partial blocks need no
//! bookkeeping.

use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};

use crate::layer::store::error::{StoreError, io_error};
use crate::layer::store::layer::LayerStore;
use crate::layer::store::{Store, proven, record};

/// What an eviction did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Evicted {
    /// Bytes of disk in use before.
    pub before: u64,
    /// Bytes of disk in use after.
    pub after: u64,
    /// Layers removed whole.
    pub layers: u32,
    /// Spans punched out of layers in use.
    pub spans: u32,
}

/// The directory of a layer that is not open.
struct Closed {
    used: SystemTime,
    directory: PathBuf,
    bytes: u64,
    /// Of these, the bytes of `data` and `present`.
    data_bytes: u64,
}

impl Store {
    /// Bytes of disk that the layers take.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn disk_bytes(&self) -> Result<u64, StoreError> {
        Ok(self.directories()?.iter().map(|closed| closed.bytes).sum())
    }

    /// Evicts until the layers take at most `quota` bytes of disk, or nothing is left to evict.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn evict_to(&self, quota: u64) -> Result<Evicted, StoreError> {
        let mut evicted = Evicted { before: self.disk_bytes()?, ..Evicted::default() };
        evicted.after = evicted.before;
        if evicted.before <= quota {
            return Ok(evicted);
        }
        // Held so that no layer is opened while it is being removed.
        let layers = self.layers.lock();
        let open: Vec<Arc<LayerStore>> = layers.values().filter_map(Weak::upgrade).collect();
        let mut closed = self.directories()?;
        closed.retain(|closed| open.iter().all(|open| open.directory() != closed.directory));
        closed.sort_by_key(|closed| closed.used);
        for closed in closed.iter().filter(|closed| closed.data_bytes > 0) {
            if evicted.after <= quota {
                return Ok(evicted);
            }
            for name in ["packed", "present", "data"] {
                let file = closed.directory.join(name);
                std::fs::remove_file(&file).or_else(ignore_absent).map_err(io_error("remove", &file))?;
            }
            evicted.after = evicted.after.saturating_sub(closed.data_bytes);
            evicted.layers += 1;
        }
        evict_spans(&open, quota, &mut evicted)?;
        for closed in &closed {
            if evicted.after <= quota {
                break;
            }
            if let Some(record) = record::read(&closed.directory) {
                self.common.proven.forget(&record.claim);
            }
            self.move_aside(&closed.directory)?.delete();
            evicted.after = evicted.after.saturating_sub(closed.bytes - closed.data_bytes);
        }
        drop(layers);
        evicted.after = self.disk_bytes()?;
        Ok(evicted)
    }

    /// Keeps the layers within `quota` bytes for as long as it is polled: looks after every interval in which something
    /// was written, on the blocking pool. Between two looks the store may grow beyond the quota by what the line
    /// brings.
    pub async fn keep_within(self: Arc<Self>, quota: u64, interval: Duration) {
        let mut seen = None;
        loop {
            let written = self.common.written.load(Ordering::Relaxed);
            if seen.replace(written) != Some(written) {
                let store = Arc::clone(&self);
                match tokio::task::spawn_blocking(move || store.evict_to(quota)).await {
                    Ok(Ok(Evicted { layers: 0, spans: 0, .. })) => {}
                    Ok(Ok(evicted)) => tracing::info!(?evicted, quota, "the store was over its quota"),
                    Ok(Err(error)) => tracing::warn!(%error, "the store cannot be kept within its quota"),
                    Err(_) => return,
                }
            }
            tokio::time::sleep(interval).await;
        }
    }

    fn directories(&self) -> Result<Vec<Closed>, StoreError> {
        let root = self.root.join("layers");
        let mut directories = Vec::new();
        for entry in std::fs::read_dir(&root).map_err(io_error("list", &root))? {
            let directory = entry.map_err(io_error("list", &root))?.path();
            let (data, present) = (size(&directory.join("data"))?, size(&directory.join("present"))?);
            let others = [size(&directory.join("table"))?, size(&directory.join(proven::FILE))?];
            let sum = |files: &[&Option<Metadata>]| {
                512 * files.iter().filter_map(|file| file.as_ref()).map(Metadata::blocks).sum::<u64>()
            };
            let data_bytes = sum(&[&data, &present]);
            let bytes = data_bytes + sum(&[&others[0], &others[1]]);
            let used = present.and_then(|present| present.modified().ok()).unwrap_or(SystemTime::UNIX_EPOCH);
            directories.push(Closed { used, directory, bytes, data_bytes });
        }
        Ok(directories)
    }
}

fn evict_spans(open: &[Arc<LayerStore>], quota: u64, evicted: &mut Evicted) -> Result<(), StoreError> {
    let mut candidates: Vec<(u32, usize, u32)> = Vec::new();
    for (number, layer) in open.iter().enumerate().filter(|(_, layer)| !layer.is_pinned() && !layer.is_lent()) {
        let here = (0..layer.spans()).filter(|span| layer.is_present(*span) || layer.has_parts(*span));
        candidates.extend(here.map(|span| (layer.last_used(span), number, span)));
    }
    candidates.sort_unstable();
    for (_, number, span) in candidates {
        if evicted.after <= quota {
            break;
        }
        open[number].evict(span)?;
        evicted.after = evicted.after.saturating_sub(open[number].length(span));
        evicted.spans += 1;
    }
    Ok(())
}

fn ignore_absent(cause: io::Error) -> io::Result<()> {
    if cause.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(cause) }
}

fn size(path: &std::path::Path) -> Result<Option<Metadata>, StoreError> {
    match std::fs::metadata(path) {
        Ok(metadata) => Ok(Some(metadata)),
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(cause) => Err(io_error("examine", path)(cause)),
    }
}
