//! One image from all the places that `soci create` reads: registry, layout, archives, containerd.

use std::fs;
use std::path::Path;
use std::process::Command;
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
use soci_tests::{on_each_containerd, run, soci, soci_path, stdout};

on_each_containerd!(images_in_containerd, what_containerd_lacks);

fn image() -> Image {
    let base = tar(&[("bin/tool", text(1, 3_000_000)), ("etc/conf", text(2, 500))]);
    Image::gzip(vec![base, tar(&[("app/data", text(3, 900_000))]), tar(&[("tiny", text(5, 10))])])
}

/// The files of an OCI layout with one image, under a name.
fn layout_files(image: &Image, name: &str) -> Vec<(String, Vec<u8>)> {
    let index = json!({ "schemaVersion": 2, "manifests": [{
        "mediaType": media_type::MANIFEST,
        "digest": image.digest(),
        "size": image.manifest.len(),
        "annotations": { "io.containerd.image.name": name },
    }]});
    let blobs = image.blobs.iter().chain([&image.manifest]);
    let blob = |bytes: &bytes::Bytes| (format!("blobs/sha256/{}", Digest::of(bytes).hex()), bytes.to_vec());
    let mut files: Vec<(String, Vec<u8>)> = blobs.map(blob).collect();
    files.push(("index.json".to_owned(), index.to_string().into_bytes()));
    files.push(("oci-layout".to_owned(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec()));
    files
}

fn write_tar(path: &Path, files: &[(String, Vec<u8>)]) {
    let files: Vec<(&str, Vec<u8>)> = files.iter().map(|(name, bytes)| (name.as_str(), bytes.clone())).collect();
    fs::write(path, tar(&files)).unwrap();
}

fn write_directory(path: &Path, files: &[(String, Vec<u8>)]) {
    for (name, bytes) in files {
        let file = path.join(name);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, bytes).unwrap();
    }
}

/// `soci create` into an index store of its own.
fn create(root: &Path) -> Command {
    let mut command = soci();
    command.env_remove("CONTAINERD_ADDRESS").env_remove("CONTAINERD_NAMESPACE");
    command.arg("--root").arg(root).args(["create", "--min-layer-size", "1000", "--span-size", "262144"]);
    command
}

/// The same with global flags as nerdctl passes them.
fn create_in_containerd(node: &Node, root: &Path) -> Command {
    let mut command = soci();
    command.arg("--address").arg(node.path("containerd.sock")).args(["--namespace", "default"]);
    command.arg("--root").arg(root).args(["create", "--min-layer-size", "1000", "--span-size", "262144"]);
    command
}

