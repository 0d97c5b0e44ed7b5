//! Which of several credentials is used, and what happens after a refusal.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use soci_index::format::reference::ManifestName;
use soci_index::registry::{
    ClientOptions, CredentialSource, Credentials, Keychain, Login, LoginVerdict, Registry, RegistryError, Secret,
};

use super::{MANIFEST, Passwords, carries, guarded, tag};
use crate::wire::server::{BASIC, Recorded, Reply, Server, options, reply, with_password};

#[tokio::test]
async fn every_repository_has_its_own_credentials_and_they_may_change() {
    let right = Arc::new(Mutex::new("one"));
    let accepted = Arc::clone(&right);
    let server = Server::start(move |request| {
        let wanted = if request.target.contains("/p/other/") { "other" } else { *accepted.lock().unwrap() };
        if carries(request, wanted) {
            return reply(200).body(MANIFEST);
        }
        reply(401).header("www-authenticate", "Basic realm=\"x\"")
    })
    .await;
    let passwords = Arc::new(Passwords::default());
    let credentials = CredentialSource::Keychain(Arc::clone(&passwords) as Arc<dyn Keychain>);
    let registry = Registry::new(&server.address, ClientOptions { credentials, ..options() }).unwrap();
    let (repository, other) = (registry.repository("p/r"), registry.repository("p/other"));

    // Nothing is known, and that is not remembered.
    let error = repository.manifest(&tag()).await.unwrap_err();
    assert!(matches!(error, RegistryError::Unauthorized { .. }), "{error:?}");
    passwords.set("p/r", "one");
    passwords.set("p/other", "other");
    repository.manifest(&tag()).await.unwrap().unwrap();
    other.manifest(&tag()).await.unwrap().unwrap();
    repository.manifest(&tag()).await.unwrap().unwrap();
    assert_eq!(passwords.asked.load(Ordering::Relaxed), 3, "kept while they are good");

    // Both sides change; the call that finds out succeeds.
    *right.lock().unwrap() = "two";
    passwords.set("p/r", "two");
    repository.manifest(&tag()).await.unwrap().unwrap();
    other.manifest(&tag()).await.unwrap().unwrap();
    assert_eq!(passwords.asked.load(Ordering::Relaxed), 4);
}

#[tokio::test]
async fn changed_credentials_are_used_for_the_next_token() {
    let right = Arc::new(Mutex::new("one"));
    let accepted = Arc::clone(&right);
    // Tokens live for an instant, so that each call needs a new one.
    let server = guarded("abc", move |request| match carries(request, *accepted.lock().unwrap()) {
        true => reply(200).body(r#"{"token":"abc","expires_in":0.000001}"#),
        false => reply(401),
    })
    .await;
    let passwords = Arc::new(Passwords::default());
    passwords.set("p/r", "one");
    let credentials = CredentialSource::Keychain(Arc::clone(&passwords) as Arc<dyn Keychain>);
    let repository = server.repository_with(ClientOptions { credentials, ..options() });
    repository.manifest(&tag()).await.unwrap().unwrap();
    *right.lock().unwrap() = "two";
    passwords.set("p/r", "two");
    repository.manifest(&tag()).await.unwrap().unwrap();
    // Wrong on both sides is an error, and not for ever.
    *right.lock().unwrap() = "three";
    assert!(matches!(repository.manifest(&tag()).await, Err(RegistryError::Token { status: Some(401), .. })));
    passwords.set("p/r", "three");
    repository.manifest(&tag()).await.unwrap().unwrap();
}

/// Knows several passwords for each repository, the same for all, in the order in which they are to be tried.
#[derive(Debug)]
struct Several(Mutex<Vec<String>>);

impl Several {
    fn of(passwords: &[&str]) -> Arc<Self> {
        Arc::new(Self(Mutex::new(passwords.iter().map(|text| (*text).to_owned()).collect())))
    }
}

impl Keychain for Several {
    fn name(&self) -> &'static str {
        "several passwords"
    }

    fn find<'a>(&'a self, _: &'a str, _: &'a str) -> BoxFuture<'a, Result<Vec<Login>, String>> {
        let login = |password: &String| Login {
            credentials: Credentials::Password { user: "me".to_owned(), password: Secret::new(password) },
            until: None,
            whole_registry: false,
        };
        let logins = self.0.lock().unwrap().iter().map(login).collect();
        std::future::ready(Ok(logins)).boxed()
    }
}

