//! Why an archive that `docker save` is said to have written cannot be read.

use crate::format::class::{Class, Classified};
use crate::image::names::printable;

/// How many links one after the other lead to a layer. Docker writes one.
pub(crate) const LINKS_MAX: usize = 8;

/// Why what `docker save` is said to have written cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SavedError {
    /// It is something else.
    #[error("it has neither manifest.json nor an OCI layout: docker save did not write it")]
    NoManifest,
    /// `manifest.json` is not what Docker writes.
    #[error("manifest.json cannot be read: {reason}")]
    Json { reason: String },
    /// It holds more than one image.
    #[error("it holds {count} images: name one{}", known(tags))]
    Ambiguous { count: usize, tags: Vec<String> },
    /// It does not hold the image that was named.
    #[error("it holds no image {tag}{}", known(tags))]
    NoSuchTag {
        tag: String,
        /// Some of the names that it has.
        tags: Vec<String>,
    },
    /// It names a member that is not there.
    #[error("its member {name} is missing")]
    Missing { name: String },
    /// It names something outside of itself.
    #[error("its member {name} leads out of the archive")]
    Outside { name: String },
    /// Links lead in a circle, or nearly.
    #[error("its member {name} leads through more than {LINKS_MAX} links")]
    Links { name: String },
    /// More than any real archive has.
    #[error("it has more than {limit} {what}")]
    TooMany { what: &'static str, limit: usize },
}

impl Classified for SavedError {
    fn class(&self) -> Class {
        match self {
            Self::Ambiguous { .. } | Self::NoSuchTag { .. } => Class::Other,
            Self::NoManifest => Class::Local,
            Self::Json { .. }
            | Self::Missing { .. }
            | Self::Outside { .. }
            | Self::Links { .. }
            | Self::TooMany { .. } => Class::Content,
        }
    }
}

fn known(tags: &[String]) -> String {
    let tags: Vec<String> = tags.iter().map(|tag| shown(tag)).collect();
    if tags.is_empty() { String::new() } else { format!(" (there are {})", tags.join(", ")) }
}

/// A name for a message.
pub(crate) fn shown(name: &str) -> String {
    printable(name, 200)
}
