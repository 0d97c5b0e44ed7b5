//! Writing blobs: ask, open an upload, send it.
//!
//! Small blobs (indexes are) go in one PUT, because every registry takes it. Large ones, and those of which the
//! registry says that one request is too much, go in chunks, where a broken connection costs a chunk and not the blob.
//! The protocol variant of a registry is found by trying: one that refuses the first gets the other. A PUT whose fate
//! is unknown is not continued: the whole sequence starts again. Asking first makes a repeated push cheap, and protects
//! a present blob from some registries' garbage collection. Invariants: the query of the upload location is kept;
//! nothing secret goes there unless it is on the registry's own origin; a blob that cannot be mounted is sent, whatever
//! the reason.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::StreamExt;
use parking_lot::Mutex;
use url::Url;

use crate::format::digest::Digest;
use crate::registry::Repository;
use crate::registry::auth::Scopes;
use crate::registry::error::RegistryError;
use crate::registry::exchange::{ApiResponse, Call, asked_pause, is_busy};
use crate::registry::failover::HostedRepository;
use crate::registry::redirect;
use crate::registry::retry::Deadline;
use crate::registry::transport::{Body, Method};

mod chunks;
mod trial;

pub use self::trial::Trial;

/// In which sizes blobs are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UploadSizes {
    /// Larger blobs go in chunks. One request of this size takes some seconds on a slow line: not much is lost when it
    /// breaks.
    pub whole_bytes_max: u64,
    /// How much is sent at a time otherwise. It is held in memory, once for each upload in progress.
    pub chunk_bytes: usize,
}

impl Default for UploadSizes {
    fn default() -> Self {
        Self { whole_bytes_max: 64 << 20, chunk_bytes: 8 << 20 }
    }
}

/// How a blob came to be on the registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PushedBlob {
    /// It was there.
    Present,
    /// The registry took it from another repository of its own.
    Mounted,
    /// It was sent.
    Uploaded,
}

/// How a blob is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum UploadMode {
    Whole,
    Chunks,
}

/// How one attempt ended short of success.
enum Setback {
    Busy(Box<ApiResponse>),
    Error(RegistryError),
    /// The registry does not take it in this manner.
    UploadMode(UploadMode, RegistryError),
    /// The registry has forgotten the upload.
    Lost(RegistryError),
    /// It was tried often enough.
    Final(RegistryError),
}

/// Whether to look first if a blob is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Look {
    First,
    Never,
}

/// What is pushed.
struct Push<'a> {
    digest: &'a Digest,
    body: Body,
    mount_from: Option<&'a str>,
    look: Look,
    what: String,
    /// Manners that the registry has refused.
    refused: Vec<UploadMode>,
}

/// An upload that the registry has opened.
struct UploadSession {
    location: Url,
    scopes: Scopes,
    /// The smallest chunk that it takes, if it says so.
    smallest: Option<u64>,
}

impl Repository {
    /// Makes sure that the blob `digest` is in the repository; `body` is what it holds. With `mount_from` the registry
    /// is first asked to take it from that repository.
    ///
    /// # Errors
    /// [`RegistryError`] when the registry refuses it or the body cannot be read.
    pub async fn push_blob(
        &self,
        digest: &Digest,
        body: Body,
        mount_from: Option<&str>,
    ) -> Result<PushedBlob, RegistryError> {
        self.push_place()?.push_blob(digest, body, mount_from, Look::First).await
    }

    /// The same for a small blob, which is sent although it may be there: this shows whether anything may be pushed.
    ///
    /// # Errors
    /// As [`Repository::push_blob`].
    pub async fn push_anyway(&self, digest: &Digest, bytes: Bytes) -> Result<PushedBlob, RegistryError> {
        self.push_place()?.push_blob(digest, Body::Bytes(bytes), None, Look::Never).await
    }
}

