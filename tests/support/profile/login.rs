//! Authentication: challenges, tokens and their scopes.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;

use super::server::{Reply, Request};
use super::{Login, Quirks};

/// The token service of a registry, and its door.
#[derive(Debug, Default)]
pub(super) struct Door {
    /// The scopes of each token.
    tokens: Mutex<HashMap<String, HashSet<String>>>,
    count: AtomicU64,
    expired: AtomicBool,
}

/// The user of every profile: a robot account of Harbor, since that is the hardest to quote.
pub(super) const USER: &str = "robot$team+ci";
pub(super) const PASSWORD: &str = "pass-w0rd$of-the-profile";
/// What stands for both where logins are exchanged.
pub(super) const IDENTITY: &str = "identity-token-of-the-profile";

impl Door {
    /// Answers the token service.
    pub(super) fn token(&self, quirks: &Quirks, request: &Request) -> Reply {
        if request.method != "GET" {
            return Reply::error(quirks.form.unwrap_or(405), "UNSUPPORTED", "no such form");
        }
        let known = request.header("authorization").map(|given| is_known(given, quirks));
        match known {
            Some(true) => {}
            // Harbor treats a wrong password like an anonymous client (section 5.3).
            Some(false) if quirks.login != Login::HarborToken => {
                return Reply::error(401, "UNAUTHORIZED", "wrong password");
            }
            Some(false) | None => return Reply::json(200, r#"{"token":"good-for-nothing","access_token":""}"#),
        }
        let token = format!("token-{}-of-the-profile", self.count.fetch_add(1, Ordering::Relaxed));
        let mut rights = HashSet::new();
        for scope in request.query("scope") {
            let Some((name, actions)) = scope.rsplit_once(':') else { continue };
            rights.extend(actions.split(',').map(|action| format!("{name}:{action}")));
        }
        self.tokens.lock().unwrap_or_else(PoisonError::into_inner).insert(token.clone(), rights);
        let access = if quirks.login == Login::HarborToken { "" } else { token.as_str() };
        Reply::json(200, &format!(r#"{{"token":"{token}","access_token":"{access}","expires_in":1800}}"#))
    }

    /// What keeps a request out, if anything does.
    pub(super) fn refusal(&self, quirks: &Quirks, request: &Request) -> Option<Reply> {
        let refuse = |challenge: String| {
            let reply = Reply::error(401, "UNAUTHORIZED", "unauthorized to access repository");
            Some(reply.header("www-authenticate", challenge))
        };
        let name = request.repository();
        let action = if matches!(request.method.as_str(), "GET" | "HEAD") { "pull" } else { "push" };
        let given = request.header("authorization");
        if let Some(basic) = given.filter(|given| given.starts_with("Basic ")) {
            if quirks.login == Login::Token || !is_known(basic, quirks) {
                return refuse("Basic realm=\"registry\"".to_owned());
            }
            let expires = quirks.expires_once && request.method == "PUT" && !self.expired.swap(true, Ordering::Relaxed);
            return expires
                .then(|| Reply::error(403, "DENIED", "Your authorization token has expired. Reauthenticate."));
        }
        if quirks.login == Login::Basic {
            return refuse("Basic realm=\"registry\",service=\"registry\"".to_owned());
        }
        let Some(token) = given.and_then(|given| given.strip_prefix("Bearer ")) else {
            let (host, actions) =
                (request.header("host").unwrap_or_default(), if action == "pull" { "pull" } else { "pull,push" });
            return refuse(format!(
                "Bearer realm=\"http://{host}/service/token\",service=\"registry\",scope=\"repository:{name}:{actions}\""
            ));
        };
        let tokens = self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        let right = format!("repository:{name}:{action}");
        if tokens.get(token).is_some_and(|rights| rights.contains(&right)) {
            return None;
        }
        refuse(match quirks.login {
            Login::HarborToken => "Basic realm=\"harbor\"".to_owned(),
            _ => format!(
                "Bearer realm=\"http://{}/service/token\",service=\"registry\",scope=\"{right}\",error=\"insufficient_scope\"",
                request.header("host").unwrap_or_default()
            ),
        })
    }
}

fn is_known(authorization: &str, quirks: &Quirks) -> bool {
    let expected = match quirks.form {
        None => format!("{USER}:{PASSWORD}"),
        Some(_) => format!(":{IDENTITY}"),
    };
    authorization.strip_prefix("Basic ") == Some(BASE64.encode(expected).as_str())
}
