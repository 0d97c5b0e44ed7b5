//! `soci doctor REF`: what publishing would meet, on registries of several kinds, and that nothing is written.

use std::path::Path;

use serde_json::{Map, Value};
use soci_index::format::reference::ManifestName;
use soci_index::registry::Repository;
use soci_tests::image::{GZIP, Image, gzip, tar, text};
use soci_tests::profile::{Broken, Profile, ProfiledRegistry};
use soci_tests::{run, soci, stdout};

const ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";

fn image() -> Image {
    Image::gzip(vec![tar(&[("bin/tool", text(1, 3_000_000))]), tar(&[("app/data", text(3, 900_000))])])
}

/// What `doctor` finds, by its subject: `ok: ...`, `note: ...` or `WRONG: ...`, with the next step.
fn findings(arguments: &[&str], login: &Path) -> Map<String, Value> {
    let mut command = soci();
    command.args(["doctor", "--json", "--containerd-config", "/no/such/file"]).args(arguments);
    let output = run(command.env("DOCKER_CONFIG", login));
    let said = String::from_utf8_lossy(&output.stderr);
    let list: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {said}"));
    let word = |key: &str, finding: &Value| finding[key].as_str().unwrap_or_default().to_owned();
    let line = |finding: &Value| {
        let (verdict, found, fix) = (word("verdict", finding), word("found", finding), word("fix", finding));
        (word("what", finding), Value::from(format!("{verdict}: {found}; {fix}")))
    };
    list.as_array().unwrap().iter().map(line).collect()
}

fn assert_says(findings: &Map<String, Value>, what: &str, parts: &[&str]) {
    let said =
        findings.get(what).and_then(Value::as_str).unwrap_or_else(|| panic!("nothing about {what}: {findings:?}"));
    for part in parts {
        assert!(said.contains(part), "{what}: {said}: it should say {part:?}");
    }
}

/// Where an index would be listed, and the command for each case.
#[tokio::test(flavor = "multi_thread")]
async fn where_an_index_would_be_listed() {
    for (profile, parts) in [
        (Profile::Harbor211, &["good: the registry has the API"][..]),
        (Profile::Harbor28, &["note: no API", "application/json", "soci publish 127.0.0.1:"]),
        (Profile::Ghcr, &["note: no API (HTTP 404) and no fallback tag", "makes the tag", "--v2", "--to HOST/NAME"]),
        (Profile::Quay, &["note: no API (HTTP 404) and no fallback tag", "if the registry refuses that", "--v2"]),
        (Profile::GitLabDash, &["note: neither the API nor a place", "answers with the image itself", "--v2", "--to"]),
        (Profile::GoogleArtifactRegistry, &["note: no API", "makes the tag"]),
    ] {
        let (registry, login) = (ProfiledRegistry::start(profile).await, tempfile::tempdir().unwrap());
        let repository = registry.client(login.path()).repository("team/app");
        image().push(&repository, "v1").await;
        let name = format!("{}/team/app:v1", registry.address);
        let before = registry.requests().len();
        let found = findings(&[&name, "--push"], login.path());
        assert_says(&found, "referrers", parts);
        assert_says(&found, "index", &["bad: the image has none", &format!("soci publish {name}")]);
        assert_says(&found, "layers", &["note: 0 of 2 are indexed; 2 below", "--min-layer-size 0"]);
        assert_says(&found, "push", &["good: allowed: an upload was begun, and cancelled"]);
        let requests = registry.requests().split_off(before);
        let sends: Vec<&String> = requests
            .iter()
            .filter(|line| !["GET ", "HEAD ", "POST /service/token"].iter().any(|start| line.starts_with(start)))
            .collect();
        assert!(sends.iter().all(|line| line.contains("/team/app/blobs/uploads/")), "{profile:?}: {sends:?}");
        assert!(sends.iter().any(|line| line.starts_with("DELETE ")), "{profile:?}: {sends:?}");
        assert!(!sends.iter().any(|line| line.starts_with("PUT ") || line.starts_with("PATCH ")), "{sends:?}");
        assert_eq!(registry.leaks(), [""; 0], "{profile:?}");
    }
}

