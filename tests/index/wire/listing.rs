//! Lists of referrers that are asked for early.

use std::time::Duration;

use serde_json::json;
use soci_index::find::discover::{Discovery, preferred_listed};
use soci_index::format::digest::Digest;
use soci_index::format::model::{Descriptor, media_type};
use soci_index::registry::referrers::{FoundBy, Listing};

use crate::wire::server::{Recorded, Reply, Server, reply};

const KIND: &str = "application/vnd.amazon.soci.index.v1+json";

fn image() -> Digest {
    Digest::of(b"the image")
}

fn manifest(name: &str) -> String {
    let subject = json!({"mediaType": media_type::MANIFEST, "digest": image(), "size": 9});
    let config = json!({"mediaType": KIND, "digest": Digest::of(b"{}"), "size": 2});
    json!({
        "schemaVersion": 2, "mediaType": media_type::MANIFEST, "artifactType": KIND, "config": config, "layers": [],
        "subject": subject, "annotations": {"name": name},
    })
    .to_string()
}

fn list(manifests: &[&str]) -> Reply {
    let entry = |text: &&str| {
        let digest = Digest::of(text.as_bytes());
        json!({"mediaType": media_type::MANIFEST, "digest": digest, "size": text.len(), "artifactType": KIND})
    };
    let entries: Vec<_> = manifests.iter().map(entry).collect();
    let body = json!({"schemaVersion": 2, "mediaType": media_type::INDEX, "manifests": entries}).to_string();
    reply(200).header("content-type", media_type::INDEX).body(body)
}

/// Answers by what is asked for: the API, the fallback tag, a manifest.
async fn registry(api: Reply, tag: Reply, manifests: [String; 2]) -> Server {
    Server::start(move |request: &Recorded| {
        let last = request.target.rsplit('/').next().unwrap_or_default();
        match manifests.iter().find(|text| Digest::of(text.as_bytes()).to_string() == last) {
            _ if request.target.contains("/referrers/") => api.clone(),
            _ if last.starts_with("sha256-") => tag.clone(),
            Some(text) => reply(200).header("content-type", media_type::MANIFEST).body(text),
            None => reply(404),
        }
    })
    .await
}

fn first(entries: &[Descriptor]) -> Vec<Digest> {
    entries.iter().take(1).map(|entry| entry.digest).collect()
}

#[tokio::test]
async fn everything_is_asked_once() {
    let manifests = ["one", "other"].map(manifest);
    let digests = [0, 1].map(|number: usize| Digest::of(manifests[number].as_bytes()));
    let tag = list(&[&manifests[0], &manifests[1]]);
    let server = registry(reply(404), tag, manifests.clone()).await;
    let listing = Listing::new(server.repository(), image(), first);
    let (asked, found) = tokio::join!(listing.ask(), listing.referrers(Some(KIND)));
    asked.unwrap();
    let found = found.unwrap();
    assert_eq!((found.entries.len(), found.found_by), (2, FoundBy::FallbackTag));
    assert!(listing.referrers(Some("another")).await.unwrap().entries.is_empty());
    let mut lines = server.lines();
    lines.sort();
    let expected = [
        format!("GET /v2/p/r/manifests/sha256-{}", image().hex()),
        format!("GET /v2/p/r/manifests/{}", digests[0]),
        format!("GET /v2/p/r/referrers/{}", image()),
    ];
    assert_eq!(lines, expected);
    // What was not chosen is fetched when it is wanted.
    for (number, requests) in [(0, 3), (1, 4)] {
        let raw = listing.manifest(digests[number]).await.unwrap().unwrap();
        assert_eq!((&*raw.bytes, server.requests().len()), (manifests[number].as_bytes(), requests));
    }
    assert!(listing.is_of(&image()) && !listing.is_of(&digests[0]));
}

/// Both lists are asked for before either has answered.
#[tokio::test]
async fn the_api_is_not_waited_for() {
    let server = registry(list(&[]).stall(0), list(&[]), ["a", "b"].map(manifest)).await;
    let listing = Listing::new(server.repository(), image(), first);
    assert!(tokio::time::timeout(Duration::from_millis(300), listing.ask()).await.is_err(), "the API never answers");
    let lines = server.lines();
    assert!(lines.iter().any(|line| line.contains("/manifests/sha256-")), "{lines:?}");
}

/// As in [`Repository::referrers`](soci_index::registry::Repository::referrers), the API goes first, whatever the tag
/// is.
#[tokio::test]
async fn the_api_decides() {
    let manifests = ["one", "other"].map(manifest);
    let foreign = reply(200).header("content-type", media_type::MANIFEST).body(&manifests[1]);
    for tag in [foreign, reply(403), list(&[&manifests[1]])] {
        let server = registry(list(&[&manifests[0]]), tag, manifests.clone()).await;
        let listing = Listing::new(server.repository(), image(), first);
        assert_eq!(listing.referrers(None).await.unwrap().found_by, FoundBy::Api);
        let Discovery::Found(found) = preferred_listed(&listing, &[KIND]).await.unwrap() else {
            panic!("nothing found")
        };
        assert_eq!(&*found.raw, manifests[0].as_bytes());
    }
}

#[tokio::test]
async fn a_failure_is_not_remembered() {
    let [text, _] = ["one", "other"].map(manifest);
    let (entries, mut refusals) = (list(&[&text]), 2);
    let server = Server::start(move |request: &Recorded| {
        refusals -= 1;
        match (refusals >= 0, request.target.contains("/referrers/")) {
            (true, _) => reply(403),
            (false, true) => entries.clone(),
            (false, false) => reply(404),
        }
    })
    .await;
    let listing = Listing::new(server.repository(), image(), first);
    assert!(listing.ask().await.is_err());
    // The manifest that was chosen is not there, which only a caller that wants it sees.
    listing.ask().await.unwrap();
    assert_eq!(listing.referrers(None).await.unwrap().entries.len(), 1);
    assert_eq!(listing.manifest(Digest::of(text.as_bytes())).await, Ok(None));
}

/// A registry that cannot list delays no caller twice: a failed request is the answer for all callers that waited for
/// it.
#[tokio::test]
async fn a_failure_is_shared_by_all_waiting_callers() {
    let server = Server::start(|_: &Recorded| reply(403)).await;
    let listing = Listing::new(server.repository(), image(), first);
    let (one, other, third) = tokio::join!(listing.ask(), listing.referrers(None), listing.referrers(Some(KIND)));
    let error = one.unwrap_err();
    assert_eq!((other.unwrap_err(), third.unwrap_err()), (error.clone(), error));
    assert_eq!(server.requests().len(), 2, "{:?}", server.lines());
    assert!(listing.ask().await.is_err());
    assert_eq!(server.requests().len(), 4);
}
