//! What it costs to prove a layer, with its file table, beside hashing the same bytes.

use std::io::Read as _;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, ensure};
use soci_fs::layer::proof::{self, Verdict};
use soci_fs::layer::reader::{LayerReader, Policy};
use soci_fs::layer::source::memory::MemorySource;
use soci_fs::layer::store::{Claim, Store};
use soci_index::format::digest::{Digest, Hasher};
use soci_index::format::index::Compression;
use soci_index::indexing::{Options, index_bytes};
use tokio::runtime::Runtime;

use crate::report::{Goal, Pairs, Report};

const ROUNDS: usize = 5;
/// Files of a layer and bytes of each: as in a system's image, and as in one of many small sources.
const SHAPES: [(u32, usize); 2] = [(20_000, 25_000), (150_000, 1_000)];

/// The proof of layers that are on disk, in units of SHA-256 of the same files.
pub(crate) fn proof(runtime: &Runtime, report: &mut Report) -> anyhow::Result<()> {
    for (files, size) in SHAPES {
        let tar = layer(files, size)?;
        let blob = {
            let mut encoder = flate2::read::GzEncoder::new(&tar[..], flate2::Compression::fast());
            let mut blob = Vec::new();
            encoder.read_to_end(&mut blob)?;
            bytes::Bytes::from(blob)
        };
        let index = Arc::new(index_bytes(&blob, Options::of(Compression::Gzip))?.index);
        let (digest, diff_id) = (Digest::of(&blob), Digest::of(&tar));
        let claim = Claim { table: Some(Digest::of(b"the table")), ..Claim::whole(digest, diff_id) };
        let mut pairs = Pairs::default();
        for _ in 0..ROUNDS {
            let scratch = tempfile::Builder::new().prefix("soci-bench-proof-").tempdir()?;
            let kept = Store::open(scratch.path())?.layer(&claim, &index)?;
            let data = kept.directory().join("data");
            let source = Arc::new(MemorySource::new(blob.clone()));
            let reader =
                LayerReader::new(digest, Arc::clone(&index), kept, source, Policy::default(), runtime.handle());
            runtime.block_on(reader.fetching().complete())?;
            let start = Instant::now();
            ensure!(hash(&data)? == diff_id, "the store has other bytes");
            let hashed = start.elapsed().as_secs_f64();
            let start = Instant::now();
            let verdict = runtime.block_on(proof::by_data(&reader, diff_id))?;
            let proven = start.elapsed().as_secs_f64();
            ensure!(verdict == Verdict::Proven, "{verdict:?}");
            pairs.push(proven * 1000.0, hashed * 1000.0);
        }
        let what = format!("proof of {files} files, {} MB", tar.len() / 1_000_000);
        report.add(format!("{what}: time, in units of SHA-256 of the same"), Goal::AtMost(1.2), "", pairs.ratios);
        report.add(what, Goal::None, "ms", pairs.ours);
    }
    Ok(())
}

fn hash(path: &std::path::Path) -> anyhow::Result<Digest> {
    let mut file = std::fs::File::open(path).with_context(|| path.display().to_string())?;
    let (mut hasher, mut buffer) = (Hasher::new(soci_index::format::digest::Algorithm::Sha256), vec![0; 1 << 20]);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hasher.finish()),
            length => hasher.update(&buffer[..length]),
        }
    }
}

/// Files of words that compress about as programs do.
fn layer(files: u32, size: usize) -> anyhow::Result<Vec<u8>> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut state = 1_u64;
    for number in 0..files {
        let mut content = Vec::with_capacity(size + 8);
        while content.len() < size {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            content.extend_from_slice(format!("{:x} ", state >> 44).as_bytes());
        }
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(content.len() as u64);
        builder.append_data(&mut header, format!("usr/lib/d{}/file{number}", number % 100), &content[..])?;
    }
    Ok(builder.into_inner()?)
}
