//! Blobs written.

use std::sync::Arc;

use bytes::Bytes;
use soci_index::format::digest::Digest;
use soci_index::registry::upload::PushedBlob;
use soci_index::registry::{Body, Chunks, RegistryError};

use crate::wire::server::{BASIC, Server, reply, with_password};

const DIGEST: &str = "sha256:2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";

fn hello() -> (Digest, Body) {
    (DIGEST.parse().unwrap(), Body::Bytes("hello".into()))
}

#[tokio::test]
async fn present_blobs_are_not_sent() {
    let server = Server::queue([reply(200)]).await;
    let (digest, body) = hello();
    assert_eq!(server.repository().push_blob(&digest, body, None).await, Ok(PushedBlob::Present));
    assert_eq!(server.lines(), [format!("HEAD /v2/p/r/blobs/{DIGEST}")]);
}

#[tokio::test]
async fn locations() {
    // A relative one, an absolute one, and with a query that must survive as it is.
    for (location, expected) in [
        ("/v2/p/r/blobs/uploads/1", format!("/v2/p/r/blobs/uploads/1?digest={DIGEST}")),
        ("HERE/upload?_state=a%2Bb+c==&x", format!("/upload?_state=a%2Bb+c==&x&digest={DIGEST}")),
        ("2", format!("/v2/p/r/blobs/uploads/2?digest={DIGEST}")),
    ] {
        let server = Server::start(move |request| match request.method.as_str() {
            "HEAD" => reply(404),
            "POST" => {
                let here = format!("http://{}", request.header("host").unwrap());
                reply(202).header("location", location.replace("HERE", &here))
            }
            _ => reply(201),
        })
        .await;
        let (digest, body) = hello();
        assert_eq!(server.repository().push_blob(&digest, body, None).await, Ok(PushedBlob::Uploaded));
        let put = server.requests().pop().unwrap();
        assert_eq!(put.line(), format!("PUT {expected}"));
        assert_eq!(put.header("content-type"), Some("application/octet-stream"));
        assert_eq!(put.body, b"hello");
        assert_eq!(server.requests()[1].line(), "POST /v2/p/r/blobs/uploads/");
        assert_eq!(server.requests()[1].header("content-length"), Some("0"));
    }
}

#[tokio::test]
async fn an_upload_elsewhere_gets_no_credentials() {
    let storage = Server::queue([reply(201)]).await;
    let target = storage.url("/bucket?sig=1");
    let server = Server::start(move |request| match (request.header("authorization"), request.method.as_str()) {
        (None, _) => reply(401).header("www-authenticate", "Basic realm=\"x\""),
        (Some(_), "HEAD") => reply(404),
        (Some(_), _) => reply(202).header("location", target.clone()),
    })
    .await;
    let (digest, body) = hello();
    server.repository_with(with_password()).push_blob(&digest, body, None).await.unwrap();
    storage.assert_no_credentials();
    assert_eq!(storage.lines(), [format!("PUT /bucket?sig=1&digest={DIGEST}")]);
    assert_eq!(server.requests().last().unwrap().header("authorization"), Some(BASIC));
}

#[tokio::test]
async fn bad_locations() {
    for answer in [reply(202), reply(202).header("location", "http://169.254.169.254/x?secret")] {
        let server = Server::queue([reply(404), answer]).await;
        let (digest, body) = hello();
        let error = server.repository().push_blob(&digest, body, None).await.unwrap_err();
        assert!(matches!(error, RegistryError::Malformed { .. }) && !error.to_string().contains("secret"), "{error:?}");
    }
}

#[tokio::test]
async fn a_broken_upload_starts_again() {
    let mut posts = 0;
    let server = Server::start(move |request| match request.method.as_str() {
        "HEAD" => reply(404),
        "POST" => {
            posts += 1;
            reply(202).header("location", format!("/up/{posts}"))
        }
        _ if request.target.starts_with("/up/1?") => reply(201).hang_up(),
        _ if request.target.starts_with("/up/2?") => reply(503),
        _ => reply(201),
    })
    .await;
    let (digest, _) = hello();
    let open = Arc::new(|| {
        let chunks: Chunks =
            Box::pin(futures_util::stream::iter(["he", "l", "lo"].map(|chunk| Ok(Bytes::from(chunk)))));
        chunks
    });
    let repository = server.repository();
    let pushed = repository.push_blob(&digest, Body::Chunks { length: 5, open }, None).await;
    assert_eq!(pushed, Ok(PushedBlob::Uploaded));
    let puts: Vec<_> = server.requests().into_iter().filter(|request| request.method == "PUT").collect();
    assert!(puts.iter().all(|put| put.body == b"hello" && put.header("content-length") == Some("5")));
    assert!(puts.len() == 3);
    assert!(repository.registry().traffic().bytes_sent >= 10);
}

#[tokio::test]
async fn a_failing_source_is_named() {
    let server = Server::start(|request| match request.method.as_str() {
        "HEAD" => reply(404),
        _ => reply(202).header("location", "/up"),
    })
    .await;
    let (digest, _) = hello();
    let open = Arc::new(|| {
        let chunks: Chunks = Box::pin(futures_util::stream::iter([Err(std::io::Error::other("disk on fire"))]));
        chunks
    });
    let error = server.repository().push_blob(&digest, Body::Chunks { length: 5, open }, None).await.unwrap_err();
    assert!(matches!(&error, RegistryError::Source { reason, .. } if reason == "disk on fire"), "{error:?}");
}

