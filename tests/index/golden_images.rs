//! SOCI index manifests, zTOCs and prefetch artifacts of whole images, byte for byte as AWS's tools write them.

#![allow(clippy::unwrap_used, reason = "a test says no by panicking")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;
use soci_index::format::digest::Digest;
use soci_index::format::index::Compression;
use soci_index::format::limits::Limits;
use soci_index::format::manifest::{Prefetch, SociIndex, ZtocReference};
use soci_index::format::model::{Descriptor, ImageManifest};
use soci_index::format::prefetch;
use soci_index::format::v2_document::{EntryPlatform, Index, ManifestEntry};
use soci_index::format::ztoc::Ztoc;
use soci_index::indexing::{self, Options};
use soci_index::publish::v2::{EntryNotes, Indexed, enable};

/// Blobs of an OCI layout.
struct Layout(PathBuf);

impl Layout {
    fn blob(&self, digest: &Digest) -> Vec<u8> {
        let bytes = std::fs::read(self.0.join("blobs/sha256").join(digest.hex())).unwrap();
        assert!(digest.matches(&bytes));
        bytes
    }

    /// All image manifests, those inside indexes too, with a name for each platform.
    fn images(&self) -> Vec<(String, Descriptor)> {
        let index: Value = serde_json::from_slice(&std::fs::read(self.0.join("index.json")).unwrap()).unwrap();
        let mut images = Vec::new();
        self.collect(&index, &mut images);
        images
    }

    fn collect(&self, index: &Value, images: &mut Vec<(String, Descriptor)>) {
        for entry in index["manifests"].as_array().unwrap() {
            let descriptor: Descriptor = serde_json::from_value(entry.clone()).unwrap();
            let body: Value = serde_json::from_slice(&self.blob(&descriptor.digest)).unwrap();
            if body.get("manifests").is_some() {
                self.collect(&body, images);
            } else if descriptor.may_be_image() {
                let config: Value =
                    serde_json::from_slice(&self.blob(&body["config"]["digest"].as_str().unwrap().parse().unwrap()))
                        .unwrap();
                let part = |key: &str| config[key].as_str().map(str::to_owned);
                let name: Vec<String> = ["os", "architecture", "variant"].iter().filter_map(|key| part(key)).collect();
                images.push((name.join("-"), descriptor));
            }
        }
    }
}

/// Numbers and paths from the README of a case.
fn setting(readme: &str, flag: &str) -> u64 {
    let rest = readme.split(flag).nth(1).unwrap();
    rest.split_whitespace().next().unwrap().parse().unwrap()
}

