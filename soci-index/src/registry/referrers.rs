//! Finding what refers to an image, and making sure that it can be found.
//!
//! The referrers API is believed only when it answers like one: status 200, the index media type, a document of that
//! form, from the registry itself. Login pages with status 200, other media types and other sites are "no API", and the
//! fallback tag takes over (see [`crate::registry::fallback`]). Invariants: 401 and 403 are never taken for "no API" by
//! what writes (a reader takes what the fallback tag lists, and says else which question was refused); an unknown
//! repository is an empty list; the server's filter is not relied on; pages are followed on the same origin only and
//! are bounded in number.

use bytes::Bytes;
use parking_lot::Mutex;

use crate::format::digest::Digest;
use crate::format::model::{Descriptor, ImageIndex, ImageManifest, media_type};
use crate::format::reference::ManifestName;
use crate::registry::Repository;
use crate::registry::error::RegistryError;
use crate::registry::exchange::{ApiResponse, Call, Retries};
use crate::registry::failover::HostedRepository;
use crate::registry::fallback::FallbackTag;
use crate::registry::headers;
use crate::registry::manifests::Manifests;
use crate::registry::need::Need;
use crate::registry::redirect;
use crate::registry::scopes::Scopes;
use crate::registry::transport::Method;

mod listing;
mod visibility;

pub(crate) use self::listing::Lists;
pub use self::listing::{Choose, Listing};
pub use self::visibility::{Blemish, NoApi, Visibility};

/// Pages of one list. Stops a server whose pages lead on for ever.
const PAGES_MAX: usize = 100;
/// Entries of one list, of all pages.
const ENTRIES_MAX: usize = 20_000;
/// How often to look for an entry that the registry should list.
const LOOKS_MAX: u32 = 4;

/// Whether the registry has the referrers API, and what it lists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ApiAnswer {
    /// It has; these are the entries.
    Listed(Vec<Descriptor>),
    /// It has not, and this shows it.
    Unsupported(NoApi),
}

/// How referrers were found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FoundBy {
    /// Listed by the referrers API.
    Api,
    /// Listed in the fallback tag.
    FallbackTag,
    /// There is neither the API nor a fallback tag; the text says why the API is taken not to be there.
    Nothing(String),
}

/// The referrers of a manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Referrers {
    /// The entries, in the registry's order. Entries that do not say what they are (`artifactType` missing) are
    /// included regardless of the filter: only the manifest itself states its type.
    pub entries: Vec<Descriptor>,
    /// Where they come from.
    pub found_by: FoundBy,
}

/// In which order a registry's two lists are asked for.
#[derive(Debug, Clone, Copy)]
enum Asking {
    /// The fallback tag when there turns out to be no API.
    InTurn,
    AtOnce,
}

impl Referrers {
    /// Keeps what is of this kind or does not say what it is.
    fn keep(&mut self, artifact_type: Option<&str>) {
        if let Some(wanted) = artifact_type {
            self.entries.retain(|entry| entry.kind() == wanted || entry.kind().is_empty());
        }
    }
}

/// A referrer that was pushed and that consumers will find, though perhaps not all of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PushedReferrer {
    pub digest: Digest,
    pub found_by: FoundBy,
    /// How often the fallback tag was written; more than once means that another client wrote it, too.
    pub tag_writes: u32,
    /// The entry as listed.
    pub entry: Descriptor,
    /// Which clients can discover it.
    pub visibility: Visibility,
}

impl Repository {
    /// What refers to `subject`, by the API or else by the fallback tag. A mirror that lists nothing is not believed
    /// while another host can be asked: many pass images on and not what refers to them.
    ///
    /// # Errors
    /// [`RegistryError`] when the registry cannot be asked.
    pub async fn referrers(&self, subject: &Digest, artifact_type: Option<&str>) -> Result<Referrers, RegistryError> {
        self.listed(subject, artifact_type, Asking::InTurn).await
    }