impl HostedRepository {
    async fn push_blob(
        &self,
        digest: &Digest,
        body: Body,
        mount_from: Option<&str>,
        look: Look,
    ) -> Result<PushedBlob, RegistryError> {
        let deadline = self.deadline(body.len());
        let failure = Arc::default();
        let (body, what) = (watched(body, &failure), format!("pushing blob {digest}"));
        let mut push = Push { digest, body, mount_from, look, what, refused: Vec::new() };
        let mut retry = 0;
        loop {
            let (error, pause, again) = match self.push_once(&push, &deadline).await {
                Ok(pushed) => return Ok(pushed),
                Err(Setback::Busy(answer)) => {
                    let pause = asked_pause(&answer.response);
                    (self.status_error(*answer, &push.what).await, pause, true)
                }
                Err(Setback::UploadMode(manner, error)) if push.refused.is_empty() => {
                    tracing::debug!(registry = self.host(), ?manner, %error, "sending the blob another way");
                    push.refused.push(manner);
                    continue;
                }
                Err(Setback::Error(error)) => {
                    let again = error.is_transient();
                    (error, None, again)
                }
                Err(Setback::Lost(error)) => (error, None, true),
                Err(Setback::UploadMode(_, error) | Setback::Final(error)) => return Err(error),
            };
            if let Some(reason) = failure.lock().take() {
                return Err(self.source_error(digest, reason));
            }
            if !again {
                return Err(error);
            }
            self.pause(&mut retry, pause, &push.what, error, &deadline).await?;
        }
    }

    async fn push_once(&self, push: &Push<'_>, deadline: &Deadline) -> Result<PushedBlob, Setback> {
        if push.look == Look::First && self.is_present(push, &Scopes::push(self.name()), deadline).await? {
            return Ok(PushedBlob::Present);
        }
        let Some(opened) = self.open_upload(push, deadline).await? else { return Ok(PushedBlob::Mounted) };
        let sizes = self.options().upload;
        let chunk = chunks::size(sizes.chunk_bytes, opened.smallest);
        let large = push.body.len() > sizes.whole_bytes_max || opened.smallest.is_some();
        let in_chunks = match push.refused.first() {
            None => large && chunk.is_some_and(|chunk| push.body.len() > chunk as u64),
            Some(refused) => *refused == UploadMode::Whole,
        };
        match chunk {
            Some(chunk) if in_chunks => chunks::send(self, push, opened, chunk, deadline).await,
            _ => self.put_whole(push, opened, deadline).await,
        }
    }

    /// Opens an upload; `None` when the registry has mounted the blob instead.
    async fn open_upload(&self, push: &Push<'_>, deadline: &Deadline) -> Result<Option<UploadSession>, Setback> {
        let url = self.url("blobs/uploads/");
        let own = Scopes::push(self.name());
        if let Some(from) = push.mount_from {
            let (mut url, from) = (url.clone(), &self.name_of(from));
            url.query_pairs_mut().append_pair("mount", &push.digest.to_string()).append_pair("from", from);
            let both = own.clone().and(&Scopes::pull(from));
            let call = upload_call(push, Method::Post, url, Body::Empty, &both);
            let reason = match self.try_once(&call, deadline).await {
                Ok(answer) if answer.status() == 201 => return Ok(None),
                Ok(answer) if answer.status() == 202 => return self.opened(push, &answer, both).map(Some),
                Ok(answer) => format!("HTTP {}", answer.status()),
                // Push access here does not imply read access there.
                Err(Setback::Error(error)) if error.is_refusal() => error.to_string(),
                Err(setback) => return Err(setback),
            };
            tracing::debug!(registry = self.host(), blob = %push.digest, from, reason, "not mounted: sending it");
        }
        let call = upload_call(push, Method::Post, url, Body::Empty, &own);
        let answer = self.try_once(&call, deadline).await?;
        match answer.status() {
            202 => self.opened(push, &answer, own).map(Some),
            _ => Err(self.unexpected(answer, push).await),
        }
    }

    fn opened(&self, push: &Push<'_>, answer: &ApiResponse, scopes: Scopes) -> Result<UploadSession, Setback> {
        let location = location(answer).map_err(|reason| Setback::Error(self.malformed(&push.what, &reason)))?;
        let smallest = answer.response.header("oci-chunk-min-length").and_then(|text| text.trim().parse().ok());
        Ok(UploadSession { location, scopes, smallest })
    }