fn wanted(readme: &str) -> Vec<String> {
    let line = readme.lines().find(|line| line.starts_with("Prefetch files asked for")).unwrap();
    line.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

#[test]
fn indexes_are_identical() {
    let mut compared = 0;
    for case in ["01-single-platform", "02-two-platforms", "03-docker-types", "04-index-with-attestations"] {
        let directory = soci_tests::golden::golden().join("images").join(case);
        let readme = std::fs::read_to_string(directory.join("README.md")).unwrap();
        let layout = Layout(directory.join("layout"));
        for (platform, image) in layout.images() {
            compared += check_image(&directory, &readme, &layout, &platform, &image);
        }
    }
    assert!(compared >= 12, "only {compared} manifests were compared");
}

/// A layer of an image, its zTOC, and how an index refers to it.
type Layer = (Descriptor, Ztoc, ZtocReference);

/// Builds the zTOCs of an image and compares them with AWS's.
fn ztocs(directory: &Path, readme: &str, layout: &Layout, image: &Descriptor) -> Vec<Layer> {
    let manifest: ImageManifest = serde_json::from_slice(&layout.blob(&image.digest)).unwrap();
    let (span_bytes, least) = (setting(readme, "--span-size "), setting(readme, "--min-layer-size "));
    let mut ztocs = Vec::new();
    for layer in manifest.layers.iter().filter(|layer| layer.size >= least && !layer.media_type.ends_with("zstd")) {
        let gzip = layer.media_type.ends_with("gzip");
        let compression = if gzip { Compression::Gzip } else { Compression::None };
        let options = Options { compression, span_bytes, compact: None, limits: Limits::DEFAULT };
        let ztoc = indexing::index_bytes(&layout.blob(&layer.digest), options).unwrap().into_ztoc().unwrap();
        let encoded = ztoc.encode().unwrap();
        let golden = directory.join("ztocs").join(format!("{}.ztoc", encoded.digest().hex()));
        assert_eq!(std::fs::read(&golden).ok(), Some(encoded.to_vec()), "{}", golden.display());
        let reference = ZtocReference {
            digest: encoded.digest(),
            size: encoded.len(),
            layer: layer.digest,
            layer_media_type: layer.media_type.clone(),
            span_bytes,
            disable_xattrs: false,
        };
        ztocs.push((layer.clone(), ztoc, reference));
    }
    ztocs
}

fn references(ztocs: &[Layer]) -> Vec<ZtocReference> {
    ztocs.iter().map(|(_, _, reference)| reference.clone()).collect()
}

fn check_image(directory: &Path, readme: &str, layout: &Layout, platform: &str, image: &Descriptor) -> usize {
    let ztocs = ztocs(directory, readme, layout, image);
    let mut compared = 0;
    let mut check = |kind: &str, index: &SociIndex| {
        let golden = directory.join(kind).join(format!("soci-index-{platform}.json"));
        let Ok(golden) = std::fs::read(&golden) else { return };
        assert_eq!(String::from_utf8(index.to_json()).unwrap(), String::from_utf8(golden.clone()).unwrap(), "{kind}");
        assert_eq!(SociIndex::parse(&golden, &Limits::DEFAULT).unwrap(), *index);
        compared += 1;
    };
    let references = references(&ztocs);
    check("v1", &SociIndex::v1(&references, &[], image));
    let optimised =
        |(_, ztoc, reference): &Layer| ZtocReference { disable_xattrs: ztoc.has_no_xattrs(), ..reference.clone() };
    check("v1-xattr-optimization", &SociIndex::v1(&ztocs.iter().map(optimised).collect::<Vec<_>>(), &[], image));
    let artifacts = prefetch_artifacts(directory, readme, &ztocs);
    check("v1-prefetch", &SociIndex::v1(&references, &artifacts, image));
    check("v2", &SociIndex::v2(&references, &[]));
    check("v2-prefetch", &SociIndex::v2(&references, &artifacts));
    compared
}

/// The documents of a SOCI-enabled image, and of one that was enabled before.
#[test]
fn enabled_images_are_identical() {
    let mut compared = 0;
    for case in ["01-single-platform", "02-two-platforms", "03-docker-types", "04-index-with-attestations"] {
        let directory = soci_tests::golden::golden().join("images").join(case);
        let readme = std::fs::read_to_string(directory.join("README.md")).unwrap();
        let layout = Layout(directory.join("layout"));
        for kind in ["v2", "v2-prefetch"] {
            let (mut indexed, mut children) = (Vec::new(), BTreeMap::new());
            let root = root(&layout);
            for (_, image) in layout.images() {
                let ztocs = ztocs(&directory, &readme, &layout, &image);
                let artifacts = prefetch_artifacts(&directory, &readme, &ztocs);
                let artifacts = if kind == "v2" { &[][..] } else { &artifacts };
                let index = SociIndex::v2(&references(&ztocs), artifacts).to_json().into();
                let entry = root.manifests.iter().find(|entry| entry.digest == image.digest).unwrap();
                indexed.push(Indexed { image: image.digest, platform: entry.platform.clone().unwrap(), index });
            }
            for entry in &root.manifests {
                children.insert(entry.digest, layout.blob(&entry.digest).into());
            }
            let enabled = enable(&root, &children, &indexed, EntryNotes::Replaced).unwrap();
            let golden = std::fs::read_to_string(directory.join(kind).join("image-index.json")).unwrap();
            assert_eq!(String::from_utf8(enabled.index.bytes.to_vec()).unwrap(), golden, "{case} {kind}");
            compared += 1;
            if kind != "v2" {
                continue;
            }
            // Once more: what was made is what is found.
            let again = Index::parse(&enabled.index.bytes).unwrap();
            let children = enabled.manifests.iter().map(|made| (made.digest, made.bytes.clone())).collect();
            for one in &mut indexed {
                one.image = enabled.renamed[&one.image];
            }
            let again = enable(&again, &children, &indexed, EntryNotes::Replaced).unwrap();
            let golden = std::fs::read_to_string(directory.join("v2-again/image-index.json")).unwrap();
            assert_eq!(String::from_utf8(again.index.bytes.to_vec()).unwrap(), golden, "{case} again");
            compared += 1;
        }
    }
    assert_eq!(compared, 12);
}

/// The image index of a layout; a single manifest in an index made for it.
fn root(layout: &Layout) -> Index {
    let index = Index::parse(&std::fs::read(layout.0.join("index.json")).unwrap()).unwrap();
    let [only] = index.manifests.as_slice() else { panic!("one root") };
    let body: Value = serde_json::from_slice(&layout.blob(&only.digest)).unwrap();
    if body.get("manifests").is_some() {
        return Index::parse(&layout.blob(&only.digest)).unwrap();
    }
    let config: Value =
        serde_json::from_slice(&layout.blob(&body["config"]["digest"].as_str().unwrap().parse().unwrap())).unwrap();
    let platform: soci_index::format::model::ImageConfig = serde_json::from_value(config).unwrap();
    let mut entry: ManifestEntry = only.clone();
    entry.platform = Some(EntryPlatform::from(&platform.platform));
    Index::of(vec![entry])
}

fn prefetch_artifacts(directory: &Path, readme: &str, ztocs: &[Layer]) -> Vec<(Digest, Descriptor)> {
    let layers: Vec<(Digest, &Ztoc)> = ztocs.iter().map(|(layer, ztoc, _)| (layer.digest, ztoc)).collect();
    let plan = prefetch::plan(&layers, &wanted(readme));
    let mut artifacts = BTreeMap::new();
    let noted = |(layer, prefetch): &(Digest, Prefetch)| {
        let json = prefetch.to_json();
        assert_eq!(Prefetch::parse(&json, &Limits::DEFAULT).unwrap(), *prefetch);
        let golden = directory.join("prefetch").join(format!("{}.json", Digest::of(&json).hex()));
        assert_eq!(std::fs::read(&golden).ok(), Some(json.clone()), "{}", golden.display());
        artifacts.insert(*layer, ());
        (*layer, Descriptor::of("", &json))
    };
    plan.layers.iter().map(noted).collect()
}

#[test]
fn foreign_documents_are_refused() {
    let parse =
        |text: &str| SociIndex::parse(text.as_bytes(), &Limits::DEFAULT).map(|_| ()).map_err(|error| error.to_string());
    assert!(parse("{}").is_err());
    assert!(parse("[").is_err());
    let image = r#"{"schemaVersion":2,"mediaType":"m","config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","size":2},"layers":[]}"#;
    assert!(parse(image).is_err_and(|error| error.contains("application/vnd.oci.image.config.v1+json")));
    let large = " ".repeat(5 << 20);
    assert!(parse(&large).is_err_and(|error| error.contains("limit")));
    for bad in [
        r#"{"version":"2.0","prefetch_spans":[{"start_span":0,"end_span":0}]}"#,
        r#"{"version":"1.0","prefetch_spans":[]}"#,
        r#"{"version":"1.0","prefetch_spans":[{"start_span":3,"end_span":2}]}"#,
        r#"{"version":"1.0","prefetch_spans":[{"start_span":-1,"end_span":2}]}"#,
    ] {
        assert!(Prefetch::parse(bad.as_bytes(), &Limits::DEFAULT).is_err(), "{bad}");
    }
}

/// Go escapes three characters that serde leaves alone.
#[test]
fn json_is_escaped_as_go_does() {
    let mut reference = ZtocReference {
        digest: Digest::of(b""),
        size: 0,
        layer: Digest::of(b""),
        layer_media_type: "a<b>&\u{2028}".to_owned(),
        span_bytes: 1,
        disable_xattrs: false,
    };
    reference.disable_xattrs = true;
    let subject = Descriptor::new("m", Digest::of(b""), 0);
    let json = String::from_utf8(SociIndex::v1(&[reference], &[], &subject).to_json()).unwrap();
    assert!(json.contains(r#""a\u003cb\u003e\u0026\u2028""#), "{json}");
}
