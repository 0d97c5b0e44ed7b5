//! A publish that is killed at any moment leaves nothing half-done that can be found, and the next run completes it.

use soci_index::find::discover::{Discovery, Which, on_registry, preferred_on_registry};
use soci_index::format::digest::Digest;
use soci_index::format::limits::Limits;
use soci_index::format::manifest::{INDEX_DIGEST, SociIndex};
use soci_index::format::model::{Descriptor, ImageIndex, ImageManifest};
use soci_index::format::reference::ManifestName;
use soci_index::format::span_index::{SPAN_INDEX, SpanIndex};
use soci_index::registry::Repository;
use soci_tests::gate::{Gate, Moment};
use soci_tests::image::{Image, tar, text};
use soci_tests::registry::{DockerRegistry, client};
use soci_tests::soci;

fn image() -> Image {
    let layer = |seed| tar(&[("data", text(seed, 200_000))]);
    Image::gzip(vec![layer(1), layer(2)])
}

/// Whether all that an index names is there.
async fn assert_whole(repository: &Repository, blobs: &[Descriptor], what: &str) {
    for blob in blobs {
        let size = repository.blob_size(&blob.digest).await.unwrap();
        assert_eq!(size, Some(blob.size), "{what}: {} is not there", blob.digest);
    }
}

/// What a node finds: the index beside the image, whole, or none.
async fn referrer(repository: &Repository, image: &Image, what: &str) -> Option<Digest> {
    match on_registry(repository, &image.digest(), Which::Newest).await.unwrap() {
        Discovery::Found(found) => {
            let index = SociIndex::parse(&found.raw, &Limits::DEFAULT).unwrap();
            assert_whole(repository, &index.layers, what).await;
            Some(found.digest)
        }
        Discovery::None { rejected, .. } => {
            assert!(rejected.is_empty(), "{what}: the registry lists {rejected:?}");
            None
        }
    }
}

/// What the tag names: the image as it was, or the new one, whole; with its span index, if it has to have one.
async fn tagged(repository: &Repository, image: &Image, has_spans: bool, what: &str) -> Option<Digest> {
    let raw = repository.manifest(&ManifestName::Tag("v1".to_owned())).await.unwrap().expect("an image");
    if raw.digest == image.digest() {
        return None;
    }
    let root: ImageIndex = serde_json::from_slice(&raw.bytes).unwrap();
    for entry in &root.manifests {
        let manifest = repository.manifest(&ManifestName::Digest(entry.digest)).await.unwrap();
        let manifest = manifest.unwrap_or_else(|| panic!("{what}: {} is not there", entry.digest));
        let Ok(index) = SociIndex::parse(&manifest.bytes, &Limits::DEFAULT) else {
            let manifest: ImageManifest = serde_json::from_slice(&manifest.bytes).unwrap();
            assert!(manifest.annotations.contains_key(INDEX_DIGEST), "{what}");
            if has_spans {
                let found = preferred_on_registry(repository, &entry.digest, Which::Newest, &[SPAN_INDEX]).await;
                let Ok(Discovery::Found(found)) = found else { panic!("{what}: no span index: {found:?}") };
                let spans = SpanIndex::parse(&found.raw, &Limits::DEFAULT).unwrap();
                assert_whole(repository, &spans.layers, what).await;
            }
            continue;
        };
        assert_whole(repository, &index.layers, what).await;
    }
    Some(raw.digest)
}

async fn killed_at_every_request(more: &[&str], v2: bool) {
    let Some(registry) = DockerRegistry::start() else { return };
    let gate = Gate::start(&registry.address).await.unwrap();
    let image = image();
    let publish = |repository: &str| {
        let mut command = soci();
        command.args(["publish", &format!("{}/{repository}:v1", gate.host()), "--min-layer-size", "0"]).args(more);
        command
    };
    let direct = client(&registry.address);
    let found = |repository: Repository, what: String| {
        let image = &image;
        let has_spans = more.contains(&"both");
        async move {
            match v2 {
                true => tagged(&repository, image, has_spans, &what).await,
                false => referrer(&repository, image, &what).await,
            }
        }
    };

    image.push(&direct.repository("whole"), "v1").await;
    let (status, requests) = gate.run(&mut publish("whole"), None).await;
    assert!(status.success());
    let expected = found(direct.repository("whole"), "not killed".to_owned()).await;
    assert!(expected.is_some() && requests.len() >= 10, "{requests:?}");

    let (mut cut, mut complete) = (0, 0);
    for (limit, request) in (1..=requests.len()).zip(&requests) {
        for moment in [Moment::Before, Moment::After] {
            let name = format!("k{limit}-{}", if moment == Moment::Before { "before" } else { "after" });
            let what = format!("killed {moment:?} request {limit}, in the whole run: {request}");
            let repository = direct.repository(&name);
            image.push(&repository, "v1").await;
            let (status, _) = gate.run(&mut publish(&name), Some((limit, moment))).await;
            // Layers run side by side, so the number of requests differs a little from run to run.
            cut += usize::from(!status.success());
            let there = found(repository.clone(), what.clone()).await;
            assert!(there.is_none() || there == expected, "{what}");
            complete += usize::from(there.is_some());
            let (status, _) = gate.run(&mut publish(&name), None).await;
            assert!(status.success(), "the second run, {what}");
            assert_eq!(found(repository, what.clone()).await, expected, "{what}");
        }
    }
    assert!(cut >= 2 * requests.len() - 6 && complete >= 1, "{cut} runs were cut, {complete} of them were done");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_publish_is_completed() {
    killed_at_every_request(&[], false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_conversion_is_completed() {
    killed_at_every_request(&["--v2"], true).await;
    killed_at_every_request(&["--v2", "--format", "both"], true).await;
}
