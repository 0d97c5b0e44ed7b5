//! Reading an OCI layout, be it a directory or a tar file that holds one or can be read as one.
//!
//! Both come down to "a file, an offset, a length" for each blob, so reading is written once, with positioned reads: no
//! shared file position, no extraction of archives. Invariants: whole documents are bounded and checked against their
//! digest before they are returned; nothing outside the layout is opened, because names are made from digests.

use std::fmt::Debug;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

use crate::format::class::{Class, Classified};
use crate::format::digest::{Digest, Hasher};
use crate::format::limits::Limits;
use crate::format::model::{Descriptor, ImageIndex, Probe, RawManifest};
use crate::image::saved::SavedError;

/// Bytes read from a file at a time: large enough for the disk, small enough to flow.
const CHUNK_BYTES: u64 = 1 << 20;

/// Why a layout cannot be read or written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The operating system says no.
    #[error("{}: {what}: {reason}", path.display())]
    Io { path: PathBuf, what: &'static str, kind: io::ErrorKind, reason: String },
    /// It is no OCI layout.
    #[error("{} is no OCI layout: {reason}", path.display())]
    NotALayout { path: PathBuf, reason: String },
    /// A document cannot be read.
    #[error("{}: {what} cannot be read: {reason}", path.display())]
    Malformed { path: PathBuf, what: String, reason: String },
    /// The content is not what its name says.
    #[error("{}: a blob has digest {found}, expected {expected}", path.display())]
    Digest { path: PathBuf, expected: Box<Digest>, found: Box<Digest> },
    /// The content is not as long as the descriptor says.
    #[error("{}: blob {digest} has {found} bytes, expected {expected}", path.display())]
    Size { path: PathBuf, digest: Box<Digest>, expected: u64, found: u64 },
    /// More than we are willing to hold.
    #[error("{}: {what} is larger than the limit of {limit} bytes", path.display())]
    TooLarge { path: PathBuf, what: String, limit: u64 },
    /// A blob has no such bytes.
    #[error("{}: blob {digest} has {size} bytes, there are no bytes {}..{}", path.display(), range.start, range.end)]
    Range { path: PathBuf, digest: Box<Digest>, range: Range<u64>, size: u64 },
    /// It is not what `docker save` writes.
    #[error("{}: {reason}", path.display())]
    Saved { path: PathBuf, reason: SavedError },
    /// A blob is not there.
    #[error("{} has no blob {digest}", path.display())]
    Missing { path: PathBuf, digest: Box<Digest> },
}

impl Classified for StoreError {
    fn class(&self) -> Class {
        match self {
            Self::Io { .. } | Self::NotALayout { .. } => Class::Local,
            Self::Malformed { .. }
            | Self::Digest { .. }
            | Self::Size { .. }
            | Self::TooLarge { .. }
            | Self::Range { .. }
            | Self::Missing { .. } => Class::Content,
            Self::Saved { reason, .. } => reason.class(),
        }
    }
}

impl StoreError {
    pub(crate) fn io(path: &Path, what: &'static str, error: &io::Error) -> Self {
        Self::Io { path: path.to_owned(), what, kind: error.kind(), reason: error.to_string() }
    }
}

/// Where a piece of content lies.
#[derive(Debug, Clone)]
pub struct Located {
    content: Content,
    /// How long it is.
    pub(crate) length: u64,
}

#[derive(Debug, Clone)]
enum Content {
    /// In a file, from this offset on.
    File(Arc<File>, u64),
    /// A document that was made here.
    Memory(Bytes),
}

impl Located {
    pub(crate) fn file(file: &Arc<File>, offset: u64, length: u64) -> Self {
        Self { content: Content::File(Arc::clone(file), offset), length }
    }

    pub(crate) fn memory(bytes: Bytes) -> Self {
        let length = bytes.len() as u64;
        Self { content: Content::Memory(bytes), length }
    }

    /// Where it begins, if it is in a file.
    pub(crate) const fn offset(&self) -> Option<u64> {
        match &self.content {
            Content::File(_, offset) => Some(*offset),
            Content::Memory(_) => None,
        }
    }
}

