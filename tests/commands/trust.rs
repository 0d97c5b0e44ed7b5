//! Policies of trust: which indexes are used before they are proven, and what is shown of forged ones.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde_json::json;
use soci_cli::demo::registry::DemoRegistry;
use soci_fs::layer::reader::Policy;
use soci_fs::layer::store::Store;
use soci_fs::layer::unpack::LayerClaim;
use soci_fs::open::trust::{Provisional, SignerRule, TrustPolicy};
use soci_fs::open::{IndexModes, OpenOptions, OpenedImage, Way, open_image};
use soci_index::format::checkpoint::{WINDOW_BYTES, Window};
use soci_index::format::digest::Digest;
use soci_index::format::index::Compression;
use soci_index::format::limits::Limits;
use soci_index::format::manifest::{EMPTY_CONFIG, INDEX_DIGEST, INDEX_V2, SociIndex, ZtocReference};
use soci_index::format::model::{Descriptor, media_type};
use soci_index::format::platform::PlatformSelection;
use soci_index::format::reference::ManifestName;
use soci_index::format::ztoc::{Spans, Ztoc};
use soci_index::image::ImageSource;
use soci_index::indexing::{Options, index_bytes};
use soci_index::registry::{Body, ClientOptions, CredentialSource, Repository};
use soci_tests::front::{Fault, Front};
use soci_tests::image::{GZIP, Image, gzip, tar, text};
use soci_tests::registry::client;
use soci_tests::signer::{Kind, Signer, push_referrer};
use soci_tests::{soci, stdout};

mod policy;

const SPAN_BYTES: u64 = 65_536;

fn content() -> Vec<u8> {
    tar(&[("file", text(1, 600_000))])
}

fn ztoc() -> Ztoc {
    let options =
        Options { compression: Compression::Gzip, span_bytes: SPAN_BYTES, compact: None, limits: Limits::DEFAULT };
    index_bytes(&gzip(&content(), 6), options).unwrap().into_ztoc().unwrap()
}

/// A zTOC that passes every check and yields other content from its last span.
fn forged() -> Ztoc {
    let mut forged = ztoc();
    let Spans::Gzip { checkpoints, .. } = &mut forged.spans else { panic!("a gzip layer") };
    let last = checkpoints.last_mut().unwrap();
    let mut window = last.window.load().to_vec();
    window[WINDOW_BYTES / 2..].iter_mut().for_each(|byte| *byte ^= 0x20);
    last.window = Window::from_bytes(window.into()).unwrap();
    forged
}

/// An image of one layer in a registry of this process, with an index.
struct Stage {
    registry: DemoRegistry,
    image: Image,
    index: Descriptor,
    root: tempfile::TempDir,
}

impl Stage {
    /// With a version 1 index by `ztoc`.
    async fn new(ztoc: &Ztoc) -> Self {
        let mut stage = Self::unindexed().await;
        let index = stage.push_ztoc(ztoc).await.to_json();
        stage.index = Descriptor::of(media_type::MANIFEST, &index);
        stage.repository().push_referrer(media_type::MANIFEST, index.into()).await.unwrap();
        stage
    }

    async fn unindexed() -> Self {
        let registry = DemoRegistry::start(Duration::ZERO).await.unwrap();
        let image = Image::gzip(vec![content()]);
        let (index, root) = (Descriptor::of(media_type::MANIFEST, b""), tempfile::tempdir().unwrap());
        let stage = Self { registry, image, index, root };
        stage.image.push(&stage.repository(), "v1").await;
        stage
    }

    /// With a version 2 index, which the image names.
    async fn annotated() -> Self {
        let mut stage = Self::unindexed().await;
        let v1 = stage.push_ztoc(&ztoc()).await.to_json();
        let mut v2: serde_json::Value = serde_json::from_slice(&v1).unwrap();
        v2.as_object_mut().unwrap().remove("subject");
        v2["config"]["mediaType"] = INDEX_V2.into();
        let v2 = Bytes::from(v2.to_string());
        stage.index = Descriptor::of(media_type::MANIFEST, &v2);
        let name = ManifestName::Digest(stage.index.digest);
        stage.repository().push_manifest(&name, media_type::MANIFEST, v2).await.unwrap();
        let mut manifest: serde_json::Value = serde_json::from_slice(&stage.image.manifest).unwrap();
        manifest["annotations"] = json!({ INDEX_DIGEST: stage.index.digest });
        stage.image.manifest = Bytes::from(manifest.to_string());
        stage.image.push(&stage.repository(), "v1").await;
        stage
    }

