//! The policy for indexes that are not proven: in the library, in `soci mount`, in the snapshotter, after a restart.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use soci_fs::layer::proof::{self, Verdict};
use soci_fs::layer::store::Store;
use soci_fs::open::trust::TrustPolicy;
use soci_fs::open::{KeptLayer, LayerOrigin, Way, reopen_layer};
use soci_index::format::platform::PlatformSelection;
use soci_tests::containerd::Containerd;
use soci_tests::daemon::daemon;
use soci_tests::image::text;
use soci_tests::node::Node;
use soci_tests::signer::{Kind, Signer};
use soci_tests::{run, soci};

use super::{Stage, content, deny, read, required, ztoc};

/// What was proven is used under every policy, and survives the process.
#[tokio::test(flavor = "multi_thread")]
async fn proven_layers_are_used_under_every_policy() {
    let Some(signer) = Signer::new(Kind::P256) else { return };
    for by_data in [true, false] {
        let stage = Stage::new(&ztoc()).await;
        let opened = stage.open("a", TrustPolicy::default()).await;
        let reader = &opened.readers[0];
        reader.fetching().complete().await.unwrap();
        assert!(!reader.store().is_proven());
        let proof = if by_data {
            proof::by_data(reader, stage.claim().diff_id).await
        } else {
            proof::by_source(reader, stage.claim()).await
        };
        assert_eq!(proof.unwrap(), Verdict::Proven);
        drop(opened);
        for trust in [deny(), required(&[signer.path("pub.pem")])] {
            let opened = stage.open("a", trust).await;
            assert_eq!(opened.notes[0].way, Way::Kept);
            let read = read(&opened).await;
            assert!(read[..] == content()[..read.len()]);
        }
    }
}

/// After a restart a layer that was read lazily is opened again without a question only if the policy lets it.
#[tokio::test(flavor = "multi_thread")]
async fn restarts_follow_the_policy() {
    let stage = Stage::new(&ztoc()).await;
    let image = stage.source().await.resolve(&PlatformSelection::Host).await.unwrap().remove(0);
    let runtime = tokio::runtime::Handle::current();
    let opener = soci_fs::open::ImageOpener::new(
        stage.source().await,
        image.clone(),
        Arc::new(Store::open(&stage.root.path().join("a")).unwrap()),
        stage.options("a", TrustPolicy::default()),
        runtime.clone(),
    );
    let opened = opener.await.unwrap().open_layer(&image.manifest.layers[0], stage.claim().diff_id).await.unwrap();
    assert!(opened.claim.table.is_some() && opened.note.way == Way::Lazy);
    let (image, layer) = (stage.source().await, image.manifest.layers[0].clone());
    let kept = KeptLayer { claim: opened.claim, origins: vec![LayerOrigin { image, layer, index_from: None }] };
    let reader = opened.reader.clone();
    drop(opened);
    let again = async |trust: TrustPolicy, store: &Arc<Store>| {
        reopen_layer(&kept, store, &stage.options("a", trust), &runtime).await.unwrap().is_some()
    };
    reader.fetching().complete().await.unwrap();
    drop(reader);
    let store = Arc::new(Store::open(&stage.root.path().join("a")).unwrap());
    assert!(again(TrustPolicy::default(), &store).await);
    assert!(!again(deny(), &store).await);
    let reader = reopen_layer(&kept, &store, &stage.options("a", TrustPolicy::default()), &runtime).await;
    proof::by_source(&reader.unwrap().unwrap(), stage.claim()).await.unwrap();
    assert!(again(deny(), &store).await);
}

fn mount(root: &Path, name: &str, at: &Path, more: &[&str]) -> Command {
    let mut command = soci();
    command.arg("--root").arg(root).args(["mount", name]).arg(at).args(["--min-layer-size", "1000", "--detach"]);
    command.args(more);
    command
}

