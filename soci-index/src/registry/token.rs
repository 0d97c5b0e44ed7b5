//! Getting an access token from a token service.
//!
//! `GET realm?service=..&scope=..` with Basic when there is a password; an identity token is exchanged by a POST form,
//! and by GET where a service does not know the form. Invariants: redirects of a token service are not followed, since
//! the request carries a secret; its answer is bounded and never quoted; an empty `access_token` (Harbor sends one) is
//! no token.

use std::time::Duration;

use base64::Engine as _;
use bytes::Bytes;
use serde::Deserialize;
use tokio::time::Instant;
use url::Url;

use crate::registry::credentials::{Credentials, Secret};
use crate::registry::error::RegistryError;
use crate::registry::headers;
use crate::registry::redirect::ShownUrl;
use crate::registry::retry::{Deadline, RetryPolicy};
use crate::registry::scopes::Scopes;
use crate::registry::transport::{Body, BodyError, Method, Request, Transport};

/// A token's life if the service does not state it (the distribution project's rule).
const LIFE_DEFAULT: u64 = 60;
/// Most seconds that a token is believed to live, so that it is renewed now and then.
const LIFE_MAX: u64 = 12 * 3600;
/// Bytes of an answer. Tokens with many rights reach some tens of kilobytes.
const ANSWER_BYTES_MAX: u64 = 1 << 20;

/// An access token and until when to use it.
#[derive(Debug, Clone)]
pub(crate) struct Token {
    text: Secret,
    until: Instant,
}

impl Token {
    pub(crate) fn text(&self) -> &str {
        self.text.expose()
    }

    pub(crate) fn is_fresh(&self) -> bool {
        Instant::now() < self.until
    }
}

/// What to ask for.
pub(crate) struct TokenRequest<'a> {
    pub(crate) registry: &'a str,
    pub(crate) realm: &'a Url,
    pub(crate) service: Option<String>,
    pub(crate) scopes: &'a Scopes,
    pub(crate) credentials: &'a Credentials,
    /// Whether the service is on the registry's own origin.
    pub(crate) home: bool,
    /// See [`Request::silence_max`].
    pub(crate) silence_max: Option<Duration>,
}

struct TokenResponse {
    status: u16,
    retry_after: Option<Duration>,
    body: Bytes,
}