/// What a failed command says, and its exit code.
fn failure(command: &mut Command) -> (i32, String) {
    let output = run(command);
    assert!(!output.status.success(), "{command:?} should fail");
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

fn document(output: &str) -> Value {
    serde_json::from_str(output).unwrap()
}

/// Layers are indexed in no fixed order of time, and printed in the image's.
#[tokio::test(flavor = "multi_thread")]
async fn one_image_in_many_places() {
    let registry = DemoRegistry::start(Duration::ZERO).await.unwrap();
    let (image, name) = (image(), format!("{}/team/app:v1", registry.host()));
    image.push(&client(&registry.host()).repository("team/app"), "v1").await;
    let place = tempfile::tempdir().unwrap();
    let at = |name: &str| place.path().join(name);
    let mut files = layout_files(&image, &name);
    write_directory(&at("layout"), &files);
    write_tar(&at("oci.tar"), &files);
    // What Docker goes by, beside a layout that says the same.
    let blob = |blob: &bytes::Bytes| format!("blobs/sha256/{}", Digest::of(blob).hex());
    let (config, layers) = image.blobs.split_last().unwrap();
    let layers: Vec<String> = layers.iter().map(blob).collect();
    let saved = json!([{ "Config": blob(config), "RepoTags": [name], "Layers": layers }]);
    files.push(("manifest.json".to_owned(), saved.to_string().into_bytes()));
    write_tar(&at("saved.tar"), &files);
    let expected = stdout(create(&at("r")).arg(&name));
    assert_eq!(expected.lines().count(), 3, "{expected}");
    let index = document(&stdout(create(&at("r")).args([&name, "--json"])))[0]["index"].clone();
    for (root, reference) in [
        ("a", format!("oci:{}", at("layout").display())),
        ("b", format!("oci-archive:{}:v1", at("oci.tar").display())),
        ("c", format!("docker-archive:{}:v1", at("saved.tar").display())),
    ] {
        let output = run(create(&at(root)).arg(&reference));
        assert_eq!(String::from_utf8_lossy(&output.stdout), expected, "{reference}");
        assert_eq!(String::from_utf8_lossy(&output.stderr), "", "its layers are those of the registry");
        assert_eq!(document(&stdout(create(&at(root)).args([&reference, "--json"])))[0]["index"], index);
    }
}

/// What `docker save` wrote before it wrote layouts.
#[test]
fn archives_without_a_manifest() {
    let place = tempfile::tempdir().unwrap();
    let at = |name: &str| place.path().join(name);
    let image = image();
    let layer = &image.tars[0];
    let config = String::from_utf8(image.blobs.last().unwrap().to_vec()).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    let diff_id = Digest::of(layer);
    config["rootfs"]["diff_ids"] = json!([diff_id, Digest::of(&image.tars[1]), diff_id]);
    let mut builder = tar::Builder::new(fs::File::create(at("saved.tar")).unwrap());
    let mut put = |name: &str, bytes: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        builder.append_data(&mut header, name, bytes).unwrap();
    };
    put("one/layer.tar", layer);
    put("two/layer.tar", &image.blobs[1]);
    put("config.json", config.to_string().as_bytes());
    let manifest = json!([{ "Config": "config.json", "RepoTags": ["app:v1"],
        "Layers": ["one/layer.tar", "two/layer.tar", "three/layer.tar"] }]);
    put("manifest.json", manifest.to_string().as_bytes());
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Symlink);
    header.set_size(0);
    builder.append_link(&mut header, "three/layer.tar", "../one/layer.tar").unwrap();
    builder.into_inner().unwrap();

    let reference = format!("docker-archive:{}", at("saved.tar").display());
    let output = run(create(&at("root")).arg(&reference));
    let (said, warned) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert!(output.status.success(), "{warned}");
    assert!(warned.contains("fit only the image pushed from this archive with the same bytes"), "{warned}");
    assert!(warned.contains("has no manifest of its own: sha256:"), "{warned}");
    // The zTOC of a layer is that of the file.
    fs::write(at("layer.tar"), layer).unwrap();
    let single = ["ztoc", "create", "--span-size", "262144", "-o"];
    let single = stdout(soci().args(single).arg(at("layer.ztoc")).arg(at("layer.tar")));
    assert_eq!(said.matches(single.trim()).count(), 2, "{said}{single}");

    let (code, said) = failure(create(&at("root")).arg(format!("{reference}:v2")));
    assert!(code == 1 && said.contains("holds no image v2 (there are app:v1)"), "{code} {said}");
    // What is not as the configuration says is no image.
    config["rootfs"]["diff_ids"][1] = json!(diff_id);
    let files = [
        ("one/layer.tar".to_owned(), layer.clone()),
        ("two/layer.tar".to_owned(), image.blobs[1].to_vec()),
        ("three/layer.tar".to_owned(), layer.clone()),
        ("config.json".to_owned(), config.to_string().into_bytes()),
        ("manifest.json".to_owned(), manifest.to_string().into_bytes()),
    ];
    write_tar(&at("forged.tar"), &files);
    let (code, said) = failure(create(&at("other")).arg(format!("docker-archive:{}", at("forged.tar").display())));
    assert!(code == 5 && said.contains("the image is damaged or forged"), "{code} {said}");
}