/// Credentials from other sources do not hide a client's own: one credential after the other is tried, whether
/// the registry refuses it itself, by either status, or the token service does.
#[tokio::test]
async fn credentials_are_tried_in_turn() {
    for refusal in [401, 403] {
        for by_token in [false, true] {
            let right = Arc::new(Mutex::new("good"));
            let accepted = Arc::clone(&right);
            let server = Server::start(move |request| {
                let is_token = request.target.starts_with("/token");
                let authorization = request.header("authorization");
                let is_right = carries(request, *accepted.lock().unwrap());
                let realm = format!("http://{}/token", request.header("host").unwrap());
                let challenge =
                    if by_token { format!("Bearer realm=\"{realm}\"") } else { "Basic realm=\"x\"".to_owned() };
                match (is_token, authorization) {
                    (true, Some(_)) if is_right => reply(200).body(r#"{"token":"abc"}"#),
                    // Some give a token to every client, which is then good for nothing.
                    (true, None) => reply(200).body(r#"{"token":"nothing"}"#),
                    (true, _) => reply(refusal),
                    (false, Some("Bearer abc")) => reply(200).body(MANIFEST),
                    (false, Some(_)) if is_right => reply(200).body(MANIFEST),
                    (false, None) => reply(401).header("www-authenticate", challenge),
                    (false, Some(_)) => reply(refusal).header("www-authenticate", challenge),
                }
            })
            .await;
            let several = Several::of(&["bad", "evil", "good", "other"]);
            let chain = vec![CredentialSource::Keychain(Arc::clone(&several) as Arc<dyn Keychain>)];
            let credentials = CredentialSource::Chain(chain);
            let repository = server.repository_with(ClientOptions { credentials, ..options() });
            let case = format!("{refusal}, by a token {by_token}");
            repository.manifest(&tag()).await.unwrap_or_else(|error| panic!("{case}: {error}")).unwrap();
            assert!(!server.requests().iter().any(|request| carries(request, "other")), "{case}");
            // What is good is not looked for again.
            let before = server.requests().len();
            repository.manifest(&tag()).await.unwrap().unwrap();
            assert_eq!(server.requests().len(), before + 1, "{case}");

            // Nothing helps, until one is good: a refusal is not remembered for ever, from whatever source.
            for next in ["none of them", "bad", "none of them", "other"] {
                *right.lock().unwrap() = next;
                let last = repository.manifest(&tag()).await;
                if by_token && last.is_ok() && next == "none of them" {
                    // The token is good as long as the registry says so.
                    continue;
                }
                assert_eq!(last.is_ok(), next != "none of them", "{case}, {next}: {last:?}");
            }
        }
    }
}

/// A public image is pulled, although a secret for it is wrong.
#[tokio::test]
async fn a_wrong_secret_does_not_shut_what_is_open() {
    for by_token in [false, true] {
        let server = Server::start(move |request| {
            let realm = format!("http://{}/token", request.header("host").unwrap());
            match (request.target.starts_with("/token"), request.header("authorization")) {
                (true, None) => reply(200).body(r#"{"token":"public"}"#),
                (false, Some("Bearer public")) => reply(200).body(MANIFEST),
                (false, None) if !by_token && !request.target.ends_with("/first") => reply(200).body(MANIFEST),
                (false, _) if by_token => reply(401).header("www-authenticate", format!("Bearer realm=\"{realm}\"")),
                (_, _) => reply(401).header("www-authenticate", "Basic realm=\"x\""),
            }
        })
        .await;
        let keychain = CredentialSource::Keychain(Several::of(&["bad"]) as Arc<dyn Keychain>);
        let credentials = CredentialSource::Chain(vec![keychain]);
        let repository = server.repository_with(ClientOptions { credentials, ..options() });
        // Teaches it that the registry asks for passwords.
        let first = repository.manifest(&ManifestName::Tag("first".into())).await;
        assert_eq!(first.is_ok(), by_token, "{first:?}");
        for _ in 0..2 {
            repository.manifest(&tag()).await.unwrap_or_else(|error| panic!("by a token {by_token}: {error}")).unwrap();
        }
    }
}

/// More credentials than one request tries: the next one goes on with those that are left.
#[tokio::test]
async fn very_many_credentials_are_tried_over_several_requests() {
    let server = Server::start(|request| match carries(request, "39") {
        true => reply(200).body(MANIFEST),
        false => reply(401).header("www-authenticate", "Basic realm=\"x\""),
    })
    .await;
    let numbers: Vec<String> = (0..40).map(|number| number.to_string()).collect();
    let several = Several::of(&numbers.iter().map(String::as_str).collect::<Vec<_>>());
    let credentials = CredentialSource::Chain(vec![CredentialSource::Keychain(several as Arc<dyn Keychain>)]);
    let repository = server.repository_with(ClientOptions { credentials, ..options() });
    let mut requests = 0;
    for attempt in 0.. {
        let answer = repository.manifest(&tag()).await;
        let sent = server.requests().len() - std::mem::replace(&mut requests, server.requests().len());
        // Of these one asks whether the last login is good.
        assert!(sent <= 19, "{sent} requests for one");
        if answer.is_ok() {
            break;
        }
        assert!(attempt < 4, "{answer:?}");
    }
}

/// A registry of logins without tokens that lets `me` read and no login push.
fn readable(request: &Recorded) -> Reply {
    match (request.header("authorization"), request.method.as_str()) {
        (Some(BASIC), "GET" | "HEAD") => reply(200).body(MANIFEST),
        _ => reply(401).header("www-authenticate", "Basic realm=\"x\"").body("denied: denied\n"),
    }
}

/// What a login is refused for: itself, or what it lacks.
#[tokio::test]
async fn a_wrong_password_and_a_missing_right_are_distinguished() {
    let server = Server::start(readable).await;
    let wrong = CredentialSource::Password { user: "me".into(), password: Secret::new("wrong") };
    let wrong = ClientOptions { credentials: wrong, ..options() };
    for (options, login, words) in [
        (with_password(), LoginVerdict::Good, "has no right to this"),
        (wrong, LoginVerdict::Wrong, "its password is another"),
        (options(), LoginVerdict::None, "no credentials"),
    ] {
        let error = server.repository_with(options).try_upload().await.unwrap_err();
        let RegistryError::Unauthorized { login: found, message, .. } = &error else { panic!("{error:?}") };
        assert_eq!((*found, message.as_str()), (login, "denied"), "{error}");
        assert!(error.to_string().contains(words) && error.lacks_rights(), "{error}");
    }
}

/// However many requests are refused at once, each names the login that was used.
#[tokio::test]
async fn refused_requests_side_by_side_name_the_login() {
    for _ in 0..20 {
        let server = Server::start(readable).await;
        let repository = server.repository_with(with_password());
        let pushes = (0..4).map(|_| repository.try_upload());
        for refused in futures_util::future::join_all(pushes).await {
            let error = refused.unwrap_err().to_string();
            assert!(error.contains("with a user name and password"), "{error}");
        }
    }
}