async fn digest(repository: &Repository, tag: &str) -> String {
    repository.manifest(&ManifestName::Tag(tag.to_owned())).await.unwrap().unwrap().digest.to_string()
}

/// Which index there is, before and after each way of publishing.
#[tokio::test(flavor = "multi_thread")]
async fn which_index_there_is() {
    let (registry, login) = (ProfiledRegistry::start(Profile::Ghcr).await, tempfile::tempdir().unwrap());
    let repository = registry.client(login.path()).repository("team/app");
    image().push(&repository, "v1").await;
    let name = format!("{}/team/app:v1", registry.address);
    let publish = |more: &[&str]| {
        let mut command = soci();
        command.args(["publish", "--min-layer-size", "1000", &name]).args(more);
        drop(stdout(command.env("DOCKER_CONFIG", login.path())));
    };
    publish(&[]);
    let found = findings(&[&name], login.path());
    assert_says(&found, "referrers", &["good: the registry has no API; the fallback tag is there"]);
    assert_says(&found, "index", &["good: 1 of version 1"]);
    assert!(!found.contains_key("push"), "it was not asked for");
    let before = digest(&repository, "v1").await;
    publish(&["--v2"]);
    assert_ne!(digest(&repository, "v1").await, before);
    assert_says(&findings(&[&name], login.path()), "index", &["good: the image names its index (version 2)"]);
}

/// Layers that cannot be indexed, and those that are indexed by default.
#[tokio::test(flavor = "multi_thread")]
async fn which_layers_are_indexed() {
    let (registry, login) = (ProfiledRegistry::start(Profile::Harbor211).await, tempfile::tempdir().unwrap());
    let repository = registry.client(login.path()).repository("team/app");
    let plain = tar(&[("data", text(7, 11 << 20))]);
    let small = tar(&[("small", text(8, 1000))]);
    let zstd = zstd::encode_all(&plain[..], 1).unwrap();
    let tar_type = "application/vnd.oci.image.layer.v1.tar";
    let large = (tar_type, plain.clone(), plain.clone());
    for (tag, layers, parts) in [
        ("good", vec![large.clone()], &["good: 1 of 1 are indexed"][..]),
        (
            "mixed",
            vec![large.clone(), (GZIP, gzip(&small, 6), small), (ZSTD, zstd.clone(), plain.clone())],
            &["note: 1 of 3 are indexed; 1 below 10", "1 cannot be", "zstd", "force-compression=true"],
        ),
        ("zstd", vec![(ZSTD, zstd, plain)], &["bad: 0 of 1 are indexed", "compression=gzip"]),
    ] {
        Image::new(layers).push(&repository, tag).await;
        let found = findings(&[&format!("{}/team/app:{tag}", registry.address)], login.path());
        assert_says(&found, "layers", parts);
    }
}

/// Logins that may not push, and registries that do not cancel.
#[tokio::test(flavor = "multi_thread")]
async fn who_may_push() {
    for (broken, parts) in [
        (
            Broken { method: "DELETE", path: "/uploads/", status: 405 },
            &["good: allowed", "will forget it (HTTP 405)"][..],
        ),
        (Broken { method: "POST", path: "/uploads/", status: 403 }, &["bad: ", "403", "right to push", "--to"]),
        (Broken { method: "POST", path: "/uploads/", status: 404 }, &["bad: ", "404"]),
    ] {
        let quirks = soci_tests::profile::Quirks { broken: Some(broken), ..Profile::Harbor211.quirks() };
        let (registry, login) = (ProfiledRegistry::with(quirks).await, tempfile::tempdir().unwrap());
        image().push(&registry.client(login.path()).repository("team/app"), "v1").await;
        registry.break_down();
        let found = findings(&[&format!("{}/team/app:v1", registry.address), "--push"], login.path());
        assert_says(&found, "push", parts);
    }
    let (registry, login) = (ProfiledRegistry::start(Profile::Quay).await, tempfile::tempdir().unwrap());
    image().push(&registry.client(login.path()).repository("team/app"), "v1").await;
    let name = format!("{}/team/app:v1", registry.address);
    let found = findings(&[&name, "--push", "--user", "robot:wrong"], login.path());
    assert_says(&found, "push", &["bad: ", "docker login 127.0.0.1:", "push access"]);

    let refused = run(soci().args(["doctor", "--push"]));
    assert_eq!(refused.status.code(), Some(2), "an image is needed");
    let layout = run(soci().args(["doctor", "--push", "oci:/"]));
    assert!(!layout.status.success());
}

