//! Where a converted image goes: a tag in a registry, a layout directory, a layout in a tar file, or a name in another
//! program's store.
//!
//! A [`Target`] says which; opened, each kind of place implements one trait. Its name comes last, in one step.

mod files;
mod foreign;
mod layout;
mod registry;

use std::path::PathBuf;
use std::sync::Arc;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;

use crate::format::digest::Digest;
use crate::format::model::Descriptor;
use crate::image::foreign::ContentTarget;
use crate::image::layout::Layout;
use crate::image::sink::{ForeignSink, Sink, Written, on_disk, written};
use crate::image::{ImageError, ImageSource};
use crate::publish::PublishError;
use crate::publish::v2::Document;
use crate::registry::Repository;

/// Where a converted image goes.
#[derive(Debug, Clone)]
pub enum Target {
    /// A tag in a repository.
    Registry { repository: Repository, tag: String },
    /// Into a layout directory, beside what is there.
    Layout {
        /// The directory; made if need be.
        directory: PathBuf,
        tag: Option<String>,
    },
    /// A layout directory with nothing but this image. A layout that is there is replaced.
    NewLayout { directory: PathBuf },
    /// A layout in a tar file, which is replaced.
    Archive { file: PathBuf, tag: Option<String> },
    /// A name in another program's store.
    Foreign(Arc<dyn ContentTarget>),
}

impl Target {
    /// The place of an image's parts as the local index store calls it; `None` for files, which have no lasting name.
    #[must_use]
    pub fn kept_in(&self) -> Option<String> {
        match self {
            Self::Registry { repository, .. } => Some(repository.to_string()),
            Self::Foreign(there) => Some(there.place()),
            Self::Layout { .. } | Self::NewLayout { .. } | Self::Archive { .. } => None,
        }
    }

    /// The repository, for a place that can list what refers to an image: a registry.
    #[must_use]
    pub fn repository(&self) -> Option<&Repository> {
        Some(self.tagged()?.0)
    }

    /// The repository and the tag in it.
    pub(super) fn tagged(&self) -> Option<(&Repository, &str)> {
        if let Self::Registry { repository, tag } = self { Some((repository, tag)) } else { None }
    }

    /// Whether parts that the source lacks may be lacking here, too: both are stores of what was pulled, and the next
    /// pull fetches them.
    pub(super) fn may_lack(&self, source: &ImageSource) -> bool {
        matches!(self, Self::Foreign(_)) && source.is_partial()
    }

    /// Begins writing.
    pub(super) async fn open(&self) -> Result<Box<dyn OpenTarget + '_>, PublishError> {
        Ok(match self {
            Self::Registry { repository, tag } => Box::new(registry::Tagged { repository, tag }),
            Self::Layout { directory, tag } => {
                let directory = directory.clone();
                let layout = on_disk(move || Layout::open_or_create(&directory)).await?;
                Box::new(layout::InLayout { layout, tag: tag.as_ref() })
            }
            Self::NewLayout { directory } => {
                Box::new(files::NewLayout { directory, staged: files::begin(directory, true).await? })
            }
            Self::Archive { file, tag } => {
                let staged = files::begin(file, false).await?;
                Box::new(files::Archive { file, tag: tag.as_deref(), staged, later: Vec::new() })
            }
            Self::Foreign(there) => {
                let sink = ForeignSink(there.open().await.map_err(ImageError::from)?);
                Box::new(foreign::InForeign { sink })
            }
        })
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let tagged = |tag: &Option<String>| tag.as_ref().map(|tag| format!(":{tag}")).unwrap_or_default();
        match self {
            Self::Registry { repository, tag } => write!(f, "{repository}:{tag}"),
            Self::Layout { directory, tag } => write!(f, "oci:{}{}", directory.display(), tagged(tag)),
            Self::NewLayout { directory } => write!(f, "{}", directory.display()),
            Self::Foreign(there) => f.write_str(there.name()),
            Self::Archive { file, tag } => write!(f, "{}{}", file.display(), tagged(tag)),
        }
    }
}

/// A target that is being written to.
pub(super) trait OpenTarget: Send + Sync {
    /// For documents and the parts of indexes.
    fn sink(&self) -> &dyn Sink;

    /// The place as one to take blobs from.
    fn as_source(&self) -> ImageSource;

    /// The image that is there now, if there may be one.
    fn as_image(&self) -> Option<ImageSource> {
        None
    }

    /// Whether the image is there already.
    fn holds<'a>(&'a self, _index: &'a Digest) -> BoxFuture<'a, Result<bool, PublishError>> {
        std::future::ready(Ok(false)).boxed()
    }

    /// Whether the image comes from here, so that all it needs is here.
    fn is_home_of(&self, _source: &ImageSource) -> bool {
        false
    }

    /// Puts a blob of the image.
    fn copy<'a>(&'a mut self, source: &'a ImageSource, blob: &'a Descriptor) -> Written<'a> {
        self.sink().copy(source, blob)
    }

    /// Makes sure that the target's name still means this, where names may move.
    fn expect<'a>(&'a self, _expected: &'a Digest) -> Written<'a, PublishError> {
        written()
    }

    /// Gives the image its name. What was written for it comes from `source`.
    fn finish<'a>(&'a mut self, source: &'a ImageSource, index: &'a Document) -> Written<'a, PublishError>;

    /// Ends the writing. What was named stays, what was not may go.
    fn close(&self) -> BoxFuture<'_, ()> {
        std::future::ready(()).boxed()
    }
}
