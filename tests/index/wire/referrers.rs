//! The referrers API, and what is not the referrers API.

use serde_json::{Value, json};
use soci_index::format::digest::Digest;
use soci_index::format::model::media_type;
use soci_index::registry::RegistryError;
use soci_index::registry::referrers::{ApiAnswer, FoundBy};

use crate::wire::server::{Reply, Server, reply, with_password};

const KIND: &str = "application/vnd.amazon.soci.index.v1+json";

fn entry(content: &str, kind: Option<&str>) -> Value {
    json!({"mediaType": media_type::MANIFEST, "digest": Digest::of(content.as_bytes()), "size": content.len(), "artifactType": kind})
}

fn index(entries: &[Value]) -> Reply {
    let body = json!({"schemaVersion": 2, "mediaType": media_type::INDEX, "manifests": entries}).to_string();
    reply(200).header("content-type", media_type::INDEX).body(body)
}

#[tokio::test]
async fn filtered_here_as_well() {
    let server = Server::queue([index(&[entry("a", Some(KIND)), entry("b", Some("other")), entry("c", None)])]).await;
    let subject = Digest::of(b"subject");
    let found = server.repository().referrers(&subject, Some(KIND)).await.unwrap();
    assert_eq!(found.found_by, FoundBy::Api);
    let digests: Vec<_> = found.entries.iter().map(|entry| entry.digest).collect();
    assert_eq!(digests, [Digest::of(b"a"), Digest::of(b"c")]);
    let expected =
        format!("GET /v2/p/r/referrers/{subject}?artifactType=application%2Fvnd.amazon.soci.index.v1%2Bjson");
    assert_eq!(server.lines(), [expected]);
}

#[tokio::test]
async fn pages() {
    let server = Server::queue([
        index(&[entry("a", None)]).header("link", "</v2/p/r/referrers/x?page=2&x=a,b>; rel=\"next\""),
        index(&[]).header("link", "<?page=3>; rel=next"),
        index(&[entry("b", None)]),
    ])
    .await;
    let found = server.repository().referrers(&Digest::of(b""), None).await.unwrap();
    assert_eq!(found.entries.len(), 2);
    assert_eq!(server.lines()[1..], ["GET /v2/p/r/referrers/x?page=2&x=a,b", "GET /v2/p/r/referrers/x?page=3"]);
}

#[tokio::test]
async fn a_cut_page_is_asked_for_again() {
    let server = Server::queue([index(&[entry("a", None)]).cut(20), index(&[entry("a", None)])]).await;
    let found = server.repository().referrers(&Digest::of(b""), None).await.unwrap();
    assert_eq!((found.entries.len(), server.requests().len()), (1, 2));
}

#[tokio::test]
async fn pages_elsewhere_are_not_asked() {
    let other = Server::start(|_| index(&[])).await;
    let server = Server::queue([index(&[]).header("link", format!("<{}>; rel=\"next\"", other.url("/x")))]).await;
    let error = server.repository_with(with_password()).referrers(&Digest::of(b""), None).await.unwrap_err();
    assert!(matches!(error, RegistryError::Malformed { .. }) && error.to_string().contains("another origin"));
    assert_eq!(other.requests().len(), 0);
}

#[tokio::test]
async fn pages_without_end() {
    let server = Server::start(|_| index(&[]).header("link", "</v2/p/r/referrers/x>; rel=\"next\"")).await;
    let error = server.repository().referrers(&Digest::of(b""), None).await.unwrap_err();
    assert!(error.to_string().contains("pages"), "{error}");
    let broken = index(&[]).header("link", "</x>; rel=\"next\"");
    let server = Server::queue([broken, reply(200).header("content-type", "text/html")]).await;
    let error = server.repository().referrers(&Digest::of(b""), None).await.unwrap_err();
    assert!(error.to_string().contains("page 2"), "{error}");
}

#[tokio::test]
async fn not_the_api() {
    let other = Server::start(|_| index(&[])).await;
    for (answer, reason) in [
        (reply(200).header("content-type", "text/html; charset=utf-8").body("<html>log in</html>"), "text/html"),
        (reply(200).header("content-type", "application/json").body("{}"), "application/json"),
        (reply(200).header("content-type", media_type::INDEX).body("<html>"), "no image index"),
        (reply(200).body("{}"), "\"\""),
        (reply(404).body("404 page not found"), "404"),
        (reply(404).body(r#"{"errors":[{"code":"MANIFEST_UNKNOWN"}]}"#), "404"),
        (reply(405), "405"),
        (reply(400), "400"),
        (reply(501), "501"),
        (reply(302).header("location", other.url("/login")), "another site"),
        (reply(302).header("location", "ftp://x/"), "redirect"),
    ] {
        let server = Server::queue([answer.clone(), answer, reply(404)]).await;
        let repository = server.repository();
        match repository.referrers_api(&Digest::of(b""), None).await.unwrap() {
            ApiAnswer::Unsupported(found) => assert!(found.to_string().contains(reason), "{found}"),
            listed => panic!("{reason}: {listed:?}"),
        }
        // Nor is there a fallback tag.
        let found = repository.referrers(&Digest::of(b""), None).await.unwrap();
        assert!(matches!(found.found_by, FoundBy::Nothing(_)) && found.entries.is_empty());
        assert_eq!(server.lines()[2], format!("GET /v2/p/r/manifests/sha256-{}", Digest::of(b"").hex()));
    }
}

#[tokio::test]
async fn an_unknown_name_is_empty() {
    let server = Server::queue([reply(404).body(r#"{"errors":[{"code":"NAME_UNKNOWN","message":"no"}]}"#)]).await;
    let found = server.repository().referrers(&Digest::of(b""), None).await.unwrap();
    assert_eq!((found.entries.len(), found.found_by), (0, FoundBy::Api));
}

#[tokio::test]
async fn no_access_is_not_no_api() {
    for status in [401, 403] {
        let server = Server::start(move |_| reply(status)).await;
        let result = server.repository().referrers(&Digest::of(b""), None).await;
        assert!(matches!(result, Err(RegistryError::NoReferrers { is_refusal: true, .. })));
        // The fallback tag might have listed something.
        assert_eq!(server.requests().len(), 2);
    }
}

#[tokio::test]
async fn a_fallback_tag_is_read() {
    let server = Server::queue([reply(404), index(&[entry("a", Some(KIND)), entry("b", Some("x"))])]).await;
    let found = server.repository().referrers(&Digest::of(b"s"), Some(KIND)).await.unwrap();
    assert_eq!((found.entries.len(), found.found_by), (1, FoundBy::FallbackTag));
}

#[tokio::test]
async fn a_foreign_tag_lists_nothing() {
    let manifest = r#"{"schemaVersion":2,"config":{},"layers":[]}"#;
    let foreign = reply(200).header("content-type", media_type::MANIFEST).body(manifest);
    let server = Server::queue([reply(404), foreign]).await;
    let found = server.repository().referrers(&Digest::of(b"s"), None).await.unwrap();
    assert!(matches!(found.found_by, FoundBy::Nothing(reason) if reason.contains("not an image index")));
}
