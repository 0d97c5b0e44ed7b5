//! Which index of an image is meant: the one finder, for everything that uses, pushes, checks or reuses an index.
//!
//! The rules of the choice, in this order:
//!
//! 1. An index that was named by its digest: that one and no other.
//! 2. Only an index that can be read and whose `subject` is the image's manifest, or (version 2) that the image's manifest
//!    names in an annotation.
//! 3. One in a repository that the operator named for the image goes before all others, in the order in which they were
//!    named: the operator's choice takes precedence over that of any user with push access.
//! 4. The span index goes before the version 2 index that the image names, and that before AWS's version 1.
//! 5. The one that has tables of the most layers: what was published again with a smaller `--min-layer-size` is used, and
//!    ours say nothing of their time, which would make two of one image differ.
//! 6. The newest, by the instant that `created` names, in whatever zone and with whatever fraction it is written. No time,
//!    or one that cannot be read, is the oldest. An entry of a layout has its manifest's time, else that of index.json.
//! 7. The smallest digest.
//!
//! A policy of trust may pass over what it doubts, in the same order ([`choose::Ordered::take`]).
//!
//! The places are the repositories that were named, the image's own place (what its manifest names, and what refers to
//! it), and the local index store. In the local store an index that was made on this machine counts for its image
//! wherever that is; one that was *fetched* is a copy of what another place has ([`origin`]). It is a candidate only
//! for an image that has this place among its own, and only when the place cannot be asked now; if it answers, its
//! answer counts. So no repository gets an index that was fetched for another one. Two copies need no question: an
//! index that was named by digest, and the one that the image's manifest names, for no answer can change them. A place
//! that cannot be asked is noted as passed over with its error; only where it matters to the caller it is one
//! ([`Gathered::failure`]). A place that does not answer is not waited for to the end where there is a copy of what it
//! had, or where the image can be used without an index ([`Search::is_optional`]).
//!
//! [`choose`] is pure; this module asks. Road not taken: to stop at the first place that has an index, local store
//! first. It saves a question, and lets a stale or foreign copy speak for the image.
//!
//! The room uses `format`, `registry` and `image`; `publish` and `soci-fs` use it.

use std::collections::HashMap;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;

use crate::find::discover::{Depth, Listed, Which, list, list_layout};
use crate::format::digest::Digest;
use crate::format::index_manifest::{IndexManifest, REFERRING};
use crate::format::limits::Limits;
use crate::format::manifest::{INDEX_DIGEST, INDEX_V2, SociIndex};
use crate::format::model::{Descriptor, ImageManifest, RawManifest};
use crate::image::layout::Layout;
use crate::image::store::{Store as _, StoreError};
use crate::image::{ImageError, ImageSource, PlatformImage};
use crate::registry::Repository;
use crate::registry::referrers::{Listing, Lists};

pub mod choose;
pub mod discover;
mod gathered;
pub mod hedge;
pub mod keep;
pub mod origin;
pub mod parts;
pub mod sweep;

pub use self::gathered::Gathered;

use self::choose::{Candidate, IndexPlace, PassedOver, Reason};
use self::gathered::{Unasked, candidate};

/// How long a place may take to answer where it can be done without.
const PATIENCE: Duration = Duration::from_secs(10);
/// Repositories that are asked at the same time.
const PARALLEL: usize = 8;

