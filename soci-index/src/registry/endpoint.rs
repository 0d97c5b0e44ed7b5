//! One host of a registry: its address, and everything that belongs to it and to no other.
//!
//! A registry may be reached by several hosts ([`crate::registry::hosts`]). Each has its own connections, certificates,
//! headers, logins, tokens and memory of redirects, so that nothing obtained from one is sent to another. Invariants:
//! logins are looked up under the host's own name, and a password that the user gave on the spot belongs to the
//! registry itself; an unreachable host is skipped for a while if there is another one.

use std::collections::{HashMap, HashSet};
use std::fmt::Display;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;
use url::Url;

use crate::format::digest::Digest;
use crate::registry::address::Address;
use crate::registry::auth::Authorizer;
use crate::registry::credentials::CredentialSource;
use crate::registry::error::{TransportError, TransportKind};
use crate::registry::hosts::{Capabilities, Host, HostRules, Hosts, Repositories};
use crate::registry::need::Need;
use crate::registry::redirect::{self, ShownUrl};
use crate::registry::transport::{Home, Response, Setup, Transport};
use crate::registry::{ClientOptions, headers};

/// Warnings remembered so as not to repeat them.
const WARNINGS_MAX: usize = 100;
/// Redirect targets remembered, one per blob.
const TARGETS_MAX: usize = 1000;
/// Refusals remembered, one per repository and kind of question. What is beyond is asked each time.
const REFUSALS_MAX: usize = 1000;
/// Origins remembered that answered.
const REACHED_MAX: usize = 100;
/// How long a host that could not be reached is left aside. Long enough that a start of a container does not wait for
/// it at every read, short enough that a mirror that was restarted is used by the next one.
const ASIDE: Duration = Duration::from_secs(30);

/// How long a host that does not serve parts of blobs is asked for whole ones only.
const WHOLE_ONLY_FOR: Duration = Duration::from_secs(600);

/// One host.
#[derive(Debug)]
pub(crate) struct Endpoint {
    /// The registry's own name, or the host and port of a mirror.
    pub(crate) name: String,
    /// The root of its API, without a slash at the end of the path.
    pub(crate) address: Address,
    /// The registry whose content is requested, if the host is a mirror.
    pub(crate) namespace: Option<String>,
    pub(crate) capabilities: Capabilities,
    /// For which repositories it is, if not for all.
    pub(crate) repositories: Option<Repositories>,
    pub(crate) transport: Transport,
    pub(crate) authorizer: Authorizer,
    redirect_life: Duration,
    state: Mutex<EndpointState>,
}

#[derive(Debug, Default)]
struct EndpointState {
    warned: HashSet<String>,
    targets: HashMap<(String, Digest), Target>,
    aside_until: Option<Instant>,
    /// Where an answer came from: the host, its token service, its storage.
    reached: HashSet<String>,
    /// When it was last seen to serve no parts of blobs.
    whole_only: Option<Instant>,
    /// Whether it has served the last part of a blob that it was asked for.
    serves_parts: bool,
    /// When it last refused something.
    refused: HashMap<(String, Need), Instant>,
    /// When a failure was last worth a warning.
    complained: Option<Instant>,
}

/// Where a blob really is, for a while.
#[derive(Debug, Clone)]
struct Target {
    url: Url,
    until: Instant,
}

impl Endpoint {
    /// All hosts of the registry `name`, in the order in which they are asked. `own` is where the registry itself is,
    /// but for its rules. The error is a reason in words.
    pub(crate) fn all(name: &str, own: &Host, hosts: Hosts, options: &ClientOptions) -> Result<Vec<Self>, String> {
        let last = match hosts.server {
            Some(url) => Host { url, plain: None, rules: hosts.rules },
            None => Host { rules: hosts.rules, ..own.clone() },
        };
        let all = hosts.before.into_iter().chain([last]);
        all.map(|host| Self::new(name, &own.url, host, options)).collect()
    }