/// A layer that comes through a pipe gives the same zTOC as one in a file.
#[test]
fn layers_from_standard_input() {
    let place = tempfile::tempdir().unwrap();
    let at = |name: &str| place.path().join(name);
    let image = image();
    for (name, layer) in [("gzip", image.blobs[0].to_vec()), ("tar", image.tars[0].clone())] {
        fs::write(at(name), &layer).unwrap();
        let whole = stdout(soci().args(["ztoc", "create", "--json", "-o"]).arg(at("file")).arg(at(name)));
        let mut piped = soci();
        piped
            .args(["ztoc", "create", "--json", "-o"])
            .arg(at("pipe"))
            .arg("-")
            .stdin(fs::File::open(at(name)).unwrap());
        assert_eq!(stdout(&mut piped), whole, "{name}");
        assert_eq!(fs::read(at("file")).unwrap(), fs::read(at("pipe")).unwrap(), "{name}");
        // In and out by pipes, and not in pieces that fit: nothing but the zTOC comes out.
        let script = format!("cat {} | {} ztoc create -o - -", at(name).display(), soci_path().display());
        let output = run(Command::new("sh").args(["-c", &script]));
        assert!(output.status.success() && output.stdout == fs::read(at("file")).unwrap(), "{name}");
    }
    fs::write(at("cut"), &image.blobs[0][..50_000]).unwrap();
    let mut cut = soci();
    cut.args(["ztoc", "create", "-o"]).arg(at("none")).arg("-").stdin(fs::File::open(at("cut")).unwrap());
    let (code, said) = failure(&mut cut);
    assert!(code == 5 && !at("none").exists(), "{code} {said}");
}

/// What nerdctl does: the image is in containerd and in its registry; index it here, push the index there.
async fn images_in_containerd(version: Containerd) {
    let Some(node) = Node::start(version) else { return };
    let registry = DemoRegistry::start(Duration::ZERO).await.unwrap();
    let (image, name) = (image(), format!("{}/team/app:v1", registry.host()));
    let repository = client(&registry.host()).repository("team/app");
    image.push(&repository, "v1").await;
    write_tar(&node.path("image.tar"), &layout_files(&image, &name));
    let expected = stdout(create(&node.path("a")).arg(format!("oci-archive:{}", node.path("image.tar").display())));
    let index = stdout(soci().arg("--root").arg(node.path("a")).args(["index", "ls", "-q", "--span-indexes"]));
    drop(stdout(node.ctr().args(["images", "import", "--no-unpack"]).arg(node.path("image.tar"))));

    let before = registry.traffic().requests;
    assert_eq!(stdout(create_in_containerd(&node, &node.path("b")).args(["--all-platforms", &name])), expected);
    let named = ["--address", &node.path("containerd.sock").display().to_string(), "--root"];
    let mut explicit = soci();
    explicit.args(named).arg(node.path("c")).args(["create", "--min-layer-size", "1000", "--span-size", "262144"]);
    assert_eq!(stdout(explicit.arg(format!("containerd:{name}"))), expected);
    let mut by_environment = create(&node.path("d"));
    by_environment.env("CONTAINERD_ADDRESS", format!("unix://{}", node.path("containerd.sock").display()));
    assert_eq!(stdout(by_environment.arg(&name)), expected);
    assert_eq!(registry.traffic().requests, before, "the registry was not asked");
    for root in ["b", "c", "d"] {
        let list = |arguments: &[&str]| stdout(soci().arg("--root").arg(node.path(root)).args(arguments));
        assert_eq!(
            list(&["index", "ls", "-q", "--span-indexes", "--all-platforms", "--ref", &name]),
            index,
            "in {root}"
        );
    }

    let mut push = soci();
    push.args(named).arg(node.path("b")).args(["--namespace", "default", "push", "--all-platforms", "--skip-verify"]);
    let pushed = stdout(push.args(["--plain-http", "--hosts-dir", "/no/such/a,/no/such/b", &name]));
    assert_eq!(index.lines().count(), 2, "{index}");
    for index in index.lines() {
        assert!(pushed.contains(&format!("pushing soci index with digest: {index}")), "{pushed}");
        let there = repository.manifest(&ManifestName::Digest(index.parse().unwrap())).await.unwrap();
        assert!(there.is_some());
    }
}

