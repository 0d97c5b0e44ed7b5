//! Mirrors and bans out of `registries.conf`.

use soci_index::format::digest::Digest;
use soci_index::registry::hosts::HostSource;
use soci_index::registry::upload::PushedBlob;
use soci_index::registry::{Body, ClientOptions, Registry, RegistryError};

use super::tag;
use crate::wire::server::{Server, options, reply};

const MANIFEST: &str = r#"{"schemaVersion":2,"config":{},"layers":[]}"#;

fn registry(name: &str, text: &str) -> Result<Registry, RegistryError> {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    let hosts = HostSource { registries_conf: vec![file.path().to_owned()], ..HostSource::default() };
    Registry::new(name, ClientOptions { hosts, ..options() })
}

/// A proxy with a project in front of the names: its token is for the name there, and no other name is sent.
#[tokio::test]
async fn names_are_rewritten_in_scopes_too() {
    let mirror = Server::start(|request| {
        if request.target.starts_with("/token") {
            return reply(200).body(r#"{"token":"abc"}"#);
        }
        match request.header("authorization") {
            Some("Bearer abc") => reply(200).body(MANIFEST),
            _ => {
                let realm = format!("http://{}/token", request.header("host").unwrap());
                reply(401).header("www-authenticate", format!("Bearer realm=\"{realm}\",service=\"harbor-registry\""))
            }
        }
    })
    .await;
    let text = format!(
        "[[registry]]\nprefix = 'r.invalid'\n[[registry.mirror]]\nlocation = '{}/proxy/r'\ninsecure = true\n",
        mirror.address
    );
    let repository = registry("r.invalid", &text).unwrap().repository("p/r");
    repository.manifest(&tag()).await.unwrap().unwrap();
    let manifest = "GET /v2/proxy/r/p/r/manifests/t";
    let token = "GET /token?service=harbor-registry&scope=repository%3Aproxy%2Fr%2Fp%2Fr%3Apull";
    assert_eq!(mirror.lines(), [manifest, token, manifest]);
}

/// What moved is read and written there, under its name there, mounts included.
#[tokio::test]
async fn another_place_stands_in_for_a_registry() {
    let place = Server::start(|request| match request.method.as_str() {
        "HEAD" => reply(404),
        _ => reply(201),
    })
    .await;
    let text = format!("[[registry]]\nprefix = 'r.invalid/p'\nlocation = '{}/new'\n", place.address);
    let repository = registry("r.invalid", &text).unwrap().repository("p/r");
    let digest = Digest::of(b"x");
    let pushed = repository.push_blob(&digest, Body::Bytes("x".into()), Some("p/base")).await;
    assert_eq!(pushed, Ok(PushedBlob::Mounted));
    let hex = digest.to_string().replace(':', "%3A");
    assert_eq!(place.lines()[1], format!("POST /v2/new/r/blobs/uploads/?mount={hex}&from=new%2Fbase"));
}

#[tokio::test]
async fn bans_are_kept() {
    let server = Server::start(|_| reply(404)).await;
    let text = format!("[[registry]]\nprefix = '{}/p'\nblocked = true\n", server.address);
    let registry = registry(&server.address, &text).unwrap();
    let banned = registry.repository("p/r");
    for error in [
        banned.manifest(&tag()).await.unwrap_err(),
        banned.push_blob(&Digest::of(b"x"), Body::Empty, None).await.unwrap_err(),
    ] {
        let shown = error.to_string();
        assert!(matches!(error, RegistryError::Setup { .. }) && shown.contains("blocks p/r"), "{shown}");
    }
    assert_eq!(server.lines(), [""; 0]);
    assert_eq!(registry.repository("q/r").manifest(&tag()).await, Ok(None));
}

#[tokio::test]
async fn a_file_with_mistakes_is_no_empty_file() {
    let error = registry("r.invalid", "[[registry]]\nblocked = 'yes'\n").unwrap_err().to_string();
    assert!(error.contains(":2: blocked: expected true or false"), "{error}");
}