/// A search for the index of one image.
#[derive(Debug, Clone, Copy)]
pub struct Search<'a> {
    /// The image's manifest.
    pub subject: Digest,
    /// The version 2 index that it names, if that is looked for.
    pub annotated: Option<Digest>,
    /// The index that was asked for by its digest.
    pub named: Option<&'a Digest>,
    /// The kinds of referring indexes that are looked for, the better one first.
    pub referring: &'a [&'static str],
    /// The repositories that were named for the image.
    pub repositories: &'a [Repository],
    /// The image's own place.
    pub own: Option<&'a ImageSource>,
    /// What refers to the image, where that was asked for early.
    pub listing: Option<&'a Listing>,
    /// The local index store.
    pub local: Option<&'a Layout>,
    /// Whether an index that was named may be of another image: it says nothing of the layers that only this one has.
    pub any_subject: bool,
    /// Whether indexes count that the local store lists and whose parts are in another program's store.
    pub listed: bool,
    /// Another program's store on this machine that may have indexes. It lists none, and is asked by their digests.
    pub content: Option<&'a ImageSource>,
    /// Whether to ask every place and of every form, too, where that cannot change the first choice: for reports, and
    /// for policies that may refuse the first.
    pub thorough: bool,
    /// Whether the image can be used without an index: then no place is waited for longer than ten seconds.
    pub is_optional: bool,
}

/// An index of the local store.
struct Kept {
    candidate: Candidate,
    /// Where it was fetched; `None` if it was made here.
    origins: Option<Vec<String>>,
}

impl Kept {
    fn is_of(&self, place: &str) -> bool {
        self.origins.as_ref().is_some_and(|origins| origins.iter().any(|origin| origin == place))
    }

    fn as_copy_of(&self, place: IndexPlace) -> Candidate {
        Candidate { place, cached: true, ..self.candidate.clone() }
    }
}

impl<'a> Search<'a> {
    /// For any index of `image`, in its own place only.
    #[must_use]
    pub fn new(source: &'a ImageSource, image: &PlatformImage) -> Self {
        let annotated = image.manifest.annotations.get(INDEX_DIGEST);
        let annotated = annotated.and_then(|digest| {
            let parsed = digest.parse();
            let image = image.descriptor.digest;
            parsed.inspect_err(|error| tracing::warn!(%image, %error, "the image names no proper index")).ok()
        });
        Self { annotated, own: Some(source), ..Self::of(image.descriptor.digest) }
    }

    /// For indexes that refer to the manifest `subject`, nowhere yet.
    #[must_use]
    pub const fn of(subject: Digest) -> Self {
        Self {
            subject,
            annotated: None,
            named: None,
            referring: REFERRING,
            repositories: &[],
            own: None,
            listing: None,
            local: None,
            any_subject: false,
            listed: true,
            content: None,
            thorough: false,
            is_optional: false,
        }
    }

    /// Asks the places.
    ///
    /// # Errors
    /// [`StoreError`] when a layout that is on this machine cannot be read. A registry that cannot be asked is no
    /// error.
    pub async fn gather(&self) -> Result<Gathered, StoreError> {
        let mut gathered = Gathered::default();
        let kept = self.kept(&mut gathered)?;
        let (made, fetched): (Vec<Kept>, Vec<Kept>) = kept.into_iter().partition(|kept| kept.origins.is_none());
        gathered.candidates.extend(made.into_iter().map(|kept| kept.candidate));
        self.copies_of_what_is_named(&fetched, &mut gathered);
        self.in_content(&mut gathered).await;
        if self.named.is_some() && !gathered.candidates.is_empty() {
            return Ok(gathered);
        }
        self.named_repositories(&fetched, &mut gathered).await;
        let is_decided = gathered.candidates.iter().any(|found| matches!(found.place, IndexPlace::Named { .. }));
        if self.own.is_some() && is_decided && !self.thorough {
            gathered.passed_over.push(PassedOver::place(IndexPlace::Beside, Reason::NotNeeded));
        } else if let Some(own) = self.own {
            self.own_place(own, &fetched, &mut gathered).await?;
            self.by_digest(own, &mut gathered).await;
        }
        self.explain(&fetched, &mut gathered);
        Ok(gathered)
    }

