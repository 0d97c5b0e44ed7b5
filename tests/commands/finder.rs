//! One finder: all commands and the library take the same index of an image, and an index speaks for no other
//! repository than the one that it was fetched from.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde_json::{Value, json};
use soci_cli::demo::registry::DemoRegistry;
use soci_fs::layer::store::Store;
use soci_fs::open::{ImageOpener, OpenError, OpenOptions, Way};
use soci_index::format::digest::Digest;
use soci_index::format::manifest::{EMPTY_CONFIG, INDEX_DIGEST, INDEX_V1, INDEX_V2};
use soci_index::format::model::{Descriptor, annotation, media_type};
use soci_index::format::platform::PlatformSelection;
use soci_index::format::reference::ManifestName;
use soci_index::format::span_index::SPAN_INDEX;
use soci_index::image::layout::Layout;
use soci_index::image::{ImageSource, PlatformImage};
use soci_index::registry::{Body, ClientOptions, CredentialSource, Registry, Repository};
use soci_tests::front::{Fault, Front};
use soci_tests::image::{Image, tar, text};
use soci_tests::registry::client;
use soci_tests::{run, soci, stdout};

/// An image, and one index of each form with its blobs, of which any number of others can be made.
struct Stage {
    image: Image,
    /// The version 1 index and the span index, as they were published.
    indexes: BTreeMap<&'static str, Value>,
    blobs: Vec<Bytes>,
}

impl Stage {
    async fn new(content: &str) -> Self {
        let registry = DemoRegistry::start(Duration::ZERO).await.unwrap();
        let repository = client(&registry.host()).repository("made/here");
        let image = Image::gzip(vec![tar(&[(content, text(1, 300_000)), ("etc/motd", text(2, 1000))])]);
        image.push(&repository, "v1").await;
        let name = format!("{}/made/here:v1", registry.host());
        drop(stdout(soci().args(["publish", &name, "--min-layer-size", "0", "--span-size", "65536", "--json"])));
        let (mut indexes, mut blobs) = (BTreeMap::new(), vec![Bytes::from_static(EMPTY_CONFIG)]);
        for entry in repository.referrers(&image.digest(), None).await.unwrap().entries {
            let kind = [SPAN_INDEX, INDEX_V1].into_iter().find(|kind| *kind == entry.kind()).unwrap();
            let raw = repository.manifest(&ManifestName::Digest(entry.digest)).await.unwrap().unwrap();
            let index: Value = serde_json::from_slice(&raw.bytes).unwrap();
            for layer in index["layers"].as_array().unwrap() {
                let blob: Descriptor = serde_json::from_value(layer.clone()).unwrap();
                blobs.push(repository.blob_bytes(&blob, 1 << 30).await.unwrap());
            }
            indexes.insert(kind, index);
        }
        Self { image, indexes, blobs }
    }

    /// Another index of this form that says the same of the layers.
    fn index(&self, kind: &str, created: Option<&str>, variant: u64) -> Bytes {
        let mut index = self.indexes[kind].clone();
        index["annotations"]["test.variant"] = variant.to_string().into();
        if let Some(created) = created {
            index["annotations"][annotation::CREATED] = created.into();
        }
        index["subject"] = json!(Descriptor::of(media_type::MANIFEST, &self.image.manifest));
        index.to_string().into()
    }

    /// Has the image name an index of its own (version 2).
    fn annotate(&mut self) -> Bytes {
        let mut index = self.indexes[INDEX_V1].clone();
        index.as_object_mut().unwrap().remove("subject");
        index["config"]["mediaType"] = INDEX_V2.into();
        let index = Bytes::from(index.to_string());
        let mut manifest: Value = serde_json::from_slice(&self.image.manifest).unwrap();
        manifest["annotations"] = json!({ INDEX_DIGEST: Digest::of(&index).to_string() });
        self.image.manifest = Bytes::from(manifest.to_string());
        index
    }

    async fn push_blobs(&self, repository: &Repository) {
        for blob in &self.blobs {
            repository.push_blob(&Digest::of(blob), Body::Bytes(blob.clone()), None).await.unwrap();
        }
    }

    async fn push_index(&self, repository: &Repository, index: &Bytes) {
        self.push_blobs(repository).await;
        repository.push_referrer(media_type::MANIFEST, index.clone()).await.unwrap();
    }

