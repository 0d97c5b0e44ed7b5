//! Digests of a layer, of its uncompressed stream and of every span.

use sha2::{Digest as _, Sha256};

use crate::format::compact::EncodeError;
use crate::format::digest::Digest;
use crate::format::index::Compression;
use crate::indexing::Options;
use crate::indexing::choice::{Chooser, Chosen, Pieces};
use crate::indexing::scanner::Marks;

/// What the hasher found.
#[derive(Debug, Clone)]
pub(crate) struct Hashed {
    /// Digest of the layer blob.
    pub layer: Digest,
    /// Digest of the uncompressed stream.
    pub stream: Digest,
    /// Length of the uncompressed stream.
    pub stream_bytes: u64,
    /// SHA-256 of each span's compressed bytes.
    pub spans: Vec<[u8; 32]>,
    /// The spans of the span index, if it was asked for.
    pub compact: Option<Result<Chosen, EncodeError>>,
}

/// Computes the digests from what the scanner hands on: each piece of input with its cuts, each piece of output.
#[derive(Debug)]
pub(crate) struct Hasher {
    layer: Sha256,
    stream: Sha256,
    stream_bytes: u64,
    spans: Vec<[u8; 32]>,
    /// The span that is being hashed; none before the first.
    span: Option<Sha256>,
    last_byte: u8,
    compact: Option<Compact>,
}

/// Spans of a span index in the making.
#[derive(Debug)]
enum Compact {
    Gzip(Box<Chooser>),
    Plain(Pieces),
}

impl Hasher {
    /// Starts a layer.
    #[must_use]
    pub(crate) fn new(options: &Options) -> Self {
        let (layer, stream) = (Sha256::new(), Sha256::new());
        let compact = options.compact.map(|span_bytes| match options.compression {
            Compression::Gzip => Compact::Gzip(Box::new(Chooser::new(span_bytes, options.limits.spans_max))),
            Compression::None => Compact::Plain(Pieces::new(span_bytes)),
        });
        Self { layer, stream, stream_bytes: 0, spans: Vec::new(), span: None, last_byte: 0, compact }
    }

    /// The next piece of the layer blob, and where in it spans begin or may begin.
    pub(crate) fn compressed(&mut self, piece: &[u8], marks: Marks) {
        self.layer.update(piece);
        match &mut self.compact {
            Some(Compact::Gzip(chooser)) => chooser.push(piece, marks.candidates, marks.produced),
            Some(Compact::Plain(pieces)) => pieces.push(piece),
            None => {}
        }
        let mut done = 0;
        for cut in marks.cuts {
            self.add(&piece[done..cut.at]);
            if let Some(span) = self.span.take()
                && !cut.replaces
            {
                self.spans.push(span.finalize().into());
            }
            let mut span = Sha256::new();
            if cut.shared {
                let before = cut.at.checked_sub(1).map_or(self.last_byte, |index| piece[index]);
                span.update([before]);
            }
            self.span = Some(span);
            done = cut.at;
        }
        self.add(&piece[done..]);
        self.last_byte = piece.last().copied().unwrap_or(self.last_byte);
    }

    /// The next piece of the uncompressed stream.
    pub(crate) fn uncompressed(&mut self, piece: &[u8]) {
        self.stream.update(piece);
        self.stream_bytes += piece.len() as u64;
    }

    /// Ends the layer.
    #[must_use]
    pub(crate) fn finish(mut self) -> Hashed {
        if let Some(span) = self.span.take() {
            self.spans.push(span.finalize().into());
        }
        Hashed {
            layer: Digest::from_sha256(self.layer.finalize().into()),
            stream: Digest::from_sha256(self.stream.finalize().into()),
            stream_bytes: self.stream_bytes,
            spans: self.spans,
            compact: self.compact.map(|compact| match compact {
                Compact::Gzip(chooser) => chooser.finish(),
                Compact::Plain(pieces) => Ok(Chosen { digests: pieces.finish(), ..Chosen::default() }),
            }),
        }
    }

    fn add(&mut self, bytes: &[u8]) {
        if let Some(span) = &mut self.span {
            span.update(bytes);
        }
    }
}
