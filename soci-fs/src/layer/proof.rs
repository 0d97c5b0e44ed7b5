//! Proves that a layer is what the image says, and not only what its index says.
//!
//! Until then a layer is *provisional*: span digests come from the index, and so do the windows that decoding starts
//! from and the table of files, so an index can be forged that shows other bytes, names, links or owners. Two proofs
//! exist, and both are of bytes and table:
//!
//! * [`by_data`]: the stored tar, all of it, has the SHA-256 that the image's configuration names, and the tar reader finds
//!   in it the entries of the table, all of them and no others. Cheap, and it fetches nothing; but a zTOC ends where the tar
//!   ends, and the padding behind it counts in the digest. Padding is zeros in practice, so every plausible length of zeros
//!   is tried.
//! * [`by_source`]: the blob once more from the source, decoded from its first byte without the index. Its digest, the
//!   tar's digest, every stored byte and every entry of the table are compared. It decides what the first cannot.
//!
//! A proof leaves marks behind ([`crate::layer::store`]), so that spans that are fetched again are held to the same
//! bytes. A claim that fails is condemned: the layer goes out of service, and the claim is not believed again.

use std::sync::Arc;

use futures_util::StreamExt as _;
use soci_index::format::class::{Class, Classified};
use soci_index::format::digest::{Algorithm, Digest, Hasher};
use soci_index::indexing::{IndexError, Indexer, Options};
use tokio::sync::watch;

use crate::layer::reader::LayerReader;
use crate::layer::source::{Chunks, Delivery, OriginId, Source as _, SourceError};
use crate::layer::store::{LayerStore, Mark, Proof, Reading, StoreError};
use crate::layer::unpack::LayerClaim;

mod checks;

use checks::{Marks, TableCheck, same_entry};

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
    /// This proof is inconclusive; [`by_source`] decides.
    Undecided,
}

/// Why a proof could not be made, or what it found wrong.
#[derive(Debug, thiserror::Error)]
pub enum ProofError {
    /// Not all of the layer is present.
    #[error("layer {layer} is not complete: span {span} is missing")]
    Incomplete { layer: Digest, span: u32 },
    /// The source did not deliver.
    #[error("layer {layer}: {cause}")]
    Source {
        layer: Digest,
        #[source]
        cause: SourceError,
    },
    /// The store failed.
    #[error("layer {layer}: {cause}")]
    Store {
        layer: Digest,
        #[source]
        cause: StoreError,
    },
    /// The blob from the source is no layer.
    #[error("layer {layer}: {cause}")]
    Index {
        layer: Digest,
        #[source]
        cause: IndexError,
    },
    /// The blob from the source is not the one the image names. It says nothing about what is stored.
    #[error("layer {layer}: the source delivered a blob with the digest {found}")]
    WrongBlob { layer: Digest, found: Digest },
    /// The layer is not what the image says, whatever the index.
    #[error("layer {layer}: its tar has the digest {found}, the image says {expected}")]
    WrongTar {
        layer: Digest,
        /// The image's `diff_id`.
        expected: Digest,
        found: Digest,
    },
    /// What the index made of the blob is not what the blob holds: the index is forged or damaged.
    #[error("layer {layer}: the index yields other bytes than the layer has, from byte {offset} on")]
    Content {
        layer: Digest,
        /// Where the first difference is, within a span.
        offset: u64,
    },
    /// The index's file table is not that of the tar.
    #[error("layer {layer}: entry {entry} of the index is not what the tar says")]
    Table {
        layer: Digest,
        /// Position of the first entry that differs.
        entry: usize,
    },
    /// The work was cut off: the process is shutting down.
    #[error("layer {layer}: the proof was abandoned")]
    Abandoned { layer: Digest },
}

impl Classified for ProofError {
    fn class(&self) -> Class {
        match self {
            Self::Source { cause, .. } => cause.class(),
            Self::Store { .. } => Class::Local,
            Self::Index { .. }
            | Self::WrongBlob { .. }
            | Self::WrongTar { .. }
            | Self::Content { .. }
            | Self::Table { .. } => Class::Content,
            Self::Incomplete { .. } | Self::Abandoned { .. } => Class::Other,
        }
    }
}

/// Compares the stored tar with `diff_id`, and its entries with the table. All of it must be present.
///
/// # Errors
/// [`ProofError::Incomplete`], [`ProofError::Store`], [`ProofError::Table`]; after the last the claim is condemned.
pub async fn by_data(reader: &LayerReader, diff_id: Digest) -> Result<Verdict, ProofError> {
    let (_, landed) = watch::channel(reader.store().size());
    by_data_as_it_comes(reader, diff_id, landed).await
}

/// The same during a download: `landed` says how far from its start all of the layer is present. What is lacking when
/// its sender has gone must be present then.
///
/// # Errors
/// As [`by_data`].
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
    let result = work.await.map_err(|_| ProofError::Abandoned { layer })?;
    if let Err(error @ ProofError::Table { .. }) = &result {
        condemn(reader, error).await;
    }
    result
}

