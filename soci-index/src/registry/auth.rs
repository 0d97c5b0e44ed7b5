//! Chooses credentials for a request and learns from 401 and 403 responses.
//!
//! A registry is first asked with what is known: nothing at the beginning, a cached token later. Its 401 names a
//! scheme, which is remembered; Bearer wins over Basic. Harbor answers `Basic` to a token that lacks rights: a known
//! Bearer realm is then kept and a wider scope asked for. Nothing is remembered for ever: tokens end before the server
//! says so, and a refusal drops token and credentials, because both may have been renewed outside. Of several
//! credentials for a repository the next is tried then; only when all were refused does it begin again with the first.
//!
//! Invariants: a token is used only for the set of scopes that it was asked for; there is at most one token request in
//! flight per set, and one search for credentials per repository; a password goes to the registry's own origin and to a
//! realm that [`redirect::realm`] allows.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;
use url::Url;

use crate::registry::address::Address;
use crate::registry::challenge::Challenge;
use crate::registry::credentials::{self, CredentialSource, Credentials, Login};
use crate::registry::error::RegistryError;
use crate::registry::redirect;
use crate::registry::retry::{Deadline, RetryPolicy};
use crate::registry::scopes::Scopes;
use crate::registry::token::{Token, TokenRequest, basic};
use crate::registry::transport::Transport;

/// Sets of scopes with a token kept at a time. A client of one registry meets a handful of repositories; a client that
/// uses more pays with a token request.
const TOKENS_MAX: usize = 256;

/// Credentials that one request tries. The next request goes on with those that are left.
pub(crate) const TRIED_MAX: usize = 16;
/// Refused credentials that are remembered for a repository. With more, it begins again with the first.
const REFUSED_MAX: usize = 1024;

/// What is known of the registry.
#[derive(Debug, Clone)]
enum Scheme {
    Unknown,
    Basic,
    Bearer { realm: Url, service: Option<String> },
}

#[derive(Debug)]
struct AuthState {
    scheme: Scheme,
    logins: Logins,
    /// Serialises credential lookups, per repository.
    searches: HashMap<String, Arc<tokio::sync::Mutex<()>>>,
    tokens: HashMap<Scopes, Arc<Slot>>,
    /// Scopes that turned out to need more than we asked for.
    wider: HashMap<Scopes, Scopes>,
}

/// Credentials that were found.
#[derive(Debug, Default)]
struct Logins {
    registry: Option<Login>,
    repositories: HashMap<String, Login>,
    /// Credentials that are retried only after all others.
    refused: HashMap<String, Vec<Credentials>>,
}

impl Logins {
    fn for_repository(&self, repository: &str) -> Option<&Credentials> {
        let is_refused =
            |login: &&Login| self.refused.get(repository).is_some_and(|refused| refused.contains(&login.credentials));
        let whole = || self.registry.as_ref().filter(|login| !is_refused(login));
        let known = self.repositories.get(repository).or_else(whole)?;
        known.until.is_none_or(|until| Instant::now() < until).then_some(&known.credentials)
    }

    fn keep(&mut self, repository: &str, login: Login) {
        if login.whole_registry {
            self.repositories.remove(repository);
            self.registry = Some(login);
            return;
        }
        if self.repositories.len() >= TOKENS_MAX {
            self.repositories.clear();
        }
        self.repositories.insert(repository.to_owned(), login);
    }

    fn forget(&mut self, repository: &str) {
        self.registry = None;
        self.repositories.remove(repository);
    }

    fn refuse(&mut self, repository: &str, credentials: &Credentials) {
        if self.refused.len() >= TOKENS_MAX && !self.refused.contains_key(repository) {
            self.refused.clear();
        }
        let refused = self.refused.entry(repository.to_owned()).or_default();
        if refused.len() >= REFUSED_MAX {
            refused.clear();
        }
        if !refused.contains(credentials) {
            refused.push(credentials.clone());
        }
        // What another request has found meanwhile is not dropped.
        if self.for_repository(repository).is_none_or(|known| known == credentials) {
            self.forget(repository);
        }
    }
}

/// Where the token for one set of scopes is kept. The lock is held while it is fetched, so others wait for the result.
type Slot = tokio::sync::Mutex<Fetched>;

#[derive(Debug, Default)]
struct Fetched {
    /// And by which credentials it was got.
    token: Option<(Token, Credentials)>,
    failure: Option<(Instant, RegistryError)>,
}

/// What was attached to a request.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Grant {
    header: String,
    scopes: Scopes,
    /// Whose it is.
    by: Credentials,
}

impl Grant {
    /// The value of the `Authorization` header.
    pub(crate) fn header(&self) -> &str {
        &self.header
    }

    /// Whether it was given by a token service.
    pub(crate) fn is_token(&self) -> bool {
        self.header.starts_with("Bearer ")
    }

    /// The credentials that it came from.
    pub(crate) fn by(&self) -> &Credentials {
        &self.by
    }
}

