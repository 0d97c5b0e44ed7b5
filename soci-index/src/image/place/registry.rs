//! An image in a registry.

use std::ops::Range;

use bytes::Bytes;
use futures_util::FutureExt as _;

use crate::format::digest::Digest;
use crate::format::model::{Descriptor, RawManifest};
use crate::format::reference::ManifestName;
use crate::image::error::ImageError;
use crate::image::place::{Answer, BlobStream, Place, Roots};
use crate::registry::{Part, Repository};

/// A repository, and which of its images is meant.
#[derive(Debug)]
pub(crate) struct InRegistry {
    pub(crate) repository: Repository,
    pub(crate) name: ManifestName,
}

impl Place for InRegistry {
    fn image(&self) -> String {
        let separator = if self.name.tag().is_some() { ':' } else { '@' };
        format!("{}{separator}{}", self.repository, self.name)
    }

    fn place(&self) -> String {
        self.repository.to_string()
    }

    /// The registry is asked once: the document tells what the name means at the same moment.
    fn roots(&self) -> Answer<'_, Roots> {
        async move {
            let not_found = || ImageError::NotFound { image: self.image(), tags: Vec::new() };
            let root = self.repository.manifest(&self.name).await?.ok_or_else(not_found)?;
            Ok(Roots { entries: vec![root.descriptor()], document: Some(root) })
        }
        .boxed()
    }

    fn manifest<'a>(&'a self, descriptor: &'a Descriptor) -> Answer<'a, Option<RawManifest>> {
        self.manifest_by_digest(descriptor.digest)
    }

    fn manifest_by_digest(&self, digest: Digest) -> Answer<'_, Option<RawManifest>> {
        async move { Ok(self.repository.manifest(&ManifestName::Digest(digest)).await?) }.boxed()
    }

    fn size<'a>(&'a self, digest: &'a Digest) -> Answer<'a, Option<u64>> {
        async move { Ok(self.repository.blob_size(digest).await?) }.boxed()
    }

    fn blob_bytes<'a>(&'a self, descriptor: &'a Descriptor, limit: u64) -> Answer<'a, Bytes> {
        async move { Ok(self.repository.blob_bytes(descriptor, limit).await?) }.boxed()
    }

    fn open_blob(&self, descriptor: &Descriptor) -> BlobStream {
        BlobStream::new(self.repository.blob(descriptor.digest, descriptor.size).read_all())
    }

    fn read_range(&self, descriptor: &Descriptor, range: Range<u64>) -> BlobStream {
        BlobStream::new(self.repository.blob(descriptor.digest, descriptor.size).read_range(range))
    }

    fn open_range<'a>(&'a self, descriptor: &'a Descriptor, range: Range<u64>) -> Answer<'a, Part<BlobStream>> {
        let blob = self.repository.blob(descriptor.digest, descriptor.size);
        async move { Ok(blob.open_range(range).await?.map(BlobStream::new)) }.boxed()
    }

    fn serves_parts(&self) -> bool {
        self.repository.serves_parts()
    }

    fn missing(&self, _: &Digest) -> ImageError {
        ImageError::NotFound { image: self.image(), tags: Vec::new() }
    }

    fn repository(&self) -> Option<&Repository> {
        Some(&self.repository)
    }

    fn tag(&self) -> Option<&str> {
        self.name.tag()
    }
}