    /// Puts an index into the local store, as `soci create` does.
    fn keep(&self, root: &Path, kind: &str, index: &Bytes, created: Option<&str>) {
        let layout = Layout::open_or_create(&root.join("content")).unwrap();
        let mut writer = layout.lock().unwrap();
        for blob in &self.blobs {
            writer.add_blob(blob).unwrap();
        }
        let mut entry = Descriptor::of(media_type::MANIFEST, index);
        entry.artifact_type = Some(kind.to_owned());
        entry.annotations.extend(created.map(|created| (annotation::CREATED.to_owned(), created.to_owned())));
        writer.add_manifest(entry, index).unwrap();
    }
}

fn quick() -> ClientOptions {
    let credentials = CredentialSource::Anonymous;
    ClientOptions { credentials, deadline: Duration::from_millis(300), ..ClientOptions::default() }
}

fn options(root: &Path) -> OpenOptions {
    OpenOptions { index_store: Some(root.join("content")), ..OpenOptions::default() }
}

async fn resolve(name: &str) -> (ImageSource, PlatformImage) {
    let source = ImageSource::open(&name.parse().unwrap(), &quick()).await.unwrap();
    let image = source.resolve(&PlatformSelection::Host).await.unwrap().remove(0);
    (source, image)
}

async fn open(at: &Path, name: &str, options: OpenOptions) -> Result<ImageOpener, OpenError> {
    let (source, image) = resolve(name).await;
    open_resolved(at, source, image, options).await
}

async fn open_resolved(
    at: &Path,
    source: ImageSource,
    image: PlatformImage,
    options: OpenOptions,
) -> Result<ImageOpener, OpenError> {
    // A new one each time: a process that another test starts may hold the lock of the last one for a moment.
    let layers = tempfile::tempdir_in(at).unwrap().keep();
    let store = Arc::new(Store::open(&layers).unwrap());
    ImageOpener::new(source, image, store, options, tokio::runtime::Handle::current()).await
}

fn document(arguments: &[&str], root: &Path) -> Value {
    let output = run(soci().args(arguments).arg("--root").arg(root));
    let said = String::from_utf8_lossy(&output.stderr);
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{arguments:?}: {error}: {said}"))
}

/// A number that is the same in every run.
struct Dice(u64);

impl Dice {
    fn below(&mut self, most: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 33).unwrap() % most
    }
}

const TIMES: [Option<&str>; 7] = [
    None,
    Some("soon"),
    Some("2026-01-01T00:00:00Z"),
    Some("2026-01-01T01:00:00.000+01:00"),
    Some("2026-01-01T00:00:00.5Z"),
    Some("2025-12-31T20:00:00-06:00"),
    Some("2026-02-01T00:00:00Z"),
];

/// For any set of indexes (in the local store, beside the image, in the image, in a repository that is named), of
/// equal, odd and missing times, every command names the same one.
#[tokio::test(flavor = "multi_thread")]
async fn all_commands_name_the_same_index() {
    let mut dice = Dice(0x5eed);
    for round in 0..8 {
        let mut stage = Stage::new("bin/tool").await;
        let registry = DemoRegistry::start(Duration::ZERO).await.unwrap();
        let repository = client(&registry.host()).repository("team/app");
        let elsewhere = client(&registry.host()).repository("soci/index");
        let root = tempfile::tempdir().unwrap();
        let (is_named, is_annotated) = (round % 4 == 3, round % 2 == 1);
        let version_2 = is_annotated.then(|| stage.annotate());
        stage.push_blobs(&repository).await;
        if let Some(index) = version_2 {
            let name = ManifestName::Digest(Digest::of(&index));
            repository.push_manifest(&name, media_type::MANIFEST, index).await.unwrap();
        }
        stage.image.push(&repository, "v1").await;
        let mut local = Vec::new();
        for variant in 0..2 + dice.below(4) {
            let kind = [SPAN_INDEX, INDEX_V1][dice.below(2)];
            let (created, listed) = (TIMES[dice.below(7)], TIMES[dice.below(7)]);
            let index = stage.index(kind, created, variant as u64);
            let places = 1 + dice.below(if is_named { 7 } else { 3 });
            if places & 1 != 0 {
                stage.push_index(&repository, &index).await;
            }
            if places & 2 != 0 {
                stage.keep(root.path(), kind, &index, listed);
                local.push(Digest::of(&index).to_string());
            }
            if places & 4 != 0 {
                stage.push_index(&elsewhere, &index).await;
            }
        }
        let name = format!("{}/team/app:v1", registry.host());
        let index_repositories = if is_named { vec![elsewhere.clone()] } else { Vec::new() };
        let opener = open(root.path(), &name, OpenOptions { index_repositories, ..options(root.path()) }).await;
        let meant = opener.unwrap().index().unwrap().to_string();
        let from = format!("{}/soci/index", registry.host());
        let named: &[&str] = if is_named { &["--index-from", &from] } else { &[] };
        let verified = document(&[&["verify", &name, "--json"], named].concat(), root.path());
        let used: Vec<&Value> = verified.as_array().unwrap().iter().filter(|one| one["used"] == true).collect();
        assert_eq!((used.len(), &used[0]["index"]), (1, &Value::from(meant.clone())), "round {round}: {verified:#}");
        assert_eq!(verified[0]["index"], meant, "the one that is used comes first");
        if is_named {
            continue;
        }
        let pulled = document(&["pull", &name, "--json", "--min-layer-size", "0"], root.path());
        assert_eq!(pulled["index"], meant, "round {round}: {pulled:#}");
        assert_eq!(pulled["place"], used[0]["place"], "round {round}: {pulled:#}");
        let checked = document(&["doctor", &name, "--json", "--containerd-config", "/no/such"], root.path());
        let about = checked.as_array().unwrap().iter().find(|one| one["what"] == "index").unwrap();
        assert!(about["found"].as_str().unwrap().contains(&format!("used: index {meant} ")), "round {round}: {about}");
        if local.is_empty() {
            continue;
        }
        let pushed = document(&["push", &name, "--json", "--existing-index", "allow"], root.path());
        let pushed: Vec<&str> = pushed.as_array().unwrap().iter().map(|one| one["index"].as_str().unwrap()).collect();
        assert!(pushed.iter().all(|one| local.iter().any(|local| local == one)), "{pushed:?}: {local:?}");
        assert!(!local.contains(&meant) || pushed.contains(&&*meant), "round {round}: {pushed:?} without {meant}");
    }
}

