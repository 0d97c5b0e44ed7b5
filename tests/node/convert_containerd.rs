//! `soci convert` within containerd, into it and out of it, as nerdctl calls it; and what containerd's garbage collector
//! leaves of the result.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use soci_cli::demo::registry::DemoRegistry;
use soci_index::format::digest::Digest;
use soci_index::format::model::media_type;
use soci_index::format::reference::ManifestName;
use soci_tests::containerd::Containerd;
use soci_tests::image::{Image, tar, text};
use soci_tests::node::Node;
use soci_tests::registry::client;
use soci_tests::{on_each_containerd, run, soci, stdout};

on_each_containerd!(
    golden_images,
    plain_names,
    the_collector_keeps_what_the_image_needs,
    platforms_that_were_not_pulled,
    what_is_missing,
    killed_and_repeated,
);

const BUILDING: [&str; 4] = ["--min-layer-size", "1000", "--span-size", "262144"];

fn image() -> Image {
    let base = tar(&[("bin/tool", text(1, 3_000_000)), ("etc/conf", text(2, 500))]);
    Image::gzip(vec![base, tar(&[("app/data", text(3, 900_000))]), tar(&[("tiny", text(5, 10))])])
}

/// With the global flags that nerdctl passes.
fn in_containerd(node: &Node, command: &str) -> Command {
    let mut soci = soci();
    soci.arg("--address").arg(node.path("containerd.sock")).args(["--namespace", "default", command]);
    soci
}

fn convert(node: &Node, source: &str, destination: &str) -> Command {
    let mut command = in_containerd(node, "convert");
    command.args(["--all-platforms"]).args(BUILDING).args([source, destination]);
    command
}

fn document(mut command: Command) -> Value {
    serde_json::from_str(&stdout(command.arg("--json"))).unwrap()
}