/// The request that needs authorisation, and its retry policy.
pub(crate) struct AuthContext<'a> {
    pub(crate) transport: &'a Transport,
    pub(crate) repository: &'a str,
    pub(crate) scopes: &'a Scopes,
    pub(crate) deadline: &'a Deadline,
    pub(crate) retry_policy: RetryPolicy,
    /// See [`crate::registry::transport::Request::silence_max`].
    pub(crate) silence_max: Option<Duration>,
}

/// The token service, and what is requested of it.
struct TokenEndpoint<'a> {
    context: &'a AuthContext<'a>,
    realm: &'a Url,
    service: Option<String>,
    scopes: &'a Scopes,
}

/// The credentials of one host.
#[derive(Debug)]
pub(crate) struct Authorizer {
    registry: String,
    address: Address,
    source: CredentialSource,
    state: Mutex<AuthState>,
}

impl Authorizer {
    pub(crate) fn new(registry: &str, address: Address, source: CredentialSource) -> Self {
        let state = AuthState {
            scheme: Scheme::Unknown,
            logins: Logins::default(),
            searches: HashMap::new(),
            tokens: HashMap::new(),
            wider: HashMap::new(),
        };
        Self { registry: registry.to_owned(), address, source, state: Mutex::new(state) }
    }

    /// The token service, if the registry has named one.
    pub(crate) fn realm(&self) -> Option<Url> {
        match &self.state.lock().scheme {
            Scheme::Bearer { realm, .. } => Some(realm.clone()),
            Scheme::Unknown | Scheme::Basic => None,
        }
    }

    /// What to attach to a request; `None` while the registry has not asked for anything.
    pub(crate) async fn grant(&self, context: &AuthContext<'_>) -> Result<Option<Grant>, RegistryError> {
        let (scheme, scopes) = {
            let state = self.state.lock();
            (state.scheme.clone(), state.wider.get(context.scopes).unwrap_or(context.scopes).clone())
        };
        let (header, by) = match scheme {
            Scheme::Unknown => return Ok(None),
            Scheme::Basic => {
                let credentials = self.credentials(context).await?;
                let header = match &credentials {
                    Credentials::Password { user, password } => basic(user, password.expose()),
                    Credentials::IdentityToken(token) => basic("", token.expose()),
                    Credentials::Anonymous => return Ok(None),
                };
                (header, credentials)
            }
            Scheme::Bearer { realm, service } => {
                let asked = TokenEndpoint { context, realm: &realm, service, scopes: &scopes };
                let (token, by) = self.token(&asked).await?;
                (format!("Bearer {token}"), by)
            }
        };
        Ok(Some(Grant { header, scopes, by }))
    }

    /// Learns from a 401. Says whether asking again with a new [`Authorizer::grant`] may help.
    pub(crate) fn refused(
        &self,
        scopes: &Scopes,
        used: Option<&Grant>,
        challenges: &[Challenge],
    ) -> Result<bool, RegistryError> {
        let bearer = challenges.iter().find(|challenge| challenge.scheme == "bearer");
        let basic = challenges.iter().any(|challenge| challenge.scheme == "basic");
        let realm = bearer.and_then(|challenge| challenge.parameter("realm"));
        if let (Some(challenge), Some(realm)) = (bearer, realm) {
            let realm = redirect::realm(self.address.base(), realm).map_err(|reason| RegistryError::Realm {
                registry: self.registry.clone(),
                realm: realm.split('?').next().unwrap_or_default().chars().take(200).collect(),
                reason,
            })?;
            let service = challenge.parameter("service").map(str::to_owned);
            let mut state = self.state.lock();
            state.scheme = Scheme::Bearer { realm, service };
            let mut wanted = state.wider.get(scopes).unwrap_or(scopes).clone();
            wanted.widen(challenge.parameter("scope").unwrap_or_default());
            if wanted != *scopes {
                state.wider.insert(scopes.clone(), wanted);
            }
            return Ok(true);
        }
        let mut state = self.state.lock();
        match state.scheme {
            // Harbor: the token lacks rights. Ask for everything that the same repositories may need.
            Scheme::Bearer { .. } if basic => {
                let mut wanted = scopes.clone();
                wanted.allow_push();
                state.wider.insert(scopes.clone(), wanted);
                Ok(true)
            }
            _ if basic => {
                state.scheme = Scheme::Basic;
                Ok(true)
            }
            // No challenge that we understand: only a credential that was refused can be renewed.
            _ => Ok(used.is_some()),
        }
    }

    /// Ends the tries of a request: the next one looks for credentials anew, and where it had come to none it begins
    /// again.
    pub(crate) fn give_up(&self, repository: &str, used: Option<&Grant>) {
        let mut state = self.state.lock();
        if used.is_none() {
            state.logins.refuse(repository, &Credentials::Anonymous);
        }
        state.logins.forget(repository);
    }

    /// Drops the refused credential, unless it was renewed concurrently.
    pub(crate) async fn forget(&self, repository: &str, used: &Grant) {
        self.state.lock().logins.refuse(repository, &used.by);
        let slot = self.state.lock().tokens.get(&used.scopes).cloned();
        let Some(slot) = slot else { return };
        let mut fetched = slot.lock().await;
        if fetched.token.as_ref().is_some_and(|(token, _)| used.header.strip_prefix("Bearer ") == Some(token.text())) {
            fetched.token = None;
        }
    }

