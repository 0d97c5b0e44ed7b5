//! An image inside a tar file, read in place: an OCI layout (`oci-archive:`), or what `docker save` writes.
//!
//! A pass over the tar's headers yields where each blob lies; nothing is extracted and the file may be far larger than
//! the disk has room for. Both forms become the same: documents and blobs by their digests. Invariants: only names that
//! belong to an image are remembered; every remembered range lies inside the file; of two members of one name the last
//! counts, as it does for tar.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

use crate::format::digest::Digest;
use crate::format::limits::Limits;
use crate::image::docker;
use crate::image::members::{Member, walk};
use crate::image::store::{Located, Store, StoreError, read_at};

/// A tar file that holds an image.
#[derive(Debug, Clone)]
pub(crate) struct Archive(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    index: Located,
    blobs: HashMap<Digest, Located>,
    is_made: bool,
    /// Whether there is nothing but the image that was named when it was opened.
    is_chosen: bool,
}

impl Archive {
    /// Reads the table of contents of the tar file `path`, which holds an OCI layout. Blocks.
    ///
    /// # Errors
    /// [`StoreError`] when it is no tar file, or holds no OCI layout.
    pub(crate) fn open(path: &Path) -> Result<Self, StoreError> {
        let file = open_file(path)?;
        let lacking = || StoreError::NotALayout {
            path: path.to_owned(),
            reason: "it lacks the members oci-layout and index.json".to_owned(),
        };
        Self::layout_in(path, &file)?.ok_or_else(lacking)
    }

    /// Opens what `docker save` has written, by its manifest.json; an archive without one as an OCI layout. Layers are
    /// read once to know their digests, unless the layout in the archive agrees with its manifest.json. `tag` is a tag,
    /// a whole name or the place of the image that is meant. Blocks.
    ///
    /// # Errors
    /// [`StoreError`] when it is no tar file, or holds neither.
    pub(crate) fn open_saved(path: &Path, tag: Option<&str>) -> Result<Self, StoreError> {
        let file = open_file(path)?;
        let Some(docker::Made { is_made, index, blobs }) = docker::read(path, &file, tag)? else {
            return Self::layout_in(path, &file)?.ok_or_else(|| docker::nothing_in(path));
        };
        Ok(Self(Arc::new(Inner { path: path.to_owned(), index, blobs, is_made, is_chosen: true })))
    }

    fn layout_in(path: &Path, file: &Arc<File>) -> Result<Option<Self>, StoreError> {
        let (mut layout, mut index, mut blobs) = (false, None, HashMap::new());
        walk(path, file, |name, member| {
            let Member::File { offset, length } = member else { return Ok(()) };
            let located = || Located::file(file, offset, length);
            match name {
                b"oci-layout" => layout = true,
                b"index.json" => index = Some(located()),
                other => {
                    if let Some(digest) = blob_digest(other) {
                        blobs.insert(digest, located());
                    }
                }
            }
            Ok(())
        })?;
        let index = index.filter(|_| layout);
        let inner = |index| Inner { path: path.to_owned(), index, blobs, is_made: false, is_chosen: false };
        Ok(index.map(|index| Self(Arc::new(inner(index)))))
    }
}

impl Store for Archive {
    fn path(&self) -> &Path {
        &self.0.path
    }

    fn index_bytes(&self) -> Result<Bytes, StoreError> {
        let (limit, index) = (Limits::DEFAULT.manifest_bytes_max, &self.0.index);
        if index.length > limit {
            let what = "index.json".to_owned();
            return Err(StoreError::TooLarge { path: self.0.path.clone(), what, limit });
        }
        read_at(&self.0.path, index, 0, index.length)
    }

    fn locate(&self, digest: &Digest) -> Result<Option<Located>, StoreError> {
        Ok(self.0.blobs.get(digest).cloned())
    }

    fn is_chosen(&self) -> bool {
        self.0.is_chosen
    }

    fn has_made_manifest(&self) -> bool {
        self.0.is_made
    }
}

fn open_file(path: &Path) -> Result<Arc<File>, StoreError> {
    File::open(path).map(Arc::new).map_err(|error| StoreError::io(path, "cannot open", &error))
}

/// `blobs/sha256/<hex>` as a digest.
fn blob_digest(name: &[u8]) -> Option<Digest> {
    let (algorithm, hex) = std::str::from_utf8(name).ok()?.strip_prefix("blobs/")?.split_once('/')?;
    format!("{algorithm}:{hex}").parse().ok()
}
