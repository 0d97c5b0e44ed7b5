//! Manifests read and written.

use soci_index::format::digest::Digest;
use soci_index::format::model::media_type;
use soci_index::format::reference::ManifestName;
use soci_index::registry::RegistryError;

use crate::wire::server::{Server, reply};

const BODY: &str = r#"{ "schemaVersion":2, "config":{},"layers":[]  }"#;

fn tag() -> ManifestName {
    ManifestName::Tag("t".into())
}

#[tokio::test]
async fn bytes_are_kept_as_they_are() {
    let server = Server::start(|_| reply(200).header("content-type", media_type::DOCKER_MANIFEST).body(BODY)).await;
    let digest = Digest::of(BODY.as_bytes());
    for name in [tag(), ManifestName::Digest(digest)] {
        let raw = server.repository().manifest(&name).await.unwrap().unwrap();
        assert_eq!((raw.digest, &*raw.bytes), (digest, BODY.as_bytes()));
        assert_eq!(raw.media_type, media_type::DOCKER_MANIFEST);
    }
    let request = &server.requests()[1];
    assert_eq!(request.target, format!("/v2/p/r/manifests/{digest}"));
    let accept = request.header("accept").unwrap();
    for kind in [media_type::MANIFEST, media_type::INDEX, media_type::DOCKER_MANIFEST, media_type::DOCKER_LIST] {
        assert!(accept.contains(kind));
    }
}

#[tokio::test]
async fn wrong_manifests() {
    let server = Server::start(|_| reply(200).body(BODY)).await;
    let name = ManifestName::Digest(Digest::of(b"other"));
    let error = server.repository().manifest(&name).await.unwrap_err();
    assert!(matches!(error, RegistryError::Digest { .. }), "{error:?}");
    let lie = Digest::of(b"other").to_string();
    let server = Server::queue([reply(200).header("docker-content-digest", lie).body(BODY)]).await;
    let error = server.repository().manifest(&tag()).await.unwrap_err();
    assert!(matches!(error, RegistryError::Digest { .. }), "{error:?}");
    let server = Server::queue([reply(200).body("<html>")]).await;
    let error = server.repository().manifest(&tag()).await.unwrap_err();
    assert!(matches!(error, RegistryError::Malformed { .. }), "{error:?}");
}

#[tokio::test]
async fn absence_is_a_value() {
    for body in ["", "<html>", r#"{"errors":[{"code":"MANIFEST_UNKNOWN"}]}"#] {
        let server = Server::queue([reply(404).body(body)]).await;
        assert_eq!(server.repository().manifest(&tag()).await, Ok(None));
    }
}

#[tokio::test]
async fn huge_manifests_are_refused_before_they_are_read() {
    let server = Server::queue([
        reply(200).header("content-length", "1000000000000").stall(0),
        reply(200).header("transfer-encoding", "chunked").body(endless()),
    ])
    .await;
    for _ in 0..2 {
        let error = server.repository().manifest(&tag()).await.unwrap_err();
        assert!(matches!(error, RegistryError::TooLarge { limit: 4_194_304, .. }), "{error:?}");
    }
}

/// Five megabytes in chunks of a mebibyte, and no end.
fn endless() -> Vec<u8> {
    [b"100000\r\n".to_vec(), vec![b' '; 1 << 20], b"\r\n".to_vec()].concat().repeat(5)
}

#[tokio::test]
async fn a_cut_manifest_is_asked_for_again() {
    let server = Server::queue([reply(200).body(BODY).cut(10), reply(200).body(BODY)]).await;
    assert!(server.repository().manifest(&tag()).await.unwrap().is_some());
}

#[tokio::test]
async fn policies_are_explained() {
    let body = r#"{"errors":[{"code":"PROJECTPOLICYVIOLATION","message":"not signed"}]}"#;
    let server = Server::queue([reply(412).body(body)]).await;
    let text = server.repository().manifest(&tag()).await.unwrap_err().to_string();
    assert!(text.contains("PROJECTPOLICYVIOLATION: not signed") && text.contains("policy") && !text.contains('\n'));
    let server = Server::queue([reply(412).stall(0).header("content-length", "5")]).await;
    assert!(server.repository().manifest(&tag()).await.unwrap_err().to_string().contains("HTTP 412"));
}

#[tokio::test]
async fn a_push_without_location() {
    let digest = Digest::of(BODY.as_bytes());
    let subject = Digest::of(b"subject");
    let server = Server::queue([reply(201), reply(201).header("OCI-Subject", subject.to_string())]).await;
    for expected in [None, Some(subject)] {
        let pushed =
            server.repository().push_manifest(&ManifestName::Digest(digest), media_type::MANIFEST, BODY.into()).await;
        let pushed = pushed.unwrap();
        assert_eq!((pushed.digest, pushed.subject), (digest, expected));
    }
    let request = &server.requests()[0];
    assert_eq!(request.line(), format!("PUT /v2/p/r/manifests/{digest}"));
    assert_eq!(request.header("content-type"), Some(media_type::MANIFEST));
    assert_eq!(request.body, BODY.as_bytes());
}

#[tokio::test]
async fn a_push_that_goes_wrong() {
    let server = Server::queue([
        reply(400).body(r#"{"errors":[{"code":"MANIFEST_BLOB_UNKNOWN","message":"blob unknown"}]}"#),
        reply(201).header("docker-content-digest", Digest::of(b"other").to_string()),
    ])
    .await;
    let push = || async { server.repository().push_manifest(&tag(), media_type::MANIFEST, BODY.into()).await };
    assert!(push().await.unwrap_err().to_string().contains("HTTP 400 MANIFEST_BLOB_UNKNOWN: blob unknown"));
    assert!(matches!(push().await.unwrap_err(), RegistryError::Digest { .. }));
    let name = ManifestName::Digest(Digest::of(b"other"));
    let error = server.repository().push_manifest(&name, media_type::MANIFEST, BODY.into()).await.unwrap_err();
    assert!(matches!(error, RegistryError::Digest { .. }));
    assert_eq!(server.requests().len(), 2);
}

#[tokio::test]
async fn tags_stay_in_their_place() {
    let server = Server::queue([]).await;
    for tag in ["", "../../x", "a/b", "a?b", ".a", &"a".repeat(129)] {
        let error = server.repository().manifest(&ManifestName::Tag(tag.into())).await.unwrap_err();
        assert!(matches!(error, RegistryError::Malformed { .. }), "{tag}");
    }
    assert!(server.requests().is_empty());
}
