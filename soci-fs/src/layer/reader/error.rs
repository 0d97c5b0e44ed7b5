//! Why bytes of a layer could not be read.

use std::fmt;
use std::time::Duration;

use soci_index::format::class::{Class, Classified};
use soci_index::format::compact::WindowError;
use soci_index::format::decode::DecodeError;
use soci_index::format::digest::Digest;
use soci_index::format::span::SpanId;
use soci_index::format::tar::HeaderMismatch;

use crate::layer::source::SourceError;
use crate::layer::store::StoreError;

/// A read that failed: where, and why.
#[derive(Debug, Clone)]
pub struct ReadError {
    pub layer: Digest,
    /// The span, where the failure belongs to one.
    pub span: Option<SpanId>,
    /// Offset in the uncompressed layer.
    pub offset: u64,
    /// Name of the file as the archive has it, where the read was of a file.
    pub file: Option<String>,
    /// What went wrong.
    pub cause: Cause,
}

impl Classified for ReadError {
    fn class(&self) -> Class {
        self.cause.class()
    }
}

impl fmt::Display for ReadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot read byte {} of layer {}", self.offset, self.layer)?;
        if let Some(span) = self.span {
            write!(f, ", span {span}")?;
        }
        if let Some(file) = &self.file {
            write!(f, ", file {file:?}")?;
        }
        write!(f, ": {}", self.cause)
    }
}

impl std::error::Error for ReadError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.cause)
    }
}

/// What went wrong with a read.
///
/// Exhaustive on purpose: each exit table decides about every variant.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Cause {
    /// The source did not deliver.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The source ended the answer early.
    #[error("the source delivered {found} of {expected} bytes")]
    Short { expected: u64, found: u64 },
    /// The bytes are not the ones that were indexed.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// The window of a span is not the one that the index means.
    #[error(transparent)]
    WindowBlob(#[from] WindowError),
    /// The window of a span is not at hand.
    #[error("the window of span {span} is not available")]
    NoWindow { span: SpanId },
    /// The answer did not come in time.
    #[error("no answer within {} s", limit.as_secs_f32())]
    Deadline { limit: Duration },
    /// The local store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The file's header in the layer is not what the index says.
    #[error(transparent)]
    Header(#[from] HeaderMismatch),
    /// The index is forged or damaged: the history it gives for a span is not the output of the span before.
    #[error(
        "the index gives span {span} a window that is not the end of the span before it; the layer is out of service"
    )]
    Window { span: SpanId },
    /// The windows of a span index cannot be obtained.
    #[error("the windows of its index cannot be fetched: {0}")]
    Windows(Box<Self>),
    /// The layer cannot be proven for too long.
    #[error("the layer is suspended: {why}")]
    Suspended { why: String },
    /// The layer has failed its proof.
    #[error("the layer was proven wrong and is out of service: {what}")]
    Condemned { what: String },
    /// The range or entry is not part of the layer.
    #[error("the layer ends at byte {size}")]
    OutOfRange { size: u64 },
    /// The process is shutting down.
    #[error("the read was abandoned")]
    Abandoned,
}

impl Classified for Cause {
    fn class(&self) -> Class {
        match self {
            Self::Source(error) => error.class(),
            Self::Short { .. } | Self::Deadline { .. } => Class::Registry,
            Self::Store(_) => Class::Local,
            Self::Decode(_)
            | Self::WindowBlob(_)
            | Self::NoWindow { .. }
            | Self::Suspended { .. }
            | Self::Header(_)
            | Self::Window { .. }
            | Self::Condemned { .. }
            | Self::OutOfRange { .. } => Class::Content,
            Self::Windows(cause) => cause.class(),
            Self::Abandoned => Class::Other,
        }
    }
}
