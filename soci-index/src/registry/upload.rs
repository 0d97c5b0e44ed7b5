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
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use parking_lot::Mutex;
use url::Url;

use crate::format::digest::Digest;
use crate::registry::Repository;
use crate::registry::blobs::blob_call;
use crate::registry::error::RegistryError;
use crate::registry::exchange::{ApiResponse, Call, Retries, is_busy};
use crate::registry::failover::HostedRepository;
use crate::registry::redirect;
use crate::registry::retry::Deadline;
use crate::registry::scopes::Scopes;
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
    /// The registry asks to come back later, and may say when.
    Busy(RegistryError, Option<Duration>),
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

/// One blob on its way to one host.
struct Push<'a> {
    hosted: &'a HostedRepository,
    digest: &'a Digest,
    body: Body,
    mount_from: Option<&'a str>,
    look: Look,
    what: String,
    deadline: Deadline,
    /// Manners that the registry has refused.
    refused: Vec<UploadMode>,
    /// Why the body could not be read.
    failure: Arc<Mutex<Option<String>>>,
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
        Push::new(&self.push_host()?, digest, body, mount_from, Look::First).run().await
    }

    /// The same for a small blob, which is sent although it may be there: this shows whether anything may be pushed.
    ///
    /// # Errors
    /// As [`Repository::push_blob`].
    pub(crate) async fn push_anyway(&self, digest: &Digest, bytes: Bytes) -> Result<PushedBlob, RegistryError> {
        Push::new(&self.push_host()?, digest, Body::Bytes(bytes), None, Look::Never).run().await
    }
}

impl<'a> Push<'a> {
    fn new(
        hosted: &'a HostedRepository,
        digest: &'a Digest,
        body: Body,
        mount_from: Option<&'a str>,
        look: Look,
    ) -> Self {
        let (deadline, failure) = (hosted.deadline(body.len()), Arc::default());
        let (body, what) = (watched(body, &failure), format!("pushing blob {digest}"));
        Self { hosted, digest, body, mount_from, look, what, deadline, refused: Vec::new(), failure }
    }

    async fn run(mut self) -> Result<PushedBlob, RegistryError> {
        let mut retries = Retries::new(self.hosted, &self.what, &self.deadline);
        loop {
            let (error, pause, again) = match self.once().await {
                Ok(pushed) => return Ok(pushed),
                Err(Setback::Busy(error, pause)) => (error, pause, true),
                Err(Setback::UploadMode(manner, error)) if self.refused.is_empty() => {
                    tracing::debug!(registry = self.hosted.host(), ?manner, %error, "sending the blob another way");
                    self.refused.push(manner);
                    continue;
                }
                Err(Setback::Error(error)) => {
                    let again = error.is_transient();
                    (error, None, again)
                }
                Err(Setback::Lost(error)) => (error, None, true),
                Err(Setback::UploadMode(_, error) | Setback::Final(error)) => return Err(error),
            };
            if let Some(reason) = self.failure.lock().take() {
                return Err(self.source_error(reason));
            }
            if !again {
                return Err(error);
            }
            retries.after(error, pause).await?;
        }
    }

    async fn once(&self) -> Result<PushedBlob, Setback> {
        if self.look == Look::First && self.is_present(&Scopes::push(self.hosted.name())).await? {
            return Ok(PushedBlob::Present);
        }
        let Some(opened) = self.open_upload().await? else { return Ok(PushedBlob::Mounted) };
        let sizes = self.hosted.options().upload;
        let chunk = chunks::size(sizes.chunk_bytes, opened.smallest);
        let large = self.body.len() > sizes.whole_bytes_max || opened.smallest.is_some();
        let in_chunks = match self.refused.first() {
            None => large && chunk.is_some_and(|chunk| self.body.len() > chunk as u64),
            Some(refused) => *refused == UploadMode::Whole,
        };
        match chunk {
            Some(chunk) if in_chunks => chunks::send(self, opened, chunk).await,
            _ => self.put_whole(opened).await,
        }
    }

