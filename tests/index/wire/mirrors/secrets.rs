//! Which host gets which secret, and that no other one does.

use std::sync::{Arc, Mutex};

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use serde_json::json;
use soci_index::registry::hosts::HostRules;
use soci_index::registry::{ClientOptions, CredentialSource, Credentials, Keychain, Login, Secret};

use super::{all, behind, blob, by_file, content, host, mirrored, tag};
use crate::wire::server::{Recorded, Server, options, reply, with_password};

/// Has a password for every registry, and records the look-ups.
#[derive(Debug, Default)]
struct Passwords(Mutex<Vec<String>>);

impl Keychain for Passwords {
    fn name(&self) -> &'static str {
        "the test's passwords"
    }

    fn find<'a>(&'a self, registry: &'a str, _: &'a str) -> BoxFuture<'a, Result<Vec<Login>, String>> {
        self.0.lock().unwrap().push(registry.to_owned());
        let credentials = Credentials::Password { user: "for".to_owned(), password: Secret::new(registry) };
        std::future::ready(Ok(vec![Login { credentials, until: None, whole_registry: true }])).boxed()
    }
}

fn basic(user: &str, password: &str) -> String {
    use base64::Engine as _;
    format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}")))
}

fn secrets(server: &Server) -> Vec<String> {
    server.requests().iter().filter_map(|request| request.header("authorization").map(str::to_owned)).collect()
}

#[tokio::test]
async fn every_host_gets_its_own_credentials() {
    let wants = |request: &Recorded| match request.header("authorization") {
        None => reply(401).header("www-authenticate", "Basic realm=\"x\""),
        Some(_) => reply(404),
    };
    let (mirror, origin) = (Server::start(wants).await, Server::start(wants).await);
    let passwords = Arc::new(Passwords::default());
    let credentials = CredentialSource::Keychain(Arc::clone(&passwords) as Arc<dyn Keychain>);
    let before = || vec![host(&mirror.address, HostRules::default())];
    let repository = mirrored(&origin.address, before(), ClientOptions { credentials, ..options() });
    assert_eq!(repository.manifest(&tag()).await, Ok(None));
    assert_eq!(secrets(&mirror), [basic("for", &mirror.address)]);
    assert_eq!(secrets(&origin), [basic("for", &origin.address)]);
    assert_eq!(*passwords.0.lock().unwrap(), [mirror.address.clone(), origin.address.clone()]);

    // A password that was given on the spot is for the registry that was named.
    let repository = mirrored(&origin.address, before(), with_password());
    assert_eq!(repository.manifest(&tag()).await, Ok(None));
    assert_eq!(secrets(&mirror).len(), 1);
    assert_eq!(secrets(&origin)[1..], [basic("me", "hunter2")]);
}

/// Wants a token of its own.
async fn with_tokens(token: &'static str) -> Server {
    Server::start(move |request| {
        if request.target.starts_with("/token") {
            return reply(200).body(json!({ "token": token }).to_string());
        }
        if request.header("authorization") == Some(&format!("Bearer {token}")) {
            return reply(404);
        }
        let realm = format!("http://{}/token", request.header("host").unwrap());
        reply(401).header("www-authenticate", format!("Bearer realm=\"{realm}\",service=\"s\""))
    })
    .await
}

#[tokio::test]
async fn every_host_has_its_own_tokens() {
    let (mirror, origin) = (with_tokens("one").await, with_tokens("two").await);
    let repository = behind(&mirror, &origin);
    for _ in 0..2 {
        assert_eq!(repository.manifest(&tag()).await, Ok(None));
    }
    assert_eq!(secrets(&mirror), ["Bearer one"; 2]);
    assert_eq!(secrets(&origin), ["Bearer two"; 2]);
}

#[tokio::test]
async fn headers_stay_with_their_host() {
    let storage = Server::start(all).await;
    let target = storage.url("/blob");
    let mirror = Server::start(move |request| match request.target.contains("/blobs/") {
        true => reply(307).header("location", target.clone()),
        false => reply(404),
    })
    .await;
    let origin = Server::start(all).await;
    let root = tempfile::tempdir().unwrap();
    let text = format!(
        "[host.'http://{}/prefix']\noverride_path = true\n[host.'http://{}/prefix'.header]\nx-secret = ['a', 'b']\nrange = 'no'\n",
        mirror.address, mirror.address
    );
    let repository = by_file(&origin.address, &text, root.path(), options());
    assert_eq!(repository.blob(blob(), 4000).read_bytes(0..10).await.unwrap(), content()[..10]);
    repository.manifest(&tag()).await.unwrap().unwrap();
    let asked = mirror.requests();
    assert!(asked[0].target.starts_with("/prefix/p/r/blobs/sha256:"), "{}", asked[0].target);
    assert_eq!((asked[0].header("x-secret"), asked[1].header("x-secret")), (Some("a"), Some("a")));
    // What we say ourselves is not overwritten.
    assert_eq!(asked[0].header("range"), Some("bytes=0-9"));
    for other in [&storage, &origin] {
        assert_eq!(other.requests().len(), 1);
        assert_eq!(other.requests()[0].header("x-secret"), None);
    }
}
