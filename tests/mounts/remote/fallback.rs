//! Layers that are left to containerd, and why.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use soci_cli::demo::registry::DemoRegistry;
use soci_fs::layer::stages::Stages;
use soci_fs::node::metrics::Metrics;
use soci_fs::node::remote::labels::{IMAGE, INDEX, LAYER, MANIFEST};
use soci_fs::node::remote::{ProfileOptions, RemoteError};
use soci_fs::open::{IndexModes, OpenOptions};
use soci_index::format::digest::Digest;
use soci_tests::image::{Image, tar, text};
use soci_tests::layers::{Daemon, labels};
use soci_tests::{soci, stdout};

use super::{image, push};

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
