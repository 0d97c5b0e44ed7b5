//! A start-up profile that is pushed for AWS's snapshotter, too, read back from the registry as that one would.

use std::path::PathBuf;

use soci_index::format::digest::Digest;
use soci_index::format::limits::Limits;
use soci_index::format::manifest::{INDEX_V1, LAYER_DIGEST, PREFETCH, Prefetch, SociIndex};
use soci_index::format::profile::{Profile, Touched};
use soci_index::format::reference::ManifestName;
use soci_index::format::span::SpanTable;
use soci_index::format::ztoc::Ztoc;
use soci_index::image::ImageSource;
use soci_index::registry::Repository;
use soci_tests::image::{Image, tar, text};
use soci_tests::mounting::{Mounting, REPOSITORY};
use soci_tests::registry::client;
use soci_tests::{run, stdout};

/// The spans of AWS's index.
const SPAN_BYTES: u64 = 131_072;

/// Two layers that have a zTOC, below one that is too small.
async fn stage() -> Mounting {
    let layers = [text(1, 2_000_000), text(2, 1_500_000), text(3, 100)].map(|content| tar(&[("data", content)]));
    Mounting::new(Image::gzip(layers.to_vec())).await
}

/// Writes a profile of ranges of the image's layers, each a layer, a first byte and a length.
fn profile(stage: &Mounting, ranges: &[(u32, u64, u64)]) -> PathBuf {
    let layers = stage.image.blobs.iter().map(|blob| Digest::of(blob)).collect();
    let touched = |(layer, start, length): &(u32, u64, u64)| Touched { layer: *layer, bytes: *start..start + length };
    let profile = Profile::new(layers, ranges.iter().map(touched).collect(), &Limits::DEFAULT).unwrap();
    let file = stage.scratch.path().join("p.profile");
    std::fs::write(&file, profile.encode().unwrap()).unwrap();
    file
}

async fn index(repository: &Repository, digest: &str) -> SociIndex {
    let name = ManifestName::Digest(digest.parse().unwrap());
    let raw = repository.manifest(&name).await.unwrap().unwrap();
    let parsed = SociIndex::parse(&raw.bytes, &Limits::DEFAULT).unwrap();
    assert_eq!(parsed.to_json(), raw.bytes, "AWS's daemon keeps only what it would write the same");
    parsed
}

/// The spans of a layer by its zTOC in the index.
async fn table(stage: &Mounting, repository: &Repository, index: &SociIndex, layer: usize) -> SpanTable {
    let blob = &stage.image.blobs[layer];
    let found = index.ztoc(&Digest::of(blob)).unwrap();
    let bytes = ImageSource::of_repository(repository).blob_bytes(found, 1 << 30).await.unwrap();
    let ztoc = Ztoc::decode(&bytes, &Limits::DEFAULT).unwrap();
    ztoc.into_index(blob.len() as u64, &Limits::DEFAULT).unwrap().spans
}

/// The spans that the index has fetched early, and of which layer, in its order.
async fn early(repository: &Repository, index: &SociIndex) -> Vec<(String, Vec<u32>)> {
    let mut all = Vec::new();
    for blob in index.layers.iter().filter(|blob| blob.media_type == PREFETCH) {
        let bytes = ImageSource::of_repository(repository).blob_bytes(blob, 1 << 20).await.unwrap();
        let ranges = Prefetch::parse(&bytes, &Limits::DEFAULT).unwrap().prefetch_spans;
        let spans = ranges.iter().flat_map(|range| range.start_span..=range.end_span).collect();
        all.push((blob.annotations[LAYER_DIGEST].clone(), spans));
    }
    all
}

