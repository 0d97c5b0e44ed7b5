//! Images in a content store that this crate cannot speak to: containerd's, say, whose protocol is gRPC.
//!
//! The other side implements [`ContentStore`], which only reports a blob's length and serves its bytes; everything that
//! makes bytes trustworthy is here, once. To write, it implements [`ContentTarget`] and [`ContentSink`]: such a store
//! garbage-collects unreferenced content, so the references are recorded in it. Invariants: a whole blob has the length
//! and the digest of its descriptor or ends with an error; missing content is distinguished from unreadable content,
//! because callers handle them differently.

use std::fmt::Debug;
use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures_util::future::BoxFuture;
use futures_util::{FutureExt as _, Stream, StreamExt as _, TryFutureExt as _, TryStreamExt as _};

use crate::format::digest::{Digest, Hasher};
use crate::format::limits::Limits;
use crate::format::model::{Descriptor, Probe, RawManifest};
pub use crate::image::error::ForeignError;
use crate::image::error::ImageError;
use crate::image::place::{Answer, BlobStream, Place, Roots};

/// Bytes of a blob as another store gives them out.
pub type Pieces = Pin<Box<dyn Stream<Item = Result<Bytes, ForeignError>> + Send>>;

/// A store of blobs by their digests, in which one image has a name.
pub trait ContentStore: Debug + Send + Sync {
    /// What messages call the image, with the store: `containerd:NAME`.
    fn name(&self) -> &str;

    /// The store without the image, as the local index store calls it where it keeps the parts of an index; `None` if it
    /// keeps none.
    fn place(&self) -> Option<String> {
        None
    }

    /// What the name means: a manifest, or an index of several. `None` if it means nothing (yet).
    fn root(&self) -> Option<&Descriptor>;

    /// How long a blob is; `None` if it is not there.
    fn size<'a>(&'a self, digest: &'a Digest) -> BoxFuture<'a, Result<Option<u64>, ForeignError>>;

    /// Bytes of a blob that is there, from an offset to another.
    fn read(&self, digest: &Digest, range: Range<u64>) -> Pieces;
}

/// Bytes of a blob on their way into another store.
pub type Incoming = Pin<Box<dyn Stream<Item = io::Result<Bytes>> + Send>>;

/// What a document needs, each part by its name: `config`, `l.0`, `ztoc.0`, `m.0`.
pub type References = Vec<(String, Digest)>;

/// A name in another program's store that an image is to get.
pub trait ContentTarget: Debug + Send + Sync {
    /// What messages call the image, with the store.
    fn name(&self) -> &str;

    /// The store, without the image.
    fn place(&self) -> String;

    /// Begins writing: until [`ContentSink::close`] the store keeps what it is given, whether or not anything refers to
    /// it, and for some hours if that call never comes.
    fn open(&self) -> BoxFuture<'_, Result<Arc<dyn ContentSink>, ForeignError>>;
}

/// Another program's store while an image is written to it.
pub trait ContentSink: Debug + Send + Sync {
    /// The store for reading. Its root is what the name meant at the beginning.
    fn store(&self) -> Arc<dyn ContentStore>;

    /// Has a blob kept that is there already; `false` if it is not there.
    fn keep<'a>(&'a self, digest: &'a Digest) -> BoxFuture<'a, Result<bool, ForeignError>>;

    /// Puts a blob, whose digest the store checks. One that is there is as good.
    fn put<'a>(&'a self, digest: &'a Digest, size: u64, content: Incoming) -> BoxFuture<'a, Result<(), ForeignError>>;

    /// Has the store keep what a document that is there refers to for as long as it keeps the document.
    fn link<'a>(&'a self, document: &'a Digest, needs: &'a References) -> BoxFuture<'a, Result<(), ForeignError>>;

    /// Gives the image its name; what had it before loses it.
    fn name_image<'a>(&'a self, root: &'a Descriptor) -> BoxFuture<'a, Result<(), ForeignError>>;

    /// Ends writing: from now on the store keeps only what is referred to.
    fn close(&self) -> BoxFuture<'_, Result<(), ForeignError>>;
}

impl ForeignError {
    /// A blob of which a store's image needs that it is there, and it is not.
    #[must_use]
    pub fn missing(store: &dyn ContentStore, digest: &Digest) -> Self {
        Self::Missing { image: store.name().to_owned(), digest: Box::new(*digest) }
    }
}

/// An image in a store that another crate reads.
#[derive(Debug)]
pub(super) struct Foreign(pub(super) Arc<dyn ContentStore>);

impl Place for Foreign {
    fn image(&self) -> String {
        self.0.name().to_owned()
    }

