//! Layers without an index: streamed once, whole, into the same store, their table built on the way.
//!
//! This is one sequential write and no file is created per entry, so for a layer that is small or has no index it is
//! faster than unpacking; and what results is a [`LayerIndex`] like any other, so the reader, the tree and the mount
//! know no difference. zstd layers come this way too: they are decompressed here and indexed as plain tar, and since
//! single spans of them cannot be fetched again they are pinned in the store.
//!
//! Invariants: nothing is published before the digest of the blob and of its tar have been compared with what the image
//! says; on any failure the layer's directory is removed.

use std::fs::File;
use std::io::{self, BufReader, Read as _, Write as _};
use std::iter;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt as _;
use soci_index::format::class::{Class, Classified};
use soci_index::format::digest::{Algorithm, Digest, Hasher};
pub use soci_index::format::encoding::Encoding;
use soci_index::format::index::{Compression, LayerIndex};
use soci_index::format::manifest::ZTOC;
use soci_index::format::model::Descriptor;
use soci_index::indexing::pipeline::{self, PipelineError};
use soci_index::indexing::{IndexError, Indexed, Options};
use soci_index::registry::pieces::Pieces;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, mpsc};

use crate::layer::budget;
use crate::layer::source::{Source, SourceError};
use crate::layer::store::{Claim, LayerStore, Proof, Record, Store, StoreError};

mod window;

/// Spans of an unpacked layer. Nothing is decoded from them; they are what a checksum covers.
const SPAN_BYTES: u64 = 4 << 20;

/// Chunks that may wait between the network and the disk.
const CHUNKS_WAITING: usize = 64;

/// What is decompressed of a zstd layer at a time.
const ZSTD_PIECE_BYTES: usize = 64 << 10;

/// What the image says about a layer.
#[derive(Debug, Clone, Copy)]
pub struct LayerClaim {
    /// Digest of the blob.
    pub digest: Digest,
    /// Size of the blob.
    pub size: u64,
    /// Digest of the uncompressed tar, from the image's configuration.
    pub diff_id: Digest,
}

impl LayerClaim {
    /// The claim under which the store keeps the layer when it is read whole.
    #[must_use]
    pub const fn whole(&self) -> Claim {
        Claim::whole(self.digest, self.diff_id)
    }
}

/// Why a layer could not be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// The source did not deliver.
    #[error("layer {layer}: {cause}")]
    Source {
        layer: Digest,
        #[source]
        cause: SourceError,
    },
    /// The blob is not a layer.
    #[error("layer {layer}: {cause}")]
    Index {
        layer: Digest,
        #[source]
        cause: IndexError,
    },
    /// The blob is damaged zstd.
    #[error("layer {layer}: the zstd data are damaged: {cause}")]
    Zstd {
        layer: Digest,
        #[source]
        cause: io::Error,
    },
    /// The blob is not the one the image names.
    #[error("layer {layer}: the blob has the digest {found}")]
    WrongBlob { layer: Digest, found: Digest },
    /// The tar is not the one the image names.
    #[error("layer {layer}: its tar has the digest {found}, the image says {expected}")]
    WrongTar {
        layer: Digest,
        /// The image's `diff_id`.
        expected: Digest,
        found: Digest,
    },
    /// A digest of the image uses another hash function than SHA-256, which is all the indexer computes.
    #[error("layer {layer}: {digest} is no SHA-256 digest and cannot be checked")]
    Algorithm { layer: Digest, digest: Digest },
    /// The store failed.
    #[error("layer {layer}: {cause}")]
    Store {
        layer: Digest,
        #[source]
        cause: StoreError,
    },
    /// The work was cut off: the process is shutting down.
    #[error("layer {layer}: unpacking was abandoned")]
    Abandoned { layer: Digest },
}

