//! An image in a layout or archive: which entries of its index.json are the image that was named, and its blobs.

use std::collections::HashSet;
use std::ops::Range;

use bytes::Bytes;
use futures_util::{FutureExt as _, Stream};

use crate::format::digest::{Digest, Hasher};
use crate::format::model::{Descriptor, RawManifest, annotation};
use crate::format::platform::Platform;
use crate::format::v2_document::{Index, ManifestEntry};
use crate::image::error::ImageError;
use crate::image::layout::Layout;
use crate::image::names::{self, printable};
use crate::image::place::blocking;
use crate::image::place::{Answer, BlobStream, Place, Roots};
use crate::image::store::{Store, StoreError, read_piece};

/// A layout or archive, and which of its images is meant.
#[derive(Debug)]
pub(crate) struct Stored<S> {
    pub(crate) store: S,
    pub(crate) tag: Option<String>,
    /// The layout directory, if it is one.
    pub(crate) layout: Option<Layout>,
}

impl<S: Store> Stored<S> {
    async fn read<T: Send + 'static>(
        &self,
        work: impl FnOnce(&S) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, ImageError> {
        let store = self.store.clone();
        blocking(move || Ok(work(&store)?)).await
    }

    /// What index.json offers for the tag. Several without a tag are the platforms of one image, if they say which.
    async fn offered(&self) -> Result<Vec<Descriptor>, ImageError> {
        let entries = self.read(S::entries).await?;
        let count = entries.len();
        let mut images: Vec<Descriptor> = entries.into_iter().filter(Descriptor::may_be_image).collect();
        if images.is_empty() && count > 0 {
            return Err(ImageError::NoImage { image: self.image(), count });
        }
        let tags = tags_of(&images);
        if let Some(tag) = self.tag.as_ref().filter(|_| !self.store.is_chosen()) {
            let names: Vec<Vec<String>> = images.iter().map(names_of).collect();
            let places = names::meant(&names, tag);
            let mut place = 0..;
            images.retain(|_| place.next().is_some_and(|place| places.contains(&place)));
        }
        // One image with several names is not several.
        let mut seen = HashSet::new();
        let named = images.clone();
        images.retain(|entry| seen.insert(entry.digest));
        match images.len() {
            0 => Err(ImageError::NotFound { image: self.image(), tags }),
            1 => Ok(images),
            _ if are_one_image(&named) => Ok(images),
            _ => Err(ImageError::Ambiguous { image: self.image(), tags }),
        }
    }

    /// A blob, piece by piece. With a hasher it has the right digest or ends with an error.
    fn pieces(
        &self,
        descriptor: &Descriptor,
        range: Range<u64>,
        hasher: Option<Hasher>,
    ) -> impl Stream<Item = Result<Bytes, ImageError>> + Send + use<S> {
        let start = (self.store.clone(), descriptor.clone(), range, None, hasher);
        futures_util::stream::try_unfold(start, |(store, descriptor, mut range, located, mut hasher)| async move {
            blocking(move || {
                let located = match located {
                    Some(located) => located,
                    None => store.locate(&descriptor.digest)?.ok_or_else(|| store.missing(&descriptor.digest))?,
                };
                let size = descriptor.size;
                if located.length != size {
                    return Err(store.wrong_size(&descriptor, located.length).into());
                }
                if range.start > range.end || range.end > size {
                    let (path, digest) = (store.path().to_owned(), Box::new(descriptor.digest));
                    return Err(StoreError::Range { path, digest, range, size }.into());
                }
                if range.start >= range.end {
                    return match hasher.map(Hasher::finish) {
                        Some(found) if found != descriptor.digest => {
                            Err(store.wrong_digest(&descriptor.digest, found).into())
                        }
                        _ => Ok(None),
                    };
                }
                let piece = read_piece(store.path(), &located, range.start, range.end)?;
                range.start += piece.len() as u64;
                if let Some(hasher) = &mut hasher {
                    hasher.update(&piece);
                }
                Ok(Some((piece, (store, descriptor, range, Some(located), hasher))))
            })
            .await
        })
    }
}

