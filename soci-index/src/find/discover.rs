//! What one place has of an image's indexes: a repository, or an OCI layout.
//!
//! The low-level half of [`crate::find`], which knows all places of an image; use this module for the index of one
//! known repository. Registries list manifests in no defined order, and every client with push access can add one.
//! Invariants: a manifest is judged by what it says itself, never by what a list says of it; its `subject` is the
//! image; it can be read as an index; its raw bytes are returned. Of several the order is that of [`crate::find`].

use std::collections::HashMap;

use bytes::Bytes;

use crate::find::choose::{Created, better_first, newest_first};
use crate::format::digest::Digest;
use crate::format::index_manifest::IndexManifest;
use crate::format::limits::Limits;
use crate::format::model::{Descriptor, ImageManifest, RawManifest, annotation, media_type};
use crate::image::ImageError;
use crate::image::layout::Layout;
use crate::image::store::{Store as _, StoreError};
use crate::registry::referrers::{FoundBy, Listing, Lists};
use crate::registry::{RegistryError, Repository};

/// The configuration media type of a version 1 index, which is also its artifact type.
pub use crate::format::manifest::INDEX_V1 as SOCI_INDEX_V1;

/// Manifests that are fetched at most. Stops a repository full of referrers from holding up a mount.
const CANDIDATES_MAX: usize = 32;

/// An index that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundIndex {
    /// The manifest's digest.
    pub digest: Digest,
    /// The manifest, byte for byte.
    pub raw: Bytes,
    /// The same, parsed.
    pub manifest: ImageManifest,
    /// How many others were passed over.
    pub others: usize,
    /// Which of the kinds that were asked for it is: its artifact type.
    pub kind: &'static str,
}

/// Why a listed manifest was not taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejected {
    /// The manifest.
    pub digest: Digest,
    pub reason: String,
}

/// An index that a registry lists and refuses to show: by a policy that admits signed content only, say.
#[derive(Debug, Clone)]
pub struct Refused {
    /// The manifest.
    pub digest: Digest,
    /// Its size, as listed.
    pub size: u64,
    /// The kind, as listed; `None` where the list does not say it.
    pub kind: Option<&'static str>,
    /// What the registry said.
    pub error: RegistryError,
}

/// What a search found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Discovery {
    Found(Box<FoundIndex>),
    None {
        /// One line for a log.
        reason: String,
        /// What was listed and not taken.
        rejected: Vec<Rejected>,
    },
}

/// Which of an image's indexes is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which<'a> {
    Newest,
    /// This one and no other.
    Named(&'a Digest),
}

impl Which<'_> {
    fn is(self, digest: &Digest) -> bool {
        match self {
            Self::Newest => true,
            Self::Named(wanted) => wanted == digest,
        }
    }
}

/// Searches a repository for AWS's index of `image` (an image manifest, not an index).
///
/// # Errors
/// As [`preferred_on_registry`].
pub async fn on_registry(
    repository: &Repository,
    image: &Digest,
    which: Which<'_>,
) -> Result<Discovery, RegistryError> {
    preferred_on_registry(repository, image, which, &[SOCI_INDEX_V1]).await
}