/// An image is in repositories A and B, an index beside A only: a node that has opened A opens B without an index, and
/// A again with it; and so do A and B on two registries.
#[tokio::test(flavor = "multi_thread")]
async fn an_index_speaks_for_its_repository_only() {
    for kind in [SPAN_INDEX, INDEX_V1, INDEX_V2] {
        for is_one_host in [true, false] {
            let mut stage = Stage::new("bin/tool").await;
            let (first, second) = (
                DemoRegistry::start(Duration::ZERO).await.unwrap(),
                DemoRegistry::start(Duration::ZERO).await.unwrap(),
            );
            let second = if is_one_host { &first } else { &second };
            let with = client(&first.host()).repository("dev/app");
            let without = client(&second.host()).repository("prod/app");
            let index = match kind {
                INDEX_V2 => stage.annotate(),
                kind => stage.index(kind, None, 0),
            };
            stage.image.push(&with, "v1").await;
            stage.image.push(&without, "v1").await;
            stage.push_blobs(&with).await;
            let digest = Digest::of(&index);
            with.push_manifest(&ManifestName::Digest(digest), media_type::MANIFEST, index).await.unwrap();
            let root = tempfile::tempdir().unwrap();
            let names = [format!("{}/dev/app:v1", first.host()), format!("{}/prod/app:v1", second.host())];
            for (name, expected) in [(0, Some(digest)), (1, None), (0, Some(digest)), (1, None)] {
                let opener = open(root.path(), &names[name], options(root.path())).await.unwrap();
                assert_eq!(opener.index(), expected, "{kind}, one host: {is_one_host}, {}", names[name]);
                let layer = opener.image().manifest.layers[0].clone();
                let opened = opener.open_layer(&layer, Digest::of(&stage.image.tars[0])).await.unwrap();
                let read = opened.reader.read(0, stage.image.tars[0].len()).await.unwrap();
                assert!(read == stage.image.tars[0]);
            }
            // Where both repositories have it, both are noted.
            let root = tempfile::tempdir().unwrap();
            if kind != INDEX_V2 {
                let index = stage.index(kind, None, 0);
                stage.push_index(&without, &index).await;
                for name in [0, 1, 0] {
                    let opener = open(root.path(), &names[name], options(root.path())).await.unwrap();
                    assert_eq!(opener.index(), Some(digest));
                }
                let entries = Layout::open(&root.path().join("content")).unwrap().entries().unwrap();
                let origin =
                    &entries.iter().find(|entry| entry.digest == digest).unwrap().annotations["dev.soci.origin"];
                assert_eq!(origin.split(',').count(), 2, "{origin}");
            }
        }
    }
}

