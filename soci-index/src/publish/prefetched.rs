//! A start-up profile as AWS's prefetch artifacts, beside an image.
//!
//! AWS's daemon finds such an artifact in the index that it uses, and nowhere else. So the image's index (version 1) is
//! published once more, with the same zTOCs and with one artifact for each layer of which the profile names something;
//! artifacts that it had before are left out, since a start-up is described by one profile. The index without them
//! stays, because nothing in a registry is deleted, and AWS's daemon takes the one that the registry lists first: what
//! else is listed is therefore part of the answer. Order of things: the artifacts, the configuration, then the
//! manifest.

use bytes::Bytes;

use crate::find::discover::{self, Discovery, Which};
use crate::format::class::{Class, Classified};
use crate::format::digest::Digest;
use crate::format::limits::Limits;
use crate::format::manifest::{EMPTY_CONFIG, INDEX_V1, ManifestError, PREFETCH, SociIndex};
use crate::format::model::{Descriptor, media_type};
use crate::format::prefetch;
use crate::format::profile::Profile;
use crate::format::ztoc::{Ztoc, ZtocError};
use crate::image::{ImageError, ImageSource, PlatformImage};
use crate::publish::known;
use crate::registry::referrers::PushedReferrer;
use crate::registry::{Body, RegistryError, Repository};

/// An artifact that was pushed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Artifact {
    pub layer: Digest,
    /// The artifact.
    pub digest: Digest,
    /// How many of the layer's spans it names.
    pub spans: u64,
}

/// What was pushed.
#[derive(Debug, Clone)]
pub struct Prefetched {
    /// The index that names the artifacts.
    pub index: PushedReferrer,
    /// The artifacts, in the order of the image's layers.
    pub artifacts: Vec<Artifact>,
    /// Other indexes of AWS's kind that the registry lists for the image.
    pub besides: Vec<Digest>,
}

/// Why there are no prefetch artifacts.
#[derive(Debug, thiserror::Error)]
pub enum PrefetchedError {
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// A zTOC cannot be read.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// There is no index whose spans could be named.
    #[error("{repository} has no AWS index (version 1) of {image}: {reason}")]
    NoIndex { repository: String, image: Box<Digest>, reason: String },
    /// The index is none.
    #[error("index {digest}: {source}")]
    Manifest { digest: Box<Digest>, source: ManifestError },
    /// A zTOC is none.
    #[error("zTOC {digest} of layer {layer}: {source}")]
    Ztoc { digest: Box<Digest>, layer: Box<Digest>, source: ZtocError },
    /// The profile names nothing of the layers that have a zTOC.
    #[error("the profile names nothing of the {layers} layers that index {index} has zTOCs of")]
    NothingNamed { index: Box<Digest>, layers: usize },
}

impl Classified for PrefetchedError {
    fn class(&self) -> Class {
        match self {
            Self::Registry(error) => error.class(),
            Self::Image(error) => error.class(),
            Self::NoIndex { .. } | Self::NothingNamed { .. } => Class::Other,
            Self::Manifest { .. } | Self::Ztoc { .. } => Class::Content,
        }
    }
}

/// Pushes `profile` as prefetch artifacts of `image` into `repository`, which has the image's index.
///
/// # Errors
/// [`PrefetchedError`]. After an error no new manifest is in the repository, unless it is the registry's list that
/// failed.
pub async fn push(
    repository: &Repository,
    image: &PlatformImage,
    profile: &Profile,
) -> Result<Prefetched, PrefetchedError> {
    let subject = image.raw.digest;
    let found = match discover::on_registry(repository, &subject, Which::Newest).await? {
        Discovery::Found(found) => found,
        Discovery::None { reason, .. } => {
            let (_, refused) = known::refers(repository, &subject, &[INDEX_V1]).await?;
            if let Some(refused) = refused.into_iter().next() {
                return Err(refused.error.into());
            }
            let (repository, image) = (repository.to_string(), Box::new(subject));
            return Err(PrefetchedError::NoIndex { repository, image, reason });
        }
    };
    let parsed = SociIndex::parse(&found.raw, &Limits::DEFAULT);
    let index = parsed.map_err(|source| PrefetchedError::Manifest { digest: Box::new(found.digest), source })?;
    let (mut artifacts, mut named) = (Vec::new(), Vec::new());
    for layer in image.manifest.layers.iter().map(|layer| layer.digest) {
        let is_done = artifacts.iter().any(|done: &Artifact| done.layer == layer);
        let Some(ztoc) = index.ztoc(&layer).filter(|_| profile.layers().contains(&layer) && !is_done) else { continue };
        let Some(prefetch) = prefetch::of_profile(profile, &layer, &fetch(repository, &layer, ztoc).await?) else {
            continue;
        };
        let json = Bytes::from(prefetch.to_json());
        let blob = Descriptor::of(PREFETCH, &json);
        repository.push_blob(&blob.digest, Body::Bytes(json), None).await?;
        artifacts.push(Artifact { layer, digest: blob.digest, spans: prefetch.spans() });
        named.push((layer, blob));
    }
    if artifacts.is_empty() {
        let layers = index.ztocs().count();
        return Err(PrefetchedError::NothingNamed { index: Box::new(found.digest), layers });
    }
    let config = Bytes::from_static(EMPTY_CONFIG);
    repository.push_blob(&Digest::of(&config), Body::Bytes(config), None).await?;
    let json = Bytes::from(index.with_prefetch(&named).to_json());
    let index = repository.push_referrer(media_type::MANIFEST, json).await?;
    let listed = repository.referrers(&subject, Some(INDEX_V1)).await?.entries;
    let besides = listed.iter().filter(|entry| entry.kind() == INDEX_V1 && entry.digest != index.digest);
    Ok(Prefetched { besides: besides.map(|entry| entry.digest).collect(), index, artifacts })
}

async fn fetch(repository: &Repository, layer: &Digest, ztoc: &Descriptor) -> Result<Ztoc, PrefetchedError> {
    let limits = Limits::DEFAULT;
    let bytes = ImageSource::of_repository(repository).blob_bytes(ztoc, limits.ztoc_bytes_max).await?;
    Ztoc::decode(&bytes, &limits).map_err(|source| PrefetchedError::Ztoc {
        digest: Box::new(ztoc.digest),
        layer: Box::new(*layer),
        source,
    })
}
