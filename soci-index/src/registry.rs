//! Registries: reading and writing images and indexes over the distribution protocol.
//!
//! A [`Registry`] is what images name, on one host or, with mirrors, on several; a [`Repository`] is one name on it.
//! Both are handles that cost nothing to clone. Below them each file has one job: `hosts` reads which hosts there are;
//! an `endpoint` is one of them with its connections, tokens and memory, and its `address` finds out whether it speaks
//! TLS; `failover` chooses the host; `transport` moves bytes and is the only one that knows the HTTP library;
//! `challenge`, `headers`, `redirect` and `retry` are pure; `auth`, `token` and `credentials` decide what may be
//! attached to a request; `exchange` carries one call through; `pieces` hands bytes to code that blocks; `blobs`, `manifests`, `tags`, `referrers`, `fallback`
//! and `upload` speak the protocol.
//!
//! A ready-made client was not used because lazy loading lives on what such clients hide: whether a range was honoured,
//! where a redirect led, whether the registry knows referrers. Invariants: no credential leaves the origin of its host
//! (a token service apart), and no host gets another one's; every answer is bounded before it is held; every operation
//! ends at its deadline; an absent manifest or blob is a value, not an error.
//!
//! The room uses `format`; `image`, `trust`, `find` and `publish` use it.

mod address;
mod auth;
mod blobs;
mod certificates;
pub mod challenge;
pub mod credentials;
mod endpoint;
pub mod error;
mod exchange;
mod failover;
pub mod fallback;
mod headers;
pub mod hosts;
mod manifests;
mod need;
#[cfg(feature = "oci-client")]
pub mod oci_client;
pub mod pieces;
pub(crate) mod redirect;
pub mod referrers;
pub mod request_headers;
pub(crate) mod retry;
mod scopes;
mod tags;
mod token;
mod traffic;
pub(crate) mod transport;
pub mod upload;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use url::Url;

pub use self::blobs::{BlobReader, ByteStream, Part};
pub use self::credentials::{CredentialSource, Credentials, Keychain, Login, Secret};
pub use self::error::{LoginVerdict, RegistryError, TransportError, TransportKind};
pub use self::hosts::{ClientCertificate, HostSource};
pub use self::redirect::ShownUrl;
pub use self::request_headers::RequestHeaders;
pub use self::retry::Backoff;
pub use self::traffic::Traffic;
pub use self::transport::{Body, Chunks};
pub use self::upload::UploadSizes;
use crate::format::limits::Limits;
use crate::registry::endpoint::Endpoint;
use crate::registry::hosts::{Blocked, Host, HostRules};
use crate::registry::retry::Deadline;

/// How to reach a registry. Proxies are those that the environment names (`HTTPS_PROXY`, `HTTP_PROXY`, `ALL_PROXY`,
/// `NO_PROXY`, also in small letters), with their logins; registries on this machine are asked directly.
#[derive(Debug, Clone)]
pub struct ClientOptions {
    /// Where user names and passwords come from.
    pub credentials: CredentialSource,
    /// Do not check the registry's own certificate. Mirrors have their own rules.
    pub skip_verify: bool,
    /// Speak plain HTTP. Without it, registries on this machine (`localhost`, `127.0.0.1`, `[::1]`) are asked for TLS
    /// first, and spoken to in plain HTTP if they have none, unless something is said of their TLS: a file of
    /// certificates, a client's certificate, or that none is verified.
    pub plain_http: bool,
    /// Mirrors, and how hosts are treated.
    pub hosts: HostSource,
    /// A PEM file of certificates to trust beside the system's.
    pub ca_file: Option<PathBuf>,
    /// Credentials for the registry itself. Mirrors have their own.
    pub client_certificate: Option<ClientCertificate>,
    /// How long to wait for a connection.
    pub connect: Duration,
    /// How long to wait for an answer to begin.
    pub head: Duration,
    /// How long an operation may take without any progress, retries included.
    pub deadline: Duration,
    /// How long one connection may be silent before it is given up and another one tried.
    pub stall: Duration,
    /// How to wait between attempts.
    pub backoff: Backoff,
    /// A user is waiting and may have typed a wrong name: a host that was never reached is retried only once and
    /// quickly, and each longer backoff is reported.
    pub is_interactive: bool,
    /// How long the target of a redirect is used without asking the registry again. Such URLs are signed for minutes.
    pub redirect_life: Duration,
    /// In which sizes blobs are sent.
    pub upload: UploadSizes,
    /// Bounds on what a registry may make us hold.
    pub limits: Limits,
}

impl ClientOptions {
    const fn has_tls(&self) -> bool {
        self.skip_verify || self.ca_file.is_some() || self.client_certificate.is_some()
    }
}

impl Default for ClientOptions {
    fn default() -> Self {
        Self {
            credentials: CredentialSource::default(),
            skip_verify: false,
            plain_http: false,
            hosts: HostSource::default(),
            ca_file: None,
            client_certificate: None,
            connect: Duration::from_secs(10),
            head: Duration::from_secs(20),
            deadline: Duration::from_secs(60),
            stall: Duration::from_secs(20),
            backoff: Backoff::default(),
            is_interactive: false,
            redirect_life: Duration::from_secs(120),
            upload: UploadSizes::default(),
            limits: Limits::DEFAULT,
        }
    }
}