    /// How to speak of the credentials in use: those that are known, else those that were refused before, also to
    /// another request, else what the user has named.
    pub(crate) fn describe(&self, repository: &str) -> &'static str {
        let is_login = |known: &&Credentials| **known != Credentials::Anonymous;
        let state = self.state.lock();
        let known = state.logins.for_repository(repository).filter(is_login);
        let refused = || state.logins.refused.get(repository).and_then(|refused| refused.iter().find(is_login));
        known.or_else(refused).map_or_else(|| self.source.describe(), Credentials::describe)
    }

    /// A token, and by which credentials it was got.
    async fn token(&self, asked: &TokenEndpoint<'_>) -> Result<(String, Credentials), RegistryError> {
        let since = Instant::now();
        let slot = self.slot(asked.scopes);
        let mut fetched = slot.lock().await;
        if let Some((token, by)) = fetched.token.as_ref().filter(|(token, _)| token.is_fresh()) {
            return Ok((token.text().to_owned(), by.clone()));
        }
        // All waiters of a failed attempt share its error.
        if let Some((_, error)) = fetched.failure.as_ref().filter(|(when, _)| *when > since) {
            return Err(error.clone());
        }
        match self.fetch_token(asked).await {
            Ok((token, by)) => {
                let text = token.text().to_owned();
                *fetched = Fetched { token: Some((token, by.clone())), failure: None };
                Ok((text, by))
            }
            Err(error) => {
                *fetched = Fetched { token: None, failure: Some((Instant::now(), error.clone())) };
                self.state.lock().logins.forget(asked.context.repository);
                Err(error)
            }
        }
    }

    /// Asks the token service. Credentials that it refuses are looked up once more: they may have changed, or there may
    /// be others.
    async fn fetch_token(&self, asked: &TokenEndpoint<'_>) -> Result<(Token, Credentials), RegistryError> {
        let (mut tried, mut first) = (Vec::new(), None);
        loop {
            let credentials = self.credentials(asked.context).await?;
            if let Some(error) = first.take_if(|_| tried.contains(&credentials) || tried.len() >= TRIED_MAX) {
                return Err(error);
            }
            let answer = self.request_token(asked, &credentials).await;
            if !matches!(answer, Err(RegistryError::Token { status: Some(401 | 403), .. })) {
                return answer.map(|token| (token, credentials));
            }
            self.state.lock().logins.refuse(asked.context.repository, &credentials);
            tried.push(credentials);
            first = first.or(answer.err());
        }
    }

    async fn request_token(
        &self,
        asked: &TokenEndpoint<'_>,
        credentials: &Credentials,
    ) -> Result<Token, RegistryError> {
        let TokenEndpoint { context, realm, service, scopes } = asked;
        let request = TokenRequest {
            registry: &self.registry,
            realm,
            service: service.clone(),
            scopes,
            credentials,
            home: redirect::same_origin(self.address.base(), realm),
            silence_max: context.silence_max,
        };
        request.send(context.transport, context.retry_policy, context.deadline).await
    }

    fn slot(&self, scopes: &Scopes) -> Arc<Slot> {
        let mut state = self.state.lock();
        if state.tokens.len() >= TOKENS_MAX && !state.tokens.contains_key(scopes) {
            state.tokens.clear();
            state.wider.clear();
        }
        Arc::clone(state.tokens.entry(scopes.clone()).or_default())
    }

    /// The credentials for a repository, looked up by one at a time: a program or a plugin may be slow or dear.
    pub(crate) async fn credentials(&self, context: &AuthContext<'_>) -> Result<Credentials, RegistryError> {
        let AuthContext { repository, deadline, .. } = *context;
        let search = {
            let mut state = self.state.lock();
            if let Some(known) = state.logins.for_repository(repository) {
                return Ok(known.clone());
            }
            if state.searches.len() >= TOKENS_MAX {
                state.searches.clear();
            }
            Arc::clone(state.searches.entry(repository.to_owned()).or_default())
        };
        let found = async {
            let _searching = search.lock().await;
            if let Some(known) = self.state.lock().logins.for_repository(repository) {
                return Ok(known.clone());
            }
            let refused = self.state.lock().logins.refused.get(repository).cloned().unwrap_or_default();
            let found = credentials::find(&self.registry, repository, &self.source, &refused).await?;
            let credentials = found.login.credentials.clone();
            let mut state = self.state.lock();
            if found.is_refused {
                state.logins.refused.remove(repository);
            }
            state.logins.keep(repository, found.login);
            Ok(credentials)
        };
        let limit =
            context.silence_max.map_or(deadline.at(), |silence_max| deadline.at().min(Instant::now() + silence_max));
        let found = tokio::time::timeout_at(limit, found).await;
        let found = found.unwrap_or_else(|_| Err("the credential source did not answer in time".to_owned()));
        found.map_err(|reason| RegistryError::Credentials { registry: self.registry.clone(), reason })
    }
}
