//! Images, wherever they are: on a registry, in an OCI layout directory, in an archive, in another program's store.
//!
//! An [`ImageSource`] finds the manifests of the requested platforms and serves their blobs. Indexing, verifying and
//! mounting an image need nothing else and are independent of where it comes from. It is an enum, not a trait: the
//! places are known, and those on the disk share their reading code; only for stores whose protocol this crate does not
//! speak there is a trait, [`foreign::ContentStore`]. Invariants: a [`PlatformImage`] has been checked as a whole
//! (digests of manifest and configuration, one `diff_id` per layer); raw bytes travel beside every parsed document;
//! attestations and artifacts are never taken for images.
//!
//! The room uses `format` and `registry`; `find` and `publish` use it. [`sink`] is where things are written to,
//! [`output`] how files are: never half, and never in place of a device.

pub mod archive;
mod docker;
mod entries;
mod error;
pub mod foreign;
pub mod layout;
mod members;
mod names;
pub mod output;
mod parts;
pub mod sink;
pub mod store;
mod stream;
pub mod urls;

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::TryStreamExt;

use crate::format::digest::{Digest, Hasher};
use crate::format::limits::Limits;
use crate::format::model::{Descriptor, ImageConfig, ImageIndex, ImageManifest, RawManifest, media_type};
use crate::format::platform::{Platform, PlatformSelection, best};
use crate::format::reference::{ManifestName, Reference};
use crate::image::archive::Archive;
use crate::image::entries::tags_of;
use crate::image::foreign::{ContentStore, ForeignError};
use crate::image::layout::Layout;
use crate::image::store::Store;
pub use crate::image::stream::BlobStream;
use crate::image::stream::stored;
use crate::registry::{ClientOptions, Registry, Repository};

