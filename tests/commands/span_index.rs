//! The span index beside AWS's: published, found first, read by, and of no harm to others.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use soci_fs::layer::store::Store;
use soci_fs::open::{ImageOpener, KeptLayer, LayerOrigin, OpenOptions, Way, reopen_layer};
use soci_index::find::discover::{Discovery, Which, on_registry, preferred_on_registry};
use soci_index::format::digest::Digest;
use soci_index::format::icon;
use soci_index::format::limits::Limits;
use soci_index::format::manifest::INDEX_V1;
use soci_index::format::model::{Descriptor, ImageIndex, ImageManifest};
use soci_index::format::platform::PlatformSelection;
use soci_index::format::profile::artifact::ARTIFACT as PROFILE_ARTIFACT;
use soci_index::format::profile::{PAGE_BYTES, Profile, Touched};
use soci_index::format::reference::ManifestName;
use soci_index::format::span_index::{SPAN_INDEX, SpanIndex};
use soci_index::image::ImageSource;
use soci_index::registry::{ClientOptions, CredentialSource, Repository};
use soci_tests::front::Front;
use soci_tests::go::peer;
use soci_tests::image::{Image, tar, text};
use soci_tests::registry::{BothKinds, DockerRegistry, client};
use soci_tests::{run, soci, stdout};

const FLAGS: [&str; 6] = ["--min-layer-size", "0", "--span-size", "100000", "--index-span-size", "50000"];

fn image() -> Image {
    let names: Vec<String> = (0..40).map(|number| format!("srv/data/{number}")).collect();
    let files: Vec<(&str, Vec<u8>)> = names.iter().map(|name| (name.as_str(), text(7, 60_000))).collect();
    Image::gzip(vec![tar(&files), tar(&[("etc/motd", text(3, 300_000))])])
}

fn publish(name: &str, more: &[&str]) -> serde_json::Value {
    serde_json::from_str(&stdout(soci().args(["publish", name, "--json"]).args(FLAGS).args(more))).unwrap()
}

fn options(root: &Path) -> OpenOptions {
    OpenOptions { index_store: Some(root.join("content")), ..OpenOptions::default() }
}

async fn source(name: &str) -> ImageSource {
    let client = ClientOptions { credentials: CredentialSource::Anonymous, ..ClientOptions::default() };
    ImageSource::open(&name.parse().unwrap(), &client).await.unwrap()
}

async fn open(name: &str, root: &Path, options: OpenOptions) -> ImageOpener {
    let source = source(name).await;
    let image = source.resolve(&PlatformSelection::Host).await.unwrap().remove(0);
    let store = Arc::new(Store::open(root).unwrap());
    ImageOpener::new(source, image, store, options, tokio::runtime::Handle::current()).await.unwrap()
}

/// Opens the image's layers and compares all of their bytes; gives the index and the media type of each table.
async fn read_all(name: &str, image: &Image, options: OpenOptions, root: &Path) -> (Digest, Vec<String>) {
    let opener = open(name, root, options).await;
    let mut kinds = Vec::new();
    for (layer, tar) in opener.image().manifest.layers.clone().iter().zip(&image.tars) {
        let opened = opener.open_layer(layer, Digest::of(tar)).await.unwrap();
        assert_eq!(opened.note.way, Way::Lazy);
        let length = usize::try_from(opened.reader.index().uncompressed_size).unwrap();
        assert!(opened.reader.read(0, length).await.unwrap() == tar[..length]);
        kinds.push(opened.table.unwrap().media_type);
    }
    (opener.index().unwrap(), kinds)
}

async fn spans_of(repository: &Repository, image: &Image) -> SpanIndex {
    let found = preferred_on_registry(repository, &image.digest(), Which::Newest, &[SPAN_INDEX]).await.unwrap();
    let Discovery::Found(found) = found else { panic!("no span index: {found:?}") };
    SpanIndex::parse(&found.raw, &Limits::DEFAULT).unwrap()
}

/// The image in a registry, as `team/app:v1`.
async fn pushed(address: &str) -> (Image, Repository) {
    let (image, repository) = (image(), client(address).repository("team/app"));
    image.push(&repository, "v1").await;
    (image, repository)
}

