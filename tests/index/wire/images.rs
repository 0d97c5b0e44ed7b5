//! One image in its three places: on a registry, in a layout directory, in an archive.

use std::path::Path;

use futures_util::TryStreamExt;
use serde_json::{Value, json};
use soci_index::format::digest::Digest;
use soci_index::format::model::{Descriptor, media_type};
use soci_index::format::platform::{Platform, PlatformSelection};
use soci_index::image::layout::Layout;
use soci_index::image::{ImageError, ImageSource};

use crate::wire::server::{Server, options, reply};

const LAYER: &[u8] = &[42; 3_000_000];

/// The blobs of an image for two platforms, with an attestation and a SOCI manifest beside them, and its index.
fn image() -> (Vec<Vec<u8>>, Vec<u8>) {
    let mut blobs = vec![LAYER.to_vec()];
    let mut entries = Vec::new();
    for platform in [
        json!({"os": "linux", "architecture": "amd64"}),
        json!({"os": "linux", "architecture": "arm64", "variant": "v8"}),
    ] {
        let mut config = platform.clone();
        config["rootfs"] = json!({"type": "layers", "diff_ids": [Digest::of(b"diff")]});
        let config = config.to_string().into_bytes();
        let mut manifest = json!({"schemaVersion": 2, "mediaType": media_type::MANIFEST});
        manifest["config"] = described(media_type::CONFIG, &config);
        manifest["layers"] = json!([described("application/vnd.oci.image.layer.v1.tar+gzip", LAYER)]);
        let manifest = manifest.to_string().into_bytes();
        let mut entry = described(media_type::MANIFEST, &manifest);
        entry["platform"] = platform;
        entries.push(entry);
        blobs.extend([config, manifest]);
    }
    let mut attestation = described(media_type::MANIFEST, b"not even stored");
    attestation["platform"] = json!({"os": "unknown", "architecture": "unknown"});
    let mut soci = described(media_type::MANIFEST, b"nor this");
    soci["artifactType"] = json!("application/vnd.amazon.soci.index.v2+json");
    soci["platform"] = json!({"os": "linux", "architecture": "amd64"});
    entries.extend([attestation, soci]);
    let index = json!({"schemaVersion": 2, "mediaType": media_type::INDEX, "manifests": entries}).to_string();
    (blobs, index.into_bytes())
}

fn described(media_type: &str, content: &[u8]) -> Value {
    json!({"mediaType": media_type, "digest": Digest::of(content), "size": content.len()})
}

fn write_layout(directory: &Path) {
    let layout = Layout::open_or_create(directory).unwrap();
    let mut writer = layout.lock().unwrap();
    let (blobs, index) = image();
    for blob in blobs {
        writer.add_blob(&blob).unwrap();
    }
    let mut entry = Descriptor::of(media_type::INDEX, &index);
    entry.annotations.insert("org.opencontainers.image.ref.name".into(), "v1".into());
    writer.add_manifest(entry, &index).unwrap();
}

fn write_archive(directory: &Path, file: &Path) {
    let mut builder = tar::Builder::new(std::fs::File::create(file).unwrap());
    builder.append_dir_all(".", directory).unwrap();
    builder.finish().unwrap();
}

async fn registry() -> Server {
    let (blobs, index) = image();
    Server::start(move |request| {
        let name = request.target.rsplit('/').next().unwrap();
        let all = blobs.iter().chain([&index]);
        let Some(found) = all.into_iter().find(|blob| name == "v1" || Digest::of(blob).to_string() == name) else {
            return reply(404);
        };
        let found = if name == "v1" { &index } else { found };
        match request.header("range") {
            Some(_) => {
                let (first, last) = request.range(found.len());
                let range = format!("bytes {first}-{last}/{}", found.len());
                reply(206).header("content-range", range).body(&found[first..=last])
            }
            None => reply(200).body(found),
        }
    })
    .await
}

async fn open(reference: &str) -> Result<ImageSource, ImageError> {
    ImageSource::open(&reference.parse().unwrap(), &options()).await
}

