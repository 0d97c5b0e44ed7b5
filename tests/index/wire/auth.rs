//! Tokens, challenges and renewals.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use base64::Engine as _;
use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use soci_index::format::digest::Digest;
use soci_index::format::reference::ManifestName;
use soci_index::registry::{
    Body, ClientOptions, CredentialSource, Credentials, Keychain, Login, RegistryError, Secret,
};

use crate::wire::server::{BASIC, Recorded, Reply, Server, options, reply, with_password};

mod credentials;

const MANIFEST: &str = r#"{"schemaVersion":2,"config":{},"layers":[]}"#;

fn tag() -> ManifestName {
    ManifestName::Tag("t".into())
}

/// A registry that wants a Bearer token; `token` answers the token service, which is on the same address.
async fn guarded(accepted: &'static str, token: impl Fn(&Recorded) -> Reply + Send + 'static) -> Server {
    Server::start(move |request| {
        if request.target.starts_with("/token") {
            return token(request);
        }
        if request.header("authorization") == Some(&format!("Bearer {accepted}")) {
            return reply(200).body(MANIFEST);
        }
        let realm = format!("http://{}/token", request.header("host").unwrap());
        reply(401)
            .header("www-authenticate", "Negotiate")
            .header("WWW-Authenticate", format!("Bearer realm=\"{realm}\",service=\"s\",scope=\"repository:p/r:pull\""))
            .body(r#"{"errors":[{"code":"UNAUTHORIZED","message":"who are you"}]}"#)
    })
    .await
}

#[tokio::test]
async fn anonymous_bearer_token_is_fetched_once() {
    let server = guarded("abc", |_| reply(200).body(r#"{"token":"abc","access_token":"","expires_in":300}"#)).await;
    let repository = server.repository();
    let (one, two) = (tag(), tag());
    let (one, two) = tokio::join!(repository.manifest(&one), repository.manifest(&two));
    assert!(one.unwrap().is_some() && two.unwrap().is_some());
    repository.manifest(&tag()).await.unwrap().unwrap();
    let tokens: Vec<_> = server.requests().into_iter().filter(|r| r.target.starts_with("/token")).collect();
    assert_eq!(tokens.len(), 1, "{:?}", server.lines());
    assert_eq!(tokens[0].line(), "GET /token?service=s&scope=repository%3Ap%2Fr%3Apull");
    assert_eq!(tokens[0].header("authorization"), None);
}

#[tokio::test]
async fn password_goes_to_the_token_service_only() {
    let server = guarded("abc", |request| {
        assert_eq!(request.header("authorization"), Some(BASIC));
        reply(200).body(r#"{"access_token":"abc"}"#)
    })
    .await;
    server.repository_with(with_password()).manifest(&tag()).await.unwrap().unwrap();
    let others: Vec<_> = server.requests().into_iter().filter(|r| !r.target.starts_with("/token")).collect();
    assert_eq!(others[0].header("authorization"), None);
    assert_eq!(others[1].header("authorization"), Some("Bearer abc"));
}

#[tokio::test]
async fn a_new_token_after_401_and_then_an_error() {
    let server = guarded("never", |_| reply(200).body(r#"{"token":"wrong"}"#)).await;
    let error = server.repository_with(with_password()).manifest(&tag()).await.unwrap_err();
    assert!(matches!(&error, RegistryError::Unauthorized { scope, .. } if scope == "repository:p/r:pull"), "{error:?}");
    let text = format!("{error} {error:?}");
    assert!(text.contains("who are you") && !text.contains("hunter2") && !text.contains("wrong"), "{text}");
    // Unknown, wrong token, renewed token.
    assert_eq!(server.lines().iter().filter(|line| line.contains("manifests")).count(), 3);
}

#[tokio::test]
async fn identity_tokens_by_form_then_by_query() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let server = guarded("abc", |request| match request.method.as_str() {
        "POST" => reply(405),
        _ => reply(200).body(r#"{"token":"abc"}"#),
    })
    .await;
    let config = format!(r#"{{"auths":{{"{}":{{"identitytoken":"idt"}}}}}}"#, server.address);
    std::fs::write(file.path(), config).unwrap();
    let credentials = CredentialSource::File(file.path().to_owned());
    let repository = server.repository_with(ClientOptions { credentials, ..options() });
    repository.manifest(&tag()).await.unwrap().unwrap();
    let form = server.requests().into_iter().find(|request| request.method == "POST").unwrap();
    let expected =
        "grant_type=refresh_token&service=s&client_id=soci&scope=repository%3Ap%2Fr%3Apull&refresh_token=idt";
    assert_eq!(String::from_utf8(form.body).unwrap(), expected);
}

#[tokio::test]
async fn harbors_basic_challenge_widens_the_scope() {
    let server = Server::start(|request| {
        if request.target.starts_with("/token") {
            let wide = request.target.contains("pull%2Cpush");
            return reply(200).body(if wide { r#"{"token":"wide"}"# } else { r#"{"token":"narrow"}"# });
        }
        match request.header("authorization") {
            Some("Bearer wide") => reply(200).body(MANIFEST),
            Some(_) => reply(401).header("www-authenticate", "Basic realm=\"harbor\""),
            None => {
                let realm = format!("http://{}/token", request.header("host").unwrap());
                reply(401).header("www-authenticate", format!("Bearer realm=\"{realm}\",service=\"harbor-registry\""))
            }
        }
    })
    .await;
    server.repository_with(with_password()).manifest(&tag()).await.unwrap().unwrap();
    assert!(
        server
            .requests()
            .iter()
            .all(|request| { request.target.starts_with("/token") || request.header("authorization") != Some(BASIC) })
    );
}

#[tokio::test]
async fn basic_only() {
    let server = Server::start(|request| match request.header("authorization") {
        Some(BASIC) => reply(200).body(MANIFEST),
        _ => reply(401).header("www-authenticate", "Basic realm=\"x\""),
    })
    .await;
    server.repository_with(with_password()).manifest(&tag()).await.unwrap().unwrap();
    let error = server.repository().manifest(&tag()).await.unwrap_err();
    assert!(error.to_string().contains("log in"), "{error}");
}

#[tokio::test]
async fn an_expired_token_shows_as_403_and_is_renewed_once() {
    let mut tokens = 0;
    let server = Server::start(move |request| {
        if request.target.starts_with("/token") {
            tokens += 1;
            return reply(200).body(format!(r#"{{"token":"t{tokens}"}}"#));
        }
        match request.header("authorization") {
            None => {
                let realm = format!("http://{}/token", request.header("host").unwrap());
                reply(401).header("www-authenticate", format!("Bearer realm=\"{realm}\""))
            }
            Some("Bearer t1") => {
                reply(403).body(r#"{"errors":[{"code":"DENIED","message":"Your authorization token has expired."}]}"#)
            }
            Some("Bearer t2") if request.target.ends_with("/t") => reply(200).body(MANIFEST),
            Some(_) => reply(403).body(r#"{"errors":[{"code":"DENIED","message":"quota exceeded"}]}"#),
        }
    })
    .await;
    let repository = server.repository();
    repository.manifest(&tag()).await.unwrap().unwrap();
    let error = repository.manifest(&ManifestName::Tag("other".into())).await.unwrap_err();
    assert!(error.to_string().contains("HTTP 403 DENIED: quota exceeded"), "{error}");
}

#[tokio::test]
async fn realms_elsewhere_get_nothing() {
    for realm in ["http://169.254.169.254/token", "http://10.0.0.1/token", "http://u:p@127.0.0.1/token", "ftp://x/"] {
        let server =
            Server::queue([reply(401).header("www-authenticate", format!("Bearer realm=\"{realm}?secret=1\""))]).await;
        let error = server.repository_with(with_password()).manifest(&tag()).await.unwrap_err();
        assert!(matches!(error, RegistryError::Realm { .. }), "{error:?}");
        assert!(!error.to_string().contains("secret"), "{error}");
        assert_eq!(server.requests().len(), 1);
    }
}

#[tokio::test]
async fn token_services_in_trouble() {
    for (answers, expected) in [
        (vec![reply(503), reply(429).header("retry-after", "0"), reply(200).body(r#"{"token":"abc"}"#)], None),
        (vec![reply(200).body("<html>secret</html>")], Some("no token document")),
        (vec![reply(200).body(r#"{"token":"","access_token":""}"#)], Some("holds no token")),
        (vec![reply(403)], Some("HTTP 403")),
        (vec![reply(302).header("location", "http://elsewhere.example/")], Some("HTTP 302")),
        (vec![reply(200).header("content-length", "99999999999").stall(0)], Some("too large")),
    ] {
        let answers = std::sync::Mutex::new(answers.into_iter());
        let server = guarded("abc", move |_| answers.lock().unwrap().next().unwrap_or_else(|| reply(400))).await;
        let result = server.repository().manifest(&tag()).await;
        match expected {
            None => assert!(result.unwrap().is_some()),
            Some(text) => {
                let error = result.unwrap_err().to_string();
                assert!(error.contains(text) && !error.contains("secret"), "{error}");
            }
        }
    }
}

#[tokio::test]
async fn pushing_asks_for_both_rights_at_once() {
    let server = guarded("abc", |_| reply(200).body(r#"{"token":"abc"}"#)).await;
    let pushed = server.repository().push_blob(&Digest::of(b"x"), Body::Bytes("x".into()), None).await;
    assert!(pushed.is_ok());
    let token = server.lines().into_iter().find(|line| line.contains("/token")).unwrap();
    assert!(token.ends_with("scope=repository%3Ap%2Fr%3Apull%2Cpush"), "{token}");
}

/// Knows a password per repository, which may change, and counts how often it is asked.
#[derive(Debug, Default)]
struct Passwords {
    known: Mutex<HashMap<String, String>>,
    asked: AtomicUsize,
}

impl Passwords {
    fn set(&self, repository: &str, password: &str) {
        self.known.lock().unwrap().insert(repository.to_owned(), password.to_owned());
    }
}

impl Keychain for Passwords {
    fn name(&self) -> &'static str {
        "the test's passwords"
    }

    fn find<'a>(&'a self, _: &'a str, repository: &'a str) -> BoxFuture<'a, Result<Vec<Login>, String>> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let password = self.known.lock().unwrap().get(repository).map(Secret::new);
        let login = password.map(|password| Login {
            credentials: Credentials::Password { user: "me".to_owned(), password },
            until: None,
            whole_registry: false,
        });
        std::future::ready(Ok(login.into_iter().collect())).boxed()
    }
}

/// Whether a request carries this password.
fn carries(request: &Recorded, password: &str) -> bool {
    let expected = base64::engine::general_purpose::STANDARD.encode(format!("me:{password}"));
    request.header("authorization") == Some(&format!("Basic {expected}"))
}

/// Harbor says this of a project that is not there, to every client.
#[tokio::test]
async fn a_refusal_without_a_question() {
    for header in [None, Some("")] {
        let mut refusal = reply(401).body(r#"{"errors":[{"code":"UNAUTHORIZED","message":"project p not found"}]}"#);
        if let Some(header) = header {
            refusal = refusal.header("www-authenticate", header);
        }
        let server = Server::queue([refusal.clone(), refusal]).await;
        let error = server.repository_with(with_password()).manifest(&tag()).await.unwrap_err();
        let shown = error.to_string();
        assert!(matches!(error, RegistryError::Unauthorized { challenged: false, .. }), "{shown}");
        assert!(shown.contains("project p not found") && shown.contains("check the name, or create it"), "{shown}");
        assert_eq!(server.requests().len(), 1);
    }
}

/// ECR, once authenticated, refuses an expired token without any challenge.
#[tokio::test]
async fn a_refusal_without_a_question_of_what_was_good_before() {
    let right = Arc::new(Mutex::new("one"));
    let accepted = Arc::clone(&right);
    let server = Server::start(move |request| match request.header("authorization") {
        None => reply(401).header("www-authenticate", "Basic realm=\"https://ecr.invalid/\",service=\"ecr\""),
        Some(_) if carries(request, *accepted.lock().unwrap()) => reply(200).body(MANIFEST),
        Some(_) => {
            reply(403).body(r#"{"errors":[{"code":"DENIED","message":"Your authorization token has expired."}]}"#)
        }
    })
    .await;
    let passwords = Arc::new(Passwords::default());
    passwords.set("p/r", "one");
    let credentials = CredentialSource::Keychain(Arc::clone(&passwords) as Arc<dyn Keychain>);
    let repository = server.repository_with(ClientOptions { credentials, ..options() });
    repository.manifest(&tag()).await.unwrap().unwrap();
    *right.lock().unwrap() = "two";
    let error = repository.manifest(&tag()).await.unwrap_err().to_string();
    assert!(error.contains("HTTP 403 DENIED: Your authorization token has expired."), "{error}");
    passwords.set("p/r", "two");
    repository.manifest(&tag()).await.unwrap().unwrap();
}

/// How services say that they do not know the form (Harbor 405, Artifactory 401, ACR 400).
#[tokio::test]
async fn token_services_that_take_no_form() {
    for status in [400, 401, 404, 405] {
        let server = guarded("abc", move |request| match request.method.as_str() {
            "POST" => reply(status),
            _ => reply(200).body(r#"{"token":"abc"}"#),
        })
        .await;
        let file = tempfile::NamedTempFile::new().unwrap();
        let config = format!(r#"{{"auths":{{"{}":{{"identitytoken":"idt"}}}}}}"#, server.address);
        std::fs::write(file.path(), config).unwrap();
        let credentials = CredentialSource::File(file.path().to_owned());
        let repository = server.repository_with(ClientOptions { credentials, ..options() });
        assert!(repository.manifest(&tag()).await.unwrap().is_some(), "{status}");
    }
}

/// Robot accounts of Harbor have a dollar sign in their names.
#[tokio::test]
async fn names_are_sent_as_they_are() {
    let expected = base64::engine::general_purpose::STANDARD.encode("robot$team+ci:pass$word");
    let expected = format!("Basic {expected}");
    let server = guarded("abc", move |request| match request.header("authorization") == Some(&expected) {
        true => reply(200).body(r#"{"token":"abc","access_token":""}"#),
        false => reply(401),
    })
    .await;
    let credentials = CredentialSource::Password { user: "robot$team+ci".into(), password: Secret::new("pass$word") };
    let repository = server.repository_with(ClientOptions { credentials, ..options() });
    assert!(repository.manifest(&tag()).await.unwrap().is_some());
}
