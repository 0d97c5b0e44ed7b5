//! The caps of this process on what images may make it hold.
//!
//! An operator raises them once, when the program starts; where they apply, deep in what opens layers, nothing else of
//! an operator's settings is needed. So they are one value of the process, not a parameter of everything in between.
//! The tables of all layers that are open are counted here, too: each is bounded by its layer, but there may be any
//! number of layers.

use std::sync::{Arc, OnceLock, Weak};

use parking_lot::Mutex;
use soci_index::format::index::LayerIndex;
use soci_index::format::limits::{ENTRY_MEMORY, Limits, SPAN_MEMORY};

/// Memory for the tables of all open layers, by default: some three million files.
pub const TOTAL_TABLE_BYTES: u64 = 1 << 30;

/// What an operator may set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caps {
    pub layer: Limits,
    /// Bytes of memory that the tables of all open layers may take.
    pub total_table_bytes: u64,
}

impl Default for Caps {
    fn default() -> Self {
        Self { layer: Limits::DEFAULT, total_table_bytes: TOTAL_TABLE_BYTES }
    }
}

/// Why a layer is not opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "its tables take {wanted} bytes of memory, those of other layers {held}, and all of them may take {cap} \
     (max_total_table_bytes)"
)]
pub struct Full {
    wanted: u64,
    held: u64,
    cap: u64,
}

static CAPS: OnceLock<Caps> = OnceLock::new();
static TABLES: Mutex<Tables> = Mutex::new(Tables(Vec::new()));

/// Sets the caps, before anything is opened. Once: later calls change nothing.
pub fn set(caps: Caps) {
    if CAPS.set(caps).is_err() {
        tracing::debug!("the limits of this process are set already");
    }
}

fn caps() -> Caps {
    CAPS.get().copied().unwrap_or_default()
}

/// The caps for what is said of a layer blob of so many bytes.
#[must_use]
pub fn for_layer(layer_bytes: u64) -> Limits {
    caps().layer.for_layer(layer_bytes)
}

/// Accounts for the tables of a layer while they are in use, if the limit allows.
///
/// # Errors
/// [`Full`].
pub fn admit(index: &Arc<LayerIndex>) -> Result<(), Full> {
    TABLES.lock().admit(index, caps().total_table_bytes)
}

/// Counts the tables of a layer that must be opened: it was admitted by a process before this one.
pub fn count(index: &Arc<LayerIndex>) {
    // Whatever the others take.
    let _ = TABLES.lock().admit(index, u64::MAX);
}

/// The tables that are held, each with its weight.
struct Tables(Vec<(Weak<LayerIndex>, u64)>);

impl Tables {
    fn admit(&mut self, index: &Arc<LayerIndex>, cap: u64) -> Result<(), Full> {
        self.0.retain(|(table, _)| table.strong_count() > 0);
        if self.0.iter().any(|(table, _)| std::ptr::eq(table.as_ptr(), Arc::as_ptr(index))) {
            return Ok(());
        }
        let (wanted, held) = (weight(index), self.0.iter().map(|(_, bytes)| bytes).sum::<u64>());
        if held.saturating_add(wanted) > cap {
            return Err(Full { wanted, held, cap });
        }
        self.0.push((Arc::downgrade(index), wanted));
        Ok(())
    }
}

/// Bytes of memory that a layer's tables take with its tree. A name is in both.
fn weight(index: &LayerIndex) -> u64 {
    let texts: usize = index.entries.iter().map(|entry| 2 * entry.name.len() + entry.link.len()).sum();
    index.entries.len() as u64 * ENTRY_MEMORY + index.spans.len() as u64 * SPAN_MEMORY + texts as u64
}

#[cfg(test)]
mod tests {
    use soci_index::format::index::Compression;
    use soci_index::indexing::{Options, index_bytes};

    use super::*;

    fn index(files: usize) -> Arc<LayerIndex> {
        let mut builder = tar::Builder::new(Vec::new());
        for number in 0..files {
            let mut header = tar::Header::new_gnu();
            header.set_size(0);
            builder.append_data(&mut header, format!("{number:010}"), &b""[..]).unwrap();
        }
        let tar = builder.into_inner().unwrap();
        let ztoc = index_bytes(&tar, Options::of(Compression::None)).unwrap().into_ztoc().unwrap();
        Arc::new(ztoc.into_index(tar.len() as u64, &Limits::DEFAULT).unwrap())
    }

    #[test]
    fn tables_are_counted_while_they_are_held() {
        let mut tables = Tables(Vec::new());
        let (one, two) = (index(10), index(10));
        let each = 10 * (ENTRY_MEMORY + 20) + SPAN_MEMORY;
        assert_eq!(weight(&one), each);
        assert_eq!(tables.admit(&one, 2 * each - 1), Ok(()));
        // It is the same one.
        assert_eq!(tables.admit(&Arc::clone(&one), each), Ok(()));
        let refused = tables.admit(&two, 2 * each - 1).unwrap_err();
        assert_eq!(refused, Full { wanted: each, held: each, cap: 2 * each - 1 });
        assert!(refused.to_string().contains("max_total_table_bytes"));
        drop(one);
        assert_eq!(tables.admit(&two, 2 * each - 1), Ok(()));
        assert_eq!(tables.admit(&index(10), u64::MAX), Ok(()));
    }
}
