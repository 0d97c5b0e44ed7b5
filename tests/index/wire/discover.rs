//! Finding an index, on a registry and in a layout.

use std::collections::HashMap;

use serde_json::json;
use soci_index::find::discover::{Discovery, SOCI_INDEX_V1, Which, in_layout, on_registry};
use soci_index::format::digest::Digest;
use soci_index::format::model::{Descriptor, media_type};
use soci_index::image::layout::Layout;
use soci_index::registry::RegistryError;

use crate::wire::server::{Server, reply};

fn image() -> Digest {
    Digest::of(b"image")
}

fn index(subject: Digest, created: Option<&str>, kind: &str) -> String {
    let mut manifest = json!({
        "schemaVersion": 2,
        "mediaType": media_type::MANIFEST,
        "config": {"mediaType": kind, "digest": Digest::of(b"{}"), "size": 2},
        "layers": [],
        "subject": {"mediaType": media_type::MANIFEST, "digest": subject, "size": 5},
    });
    if let Some(created) = created {
        manifest["annotations"] = json!({"org.opencontainers.image.created": created});
    }
    manifest.to_string()
}

/// A registry that has these manifests and lists all of them as SOCI indexes, without annotations.
async fn registry(manifests: &[String]) -> Server {
    let entries: Vec<_> = manifests
        .iter()
        .map(|manifest| json!({"mediaType": media_type::MANIFEST, "digest": Digest::of(manifest.as_bytes()), "size": manifest.len(), "artifactType": SOCI_INDEX_V1}))
        .chain([json!({"mediaType": media_type::MANIFEST, "digest": Digest::of(b"gone"), "size": 4, "artifactType": null})])
        .collect();
    let list = json!({"manifests": entries}).to_string();
    let by_path: HashMap<String, String> = manifests
        .iter()
        .map(|manifest| (format!("/v2/p/r/manifests/{}", Digest::of(manifest.as_bytes())), manifest.clone()))
        .collect();
    Server::start(move |request| match by_path.get(&request.target) {
        Some(manifest) => reply(200).header("content-type", media_type::MANIFEST).body(manifest),
        None if request.target.contains("/referrers/") => {
            reply(200).header("content-type", media_type::INDEX).body(&list)
        }
        None => reply(404),
    })
    .await
}

fn candidates() -> (Vec<String>, String) {
    let newest = index(image(), Some("2026-02-01T00:00:00+02:00"), SOCI_INDEX_V1);
    let all = vec![
        index(image(), None, SOCI_INDEX_V1),
        index(image(), Some("2026-01-31T21:59:59Z"), SOCI_INDEX_V1),
        newest.clone(),
        index(Digest::of(b"another image"), Some("2030-01-01T00:00:00Z"), SOCI_INDEX_V1),
        index(image(), Some("2030-01-01T00:00:00Z"), "application/vnd.amazon.soci.index.v2+json"),
    ];
    (all, newest)
}

#[tokio::test]
async fn the_newest_that_fits() {
    let (mut all, newest) = candidates();
    for _ in 0..all.len() {
        all.rotate_left(1);
        let server = registry(&all).await;
        let Discovery::Found(found) = on_registry(&server.repository(), &image(), Which::Newest).await.unwrap() else {
            panic!("nothing found")
        };
        assert_eq!((&*found.raw, found.others), (newest.as_bytes(), 2));
        assert_eq!(found.digest, Digest::of(newest.as_bytes()));
    }
}

/// A named index is taken however old it is, and only if it belongs to the image.
#[tokio::test]
async fn a_named_one() {
    let (all, _) = candidates();
    let server = registry(&all).await;
    let directory = tempfile::tempdir().unwrap();
    let layout = Layout::open_or_create(directory.path()).unwrap();
    let mut writer = layout.lock().unwrap();
    for manifest in &all {
        writer.add_manifest(Descriptor::of(media_type::MANIFEST, b""), manifest.as_bytes()).unwrap();
    }
    for (position, manifest) in all.iter().enumerate() {
        let digest = Digest::of(manifest.as_bytes());
        let which = Which::Named(&digest);
        let remote = on_registry(&server.repository(), &image(), which).await.unwrap();
        let local = in_layout(&layout, &image(), which).unwrap();
        for found in [remote, local] {
            match found {
                Discovery::Found(found) => assert_eq!((&*found.raw, position < 3), (manifest.as_bytes(), true)),
                Discovery::None { .. } => assert!(position >= 3, "{manifest}"),
            }
        }
    }
    let missing = Digest::of(b"no such index");
    let found = on_registry(&server.repository(), &image(), Which::Named(&missing)).await.unwrap();
    assert!(matches!(found, Discovery::None { reason, .. } if reason.contains("it is not there")));
}

#[tokio::test]
async fn nothing_fits() {
    let (all, _) = candidates();
    let server = registry(&all[3..]).await;
    let Discovery::None { reason, rejected } =
        on_registry(&server.repository(), &image(), Which::Newest).await.unwrap()
    else {
        panic!("found one")
    };
    assert_eq!(rejected.len(), 3);
    assert!(reason.contains("none of the listed manifests fits"), "{reason}");
    let server = Server::start(|_| reply(404)).await;
    let Discovery::None { reason, .. } = on_registry(&server.repository(), &image(), Which::Newest).await.unwrap()
    else {
        panic!("found one")
    };
    assert!(reason.contains("no referrers API (HTTP 404)"), "{reason}");
    let server = Server::start(|_| reply(401)).await;
    let error = on_registry(&server.repository(), &image(), Which::Newest).await.unwrap_err();
    assert!(matches!(error, RegistryError::NoReferrers { is_refusal: true, .. }));
}

#[test]
fn in_a_layout() {
    let (all, newest) = candidates();
    let directory = tempfile::tempdir().unwrap();
    let layout = Layout::open_or_create(directory.path()).unwrap();
    assert!(matches!(in_layout(&layout, &image(), Which::Newest).unwrap(), Discovery::None { .. }));
    let mut writer = layout.lock().unwrap();
    for manifest in &all {
        writer.add_manifest(Descriptor::of(media_type::MANIFEST, b""), manifest.as_bytes()).unwrap();
    }
    let Discovery::Found(found) = in_layout(&layout, &image(), Which::Newest).unwrap() else { panic!("nothing found") };
    assert_eq!((&*found.raw, found.others), (newest.as_bytes(), 2));
    // A damaged one is passed over.
    std::fs::write(layout.blob_path(&found.digest), "damaged").unwrap();
    let Discovery::Found(found) = in_layout(&layout, &image(), Which::Newest).unwrap() else { panic!("nothing found") };
    assert_eq!(found.others, 1);
}
