//! Nothing that one image claims reaches another one, and nothing that is missing in one place is an error while another
//! place has it. Each test is an attack, or an outage, against the layers of a daemon.

use std::time::Duration;

use soci_cli::demo::registry::DemoRegistry;
use soci_index::registry::Repository;
use soci_tests::forge::{Lie, SPAN_BYTES, push_spans, push_ztoc};
use soci_tests::front::{Fault, Front};
use soci_tests::image::{GZIP, Image, gzip, text};
use soci_tests::layers::{Daemon, labels};
use soci_tests::registry::client;

mod origins;
mod packs;

const FILE: usize = 900_000;

fn append(builder: &mut tar::Builder<Vec<u8>>, name: &str, content: &[u8]) {
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o644);
    header.set_size(content.len() as u64);
    builder.append_data(&mut header, name, content).unwrap();
}

/// A layer with a file and a symbolic link to it.
fn layer(seed: u64) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    append(&mut builder, "file", &text(seed, FILE));
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Symlink);
    header.set_size(0);
    builder.append_link(&mut header, "link", "file").unwrap();
    builder.into_inner().unwrap()
}

/// What the owner of [`layer`] 1 ought to see.
async fn assert_honest(daemon: &Daemon, slot: u16) {
    assert_eq!(daemon.link(slot, "link").await.unwrap(), b"file");
    assert!(daemon.read(slot, "file").await == text(1, FILE), "other bytes than the layer has");
}

/// A registry of this process, with a front before it for each party, which makes the parties' registries fail.
struct Stage {
    registry: DemoRegistry,
    root: tempfile::TempDir,
}

impl Stage {
    async fn new() -> Self {
        Self { registry: DemoRegistry::start(Duration::ZERO).await.unwrap(), root: tempfile::tempdir().unwrap() }
    }

    fn repository(&self, name: &str) -> Repository {
        client(&self.registry.host()).repository(name)
    }

    fn name(&self, repository: &str) -> String {
        format!("{}/{repository}:v1", self.registry.host())
    }

    fn daemon(&self) -> Daemon {
        Daemon::start(self.root.path(), true)
    }
}

/// Waits, at most ten seconds.
async fn until(what: &str, is_so: impl Fn() -> bool) {
    for _ in 0..1000 {
        if is_so() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{what}");
}

/// How an attacker tries to get into the victim's image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Attack {
    /// An image whose configuration claims the victim's diff_id over a layer of the attacker's.
    ClaimedDiffId,
    /// A forged index beside the attacker's own image of the same layer.
    ForgedZtoc(Lie),
    ForgedToc,
    /// The right layer, claimed to be another tar: once it is found wrong, so might be the victim's.
    WrongDiffId,
}

const ATTACKS: [Attack; 5] = [
    Attack::ClaimedDiffId,
    Attack::ForgedZtoc(Lie::Window),
    Attack::ForgedZtoc(Lie::Link),
    Attack::ForgedToc,
    Attack::WrongDiffId,
];

impl Attack {
    async fn push(self, repository: &Repository) -> Image {
        let (right, other) = (layer(1), layer(2));
        let image = match self {
            Self::ClaimedDiffId => Image::new(vec![(GZIP, gzip(&other, 6), right)]),
            Self::WrongDiffId => Image::new(vec![(GZIP, gzip(&right, 6), other)]),
            Self::ForgedZtoc(_) | Self::ForgedToc => Image::gzip(vec![right]),
        };
        image.push(repository, "v1").await;
        match self {
            Self::ForgedZtoc(lie) => push_ztoc(repository, &image, SPAN_BYTES, lie).await,
            Self::ForgedToc => push_spans(repository, &image, SPAN_BYTES, Lie::Link).await,
            Self::ClaimedDiffId | Self::WrongDiffId => push_ztoc(repository, &image, SPAN_BYTES, Lie::None).await,
        };
        image
    }
}

