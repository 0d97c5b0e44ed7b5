//! `soci rpull` against real containerds: lazily, without an index, for another snapshotter, interrupted and repeated.

use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;
use soci_tests::containerd::Containerd;
use soci_tests::front::{Fault, Front};
use soci_tests::image::{Image, shell_layer, tar, text};
use soci_tests::node::Node;
use soci_tests::stage::Stage;
use soci_tests::urls::serve;
use soci_tests::{on_each_containerd, run, soci, stdout};

on_each_containerd!(
    layers_are_provided,
    other_snapshotters_are_filled,
    foreign_layers_come_from_their_urls,
    an_interrupted_pull_is_gone_on_with,
    a_second_repository_serves_when_the_first_is_gone,
);

const FILE_BYTES: usize = 3 << 20;

fn image() -> Image {
    let data = tar(&[("srv/data", text(7, FILE_BYTES))]);
    Image::gzip(vec![shell_layer(("/etc/base", "from below\n")), data, tar(&[("etc/top", b"from above\n".to_vec())])])
}

fn rpull(node: &Node) -> Command {
    let mut command = soci();
    command.arg("--address").arg(node.path("containerd.sock")).arg("rpull");
    command
}

/// How the layers of an image came.
fn came(output: &str) -> Vec<String> {
    let document: Value = serde_json::from_str(output).unwrap();
    let layers = document["layers"].as_array().unwrap();
    layers.iter().map(|layer| layer["came"].as_str().unwrap().to_owned()).collect()
}

async fn layers_are_provided(version: Containerd) {
    let Some(stage) = Stage::new().await else { return };
    let Some(node) = Node::start(version) else { return };
    let image = image();
    let bytes: u64 = image.blobs.iter().map(|blob| blob.len() as u64).sum();
    let name = stage.publish(&image, "v1", 1 << 20).await;
    let before = stage.registry.traffic().bytes_sent;
    assert_eq!(came(&stdout(rpull(&node).args(["--json", &name]))), ["provided"; 3]);
    let read = stage.registry.traffic().bytes_sent - before;
    assert!(read < bytes / 4, "{read} of {bytes} bytes were pulled");
    assert_eq!(
        node.run(&name, "one", "cat /etc/base /etc/top; wc -c < /srv/data"),
        format!("from below\nfrom above\n{FILE_BYTES}\n")
    );
    // containerd's clients see an image like any other.
    assert!(stdout(node.ctr().args(["images", "ls", "-q"])).lines().any(|line| line == name));
    assert_eq!(stdout(node.ctr().args(["leases", "ls", "-q"])), "");

    let again = stdout(rpull(&node).arg(&name));
    assert_eq!(again.matches("was here").count(), 3, "{again}");
    assert!(again.contains(&format!("ctr run --rm --snapshotter soci {name}")), "{again}");

    // What has no index comes whole, into the same store.
    let plain = Image::gzip(vec![image.tars[0].clone(), tar(&[("srv/other", text(9, FILE_BYTES))])]);
    let plain = stage.push(&plain, "plain").await;
    assert_eq!(came(&stdout(rpull(&node).args(["--json", &plain]))), ["already", "provided"]);
    assert_eq!(node.run(&plain, "two", "wc -c < /srv/other"), format!("{FILE_BYTES}\n"));
    node.remove_last_images(&[&name, &plain]);
}

/// What the registry lacks and the snapshotter leaves comes from its URLs, if that is allowed.
async fn foreign_layers_come_from_their_urls(version: Containerd) {
    let Some(stage) = Stage::new().await else { return };
    let Some(node) = Node::start(version) else { return };
    let mut image = image();
    let (url, asked) = serve(image.blobs[1].to_vec());
    let mut manifest: Value = serde_json::from_slice(&image.manifest).unwrap();
    manifest["layers"][1]["mediaType"] = "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip".into();
    manifest["layers"][1]["urls"] = serde_json::json!([format!("{url}/layer")]);
    image.manifest = manifest.to_string().into();
    let name = stage.push(&Image { blobs: lacking(&image), ..image.clone() }, "foreign").await;
    let pull = |more: &[&str]| run(rpull(&node).args(["--snapshotter", "overlayfs", "--json", &name]).args(more));
    let refused = pull(&[]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.status.code() == Some(5) && said.contains("--foreign-layers"), "{said}");
    assert_eq!(asked.lock().unwrap().len(), 0);
    let pulled = pull(&["--foreign-layers"]);
    assert!(pulled.status.success(), "{pulled:?}");
    // The first one is here already, unless containerd has collected what the pull that failed left behind.
    assert_eq!(came(&String::from_utf8(pulled.stdout).unwrap())[1..], ["fetched", "fetched"]);
    node.remove_last_images(&[&name]);
}

