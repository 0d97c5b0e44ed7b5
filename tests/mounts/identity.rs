//! Nothing that one image claims reaches another one, and nothing that is missing in one place is an error while another
//! place has it. Each test is an attack, or an outage, against the layers of a daemon.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use soci_cli::demo::registry::DemoRegistry;
use soci_fs::node::remote::ProfileOptions;
use soci_fs::open::OpenOptions;
use soci_fs::open::trust::{Provisional, TrustPolicy};
use soci_index::format::digest::Digest;
use soci_index::format::limits::Limits;
use soci_index::format::model::{Descriptor, media_type};
use soci_index::format::profile::artifact::Notes;
use soci_index::format::profile::{PAGE_BYTES, Profile, Touched};
use soci_index::publish::profiles;
use soci_index::registry::Repository;
use soci_tests::forge::{Lie, SPAN_BYTES, push_spans, push_ztoc};
use soci_tests::front::{Fault, Front};
use soci_tests::image::{GZIP, Image, gzip, text};
use soci_tests::layers::{Daemon, labels};
use soci_tests::registry::client;

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

/// A start-up pack of one page that is not what the layer has, in the attacker's repository, as the default.
async fn push_forged_pack(repository: &Repository, image: &Image, scratch: &Path) {
    let bytes = vec![b'P'; PAGE_BYTES as usize];
    let range = Touched { layer: 0, bytes: PAGE_BYTES..2 * PAGE_BYTES };
    let profile = Profile::new(vec![Digest::of(&image.blobs[0])], vec![range], &Limits::DEFAULT).unwrap();
    let profile = profile.with_digests(vec![Digest::of(&bytes).bytes().try_into().unwrap()]).unwrap();
    let file: PathBuf = scratch.join("pack");
    std::fs::write(&file, zstd::bulk::compress(&bytes, 1).unwrap()).unwrap();
    let notes = Notes {
        name: "default".to_owned(),
        is_default: true,
        created: "2026-01-01T00:00:00Z".to_owned(),
        command: None,
    };
    let subject = Descriptor::of(media_type::MANIFEST, &image.manifest);
    profiles::push(repository, &subject, &profile, Some(&file), &notes).await.unwrap();
}

fn has_pack(bytes: &[u8]) -> bool {
    bytes.windows(64).any(|window| window == [b'P'; 64])
}

/// A forged pack reaches the image that it is beside and no other, and is condemned by the spans themselves.
#[tokio::test(flavor = "multi_thread")]
async fn a_forged_pack_reaches_only_its_own_image() {
    let stage = Stage::new().await;
    let scratch = tempfile::tempdir().unwrap();
    let image = Image::gzip(vec![layer(1)]);
    for repository in ["attacker/app", "victim/app"] {
        push(&stage.repository(repository), &image, Form::Ztoc).await;
    }
    push_forged_pack(&stage.repository("attacker/app"), &image, scratch.path()).await;
    let profiles = ProfileOptions { replay: true, ..ProfileOptions::default() };
    let start = || Daemon::start_with(stage.root.path(), true, profiles.clone());
    let (evil, good) = (labels(&stage.name("attacker/app"), &image, 0), labels(&stage.name("victim/app"), &image, 0));
    let daemon = start();
    let bad_slot = daemon.layers.provide(&evil).await.unwrap();
    let reader = daemon.forest.reader(bad_slot).unwrap();
    until("the pack has come", || reader.store().has_parts(0)).await;
    let page = reader.read(PAGE_BYTES, 100).await.unwrap();
    assert!(has_pack(&page), "under `allow` a pack is believed by its own image until its span comes");
    let slot = daemon.layers.provide(&good).await.unwrap();
    assert_ne!(slot, bad_slot);
    assert_honest(&daemon, slot).await;
    // Fetching the rest finds it out, and leaves the layer as it is.
    let working = tokio::spawn(daemon.background(None).run());
    until("the layers are proven", || {
        [slot, bad_slot].iter().all(|slot| daemon.forest.reader(*slot).unwrap().store().is_proven())
    })
    .await;
    working.abort();
    assert!(reader.health().condemned().is_none(), "the layer is right, the pack was not");
    let said = reader.health().last_error().unwrap_or_default();
    assert!(said.contains("is condemned") && said.contains("pack"), "{said}");
    assert!(!has_pack(&daemon.read(bad_slot, "file").await));
    drop((reader, daemon));
    // Nothing that is new comes of it again.
    let daemon = start();
    daemon.layers.release(bad_slot);
    daemon.layers.release(slot);
    let again = daemon.layers.provide(&evil).await.unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(daemon.record(again).unwrap().claim.pack, None);
    assert_honest(&daemon, again).await;
}

/// The bytes of a pack are worth nothing under a stricter policy, nor where no profile is wanted, on the same root.
#[tokio::test(flavor = "multi_thread")]
async fn a_pack_is_worth_nothing_under_another_policy() {
    let stage = Stage::new().await;
    let scratch = tempfile::tempdir().unwrap();
    let image = Image::gzip(vec![layer(1)]);
    let repository = stage.repository("team/app");
    push(&repository, &image, Form::Ztoc).await;
    push_forged_pack(&repository, &image, scratch.path()).await;
    let labels = labels(&stage.name("team/app"), &image, 0);
    let profiles = ProfileOptions { replay: true, ..ProfileOptions::default() };
    {
        let daemon = Daemon::start_with(stage.root.path(), true, profiles.clone());
        let slot = daemon.layers.provide(&labels).await.unwrap();
        let reader = daemon.forest.reader(slot).unwrap();
        until("the pack has come", || reader.store().has_parts(0)).await;
        assert!(has_pack(&reader.read(PAGE_BYTES, 100).await.unwrap()));
        // Every page of the span from the pack, and it would have been a span.
        assert_eq!(reader.store().present_spans(), 0);
    }
    for (profiles, policy) in [(ProfileOptions::default(), Provisional::Allow), (profiles, Provisional::Deny)] {
        let root = tempfile::tempdir().unwrap();
        let copy =
            std::process::Command::new("cp").arg("-a").arg(stage.root.path().join(".")).arg(root.path()).status();
        assert!(copy.unwrap().success());
        std::fs::remove_dir_all(root.path().join("slots")).unwrap();
        let trust = Arc::new(TrustPolicy::new(policy, &[], &[]).unwrap());
        let daemon = Daemon::start_by(root.path(), profiles, |options| OpenOptions { trust, ..options });
        let slot = daemon.layers.provide(&labels).await.unwrap();
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert_honest(&daemon, slot).await;
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
