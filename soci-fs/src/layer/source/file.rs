//! A blob that is a local file: an OCI layout on disk, a shared file system, a content store.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::{FutureExt as _, StreamExt as _, stream};

use crate::layer::source::{Chunks, Source, SourceError};

/// Bytes per read: large enough that the system calls do not count, small enough that decoding starts soon.
const CHUNK_BYTES: u64 = 256 << 10;

/// A blob in a file.
#[derive(Debug, Clone)]
pub struct FileSource {
    file: Arc<File>,
    path: Arc<PathBuf>,
    size: u64,
}

impl FileSource {
    /// Opens the file.
    ///
    /// # Errors
    /// [`SourceError::Local`].
    pub fn open(path: &Path) -> Result<Self, SourceError> {
        let local = |cause| local(path, cause);
        let file = File::open(path).map_err(local)?;
        let size = file.metadata().map_err(local)?.len();
        Ok(Self { file: Arc::new(file), path: Arc::new(path.to_owned()), size })
    }

    async fn chunk(self, offset: u64, length: u64) -> Result<Bytes, SourceError> {
        let path = Arc::clone(&self.path);
        let read = move || {
            #[expect(clippy::cast_possible_truncation, reason = "at most CHUNK_BYTES")]
            let mut buffer = vec![0; length as usize];
            self.file.read_exact_at(&mut buffer, offset).map(|()| Bytes::from(buffer))
        };
        match tokio::task::spawn_blocking(read).await {
            Ok(result) => result.map_err(|cause| local(&path, cause)),
            Err(join) => Err(local(&path, io::Error::other(join))),
        }
    }
}

impl Source for FileSource {
    fn read(&self, range: Range<u64>) -> BoxFuture<'_, Result<Chunks, SourceError>> {
        let this = self.clone();
        async move {
            if range.start > range.end || range.end > this.size {
                return Err(SourceError::OutOfRange { start: range.start, end: range.end, size: this.size });
            }
            let chunks = stream::unfold(range.start, move |offset| {
                let this = this.clone();
                async move {
                    if offset >= range.end {
                        return None;
                    }
                    let length = CHUNK_BYTES.min(range.end - offset);
                    let chunk = this.chunk(offset, length).await;
                    // After an error the stream ends.
                    let next = if chunk.is_ok() { offset + length } else { range.end };
                    Some((chunk, next))
                }
            });
            Ok(chunks.boxed())
        }
        .boxed()
    }
}

fn local(path: &Path, cause: io::Error) -> SourceError {
    SourceError::Local { origin: path.display().to_string(), cause: Arc::new(cause) }
}
