//! Archives as Docker wrote them, and as it never would.

use std::io::Write as _;

use super::*;
use crate::image::archive::Archive;
use crate::image::store::Store as _;

#[derive(Clone)]
enum Put {
    File(Vec<u8>),
    Symlink(&'static str),
    HardLink(&'static str),
}

/// A tar file of these members.
fn archive(members: &[(&str, Put)]) -> tempfile::NamedTempFile {
    let mut builder = tar::Builder::new(tempfile::NamedTempFile::new().unwrap());
    for (name, put) in members {
        let mut header = tar::Header::new_gnu();
        header.set_size(0);
        header.set_mode(0o644);
        match put {
            Put::File(bytes) => {
                header.set_size(bytes.len() as u64);
                builder.append_data(&mut header, name, &bytes[..]).unwrap();
            }
            Put::Symlink(target) => {
                header.set_entry_type(tar::EntryType::Symlink);
                builder.append_link(&mut header, name, target).unwrap();
            }
            Put::HardLink(target) => {
                header.set_entry_type(tar::EntryType::Link);
                builder.append_link(&mut header, name, target).unwrap();
            }
        }
    }
    builder.into_inner().unwrap()
}

fn file(text: &str) -> Put {
    Put::File(text.as_bytes().to_vec())
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

const CONFIG: &str = r#"{"os":"linux","architecture":"amd64","rootfs":{"diff_ids":[]}}"#;

/// The usual archive, with `manifest` for manifest.json.
fn usual(manifest: &str) -> tempfile::NamedTempFile {
    archive(&[
        ("a/layer.tar", file("plain")),
        ("b/layer.tar", Put::Symlink("../a/layer.tar")),
        ("c/layer.tar", Put::HardLink("a/layer.tar")),
        ("d.tar", Put::File(gzip(b"plain"))),
        ("loop/1", Put::Symlink("2")),
        ("loop/2", Put::Symlink("1")),
        ("up/layer.tar", Put::Symlink("../../etc/passwd")),
        ("root/layer.tar", Put::Symlink("/etc/passwd")),
        ("gone/layer.tar", Put::Symlink("../nowhere")),
        ("c.json", file(CONFIG)),
        ("manifest.json", file(manifest)),
    ])
}

#[test]
fn layers_are_described_by_their_bytes() {
    let layers = r#"["a/layer.tar","b/layer.tar","./c/layer.tar","d.tar","a/../a/layer.tar"]"#;
    let manifest = format!(r#"[{{"Config":"c.json","RepoTags":["app:1","other/app:2"],"Layers":{layers}}}]"#);
    let file = usual(&manifest);
    let store = Archive::open_saved(file.path(), None).unwrap();
    assert!(store.has_made_manifest());
    let entries = store.entries().unwrap();
    let names: Vec<&str> =
        entries.iter().map(|entry| entry.annotations[annotation::CONTAINERD_NAME].as_str()).collect();
    assert_eq!(names, ["app:1", "other/app:2"]);
    let raw = store.manifest(&entries[0]).unwrap().unwrap();
    let manifest: crate::format::model::ImageManifest = serde_json::from_slice(&raw.bytes).unwrap();
    assert_eq!(manifest.config, Descriptor::of(media_type::CONFIG, CONFIG.as_bytes()));
    let plain = Descriptor::of(TAR, b"plain");
    let packed = Descriptor::of(&format!("{TAR}+gzip"), &gzip(b"plain"));
    assert_eq!(manifest.layers, [plain.clone(), plain.clone(), plain.clone(), packed.clone(), plain.clone()]);
    for (layer, content) in [(&plain, b"plain".to_vec()), (&packed, gzip(b"plain"))] {
        assert_eq!(store.blob_bytes(layer, 1000).unwrap().unwrap(), content);
    }
    // The same archive gives the same manifest.
    let again = Archive::open_saved(file.path(), Some("2")).unwrap();
    assert_eq!(again.entries().unwrap()[0].digest, entries[0].digest);
}

/// An archive of two plain layers as newer releases of Docker write it, with a layout whose manifest has these layers.
fn with_layout(layers: impl Fn(Descriptor, Descriptor) -> Vec<Descriptor>) -> (tempfile::NamedTempFile, Digest) {
    let (one, two) = (Descriptor::of(TAR, b"one"), Descriptor::of(TAR, b"other"));
    let config = format!(r#"{{"rootfs":{{"diff_ids":["{}","{}"]}}}}"#, one.digest, two.digest);
    let names = [&one, &two].map(|layer| format!("blobs/sha256/{}", layer.digest.hex()));
    let saved = json!([{
        "Config": format!("blobs/sha256/{}", Digest::of(config.as_bytes()).hex()),
        "RepoTags": ["app:1"],
        "Layers": names,
    }]);
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": media_type::MANIFEST,
        "config": Descriptor::of(media_type::CONFIG, config.as_bytes()),
        "layers": layers(one, two),
    });
    let manifest = manifest.to_string();
    let entry = Descriptor::of(media_type::MANIFEST, manifest.as_bytes());
    let nested = json!({ "schemaVersion": 2, "mediaType": media_type::INDEX, "manifests": [entry] }).to_string();
    let root = Descriptor::of(media_type::INDEX, nested.as_bytes());
    let index = json!({ "schemaVersion": 2, "manifests": [root] }).to_string();
    let blobs: Vec<(String, Put)> = ["one", "other", &config, &manifest, &nested]
        .map(|blob| (format!("blobs/sha256/{}", Digest::of(blob.as_bytes()).hex()), file(blob)))
        .into();
    let mut members: Vec<(&str, Put)> = blobs.iter().map(|(name, put)| (name.as_str(), put.clone())).collect();
    members.extend([
        ("oci-layout", file(r#"{"imageLayoutVersion":"1.0.0"}"#)),
        ("index.json", file(&index)),
        ("manifest.json", file(&saved.to_string())),
    ]);
    (archive(&members), entry.digest)
}

#[test]
fn a_layout_counts_only_if_it_agrees() {
    let right = [Descriptor::of(TAR, b"one"), Descriptor::of(TAR, b"other")];
    let size = |layer: Descriptor| Descriptor { size: layer.size + 1, ..layer };
    let kind = |layer: Descriptor, kind: &str| Descriptor { media_type: kind.to_owned(), ..layer };
    type Layers<'l> = &'l dyn Fn(Descriptor, Descriptor) -> Vec<Descriptor>;
    let cases: [(Layers<'_>, bool); 7] = [
        (&|one, two| vec![one, two], true),
        (&|one, two| vec![two, one], false),
        (&|one, two| vec![one, size(two)], false),
        (&|one, two| vec![one, kind(two, "application/vnd.oci.image.layer.v1.tar+gzip")], false),
        (&|one, _| vec![one], false),
        (&|one, two| vec![one.clone(), two, one], false),
        (&|one, _| vec![one, Descriptor::of(TAR, b"not there")], false),
    ];
    for (number, (layers, is_used)) in cases.into_iter().enumerate() {
        let (file, digest) = with_layout(layers);
        let store = Archive::open_saved(file.path(), None).unwrap();
        assert_eq!(store.has_made_manifest(), !is_used, "case {number}");
        let entry = &store.entries().unwrap()[0];
        assert_eq!(
            (entry.digest == digest, entry.annotations[annotation::CONTAINERD_NAME].as_str()),
            (is_used, "app:1")
        );
        let raw = store.manifest(entry).unwrap().unwrap();
        let manifest: crate::format::model::ImageManifest = serde_json::from_slice(&raw.bytes).unwrap();
        assert_eq!(manifest.layers, right, "case {number}");
        for (layer, content) in right.iter().zip(["one", "other"]) {
            assert_eq!(store.blob_bytes(layer, 1000).unwrap().unwrap(), content);
        }
    }
}

#[test]
fn a_layout_alone_is_read() {
    let file = archive(&[
        ("oci-layout", file(r#"{"imageLayoutVersion":"1.0.0"}"#)),
        ("index.json", file(r#"{"manifests":[]}"#)),
    ]);
    let archive = Archive::open_saved(file.path(), None).unwrap();
    assert!(!archive.has_made_manifest());
    assert_eq!(archive.entries().unwrap(), []);
}

/// Keys of manifest.json as Jib has written them, and names as skopeo takes them.
#[test]
fn keys_and_names() {
    let file = usual(
        r#"[{"config":"c.json","repoTags":["team/app:latest"],"layers":["a/layer.tar"]},
        {"CONFIG":"c.json","RepoTags":["team/db:latest"],"Layers":["d.tar"]},{"Config":"c.json","Layers":[]}]"#,
    );
    let layers = |tag| {
        let store = Archive::open_saved(file.path(), Some(tag)).unwrap();
        let raw = store.manifest(&store.entries().unwrap()[0]).unwrap().unwrap();
        serde_json::from_slice::<crate::format::model::ImageManifest>(&raw.bytes).unwrap().layers
    };
    for tag in ["team/db:latest", "team/db", "docker.io/team/db:latest", "@1"] {
        assert_eq!(layers(tag), [Descriptor::of(&format!("{TAR}+gzip"), &gzip(b"plain"))], "{tag}");
    }
    assert_eq!(layers("team/app:latest"), [Descriptor::of(TAR, b"plain")]);
    assert_eq!(layers("@2"), []);
    for tag in [None, Some("latest")] {
        let error = Archive::open_saved(file.path(), tag).unwrap_err().to_string();
        assert!(error.contains("(there are team/app:latest, team/db:latest, @2)"), "{error}");
    }
}

#[test]
fn hostile_archives() {
    let with = |layers: &str| format!(r#"[{{"Config":"c.json","RepoTags":null,"Layers":{layers}}}]"#);
    let many = format!("[{}\"a/layer.tar\"]", "\"a/layer.tar\",".repeat(LAYERS_MAX));
    let two = r#"[{"Config":"c.json","RepoTags":["a:1"]},{"Config":"c.json","RepoTags":["b:1"]}]"#;
    let images = format!("[{}{{\"Config\":\"c.json\"}}]", "{\"Config\":\"c.json\"},".repeat(IMAGES_MAX));
    for (manifest, tag, expected) in [
        (with(r#"["nowhere"]"#), None, "nowhere is missing"),
        (with(r#"["gone/layer.tar"]"#), None, "gone/layer.tar is missing"),
        (with(r#"["../../etc/passwd"]"#), None, "leads out of the archive"),
        (with(r#"["/etc/passwd"]"#), None, "leads out of the archive"),
        (with(r#"["up/layer.tar"]"#), None, "leads out of the archive"),
        (with(r#"["root/layer.tar"]"#), None, "leads out of the archive"),
        (with(r#"["loop/1"]"#), None, "through more than 8 links"),
        (with(r#"[""]"#), None, "is missing"),
        (with(r#"["a"]"#), None, "is missing"),
        (with(&many), None, "more than 1000 layers"),
        (with("{}"), None, "manifest.json cannot be read"),
        (r#"[{"Config":"none.json"}]"#.to_owned(), None, "none.json is missing"),
        (r#"[{"Layers":[]}]"#.to_owned(), None, "missing field `config`"),
        ("[]".to_owned(), None, "lists no image"),
        ("[".to_owned(), None, "manifest.json cannot be read"),
        (two.to_owned(), None, "holds 2 images: name one (there are a:1, b:1)"),
        (two.to_owned(), Some("1"), "holds 2 images"),
        (two.to_owned(), Some("c"), "holds no image c (there are a:1, b:1)"),
        (images, None, "more than 1000 images"),
    ] {
        let file = usual(&manifest);
        let error = Archive::open_saved(file.path(), tag).unwrap_err();
        assert!(matches!(error, StoreError::Saved { .. }), "{error:?}");
        assert!(error.to_string().contains(expected), "{expected}: {error}");
    }
    assert!(Archive::open_saved(usual(two).path(), Some("a:1")).is_ok());
}

#[test]
fn files_that_are_no_archive_of_docker_s() {
    let empty = archive(&[]);
    let error = Archive::open_saved(empty.path(), None).unwrap_err();
    assert!(matches!(error, StoreError::Saved { reason: SavedError::NoManifest, .. }), "{error:?}");
    let long = archive(&[("manifest.json", Put::File(vec![b' '; 5 << 20]))]);
    assert!(matches!(Archive::open_saved(long.path(), None), Err(StoreError::TooLarge { .. })));
    // Cut off within the last member, and within a header.
    let whole = usual(r#"[{"Config":"c.json"}]"#);
    let length = whole.as_file().metadata().unwrap().len();
    for cut in [length - 1024 - 512, 700] {
        whole.as_file().set_len(cut).unwrap();
        assert!(Archive::open_saved(whole.path(), None).is_err(), "cut at {cut}");
    }
    let names: Vec<String> = (0..200).map(|number| format!("{number}{}", "x".repeat(90_000))).collect();
    let members: Vec<(&str, Put)> = names.iter().map(|name| (name.as_str(), file(""))).collect();
    let error = Archive::open_saved(archive(&members).path(), None).unwrap_err().to_string();
    assert!(error.contains("bytes of names"), "{error}");
}
