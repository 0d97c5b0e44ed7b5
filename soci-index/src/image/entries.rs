//! What the index.json of a layout or archive offers: which of its entries are the image that was named.

use std::collections::HashSet;

use super::{ImageError, ImageSource, blocking};
use crate::image::model::{Descriptor, RawManifest, annotation};
use crate::image::store::{Store, StoreError};
use crate::v2::document::{Entry, Index};

impl ImageSource {
    /// What index.json offers for our tag. Several without a tag are the platforms of one image, if they say which.
    pub(super) async fn store_roots(&self, store: &Store) -> Result<Vec<Descriptor>, ImageError> {
        let reader = store.clone();
        let entries = blocking(move || Ok(reader.entries()?)).await?;
        let mut images: Vec<Descriptor> = entries.into_iter().filter(Descriptor::may_be_image).collect();
        let tags = tags_of(&images);
        if let Self::Store { tag: Some(tag), .. } = self {
            images.retain(|entry| has_tag(entry, tag));
        }
        // One image with several names is not several.
        let mut seen = HashSet::new();
        images.retain(|entry| seen.insert(entry.digest));
        let one_image = images.len() == 1 || images.iter().all(|entry| entry.platform.is_some());
        match images.len() {
            0 => Err(self.not_found(tags)),
            _ if one_image => Ok(images),
            _ => Err(ImageError::Ambiguous { image: self.to_string(), tags }),
        }
    }

    /// The entries of a layout's index.json that make one image between them, with all their fields; `None` when one
    /// entry is the image.
    ///
    /// # Errors
    /// [`ImageError`] when there is no image, or several.
    pub(crate) async fn listed_roots(&self) -> Result<Option<Vec<Entry>>, ImageError> {
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
    pub(crate) async fn root_entry(&self, root: &RawManifest) -> Result<Entry, ImageError> {
        if let Self::Store { store, .. } = self
            && let Some(entry) = self.index_json(store).await?.into_iter().find(|entry| entry.digest == root.digest)
        {
            return Ok(entry);
        }
        Ok(Entry::new(&root.media_type, root.digest, root.bytes.len() as u64))
    }

    async fn index_json(&self, store: &Store) -> Result<Vec<Entry>, ImageError> {
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

fn has_tag(entry: &Descriptor, tag: &str) -> bool {
    let named = |key| entry.annotations.get(key).map(String::as_str);
    // Some tools write the full name where others write the tag.
    let full = |name: &str| name == tag || name.strip_suffix(tag).is_some_and(|rest| rest.ends_with(':'));
    named(annotation::REF_NAME).is_some_and(full) || named(annotation::CONTAINERD_NAME).is_some_and(full)
}

pub(super) fn tags_of(entries: &[Descriptor]) -> Vec<String> {
    let tag = |entry: &Descriptor| {
        let name = entry.annotations.get(annotation::REF_NAME);
        name.or_else(|| entry.annotations.get(annotation::CONTAINERD_NAME)).cloned()
    };
    entries.iter().filter_map(tag).take(20).collect()
}
