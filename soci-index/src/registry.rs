//! Registries: reading and writing images and indexes over the distribution protocol.
//!
//! A [`Registry`] is one host with its connections, tokens and counters; a [`Repository`] is one name on it. Both are
//! handles that cost nothing to clone. Below them each file has one job: `transport` moves bytes and is the only one
//! that knows the HTTP library; `challenge`, `headers`, `redirect` and `retry` are pure; `auth`, `token` and
//! `credentials` decide what may be attached to a request; `exchange` carries one call through; `blobs`, `manifests`,
//! `referrers`, `fallback` and `upload` speak the protocol.
//!
//! A ready-made client was not used because lazy loading lives on what such clients hide: whether a range was honoured,
//! where a redirect led, whether the registry knows referrers. Invariants: no credential leaves the registry's origin
//! (a token service apart); every answer is bounded before it is held; every operation ends at its deadline; an absent
//! manifest or blob is a value, not an error.

mod auth;
pub mod blobs;
pub mod challenge;
pub mod credentials;
pub mod error;
mod exchange;
pub mod fallback;
mod headers;
pub mod manifests;
pub mod redirect;
pub mod referrers;
pub mod retry;
mod token;
mod transport;
pub mod upload;

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use url::Url;

pub use self::blobs::BlobReader;
pub use self::credentials::{CredentialSource, Credentials, Keychain, Login, Secret};
pub use self::error::{RegistryError, TransportError, TransportKind};
pub use self::retry::Backoff;
pub use self::transport::{Body, Chunks, Traffic};
use crate::digest::Digest;
use crate::limits::Limits;
use crate::registry::auth::Authorizer;
use crate::registry::retry::Deadline;
use crate::registry::transport::{Response, Setup, Transport};

/// Warnings remembered so as not to repeat them.
const WARNINGS_MAX: usize = 100;
/// Redirect targets remembered, one per blob.
const TARGETS_MAX: usize = 1000;

/// How to reach a registry.
#[derive(Debug, Clone)]
pub struct ClientOptions {
    /// Where user names and passwords come from.
    pub credentials: CredentialSource,
    /// Speak plain HTTP. Registries on this machine (`localhost`, `127.0.0.1`, `[::1]`) are always spoken to like this.
    pub plain_http: bool,
    /// A PEM file of certificates to trust beside the system's.
    pub ca_file: Option<PathBuf>,
    /// How long an operation may take without any progress, retries included.
    pub deadline: Duration,
    /// How long one connection may be silent before it is given up and another one tried.
    pub stall: Duration,
    /// How to wait between attempts.
    pub backoff: Backoff,
    /// How long the target of a redirect is used without asking the registry again. Such URLs are signed for minutes.
    pub redirect_life: Duration,
    /// Bounds on what a registry may make us hold.
    pub limits: Limits,
}

impl Default for ClientOptions {
    fn default() -> Self {
        Self {
            credentials: CredentialSource::default(),
            plain_http: false,
            ca_file: None,
            deadline: Duration::from_secs(60),
            stall: Duration::from_secs(20),
            backoff: Backoff::default(),
            redirect_life: Duration::from_secs(120),
            limits: Limits::DEFAULT,
        }
    }
}

/// One registry.
#[derive(Debug, Clone)]
pub struct Registry(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    name: String,
    base: Url,
    options: ClientOptions,
    transport: Transport,
    authorizer: Authorizer,
    warned: Mutex<HashSet<String>>,
    targets: Mutex<HashMap<(String, Digest), Target>>,
}

/// Where a blob really is, for a while.
#[derive(Debug, Clone)]
struct Target {
    url: Url,
    until: Instant,
}

impl Registry {
    /// Sets up access to the registry called `name` (`docker.io`, `harbor.example`, `localhost:5000`). Nothing is sent.
    ///
    /// # Errors
    /// [`RegistryError::Setup`] when the name is no host, or the certificates cannot be read.
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
        let loopback = redirect::is_loopback(&base);
        if options.plain_http || loopback {
            base = parse("http")?;
        }
        let setup = Setup { ca_file: options.ca_file.clone(), loopback, stall: options.stall };
        let transport = Transport::new(&setup).map_err(failed)?;
        let authorizer = Authorizer::new(name, &base, options.credentials.clone(), options.backoff);
        let (warned, targets) = (Mutex::default(), Mutex::default());
        Ok(Self(Arc::new(Inner { name: name.to_owned(), base, options, transport, authorizer, warned, targets })))
    }

    /// The name as given.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// A repository on it.
    #[must_use]
    pub fn repository(&self, name: &str) -> Repository {
        Repository { registry: self.clone(), name: name.into() }
    }

    /// What has been sent and received so far by this handle and its clones.
    #[must_use]
    pub fn traffic(&self) -> Traffic {
        self.0.transport.traffic()
    }

    /// How it is reached.
    #[must_use]
    pub fn options(&self) -> &ClientOptions {
        &self.0.options
    }

    pub(crate) fn base(&self) -> &Url {
        &self.0.base
    }

    pub(crate) fn transport(&self) -> &Transport {
        &self.0.transport
    }

    pub(crate) fn authorizer(&self) -> &Authorizer {
        &self.0.authorizer
    }

    /// Passes a `Warning` of the registry on, once.
    pub(crate) fn note_warnings(&self, response: &Response) {
        for text in response.headers("warning").filter_map(headers::warning_text) {
            let mut warned = self.0.warned.lock().unwrap_or_else(PoisonError::into_inner);
            if warned.len() < WARNINGS_MAX && warned.insert(text.clone()) {
                tracing::warn!(registry = self.name(), warning = text, "the registry warns");
            }
        }
    }
}

/// One repository of a registry.
#[derive(Debug, Clone)]
pub struct Repository {
    registry: Registry,
    name: Arc<str>,
}

impl Repository {
    /// The registry.
    #[must_use]
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// The name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The URL of `rest` below this repository. Tags, digests and names hold nothing that needs escaping in a path.
    pub(crate) fn url(&self, rest: &str) -> Url {
        let mut url = self.registry.base().clone();
        url.set_path(&format!("/v2/{}/{rest}", self.name));
        url
    }

    pub(crate) fn deadline(&self, bytes: u64) -> Deadline {
        Deadline::new(self.registry.options().deadline, bytes)
    }

    /// Where a blob was last redirected to, if that is still good.
    pub(crate) fn target(&self, digest: &Digest) -> Option<Url> {
        let targets = self.registry.0.targets.lock().unwrap_or_else(PoisonError::into_inner);
        let target = targets.get(&(self.name.to_string(), *digest))?;
        (Instant::now() < target.until).then(|| target.url.clone())
    }

    pub(crate) fn set_target(&self, digest: &Digest, url: Option<Url>) {
        let mut targets = self.registry.0.targets.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (self.name.to_string(), *digest);
        let Some(url) = url else {
            targets.remove(&key);
            return;
        };
        if targets.len() >= TARGETS_MAX {
            let now = Instant::now();
            targets.retain(|_, target| now < target.until);
            if targets.len() >= TARGETS_MAX {
                targets.clear();
            }
        }
        targets.insert(key, Target { url, until: Instant::now() + self.registry.options().redirect_life });
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
            assert_eq!(registry.base().as_str(), expected, "{name}");
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
