//! The HTTP client: one request out, one response in, nothing remembered.
//!
//! This is the only file that knows the HTTP library. Proxies are those of the environment (`HTTPS_PROXY`,
//! `HTTP_PROXY`, `ALL_PROXY`, except for hosts in `NO_PROXY`); a registry on this machine is never asked through one,
//! because the proxy's `localhost` is another. It follows no redirect, retries nothing and attaches no credential by
//! itself: those are decisions, and they are taken above. TLS is rustls with the *ring* provider, so that the build
//! needs no C compiler beyond what ring brings. Invariants: every wait ends at the caller's deadline; bytes are counted
//! as they pass; errors hold no query of any URL; a host's headers, its client certificate and the leave to skip
//! verification are for requests that the caller calls `home`, and for no other.

use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::{Stream, StreamExt};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use url::Url;

use crate::registry::certificates;
use crate::registry::credentials::Secret;
use crate::registry::error::{TransportError, TransportKind};
use crate::registry::hosts::ClientCertificate;
use crate::registry::redirect::ShownUrl;
use crate::registry::request_headers::RequestHeaders;
use crate::registry::retry::Deadline;
use crate::registry::traffic::{Counters, Traffic};

/// The chunks of a request body.
pub type Chunks = Pin<Box<dyn Stream<Item = std::io::Result<Bytes>> + Send>>;

/// A request body that can be sent more than once.
#[derive(Clone, Default)]
pub enum Body {
    /// None.
    #[default]
    Empty,
    /// Bytes in memory.
    Bytes(Bytes),
    /// Chunks that a function opens anew for every attempt.
    Chunks {
        /// How many bytes they add up to.
        length: u64,
        /// Opens them.
        open: Arc<dyn Fn() -> Chunks + Send + Sync>,
    },
}

impl Body {
    /// Its bytes, a piece at a time, from the beginning.
    pub(crate) fn pieces(&self) -> Chunks {
        match self {
            Self::Empty => Box::pin(futures_util::stream::empty()),
            Self::Bytes(bytes) => Box::pin(futures_util::stream::iter([Ok(bytes.clone())])),
            Self::Chunks { open, .. } => open(),
        }
    }

    /// Its length in bytes.
    #[must_use]
    pub(crate) fn len(&self) -> u64 {
        match self {
            Self::Empty => 0,
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::Chunks { length, .. } => *length,
        }
    }

    /// Whether there is nothing to send.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl std::fmt::Debug for Body {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Body({} bytes)", self.len())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Method {
    Get,
    Head,
    Post,
    Patch,
    Put,
    /// Of uploads of our own alone.
    Delete,
}

impl Method {
    /// Whether a body goes with it.
    fn has_body(self) -> bool {
        match self {
            Self::Get | Self::Head | Self::Delete => false,
            Self::Post | Self::Patch | Self::Put => true,
        }
    }
}

/// One request. `authorization` stands apart because it is secret.
pub(crate) struct Request<'a> {
    pub(crate) method: Method,
    pub(crate) url: &'a Url,
    pub(crate) headers: &'a [(&'static str, String)],
    /// What the client wants to be sent to the host itself, beside its own headers.
    pub(crate) more: Option<&'a RequestHeaders>,
    pub(crate) authorization: Option<&'a str>,
    pub(crate) body: &'a Body,
    /// Whether it goes to the host itself, not to a redirect's target: then it carries the host's headers and
    /// certificate.
    pub(crate) home: bool,
    /// A shorter response timeout than usual, because another host can be asked.
    pub(crate) silence_max: Option<Duration>,
}

/// How to build the clients of one host.
pub(crate) struct Setup {
    pub(crate) ca_files: Vec<PathBuf>,
    /// No proxy can reach a registry on this machine.
    pub(crate) loopback: bool,
    pub(crate) connect: Duration,
    /// How long to wait for the head of an answer.
    pub(crate) head: Duration,
    pub(crate) stall: Duration,
    /// What only the host itself gets.
    pub(crate) home: Home,
}

/// What only the host itself gets.
#[derive(Default)]
pub(crate) struct Home {
    pub(crate) certificate: Option<ClientCertificate>,
    pub(crate) skip_verify: bool,
    pub(crate) headers: Vec<(String, Secret)>,
}

/// One client for either scheme, each made when it is first needed: to read the system's certificates takes longer than
/// a request to a registry nearby. A host with a TLS of its own has a third one: its client certificate and its
/// exemption from verification apply to no other host.
struct Clients {
    extra: Vec<CertificateDer<'static>>,
    identity: Option<Identity>,
    skip_verify: bool,
    loopback: bool,
    connect: Duration,
    plain: OnceLock<Result<reqwest::Client, String>>,
    secure: OnceLock<Result<reqwest::Client, String>>,
    home: OnceLock<Result<reqwest::Client, String>>,
}