/// The attacker first, and the victim first; while both run, after the proof, after a restart, and at the next pull.
#[tokio::test(flavor = "multi_thread")]
async fn an_attacker_reaches_only_the_attacker() {
    for attack in ATTACKS {
        for attacker_first in [true, false] {
            let stage = Stage::new().await;
            let evil = attack.push(&stage.repository("attacker/app")).await;
            // Another manifest of the same layer.
            let victim = stage.repository("victim/app");
            let mut good = Image::gzip(vec![layer(1)]);
            good.manifest = String::from_utf8(good.manifest.to_vec()).unwrap().replacen('{', "{ ", 1).into();
            good.push(&victim, "v1").await;
            push_spans(&victim, &good, SPAN_BYTES, Lie::None).await;
            let evil_labels = labels(&stage.name("attacker/app"), &evil, 0);
            let good_labels = labels(&stage.name("victim/app"), &good, 0);

            let daemon = stage.daemon();
            let read_evil = async || {
                let slot = daemon.layers.provide(&evil_labels).await.unwrap();
                let _ = daemon.link(slot, "link").await;
                let _ = daemon.try_read(slot, "file").await;
                slot
            };
            let bad_slot = if attacker_first { Some(read_evil().await) } else { None };
            let slot = daemon.layers.provide(&good_labels).await.unwrap();
            assert_honest(&daemon, slot).await;
            let bad_slot = match bad_slot {
                Some(bad_slot) => bad_slot,
                None => read_evil().await,
            };
            assert_ne!(slot, bad_slot, "{attack:?}: one slot for two claims");
            assert_honest(&daemon, slot).await;

            let working = tokio::spawn(daemon.background(None).run());
            let state = |slot| daemon.forest.reader(slot).unwrap();
            until("the lie is found out and the truth proven", || {
                state(bad_slot).health().condemned().is_some() && state(slot).store().is_proven()
            })
            .await;
            assert_honest(&daemon, slot).await;
            assert!(daemon.try_read(bad_slot, "file").await.is_err() && daemon.link(bad_slot, "link").await.is_err());
            working.abort();
            drop(daemon);

            let daemon = stage.daemon();
            assert_honest(&daemon, slot).await;
            assert!(daemon.try_read(bad_slot, "file").await.is_err(), "{attack:?}: a restart forgives");
            // The next pull of the attacker's image gets the truth, or nothing, and never the condemned slot.
            match daemon.layers.provide(&evil_labels).await {
                Ok(again) => {
                    assert_ne!(again, bad_slot);
                    assert_honest(&daemon, again).await;
                }
                Err(error) => assert_eq!(attack, Attack::WrongDiffId, "{error}"),
            }
            assert_eq!(daemon.layers.provide(&good_labels).await.unwrap(), slot);
        }
    }
}

/// What was proven serves every image that claims the same tar, and its bytes come once.
#[tokio::test(flavor = "multi_thread")]
async fn proven_layers_are_shared_by_diff_id() {
    let stage = Stage::new().await;
    let first = stage.repository("team/app");
    let image = Image::gzip(vec![layer(1)]);
    image.push(&first, "v1").await;
    push_ztoc(&first, &image, SPAN_BYTES, Lie::None).await;
    // The same tar, compressed anew, without an index.
    let recompressed = Image::new(vec![(GZIP, gzip(&layer(1), 1), layer(1))]);
    recompressed.push(&stage.repository("other/app"), "v1").await;
    assert_ne!(image.blobs[0], recompressed.blobs[0]);
    let daemon = stage.daemon();
    let slot = daemon.layers.provide(&labels(&stage.name("team/app"), &image, 0)).await.unwrap();
    assert_honest(&daemon, slot).await;
    let working = tokio::spawn(daemon.background(None).run());
    until("the layer is proven", || daemon.forest.reader(slot).unwrap().store().is_proven()).await;
    working.abort();
    let before = stage.registry.traffic().bytes_sent;
    let other = labels(&stage.name("other/app"), &recompressed, 0);
    assert_eq!(daemon.layers.provide(&other).await.unwrap(), slot);
    let sent = stage.registry.traffic().bytes_sent - before;
    assert!(sent < 20_000, "{sent} bytes for a layer that is here");
    // It is remembered as an image of the slot, and asks for nothing the next time.
    let before = stage.registry.traffic().requests;
    assert_eq!(daemon.layers.provide(&other).await.unwrap(), slot);
    assert_eq!(stage.registry.traffic().requests, before);
}

/// Which forms of an index an image has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Ztoc,
    Spans,
    /// None: the layer is read whole.
    Whole,
}

async fn push(repository: &Repository, image: &Image, form: Form) {
    image.push(repository, "v1").await;
    match form {
        Form::Ztoc => drop(push_ztoc(repository, image, SPAN_BYTES, Lie::None).await),
        Form::Spans => drop(push_spans(repository, image, SPAN_BYTES, Lie::None).await),
        Form::Whole => {}
    }
}

/// A source that gives what a start-up needs and withholds what would expose a lie: the claim fails closed, and is back in
/// service once it is proven.
#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_proven_is_suspended() {
    let stage = Stage::new().await;
    let image = Image::gzip(vec![layer(1)]);
    push(&stage.repository("team/app"), &image, Form::Ztoc).await;
    let front = Front::start(&stage.registry.host()).await.unwrap();
    let daemon = stage.daemon();
    let slot = daemon.layers.provide(&labels(&format!("{}/team/app:v1", front.host()), &image, 0)).await.unwrap();
    let reader = daemon.forest.reader(slot).unwrap();
    let _start = reader.read(0, 100).await.unwrap();
    front.set(Fault::Status(403, ""));
    let working = tokio::spawn(daemon.background(Some(Duration::from_secs(1))).run());
    until("the claim is suspended", || reader.health().suspended().is_some()).await;
    let refused = reader.read(0, 100).await.unwrap_err();
    assert!(refused.to_string().contains("suspended"), "{refused}");
    assert!(daemon.link(slot, "link").await.is_err(), "names are claims, too");
    working.abort();
    front.set(Fault::None);
    let _working = tokio::spawn(daemon.background(Some(Duration::from_secs(1))).run());
    until("it is proven and in service", || reader.health().suspended().is_none()).await;
    assert!(reader.store().is_proven());
    assert_honest(&daemon, slot).await;
}
