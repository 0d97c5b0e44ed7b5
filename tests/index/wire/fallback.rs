//! Pushing referrers: to registries that list them, and to those where the clients keep the list.

use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use soci_index::format::digest::Digest;
use soci_index::format::model::media_type;
use soci_index::registry::RegistryError;
use soci_index::registry::error::ForeignTag;
use soci_index::registry::referrers::{Blemish, FoundBy, Visibility};

use crate::wire::server::{Recorded, Reply, Server, reply};

const KIND: &str = "application/vnd.amazon.soci.index.v1+json";

fn subject() -> Digest {
    Digest::of(b"subject")
}

fn manifest() -> String {
    json!({
        "schemaVersion": 2,
        "mediaType": media_type::MANIFEST,
        "config": {"mediaType": KIND, "digest": Digest::of(b"{}"), "size": 2},
        "layers": [],
        "subject": {"mediaType": media_type::MANIFEST, "digest": subject(), "size": 7},
        "annotations": {"k": "v"},
    })
    .to_string()
}

fn index_reply(body: &str) -> Reply {
    reply(200).header("content-type", media_type::INDEX).body(body)
}

/// A registry without the API whose fallback tag holds `tag`; `disturb` sees every write and may change what is kept.
async fn without_api(
    tag: Option<String>,
    mut disturb: impl FnMut(String) -> String + Send + 'static,
) -> (Server, Arc<Mutex<Option<String>>>) {
    let kept = Arc::new(Mutex::new(tag));
    let shared = Arc::clone(&kept);
    let server = Server::start(move |request: &Recorded| {
        let mut kept = shared.lock().unwrap();
        let is_tag = request.target.contains("/manifests/sha256-");
        match (request.method.as_str(), is_tag) {
            ("PUT", true) => {
                assert_eq!(request.header("content-type"), Some(media_type::INDEX));
                *kept = Some(disturb(String::from_utf8(request.body.clone()).unwrap()));
                reply(201)
            }
            ("PUT", false) => reply(201),
            ("GET", true) => kept.as_deref().map_or_else(|| reply(404), index_reply),
            _ => reply(404),
        }
    })
    .await;
    (server, kept)
}