impl std::fmt::Debug for Clients {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Clients")
    }
}

impl Clients {
    fn client_for(&self, url: &Url, home: bool) -> Result<&reqwest::Client, String> {
        let client = if url.scheme() == "http" {
            self.plain.get_or_init(|| self.builder().tls_certs_only([]).build().map_err(|error| describe(&error)))
        } else if home && (self.skip_verify || self.identity.is_some()) {
            self.home.get_or_init(|| self.secure(true))
        } else {
            self.secure.get_or_init(|| self.secure(false))
        };
        client.as_ref().map_err(Clone::clone)
    }

    fn secure(&self, home: bool) -> Result<reqwest::Client, String> {
        let identity = self.identity.as_ref().filter(|_| home);
        let client = if home && self.skip_verify {
            let builder = self.builder().tls_danger_accept_invalid_certs(true).tls_certs_only([]);
            match identity {
                Some(identity) => builder.identity(identity.library.clone()),
                None => builder,
            }
        } else {
            let identity = identity.map(|identity| (identity.chain.clone(), identity.key.clone_key()));
            self.builder().tls_backend_preconfigured(certificates::client_config(&self.extra, identity)?)
        };
        client.build().map_err(|error| describe(&error))
    }

    fn builder(&self) -> reqwest::ClientBuilder {
        let builder = reqwest::Client::builder()
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(self.connect)
            .referer(false)
            .user_agent(concat!("soci/", env!("CARGO_PKG_VERSION")));
        if self.loopback { builder.no_proxy() } else { builder }
    }
}

#[derive(Debug, Clone)]
pub(crate) struct Transport {
    clients: Arc<Clients>,
    counters: Arc<Counters>,
    /// What every request to the host itself carries.
    headers: reqwest::header::HeaderMap,
    head: Duration,
    stall: Duration,
}

impl Transport {
    /// Gets ready; the error is a reason in words.
    pub(crate) fn new(setup: &Setup) -> Result<Self, String> {
        // Another library in this process may have installed a provider already, which serves as well.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut extra = Vec::new();
        for file in &setup.ca_files {
            extra.extend(certificates::chain(file, &read(file)?)?);
        }
        let Setup { loopback, connect, head, stall, .. } = *setup;
        let (identity, skip_verify) =
            (setup.home.certificate.as_ref().map(identity).transpose()?, setup.home.skip_verify);
        let (plain, secure, home) = Default::default();
        let clients = Clients { extra, identity, skip_verify, loopback, connect, plain, secure, home };
        let headers = own_headers(&setup.home.headers)?;
        Ok(Self { clients: Arc::new(clients), counters: Arc::default(), headers, head, stall })
    }

    pub(crate) fn traffic(&self) -> Traffic {
        Traffic {
            requests: self.counters.requests.load(Ordering::Relaxed),
            bytes_received: self.counters.bytes_received.load(Ordering::Relaxed),
            bytes_sent: self.counters.bytes_sent.load(Ordering::Relaxed),
        }
    }

    /// Sends one request and waits for the head of the response.
    pub(crate) async fn send(&self, request: &Request<'_>, deadline: &Deadline) -> Result<Response, TransportError> {
        let method = match request.method {
            Method::Get => reqwest::Method::GET,
            Method::Head => reqwest::Method::HEAD,
            Method::Post => reqwest::Method::POST,
            Method::Delete => reqwest::Method::DELETE,
            Method::Patch => reqwest::Method::PATCH,
            Method::Put => reqwest::Method::PUT,
        };
        let client = self
            .clients
            .client_for(request.url, request.home)
            .map_err(|detail| impossible(request.url, detail.as_str()))?;
        let verb = method.clone();
        let mut builder = client.request(method, request.url.clone()).headers(self.head_of(request)?);
        if request.method.has_body() {
            builder = builder.header(reqwest::header::CONTENT_LENGTH, request.body.len());
            builder = builder.body(self.body(request.body, deadline));
        }
        self.counters.requests.fetch_add(1, Ordering::Relaxed);
        let sent = builder.send();
        // A server may take its time over an upload and over its last word; it has none for a question.
        let asks = request.body.is_empty() && request.method != Method::Put;
        let wait = if asks { self.head } else { Duration::MAX };
        let silence_max = request.silence_max.unwrap_or(Duration::MAX);
        let shown = ShownUrl::new(request.url);
        // The words are those that AWS's tool prints.
        tracing::debug!(target: "soci_index::http", "http req {verb} {shown}");
        let response = within(deadline, wait.min(silence_max), sent).await;
        let response = response
            .ok_or_else(|| timeout(request.url))
            .and_then(|response| response.map_err(|error| failure(request.url, &error)));
        let response = response.inspect_err(|error| tracing::debug!(target: "soci_index::http", "http err {error}"))?;
        tracing::debug!(target: "soci_index::http", "http res {} {shown}", response.status());
        let (counters, stall) = (Arc::clone(&self.counters), self.stall.min(silence_max));
        Ok(Response { response, url: request.url.clone(), counters, stall })
    }

