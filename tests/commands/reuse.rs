//! What is reused of existing indexes, and by which signature: what any client may have pushed is never signed, nor
//! made part of an image.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use soci_cli::demo::registry::DemoRegistry;
use soci_fs::layer::store::Store;
use soci_fs::open::trust::{Provisional, TrustPolicy};
use soci_fs::open::{OpenOptions, OpenedImage, Way, open_image};
use soci_index::format::digest::Digest;
use soci_index::format::model::media_type;
use soci_index::format::platform::PlatformSelection;
use soci_index::format::reference::ManifestName;
use soci_index::image::ImageSource;
use soci_index::registry::{ClientOptions, CredentialSource, Repository};
use soci_tests::forge::{Lie, push_spans, push_ztoc};
use soci_tests::image::{Image, tar, text};
use soci_tests::registry::client;
use soci_tests::signer::{Kind, Signer};
use soci_tests::{run, soci, stdout};

const SPAN_BYTES: u64 = 65_536;

/// Images of two tags that share their lower layer, in a registry of this process.
struct Stage {
    registry: DemoRegistry,
    image: Image,
    neighbour: Image,
    work: tempfile::TempDir,
}

/// Where another client has put forged indexes of the lower layer.
#[derive(Debug, Clone, Copy)]
enum Forged {
    Beside,
    BesideANeighbour,
}

impl Stage {
    async fn new() -> Self {
        let registry = DemoRegistry::start(Duration::ZERO).await.unwrap();
        let base = tar(&[("base", text(1, 600_000))]);
        let of = |top: &str| Image::gzip(vec![base.clone(), tar(&[(top, text(2, 200_000))])]);
        let stage = Self { registry, image: of("one"), neighbour: of("two"), work: tempfile::tempdir().unwrap() };
        stage.image.push(&stage.repository(), "v2").await;
        stage.neighbour.push(&stage.repository(), "v1").await;
        // Stands for cosign: notes what it is asked to sign.
        std::fs::write(stage.work.path().join("sign.sh"), "echo \"$1\" >> \"$LIST\"\n").unwrap();
        stage
    }

    fn repository(&self) -> Repository {
        client(&self.registry.host()).repository("team/app")
    }

    fn name(&self) -> String {
        format!("{}/team/app:v2", self.registry.host())
    }

    async fn forge(&self, place: Forged) -> [Digest; 2] {
        let image = match place {
            Forged::Beside => &self.image,
            Forged::BesideANeighbour => &self.neighbour,
        };
        let ztoc = push_ztoc(&self.repository(), image, SPAN_BYTES, Lie::Window).await.table;
        [ztoc, push_spans(&self.repository(), image, SPAN_BYTES, Lie::Layer).await.table]
    }

    fn soci(&self, arguments: &[&str]) -> Value {
        let span_bytes = SPAN_BYTES.to_string();
        let mut command = soci();
        command.args(arguments).args(["--min-layer-size", "0", "--span-size", &span_bytes]);
        command.args(["--index-span-size", &span_bytes, "--json"]).env("LIST", self.work.path().join("list"));
        serde_json::from_str(&stdout(&mut command)).unwrap()
    }

    fn sign_with(&self) -> String {
        format!("sh {} {{}}", self.work.path().join("sign.sh").display())
    }

    /// What was to be signed since the last call.
    fn to_sign(&self) -> Vec<Digest> {
        let list = self.work.path().join("list");
        let text = std::fs::read_to_string(&list).unwrap_or_default();
        let _ = std::fs::remove_file(list);
        let place = format!("{}/team/app@", self.registry.host());
        text.lines().map(|line| line.strip_prefix(&place).unwrap().parse().unwrap()).collect()
    }

    /// Opens the tag as a node does that demands this signer's signatures.
    async fn open(&self, root: &Path, keys: &[PathBuf]) -> OpenedImage {
        let options = ClientOptions { credentials: CredentialSource::Anonymous, ..ClientOptions::default() };
        let source = ImageSource::open(&self.name().parse().unwrap(), &options).await.unwrap();
        let image = source.resolve(&PlatformSelection::Host).await.unwrap().remove(0);
        let options = OpenOptions {
            layer_bytes_min: 1000,
            index_store: Some(root.join("content")),
            trust: Arc::new(TrustPolicy::new(Provisional::RequireSignature, keys, &[]).unwrap()),
            ..OpenOptions::default()
        };
        let store = Arc::new(Store::open(&root.join("layers")).unwrap());
        open_image(&source, &image, &store, &options, &tokio::runtime::Handle::current()).await.unwrap()
    }
}

fn digest(value: &Value) -> Digest {
    value.as_str().unwrap().parse().unwrap()
}

