//! A small registry in this process, so that a demonstration needs no network and no installation.
//!
//! It speaks version 1.1 of the distribution protocol as far as image tools use it: blobs with ranges, uploads in one
//! piece or several, mounts, manifests, tags, and the referrers API. Everything is kept in memory and forgotten at the
//! end; there is no authentication, which is why it listens on the loopback address only. Requests and bytes are
//! counted, because what a demonstration shows is how few there are. Invariants: content is stored under the digest
//! that was computed here; a manifest is accepted only when everything it points at (its subject apart) is there.

mod range;
mod state;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State as Shared};
use axum::http::{Method, StatusCode, header};
use axum::response::Response;
use bytes::Bytes;
use futures_util::StreamExt;
use soci_index::format::digest::Digest;
use soci_index::registry::Traffic;
use tokio::task::JoinHandle;

use self::state::{Failure, Manifest, RegistryState};

/// Bytes of one upload request. The store is memory.
const UPLOAD_BYTES_MAX: usize = 4 << 30;
/// Bytes of one manifest, as the specification asks for.
const MANIFEST_BYTES_MAX: usize = 4 << 20;
/// Bytes handed to a connection at a time, so that bytes are counted as they leave and not when they are promised.
const CHUNK_BYTES: usize = 64 << 10;

/// A registry that runs until it is dropped.
#[derive(Debug)]
pub struct DemoRegistry {
    address: SocketAddr,
    server: Arc<Server>,
    task: JoinHandle<()>,
}

#[derive(Debug)]
struct Server {
    state: RegistryState,
    counters: Arc<Counters>,
    latency: Duration,
}

#[derive(Debug, Default)]
struct Counters {
    requests: AtomicU64,
    received: AtomicU64,
    sent: AtomicU64,
}

impl DemoRegistry {
    /// Starts one on a free port of the loopback address. Every request is answered after `latency`, to stand for the
    /// way to a registry that is not on this machine.
    ///
    /// # Errors
    /// When no port can be obtained.
    pub async fn start(latency: Duration) -> io::Result<Self> {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let server = Arc::new(Server { state: RegistryState::default(), counters: Arc::default(), latency });
        let router = Router::new().fallback(answer).with_state(Arc::clone(&server));
        let task = tokio::spawn(async move {
            let listener = axum::serve::ListenerExt::tap_io(listener, |stream| {
                // A small answer must not wait for an acknowledgement.
                let _ = stream.set_nodelay(true);
            });
            if let Err(error) = axum::serve(listener, router).await {
                tracing::error!(%error, "the demonstration's registry has stopped");
            }
        });
        Ok(Self { address, server, task })
    }

    /// Its name in image references, for example `127.0.0.1:40001`.
    #[must_use]
    pub fn host(&self) -> String {
        self.address.to_string()
    }

    /// What has passed so far, seen from the registry: `bytes_sent` went to its clients.
    #[must_use]
    pub fn traffic(&self) -> Traffic {
        let counters = &self.server.counters;
        Traffic {
            requests: counters.requests.load(Ordering::Relaxed),
            bytes_received: counters.received.load(Ordering::Relaxed),
            bytes_sent: counters.sent.load(Ordering::Relaxed),
        }
    }
}