/// One registry, on one host or several.
#[derive(Debug, Clone)]
pub struct Registry(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    name: String,
    options: ClientOptions,
    endpoints: Vec<Arc<Endpoint>>,
    blocked: Vec<Blocked>,
}

impl Registry {
    /// Sets up access to the registry called `name` (`docker.io`, `harbor.example`, `localhost:5000`). Files that
    /// describe its hosts are read; nothing is sent.
    ///
    /// # Errors
    /// [`RegistryError::Setup`] when the name is no host, or the certificates of a host cannot be read.
    pub fn new(name: &str, options: ClientOptions) -> Result<Self, RegistryError> {
        let failed = |reason: String| RegistryError::Setup { registry: name.to_owned(), reason };
        let host = match name {
            // The name that users write is not where the registry is.
            "docker.io" | "index.docker.io" => "registry-1.docker.io",
            other => other,
        };
        let parse =
            |scheme: &str| Url::parse(&format!("{scheme}://{host}/")).map_err(|error| failed(error.to_string()));
        let mut base = parse("https")?;
        if base.path() != "/" || base.query().is_some() || base.fragment().is_some() || !base.username().is_empty() {
            return Err(failed("expected host or host:port".to_owned()));
        }
        let known_as = if host == "registry-1.docker.io" { "docker.io" } else { name };
        let mut hosts = options.hosts.for_registry(known_as).map_err(failed)?;
        let mut plain = parse("http")?;
        base.set_path("/v2");
        plain.set_path("/v2");
        let own = match options.plain_http {
            true => Host { url: plain, plain: None, rules: HostRules::default() },
            false => Host::perhaps_plain(base, plain, HostRules::default()),
        };
        let blocked = std::mem::take(&mut hosts.blocked);
        let endpoints = Endpoint::all(known_as, &own, hosts, &options).map_err(failed)?;
        let endpoints = endpoints.into_iter().map(Arc::new).collect();
        Ok(Self(Arc::new(Inner { name: name.to_owned(), options, endpoints, blocked })))
    }

    /// The name as given.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0.name
    }

    #[must_use]
    pub fn repository(&self, name: &str) -> Repository {
        Repository { registry: self.clone(), name: name.into(), headers: RequestHeaders::default() }
    }

    /// What has been sent and received so far by this handle and its clones, on all hosts.
    #[must_use]
    pub fn traffic(&self) -> Traffic {
        self.0.endpoints.iter().map(|endpoint| endpoint.transport.traffic()).sum()
    }

    /// How it is reached.
    #[must_use]
    pub fn options(&self) -> &ClientOptions {
        &self.0.options
    }

    /// Its hosts, in the order in which they are asked. There is at least one.
    pub(crate) fn endpoints(&self) -> &[Arc<Endpoint>] {
        &self.0.endpoints
    }
}

/// One repository of a registry.
#[derive(Debug, Clone)]
pub struct Repository {
    registry: Registry,
    name: Arc<str>,
    headers: RequestHeaders,
}

impl Repository {
    #[must_use]
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Sends these with all requests to the registry's hosts, beside its own.
    #[must_use]
    pub fn with_headers(self, headers: RequestHeaders) -> Self {
        Self { headers, ..self }
    }

    /// What is sent with all requests beside their own headers.
    pub(crate) fn headers(&self) -> &RequestHeaders {
        &self.headers
    }

    /// The configuration that blocks the repository, if any.
    pub(crate) fn blocked(&self) -> Option<&Blocked> {
        self.registry.0.blocked.iter().find(|blocked| blocked.repositories.contains(&self.name))
    }

    pub(crate) fn deadline(&self, bytes: u64) -> Deadline {
        Deadline::new(self.registry.options().deadline, bytes)
    }
}

impl std::fmt::Display for Repository {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.registry.name(), self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for (name, plain_http, expected) in [
            ("docker.io", false, "https://registry-1.docker.io/"),
            ("harbor.example", false, "https://harbor.example/"),
            ("harbor.example:8443", false, "https://harbor.example:8443/"),
            ("harbor.example", true, "http://harbor.example/"),
            ("localhost:5000", false, "http://localhost:5000/"),
            ("127.0.0.1", false, "http://127.0.0.1/"),
            ("[::1]:5000", false, "http://[::1]:5000/"),
        ] {
            let registry = Registry::new(name, ClientOptions { plain_http, ..ClientOptions::default() }).unwrap();
            assert_eq!(registry.endpoints()[0].url("r", "").as_str(), format!("{expected}v2/r/"), "{name}");
        }
        for name in ["", "a b", "h/path", "user@h", "h?x"] {
            let failed = Registry::new(name, ClientOptions::default());
            assert!(matches!(failed, Err(RegistryError::Setup { .. })), "{name}");
        }
        let ca_file = Some(PathBuf::from("/no/such/file.pem"));
        let failed = Registry::new("h", ClientOptions { ca_file, ..ClientOptions::default() });
        assert!(matches!(failed, Err(RegistryError::Setup { .. })));
    }
}