/// On registries with and without the referrers API: both indexes are there, ours is read by us, AWS's by AWS.
#[tokio::test(flavor = "multi_thread")]
async fn beside_each_other() {
    let registries = BothKinds::start();
    for address in registries.addresses() {
        let (image, repository) = pushed(address).await;
        let name = format!("{address}/team/app:v1");
        let published = publish(&name, &[]);
        let one = &published["images"][0];
        let (aws, spans) = (&one["index"]["digest"], &one["spanIndex"]["digest"]);
        assert!(aws.is_string() && spans.is_string() && aws != spans, "{published:#}");

        let root = tempfile::tempdir().unwrap();
        let (index, kinds) = read_all(&name, &image, options(root.path()), root.path()).await;
        assert_eq!((index.to_string().as_str(), kinds), (spans.as_str().unwrap(), vec![TOC.to_owned(); 2]));

        // What only knows AWS's finds AWS's.
        let Discovery::Found(found) = on_registry(&repository, &image.digest(), Which::Newest).await.unwrap() else {
            panic!("AWS's index is not found")
        };
        assert_eq!((found.digest.to_string().as_str(), found.others), (aws.as_str().unwrap(), 0));
        if let Some(peer) = peer() {
            let work = tempfile::tempdir().unwrap();
            let size = image.manifest.len().to_string();
            let mut pull = Command::new(&peer);
            pull.args(["pull", &format!("{address}/team/app"), &image.digest().to_string(), &size]).arg(work.path());
            let pulled = stdout(&mut pull);
            assert!(pulled.lines().any(|line| line == aws.as_str().unwrap()), "{address}: {pulled}");
        }

        // The same again: nothing to do. Without one of its blobs: built again.
        assert_eq!(publish(&name, &[])["images"][0]["spanIndex"]["status"], "up to date");
        assert_eq!(stdout(soci().args(["verify", &name])).matches(" identical").count(), 6, "{address}");
    }
}

/// Beside an image that carries AWS's index: found first, by other tags and repositories too; the image is the same
/// with it and without it. It comes later, too.
#[tokio::test(flavor = "multi_thread")]
async fn beside_a_converted_image() {
    let registries = BothKinds::start();
    for address in registries.addresses() {
        let (image, _) = pushed(address).await;
        let at = |name: &str| format!("{address}/team/{name}");
        let name = at("app:v1-soci");
        let publish_to = |to: &str, more: &[&str]| publish(&at("app:v1"), &[&["--v2", "--as", to], more].concat());
        let plain = publish_to(&name, &[]);
        assert!(plain["images"][0]["spanIndex"].is_null(), "it was not asked for: {plain:#}");
        let root = tempfile::tempdir().unwrap();
        let (index, _) = read_all(&name, &image, options(root.path()), root.path()).await;
        assert_eq!(plain["images"][0]["index"]["digest"], index.to_string());

        let both = publish_to(&name, &["--format", "both"]);
        let one = &both["images"][0];
        assert_eq!((&both["digest"], &both["status"]), (&plain["digest"], &"written".into()), "{address}: {both:#}");
        assert_eq!(one["spanIndex"]["status"], "published", "{both:#}");
        let root = tempfile::tempdir().unwrap();
        let (index, kinds) = read_all(&name, &image, options(root.path()), root.path()).await;
        assert_eq!((one["spanIndex"]["digest"].clone(), kinds), (index.to_string().into(), vec![TOC.to_owned(); 2]));

        let again = publish_to(&name, &["--format", "both"]);
        let one_again = &again["images"][0];
        assert_eq!(again["status"], "up to date", "{again:#}");
        assert_eq!(one_again["spanIndex"]["status"], "up to date", "{again:#}");
        for layer in one_again["layers"].as_array().unwrap() {
            assert!(layer["reused"] == false && layer["spans"]["reused"] == false, "it is not signed: {layer:#}");
        }
        let elsewhere = publish_to(&at("other:v1"), &["--format", "both"]);
        assert_eq!(elsewhere["images"][0]["spanIndex"]["digest"], one["spanIndex"]["digest"]);
        let converted = ["convert", &name, &at("third:v1"), "--span-index", "--json"];
        let converted: serde_json::Value = serde_json::from_str(&stdout(soci().args(converted).args(FLAGS))).unwrap();
        assert_eq!(converted["images"][0]["spanIndex"]["digest"], one["spanIndex"]["digest"]);
        for name in ["other:v1", "third:v1"] {
            let root = tempfile::tempdir().unwrap();
            let (found, _) = read_all(&at(name), &image, options(root.path()), root.path()).await;
            assert_eq!(found, index, "{address}: {name}");
        }
    }
}

