//! Why an image, or a layer of it, cannot be read.

use std::ops::Range;

use crate::format::class::{Class, Classified};
use crate::format::digest::Digest;
use crate::format::platform::Platform;
use crate::image::store::StoreError;
use crate::registry::RegistryError;
use crate::registry::error::TransportError;
use crate::registry::redirect::{ShownUrl, TargetError};

/// Why an image cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ImageError {
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The layout or archive.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The content store of another program.
    #[error(transparent)]
    Foreign(#[from] ForeignError),
    /// The image is in a place that this command does not read.
    #[error("{image} is in a place that this command does not read: name it in a registry, a layout or an archive")]
    Elsewhere { image: String },
    /// There is no such image.
    #[error("{image}: there is no such image{}", known_tags(tags))]
    NotFound { image: String, tags: Vec<String> },
    /// There is something, and no image in it.
    #[error("{image} holds no image: {}", entries(*count))]
    NoImage {
        image: String,
        /// How many entries there are that are none.
        count: usize,
    },
    /// A layout holds several images.
    #[error("{image} holds several images: name one{}", known_tags(tags))]
    Ambiguous { image: String, tags: Vec<String> },
    /// The image is not made for a platform.
    #[error("{image} has no manifest for {wanted}; it has {}", list(offered))]
    NoPlatform { image: String, wanted: Platform, offered: Vec<Platform> },
    /// It is something else than an image.
    #[error("{image}: {digest} is no image but {kind:?}")]
    NotAnImage { image: String, digest: Box<Digest>, kind: String },
    /// A document of the image is not well formed.
    #[error("{image}: {what} {digest} cannot be read: {reason}")]
    Malformed { image: String, what: &'static str, digest: Box<Digest>, reason: String },
    /// A layer cannot be obtained from the URLs that it names.
    #[error("layer {layer}: {source}")]
    Urls { layer: Box<Digest>, source: UrlError },
    /// The background task was stopped.
    #[error("reading was stopped")]
    Stopped,
}

impl Classified for ImageError {
    fn class(&self) -> Class {
        match self {
            Self::Registry(error) => error.class(),
            Self::Store(error) => error.class(),
            Self::Malformed { .. } | Self::NotAnImage { .. } => Class::Content,
            Self::NotFound { .. } | Self::Ambiguous { .. } | Self::NoPlatform { .. } => Class::Other,
            Self::NoImage { .. } => Class::NothingToIndex,
            Self::Urls { source, .. } => source.class(),
            Self::Stopped => Class::Other,
            Self::Elsewhere { .. } => Class::Usage,
            Self::Foreign(error) => error.class(),
        }
    }
}

fn entries(count: usize) -> String {
    match count {
        0 => "its index is empty".to_owned(),
        1 => "the only entry of its index is an attestation or another artifact".to_owned(),
        _ => format!("all {count} entries of its index are attestations or other artifacts"),
    }
}

fn known_tags(tags: &[String]) -> String {
    if tags.is_empty() { String::new() } else { format!(" (there are {})", tags.join(", ")) }
}

fn list(platforms: &[Platform]) -> String {
    platforms.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// Why a content store of another program does not give what is wanted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ForeignError {
    /// A blob is not there.
    #[error(
        "{image}: {digest}: not found; its store does not have it: the image was pulled for another platform \
         (--skip-missing-platforms leaves that out), or lazily, or the content was discarded after unpacking; \
         `soci publish` indexes it from its registry, and a full pull fetches it"
    )]
    Missing { image: String, digest: Box<Digest> },
    /// The store does not answer, or refuses.
    #[error("{image}: {digest} cannot be read: {reason}")]
    Failed { image: String, digest: Box<Digest>, reason: String },
    /// The store cannot be reached or written to.
    #[error("{image}: {reason}")]
    Store { image: String, reason: String },
    /// A blob has another length than its descriptor says.
    #[error("{image}: {digest} has {found} bytes in its store, expected {expected}")]
    Size {
        image: String,
        digest: Box<Digest>,
        expected: u64,
        /// As stored, or as far as it came.
        found: u64,
    },
    /// A blob is not what its name says.
    #[error("{image}: its store gave content with digest {found} for {expected}")]
    Digest { image: String, expected: Box<Digest>, found: Box<Digest> },
    /// More than we are willing to hold.
    #[error("{image}: {digest} is larger than the limit of {limit} bytes")]
    TooLarge { image: String, digest: Box<Digest>, limit: u64 },
    /// A blob has no such bytes.
    #[error("{image}: {digest} has {size} bytes, there are no bytes {}..{}", range.start, range.end)]
    Range { image: String, digest: Box<Digest>, range: Range<u64>, size: u64 },
    /// A manifest is not well formed.
    #[error("{image}: the manifest {digest} cannot be read: {reason}")]
    Malformed { image: String, digest: Box<Digest>, reason: String },
}

impl Classified for ForeignError {
    fn class(&self) -> Class {
        match self {
            Self::Missing { .. } => Class::Other,
            Self::Failed { .. } | Self::Store { .. } => Class::Local,
            Self::Size { .. }
            | Self::Digest { .. }
            | Self::TooLarge { .. }
            | Self::Range { .. }
            | Self::Malformed { .. } => Class::Content,
        }
    }
}

/// Why a layer could not be fetched from a URL.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UrlError {
    /// The client could not be set up.
    #[error("{reason}")]
    Setup { reason: String },
    /// The descriptor has no URL.
    #[error("it names no URL")]
    None,
    /// The URL may not be asked.
    #[error("{url}: {source}")]
    Target { url: String, source: TargetError },
    /// The exchange failed.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// Another answer than content.
    #[error("{url}: HTTP {status}")]
    Status { url: ShownUrl, status: u16 },
    /// The content is longer or shorter than the descriptor says.
    #[error("{url}: it has {found} bytes, expected {expected}")]
    Size {
        url: ShownUrl,
        expected: u64,
        /// As announced, or as far as it came.
        found: u64,
    },
    /// The content is not what the descriptor says.
    #[error("{url}: its digest is {found}")]
    Digest { url: ShownUrl, found: Box<Digest> },
}

impl Classified for UrlError {
    fn class(&self) -> Class {
        match self {
            Self::Setup { .. } => Class::Other,
            Self::Transport(_) | Self::Status { .. } => Class::Registry,
            Self::None | Self::Target { .. } | Self::Size { .. } | Self::Digest { .. } => Class::Content,
        }
    }
}