    /// The local store's indexes of the image.
    fn kept(&self, gathered: &mut Gathered) -> Result<Vec<Kept>, StoreError> {
        let Some(layout) = self.local else { return Ok(Vec::new()) };
        let entries: HashMap<Digest, Descriptor> =
            layout.entries()?.into_iter().map(|entry| (entry.digest, entry)).collect();
        let origins = |digest: &Digest| entries.get(digest).and_then(origin::origins);
        let counts = |digest: &Digest| {
            self.listed || !entries.get(digest).is_some_and(|entry| entry.annotations.contains_key(origin::KEPT_IN))
        };
        let which = self.named.map_or(Which::Newest, Which::Named);
        let listed = list_layout(layout, &self.subject, which, self.referring)?;
        gathered.reject(&listed, &IndexPlace::Local);
        let mut kept: Vec<Kept> = listed
            .found
            .into_iter()
            .filter(|found| counts(&found.raw.digest))
            .map(|found| Kept { origins: origins(&found.raw.digest), candidate: candidate(found, IndexPlace::Local) })
            .collect();
        let is_version_2 = |entry: &&Descriptor| {
            counts(&entry.digest) && (self.annotated == Some(entry.digest) || entry.kind() == INDEX_V2)
        };
        if let Some(entry) =
            self.named.copied().or(self.annotated).and_then(|digest| entries.get(&digest)).filter(is_version_2)
            && let Some(raw) = layout.manifest(entry)?
        {
            match version_2(entry.digest, raw.bytes, IndexPlace::Local) {
                Ok(candidate) => kept.push(Kept { origins: origins(&entry.digest), candidate }),
                Err(reason) => gathered.unfit(entry.digest, IndexPlace::Local, reason),
            }
        }
        Ok(kept)
    }

    /// The version 2 index, unless another one was named.
    fn wanted_annotation(&self) -> Option<Digest> {
        self.annotated.filter(|digest| self.named.is_none_or(|named| named == digest))
    }

    /// `HOST/REPOSITORY` of the image itself.
    fn own_name(&self) -> Option<String> {
        self.own?.repository().map(ToString::to_string)
    }