impl Drop for DemoRegistry {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn answer(Shared(server): Shared<Arc<Server>>, request: Request) -> Response {
    server.counters.requests.fetch_add(1, Ordering::Relaxed);
    if !server.latency.is_zero() {
        tokio::time::sleep(server.latency).await;
    }
    let answer = server.route(request).await.unwrap_or_else(|failure| refuse(&failure));
    let mut response = Response::new(Body::empty());
    *response.status_mut() = answer.status;
    for (name, value) in answer.headers {
        if let Ok(value) = value.parse() {
            response.headers_mut().insert(name, value);
        }
    }
    response.headers_mut().insert(header::CONTENT_LENGTH, answer.body.len().into());
    if !answer.head_only {
        *response.body_mut() = counted(answer.body, Arc::clone(&server.counters));
    }
    response
}

/// An answer before it becomes HTTP.
struct Reply {
    status: StatusCode,
    headers: Vec<(&'static str, String)>,
    body: Bytes,
    /// Send the length of the body without the body.
    head_only: bool,
}

fn reply(status: StatusCode) -> Reply {
    Reply { status, headers: Vec::new(), body: Bytes::new(), head_only: false }
}

impl Reply {
    fn header(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    fn body(mut self, body: impl Into<Bytes>) -> Self {
        self.body = body.into();
        self
    }

    fn head_only(mut self, head_only: bool) -> Self {
        self.head_only = head_only;
        self
    }
}

fn refuse(failure: &Failure) -> Reply {
    let (status, code) = failure.status();
    let body = serde_json::json!({"errors": [{"code": code, "message": failure.to_string()}]}).to_string();
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    reply(status).header("content-type", "application/json").body(body)
}

fn counted(body: Bytes, counters: Arc<Counters>) -> Body {
    let chunks = futures_util::stream::unfold(body, |mut rest| async move {
        let next = rest.split_to(rest.len().min(CHUNK_BYTES));
        (!next.is_empty()).then_some((next, rest))
    });
    Body::from_stream(chunks.map(move |chunk| {
        counters.sent.fetch_add(chunk.len() as u64, Ordering::Relaxed);
        Ok::<_, std::convert::Infallible>(chunk)
    }))
}

/// The parameters of a query.
struct Query(Vec<(String, String)>);

impl Query {
    fn of(request: &Request) -> Self {
        let text = request.uri().query().unwrap_or_default();
        Self(url::form_urlencoded::parse(text.as_bytes()).into_owned().collect())
    }

    fn value(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    fn digest(&self, name: &str) -> Result<Option<Digest>, Failure> {
        self.value(name).map(|text| text.parse().map_err(|_| Failure::BadDigest)).transpose()
    }
}

impl Server {
    async fn route(&self, request: Request) -> Result<Reply, Failure> {
        let path = request.uri().path().to_owned();
        let rest = path.strip_prefix("/v2/").ok_or(Failure::Unknown)?;
        if rest.is_empty() {
            return Ok(reply(StatusCode::OK));
        }
        let head = request.method() == Method::HEAD;
        let reading = head || request.method() == Method::GET;
        // Names hold slashes, so the path is taken apart from its end.
        if let Some((name, id)) = rest.rsplit_once("/blobs/uploads/") {
            return self.upload(name, id, request).await;
        }
        if let Some(name) = rest.strip_suffix("/blobs/uploads") {
            return self.upload(name, "", request).await;
        }
        if let Some(name) = rest.strip_suffix("/tags/list").filter(|_| reading) {
            let tags = self.state.tags(name)?;
            let body = serde_json::json!({"name": name, "tags": tags}).to_string();
            return Ok(reply(StatusCode::OK).header("content-type", "application/json").body(body).head_only(head));
        }
        let (front, last) = rest.rsplit_once('/').ok_or(Failure::Unknown)?;
        let (name, kind) = front.rsplit_once('/').ok_or(Failure::Unknown)?;
        match kind {
            "blobs" if reading => self.blob(name, last, &request),
            "referrers" if reading => self.referrers(name, last, &Query::of(&request), head),
            "manifests" if reading => {
                let found = self.state.manifest(name, last)?;
                let answer = reply(StatusCode::OK).header("content-type", &found.media_type);
                let answer = answer.header("docker-content-digest", found.digest.to_string());
                Ok(answer.body(found.bytes).head_only(head))
            }
            "manifests" if request.method() == Method::PUT => self.put_manifest(name, last, request).await,
            "manifests" if request.method() == Method::DELETE => {
                self.state.delete_manifest(name, &last.parse().map_err(|_| Failure::BadDigest)?)?;
                Ok(reply(StatusCode::ACCEPTED))
            }
            _ => Err(Failure::Unsupported),
        }
    }

