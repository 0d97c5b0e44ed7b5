//! A converted image that gets a name in another program's store.

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;

use crate::format::digest::Digest;
use crate::format::model::{Descriptor, media_type};
use crate::image::foreign::ContentSink;
use crate::image::sink::{ForeignSink, Sink, Written};
use crate::image::{ImageError, ImageSource};
use crate::publish::PublishError;
use crate::publish::convert::destination::OpenTarget;
use crate::publish::v2::Document;

/// A name in another program's store.
pub(super) struct InForeign {
    pub(super) sink: ForeignSink,
}

impl InForeign {
    fn there(&self) -> &dyn ContentSink {
        &*self.sink.0
    }
}

impl OpenTarget for InForeign {
    fn sink(&self) -> &dyn Sink {
        &self.sink
    }

    fn as_source(&self) -> ImageSource {
        ImageSource::foreign(self.there().store())
    }

    fn as_image(&self) -> Option<ImageSource> {
        Some(self.as_source())
    }

    fn holds<'a>(&'a self, index: &'a Digest) -> BoxFuture<'a, Result<bool, PublishError>> {
        let is_there = self.there().store().root().is_some_and(|root| root.digest == *index);
        std::future::ready(Ok(is_there)).boxed()
    }

    fn finish<'a>(&'a mut self, _: &'a ImageSource, index: &'a Document) -> Written<'a, PublishError> {
        async move {
            self.sink.put_manifest(media_type::INDEX, &index.digest, index.bytes.clone()).await?;
            let root = Descriptor::of(media_type::INDEX, &index.bytes);
            Ok(self.there().name_image(&root).await.map_err(ImageError::from)?)
        }
        .boxed()
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        async move {
            if let Err(error) = self.there().close().await {
                tracing::warn!(%error, "what was written is kept for longer than it need be");
            }
        }
        .boxed()
    }
}
