//! Why a layer is left to containerd.

use std::time::Duration;

use soci_index::format::class::{Class, Classified};
use soci_index::format::digest::Digest;
use soci_index::image::ImageError;
use soci_index::registry::RegistryError;

use crate::fuse::forest::ForestError;
use crate::node::remote::id_maps::IdMapsError;
use crate::node::remote::labels::LabelError;
use crate::node::remote::slots::SlotError;
use crate::open::OpenError;

/// The operation that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Failed {
    /// To have a layer for lazy reading.
    Lazy,
    Whole,
}

impl RemoteError {
    /// What has failed, if something has: that an image has no index, that labels name none, or that it is to be left to
    /// containerd, is no failure.
    pub(super) const fn failure(&self) -> Option<Failed> {
        match self {
            Self::Off
            | Self::Label(_)
            | Self::Open(OpenError::NotLazy { is_indexed: false, .. } | OpenError::NoSuchIndex { .. }) => None,
            Self::Open(OpenError::Unpack(_)) => Some(Failed::Whole),
            _ => Some(Failed::Lazy),
        }
    }

    /// Whether the next layer of the image meets the same: an index that was asked for by its digest cannot be
    /// obtained.
    pub(super) const fn is_lasting(&self) -> bool {
        matches!(self, Self::Open(OpenError::NoSuchIndex { .. }))
    }
}

/// Why a layer is not provided.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    /// The labels do not say which layer.
    #[error(transparent)]
    Label(#[from] LabelError),
    /// The registry cannot be set up.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The image cannot be read.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The manifest is that of no platform.
    #[error("{image} names no image that can run")]
    NoImage { image: String },
    /// The image does not have the layer.
    #[error("{image} has no layer {layer}")]
    NoLayer { image: String, layer: Digest },
    /// The layer cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The layer links to files of layers below it, which a single layer cannot show.
    #[error("layer {layer} has {links} hard links to files of lower layers")]
    LowerLinks { layer: Digest, links: usize },
    /// There is no slot to put it.
    #[error(transparent)]
    Slot(#[from] SlotError),
    /// A mapping of owners has no number.
    #[error(transparent)]
    IdMaps(#[from] IdMapsError),
    /// Its files cannot be numbered.
    #[error(transparent)]
    Forest(#[from] ForestError),
    /// It took too long.
    #[error("{what} did not come within {} s", limit.as_secs())]
    Deadline { what: String, limit: Duration },
    /// No kind of index is to be used.
    #[error("indexes of both versions are off ([pull_modes]), and no label names one")]
    Off,
    /// The process is shutting down.
    #[error("the layer was abandoned")]
    Abandoned,
}

impl Classified for RemoteError {
    fn class(&self) -> Class {
        match self {
            Self::Label(error) => error.class(),
            Self::Registry(error) => error.class(),
            Self::Image(error) => error.class(),
            Self::Open(error) => error.class(),
            Self::Slot(error) => error.class(),
            Self::IdMaps(error) => error.class(),
            Self::Forest(error) => error.class(),
            Self::NoImage { .. } | Self::NoLayer { .. } | Self::LowerLinks { .. } => Class::Content,
            Self::Deadline { .. } => Class::Registry,
            Self::Off | Self::Abandoned => Class::Other,
        }
    }
}
