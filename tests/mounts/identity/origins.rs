//! A layer that several repositories have, when one of them fails or goes.

use std::time::{Duration, Instant};

use soci_cli::demo::registry::DemoRegistry;
use soci_fs::node::remote::ProfileOptions;
use soci_fs::open::OpenOptions;
use soci_tests::forge::{Lie, SPAN_BYTES, push_spans};
use soci_tests::front::{Fault, Front};
use soci_tests::image::Image;
use soci_tests::layers::{Daemon, labels};
use soci_tests::registry::client;

use super::{Form, Stage, assert_honest, layer, push};

/// What happens to the registry that a layer was first pulled from.
const OUTAGES: [Fault; 6] = [
    Fault::Stopped,
    Fault::Status(404, ""),
    Fault::Status(403, ""),
    Fault::Status(401, "www-authenticate: Basic realm=\"x\"\r\n"),
    Fault::Garbage,
    Fault::Slow { late: Duration::from_secs(60), bytes_per_second: 1000 },
];

/// Two images share a layer by equal claims, from two registries; the first fails in every way; with and without a restart.
#[tokio::test(flavor = "multi_thread")]
async fn the_second_origin_serves_when_the_first_fails() {
    for form in [Form::Ztoc, Form::Spans] {
        for fault in OUTAGES {
            for restart in [false, true] {
                let stage = Stage::new().await;
                let image = Image::gzip(vec![layer(1)]);
                push(&stage.repository("team/app"), &image, form).await;
                let (first, second) = (
                    Front::start(&stage.registry.host()).await.unwrap(),
                    Front::start(&stage.registry.host()).await.unwrap(),
                );
                let daemon = stage.daemon();
                let labels_of = |front: &Front| labels(&format!("{}/team/app:v1", front.host()), &image, 0);
                let slot = daemon.layers.provide(&labels_of(&first)).await.unwrap();
                assert_eq!(daemon.link(slot, "link").await.unwrap(), b"file");
                assert_eq!(daemon.layers.provide(&labels_of(&second)).await.unwrap(), slot, "the same claim");
                first.set(fault);
                let daemon = if restart {
                    drop(daemon);
                    stage.daemon()
                } else {
                    daemon
                };
                let start = Instant::now();
                assert_honest(&daemon, slot).await;
                assert!(start.elapsed() < Duration::from_secs(15), "{form:?} {fault:?}: {:?}", start.elapsed());
                assert_eq!(daemon.record(slot).unwrap().origins.len(), 2);
            }
        }
    }
}

/// An image with an index in one repository, then the same digest from another one where there is none: the second does not
/// get the first one's index, and neither is hurt when the other's repository goes, nor the second when the first image is
/// removed from the node. Promotion from one stage to the next.
#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_promoted_and_its_first_repository_goes() {
    for form in [Form::Ztoc, Form::Spans] {
        for gone in ["dev", "prod", "dev, removed from the node"] {
            for restart in [false, true] {
                let stage = Stage::new().await;
                let image = Image::gzip(vec![layer(1)]);
                push(&stage.repository("dev/app"), &image, form).await;
                push(&stage.repository("prod/app"), &image, Form::Whole).await;
                let fronts = [
                    Front::start(&stage.registry.host()).await.unwrap(),
                    Front::start(&stage.registry.host()).await.unwrap(),
                ];
                let names = [format!("{}/dev/app:v1", fronts[0].host()), format!("{}/prod/app:v1", fronts[1].host())];
                let daemon = stage.daemon();
                let mut slots = Vec::new();
                for name in &names {
                    let slot = daemon.layers.provide(&labels(name, &image, 0)).await.unwrap();
                    assert_eq!(daemon.link(slot, "link").await.unwrap(), b"file");
                    slots.push(slot);
                }
                assert_ne!(slots[0], slots[1], "the index of one repository is used for another one's image");
                fronts[usize::from(gone == "prod")].set(Fault::Status(404, ""));
                if gone == "dev, removed from the node" {
                    daemon.layers.release(slots[0]);
                    daemon.layers.sweep_indexes().await;
                }
                let daemon = if restart {
                    drop(daemon);
                    stage.daemon()
                } else {
                    daemon
                };
                assert_honest(&daemon, slots[1]).await;
                if gone == "prod" {
                    assert_honest(&daemon, slots[0]).await;
                }
            }
        }
    }
}

/// The index is deleted in the registry, its blobs with it, while a container reads; also across a restart.
#[tokio::test(flavor = "multi_thread")]
async fn an_index_goes_while_a_container_reads() {
    for restart in [false, true] {
        let (stage, indexes) = (Stage::new().await, DemoRegistry::start(Duration::ZERO).await.unwrap());
        let image = Image::gzip(vec![layer(1)]);
        push(&stage.repository("team/app"), &image, Form::Whole).await;
        let front = Front::start(&indexes.host()).await.unwrap();
        push_spans(&client(&indexes.host()).repository("soci/index"), &image, SPAN_BYTES, Lie::None).await;
        let elsewhere = client(&front.host()).repository("soci/index");
        let start = || {
            Daemon::start_by(stage.root.path(), ProfileOptions::default(), |options| OpenOptions {
                index_repositories: vec![elsewhere.clone()],
                // What is kept of the index must not be what helps.
                index_store: None,
                ..options
            })
        };
        let daemon = start();
        // The rules of a daemon go by image; here all have the same.
        let slot = daemon.layers.provide(&labels(&stage.name("team/app"), &image, 0)).await;
        let Ok(slot) = slot else { panic!("{slot:?}") };
        assert_eq!(daemon.link(slot, "link").await.unwrap(), b"file");
        front.set(Fault::Status(404, ""));
        let daemon = if restart {
            drop(daemon);
            start()
        } else {
            daemon
        };
        assert_honest(&daemon, slot).await;
    }
}