#[tokio::test]
async fn accepted_is_not_yet_stored() {
    let accepted = || [reply(404), reply(202).header("location", "/up"), reply(202)];
    let (digest, body) = hello();
    let server = Server::queue(accepted().into_iter().chain([reply(200)])).await;
    assert_eq!(server.repository().push_blob(&digest, body.clone(), None).await, Ok(PushedBlob::Uploaded));
    let server = Server::queue(accepted().into_iter().chain([reply(404)])).await;
    let error = server.repository().push_blob(&digest, body, None).await.unwrap_err();
    assert!(matches!(error, RegistryError::Status { status: 202, .. }), "{error:?}");
}

#[tokio::test]
async fn mounts() {
    for (answers, expected) in [
        (vec![reply(404), reply(201)], PushedBlob::Mounted),
        (vec![reply(404), reply(202).header("location", "/up"), reply(201)], PushedBlob::Uploaded),
    ] {
        let server = Server::queue(answers).await;
        let (digest, body) = hello();
        assert_eq!(server.repository().push_blob(&digest, body, Some("other/repo")).await, Ok(expected));
        let hex = DIGEST.replace(':', "%3A");
        assert_eq!(server.lines()[1], format!("POST /v2/p/r/blobs/uploads/?mount={hex}&from=other%2Frepo"));
    }
}

#[tokio::test]
async fn refusals_are_final_and_say_what_to_do() {
    let answer = |status: u16, code: &str, message: &str| {
        reply(status).body(format!(r#"{{"errors":[{{"code":"{code}","message":"{message}"}}]}}"#))
    };
    for (refusal, expected) in [
        (answer(403, "DENIED", "can not push artifact to a proxy project: p"), &["proxy project: p", "--to"][..]),
        (
            answer(403, "DENIED", "adding 5 bytes of storage exceeds the quota"),
            &["exceeds the quota", "raise its quota"],
        ),
        (answer(404, "NOT_FOUND", "project p not found"), &["project p not found", "create the project"]),
        (answer(412, "PRECONDITION", "configured as immutable"), &["HTTP 412", "immutable tag"]),
        (reply(413).body("<html><h1>413 Request Entity Too Large</h1></html>"), &["HTTP 413", "larger than"]),
        (reply(400), &["HTTP 400"]),
    ] {
        let server = Server::queue([reply(404), refusal]).await;
        let (digest, hello) = hello();
        let error = server.repository().push_blob(&digest, hello, None).await.unwrap_err().to_string();
        assert!(expected.iter().all(|part| error.contains(part)) && !error.contains('<'), "{error}");
        assert_eq!(server.requests().len(), 2);
    }
}

#[tokio::test]
async fn a_source_that_may_not_be_read_is_no_obstacle() {
    let refusals = [
        reply(401),
        reply(401).header("www-authenticate", "Basic realm=\"harbor\""),
        reply(403).body(r#"{"errors":[{"code":"DENIED","message":"requested access to the resource is denied"}]}"#),
        reply(404).body(r#"{"errors":[{"code":"NAME_UNKNOWN","message":"other/repo"}]}"#),
        reply(405),
    ];
    for refusal in refusals {
        let server = Server::start(move |request| match request.method.as_str() {
            "HEAD" => reply(404),
            "POST" if request.target.contains("mount=") => refusal.clone(),
            "POST" => reply(202).header("location", "/up"),
            _ => reply(201),
        })
        .await;
        let (digest, body) = hello();
        let pushed = server.repository_with(with_password()).push_blob(&digest, body, Some("other/repo")).await;
        assert_eq!(pushed, Ok(PushedBlob::Uploaded), "{:?}", server.lines());
        assert_eq!(server.requests().last().unwrap().body, b"hello");
    }
}

/// The token service gives no token for the source: the mount is not even asked for.
#[tokio::test]
async fn a_mount_asks_for_two_scopes() {
    for generous in [true, false] {
        let server = Server::start(move |request| {
            if request.target.starts_with("/token") {
                let both = request.target.contains("other%2Frepo%3Apull") && request.target.contains("pull%2Cpush");
                return if both && !generous { reply(403) } else { reply(200).body(r#"{"token":"abc"}"#) };
            }
            match (request.header("authorization"), request.method.as_str()) {
                (Some("Bearer abc"), "HEAD") => reply(404),
                (Some("Bearer abc"), "POST") if request.target.contains("mount=") => reply(201),
                (Some("Bearer abc"), "POST") => reply(202).header("location", "/up"),
                (Some("Bearer abc"), _) => reply(201),
                _ => {
                    let realm = format!("http://{}/token", request.header("host").unwrap());
                    reply(401).header("www-authenticate", format!("Bearer realm=\"{realm}\",service=\"s\""))
                }
            }
        })
        .await;
        let (digest, body) = hello();
        let pushed = server.repository().push_blob(&digest, body, Some("other/repo")).await;
        let expected = if generous { PushedBlob::Mounted } else { PushedBlob::Uploaded };
        assert_eq!(pushed, Ok(expected), "{:?}", server.lines());
    }
}

#[tokio::test]
async fn a_policy_on_reading_does_not_stop_a_push() {
    for status in [400, 404, 405, 412] {
        let server = Server::start(move |request| match request.method.as_str() {
            "HEAD" => reply(status),
            "POST" => reply(202).header("location", "/up"),
            _ => reply(201),
        })
        .await;
        let (digest, body) = hello();
        assert_eq!(server.repository().push_blob(&digest, body, None).await, Ok(PushedBlob::Uploaded), "{status}");
    }
}