    /// Puts an index of the image into another repository.
    async fn index_of(&self, ztoc: &Ztoc, repository: &Repository) -> Digest {
        let index = self.push_ztoc_to(ztoc, repository).await.to_json();
        let digest = Digest::of(&index);
        repository.push_referrer(media_type::MANIFEST, index.into()).await.unwrap();
        digest
    }

    async fn push_ztoc(&self, ztoc: &Ztoc) -> SociIndex {
        self.push_ztoc_to(ztoc, &self.repository()).await
    }

    async fn push_ztoc_to(&self, ztoc: &Ztoc, repository: &Repository) -> SociIndex {
        let ztoc = ztoc.clone().encode().unwrap().to_vec();
        let reference = ZtocReference {
            digest: Digest::of(&ztoc),
            size: ztoc.len() as u64,
            layer: Digest::of(&self.image.blobs[0]),
            layer_media_type: GZIP.to_owned(),
            span_bytes: SPAN_BYTES,
            disable_xattrs: false,
        };
        for blob in [&ztoc[..], EMPTY_CONFIG] {
            let body = Body::Bytes(Bytes::copy_from_slice(blob));
            repository.push_blob(&Digest::of(blob), body, None).await.unwrap();
        }
        SociIndex::v1(&[reference], &[], &Descriptor::of(media_type::MANIFEST, &self.image.manifest))
    }

    fn repository(&self) -> Repository {
        client(&self.registry.host()).repository("team/app")
    }

    fn name(&self) -> String {
        format!("{}/team/app:v1", self.registry.host())
    }

    async fn source(&self) -> ImageSource {
        let options = ClientOptions { credentials: CredentialSource::Anonymous, ..ClientOptions::default() };
        ImageSource::open(&self.name().parse().unwrap(), &options).await.unwrap()
    }

    fn options(&self, root: &str, trust: TrustPolicy) -> OpenOptions {
        OpenOptions {
            whole_layers: true,
            whole_beside_index: true,
            layer_bytes_min: 1000,
            policy: Policy { read_deadline: Duration::from_secs(20), ..Policy::default() },
            index: None,
            modes: IndexModes::default(),
            index_repositories: Vec::new(),
            index_store: Some(self.root.path().join(root).join("content")),
            parallel: 1,
            trust: Arc::new(trust),
            listing: None,
            profile: soci_fs::foresight::profile::Choice::None,
            urls: None,
            observer: Arc::new(|_| {}),
            ..OpenOptions::default()
        }
    }

    /// Opens the image under a policy, in the store called `root`.
    async fn open(&self, root: &str, trust: TrustPolicy) -> OpenedImage {
        self.open_with(root, self.options(root, trust)).await
    }

    async fn open_with(&self, root: &str, options: OpenOptions) -> OpenedImage {
        let source = self.source().await;
        let image = source.resolve(&PlatformSelection::Host).await.unwrap().remove(0);
        let store = Arc::new(Store::open(&self.root.path().join(root)).unwrap());
        open_image(&source, &image, &store, &options, &tokio::runtime::Handle::current()).await.unwrap()
    }

    fn claim(&self) -> LayerClaim {
        let blob = &self.image.blobs[0];
        LayerClaim { digest: Digest::of(blob), size: blob.len() as u64, diff_id: Digest::of(&self.image.tars[0]) }
    }
}

fn deny() -> TrustPolicy {
    TrustPolicy::new(Provisional::Deny, &[], &[]).unwrap()
}

fn required(keys: &[PathBuf]) -> TrustPolicy {
    TrustPolicy::new(Provisional::RequireSignature, keys, &[]).unwrap()
}

/// Why the one layer was fetched whole.
fn reason(opened: &OpenedImage) -> &str {
    match &opened.notes[0].way {
        Way::Streamed(reason) => reason,
        other => panic!("it should be fetched whole, not {other:?}"),
    }
}

async fn read(opened: &OpenedImage) -> Vec<u8> {
    let reader = &opened.readers[0];
    let length = usize::try_from(reader.index().uncompressed_size).unwrap();
    reader.read(0, length).await.unwrap().to_vec()
}