/// Where nothing refers to an image, and where AWS's form would be missing, is said before anything is read.
#[test]
fn no_span_index_without_a_place_for_it() {
    let place = tempfile::tempdir().unwrap();
    let layout = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/images/01-single-platform/layout");
    let (source, to) = (format!("oci:{}", layout.display()), format!("oci:{}/out:v1", place.path().display()));
    for (arguments, text) in [
        (vec!["convert", &source, &to, "--span-index"], "in a registry only"),
        (vec!["publish", "h.example/a:v1", "--v2", "--format", "span"], "--format both"),
        (vec!["convert", &source, "h.example/a:v1", "--span-index", "--index-span-size", "0"], "--index-span-size"),
        (vec!["serve-webhook", "--registry", "h.example", "--v2", "--format", "span"], "--format both"),
    ] {
        let output = run(soci().args(&arguments));
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {message}");
        assert!(message.contains(text), "{arguments:?}: {message}");
    }
    assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 0, "nothing was begun");
}

/// One form without the other; and `create` with `push` makes what `publish` makes.
#[tokio::test(flavor = "multi_thread")]
async fn one_form_or_the_other() {
    let Some(registry) = DockerRegistry::start() else { return };
    let mut made = Vec::new();
    for (tag, format) in [("aws", "aws"), ("span", "span")] {
        let (image, repository) = (image(), client(&registry.address).repository(&format!("team/{tag}")));
        image.push(&repository, "v1").await;
        let name = format!("{}/team/{tag}:v1", registry.address);
        let published = publish(&name, &["--format", format]);
        assert!(published["images"][0]["spanIndex"].is_null(), "{published:#}");
        made.push(published["images"][0]["index"]["digest"].clone());
        let root = tempfile::tempdir().unwrap();
        let (_, kinds) = read_all(&name, &image, options(root.path()), root.path()).await;
        assert_eq!(kinds[0] == TOC, format == "span", "{kinds:?}");
    }
    let (image, repository) = (image(), client(&registry.address).repository("team/steps"));
    image.push(&repository, "v1").await;
    let (name, root) = (format!("{}/team/steps:v1", registry.address), tempfile::tempdir().unwrap());
    let _ = stdout(soci().arg("--root").arg(root.path()).args(["create", &name]).args(FLAGS));
    let pushed = stdout(soci().arg("--root").arg(root.path()).args(["push", &name, "--quiet"]));
    let pushed: Vec<serde_json::Value> = pushed.lines().map(Into::into).collect();
    assert_eq!(pushed, made);
    assert_eq!(spans_of(&repository, &image).await.references().count(), 2);
}

/// A TOC that is gone or is none costs nothing but the better index.
#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_span_index_leaves_the_other() {
    let Some(registry) = DockerRegistry::start() else { return };
    let (image, repository) = (image(), client(&registry.address).repository("team/app"));
    image.push(&repository, "v1").await;
    let name = format!("{}/team/app:v1", registry.address);
    let _ = publish(&name, &["--format", "aws"]);
    let good = {
        let _ = publish(&name, &["--format", "span"]);
        spans_of(&repository, &image).await
    };
    // A newer one, of which the first layer's TOC is something else.
    let junk = repository_blob(&repository, b"not a TOC").await;
    let mut references: Vec<_> = good.references().collect();
    references[0].toc = junk;
    let mut bad = serde_json::to_value(SpanIndex::new(&references, &good.subject)).unwrap();
    bad["annotations"] = serde_json::json!({ "org.opencontainers.image.created": "2030-01-01T00:00:00Z" });
    let manifest = "application/vnd.oci.image.manifest.v1+json";
    repository.push_referrer(manifest, bad.to_string().into()).await.unwrap();
    let root = tempfile::tempdir().unwrap();
    let (_, kinds) = read_all(&name, &image, options(root.path()), root.path()).await;
    assert!(kinds[0] != TOC && kinds[1] == TOC, "{kinds:?}");
}

