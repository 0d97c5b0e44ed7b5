//! Images that a real containerd starts lazily: pulled as Kubernetes does it, run, compared, killed under, removed.

use std::process::Command;

use soci_tests::containerd::Containerd;
use soci_tests::image::{Image, shell_layer, tar, text};
use soci_tests::node::Node;
use soci_tests::stage::Stage;
use soci_tests::{on_each_containerd, stdout};

on_each_containerd!(containers_start_lazily_and_outlive_the_snapshotter, trees_are_those_of_overlayfs);

/// Files of the large layer, and bytes of each.
const FILES: u64 = 12;
const FILE_BYTES: usize = 1 << 20;
/// So that a file is a span or two.
const SPAN_BYTES: u32 = 1 << 20;

fn content(file: u64) -> Vec<u8> {
    text(file + 1, FILE_BYTES)
}

/// A shell, a large layer, and on top of it white-outs of a file and of a directory's content.
fn image() -> Image {
    let names: Vec<String> = (0..FILES).map(|file| format!("srv/data/{file}")).collect();
    let mut files: Vec<(&str, Vec<u8>)> = names.iter().zip(0..).map(|(name, file)| (&**name, content(file))).collect();
    files.push(("srv/old/hidden", b"hidden\n".to_vec()));
    let top = tar(&[
        ("etc/greeting", b"hello from above\n".to_vec()),
        ("etc/.wh.removed", Vec::new()),
        ("srv/old/.wh..wh..opq", Vec::new()),
        ("srv/old/new", b"new\n".to_vec()),
    ]);
    Image::gzip(vec![shell_layer(("/etc/removed", "never seen\n")), tar(&files), top])
}

