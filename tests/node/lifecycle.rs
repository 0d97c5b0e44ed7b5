//! What happens to images and containers on a machine: several at a time, written to, committed, sharing layers, going
//! away; and a reboot under them. Layers are lazy all the while: a [`Front`] records the requests to the registry.

use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::process::{Child, Command, Stdio};

use flate2::read::MultiGzDecoder;
use rustix::mount::{UnmountFlags, unmount};
use soci_index::format::digest::Digest;
use soci_tests::containerd::Containerd;
use soci_tests::front::Front;
use soci_tests::image::{GZIP, Image, shell_layer, tar, text};
use soci_tests::node::Node;
use soci_tests::stage::Stage;
use soci_tests::{on_each_containerd, run, soci, stdout};

on_each_containerd!(
    containers_share_an_image_and_are_committed,
    images_share_layers,
    a_container_s_start_becomes_a_profile,
    a_reboot_costs_what_the_disk_has_lost,
    seventy_layers_with_long_names,
);

/// Files of the large layer, and bytes of each.
const FILES: u64 = 6;
const FILE_BYTES: usize = 1 << 20;
const SPAN_BYTES: u32 = 256 << 10;

fn content(file: u64) -> Vec<u8> {
    text(file + 1, FILE_BYTES)
}

fn path(file: u64) -> String {
    format!("/srv/data/{file}")
}

/// The layer with the files.
fn data_layer() -> Vec<u8> {
    let files: Vec<String> = (0..FILES).map(|file| path(file)[1..].to_owned()).collect();
    tar(&files.iter().zip(0..).map(|(name, file)| (&**name, content(file))).collect::<Vec<_>>())
}

fn image() -> Image {
    Image::gzip(vec![shell_layer(("/etc/base", "")), data_layer()])
}

/// A machine and the registry that it sees.
struct Scene {
    node: Node,
    front: Front,
    stage: Stage,
}

impl Scene {
    async fn new(version: Containerd) -> Option<Self> {
        let stage = Stage::new().await?;
        let node = Node::start(version)?;
        let front = Front::start(&stage.registry.host()).await.unwrap();
        Some(Self { node, front, stage })
    }

    /// Publishes an image with an index and pulls it; no layer is read by this. Gives its name and what it cost.
    async fn pull(&self, image: &Image, tag: &str) -> (String, u64) {
        drop(self.stage.publish(image, tag, SPAN_BYTES).await);
        let name = self.stage.name(&self.front.host(), tag);
        let asked = |layer: &Vec<u8>| self.front.requests(&Digest::of(layer).to_string());
        let layers: Vec<Vec<u8>> = image.blobs[..image.tars.len()].iter().map(|blob| blob.to_vec()).collect();
        let before: Vec<usize> = layers.iter().map(asked).collect();
        let bytes = self.stage.pull(&self.node, "soci", &name);
        assert_eq!(layers.iter().map(asked).collect::<Vec<_>>(), before, "layers were fetched by the pull");
        (name, bytes)
    }

    /// Requests for a layer.
    fn requests(&self, image: &Image, layer: usize) -> usize {
        self.front.requests(&Digest::of(&image.blobs[layer]).to_string())
    }

    fn begin(&self, container: &str, script: &str) -> Child {
        let mut command = self.node.exec(container, script);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap()
    }
}

/// The image that a container is made of, and on top of it a layer of what the container has written.
fn commit(node: &Node, container: &str, image: &Image) -> Image {
    let mut diff = node.ctr();
    let output = run(diff.args(["snapshots", "--snapshotter", "soci", "diff", &node.container(container)]));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut written = Vec::new();
    MultiGzDecoder::new(&output.stdout[..]).read_to_end(&mut written).unwrap();
    let below = image.blobs.iter().zip(&image.tars).map(|(blob, tar)| (GZIP, blob.to_vec(), tar.clone()));
    Image::new(below.chain([(GZIP, output.stdout, written)]).collect())
}