/// A pipeline asks about an image: this machine, which is no node, is none of its business, unless it is asked for.
#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_judged_without_the_machine() {
    let (registry, login) = (ProfiledRegistry::start(Profile::Harbor211).await, tempfile::tempdir().unwrap());
    let repository = registry.client(login.path()).repository("team/app");
    let large = tar(&[("data", text(7, 11 << 20))]);
    let layers = vec![
        ("application/vnd.oci.image.layer.v1.tar", large.clone(), large),
        (GZIP, gzip(&tar(&[("small", text(8, 1000))]), 6), tar(&[("small", text(8, 1000))])),
    ];
    let image = Image::new(layers);
    image.push(&repository, "v1").await;
    let name = format!("{}/team/app:v1", registry.address);
    let doctor_of = |name: &str, arguments: &[&str]| {
        let root = tempfile::tempdir().unwrap();
        let mut command = soci();
        command.arg("--root").arg(root.path()).args(["doctor", name]).args(arguments);
        run(command.env("DOCKER_CONFIG", login.path()))
    };
    let doctor = |arguments: &[&str]| doctor_of(&name, arguments);
    let said = |output: &std::process::Output| String::from_utf8_lossy(&output.stdout).into_owned();
    let no_node = ["--containerd-config", "/no/such/file"];
    let without = doctor(&no_node);
    assert_eq!(without.status.code(), Some(1), "there is no index: {}", said(&without));
    drop(stdout(soci().args(["publish", &name]).env("DOCKER_CONFIG", login.path())));
    let with = doctor(&no_node);
    assert_eq!(with.status.code(), Some(0), "{}", said(&with));
    assert!(!said(&with).contains("/dev/fuse") && !said(&with).contains("kernel"), "{}", said(&with));
    assert!(said(&with).contains("1 of 2 are indexed; the others are read whole"), "{}", said(&with));
    // Of two indexes of an image the digest may decide; this one is alone.
    let all = format!("{}/team/all:v1", registry.address);
    image.push(&registry.client(login.path()).repository("team/all"), "v1").await;
    drop(stdout(soci().args(["publish", &all, "--min-layer-size", "0"]).env("DOCKER_CONFIG", login.path())));
    let with = doctor_of(&all, &no_node);
    assert!(said(&with).contains("2 of 2 are indexed"), "{}", said(&with));

    // With the option, and where containerd is configured for the snapshotter: a list without overlayfs breaks its
    // pulls.
    assert!(said(&doctor(&["--node", "--containerd-config", "/no/such/file"])).contains("/dev/fuse"));
    let (directory, file) = (tempfile::tempdir().unwrap(), "config.toml");
    let file = directory.path().join(file);
    let list = "[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\nsnapshotter = 'soci'\n";
    std::fs::write(&file, format!("version = 3\n[proxy_plugins.soci]\naddress = '/dev/null'\n{list}")).unwrap();
    let node = doctor(&["--containerd-config", file.to_str().unwrap()]);
    assert_eq!(node.status.code(), Some(1));
    let lines = ["WRONG unpacking", "no unpack platforms defined", "        snapshotter = \"overlayfs\""];
    let lines = lines.map(|line| line.replace("        snapshotter", "  snapshotter"));
    assert!(lines.iter().all(|line| said(&node).contains(line)), "{}", said(&node));
    assert!(said(&node).contains("        [proxy_plugins.soci.exports]"), "{}", said(&node));
}
