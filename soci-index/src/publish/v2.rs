//! The SOCI-enabled image (version 2): the image says itself which index is its own.
//!
//! Its image index lists, beside each image manifest, a SOCI manifest; the image manifest names it in an annotation,
//! and the SOCI manifest's entry names the image manifest in another. So no registry needs to know referrers, and the
//! index is bound by the image's digest, which is a new one. This module only writes documents: what goes where is
//! [`crate::publish::convert`]'s business.
//!
//! The documents are those of AWS's tool, byte for byte (aws-formats, section 7), which has a side effect: an entry's
//! own annotations are replaced by those of its manifest, and with them goes what an attestation says it belongs to.
//! [`EntryNotes::Kept`] keeps them, and leaves the attestations as they are. Two of that tool's mistakes are not
//! repeated: a SOCI manifest of an earlier conversion is never taken for an image, and neither is any other artifact.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use crate::format::class::{Class, Classified};
use crate::format::digest::Digest;
use crate::format::manifest::{IMAGE_MANIFEST_DIGEST, INDEX_DIGEST, INDEX_V2};
use crate::format::model::{annotation, media_type};
use crate::format::platform::Platform;
use crate::format::v2_document::{EntryPlatform, Index, Manifest, ManifestEntry};

/// What becomes of the annotations that an image index has for its entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EntryNotes {
    /// Replaced by those of the manifest, as AWS's tool does.
    #[default]
    Replaced,
    /// Kept, and attestations say that they belong to the new manifests.
    Kept,
}

/// A platform for which there is a SOCI index.
#[derive(Debug, Clone)]
pub struct Indexed {
    /// Its image manifest, before.
    pub image: Digest,
    /// The platform as the entry of the SOCI index shall name it.
    pub platform: EntryPlatform,
    /// The SOCI index (version 2).
    pub index: Bytes,
}

/// A document of the new image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    pub media_type: &'static str,
    pub digest: Digest,
    /// The document.
    pub bytes: Bytes,
}

/// The new image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Enabled {
    /// SOCI indexes, then image manifests: all that is written new but the image index.
    pub manifests: Vec<Document>,
    /// Entries that stay as they are; what they point at must be where the image goes.
    pub untouched: Vec<ManifestEntry>,
    /// The image index.
    pub index: Document,
    /// Which manifest took the place of which.
    pub renamed: BTreeMap<Digest, Digest>,
    /// The manifests of the platforms that are indexed.
    pub indexed: BTreeSet<Digest>,
}

/// Why an image cannot be SOCI-enabled.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EnableError {
    /// A manifest of the image is not well formed.
    #[error("manifest {digest} cannot be read: {reason}")]
    Malformed { digest: Box<Digest>, reason: String },
    /// The manifest of an indexed platform is not in the index itself.
    #[error("the image index does not list {digest} itself but in an index inside it, which has no version 2 form")]
    Nested { digest: Box<Digest> },
}

impl Classified for EnableError {
    fn class(&self) -> Class {
        Class::Content
    }
}

impl Enabled {
    /// What took the place of an image manifest.
    #[must_use]
    pub(crate) fn manifest_of(&self, image: &Digest) -> Option<&Document> {
        let new = self.renamed.get(image)?;
        self.manifests.iter().find(|document| document.digest == *new)
    }
}

impl Document {
    fn new(media_type: &'static str, bytes: Vec<u8>) -> Self {
        Self { media_type, digest: Digest::of(&bytes), bytes: bytes.into() }
    }

    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }
}

impl From<&Platform> for EntryPlatform {
    fn from(platform: &Platform) -> Self {
        Self {
            architecture: platform.architecture().to_owned(),
            os: platform.os().to_owned(),
            os_version: String::new(),
            os_features: Vec::new(),
            variant: platform.variant().to_owned(),
        }
    }
}

impl From<&EntryPlatform> for Platform {
    fn from(platform: &EntryPlatform) -> Self {
        Self::new(&platform.os, &platform.architecture, &platform.variant)
    }
}

