//! Access logs: which bytes of which layers a start-up read, in order, with the borders of the files they belong to.
//!
//! A log is text, a record a line, `#` before remarks:
//!
//! | line | what |
//! |---|---|
//! | `layer COMPRESSED:UNCOMPRESSED ...` | a layer, by the bytes of its spans; layers are numbered from 0 |
//! | `read LAYER FIRST END FILE_FIRST FILE_END` | a read of the spans from `FIRST` to before `END`, of a file that lies in the spans from `FILE_FIRST` to before `FILE_END` |
//!
//! It is made of a profile, as `soci record` writes it, and the layers. A profile tells of each page once and joins what
//! follows each other, so a log has its first touches only, in pieces of what the kernel asks for at once.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs::File;
use std::ops::Range;
use std::path::Path;

use anyhow::Context;
use soci_index::format::index::{Compression, LayerIndex};
use soci_index::format::limits::Limits;
use soci_index::format::profile::Profile;
use soci_index::indexing::Options;
use soci_index::indexing::pipeline::index_reader;

/// Bytes that the kernel asks of a file system at once.
const READ_BYTES: u64 = 128 << 10;

/// Uncompressed bytes of a span in a log.
const SPAN_BYTES: u64 = soci_index::format::compact::SPAN_BYTES;

/// What was read, and of what.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Log {
    /// Per layer and span, its compressed and uncompressed bytes.
    pub layers: Vec<Vec<(u64, u64)>>,
    /// The reads, in order.
    pub reads: Vec<Read>,
}

/// One read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Read {
    /// Number of the layer.
    pub layer: usize,
    /// The spans that were needed.
    pub spans: Range<u32>,
    /// The spans of the file.
    pub file: Range<u32>,
}

impl Log {
    /// Reads the text.
    ///
    /// # Errors
    /// When a line is none of the above.
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        let mut log = Self::default();
        for (number, line) in text.lines().enumerate() {
            let words: Vec<&str> = line.split_whitespace().collect();
            let parsed = match words.as_slice() {
                [] => continue,
                [first, ..] if first.starts_with('#') => continue,
                ["layer", spans @ ..] => layer(spans).map(|spans| log.layers.push(spans)),
                ["read", numbers @ ..] => read(numbers, &log.layers).map(|read| log.reads.push(read)),
                _ => None,
            };
            parsed.with_context(|| format!("line {} is neither a layer nor a read of one: {line}", number + 1))?;
        }
        Ok(log)
    }

    /// The text.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = String::new();
        for layer in &self.layers {
            text.push_str("layer");
            for (compressed, uncompressed) in layer {
                let _ = write!(text, " {compressed}:{uncompressed}");
            }
            text.push('\n');
        }
        for Read { layer, spans, file } in &self.reads {
            let _ = writeln!(text, "read {layer} {} {} {} {}", spans.start, spans.end, file.start, file.end);
        }
        text
    }

    /// Makes a log of a profile; `layers` are files with the layers it speaks of.
    ///
    /// # Errors
    /// When a file cannot be read, or the profile is none, or speaks of a layer that is not there.
    pub fn of_profile(profile: &Path, layers: &[String]) -> anyhow::Result<Self> {
        let limits = Limits::DEFAULT;
        let profile = Profile::decode(&std::fs::read(profile)?, &limits)?;
        let options = Options { compression: Compression::Gzip, span_bytes: SPAN_BYTES, compact: None, limits };
        let mut indexes = HashMap::new();
        for layer in layers {
            let file = File::open(layer).with_context(|| format!("opening {layer}"))?;
            let indexed = index_reader(file, options, &mut |_| {})?;
            indexes.insert(indexed.layer_digest, indexed.index);
        }
        let found = |digest| indexes.get(digest).with_context(|| format!("layer {digest} is not among the files"));
        let indexes = profile.layers().iter().map(found).collect::<anyhow::Result<Vec<&LayerIndex>>>()?;
        let sizes = |index: &&LayerIndex| {
            let length = |range: &Range<u64>| range.end - range.start;
            index.spans.spans().iter().map(|span| (length(&span.compressed), length(&span.uncompressed))).collect()
        };
        let mut log = Self { layers: indexes.iter().map(sizes).collect(), reads: Vec::new() };
        for range in profile.ranges() {
            let index = indexes[range.layer as usize];
            let mut from = range.bytes.start;
            while from < range.bytes.end.min(index.uncompressed_size) {
                let to = (from + READ_BYTES).min(range.bytes.end).min(index.uncompressed_size);
                let file = file_at(index, from).unwrap_or(from..to);
                let (spans, file) = (index.spans.covering(from..to), index.spans.covering(file));
                let read = Read { layer: range.layer as usize, spans, file };
                if log.reads.last() != Some(&read) {
                    log.reads.push(read);
                }
                from = to;
            }
        }
        Ok(log)
    }
}

/// The bytes of the file that `offset` is in. Entries are in the order of the tar.
fn file_at(index: &LayerIndex, offset: u64) -> Option<Range<u64>> {
    let behind = index.entries.partition_point(|entry| entry.header_offset <= offset);
    let entry = index.entries.get(behind.checked_sub(1)?)?;
    Some(entry.header_offset..index.entries.get(behind).map_or(index.uncompressed_size, |next| next.header_offset))
}

fn layer(spans: &[&str]) -> Option<Vec<(u64, u64)>> {
    let span =
        |word: &&str| word.split_once(':').and_then(|(one, other)| Some((one.parse().ok()?, other.parse().ok()?)));
    spans.iter().map(span).collect()
}

fn read(numbers: &[&str], layers: &[Vec<(u64, u64)>]) -> Option<Read> {
    let numbers: Vec<u32> = numbers.iter().map(|word| word.parse().ok()).collect::<Option<_>>()?;
    let [layer, first, end, file_first, file_end] = numbers[..] else { return None };
    let count = layers.get(layer as usize)?.len();
    let is_good = first < end && end as usize <= count && file_first <= file_end && file_end as usize <= count;
    is_good.then_some(Read { layer: layer as usize, spans: first..end, file: file_first..file_end })
}