impl Classified for UnpackError {
    fn class(&self) -> Class {
        match self {
            Self::Source { cause, .. } => cause.class(),
            Self::Index { .. }
            | Self::Zstd { .. }
            | Self::WrongBlob { .. }
            | Self::WrongTar { .. }
            | Self::Algorithm { .. } => Class::Content,
            Self::Store { .. } => Class::Local,
            Self::Abandoned { .. } => Class::Other,
        }
    }
}

/// An unpacked layer.
#[derive(Debug)]
pub struct Unpacked {
    pub index: Arc<LayerIndex>,
    /// Its bytes, all present and proven.
    pub store: Arc<LayerStore>,
    /// What the store says of it. Its table is kept, except for the rare layer that no zTOC can represent.
    pub record: Record,
}

/// Streams the layer into the store and checks it.
///
/// Whatever the store had of it is replaced, so it should not be open elsewhere.
///
/// # Errors
/// [`UnpackError`]; nothing of the layer is left then, nor if the future is dropped half-way.
pub async fn unpack(
    store: &Store,
    source: &dyn Source,
    claim: LayerClaim,
    encoding: Encoding,
) -> Result<Unpacked, UnpackError> {
    let layer = claim.digest;
    for digest in [claim.digest, claim.diff_id] {
        if digest.algorithm() != Algorithm::Sha256 {
            return Err(UnpackError::Algorithm { layer, digest });
        }
    }
    let failed = |cause| UnpackError::Store { layer, cause };
    store.remove(&claim.whole()).map_err(failed)?;
    let unfinished = Unfinished { store, claim: claim.whole() };
    let unpacked = fill(store, source, claim, encoding).await?;
    std::mem::forget(unfinished);
    Ok(unpacked)
}

/// A layer that is being streamed; what was written of it goes when this is dropped.
struct Unfinished<'s> {
    store: &'s Store,
    claim: Claim,
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        match (self.store.set_aside(&self.claim), Handle::try_current()) {
            (Ok(removed), Ok(runtime)) => drop(runtime.spawn_blocking(move || removed.delete())),
            (Ok(removed), Err(_)) => removed.delete(),
            (Err(error), _) => tracing::warn!(layer = %self.claim.layer, %error, "a layer that failed is left behind"),
        }
    }
}

async fn fill(
    store: &Store,
    source: &dyn Source,
    claim: LayerClaim,
    encoding: Encoding,
) -> Result<Unpacked, UnpackError> {
    let layer = claim.digest;
    let failed = |cause| UnpackError::Store { layer, cause };
    let directory = store.directory(&claim.whole().id());
    let (sender, receiver) = mpsc::channel(CHUNKS_WAITING);
    let writer = tokio::task::spawn_blocking(move || write(&directory, receiver, claim, encoding));
    let sent = send(source, claim, sender).await;
    let written = writer.await.map_err(|_| UnpackError::Abandoned { layer })?;
    let indexed = match (written, sent) {
        (Ok(indexed), Ok(())) => indexed,
        // A blob that broke off is no good blob either; the reason it broke off is the better one.
        (_, Err(Some(cause))) => return Err(UnpackError::Source { layer, cause }),
        (Err(error), _) => return Err(error),
        (Ok(_), Err(None)) => return Err(UnpackError::Abandoned { layer }),
    };
    let kept = store.layer(&claim.whole(), &indexed.index).map_err(failed)?;
    let adopting = Arc::clone(&kept);
    let adopted =
        tokio::task::spawn_blocking(move || adopting.adopt().and_then(|()| adopting.set_proven(&Proof::OwnTable)));
    adopted.await.map_err(|_| UnpackError::Abandoned { layer })?.map_err(failed)?;
    let from_elsewhere = !source.is_remembered();
    if encoding == Encoding::Zstd || from_elsewhere {
        kept.pin();
    }
    let index = Arc::new(indexed.index.clone());
    let ztoc = indexed.into_ztoc().ok().and_then(|ztoc| Some(ztoc.encode().ok()?.to_vec()));
    let table_kept = ztoc.as_ref().map(|ztoc| Descriptor::of(ZTOC, ztoc));
    let record = Record { claim: claim.whole(), layer_bytes: claim.size, table_kept, from_elsewhere };
    // Without it the layer is only streamed again.
    if let Some(ztoc) = &ztoc
        && let Err(error) = store.keep_table(&record, ztoc)
    {
        tracing::warn!(%layer, %error, "the layer's table is not kept: after a restart the layer will be streamed again");
    }
    Ok(Unpacked { index, store: kept, record })
}

