//! Layers for snapshots: found by labels, opened side by side, opened again after a restart.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use soci_cli::demo::registry::DemoRegistry;
use soci_fs::foresight::profile::Memory;
use soci_fs::fuse::file_system::FileSystem as _;
use soci_fs::layer::stages::Stages;
use soci_fs::node::metrics::Metrics;
use soci_fs::node::remote::background::{Background, Pace};
use soci_fs::node::remote::labels::{IMAGE, INDEX, LAYER, MANIFEST};
use soci_fs::node::remote::{ProfileOptions, RemoteError};
use soci_fs::open::{IndexModes, OpenOptions};
use soci_index::format::digest::Digest;
use soci_index::format::model::media_type;
use soci_index::format::reference::ManifestName;
use soci_index::image::urls::UrlFetcher;
use soci_index::registry::Body;
use soci_tests::front::{Fault, Front};
use soci_tests::image::{GZIP, Image, gzip, tar, text};
use soci_tests::layers::{Daemon, labels};
use soci_tests::registry::client;
use soci_tests::urls::serve;
use soci_tests::{soci, stdout};

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

/// A node that has lost an image's bytes fetches what its last start-up read, before any read.
#[tokio::test(flavor = "multi_thread")]
async fn start_ups_are_remembered_and_fetched_ahead() {
    let content = text(5, 2_000_000);
    let image = Image::gzip(vec![tar(&[("data", content.clone())])]);
    let registry = DemoRegistry::start(Duration::ZERO).await.unwrap();
    let name = push(&registry, &image).await;
    publish(&name);
    let kept = tempfile::tempdir().unwrap();
    let profiles = ProfileOptions {
        follow_names: false,
        prefetch: false,
        prefetch_layers: None,
        replay: true,
        record: true,
        memory: Some(Memory::new(kept.path().join("profiles"))),
        budget_bytes: None,
        start_up: Some(Duration::from_millis(500)),
    };
    let present = |daemon: &Daemon, slot| daemon.forest.reader(slot).unwrap().store().present_spans();
    for is_known in [false, true] {
        let root = tempfile::tempdir().unwrap();
        let daemon = Daemon::start_with(root.path(), true, profiles.clone());
        let slot = daemon.layers.provide(&labels(&name, &image, 0)).await.unwrap();
        let mut ahead = 0;
        for _ in 0..20 {
            tokio::time::sleep(Duration::from_millis(10)).await;
            ahead = present(&daemon, slot);
        }
        assert_eq!(ahead > 0, is_known, "{ahead} spans before any read");
        let inode = daemon.forest.lookup(1, slot.to_string().as_bytes()).unwrap().inode;
        let inode = daemon.forest.lookup(inode, b"data").unwrap().inode;
        assert_eq!(daemon.forest.read(inode, 1_000_000, 100).await.unwrap(), content[1_000_000..1_000_100]);
        for _ in 0..300 {
            if kept.path().join("profiles").exists() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(std::fs::read_dir(kept.path().join("profiles")).unwrap().count(), 1);
    }
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

#[tokio::test(flavor = "multi_thread")]
async fn reasons_for_leaving_a_layer_to_containerd() {
    let (image, _) = image();
    let registry = DemoRegistry::start(Duration::ZERO).await.unwrap();
    let name = push(&registry, &image).await;
    let root = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(root.path(), false);
    let reason = |changes: BTreeMap<&str, String>, layer| {
        let mut labels = labels(&name, &image, layer);
        labels.extend(changes.into_iter().map(|(key, value)| (key.to_owned(), value)));
        let daemon = &daemon;
        async move { daemon.layers.provide(&labels).await.unwrap_err().to_string() }
    };
    let none = BTreeMap::new();
    assert!(reason(none.clone(), 0).await.contains("cannot be read lazily: the image has no index"));
    assert!(reason(none, 1).await.contains("cannot be read lazily: it is small"));
    let absent = Digest::of(b"absent").to_string();
    assert!(reason(BTreeMap::from([(LAYER, absent.clone())]), 0).await.contains("has no layer"));
    assert!(reason(BTreeMap::from([(MANIFEST, absent.clone())]), 0).await.contains("no such image"));
    assert!(reason(BTreeMap::from([(INDEX, absent)]), 0).await.contains("there is no index"));
    assert!(
        reason(BTreeMap::from([(IMAGE, String::new())]), 0)
            .await
            .contains("must be configured to pass image annotations")
    );
    assert!(daemon.forest.slots().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_is_not_remembered() {
    let (image, contents) = image();
    let registry = DemoRegistry::start(Duration::ZERO).await.unwrap();
    let name = format!("{}/team/app:v1", registry.host());
    let root = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(root.path(), true);
    let labels = labels(&name, &image, 0);
    assert!(daemon.layers.provide(&labels).await.unwrap_err().to_string().contains("no such image"));
    push(&registry, &image).await;
    let slot = daemon.layers.provide(&labels).await.unwrap();
    assert_eq!(daemon.read(slot, "etc/motd").await, contents[0]);
}

/// A layer whose hard link leads to a lower layer cannot stand alone.
#[tokio::test(flavor = "multi_thread")]
async fn links_to_lower_layers_are_containerd_s() {
    let below = tar(&[("a", text(1, 20_000))]);
    let mut builder = tar::Builder::new(tar(&[("c", text(2, 20_000))]));
    let bytes = builder.get_ref().len() - 1024;
    builder.get_mut().truncate(bytes);
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Link);
    header.set_size(0);
    builder.append_link(&mut header, "b", "a").unwrap();
    let image = Image::gzip(vec![below, builder.into_inner().unwrap()]);
    let registry = DemoRegistry::start(Duration::ZERO).await.unwrap();
    let name = push(&registry, &image).await;
    let root = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(root.path(), true);
    daemon.layers.provide(&labels(&name, &image, 0)).await.unwrap();
    let error = daemon.layers.provide(&labels(&name, &image, 1)).await.unwrap_err();
    assert!(matches!(&*error, RemoteError::LowerLinks { links: 1, .. }), "{error}");
    assert_eq!(daemon.forest.slots().len(), 1);
}

/// What no read asked for is fetched in the background and proven; then neither registry nor index need be trusted any
/// more.
#[tokio::test(flavor = "multi_thread")]
async fn the_rest_comes_in_the_background() {
    let (image, contents) = image();
    let registry = DemoRegistry::start(Duration::ZERO).await.unwrap();
    let name = push(&registry, &image).await;
    publish(&name);
    let root = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(root.path(), true);
    let slot = daemon.layers.provide(&labels(&name, &image, 0)).await.unwrap();
    let reader = daemon.forest.reader(slot).unwrap();
    assert!(!reader.store().is_complete() && !reader.store().is_proven());
    let metrics = Arc::new(Metrics::default());
    let pace = Pace {
        silence: Duration::from_millis(300),
        period: Duration::from_millis(5),
        quiet: Duration::from_millis(100),
        withheld: None,
    };
    let background = |quota| Background { layers: daemon.layers.clone(), pace, quota, metrics: Arc::clone(&metrics) };
    // A store that is nearly full is left as it is.
    let full = tokio::time::timeout(Duration::from_secs(1), background(Some(1)).run()).await;
    assert!(full.is_err() && reader.store().present_spans() == 0);
    let working = tokio::spawn(background(None).run());
    for _ in 0..400 {
        if reader.store().is_proven() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    assert!(reader.store().is_complete() && reader.store().is_proven());
    assert_eq!(metrics.background_spans.load(Ordering::Relaxed), u64::from(reader.store().spans()));
    // All is done: no registry is asked again.
    let before = registry.traffic().requests;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(registry.traffic().requests, before);
    drop(registry);
    assert_eq!(daemon.read(slot, "etc/motd").await, contents[0]);
    working.abort();
}

/// The layers of a pull that was given up are fetched without a waiting caller, and not for long.
#[tokio::test(flavor = "multi_thread")]
async fn fetches_without_waiting_callers_end() {
    let image = Image::gzip(vec![tar(&[("etc/motd", text(1, 3_000_000))]), tar(&[("etc/other", text(2, 3_000_000))])]);
    let registry = DemoRegistry::start(Duration::ZERO).await.unwrap();
    push(&registry, &image).await;
    let front = Front::start(&registry.host()).await.unwrap();
    let name = format!("{}/team/app:v1", front.host());
    let root = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(root.path(), true);
    front.set(Fault::Slow { late: Duration::from_millis(10), bytes_per_second: 50_000 });
    let (labels, layers) = (labels(&name, &image, 0), daemon.layers.clone());
    let question = {
        let labels = labels.clone();
        tokio::spawn(async move { layers.provide(&labels).await })
    };
    let stored = || std::fs::read_dir(root.path().join("layers")).map_or(0, Iterator::count);
    for _ in 0..200 {
        if stored() == 2 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(stored(), 2, "both layers are being fetched");
    daemon.layers.end_idle(Duration::ZERO);
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!question.is_finished(), "a caller waits");
    question.abort();
    let _ = question.await;
    daemon.layers.end_idle(Duration::ZERO);
    for _ in 0..200 {
        if stored() == 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(stored(), 0, "nothing is left of what was fetched");
    // A caller that comes back gets it.
    front.set(Fault::None);
    let slot = daemon.layers.provide(&labels).await.unwrap();
    assert_eq!(daemon.read(slot, "etc/motd").await, text(1, 3_000_000));
}

/// A version 2 index that is asked for by its digest is used for an image that does not name it, also with all modes
/// off; without that the image is containerd's.
#[tokio::test(flavor = "multi_thread")]
async fn indexes_by_digest_and_modes_that_are_off() {
    let (image, contents) = image();
    let registry = DemoRegistry::start(Duration::ZERO).await.unwrap();
    let name = push(&registry, &image).await;
    let made = format!("{}/team/app:soci", registry.host());
    let convert = ["convert", &name, &made, "--min-layer-size", "10000", "--span-size", "65536", "--json"];
    let scratch = tempfile::tempdir().unwrap();
    let converted: serde_json::Value =
        serde_json::from_str(&stdout(soci().arg("--root").arg(scratch.path()).args(convert))).unwrap();
    let index = converted["images"][0]["index"]["digest"].as_str().unwrap().to_owned();
    let off = IndexModes { referring: false, annotated: false };
    let root = tempfile::tempdir().unwrap();
    let daemon = Daemon::start_by(root.path(), ProfileOptions::default(), |open| OpenOptions {
        modes: off,
        whole_layers: false,
        ..open
    });
    let asked = |layer: usize| {
        let mut labels = labels(&name, &image, layer);
        labels.insert(INDEX.to_owned(), index.clone());
        labels
    };
    let slot = daemon.layers.provide(&asked(0)).await.unwrap();
    assert_eq!(daemon.read(slot, "etc/motd").await, contents[0]);
    let before = registry.traffic().requests;
    let left = daemon.layers.provide(&labels(&name, &image, 1)).await.unwrap_err();
    assert!(matches!(*left, RemoteError::Off), "{left}");
    assert_eq!(registry.traffic().requests, before, "nothing is asked");
}

/// The index that a label names is of another image: it is used for the layers that both have, the others come whole,
/// even where images without an index are left to containerd.
#[tokio::test(flavor = "multi_thread")]
async fn an_index_of_another_image() {
    let [shared, own, others] = [1, 2, 3].map(|seed| text(seed, 300_000));
    let layer = |content: &Vec<u8>| tar(&[("etc/motd", content.clone())]);
    let registry = DemoRegistry::start(Duration::ZERO).await.unwrap();
    let other = Image::gzip(vec![layer(&shared), layer(&others)]);
    let publish = ["publish", &push(&registry, &other).await, "--format", "aws", "--min-layer-size", "0", "--json"];
    let published: serde_json::Value = serde_json::from_str(&stdout(soci().args(publish))).unwrap();
    let index = published["images"][0]["index"]["digest"].as_str().unwrap().to_owned();
    let image = Image::gzip(vec![layer(&shared), layer(&own)]);
    let name = push(&registry, &image).await;
    for (whole_layers, (layer, content, is_lazy)) in
        [true, false].into_iter().flat_map(|whole| [(0, &shared, true), (1, &own, false)].map(|layer| (whole, layer)))
    {
        let root = tempfile::tempdir().unwrap();
        let daemon = Daemon::start_by(root.path(), ProfileOptions::default(), |open| OpenOptions {
            any_subject: true,
            whole_layers,
            whole_beside_index: true,
            ..open
        });
        let mut labels = labels(&name, &image, layer);
        labels.insert(INDEX.to_owned(), index.clone());
        let slot = daemon.layers.provide(&labels).await.unwrap();
        assert_eq!(daemon.record(slot).unwrap().claim.table.is_some(), is_lazy, "layer {layer}");
        assert_eq!(daemon.read(slot, "etc/motd").await, *content);
    }
}

/// An index that cannot be had is looked for once, however many layers the image has.
#[tokio::test(flavor = "multi_thread")]
async fn a_search_that_failed_serves_all_layers() {
    let (image, _) = image();
    let registry = DemoRegistry::start(Duration::ZERO).await.unwrap();
    let name = push(&registry, &image).await;
    let root = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(root.path(), true);
    let asked = |layer: usize| {
        let mut labels = labels(&name, &image, layer);
        labels.insert(INDEX.to_owned(), Digest::of(b"no such index").to_string());
        labels
    };
    assert!(daemon.layers.provide(&asked(0)).await.is_err());
    let before = registry.traffic().requests;
    for layer in [1, 2, 0] {
        let error = daemon.layers.provide(&asked(layer)).await.unwrap_err();
        assert!(matches!(*error, RemoteError::Open(_)), "{error}");
    }
    assert_eq!(registry.traffic().requests, before, "one search is enough");
    // Without the digest it is another question.
    daemon.layers.provide(&labels(&name, &image, 0)).await.unwrap();
}

/// A layer that an index names and that cannot be read by it counts as one that fell back; others do not.
#[tokio::test(flavor = "multi_thread")]
async fn layers_that_fall_back_are_counted() {
    let (image, contents) = image();
    let registry = DemoRegistry::start(Duration::ZERO).await.unwrap();
    let name = push(&registry, &image).await;
    for (is_damaged, expected) in [(false, 0), (true, 1)] {
        let root = tempfile::tempdir().unwrap();
        let create = ["create", &name, "--format", "aws", "--min-layer-size", "10000"];
        drop(stdout(soci().arg("--root").arg(root.path()).args(create)));
        if is_damaged {
            let ztoc = stdout(soci().arg("--root").arg(root.path()).args(["ztoc", "list", "-q"]));
            let file = ztoc.lines().next().unwrap().replace("sha256:", "content/blobs/sha256/");
            std::fs::write(root.path().join(file), "no zTOC").unwrap();
        }
        let stages = Arc::new(Stages::default());
        let open = |open| OpenOptions { stages: Arc::clone(&stages), ..open };
        let daemon = Daemon::start_by(root.path(), ProfileOptions::default(), open);
        let slot = daemon.layers.provide(&labels(&name, &image, 0)).await.unwrap();
        assert_eq!(daemon.read(slot, "etc/motd").await, contents[0]);
        let metrics = Metrics { stages, ..Metrics::default() };
        let text = metrics.text(&[], daemon.forest.counters());
        let line =
            format!("soci_fs_operation_count{{layer=\"\",operation_type=\"fuse_mount_failure_count\"}} {expected}");
        assert!(text.lines().any(|found| found == line), "{text}");
    }
}

/// Artifacts are of one layer each, of which only so many are fetched ahead at the same time.
#[tokio::test(flavor = "multi_thread")]
async fn prefetching_is_limited() {
    const DELAY: Duration = Duration::from_millis(300);
    let layers = [("a", text(1, 200_000)), ("b", text(2, 200_000))].map(|file| tar(&[file]));
    let image = Image::gzip(layers.to_vec());
    let registry = DemoRegistry::start(DELAY).await.unwrap();
    let name = push(&registry, &image).await;
    let line = ["publish", &name, "--format", "aws", "--min-layer-size", "0"];
    drop(stdout(soci().args(line).args(["--prefetch-file", "a", "--prefetch-file", "b"])));
    let root = tempfile::tempdir().unwrap();
    let profiles = ProfileOptions { prefetch: true, prefetch_layers: Some(1), ..ProfileOptions::default() };
    let daemon = Daemon::start_with(root.path(), true, profiles);
    let mut slots = Vec::new();
    for layer in [0, 1] {
        slots.push(daemon.layers.provide(&labels(&name, &image, layer)).await.unwrap());
    }
    let mut came = [None; 2];
    let start = Instant::now();
    while came.contains(&None) {
        assert!(start.elapsed() < Duration::from_secs(30), "{came:?}");
        for (slot, came) in slots.iter().zip(&mut came) {
            let is_there = daemon.forest.reader(*slot).unwrap().store().is_complete();
            *came = came.or_else(|| is_there.then(Instant::now));
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let [first, second] = came.map(Option::unwrap);
    let between = first.max(second) - first.min(second);
    assert!(between > DELAY / 2, "they came side by side, {between:?} apart");
}

/// What AWS's prefetch artifacts name is fetched before any read, if that is wanted.
#[tokio::test(flavor = "multi_thread")]
async fn prefetch_artifacts_are_used() {
    let image = Image::gzip(vec![tar(&[("a", text(1, 900_000)), ("b", text(2, 900_000))])]);
    let registry = DemoRegistry::start(Duration::ZERO).await.unwrap();
    let name = push(&registry, &image).await;
    let line = ["publish", &name, "--format", "aws", "--min-layer-size", "0", "--span-size", "65536"];
    drop(stdout(soci().args(line).args(["--prefetch-file", "b"])));
    let spans = ["publish", &name, "--format", "span", "--min-layer-size", "0", "--index-span-size", "65536"];
    for (prefetch, by_spans) in [(false, false), (true, false), (false, true), (true, true)] {
        if by_spans {
            drop(stdout(soci().args(spans)));
        }
        let root = tempfile::tempdir().unwrap();
        let profiles = ProfileOptions { prefetch, ..ProfileOptions::default() };
        let daemon = Daemon::start_with(root.path(), true, profiles);
        let slot = daemon.layers.provide(&labels(&name, &image, 0)).await.unwrap();
        let present = || daemon.forest.reader(slot).unwrap().store().present_spans();
        for _ in 0..200 {
            if present() >= 5 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(if prefetch { 25 } else { 1 })).await;
        }
        assert_eq!(present() >= 5, prefetch, "{} spans", present());
        assert_eq!(daemon.read(slot, "b").await, text(2, 900_000));
    }
}
