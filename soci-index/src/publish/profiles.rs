//! Profiles beside an image: finding, fetching and pushing them.
//!
//! Order of things when one is pushed: the pack, the profile, the configuration and the icon, then the manifest, which
//! names the image, then the check that the registry lists it. What is passed over in a search is said in the log only:
//! a profile is a hint, and a faulty one must not fail an operation.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use futures_util::StreamExt as _;

use crate::format::class::{Class, Classified};
use crate::format::digest::Digest;
use crate::format::icon;
use crate::format::limits::Limits;
use crate::format::manifest::EMPTY_CONFIG;
use crate::format::model::{Descriptor, RawManifest, media_type};
use crate::format::profile::artifact::{self, ARTIFACT, Notes, Published};
use crate::format::profile::{PACK, PROFILE, Profile, ProfileError};
use crate::format::reference::ManifestName;
use crate::image::sink::file_body;
use crate::image::store::Store as _;
use crate::image::{ImageError, ImageSource};
use crate::registry::referrers::{Listing, Lists, PushedReferrer};
use crate::registry::{Body, RegistryError, Repository};

/// Manifests that are fetched at most. Stops a repository full of profiles from holding up a mount.
const CANDIDATES_MAX: usize = 32;
/// Manifests that are fetched at the same time: each costs a round trip.
const PARALLEL: usize = 8;
/// Bytes of a profile blob at most: the largest that keeps the limits is smaller.
const BLOB_BYTES_MAX: u64 = 64 << 20;

/// Why a profile could not be found, fetched or pushed.
#[derive(Debug, thiserror::Error)]
pub enum ProfilesError {
    /// The image's place cannot be read.
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// A blob is no profile.
    #[error("profile {digest}: {source}")]
    Profile { digest: Box<Digest>, source: ProfileError },
    /// The profile that is to be pushed cannot be written down.
    #[error("cannot write the profile down: {0}")]
    Encode(ProfileError),
    /// The pack cannot be read.
    #[error("cannot read the pack {}: {cause}", file.display())]
    Pack { file: PathBuf, cause: std::io::Error },
}

impl Classified for ProfilesError {
    fn class(&self) -> Class {
        match self {
            Self::Image(error) => error.class(),
            Self::Registry(error) => error.class(),
            Self::Profile { .. } => Class::Content,
            Self::Encode(_) => Class::Other,
            Self::Pack { .. } => Class::Local,
        }
    }
}

/// The profiles of `image`, the preferred ones first.
///
/// # Errors
/// [`ProfilesError`] when the registry cannot be asked. What cannot be read is passed over.
pub async fn list(source: &ImageSource, image: &Digest) -> Result<Vec<Published>, ProfilesError> {
    if let Some(repository) = source.repository() {
        return of_registry(Lists::Repository(repository), image).await;
    }
    let Some(layout) = source.layout() else { return Ok(Vec::new()) };
    let mut raws = Vec::new();
    for entry in layout.entries().map_err(ImageError::from)?.iter().filter(|entry| entry.kind() == ARTIFACT) {
        raws.extend(layout.manifest(entry).map_err(ImageError::from)?);
    }
    Ok(profiles(&raws, image))
}

/// The same by a list that was asked for early.
///
/// # Errors
/// As [`list`].
pub async fn list_early(listing: &Listing) -> Result<Vec<Published>, ProfilesError> {
    of_registry(Lists::Early(listing), listing.subject()).await
}

async fn of_registry(lists: Lists<'_>, image: &Digest) -> Result<Vec<Published>, ProfilesError> {
    let mut entries = lists.referrers(image, Some(ARTIFACT)).await?.entries;
    entries.sort_by_key(|entry| entry.digest);
    entries.dedup_by_key(|entry| entry.digest);
    let fetched = futures_util::stream::iter(entries.into_iter().take(CANDIDATES_MAX))
        .map(|entry| async move {
            let raw = lists.manifest(entry.digest).await;
            raw.inspect_err(|error| tracing::debug!(digest = %entry.digest, %error, "a profile cannot be read")).ok()?
        })
        .buffered(PARALLEL);
    let raws: Vec<RawManifest> = fetched.filter_map(std::future::ready).collect().await;
    Ok(profiles(&raws, image))
}