/// Moves the blob's chunks into the channel. `Err(None)`: the receiver is gone.
async fn send(source: &dyn Source, claim: LayerClaim, sender: mpsc::Sender<Bytes>) -> Result<(), Option<SourceError>> {
    let mut chunks = source.read(0..claim.size).await.map_err(Some)?;
    while let Some(chunk) = chunks.next().await {
        sender.send(chunk.map_err(Some)?).await.map_err(|_| None)?;
    }
    Ok(())
}

/// Decodes, indexes, writes and checks. Runs on the blocking pool, and hashes and writes concurrently on a thread of
/// its own.
fn write(
    directory: &Path,
    chunks: mpsc::Receiver<Bytes>,
    claim: LayerClaim,
    encoding: Encoding,
) -> Result<Indexed, UnpackError> {
    let layer = claim.digest;
    let path = directory.join("data");
    let failed = |operation| {
        let path = path.clone();
        move |cause| UnpackError::Store { layer, cause: StoreError::Io { operation, path, cause: Arc::new(cause) } }
    };
    if claim.size > 0 && chunks.is_closed() && chunks.is_empty() {
        // Given up before it began: there must not be a directory again.
        return Err(UnpackError::Abandoned { layer });
    }
    crate::layer::private::ensure_private_dir(directory)
        .map_err(|error| failed("use the directory of")(error.into()))?;
    let options = File::options().read(true).write(true).create(true).truncate(true).clone();
    let mut file = options.open(&path).map_err(failed("create"))?;
    let broken = OnceLock::new();
    let mut keep = |tar: &[u8]| {
        if broken.get().is_none()
            && let Err(cause) = file.write_all(tar)
        {
            let _ = broken.set(cause);
        }
    };
    let mut input = Input::new(chunks, encoding).map_err(|cause| UnpackError::Zstd { layer, cause })?;
    let next = || match broken.get() {
        None => input.next().map_err(Halt::Zstd),
        Some(_) => Err(Halt::Write),
    };
    let compression = if encoding == Encoding::Gzip { Compression::Gzip } else { Compression::None };
    let options = Options {
        compression,
        span_bytes: SPAN_BYTES,
        compact: None,
        limits: crate::layer::limits::for_layer(claim.size),
    };
    let indexed = pipeline::index_chunks(next, options, &mut keep);
    if let Some(cause) = broken.into_inner() {
        return Err(failed("write")(cause));
    }
    let indexed = match indexed {
        Ok(indexed) => indexed,
        Err(PipelineError::Index(cause)) => return Err(UnpackError::Index { layer, cause }),
        Err(PipelineError::Read(Halt::Zstd(cause))) => return Err(UnpackError::Zstd { layer, cause }),
        // The file was looked at above.
        Err(PipelineError::Read(Halt::Write)) => return Err(UnpackError::Abandoned { layer }),
    };
    let found = input.digest().map_err(|cause| UnpackError::Zstd { layer, cause })?.unwrap_or(indexed.layer_digest);
    if found != claim.digest {
        return Err(UnpackError::WrongBlob { layer, found });
    }
    if indexed.diff_id != claim.diff_id {
        return Err(UnpackError::WrongTar { layer, expected: claim.diff_id, found: indexed.diff_id });
    }
    Ok(indexed)
}

/// Why no more of the blob is taken.
enum Halt {
    /// The file cannot be written.
    Write,
    /// The blob is damaged.
    Zstd(io::Error),
}