/// An OCI layout to read from: a directory, or a tar file that holds one or can be read as one. All calls block.
pub trait Store: Clone + Debug + Send + Sync + 'static {
    /// The directory or file.
    fn path(&self) -> &Path;

    /// index.json, as it is.
    ///
    /// # Errors
    /// [`StoreError`] when it cannot be read.
    fn index_bytes(&self) -> Result<Bytes, StoreError>;

    /// Where a blob lies; `None` when it is not there.
    ///
    /// # Errors
    /// [`StoreError`] when that cannot be found out.
    fn locate(&self, digest: &Digest) -> Result<Option<Located>, StoreError>;

    /// Whether it has no other image than the one that was named when it was opened.
    fn is_chosen(&self) -> bool {
        false
    }

    /// Whether it has no manifest of its own: the one that is read was made here.
    fn has_made_manifest(&self) -> bool {
        false
    }

    /// The entries of index.json.
    ///
    /// # Errors
    /// [`StoreError`] when it cannot be read.
    fn entries(&self) -> Result<Vec<Descriptor>, StoreError> {
        let index: Result<ImageIndex, _> = serde_json::from_slice(&self.index_bytes()?);
        index.map(|index| index.manifests).map_err(|error| StoreError::Malformed {
            path: self.path().to_owned(),
            what: "index.json".to_owned(),
            reason: error.to_string(),
        })
    }

    /// A manifest; `None` when its blob is not there.
    ///
    /// # Errors
    /// [`StoreError`] when it cannot be read or is not what its descriptor says.
    fn manifest(&self, descriptor: &Descriptor) -> Result<Option<RawManifest>, StoreError> {
        let Some(bytes) = self.blob_bytes(descriptor, Limits::DEFAULT.manifest_bytes_max)? else { return Ok(None) };
        let probe: Probe = serde_json::from_slice(&bytes).map_err(|error| StoreError::Malformed {
            path: self.path().to_owned(),
            what: format!("manifest {}", descriptor.digest),
            reason: error.to_string(),
        })?;
        let media_type = probe.media_type(&descriptor.media_type);
        Ok(Some(RawManifest { media_type, digest: descriptor.digest, bytes }))
    }

    /// A whole blob of at most `limit` bytes, checked; `None` when it is not there.
    ///
    /// # Errors
    /// [`StoreError`] when it cannot be read or is not what its descriptor says.
    fn blob_bytes(&self, descriptor: &Descriptor, limit: u64) -> Result<Option<Bytes>, StoreError> {
        let Some(located) = self.locate(&descriptor.digest)? else { return Ok(None) };
        if located.length != descriptor.size {
            return Err(self.wrong_size(descriptor, located.length));
        }
        if located.length > limit {
            let what = format!("blob {}", descriptor.digest);
            return Err(StoreError::TooLarge { path: self.path().to_owned(), what, limit });
        }
        let bytes = read_at(self.path(), &located, 0, located.length)?;
        let mut hasher = Hasher::new(descriptor.digest.algorithm());
        hasher.update(&bytes);
        let found = hasher.finish();
        if found == descriptor.digest { Ok(Some(bytes)) } else { Err(self.wrong_digest(&descriptor.digest, found)) }
    }

    /// The error for content that is not as long as its descriptor says.
    fn wrong_size(&self, descriptor: &Descriptor, found: u64) -> StoreError {
        let (path, digest) = (self.path().to_owned(), Box::new(descriptor.digest));
        StoreError::Size { path, digest, expected: descriptor.size, found }
    }

    /// The error for content that is not what its name says.
    fn wrong_digest(&self, expected: &Digest, found: Digest) -> StoreError {
        StoreError::Digest { path: self.path().to_owned(), expected: Box::new(*expected), found: Box::new(found) }
    }

    /// The error for content that should be there.
    fn missing(&self, digest: &Digest) -> StoreError {
        StoreError::Missing { path: self.path().to_owned(), digest: Box::new(*digest) }
    }
}

/// Reads the next piece of `located` from `position` on, up to `end`.
pub(crate) fn read_piece(path: &Path, located: &Located, position: u64, end: u64) -> Result<Bytes, StoreError> {
    read_at(path, located, position, end.saturating_sub(position).min(CHUNK_BYTES))
}

/// Reads exactly `length` bytes, which the caller has bounded.
pub(crate) fn read_at(path: &Path, located: &Located, position: u64, length: u64) -> Result<Bytes, StoreError> {
    let failed = |error: io::Error| StoreError::io(path, "cannot read", &error);
    let length = usize::try_from(length).map_err(|_| failed(io::ErrorKind::OutOfMemory.into()))?;
    match &located.content {
        Content::File(file, offset) => {
            let mut bytes = vec![0; length];
            file.read_exact_at(&mut bytes, offset.saturating_add(position)).map_err(failed)?;
            Ok(bytes.into())
        }
        Content::Memory(bytes) => {
            let start = usize::try_from(position).unwrap_or(usize::MAX);
            let end = start.checked_add(length).filter(|end| *end <= bytes.len());
            let end = end.ok_or_else(|| failed(io::ErrorKind::UnexpectedEof.into()))?;
            Ok(bytes.slice(start..end))
        }
    }
}