impl TokenRequest<'_> {
    pub(crate) async fn send(
        &self,
        transport: &Transport,
        retry_policy: RetryPolicy,
        deadline: &Deadline,
    ) -> Result<Token, RegistryError> {
        let mut answer = None;
        if let Credentials::IdentityToken(token) = self.credentials {
            let form = self.repeated(transport, retry_policy, deadline, Some(token)).await?;
            // These four are how services say that they do not know the form.
            if !matches!(form.status, 400 | 401 | 404 | 405) {
                answer = Some(form);
            }
        }
        let answer = match answer {
            Some(answer) => answer,
            None => self.repeated(transport, retry_policy, deadline, None).await?,
        };
        match answer.status {
            200 => read(&answer.body).map_err(|reason| self.error(Some(200), reason)),
            status @ (401 | 403) => Err(self.error(Some(status), self.credentials.describe())),
            status => {
                let (code, message) = headers::error_body(&answer.body);
                Err(self.error(Some(status), &format!("{} {message}", code.unwrap_or_default())))
            }
        }
    }

    /// Asks until there is an answer that another attempt would not change. A service that cannot be reached is an
    /// error at once: the request that wants the token is retried, as often as is worth it, and says so.
    async fn repeated(
        &self,
        transport: &Transport,
        retry_policy: RetryPolicy,
        deadline: &Deadline,
        form: Option<&Secret>,
    ) -> Result<TokenResponse, RegistryError> {
        let mut retry = 0;
        loop {
            let answer = self.once(transport, deadline, form).await?;
            if !matches!(answer.status, 429 | 500 | 502..=504) || retry >= retry_policy.backoff.retries_max {
                return Ok(answer);
            }
            let pause = answer.retry_after.unwrap_or_else(|| retry_policy.backoff.wait(retry, fastrand::f64()));
            retry_policy.report(pause, &format_args!("{} answers {}", ShownUrl::new(self.realm), answer.status));
            if !deadline.pause(pause).await {
                return Ok(answer);
            }
            retry += 1;
        }
    }

    async fn once(
        &self,
        transport: &Transport,
        deadline: &Deadline,
        form: Option<&Secret>,
    ) -> Result<TokenResponse, RegistryError> {
        let (url, body) = self.target(form);
        let authorization = match (form, self.credentials) {
            (Some(_), _) | (None, Credentials::Anonymous) => None,
            (None, Credentials::Password { user, password }) => Some(basic(user, password.expose())),
            (None, Credentials::IdentityToken(token)) => Some(basic("", token.expose())),
        };
        let mut headers = vec![("accept", "application/json".to_owned())];
        if form.is_some() {
            headers.push(("content-type", "application/x-www-form-urlencoded".to_owned()));
        }
        let method = if form.is_some() { Method::Post } else { Method::Get };
        let authorization = authorization.as_deref();
        let (headers, body, home, silence_max) = (&headers, &body, self.home, self.silence_max);
        let request = Request { method, url: &url, headers, more: None, authorization, body, home, silence_max };
        let failed = |error| RegistryError::Transport { registry: self.registry.to_owned(), attempts: 1, error };
        let response = transport.send(&request, deadline).await.map_err(failed)?;
        let status = response.status();
        let after = response.header("retry-after");
        let retry_after =
            after.and_then(|text| crate::registry::retry::retry_after(text, std::time::SystemTime::now()));
        let body = match response.bytes(ANSWER_BYTES_MAX, deadline).await {
            Ok(body) => body,
            Err(BodyError::Transport(error)) => return Err(failed(error)),
            Err(BodyError::TooLarge) => return Err(self.error(Some(status), "the answer is too large")),
        };
        Ok(TokenResponse { status, retry_after, body })
    }

    fn target(&self, form: Option<&Secret>) -> (Url, Body) {
        let mut url = self.realm.clone();
        let scopes = self.scopes.texts();
        match form {
            None => {
                let mut query = url.query_pairs_mut();
                if let Some(service) = &self.service {
                    query.append_pair("service", service);
                }
                query.extend_pairs(scopes.iter().map(|scope| ("scope", scope)));
                drop(query);
                (url, Body::Empty)
            }
            Some(token) => {
                let mut form = url::form_urlencoded::Serializer::new(String::new());
                form.append_pair("grant_type", "refresh_token");
                form.append_pair("service", self.service.as_deref().unwrap_or_default());
                form.append_pair("client_id", "soci");
                form.append_pair("scope", &scopes.join(" "));
                form.append_pair("refresh_token", token.expose());
                (url, Body::Bytes(Bytes::from(form.finish())))
            }
        }
    }

    fn error(&self, status: Option<u16>, reason: &str) -> RegistryError {
        let reason = match status {
            Some(200) | None => reason.to_owned(),
            Some(status) => format!("HTTP {status} {reason}").trim_end().to_owned(),
        };
        RegistryError::Token { registry: self.registry.to_owned(), realm: ShownUrl::new(self.realm), status, reason }
    }
}

fn read(body: &[u8]) -> Result<Token, &'static str> {
    #[derive(Deserialize)]
    struct Fields {
        #[serde(default)]
        token: Option<String>,
        #[serde(default)]
        access_token: Option<String>,
        #[serde(default)]
        expires_in: Option<f64>,
    }
    let fields: Fields = serde_json::from_slice(body).map_err(|_| "the answer is no token document")?;
    let text = [fields.token, fields.access_token].into_iter().flatten().find(|text| !text.is_empty());
    let text = text.ok_or("the answer holds no token")?;
    if !text.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err("the token holds characters that no header can carry");
    }
    let expires_in = fields.expires_in.filter(|seconds| *seconds > 0.0);
    let life = expires_in.map_or(Duration::from_secs(LIFE_DEFAULT), |seconds| {
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX).min(Duration::from_secs(LIFE_MAX))
    });
    Ok(Token { text: Secret::new(text), until: Instant::now() + usable(life, fastrand::f64()) })
}

/// How much of a token's life to use: a margin of 10 to 20 % (random, so that many clients do not renew together).
fn usable(life: Duration, random: f64) -> Duration {
    life.mul_f64(0.9 - 0.1 * random.clamp(0.0, 1.0))
}

/// The value of a Basic authorization header.
pub(crate) fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers() {
        for (body, expected) in [
            (r#"{"token":"a","access_token":""}"#, Some("a")),
            (r#"{"token":"","access_token":"b"}"#, Some("b")),
            (r#"{"access_token":"b","expires_in":300}"#, Some("b")),
            (r#"{"token":"a","expires_in":1e300}"#, Some("a")),
            (r#"{"token":"a","expires_in":-5}"#, Some("a")),
            (r#"{"token":""}"#, None),
            (r#"{"token":"a\nb"}"#, None),
            (r"{}", None),
            ("<html>", None),
        ] {
            assert_eq!(read(body.as_bytes()).ok().map(|token| token.text().to_owned()).as_deref(), expected, "{body}");
        }
        assert_eq!(usable(Duration::from_secs(100), 0.0), Duration::from_secs(90));
        assert_eq!(usable(Duration::from_secs(100), 1.0), Duration::from_secs(80));
    }
}
