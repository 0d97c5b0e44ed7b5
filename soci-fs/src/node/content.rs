//! An image in containerd's content store.
//!
//! Reading writes nothing there: no label, no lease. An image that is removed while it is read fails the reading, with
//! a message that says so.

pub mod node;
pub mod target;

use std::ops::Range;

use futures_util::future::BoxFuture;
use futures_util::{FutureExt as _, StreamExt as _, TryStreamExt as _};
use soci_index::format::digest::Digest;
use soci_index::format::model::Descriptor;
use soci_index::image::foreign::{ContentStore, ForeignError, Pieces};
use soci_index::publish::local::containerd_place;

use crate::node::grpc::containerd::{Containerd, ContainerdError};

/// An image of containerd.
#[derive(Debug)]
pub struct ContainerdImage {
    containerd: Containerd,
    shown: String,
    root: Option<Descriptor>,
}

impl ContainerdImage {
    /// Finds an image by its name, or else by the `other` name that it may have.
    ///
    /// # Errors
    /// [`ContainerdError::NoImage`] of the first name when containerd knows neither, else another [`ContainerdError`].
    pub async fn find(containerd: Containerd, name: &str, other: &str) -> Result<Self, ContainerdError> {
        let (name, root) = match containerd.image(name).await {
            Ok(root) => (name, root),
            Err(unknown @ ContainerdError::NoImage { .. }) if other != name => match containerd.image(other).await {
                Ok(root) => (other, root),
                Err(ContainerdError::NoImage { .. }) => return Err(unknown),
                Err(error) => return Err(error),
            },
            Err(error) => return Err(error),
        };
        Ok(Self { containerd, shown: format!("containerd:{name}"), root: Some(root) })
    }

    /// The content of containerd's namespace, of whatever image; messages call it `shown`.
    #[must_use]
    pub const fn content(containerd: Containerd, shown: String) -> Self {
        Self { containerd, shown, root: None }
    }

    /// The image's name, as containerd has it.
    #[must_use]
    pub fn image_name(&self) -> &str {
        self.shown.strip_prefix("containerd:").unwrap_or(&self.shown)
    }

    fn failed(&self, digest: &Digest) -> impl Fn(ContainerdError) -> ForeignError + Send + use<> {
        let (image, digest) = (self.shown.clone(), *digest);
        move |error| ForeignError::Failed { image: image.clone(), digest: Box::new(digest), reason: error.to_string() }
    }
}

impl ContentStore for ContainerdImage {
    fn name(&self) -> &str {
        &self.shown
    }

    fn place(&self) -> Option<String> {
        Some(containerd_place(self.containerd.namespace()))
    }

    fn root(&self) -> Option<&Descriptor> {
        self.root.as_ref()
    }

    fn size<'a>(&'a self, digest: &'a Digest) -> BoxFuture<'a, Result<Option<u64>, ForeignError>> {
        async move { self.containerd.content_size(digest).await.map_err(self.failed(digest)) }.boxed()
    }

    fn read(&self, digest: &Digest, range: Range<u64>) -> Pieces {
        self.containerd.read_content(digest, range).map_err(self.failed(digest)).boxed()
    }
}