    fn blob(&self, name: &str, digest: &str, request: &Request) -> Result<Reply, Failure> {
        let digest: Digest = digest.parse().map_err(|_| Failure::BadDigest)?;
        let blob = self.state.blob(name, &digest)?;
        let head = request.method() == Method::HEAD;
        let common = |status| {
            reply(status)
                .header("content-type", "application/octet-stream")
                .header("docker-content-digest", digest.to_string())
                .header("accept-ranges", "bytes")
                .head_only(head)
        };
        let asked = request.headers().get(header::RANGE).and_then(|value| value.to_str().ok());
        Ok(match range::read(asked.unwrap_or_default(), blob.len()) {
            range::RequestedRange::Whole => common(StatusCode::OK).body(blob),
            range::RequestedRange::Nothing => {
                common(StatusCode::RANGE_NOT_SATISFIABLE).header("content-range", format!("bytes */{}", blob.len()))
            }
            range::RequestedRange::Part(part) => {
                let shown = format!("bytes {}-{}/{}", part.start, part.end - 1, blob.len());
                common(StatusCode::PARTIAL_CONTENT).header("content-range", shown).body(blob.slice(part))
            }
        })
    }

    fn referrers(&self, name: &str, subject: &str, query: &Query, head: bool) -> Result<Reply, Failure> {
        let subject: Digest = subject.parse().map_err(|_| Failure::BadDigest)?;
        let filter = query.value("artifactType");
        let list = self.state.referrers(name, &subject, filter);
        let mut answer = reply(StatusCode::OK).header("content-type", "application/vnd.oci.image.index.v1+json");
        if filter.is_some() {
            answer = answer.header("oci-filters-applied", "artifactType");
        }
        Ok(answer.body(list.to_string()).head_only(head))
    }

    async fn put_manifest(&self, name: &str, reference: &str, request: Request) -> Result<Reply, Failure> {
        let media_type = request.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let media_type = media_type.unwrap_or_default().to_owned();
        let bytes = self.receive(request, MANIFEST_BYTES_MAX).await?;
        let stored = self.state.put_manifest(name, reference, Manifest::of(media_type, bytes))?;
        let mut answer = reply(StatusCode::CREATED)
            .header("location", format!("/v2/{name}/manifests/{}", stored.digest))
            .header("docker-content-digest", stored.digest.to_string());
        if let Some(subject) = stored.subject {
            answer = answer.header("oci-subject", subject.to_string());
        }
        Ok(answer)
    }

    async fn upload(&self, name: &str, id: &str, request: Request) -> Result<Reply, Failure> {
        let query = Query::of(&request);
        let method = request.method().clone();
        let created = |digest: &Digest| {
            reply(StatusCode::CREATED)
                .header("location", format!("/v2/{name}/blobs/{digest}"))
                .header("docker-content-digest", digest.to_string())
        };
        let accepted = |id: &str, length: usize| {
            reply(StatusCode::ACCEPTED)
                .header("location", format!("/v2/{name}/blobs/uploads/{id}"))
                .header("range", format!("0-{}", length.saturating_sub(1)))
        };
        if method == Method::POST && id.is_empty() {
            if let (Some(digest), Some(from)) = (query.digest("mount")?, query.value("from"))
                && self.state.mount(name, from, &digest)
            {
                return Ok(created(&digest));
            }
            let digest = query.digest("digest")?;
            let bytes = self.receive(request, UPLOAD_BYTES_MAX).await?;
            let id = self.state.begin(bytes);
            return match digest {
                Some(digest) => self.state.finish(name, &id, &digest).map(|()| created(&digest)),
                None => Ok(accepted(&id, 0)),
            };
        }
        if method == Method::GET {
            // How far it has come.
            let response = accepted(id, self.state.append(id, &[])?);
            return Ok(Reply { status: StatusCode::NO_CONTENT, ..response });
        }
        if method == Method::PATCH {
            let bytes = self.receive(request, UPLOAD_BYTES_MAX).await?;
            return Ok(accepted(id, self.state.append(id, &bytes)?));
        }
        if method == Method::PUT {
            let digest = query.digest("digest")?.ok_or(Failure::BadDigest)?;
            let bytes = self.receive(request, UPLOAD_BYTES_MAX).await?;
            self.state.append(id, &bytes)?;
            self.state.finish(name, id, &digest)?;
            return Ok(created(&digest));
        }
        if method == Method::DELETE {
            return self.state.cancel(id).map(|()| reply(StatusCode::NO_CONTENT));
        }
        Err(Failure::Unsupported)
    }

    async fn receive(&self, request: Request, limit: usize) -> Result<Bytes, Failure> {
        let bytes = axum::body::to_bytes(request.into_body(), limit).await.map_err(|_| Failure::TooLarge)?;
        self.counters.received.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests;
