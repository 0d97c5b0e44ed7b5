//! Registries that refuse something, and pushes that were interrupted.

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use soci_index::find::discover::{Discovery, Which, on_registry};
use soci_index::format::model::media_type;
use soci_index::format::reference::ManifestName;
use soci_tests::mounting::can_mount;
use soci_tests::profile::{Broken, Profile, ProfiledRegistry, Quirks};
use soci_tests::publishing::{Outcome, image, publish, publish_and_find};
use soci_tests::{run, soci};

use super::{assert_nothing_is_sent, to_another};

/// Where nothing but images is taken, neither version has a place, and the message says where to go; another repository
/// is the way.
#[tokio::test(flavor = "multi_thread")]
async fn to_where_artifacts_are_refused() {
    for status in [403, 415] {
        let quirks = Quirks { refuses_artifacts: Some(status), ..Profile::Ghcr.quirks() };
        let registry = ProfiledRegistry::with(quirks).await;
        let (login, image) = (tempfile::tempdir().unwrap(), image());
        image.push(&registry.client(login.path()).repository("team/app"), "v1").await;
        let name = format!("{}/team/app:v1", registry.address);
        for more in [&[][..], &["--v2"]] {
            let output = run(publish(&name, login.path()).args(more));
            assert_eq!(output.status.code(), Some(8), "{status} {more:?}: {output:?}");
        }
        let before = registry.requests().len();
        to_another(&name, &image, login.path()).await;
        assert_nothing_is_sent(&registry, before);
    }
}

/// What a registry does not take is said in words that lead on.
#[tokio::test(flavor = "multi_thread")]
async fn dockers_media_types_on_zot() {
    let registry = ProfiledRegistry::start(Profile::Zot).await;
    let login = tempfile::tempdir().unwrap();
    let repository = registry.client(login.path()).repository("team/app");
    let name = ManifestName::Tag("v1".to_owned());
    let refused = repository.push_manifest(&name, media_type::DOCKER_MANIFEST, "{}".into()).await.unwrap_err();
    assert!(refused.to_string().contains("does not accept this media type"), "{refused}");
}

/// A push that was cut between the manifest and the tag leaves an index that no client finds; the next run lists it.
#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_publish_is_repaired() {
    let broken = Some(Broken { method: "PUT", path: "/manifests/sha256-", status: 403 });
    let registry = ProfiledRegistry::with(Quirks { broken, ..Profile::Ghcr.quirks() }).await;
    let login = tempfile::tempdir().unwrap();
    let repository = registry.client(login.path()).repository("team/app");
    let (image, name) = (image(), format!("{}/team/app:v1", registry.address));
    image.push(&repository, "v1").await;
    registry.break_down();
    let output = run(&mut publish(&name, login.path()));
    assert_eq!(output.status.code(), Some(8), "{output:?}");
    assert_eq!(repository.fallback_entries(&image.digest()).await.unwrap(), None);
    registry.heal();
    publish_and_find(&name, &image, &repository, login.path(), Outcome::Tag).await;
}

/// A project that shows only what is signed (section 5.2): the index is pushed without a look at what is there, as
/// often as it takes.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_read_back() {
    let broken = Some(Broken { method: "GET", path: "/manifests/sha256:", status: 412 });
    let registry = ProfiledRegistry::with(Quirks { broken, ..Profile::Harbor215.quirks() }).await;
    let login = tempfile::tempdir().unwrap();
    let repository = registry.client(login.path()).repository("team/app");
    let (image, name) = (image(), format!("{}/team/app:v1", registry.address));
    image.push(&repository, "v1").await;
    registry.break_down();
    for _ in 0..2 {
        let output = run(&mut publish(&name, login.path()));
        assert!(output.status.success(), "{output:?}");
    }
    registry.heal();
    let found = on_registry(&repository, &image.digest(), Which::Newest).await.unwrap();
    assert!(matches!(found, Discovery::Found(found) if found.others == 0));
}