#[tokio::test]
async fn with_the_api() {
    let listed = json!({"manifests": [{
        "mediaType": media_type::MANIFEST, "digest": Digest::of(manifest().as_bytes()), "size": 1, "artifactType": KIND,
    }]})
    .to_string();
    let mut looks = 0;
    let server = Server::start(move |request| {
        if request.method == "PUT" {
            return reply(201).header("oci-subject", subject().to_string()).header("warning", "299 - \"soon full\"");
        }
        looks += 1;
        // The list lags behind.
        if looks < 3 { index_reply(r#"{"manifests":[]}"#) } else { index_reply(&listed) }
    })
    .await;
    let pushed = server.repository().push_referrer(media_type::MANIFEST, manifest().into()).await.unwrap();
    assert_eq!((pushed.found_by, pushed.tag_writes, pushed.entry.size), (FoundBy::Api, 0, 1));
    let size = Blemish::Size { listed: 1, pushed: manifest().len() as u64 };
    assert_eq!(pushed.visibility, Visibility::Partial(vec![size]));
}

/// What each way of listing means for clients: the query that the registry was asked last, and what was found.
#[tokio::test]
async fn who_will_see_it() {
    let (digest, size) = (Digest::of(manifest().as_bytes()), manifest().len() as u64);
    let entry = move |size: u64, kind: &str| {
        json!({"manifests": [{"mediaType": media_type::MANIFEST, "digest": digest, "size": size, "artifactType": kind}]})
            .to_string()
    };
    let blemish = |listed: &str| Blemish::ArtifactType { listed: listed.into(), pushed: KIND.into() };
    let json_type = Blemish::ContentType { found: "application/json".into() };
    let filter = Blemish::Filter { artifact_type: KIND.into() };
    for (content_type, filters, body, found_by, expected) in [
        (media_type::INDEX, false, entry(size, KIND), FoundBy::Api, vec![]),
        (media_type::INDEX, false, entry(size, ""), FoundBy::Api, vec![blemish("")]),
        (
            media_type::INDEX,
            false,
            entry(7, "x"),
            FoundBy::Api,
            vec![Blemish::Size { listed: 7, pushed: size }, blemish("x")],
        ),
        (media_type::INDEX, true, entry(size, KIND), FoundBy::Api, vec![filter]),
        ("application/json; charset=utf-8", false, entry(7, KIND), FoundBy::FallbackTag, vec![json_type]),
        ("text/html", false, "<html>log in</html>".to_owned(), FoundBy::FallbackTag, vec![]),
    ] {
        let mut tag: Option<Vec<u8>> = None;
        let server = Server::start(move |request| {
            let is_tag = request.target.contains("/manifests/sha256-");
            match request.method.as_str() {
                "PUT" if is_tag => {
                    tag = Some(request.body.clone());
                    reply(201)
                }
                "PUT" => reply(201).header("oci-subject", subject().to_string()),
                _ if is_tag => tag.as_ref().map_or_else(|| reply(404), |list| index_reply("").body(list)),
                _ if filters && request.target.contains("artifactType") => index_reply(r#"{"manifests":[]}"#),
                _ => reply(200).header("content-type", content_type).body(&body),
            }
        })
        .await;
        let pushed = server.repository().push_referrer(media_type::MANIFEST, manifest().into()).await.unwrap();
        assert_eq!((pushed.found_by, pushed.visibility), (found_by, Visibility::of(expected)), "{content_type}");
    }
}

#[tokio::test]
async fn a_registry_that_takes_neither() {
    for status in [400, 405, 412, 415] {
        let server = Server::start(move |request| match request.method.as_str() {
            "PUT" if request.target.contains("/manifests/sha256-") => {
                reply(status).body(r#"{"errors":[{"code":"TAG_INVALID","message":"invalid tag name"}]}"#)
            }
            "PUT" => reply(201),
            _ => reply(404).body("<html>not here</html>"),
        })
        .await;
        let error = server.repository().push_referrer(media_type::MANIFEST, manifest().into()).await.unwrap_err();
        let shown = error.to_string();
        assert!(matches!(error, RegistryError::NoListing { .. }), "{shown}");
        for part in ["HTTP 404", "invalid tag name", "--to", "--v2"] {
            assert!(shown.contains(part) && !shown.contains('\n'), "{shown}");
        }
    }
}

#[tokio::test]
async fn an_api_that_never_lists_it() {
    let server = Server::start(|request| match request.method.as_str() {
        "PUT" => reply(201).header("oci-subject", subject().to_string()),
        _ => index_reply(r#"{"manifests":[]}"#),
    })
    .await;
    let error = server.repository().push_referrer(media_type::MANIFEST, manifest().into()).await.unwrap_err();
    assert!(matches!(error, RegistryError::NotListed { .. }), "{error:?}");
}

#[tokio::test]
async fn a_new_tag() {
    let (server, kept) = without_api(None, |body| body).await;
    let pushed = server.repository().push_referrer(media_type::MANIFEST, manifest().into()).await.unwrap();
    assert_eq!((pushed.found_by, pushed.tag_writes), (FoundBy::FallbackTag, 1));
    let list: Value = serde_json::from_str(kept.lock().unwrap().as_ref().unwrap()).unwrap();
    let expected = json!([{
        "mediaType": media_type::MANIFEST,
        "digest": Digest::of(manifest().as_bytes()),
        "size": manifest().len(),
        "annotations": {"k": "v"},
        "artifactType": KIND,
    }]);
    assert_eq!(list["manifests"], expected);
    // A second run changes nothing.
    let again = server.repository().push_referrer(media_type::MANIFEST, manifest().into()).await.unwrap();
    assert_eq!(again.tag_writes, 0);
    assert!(server.lines().iter().all(|line| !line.starts_with("DELETE")));
    assert_eq!(server.lines().iter().filter(|line| line.starts_with("PUT") && line.contains("sha256-")).count(), 1);
}

#[tokio::test]
async fn a_concurrent_writer_drops_our_entry_once() {
    let theirs = r#"{"schemaVersion":2,"x":1,"manifests":[{"digest":"sha256:00","y":[2]}],"annotations":{"a":"b"}}"#;
    let mut writes = 0;
    let (server, kept) = without_api(Some(theirs.into()), move |body| {
        writes += 1;
        if writes == 1 { theirs.replace("[2]", "[3]") } else { body }
    })
    .await;
    // What the other one wrote is no list that we can read as descriptors: it survives all the same.
    let subject = subject();
    let mut entry = soci_index::format::model::Descriptor::of(media_type::MANIFEST, b"ours");
    entry.artifact_type = Some(KIND.into());
    assert_eq!(server.repository().write_fallback(&subject, &entry).await, Ok(2));
    let ours = serde_json::to_string(&entry).unwrap();
    let expected = theirs.replace("[2]}", &format!("[3]}},{ours}"));
    assert_eq!(kept.lock().unwrap().as_deref(), Some(expected.as_str()));
}

#[tokio::test]
async fn a_writer_that_never_gives_way() {
    let (server, _) = without_api(None, |_| r#"{"manifests":[]}"#.into()).await;
    let entry = soci_index::format::model::Descriptor::of(media_type::MANIFEST, b"ours");
    let error = server.repository().write_fallback(&subject(), &entry).await.unwrap_err();
    assert!(matches!(error, RegistryError::FallbackLost { writes: 24, .. }), "{error:?}");
}

#[tokio::test]
async fn foreign_tags_are_left_alone() {
    let entry = soci_index::format::model::Descriptor::of(media_type::MANIFEST, b"ours");
    let image = r#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{}}"#;
    let index = r#"{"manifests":[]}"#;
    for (body, subject, expected) in [
        (image, subject(), ForeignTag::NotAnIndex { media_type: media_type::MANIFEST.into() }),
        // The registry took the dash for a colon: an index that looks like a list and is the image.
        (index, Digest::of(index.as_bytes()), ForeignTag::Subject),
    ] {
        let (server, kept) = without_api(Some(body.into()), |body| body).await;
        let error = server.repository().write_fallback(&subject, &entry).await.unwrap_err();
        assert!(matches!(&error, RegistryError::ForeignTag { reason, .. } if *reason == expected), "{error:?}");
        assert_eq!(kept.lock().unwrap().as_deref(), Some(body));
        assert!(server.lines().iter().all(|line| line.starts_with("GET")));
    }
    let (server, _) = without_api(Some(r#"{"manifests":7}"#.into()), |body| body).await;
    let error = server.repository().write_fallback(&subject(), &entry).await.unwrap_err();
    assert!(matches!(error, RegistryError::ForeignTag { reason: ForeignTag::Malformed { .. }, .. }));
}

#[tokio::test]
async fn only_referrers_are_pushed_like_this() {
    let server = Server::queue([]).await;
    let plain = json!({"config": {"digest": Digest::of(b"{}"), "size": 2}}).to_string();
    let error = server.repository().push_referrer(media_type::MANIFEST, plain.into()).await.unwrap_err();
    assert!(error.to_string().contains("no subject"), "{error}");
    assert!(server.requests().is_empty());
}

#[tokio::test]
async fn sixteen_writers_at_once() {
    let (server, kept) = without_api(None, |body| body).await;
    let writers = (0..16).map(|writer: u32| {
        let repository = server.repository();
        async move {
            let entry = soci_index::format::model::Descriptor::of(media_type::MANIFEST, &writer.to_le_bytes());
            repository.write_fallback(&subject(), &entry).await
        }
    });
    for result in futures_util::future::join_all(writers).await {
        result.unwrap();
    }
    let list: Value = serde_json::from_str(kept.lock().unwrap().as_ref().unwrap()).unwrap();
    assert_eq!(list["manifests"].as_array().unwrap().len(), 16);
    assert!(server.lines().iter().all(|line| line.starts_with("GET") || line.starts_with("PUT")));
}