/// Other platforms, other namespaces, layers that were provided lazily or collected: each says what to do.
async fn what_containerd_lacks(version: Containerd) {
    let Some(node) = Node::start(version) else { return };
    let registry = DemoRegistry::start(Duration::ZERO).await.unwrap();
    let (image, repository) = (image(), client(&registry.host()).repository("team/app"));
    image.push(&repository, "one").await;
    let other = Image::gzip(vec![tar(&[("other", text(9, 10))])]);
    other.push(&repository, "other").await;
    let absent = other.digest();
    let own = if cfg!(target_arch = "aarch64") { ["arm64", "amd64"] } else { ["amd64", "arm64"] };
    let entry = |digest: Digest, size: usize, architecture: &str| {
        json!({ "mediaType": media_type::MANIFEST, "digest": digest, "size": size,
            "platform": { "os": "linux", "architecture": architecture } })
    };
    let manifests = [entry(image.digest(), image.manifest.len(), own[0]), entry(absent, other.manifest.len(), own[1])];
    let index = json!({ "schemaVersion": 2, "mediaType": media_type::INDEX, "manifests": manifests }).to_string();
    repository.push_manifest(&ManifestName::Tag("v1".to_owned()), media_type::INDEX, index.into()).await.unwrap();
    let name = format!("{}/team/app:v1", registry.host());
    let socket = node.path("containerd.sock");
    let rpull = |snapshotter: &str| {
        let mut command = soci();
        command.arg("--address").arg(&socket).args(["rpull", "--snapshotter", snapshotter, &name]);
        drop(stdout(&mut command));
    };
    let create = || create_in_containerd(&node, &node.path("a"));

    let (code, said) = failure(create().arg(&name));
    assert!(code == 1 && said.contains("has no image") && said.contains("soci publish"), "{code} {said}");
    rpull("overlayfs");
    let (code, said) = failure(create().args(["--all-platforms", &name]));
    assert!(code == 1 && said.contains("not found") && said.contains(&absent.to_string()), "{code} {said}");
    let output = run(create().args(["--all-platforms", "--skip-missing-platforms", &name]));
    let (lines, warned) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && lines.lines().count() == 3, "{lines} {warned}");
    assert!(warned.contains("was not pulled") && warned.contains(own[1]), "{warned}");
    let (code, said) = failure(create().args(["--platform", &format!("linux/{}", own[1]), &name]));
    assert!(code == 1 && said.contains(&absent.to_string()) && said.contains("soci publish"), "{code} {said}");
    let mut elsewhere = soci();
    elsewhere.arg("--address").arg(&socket).args(["--namespace", "k8s.io", "create", &name]);
    let (code, said) = failure(elsewhere.arg("--root").arg(node.path("a")));
    assert!(code == 1 && said.contains("namespace k8s.io"), "{code} {said}");

    // One layer is collected.
    let layer = Digest::of(&image.blobs[1]);
    drop(stdout(node.ctr().args(["content", "rm", &layer.to_string()])));
    let (code, said) = failure(create().args(["--force", &name]));
    assert!(code == 1 && said.contains(&layer.to_string()) && said.contains("soci publish"), "{code} {said}");
    let (code, said) =
        failure(soci().args(["--address", "/no/such.sock", "create", &name, "--root"]).arg(node.path("a")));
    assert!(code == 7 && said.contains("/no/such.sock"), "{code} {said}");
    let (code, said) = failure(soci().args(["mount", "containerd:x", "/tmp"]));
    assert!(code == 2 && said.contains("does not read"), "{code} {said}");
}
