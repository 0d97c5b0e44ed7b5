//! Prints one file of a gzip layer by its zTOC, decoding only the spans that hold it:
//! `read_file LAYER.tar.gz LAYER.ztoc usr/bin/env > env`.
//!
//! The closure is all that random access needs: here it reads ranges of a local file, it could as well ask a server.

use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use anyhow::Context;
use bytes::Bytes;
use soci_index::format::access::LayerReader;
use soci_index::format::limits::Limits;
use soci_index::format::ztoc::Ztoc;

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [layer, ztoc, name] = &arguments[..] else { anyhow::bail!("usage: read_file LAYER.tar.gz LAYER.ztoc NAME") };
    let layer = File::open(layer)?;
    let ztoc = Ztoc::decode(&Bytes::from(std::fs::read(ztoc)?), &Limits::DEFAULT)?;
    let index = ztoc.into_index(layer.metadata()?.len(), &Limits::DEFAULT)?;
    let entry = index.entries.iter().rfind(|entry| *entry.name == *name.as_bytes()).context("no such file")?;

    let mut ranges = 0;
    let fetch = |range: Range<u64>| {
        ranges += 1;
        let mut buffer = vec![0; usize::try_from(range.end - range.start).map_err(std::io::Error::other)?];
        layer.read_exact_at(&mut buffer, range.start)?;
        Ok::<_, std::io::Error>(Bytes::from(buffer))
    };
    let mut content = Vec::new();
    LayerReader::new(&index, fetch).read_file(entry, 0..entry.size, &mut |piece| content.extend_from_slice(piece))?;
    std::io::stdout().write_all(&content)?;
    eprintln!("{} bytes from {ranges} of {} spans", content.len(), index.spans.len());
    Ok(())
}