/// Its blobs without the second layer.
fn lacking(image: &Image) -> Vec<bytes::Bytes> {
    image.blobs.iter().enumerate().filter(|(place, _)| *place != 1).map(|(_, blob)| blob.clone()).collect()
}

async fn other_snapshotters_are_filled(version: Containerd) {
    let Some(stage) = Stage::new().await else { return };
    let Some(node) = Node::start(version) else { return };
    let name = stage.publish(&image(), "v1", 1 << 20).await;
    let pull = |name: &str| stdout(rpull(&node).args(["--snapshotter", "overlayfs", "--json", name]));
    assert_eq!(came(&pull(&name)), ["fetched"; 3]);
    assert_eq!(came(&pull(&name)), ["already"; 3]);
    let container = node.container("overlay");
    let script = ["/bin/sh", "-c", "cat /etc/base /etc/top; wc -c < /srv/data"];
    let ran = stdout(node.ctr().args(["run", "--rm", "--snapshotter", "overlayfs", &name, &container]).args(script));
    assert_eq!(ran, format!("from below\nfrom above\n{FILE_BYTES}\n"));

    let failed = |command: &mut Command, code: i32, expected: &str| {
        let output = run(command);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{said}");
        assert!(said.contains(expected), "{said}");
    };
    failed(rpull(&node).args(["--snapshotter", "nobody", &name]), 7, "soci doctor");
    failed(rpull(&node).arg(name.replace(":v1", ":v2")), 1, "v2");
    failed(rpull(&node).args(["--soci-index-digest", "x", &name]), 2, "--soci-index-digest");
    failed(rpull(&node).arg("oci:/tmp"), 2, "not in a registry");
    failed(soci().args(["--address", "/no/such.sock", "rpull", &name]), 7, "/no/such.sock");
}

async fn an_interrupted_pull_is_gone_on_with(version: Containerd) {
    let Some(stage) = Stage::new().await else { return };
    let Some(node) = Node::start(version) else { return };
    let front = Front::start(&stage.registry.host()).await.unwrap();
    let image = image();
    drop(stage.push(&image, "v1").await);
    let name = stage.name(&front.host(), "v1");
    front.set(Fault::Slow { late: Duration::from_millis(10), bytes_per_second: 400_000 });
    let mut command = rpull(&node);
    command.args(["--snapshotter", "overlayfs", &name]).stdin(Stdio::null()).stdout(Stdio::null());
    let mut child = command.spawn().unwrap();
    // Within the first layer, or the second.
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(child.try_wait().unwrap().is_none(), "it was too quick to be interrupted");
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!stdout(node.ctr().args(["images", "ls", "-q"])).contains(&name), "half an image has a name");
    front.set(Fault::None);
    let before = stage.registry.traffic().bytes_sent;
    drop(stdout(rpull(&node).args(["--snapshotter", "overlayfs", &name])));
    let read = stage.registry.traffic().bytes_sent - before;
    let bytes: u64 = image.blobs.iter().map(|blob| blob.len() as u64).sum();
    assert!(read + 200_000 < bytes, "{read} of {bytes} bytes were fetched again");
    let container = node.container("again");
    let script = ["/bin/sh", "-c", "cat /etc/top"];
    let ran = stdout(node.ctr().args(["run", "--rm", "--snapshotter", "overlayfs", &name, &container]).args(script));
    assert_eq!(ran, "from above\n");
}

/// The same digest from two registries: containerd has the snapshots and does not ask us about the second pull. When the
/// first registry goes, and its image is removed, the container reads on from the second, also after a restart.
async fn a_second_repository_serves_when_the_first_is_gone(version: Containerd) {
    let Some(stage) = Stage::new().await else { return };
    let Some(mut node) = Node::start(version) else { return };
    let address = format!("[content_store]\ncontainerd_address = {:?}\n", node.path("containerd.sock"));
    node.configure(&format!("[background_fetch]\ndisable = true\n{address}"));
    let (first, second) =
        (Front::start(&stage.registry.host()).await.unwrap(), Front::start(&stage.registry.host()).await.unwrap());
    drop(stage.publish(&image(), "v1", 1 << 20).await);
    let names = [&first, &second].map(|front| stage.name(&front.host(), "v1"));
    for name in &names {
        drop(stdout(rpull(&node).arg(name)));
    }
    node.start_container(&names[1], "reader");
    assert_eq!(node.read("reader", "/etc/top"), b"from above\n");
    first.set(Fault::Status(404, ""));
    drop(stdout(node.ctr().args(["images", "rm", "--sync", &names[0]])));
    node.assert_reads("reader", "/srv/data", &text(7, FILE_BYTES));
    let origins = node.status()["layers"].to_string();
    assert!(origins.contains(&second.host()), "{origins}");
    node.kill_worker();
    node.assert_reads("reader", "/etc/base", b"from below\n");
    node.stop_container("reader");
    node.remove_container("reader");
    node.remove_last_images(&[&names[1]]);
}