impl<S: Store> Place for Stored<S> {
    fn image(&self) -> String {
        let tag = self.tag.as_ref().map(|tag| format!(":{tag}")).unwrap_or_default();
        format!("{}{tag}", self.store.path().display())
    }

    fn place(&self) -> String {
        self.store.path().display().to_string()
    }

    fn roots(&self) -> Answer<'_, Roots> {
        async move { Ok(Roots { entries: self.offered().await?, document: None }) }.boxed()
    }

    fn manifest<'a>(&'a self, descriptor: &'a Descriptor) -> Answer<'a, Option<RawManifest>> {
        let descriptor = descriptor.clone();
        self.read(move |store| store.manifest(&descriptor)).boxed()
    }

    fn size<'a>(&'a self, digest: &'a Digest) -> Answer<'a, Option<u64>> {
        let digest = *digest;
        self.read(move |store| Ok(store.locate(&digest)?.map(|located| located.length))).boxed()
    }

    fn blob_bytes<'a>(&'a self, descriptor: &'a Descriptor, limit: u64) -> Answer<'a, Bytes> {
        let descriptor = descriptor.clone();
        let read =
            move |store: &S| store.blob_bytes(&descriptor, limit)?.ok_or_else(|| store.missing(&descriptor.digest));
        self.read(read).boxed()
    }

    fn open_blob(&self, descriptor: &Descriptor) -> BlobStream {
        let hasher = Hasher::new(descriptor.digest.algorithm());
        BlobStream::new(self.pieces(descriptor, 0..descriptor.size, Some(hasher)))
    }

    fn read_range(&self, descriptor: &Descriptor, range: Range<u64>) -> BlobStream {
        BlobStream::new(self.pieces(descriptor, range, None))
    }

    fn missing(&self, digest: &Digest) -> ImageError {
        self.store.missing(digest).into()
    }

    fn layout(&self) -> Option<&Layout> {
        self.layout.as_ref()
    }

    fn has_made_manifest(&self) -> bool {
        self.store.has_made_manifest()
    }

    fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    fn index_json(&self) -> Answer<'_, Option<Vec<ManifestEntry>>> {
        self.read(|store| {
            let index = Index::parse(&store.index_bytes()?).map_err(|error| StoreError::Malformed {
                path: store.path().to_owned(),
                what: "index.json".to_owned(),
                reason: error.to_string(),
            })?;
            Ok(Some(index.manifests))
        })
        .boxed()
    }
}

/// Whether entries are the platforms of one image: each says which it is for, and no two have different names or,
/// without a name, the same platform.
fn are_one_image(entries: &[Descriptor]) -> bool {
    let platforms: Option<Vec<&Platform>> = entries.iter().map(|entry| entry.platform.as_ref()).collect();
    let Some(platforms) = platforms else { return false };
    let names: HashSet<Vec<String>> = entries.iter().map(names_of).collect();
    let distinct: HashSet<&Platform> = platforms.iter().copied().collect();
    match names.len() {
        1 if names.iter().all(Vec::is_empty) => distinct.len() == platforms.len(),
        count => count == 1,
    }
}

/// Names of an entry. Some tools write the full name where others write the tag.
fn names_of(entry: &Descriptor) -> Vec<String> {
    let named = |key| entry.annotations.get(key).cloned();
    [named(annotation::REF_NAME), named(annotation::CONTAINERD_NAME)].into_iter().flatten().collect()
}

/// Names that can be typed for the entries.
pub(crate) fn tags_of(entries: &[Descriptor]) -> Vec<String> {
    let names: Vec<Vec<String>> = entries.iter().map(names_of).collect();
    names::typed(&names).iter().take(20).map(|name| printable(name, 200)).collect()
}
