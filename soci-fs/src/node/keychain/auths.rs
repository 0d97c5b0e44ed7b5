//! Credentials by image pattern, as docker's configuration and the answers of plugins list them.
//!
//! `{"auths": {PATTERN: {"auth": BASE64 | "username": .., "password": .. | "identitytoken": ..}}}`. Only this member is
//! read: a secret of a cluster may also name credential programs, and write access to a secret must not allow running
//! one here. Where several patterns match, all of them are meant, the longest first, as in Kubernetes. Pure.

use std::collections::BTreeMap;

use base64::Engine as _;
use serde::Deserialize;
use soci_index::registry::{Credentials, Secret};

use crate::node::keychain::pattern::Pattern;

/// Credentials, each for the images that a pattern describes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Auths(Vec<(Pattern, Credentials)>);

/// One entry as it is written.
#[derive(Deserialize, Default)]
#[serde(default)]
pub(super) struct AuthEntry {
    username: String,
    password: String,
    auth: String,
    identitytoken: String,
}

#[derive(Deserialize)]
struct File {
    #[serde(default)]
    auths: BTreeMap<String, AuthEntry>,
}

impl Auths {
    /// Reads a document of the form of docker's `config.json`. Entries without credentials are left out.
    ///
    /// # Errors
    /// Where it is not one. The reason holds nothing of its content.
    pub fn parse(document: &[u8]) -> Result<Self, String> {
        let file: File = serde_json::from_slice(document).map_err(|error| {
            // What serde says may quote the document.
            format!("not of the form of docker's config.json (line {}, column {})", error.line(), error.column())
        })?;
        Ok(Self::of(file.auths))
    }

    pub(super) fn of(entries: BTreeMap<String, AuthEntry>) -> Self {
        let known = entries.into_iter().filter_map(|(key, entry)| Some((Pattern::parse(&key)?, entry.credentials()?)));
        Self(known.collect())
    }

    /// The credentials for `repository` on `registry`, and the patterns by which they were found, the longest one
    /// first.
    #[must_use]
    pub fn find(&self, registry: &str, repository: &str) -> Vec<&(Pattern, Credentials)> {
        let mut matching: Vec<_> = self.0.iter().filter(|(pattern, _)| pattern.matches(registry, repository)).collect();
        matching.sort_by_key(|(pattern, _)| std::cmp::Reverse(pattern.length()));
        matching
    }
}

impl AuthEntry {
    fn credentials(self) -> Option<Credentials> {
        if !self.identitytoken.is_empty() {
            return Some(Credentials::IdentityToken(Secret::new(self.identitytoken)));
        }
        if !self.username.is_empty() || !self.password.is_empty() {
            return Some(Credentials::Password { user: self.username, password: Secret::new(self.password) });
        }
        basic(&self.auth)
    }
}

/// Reads `user:password` in base64; `None` if that is not what it is.
pub(super) fn basic(auth: &str) -> Option<Credentials> {
    let bytes = base64::engine::general_purpose::STANDARD.decode(auth.trim()).ok()?;
    let text = String::from_utf8(bytes).ok()?;
    // Docker pads with zeros.
    let (user, password) = text.trim_matches('\0').split_once(':')?;
    Some(Credentials::Password { user: user.to_owned(), password: Secret::new(password) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn password(user: &str, password: &str) -> Credentials {
        Credentials::Password { user: user.into(), password: Secret::new(password) }
    }

    #[test]
    fn the_longest_pattern_comes_first() {
        let auths = Auths::parse(
            br#"{"credsStore": "evil", "credHelpers": {"h.example": "evil"}, "auths": {
                "https://h.example/v1/": {"auth": "dTpw"},
                "h.example/team": {"username": "team", "password": "secret"},
                "h.example/team/app": {"identitytoken": "token"},
                "*.example": {"username": "star", "password": "s"},
                "empty.example": {}, "broken.example": {"auth": "%%%"}
            }}"#,
        )
        .unwrap();
        for (registry, repository, expected) in [
            ("h.example", "other", Some(password("u", "p"))),
            ("h.example", "team/x", Some(password("team", "secret"))),
            ("h.example", "team/app", Some(Credentials::IdentityToken(Secret::new("token")))),
            ("empty.example", "x", Some(password("star", "s"))),
            ("elsewhere", "x", None),
        ] {
            let found = auths.find(registry, repository).first().map(|(_, credentials)| credentials.clone());
            assert_eq!(found, expected, "{registry}/{repository}");
        }
        let all = auths.find("h.example", "team/app");
        let users = all.iter().map(|(_, credentials)| match credentials {
            Credentials::Password { user, .. } => user.as_str(),
            _ => "",
        });
        assert_eq!(users.collect::<Vec<_>>(), ["", "team", "u", "star"]);
    }

    #[test]
    fn errors_hold_no_secrets() {
        for document in [r#"{"auths": {"h": "hunter2"}}"#, r#"{"auths": "hunter2"}"#, "hunter2", "{"] {
            let error = Auths::parse(document.as_bytes()).unwrap_err();
            assert!(!error.contains("hunter2") && error.contains("line"), "{error}");
        }
        assert_eq!(Auths::parse(b"{}"), Ok(Auths::default()));
    }

    #[test]
    fn basic_pairs() {
        for (text, expected) in [
            ("dTpw", Some(password("u", "p"))),
            ("dTpwOnE=", Some(password("u", "p:q"))),
            ("dTpwAAA=", Some(password("u", "p"))),
            ("dXA=", None),
            ("not base64", None),
            ("", None),
        ] {
            assert_eq!(basic(text), expected, "{text}");
        }
    }
}