pub use docker::SavedError;
pub use error::ImageError;

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
pub enum ImageSource {
    Registry {
        repository: Repository,
        name: ManifestName,
    },
    /// In a layout directory or archive.
    Store {
        /// The layout.
        store: Store,
        tag: Option<String>,
    },
    /// In a store that another crate reads.
    Foreign(Arc<dyn ContentStore>),
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
                    let repository = registry.repository(reference.repository());
                    Self::Registry { repository, name: reference.manifest_name() }
                }
                Reference::Layout { directory, tag } => {
                    Self::Store { store: Store::Layout(Layout::open(&directory)?), tag }
                }
                Reference::Archive { file, tag } => Self::Store { store: Store::Archive(Archive::open(&file)?), tag },
                Reference::Saved { file, tag } => {
                    Self::Store { store: Store::Archive(Archive::open_saved(&file, tag.as_deref())?), tag }
                }
                other @ Reference::Containerd { .. } => return Err(ImageError::Elsewhere { image: other.to_string() }),
            })
        })
        .await
    }

    /// A repository as a place of blobs and manifests, none of them meant in particular.
    #[must_use]
    pub fn of_repository(repository: &Repository) -> Self {
        Self::Registry { repository: repository.clone(), name: ManifestName::Tag("latest".to_owned()) }
    }

    /// Its place by name, whatever is meant there: a repository, a directory, another program's image.
    #[must_use]
    pub fn place(&self) -> String {
        match self {
            Self::Registry { repository, .. } => repository.to_string(),
            Self::Store { store, .. } => store.path().display().to_string(),
            Self::Foreign(store) => store.name().to_owned(),
        }
    }

    /// The manifest that the reference names itself: an image's, or an index.
    ///
    /// # Errors
    /// [`ImageError`] when there is none, or (in a layout) several.
    pub async fn root(&self) -> Result<RawManifest, ImageError> {
        match self {
            Self::Registry { repository, name } => {
                repository.manifest(name).await?.ok_or_else(|| self.not_found(Vec::new()))
            }
            Self::Store { store, .. } => {
                let roots = self.store_roots(store).await?;
                match roots.as_slice() {
                    [only] => self.manifest(only).await?.ok_or_else(|| store.missing(&only.digest).into()),
                    several => Err(ImageError::Ambiguous { image: self.to_string(), tags: tags_of(several) }),
                }
            }
            Self::Foreign(store) => {
                let root = store.root().ok_or_else(|| self.not_found(Vec::new()))?;
                self.present(root, None).await
            }
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
        if let (Self::Foreign(store), PlatformSelection::AllPresent) = (self, selection) {
            candidates = foreign::held(&**store, candidates).await?;
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
        let (roots, root) = match self {
            Self::Registry { .. } => {
                let root = self.root().await?;
                (vec![root.descriptor()], Some(root))
            }
            Self::Store { store, .. } => (self.store_roots(store).await?, None),
            Self::Foreign(store) => (vec![store.root().ok_or_else(|| self.not_found(Vec::new()))?.clone()], None),
        };
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
        let raw = self.manifest(descriptor).await?.ok_or_else(|| match self {
            Self::Registry { .. } => self.not_found(Vec::new()),
            Self::Store { store, .. } => store.missing(&descriptor.digest).into(),
            Self::Foreign(store) => ForeignError::missing(&**store, &descriptor.digest).into(),
        })?;
        let found = raw.bytes.len() as u64;
        if found != descriptor.size {
            let reason = format!("it has {found} bytes, its descriptor says {}", descriptor.size);
            return Err(self.malformed("manifest", &descriptor.digest, &reason));
        }
        Ok(raw)
    }

    /// A manifest by its descriptor, checked; `None` when it is not there.
    ///
    /// # Errors
    /// [`ImageError`] when it cannot be read.
    pub async fn manifest(&self, descriptor: &Descriptor) -> Result<Option<RawManifest>, ImageError> {
        match self {
            Self::Registry { repository, .. } => {
                Ok(repository.manifest(&ManifestName::Digest(descriptor.digest)).await?)
            }
            Self::Store { store, .. } => {
                let (store, descriptor) = (store.clone(), descriptor.clone());
                blocking(move || Ok(store.manifest(&descriptor)?)).await
            }
            Self::Foreign(store) => Ok(foreign::manifest(store, descriptor).await?),
        }
    }

    /// A manifest that is known by its digest only; `None` when it is not there.
    ///
    /// # Errors
    /// [`ImageError`] when it cannot be read.
    pub async fn manifest_by_digest(&self, digest: Digest) -> Result<Option<RawManifest>, ImageError> {
        let size = match self {
            Self::Registry { .. } => 0,
            Self::Store { store, .. } => {
                let store = store.clone();
                let located = blocking(move || Ok(store.locate(&digest)?)).await?;
                let Some(located) = located else { return Ok(None) };
                located.length
            }
            Self::Foreign(store) => {
                let Some(size) = store.size(&digest).await? else { return Ok(None) };
                size
            }
        };
        self.manifest(&Descriptor::new(media_type::MANIFEST, digest, size)).await
    }

    /// Whether a blob is there, of the size that its descriptor says.
    ///
    /// # Errors
    /// [`ImageError`] when that cannot be found out.
    pub async fn has_blob(&self, blob: &Descriptor) -> Result<bool, ImageError> {
        let (digest, size) = (blob.digest, blob.size);
        match self {
            Self::Registry { repository, .. } => Ok(repository.blob_size(&digest).await? == Some(size)),
            Self::Store { store, .. } => {
                let store = store.clone();
                blocking(move || Ok(store.locate(&digest)?.is_some_and(|located| located.length == size))).await
            }
            Self::Foreign(store) => Ok(store.size(&digest).await? == Some(size)),
        }
    }

    /// A whole blob of at most `limit` bytes, checked.
    ///
    /// # Errors
    /// [`ImageError`] when it is missing, too large or not what the descriptor says.
    pub async fn blob_bytes(&self, descriptor: &Descriptor, limit: u64) -> Result<Bytes, ImageError> {
        match self {
            Self::Registry { repository, .. } => Ok(repository.blob_bytes(descriptor, limit).await?),
            Self::Store { store, .. } => {
                let (store, descriptor) = (store.clone(), descriptor.clone());
                blocking(move || {
                    let bytes = store.blob_bytes(&descriptor, limit)?;
                    bytes.ok_or_else(|| store.missing(&descriptor.digest).into())
                })
                .await
            }
            Self::Foreign(store) => Ok(foreign::bytes(store, descriptor, limit).await?),
        }
    }

    /// A whole blob as it arrives. Its length is checked, and the stream ends with an error instead of an end when its
    /// digest is not the descriptor's.
    #[must_use]
    pub fn open_blob(&self, descriptor: &Descriptor) -> BlobStream {
        match self {
            Self::Registry { repository, .. } => {
                let stream = repository.blob(descriptor.digest, descriptor.size).read_all();
                BlobStream::new(stream.map_err(ImageError::from))
            }
            Self::Store { store, .. } => {
                let hasher = Hasher::new(descriptor.digest.algorithm());
                BlobStream::new(stored(store, descriptor, 0..descriptor.size, Some(hasher)))
            }
            Self::Foreign(store) => {
                let hasher = Hasher::new(descriptor.digest.algorithm());
                let stream = foreign::stream(store, descriptor, 0..descriptor.size, Some(hasher));
                BlobStream::new(stream.map_err(ImageError::from))
            }
        }
    }

    /// A part of a blob as it arrives. It is *not* checked against any digest.
    #[must_use]
    pub fn read_range(&self, descriptor: &Descriptor, range: Range<u64>) -> BlobStream {
        match self {
            Self::Registry { repository, .. } => {
                let stream = repository.blob(descriptor.digest, descriptor.size).read_range(range);
                BlobStream::new(stream.map_err(ImageError::from))
            }
            Self::Store { store, .. } => BlobStream::new(stored(store, descriptor, range, None)),
            Self::Foreign(store) => {
                BlobStream::new(foreign::stream(store, descriptor, range, None).map_err(ImageError::from))
            }
        }
    }

    fn not_found(&self, tags: Vec<String>) -> ImageError {
        ImageError::NotFound { image: self.to_string(), tags }
    }

    fn malformed(&self, what: &'static str, digest: &Digest, reason: &str) -> ImageError {
        let (image, digest) = (self.to_string(), Box::new(*digest));
        ImageError::Malformed { image, what, digest, reason: reason.to_owned() }
    }
}

impl std::fmt::Display for ImageSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Registry { repository, name } => {
                let separator = if matches!(name, ManifestName::Tag(_)) { ':' } else { '@' };
                write!(f, "{}/{}{separator}{name}", repository.registry().name(), repository.name())
            }
            Self::Store { store, tag } => {
                write!(f, "{}", store.path().display())?;
                tag.as_ref().map_or(Ok(()), |tag| write!(f, ":{tag}"))
            }
            Self::Foreign(store) => f.write_str(store.name()),
        }
    }
}

/// Runs file access where it may block.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ImageError> + Send + 'static,
) -> Result<T, ImageError> {
    tokio::task::spawn_blocking(work).await.unwrap_or(Err(ImageError::Stopped))
}
