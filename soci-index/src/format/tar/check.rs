//! An entry of an index against the header in the layer itself.

use crate::format::entry::Entry;
use crate::format::limits::Limits;
use crate::format::tar::TarReader;

/// Why the header in the layer is not the entry in the index.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the tar header at offset {offset} of the uncompressed layer does not match the index: {what} differs")]
pub struct HeaderMismatch {
    /// Where the header begins in the uncompressed layer.
    pub offset: u64,
    /// Which field.
    pub what: &'static str,
}

/// Compares an entry of an index with the header bytes of the layer itself: `header` is exactly the uncompressed bytes
/// `entry.header_offset..entry.data_offset`. They may hold something skipped (a label) before the entry's own header.
///
/// # Errors
/// [`HeaderMismatch`] names the first field that differs.
pub fn check_header(entry: &Entry, header: &[u8]) -> Result<(), HeaderMismatch> {
    let offset = entry.header_offset;
    let differs = |what| Err(HeaderMismatch { offset, what });
    let mut reader = TarReader::at(offset, Limits::DEFAULT);
    if reader.push(header).is_err() || reader.offset != entry.data_offset {
        return differs("the header itself");
    }
    let [found] = &*reader.entries else { return differs("the header itself") };
    let fields: [(&'static str, bool); 11] = [
        ("the place of the data", found.data_offset == entry.data_offset),
        ("the name", found.name == entry.name),
        ("the type", found.kind == entry.kind),
        ("the size", found.size == entry.size && found.sparse() == entry.sparse()),
        ("the link target", found.link == entry.link),
        ("the mode", found.mode == entry.mode),
        ("the owner", found.uid == entry.uid && found.gid == entry.gid),
        ("the owner's name", found.user_name == entry.user_name && found.group_name == entry.group_name),
        ("the modification time", entry.modified.is_none() || found.modified == entry.modified),
        ("the device number", found.device() == entry.device()),
        ("an attribute", found.pax() == entry.pax()),
    ];
    match fields.iter().find(|(_, same)| !same) {
        Some((what, _)) => differs(what),
        None => Ok(()),
    }
}
