//! What a layer's directory says of itself: its claim, and the table that the layer is read by.
//!
//! `record.json` names the claim, `table` holds the TOC or zTOC byte for byte. So a layer can be opened again by what
//! is in its own directory, whatever becomes of the place the index came from, and goes away as a whole. A table is
//! handed out only if its digest is the recorded one.

use std::fs;
use std::path::Path;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use soci_index::format::model::Descriptor;

use crate::layer::store::claim::Claim;
use crate::layer::store::error::{StoreError, io_error};

const RECORD: &str = "record.json";
const TABLE: &str = "table";

/// What is known of a layer in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    #[serde(flatten)]
    pub claim: Claim,
    /// Size of the blob.
    pub layer_bytes: u64,
    /// The TOC or zTOC: the claim's, or one that was made here of a layer that was read whole. None when it is not
    /// kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub table_kept: Option<Descriptor>,
    /// The layer came from another place than the image's, so that what is lost of it cannot be fetched again.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub from_elsewhere: bool,
}

/// The record in a directory, if it is of the claim that the directory is named after.
pub(super) fn read(directory: &Path) -> Option<Record> {
    let record: Record = serde_json::from_slice(&fs::read(directory.join(RECORD)).ok()?).ok()?;
    let is_own = directory.file_name()?.to_str()? == record.claim.id().to_string();
    is_own.then_some(record)
}

/// The table in a directory, if it is the one that is recorded.
pub(super) fn read_table(directory: &Path, record: &Record) -> Option<Bytes> {
    let kept = record.table_kept.as_ref()?;
    let path = directory.join(TABLE);
    let table = Bytes::from(fs::read(&path).ok()?);
    if !kept.digest.matches(&table) {
        tracing::warn!(file = %path.display(), expected = %kept.digest, "a stored table is damaged; it is not used");
        return None;
    }
    Some(table)
}

/// Writes the record and its table.
pub(super) fn write_with_table(directory: &Path, record: &Record, table: &[u8]) -> Result<(), StoreError> {
    replace(directory, TABLE, table)?;
    write(directory, record)
}

/// Writes the record unless one is there.
pub(super) fn write_if_absent(directory: &Path, record: &Record) -> Result<(), StoreError> {
    if directory.join(RECORD).exists() { Ok(()) } else { write(directory, record) }
}

fn write(directory: &Path, record: &Record) -> Result<(), StoreError> {
    replace(directory, RECORD, &serde_json::to_vec(record).unwrap_or_default())
}

fn replace(directory: &Path, name: &str, content: &[u8]) -> Result<(), StoreError> {
    let (path, new) = (directory.join(name), directory.join(format!(".{name}.new")));
    let written = fs::write(&new, content).and_then(|()| fs::rename(&new, &path));
    written.map_err(io_error("write", &path))
}