/// The zTOCs and tables that a report names.
fn tables(image: &Value) -> Vec<Digest> {
    let layers = image["layers"].as_array().unwrap().iter();
    let of = |layer: &Value| [layer["ztoc"]["digest"].clone(), layer["spans"]["toc"]["digest"].clone()];
    layers.flat_map(of).filter(|one| !one.is_null()).map(|one| digest(&one)).collect()
}

/// To the end: a forged index beside the image, and beside a neighbouring tag; what is then published and signed shows
/// the honest bytes on a node that demands signatures.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_forged_is_not_signed() {
    let Some(signer) = Signer::new(Kind::P256) else { return };
    let key = signer.path("pub.pem").display().to_string();
    for place in [Forged::Beside, Forged::BesideANeighbour] {
        for version_2 in [false, true] {
            for with_key in [false, true] {
                let stage = Stage::new().await;
                let forged = stage.forge(place).await;
                let (name, sign_with) = (stage.name(), stage.sign_with());
                let mut arguments = vec!["publish", &name, "--sign-with", &sign_with];
                arguments.extend(if version_2 { &["--v2", "--format", "both"][..] } else { &[] });
                arguments.extend(if with_key { vec!["--key", &key] } else { vec![] });
                let published = stage.soci(&arguments);
                let made = &published["images"][0];
                let which = format!("{place:?}, version 2: {version_2}, a key: {with_key}: {made:#}");
                assert!(tables(made).iter().all(|table| !forged.contains(table)), "{which}");
                assert!(made["reused"].is_null(), "{which}");
                let to_sign = stage.to_sign();
                for digest in &to_sign {
                    signer.push_simple(&stage.repository(), digest).await;
                }
                let root = tempfile::tempdir().unwrap();
                let opened = stage.open(root.path(), &[signer.path("pub.pem")]).await;
                assert!(to_sign.contains(&opened.index.unwrap()), "{which}");
                for (reader, tar) in opened.readers.iter().zip(&stage.image.tars) {
                    let read = reader.read(0, usize::try_from(reader.index().uncompressed_size).unwrap()).await;
                    assert!(read.unwrap() == tar[..usize::try_from(reader.index().uncompressed_size).unwrap()]);
                }
                assert!(opened.notes.iter().all(|note| note.way == Way::Lazy), "{which}: {:?}", opened.notes);
            }
        }
    }
}

/// A converted image has nothing in it that any other client may have pushed.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_forged_is_not_made_part_of_an_image() {
    for place in [Forged::Beside, Forged::BesideANeighbour] {
        let stage = Stage::new().await;
        let forged = stage.forge(place).await;
        let target = format!("{}/team/app:converted", stage.registry.host());
        let converted = stage.soci(&["convert", &stage.name(), &target, "--span-index"]);
        let made = &converted["images"][0];
        assert!(tables(made).iter().all(|table| !forged.contains(table)), "{place:?}: {made:#}");
        assert!(made["reused"].is_null(), "{made:#}");
    }
}

/// Without signing, what exists is reused, and said to be unverified; verified, forged parts are built again.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_reused_is_said() {
    for place in [Forged::Beside, Forged::BesideANeighbour] {
        let stage = Stage::new().await;
        let forged = stage.forge(place).await;
        let name = stage.name();
        let verified = stage.soci(&["publish", &name, "--verify-reused", "--dry-run"]);
        assert!(tables(&verified["images"][0]).iter().all(|table| !forged.contains(table)), "{verified:#}");
        assert!(verified["images"][0]["reused"].is_null(), "{verified:#}");
        let trusting = stage.soci(&["publish", &name, "--dry-run"]);
        assert_eq!(trusting["images"][0]["reused"], "not verified", "{trusting:#}");
        assert!(tables(&trusting["images"][0]).iter().any(|table| forged.contains(table)), "{trusting:#}");
    }
    let stage = Stage::new().await;
    let name = stage.name();
    let first = stage.soci(&["publish", &name]);
    assert!(first["images"][0]["reused"].is_null(), "{first:#}");
    for (options, expected) in [(&[][..], "not verified"), (&["--verify-reused"], "verified")] {
        let again = stage.soci(&[&["publish", &name], options].concat());
        assert_eq!(again["images"][0]["reused"], expected, "{again:#}");
        assert_eq!(again["images"][0]["status"], "up to date", "{again:#}");
    }
    assert_eq!(first["images"][0]["usedInstead"], Value::Array(Vec::new()), "{first:#}");
    // A newer one beside it goes before it, and is not what was made here.
    let index =
        stage.repository().manifest(&ManifestName::Digest(digest(&first["images"][0]["index"]["digest"]))).await;
    let mut newer: Value = serde_json::from_slice(&index.unwrap().unwrap().bytes).unwrap();
    newer["annotations"]["org.opencontainers.image.created"] = "2026-01-01T00:00:00Z".into();
    let newer = bytes::Bytes::from(newer.to_string());
    stage.repository().push_referrer(media_type::MANIFEST, newer.clone()).await.unwrap();
    let again = stage.soci(&["publish", &name]);
    assert_eq!(again["images"][0]["usedInstead"][0], Digest::of(&newer).to_string(), "{again:#}");
    assert_eq!(again["images"][0]["reusedFrom"][0]["place"], stage.repository().to_string(), "{again:#}");

    let span_bytes = SPAN_BYTES.to_string();
    let words =
        ["publish", &name, "--min-layer-size", "0", "--span-size", &span_bytes, "--index-span-size", &span_bytes];
    assert!(stdout(soci().args(words)).contains("what existed already is reused, not verified"));
}

