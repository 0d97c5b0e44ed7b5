//! Which host of a registry is asked, and when the next one is.
//!
//! A [`HostedRepository`] is a repository on one host; everything that speaks the protocol speaks to one. Reading
//! walks the hosts that may be asked, in their order. On any failure of a host that is not the last one, the next one
//! is asked at once: retries and long timeouts are for the last. Pushing does not walk: what was pushed must be on one
//! host.
//!
//! A host that could not be reached, or that refused us, is left aside for a while. It is then asked only when the last
//! host has failed, too, once: in a network that has nothing but the mirror, the mirror must not be given up for a
//! connection that broke. Likewise a host that serves whole blobs only, where a part is wanted.
//!
//! Invariants: an absent manifest is absent on the last host, whatever others say; a mirror without a capability is
//! never asked for it; the last host is always asked; the deadline of an operation is one for all hosts.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use url::Url;

use crate::registry::endpoint::Endpoint;
use crate::registry::error::RegistryError;
use crate::registry::need::Need;
use crate::registry::request_headers::RequestHeaders;
use crate::registry::retry::{Backoff, Deadline, RetryPolicy};
use crate::registry::{ClientOptions, Repository};

/// A repository on one host: where it is, what it is called there, and how long to wait for it. What may be done with it
/// is what the parts of the protocol do through its one `call` (see `exchange`).
#[derive(Debug, Clone)]
pub(crate) struct HostedRepository {
    repository: Repository,
    endpoint: Arc<Endpoint>,
    /// What the repository is called there.
    name: Arc<str>,
    need: Need,
    is_last: bool,
    /// Whether it is worth waiting for, because no host follows it.
    is_final: bool,
}

impl HostedRepository {
    /// The host, for messages.
    pub(crate) fn host(&self) -> &str {
        &self.endpoint.name
    }

    /// The repository's name on this host.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The host and the repository, as errors say where they come from.
    pub(crate) fn names(&self) -> (String, String) {
        (self.host().to_owned(), self.name().to_owned())
    }

    /// Another repository's name on this host.
    pub(crate) fn name_of(&self, other: &str) -> String {
        name_on(&self.endpoint, other)
    }

    pub(crate) fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    pub(crate) fn options(&self) -> &ClientOptions {
        self.repository.registry().options()
    }

    /// What the client wants to be sent with all requests.
    pub(crate) fn headers(&self) -> &RequestHeaders {
        self.repository.headers()
    }

    /// Whether it is the authoritative host.
    pub(crate) fn is_last(&self) -> bool {
        self.is_last
    }

    /// Whether this error ends the failover.
    pub(crate) fn decides(&self, error: &RegistryError) -> bool {
        match error {
            RegistryError::Deadline { .. } => true,
            RegistryError::Missing { .. } => self.is_last,
            _ => self.is_final,
        }
    }

    /// The retry policy: a single attempt if another host follows.
    pub(crate) fn retry_policy(&self) -> RetryPolicy {
        let options = self.options();
        let retries_max = if self.is_final { options.backoff.retries_max } else { 0 };
        RetryPolicy { backoff: Backoff { retries_max, ..options.backoff }, is_interactive: options.is_interactive }
    }

    /// The longest silence to wait for: half of the time left if another host follows.
    pub(crate) fn silence_max(&self, deadline: &Deadline) -> Option<Duration> {
        (!self.is_final).then(|| deadline.left() / 2)
    }

    pub(crate) fn url(&self, rest: &str) -> Url {
        self.endpoint.url(self.name(), rest)
    }

    pub(crate) fn deadline(&self, bytes: u64) -> Deadline {
        self.repository.deadline(bytes)
    }