    /// The same, of all kinds, with the API and the fallback tag asked at the same time: a round trip less where there
    /// is no API, a question more where there is one.
    pub(crate) async fn referrers_at_once(&self, subject: &Digest) -> Result<Referrers, RegistryError> {
        self.listed(subject, None, Asking::AtOnce).await
    }

    async fn listed(
        &self,
        subject: &Digest,
        artifact_type: Option<&str>,
        asking: Asking,
    ) -> Result<Referrers, RegistryError> {
        let empty = &Mutex::new(None);
        let found = self.first(Need::Referrers, |hosted| async move {
            let found = ReferrersOf { hosted: &hosted, subject }.find(artifact_type, asking).await?;
            if found.entries.is_empty() && !hosted.is_last() {
                if !matches!(found.found_by, FoundBy::Nothing(_)) {
                    *empty.lock() = Some(found);
                }
                return Ok(None);
            }
            Ok(Some(found))
        });
        let found = found.await;
        let empty = empty.lock().take();
        match (found, empty) {
            (Ok(Some(found)), _) => Ok(found),
            (Ok(None), _) => {
                Ok(Referrers { entries: Vec::new(), found_by: FoundBy::Nothing(NoApi::NotAsked.to_string()) })
            }
            // No other host contradicts the mirror that lists nothing.
            (Err(error), Some(empty)) => {
                tracing::warn!(registry = self.registry().name(), %error, "a mirror lists nothing and no other host answers");
                Ok(empty)
            }
            (Err(error), None) => Err(error.about_referrers(self.name().to_owned(), *subject)),
        }
    }

    /// What the referrers API lists for `subject`, unfiltered but for what the server filters.
    ///
    /// # Errors
    /// [`RegistryError`] when the registry cannot be asked, or a later page cannot be read.
    pub async fn referrers_api(
        &self,
        subject: &Digest,
        artifact_type: Option<&str>,
    ) -> Result<ApiAnswer, RegistryError> {
        let answer = self.first(Need::Referrers, |hosted| async move {
            let answer = ReferrersOf { hosted: &hosted, subject }.api(artifact_type).await?;
            let useless = matches!(answer, ApiAnswer::Unsupported(_)) && !hosted.is_last();
            Ok((!useless).then_some(answer))
        });
        let answer = answer.await.map_err(|error| error.about_referrers(self.name().to_owned(), *subject));
        Ok(answer?.unwrap_or(ApiAnswer::Unsupported(NoApi::NotAsked)))
    }

    /// Pushes a manifest that has a subject, and sees to it that it is found: through the API if the registry has it,
    /// else by writing the fallback tag. Repairs an earlier push that got half way.
    ///
    /// # Errors
    /// [`RegistryError`] when it cannot be pushed, or would not be found.
    pub async fn push_referrer(&self, media_type: &str, bytes: Bytes) -> Result<PushedReferrer, RegistryError> {
        let (hosted, digest) = (&self.push_host()?, Digest::of(&bytes));
        let malformed = |reason: String| hosted.malformed(&format!("manifest {digest}"), reason);
        let manifest: ImageManifest = serde_json::from_slice(&bytes).map_err(|error| malformed(error.to_string()))?;
        let Some(subject) = &manifest.subject else { return Err(malformed("it has no subject".to_owned())) };
        let mut entry = Descriptor::new(media_type, digest, bytes.len() as u64);
        entry.artifact_type = Some(manifest.kind().to_owned());
        entry.annotations = manifest.annotations.clone();
        let pushed = Manifests(hosted).put(&ManifestName::Digest(digest), media_type, bytes).await?;
        ReferrersOf { hosted, subject: &subject.digest }.ensure_listed(entry, pushed.subject.is_some()).await
    }
}

/// What refers to one manifest, on one host.
struct ReferrersOf<'a> {
    hosted: &'a HostedRepository,
    subject: &'a Digest,
}