    /// The image's places with their names.
    fn places(&self) -> impl Iterator<Item = (IndexPlace, String)> + '_ {
        let named = self.repositories.iter().enumerate();
        let named = named.map(|(position, repository)| (named_place(position, repository), repository.to_string()));
        named.chain(self.own_name().map(|name| (IndexPlace::Beside, name)))
    }

    /// Copies that no answer can change.
    fn copies_of_what_is_named(&self, fetched: &[Kept], gathered: &mut Gathered) {
        for kept in fetched {
            let digest = &kept.candidate.digest;
            if self.named.is_none() && self.annotated.as_ref() != Some(digest) {
                continue;
            }
            let Some((place, _)) = self.places().find(|(_, name)| kept.is_of(name)) else { continue };
            let place = if self.annotated.as_ref() == Some(digest) { IndexPlace::Image } else { place };
            gathered.candidates.push(kept.as_copy_of(place));
        }
    }

    /// The index that is known by its digest, if another store on this machine has it.
    async fn in_content(&self, gathered: &mut Gathered) {
        let is_found = |digest: &Digest| gathered.candidates.iter().any(|found| found.digest == *digest);
        let wanted = self.named.copied().or(self.annotated).filter(|digest| !is_found(digest));
        let (Some(content), Some(digest)) = (self.content, wanted) else { return };
        let Ok(Some(raw)) = content.manifest_by_digest(digest).await else { return };
        let is_own = self.annotated == Some(digest);
        match if is_own {
            version_2(digest, raw.bytes, IndexPlace::Image)
        } else {
            self.asked_for(raw, IndexPlace::Local)
        } {
            Ok(candidate) => gathered.candidates.push(candidate),
            Err(reason) => gathered.unfit(digest, IndexPlace::Local, reason),
        }
    }

    async fn named_repositories(&self, fetched: &[Kept], gathered: &mut Gathered) {
        let ask = |repository: &'a Repository| async move {
            let name = repository.to_string();
            self.ask(Lists::Repository(repository), &name, fetched, self.referring).await
        };
        let asking: Vec<_> = self.repositories.iter().map(ask).collect();
        let asked: Vec<_> = futures_util::stream::iter(asking).buffered(PARALLEL).collect().await;
        for ((position, repository), answer) in self.repositories.iter().enumerate().zip(asked) {
            let (place, name) = (named_place(position, repository), repository.to_string());
            gathered.add(answer, &place, &name, fetched);
        }
    }

    /// Asks one repository; not for long if it can be done without.
    async fn ask(
        &self,
        lists: Lists<'_>,
        name: &str,
        fetched: &[Kept],
        kinds: &[&'static str],
    ) -> Result<Listed, Unasked> {
        if kinds.is_empty() {
            return Ok(Listed::default());
        }
        let which = self.named.map_or(Which::Newest, Which::Named);
        let depth = if self.thorough { Depth::AllKinds } else { Depth::FirstKind };
        let raw = |kept: &Kept| (kept.candidate.digest, kept.candidate.raw.clone());
        let here: HashMap<Digest, Bytes> = fetched.iter().map(raw).collect();
        let asking = list(lists, &self.subject, which, kinds, depth, &here);
        if !self.is_optional && !fetched.iter().any(|kept| kept.is_of(name)) {
            return asking.await.map_err(Unasked::Failed);
        }
        match tokio::time::timeout(PATIENCE, asking).await {
            Ok(answer) => answer.map_err(Unasked::Failed),
            Err(_) => Err(Unasked::Slow),
        }
    }

    /// What the image names, and what refers to it, where the image is.
    async fn own_place(&self, own: &ImageSource, fetched: &[Kept], gathered: &mut Gathered) -> Result<(), StoreError> {
        if let Some(repository) = own.repository() {
            let early = self.listing.filter(|listing| self.named.is_none() && listing.is_of(&self.subject));
            let lists = early.map_or(Lists::Repository(repository), Lists::Early);
            self.own_repository(own, lists, &repository.to_string(), fetched, gathered).await;
            return Ok(());
        }
        if let Some(layout) = own.layout() {
            let which = self.named.map_or(Which::Newest, Which::Named);
            let listed = list_layout(layout, &self.subject, which, self.referring)?;
            gathered.add(Ok(listed), &IndexPlace::Beside, "", &[]);
        }
        self.annotated(own, gathered).await;
        Ok(())
    }

    async fn own_repository(
        &self,
        own: &ImageSource,
        lists: Lists<'_>,
        name: &str,
        fetched: &[Kept],
        gathered: &mut Gathered,
    ) {
        // AWS's version 1 is used only if the image names no index, so one request is enough for most images.
        let in_turn = self.annotated.is_some() && self.named.is_none() && !self.thorough;
        let (first, rest) = match self.referring {
            [first, rest @ ..] if in_turn => (std::slice::from_ref(first), rest),
            all => (all, &[][..]),
        };
        let (listed, ()) = tokio::join!(self.ask(lists, name, fetched, first), self.annotated(own, gathered));
        gathered.add(listed, &IndexPlace::Beside, name, fetched);
        if !rest.is_empty() && !gathered.candidates.iter().any(Candidate::is_before_version_1) {
            let listed = self.ask(lists, name, fetched, rest).await;
            gathered.add(listed, &IndexPlace::Beside, name, fetched);
        }
    }

    /// The version 2 index that the image's own manifest names, and which is thereby as much part of it as its layers.
    async fn annotated(&self, own: &ImageSource, gathered: &mut Gathered) {
        let Some(digest) = self.wanted_annotation() else { return };
        if gathered.candidates.iter().any(|found| found.digest == digest) {
            return;
        }
        match own.manifest_by_digest(digest).await {
            Ok(Some(raw)) => match version_2(digest, raw.bytes, IndexPlace::Image) {
                Ok(candidate) => gathered.candidates.push(candidate),
                Err(reason) => gathered.unfit(digest, IndexPlace::Image, reason),
            },
            Ok(None) => gathered.unfit(digest, IndexPlace::Image, "it is not there".to_owned()),
            Err(ImageError::Registry(error)) => gathered.fail(IndexPlace::Image, Unasked::Failed(error)),
            Err(error) => gathered.unfit(digest, IndexPlace::Image, error.to_string()),
        }
    }

    /// The index that was asked for, where neither the image names it nor a list has it: one of version 2 refers to no
    /// image, and a list may be incomplete.
    async fn by_digest(&self, own: &ImageSource, gathered: &mut Gathered) {
        let Some(named) = self.named.filter(|_| gathered.candidates.is_empty()) else { return };
        match own.manifest_by_digest(*named).await {
            Ok(Some(raw)) => match self.asked_for(raw, IndexPlace::Beside) {
                Ok(candidate) => gathered.candidates.push(candidate),
                Err(reason) => gathered.unfit(*named, IndexPlace::Beside, reason),
            },
            Ok(None) => {}
            Err(ImageError::Registry(error)) => gathered.fail(IndexPlace::Beside, Unasked::Failed(error)),
            Err(error) => gathered.unfit(*named, IndexPlace::Beside, error.to_string()),
        }
    }

    /// Reads an index that was asked for by its digest: of version 2, or one that refers to the image.
    fn asked_for(&self, found: RawManifest, place: IndexPlace) -> Result<Candidate, String> {
        let RawManifest { digest, bytes: raw, .. } = found;
        let manifest: ImageManifest = serde_json::from_slice(&raw).map_err(|error| error.to_string())?;
        let index = IndexManifest::parse(manifest.kind(), &raw, &Limits::DEFAULT).map_err(|error| error.to_string())?;
        match index.subject() {
            Some(other) if other.digest != self.subject && !self.any_subject => {
                Err(format!("it is of another image, {}", other.digest))
            }
            None if index.kind() != INDEX_V2 => Err("it names no image".to_owned()),
            _ => Ok(Candidate { digest, raw, index, created: None, place, cached: false }),
        }
    }

    /// Says of copies that were of no use why.
    fn explain(&self, fetched: &[Kept], gathered: &mut Gathered) {
        for kept in fetched {
            let digest = kept.candidate.digest;
            if gathered.candidates.iter().any(|found| found.digest == digest) {
                continue;
            }
            let ours = self.places().find(|(_, name)| kept.is_of(name));
            let origin = kept.origins.iter().flatten().cloned().collect::<Vec<_>>().join(", ");
            let (place, reason) = match ours {
                Some((place, _)) => (place, Reason::Gone),
                None => (IndexPlace::Local, Reason::Foreign { origin }),
            };
            // A place that was not asked, or could not be, is mentioned already.
            let is_told = gathered.passed_over.iter().any(|other| other.digest.is_none() && other.place == place);
            let is_told = is_told || gathered.passed_over.iter().any(|other| other.digest == Some(digest));
            if !is_told {
                gathered.passed_over.push(PassedOver { digest: Some(digest), place, reason });
            }
        }
    }
}

/// Reads the index that an image names.
fn version_2(digest: Digest, raw: Bytes, place: IndexPlace) -> Result<Candidate, String> {
    match SociIndex::parse(&raw, &Limits::DEFAULT) {
        Ok(index) if index.version() == 2 => {
            // An image names one only, so its time decides nothing.
            let index = IndexManifest::Soci(index);
            Ok(Candidate { digest, raw, index, created: None, place, cached: false })
        }
        Ok(_) => Err("it is of version 1, and the image names it".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

fn named_place(position: usize, repository: &Repository) -> IndexPlace {
    IndexPlace::Named { position, repository: repository.to_string() }
}