    fn new(registry: &str, own: &Url, host: Host, options: &ClientOptions) -> Result<Self, String> {
        let Host { url: base, plain, mut rules } = host;
        // With a host that something is said of about TLS, TLS is spoken.
        let plain = plain.filter(|_| !options.has_tls() && !rules.has_tls());
        let address = Address::new(base.clone(), plain);
        let repositories = rules.repositories.take();
        let is_own = (base.host(), base.port()) == (own.host(), own.port());
        let name = if is_own { registry.to_owned() } else { authority(&base) };
        let capabilities = rules.capabilities;
        let transport = transport(&base, rules, is_own, options).map_err(|reason| match is_own {
            true => reason,
            false => format!("its host {name}: {reason}"),
        })?;
        let credentials = if is_own { options.credentials.clone() } else { without_password(&options.credentials) };
        Ok(Self {
            authorizer: Authorizer::new(&name, address.clone(), credentials),
            // Where repositories have other names, the registry's own name says nothing.
            namespace: (!is_own && repositories.is_none()).then(|| registry.to_owned()),
            repositories,
            redirect_life: options.redirect_life,
            state: Mutex::default(),
            capabilities,
            transport,
            name,
            address,
        })
    }

    fn base(&self) -> &Url {
        self.address.base()
    }

    /// The URL of `rest` below `repository`. Tags, digests and names hold nothing that needs escaping in a path.
    pub(crate) fn url(&self, repository: &str, rest: &str) -> Url {
        let mut url = self.base().clone();
        url.set_path(&format!("{}/{repository}/{rest}", self.base().path().trim_end_matches('/')));
        self.named(url)
    }

    /// The root of the API, which answers everybody with a login.
    pub(crate) fn root(&self) -> Url {
        let mut url = self.base().clone();
        url.set_path(&format!("{}/", self.base().path().trim_end_matches('/')));
        url
    }

    /// Adds whose content is wanted to a URL of this host, unless it says so.
    pub(crate) fn named(&self, mut url: Url) -> Url {
        if let Some(namespace) = &self.namespace
            && !url.query_pairs().any(|(key, _)| key == "ns")
        {
            url.query_pairs_mut().append_pair("ns", namespace);
        }
        url
    }

    /// Whether a URL is on this host.
    pub(crate) fn is_home(&self, url: &Url) -> bool {
        redirect::same_origin(self.base(), url)
    }

    /// Leaves the host aside if this is how hosts fail that are not there.
    pub(crate) fn note_failure(&self, error: &TransportError) {
        if matches!(error.kind, TransportKind::Connect | TransportKind::Tls | TransportKind::Timeout) {
            self.address.forget_plain();
            self.state.lock().aside_until = Some(Instant::now() + ASIDE);
        }
    }

    /// Records that the host answers.
    pub(crate) fn is_back(&self) {
        self.state.lock().aside_until = None;
    }

    /// Records that an answer came from the origin of a URL, here or where this host sends its clients.
    pub(crate) fn note_reached(&self, url: &Url) {
        let origin = ShownUrl::new(url);
        let reached = &mut self.state.lock().reached;
        if reached.len() < REACHED_MAX && !reached.contains(origin.origin()) {
            reached.insert(origin.origin().to_owned());
        }
    }

    /// Whether an answer ever came from there.
    pub(crate) fn was_reached(&self, url: &ShownUrl) -> bool {
        self.state.lock().reached.contains(url.origin())
    }

    /// Records that the host serves no parts of blobs, and says so once in a while.
    pub(crate) fn note_whole_only(&self, why: impl Display) {
        let known = self.state.lock().whole_only.replace(Instant::now());
        if known.is_none_or(|since| since.elapsed() >= WHOLE_ONLY_FOR) {
            tracing::warn!(host = self.name, "serves no parts of blobs: layers are fetched from it as a whole ({why})");
        }
    }

    /// Notes whether a part of a blob came that was asked for.
    pub(crate) fn note_part(&self, came: bool) {
        self.state.lock().serves_parts = came;
    }

    pub(crate) fn serves_parts(&self) -> bool {
        self.state.lock().serves_parts
    }