/// Commits the snapshot of a container itself, and gives what a script prints in a container on top of it.
fn run_on_committed_snapshot(node: &Node, container: &str, script: &str) -> String {
    let snapshots = |arguments: &[&str]| {
        let mut command = node.ctr();
        stdout(command.args(["snapshots", "--snapshotter", "soci"]).args(arguments))
    };
    drop(snapshots(&["commit", "committed", &node.container(container)]));
    drop(snapshots(&["prepare", "again", "committed"]));
    let place = node.path("again");
    fs::create_dir(&place).unwrap();
    let mount = snapshots(&["mounts", &place.display().to_string(), "again"]);
    drop(stdout(Command::new("sh").args(["-c", &mount])));
    let mut command = node.ctr();
    command.args(["run", "--rm", "--rootfs"]).arg(&place).args([&node.container("again"), "/bin/sh", "-c", script]);
    let printed = stdout(&mut command);
    unmount(&place, UnmountFlags::empty()).unwrap();
    drop(snapshots(&["rm", "again"]));
    drop(snapshots(&["rm", "committed"]));
    printed
}

async fn containers_share_an_image_and_are_committed(version: Containerd) {
    let Some(scene) = Scene::new(version).await else { return };
    let (node, image) = (&scene.node, image());
    let (name, _) = scene.pull(&image, "v1").await;
    for container in ["one", "two"] {
        node.start_container(&name, container);
    }
    // Both read everything at the same time, which costs it once.
    let before = scene.stage.registry.traffic().bytes_sent;
    let readers = ["one", "two"].map(|container| scene.begin(container, "cat /srv/data/*"));
    let all: Vec<u8> = (0..FILES).flat_map(content).collect();
    for reader in readers {
        let output = reader.wait_with_output().unwrap();
        assert!(output.status.success() && output.stdout == all, "{:?}", output.status);
    }
    let cost = scene.stage.registry.traffic().bytes_sent - before;
    let layer = image.blobs[1].len() as u64;
    // The windows of made-up text, which refers to more of what came before than real files do, are a ninth of the
    // layer; a window may be asked for twice, by two flights at the same time.
    assert!(cost < layer + layer / 6, "{cost} bytes for a layer of {layer}");

    // Each sees what it writes, and nothing of the other.
    let write = "echo written > /srv/data/0; rm /srv/data/1; mkdir /srv/new; echo deep > /srv/new/file; ls /srv/data";
    assert_eq!(stdout(&mut node.exec("one", write)), "0\n2\n3\n4\n5\n");
    node.assert_reads("two", "/srv/data/1", &content(1));
    drop(stdout(&mut node.exec("two", "echo mine > /srv/mine; echo x >> /srv/data/5")));
    for container in ["one", "two"] {
        node.stop_container(container);
    }

    let committed = commit(node, "one", &image);
    // A removed file, a written one, and a new directory: the large files below are not in it.
    assert!(committed.tars[2].len() < 64 << 10, "{}", committed.tars[2].len());
    let (second, cost) = scene.pull(&committed, "v2").await;
    assert!(cost < layer / 4, "the layers below were paid for again: {cost}");
    let script = "cat /srv/data/0 /srv/new/file; ls /srv/data; cat /srv/data/5";
    let expected = format!("written\ndeep\n0\n2\n3\n4\n5\n{}", String::from_utf8(content(5)).unwrap());
    assert_eq!(node.run(&second, "three", script), expected);

    let script = "cat /srv/mine; tail=$(grep -c x /srv/data/5); echo $tail; ls /srv";
    let printed = run_on_committed_snapshot(node, "two", script);
    assert_eq!(printed, "mine\n1\ndata\nmine\n");

    // What is removed frees what nothing else uses.
    node.remove_container("one");
    node.remove_container("two");
    drop(stdout(node.ctr().args(["images", "rm", "--sync", &name])));
    node.wait("only the second image's snapshots are there", || node.snapshots().len() == 3);
    assert_eq!(node.run(&second, "four", "cat /srv/data/0"), "written\n");
    node.remove_last_images(&[&second]);
}

