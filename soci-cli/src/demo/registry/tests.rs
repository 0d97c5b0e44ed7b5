//! The registry and the project's own client, each as the other's test.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde_json::json;
use soci_index::find::discover::{Discovery, SOCI_INDEX_V1, Which, on_registry};
use soci_index::format::digest::Digest;
use soci_index::format::model::{Descriptor, media_type};
use soci_index::format::reference::ManifestName;
use soci_index::registry::referrers::{ApiAnswer, FoundBy};
use soci_index::registry::upload::PushedBlob;
use soci_index::registry::{self, ClientOptions, CredentialSource, Registry, RegistryError, Repository};

use super::DemoRegistry;

fn repository(demo: &DemoRegistry, name: &str) -> Repository {
    let options = ClientOptions { credentials: CredentialSource::Anonymous, ..ClientOptions::default() };
    Registry::new(&demo.host(), options).unwrap().repository(name)
}

async fn push(repository: &Repository, content: &[u8]) -> Descriptor {
    let descriptor = Descriptor::of("application/octet-stream", content);
    let body = registry::Body::Bytes(Bytes::copy_from_slice(content));
    repository.push_blob(&descriptor.digest, body, None).await.unwrap();
    descriptor
}

fn manifest(config: &Descriptor, subject: Option<&Descriptor>, kind: &str) -> Bytes {
    let mut config = config.clone();
    config.media_type = kind.to_owned();
    let mut document = json!({"schemaVersion": 2, "mediaType": media_type::MANIFEST, "config": config, "layers": [],
               "annotations": {"k": "v"}});
    if let Some(subject) = subject {
        document["subject"] = json!(subject);
    }
    document.to_string().into()
}

#[tokio::test]
async fn blobs_and_ranges() {
    let demo = DemoRegistry::start(Duration::ZERO).await.unwrap();
    let here = repository(&demo, "a/b/c");
    let content: Vec<u8> = (0..200_000_u32).flat_map(u32::to_le_bytes).collect();
    assert_eq!(here.blob_size(&Digest::of(&content)).await, Ok(None));
    let blob = push(&here, &content).await;
    assert_eq!(here.blob_size(&blob.digest).await, Ok(Some(800_000)));
    let reader = here.blob(blob.digest, blob.size);
    assert_eq!(reader.read_bytes(1000..500_000).await.unwrap(), content[1000..500_000]);
    assert_eq!(here.blob_bytes(&blob, 1 << 20).await.unwrap(), content);
    let too_long = here.blob(blob.digest, blob.size + 10).read_bytes(blob.size..blob.size + 5).await;
    assert!(matches!(too_long, Err(RegistryError::RangeNotSatisfiable { size: Some(800_000), .. })));
    // What the client counts and what the registry counts is the same.
    let (ours, theirs) = (here.registry().traffic(), demo.traffic());
    assert_eq!(ours.requests, theirs.requests);
    assert_eq!((ours.bytes_sent, ours.bytes_received), (theirs.bytes_received, theirs.bytes_sent));
    assert_eq!(ours.bytes_sent, 800_000);
    let elsewhere = repository(&demo, "other");
    let body = registry::Body::Bytes(content.into());
    assert_eq!(elsewhere.push_blob(&blob.digest, body, Some("a/b/c")).await, Ok(PushedBlob::Mounted));
}

#[tokio::test]
async fn uploads_in_chunks() {
    let demo = DemoRegistry::start(Duration::ZERO).await.unwrap();
    let here = repository(&demo, "r");
    let open = Arc::new(|| {
        let chunks: registry::Chunks =
            Box::pin(futures_util::stream::iter(["he", "llo"].map(|chunk| Ok(Bytes::from(chunk)))));
        chunks
    });
    let body = registry::Body::Chunks { length: 5, open };
    let digest = Digest::of(b"hello");
    assert_eq!(here.push_blob(&digest, body.clone(), None).await, Ok(PushedBlob::Uploaded));
    let wrong = here.push_blob(&Digest::of(b"other"), body, None).await.unwrap_err();
    assert!(wrong.to_string().contains("DIGEST_INVALID"), "{wrong}");
}

#[tokio::test]
async fn manifests_and_referrers() {
    let demo = DemoRegistry::start(Duration::from_millis(1)).await.unwrap();
    let here = repository(&demo, "r");
    let missing = manifest(&Descriptor::of("a/b", b"{}"), None, media_type::CONFIG);
    let tag = ManifestName::Tag("v1".into());
    let refused = here.push_manifest(&tag, media_type::MANIFEST, missing).await.unwrap_err();
    assert!(refused.to_string().contains("MANIFEST_BLOB_UNKNOWN"), "{refused}");
    let config = push(&here, b"{}").await;
    let image = manifest(&config, None, media_type::CONFIG);
    let pushed = here.push_manifest(&tag, media_type::MANIFEST, image.clone()).await.unwrap();
    assert_eq!(pushed.subject, None);
    let read = here.manifest(&tag).await.unwrap().unwrap();
    assert_eq!((read.bytes, read.digest), (image, pushed.digest));
    let subject = here.manifest(&ManifestName::Digest(pushed.digest)).await.unwrap().unwrap().descriptor();
    assert_eq!(here.referrers_api(&subject.digest, None).await, Ok(ApiAnswer::Listed(Vec::new())));
    for kind in ["other/kind", SOCI_INDEX_V1] {
        for _ in 0..2 {
            let referrer = manifest(&config, Some(&subject), kind);
            let pushed = here.push_referrer(media_type::MANIFEST, referrer).await.unwrap();
            assert_eq!(pushed.found_by, FoundBy::Api);
            assert_eq!(pushed.entry.annotations.get("k").map(String::as_str), Some("v"));
        }
    }
    assert_eq!(here.referrers(&subject.digest, None).await.unwrap().entries.len(), 2);
    assert_eq!(here.referrers(&subject.digest, Some(SOCI_INDEX_V1)).await.unwrap().entries.len(), 1);
    assert!(matches!(on_registry(&here, &subject.digest, Which::Newest).await, Ok(Discovery::Found(_))));
    assert_eq!(here.manifest(&ManifestName::Tag("v2".into())).await, Ok(None));
}