    fn keeps_indexes_as(&self) -> Option<String> {
        self.0.place()
    }

    fn roots(&self) -> Answer<'_, Roots> {
        let root = self.0.root().ok_or_else(|| ImageError::NotFound { image: self.image(), tags: Vec::new() });
        std::future::ready(root.map(|root| Roots { entries: vec![root.clone()], document: None })).boxed()
    }

    fn manifest<'a>(&'a self, descriptor: &'a Descriptor) -> Answer<'a, Option<RawManifest>> {
        async move {
            if self.size(&descriptor.digest).await?.is_none() {
                return Ok(None);
            }
            let bytes = self.blob_bytes(descriptor, Limits::DEFAULT.manifest_bytes_max).await?;
            let probe: Probe = serde_json::from_slice(&bytes).map_err(|error| ForeignError::Malformed {
                image: self.image(),
                digest: Box::new(descriptor.digest),
                reason: error.to_string(),
            })?;
            let media_type = probe.media_type(&descriptor.media_type);
            Ok(Some(RawManifest { media_type, digest: descriptor.digest, bytes }))
        }
        .boxed()
    }

    fn size<'a>(&'a self, digest: &'a Digest) -> Answer<'a, Option<u64>> {
        self.0.size(digest).err_into().boxed()
    }

    fn blob_bytes<'a>(&'a self, descriptor: &'a Descriptor, limit: u64) -> Answer<'a, Bytes> {
        async move {
            if descriptor.size > limit {
                let (image, digest) = (self.image(), Box::new(descriptor.digest));
                return Err(ForeignError::TooLarge { image, digest, limit }.into());
            }
            let mut pieces = self.open_blob(descriptor);
            let mut whole = BytesMut::new();
            while let Some(piece) = pieces.try_next().await? {
                whole.extend_from_slice(&piece);
            }
            Ok(whole.freeze())
        }
        .boxed()
    }

    fn open_blob(&self, descriptor: &Descriptor) -> BlobStream {
        let hasher = Hasher::new(descriptor.digest.algorithm());
        BlobStream::new(stream(&self.0, descriptor, 0..descriptor.size, Some(hasher)))
    }

    fn read_range(&self, descriptor: &Descriptor, range: Range<u64>) -> BlobStream {
        BlobStream::new(stream(&self.0, descriptor, range, None))
    }

    fn is_partial(&self) -> bool {
        true
    }

    fn missing(&self, digest: &Digest) -> ImageError {
        ForeignError::missing(&*self.0, digest).into()
    }
}

/// A part of a blob as it arrives. It has the length that was asked for, and with a hasher the right digest, or it ends
/// with an error.
fn stream(
    store: &Arc<dyn ContentStore>,
    descriptor: &Descriptor,
    range: Range<u64>,
    hasher: Option<Hasher>,
) -> impl Stream<Item = Result<Bytes, ForeignError>> + Send + use<> {
    let (store, blob) = (Arc::clone(store), descriptor.clone());
    let start = Reading { store, blob, range, pieces: None, hasher };
    futures_util::stream::try_unfold(start, |mut reading| async move {
        let piece = reading.next().await?;
        Ok(piece.map(|piece| (piece, reading)))
    })
}

struct Reading {
    store: Arc<dyn ContentStore>,
    blob: Descriptor,
    /// What is still to come.
    range: Range<u64>,
    pieces: Option<Pieces>,
    hasher: Option<Hasher>,
}

impl Reading {
    async fn next(&mut self) -> Result<Option<Bytes>, ForeignError> {
        if self.pieces.is_none() {
            self.check().await?;
        }
        let (store, digest, range) = (&self.store, &self.blob.digest, self.range.clone());
        let pieces = self.pieces.get_or_insert_with(|| store.read(digest, range));
        let left = self.range.end - self.range.start;
        let piece = if left == 0 { None } else { pieces.next().await.transpose()? };
        let Some(mut piece) = piece else {
            if left > 0 {
                return Err(self.size(self.range.start));
            }
            return self.finish();
        };
        // A store that says more than it was asked for is cut short.
        piece.truncate(usize::try_from(left).unwrap_or(usize::MAX));
        self.range.start += piece.len() as u64;
        if let Some(hasher) = &mut self.hasher {
            hasher.update(&piece);
        }
        Ok(Some(piece))
    }

