//! Builds the index of a layer in one pass over its bytes, in bounded memory, with the same result on any machine.
//!
//! The work falls in two: the `Scanner` inflates, reads the tar and sets checkpoints; the `Hasher` computes the
//! digests of the layer, of its uncompressed stream and of every span. They share nothing but what the scanner hands
//! on, so they may run on two cores; [`Indexer`] runs one behind the other. A layer's windows are kept packed
//! (see [`crate::format::checkpoint`]): 10 GB of layer need some 25 MB.
//!
//! A checkpoint is set where AWS's builder sets it: at a block or member boundary, when *more than* the span size has
//! come out since the last one. The one difference: while nothing has come out, their builder sets another checkpoint
//! at every boundary and its own daemon then refuses the file; here the last of these replaces the others.
//!
//! The room uses `format`; `publish` and the tests use it. Pure but for [`pipeline`], which runs the two on two
//! threads.

pub mod choice;
mod hasher;
pub mod pipeline;
mod scanner;

use crate::format::checkpoint::Checkpoint;
use crate::format::class::{Class, Classified};
use crate::format::compact::{self, EncodeError, Encoded};
use crate::format::digest::Digest;
use crate::format::entry::Entry;
use crate::format::gzip::GzipError;
use crate::format::index::{Compression, LayerIndex, WindowPlace, Windows};
use crate::format::limits::Limits;
use crate::format::tar::{Obstacle, TarError};
use crate::format::ztoc::{self, Spans, Ztoc, ZtocError};

use choice::Chosen;
pub(crate) use hasher::{Hashed, Hasher};
pub(crate) use scanner::{Marks, Scan, Scanner};

/// Default span size of AWS's tools: 4 MiB of uncompressed layer.
pub const SPAN_BYTES: u64 = 4 << 20;

/// How to index.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// How the layer is compressed.
    pub compression: Compression,
    /// Least uncompressed bytes of a span; 0 sets a checkpoint at every block. Not 0 for plain tar.
    pub span_bytes: u64,
    /// Span size of a span index ([`crate::format::compact`]) that is to be made in the same pass: 1 to 2^40 bytes.
    pub compact: Option<u64>,
    /// Bounds on what the layer may make us hold.
    pub limits: Limits,
}

impl Options {
    /// For a zTOC of AWS's usual kind: spans of [`SPAN_BYTES`], no span index, the usual limits.
    #[must_use]
    pub const fn of(compression: Compression) -> Self {
        Self { compression, span_bytes: SPAN_BYTES, compact: None, limits: Limits::INDEXING }
    }
}

