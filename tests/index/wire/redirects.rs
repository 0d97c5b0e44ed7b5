//! Blobs on storage elsewhere, behind signed URLs that expire.

use std::time::Duration;

use soci_index::format::digest::Digest;
use soci_index::registry::{ClientOptions, RegistryError, RequestHeaders};

use crate::wire::server::{BASIC, Recorded, Reply, Server, options, reply, with_password};

fn part(request: &Recorded) -> Reply {
    let (first, last) = request.range(100);
    reply(206).header("content-range", format!("bytes {first}-{last}/100")).body(&[7; 100][first..=last])
}

/// A registry that wants Basic and sends every client to `storage` with a new signature each time.
async fn registry(storage: &Server) -> Server {
    let target = storage.url("/blob");
    let mut signature = 0;
    Server::start(move |request| {
        if request.header("authorization") != Some(BASIC) {
            return reply(401).header("www-authenticate", "Basic realm=\"x\"");
        }
        signature += 1;
        reply(307).header("location", format!("{target}?signature=secret{signature}")).header("set-cookie", "a=b")
    })
    .await
}

#[tokio::test]
async fn the_target_is_kept_and_gets_no_credentials() {
    let storage = Server::start(part).await;
    let registry = registry(&storage).await;
    let reader = registry.repository_with(with_password()).blob(Digest::of(b""), 100);
    for start in 0..3 {
        assert_eq!(reader.read_bytes(start..start + 10).await.unwrap(), [7; 10][..]);
    }
    storage.assert_no_credentials();
    // Once without and once with the password; then the storage is asked directly.
    assert_eq!(registry.requests().len(), 2);
    assert_eq!(storage.lines(), ["GET /blob?signature=secret1"; 3]);
    assert_eq!(storage.requests()[2].header("range"), Some("bytes=2-11"));
}

#[tokio::test]
async fn headers_of_a_client_are_for_the_registry() {
    let storage = Server::start(part).await;
    let registry = registry(&storage).await;
    let headers = [("X-Request-Id".to_owned(), "7".to_owned())].into();
    let repository = registry.repository_with(with_password()).with_headers(RequestHeaders::new(headers).unwrap());
    assert_eq!(repository.blob(Digest::of(b""), 100).read_bytes(0..10).await.unwrap(), [7; 10][..]);
    let asked: Vec<_> =
        registry.requests().iter().map(|asked| asked.header("x-request-id").map(str::to_owned)).collect();
    assert_eq!(asked, [Some("7".to_owned()), Some("7".to_owned())]);
    assert_eq!(storage.requests()[0].header("x-request-id"), None);
}

#[tokio::test]
async fn an_expired_target_is_renewed() {
    for refusal in [
        reply(403).body("<Error><Code>AccessDenied</Code></Error>"),
        reply(401),
        reply(400).body("<Error><Code>ExpiredToken</Code></Error>"),
    ] {
        let storage = Server::start(move |request| {
            // The first signature lives for one request.
            let expired = request.target.ends_with("secret1") && request.header("range") != Some("bytes=0-9");
            if expired { refusal.clone() } else { part(request) }
        })
        .await;
        let registry = registry(&storage).await;
        let reader = registry.repository_with(with_password()).blob(Digest::of(b""), 100);
        for start in [0, 10, 20] {
            assert_eq!(reader.read_bytes(start..start + 10).await.unwrap(), [7; 10][..]);
        }
        storage.assert_no_credentials();
        let signatures: Vec<_> = storage.lines().iter().map(|line| line[line.len() - 1..].to_owned()).collect();
        assert_eq!(signatures, ["1", "1", "2", "2"]);
    }
}

#[tokio::test]
async fn a_target_that_stays_refused_is_an_error_without_its_query() {
    let storage = Server::start(|_| reply(403).body("<Error><Code>AccessDenied</Code></Error>")).await;
    let registry = registry(&storage).await;
    let error =
        registry.repository_with(with_password()).blob(Digest::of(b""), 100).read_bytes(0..9).await.unwrap_err();
    assert!(matches!(error, RegistryError::Status { status: 403, .. }), "{error:?}");
    assert!(!format!("{error} {error:?}").contains("secret"), "{error:?}");
    assert_eq!(storage.requests().len(), 2);
}

#[tokio::test]
async fn the_life_of_a_target_ends() {
    let storage = Server::start(part).await;
    let registry = registry(&storage).await;
    let options = ClientOptions { redirect_life: Duration::ZERO, ..with_password() };
    let reader = registry.repository_with(options).blob(Digest::of(b""), 100);
    reader.read_bytes(0..10).await.unwrap();
    reader.read_bytes(0..10).await.unwrap();
    assert_eq!(registry.requests().len(), 3);
}

#[tokio::test]
async fn back_home_is_not_home() {
    let storage = Server::start(|request| {
        let back = request.target.split_once("back=").unwrap().1.to_owned();
        reply(302).header("location", format!("http://{back}/v2/p/r/blobs/stolen"))
    })
    .await;
    let target = storage.url("/blob");
    let registry = Server::start(move |request| match (request.header("authorization"), request.target.as_str()) {
        (_, "/v2/p/r/blobs/stolen") => reply(200).body([7; 100]),
        (Some(BASIC), _) => reply(307).header("location", format!("{target}?back={}", request.header("host").unwrap())),
        _ => reply(401).header("www-authenticate", "Basic realm=\"x\""),
    })
    .await;
    registry.repository_with(with_password()).blob(Digest::of(b""), 100).read_bytes(0..10).await.unwrap();
    let last = registry.requests().pop().unwrap();
    assert_eq!((last.target.as_str(), last.header("authorization")), ("/v2/p/r/blobs/stolen", None));
}

#[tokio::test]
async fn refused_redirects() {
    for location in ["", "http://169.254.169.254/latest/meta-data", "http://u:p@127.0.0.1/x", "file:///etc/passwd"] {
        let mut answer = reply(307);
        if !location.is_empty() {
            answer = answer.header("location", format!("{location}?secret"));
        }
        let server = Server::queue([answer]).await;
        let error = server.repository().blob(Digest::of(b""), 100).read_bytes(0..10).await.unwrap_err();
        assert!(matches!(error, RegistryError::Redirect { .. }), "{error:?}");
        assert!(!error.to_string().contains("secret"));
    }
    let server = Server::start(|request| reply(302).header("location", request.target.clone() + "/x")).await;
    let error = server.repository().blob(Digest::of(b""), 100).read_bytes(0..10).await.unwrap_err();
    assert!(error.to_string().contains("too many"), "{error}");
}

#[tokio::test]
async fn storage_that_dies_is_asked_for_again() {
    let storage = Server::start(part).await;
    let dead = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let (mut count, living) = (0, storage.address.clone());
    let registry = Server::start(move |_| {
        count += 1;
        let host = if count == 1 { &dead } else { &living };
        reply(307).header("location", format!("http://{host}/blob"))
    })
    .await;
    let reader = registry.repository_with(options()).blob(Digest::of(b""), 100);
    assert_eq!(reader.read_bytes(0..10).await.unwrap(), [7; 10][..]);
}