#[tokio::test]
async fn the_same_everywhere() {
    let directory = tempfile::tempdir().unwrap();
    let (layout, archive) = (directory.path().join("layout"), directory.path().join("image.tar"));
    write_layout(&layout);
    write_archive(&layout, &archive);
    let server = registry().await;
    for reference in [
        format!("{}/p/r:v1", server.address),
        format!("oci:{}:v1", layout.display()),
        format!("oci:{}", layout.display()),
        format!("oci-archive:{}:v1", archive.display()),
    ] {
        let source = open(&reference).await.unwrap();
        assert_eq!(source.root().await.unwrap().bytes, image().1, "{reference}");
        let all = source.resolve(&PlatformSelection::All).await.unwrap();
        let platforms: Vec<_> = all.iter().map(|image| image.platform.to_string()).collect();
        assert_eq!(platforms, ["linux/amd64", "linux/arm64"], "{reference}");
        let wanted: Platform = "linux/arm64".parse().unwrap();
        let one = source.resolve(&PlatformSelection::Only(vec![wanted.clone(), wanted])).await.unwrap();
        assert_eq!(one.len(), 1);
        assert_eq!(one[0].descriptor, all[1].descriptor);
        assert_eq!(one[0].config.diff_ids, [Digest::of(b"diff")]);
        assert_eq!(Digest::of(&one[0].raw.bytes), one[0].descriptor.digest);
        let layer = &one[0].manifest.layers[0];
        let whole: Vec<u8> = source.open_blob(layer).map_ok(|chunk| chunk.to_vec()).try_concat().await.unwrap();
        assert!(whole == LAYER, "{reference}");
        let part = source.read_range(layer, 5..1_500_000).map_ok(|chunk| chunk.to_vec()).try_concat().await.unwrap();
        assert!(part == LAYER[5..1_500_000], "{reference}");
        let missing: Platform = "linux/s390x".parse().unwrap();
        let error = source.resolve(&PlatformSelection::Only(vec![missing])).await.unwrap_err().to_string();
        assert!(error.contains("linux/s390x") && error.contains("linux/amd64, linux/arm64"), "{error}");
        let wrong = Descriptor::new("a/b", Digest::of(b"nowhere"), 3_000_000);
        assert!(source.open_blob(&wrong).try_collect::<Vec<_>>().await.is_err());
        let error = source.read_range(layer, 0..3_000_001).map_ok(drop).try_collect::<Vec<_>>().await.unwrap_err();
        assert!(error.to_string().contains("no bytes 0..3000001"), "{error}");
    }
}

#[tokio::test]
async fn nothing_is_asked_twice() {
    let server = registry().await;
    let source = open(&format!("{}/p/r:v1", server.address)).await.unwrap();
    source.resolve(&PlatformSelection::Only(vec!["linux/arm64".parse().unwrap()])).await.unwrap();
    // The index, the manifest, the configuration.
    assert_eq!(server.requests().len(), 3, "{:?}", server.lines());
}

/// A caller that has an image's digest can ask for its referrers while its documents are on their way.
#[tokio::test]
async fn digests_are_reported_before_the_images_come() {
    let server = registry().await;
    let arm: Platform = "linux/arm64".parse().unwrap();
    let by_tag = open(&format!("{}/p/r:v1", server.address)).await.unwrap();
    let all = by_tag.resolve(&PlatformSelection::All).await.unwrap();
    let expected: Vec<_> = all.iter().map(|image| image.descriptor.digest).collect();
    let by_digest = open(&format!("{}/p/r@{}", server.address, expected[1])).await.unwrap();
    for (source, selection, digests, asked) in [
        (&by_tag, PlatformSelection::Only(vec![arm.clone()]), &expected[1..], vec![1]),
        // The first image is here when the second is reported.
        (&by_tag, PlatformSelection::All, &expected[..], vec![1, 3]),
        (&by_digest, PlatformSelection::Host, &expected[1..], vec![1]),
        // Here only the configuration shows whether it is wanted at all.
        (&by_digest, PlatformSelection::Only(vec![arm]), &expected[1..], vec![2]),
    ] {
        let (before, mut reported) = (server.requests().len(), Vec::new());
        let mark = |digest: &Digest| reported.push((*digest, server.requests().len() - before));
        let images = source.resolve_with(&selection, mark).await.unwrap();
        assert_eq!(images.iter().map(|image| image.descriptor.digest).collect::<Vec<_>>(), digests);
        assert_eq!(reported, digests.iter().copied().zip(asked).collect::<Vec<_>>());
    }
}

