//! Images, wherever they are: on a registry, in an OCI layout directory, in an archive, in another program's store.
//!
//! An [`ImageSource`] finds the manifests of the requested platforms and serves their blobs. Indexing, verifying and
//! mounting an image need nothing else and are independent of where it comes from: each kind of place implements one
//! trait, `Place`, and what only some can do they are asked for as an option (`Place::repository`). Stores whose
//! protocol this crate does not speak are given to it as a [`foreign::ContentStore`]. Invariants: a
//! [`PlatformImage`] has been checked as a whole (digests of manifest and configuration, one `diff_id` per layer); raw
//! bytes travel beside every parsed document; attestations and artifacts are never taken for images.
//!
//! The room uses `format` and `registry`; `find` and `publish` use it. [`sink`] is where things are written to,
//! [`output`] how files are: never half, and never in place of a device.

mod archive;
mod docker;
mod error;
pub mod foreign;
pub mod layout;
mod members;
mod names;
pub mod output;
pub(crate) mod place;
mod saved;
pub mod sink;
pub mod store;
pub mod urls;

use std::ops::Deref;
use std::sync::Arc;

use bytes::Bytes;

use crate::format::digest::Digest;
use crate::format::limits::Limits;
use crate::format::model::{Descriptor, ImageConfig, ImageIndex, ImageManifest, RawManifest, media_type};
use crate::format::platform::{Platform, PlatformSelection, best};
use crate::format::reference::{ManifestName, Reference};
use crate::format::v2_document::ManifestEntry;
use crate::image::archive::Archive;
use crate::image::foreign::{ContentStore, Foreign};
use crate::image::layout::Layout;
pub use crate::image::place::BlobStream;
use crate::image::place::{InRegistry, Place, Roots, Stored, blocking, tags_of};
use crate::registry::{ClientOptions, Registry, Repository};

pub use error::ImageError;
pub use saved::SavedError;

/// How deep an image index may hold further indexes.
const DEPTH_MAX: usize = 3;
/// Manifests of one image. Stops an index that makes us fetch without end.
const MANIFESTS_MAX: usize = 1000;

/// The image of one platform.
#[derive(Debug, Clone)]
pub struct PlatformImage {
    /// The platform: the index's word for it, else the configuration's.
    pub platform: Platform,
    /// The manifest's descriptor, as the index has it.
    pub descriptor: Descriptor,
    /// The manifest, byte for byte.
    pub raw: RawManifest,
    /// The same, parsed.
    pub manifest: ImageManifest,
    /// The configuration, byte for byte.
    pub raw_config: Bytes,
    /// The same, parsed.
    pub config: ImageConfig,
}

/// Where an image is.
#[derive(Debug, Clone)]
pub struct ImageSource(Arc<dyn Place>);

impl Deref for ImageSource {
    type Target = dyn Place;

    fn deref(&self) -> &Self::Target {
        &*self.0
    }
}

impl ImageSource {
    /// Opens what a reference names. Only a layout or archive is looked at; a registry is not asked yet.
    ///
    /// # Errors
    /// [`ImageError`] when there is no such layout, or no access to the registry can be set up;
    /// [`ImageError::Elsewhere`] for what only another crate reads.
    pub async fn open(reference: &Reference, options: &ClientOptions) -> Result<Self, ImageError> {
        let reference = reference.clone();
        let options = options.clone();
        blocking(move || {
            Ok(match reference.settled(std::path::Path::exists) {
                Reference::Registry(reference) => {
                    let registry = Registry::new(reference.registry(), options)?;
                    Self::in_registry(&registry.repository(reference.repository()), reference.manifest_name())
                }
                Reference::Layout { directory, tag } => Self::in_layout(Layout::open(&directory)?, tag),
                Reference::Archive { file, tag } => Self::in_archive(Archive::open(&file)?, tag),
                Reference::Saved { file, tag } => Self::in_archive(Archive::open_saved(&file, tag.as_deref())?, tag),
                other @ Reference::Containerd { .. } => return Err(ImageError::Elsewhere { image: other.to_string() }),
            })
        })
        .await
    }

    /// An image in a repository.
    #[must_use]
    pub fn in_registry(repository: &Repository, name: ManifestName) -> Self {
        Self(Arc::new(InRegistry { repository: repository.clone(), name }))
    }

    /// A repository as a place of blobs and manifests, none of them meant in particular.
    #[must_use]
    pub fn of_repository(repository: &Repository) -> Self {
        Self::in_registry(repository, ManifestName::Tag("latest".to_owned()))
    }

    /// A layout directory as a place of blobs and manifests, none of them meant in particular.
    #[must_use]
    pub fn of_layout(layout: &Layout) -> Self {
        Self::in_layout(layout.clone(), None)
    }

    /// An image in a store that another crate reads.
    #[must_use]
    pub fn foreign(store: Arc<dyn ContentStore>) -> Self {
        Self(Arc::new(Foreign(store)))
    }

    pub(crate) fn in_layout(layout: Layout, tag: Option<String>) -> Self {
        Self(Arc::new(Stored { store: layout.clone(), tag, layout: Some(layout) }))
    }

