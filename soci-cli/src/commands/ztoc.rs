//! `soci ztoc`: indexes of single layers, on files.

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use bytes::Bytes;
use serde::Serialize;
use soci_index::format::entry::Entry;
use soci_index::format::gojson::quote;
use soci_index::format::index::Compression;
use soci_index::format::limits::Limits;
use soci_index::format::ztoc::{Ztoc, kind_name};
use soci_index::image::output::Output;
use soci_index::indexing::Options;
use soci_index::indexing::pipeline::index_reader;

use crate::report::exit::{Exit, fail};
use crate::report::output;
use crate::report::progress::Progress;

pub mod get_file;

/// `ztoc create`: indexes the layer in one pass.
///
/// # Errors
/// When the layer cannot be read or indexed, or the output not written. No partial file is left.
pub fn create(layer: &Path, out: &Path, span_bytes: u64, json: bool) -> anyhow::Result<()> {
    let shown = layer.display();
    let stdin = layer == Path::new("-");
    let (reader, size): (Box<dyn std::io::Read>, Option<u64>) = if stdin {
        (Box::new(std::io::stdin().lock()), None)
    } else {
        let file = File::open(layer).with_context(|| format!("opening the layer {shown}"))?;
        let size = file.metadata().ok().map(|metadata| metadata.len());
        (Box::new(file), size)
    };
    let mut reader = BufReader::with_capacity(256 << 10, reader);
    let start = reader.fill_buf().with_context(|| format!("reading the layer {shown}"))?;
    let compression = compression(start).with_context(|| format!("the layer {shown}"))?;
    let options = Options { compression, span_bytes, compact: None, limits: Limits::DEFAULT };
    let progress = Progress::bytes(&format!("indexing {shown}"), size);
    let indexed = index_reader(reader, options, &mut |bytes| progress.at(bytes));
    let indexed = indexed.with_context(|| format!("indexing the layer {shown}"))?;
    progress.finish();
    let mut summary = Summary {
        layer_digest: indexed.layer_digest.to_string(),
        diff_id: indexed.diff_id.to_string(),
        layer_size: indexed.index.compressed_size,
        files: indexed.entries().len(),
        spans: indexed.index.spans.len(),
        ztoc_digest: String::new(),
        ztoc_size: 0,
    };
    let ztoc = indexed.into_ztoc().map_err(|obstacle| fail(Exit::BadContent, obstacle.to_string()));
    let ztoc = ztoc.with_context(|| format!("the layer {shown} has no zTOC"))?;
    let encoded = ztoc.encode().map_err(|error| fail(Exit::BadContent, error.to_string()))?;
    drop(ztoc);
    (summary.ztoc_digest, summary.ztoc_size) = (encoded.digest().to_string(), encoded.len());
    write_whole(out, encoded.pieces()).with_context(|| format!("writing {}", out.display()))?;
    if json {
        // With the zTOC itself on standard output there is no room for a second document.
        let is_taken = out == Path::new("-") || soci_index::image::output::is_standard_output(out);
        return if is_taken { Ok(()) } else { output::json(&summary) };
    }
    if out != Path::new("-") {
        output::line_beside(out, format!("layer {} -> ztoc {}", summary.layer_digest, summary.ztoc_digest))?;
    }
    Ok(())
}

/// What `ztoc create --json` prints.
#[derive(Debug, Serialize)]
struct Summary {
    layer_digest: String,
    diff_id: String,
    layer_size: u64,
    files: usize,
    spans: usize,
    ztoc_digest: String,
    ztoc_size: u64,
}

/// How a layer that begins with these bytes is compressed.
fn compression(start: &[u8]) -> anyhow::Result<Compression> {
    match start {
        [0x1f, 0x8b, ..] => Ok(Compression::Gzip),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Err(fail(
            Exit::BadContent,
            "is compressed with zstd, which has no place to begin decoding in the middle; soci mount reads it whole",
        )),
        _ => Ok(Compression::None),
    }
}

/// Writes pieces to standard output (`-`) or to an output file.
pub(super) fn write_whole(path: &Path, mut pieces: impl Iterator<Item = Bytes>) -> anyhow::Result<()> {
    if path == Path::new("-") {
        return pieces.try_for_each(|piece| output::bytes(&piece));
    }
    let mut writer = BufWriter::new(Output::create(path)?);
    for piece in pieces {
        writer.write_all(&piece)?;
    }
    Ok(writer.into_inner().map_err(std::io::IntoInnerError::into_error)?.finish()?)
}

/// `ztoc info` of a file.
///
/// # Errors
/// When it is no zTOC.
pub fn info(bytes: &Bytes) -> anyhow::Result<()> {
    output::line(info_text(bytes)?)
}

/// The document that `ztoc info` prints: the same, to the byte, as AWS's tool.
///
/// # Errors
/// When the bytes are no zTOC.
pub fn info_text(bytes: &Bytes) -> anyhow::Result<String> {
    let ztoc = Ztoc::decode(bytes, &Limits::DEFAULT)?;
    let spans =
        |entry: &Entry| (ztoc.span_of(entry.data_offset), ztoc.span_of(entry.data_offset.saturating_add(entry.size)));
    let files: Vec<String> = ztoc.entries.iter().map(|entry| file_text(entry, spans(entry))).collect();
    let several = ztoc.entries.iter().map(spans).filter(|(first, last)| first != last).count();
    let files = if files.is_empty() { "null".to_owned() } else { format!("[\n{}\n  ]", files.join(",\n")) };
    Ok(format!(
        "{{\n  \"version\": {},\n  \"build_tool\": {},\n  \"size\": {},\n  \"span_size\": {},\n  \"num_spans\": {},\n  \
         \"num_files\": {},\n  \"num_multi_span_files\": {several},\n  \"files\": {files}\n}}",
        quote(ztoc.version.as_bytes()),
        quote(ztoc.build_tool.as_bytes()),
        bytes.len(),
        ztoc.span_bytes(),
        i64::from(ztoc.max_span_id) + 1,
        ztoc.entries.len(),
    ))
}

fn file_text(entry: &Entry, (first, last): (u32, u32)) -> String {
    format!(
        "    {{\n      \"filename\": {},\n      \"offset\": {},\n      \"size\": {},\n      \"type\": \"{}\",\n      \
         \"start_span\": {first},\n      \"end_span\": {last}\n    }}",
        quote(&entry.name),
        entry.data_offset,
        entry.size,
        kind_name(entry.kind),
    )
}

/// Reads a zTOC file.
///
/// # Errors
/// When it cannot be read, or is larger than any zTOC.
pub fn read_file(path: &PathBuf) -> anyhow::Result<Bytes> {
    let size = std::fs::metadata(path).with_context(|| format!("opening the zTOC {}", path.display()))?.len();
    if size > Limits::DEFAULT.ztoc_bytes_max {
        return Err(fail(Exit::BadContent, format!("{} is too large for a zTOC ({size} bytes)", path.display())));
    }
    Ok(Bytes::from(std::fs::read(path).with_context(|| format!("reading the zTOC {}", path.display()))?))
}