    /// The headers of a request. Those of the operator and the client come first, so that ours win where both name one.
    fn head_of(&self, request: &Request<'_>) -> Result<reqwest::header::HeaderMap, TransportError> {
        let mut headers = if request.home { self.headers.clone() } else { reqwest::header::HeaderMap::new() };
        for (name, value) in request.more.filter(|_| request.home).into_iter().flat_map(RequestHeaders::iter) {
            let unsendable = || impossible(request.url, &format!("{name} cannot be sent"));
            let name = reqwest::header::HeaderName::from_bytes(name.as_bytes()).map_err(|_| unsendable())?;
            let mut value: reqwest::header::HeaderValue = value.parse().map_err(|_| unsendable())?;
            value.set_sensitive(true);
            headers.insert(name, value);
        }
        for (name, value) in request.headers {
            let value = value.parse().map_err(|_| impossible(request.url, &format!("{name} cannot be sent")))?;
            headers.insert(*name, value);
        }
        if let Some(authorization) = request.authorization {
            headers.insert(reqwest::header::AUTHORIZATION, secret(authorization, request.url)?);
        }
        Ok(headers)
    }

    fn body(&self, body: &Body, deadline: &Deadline) -> reqwest::Body {
        match body {
            Body::Empty => reqwest::Body::from(Bytes::new()),
            Body::Bytes(bytes) => {
                self.counters.bytes_sent.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                reqwest::Body::from(bytes.clone())
            }
            Body::Chunks { open, .. } => {
                let (counters, deadline) = (Arc::clone(&self.counters), deadline.clone());
                reqwest::Body::wrap_stream(open().inspect(move |chunk| {
                    if let Ok(chunk) = chunk {
                        counters.bytes_sent.fetch_add(chunk.len() as u64, Ordering::Relaxed);
                        deadline.progress();
                    }
                }))
            }
        }
    }
}

/// The head of a response, and its body to be read.
pub(crate) struct Response {
    response: reqwest::Response,
    url: Url,
    counters: Arc<Counters>,
    stall: Duration,
}

/// Why a body could not be held.
pub(crate) enum BodyError {
    Transport(TransportError),
    TooLarge,
}

impl Response {
    pub(crate) fn status(&self) -> u16 {
        self.response.status().as_u16()
    }

    /// The first header of this name, if it is text.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.response.headers().get(name)?.to_str().ok()
    }

    /// All headers of this name that are text.
    pub(crate) fn headers<'a>(&'a self, name: &str) -> impl Iterator<Item = &'a str> {
        self.response.headers().get_all(name).iter().filter_map(|value| value.to_str().ok())
    }

    /// The length that the server announces.
    pub(crate) fn content_length(&self) -> Option<u64> {
        let text = self.header("content-length")?.trim();
        if text.bytes().all(|byte| byte.is_ascii_digit()) { text.parse().ok() } else { None }
    }

    /// The media type, lower-case, without parameters.
    pub(crate) fn media_type(&self) -> String {
        let text = self.header("content-type").unwrap_or_default();
        text.split(';').next().unwrap_or_default().trim().to_ascii_lowercase()
    }

    /// The next bytes of the body; `None` at its end.
    pub(crate) async fn chunk(&mut self, deadline: &Deadline) -> Result<Option<Bytes>, TransportError> {
        let chunk = within(deadline, self.stall, self.response.chunk()).await;
        let chunk = chunk.ok_or_else(|| timeout(&self.url))?.map_err(|error| failure(&self.url, &error))?;
        if let Some(chunk) = &chunk {
            self.counters.bytes_received.fetch_add(chunk.len() as u64, Ordering::Relaxed);
        }
        Ok(chunk)
    }

    /// The whole body, if it has at most `limit` bytes. Nothing is reserved on the server's word.
    pub(crate) async fn bytes(mut self, limit: u64, deadline: &Deadline) -> Result<Bytes, BodyError> {
        if self.content_length().is_some_and(|length| length > limit) {
            return Err(BodyError::TooLarge);
        }
        let mut whole = BytesMut::new();
        while let Some(chunk) = self.chunk(deadline).await.map_err(BodyError::Transport)? {
            if (whole.len() + chunk.len()) as u64 > limit {
                return Err(BodyError::TooLarge);
            }
            whole.extend_from_slice(&chunk);
        }
        Ok(whole.freeze())
    }
}