/// What a failed command says, and its exit code.
fn failure(command: &mut Command) -> (i32, String) {
    let output = run(command);
    assert!(!output.status.success(), "{command:?} should fail");
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

/// Imports an OCI layout whose index.json has one entry, under a name.
fn import(node: &Node, layout: &Path, name: &str) {
    let read = |path: PathBuf| std::fs::read(path).unwrap();
    let mut index: Value = serde_json::from_slice(&read(layout.join("index.json"))).unwrap();
    index["manifests"][0]["annotations"] = json!({ "io.containerd.image.name": name });
    let mut files = vec![("index.json".to_owned(), index.to_string().into_bytes())];
    files.push(("oci-layout".to_owned(), read(layout.join("oci-layout"))));
    for blob in std::fs::read_dir(layout.join("blobs/sha256")).unwrap().map(|blob| blob.unwrap().path()) {
        files.push((format!("blobs/sha256/{}", blob.file_name().unwrap().to_str().unwrap()), read(blob)));
    }
    let files: Vec<(&str, Vec<u8>)> = files.iter().map(|(name, bytes)| (name.as_str(), bytes.clone())).collect();
    std::fs::write(node.path("image.tar"), tar(&files)).unwrap();
    let arguments = ["images", "import", "--no-unpack", "--all-platforms"];
    drop(stdout(node.ctr().args(arguments).arg(node.path("image.tar"))));
}

/// What containerd has, each with its labels.
fn content(node: &Node) -> BTreeMap<String, String> {
    let list = stdout(node.ctr().args(["content", "ls"]));
    let one = |line: &str| {
        let mut words = line.split_whitespace();
        (words.next().unwrap().to_owned(), words.last().unwrap_or_default().to_owned())
    };
    list.lines().skip(1).map(one).collect()
}

fn blob(node: &Node, digest: &str) -> Vec<u8> {
    let output = run(node.ctr().args(["content", "get", digest]));
    assert!(output.status.success(), "{digest}: {}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(Digest::of(&output.stdout).to_string(), digest);
    output.stdout
}

/// What a name means.
fn target(node: &Node, name: &str) -> Option<String> {
    let list = stdout(node.ctr().args(["images", "ls"]));
    let line = list.lines().find(|line| line.split_whitespace().next() == Some(name))?;
    line.split_whitespace().nth(2).map(str::to_owned)
}

/// All that an image consists of, read whole.
fn walk(node: &Node, root: &str) -> BTreeSet<String> {
    let (mut open, mut seen) = (vec![(root.to_owned(), true)], BTreeSet::new());
    while let Some((digest, is_document)) = open.pop() {
        let bytes = blob(node, &digest);
        seen.insert(digest);
        if !is_document {
            continue;
        }
        let document: Value = serde_json::from_slice(&bytes).unwrap();
        let entry = |entry: &Value| entry["digest"].as_str().unwrap().to_owned();
        let list = |key: &str| document[key].as_array().cloned().unwrap_or_default();
        open.extend(list("manifests").iter().map(|manifest| (entry(manifest), true)));
        open.extend(list("layers").iter().map(|layer| (entry(layer), false)));
        open.extend(document.get("config").map(|config| (entry(config), false)));
    }
    seen
}

/// Every golden image, from containerd to containerd: the documents that AWS's tool makes.
async fn golden_images(version: Containerd) {
    let Some(node) = Node::start(version) else { return };
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/images");
    let mut compared = 0;
    for case in std::fs::read_dir(golden).unwrap().map(|entry| entry.unwrap().path()).filter(|case| case.is_dir()) {
        let readme = std::fs::read_to_string(case.join("README.md")).unwrap();
        let line = readme.split("## v2\n").nth(1).unwrap().split('`').nth(1).unwrap();
        let options: Vec<&str> = line.split(' ').skip(2).take_while(|word| *word != "SRC").collect();
        let (source, made) = (format!("h.example/case{compared}:v1"), format!("h.example/case{compared}:soci"));
        import(&node, &case.join("layout"), &source);
        drop(stdout(in_containerd(&node, "convert").args(&options).args([&source, &made])));
        let has = walk(&node, &target(&node, &made).unwrap());
        for file in std::fs::read_dir(case.join("v2")).unwrap().map(|file| file.unwrap().path()) {
            let digest = Digest::of(&std::fs::read(&file).unwrap()).to_string();
            assert!(has.contains(&digest), "{} is not there", file.display());
        }
        // And those of a layout.
        let out = node.path(&format!("out{compared}"));
        let line = ["convert", "--standalone", "--format", "oci-dir"];
        drop(stdout(soci().args(line).args(&options).arg(case.join("layout")).arg(&out)));
        let index: Value = serde_json::from_slice(&std::fs::read(out.join("index.json")).unwrap()).unwrap();
        assert_eq!(index["manifests"][0]["digest"].as_str(), target(&node, &made).as_deref());
        compared += 1;
    }
    assert!(compared >= 4, "{compared}");
}

/// What AWS's users type: no address, no namespace. The image is converted where it is; names that say so, and options that
/// only registries know, mean a registry.
async fn plain_names(version: Containerd) {
    let Some(node) = Node::start(version) else { return };
    let registry = DemoRegistry::start(Duration::ZERO).await.unwrap();
    let name = |tag: &str| format!("{}/team/app:{tag}", registry.host());
    let repository = client(&registry.host()).repository("team/app");
    image().push(&repository, "v1").await;
    // The machine's containerd is at the usual place, for one command.
    let usual = |arguments: &[&str]| {
        let script =
            "mount -t tmpfs tmpfs /run && mkdir /run/containerd && mount --bind \"$0\" /run/containerd && exec \"$@\"";
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", script]).arg(node.path("")).arg(soci_tests::soci_path());
        command.env_remove("CONTAINERD_ADDRESS").env_remove("CONTAINERD_NAMESPACE");
        let output = run(command.arg("convert").args(BUILDING).args(arguments));
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{said}");
        said
    };
    let in_registry = async |tag: &str| {
        let name = ManifestName::Tag(tag.to_owned());
        repository.manifest(&name).await.unwrap().map(|manifest| manifest.digest.to_string())
    };
    // containerd does not have it yet.
    let said = usual(&[&name("v1"), &name("first")]);
    assert!(!said.contains("containerd"), "{said}");
    let expected = in_registry("first").await.unwrap();
    drop(stdout(in_containerd(&node, "rpull").args(["--snapshotter", "overlayfs", &name("v1")])));

    let said = usual(&[&name("v1"), &name("second")]);
    assert_eq!(target(&node, &name("second")), Some(expected.clone()), "{said}");
    assert_eq!(in_registry("second").await, None);
    assert!(
        said.contains("is in this machine's containerd") && said.contains(&format!("docker://{}", name("v1"))),
        "{said}"
    );
    for (tag, arguments) in [
        ("third", vec![format!("docker://{}", name("v1")), format!("docker://{}", name("third"))]),
        ("fourth", vec![name("v1"), format!("docker://{}", name("fourth"))]),
        ("fifth", vec!["--replace-signed".to_owned(), name("v1"), name("fifth")]),
    ] {
        let said = usual(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!(in_registry(tag).await, Some(expected.clone()), "{said}");
        assert_eq!(target(&node, &name(tag)), None);
    }
}

/// The labels that containerd needs, and what is left when one image after the other is removed.
async fn the_collector_keeps_what_the_image_needs(version: Containerd) {
    let Some(node) = Node::start(version) else { return };
    let registry = DemoRegistry::start(Duration::ZERO).await.unwrap();
    let name = |tag: &str| format!("{}/team/app:{tag}", registry.host());
    let repository = client(&registry.host()).repository("team/app");
    image().push(&repository, "v1").await;
    let layout = format!("oci:{}", node.path("layout").display());
    drop(stdout(soci().args(["convert", &name("v1"), &format!("{layout}:x")]).args(BUILDING)));
    let rpull = ["--snapshotter", "overlayfs", &name("v1")];
    drop(stdout(in_containerd(&node, "rpull").args(rpull)));

    let lines = stdout(&mut convert(&node, &name("v1"), &name("soci")));
    assert_eq!(lines.lines().filter(|line| line.contains(" -> ztoc ")).count(), 2, "{lines}");
    let root = target(&node, &name("soci")).unwrap();
    let index: Value = serde_json::from_slice(&std::fs::read(node.path("layout/index.json")).unwrap()).unwrap();
    assert_eq!(index["manifests"][0]["digest"], root.as_str(), "the image made in a layout");
    assert_eq!(stdout(node.ctr().args(["leases", "ls", "-q"])), "");
    let needed = walk(&node, &root);
    let labels = content(&node);
    let index: Value = serde_json::from_slice(&blob(&node, &root)).unwrap();
    let entry = |number: usize| index["manifests"][number]["digest"].as_str().unwrap();
    let label = |part: &str, digest: &str| format!("containerd.io/gc.ref.content.{part}={digest}");
    for (number, part) in [(0, "l.2="), (1, "ztoc.1=")] {
        assert!(labels[&root].contains(&label(&format!("m.{number}"), entry(number))), "{labels:?}");
        assert!(labels[entry(number)].contains(&format!("containerd.io/gc.ref.content.{part}")), "{labels:?}");
        assert!(labels[entry(number)].contains("containerd.io/gc.ref.content.config="), "{labels:?}");
    }

    // The same again, from itself and over itself; what was lost is put again.
    for source in ["v1", "soci"] {
        let again = document(convert(&node, &name(source), &name("soci")));
        assert_eq!((&again["status"], &again["digest"]), (&json!("up to date"), &json!(root)), "{again}");
    }
    let ztoc = serde_json::from_slice::<Value>(&blob(&node, entry(1))).unwrap()["layers"][0]["digest"].clone();
    drop(stdout(node.ctr().args(["content", "rm", ztoc.as_str().unwrap()])));
    document(convert(&node, &name("v1"), &name("soci")));
    assert_eq!(walk(&node, &root), needed);

    drop(stdout(node.ctr().args(["images", "rm", "--sync", &name("v1")])));
    assert_eq!(walk(&node, &root), needed, "without the image it was made of");
    let left: BTreeSet<String> = content(&node).into_keys().collect();
    assert_eq!(left, needed, "exactly what the image needs is kept");

    // To the registry, by this program and as nerdctl does it.
    let copied = document({
        let mut command = soci();
        command.arg("--address").arg(node.path("containerd.sock"));
        command.args(["publish", "--v2", "--as", &name("published")]).args(BUILDING);
        command.arg(format!("containerd:{}", name("soci")));
        command
    });
    assert_eq!(copied["digest"], root.as_str(), "{copied}");
    let pushed = ["images", "push", "--plain-http", &name("pushed"), &name("soci")];
    drop(stdout(node.ctr().args(pushed)));
    for tag in ["published", "pushed"] {
        let there = repository.manifest(&ManifestName::Tag(tag.to_owned())).await.unwrap().unwrap();
        assert_eq!(there.digest.to_string(), root, "{tag}");
    }

    drop(stdout(node.ctr().args(["images", "rm", "--sync", &name("soci")])));
    assert_eq!(content(&node), BTreeMap::new(), "everything goes with the image");
}

/// Pushes an image for this machine and another one; gives their digests.
async fn two_platforms(registry: &DemoRegistry) -> [Digest; 2] {
    let repository = client(&registry.host()).repository("team/app");
    let (image, other) = (image(), Image::gzip(vec![tar(&[("other", text(9, 2_000_000))])]));
    image.push(&repository, "one").await;
    other.push(&repository, "other").await;
    let entry = |image: &Image, architecture: &str| {
        json!({ "mediaType": media_type::MANIFEST, "digest": image.digest(), "size": image.manifest.len(),
            "platform": { "os": "linux", "architecture": architecture } })
    };
    let [own, foreign] = platforms();
    let manifests = [entry(&image, own), entry(&other, foreign)];
    let index = json!({ "schemaVersion": 2, "mediaType": media_type::INDEX, "manifests": manifests }).to_string();
    repository.push_manifest(&ManifestName::Tag("v1".to_owned()), media_type::INDEX, index.into()).await.unwrap();
    [image.digest(), other.digest()]
}

const fn platforms() -> [&'static str; 2] {
    if cfg!(target_arch = "aarch64") { ["arm64", "amd64"] } else { ["amd64", "arm64"] }
}

/// As with AWS's tool they are an error, unless they may be left out: their entries stay, and a later pull makes the image
/// complete.
async fn platforms_that_were_not_pulled(version: Containerd) {
    let Some(node) = Node::start(version) else { return };
    let registry = DemoRegistry::start(Duration::ZERO).await.unwrap();
    let [_, absent] = two_platforms(&registry).await;
    let name = |tag: &str| format!("{}/team/app:{tag}", registry.host());
    drop(stdout(in_containerd(&node, "rpull").args(["--snapshotter", "overlayfs", &name("v1")])));
    let (code, said) = failure(&mut convert(&node, &name("v1"), &name("soci")));
    assert!(code == 1 && said.contains("not found") && said.contains("--skip-missing-platforms"), "{code} {said}");
    assert_eq!(target(&node, &name("soci")), None);
    let made = document({
        let mut command = convert(&node, &name("v1"), &name("soci"));
        command.arg("--skip-missing-platforms");
        command
    });
    assert_eq!(made["images"].as_array().unwrap().len(), 1, "{made}");
    let root = target(&node, &name("soci")).unwrap();
    let index: Value = serde_json::from_slice(&blob(&node, &root)).unwrap();
    let entries = index["manifests"].as_array().unwrap();
    assert_eq!(entries.len(), 3, "{index}");
    assert_eq!(entries[1]["digest"], absent.to_string(), "{index}");
    let labels = content(&node);
    assert!(labels[&root].contains("content.m.0=") && labels[&root].contains("content.m.2="), "{labels:?}");
    assert!(!labels[&root].contains(&absent.to_string()), "{labels:?}");
    drop(stdout(node.ctr().args(["images", "rm", "--sync", &name("v1")])));
    for kept in [0, 2] {
        walk(&node, entries[kept]["digest"].as_str().unwrap());
    }

    // A registry takes only what is whole.
    let mut out = in_containerd(&node, "publish");
    out.args(["--v2", "--as", &name("out")]).args(BUILDING).arg(format!("containerd:{}", name("soci")));
    let out = document(out);
    let repository = client(&registry.host()).repository("team/app");
    let there = repository.manifest(&ManifestName::Tag("out".to_owned())).await.unwrap().unwrap();
    assert_eq!(there.digest.to_string(), out["digest"].as_str().unwrap());
    assert!(!String::from_utf8_lossy(&there.bytes).contains(&absent.to_string()));

    let other = format!("linux/{}", platforms()[1]);
    let mut command = in_containerd(&node, "convert");
    let (code, said) = failure(command.args(["--platform", &other, &name("soci"), &name("again")]));
    assert!(code == 1 && said.contains(&absent.to_string()), "{code} {said}");
    assert_eq!(target(&node, &name("again")), None);
}

/// What is not there, and names that cannot be given.
async fn what_is_missing(version: Containerd) {
    let Some(node) = Node::start(version) else { return };
    let registry = DemoRegistry::start(Duration::ZERO).await.unwrap();
    let (image, repository) = (image(), client(&registry.host()).repository("team/app"));
    image.push(&repository, "v1").await;
    let name = |tag: &str| format!("{}/team/app:{tag}", registry.host());
    let (code, said) = failure(&mut convert(&node, &name("v1"), &name("soci")));
    assert!(code == 1 && said.contains("has no image"), "{code} {said}");
    drop(stdout(in_containerd(&node, "rpull").args(["--snapshotter", "overlayfs", &name("v1")])));
    let digest = Digest::of(b"x");
    for (destination, expected) in [
        (format!("{}/team/app@{digest}", registry.host()), "must not contain a digest"),
        ("UPPER".to_owned(), "must be a tagged ref"),
    ] {
        let (code, said) = failure(&mut convert(&node, &name("v1"), &destination));
        assert!(code == 2 && said.contains(expected), "{code} {said}");
    }
    let mut publish = in_containerd(&node, "publish");
    publish.args(["--v2", "--as", "containerd:x"]).args(BUILDING).arg(name("v1"));
    let (code, said) = failure(&mut publish);
    assert!(code == 2 && said.contains("`soci convert` does"), "{code} {said}");
    drop(stdout(soci().args(["convert", &name("v1"), &format!("oci:{}", node.path("l").display())]).args(BUILDING)));
    let from = format!("oci:{}", node.path("l").display());
    let (code, said) = failure(soci().args(["--address", "/no/such.sock", "convert", &from, "x:y"]).args(BUILDING));
    assert!(code == 7 && said.contains("containerd:docker.io/library/x:y") && said.contains("/no/such.sock"), "{said}");

    // With and without zTOCs that are there already, no image comes about that lacks a layer.
    document(convert(&node, &name("v1"), &name("soci")));
    for layer in [&image.blobs[2], &image.blobs[1]] {
        let layer = Digest::of(layer);
        drop(stdout(node.ctr().args(["content", "rm", &layer.to_string()])));
        for source in ["v1", "soci"] {
            let (code, said) = failure(&mut convert(&node, &name(source), &name("other")));
            assert!(code == 1 && said.contains(&layer.to_string()) && said.contains("does not have"), "{code} {said}");
        }
    }
    assert_eq!(target(&node, &name("other")), None);
    assert_eq!(stdout(node.ctr().args(["leases", "ls", "-q"])), "", "a failed run leaves no lease");
}

/// Killed at any time: the name means nothing or the whole image, and what is left is not kept for ever.
async fn killed_and_repeated(version: Containerd) {
    let Some(node) = Node::start(version) else { return };
    let registry = DemoRegistry::start(Duration::ZERO).await.unwrap();
    two_platforms(&registry).await;
    let layout = format!("oci:{}", node.path("layout").display());
    let whole = ["convert", "--all-platforms", &format!("{}/team/app:v1", registry.host()), &layout];
    let whole = document({
        let mut command = soci();
        command.args(whole).args(BUILDING);
        command
    });
    // A little later each time, until one comes to its end.
    for time in (20..10_000).step_by(20).map(Duration::from_millis) {
        let mut command = convert(&node, &layout, "h.example/app:v1");
        let mut child = command.args(["--force"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        tokio::time::sleep(time).await;
        let ended = child.try_wait().unwrap().is_some();
        child.kill().unwrap();
        child.wait().unwrap();
        if let Some(root) = target(&node, "h.example/app:v1") {
            assert_eq!(root, whole["digest"].as_str().unwrap());
            walk(&node, &root);
            drop(stdout(node.ctr().args(["images", "rm", "--sync", "h.example/app:v1"])));
        }
        if ended {
            break;
        }
    }
    let leases = stdout(node.ctr().args(["leases", "ls"]));
    assert!(leases.lines().count() > 1, "no run was killed while it was writing: {leases}");
    assert!(leases.lines().skip(1).all(|lease| lease.contains("containerd.io/gc.expire=")), "{leases}");
    let last = document(convert(&node, &layout, "h.example/app:v1"));
    assert_eq!(last["digest"], whole["digest"]);
    let needed = walk(&node, last["digest"].as_str().unwrap());
    for lease in stdout(node.ctr().args(["leases", "ls", "-q"])).lines() {
        drop(stdout(node.ctr().args(["leases", "rm", "--sync", lease])));
    }
    assert_eq!(content(&node).into_keys().collect::<BTreeSet<_>>(), needed);
}
