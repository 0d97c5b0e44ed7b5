//! `soci bench` against a real containerd and a real registry: what it measures, draws, and refuses to report.

use std::process::Command;

use serde_json::Value;
use soci_tests::containerd::Containerd;
use soci_tests::image::{Image, shell_layer, tar, text};
use soci_tests::node::Node;
use soci_tests::registry::{DockerRegistry, client};
use soci_tests::{run, soci, stdout};

const FILE_BYTES: usize = 6 << 20;

fn bench(node: &Node, image: &str, snapshotters: &str) -> Command {
    let mut command = soci();
    command.arg("--root").arg(node.path("soci")).arg("--address").arg(node.path("containerd.sock")).args([
        "bench",
        "--repeat",
        "1",
        "--min-layer-size",
        "1000000",
    ]);
    command.args(["--image", image, "--snapshotter", snapshotters, "--workload", "read=/bin/sh -c 'cat /etc/base'"]);
    command
}

async fn pushed(registry: &DockerRegistry, tag: &str, seed: u64) -> (String, u64) {
    let data = tar(&[("srv/data", text(seed, FILE_BYTES))]);
    let image = Image::gzip(vec![shell_layer(("/etc/base", "from below\n")), data]);
    image.push(&client(&registry.address).repository("team/app"), tag).await;
    let layers = image.blobs[..2].iter().map(|blob| blob.len() as u64).sum();
    (format!("{}/team/app:{tag}", registry.address), layers)
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

#[tokio::test(flavor = "multi_thread")]
async fn starts_are_measured_and_drawn() {
    let Some(registry) = DockerRegistry::start() else { return };
    let Some(node) = Node::start(Containerd::Installed) else { return };
    let (name, layers) = pushed(&registry, "v1", 7).await;
    drop(stdout(soci().args(["publish", &name, "--min-layer-size", "0", "--span-size", "262144"])));
    let (json, svg) = (node.path("starts.json"), node.path("starts.svg"));
    let mut command = bench(&node, &name, "overlayfs,soci");
    command
        .args(["--warm", "--sim-rtt", "4ms", "--sim-rate", "1gbit"])
        .arg("--json")
        .arg(&json)
        .arg("--picture")
        .arg(&svg);
    let table = stdout(&mut command);
    assert!(table.contains("SNAPSHOTTER") && table.contains("overlayfs") && table.contains("soci (warm)"), "{table}");

    let document: Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    assert_eq!(document["network"]["bitsPerSecond"], 1_000_000_000);
    let series = document["series"].as_array().unwrap();
    let kinds: Vec<_> = series.iter().map(|one| (one["snapshotter"].as_str().unwrap(), one["warm"] == true)).collect();
    assert_eq!(kinds, [("overlayfs", false), ("overlayfs", true), ("soci", false), ("soci", true)]);
    for one in series {
        assert_eq!((one["workload"].as_str(), one["samples"].as_array().map(Vec::len)), (Some("read"), Some(1)));
        let [create, run] = ["create", "run"].map(|phase| number(&one["seconds"][phase]["median"]));
        assert!(create > 0.0 && run > 0.0, "{one}");
        // Each of the two must have asked and been answered.
        assert_eq!(number(&one["seconds"]["pull"]["median"]) > 0.008, one["warm"] == false, "{one}");
    }
    let bytes: Vec<f64> = series.iter().map(|one| number(&one["bytes"]["median"])).collect();
    assert!(bytes[0] >= layers as f64, "overlayfs has all: {bytes:?} of {layers}");
    assert!(bytes[2] < layers as f64 * 0.75, "a part is enough: {bytes:?} of {layers}");
    assert!(bytes[1] < 1.0 && bytes[3] < 1.0, "nothing is fetched twice: {bytes:?}");
    // How long reads waited only ours says, and in the second start none did.
    let waits: Vec<&Value> = series.iter().map(|one| &one["samples"][0]["waits"]).collect();
    assert!(waits[0].is_null() && waits[1].is_null(), "{waits:?}");
    assert!(number(&waits[2]["reads"]) >= 1.0 && number(&waits[2]["seconds"]) > 0.004, "{waits:?}");
    assert!(number(&waits[3]["reads"]) < 1.0 && number(&waits[3]["seconds"]) <= 0.0, "{waits:?}");
    let picture = std::fs::read_to_string(svg).unwrap();
    assert!(picture.starts_with("<svg ") && picture.matches("<rect").count() == 1 + 3 + 4 * 3, "{picture}");
    // Nothing is left.
    assert_eq!(stdout(node.ctr().args(["images", "ls", "-q"])), "");
    assert_eq!((node.containers().len(), node.snapshots().len()), (0, 0));
}

/// A wrong name is said before anything is measured.
#[test]
fn pictures_are_svg() {
    let mut command = soci();
    command.args(["bench", "--image", "localhost:1/a", "--snapshotter", "soci", "--workload", "a=b"]);
    let output = run(command.args(["--picture", "starts.gif"]));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("starts.gif") && said.contains("pictures are SVG"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_fall_back_is_not_reported() {
    let Some(registry) = DockerRegistry::start() else { return };
    let Some(node) = Node::start(Containerd::Installed) else { return };
    let (plain, _) = pushed(&registry, "plain", 9).await;
    let refused = |snapshotter: &str, expected: &str| {
        let output = run(&mut bench(&node, &plain, snapshotter));
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && output.stdout.is_empty(), "{said}");
        assert!(said.contains(expected) && said.contains("sha256:"), "{said}");
    };
    // There is no index, so the snapshotter fetches the layer whole and says that it has it.
    refused("soci", "this is no lazy start");
    // And after that it is here.
    refused("soci", "this is no cold start");
    let output = run(&mut bench(&node, &plain, "nobody"));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("nobody") && said.contains("overlayfs"), "{said}");
}
