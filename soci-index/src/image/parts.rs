//! Parts of blobs, where an image's place serves them, and whole blobs where it does not.

use std::ops::Range;

use futures_util::TryStreamExt as _;

use crate::format::model::Descriptor;
use crate::image::{BlobStream, ImageError, ImageSource};
use crate::registry::Part;

impl ImageSource {
    /// A part of a blob as it arrives, which is *not* checked against any digest; or the whole blob, where its place
    /// serves no parts.
    ///
    /// # Errors
    /// [`ImageError`] when nothing begins to come.
    pub async fn open_range(&self, descriptor: &Descriptor, range: Range<u64>) -> Result<Part<BlobStream>, ImageError> {
        match self {
            Self::Registry { repository, .. } => {
                let part = repository.blob(descriptor.digest, descriptor.size).open_range(range).await?;
                Ok(part.map(|stream| BlobStream::new(stream.map_err(ImageError::from))))
            }
            Self::Store { .. } | Self::Foreign(_) => Ok(Part::Asked(self.read_range(descriptor, range))),
        }
    }

    /// Whether parts of blobs are known to be served there.
    #[must_use]
    pub fn serves_parts(&self) -> bool {
        match self {
            Self::Registry { repository, .. } => repository.serves_parts(),
            Self::Store { .. } | Self::Foreign(_) => true,
        }
    }
}
