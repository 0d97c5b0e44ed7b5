//! A client that is not ours, the crate `oci-client`: it reads what was published here, and what a program publishes with
//! it is found here.

use std::time::Duration;

use oci_client::client::{ClientConfig, ClientProtocol};
use oci_client::manifest::{ImageIndexEntry, OciDescriptor};
use oci_client::secrets::RegistryAuth;
use oci_client::{Client, Reference};
use soci_cli::demo::registry::DemoRegistry;
use soci_index::find::discover::{Discovery, Which, on_registry};
use soci_index::format::digest::Digest;
use soci_index::format::limits::Limits;
use soci_index::format::manifest::{INDEX_V1, SociIndex};
use soci_index::format::span_index::SPAN_INDEX;
use soci_tests::image::{Image, tar, text};
use soci_tests::registry::{Distribution, DockerRegistry, client};
use soci_tests::{run, soci, soci_path, stdout};

fn image() -> Image {
    Image::gzip(vec![tar(&[("a", text(1, 300_000))]), tar(&[("b", text(2, 200_000))])])
}

/// Publishes an image's index as users do, and has the other client follow every reference from the image down.
async fn published_is_readable(address: &str) {
    let image = image();
    image.push(&client(address).repository("team/app"), "v1").await;
    let name = format!("{address}/team/app:v1");
    drop(stdout(soci().args(["publish", &name, "--min-layer-size", "1000", "--format", "both"])));

    let _ = rustls::crypto::ring::default_provider().install_default();
    let protocol = ClientProtocol::HttpsExcept(vec![address.to_owned()]);
    let other = Client::new(ClientConfig { protocol, ..ClientConfig::default() });
    let subject = Reference::with_digest(address.to_owned(), "team/app".to_owned(), image.digest().to_string());
    let listed = other.pull_referrers(&subject, None).await.unwrap();
    for kind in [INDEX_V1, SPAN_INDEX] {
        let is_kind = |entry: &&ImageIndexEntry| entry.artifact_type.as_deref() == Some(kind);
        let entry = listed.manifests.iter().find(is_kind).unwrap_or_else(|| panic!("{kind} is not in {listed}"));
        let index = subject.clone_with_digest(entry.digest.clone());
        let (raw, _) = other.pull_manifest_raw(&index, &RegistryAuth::Anonymous, &[&*entry.media_type]).await.unwrap();
        assert_eq!((Digest::of(&raw).to_string(), raw.len() as i64), (entry.digest.clone(), entry.size));
        let (manifest, _) = other.pull_image_manifest(&index, &RegistryAuth::Anonymous).await.unwrap();
        assert_eq!(manifest.subject.as_ref().map(|subject| subject.digest.clone()), Some(image.digest().to_string()));
        assert!(manifest.layers.len() >= image.tars.len(), "{manifest}");
        for blob in manifest.layers.iter().chain([&manifest.config]) {
            assert_eq!(pulled(&other, &index, blob).await, (blob.digest.clone(), blob.size), "{kind}");
        }
    }
}

/// The digest and the size of a blob as it comes.
async fn pulled(other: &Client, place: &Reference, blob: &OciDescriptor) -> (String, i64) {
    let mut content = Vec::new();
    other.pull_blob(place, blob, &mut content).await.unwrap();
    (Digest::of(&content).to_string(), content.len() as i64)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_published_is_readable() {
    published_is_readable(&DemoRegistry::start(Duration::ZERO).await.unwrap().host()).await;
    if let Some(registry) = Distribution::start() {
        published_is_readable(&registry.address).await;
    }
    // Without the referrers API, by the fallback tag.
    if let Some(registry) = DockerRegistry::start() {
        published_is_readable(&registry.address).await;
    }
}

/// The example, whose every byte goes through the other client.
#[tokio::test(flavor = "multi_thread")]
async fn what_it_publishes_is_found() {
    let registry = DemoRegistry::start(Duration::ZERO).await.unwrap();
    let repository = client(&registry.host()).repository("team/app");
    let image = image();
    image.push(&repository, "v1").await;
    let name = format!("{}/team/app:v1", registry.host());
    let example = soci_path().with_file_name("with_oci_client");
    assert!(example.exists(), "{} is missing: run `cargo build --workspace` first", example.display());
    let said = stdout(std::process::Command::new(example).arg(&name));
    let Discovery::Found(found) = on_registry(&repository, &image.digest(), Which::Newest).await.unwrap() else {
        panic!("no index is found: {said}");
    };
    assert!(said.contains(&found.digest.to_string()), "{said}");
    let index = SociIndex::parse(&found.raw, &Limits::DEFAULT).unwrap();
    assert_eq!(index.ztocs().count(), image.tars.len());
    let verified = run(soci().args(["verify", &name]));
    assert!(verified.status.success(), "{}", String::from_utf8_lossy(&verified.stderr));
}
