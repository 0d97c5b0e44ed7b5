//! Proves that a layer is what the image says, and not only what its index says.
//!
//! Until then a layer is *provisional*: span digests come from the index, and so do the windows that decoding starts
//! from, so whoever made the index could have made right compressed bytes decode to other content. Two proofs exist.
//!
//! * [`by_data`]: the stored tar, all of it, has the SHA-256 that the image's configuration names. Cheap, and it fetches
//!   nothing; but a zTOC ends where the tar ends, and the padding behind it counts in the digest. Padding is zeros in
//!   practice, so every plausible length of zeros is tried.
//! * [`by_source`]: the blob once more from the source, decoded from its first byte without the index. Its digest, the
//!   tar's digest, every stored byte and every entry of the table are compared. Nothing escapes this one.
//!
//! A layer that fails is taken out of service. Only the second proves the index as well, with the names and attributes of
//! files that it gives; a policy that does not trust indexes ([`crate::trust`]) asks for that one.

use std::sync::Arc;

use futures_util::StreamExt as _;
use soci_index::digest::{Digest, Hasher};
use soci_index::entry::Entry;
use soci_index::index::LayerIndex;
use soci_index::indexer::{IndexError, Indexed, Indexer, Options};
use soci_index::limits::Limits;
use tokio::sync::watch;

use crate::reader::LayerReader;
use crate::source::SourceError;
use crate::store::{LayerStore, Reading, StoreError};
use crate::unpack::LayerClaim;

/// Zeros behind the tar that [`by_data`] tries, in blocks of 512: archives are padded to 10 KiB, some builders to more.
const PADDING_BYTES_MAX: u64 = 1 << 20;

const TAR_BLOCK_BYTES: u64 = 512;

/// Bytes that are read from the store at a time.
const PIECE_BYTES: usize = 1 << 20;

/// What a proof found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The layer is what the image says.
    Proven,
    /// This proof cannot tell; [`by_source`] can.
    Undecided,
}

/// Why a proof could not be made, or what it found wrong.
#[derive(Debug, thiserror::Error)]
pub enum ProofError {
    /// Not all of the layer is present.
    #[error("layer {layer} is not complete: span {span} is missing")]
    Incomplete {
        /// The layer.
        layer: Digest,
        /// The first missing span.
        span: u32,
    },
    /// The source did not deliver.
    #[error("layer {layer}: {cause}")]
    Source {
        /// The layer.
        layer: Digest,
        /// What it said.
        #[source]
        cause: SourceError,
    },
    /// The store failed.
    #[error("layer {layer}: {cause}")]
    Store {
        /// The layer.
        layer: Digest,
        /// What it said.
        #[source]
        cause: StoreError,
    },
    /// The blob from the source is no layer.
    #[error("layer {layer}: {cause}")]
    Index {
        /// The layer.
        layer: Digest,
        /// What is wrong with it.
        #[source]
        cause: IndexError,
    },
    /// The blob from the source is not the one the image names. It says nothing about what is stored.
    #[error("layer {layer}: the source delivered a blob with the digest {found}")]
    WrongBlob {
        /// The layer.
        layer: Digest,
        /// What came.
        found: Digest,
    },
    /// The layer is not what the image says, whatever the index.
    #[error("layer {layer}: its tar has the digest {found}, the image says {expected}")]
    WrongTar {
        /// The layer.
        layer: Digest,
        /// The image's `diff_id`.
        expected: Digest,
        /// What came.
        found: Digest,
    },
    /// What the index made of the blob is not what the blob holds: the index is forged or damaged.
    #[error("layer {layer}: the index yields other bytes than the layer has, from byte {offset} on")]
    Content {
        /// The layer.
        layer: Digest,
        /// Where the first difference is, within a span.
        offset: u64,
    },
    /// The index's file table is not that of the tar.
    #[error("layer {layer}: entry {entry} of the index is not what the tar says")]
    Table {
        /// The layer.
        layer: Digest,
        /// Position of the first entry that differs.
        entry: usize,
    },
    /// The work was cut off: the process is shutting down.
    #[error("layer {layer}: the proof was abandoned")]
    Abandoned {
        /// The layer.
        layer: Digest,
    },
}

/// Compares the stored tar with `diff_id`. All of it must be present.
///
/// # Errors
/// [`ProofError::Incomplete`], [`ProofError::Store`].
pub async fn by_data(reader: &LayerReader, diff_id: Digest) -> Result<Verdict, ProofError> {
    let (_, landed) = watch::channel(reader.store().size());
    by_data_as_it_comes(reader, diff_id, landed).await
}