/// What is signed by a key that is meant is reused and not signed again, whatever else is beside it; the rest is signed
/// by the next run, children first.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_signed_is_reused() {
    let (Some(signer), Some(other)) = (Signer::new(Kind::P256), Signer::new(Kind::P256)) else { return };
    let key = |signer: &Signer| signer.path("pub.pem").display().to_string();
    let (ours, theirs) = (key(&signer), key(&other));
    let stage = Stage::new().await;
    let (name, sign_with, repository) = (stage.name(), stage.sign_with(), stage.repository());
    let publish = |key: &str| stage.soci(&["publish", &name, "--sign-with", &sign_with, "--key", key]);
    let first = publish(&ours);
    let [index, spans] =
        [&first["images"][0]["index"], &first["images"][0]["spanIndex"]].map(|one| digest(&one["digest"]));
    assert_eq!(stage.to_sign(), [index, spans]);
    signer.push_simple(&repository, &index).await;
    let second = publish(&ours);
    assert_eq!(stage.to_sign(), [spans], "what is missing is signed");
    assert_eq!(second["images"][0]["status"], "up to date", "{second:#}");
    signer.push_simple(&repository, &spans).await;
    stage.forge(Forged::Beside).await;
    let third = publish(&ours);
    assert_eq!((stage.to_sign(), &third["images"][0]["reused"]), (vec![], &"signed".into()), "{third:#}");
    let layers = third["images"][0]["layers"].as_array().unwrap();
    assert!(layers.iter().all(|layer| layer["reused"] == true && layer["spans"]["reused"] == true), "{third:#}");
    // A signature by another key counts for nothing, nor does any where no key is given.
    let fourth = publish(&theirs);
    assert!(fourth["images"][0]["reused"].is_null(), "{fourth:#}");
    assert_eq!(stage.to_sign(), [index, spans]);
    let unnamed = stage.soci(&["publish", &name, "--sign-with", &sign_with]);
    assert!(unnamed["images"][0]["reused"].is_null(), "{unnamed:#}");
    assert_eq!(stage.to_sign(), [index, spans]);

    // All that a policy may ask for: the indexes, the image's manifest, the image.
    let options = ["--v2", "--format", "both", "--sign-with", &sign_with, "--key", &ours];
    let enabled = stage.soci(&[&["publish", &name], &options[..]].concat());
    let to_sign = stage.to_sign();
    let [index, spans] =
        [&enabled["images"][0]["index"], &enabled["images"][0]["spanIndex"]].map(|one| digest(&one["digest"]));
    assert_eq!((&to_sign[..2], to_sign.len(), to_sign[3]), (&[index, spans][..], 4, digest(&enabled["digest"])));
    let options = ClientOptions { credentials: CredentialSource::Anonymous, ..ClientOptions::default() };
    let source = ImageSource::open(&name.parse().unwrap(), &options).await.unwrap();
    let image = source.resolve(&PlatformSelection::Host).await.unwrap().remove(0);
    assert_eq!(to_sign[2], image.descriptor.digest);
}

/// The signing program is looked for before any work begins.
#[tokio::test(flavor = "multi_thread")]
async fn the_program_is_looked_for_first() {
    let stage = Stage::new().await;
    let before = stage.registry.traffic().requests;
    for command in ["no-such-program sign {}", "/no/such/program {}", "/etc/passwd {}"] {
        let refused = run(soci().args(["publish", &stage.name(), "--sign-with", command]));
        let said = String::from_utf8_lossy(&refused.stderr);
        assert_eq!(refused.status.code(), Some(2), "{said}");
        assert!(said.contains("install it, or name it by its path; nothing was done"), "{said}");
        let served = run(soci().args(["serve-webhook", "--registry", "h.example", "--sign-with", command]));
        assert_eq!(served.status.code(), Some(2), "{served:?}");
    }
    assert_eq!(stage.registry.traffic().requests, before, "nothing was asked");
}
