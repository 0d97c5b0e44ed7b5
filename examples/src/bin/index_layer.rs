//! Indexes one gzip layer and writes its zTOC: `index_layer LAYER.tar.gz OUT.ztoc`.

use std::fs::File;
use std::io::{BufWriter, Write};

use anyhow::Context;
use soci_index::format::index::Compression;
use soci_index::format::limits::Limits;
use soci_index::indexing::pipeline::index_reader;
use soci_index::indexing::{Options, SPAN_BYTES};

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args_os().skip(1);
    let layer = arguments.next().context("usage: index_layer LAYER.tar.gz OUT.ztoc")?;
    let out = arguments.next().context("usage: index_layer LAYER.tar.gz OUT.ztoc")?;
    let options =
        Options { compression: Compression::Gzip, span_bytes: SPAN_BYTES, compact: None, limits: Limits::DEFAULT };
    let indexed = index_reader(File::open(layer)?, options, &mut |_| {})?;
    println!("layer {}, diff_id {}", indexed.layer_digest, indexed.diff_id);
    println!("{} files, {} spans", indexed.entries().len(), indexed.index.spans.len());
    let encoded = indexed.into_ztoc()?.encode()?;
    let mut file = BufWriter::new(File::create(out)?);
    encoded.pieces().try_for_each(|piece| file.write_all(&piece))?;
    Ok(file.flush()?)
}
