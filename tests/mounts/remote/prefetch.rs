//! What is fetched ahead of reads: by profiles, by prefetch artifacts, and in the background.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use soci_cli::demo::registry::DemoRegistry;
use soci_fs::foresight::profile::Memory;
use soci_fs::fuse::file_system::FileSystem as _;
use soci_fs::node::metrics::Metrics;
use soci_fs::node::remote::ProfileOptions;
use soci_fs::node::remote::background::{Background, Pace};
use soci_tests::front::{Fault, Front};
use soci_tests::image::{Image, tar, text};
use soci_tests::layers::{Daemon, labels};
use soci_tests::{soci, stdout};

use super::{image, publish, push};

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
