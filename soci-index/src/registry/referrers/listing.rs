//! What refers to an image, asked for early and once.
//!
//! Opening an image needs its index and its profiles, which are found by the same list, and on a distant registry each
//! request is a round trip in the foreground. A [`Listing`] is asked as soon as the image's digest is known, while the
//! image's own documents are in flight. It asks the referrers API and for the fallback tag at the same time, and then
//! for the manifests that will be wanted. Invariants: it knows nothing that its repository would not return; a failure
//! is shared by all waiters, and a later caller retries; what it has fetched is forgotten after half a minute, since
//! lists change.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use parking_lot::Mutex;
use tokio::sync::OnceCell;

use crate::format::digest::Digest;
use crate::format::model::{Descriptor, RawManifest};
use crate::format::reference::ManifestName;
use crate::registry::referrers::Referrers;
use crate::registry::{RegistryError, Repository};

/// How long it is believed.
const LIFE: Duration = Duration::from_secs(30);
/// Manifests that are fetched early, at most; all of them at the same time.
const MANIFESTS_MAX: usize = 8;

/// Which of the entries of a list will be wanted.
pub type Choose = fn(&[Descriptor]) -> Vec<Digest>;

/// The referrers of one manifest in one repository.
#[derive(Debug)]
pub struct Listing {
    repository: Repository,
    subject: Digest,
    choose: Choose,
    since: Instant,
    fetched: OnceCell<Fetched>,
    failures: Mutex<Failures>,
}

/// Attempts that came to nothing.
#[derive(Debug, Default)]
struct Failures {
    count: u64,
    last: Option<RegistryError>,
}

#[derive(Debug)]
struct Fetched {
    referrers: Referrers,
    manifests: HashMap<Digest, RawManifest>,
}

impl Listing {
    /// Of what refers to `subject`, with the manifests that `choose` picks. Nothing is asked yet.
    #[must_use]
    pub fn new(repository: Repository, subject: Digest, choose: Choose) -> Self {
        Self {
            repository,
            subject,
            choose,
            since: Instant::now(),
            fetched: OnceCell::new(),
            failures: Mutex::default(),
        }
    }

    /// Whether this is of `subject`, and young enough.
    #[must_use]
    pub fn is_of(&self, subject: &Digest) -> bool {
        self.subject == *subject && self.since.elapsed() < LIFE
    }

    /// The manifest whose referrers these are.
    #[must_use]
    pub(crate) const fn subject(&self) -> &Digest {
        &self.subject
    }

    /// Asks, unless that was done; waits for the answer that is in progress.
    ///
    /// # Errors
    /// [`RegistryError`] when the registry cannot be asked. The next call asks again.
    pub async fn ask(&self) -> Result<(), RegistryError> {
        self.fetched().await.map(drop)
    }

    /// What refers to the subject, as [`Repository::referrers`] says it.
    ///
    /// # Errors
    /// As [`Listing::ask`].
    pub async fn referrers(&self, artifact_type: Option<&str>) -> Result<Referrers, RegistryError> {
        let mut referrers = self.fetched().await?.referrers.clone();
        referrers.keep(artifact_type);
        Ok(referrers)
    }

    /// A manifest that was listed; `None` when it is not there.
    ///
    /// # Errors
    /// [`RegistryError`] when it cannot be read.
    pub async fn manifest(&self, digest: Digest) -> Result<Option<RawManifest>, RegistryError> {
        match self.fetched.get().and_then(|fetched| fetched.manifests.get(&digest)) {
            Some(raw) => Ok(Some(raw.clone())),
            None => self.repository.manifest(&ManifestName::Digest(digest)).await,
        }
    }

    async fn fetched(&self) -> Result<&Fetched, RegistryError> {
        let before = self.failures.lock().count;
        let ask = || async {
            // Another caller has asked while this one waited.
            if let Some(error) = self.failure_since(before) {
                return Err(error);
            }
            self.fetch().await.inspect_err(|error| self.note_failure(error))
        };
        self.fetched.get_or_try_init(ask).await
    }

    fn failure_since(&self, before: u64) -> Option<RegistryError> {
        let failures = self.failures.lock();
        failures.last.clone().filter(|_| failures.count > before)
    }

    fn note_failure(&self, error: &RegistryError) {
        let mut failures = self.failures.lock();
        failures.count += 1;
        failures.last = Some(error.clone());
    }

    async fn fetch(&self) -> Result<Fetched, RegistryError> {
        let referrers = self.repository.referrers_at_once(&self.subject).await?;
        let early = (self.choose)(&referrers.entries).into_iter().take(MANIFESTS_MAX);
        let fetched = futures_util::stream::iter(early)
            .map(|digest| async move { (digest, self.repository.manifest(&ManifestName::Digest(digest)).await) })
            .buffer_unordered(MANIFESTS_MAX);
        // What could not be fetched is fetched again, and its error reported, when it is needed.
        let manifests = fetched.filter_map(async |(digest, raw)| Some((digest, raw.ok()??))).collect().await;
        Ok(Fetched { referrers, manifests })
    }
}

/// Where lists and manifests of referrers are had.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Lists<'a> {
    /// From the registry, when they are wanted.
    Repository(&'a Repository),
    /// From what was asked for early.
    Early(&'a Listing),
}

impl Lists<'_> {
    /// What refers to `subject`, which is an early list's own.
    pub(crate) async fn referrers(self, subject: &Digest, kind: Option<&str>) -> Result<Referrers, RegistryError> {
        match self {
            Self::Repository(repository) => repository.referrers(subject, kind).await,
            Self::Early(listing) => listing.referrers(kind).await,
        }
    }

    /// One of their manifests.
    pub(crate) async fn manifest(self, digest: Digest) -> Result<Option<RawManifest>, RegistryError> {
        match self {
            Self::Repository(repository) => repository.manifest(&ManifestName::Digest(digest)).await,
            Self::Early(listing) => listing.manifest(digest).await,
        }
    }
}