#[tokio::test]
async fn tags_that_are_not_there() {
    let directory = tempfile::tempdir().unwrap();
    write_layout(directory.path());
    let source = open(&format!("oci:{}:v2", directory.path().display())).await.unwrap();
    let error = source.resolve(&PlatformSelection::All).await.unwrap_err();
    assert!(matches!(&error, ImageError::NotFound { tags, .. } if tags == &["v1"]), "{error:?}");
    let layout = Layout::open(directory.path()).unwrap();
    let mut entry = Descriptor::of(media_type::INDEX, b"");
    entry.annotations.insert("org.opencontainers.image.ref.name".into(), "v2".into());
    layout.lock().unwrap().add_manifest(entry, br#"{"manifests":[]}"#).unwrap();
    let source = open(&format!("oci:{}", directory.path().display())).await.unwrap();
    let error = source.resolve(&PlatformSelection::All).await.unwrap_err();
    assert!(error.to_string().contains("v1, v2"), "{error}");
    let server = Server::start(|_| reply(404)).await;
    let source = open(&format!("{}/p/r:v1", server.address)).await.unwrap();
    assert!(matches!(source.resolve(&PlatformSelection::All).await, Err(ImageError::NotFound { .. })));
}

#[tokio::test]
async fn damage_is_found() {
    let directory = tempfile::tempdir().unwrap();
    write_layout(directory.path());
    let layout = Layout::open(directory.path()).unwrap();
    let source = open(&format!("oci:{}", directory.path().display())).await.unwrap();
    let image = source.resolve(&PlatformSelection::All).await.unwrap().remove(0);
    let layer = &image.manifest.layers[0];
    let mut damaged = LAYER.to_vec();
    damaged[2_000_000] ^= 1;
    std::fs::write(layout.blob_path(&layer.digest), &damaged).unwrap();
    let error = source.open_blob(layer).try_collect::<Vec<_>>().await.unwrap_err();
    assert!(error.to_string().contains("has digest"), "{error}");
    std::fs::write(layout.blob_path(&layer.digest), &damaged[1..]).unwrap();
    let error = source.open_blob(layer).try_collect::<Vec<_>>().await.unwrap_err();
    assert!(error.to_string().contains("2999999 bytes"), "{error}");
    std::fs::write(layout.blob_path(&image.manifest.config.digest), "{}").unwrap();
    assert!(source.resolve(&PlatformSelection::All).await.is_err());
}

#[tokio::test]
async fn one_platform_is_taken_as_it_is() {
    let directory = tempfile::tempdir().unwrap();
    let layout = Layout::open_or_create(directory.path()).unwrap();
    let mut writer = layout.lock().unwrap();
    let config = json!({"os": "linux", "architecture": "s390x", "rootfs": {"diff_ids": null}}).to_string();
    writer.add_blob(config.as_bytes()).unwrap();
    let manifest = json!({"config": described("", config.as_bytes()), "layers": null}).to_string();
    writer.add_manifest(Descriptor::of(media_type::MANIFEST, b""), manifest.as_bytes()).unwrap();
    let source = open(&format!("oci:{}", directory.path().display())).await.unwrap();
    let found = source.resolve(&PlatformSelection::Host).await.unwrap();
    assert_eq!(found[0].platform.to_string(), "linux/s390x");
    let other = PlatformSelection::Only(vec!["linux/amd64".parse().unwrap()]);
    assert!(matches!(source.resolve(&other).await, Err(ImageError::NoPlatform { .. })));
}

#[tokio::test]
async fn not_images_and_not_archives() {
    let directory = tempfile::tempdir().unwrap();
    let layout = Layout::open_or_create(&directory.path().join("l")).unwrap();
    let manifest = json!({"config": described("a/b", b"{}"), "layers": []}).to_string();
    layout.lock().unwrap().add_manifest(Descriptor::of(media_type::MANIFEST, b""), manifest.as_bytes()).unwrap();
    let source = open(&format!("oci:{}", layout.directory().display())).await.unwrap();
    let error = source.resolve(&PlatformSelection::Host).await.unwrap_err();
    assert!(matches!(&error, ImageError::NotAnImage { kind, .. } if kind == "a/b"), "{error:?}");
    let file = directory.path().join("x.tar");
    for content in [&b"\x1f\x8bgarbage"[..], &[0; 1024], &[b'x'; 2000]] {
        std::fs::write(&file, content).unwrap();
        assert!(open(&format!("oci-archive:{}", file.display())).await.is_err());
    }
    assert!(open("oci:/no/such/directory").await.is_err());
    assert!(open("oci-archive:/no/such/file").await.is_err());
}
