//! Why an image cannot be read.

use crate::format::class::{Class, Classified};
use crate::format::digest::Digest;
use crate::format::platform::Platform;
use crate::image::foreign::ForeignError;
use crate::image::store::StoreError;
use crate::image::urls::UrlError;
use crate::registry::RegistryError;

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
