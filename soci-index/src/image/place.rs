//! A place of images: what each kind of them answers, and the bytes of a blob as they arrive.
//!
//! Registries, layouts and archives, and stores of other programs implement one trait. What only some can do has a
//! default that says so; no caller asks of what kind a place is.

mod registry;
mod stored;

use std::fmt::Debug;
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::{FutureExt as _, Stream, StreamExt as _, TryStreamExt as _};

use crate::format::digest::Digest;
use crate::format::model::{Descriptor, RawManifest, media_type};
use crate::format::v2_document::ManifestEntry;
use crate::image::error::ImageError;
use crate::image::layout::Layout;
use crate::registry::{Part, Repository};

pub(super) use self::registry::InRegistry;
pub(super) use self::stored::{Stored, tags_of};

/// What a place answers in its time.
pub(crate) type Answer<'a, T> = BoxFuture<'a, Result<T, ImageError>>;

/// What an image's name means.
#[derive(Debug)]
pub struct Roots {
    /// Several are the platforms of one image.
    pub entries: Vec<Descriptor>,
    /// The only one, where it had to be read to be known.
    pub document: Option<RawManifest>,
}

/// A place where an image is.
pub trait Place: Debug + Send + Sync {
    /// What messages call the image.
    fn image(&self) -> String;

    /// The place by name, whatever is meant there: a repository, a directory, another program's image.
    fn place(&self) -> String {
        self.image()
    }

    /// What the local index store calls the place where parts of an index are kept here; `None` if they never are.
    fn keeps_indexes_as(&self) -> Option<String> {
        None
    }

    /// What the image's name means: one manifest or index, or in a layout the manifests of its platforms.
    fn roots(&self) -> Answer<'_, Roots>;

    /// A manifest by its descriptor, checked; `None` when it is not there.
    fn manifest<'a>(&'a self, descriptor: &'a Descriptor) -> Answer<'a, Option<RawManifest>>;

    /// A manifest that is known by its digest only; `None` when it is not there.
    fn manifest_by_digest(&self, digest: Digest) -> Answer<'_, Option<RawManifest>> {
        async move {
            let Some(size) = self.size(&digest).await? else { return Ok(None) };
            self.manifest(&Descriptor::new(media_type::MANIFEST, digest, size)).await
        }
        .boxed()
    }

    /// How long a blob is; `None` when it is not there.
    fn size<'a>(&'a self, digest: &'a Digest) -> Answer<'a, Option<u64>>;

    /// Whether a blob is there, of the size that its descriptor says.
    fn has_blob<'a>(&'a self, blob: &'a Descriptor) -> Answer<'a, bool> {
        async move { Ok(self.size(&blob.digest).await? == Some(blob.size)) }.boxed()
    }

    /// A whole blob of at most `limit` bytes, checked.
    fn blob_bytes<'a>(&'a self, descriptor: &'a Descriptor, limit: u64) -> Answer<'a, Bytes>;

    /// A whole blob as it arrives. Its length is checked, and the stream ends with an error instead of an end when its
    /// digest is not the descriptor's.
    fn open_blob(&self, descriptor: &Descriptor) -> BlobStream;

    /// A part of a blob as it arrives. It is *not* checked against any digest.
    fn read_range(&self, descriptor: &Descriptor, range: Range<u64>) -> BlobStream;

    /// The same, when something begins to come; or the whole blob, where the place serves no parts.
    fn open_range<'a>(&'a self, descriptor: &'a Descriptor, range: Range<u64>) -> Answer<'a, Part<BlobStream>> {
        std::future::ready(Ok(Part::Asked(self.read_range(descriptor, range)))).boxed()
    }

    /// Whether parts of blobs are known to be served there.
    fn serves_parts(&self) -> bool {
        true
    }

    /// Whether the image may be there in part, because it was pulled for one platform.
    fn is_partial(&self) -> bool {
        false
    }

    /// The error for content that should be there.
    fn missing(&self, digest: &Digest) -> ImageError;

    /// The repository, for a place that can be asked for referrers, tags and signatures: a registry.
    fn repository(&self) -> Option<&Repository> {
        None
    }

    /// The tag by which the image is named.
    fn tag(&self) -> Option<&str> {
        None
    }

    /// The layout directory, for a place that is one: it lists what refers to an image.
    fn layout(&self) -> Option<&Layout> {
        None
    }

    /// Whether the image has no manifest of its own: the one that is read was made here, from its layers as they are.
    /// No registry knows that manifest unless it was pushed from here.
    fn has_made_manifest(&self) -> bool {
        false
    }

    /// The entries of a layout's index.json, with all their fields.
    fn index_json(&self) -> Answer<'_, Option<Vec<ManifestEntry>>> {
        std::future::ready(Ok(None)).boxed()
    }
}

/// Bytes of a blob as they arrive.
pub struct BlobStream(Pin<Box<dyn Stream<Item = Result<Bytes, ImageError>> + Send>>);

impl BlobStream {
    pub(super) fn new<E: Into<ImageError> + 'static>(
        stream: impl Stream<Item = Result<Bytes, E>> + Send + 'static,
    ) -> Self {
        Self(Box::pin(stream.map_err(Into::into)))
    }
}

impl Stream for BlobStream {
    type Item = Result<Bytes, ImageError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_next_unpin(context)
    }
}

impl std::fmt::Debug for BlobStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("BlobStream")
    }
}

/// Runs file access where it may block.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ImageError> + Send + 'static,
) -> Result<T, ImageError> {
    tokio::task::spawn_blocking(work).await.unwrap_or(Err(ImageError::Stopped))
}
