//! What a snapshot's labels and an image's annotations lead to: headers that reach the registry, indexes that are not
//! there, indexes that are damaged.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use serde_json::Value;
use soci_cli::demo::registry::DemoRegistry;
use soci_fs::node::remote::labels::{HEADER, MANIFEST};
use soci_fs::node::remote::{ProfileOptions, RemoteError};
use soci_fs::open::OpenError;
use soci_index::format::digest::Digest;
use soci_index::format::manifest::{INDEX_DIGEST, SociIndex, ZtocReference};
use soci_index::format::model::{Descriptor, media_type};
use soci_index::format::reference::ManifestName;
use soci_index::registry::{Body, Repository};
use soci_tests::front::Front;
use soci_tests::image::{GZIP, Image, tar, text};
use soci_tests::layers::{Daemon, labels};
use soci_tests::registry::client;
use soci_tests::{soci, stdout};

const BUILDING: [&str; 4] = ["--min-layer-size", "10000", "--span-size", "65536"];

fn image() -> Image {
    Image::gzip(vec![tar(&[("first", text(1, 300_000)), ("second", text(2, 300_000))])])
}

async fn pushed(image: &Image) -> (DemoRegistry, Repository) {
    let registry = DemoRegistry::start(Duration::ZERO).await.unwrap();
    let repository = client(&registry.host()).repository("team/app");
    image.push(&repository, "v1").await;
    (registry, repository)
}

/// A header that the configuration allows goes with every request for the image, also after a restart; another one
/// with none.
#[tokio::test(flavor = "multi_thread")]
async fn allowed_headers_reach_the_registry() {
    let image = image();
    let (registry, _) = pushed(&image).await;
    drop(stdout(soci().args(["publish", &format!("{}/team/app:v1", registry.host())]).args(BUILDING)));
    let front = Front::start(&registry.host()).await.unwrap();
    let name = format!("{}/team/app:v1", front.host());
    let mut wanted = labels(&name, &image, 0);
    wanted.insert(format!("{HEADER}X-Trace"), "abc".to_owned());
    wanted.insert(format!("{HEADER}X-Other"), "abc".to_owned());
    let root = tempfile::tempdir().unwrap();
    let start = || Daemon::start_allowing(root.path(), &["x-trace"]);
    let slot = {
        let daemon = start();
        let slot = daemon.layers.provide(&wanted).await.unwrap();
        assert_eq!(daemon.read(slot, "first").await, text(1, 300_000));
        slot
    };
    let (all, marked) = (front.requests(""), front.requests_with("x-trace: abc"));
    assert!(all > 2 && marked == all, "{marked} of {all} requests");
    let daemon = start();
    assert_eq!(daemon.read(slot, "second").await, text(2, 300_000));
    let (all, marked) = (front.requests("") - all, front.requests_with("x-trace: abc") - marked);
    assert!(all > 0 && marked == all, "{marked} of {all} requests after the restart");
    assert_eq!(front.requests_with("x-other:"), 0);
}

/// The reason why a layer is not read lazily, and whether that is a failure.
async fn refusal(daemon: &Daemon, labels: &BTreeMap<String, String>) -> (bool, String) {
    match &*daemon.layers.provide(labels).await.unwrap_err() {
        RemoteError::Open(OpenError::NotLazy { reason, is_indexed, .. }) => (*is_indexed, reason.to_string()),
        other => panic!("{other}"),
    }
}

/// The index that an image names and that is not there is as none: no failure, and the image is left to containerd.
#[tokio::test(flavor = "multi_thread")]
async fn an_annotation_may_lead_nowhere() {
    let image = image();
    let (registry, repository) = pushed(&image).await;
    let mut manifest: Value = serde_json::from_slice(&image.manifest).unwrap();
    manifest["annotations"] = serde_json::json!({ INDEX_DIGEST: Digest::of(b"absent").to_string() });
    let manifest = Bytes::from(serde_json::to_vec(&manifest).unwrap());
    let tag = ManifestName::Tag("dangling".to_owned());
    repository.push_manifest(&tag, media_type::MANIFEST, manifest.clone()).await.unwrap();
    let mut wanted = labels(&format!("{}/team/app:dangling", registry.host()), &image, 0);
    wanted.insert(MANIFEST.to_owned(), Digest::of(&manifest).to_string());
    let root = tempfile::tempdir().unwrap();
    let (is_failure, reason) = refusal(&Daemon::start(root.path(), false), &wanted).await;
    assert!(!is_failure && reason.contains("no index"), "{reason}");
}

/// A zTOC that is none, under its right digest, is a failure to mount the layer; with whole layers it is fetched.
#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_ztoc_is_a_failure() {
    let image = image();
    let (registry, repository) = pushed(&image).await;
    let ztoc = b"no zTOC at all".to_vec();
    let reference = ZtocReference {
        digest: Digest::of(&ztoc),
        size: ztoc.len() as u64,
        layer: Digest::of(&image.blobs[0]),
        layer_media_type: GZIP.to_owned(),
        span_bytes: 65536,
        disable_xattrs: false,
    };
    let index = SociIndex::v1(&[reference], &[], &Descriptor::of(media_type::MANIFEST, &image.manifest)).to_json();
    for blob in [ztoc, b"{}".to_vec()] {
        repository.push_blob(&Digest::of(&blob), Body::Bytes(blob.into()), None).await.unwrap();
    }
    repository.push_referrer(media_type::MANIFEST, Bytes::from(index)).await.unwrap();
    let wanted = labels(&format!("{}/team/app:v1", registry.host()), &image, 0);
    let root = tempfile::tempdir().unwrap();
    let (is_failure, reason) = refusal(&Daemon::start(root.path(), false), &wanted).await;
    assert!(is_failure, "{reason}");
    let other = tempfile::tempdir().unwrap();
    let daemon = Daemon::start_by(other.path(), ProfileOptions::default(), |options| options);
    let slot = daemon.layers.provide(&wanted).await.unwrap();
    assert_eq!(daemon.read(slot, "first").await, text(1, 300_000));
}