    /// Whether it was lately seen to serve no parts of blobs.
    pub(crate) fn serves_whole_only(&self) -> bool {
        self.state.lock().whole_only.is_some_and(|since| since.elapsed() < WHOLE_ONLY_FOR)
    }

    /// Records that the host denied access to a repository.
    pub(crate) fn refuses(&self, repository: &str, need: Need) {
        let refused = &mut self.state.lock().refused;
        let need = need.refused();
        refused.retain(|_, since| since.elapsed() < ASIDE);
        if refused.len() < REFUSALS_MAX {
            refused.insert((repository.to_owned(), need), Instant::now());
        }
    }

    /// Whether another host should be asked.
    pub(crate) fn is_aside(&self, repository: &str, need: Need) -> bool {
        let state = self.state.lock();
        let refused =
            || state.refused.get(&(repository.to_owned(), need.refused())).is_some_and(|since| since.elapsed() < ASIDE);
        state.aside_until.is_some_and(|until| Instant::now() < until) || refused()
    }

    /// Whether a failure should be shown: not each of many in a row.
    pub(crate) fn may_complain(&self) -> bool {
        let mut state = self.state.lock();
        let quiet = state.complained.is_some_and(|last| last.elapsed() < ASIDE);
        if !quiet {
            state.complained = Some(Instant::now());
        }
        !quiet
    }

    /// Passes a `Warning` of the host on, once.
    pub(crate) fn note_warnings(&self, response: &Response) {
        for text in response.headers("warning").filter_map(headers::warning_text) {
            let mut state = self.state.lock();
            if state.warned.len() < WARNINGS_MAX && state.warned.insert(text.clone()) {
                tracing::warn!(registry = self.name, warning = text, "the registry warns");
            }
        }
    }

    /// Where a blob was last redirected to, if that is still good.
    pub(crate) fn target(&self, repository: &str, digest: &Digest) -> Option<Url> {
        let state = self.state.lock();
        let target = state.targets.get(&(repository.to_owned(), *digest))?;
        (Instant::now() < target.until).then(|| target.url.clone())
    }

    pub(crate) fn set_target(&self, repository: &str, digest: &Digest, url: Option<Url>) {
        let targets = &mut self.state.lock().targets;
        let key = (repository.to_owned(), *digest);
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
        targets.insert(key, Target { url, until: Instant::now() + self.redirect_life });
    }
}

/// Host and port of a URL, as people write them.
fn authority(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

fn transport(base: &Url, rules: HostRules, is_own: bool, options: &ClientOptions) -> Result<Transport, String> {
    let mut certificates = rules.client_certificates.into_iter();
    // What the user named for the registry goes before what was written down for everybody.
    let given = options.client_certificate.clone().filter(|_| is_own);
    let certificate = given.or_else(|| certificates.next());
    if certificates.len() > 0 {
        let host = authority(base);
        tracing::warn!(host, unused = certificates.len(), "a host has several client certificates; the first is used");
    }
    let (head, stall) = rules.silence.map_or((options.head, options.stall), |silence| (silence, silence));
    Transport::new(&Setup {
        ca_files: options.ca_file.iter().cloned().chain(rules.ca_files).collect(),
        loopback: redirect::is_loopback(base),
        connect: rules.dial_timeout.unwrap_or(options.connect),
        head,
        stall,
        home: Home {
            certificate,
            skip_verify: rules.skip_verify || (is_own && options.skip_verify),
            headers: rules.headers,
        },
    })
}

/// Where a mirror's logins may come from. A password that the user gave was meant for the registry.
fn without_password(source: &CredentialSource) -> CredentialSource {
    match source {
        CredentialSource::Password { .. } | CredentialSource::IdentityToken(_) => CredentialSource::Anonymous,
        CredentialSource::Chain(sources) => CredentialSource::Chain(sources.iter().map(without_password).collect()),
        CredentialSource::DockerConfig
        | CredentialSource::File(_)
        | CredentialSource::Keychain(_)
        | CredentialSource::Anonymous => source.clone(),
    }
}
