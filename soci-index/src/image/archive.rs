//! An OCI layout inside a tar file (`oci-archive:`), read in place.
//!
//! One pass over the tar's headers, which seeks past the content, yields where each blob lies; nothing is extracted and
//! the file may be far larger than the disk has room for. Invariants: only names that belong to a layout are
//! remembered; every remembered range lies inside the file; of two members of one name the last counts, as it does for
//! tar.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

use crate::digest::Digest;
use crate::image::store::{Located, StoreError, read_at};
use crate::limits::Limits;

/// Members of one archive. Stops a file of empty members from filling the memory.
const MEMBERS_MAX: usize = 1_000_000;

/// A tar file that holds an OCI layout.
#[derive(Debug, Clone)]
pub struct Archive(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    file: Arc<File>,
    index: (u64, u64),
    blobs: HashMap<Digest, (u64, u64)>,
}

impl Archive {
    /// Reads the table of contents of the tar file `path`. Blocks.
    ///
    /// # Errors
    /// [`StoreError`] when it is no tar file, or holds no OCI layout.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let io = |what| move |error: std::io::Error| StoreError::io(path, what, &error);
        let file = File::open(path).map_err(io("cannot open"))?;
        let length = file.metadata().map_err(io("cannot read"))?.len();
        let (mut layout, mut index, mut blobs) = (false, None, HashMap::new());
        let mut archive = tar::Archive::new(&file);
        let entries = archive.entries_with_seek().map_err(io("is not a tar file"))?;
        for (count, entry) in entries.enumerate() {
            let entry = entry.map_err(io("is not a tar file (a compressed one must be unpacked first)"))?;
            if count >= MEMBERS_MAX {
                return Err(not_a_layout(path, format!("it has more than {MEMBERS_MAX} members")));
            }
            if !entry.header().entry_type().is_file() {
                continue;
            }
            let place = (entry.raw_file_position(), entry.size());
            if place.0.checked_add(place.1).is_none_or(|end| end > length) {
                return Err(not_a_layout(path, "a member goes beyond the end of the file".to_owned()));
            }
            let name = entry.path_bytes();
            let name = name.strip_prefix(b"./").unwrap_or(&name);
            match name {
                b"oci-layout" => layout = true,
                b"index.json" => index = Some(place),
                other => {
                    if let Some(digest) = blob_digest(other) {
                        blobs.insert(digest, place);
                    }
                }
            }
        }
        let index = index.filter(|_| layout);
        let index =
            index.ok_or_else(|| not_a_layout(path, "it lacks the members oci-layout and index.json".to_owned()))?;
        Ok(Self(Arc::new(Inner { path: path.to_owned(), file: Arc::new(file), index, blobs })))
    }

    /// The tar file.
    #[must_use]
    pub fn file(&self) -> &Path {
        &self.0.path
    }

    pub(crate) fn index_bytes(&self) -> Result<Bytes, StoreError> {
        let limit = Limits::DEFAULT.manifest_bytes_max;
        let (offset, length) = self.0.index;
        if length > limit {
            let what = "index.json".to_owned();
            return Err(StoreError::TooLarge { path: self.0.path.clone(), what, limit });
        }
        read_at(&self.0.path, &self.located(offset, length), 0, length)
    }

    pub(crate) fn locate(&self, digest: &Digest) -> Option<Located> {
        self.0.blobs.get(digest).map(|(offset, length)| self.located(*offset, *length))
    }

    fn located(&self, offset: u64, length: u64) -> Located {
        Located { file: Arc::clone(&self.0.file), offset, length }
    }
}

/// `blobs/sha256/<hex>` as a digest.
fn blob_digest(name: &[u8]) -> Option<Digest> {
    let (algorithm, hex) = std::str::from_utf8(name).ok()?.strip_prefix("blobs/")?.split_once('/')?;
    format!("{algorithm}:{hex}").parse().ok()
}

fn not_a_layout(path: &Path, reason: String) -> StoreError {
    StoreError::NotALayout { path: path.to_owned(), reason }
}