/// `None` when the deadline comes, or when nothing happens for `stall`.
async fn within<T>(deadline: &Deadline, stall: Duration, future: impl Future<Output = T>) -> Option<T> {
    tokio::select! {
        // Whatever is ready counts, also at the last moment.
        biased;
        value = future => Some(value),
        () = deadline.expired() => None,
        () = tokio::time::sleep(stall) => None,
    }
}

fn secret(text: &str, url: &Url) -> Result<reqwest::header::HeaderValue, TransportError> {
    let mut value = reqwest::header::HeaderValue::from_str(text)
        .map_err(|_| impossible(url, "the credentials hold characters that a header cannot carry"))?;
    value.set_sensitive(true);
    Ok(value)
}

/// The headers that an operator wants sent, unless one of them is none.
fn own_headers(given: &[(String, Secret)]) -> Result<reqwest::header::HeaderMap, String> {
    let mut headers = reqwest::header::HeaderMap::new();
    for (name, value) in given {
        let failed = |what: &str| format!("the header {name:?} {what}");
        let name = reqwest::header::HeaderName::from_bytes(name.as_bytes()).map_err(|_| failed("is no name"))?;
        let value = reqwest::header::HeaderValue::from_str(value.expose());
        let mut value = value.map_err(|_| failed("has a value that cannot be sent"))?;
        value.set_sensitive(true);
        headers.append(name, value);
    }
    Ok(headers)
}

/// The client certificate that a host may request.
struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    /// The same, as the library takes it where it verifies nothing.
    library: reqwest::Identity,
}

/// Reads a certificate and its key.
fn identity(files: &ClientCertificate) -> Result<Identity, String> {
    let mut pem = read(&files.certificate)?;
    if let Some(key) = &files.key {
        pem.push(b'\n');
        pem.extend(read(key)?);
    }
    let failed = |reason: String| format!("{}: no certificate with key: {reason}", files.certificate.display());
    let library = reqwest::Identity::from_pem(&pem).map_err(|error| failed(describe(&error)))?;
    let key = PrivateKeyDer::from_pem_slice(&pem).map_err(|error| failed(error.to_string()))?;
    Ok(Identity { chain: certificates::chain(&files.certificate, &pem)?, key, library })
}

fn read(file: &Path) -> Result<Vec<u8>, String> {
    std::fs::read(file).map_err(|error| format!("{}: {error}", file.display()))
}

/// A request that cannot be made.
fn impossible(url: &Url, detail: &str) -> TransportError {
    TransportError { kind: TransportKind::Request, url: ShownUrl::new(url), detail: detail.to_owned() }
}

fn timeout(url: &Url) -> TransportError {
    let detail = "no answer in time".to_owned();
    TransportError { kind: TransportKind::Timeout, url: ShownUrl::new(url), detail }
}

fn failure(url: &Url, error: &reqwest::Error) -> TransportError {
    if wants_proxy_login(error) {
        let detail = "the proxy wants a login: name it as http://USER:PASSWORD@HOST in HTTPS_PROXY".to_owned();
        return TransportError { kind: TransportKind::Proxy, url: ShownUrl::new(url), detail };
    }
    let kind = if is_tls(error) {
        TransportKind::Tls
    } else if error.is_builder() {
        TransportKind::Request
    } else if error.is_connect() {
        TransportKind::Connect
    } else if error.is_timeout() {
        TransportKind::Timeout
    } else {
        TransportKind::Interrupted
    };
    TransportError { kind, url: ShownUrl::new(url), detail: describe(error) }
}

/// rustls reports a refused certificate somewhere down the chain of causes.
fn is_tls(error: &reqwest::Error) -> bool {
    causes(error).any(|cause| cause.is::<rustls::Error>())
}

/// The library has no kind for what a proxy says to a tunnel; its words have been these for years.
fn wants_proxy_login(error: &reqwest::Error) -> bool {
    error.is_connect() && causes(error).any(|cause| cause.to_string().ends_with("proxy authorization required"))
}

/// The innermost cause: the outer ones repeat the URL, whose query may be secret.
fn describe(error: &reqwest::Error) -> String {
    if let Some(error) = causes(error).find_map(|cause| cause.downcast_ref::<rustls::Error>()) {
        return certificates::advice(error);
    }
    match causes(error).last() {
        Some(cause) => crate::registry::headers::one_line(&cause.to_string()),
        None if error.is_builder() => "the request cannot be built".to_owned(),
        None => "the request failed".to_owned(),
    }
}

/// What is behind an error. An `io::Error` hides the error that it was made of from `source()`.
fn causes(error: &reqwest::Error) -> impl Iterator<Item = &(dyn std::error::Error + 'static)> {
    std::iter::successors(std::error::Error::source(error), |cause| {
        let inner = cause.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        inner.map(|inner| inner as &(dyn std::error::Error + 'static)).or_else(|| cause.source())
    })
}
