//! Decoding one span: compressed bytes in, checked uncompressed bytes out.
//!
//! Three things must match before a span's bytes may leave the decoder: the SHA-256 of the compressed bytes, the number
//! of bytes they yield, and, unless it is the last span, the place where its last block ends: exactly the next
//! checkpoint. The third check is what a shifted checkpoint does not survive: the digest of the compressed bytes alone
//! says nothing about where their output belongs.

use sha2::{Digest as _, Sha256};

use crate::format::checkpoint::Window;
use crate::format::class::{Class, Classified};
use crate::format::digest::hex;
use crate::format::gzip::{Event, Gzip, GzipError};
use crate::format::index::{Compression, LayerIndex};
use crate::format::span::{Span, SpanId};

/// Why a span could not be decoded, or is not what the index says.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The layer has no such span.
    #[error("the layer has {count} spans, there is no span {span}")]
    NoSuchSpan { span: SpanId, count: usize },
    /// The span's window is not part of the index.
    #[error("span {span}: its window has to be fetched first")]
    NoWindow { span: SpanId },
    /// The compressed bytes are not the ones that were indexed.
    #[error("span {span}: the compressed bytes have SHA-256 {found}, the index says {expected}")]
    Digest {
        span: SpanId,
        /// Hex digest of the index; `none` when it has no usable one.
        expected: String,
        /// Hex digest of the bytes.
        found: String,
    },
    /// More or fewer compressed bytes were given than the span has.
    #[error("span {span}: got {found} compressed bytes, expected {expected}")]
    Input { span: SpanId, expected: u64, found: u64 },
    /// The bytes are no gzip data, or the checkpoint is not where it says.
    #[error("span {span} cannot be decoded: {source}")]
    Gzip { span: SpanId, source: GzipError },
    /// The span ends elsewhere than the index says.
    #[error("span {span} ends after {found} bytes of output, or not at a checkpoint; the index says {expected}")]
    End { span: SpanId, expected: u64, found: u64 },
}

impl Classified for DecodeError {
    fn class(&self) -> Class {
        Class::Content
    }
}

/// Decodes one span from its compressed bytes as they arrive.
///
/// Output of [`SpanDecoder::push`] must not be used before [`SpanDecoder::finish`] has succeeded.
#[derive(Debug)]
pub struct SpanDecoder {
    id: SpanId,
    span: Span,
    hash: Sha256,
    taken: u64,
    produced: u64,
    form: Form,
}

#[derive(Debug)]
enum Form {
    Plain,
    Gzip { decoder: Box<Gzip>, buffer: Vec<u8>, end: End },
}

/// Where the output of a gzip span ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// At the end of the layer's tar: what follows in the stream is padding.
    Tar,
    /// At the next checkpoint: this offset in the layer, these bits.
    Checkpoint { compressed: u64, bits: u8, reached: bool },
}

/// Room for the output of one step.
const BUFFER_BYTES: usize = 128 << 10;

impl SpanDecoder {
    /// Begins with a span whose window is part of the index, or not needed.
    ///
    /// # Errors
    /// [`DecodeError::NoSuchSpan`], [`DecodeError::NoWindow`].
    pub(crate) fn new(index: &LayerIndex, id: SpanId) -> Result<Self, DecodeError> {
        let window = index.window(id).ok_or(DecodeError::NoWindow { span: id })?;
        Self::with_window(index, id, window)
    }

    /// Begins with a span whose window was fetched, or is the end of what came before.
    ///
    /// # Errors
    /// [`DecodeError::NoSuchSpan`].
    pub fn with_window(index: &LayerIndex, id: SpanId, window: &Window) -> Result<Self, DecodeError> {
        let no_such = DecodeError::NoSuchSpan { span: id, count: index.spans.len() };
        let span = index.spans.span(id).ok_or(no_such)?.clone();
        let form = match index.compression {
            Compression::None => Form::Plain,
            Compression::Gzip => {
                let end = match index.spans.span(id + 1) {
                    Some(next) => End::Checkpoint { compressed: span.compressed.end, bits: next.bits, reached: false },
                    None => End::Tar,
                };
                let window = (span.uncompressed.start > 0).then_some(window);
                let decoder = Box::new(Gzip::resume(span.compressed.start, span.bits, window));
                Form::Gzip { decoder, buffer: vec![0; BUFFER_BYTES], end }
            }
        };
        Ok(Self { id, span, hash: Sha256::new(), taken: 0, produced: 0, form })
    }

