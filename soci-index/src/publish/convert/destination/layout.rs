//! A converted image that goes into a layout directory, beside what is there.

use futures_util::FutureExt as _;

use crate::format::model::{Descriptor, annotation, media_type};
use crate::image::ImageSource;
use crate::image::layout::Layout;
use crate::image::sink::{Sink, Written, on_disk};
use crate::publish::PublishError;
use crate::publish::convert::destination::OpenTarget;
use crate::publish::v2::Document;

/// A layout directory, and the tag in it.
pub(super) struct InLayout<'t> {
    pub(super) layout: Layout,
    pub(super) tag: Option<&'t String>,
}

impl OpenTarget for InLayout<'_> {
    fn sink(&self) -> &dyn Sink {
        &self.layout
    }

    fn as_source(&self) -> ImageSource {
        ImageSource::of_layout(&self.layout)
    }

    fn as_image(&self) -> Option<ImageSource> {
        Some(ImageSource::in_layout(self.layout.clone(), self.tag.cloned()))
    }

    fn is_home_of(&self, source: &ImageSource) -> bool {
        source.layout() == Some(&self.layout)
    }

    fn finish<'a>(&'a mut self, _: &'a ImageSource, index: &'a Document) -> Written<'a, PublishError> {
        let (layout, bytes) = (self.layout.clone(), index.bytes.clone());
        let mut entry = Descriptor::of(media_type::INDEX, &bytes);
        entry.annotations.extend(self.tag.cloned().map(|tag| (annotation::REF_NAME.to_owned(), tag)));
        async move {
            on_disk(move || layout.lock()?.add_manifest(entry, &bytes)).await?;
            Ok(())
        }
        .boxed()
    }
}