/// A stored tar on its way through hash and tar reader, from its start on.
struct Hashing {
    layer: Digest,
    store: Arc<LayerStore>,
    diff_id: Digest,
    marks: Marks,
    /// Of a diff_id that is no SHA-256.
    other: Option<Hasher>,
    table: TableCheck,
    buffer: Vec<u8>,
    offset: u64,
}

impl Hashing {
    fn new(reader: &LayerReader, diff_id: Digest) -> Self {
        let (layer, store) = (reader.digest(), Arc::clone(reader.store()));
        let (marks, other) = (Marks::new(reader.index()), other_hasher(&diff_id));
        let table = TableCheck::new(Arc::clone(reader.index()));
        Self { layer, store, diff_id, marks, other, table, buffer: vec![0; PIECE_BYTES], offset: 0 }
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
            self.marks.push(part);
            self.table.push(part);
            if let Some(other) = &mut self.other {
                other.update(part);
            }
            self.offset += length as u64;
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Verdict, ProofError> {
        self.go_to(self.store.size())?;
        if !self.is_the_tar() {
            return Ok(Verdict::Undecided);
        }
        if let Some(entry) = self.table.finish() {
            return Err(ProofError::Table { layer: self.layer, entry });
        }
        self.store
            .set_proven(&Proof::Marks(self.marks.ends))
            .map_err(|cause| ProofError::Store { layer: self.layer, cause })?;
        Ok(Verdict::Proven)
    }

    /// Whether the bytes, with some padding, have the digest.
    fn is_the_tar(&self) -> bool {
        let to_block = (TAR_BLOCK_BYTES - self.offset % TAR_BLOCK_BYTES) % TAR_BLOCK_BYTES;
        let (mut hash, mut other, mut padding) = (self.marks.hash.clone(), self.other.clone(), 0);
        while padding <= PADDING_BYTES_MAX {
            let digest = match &other {
                Some(other) => other.clone().finish(),
                None => hash.digest(self.offset + padding),
            };
            if digest == self.diff_id {
                return true;
            }
            let step = if padding == 0 && to_block > 0 { to_block } else { TAR_BLOCK_BYTES };
            let zeros = &[0; 512][..usize::try_from(step).unwrap_or(512)];
            hash.update(zeros);
            if let Some(other) = &mut other {
                other.update(zeros);
            }
            padding += step;
        }
        false
    }
}

/// A hasher for a digest that is no SHA-256.
fn other_hasher(digest: &Digest) -> Option<Hasher> {
    (digest.algorithm() != Algorithm::Sha256).then(|| Hasher::new(digest.algorithm()))
}

/// The cheap proof, and, if it is inconclusive, the one that fetches the blob once more.
///
/// # Errors
/// [`ProofError`].
pub async fn prove(reader: &LayerReader, claim: LayerClaim) -> Result<Verdict, ProofError> {
    let (_, landed) = watch::channel(reader.store().size());
    prove_as_it_comes(reader, claim, landed).await
}

/// The same during a download, see [`by_data_as_it_comes`].
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
/// [`ProofError`]. After [`ProofError::WrongTar`], [`ProofError::Content`] and [`ProofError::Table`] the claim is
/// condemned.
pub async fn by_source(reader: &LayerReader, claim: LayerClaim) -> Result<Verdict, ProofError> {
    let layer = reader.digest();
    let mut tries = reader.fetching().source().choices();
    let result = loop {
        let (result, from) = compare(reader, claim).await;
        tries = tries.saturating_sub(1);
        match (&result, from) {
            // It says something of the origin and nothing of the layer.
            (Err(ProofError::WrongBlob { .. } | ProofError::Index { .. }), Some(from)) if tries > 0 => {
                reader.fetching().source().blame(from);
            }
            _ => break result,
        }
    };
    match result {
        Err(error @ (ProofError::WrongTar { .. } | ProofError::Content { .. } | ProofError::Table { .. })) => {
            condemn(reader, &error).await;
            Err(error)
        }
        Ok(marks) => {
            let store = Arc::clone(reader.store());
            let noted = tokio::task::spawn_blocking(move || store.set_proven(&Proof::Marks(marks))).await;
            let noted = noted.map_err(|_| ProofError::Abandoned { layer })?;
            noted.map_err(|cause| ProofError::Store { layer, cause })?;
            Ok(Verdict::Proven)
        }
        Err(error) => Err(error),
    }
}

/// Condemns the claim, on a thread that may wait for the disk. After [`ProofError::WrongTar`] no index can make the
/// diff_id true: the blob is what its digest says.
async fn condemn(reader: &LayerReader, error: &ProofError) {
    let (of_blob, reason) = (matches!(error, ProofError::WrongTar { .. }), error.to_string());
    let reader = reader.clone();
    let noted = tokio::task::spawn_blocking(move || {
        let noted = if of_blob { reader.store().condemn_diff_id(&reason) } else { Ok(()) };
        reader.health().condemn(reason);
        noted
    });
    if let Ok(Err(error)) = noted.await {
        tracing::error!(%error, "a verdict is not on disk: after a restart it has to be found again");
    }
}

/// What the whole blob says of the stored bytes and the table, and which origin it came from.
async fn compare(reader: &LayerReader, claim: LayerClaim) -> (Result<Vec<Mark>, ProofError>, Option<OriginId>) {
    let cause = |cause| ProofError::Source { layer: reader.digest(), cause };
    match reader.fetching().source().fetch(0..claim.size).await {
        Ok(Delivery { chunks, from, .. }) => (compare_with(reader, claim, chunks).await, from),
        Err(error) => (Err(cause(error)), None),
    }
}

async fn compare_with(reader: &LayerReader, claim: LayerClaim, mut chunks: Chunks) -> Result<Vec<Mark>, ProofError> {
    let layer = reader.digest();
    let mut comparison = Comparison::new(reader, claim)?;
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.map_err(|cause| ProofError::Source { layer, cause })?;
        // One chunk at a time on the blocking pool: a proof runs in the background.
        let work = tokio::task::spawn_blocking(move || comparison.push(&chunk).map(|()| comparison));
        comparison = work.await.map_err(|_| ProofError::Abandoned { layer })??;
    }
    comparison.judge(claim)
}