/// Under `deny` a forged index shows nothing, for it is not used; what was fetched whole is kept and used again.
#[tokio::test(flavor = "multi_thread")]
async fn forged_indexes_are_not_used() {
    let stage = Stage::new(&forged()).await;
    let allowed = stage.open("a", TrustPolicy::default()).await;
    assert_eq!(allowed.notes[0].way, Way::Lazy);
    let last = allowed.readers[0].index().spans.spans().last().unwrap().uncompressed.clone();
    let shown = allowed.readers[0].read(last.start, usize::try_from(last.end - last.start).unwrap()).await.unwrap();
    let right = content();
    assert!(shown[..] != right[usize::try_from(last.start).unwrap()..][..shown.len()], "the forgery is seen");
    drop(allowed);
    // A store that has followed the forgery, and a new one.
    for root in ["a", "d"] {
        let before = stage.registry.traffic().bytes_sent;
        let denied = stage.open(root, deny()).await;
        assert_eq!(reason(&denied), "no index is used before it is proven");
        let read = read(&denied).await;
        assert!(read[..] == right[..read.len()]);
        drop(denied);
        let size = stage.image.blobs[0].len() as u64;
        let sent = stage.registry.traffic().bytes_sent - before;
        assert!(sent < size + 100_000, "{sent} bytes for a layer of {size}");
        let again = stage.open(root, deny()).await;
        assert_eq!(again.notes[0].way, Way::Kept);
        assert!(self::read(&again).await == read);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn signatures_are_required() {
    let (Some(signer), Some(other)) = (Signer::new(Kind::P256), Signer::new(Kind::Ed25519)) else { return };
    let keys = [signer.path("pub.pem")];
    let stage = Stage::new(&ztoc()).await;
    let unsigned = stage.open("a", required(&keys)).await;
    assert!(reason(&unsigned).ends_with("is not trusted: it has no signature"), "{}", reason(&unsigned));
    let read = read(&unsigned).await;
    assert!(read[..] == content()[..read.len()]);
    other.push_simple(&stage.repository(), &stage.index.digest).await;
    let wrong = stage.open("b", required(&keys)).await;
    assert!(reason(&wrong).contains("none of the trusted keys"), "{}", reason(&wrong));
    // The signature of another manifest in this one's place.
    let bundle_type = "application/vnd.dev.sigstore.bundle.v0.3+json";
    let predicate = "https://sigstore.dev/cosign/sign/v1";
    let foreign = signer.bundle(&Digest::of(b"another"), predicate).to_string();
    push_referrer(&stage.repository(), &stage.index, bundle_type, bundle_type, foreign.as_bytes()).await;
    let wrong = stage.open("c", required(&keys)).await;
    assert!(reason(&wrong).contains("it signs sha256:"), "{}", reason(&wrong));
    // The image's signature does not vouch for an index that any client may add.
    signer.push_simple(&stage.repository(), &stage.image.digest()).await;
    assert!(matches!(stage.open("d", required(&keys)).await.notes[0].way, Way::Streamed(_)));

    let own = signer.bundle(&stage.index.digest, predicate).to_string();
    push_referrer(&stage.repository(), &stage.index, bundle_type, bundle_type, own.as_bytes()).await;
    // From the registry, and from the local store, where the index is without its signature.
    for _ in 0..2 {
        let signed = stage.open("e", required(&keys)).await;
        assert_eq!(signed.notes[0].way, Way::Lazy);
        assert!(self::read(&signed).await == read);
    }
    // What is here whole stays in use.
    let third = Signer::new(Kind::P384).unwrap();
    assert_eq!(stage.open("a", required(&[third.path("pub.pem")])).await.notes[0].way, Way::Kept);
}

/// The key of one team speaks for the images of that team's repositories only, wherever the index and its signature
/// are.
#[tokio::test(flavor = "multi_thread")]
async fn keys_are_bound_to_repositories() {
    let (Some(ours), Some(theirs)) = (Signer::new(Kind::P256), Signer::new(Kind::P256)) else { return };
    let policy = |patterns: [&str; 2]| {
        let rule = |(pattern, signer): (&str, &Signer)| SignerRule {
            pattern: pattern.to_owned(),
            keys: vec![signer.path("pub.pem")],
            certificates: Vec::new(),
        };
        let rules = [rule((patterns[0], &ours)), rule((patterns[1], &theirs))];
        TrustPolicy::with_signers(Provisional::RequireSignature, &[], &[], &rules).unwrap()
    };
    let stage = Stage::new(&ztoc()).await;
    let host = stage.registry.host();
    let (own, other) = (format!("{host}/team/*"), format!("{host}/other/*"));
    let profile = Digest::of(b"profile");
    let repository = stage.repository();
    theirs.push_simple(&repository, &stage.index.digest).await;
    theirs.push_simple(&repository, &profile).await;
    let refused = stage.open("a", policy([&own, &other])).await;
    assert!(reason(&refused).contains("none of the trusted keys"), "{}", reason(&refused));
    let read = read(&refused).await;
    assert!(read[..] == content()[..read.len()]);
    assert_eq!(stage.open("b", policy([&other, &own])).await.notes[0].way, Way::Lazy, "bound the other way round");
    let unsigned = stage.open("c", policy([&other, "elsewhere.example/*"])).await;
    assert!(
        reason(&unsigned).contains(&format!("no key and no certificate speaks for {host}/team/app")),
        "{}",
        reason(&unsigned)
    );
    // The same of a profile with a pack.
    assert!(
        policy([&own, &other]).pack_doubt(&repository, &profile).await.unwrap().contains("none of the trusted keys")
    );
    assert_eq!(policy([&other, &own]).pack_doubt(&repository, &profile).await, None);
    assert!(policy([&own, &other]).pack_doubt(&repository, &Digest::of(b"another")).await.is_some());
    assert_eq!(TrustPolicy::default().pack_doubt(&repository, &profile).await, None);
    assert!(deny().pack_doubt(&repository, &profile).await.is_some());

    // An index in a repository that only the operator names, signed by its owners, does not speak for this image.
    let elsewhere = client(&host).repository("other/index");
    let index = stage.index_of(&ztoc(), &elsewhere).await;
    theirs.push_simple(&elsewhere, &index).await;
    for (root, patterns, is_trusted) in [("d", [&own, &other], false), ("e", [&other, &own], true)] {
        let options = OpenOptions {
            index_repositories: vec![elsewhere.clone()],
            ..stage.options(root, policy(patterns.map(String::as_str)))
        };
        let opened = stage.open_with(root, options).await;
        assert_eq!(opened.notes[0].way == Way::Lazy, is_trusted, "{patterns:?}");
    }
}

/// A repository that is named for indexes and answers nothing holds up neither a signed image nor an unsigned one.
#[tokio::test(flavor = "multi_thread")]
async fn a_silent_repository_is_not_waited_for_to_the_end() {
    let Some(signer) = Signer::new(Kind::P256) else { return };
    let stage = Stage::new(&ztoc()).await;
    let front = Front::start(&stage.registry.host()).await.unwrap();
    front.set(Fault::Slow { late: Duration::from_secs(60), bytes_per_second: 1000 });
    let silent = client(&front.host()).repository("other/index");
    for (root, is_signed, seconds) in [("a", false, 25), ("b", true, 15)] {
        if is_signed {
            signer.push_simple(&stage.repository(), &stage.index.digest).await;
        }
        let trust = required(&[signer.path("pub.pem")]);
        let options = OpenOptions { index_repositories: vec![silent.clone()], ..stage.options(root, trust) };
        let start = Instant::now();
        let opened = stage.open_with(root, options).await;
        assert!(start.elapsed() < Duration::from_secs(seconds), "{root}: {:?}", start.elapsed());
        assert_eq!(opened.notes[0].way == Way::Lazy, is_signed, "{root}");
        if !is_signed {
            assert!(reason(&opened).contains("gave no signature within 10s"), "{}", reason(&opened));
        }
    }
}

/// A span index goes first unless only AWS's is signed.
#[tokio::test(flavor = "multi_thread")]
async fn a_signed_index_goes_before_an_unsigned_span_index() {
    let Some(signer) = Signer::new(Kind::P256) else { return };
    let keys = [signer.path("pub.pem")];
    let stage = Stage::new(&ztoc()).await;
    let options = ["--format", "span", "--min-layer-size", "0", "--json"];
    let published = stdout(soci().args(["publish", &stage.name()]).args(options));
    let published: serde_json::Value = serde_json::from_str(&published).unwrap();
    let spans: Digest = published["images"][0]["index"]["digest"].as_str().unwrap().parse().unwrap();
    assert_eq!(stage.open("a", TrustPolicy::default()).await.index, Some(spans));
    let unsigned = stage.open("b", required(&keys)).await;
    assert!(reason(&unsigned).ends_with("is not trusted: it has no signature"), "{}", reason(&unsigned));

    signer.push_simple(&stage.repository(), &stage.index.digest).await;
    for (root, signed) in [("c", stage.index.digest), ("d", spans)] {
        let opened = stage.open(root, required(&keys)).await;
        assert_eq!((opened.index, &opened.notes[0].way), (Some(signed), &Way::Lazy));
        let read = read(&opened).await;
        assert!(read[..] == content()[..read.len()]);
        signer.push_simple(&stage.repository(), &spans).await;
    }
}

/// An index that the image itself names is signed with the image.
#[tokio::test(flavor = "multi_thread")]
async fn a_signed_image_vouches_for_the_index_it_names() {
    let Some(signer) = Signer::new(Kind::P256) else { return };
    let keys = [signer.path("pub.pem")];
    let stage = Stage::annotated().await;
    let unsigned = stage.open("a", required(&keys)).await;
    assert!(reason(&unsigned).contains("nor is the image that names it signed"), "{}", reason(&unsigned));
    signer.push_simple(&stage.repository(), &stage.image.digest()).await;
    assert_eq!(stage.open("b", required(&keys)).await.notes[0].way, Way::Lazy);
}