/// All layers of the image have just been pulled lazily, at the cost of `pulled` bytes.
fn assert_lazy(node: &Node, image: &Image, pulled: u64) {
    let bytes: usize = image.blobs.iter().map(|blob| blob.len()).sum();
    assert!(pulled < bytes as u64 / 4, "{pulled} of {bytes} bytes were pulled");
    let prepared = node.log().lines().filter(|line| line.contains(r#""remote-snapshot-prepared":"true""#)).count();
    assert_eq!(prepared, 3, "{}", node.log());
}

/// What a new container of an image would see, as an archive, by the mounts that the snapshotter gives out.
fn archive(node: &Node, snapshotter: &str, image: &str) -> Vec<u8> {
    let (key, place) = (format!("compare-{snapshotter}"), node.path(&format!("compare-{snapshotter}")));
    std::fs::create_dir(&place).unwrap();
    let create = ["container", "create", "--snapshotter", snapshotter, image, &key, "/bin/sh"];
    drop(stdout(node.ctr().args(create)));
    let mount = stdout(node.ctr().args(["snapshots", "--snapshotter", snapshotter, "mounts"]).arg(&place).arg(&key));
    drop(stdout(Command::new("sh").args(["-c", &mount])));
    let script = "cd \"$0\" && exec tar --sort=name --pax-option=delete=atime,delete=ctime --xattrs --xattrs-include='*' --numeric-owner -cf - *";
    let output = Command::new("sh").args(["-c", script]).arg(&place).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    rustix::mount::unmount(&place, rustix::mount::UnmountFlags::empty()).unwrap();
    drop(stdout(node.ctr().args(["container", "rm", &key])));
    output.stdout
}

async fn containers_start_lazily_and_outlive_the_snapshotter(version: Containerd) {
    let Some(mut node) = Node::start(version) else { return };
    let Some(stage) = Stage::new().await else { return };
    let image = image();
    let name = stage.publish(&image, "v1", SPAN_BYTES).await;
    let pulled = stage.pull(&node, "soci", &name);
    assert_lazy(&node, &image, pulled);

    let script =
        "cat /etc/greeting /srv/old/*; ls /etc/removed 2>/dev/null; echo written > /srv/data/0; cat /srv/data/0";
    assert_eq!(node.run(&name, "one", script), "hello from above\nnew\nwritten\n");
    assert_eq!(node.run(&name, "two", "cat /srv/data/0").into_bytes(), content(0));

    // A container that runs reads on, file after file, while its server dies each time.
    node.start_container(&name, "long");
    for file in 1..5 {
        let before = node.status()["pid"].clone();
        node.kill_worker();
        node.assert_reads("long", &format!("/srv/data/{file}"), &content(file));
        assert_ne!(node.status()["pid"], before);
    }
    node.stop_container("long");
    node.remove_container("long");

    // All processes die, as in a power cut; then the registry is not needed for what is here.
    node.kill_snapshotter();
    node.start_snapshotter();
    node.wait_for_containerd();
    let before = stage.registry.traffic().requests;
    assert_eq!(node.run(&name, "three", "cat /srv/data/1").into_bytes(), content(1));
    assert_eq!(stage.registry.traffic().requests, before);
    node.remove_last_images(&[&name]);
}

/// containerd pulls by itself, as its client and Kubernetes ask it to since 2.1: its configuration has it pass
/// annotations on.
#[tokio::test(flavor = "multi_thread")]
async fn the_transfer_service_pulls_lazily() {
    let Some(node) = Node::start(Containerd::V2) else { return };
    let Some(stage) = Stage::new().await else { return };
    let image = image();
    let name = stage.publish(&image, "v1", SPAN_BYTES).await;
    let before = stage.registry.traffic().bytes_sent;
    drop(stdout(node.ctr().args(["images", "pull", "--plain-http", "--snapshotter", "soci", &name])));
    assert_lazy(&node, &image, stage.registry.traffic().bytes_sent - before);
    assert_eq!(node.run(&name, "one", "cat /srv/data/7").into_bytes(), content(7));
    // Local pulls by the same client come without annotations.
    node.remove_last_images(&[&name]);
    drop(stdout(node.ctr().args(["images", "pull", "--local", "--plain-http", "--snapshotter", "soci", &name])));
    assert_eq!(node.entries("layers").len(), 0);
    assert_eq!(node.run(&name, "two", "cat /srv/data/7").into_bytes(), content(7));
}

/// Layers without an index come whole and in parallel; what containers see is what overlayfs shows.
async fn trees_are_those_of_overlayfs(version: Containerd) {
    let Some(stage) = Stage::new().await else { return };
    let image = image();
    let (plain, indexed) = (stage.push(&image, "plain").await, "indexed");
    for with_index in [false, true] {
        let Some(node) = Node::start(version) else { return };
        let name = if with_index { stage.publish(&image, indexed, SPAN_BYTES).await } else { plain.clone() };
        for snapshotter in ["soci", "overlayfs"] {
            assert!(stage.pull(&node, snapshotter, &name) > 0);
        }
        let (ours, theirs) = (archive(&node, "soci", &name), archive(&node, "overlayfs", &name));
        assert!(ours.len() > FILE_BYTES);
        if ours != theirs {
            let listing = |bytes: &[u8]| -> Vec<String> {
                let mut archive = tar::Archive::new(bytes);
                let entries = archive.entries().unwrap().map(|entry| {
                    let entry = entry.unwrap();
                    let header = entry.header();
                    format!("{:?} {header:?}", entry.path().unwrap())
                });
                entries.collect()
            };
            let at = ours.iter().zip(&theirs).position(|(ours, theirs)| ours != theirs).unwrap_or_default();
            let around = |bytes: &[u8]| {
                String::from_utf8_lossy(&bytes[at.saturating_sub(200)..bytes.len().min(at + 200)]).into_owned()
            };
            let (at_ours, at_theirs) = (around(&ours), around(&theirs));
            let (ours, theirs) = (listing(&ours), listing(&theirs));
            let odd = ours.iter().zip(&theirs).find(|(ours, theirs)| ours != theirs);
            panic!(
                "with_index {with_index}: {} and {} entries; first difference: {odd:?}, at {at}:\n{at_ours:?}\n{at_theirs:?}",
                ours.len(),
                theirs.len()
            );
        }
    }
}
