//! Packs of profiles: what a forged one reaches, and what a policy refuses.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

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
use soci_tests::image::Image;
use soci_tests::layers::{Daemon, labels};

use super::{Form, Stage, assert_honest, layer, push, until};

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
