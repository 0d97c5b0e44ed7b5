//! Inflates a layer, reads its tar, sets checkpoints.

use crate::format::checkpoint::{Checkpoint, WINDOW_BYTES, Window};
use crate::format::gzip::{Event, Gzip, GzipError};
use crate::format::index::Compression;
use crate::format::tar::{Table, TarReader};
use crate::indexing::choice::{Candidate, Zones};
use crate::indexing::{IndexError, Options};

/// Output that one pass through the buffer takes. Small enough for the second-level cache, which tar reader and hasher
/// then read it from.
const OUTPUT_BYTES: usize = 256 << 10;

/// What the scanner found.
#[derive(Debug)]
pub(crate) struct Scan {
    /// The files.
    pub table: Table,
    /// One per span of a gzip layer; none for plain tar.
    pub checkpoints: Vec<Checkpoint>,
    /// Size of the layer blob.
    pub compressed_bytes: u64,
}

/// Where a span's compressed bytes begin, relative to the piece of input that was just pushed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cut {
    /// Offset in the piece of the first byte that belongs to the new span alone.
    pub at: usize,
    /// Whether the byte before it belongs to both spans.
    pub shared: bool,
    /// Whether the span before is to be forgotten: it held no output.
    pub replaces: bool,
}

/// What the hasher has to know of a piece of input.
#[derive(Debug, Default)]
pub(crate) struct Marks {
    /// Where spans begin.
    pub cuts: Vec<Cut>,
    /// Where spans of a span index may begin, if there is to be one.
    pub candidates: Vec<Candidate>,
    /// Bytes of output up to the end of the piece.
    pub produced: u64,
}

/// See [`super`].
#[derive(Debug)]
pub(crate) struct Scanner {
    options: Options,
    tar: TarReader,
    compressed_bytes: u64,
    form: Form,
}

#[derive(Debug)]
enum Form {
    Gzip(Box<GzipForm>),
    /// Bytes until the next span begins.
    Plain {
        left: u64,
        spans: usize,
    },
}

#[derive(Debug)]
struct GzipForm {
    decoder: Gzip,
    checkpoints: Vec<Checkpoint>,
    /// The last [`WINDOW_BYTES`] of output, then new output.
    buffer: Vec<u8>,
    filled: usize,
    /// All output so far.
    produced: u64,
    /// For a span index.
    zones: Option<Zones>,
}

impl Scanner {
    /// Starts a layer.
    ///
    /// # Errors
    /// [`IndexError::SpanSize`].
    pub(crate) fn new(options: Options) -> Result<Self, IndexError> {
        let plain = options.compression == Compression::None;
        if options.span_bytes > i64::MAX.cast_unsigned() || (plain && options.span_bytes == 0) {
            return Err(IndexError::SpanSize { span_bytes: options.span_bytes });
        }
        if let Some(span_bytes) = options.compact.filter(|span_bytes| !(1..=1 << 40).contains(span_bytes)) {
            return Err(IndexError::CompactSpanSize { span_bytes });
        }
        let form = if plain {
            Form::Plain { left: 0, spans: 0 }
        } else {
            Form::Gzip(Box::new(GzipForm {
                decoder: Gzip::new(),
                checkpoints: Vec::new(),
                buffer: vec![0; WINDOW_BYTES + OUTPUT_BYTES],
                filled: WINDOW_BYTES,
                produced: 0,
                zones: options.compact.map(Zones::new),
            }))
        };
        Ok(Self { options, tar: TarReader::new(options.limits), compressed_bytes: 0, form })
    }

    /// Takes the next bytes of the layer, hands their output to `tar`, and says where in `input` spans begin.
    ///
    /// # Errors
    /// [`IndexError`]; the scanner is of no use afterwards.
    pub(crate) fn push(&mut self, input: &[u8], tar: &mut dyn FnMut(&[u8])) -> Result<Marks, IndexError> {
        let start = self.compressed_bytes;
        self.compressed_bytes += input.len() as u64;
        match &mut self.form {
            Form::Plain { left, spans } => {
                self.tar.push(input)?;
                tar(input);
                let cuts = plain_cuts(input.len(), left, self.options.span_bytes);
                *spans += cuts.len();
                check_count(*spans, &self.options)?;
                Ok(Marks { cuts, produced: self.compressed_bytes, ..Marks::default() })
            }
            Form::Gzip(form) => form.push(input, start, &mut self.tar, tar, &self.options),
        }
    }