/// A place that cannot be asked is no error: what was kept from it counts, else the image is opened without an index.
/// Only an index that was named is missed.
#[tokio::test(flavor = "multi_thread")]
async fn a_place_that_cannot_be_asked() {
    let stage = Stage::new("bin/tool").await;
    for kind in [SPAN_INDEX, INDEX_V1] {
        let registry = DemoRegistry::start(Duration::ZERO).await.unwrap();
        let repository = client(&registry.host()).repository("team/app");
        stage.image.push(&repository, "v1").await;
        let (index, older) = (stage.index(kind, TIMES[6], 0), stage.index(kind, TIMES[2], 1));
        stage.push_index(&repository, &index).await;
        let (here, new) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let name = format!("{}/team/app:v1", registry.host());
        let (source, image) = resolve(&name).await;
        let digest = Some(Digest::of(&index));
        assert_eq!(open(here.path(), &name, options(here.path())).await.unwrap().index(), digest);
        stage.keep(new.path(), kind, &older, None);
        drop(registry);
        let again = |root: &Path, named| {
            let (source, image, options) = (source.clone(), image.clone(), options(root));
            let root = root.to_owned();
            async move { open_resolved(&root, source, image, OpenOptions { index: named, ..options }).await }
        };
        assert_eq!(again(here.path(), None).await.unwrap().index(), digest, "{kind}: kept");
        assert_eq!(again(here.path(), digest).await.unwrap().index(), digest, "{kind}: kept and named");
        assert_eq!(again(new.path(), None).await.unwrap().index(), Some(Digest::of(&older)), "{kind}: made here");
        assert!(again(new.path(), digest).await.is_err(), "{kind}: named and nowhere");
        let nothing = tempfile::tempdir().unwrap();
        assert_eq!(again(nothing.path(), None).await.unwrap().index(), None, "{kind}: nothing anywhere");
    }
}

/// A place that does not answer is not waited for to the end while there is a copy of what it had.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_place_is_not_waited_for_to_the_end() {
    let stage = Stage::new("bin/tool").await;
    let registry = DemoRegistry::start(Duration::ZERO).await.unwrap();
    let repository = client(&registry.host()).repository("team/app");
    stage.image.push(&repository, "v1").await;
    let index = stage.index(SPAN_INDEX, None, 0);
    stage.push_index(&repository, &index).await;
    let front = Front::start(&registry.host()).await.unwrap();
    let name = format!("{}/team/app:v1", front.host());
    let patient = ClientOptions { credentials: CredentialSource::Anonymous, ..ClientOptions::default() };
    let source = ImageSource::open(&name.parse().unwrap(), &patient).await.unwrap();
    let image = source.resolve(&PlatformSelection::Host).await.unwrap().remove(0);
    let root = tempfile::tempdir().unwrap();
    let open = || open_resolved(root.path(), source.clone(), image.clone(), options(root.path()));
    assert_eq!(open().await.unwrap().index(), Some(Digest::of(&index)));
    front.set(Fault::Slow { late: Duration::from_secs(50), bytes_per_second: 1000 });
    let start = Instant::now();
    assert_eq!(open().await.unwrap().index(), Some(Digest::of(&index)));
    assert!(start.elapsed() < Duration::from_secs(18), "{:?}", start.elapsed());
}

/// What a registry has taken back does not live on in the local store.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_counts_more_than_a_copy() {
    let stage = Stage::new("bin/tool").await;
    let registry = DemoRegistry::start(Duration::ZERO).await.unwrap();
    let repository = client(&registry.host()).repository("team/app");
    stage.image.push(&repository, "v1").await;
    let (old, new) = (stage.index(INDEX_V1, TIMES[2], 0), stage.index(INDEX_V1, TIMES[6], 1));
    stage.push_index(&repository, &old).await;
    let (root, name) = (tempfile::tempdir().unwrap(), format!("{}/team/app:v1", registry.host()));
    for index in [&old, &new] {
        stage.push_index(&repository, index).await;
        let opener = open(root.path(), &name, options(root.path())).await.unwrap();
        assert_eq!(opener.index(), Some(Digest::of(index)));
    }
    let fresh = DemoRegistry::start(Duration::ZERO).await.unwrap();
    let repository = client(&fresh.host()).repository("team/app");
    stage.image.push(&repository, "v1").await;
    let layout = Layout::open(&root.path().join("content")).unwrap();
    // The same repository, as far as the store knows, that has lost its indexes.
    let text = std::fs::read_to_string(layout.directory().join("index.json")).unwrap();
    std::fs::write(layout.directory().join("index.json"), text.replace(&registry.host(), &fresh.host())).unwrap();
    let name = format!("{}/team/app:v1", fresh.host());
    assert_eq!(open(root.path(), &name, options(root.path())).await.unwrap().index(), None);
}