async fn repository_blob(repository: &Repository, bytes: &'static [u8]) -> (Digest, u64) {
    let body = soci_index::registry::Body::Bytes(bytes.into());
    repository.push_blob(&Digest::of(bytes), body, None).await.unwrap();
    (Digest::of(bytes), bytes.len() as u64)
}

/// After a restart a layer is opened from what is kept, and its windows come from where they were.
#[tokio::test(flavor = "multi_thread")]
async fn a_restart_needs_no_registry() {
    let Some(registry) = DockerRegistry::start() else { return };
    let (image, repository) = (image(), client(&registry.address).repository("team/app"));
    image.push(&repository, "v1").await;
    let name = format!("{}/team/app:v1", registry.address);
    // In another repository, where a restarted process does not look.
    let to = format!("{}/soci/indexes", registry.address);
    let _ = publish(&name, &["--to", &to]);
    let (root, runtime) = (tempfile::tempdir().unwrap(), tokio::runtime::Handle::current());
    let options = OpenOptions {
        index_repositories: vec![client(&registry.address).repository("soci/indexes")],
        ..options(root.path())
    };
    let opener = open(&name, root.path(), options.clone()).await;
    let layer = opener.image().manifest.layers[0].clone();
    let opened = opener.open_layer(&layer, Digest::of(&image.tars[0])).await.unwrap();
    assert!(opened.reader.read(200_000, 1_000).await.unwrap() == image.tars[0][200_000..201_000]);
    let origin = LayerOrigin { image: source(&name).await, layer, index_from: opened.index_from.clone() };
    let kept = KeptLayer { claim: opened.claim, origins: vec![origin] };
    drop((opened, opener));
    let store = Arc::new(Store::open(root.path()).unwrap());
    let options = OpenOptions { index_repositories: Vec::new(), ..options };
    let reader = reopen_layer(&kept, &store, &options, &runtime).await.unwrap().unwrap();
    assert!(reader.store().present_bytes() > 0);
    let length = usize::try_from(reader.index().uncompressed_size).unwrap();
    assert!(reader.read(0, length).await.unwrap() == image.tars[0][..length]);
}

const TOC: &str = soci_index::format::compact::TOC;

/// What is published again with a smaller `--min-layer-size` is used from then on, whatever the digests are; with a
/// larger one it is said that the earlier index stays in use.
#[tokio::test(flavor = "multi_thread")]
async fn the_index_of_more_layers_is_used() {
    let registry = soci_cli::demo::registry::DemoRegistry::start(std::time::Duration::ZERO).await.unwrap();
    let host = registry.host();
    // With one image the digests could be right by chance.
    for number in 0..4 {
        let image = Image::gzip(vec![tar(&[("a", text(number, 300_000))]), tar(&[("b", text(number + 9, 40_000))])]);
        image.push(&client(&host).repository(&format!("team/{number}")), "v1").await;
        let name = format!("{host}/team/{number}:v1");
        let publish = |min: &str| -> serde_json::Value {
            let words = ["publish", &name, "--json", "--span-size", "65536", "--min-layer-size", min];
            serde_json::from_str(&stdout(soci().args(words))).unwrap()
        };
        let one = publish("50000");
        assert_eq!(one["images"][0]["usedInstead"], serde_json::json!([]), "{one:#}");
        let two = publish("0");
        assert_eq!(two["images"][0]["usedInstead"], serde_json::json!([]), "{two:#}");
        let root = tempfile::tempdir().unwrap();
        let (index, kinds) = read_all(&name, &image, options(root.path()), root.path()).await;
        let spans = &two["images"][0]["spanIndex"]["digest"];
        assert_eq!((spans, kinds.len()), (&index.to_string().into(), 2), "{two:#}");
        assert_ne!(*spans, one["images"][0]["spanIndex"]["digest"]);
        let verified = stdout(soci().args(["verify", &name, "--json"]));
        let verified: serde_json::Value = serde_json::from_str(&verified).unwrap();
        let passed_over = verified[0]["passedOver"].as_array().unwrap();
        let reasons: Vec<&str> = passed_over.iter().filter_map(|other| other["reason"].as_str()).collect();
        assert!(reasons.contains(&"it covers fewer layers"), "{reasons:?}");
        let again = publish("50000");
        let instead = again["images"][0]["usedInstead"].as_array().unwrap();
        assert!(instead.contains(spans) && instead.len() == 2, "{again:#}");
    }
}