/// The same beside whoever brings the layer: `landed` says how far from its start all of it is present. What is lacking when
/// its sender has gone must be present then.
///
/// # Errors
/// [`ProofError::Incomplete`], [`ProofError::Store`].
pub async fn by_data_as_it_comes(
    reader: &LayerReader,
    diff_id: Digest,
    mut landed: watch::Receiver<u64>,
) -> Result<Verdict, ProofError> {
    let (layer, size) = (reader.digest(), reader.store().size());
    let mut hashing = Hashing::new(reader, diff_id);
    loop {
        let end = *landed.borrow_and_update();
        let work = tokio::task::spawn_blocking(move || hashing.go_to(end).map(|()| hashing));
        hashing = work.await.map_err(|_| ProofError::Abandoned { layer })??;
        if hashing.offset >= size || landed.changed().await.is_err() {
            break;
        }
    }
    let work = tokio::task::spawn_blocking(move || hashing.finish());
    work.await.map_err(|_| ProofError::Abandoned { layer })?
}

/// A stored tar on its way through a hash, from its start on.
struct Hashing {
    layer: Digest,
    store: Arc<LayerStore>,
    diff_id: Digest,
    hasher: Hasher,
    buffer: Vec<u8>,
    offset: u64,
}

impl Hashing {
    fn new(reader: &LayerReader, diff_id: Digest) -> Self {
        let (layer, store) = (reader.digest(), Arc::clone(reader.store()));
        let hasher = Hasher::new(diff_id.algorithm());
        Self { layer, store, diff_id, hasher, buffer: vec![0; PIECE_BYTES], offset: 0 }
    }

    fn failed(&self, cause: StoreError) -> ProofError {
        ProofError::Store { layer: self.layer, cause }
    }