/// What is pushed names the spans that hold the profile's bytes, and no others; pushed again, only a new profile's.
#[tokio::test(flavor = "multi_thread")]
async fn profile_as_prefetch_artifacts() {
    let stage = stage().await;
    let (name, repository) = (stage.name(), client(&stage.registry.host()).repository(REPOSITORY));
    // In the order of the reads, which is not that of the bytes; one range is beyond the layer's end.
    let ranges = [(1, 1_200_128, 4096), (0, 1_638_400, 200_000), (0, 0, 4096), (1, 1 << 30, 4096), (2, 0, 512)];
    let ranges = ranges.map(|(layer, start, length)| (layer, start / 4096 * 4096, length));
    let file = profile(&stage, &ranges);
    let file = file.to_str().unwrap();
    let push = ["profile", "push", &name, file, "--default", "--as-prefetch"];

    let refused = run(&mut stage.soci("a", &push));
    let said = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(1), "{said}");
    assert!(said.contains(&format!("{name} has no index")), "{said}");
    assert!(said.contains(&format!("`soci publish --format aws {name}`")), "{said}");
    assert_eq!(stdout(&mut stage.soci("a", &["profile", "list", &name, "--json"])).trim(), "[]", "nothing was pushed");

    stage.publish(&["--format", "aws", "--span-size", &SPAN_BYTES.to_string()]);
    let pushed: serde_json::Value = serde_json::from_str(&stdout(stage.soci("a", &push).arg("--json"))).unwrap();
    let prefetch = &pushed["prefetch"];
    let index_digest = prefetch["index"].as_str().unwrap();
    let made = index(&repository, index_digest).await;
    let others = prefetch["otherIndexes"].as_array().unwrap();
    assert_eq!(others.len(), 1, "{pushed}");
    let before = index(&repository, others[0].as_str().unwrap()).await;
    assert!(made.ztocs().eq(before.ztocs()) && made.subject == before.subject, "the same zTOCs of the same image");

    let mut expected = Vec::new();
    for layer in [0, 1] {
        let table = table(&stage, &repository, &made, layer).await;
        assert!(table.len() > 5, "{} spans", table.len());
        let of_layer = ranges.iter().filter(|(of, ..)| *of as usize == layer);
        let mut spans: Vec<u32> = of_layer.flat_map(|(_, at, length)| table.covering(*at..at + length)).collect();
        spans.sort_unstable();
        spans.dedup();
        expected.push((Digest::of(&stage.image.blobs[layer]).to_string(), spans));
    }
    let found = early(&repository, &made).await;
    assert_eq!(found, expected);
    for (artifact, (layer, spans)) in prefetch["artifacts"].as_array().unwrap().iter().zip(&found) {
        assert!(artifact["layer"] == **layer && artifact["spans"] == spans.len(), "{pushed}");
    }
    let verified = stdout(&mut stage.soci("a", &["verify", &name, "--index", index_digest]));
    assert_eq!(verified.matches(" identical").count(), 4, "{verified}");

    // The same again is the same; another profile replaces the lists.
    let again = stdout(&mut stage.soci("a", &push));
    assert!(again.contains("for AWS's snapshotter: ") && again.contains(index_digest), "{again}");
    assert!(again.contains("of 2 layers") && again.contains(others[0].as_str().unwrap()), "{again}");
    let listed: serde_json::Value =
        serde_json::from_str(&stdout(&mut stage.soci("a", &["profile", "list", &name, "--json"]))).unwrap();
    assert_eq!(listed.as_array().unwrap().len(), 1, "no second one of the same name: {listed}");
    let _ = profile(&stage, &[(1, 0, 4096)]);
    let other: serde_json::Value = serde_json::from_str(&stdout(stage.soci("a", &push).arg("--json"))).unwrap();
    let second = index(&repository, other["prefetch"]["index"].as_str().unwrap()).await;
    assert_eq!(early(&repository, &second).await, [(Digest::of(&stage.image.blobs[1]).to_string(), vec![0])]);
    let _ = profile(&stage, &[(2, 0, 512)]);
    let nothing = run(&mut stage.soci("a", &push));
    let said = String::from_utf8_lossy(&nothing.stderr);
    assert!(nothing.status.code() == Some(1) && said.contains("names nothing of the 2 layers"), "{said}");
    assert_eq!(repository.referrers(&made.subject.unwrap().digest, Some(INDEX_V1)).await.unwrap().entries.len(), 3);
}
