//! One call to a registry, carried through: authorization, redirects and retries around the bare transport.
//!
//! The rules that keep credentials on their own host meet here. Invariants: `Authorization` is attached only while
//! every hop so far was on the registry's own origin; every credential that is known is tried once per call, and
//! renewed once; a body is sent again only if it can be opened again; the call ends at its deadline.

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use url::Url;

use crate::registry::address;
use crate::registry::auth::{AuthContext, Grant, TRIED_MAX};
use crate::registry::challenge;
use crate::registry::credentials::Credentials;
use crate::registry::error::{LoginVerdict, RegistryError, TransportError, TransportKind};
use crate::registry::failover::HostedRepository;
use crate::registry::headers;
use crate::registry::redirect::{self, ShownUrl};
use crate::registry::retry::{self, Deadline};
use crate::registry::scopes::Scopes;
use crate::registry::transport::{Body, BodyError, Method, Request, Response};

/// Redirects followed in a row; storage needs one or two.
const REDIRECTS_MAX: usize = 5;
/// Bytes of an error body that are looked at.
const ERROR_BYTES_MAX: u64 = 64 << 10;
/// How long to wait for an error body: the status is known, the rest is optional detail.
const ERROR_WAIT: Duration = Duration::from_secs(1);

/// How long to wait for the answer whether a login is good: it only makes an error better.
const LOGIN_WAIT: Duration = Duration::from_secs(2);

/// What to ask.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    pub(crate) method: Method,
    pub(crate) url: Url,
    pub(crate) headers: Vec<(&'static str, String)>,
    pub(crate) body: Body,
    pub(crate) scopes: Scopes,
    /// For messages: what is being done.
    pub(crate) what: String,
}

impl Call {
    /// One without a body and without headers of its own.
    pub(crate) fn new(method: Method, url: Url, scopes: Scopes, what: impl Into<String>) -> Self {
        Self { method, url, headers: Vec::new(), body: Body::Empty, scopes, what: what.into() }
    }

    pub(crate) fn with_header(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    pub(crate) fn with_body(self, body: Body) -> Self {
        Self { body, ..self }
    }
}

/// What came back.
pub(crate) struct ApiResponse<'a> {
    pub(crate) response: Response,
    /// The URL that answered, after redirects.
    pub(crate) url: Url,
    asked: Attempt<'a>,
}

impl ApiResponse<'_> {
    pub(crate) fn status(&self) -> u16 {
        self.response.status()
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.response.header(name)
    }

    /// How long the server asks us to wait.
    pub(crate) fn asked_pause(&self) -> Option<Duration> {
        retry::retry_after(self.header("retry-after")?, SystemTime::now())
    }

    /// The error if the status was unexpected.
    pub(crate) async fn error(self) -> RegistryError {
        let (status, what) = (self.status(), self.asked.call.what.clone());
        let (registry, repository) = self.asked.hosted.names();
        let (code, message) = error_text(self.response).await;
        RegistryError::Status { registry, repository, what, status, code: code.map(String::into_boxed_str), message }
    }

    /// Reads a whole document, of the size of a manifest at most.
    pub(crate) async fn document(self) -> Result<Bytes, RegistryError> {
        let Attempt { hosted, call, deadline } = self.asked;
        let limit = hosted.options().limits.manifest_bytes_max;
        self.response.bytes(limit, deadline).await.map_err(|error| match error {
            BodyError::Transport(error) => hosted.transport_error(&call.what, error, deadline),
            BodyError::TooLarge => {
                let (registry, repository) = hosted.names();
                RegistryError::TooLarge { registry, repository, what: call.what.clone(), limit }
            }
        })
    }
}

/// Whether a status says "later".
pub(crate) fn is_busy(status: u16) -> bool {
    matches!(status, 408 | 429 | 500 | 502 | 503 | 504)
}