    async fn put_whole(
        &self,
        push: &Push<'_>,
        opened: UploadSession,
        deadline: &Deadline,
    ) -> Result<PushedBlob, Setback> {
        let url = with_digest(opened.location, push.digest);
        let mut call = upload_call(push, Method::Put, url, push.body.clone(), &opened.scopes);
        call.headers.push(("content-type", "application/octet-stream".to_owned()));
        let answer = self.try_once(&call, deadline).await?;
        match answer.status() {
            413 => Err(Setback::UploadMode(UploadMode::Whole, self.status_error(answer, &push.what).await)),
            _ => self.stored(push, answer, &opened.scopes, deadline).await,
        }
    }

    /// Reads the answer to the PUT that ends an upload.
    async fn stored(
        &self,
        push: &Push<'_>,
        answer: ApiResponse,
        scopes: &Scopes,
        deadline: &Deadline,
    ) -> Result<PushedBlob, Setback> {
        match answer.status() {
            201 => Ok(PushedBlob::Uploaded),
            // "Accepted" and its like do not say that the blob is there.
            200 | 202 | 204 if self.is_present(push, scopes, deadline).await? => Ok(PushedBlob::Uploaded),
            _ => Err(self.unexpected(answer, push).await),
        }
    }

    /// Whether the blob is there. A registry that does not say is taken to have nothing.
    async fn is_present(&self, push: &Push<'_>, scopes: &Scopes, deadline: &Deadline) -> Result<bool, Setback> {
        let mut call = self.blob_call(Method::Head, push.digest, push.what.clone());
        call.scopes = scopes.clone();
        match self.try_once(&call, deadline).await {
            Ok(answer) => Ok(answer.status() == 200),
            Err(Setback::Error(RegistryError::Redirect { .. })) => Ok(false),
            Err(setback) => Err(setback),
        }
    }

    async fn try_once(&self, call: &Call, deadline: &Deadline) -> Result<ApiResponse, Setback> {
        match self.attempt(call, deadline).await {
            Ok(answer) if is_busy(answer.status()) => Err(Setback::Busy(Box::new(answer))),
            Ok(answer) => Ok(answer),
            Err(error) => Err(Setback::Error(error)),
        }
    }

    async fn unexpected(&self, answer: ApiResponse, push: &Push<'_>) -> Setback {
        Setback::Error(self.status_error(answer, &push.what).await)
    }

    fn source_error(&self, digest: &Digest, reason: String) -> RegistryError {
        RegistryError::Source {
            registry: self.host().to_owned(),
            repository: self.name().to_owned(),
            digest: Box::new(*digest),
            reason,
        }
    }
}

fn upload_call(push: &Push<'_>, method: Method, url: Url, body: Body, scopes: &Scopes) -> Call {
    Call { method, url, headers: Vec::new(), body, scopes: scopes.clone(), what: push.what.clone() }
}

/// Where an upload is to be sent; the reason in words if nowhere.
fn location(answer: &ApiResponse) -> Result<Url, String> {
    let location = answer.response.header("location").unwrap_or_default();
    if location.is_empty() {
        return Err("the registry names no location for the upload".to_owned());
    }
    redirect::target(&answer.url, location).map_err(|reason| format!("the location of the upload is refused: {reason}"))
}

/// The location with its own query and the digest. Appended as text: going through pairs would rewrite the state that
/// the registry has put there.
fn with_digest(mut location: Url, digest: &Digest) -> Url {
    let query = match location.query() {
        Some(query) if !query.is_empty() => format!("{query}&digest={digest}"),
        _ => format!("digest={digest}"),
    };
    location.set_query(Some(&query));
    location
}

/// Keeps the error of a failing source: the HTTP library would only report that sending failed.
fn watched(body: Body, failure: &Arc<Mutex<Option<String>>>) -> Body {
    let Body::Chunks { length, open } = body else { return body };
    let failure = Arc::clone(failure);
    let open = Arc::new(move || {
        let failure = Arc::clone(&failure);
        let chunks: crate::registry::Chunks = Box::pin(open().inspect(move |chunk| {
            if let Err(error) = chunk {
                *failure.lock() = Some(error.to_string());
            }
        }));
        chunks
    });
    Body::Chunks { length, open }
}
