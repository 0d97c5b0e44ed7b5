//! What a read-only file system answers: an image and a forest have the same questions put to them, by the adapter or
//! by a program of its own.
//!
//! Not one FUSE type is known here, so everything a mount answers can be tested without mounting.

use std::fmt;
use std::future::Future;
use std::sync::Arc;

use futures_util::future::BoxFuture;

use crate::fuse::counts::Counters;
use crate::fuse::error::FsError;
use crate::tree::attributes::Attributes;

/// A name in a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirectoryEntry<'name> {
    /// Where to go on listing behind this name.
    pub next: u64,
    pub name: &'name [u8],
    /// What it leads to.
    pub attributes: Attributes,
    /// [`FileSystem::generation`] of it.
    pub generation: u64,
}

/// An extended attribute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Xattr {
    pub name: Vec<u8>,
    pub value: Vec<u8>,
}

/// How the kernel is to treat a file that a program opens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opening {
    /// Its pages are kept.
    Cached,
    /// Its bytes are asked for each time, with this number, never 0, which says what the file was when it was opened.
    Direct { handle: u64 },
}

/// Receives names; `false` ends the listing.
pub type Visit<'a> = &'a mut dyn FnMut(DirectoryEntry<'_>) -> bool;

/// A file system that never changes, but for what it says that does.
///
/// Every question may fail with [`FsError::NoInode`], and in a forest with [`FsError::NoSlot`] or, before the layer is
/// open, with [`FsError::Closed`].
pub trait FileSystem: fmt::Debug + Send + Sync + 'static {
    /// What has to be waited for before a question about `inode`, or about `name` in it, can be answered.
    fn waiting(self: &Arc<Self>, _inode: u64, _name: Option<&[u8]>) -> Option<BoxFuture<'static, Result<(), FsError>>> {
        None
    }

    /// Whether what `stat` shows never changes.
    fn is_constant(&self, inode: u64) -> bool;

    /// Whether the names in a directory never change, nor their absence.
    fn names_last(&self, _directory: u64) -> bool {
        true
    }

    /// The generation of the layer that `inode` belongs to, which distinguishes it from other ones in the same place.
    fn generation(&self, _inode: u64) -> u64 {
        0
    }

    /// How a file is opened.
    fn opening(&self, _inode: u64) -> Opening {
        Opening::Cached
    }

    /// Whether there may be files that are not opened as all others are: then the kernel has to ask each time.
    fn has_direct_files(&self) -> bool {
        false
    }

    /// `false` if no file can ever have an extended attribute: then the kernel is configured not to ask.
    fn can_have_xattrs(&self) -> bool;

    /// Finds a name in a directory.
    ///
    /// # Errors
    /// [`FsError::NotFound`], [`FsError::NotDirectory`].
    fn lookup(&self, directory: u64, name: &[u8]) -> Result<Attributes, FsError>;

    /// What `stat` shows.
    ///
    /// # Errors
    /// [`FsError`].
    fn attributes(&self, inode: u64) -> Result<Attributes, FsError>;

    /// The directory that holds a directory.
    ///
    /// # Errors
    /// [`FsError`].
    fn parent(&self, directory: u64) -> Result<u64, FsError>;

    /// Shows the names in a directory from position `from` on, without `.` and `..`, to `visit` until it says `false`.
    /// Positions come from [`DirectoryEntry::next`]; the first is 0.
    ///
    /// # Errors
    /// [`FsError::NotDirectory`].
    fn list(&self, directory: u64, from: u64, visit: Visit<'_>) -> Result<(), FsError>;

    /// The target of a symbolic link.
    ///
    /// # Errors
    /// [`FsError::NotLink`].
    fn read_link(&self, inode: u64) -> Result<Vec<u8>, FsError>;

    /// A file's extended attributes.
    ///
    /// # Errors
    /// [`FsError`].
    fn xattrs(&self, inode: u64) -> Result<Vec<Xattr>, FsError>;

    /// The value of one extended attribute.
    ///
    /// # Errors
    /// [`FsError::NoAttribute`].
    fn xattr(&self, inode: u64, name: &[u8]) -> Result<Vec<u8>, FsError> {
        let found = self.xattrs(inode)?.into_iter().find(|xattr| xattr.name == name);
        found.map(|xattr| xattr.value).ok_or(FsError::NoAttribute)
    }

    /// Reads a file if nothing has to be waited for; `false` if [`FileSystem::read`] is needed. What `buffer` held is
    /// replaced.
    ///
    /// # Errors
    /// [`FsError`].
    fn try_read(&self, inode: u64, offset: u64, length: usize, buffer: &mut Vec<u8>) -> Result<bool, FsError>;

    /// Reads a file.
    ///
    /// # Errors
    /// [`FsError`], at the latest after the limits for opening and reading.
    fn read(&self, inode: u64, offset: u64, length: usize) -> impl Future<Output = Result<Vec<u8>, FsError>> + Send;

    /// Number of files and sum of their sizes, as far as they are known.
    fn totals(&self) -> (u64, u64);

    /// Where questions are counted, and by which slot.
    fn counters(&self, _inode: u64) -> Option<(&Counters, u16)> {
        None
    }
}