impl HostedRepository {
    /// Makes a call and repeats it while the registry is busy or unreachable. Any other status is the caller's to
    /// judge.
    pub(crate) async fn call<'a>(
        &'a self,
        call: &'a Call,
        deadline: &'a Deadline,
    ) -> Result<ApiResponse<'a>, RegistryError> {
        let mut retries = Retries::new(self, &call.what, deadline);
        loop {
            // On the heap: the futures of all callers would hold this one, which is large and deep.
            let (error, pause) = match Box::pin(self.attempt(call, deadline)).await {
                Ok(answer) if !is_busy(answer.status()) => return Ok(answer),
                Ok(answer) => {
                    let pause = answer.asked_pause();
                    (answer.error().await, pause)
                }
                Err(error) if error.is_transient() => (error, None),
                Err(error) => return Err(error),
            };
            retries.after(error, pause).await?;
        }
    }

    /// One attempt: follows redirects, renews credentials.
    pub(crate) async fn attempt<'a>(
        &'a self,
        call: &'a Call,
        deadline: &'a Deadline,
    ) -> Result<ApiResponse<'a>, RegistryError> {
        Attempt { hosted: self, call, deadline }.run().await
    }

    /// A transport error, or the deadline's if that is what ended the attempt.
    pub(crate) fn transport_error(&self, what: &str, error: TransportError, deadline: &Deadline) -> RegistryError {
        let error = RegistryError::Transport { registry: self.host().to_owned(), attempts: 1, error };
        if deadline.is_over() { self.deadline_error(what, deadline, &error) } else { error }
    }

    fn deadline_error(&self, what: &str, deadline: &Deadline, last: &RegistryError) -> RegistryError {
        let ((registry, repository), what, allowed) = (self.names(), what.to_owned(), deadline.allowed());
        RegistryError::Deadline { registry, repository, what, allowed, last: Some(last.to_string()) }
    }

    /// The error if an answer is not what `what` should bring.
    pub(crate) fn malformed(&self, what: &str, reason: impl ToString) -> RegistryError {
        let (registry, repository) = self.names();
        RegistryError::Malformed { registry, repository, what: what.to_owned(), reason: reason.to_string() }
    }
}

/// The further attempts of one operation at a host.
pub(crate) struct Retries<'a> {
    hosted: &'a HostedRepository,
    /// What is done, for messages.
    what: &'a str,
    deadline: &'a Deadline,
    /// How many there were since the last progress.
    pub(crate) made: u32,
}

impl<'a> Retries<'a> {
    pub(crate) const fn new(hosted: &'a HostedRepository, what: &'a str, deadline: &'a Deadline) -> Self {
        Self { hosted, what, deadline, made: 0 }
    }

    /// Waits before another attempt, as long as the server `asked` or the backoff says, or fails with `error` when there
    /// must be none.
    pub(crate) async fn after(&mut self, error: RegistryError, asked: Option<Duration>) -> Result<(), RegistryError> {
        let retry_policy = self.hosted.retry_policy();
        let error = match error {
            RegistryError::Transport { registry, error, .. } => {
                RegistryError::Transport { registry, attempts: self.made + 1, error }
            }
            other => other,
        };
        let no_host = matches!(&error, RegistryError::Transport { error, .. }
            if error.kind == TransportKind::Connect && !self.hosted.endpoint().was_reached(&error.url));
        if self.made >= retry_policy.retries_max(no_host) {
            return Err(error);
        }
        let pause = asked.unwrap_or_else(|| retry_policy.backoff.wait(self.made, fastrand::f64()));
        retry_policy.report(pause, &error);
        if !self.deadline.pause(pause).await {
            return Err(self.hosted.deadline_error(self.what, self.deadline, &error));
        }
        self.made += 1;
        Ok(())
    }
}

/// One attempt of a call: the requests to which redirects and refusals lead.
#[derive(Clone, Copy)]
struct Attempt<'a> {
    hosted: &'a HostedRepository,
    call: &'a Call,
    deadline: &'a Deadline,
}

