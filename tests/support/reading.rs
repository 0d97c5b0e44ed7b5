//! Layers made by hand, and readers over them.

use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use soci_fs::layer::reader::{LayerReader, Policy};
use soci_fs::layer::source::Source;
use soci_fs::layer::source::memory::MemorySource;
use soci_fs::layer::store::{Claim, Store};
use soci_fs::layer::unpack::LayerClaim;
use soci_index::format::digest::Digest;
use soci_index::format::index::{Compression, LayerIndex};
use soci_index::format::limits::Limits;
use soci_index::indexing::{Indexed, Indexer, Options};

/// A layer: its tar, its blob, its index.
#[derive(Debug, Clone)]
pub struct Layer {
    pub tar: Vec<u8>,
    pub blob: Bytes,
    pub index: Arc<LayerIndex>,
    pub claim: LayerClaim,
}

impl Layer {
    pub fn gzip(tar: Vec<u8>, span_bytes: u64) -> Self {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
        encoder.write_all(&tar).unwrap();
        Self::from_blob(encoder.finish().unwrap(), Compression::Gzip, span_bytes)
    }

    pub fn plain(tar: Vec<u8>, span_bytes: u64) -> Self {
        Self::from_blob(tar, Compression::None, span_bytes)
    }

    pub fn from_blob(blob: Vec<u8>, compression: Compression, span_bytes: u64) -> Self {
        let (indexed, tar) = index(&blob, compression, span_bytes).unwrap();
        let claim = LayerClaim { digest: indexed.layer_digest, size: blob.len() as u64, diff_id: indexed.diff_id };
        Self { tar, blob: blob.into(), index: Arc::new(indexed.index), claim }
    }

    pub fn digest(&self) -> Digest {
        self.claim.digest
    }

    /// The claim of an image that reads the layer by its index.
    pub fn indexed(&self) -> Claim {
        Claim { table: Some(Digest::of(b"its table")), ..self.claim.whole() }
    }

    pub fn memory(&self) -> Arc<MemorySource> {
        Arc::new(MemorySource::new(self.blob.clone()))
    }

    /// A reader on the current runtime.
    pub fn reader(&self, store: &Store, source: Arc<dyn Source>, policy: Policy) -> LayerReader {
        self.reader_on(store, source, policy, &tokio::runtime::Handle::current())
    }

    pub fn reader_on(
        &self,
        store: &Store,
        source: Arc<dyn Source>,
        policy: Policy,
        runtime: &tokio::runtime::Handle,
    ) -> LayerReader {
        let kept = store.layer(&self.indexed(), &self.index).unwrap();
        LayerReader::new(self.digest(), Arc::clone(&self.index), kept, source, policy, runtime)
    }
}

pub fn index(
    blob: &[u8],
    compression: Compression,
    span_bytes: u64,
) -> Result<(Indexed, Vec<u8>), soci_index::indexing::IndexError> {
    let mut tar = Vec::new();
    let mut indexer = Indexer::new(Options { compression, span_bytes, compact: None, limits: Limits::DEFAULT })?;
    for chunk in blob.chunks(100_000) {
        indexer.push(chunk, &mut |bytes| tar.extend_from_slice(bytes))?;
    }
    Ok((indexer.finish()?, tar))
}

/// Bytes that compress about as well as text, the same for the same seed.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let word = format!("{:x} ", (state >> 40) & 0xffff);
        bytes.extend_from_slice(word.as_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// A tar of these files, in their order.
pub fn files_tar<N: AsRef<Path>, C: AsRef<[u8]>>(files: impl IntoIterator<Item = (N, C)>) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, content) in files {
        let content = content.as_ref();
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(content.len() as u64);
        builder.append_data(&mut header, name, content).unwrap();
    }
    builder.into_inner().unwrap()
}

/// A tar of `files` files of about `size` bytes each in a few directories.
pub fn sample_tar(files: u64, size: usize) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for number in 0..files {
        if number % 10 == 0 {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(tar::EntryType::Directory);
            header.set_mode(0o755);
            header.set_size(0);
            header.set_mtime(1_600_000_000);
            builder.append_data(&mut header, format!("dir{}/", number / 10), &[][..]).unwrap();
        }
        let content = noise(number + 1, size + usize::try_from(number % 7).unwrap() * 100);
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(content.len() as u64);
        header.set_mtime(1_600_000_000 + number);
        builder.append_data(&mut header, format!("dir{}/file{number}", number / 10), &content[..]).unwrap();
    }
    builder.into_inner().unwrap()
}

/// A policy with short times, so that failing tests do not take minutes.
pub fn quick() -> Policy {
    Policy {
        read_deadline: Duration::from_millis(500),
        stall_limit: Duration::from_millis(200),
        flight_limit: Duration::from_secs(2),
        ..Policy::default()
    }
}

/// No reading ahead, so that requests can be counted.
pub fn plain_policy() -> Policy {
    Policy { ahead_bytes_max: 0, ..Policy::default() }
}

/// Where the golden layers are, or `None`, loudly.
pub fn golden() -> Option<PathBuf> {
    let beside = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/golden"));
    let root = std::env::var_os("SOCI_GOLDEN").map_or(beside, PathBuf::from);
    if root.is_dir() {
        return Some(root);
    }
    eprintln!("SKIPPED: no golden data at {}; set SOCI_GOLDEN", root.display());
    None
}

pub fn gunzip(blob: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut tar = Vec::new();
    flate2::read::MultiGzDecoder::new(blob).read_to_end(&mut tar)?;
    Ok(tar)
}