    /// Takes the next bytes of the span's compressed range and appends what they decode to.
    ///
    /// # Errors
    /// [`DecodeError`] when the bytes are no deflate data. Never appends more than the span holds.
    pub fn push(&mut self, input: &[u8], output: &mut Vec<u8>) -> Result<(), DecodeError> {
        let expected = self.span.compressed.end - self.span.compressed.start;
        self.taken += input.len() as u64;
        if self.taken > expected {
            return Err(DecodeError::Input { span: self.id, expected, found: self.taken });
        }
        self.hash.update(input);
        let wanted = self.span.uncompressed.end - self.span.uncompressed.start;
        match &mut self.form {
            Form::Plain => {
                output.extend_from_slice(input);
                self.produced += input.len() as u64;
            }
            Form::Gzip { decoder, buffer, end } => {
                let mut run = Run { decoder, buffer, end, produced: &mut self.produced, wanted };
                run.push(input, output).map_err(|source| DecodeError::Gzip { span: self.id, source })?;
            }
        }
        Ok(())
    }

    /// Checks digest, length and end.
    ///
    /// # Errors
    /// [`DecodeError`] when one of them is not what the index says.
    pub fn finish(self) -> Result<(), DecodeError> {
        let (span, expected) = (self.id, self.span.compressed.end - self.span.compressed.start);
        if self.taken != expected {
            return Err(DecodeError::Input { span, expected, found: self.taken });
        }
        let found: [u8; 32] = self.hash.finalize().into();
        if self.span.digest != Some(found) {
            let expected = self.span.digest.map_or_else(|| "none".to_owned(), |digest| hex(&digest));
            return Err(DecodeError::Digest { span, expected, found: hex(&found) });
        }
        let expected = self.span.uncompressed.end - self.span.uncompressed.start;
        let at_end = match self.form {
            Form::Gzip { end: End::Checkpoint { reached, .. }, .. } => reached,
            Form::Gzip { end: End::Tar, .. } | Form::Plain => true,
        };
        if self.produced != expected || !at_end {
            return Err(DecodeError::End { span, expected, found: self.produced });
        }
        Ok(())
    }
}

/// Decodes a span whose compressed bytes are all at hand.
///
/// # Errors
/// [`DecodeError`], see [`SpanDecoder`].
pub fn decode_span(index: &LayerIndex, id: SpanId, compressed: &[u8]) -> Result<Vec<u8>, DecodeError> {
    let mut decoder = SpanDecoder::new(index, id)?;
    let mut output = Vec::new();
    decoder.push(compressed, &mut output)?;
    decoder.finish()?;
    Ok(output)
}

/// The parts of a gzip decoding that change together.
struct Run<'a> {
    decoder: &'a mut Gzip,
    buffer: &'a mut [u8],
    end: &'a mut End,
    produced: &'a mut u64,
    wanted: u64,
}

impl Run<'_> {
    fn push(&mut self, mut input: &[u8], output: &mut Vec<u8>) -> Result<(), GzipError> {
        loop {
            let left = self.wanted - *self.produced;
            // At the tar's end the rest of the stream does not matter. At a checkpoint it does: the block must end.
            if left == 0 && (*self.end == End::Tar || self.reached()) {
                return Ok(());
            }
            let room = usize::try_from(left).unwrap_or(usize::MAX).min(self.buffer.len());
            let step = self.decoder.step(input, &mut self.buffer[..room])?;
            output.extend_from_slice(&self.buffer[..step.produced]);
            *self.produced += step.produced as u64;
            input = &input[step.consumed..];
            if let (Event::Boundary { compressed, bits }, End::Checkpoint { compressed: c, bits: b, reached }) =
                (step.event, &mut *self.end)
            {
                *reached = (compressed, bits) == (*c, *b) && *self.produced == self.wanted;
            }
            if step.event == Event::More && step.produced == 0 && (input.is_empty() || step.consumed == 0) {
                return Ok(());
            }
        }
    }

    const fn reached(&self) -> bool {
        matches!(self.end, End::Checkpoint { reached: true, .. })
    }
}