/// What is indexed: the blob as it comes, or what zstd makes of it.
enum Input {
    Blob(mpsc::Receiver<Bytes>),
    Zstd(Box<zstd::stream::read::Decoder<'static, BufReader<Received>>>),
}

impl Input {
    fn new(chunks: mpsc::Receiver<Bytes>, encoding: Encoding) -> io::Result<Self> {
        Ok(match encoding {
            Encoding::Gzip | Encoding::Tar => Self::Blob(chunks),
            Encoding::Zstd => {
                let mut chunks = chunks;
                let first = chunks.blocking_recv().unwrap_or_default();
                let window_log = window::window_log(&first);
                // On the blocking pool, where a wait holds up nothing else.
                let turn = window::needs_turn(window_log).then(|| Handle::try_current().ok()).flatten();
                let turn = turn.and_then(|runtime| runtime.block_on(budget::large()));
                let chunks = iter::once(first).chain(iter::from_fn(move || chunks.blocking_recv())).map(Ok);
                let blob = Pieces::new(Box::new(chunks) as Box<dyn Iterator<Item = _>>);
                let received = Received { blob, hasher: Hasher::new(Algorithm::Sha256), _turn: turn };
                let mut decoder = Box::new(zstd::stream::read::Decoder::new(received)?);
                window::limit(window_log, &mut decoder)?;
                Self::Zstd(decoder)
            }
        })
    }

    /// The next piece; `None` at the end.
    fn next(&mut self) -> io::Result<Option<Bytes>> {
        match self {
            Self::Blob(chunks) => Ok(chunks.blocking_recv()),
            Self::Zstd(decoder) => {
                let mut piece = BytesMut::zeroed(ZSTD_PIECE_BYTES);
                let length = decoder.read(&mut piece)?;
                piece.truncate(length);
                Ok((length > 0).then(|| piece.freeze()))
            }
        }
    }

    /// The digest of the blob, where the indexer has not seen that itself.
    fn digest(self) -> io::Result<Option<Digest>> {
        let Self::Zstd(decoder) = self else { return Ok(None) };
        // The decoder may have read ahead into its buffer, which the hash has seen too.
        let mut rest = decoder.finish().into_inner();
        io::copy(&mut rest, &mut io::sink())?;
        Ok(Some(rest.hasher.finish()))
    }
}

/// The blob as a reader that hashes what goes through it.
struct Received {
    blob: Pieces<Box<dyn Iterator<Item = io::Result<Bytes>>>>,
    hasher: Hasher,
    /// For a decoder that takes much memory.
    _turn: Option<OwnedSemaphorePermit>,
}

impl io::Read for Received {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.blob.read(buffer)?;
        self.hasher.update(&buffer[..length]);
        Ok(length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_said_to_be_the_reason() {
        let full = Path::new("/dev/full");
        if !full.exists() {
            eprintln!("SKIPPED: this machine has no /dev/full");
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(full, directory.path().join("data")).unwrap();
        // More than the buffers on the way hold, so that the inflating thread has to be stopped.
        let tar = vec![0; 16 << 20];
        let claim = LayerClaim { digest: Digest::of(&tar), size: tar.len() as u64, diff_id: Digest::of(&tar) };
        let (sender, receiver) = mpsc::channel(CHUNKS_WAITING);
        for chunk in tar.chunks(tar.len() / CHUNKS_WAITING) {
            sender.try_send(Bytes::copy_from_slice(chunk)).unwrap();
        }
        drop(sender);
        let error = write(directory.path(), receiver, claim, Encoding::Tar).unwrap_err();
        let UnpackError::Store { cause: StoreError::Io { operation: "write", path, cause }, .. } = error else {
            panic!("{error}");
        };
        assert_eq!((path, cause.kind()), (directory.path().join("data"), io::ErrorKind::StorageFull));
    }
}
