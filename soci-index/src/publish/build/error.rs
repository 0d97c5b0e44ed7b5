//! Why an image, or one of its layers, could not be indexed.

use crate::format::class::{Class, Classified};
use crate::format::digest::Digest;
use crate::image::ImageError;
use crate::indexing::IndexError;

/// Why an image could not be indexed.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The image could not be read.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A layer is not what it should be.
    #[error("layer {layer} cannot be indexed: {source}")]
    Layer { layer: Box<Digest>, source: IndexError },
    /// A layer is not what its name says.
    #[error("layer {expected} was read and has digest {found}: the place that it came from is damaged, or lies")]
    LayerDigest { expected: Box<Digest>, found: Box<Digest> },
    /// A layer's content is not what the image configuration says.
    #[error(
        "layer {layer} unpacks to {found}, but the image configuration says {expected}: the image is damaged or forged"
    )]
    DiffId { layer: Box<Digest>, expected: Box<Digest>, found: Box<Digest> },
    /// The background task was stopped.
    #[error("indexing was stopped")]
    Stopped,
}

impl Classified for BuildError {
    fn class(&self) -> Class {
        match self {
            Self::Image(error) => error.class(),
            Self::Layer { .. } | Self::LayerDigest { .. } | Self::DiffId { .. } => Class::Content,
            Self::Stopped => Class::Other,
        }
    }
}

/// Why a layer has no zTOC.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Skip {
    /// Only a span index is made.
    NotWanted,
    /// It is smaller than [`crate::publish::build::BuildOptions::layer_bytes_min`].
    Small {
        /// The least size.
        least: u64,
    },
    /// Its compression has no place to begin in the middle.
    Compression {
        /// As the media type names it.
        name: String,
    },
    /// It is not where the image is, and was not fetched from elsewhere.
    Foreign {
        /// Where it is available.
        urls: Vec<String>,
    },
    /// It is what its digest says, and that is damaged.
    Damaged {
        /// In which way.
        error: IndexError,
    },
    /// It holds something that a zTOC cannot say.
    Inexpressible { reason: String },
}

impl std::fmt::Display for Skip {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NotWanted => f.write_str("it is left out of the index"),
            Self::Small { least } => write!(f, "it is smaller than {least} bytes"),
            Self::Compression { name } => {
                write!(f, "it is compressed in an unsupported format. expect: [tar, gzip, unknown] but got {name:?}")
            }
            Self::Foreign { urls } if urls.is_empty() => f.write_str(
                "it is a foreign layer, which is not with the image, and it names no place to fetch it from",
            ),
            Self::Foreign { urls } => {
                let allowed = "--foreign-layers, or pull_modes.foreign_layers of the snapshotter, allows that";
                let urls = shown(urls);
                write!(f, "it is a foreign layer, which is not with the image; it is to be had from {urls} ({allowed})")
            }
            Self::Damaged { error } => write!(f, "it cannot be indexed: {error}"),
            Self::Inexpressible { reason } => f.write_str(reason),
        }
    }
}

/// URLs of a descriptor for a message.
fn shown(urls: &[String]) -> String {
    let url = |url: &String| url.chars().take(200).flat_map(char::escape_default).collect::<String>();
    urls.iter().take(3).map(url).collect::<Vec<_>>().join(", ")
}