/// The authentication attempts of one request.
#[derive(Default)]
struct AuthAttempts {
    /// Retried because no credential had been sent.
    asked: bool,
    /// Asked again with credentials that had been refused.
    renewed: bool,
    /// What was refused, in order.
    refused: Vec<Credentials>,
    /// The credential that was sent last.
    used: Option<Grant>,
}

impl<'a> Attempt<'a> {
    async fn run(self) -> Result<ApiResponse<'a>, RegistryError> {
        let (mut method, mut body) = (self.call.method, self.call.body.clone());
        let endpoint = self.hosted.endpoint();
        let mut url = endpoint.address.settle(&self.call.url).await;
        let mut at_home = true;
        for _ in 0..=REDIRECTS_MAX {
            at_home &= endpoint.is_home(&url);
            let response = self.send_authorized(method, &url, &body, at_home).await?;
            let reading = matches!(method, Method::Get | Method::Head);
            match response.status() {
                307 | 308 => {}
                301 | 302 if reading => {}
                303 => (method, body) = (if method == Method::Head { method } else { Method::Get }, Body::Empty),
                _ => return Ok(ApiResponse { response, url, asked: self }),
            }
            let location = response.header("location").unwrap_or_default();
            if location.is_empty() {
                return Err(self.redirect_error(&url, "it names no location"));
            }
            url = redirect::target(&url, location).map_err(|reason| self.redirect_error(&url, &reason.to_string()))?;
        }
        Err(self.redirect_error(&url, "there were too many before it"))
    }

    /// One request to one server, repeated with renewed credentials if it asks for them.
    async fn send_authorized(
        self,
        method: Method,
        url: &Url,
        body: &Body,
        at_home: bool,
    ) -> Result<Response, RegistryError> {
        let Self { hosted, call, deadline } = self;
        let (endpoint, authorizer) = (hosted.endpoint(), &hosted.endpoint().authorizer);
        let mut tries = AuthAttempts::default();
        loop {
            let grant = if at_home { self.grant().await? } else { None };
            if grant.is_some() {
                tries.used.clone_from(&grant);
            }
            let authorization = grant.as_ref().map(Grant::header);
            let (headers, silence_max) = (&call.headers, hosted.silence_max(deadline));
            let more = Some(hosted.headers());
            let request = Request { method, url, headers, more, authorization, body, home: at_home, silence_max };
            let response = match endpoint.transport.send(&request, deadline).await {
                Ok(response) => response,
                Err(error) => {
                    // One that has answered speaks HTTP.
                    let answered = endpoint.was_reached(&error.url);
                    let error = if answered { error } else { address::explain(error, url).await };
                    if at_home && !deadline.is_over() {
                        endpoint.note_failure(&error);
                    }
                    return Err(hosted.transport_error(&call.what, error, deadline));
                }
            };
            if at_home {
                endpoint.is_back();
            }
            endpoint.note_reached(url);
            endpoint.note_warnings(&response);
            let status = response.status();
            if !at_home || !matches!(status, 401 | 403) {
                return Ok(response);
            }
            let goes_on = self.goes_on(grant.as_ref(), &mut tries).await?;
            if status == 401 {
                let challenges = challenge::parse(response.headers("www-authenticate"));
                let helps = authorizer.refused(&call.scopes, grant.as_ref(), &challenges)?;
                if !helps || !goes_on {
                    let credentials =
                        tries.refused.first().map_or_else(|| authorizer.describe(hosted.name()), Credentials::describe);
                    let login = self.login(tries.used.as_ref()).await;
                    let denied = self.denied(response, !challenges.is_empty(), credentials, login).await;
                    authorizer.give_up(hosted.name(), grant.as_ref());
                    return Err(denied);
                }
            } else if grant.is_none() || !goes_on {
                // 403 without a credential is a refusal; with one it may also mean "expired" (ECR), or "not yours".
                authorizer.give_up(hosted.name(), grant.as_ref());
                return Ok(response);
            }
        }
    }

    /// Whether to ask again after a refusal: once when no credential was sent, with each of the other credentials that
    /// are known, and once with renewed ones.
    async fn goes_on(self, used: Option<&Grant>, tries: &mut AuthAttempts) -> Result<bool, RegistryError> {
        let Some(used) = used else { return Ok(!std::mem::replace(&mut tries.asked, true)) };
        let authorizer = &self.hosted.endpoint().authorizer;
        authorizer.forget(self.hosted.name(), used).await;
        tries.refused.push(used.by().clone());
        let next = authorizer.credentials(&self.auth_context()).await?;
        let is_other = !tries.refused.contains(&next) && tries.refused.len() < TRIED_MAX;
        Ok(is_other || !std::mem::replace(&mut tries.renewed, true))
    }

    fn auth_context(self) -> AuthContext<'a> {
        let Self { hosted, call, deadline } = self;
        let (transport, repository, scopes) = (&hosted.endpoint().transport, hosted.name(), &call.scopes);
        let (retry_policy, silence_max) = (hosted.retry_policy(), hosted.silence_max(deadline));
        AuthContext { transport, repository, scopes, deadline, retry_policy, silence_max }
    }

    async fn grant(self) -> Result<Option<Grant>, RegistryError> {
        let endpoint = self.hosted.endpoint();
        let grant = endpoint.authorizer.grant(&self.auth_context()).await;
        if let (Ok(Some(_)), Some(realm)) = (&grant, endpoint.authorizer.realm()) {
            endpoint.note_reached(&realm);
        }
        // A host whose token service is unreachable counts as unreachable.
        if let Err(RegistryError::Transport { error, .. }) = &grant
            && !self.deadline.is_over()
        {
            endpoint.note_failure(error);
        }
        grant
    }

    /// Whether the registry knows a login that it refused here. A token service that issued a token knows the login;
    /// otherwise the root of the API shows it, which every login may read.
    async fn login(self, used: Option<&Grant>) -> LoginVerdict {
        let Some(used) = used.filter(|used| *used.by() != Credentials::Anonymous) else { return LoginVerdict::None };
        if used.is_token() {
            return LoginVerdict::Good;
        }
        let endpoint = self.hosted.endpoint();
        let (headers, body, url) = (&[][..], &Body::Empty, endpoint.root());
        let (authorization, silence_max) = (Some(used.header()), Some(LOGIN_WAIT));
        let (method, more) = (Method::Get, Some(self.hosted.headers()));
        let request = Request { method, url: &url, headers, more, authorization, body, home: true, silence_max };
        match endpoint.transport.send(&request, self.deadline).await.map(|response| response.status()) {
            Ok(200) => LoginVerdict::Good,
            Ok(401) => LoginVerdict::Wrong,
            Ok(_) | Err(_) => LoginVerdict::Unknown,
        }
    }

    async fn denied(
        self,
        response: Response,
        challenged: bool,
        credentials: &'static str,
        login: LoginVerdict,
    ) -> RegistryError {
        let (code, message) = error_text(response).await;
        let message = format!("{} {message}", code.unwrap_or_default()).trim().to_owned();
        let ((registry, repository), scope) = (self.hosted.names(), self.call.scopes.to_string());
        RegistryError::Unauthorized { registry, repository, scope, credentials, message, challenged, login }
    }

    fn redirect_error(self, from: &Url, reason: &str) -> RegistryError {
        let (registry, repository) = self.hosted.names();
        RegistryError::Redirect { registry, repository, from: ShownUrl::new(from), reason: reason.to_owned() }
    }
}

/// Code and message of an error answer, if it has them and does not make us wait for them.
async fn error_text(response: Response) -> (Option<String>, String) {
    // Some registries announce the length of the whole blob here: reading stops at the limit either way.
    let body = response.bytes(ERROR_BYTES_MAX, &Deadline::new(ERROR_WAIT, 0)).await;
    body.map(|body| headers::error_body(&body)).unwrap_or_default()
}
