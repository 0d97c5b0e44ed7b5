//! One entry of a layer's file table, as the tar stream states it.
//!
//! Entries are kept in tar order with all duplicates, names uncleaned: this is the record of what the archive says.
//! What it *means* (parents, hard links, white-outs, later entries replacing earlier ones) is decided by the code that
//! builds a tree from it. Texts are bytes: a tar knows no encoding.

use std::sync::Arc;

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum EntryKind {
    /// A regular file.
    Regular,
    Directory,
    /// Another name for a file of the same archive, given in [`Entry::link`].
    Hardlink,
    /// A symbolic link to [`Entry::link`].
    Symlink,
    /// A character device.
    CharDevice,
    BlockDevice,
    /// A named pipe.
    Fifo,
}

/// A point in time: seconds since 1970 (negative before) and nanoseconds after that second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Timestamp {
    /// Whole seconds, rounded down.
    pub seconds: i64,
    /// 0 to 999,999,999.
    pub nanoseconds: u32,
}

/// Which bytes of a sparse file are stored, in file order. All other bytes of the file are zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Where the bytes stand in the file.
    pub file_offset: u64,
    /// Where they stand in the uncompressed layer.
    pub data_offset: u64,
    /// How many there are.
    pub length: u64,
}

/// One PAX record: a key and its value.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct PaxRecord {
    /// The key, not empty.
    pub key: Box<[u8]>,
    /// The value; empty means that a value given elsewhere does not count.
    pub value: Box<[u8]>,
}

/// What few entries have.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Extra {
    /// Device major number of the header (also of entries that are no devices, where the header has one).
    pub device_major: i64,
    /// Device minor number of the header.
    pub device_minor: i64,
    /// All PAX records of the entry, keys ascending and unique.
    pub pax: Box<[PaxRecord]>,
    /// The stored pieces of a sparse file; `None` for all others.
    pub sparse: Option<Box<[Piece]>>,
}

/// One entry of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The name as the archive has it: not cleaned, with a leading `./` or trailing `/` where it has one.
    pub name: Box<[u8]>,
    /// Target of a symlink (free text) or hard link (a name of the archive); else usually empty.
    pub link: Box<[u8]>,
    /// Owner's name, often empty.
    pub user_name: Arc<[u8]>,
    /// Group's name, often empty.
    pub group_name: Arc<[u8]>,
    /// Where the entry's first header block begins in the uncompressed layer (extension headers included).
    pub header_offset: u64,
    /// Where the entry's data begin in the uncompressed layer.
    pub data_offset: u64,
    /// Size of a regular file in bytes, holes included; 0 for everything else.
    pub size: u64,
    /// The numeric mode field as the archive has it (type bits and junk included); see [`Entry::permissions`].
    pub mode: i64,
    /// Modification time; `None` where the index could not say it (zTOC text is limited to the years 0 to 9999).
    pub modified: Option<Timestamp>,
    /// Owner, cut to 32 bits.
    pub uid: u32,
    /// Group, cut to 32 bits.
    pub gid: u32,
    pub kind: EntryKind,
    /// Device numbers, PAX records, sparse map.
    pub extra: Option<Box<Extra>>,
}

/// The prefix of the PAX records that carry extended attributes.
const XATTR_PREFIX: &[u8] = b"SCHILY.xattr.";

impl Entry {
    /// The twelve permission bits: rwx for three, setuid, setgid, sticky.
    #[must_use]
    pub const fn permissions(&self) -> u16 {
        (self.mode & 0o7777) as u16
    }

    /// Major and minor device number of the header; zero unless the archive says otherwise.
    #[must_use]
    pub fn device(&self) -> (i64, i64) {
        self.extra.as_ref().map_or((0, 0), |extra| (extra.device_major, extra.device_minor))
    }

    /// All PAX records, keys ascending.
    #[must_use]
    pub fn pax(&self) -> &[PaxRecord] {
        self.extra.as_ref().map_or(&[], |extra| &extra.pax)
    }

    /// The stored pieces, when the file is sparse.
    #[must_use]
    pub fn sparse(&self) -> Option<&[Piece]> {
        self.extra.as_ref()?.sparse.as_deref()
    }

    /// Extended attributes (name without the PAX prefix, value), names ascending.
    pub fn xattrs(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.pax().iter().filter_map(|record| Some((record.key.strip_prefix(XATTR_PREFIX)?, &*record.value)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A million of them add up: a layer of 100,000 files should need about 20 MB for its table.
    #[test]
    fn entry_stays_small() {
        assert!(size_of::<Entry>() <= 152, "{}", size_of::<Entry>());
    }
}