impl ReferrersOf<'_> {
    async fn find(&self, artifact_type: Option<&str>, asking: Asking) -> Result<Referrers, RegistryError> {
        let fallback = FallbackTag::new(self.hosted, self.subject);
        let (api, tag) = match asking {
            Asking::InTurn => (self.api(artifact_type).await, None),
            Asking::AtOnce => {
                let (api, tag) = tokio::join!(self.api(artifact_type), fallback.entries());
                (api, Some(tag))
            }
        };
        let tagged = async {
            match tag {
                Some(tag) => tag,
                None => fallback.entries().await,
            }
        };
        let (entries, found_by) = match api {
            Ok(ApiAnswer::Listed(entries)) => (entries, FoundBy::Api),
            // Some registries refuse the path of an API that they do not have.
            Err(error @ (RegistryError::Unauthorized { .. } | RegistryError::Status { .. })) => match tagged.await {
                Ok(Some(entries)) => (entries, FoundBy::FallbackTag),
                Ok(None) | Err(_) => return Err(error),
            },
            Err(error) => return Err(error),
            Ok(ApiAnswer::Unsupported(reason)) => match tagged.await {
                Ok(Some(entries)) => (entries, FoundBy::FallbackTag),
                Ok(None) => (Vec::new(), FoundBy::Nothing(reason.to_string())),
                // An unrelated tag lists nothing; only writing to it would be wrong.
                Err(error @ RegistryError::ForeignTag { .. }) => (Vec::new(), FoundBy::Nothing(error.to_string())),
                Err(error) => return Err(error),
            },
        };
        let mut found = Referrers { entries, found_by };
        found.keep(artifact_type);
        Ok(found)
    }

    async fn api(&self, artifact_type: Option<&str>) -> Result<ApiAnswer, RegistryError> {
        let hosted = self.hosted;
        let mut url = hosted.url(&format!("referrers/{}", self.subject));
        if let Some(artifact_type) = artifact_type {
            url.query_pairs_mut().append_pair("artifactType", artifact_type);
        }
        let what = format!("asking for the referrers of {}", self.subject);
        let deadline = hosted.deadline(0);
        let mut entries: Vec<Descriptor> = Vec::new();
        let (mut page, mut retries) = (0, Retries::new(hosted, &what, &deadline));
        while page < PAGES_MAX {
            let call = Call::new(Method::Get, url.clone(), Scopes::pull(hosted.name()), what.clone());
            let call = call.with_header("accept", media_type::INDEX);
            let answer = match hosted.call(&call, &deadline).await {
                Ok(answer) => answer,
                Err(error @ RegistryError::Redirect { .. }) => {
                    return Ok(ApiAnswer::Unsupported(NoApi::Redirect(error.to_string())));
                }
                Err(error) => return Err(error),
            };
            let next = headers::next_link(answer.response.headers("link"));
            let at = answer.url.clone();
            match self.page(answer).await {
                Ok(Ok(listed)) => entries.extend(listed),
                Ok(Err(reason)) if page == 0 => return Ok(ApiAnswer::Unsupported(reason)),
                Ok(Err(reason)) => return Err(hosted.malformed(&what, format!("page {}: {reason}", page + 1))),
                // The body was cut: ask for the same page again.
                Err(error) if error.is_transient() => {
                    retries.after(error, None).await?;
                    continue;
                }
                Err(error) => return Err(error),
            }
            page += 1;
            let Some(next) = next else { return Ok(ApiAnswer::Listed(entries)) };
            let next = redirect::page(&at, &next)
                .map_err(|reason| hosted.malformed(&what, format!("the next page is refused: {reason}")))?;
            url = hosted.endpoint().named(next);
            if entries.len() > ENTRIES_MAX {
                return Err(hosted.malformed(&what, format!("more than {ENTRIES_MAX} entries")));
            }
        }
        Err(hosted.malformed(&what, format!("more than {PAGES_MAX} pages")))
    }

    /// The entries of one page, or why it is none.
    async fn page(&self, answer: ApiResponse<'_>) -> Result<Result<Vec<Descriptor>, NoApi>, RegistryError> {
        if !self.hosted.endpoint().is_home(&answer.url) {
            return Ok(Err(NoApi::OtherSite));
        }
        let (status, found_type) = (answer.status(), answer.response.media_type());
        match status {
            200 if found_type == media_type::INDEX => {}
            200 => return Ok(Err(NoApi::ContentType(found_type))),
            404 => {
                let body = answer.document().await?;
                let (code, _) = headers::error_body(&body);
                let unknown_name = code.as_deref() == Some("NAME_UNKNOWN");
                return Ok(if unknown_name { Ok(Vec::new()) } else { Err(NoApi::Status(status)) });
            }
            400 | 405 | 406 | 501 => return Ok(Err(NoApi::Status(status))),
            _ => return Err(answer.error().await),
        }
        let body = answer.document().await?;
        let index: Result<ImageIndex, _> = serde_json::from_slice(&body);
        Ok(index.map(|index| index.manifests).map_err(|error| NoApi::Malformed(error.to_string())))
    }

    /// Sees to it that a pushed manifest is found; `claimed` is whether the registry said that it lists it.
    async fn ensure_listed(&self, entry: Descriptor, claimed: bool) -> Result<PushedReferrer, RegistryError> {
        let mut look = 0;
        loop {
            let answer = self.api(Some(entry.kind())).await;
            let about = |error: RegistryError| error.about_referrers(self.hosted.name().to_owned(), *self.subject);
            let listed = match answer.map_err(about)? {
                ApiAnswer::Listed(listed) => listed,
                ApiAnswer::Unsupported(no_api) => {
                    tracing::debug!(%no_api, claimed, "the registry has no referrers API: writing the fallback tag");
                    return self.list_by_tag(entry, &no_api).await;
                }
            };
            if let Some(listed) = listed.into_iter().find(|listed| listed.digest == entry.digest) {
                let blemishes = visibility::of_entry(&entry, &listed);
                return Ok(listed_by_api(listed, blemishes));
            }
            look += 1;
            if look >= LOOKS_MAX {
                return self.listed_without_filter(&entry).await;
            }
            tokio::time::sleep(self.hosted.options().backoff.wait(look, fastrand::f64())).await;
        }
    }

    /// Puts `entry` on the list that clients keep. A registry that takes neither has no place for it.
    async fn list_by_tag(&self, entry: Descriptor, no_api: &NoApi) -> Result<PushedReferrer, RegistryError> {
        let tag_writes = match FallbackTag::new(self.hosted, self.subject).add(&entry).await {
            Ok(writes) => writes,
            Err(error @ RegistryError::Status { status: 400 | 404 | 405 | 412 | 413 | 415 | 422 | 501, .. }) => {
                let ((registry, repository), digest) = (self.hosted.names(), Box::new(entry.digest));
                let (api, tag) = (no_api.to_string(), error.to_string());
                return Err(RegistryError::NoListing { registry, repository, digest, api, tag });
            }
            Err(error) => return Err(error),
        };
        let visibility = Visibility::of(visibility::of_no_api(no_api));
        Ok(PushedReferrer { digest: entry.digest, found_by: FoundBy::FallbackTag, tag_writes, entry, visibility })
    }

    /// The last look: perhaps it is the registry's filter that hides the entry.
    async fn listed_without_filter(&self, entry: &Descriptor) -> Result<PushedReferrer, RegistryError> {
        let all = match self.api(None).await? {
            ApiAnswer::Listed(all) => all,
            ApiAnswer::Unsupported(_) => Vec::new(),
        };
        let Some(listed) = all.into_iter().find(|listed| listed.digest == entry.digest) else {
            let ((registry, repository), digest) = (self.hosted.names(), Box::new(entry.digest));
            return Err(RegistryError::NotListed { registry, repository, digest, subject: Box::new(*self.subject) });
        };
        let mut blemishes = visibility::of_entry(entry, &listed);
        blemishes.push(Blemish::Filter { artifact_type: entry.kind().to_owned() });
        Ok(listed_by_api(listed, blemishes))
    }
}

fn listed_by_api(entry: Descriptor, blemishes: Vec<Blemish>) -> PushedReferrer {
    let visibility = Visibility::of(blemishes);
    PushedReferrer { digest: entry.digest, found_by: FoundBy::Api, tag_writes: 0, entry, visibility }
}
