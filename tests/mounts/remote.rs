//! Layers for snapshots: found by labels, opened side by side, opened again after a restart.

use std::time::Duration;

use soci_cli::demo::registry::DemoRegistry;
use soci_fs::node::remote::ProfileOptions;
use soci_fs::open::OpenOptions;
use soci_index::format::digest::Digest;
use soci_index::format::model::media_type;
use soci_index::format::reference::ManifestName;
use soci_index::image::urls::UrlFetcher;
use soci_index::registry::Body;
use soci_tests::image::{GZIP, Image, gzip, tar, text};
use soci_tests::layers::{Daemon, labels};
use soci_tests::registry::client;
use soci_tests::urls::serve;
use soci_tests::{soci, stdout};

mod fallback;
mod prefetch;

/// Three layers: one for spans, one too small, one that is zstd.
fn image() -> (Image, Vec<Vec<u8>>) {
    let contents = vec![text(1, 300_000), text(2, 2000), text(3, 100_000)];
    let tars: Vec<Vec<u8>> = contents.iter().map(|content| tar(&[("etc/motd", content.clone())])).collect();
    let zstd = ("application/vnd.oci.image.layer.v1.tar+zstd", zstd::encode_all(&tars[2][..], 3).unwrap());
    let image = Image::new(vec![
        (GZIP, gzip(&tars[0], 6), tars[0].clone()),
        (GZIP, gzip(&tars[1], 6), tars[1].clone()),
        (zstd.0, zstd.1, tars[2].clone()),
    ]);
    (image, contents)
}

async fn push(registry: &DemoRegistry, image: &Image) -> String {
    image.push(&client(&registry.host()).repository("team/app"), "v1").await;
    format!("{}/team/app:v1", registry.host())
}

