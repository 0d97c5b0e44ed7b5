//! Containers of a real containerd on the snapshotter.

use std::fs;
use std::path::Path;

use serde_json::json;
use soci_tests::containerd::Containerd;
use soci_tests::image::{Image, shell_layer, tar};
use soci_tests::node::Node;
use soci_tests::{on_each_containerd, stdout};

on_each_containerd!(containers_live_on_the_snapshotter);

const IMAGE: &str = "test.local/greeting:latest";

/// An image of this machine's shell, and on top of it a file and the removal of one.
fn image(path: &Path) {
    let top = tar(&[("etc/greeting", b"hello from above\n".to_vec()), ("etc/.wh.removed", Vec::new())]);
    let image = Image::gzip(vec![shell_layer(("/etc/removed", "never seen\n")), top]);
    let index = json!({ "schemaVersion": 2, "manifests": [{
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "digest": image.digest(),
        "size": image.manifest.len(),
        "annotations": { "io.containerd.image.name": IMAGE },
    }]});
    let mut files = vec![
        ("oci-layout".to_owned(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec()),
        ("index.json".to_owned(), index.to_string().into_bytes()),
    ];
    for blob in image.blobs.iter().chain([&image.manifest]) {
        files.push((format!("blobs/sha256/{}", soci_index::format::digest::Digest::of(blob).hex()), blob.to_vec()));
    }
    let files: Vec<(&str, Vec<u8>)> = files.iter().map(|(name, bytes)| (name.as_str(), bytes.clone())).collect();
    fs::write(path, tar(&files)).unwrap();
}

async fn containers_live_on_the_snapshotter(version: Containerd) {
    let Some(mut node) = Node::start(version) else { return };
    let archive = node.path("image.tar");
    image(&archive);
    let _ = stdout(node.ctr().args(["images", "import", "--snapshotter", "soci"]).arg(&archive));
    assert_eq!(node.snapshots().len(), 2);
    assert_eq!(node.entries("snapshotter/snapshots").len(), 2);

    let script = "cat /etc/greeting; ls /etc/removed 2>/dev/null; echo written > /new; cat /new";
    assert_eq!(node.run(IMAGE, "one", script), "hello from above\nwritten\n");
    assert_eq!(node.run(IMAGE, "two", "ls /new 2>/dev/null || echo clean"), "clean\n");

    // A daemon that was killed is no more than a pause.
    node.kill_snapshotter();
    node.start_snapshotter();
    node.wait_for_containerd();
    assert_eq!(node.snapshots().len(), 2);
    assert_eq!(node.run(IMAGE, "three", "cat /etc/greeting"), "hello from above\n");

    node.remove_last_images(&[IMAGE]);
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let left = node.path("soci/snapshotter").display().to_string();
    assert!(!mounts.contains(&left), "{mounts}");
}
