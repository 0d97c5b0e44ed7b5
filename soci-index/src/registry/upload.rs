//! Writing blobs: ask, open an upload, send it in one piece.
//!
//! One PUT instead of chunks, because every registry takes it and the blobs here are small (indexes, not layers). The
//! whole sequence starts again when any part of it breaks: an upload session whose fate is unknown is not continued.
//! Asking first makes a repeated push cheap, and protects a present blob from some registries' garbage collection.
//! Invariants: the query of the upload location is kept; nothing secret goes there unless it is on the registry's own
//! origin.

use std::sync::{Arc, Mutex, PoisonError};

use futures_util::StreamExt;
use url::Url;

use crate::digest::Digest;
use crate::registry::Repository;
use crate::registry::auth::Scopes;
use crate::registry::error::RegistryError;
use crate::registry::exchange::{Answer, Call, asked_pause, is_busy};
use crate::registry::failover::Place;
use crate::registry::redirect;
use crate::registry::retry::Deadline;
use crate::registry::transport::{Body, Method};

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

/// How one attempt ended short of success.
enum Setback {
    Busy(Box<Answer>),
    Error(RegistryError),
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
        self.push_place()?.push_blob(digest, body, mount_from).await
    }
}

impl Place {
    async fn push_blob(
        &self,
        digest: &Digest,
        body: Body,
        mount_from: Option<&str>,
    ) -> Result<PushedBlob, RegistryError> {
        let what = format!("pushing blob {digest}");
        let deadline = self.deadline(body.len());
        let failure = Arc::default();
        let body = watched(body, &failure);
        let mut retry = 0;
        loop {
            let (error, pause) = match self.push_once(digest, &body, mount_from, &what, &deadline).await {
                Ok(pushed) => return Ok(pushed),
                Err(Setback::Busy(answer)) => {
                    let pause = asked_pause(&answer.response);
                    (self.status_error(*answer, &what).await, pause)
                }
                Err(Setback::Error(error)) => (error, None),
            };
            if let Some(reason) = failure.lock().unwrap_or_else(PoisonError::into_inner).take() {
                return Err(RegistryError::Source {
                    registry: self.host().to_owned(),
                    repository: self.name().to_owned(),
                    digest: Box::new(*digest),
                    reason,
                });
            }
            let busy = matches!(error, RegistryError::Status { status, .. } if is_busy(status));
            if !busy && !error.is_transient() {
                return Err(error);
            }
            self.pause(&mut retry, pause, &what, error, &deadline).await?;
        }
    }

    async fn push_once(
        &self,
        digest: &Digest,
        body: &Body,
        mount_from: Option<&str>,
        what: &str,
        deadline: &Deadline,
    ) -> Result<PushedBlob, Setback> {
        let mut scopes = Scopes::push(self.name());
        if self.is_present(digest, &scopes, what, deadline).await? {
            return Ok(PushedBlob::Present);
        }
        let mut url = self.url("blobs/uploads/");
        if let Some(from) = mount_from {
            scopes = scopes.and(&Scopes::pull(from));
            url.query_pairs_mut().append_pair("mount", &digest.to_string()).append_pair("from", from);
        }
        let call = self.upload_call(Method::Post, url, Body::Empty, scopes.clone(), what);
        let answer = self.try_once(&call, deadline).await?;
        match answer.status() {
            201 if mount_from.is_some() => return Ok(PushedBlob::Mounted),
            202 => {}
            _ => return Err(self.unexpected(answer, what).await),
        }
        let url = self.location(&answer, digest).map_err(|reason| Setback::Error(self.malformed(what, &reason)))?;
        let mut call = self.upload_call(Method::Put, url, body.clone(), scopes.clone(), what);
        call.headers.push(("content-type", "application/octet-stream".to_owned()));
        let answer = self.try_once(&call, deadline).await?;
        match answer.status() {
            201 => Ok(PushedBlob::Uploaded),
            // "Accepted" and its like do not say that the blob is there.
            200 | 202 | 204 if self.is_present(digest, &scopes, what, deadline).await? => Ok(PushedBlob::Uploaded),
            _ => Err(self.unexpected(answer, what).await),
        }
    }

    /// Whether the blob is there. A registry that does not say is taken to have nothing.
    async fn is_present(
        &self,
        digest: &Digest,
        scopes: &Scopes,
        what: &str,
        deadline: &Deadline,
    ) -> Result<bool, Setback> {
        let mut call = self.blob_call(Method::Head, digest, what.to_owned());
        call.scopes = scopes.clone();
        match self.try_once(&call, deadline).await {
            Ok(answer) => Ok(answer.status() == 200),
            Err(Setback::Error(RegistryError::Redirect { .. })) => Ok(false),
            Err(setback) => Err(setback),
        }
    }

    async fn try_once(&self, call: &Call, deadline: &Deadline) -> Result<Answer, Setback> {
        match self.attempt(call, deadline).await {
            Ok(answer) if is_busy(answer.status()) => Err(Setback::Busy(Box::new(answer))),
            Ok(answer) => Ok(answer),
            Err(error) => Err(Setback::Error(error)),
        }
    }

    async fn unexpected(&self, answer: Answer, what: &str) -> Setback {
        Setback::Error(self.status_error(answer, what).await)
    }

    fn upload_call(&self, method: Method, url: Url, body: Body, scopes: Scopes, what: &str) -> Call {
        Call { method, url, headers: Vec::new(), body, scopes, what: what.to_owned() }
    }

    /// Where to send the blob: the upload location, with its own query and the digest.
    fn location(&self, answer: &Answer, digest: &Digest) -> Result<Url, String> {
        let location = answer.response.header("location").unwrap_or_default();
        if location.is_empty() {
            return Err("the registry names no location for the upload".to_owned());
        }
        let mut url = redirect::target(&answer.url, location)
            .map_err(|reason| format!("the location of the upload is refused: {reason}"))?;
        // Appended as text: going through pairs would rewrite the state that the registry has put there.
        let query = match url.query() {
            Some(query) if !query.is_empty() => format!("{query}&digest={digest}"),
            _ => format!("digest={digest}"),
        };
        url.set_query(Some(&query));
        Ok(url)
    }
}

/// Makes a failing source tell why: the HTTP library would only say that sending failed.
fn watched(body: Body, failure: &Arc<Mutex<Option<String>>>) -> Body {
    let Body::Chunks { length, open } = body else { return body };
    let failure = Arc::clone(failure);
    let open = Arc::new(move || {
        let failure = Arc::clone(&failure);
        let chunks: super::Chunks = Box::pin(open().inspect(move |chunk| {
            if let Err(error) = chunk {
                *failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.to_string());
            }
        }));
        chunks
    });
    Body::Chunks { length, open }
}