/// Mounts, ends it, and answers what was said until it was mounted.
fn until_mounted(mount: &mut std::process::Command) -> String {
    use std::io::{BufRead as _, BufReader};
    let mut child = mount.stdout(std::process::Stdio::piped()).spawn().unwrap();
    let (mut lines, mut said) = (BufReader::new(child.stdout.take().unwrap()), String::new());
    while !said.contains("mounted ") && lines.read_line(&mut said).unwrap() > 0 {}
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    let _ = std::io::copy(&mut lines, &mut std::io::sink());
    let status = child.wait().unwrap();
    assert!(status.success(), "{status}: {said}");
    said
}

/// The same project: every command names what refuses the index, none says that there is none, and no layer is read a
/// second time.
#[tokio::test(flavor = "multi_thread")]
async fn what_refuses_an_index_is_named() {
    let broken = Some(Broken { method: "GET", path: "/manifests/sha256:", status: 412 });
    let registry = ProfiledRegistry::with(Quirks { broken, ..Profile::Harbor215.quirks() }).await;
    let login = tempfile::tempdir().unwrap();
    let repository = registry.client(login.path()).repository("team/app");
    let (image, name) = (image(), format!("{}/team/app:v1", registry.address));
    image.push(&repository, "v1").await;
    registry.break_down();
    let layers_read = || {
        let manifest: Value = serde_json::from_slice(&image.manifest).unwrap();
        let layers = manifest["layers"].as_array().unwrap();
        let is_layer = |line: &String| layers.iter().any(|layer| line.ends_with(layer["digest"].as_str().unwrap()));
        registry.requests().iter().filter(|line| line.starts_with("GET ") && is_layer(line)).count()
    };
    let mut read = Vec::new();
    for status in ["published", "refused"] {
        let output = run(&mut publish(&name, login.path()));
        let said: Value = serde_json::from_slice(&output.stdout).unwrap();
        let said = &said["images"][0];
        assert_eq!((&said["status"], &said["spanIndex"]["status"]), (&status.into(), &status.into()), "{said}");
        assert!(said["warnings"][0].as_str().unwrap().contains("PROJECTPOLICYVIOLATION"), "{said}");
        read.push(layers_read());
    }
    assert_eq!(read[0], read[1], "no layer is read again");
    let root = tempfile::tempdir().unwrap();
    for (words, code) in [
        (&["publish", "--min-layer-size", "1000"][..], 0),
        (&["verify"], 8),
        (&["doctor"], 1),
        (&["pull", "--min-layer-size", "1000"], 0),
    ] {
        let mut soci = soci();
        soci.env("DOCKER_CONFIG", login.path()).arg("--root").arg(root.path()).arg(words[0]).arg(&name);
        let output = run(soci.args(&words[1..]));
        let said = [output.stdout.clone(), output.stderr.clone()].concat();
        let said = String::from_utf8_lossy(&said);
        assert_eq!(output.status.code(), Some(code), "{words:?}: {said}");
        assert!(said.contains("PROJECTPOLICYVIOLATION"), "{words:?}: {said}");
        assert!(!said.contains("has no index") && !said.contains("has none"), "{words:?}: {said}");
    }
    if can_mount() {
        let place = tempfile::tempdir().unwrap();
        let (root, mut mount) = (tempfile::tempdir().unwrap(), soci());
        mount.env("DOCKER_CONFIG", login.path()).arg("--root").arg(root.path()).args(["mount", &name]);
        let said = until_mounted(mount.arg(place.path()).args(["--min-layer-size", "1000"]));
        assert!(said.contains("PROJECTPOLICYVIOLATION") && !said.contains("has no index"), "{said}");
    }
    // What is signed must be known: it is built, and what was signed can be read.
    let signed = run(publish(&name, login.path()).args(["--sign-with", "true"]));
    let message = String::from_utf8_lossy(&signed.stderr).into_owned();
    assert!(signed.status.success() && message.contains("PROJECTPOLICYVIOLATION"), "{message}");
}
