//! A blob of an image, wherever the image is: registry, layout directory or archive.

use std::fmt;
use std::ops::Range;

use futures_util::future::BoxFuture;
use futures_util::{FutureExt as _, StreamExt as _};
use soci_index::format::model::Descriptor;
use soci_index::image::urls::UrlFetcher;
use soci_index::image::{ImageError, ImageSource};
use soci_index::registry::Part;

use crate::layer::source::{Chunks, Delivery, Source, SourceError};

/// A blob of an image.
pub struct ImageBlob {
    image: ImageSource,
    blob: Descriptor,
}

impl ImageBlob {
    /// Reads the blob that `blob` describes.
    #[must_use]
    pub const fn new(image: ImageSource, blob: Descriptor) -> Self {
        Self { image, blob }
    }

    /// Where it is, in words: `HOST/REPOSITORY`, or a path.
    #[must_use]
    pub fn place(&self) -> String {
        self.image.place()
    }
}

impl ImageBlob {
    /// Whether a range lies in the blob; none has bytes.
    fn check(&self, range: &Range<u64>) -> Result<(), SourceError> {
        let size = self.blob.size;
        if range.start > range.end || range.end > size {
            return Err(SourceError::OutOfRange { start: range.start, end: range.end, size });
        }
        Ok(())
    }

    fn failed(&self) -> impl Fn(ImageError) -> SourceError + Send + 'static {
        let origin = self.image.to_string();
        move |error| match error {
            ImageError::Registry(error) => SourceError::Registry(error),
            ImageError::Store(error) => SourceError::Stored(error),
            other => SourceError::Unavailable { origin: origin.clone(), what: other.to_string() },
        }
    }
}

impl Source for ImageBlob {
    fn read(&self, range: Range<u64>) -> BoxFuture<'_, Result<Chunks, SourceError>> {
        async move {
            self.check(&range)?;
            if range.is_empty() {
                return Ok(futures_util::stream::empty().boxed());
            }
            let failed = self.failed();
            Ok(self.image.read_range(&self.blob, range).map(move |chunk| chunk.map_err(&failed)).boxed())
        }
        .boxed()
    }

    fn serves_parts(&self) -> bool {
        self.image.serves_parts()
    }

    fn fetch(&self, range: Range<u64>) -> BoxFuture<'_, Result<Delivery, SourceError>> {
        async move {
            self.check(&range)?;
            if range.is_empty() {
                return Ok(Delivery { chunks: futures_util::stream::empty().boxed(), from: None, is_whole: false });
            }
            let failed = self.failed();
            let (is_whole, stream) = match self.image.open_range(&self.blob, range).await.map_err(&failed)? {
                Part::Asked(stream) => (false, stream),
                Part::Whole(stream) => (true, stream),
            };
            Ok(Delivery { chunks: stream.map(move |chunk| chunk.map_err(&failed)).boxed(), from: None, is_whole })
        }
        .boxed()
    }
}

/// A foreign layer at the URLs that it names.
#[derive(Debug)]
pub struct UrlBlob {
    urls: UrlFetcher,
    blob: Descriptor,
}

impl UrlBlob {
    /// Reads the layer that `blob` describes.
    #[must_use]
    pub const fn new(urls: UrlFetcher, blob: Descriptor) -> Self {
        Self { urls, blob }
    }
}

impl Source for UrlBlob {
    fn read(&self, range: Range<u64>) -> BoxFuture<'_, Result<Chunks, SourceError>> {
        let size = self.blob.size;
        async move {
            if range.start > range.end || range.end > size {
                return Err(SourceError::OutOfRange { start: range.start, end: range.end, size });
            }
            let failed = |error: ImageError| SourceError::Unavailable {
                origin: "the layer by its URLs".to_owned(),
                what: error.to_string(),
            };
            Ok(self.urls.read(&self.blob, range).map(move |chunk| chunk.map_err(failed)).boxed())
        }
        .boxed()
    }

    /// The URLs are the image's word, and whether they may be asked is the operator's, of today.
    fn is_remembered(&self) -> bool {
        false
    }
}

impl fmt::Debug for ImageBlob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ImageBlob").field("image", &self.image.to_string()).field("blob", &self.blob.digest).finish()
    }
}