    /// Ends the layer.
    ///
    /// # Errors
    /// [`IndexError`] when it ends too early.
    pub(crate) fn finish(self) -> Result<Scan, IndexError> {
        let checkpoints = match self.form {
            Form::Plain { .. } => Vec::new(),
            Form::Gzip(form) => {
                form.decoder.finish()?;
                form.checkpoints
            }
        };
        Ok(Scan { table: self.tar.finish()?, checkpoints, compressed_bytes: self.compressed_bytes })
    }
}

fn check_count(count: usize, options: &Options) -> Result<(), IndexError> {
    let cap = options.limits.spans_max;
    if count > cap { Err(IndexError::Spans { cap, span_bytes: options.span_bytes }) } else { Ok(()) }
}

fn plain_cuts(length: usize, left: &mut u64, span_bytes: u64) -> Vec<Cut> {
    let mut cuts = Vec::new();
    let mut at = *left;
    while at < length as u64 {
        cuts.push(Cut { at: at as usize, shared: false, replaces: false });
        at += span_bytes;
    }
    *left = at - length as u64;
    cuts
}

impl GzipForm {
    fn push(
        &mut self,
        input: &[u8],
        start: u64,
        reader: &mut TarReader,
        tar: &mut dyn FnMut(&[u8]),
        options: &Options,
    ) -> Result<Marks, IndexError> {
        let (mut marks, mut at) = (Marks::default(), 0);
        loop {
            if self.filled == self.buffer.len() {
                self.buffer.copy_within(OUTPUT_BYTES.., 0);
                self.filled = WINDOW_BYTES;
            }
            let step = self.decoder.step(&input[at..], &mut self.buffer[self.filled..])?;
            at += step.consumed;
            let output = &self.buffer[self.filled..self.filled + step.produced];
            if !output.is_empty() {
                reader.push(output)?;
                tar(output);
            }
            self.filled += step.produced;
            self.produced += step.produced as u64;
            if let Event::Boundary { compressed, bits } = step.event {
                marks.candidates.extend(self.candidate(compressed, bits, reader, options));
                if let Some(replaces) = self.boundary(compressed, bits, options)? {
                    marks.cuts.push(Cut { at: (compressed - start) as usize, shared: bits > 0, replaces });
                }
            }
            if step.event == Event::More && step.produced == 0 {
                if at == input.len() {
                    marks.produced = self.produced;
                    return Ok(marks);
                }
                if step.consumed == 0 {
                    return Err(GzipError::Deflate { offset: self.decoder.offset() }.into());
                }
            }
        }
    }

    /// The boundary as one at which a span of a span index may begin, if it is near enough to where one should.
    fn candidate(&mut self, compressed: u64, bits: u8, reader: &TarReader, options: &Options) -> Option<Candidate> {
        let (zones, span_bytes) = (self.zones.as_mut()?, options.compact?);
        let window = self.buffer[self.filled - WINDOW_BYTES..self.filled].first_chunk()?;
        zones.wants(self.produced).then(|| Candidate {
            compressed,
            uncompressed: self.produced,
            bits,
            cuts_file: reader.inside().is_some_and(|size| size < span_bytes),
            window: Box::new(*window),
        })
    }

    /// Sets a checkpoint if one is due; says so, and whether it takes the place of the last one.
    fn boundary(&mut self, compressed: u64, bits: u8, options: &Options) -> Result<Option<bool>, IndexError> {
        let replaces = match self.checkpoints.last() {
            None => false,
            Some(last) if self.produced == 0 && last.uncompressed == 0 => true,
            Some(last) if self.produced - last.uncompressed > options.span_bytes => false,
            Some(_) => return Ok(None),
        };
        if replaces {
            self.checkpoints.pop();
        }
        check_count(self.checkpoints.len() + 1, options)?;
        let window = self.buffer[self.filled - WINDOW_BYTES..self.filled].first_chunk();
        let window = window.map_or(Window::EMPTY, Window::pack);
        self.checkpoints.push(Checkpoint { compressed, uncompressed: self.produced, bits, window });
        Ok(Some(replaces))
    }
}