    fn in_archive(store: Archive, tag: Option<String>) -> Self {
        Self(Arc::new(Stored { store, tag, layout: None }))
    }

    /// The entry of the image's only manifest, with all its fields where an index.json has them.
    pub(crate) async fn root_entry(&self, root: &RawManifest) -> Result<ManifestEntry, ImageError> {
        let entries = self.index_json().await?.unwrap_or_default();
        let listed = entries.into_iter().find(|entry| entry.digest == root.digest);
        Ok(listed.unwrap_or_else(|| ManifestEntry::new(&root.media_type, root.digest, root.bytes.len() as u64)))
    }

    /// The manifest that the reference names itself: an image's, or an index.
    ///
    /// # Errors
    /// [`ImageError`] when there is none, or (in a layout) several.
    pub async fn root(&self) -> Result<RawManifest, ImageError> {
        self.root_of(self.roots().await?).await
    }

    pub(crate) async fn root_of(&self, roots: Roots) -> Result<RawManifest, ImageError> {
        match (roots.document, roots.entries.as_slice()) {
            (Some(document), _) => Ok(document),
            (None, [only]) => self.present(only, None).await,
            (None, several) => Err(ImageError::Ambiguous { image: self.to_string(), tags: tags_of(several) }),
        }
    }

    /// The images of the platforms that are wanted, each checked and with its configuration.
    ///
    /// # Errors
    /// [`ImageError`] when one of them is missing or malformed.
    pub async fn resolve(&self, selection: &PlatformSelection) -> Result<Vec<PlatformImage>, ImageError> {
        self.resolve_with(selection, |_| {}).await
    }

    /// The same; `on_digest` receives the digest of each of these images as soon as it is known, which is before the
    /// image is here.
    ///
    /// # Errors
    /// As [`ImageSource::resolve`].
    pub async fn resolve_with(
        &self,
        selection: &PlatformSelection,
        on_digest: impl FnMut(&Digest),
    ) -> Result<Vec<PlatformImage>, ImageError> {
        let (candidates, root) = self.candidates().await?;
        self.resolve_among(candidates, root, selection, on_digest).await
    }

    /// The same, and [`ImageSource::root`] beside it: a registry is asked for that once, so both are of the same
    /// moment.
    ///
    /// # Errors
    /// As both.
    pub async fn resolve_with_root(
        &self,
        selection: &PlatformSelection,
    ) -> Result<(RawManifest, Vec<PlatformImage>), ImageError> {
        let (candidates, root) = self.candidates().await?;
        let root = match root {
            Some(root) => root,
            None => self.root().await?,
        };
        let images = self.resolve_among(candidates, Some(root.clone()), selection, |_| {}).await?;
        Ok((root, images))
    }

    async fn resolve_among(
        &self,
        mut candidates: Vec<Descriptor>,
        root: Option<RawManifest>,
        selection: &PlatformSelection,
        mut on_digest: impl FnMut(&Digest),
    ) -> Result<Vec<PlatformImage>, ImageError> {
        if self.is_partial() && *selection == PlatformSelection::AllPresent {
            candidates = self.held(candidates).await?;
        }
        // The only one is meant, whatever its configuration will say.
        let only = match (&candidates[..], selection) {
            ([only], PlatformSelection::All | PlatformSelection::AllPresent | PlatformSelection::Host) => {
                Some(only.digest)
            }
            _ => None,
        };
        only.iter().for_each(&mut on_digest);
        let mut offered = Vec::new();
        for descriptor in candidates {
            // Without a platform in the index only the configuration names it.
            offered.push(match descriptor.platform.clone() {
                Some(platform) => (platform, descriptor, None),
                None => {
                    let image = self.load(&descriptor, root.as_ref()).await?;
                    (image.platform.clone(), descriptor, Some(image))
                }
            });
        }
        let mut images = Vec::new();
        for place in self.choose(selection, offered.iter().map(|(platform, ..)| platform))? {
            let Some((_, descriptor, loaded)) = offered.get(place) else { continue };
            if only.is_none() {
                on_digest(&descriptor.digest);
            }
            images.push(match loaded {
                Some(image) => image.clone(),
                None => self.load(descriptor, root.as_ref()).await?,
            });
        }
        Ok(images)
    }

    /// Those of the manifests that are there. An image that was pulled for one platform names the others all the same.
    async fn held(&self, manifests: Vec<Descriptor>) -> Result<Vec<Descriptor>, ImageError> {
        let (mut held, mut absent) = (Vec::new(), None);
        for manifest in manifests {
            if self.size(&manifest.digest).await?.is_some() {
                held.push(manifest);
            } else {
                let platform = manifest.platform.as_ref().map(ToString::to_string).unwrap_or_default();
                tracing::warn!(image = %self, manifest = %manifest.digest, platform, "left out: it was not pulled");
                absent = Some(manifest.digest);
            }
        }
        match absent.filter(|_| held.is_empty()) {
            Some(digest) => Err(self.missing(&digest)),
            None => Ok(held),
        }
    }