/// The blob on its way through an indexer, compared with what is stored.
struct Comparison {
    layer: Digest,
    store: Arc<LayerStore>,
    indexer: Indexer,
    marks: Marks,
    /// Of digests that are no SHA-256: of the blob, of the tar.
    others: [Option<Hasher>; 2],
    offset: u64,
    /// Where stored bytes differ first.
    different: Option<u64>,
}

impl Comparison {
    fn new(reader: &LayerReader, claim: LayerClaim) -> Result<Self, ProofError> {
        let (layer, index) = (reader.digest(), reader.index());
        let options = Options {
            compression: index.compression,
            span_bytes: 4 << 20,
            compact: None,
            limits: crate::layer::limits::for_layer(claim.size),
        };
        let indexer = Indexer::new(options).map_err(|cause| ProofError::Index { layer, cause })?;
        let others = [&claim.digest, &claim.diff_id].map(other_hasher);
        let (store, marks) = (Arc::clone(reader.store()), Marks::new(index));
        Ok(Self { layer, store, indexer, marks, others, offset: 0, different: None })
    }

    fn push(&mut self, chunk: &[u8]) -> Result<(), ProofError> {
        let layer = self.layer;
        let (store, offset, different, marks) = (&self.store, &mut self.offset, &mut self.different, &mut self.marks);
        let [of_blob, of_tar] = &mut self.others;
        if let Some(of_blob) = of_blob {
            of_blob.update(chunk);
        }
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
            marks.push(&tar[..inside]);
            if let Some(of_tar) = of_tar {
                of_tar.update(tar);
            }
            *offset += tar.len() as u64;
        };
        self.indexer.push(chunk, &mut compare).map_err(|cause| ProofError::Index { layer, cause })?;
        failure.map_or(Ok(()), |cause| Err(ProofError::Store { layer, cause }))
    }

    fn judge(self, claim: LayerClaim) -> Result<Vec<Mark>, ProofError> {
        let (layer, index) = (self.layer, Arc::clone(&self.marks.index));
        let indexed = self.indexer.finish().map_err(|cause| ProofError::Index { layer, cause })?;
        let [of_blob, of_tar] = self.others.map(|other| other.map(Hasher::finish));
        let (of_blob, of_tar) = (of_blob.unwrap_or(indexed.layer_digest), of_tar.unwrap_or(indexed.diff_id));
        if of_blob != claim.digest {
            return Err(ProofError::WrongBlob { layer, found: of_blob });
        }
        if of_tar != claim.diff_id {
            return Err(ProofError::WrongTar { layer, expected: claim.diff_id, found: of_tar });
        }
        if let Some(offset) = self.different {
            return Err(ProofError::Content { layer, offset });
        }
        // A table that goes on behind the end of the tar is caught by its entries, or says nothing that is shown.
        if self.marks.ends.len() < index.spans.len() {
            return Err(ProofError::Content { layer, offset: self.offset });
        }
        let (found, said) = (&indexed.index.entries, &index.entries);
        let same = found.iter().zip(said).take_while(|(found, said)| same_entry(found, said)).count();
        if same < found.len().max(said.len()) {
            return Err(ProofError::Table { layer, entry: same });
        }
        Ok(self.marks.ends)
    }
}

/// Reads stored bytes if all of them are present.
fn read_present(store: &LayerStore, offset: u64, length: usize, buffer: &mut Vec<u8>) -> Result<bool, StoreError> {
    buffer.clear();
    buffer.resize(length, 0);
    Ok(store.read(offset, buffer)? == Reading::Done)
}