/// Harbor looks for an icon among the layers of a manifest. Ours have it, wherever they go; AWS's forms stay as AWS's
/// tool makes them; nothing that reads an index fetches it.
#[tokio::test(flavor = "multi_thread")]
async fn only_ours_have_the_icon() {
    let registry = soci_cli::demo::registry::DemoRegistry::start(std::time::Duration::ZERO).await.unwrap();
    let front = Front::start(&registry.host()).await.unwrap();
    let (image, repository) = pushed(&registry.host()).await;
    let (name, root) = (format!("{}/team/app:v1", registry.host()), tempfile::tempdir().unwrap());
    let icon = Digest::of(icon::PNG);
    // In two steps: by way of the local store.
    drop(stdout(soci().arg("--root").arg(root.path()).args(["create", &name]).args(FLAGS)));
    assert!(root.path().join("content/blobs/sha256").join(icon.hex()).exists());
    drop(stdout(soci().arg("--root").arg(root.path()).args(["push", &name])));
    drop(publish(&name, &["--v2", "--as", &format!("{name}-soci"), "--format", "both"]));
    let file = root.path().join("p.profile");
    let range = Touched { layer: 0, bytes: 0..PAGE_BYTES };
    let profile = Profile::new(vec![Digest::of(&image.blobs[0])], vec![range], &Limits::DEFAULT).unwrap();
    std::fs::write(&file, profile.encode().unwrap()).unwrap();
    drop(stdout(soci().args(["profile", "push", &name, file.to_str().unwrap(), "--default"])));

    let mut found = Vec::new();
    for subject in [image.digest(), converted(&repository).await] {
        for entry in repository.referrers(&subject, None).await.unwrap().entries {
            let raw = repository.manifest(&ManifestName::Digest(entry.digest)).await.unwrap().unwrap();
            let manifest: ImageManifest = serde_json::from_slice(&raw.bytes).unwrap();
            let is_icon = |layer: &&Descriptor| layer.annotations.contains_key(icon::ANNOTATION);
            let icons: Vec<&Descriptor> = manifest.layers.iter().filter(is_icon).collect();
            assert!(icons.iter().all(|layer| layer.digest == icon && layer.media_type == "image/png"), "{manifest:?}");
            assert_eq!(icons.len(), usize::from(entry.kind() != INDEX_V1), "{manifest:?}");
            found.push(entry.kind().to_owned());
        }
    }
    found.sort();
    assert_eq!(found, [INDEX_V1, SPAN_INDEX, SPAN_INDEX, PROFILE_ARTIFACT]);
    let blob = Descriptor::new("image/png", icon, icon::PNG.len() as u64);
    assert_eq!(repository.blob_bytes(&blob, 1000).await.unwrap(), icon::PNG);

    // A picture that can be shown: each part of it has the checksum that it says.
    let mut rest = icon::PNG.strip_prefix(b"\x89PNG\r\n\x1a\n").unwrap();
    while !rest.is_empty() {
        let number = |at: usize| u32::from_be_bytes(rest[at..at + 4].try_into().unwrap());
        let length = number(0) as usize;
        let mut sum = flate2::Crc::new();
        sum.update(&rest[4..8 + length]);
        assert_eq!(sum.sum(), number(8 + length));
        rest = &rest[12 + length..];
    }

    // By all commands that read an index, and by way of a node.
    let fronted = format!("{}/team/app:v1", front.host());
    for line in [&["pull", &fronted, "--min-layer-size", "0"][..], &["verify", &fronted], &["doctor", &fronted]] {
        drop(run(soci().arg("--root").arg(root.path().join("node")).args(line)));
    }
    assert!(front.requests("/blobs/") > 3 && front.requests(&icon.hex()) == 0);
}

/// The manifest of the converted image.
async fn converted(repository: &Repository) -> Digest {
    let raw = repository.manifest(&ManifestName::Tag("v1-soci".to_owned())).await.unwrap().unwrap();
    let index: ImageIndex = serde_json::from_slice(&raw.bytes).unwrap();
    index.manifests.iter().find(|entry| entry.may_be_image()).unwrap().digest
}
