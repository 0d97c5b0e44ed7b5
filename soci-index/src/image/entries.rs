//! What the index.json of a layout or archive offers: which of its entries are the image that was named.

use std::collections::HashSet;

use crate::format::model::{Descriptor, RawManifest, annotation};
use crate::format::platform::Platform;
use crate::format::v2_document::{Index, ManifestEntry};
use crate::image::members::printable;
use crate::image::names;
use crate::image::store::{Store, StoreError};
use crate::image::{ImageError, ImageSource, blocking};

impl ImageSource {
    /// What index.json offers for our tag. Several without a tag are the platforms of one image, if they say which.
    pub(super) async fn store_roots(&self, store: &Store) -> Result<Vec<Descriptor>, ImageError> {
        let reader = store.clone();
        let entries = blocking(move || Ok(reader.entries()?)).await?;
        let count = entries.len();
        let mut images: Vec<Descriptor> = entries.into_iter().filter(Descriptor::may_be_image).collect();
        if images.is_empty() && count > 0 {
            return Err(ImageError::NoImage { image: self.to_string(), count });
        }
        let tags = tags_of(&images);
        let is_chosen = matches!(store, Store::Archive(archive) if archive.is_chosen());
        if let Self::Store { tag: Some(tag), .. } = self
            && !is_chosen
        {
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
            0 => Err(self.not_found(tags)),
            1 => Ok(images),
            _ if are_one_image(&named) => Ok(images),
            _ => Err(ImageError::Ambiguous { image: self.to_string(), tags }),
        }
    }

    /// The entries of a layout's index.json that make one image between them, with all their fields; `None` when one
    /// entry is the image.
    ///
    /// # Errors
    /// [`ImageError`] when there is no image, or several.
    pub(crate) async fn listed_roots(&self) -> Result<Option<Vec<ManifestEntry>>, ImageError> {
        let Self::Store { store, tag } = self else { return Ok(None) };
        let roots = self.store_roots(store).await?;
        if roots.len() < 2 {
            return Ok(None);
        }
        let mut entries = self.index_json(store).await?;
        // Attestations of the platforms have no tag.
        if tag.is_some() {
            entries.retain(|entry| roots.iter().any(|root| root.digest == entry.digest));
        }
        Ok(Some(entries))
    }

    /// The entry of the image's only manifest, with all its fields where index.json has them.
    pub(crate) async fn root_entry(&self, root: &RawManifest) -> Result<ManifestEntry, ImageError> {
        if let Self::Store { store, .. } = self
            && let Some(entry) = self.index_json(store).await?.into_iter().find(|entry| entry.digest == root.digest)
        {
            return Ok(entry);
        }
        Ok(ManifestEntry::new(&root.media_type, root.digest, root.bytes.len() as u64))
    }

    async fn index_json(&self, store: &Store) -> Result<Vec<ManifestEntry>, ImageError> {
        let store = store.clone();
        blocking(move || {
            let index = Index::parse(&store.index_bytes()?);
            let index = index.map_err(|error| StoreError::Malformed {
                path: store.path().to_owned(),
                what: "index.json".to_owned(),
                reason: error.to_string(),
            })?;
            Ok(index.manifests)
        })
        .await
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
pub(super) fn tags_of(entries: &[Descriptor]) -> Vec<String> {
    let names: Vec<Vec<String>> = entries.iter().map(names_of).collect();
    names::typed(&names).iter().take(20).map(|name| printable(name, 200)).collect()
}