    /// Whether it is on the same host as another one.
    pub(crate) fn is_on_host_of(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.endpoint, &other.endpoint)
    }

    /// Writes down why the next host is asked. What a mirror lacks is no news; a failure is, though not every time.
    pub(crate) fn given_up(&self, error: &RegistryError) {
        use RegistryError::{Credentials, Realm, Token, Unauthorized};
        // To be refused costs a look for credentials, which may be a program to run, before every read.
        if matches!(error, Credentials { .. } | Realm { .. } | Token { .. } | Unauthorized { .. }) {
            self.endpoint.refuses(self.name(), self.need);
        }
        let (host, repository) = (self.host(), self.name());
        match error {
            RegistryError::Missing { .. } => tracing::debug!(host, repository, %error, "trying the next host"),
            _ if self.endpoint.may_complain() => tracing::warn!(host, repository, %error, "trying the next host"),
            _ => tracing::debug!(host, repository, %error, "trying the next host"),
        }
    }
}

impl Repository {
    /// The hosts to ask for something, in this order; at least one.
    pub(crate) fn hosts(&self, need: Need) -> Result<Vec<HostedRepository>, RegistryError> {
        let mut hosts: Vec<HostedRepository> = self.able(need)?.collect();
        let last = hosts.pop().ok_or_else(|| self.no_host(need))?;
        let last = HostedRepository { is_last: true, ..last };
        let is_aside = |hosted: &HostedRepository| {
            hosted.endpoint.is_aside(hosted.name(), need) || need == Need::Part && hosted.endpoint.serves_whole_only()
        };
        let (aside, mut hosts): (Vec<HostedRepository>, Vec<HostedRepository>) = hosts.into_iter().partition(is_aside);
        if !aside.is_empty() && !is_aside(&last) {
            hosts.push(last.clone());
        }
        hosts.extend(aside);
        hosts.push(HostedRepository { is_final: true, ..last });
        Ok(hosts)
    }

    /// The one host that takes what is pushed.
    pub(crate) fn push_host(&self) -> Result<HostedRepository, RegistryError> {
        let first = self.able(Need::Push)?.next().ok_or_else(|| self.no_host(Need::Push))?;
        Ok(HostedRepository { is_last: true, is_final: true, ..first })
    }

    /// The hosts that have a capability.
    fn able(&self, need: Need) -> Result<impl Iterator<Item = HostedRepository>, RegistryError> {
        if let Some(blocked) = self.blocked() {
            let (name, file) = (self.name(), blocked.file.display());
            let reason = format!("{file} blocks {name}: take the ban out of it, or use another registry");
            return Err(RegistryError::Setup { registry: self.registry().name().to_owned(), reason });
        }
        let able = self.registry().endpoints().iter().filter(move |endpoint| {
            let is_here = endpoint.repositories.as_ref().is_none_or(|some| some.contains(self.name()));
            is_here && need.is_met(endpoint.capabilities)
        });
        Ok(able.map(move |endpoint| HostedRepository {
            repository: self.clone(),
            endpoint: Arc::clone(endpoint),
            name: name_on(endpoint, self.name()).into(),
            need,
            is_last: false,
            is_final: false,
        }))
    }

    fn no_host(&self, need: Need) -> RegistryError {
        let reason = format!("none of its hosts has the capability {}", need.text());
        RegistryError::Setup { registry: self.registry().name().to_owned(), reason }
    }

    /// Asks one host after the other until one has something. The last one's word is final.
    pub(crate) async fn first<T, F>(
        &self,
        need: Need,
        ask: impl Fn(HostedRepository) -> F,
    ) -> Result<Option<T>, RegistryError>
    where
        F: Future<Output = Result<Option<T>, RegistryError>>,
    {
        for hosted in self.hosts(need)? {
            let error = match ask(hosted.clone()).await {
                Err(error) if !hosted.decides(&error) => error,
                Ok(None) if !hosted.is_last => {
                    tracing::debug!(host = hosted.host(), repository = self.name(), ?need, "not here");
                    continue;
                }
                decided => return decided,
            };
            hosted.given_up(&error);
        }
        Ok(None)
    }
}

/// What a repository is called on a host.
fn name_on(endpoint: &Endpoint, name: &str) -> String {
    let renaming = endpoint.repositories.as_ref().filter(|some| some.contains(name));
    renaming.map_or_else(|| name.to_owned(), |some| some.rename(name))
}