/// Of an index only what belongs to the image's layers is fetched.
#[tokio::test(flavor = "multi_thread")]
async fn foreign_blobs_are_left_alone() {
    let stage = Stage::new("bin/tool").await;
    for kind in [SPAN_INDEX, INDEX_V1] {
        let registry = DemoRegistry::start(Duration::ZERO).await.unwrap();
        let repository = client(&registry.host()).repository("team/app");
        stage.image.push(&repository, "v1").await;
        stage.push_blobs(&repository).await;
        let mut index: Value = serde_json::from_slice(&stage.index(kind, None, 0)).unwrap();
        let foreign = Bytes::from(text(9, 4 << 20));
        repository.push_blob(&Digest::of(&foreign), Body::Bytes(foreign.clone()), None).await.unwrap();
        for number in 0..10 {
            let mut entry = index["layers"][0].clone();
            (entry["digest"], entry["size"]) = (json!(Digest::of(&foreign)), json!(foreign.len()));
            for (key, note) in entry["annotations"].as_object_mut().unwrap() {
                if key.ends_with("layer.digest") || key.ends_with("image-layer-digest") {
                    *note = Digest::of(&[number]).to_string().into();
                }
            }
            index["layers"].as_array_mut().unwrap().push(entry);
        }
        let index = Bytes::from(index.to_string());
        repository.push_referrer(media_type::MANIFEST, index.clone()).await.unwrap();
        let root = tempfile::tempdir().unwrap();
        let before = registry.traffic().bytes_sent;
        let name = format!("{}/team/app:v1", registry.host());
        let opener = open(root.path(), &name, options(root.path())).await.unwrap();
        assert_eq!(opener.index(), Some(Digest::of(&index)), "{kind}");
        let sent = registry.traffic().bytes_sent - before;
        assert!(sent < 1 << 20, "{kind}: {sent} bytes");
        let layout = Layout::open(&root.path().join("content")).unwrap();
        assert!(!layout.has_blob(&Digest::of(&foreign)), "{kind}");
    }
}

/// A part of an index that is missing where the index is comes from wherever else the image is known, whether the index
/// is kept here or not.
#[tokio::test(flavor = "multi_thread")]
async fn parts_come_from_the_first_place_that_has_them() {
    let stage = Stage::new("bin/tool").await;
    for (kind, fault, is_kept) in [
        (SPAN_INDEX, Fault::Status(404, ""), false),
        (INDEX_V1, Fault::Status(403, ""), false),
        (SPAN_INDEX, Fault::Stopped, true),
        (INDEX_V1, Fault::Stopped, true),
    ] {
        let registry = DemoRegistry::start(Duration::ZERO).await.unwrap();
        let repository = client(&registry.host()).repository("team/app");
        stage.image.push(&repository, "v1").await;
        stage.push_blobs(&repository).await;
        let indexes = DemoRegistry::start(Duration::ZERO).await.unwrap();
        let index = stage.index(kind, None, 0);
        stage.push_index(&client(&indexes.host()).repository("soci/index"), &index).await;
        let front = Front::start(&indexes.host()).await.unwrap();
        let root = tempfile::tempdir().unwrap();
        let elsewhere = Registry::new(&front.host(), quick()).unwrap().repository("soci/index");
        let options = options(root.path());
        let index_store = options.index_store.clone().filter(|_| is_kept);
        let options = OpenOptions { index_repositories: vec![elsewhere], index_store, ..options };
        let name = format!("{}/team/app:v1", registry.host());
        let mut opener = open(root.path(), &name, options.clone()).await.unwrap();
        front.set(fault);
        if is_kept {
            let layout = Layout::open(&root.path().join("content")).unwrap();
            for blob in stage.blobs.iter().filter(|blob| &blob[..] != EMPTY_CONFIG) {
                let _ = std::fs::remove_file(layout.blob_path(&Digest::of(blob)));
            }
            opener = open(root.path(), &name, options).await.unwrap();
        }
        assert_eq!(opener.index(), Some(Digest::of(&index)), "{kind}, {fault:?}");
        let layer = opener.image().manifest.layers[0].clone();
        let opened = opener.open_layer(&layer, Digest::of(&stage.image.tars[0])).await.unwrap();
        assert_eq!(opened.note.way, Way::Lazy, "{kind}, {fault:?}");
    }
}