/// The same layer at another place of another image: another snapshot, and the same bytes on the disk.
async fn images_share_layers(version: Containerd) {
    let Some(scene) = Scene::new(version).await else { return };
    let (node, first) = (&scene.node, image());
    let bottom = tar(&[("etc/bottom", b"another image\n".to_vec())]);
    let second = Image::gzip([&bottom, &first.tars[0], &first.tars[1]].into_iter().cloned().collect());
    assert_eq!(first.blobs[1], second.blobs[2]);
    let (name, _) = scene.pull(&first, "first").await;
    assert_eq!(node.run(&name, "one", "cat /srv/data/0").into_bytes(), content(0));

    let before = [scene.requests(&first, 0), scene.requests(&first, 1)];
    assert!(before.iter().all(|requests| *requests > 0));
    let (name_2, cost) = scene.pull(&second, "second").await;
    assert!(cost < first.blobs[1].len() as u64 / 4, "{cost} bytes");
    node.start_container(&name_2, "two");
    node.assert_reads("two", "/srv/data/0", &content(0));
    assert_eq!(node.read("two", "/etc/bottom"), b"another image\n");
    assert_eq!([scene.requests(&first, 0), scene.requests(&first, 1)], before, "shared layers were fetched again");
    assert_eq!(node.snapshots().len(), 2 + 3 + 1);
    assert_eq!(node.entries("layers").len(), 3);

    // The layer stays as long as one of them is there.
    drop(stdout(node.ctr().args(["images", "rm", "--sync", &name])));
    node.wait("the first image's snapshots go", || node.snapshots().len() == 3 + 1);
    node.assert_reads("two", "/srv/data/0", &content(0));
    node.assert_reads("two", "/srv/data/5", &content(5));
    assert_eq!(node.entries("layers").len(), 3);
    node.stop_container("two");
    node.remove_container("two");
    node.remove_last_images(&[&name_2]);
}

/// What the snapshotter noted of a start is a profile before one is published, and while the container runs.
async fn a_container_s_start_becomes_a_profile(version: Containerd) {
    let Some(mut scene) = Scene::new(version).await else { return };
    let image = image();
    let (name, _) = scene.pull(&image, "noted").await;
    scene.node.start_container(&name, "one");
    scene.node.assert_reads("one", &path(2), &content(2));
    let profile = scene.node.path("one.profile");
    let record = |node: &Node, container: &str| {
        let mut command = soci();
        command.arg("--root").arg(node.path("soci")).arg("--address").arg(node.path("containerd.sock"));
        run(command.args(["record", "--container", container, "--output"]).arg(&profile))
    };
    let id = scene.node.container("one");
    let output = record(&scene.node, &id);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let shown = stdout(soci().args(["profile", "show", "--json"]).arg(&profile));
    let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
    let layer = Digest::of(&image.blobs[1]).to_string();
    let layer = shown["layers"].as_array().unwrap().iter().position(|known| *known == *layer).unwrap();
    let ranges = shown["ranges"].as_array().unwrap().iter().filter(|range| range[0] == layer);
    let bytes: u64 = ranges.map(|range| range[2].as_u64().unwrap()).sum();
    assert!((FILE_BYTES as u64..2 * FILE_BYTES as u64).contains(&bytes), "{bytes} bytes, of one file: {shown}");

    let says = |node: &Node, container: &str, expected: &str| {
        let output = record(node, container);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && text.contains(expected), "{text}");
    };
    says(&scene.node, "nobody", "containers ls");
    scene.node.configure("[profile]\nrecord = false\n");
    says(&scene.node, &id, "record = true");
    scene.node.stop_container("one");
    scene.node.remove_container("one");
    scene.node.remove_last_images(&[&name]);
}

