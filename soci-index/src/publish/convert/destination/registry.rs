//! A converted image that goes to a tag in a registry.

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;

use crate::format::digest::Digest;
use crate::format::model::{RawManifest, media_type};
use crate::format::reference::ManifestName;
use crate::image::ImageSource;
use crate::image::sink::{Sink, Written};
use crate::publish::PublishError;
use crate::publish::convert::destination::OpenTarget;
use crate::publish::v2::Document;
use crate::registry::{RegistryError, Repository};

/// A tag in a repository.
pub(super) struct Tagged<'t> {
    pub(super) repository: &'t Repository,
    pub(super) tag: &'t str,
}

impl Tagged<'_> {
    fn name(&self) -> ManifestName {
        ManifestName::Tag(self.tag.to_owned())
    }

    async fn there(&self) -> Result<Option<RawManifest>, RegistryError> {
        self.repository.manifest(&self.name()).await
    }
}

impl OpenTarget for Tagged<'_> {
    fn sink(&self) -> &dyn Sink {
        self.repository
    }

    fn as_source(&self) -> ImageSource {
        ImageSource::of_repository(self.repository)
    }

    fn as_image(&self) -> Option<ImageSource> {
        Some(ImageSource::in_registry(self.repository, self.name()))
    }

    fn holds<'a>(&'a self, index: &'a Digest) -> BoxFuture<'a, Result<bool, PublishError>> {
        async move {
            match self.there().await {
                Ok(there) => Ok(there.is_some_and(|there| there.digest == *index)),
                // A policy may let a tag be written that it does not let be read.
                Err(RegistryError::Status { status: 412, .. }) => Ok(false),
                Err(error) => Err(error.into()),
            }
        }
        .boxed()
    }

    fn is_home_of(&self, source: &ImageSource) -> bool {
        source.repository().is_some_and(|from| from.to_string() == self.repository.to_string())
    }

    /// Registries have no way to do that and to push in one step: what is pushed between the two is lost all the same.
    fn expect<'a>(&'a self, expected: &'a Digest) -> Written<'a, PublishError> {
        async move {
            let there = self.there().await?.map(|there| there.digest);
            if there.as_ref() == Some(expected) {
                return Ok(());
            }
            let (image, there) = (format!("{}:{}", self.repository, self.tag), there.map(Box::new));
            Err(PublishError::Moved { image, expected: Box::new(*expected), there })
        }
        .boxed()
    }

    fn finish<'a>(&'a mut self, _: &'a ImageSource, index: &'a Document) -> Written<'a, PublishError> {
        async move {
            self.repository.push_manifest(&self.name(), media_type::INDEX, index.bytes.clone()).await?;
            Ok(())
        }
        .boxed()
    }
}