    /// Opens an upload; `None` when the registry has mounted the blob instead.
    async fn open_upload(&self) -> Result<Option<UploadSession>, Setback> {
        let url = self.hosted.url("blobs/uploads/");
        let own = Scopes::push(self.hosted.name());
        if let Some(from) = self.mount_from {
            let (mut url, from) = (url.clone(), &self.hosted.name_of(from));
            url.query_pairs_mut().append_pair("mount", &self.digest.to_string()).append_pair("from", from);
            let both = own.clone().and(&Scopes::pull(from));
            let call = self.call(Method::Post, url, &both);
            let reason = match self.try_once(&call).await {
                Ok(answer) if answer.status() == 201 => return Ok(None),
                Ok(answer) if answer.status() == 202 => return self.opened(&answer, both).map(Some),
                Ok(answer) => format!("HTTP {}", answer.status()),
                // Push access here does not imply read access there.
                Err(Setback::Error(error)) if error.is_refusal() => error.to_string(),
                Err(setback) => return Err(setback),
            };
            tracing::debug!(registry = self.hosted.host(), blob = %self.digest, from, reason, "not mounted: sending it");
        }
        let call = self.call(Method::Post, url, &own);
        let answer = self.try_once(&call).await?;
        match answer.status() {
            202 => self.opened(&answer, own).map(Some),
            _ => Err(Setback::Error(answer.error().await)),
        }
    }

    fn opened(&self, answer: &ApiResponse<'_>, scopes: Scopes) -> Result<UploadSession, Setback> {
        let location = location(answer).map_err(|reason| Setback::Error(self.hosted.malformed(&self.what, reason)))?;
        let smallest = answer.header("oci-chunk-min-length").and_then(|text| text.trim().parse().ok());
        Ok(UploadSession { location, scopes, smallest })
    }

    async fn put_whole(&self, opened: UploadSession) -> Result<PushedBlob, Setback> {
        let url = with_digest(opened.location, self.digest);
        let call = self.sending(Method::Put, url, &opened.scopes, self.body.clone());
        let answer = self.try_once(&call).await?;
        match answer.status() {
            413 => Err(Setback::UploadMode(UploadMode::Whole, answer.error().await)),
            _ => self.stored(answer, &opened.scopes).await,
        }
    }

    /// Reads the answer to the PUT that ends an upload.
    async fn stored(&self, answer: ApiResponse<'_>, scopes: &Scopes) -> Result<PushedBlob, Setback> {
        match answer.status() {
            201 => Ok(PushedBlob::Uploaded),
            // "Accepted" and its like do not say that the blob is there.
            200 | 202 | 204 if self.is_present(scopes).await? => Ok(PushedBlob::Uploaded),
            _ => Err(Setback::Error(answer.error().await)),
        }
    }

    /// Whether the blob is there. A registry that does not say is taken to have nothing.
    async fn is_present(&self, scopes: &Scopes) -> Result<bool, Setback> {
        let mut call = blob_call(self.hosted, Method::Head, self.digest, &self.what);
        call.scopes = scopes.clone();
        match self.try_once(&call).await {
            Ok(answer) => Ok(answer.status() == 200),
            Err(Setback::Error(RegistryError::Redirect { .. })) => Ok(false),
            Err(setback) => Err(setback),
        }
    }

    async fn try_once<'b>(&'b self, call: &'b Call) -> Result<ApiResponse<'b>, Setback> {
        match self.hosted.attempt(call, &self.deadline).await {
            Ok(answer) if is_busy(answer.status()) => {
                let pause = answer.asked_pause();
                Err(Setback::Busy(answer.error().await, pause))
            }
            Ok(answer) => Ok(answer),
            Err(error) => Err(Setback::Error(error)),
        }
    }

    fn call(&self, method: Method, url: Url, scopes: &Scopes) -> Call {
        Call::new(method, url, scopes.clone(), &self.what)
    }

    /// A call that sends the blob or a part of it.
    fn sending(&self, method: Method, url: Url, scopes: &Scopes, body: Body) -> Call {
        self.call(method, url, scopes).with_header("content-type", "application/octet-stream").with_body(body)
    }

    fn source_error(&self, reason: String) -> RegistryError {
        let (registry, repository) = self.hosted.names();
        RegistryError::Source { registry, repository, digest: Box::new(*self.digest), reason }
    }
}

/// Where an upload is to be sent; the reason in words if nowhere.
fn location(answer: &ApiResponse<'_>) -> Result<Url, String> {
    let location = answer.header("location").unwrap_or_default();
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