    fn go_to(&mut self, end: u64) -> Result<(), ProofError> {
        while self.offset < end {
            let length = usize::try_from(end - self.offset).map_or(PIECE_BYTES, |rest| rest.min(PIECE_BYTES));
            let part = &mut self.buffer[..length];
            match self.store.read(self.offset, part) {
                Ok(Reading::Done) => {}
                Ok(Reading::Absent(span)) => return Err(ProofError::Incomplete { layer: self.layer, span }),
                Err(cause) => return Err(self.failed(cause)),
            }
            self.hasher.update(part);
            self.offset += length as u64;
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Verdict, ProofError> {
        self.go_to(self.store.size())?;
        let to_block = (TAR_BLOCK_BYTES - self.offset % TAR_BLOCK_BYTES) % TAR_BLOCK_BYTES;
        let zeros = [0; 512];
        let mut padding = 0;
        while padding <= PADDING_BYTES_MAX {
            if self.hasher.clone().finish() == self.diff_id {
                self.store.set_proven().map_err(|cause| self.failed(cause))?;
                return Ok(Verdict::Proven);
            }
            let step = if padding == 0 && to_block > 0 { to_block } else { TAR_BLOCK_BYTES };
            self.hasher.update(&zeros[..usize::try_from(step).unwrap_or(512)]);
            padding += step;
        }
        Ok(Verdict::Undecided)
    }
}

/// The cheap proof, and the one that fetches the blob once more where that cannot tell.
///
/// # Errors
/// [`ProofError`].
pub async fn prove(reader: &LayerReader, claim: LayerClaim) -> Result<Verdict, ProofError> {
    let (_, landed) = watch::channel(reader.store().size());
    prove_as_it_comes(reader, claim, landed).await
}

/// The same beside whoever brings the layer, see [`by_data_as_it_comes`].
///
/// # Errors
/// [`ProofError`].
pub async fn prove_as_it_comes(
    reader: &LayerReader,
    claim: LayerClaim,
    landed: watch::Receiver<u64>,
) -> Result<Verdict, ProofError> {
    match by_data_as_it_comes(reader, claim.diff_id, landed).await? {
        Verdict::Proven => Ok(Verdict::Proven),
        Verdict::Undecided => by_source(reader, claim).await,
    }
}

/// Fetches the whole blob once more and compares everything with it. What is absent from the store is not filled in.
///
/// # Errors
/// [`ProofError`]. After [`ProofError::WrongTar`], [`ProofError::Content`] and [`ProofError::Table`] the layer is out of
/// service.
pub async fn by_source(reader: &LayerReader, claim: LayerClaim) -> Result<Verdict, ProofError> {
    let layer = reader.digest();
    let result = compare(reader, claim).await;
    match &result {
        Err(error @ (ProofError::WrongTar { .. } | ProofError::Content { .. } | ProofError::Table { .. })) => {
            reader.condemn(error.to_string());
        }
        Ok(Verdict::Proven) => {
            let (store, index) = (Arc::clone(reader.store()), Arc::clone(reader.index()));
            let noted = tokio::task::spawn_blocking(move || store.set_index_proven(&index)).await;
            let noted = noted.map_err(|_| ProofError::Abandoned { layer })?;
            noted.map_err(|cause| ProofError::Store { layer, cause })?;
        }
        _ => {}
    }
    result
}

async fn compare(reader: &LayerReader, claim: LayerClaim) -> Result<Verdict, ProofError> {
    let layer = reader.digest();
    let index = reader.index();
    let options =
        Options { compression: index.compression, span_bytes: 4 << 20, compact: None, limits: Limits::DEFAULT };
    let indexer = Indexer::new(options).map_err(|cause| ProofError::Index { layer, cause })?;
    let mut comparison = Comparison { layer, store: Arc::clone(reader.store()), indexer, offset: 0, different: None };
    let source = |cause| ProofError::Source { layer, cause };
    let mut chunks = reader.source().read(0..claim.size).await.map_err(source)?;
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.map_err(source)?;
        // One chunk at a time on the blocking pool: a proof is in no hurry.
        let work = tokio::task::spawn_blocking(move || comparison.push(&chunk).map(|()| comparison));
        comparison = work.await.map_err(|_| ProofError::Abandoned { layer })??;
    }
    let different = comparison.different;
    let indexed = comparison.indexer.finish().map_err(|cause| ProofError::Index { layer, cause })?;
    judge(layer, claim, &indexed, index, different)
}

fn judge(
    layer: Digest,
    claim: LayerClaim,
    indexed: &Indexed,
    index: &LayerIndex,
    different: Option<u64>,
) -> Result<Verdict, ProofError> {
    if indexed.layer_digest != claim.digest {
        return Err(ProofError::WrongBlob { layer, found: indexed.layer_digest });
    }
    if indexed.diff_id != claim.diff_id {
        return Err(ProofError::WrongTar { layer, expected: claim.diff_id, found: indexed.diff_id });
    }
    if let Some(offset) = different {
        return Err(ProofError::Content { layer, offset });
    }
    let (found, said) = (&indexed.index.entries, &index.entries);
    let same = found.iter().zip(said).take_while(|(found, said)| same_entry(found, said)).count();
    if same < found.len().max(said.len()) {
        return Err(ProofError::Table { layer, entry: same });
    }
    Ok(Verdict::Proven)
}

/// Whether an index says of an entry what the tar says. An index may be unable to say a time, and one that says fewer
/// names of users loses nothing that is shown.
fn same_entry(tar: &Entry, index: &Entry) -> bool {
    tar.name == index.name
        && tar.link == index.link
        && tar.header_offset == index.header_offset
        && tar.data_offset == index.data_offset
        && tar.size == index.size
        && tar.permissions() == index.permissions()
        && (index.modified.is_none() || tar.modified == index.modified)
        && (tar.uid, tar.gid, tar.kind) == (index.uid, index.gid, index.kind)
        && tar.device() == index.device()
        && tar.sparse() == index.sparse()
        && tar.xattrs().eq(index.xattrs())
}

/// The blob on its way through an indexer, compared with what is stored.
struct Comparison {
    layer: Digest,
    store: Arc<LayerStore>,
    indexer: Indexer,
    offset: u64,
    /// Where stored bytes differ first.
    different: Option<u64>,
}

impl Comparison {
    fn push(&mut self, chunk: &[u8]) -> Result<(), ProofError> {
        let layer = self.layer;
        let (store, offset, different) = (&self.store, &mut self.offset, &mut self.different);
        let mut stored = Vec::new();
        let mut failure = None;
        let mut compare = |tar: &[u8]| {
            let inside =
                usize::try_from(store.size().saturating_sub(*offset)).map_or(tar.len(), |rest| rest.min(tar.len()));
            match read_present(store, *offset, inside, &mut stored) {
                Ok(true) if stored[..] != tar[..inside] => {
                    let at = stored.iter().zip(tar).take_while(|(stored, tar)| stored == tar).count();
                    different.get_or_insert(*offset + at as u64);
                }
                Ok(_) => {}
                Err(cause) => failure = Some(cause),
            }
            *offset += tar.len() as u64;
        };
        self.indexer.push(chunk, &mut compare).map_err(|cause| ProofError::Index { layer, cause })?;
        failure.map_or(Ok(()), |cause| Err(ProofError::Store { layer, cause }))
    }
}

/// Reads stored bytes if all of them are present.
fn read_present(store: &LayerStore, offset: u64, length: usize, buffer: &mut Vec<u8>) -> Result<bool, StoreError> {
    buffer.clear();
    buffer.resize(length, 0);
    Ok(store.read(offset, buffer)? == Reading::Done)
}