/// Those of some manifests that are profiles of `image`.
fn profiles(raws: &[RawManifest], image: &Digest) -> Vec<Published> {
    let profile = |raw: &RawManifest| {
        let parsed = artifact::parse(raw.digest, &raw.bytes, image);
        parsed.inspect_err(|reason| tracing::debug!(digest = %raw.digest, reason, "not a profile of this image")).ok()
    };
    let mut found: Vec<Published> = raws.iter().filter_map(profile).collect();
    artifact::order(&mut found);
    found
}

/// A published profile's content.
///
/// # Errors
/// [`ProfilesError`] when it cannot be obtained or is none.
pub async fn fetch(source: &ImageSource, published: &Published) -> Result<Profile, ProfilesError> {
    let blob = source.blob_bytes(&published.profile, BLOB_BYTES_MAX).await?;
    decode(&published.profile.digest, &blob)
}

fn decode(digest: &Digest, blob: &[u8]) -> Result<Profile, ProfilesError> {
    let decoded = Profile::decode(blob, &Limits::DEFAULT);
    decoded.map_err(|source| ProfilesError::Profile { digest: Box::new(*digest), source })
}

/// Pushes a profile of the image `subject`, with the pack in `pack` if there is one. The same profile under the same
/// name is not made a second time, although it would have another time in it.
///
/// # Errors
/// [`ProfilesError`]. After an error no new manifest is in the repository.
pub async fn push(
    repository: &Repository,
    subject: &Descriptor,
    profile: &Profile,
    pack: Option<&Path>,
    notes: &Notes,
) -> Result<PushedReferrer, ProfilesError> {
    let blob = Bytes::from(profile.encode().map_err(ProfilesError::Encode)?);
    let pack = match pack {
        Some(file) => Some(push_pack(repository, file).await?),
        None => None,
    };
    for bytes in [blob.clone(), Bytes::from_static(EMPTY_CONFIG), Bytes::from_static(icon::PNG)] {
        repository.push_blob(&Digest::of(&bytes), Body::Bytes(bytes), None).await?;
    }
    let profile = Descriptor::of(PROFILE, &blob);
    let manifest = match there(repository, &subject.digest, &profile, pack.as_ref(), notes).await {
        Some(manifest) => manifest,
        None => artifact::manifest(notes, &profile, pack.as_ref(), subject).into(),
    };
    Ok(repository.push_referrer(media_type::MANIFEST, manifest).await?)
}

/// The manifest that says all of this already, but for the time.
async fn there(
    repository: &Repository,
    image: &Digest,
    profile: &Descriptor,
    pack: Option<&Descriptor>,
    notes: &Notes,
) -> Option<Bytes> {
    let known = of_registry(Lists::Repository(repository), image).await;
    let known = known.inspect_err(|error| tracing::debug!(%error, "it is not known which profiles there are")).ok()?;
    let digest = |blob: Option<&Descriptor>| blob.map(|blob| blob.digest);
    let is_same = |one: &&Published| {
        (&one.name, one.is_default, one.profile.digest) == (&notes.name, notes.is_default, profile.digest)
            && digest(one.pack.as_ref()) == digest(pack)
            && one.command == notes.command.as_deref().unwrap_or_default()
    };
    let same = known.iter().find(is_same)?.digest;
    Some(repository.manifest(&ManifestName::Digest(same)).await.ok()??.bytes)
}

async fn push_pack(repository: &Repository, file: &Path) -> Result<Descriptor, ProfilesError> {
    let path = file.to_owned();
    let hashed = tokio::task::spawn_blocking(move || hash(&path)).await.map_err(|_| ImageError::Stopped)?;
    let (digest, size) = hashed.map_err(|cause| ProfilesError::Pack { file: file.to_owned(), cause })?;
    repository.push_blob(&digest, file_body(file.to_owned(), size), None).await?;
    Ok(Descriptor::new(PACK, digest, size))
}

fn hash(file: &Path) -> std::io::Result<(Digest, u64)> {
    use std::io::Read as _;
    let mut hasher = crate::format::digest::Hasher::new(crate::format::digest::Algorithm::Sha256);
    let (mut file, mut size, mut buffer) = (std::fs::File::open(file)?, 0, vec![0; 256 << 10]);
    loop {
        let length = file.read(&mut buffer)?;
        if length == 0 {
            return Ok((hasher.finish(), size));
        }
        hasher.update(&buffer[..length]);
        size += length as u64;
    }
}