    fn choose<'a>(
        &self,
        selection: &PlatformSelection,
        offered: impl Iterator<Item = &'a Platform> + Clone,
    ) -> Result<Vec<usize>, ImageError> {
        let count = offered.clone().count();
        let one = |wanted: &Platform| {
            best(wanted, offered.clone()).ok_or_else(|| ImageError::NoPlatform {
                image: self.to_string(),
                wanted: wanted.clone(),
                offered: offered.clone().cloned().collect(),
            })
        };
        Ok(match selection {
            PlatformSelection::All | PlatformSelection::AllPresent => (0..count).collect(),
            PlatformSelection::Host if count == 1 => vec![0],
            PlatformSelection::Host => vec![one(&Platform::host())?],
            PlatformSelection::Only(wanted) => {
                let mut places = Vec::new();
                for platform in wanted {
                    let place = one(platform)?;
                    if !places.contains(&place) {
                        places.push(place);
                    }
                }
                places
            }
        })
    }

    /// All entries that may be images, indexes opened; and what was read from a registry on the way, lest it be asked
    /// twice.
    async fn candidates(&self) -> Result<(Vec<Descriptor>, Option<RawManifest>), ImageError> {
        let Roots { entries: roots, document: root } = self.roots().await?;
        let mut found: Vec<Descriptor> = Vec::new();
        // A stack in reverse, so that the entries come out in the order of the index.
        let mut open: Vec<(Descriptor, usize)> = roots.into_iter().rev().map(|root| (root, 0)).collect();
        let (mut seen, mut others) = (0, 0);
        while let Some((descriptor, depth)) = open.pop() {
            seen += 1;
            if seen > MANIFESTS_MAX || depth > DEPTH_MAX {
                let reason = format!("more than {MANIFESTS_MAX} manifests, or indexes deeper than {DEPTH_MAX}");
                return Err(self.malformed("image index", &descriptor.digest, &reason));
            }
            if !descriptor.is_index() {
                if !found.iter().any(|known| known.digest == descriptor.digest) {
                    found.push(descriptor);
                }
                continue;
            }
            let raw = self.present(&descriptor, root.as_ref()).await?;
            let index: ImageIndex = serde_json::from_slice(&raw.bytes)
                .map_err(|error| self.malformed("image index", &descriptor.digest, &error.to_string()))?;
            let (images, rest): (Vec<_>, Vec<_>) = index.manifests.into_iter().partition(Descriptor::may_be_image);
            others += rest.len();
            open.extend(images.into_iter().rev().map(|entry| (entry, depth + 1)));
        }
        if found.is_empty() {
            return Err(ImageError::NoImage { image: self.to_string(), count: others });
        }
        Ok((found, root))
    }

    async fn load(&self, descriptor: &Descriptor, known: Option<&RawManifest>) -> Result<PlatformImage, ImageError> {
        let raw = self.present(descriptor, known).await?;
        let manifest: ImageManifest = serde_json::from_slice(&raw.bytes)
            .map_err(|error| self.malformed("manifest", &descriptor.digest, &error.to_string()))?;
        let config_type = manifest.config.media_type.as_str();
        if !matches!(config_type, "" | media_type::CONFIG | media_type::DOCKER_CONFIG) {
            return Err(ImageError::NotAnImage {
                image: self.to_string(),
                digest: Box::new(descriptor.digest),
                kind: manifest.kind().to_owned(),
            });
        }
        let raw_config = self.blob_bytes(&manifest.config, Limits::DEFAULT.manifest_bytes_max).await?;
        let malformed = |reason: &str| self.malformed("configuration", &manifest.config.digest, reason);
        let config: ImageConfig = serde_json::from_slice(&raw_config).map_err(|error| malformed(&error.to_string()))?;
        if config.diff_ids.len() != manifest.layers.len() {
            let (ids, layers) = (config.diff_ids.len(), manifest.layers.len());
            return Err(malformed(&format!("it has {ids} diff_ids for {layers} layers")));
        }
        let platform = descriptor.platform.clone().unwrap_or_else(|| config.platform.clone());
        Ok(PlatformImage { platform, descriptor: descriptor.clone(), raw, manifest, raw_config, config })
    }

    async fn present(&self, descriptor: &Descriptor, known: Option<&RawManifest>) -> Result<RawManifest, ImageError> {
        if let Some(known) = known.filter(|known| known.digest == descriptor.digest) {
            return Ok(known.clone());
        }
        let raw = self.manifest(descriptor).await?.ok_or_else(|| self.missing(&descriptor.digest))?;
        let found = raw.bytes.len() as u64;
        if found != descriptor.size {
            let reason = format!("it has {found} bytes, its descriptor says {}", descriptor.size);
            return Err(self.malformed("manifest", &descriptor.digest, &reason));
        }
        Ok(raw)
    }

    fn malformed(&self, what: &'static str, digest: &Digest, reason: &str) -> ImageError {
        let (image, digest) = (self.to_string(), Box::new(*digest));
        ImageError::Malformed { image, what, digest, reason: reason.to_owned() }
    }
}

impl std::fmt::Display for ImageSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.image())
    }
}
