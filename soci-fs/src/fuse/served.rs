//! What the adapter needs of a file system: an image and a forest answer the same questions.

use std::fmt;
use std::future::Future;
use std::sync::Arc;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;

use crate::fuse::counts::Counters;
use crate::fuse::forest::{DirectoryEntry, Forest};
use crate::fuse::image::{FsError, Image};
use crate::tree::attributes::Attributes;

/// Receives names; `false` ends the listing.
pub(super) type Visit<'a> = &'a mut dyn FnMut(DirectoryEntry<'_>) -> bool;

/// A file system that never changes, but for what it says that does.
pub(super) trait Served: fmt::Debug + Send + Sync + 'static {
    /// What has to be waited for before a question about `inode`, or about `name` in it, can be answered.
    fn waiting(self: &Arc<Self>, inode: u64, name: Option<&[u8]>) -> Option<BoxFuture<'static, Result<(), FsError>>>;
    /// Whether what `stat` shows never changes.
    fn is_constant(&self, inode: u64) -> bool;
    /// Whether names in the directory, and their absence, never change.
    fn names_last(&self, directory: u64) -> bool;
    /// The generation, which distinguishes a node from an earlier one with the same number.
    fn generation(&self, inode: u64) -> u64;
    /// `false` if no file can ever have an extended attribute: then the kernel is configured not to ask.
    fn can_have_xattrs(&self) -> bool;
    fn lookup(&self, directory: u64, name: &[u8]) -> Result<Attributes, FsError>;
    fn attributes(&self, inode: u64) -> Result<Attributes, FsError>;
    fn parent(&self, directory: u64) -> Result<u64, FsError>;
    fn list(&self, directory: u64, from: u64, visit: Visit<'_>) -> Result<(), FsError>;
    fn read_link(&self, inode: u64) -> Result<Vec<u8>, FsError>;
    fn xattr(&self, inode: u64, name: &[u8]) -> Result<Vec<u8>, FsError>;
    fn xattr_names(&self, inode: u64) -> Result<Vec<Vec<u8>>, FsError>;
    /// `false` if [`Served::read`] is needed because something has to be waited for.
    fn try_read(&self, inode: u64, offset: u64, length: usize, buffer: &mut Vec<u8>) -> Result<bool, FsError>;
    fn read(
        self: Arc<Self>,
        inode: u64,
        offset: u64,
        length: usize,
    ) -> impl Future<Output = Result<Vec<u8>, FsError>> + Send;
    fn totals(&self) -> (u64, u64);
    /// Where questions are counted, and by which slot.
    fn counters(&self, _inode: u64) -> Option<(&Counters, u16)> {
        None
    }
}

impl Served for Image {
    fn waiting(self: &Arc<Self>, _inode: u64, _name: Option<&[u8]>) -> Option<BoxFuture<'static, Result<(), FsError>>> {
        None
    }

    fn is_constant(&self, inode: u64) -> bool {
        Self::is_constant(self, inode)
    }

    fn names_last(&self, _directory: u64) -> bool {
        true
    }

    fn generation(&self, _inode: u64) -> u64 {
        0
    }

    fn can_have_xattrs(&self) -> bool {
        self.has_xattrs()
    }

    fn lookup(&self, directory: u64, name: &[u8]) -> Result<Attributes, FsError> {
        Self::lookup(self, directory, name)
    }

    fn attributes(&self, inode: u64) -> Result<Attributes, FsError> {
        Self::attributes(self, inode)
    }

    fn parent(&self, directory: u64) -> Result<u64, FsError> {
        Self::parent(self, directory)
    }

    fn list(&self, directory: u64, from: u64, visit: Visit<'_>) -> Result<(), FsError> {
        for listed in Self::list(self, directory, from)? {
            let (next, name, attributes) = (listed.next, listed.name, listed.attributes);
            if !visit(DirectoryEntry { next, name, attributes, generation: 0 }) {
                break;
            }
        }
        Ok(())
    }

    fn read_link(&self, inode: u64) -> Result<Vec<u8>, FsError> {
        Self::read_link(self, inode).map(<[u8]>::to_vec)
    }

    fn xattr(&self, inode: u64, name: &[u8]) -> Result<Vec<u8>, FsError> {
        Self::xattr(self, inode, name).map(<[u8]>::to_vec)
    }

    fn xattr_names(&self, inode: u64) -> Result<Vec<Vec<u8>>, FsError> {
        Ok(self.xattrs(inode)?.map(|(name, _)| name.to_vec()).collect())
    }

    fn try_read(&self, inode: u64, offset: u64, length: usize, buffer: &mut Vec<u8>) -> Result<bool, FsError> {
        Self::try_read(self, inode, offset, length, buffer)
    }

    async fn read(self: Arc<Self>, inode: u64, offset: u64, length: usize) -> Result<Vec<u8>, FsError> {
        Self::read(&self, inode, offset, length).await
    }

    fn totals(&self) -> (u64, u64) {
        Self::totals(self)
    }
}

impl Served for Forest {
    fn counters(&self, inode: u64) -> Option<(&Counters, u16)> {
        Some((Self::counters(self), Self::slot_of(inode)?))
    }

    fn waiting(self: &Arc<Self>, inode: u64, name: Option<&[u8]>) -> Option<BoxFuture<'static, Result<(), FsError>>> {
        let slot = self.closed_slot(inode, name)?;
        let forest = Arc::clone(self);
        Some(async move { forest.open(slot).await }.boxed())
    }

    fn is_constant(&self, inode: u64) -> bool {
        Self::is_constant(self, inode)
    }

    fn names_last(&self, directory: u64) -> bool {
        Self::names_last(self, directory)
    }

    fn generation(&self, inode: u64) -> u64 {
        Self::generation(self, inode)
    }

    fn can_have_xattrs(&self) -> bool {
        // Layers that are added later are unknown yet, and the kernel asks only once.
        true
    }

    fn lookup(&self, directory: u64, name: &[u8]) -> Result<Attributes, FsError> {
        Self::lookup(self, directory, name)
    }

    fn attributes(&self, inode: u64) -> Result<Attributes, FsError> {
        Self::attributes(self, inode)
    }

    fn parent(&self, directory: u64) -> Result<u64, FsError> {
        Self::parent(self, directory)
    }

    fn list(&self, directory: u64, from: u64, visit: Visit<'_>) -> Result<(), FsError> {
        Self::list(self, directory, from, visit)
    }

    fn read_link(&self, inode: u64) -> Result<Vec<u8>, FsError> {
        Self::read_link(self, inode)
    }

    fn xattr(&self, inode: u64, name: &[u8]) -> Result<Vec<u8>, FsError> {
        Self::xattr(self, inode, name)
    }

    fn xattr_names(&self, inode: u64) -> Result<Vec<Vec<u8>>, FsError> {
        Self::xattr_names(self, inode)
    }

    fn try_read(&self, inode: u64, offset: u64, length: usize, buffer: &mut Vec<u8>) -> Result<bool, FsError> {
        Self::try_read(self, inode, offset, length, buffer)
    }

    async fn read(self: Arc<Self>, inode: u64, offset: u64, length: usize) -> Result<Vec<u8>, FsError> {
        Self::read(&self, inode, offset, length).await
    }

    fn totals(&self) -> (u64, u64) {
        Self::totals(self)
    }
}