/// After a power cut a page that was never written is zeros on the disk, and the store must find that out.
async fn a_reboot_costs_what_the_disk_has_lost(version: Containerd) {
    let Some(mut scene) = Scene::new(version).await else { return };
    let image = image();
    let (name, _) = scene.pull(&image, "v1").await;
    scene.node.start_container(&name, "long");
    for file in 0..2 {
        scene.node.assert_reads("long", &path(file), &content(file));
    }
    drop(stdout(&mut scene.node.exec("long", "echo written > /srv/written")));
    let before = scene.requests(&image, 1);
    let layer = Digest::of(&image.blobs[1]).to_string();
    scene.node.reboot(|node| {
        let data = node.layer_directory(&layer).join("data");
        let data = File::options().read(true).write(true).open(data).unwrap();
        let mut kept = Vec::new();
        (&data).read_to_end(&mut kept).unwrap();
        let lost = content(0);
        let place = kept.windows(4096).position(|window| window == &lost[500_000..504_096]).expect("it was read");
        data.write_all_at(&[0; 4096], place as u64).unwrap();
    });
    assert_eq!(scene.requests(&image, 1), before, "the daemon started by asking the registry");
    // The container is there, with what it had written, and starts again.
    let container = scene.node.container("long");
    drop(stdout(scene.node.ctr().args(["task", "start", "--detach", &container])));
    assert_eq!(scene.node.read("long", "/srv/written"), b"written\n");
    scene.node.assert_reads("long", &path(1), &content(1));
    assert_eq!(scene.requests(&image, 1), before, "what the disk has kept was fetched again");
    scene.node.assert_reads("long", &path(0), &content(0));
    assert!(scene.requests(&image, 1) > before, "zeros were taken for what was there");
    scene.node.assert_reads("long", &path(3), &content(3));
    scene.node.stop_container("long");
    scene.node.remove_container("long");
    scene.node.remove_last_images(&[&name]);
}

/// More layers than their list has room for in a label, as many mounts in one as overlayfs gets, names as long as names
/// may be, in a path as long as a program can still name.
async fn seventy_layers_with_long_names(version: Containerd) {
    const LAYERS: u64 = 70;
    let Some(scene) = Scene::new(version).await else { return };
    let directory: String = (0..14).map(|level| format!("{level:0>250}/")).collect();
    let name = |layer: u64| format!("deep/{directory}{layer:0>255}");
    assert!(name(0).len() > 3700);
    let layers = (0..LAYERS).map(|layer| {
        let shared = format!("of layer {layer}\n").into_bytes();
        tar(&[(&name(layer), text(layer, 3000)), ("etc/shared", shared), (&format!("etc/layer/{layer}"), Vec::new())])
    });
    let image = Image::gzip([shell_layer(("/etc/base", ""))].into_iter().chain(layers).collect());
    let (reference, _) = scene.pull(&image, "v1").await;
    let log = scene.node.log();
    let lazy = log.lines().filter(|line| line.contains(r#""remote-snapshot-prepared":"true""#)).count();
    assert_eq!(lazy, 71, "{log}");
    scene.node.start_container(&reference, "reader");
    assert_eq!(scene.node.read("reader", "/etc/shared"), b"of layer 69\n");
    assert_eq!(stdout(&mut scene.node.exec("reader", "ls /etc/layer | wc -l")).trim(), "70");
    let all = stdout(
        &mut scene.node.exec("reader", "find /deep -type f | sort | while read -r file; do cat \"$file\"; done"),
    );
    assert_eq!(all.into_bytes(), (0..LAYERS).flat_map(|layer| text(layer, 3000)).collect::<Vec<_>>());
    let write = format!("cd /deep; echo written > '/{0}' && cat '/{0}'", name(7));
    assert_eq!(stdout(&mut scene.node.exec("reader", &write)), "written\n");
    scene.node.stop_container("reader");
    scene.node.remove_container("reader");
    scene.node.remove_last_images(&[&reference]);
}