/// Why a layer could not be indexed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IndexError {
    /// Not gzip, or damaged.
    #[error(transparent)]
    Gzip(#[from] GzipError),
    /// Not tar, or damaged.
    #[error(transparent)]
    Tar(#[from] TarError),
    /// A span size that cannot be.
    #[error(
        "span size {span_bytes} is not possible for this layer: it must be between 1 and 2^63 - 1 (0 is possible for gzip)"
    )]
    SpanSize { span_bytes: u64 },
    /// The same for a span index.
    #[error("span size {span_bytes} is not possible for a span index: it must be between 1 and 2^40")]
    CompactSpanSize { span_bytes: u64 },
    /// The span index could not be written.
    #[error("no span index of the layer: {0}")]
    Compact(#[from] EncodeError),
    /// More checkpoints than [`Limits::spans_max`].
    #[error("the layer has more than {cap} spans; choose a larger span size than {span_bytes}")]
    Spans { cap: usize, span_bytes: u64 },
    /// What was built does not pass our own checks: see the text.
    #[error("the layer's index would not be usable: {0}")]
    Unusable(#[from] ZtocError),
}

impl Classified for IndexError {
    fn class(&self) -> Class {
        Class::Content
    }
}

/// What one pass over a layer found.
#[derive(Debug, Clone)]
pub struct Indexed {
    pub index: LayerIndex,
    /// Digest of the layer blob.
    pub layer_digest: Digest,
    /// Digest of the whole uncompressed stream: the image configuration's `diff_id` for the layer.
    pub diff_id: Digest,
    /// Length of the whole uncompressed stream, padding behind the tar's end included (so at least
    /// `index.uncompressed_size`).
    pub stream_bytes: u64,
    /// Why a zTOC cannot represent the layer, if so.
    pub obstacle: Option<Obstacle>,
    /// The span index, if it was asked for, or why there is none.
    pub compact: Option<Result<Encoded, IndexError>>,
    checkpoints: Vec<Checkpoint>,
    digests: Vec<[u8; 32]>,
    span_bytes: u64,
    tar_bytes: u64,
}

impl Indexed {
    /// Puts the two halves of the work together.
    ///
    /// # Errors
    /// [`IndexError::Unusable`] when a layer passes a limit that only the whole shows.
    pub(crate) fn new(scan: Scan, hashed: Hashed, options: &Options) -> Result<Self, IndexError> {
        let mut ztoc = ztoc_of(
            scan.checkpoints,
            &hashed.spans,
            options.span_bytes,
            options.compression,
            scan.compressed_bytes,
            scan.table.end,
        );
        ztoc.entries = Vec::new();
        let checkpoints = match &ztoc.spans {
            Spans::Gzip { checkpoints, .. } => checkpoints.clone(),
            Spans::Plain { .. } => Vec::new(),
        };
        let mut index = ztoc.into_index(scan.compressed_bytes, &options.limits)?;
        index.entries = scan.table.entries;
        let compact = hashed.compact.map(|chosen| compact_of(chosen?, &mut index, scan.table.end, options));
        Ok(Self {
            index,
            compact,
            layer_digest: hashed.layer,
            diff_id: hashed.stream,
            stream_bytes: hashed.stream_bytes,
            obstacle: scan.table.obstacle,
            checkpoints,
            digests: hashed.spans,
            span_bytes: options.span_bytes,
            tar_bytes: scan.table.end,
        })
    }

    /// The zTOC of the layer, as AWS's tools would make it.
    ///
    /// # Errors
    /// [`Obstacle`] when the layer holds something that a zTOC cannot say.
    pub fn into_ztoc(self) -> Result<Ztoc, Obstacle> {
        if let Some(obstacle) = self.obstacle {
            return Err(obstacle);
        }
        let (compression, compressed) = (self.index.compression, self.index.compressed_size);
        let mut ztoc =
            ztoc_of(self.checkpoints, &self.digests, self.span_bytes, compression, compressed, self.tar_bytes);
        ztoc.entries = self.index.entries;
        Ok(ztoc)
    }

    /// The entries in tar order.
    #[must_use]
    pub fn entries(&self) -> &[Entry] {
        &self.index.entries
    }
}

/// The span index of a layer whose other index is `index`, with spans of its own.
fn compact_of(chosen: Chosen, index: &mut LayerIndex, tar: u64, options: &Options) -> Result<Encoded, IndexError> {
    let span_bytes = options.compact.unwrap_or_default();
    let (compression, compressed) = (options.compression, index.compressed_size);
    let (blob, mut places) = chosen.windows.finish();
    // A plain tar needs none.
    places.resize(chosen.digests.len(), WindowPlace { offset: blob.len() as u64, length: 0, digest: [0; 32] });
    let ztoc = ztoc_of(chosen.checkpoints, &chosen.digests, span_bytes, compression, compressed, tar);
    let mut compact = ztoc.into_index(compressed, &options.limits)?;
    compact.windows = Windows::Placed(places);
    compact.entries = std::mem::take(&mut index.entries);
    let toc = compact::encode(&compact);
    index.entries = compact.entries;
    Ok(Encoded { toc: toc?, windows: blob })
}

fn ztoc_of(
    checkpoints: Vec<Checkpoint>,
    digests: &[[u8; 32]],
    span_bytes: u64,
    compression: Compression,
    compressed_bytes: u64,
    tar_bytes: u64,
) -> Ztoc {
    // Sizes come from counting bytes in memory or on disk: far below 2^63. Spans are bounded by the limits.
    let span_bytes = span_bytes.cast_signed();
    let spans = match compression {
        Compression::Gzip => Spans::Gzip { span_bytes, checkpoints, first_implied: false },
        Compression::None => Spans::Plain { span_bytes, size: compressed_bytes.cast_signed() },
    };
    Ztoc {
        version: ztoc::VERSION.to_owned(),
        build_tool: ztoc::BUILD_TOOL.to_owned(),
        compressed_size: compressed_bytes.cast_signed(),
        uncompressed_size: tar_bytes.cast_signed(),
        entries: Vec::new(),
        max_span_id: i32::try_from(digests.len()).map_or(i32::MAX, |count| count - 1),
        digests: digests.iter().copied().map(Some).collect(),
        spans,
    }
}

/// The indexer on one core: push bytes, then finish.
#[derive(Debug)]
pub struct Indexer {
    scanner: Scanner,
    hasher: Hasher,
    options: Options,
}

impl Indexer {
    /// Starts a layer.
    ///
    /// # Errors
    /// [`IndexError::SpanSize`].
    pub fn new(options: Options) -> Result<Self, IndexError> {
        Ok(Self { scanner: Scanner::new(options)?, hasher: Hasher::new(&options), options })
    }

    /// Takes the next bytes of the layer blob and hands the uncompressed bytes they yield to `tar`, in order, each
    /// once.
    ///
    /// # Errors
    /// [`IndexError`] when the bytes are no gzip or no tar, or pass a limit. The indexer is of no use afterwards.
    pub fn push(&mut self, input: &[u8], tar: &mut dyn FnMut(&[u8])) -> Result<(), IndexError> {
        let hasher = &mut self.hasher;
        let marks = self.scanner.push(input, &mut |piece| {
            hasher.uncompressed(piece);
            tar(piece);
        })?;
        self.hasher.compressed(input, marks);
        Ok(())
    }

    /// Ends the layer.
    ///
    /// # Errors
    /// [`IndexError`] when the layer ends too early.
    pub fn finish(self) -> Result<Indexed, IndexError> {
        let scan = self.scanner.finish()?;
        Indexed::new(scan, self.hasher.finish(), &self.options)
    }
}

/// Indexes a layer that is all in memory.
///
/// # Errors
/// [`IndexError`].
pub fn index_bytes(layer: &[u8], options: Options) -> Result<Indexed, IndexError> {
    let mut indexer = Indexer::new(options)?;
    indexer.push(layer, &mut |_| {})?;
    indexer.finish()
}