fn publish(name: &str) {
    drop(stdout(soci().args(["publish", name, "--min-layer-size", "10000", "--span-size", "65536"])));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_layer_is_provided_and_survives_a_restart_without_the_network() {
    let (image, contents) = image();
    let registry = DemoRegistry::start(Duration::ZERO).await.unwrap();
    let name = push(&registry, &image).await;
    publish(&name);
    let root = tempfile::tempdir().unwrap();
    let mut slots = Vec::new();
    {
        let daemon = Daemon::start(root.path(), true);
        // containerd asks from the lowest up; all are asked twice at the same time here.
        for (layer, content) in contents.iter().enumerate() {
            let labels = labels(&name, &image, layer);
            let (one, two) = tokio::join!(daemon.layers.provide(&labels), daemon.layers.provide(&labels));
            let (one, two) = (one.unwrap(), two.unwrap());
            assert_eq!(one, two);
            assert_eq!(daemon.read(one, "etc/motd").await, *content);
            slots.push(one);
        }
        assert_eq!(daemon.forest.slots().len(), 3);
    }
    let before = registry.traffic().requests;
    drop(registry);
    assert!(before > 0);
    let daemon = Daemon::start(root.path(), true);
    for (slot, content) in slots.iter().zip(&contents) {
        assert_eq!(daemon.read(*slot, "etc/motd").await, *content);
    }
    assert_eq!(daemon.layers.provide(&labels(&name, &image, 1)).await.unwrap(), slots[1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_look_up_serves_all_layers() {
    let (image, _) = image();
    let registry = DemoRegistry::start(Duration::ZERO).await.unwrap();
    let name = push(&registry, &image).await;
    publish(&name);
    let root = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(root.path(), true);
    let before = registry.traffic().requests;
    for layer in 0..3 {
        daemon.layers.provide(&labels(&name, &image, layer)).await.unwrap();
    }
    // Manifest, configuration, referrers by API and by tag, index, zTOC, and two layers whole.
    let requests = registry.traffic().requests - before;
    assert!(requests <= 8, "{requests} requests");
}

#[tokio::test(flavor = "multi_thread")]
async fn unused_layers_are_swept() {
    let (image, contents) = image();
    let registry = DemoRegistry::start(Duration::ZERO).await.unwrap();
    let name = push(&registry, &image).await;
    let root = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(root.path(), true);
    // All three are brought, only this one is asked for.
    let slot = daemon.layers.provide(&labels(&name, &image, 0)).await.unwrap();
    daemon.until_slots(3).await;
    daemon.layers.sweep(Duration::from_secs(60));
    assert_eq!(daemon.forest.slots().len(), 3, "swept too early");
    daemon.layers.sweep(Duration::ZERO);
    assert_eq!(daemon.forest.slots().len(), 1, "only one was asked for");
    let directory = daemon.directory(slot);
    assert!(daemon.forest.has(slot) && directory.exists());
    daemon.layers.release(slot);
    assert!(!daemon.forest.has(slot) && !directory.exists());
    // It comes back under another number.
    let again = daemon.layers.provide(&labels(&name, &image, 0)).await.unwrap();
    assert!(again > slot);
    assert_eq!(daemon.read(again, "etc/motd").await, contents[0]);
    // The others are brought again, too; one that came later would rightly be kept.
    daemon.until_slots(3).await;
    daemon.layers.keep_only(&[again].into());
    assert_eq!(daemon.forest.slots().iter().map(|(slot, _)| *slot).collect::<Vec<_>>(), [again]);
}

/// A layer that is asked for while it is being given up is provided anew, and what was given up takes nothing of it
/// along.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_given_up_may_be_wanted_again_at_once() {
    let (image, contents) = image();
    let registry = DemoRegistry::start(Duration::ZERO).await.unwrap();
    let name = push(&registry, &image).await;
    let root = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(root.path(), true);
    let wanted = labels(&name, &image, 0);
    let mut slot = daemon.layers.provide(&wanted).await.unwrap();
    let mut anew = 0;
    for round in 0..40 {
        let layers = daemon.layers.clone();
        let given_up = tokio::task::spawn_blocking(move || layers.release(slot));
        if round % 2 == 0 {
            tokio::task::yield_now().await;
        }
        // One that was handed out just before it went is refused; the next question brings it.
        let provided = match daemon.layers.provide(&wanted).await {
            Ok(same) if same == slot => None,
            provided => provided.ok(),
        };
        given_up.await.unwrap();
        let other = match provided {
            Some(other) => other,
            None => daemon.layers.provide(&wanted).await.unwrap(),
        };
        anew += u32::from(other > slot);
        slot = other;
        assert!(daemon.directory(slot).exists(), "round {round}");
        assert_eq!(daemon.read(slot, "etc/motd").await, contents[0], "round {round}");
    }
    assert_eq!(anew, 40);
}

/// A layer that came from its URLs is nowhere else: it stays on the disk, also after a restart.
#[tokio::test(flavor = "multi_thread")]
async fn foreign_layers_stay_after_a_restart() {
    let content = text(4, 300_000);
    let foreign = tar(&[("data", content.clone())]);
    let blob = gzip(&foreign, 6);
    let (url, asked) = serve(blob.clone());
    let own = tar(&[("own", text(5, 100_000))]);
    let kind = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip";
    let mut image = Image::new(vec![(kind, blob.clone(), foreign), (GZIP, gzip(&own, 6), own)]);
    let mut manifest: serde_json::Value = serde_json::from_slice(&image.manifest).unwrap();
    manifest["layers"][0]["urls"] = serde_json::json!([format!("{url}/layer")]);
    image.manifest = manifest.to_string().into();
    let registry = DemoRegistry::start(Duration::ZERO).await.unwrap();
    let repository = client(&registry.host()).repository("team/app");
    for blob in &image.blobs[1..] {
        repository.push_blob(&Digest::of(blob), Body::Bytes(blob.clone()), None).await.unwrap();
    }
    let tag = ManifestName::Tag("v1".to_owned());
    repository.push_manifest(&tag, media_type::MANIFEST, image.manifest.clone()).await.unwrap();
    let name = format!("{}/team/app:v1", registry.host());

    let root = tempfile::tempdir().unwrap();
    let start = |is_allowed: bool| {
        let urls = is_allowed.then(|| UrlFetcher::new().unwrap());
        Daemon::start_by(root.path(), ProfileOptions::default(), |options| OpenOptions { urls, ..options })
    };
    let pinned = |daemon: &Daemon, slot| daemon.forest.reader(slot).unwrap().store().is_pinned();
    let slots = {
        let daemon = start(true);
        let foreign = daemon.layers.provide(&labels(&name, &image, 0)).await.unwrap();
        let own = daemon.layers.provide(&labels(&name, &image, 1)).await.unwrap();
        assert_eq!(daemon.read(foreign, "data").await, content);
        assert_eq!((pinned(&daemon, foreign), pinned(&daemon, own)), (true, false));
        [foreign, own]
    };
    let requests = asked.lock().unwrap().len();
    drop(registry);
    // What was fetched with leave is read without it.
    let daemon = start(false);
    assert_eq!(daemon.read(slots[0], "data").await, content);
    drop(daemon.read(slots[1], "own").await);
    assert_eq!(slots.map(|slot| pinned(&daemon, slot)), [true, false]);
    assert_eq!(asked.lock().unwrap().len(), requests);
}