/// The flags of `soci mount`, and what goes wrong with them.
#[tokio::test(flavor = "multi_thread")]
async fn mounts_follow_the_policy() {
    let Some(signer) = Signer::new(Kind::Rsa) else { return };
    let stage = Stage::new(&ztoc()).await;
    let at = stage.root.path().join("mnt");
    std::fs::create_dir(&at).unwrap();
    let key = signer.path("pub.pem").display().to_string();
    let place = |name: &str| stage.root.path().join(name);
    if !Path::new("/dev/fuse").exists() || !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: mounting needs /dev/fuse and root");
        return;
    }
    for (more, code, expected) in [
        (&["--provisional", "require-signature"][..], 2, "no key or certificate is given"),
        (&["--key", &key], 2, "only provisional = require-signature"),
        (&["--provisional", "require-signature", "--key", "/no/such.pem"], 7, "/no/such.pem"),
        (&["--provisional", "require-signature", "--certificate", &key], 2, "no certificate in PEM form"),
        (&["--provisional", "maybe"], 2, "possible values"),
    ] {
        let output = run(&mut mount(&place("z"), &stage.name(), &at, more));
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(code) && said.contains(expected), "{more:?}: {said}");
    }
    signer.push_simple(&stage.repository(), &stage.index.digest).await;
    for (root, more, is_lazy) in [
        ("x", &[][..], true),
        ("y", &["--provisional", "deny"], false),
        ("w", &["--provisional", "require-signature", "--key", &key], true),
    ] {
        let output = run(&mut mount(&place(root), &stage.name(), &at, more));
        assert!(output.status.success(), "{more:?}: {}", String::from_utf8_lossy(&output.stderr));
        let status = std::fs::read(at.join(".soci/status.json")).unwrap();
        let file = std::fs::read(at.join("file")).unwrap();
        let unmounted = run(soci().arg("umount").arg(&at));
        assert!(unmounted.status.success(), "{}", String::from_utf8_lossy(&unmounted.stderr));
        assert!(file == text(1, 600_000), "{more:?}");
        let status: serde_json::Value = serde_json::from_slice(&status).unwrap();
        assert_eq!(status["layers"][0]["proven"], !is_lazy, "{more:?}: {status}");
    }
}

/// The snapshotter's configuration has the same policies, and mistakes in it stop the start.
#[tokio::test(flavor = "multi_thread")]
async fn the_snapshotter_follows_the_policy() {
    let Some(signer) = Signer::new(Kind::P256) else { return };
    let Some(mut node) = Node::start(Containerd::Installed) else { return };
    let stage = Stage::new(&ztoc()).await;
    let key = signer.path("pub.pem");
    let required = format!("[trust]\nprovisional = 'require-signature'\nkeys = ['{}']\n", key.display());
    let quiet = "[background_fetch]\ndisable = true\n";
    for (trust, is_signed, is_lazy) in [
        (String::new(), false, true),
        ("[trust]\nprovisional = 'deny'\n".to_owned(), false, false),
        (required.clone(), false, false),
        (required, true, true),
    ] {
        if is_signed {
            signer.push_simple(&stage.repository(), &stage.index.digest).await;
        }
        node.configure(&format!("{quiet}{trust}"));
        // containerd takes a moment to find a snapshotter again.
        node.wait("the image is pulled", || {
            let mut rpull = soci();
            rpull.arg("--address").arg(node.path("containerd.sock")).args(["rpull", &stage.name()]);
            run(&mut rpull).status.success()
        });
        let status = node.status();
        assert_eq!(status["layers"][0]["proven"], !is_lazy, "{trust}: {status}");
        node.remove_last_images(&[&stage.name()]);
    }
    assert!(node.log().contains("is not trusted: it has no signature"), "{}", node.log());
    std::fs::write(node.path("wrong.toml"), "[trust]\nprovisional = 'require-signature'\n").unwrap();
    let mut wrong = daemon();
    wrong.arg("--root").arg(node.path("wrong")).arg("--address").arg(node.path("wrong.sock"));
    let output = run(wrong.arg("--config").arg(node.path("wrong.toml")));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("no key or certificate is given"), "{said}");
}