    async fn check(&mut self) -> Result<(), ForeignError> {
        let size = self.store.size(&self.blob.digest).await?;
        let size = size.ok_or_else(|| ForeignError::missing(&*self.store, &self.blob.digest))?;
        if size != self.blob.size {
            return Err(self.size(size));
        }
        if self.range.start > self.range.end || self.range.end > size {
            let (image, digest) = (self.store.name().to_owned(), Box::new(self.blob.digest));
            return Err(ForeignError::Range { image, digest, range: self.range.clone(), size });
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<Option<Bytes>, ForeignError> {
        match self.hasher.take().map(Hasher::finish) {
            Some(found) if found != self.blob.digest => {
                let (image, expected) = (self.store.name().to_owned(), Box::new(self.blob.digest));
                Err(ForeignError::Digest { image, expected, found: Box::new(found) })
            }
            _ => Ok(None),
        }
    }

    fn size(&self, found: u64) -> ForeignError {
        let (image, digest) = (self.store.name().to_owned(), Box::new(self.blob.digest));
        ForeignError::Size { image, digest, expected: self.blob.size, found }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::platform::PlatformSelection;
    use crate::image::ImageSource;

    /// A store with one blob, which says of it what a test wants.
    #[derive(Debug)]
    struct Fake {
        root: Descriptor,
        size: Option<u64>,
        pieces: Vec<Bytes>,
    }

    impl ContentStore for Fake {
        fn name(&self) -> &'static str {
            "fake:image"
        }

        fn root(&self) -> Option<&Descriptor> {
            Some(&self.root)
        }

        fn size<'a>(&'a self, _: &'a Digest) -> BoxFuture<'a, Result<Option<u64>, ForeignError>> {
            std::future::ready(Ok(self.size)).boxed()
        }

        fn read(&self, _: &Digest, _: Range<u64>) -> Pieces {
            futures_util::stream::iter(self.pieces.clone()).map(Ok).boxed()
        }
    }

    /// Reads a blob `hello` from a store that has these pieces.
    async fn read(size: Option<u64>, pieces: &[&'static str]) -> Result<Bytes, ImageError> {
        let root = Descriptor::of("a/b", b"hello");
        let pieces = pieces.iter().map(|piece| Bytes::from_static(piece.as_bytes())).collect();
        let store = Foreign(Arc::new(Fake { root: root.clone(), size, pieces }));
        store.blob_bytes(&root, 100).await
    }

    #[tokio::test]
    async fn only_right_bytes() {
        for pieces in [&["hello"][..], &["he", "", "llo"], &["hello", "more"], &["hel", "lo and more"]] {
            assert_eq!(read(Some(5), pieces).await.unwrap(), "hello", "{pieces:?}");
        }
        for (size, pieces, expected) in [
            (None, &["hello"][..], "does not have"),
            (Some(4), &["hello"], "has 4 bytes in its store, expected 5"),
            (Some(u64::MAX), &["hello"], "expected 5"),
            (Some(5), &["hell"], "has 4 bytes in its store, expected 5"),
            (Some(5), &[], "has 0 bytes in its store"),
            (Some(5), &["hallo"], "gave content with digest"),
        ] {
            let error = read(size, pieces).await.unwrap_err().to_string();
            assert!(error.starts_with("fake:image") && error.contains(expected), "{expected}: {error}");
        }
    }

    #[tokio::test]
    async fn bounds() {
        let hello = Descriptor::of("a/b", b"hello");
        let fake = Fake { root: hello.clone(), size: Some(5), pieces: vec![Bytes::from_static(b"llo")] };
        let store: Arc<dyn ContentStore> = Arc::new(fake);
        let part = |range| stream(&store, &hello, range, None).try_collect::<Vec<_>>();
        assert_eq!(part(2..5).await.unwrap().concat(), b"llo");
        assert_eq!(part(2..4).await.unwrap().concat(), b"ll");
        assert!(part(3..3).await.unwrap().is_empty());
        for range in [2..6, Range { start: 4, end: 3 }, 6..6] {
            assert!(matches!(part(range.clone()).await, Err(ForeignError::Range { .. })), "{range:?}");
        }
        let huge = Descriptor::new("a/b", hello.digest, u64::MAX);
        let refused = Foreign(store).blob_bytes(&huge, 1 << 20).await;
        assert!(matches!(refused, Err(ImageError::Foreign(ForeignError::TooLarge { .. }))));
    }

    #[tokio::test]
    async fn what_is_no_manifest() {
        let text = b"{";
        let root = Descriptor::of(crate::format::model::media_type::MANIFEST, text);
        let fake = Fake { root, size: Some(1), pieces: vec![Bytes::from_static(text)] };
        let source = ImageSource::foreign(Arc::new(fake));
        let error = source.resolve(&PlatformSelection::Host).await.unwrap_err().to_string();
        assert!(error.starts_with("fake:image: the manifest sha256:"), "{error}");
    }
}
