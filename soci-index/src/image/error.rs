//! Why an image cannot be read.

use crate::format::digest::Digest;
use crate::format::platform::Platform;
use crate::image::foreign::ForeignError;
use crate::image::store::StoreError;
use crate::image::urls::UrlError;
use crate::registry::RegistryError;

/// Why an image cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ImageError {
    /// The registry.
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
    Elsewhere {
        /// What was asked for.
        image: String,
    },
    /// There is no such image.
    #[error("{image}: there is no such image{}", known_tags(tags))]
    NotFound {
        /// What was asked for.
        image: String,
        /// The tags that a layout has.
        tags: Vec<String>,
    },
    /// There is something, and no image in it.
    #[error("{image} holds no image: {}", entries(*count))]
    NoImage {
        /// What was asked for.
        image: String,
        /// How many entries there are that are none.
        count: usize,
    },
    /// A layout holds several images.
    #[error("{image} holds several images: name one{}", known_tags(tags))]
    Ambiguous {
        /// What was asked for.
        image: String,
        /// The tags that the layout has.
        tags: Vec<String>,
    },
    /// The image is not made for a platform.
    #[error("{image} has no manifest for {wanted}; it has {}", list(offered))]
    NoPlatform {
        /// What was asked for.
        image: String,
        /// The platform.
        wanted: Platform,
        /// What there is.
        offered: Vec<Platform>,
    },
    /// It is something else than an image.
    #[error("{image}: {digest} is no image but {kind:?}")]
    NotAnImage {
        /// What was asked for.
        image: String,
        /// The manifest.
        digest: Box<Digest>,
        /// What it is.
        kind: String,
    },
    /// A document of the image is not well formed.
    #[error("{image}: {what} {digest} cannot be read: {reason}")]
    Malformed {
        /// What was asked for.
        image: String,
        /// Which kind of document.
        what: &'static str,
        /// Which one.
        digest: Box<Digest>,
        /// Why not.
        reason: String,
    },
    /// A layer cannot be had from the URLs that it names.
    #[error("layer {layer}: {source}")]
    Urls {
        /// The layer.
        layer: Box<Digest>,
        /// What the last of them said.
        source: UrlError,
    },
    /// The background task was stopped.
    #[error("reading was stopped")]
    Stopped,
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