/// Makes the documents of the SOCI-enabled image. `root` is the image index, or one made of a single manifest;
/// `children` are the manifests that are there, by digest: an entry without one stays as it is.
///
/// # Errors
/// [`EnableError`].
pub fn enable(
    root: &Index,
    children: &BTreeMap<Digest, Bytes>,
    indexed: &[Indexed],
    notes: EntryNotes,
) -> Result<Enabled, EnableError> {
    for one in indexed {
        if !root.manifests.iter().any(|entry| entry.digest == one.image) {
            return Err(EnableError::Nested { digest: Box::new(one.image) });
        }
    }
    let mut index = root.clone();
    index.media_type = media_type::INDEX.to_owned();
    let mut manifests: Vec<Document> =
        indexed.iter().map(|one| Document::new(media_type::MANIFEST, one.index.to_vec())).collect();
    let socis: Vec<(Digest, u64)> = manifests.iter().map(|soci| (soci.digest, soci.size())).collect();
    let mut renamed = BTreeMap::new();
    for entry in &mut index.manifests {
        let Some(bytes) = children.get(&entry.digest).filter(|_| is_rewritten(entry, notes)) else { continue };
        let place = indexed.iter().position(|one| one.image == entry.digest);
        let soci = place.and_then(|place| socis.get(place)).map(|(digest, _)| digest);
        let Some(document) = rewrite(entry, bytes, soci, notes)? else { continue };
        renamed.insert(entry.digest, document.digest);
        (entry.digest, entry.size) = (document.digest, document.size());
        manifests.push(document);
    }
    if notes == EntryNotes::Kept {
        index.manifests.iter_mut().for_each(|entry| follow(entry, &renamed));
    }
    for (one, (digest, size)) in indexed.iter().zip(&socis) {
        place_soci(&mut index, one, *digest, *size, &renamed);
    }
    manifests.dedup_by_key(|document| document.digest);
    let ours = |entry: &&ManifestEntry| !manifests.iter().any(|document| document.digest == entry.digest);
    let untouched = index.manifests.iter().filter(ours).cloned().collect();
    let index = Document::new(media_type::INDEX, index.to_json());
    let indexed = indexed.iter().filter_map(|one| renamed.get(&one.image).copied()).collect();
    Ok(Enabled { manifests, untouched, index, renamed, indexed })
}

/// Whether an entry's manifest is written again.
fn is_rewritten(entry: &ManifestEntry, notes: EntryNotes) -> bool {
    let attestation = entry.annotations.contains_key(annotation::DOCKER_REFERENCE_TYPE);
    entry.artifact_type != INDEX_V2
        && !media_type::is_index(&entry.media_type)
        && !(attestation && notes == EntryNotes::Kept)
}

/// The manifest in its OCI form, naming its SOCI index; `None` for what is no image. The entry's type and annotations
/// follow.
fn rewrite(
    entry: &mut ManifestEntry,
    bytes: &[u8],
    soci: Option<&Digest>,
    notes: EntryNotes,
) -> Result<Option<Document>, EnableError> {
    let malformed = |reason: String| EnableError::Malformed { digest: Box::new(entry.digest), reason };
    let mut manifest = Manifest::parse(bytes).map_err(|error| malformed(error.to_string()))?;
    if !manifest.has_image_config() {
        return Ok(None);
    }
    // Registries refuse Docker's types beside artifacts, and OCI's beside a configuration of Docker's type.
    manifest.media_type = media_type::MANIFEST.to_owned();
    manifest.config.media_type = media_type::CONFIG.to_owned();
    if let Some(soci) = soci {
        manifest.annotations.insert(INDEX_DIGEST.to_owned(), soci.to_string());
    }
    entry.media_type = media_type::MANIFEST.to_owned();
    match notes {
        EntryNotes::Replaced => entry.annotations = manifest.annotations.clone(),
        EntryNotes::Kept => {
            let named = manifest.annotations.get(INDEX_DIGEST).map(|soci| (INDEX_DIGEST.to_owned(), soci.clone()));
            entry.annotations.extend(named);
        }
    }
    Ok(Some(Document::new(media_type::MANIFEST, manifest.to_json())))
}

/// An attestation names the image that it is about by digest: the new one.
fn follow(entry: &mut ManifestEntry, renamed: &BTreeMap<Digest, Digest>) {
    let Some(about) = entry.annotations.get_mut(annotation::DOCKER_REFERENCE_DIGEST) else { return };
    if let Some(new) = about.parse().ok().and_then(|old: Digest| renamed.get(&old)) {
        *about = new.to_string();
    }
}

/// Puts a SOCI index in the place of the platform's earlier one, or at the end.
fn place_soci(index: &mut Index, one: &Indexed, digest: Digest, size: u64, renamed: &BTreeMap<Digest, Digest>) {
    let image = renamed.get(&one.image).copied().unwrap_or(one.image);
    let mut entry = ManifestEntry::new(media_type::MANIFEST, digest, size);
    entry.annotations.insert(IMAGE_MANIFEST_DIGEST.to_owned(), image.to_string());
    entry.platform = Some(one.platform.clone());
    entry.artifact_type = INDEX_V2.to_owned();
    let platform = Platform::from(&one.platform);
    let earlier = |listed: &&mut ManifestEntry| {
        let of_image = listed
            .annotations
            .get(IMAGE_MANIFEST_DIGEST)
            .is_some_and(|of| of.parse().is_ok_and(|of: Digest| of == one.image || of == image));
        let same = listed.platform.as_ref().is_some_and(|listed| Platform::from(listed) == platform);
        listed.artifact_type == INDEX_V2 && (same || of_image)
    };
    match index.manifests.iter_mut().find(earlier) {
        Some(listed) => *listed = entry,
        None => index.manifests.push(entry),
    }
}