/// Searches a repository for an index of `image` that is of the first of `kinds`, artifact types, of which there is
/// one. The registry's list is asked for once.
///
/// # Errors
/// [`RegistryError`] when the registry cannot be asked. A candidate that cannot be read is passed over.
pub async fn preferred_on_registry(
    repository: &Repository,
    image: &Digest,
    which: Which<'_>,
    kinds: &[&'static str],
) -> Result<Discovery, RegistryError> {
    preferred(Lists::Repository(repository), image, which, kinds).await
}

/// The same for the newest index, by a list that was asked for early.
///
/// # Errors
/// As [`preferred_on_registry`].
pub async fn preferred_listed(listing: &Listing, kinds: &[&'static str]) -> Result<Discovery, RegistryError> {
    preferred(Lists::Early(listing), listing.subject(), Which::Newest, kinds).await
}

async fn preferred(
    lists: Lists<'_>,
    image: &Digest,
    which: Which<'_>,
    kinds: &[&'static str],
) -> Result<Discovery, RegistryError> {
    Ok(list(lists, image, which, kinds, Depth::FirstKind, &HashMap::new()).await?.discovery(image))
}

/// How much of a list is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Depth {
    AllKinds,
    /// The first kind of which there is one, in the order in which they are given.
    FirstKind,
}

/// What a place has.
#[derive(Debug, Default)]
pub(crate) struct Listed {
    /// The indexes of the image.
    pub(crate) found: Vec<Fitting>,
    /// What was listed and does not fit, or is refused.
    pub(crate) rejected: Vec<Rejected>,
    pub(crate) refused: Vec<Refused>,
    /// What was listed and not looked at, by [`Depth::FirstKind`] or for its place in a long list.
    pub(crate) unread: Vec<Descriptor>,
    /// Why there is none, when nothing was listed.
    nothing: String,
}

/// An index of the image.
#[derive(Debug)]
pub(crate) struct Fitting {
    pub(crate) raw: RawManifest,
    manifest: ImageManifest,
    pub(crate) index: IndexManifest,
    /// When it was made.
    pub(crate) created: Option<Created>,
    /// Its artifact type.
    kind: &'static str,
}

/// Asks a registry. `kept` are manifests that are here already.
pub(crate) async fn list(
    lists: Lists<'_>,
    image: &Digest,
    which: Which<'_>,
    kinds: &[&'static str],
    depth: Depth,
    kept: &HashMap<Digest, Bytes>,
) -> Result<Listed, RegistryError> {
    let (mut listed, nothing) = match which {
        // One that is named need not be listed: it says itself whose it is.
        Which::Named(digest) => (vec![Descriptor::new("", *digest, 0)], format!("the registry has no index {digest}")),
        Which::Newest => {
            let one_kind = if let [kind] = kinds { Some(*kind) } else { None };
            let referrers = lists.referrers(image, one_kind).await?;
            let nothing = match &referrers.found_by {
                FoundBy::Api => "the registry lists no such referrer".to_owned(),
                FoundBy::FallbackTag => "the fallback tag lists no such referrer".to_owned(),
                FoundBy::Nothing(reason) => format!("no referrers API ({reason}) and no fallback tag"),
            };
            (ordered(referrers.entries), nothing)
        }
    };
    // What is of another kind is none of ours, unless the list was to be of one kind anyway.
    let may_be_of = |entry: &Descriptor, kind: &str| kinds.len() == 1 || may_be(entry, kind);
    listed.retain(|entry| kinds.iter().any(|kind| may_be_of(entry, kind)));
    let mut all = Listed { nothing, ..Listed::default() };
    let mut tried = Vec::new();
    for kind in kinds {
        if depth == Depth::FirstKind && !all.found.is_empty() {
            break;
        }
        let candidates = listed.iter().filter(|entry| may_be_of(entry, kind));
        for entry in candidates.take(CANDIDATES_MAX) {
            let digest = entry.digest;
            tried.push(digest);
            match manifest(lists, digest, kept).await {
                Ok(Some(raw)) => all.consider(raw, image, kind, None),
                Ok(None) => all.reject(digest, "it is not there".to_owned()),
                Err(error @ (RegistryError::Deadline { .. } | RegistryError::Unauthorized { .. })) => {
                    return Err(error);
                }
                Err(error) => {
                    all.reject(digest, error.to_string());
                    all.refuse(entry, kind, error);
                }
            }
        }
    }
    all.rejected.retain(|rejected| !all.found.iter().any(|found| found.raw.digest == rejected.digest));
    all.unread = listed.into_iter().filter(|entry| !tried.contains(&entry.digest)).collect();
    Ok(all)
}

async fn manifest(
    lists: Lists<'_>,
    digest: Digest,
    kept: &HashMap<Digest, Bytes>,
) -> Result<Option<RawManifest>, RegistryError> {
    match kept.get(&digest) {
        Some(bytes) => {
            Ok(Some(RawManifest { media_type: media_type::MANIFEST.to_owned(), digest, bytes: bytes.clone() }))
        }
        None => lists.manifest(digest).await,
    }
}

/// Searches an OCI layout for AWS's index of `image`: every manifest that index.json names is looked at.
///
/// # Errors
/// [`ImageError`] when index.json cannot be read. A candidate that cannot be read is passed over.
pub fn in_layout(layout: &Layout, image: &Digest, which: Which<'_>) -> Result<Discovery, ImageError> {
    Ok(list_layout(layout, image, which, &[SOCI_INDEX_V1])?.discovery(image))
}

/// What a layout has. A local one may hold the indexes of thousands of images; reading them all is still cheap.
pub(crate) fn list_layout(
    layout: &Layout,
    image: &Digest,
    which: Which<'_>,
    kinds: &[&'static str],
) -> Result<Listed, StoreError> {
    let nothing = "the layout holds no such index of this image".to_owned();
    let mut all = Listed { nothing, ..Listed::default() };
    for entry in ordered(layout.entries()?) {
        if entry.media_type != media_type::MANIFEST || !which.is(&entry.digest) {
            continue;
        }
        for kind in kinds.iter().filter(|kind| may_be(&entry, kind)) {
            match layout.manifest(&entry) {
                // Much of what is here was never meant for this image.
                Ok(Some(raw)) => drop(all.judge(raw, image, kind, created(&entry.annotations))),
                Ok(None) => {}
                Err(error @ StoreError::Io { .. }) => return Err(error),
                Err(error) => all.reject(entry.digest, error.to_string()),
            }
        }
    }
    Ok(all)
}

fn may_be(entry: &Descriptor, artifact_type: &str) -> bool {
    entry.kind().is_empty() || entry.kind() == artifact_type
}

/// The most promising first: registries copy annotations into their lists, so the newest is usually known beforehand.
fn ordered(mut entries: Vec<Descriptor>) -> Vec<Descriptor> {
    entries.sort_by_key(|entry| newest_first(created(&entry.annotations), &entry.digest));
    entries.dedup_by_key(|entry| entry.digest);
    entries
}

impl Listed {
    /// Notes an entry that is there, as listed, and that the registry does not show.
    fn refuse(&mut self, entry: &Descriptor, kind: &'static str, error: RegistryError) {
        let is_refusal = matches!(error, RegistryError::Status { status: 403 | 412 | 451, .. });
        if is_refusal && !self.refused.iter().any(|refused| refused.digest == entry.digest) {
            let kind = Some(kind).filter(|kind| entry.kind() == *kind);
            self.refused.push(Refused { digest: entry.digest, size: entry.size, kind, error });
        }
    }

    fn reject(&mut self, digest: Digest, reason: String) {
        if !self.rejected.iter().any(|rejected| rejected.digest == digest) {
            self.rejected.push(Rejected { digest, reason });
        }
    }

    fn consider(&mut self, raw: RawManifest, image: &Digest, kind: &'static str, listed: Option<Created>) {
        let digest = raw.digest;
        if let Err(reason) = self.judge(raw, image, kind, listed) {
            self.reject(digest, reason);
        }
    }

    /// Takes an index of the image that is of this kind. `listed` is the time that counts where it names none itself.
    fn judge(
        &mut self,
        raw: RawManifest,
        image: &Digest,
        kind: &'static str,
        listed: Option<Created>,
    ) -> Result<(), String> {
        let manifest: ImageManifest = serde_json::from_slice(&raw.bytes).map_err(|error| error.to_string())?;
        manifest.check_referrer(kind, image)?;
        let index = IndexManifest::parse(kind, &raw.bytes, &Limits::DEFAULT).map_err(|error| error.to_string())?;
        let created = match manifest.annotations.contains_key(annotation::CREATED) {
            true => created(&manifest.annotations),
            false => listed,
        };
        self.found.push(Fitting { raw, manifest, index, created, kind });
        Ok(())
    }

    fn discovery(mut self, image: &Digest) -> Discovery {
        self.found.sort_by_cached_key(|found| better_first(&found.index, found.created, &found.raw.digest));
        let others = self.found.len().saturating_sub(1);
        let Some(Fitting { raw, manifest, kind, .. }) = self.found.into_iter().next() else {
            let reason = self.rejected.first().map_or(self.nothing, why);
            return Discovery::None { reason, rejected: self.rejected };
        };
        if others > 0 {
            tracing::info!(%image, chosen = %raw.digest, others, "several indexes: taking the one of most layers, or the newest");
        }
        Discovery::Found(Box::new(FoundIndex { digest: raw.digest, raw: raw.bytes, manifest, others, kind }))
    }
}

fn why(first: &Rejected) -> String {
    format!("none of the listed manifests fits; {}: {}", first.digest, first.reason)
}

/// The `created` annotation; `None`, the oldest of all, when there is none or it cannot be read.
fn created(annotations: &std::collections::BTreeMap<String, String>) -> Option<Created> {
    Created::parse(annotations.get(annotation::CREATED)?)
}
