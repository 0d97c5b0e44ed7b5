//! Images that a real containerd starts lazily: pulled as Kubernetes does it, run, compared, killed under, removed.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use soci_cli::demo::recipe::{Recipe, pack};
use soci_cli::demo::registry::DemoRegistry;
use soci_tests::image::{Image, tar, text};
use soci_tests::node::Node;
use soci_tests::registry::client;
use soci_tests::{soci, stdout};

/// Files of the large layer, and bytes of each.
const FILES: u64 = 12;
const FILE_BYTES: usize = 1 << 20;

/// Does nothing until it is killed, with a shell alone.
const WAIT: &str = "sh -c 'kill -STOP $$' & wait";

fn content(file: u64) -> Vec<u8> {
    text(file + 1, FILE_BYTES)
}

/// A shell, a large layer, and on top of it white-outs of a file and of a directory's content.
fn image() -> Image {
    let recipe = Recipe::of_this_machine().unwrap();
    let base = pack(&recipe.layers[0], Some(&("/etc/removed".into(), "never seen\n".to_owned()))).unwrap();
    let names: Vec<String> = (0..FILES).map(|file| format!("srv/data/{file}")).collect();
    let mut files: Vec<(&str, Vec<u8>)> = names.iter().zip(0..).map(|(name, file)| (&**name, content(file))).collect();
    files.push(("srv/old/hidden", b"hidden\n".to_vec()));
    let top = tar(&[
        ("etc/greeting", b"hello from above\n".to_vec()),
        ("etc/.wh.removed", Vec::new()),
        ("srv/old/.wh..wh..opq", Vec::new()),
        ("srv/old/new", b"new\n".to_vec()),
    ]);
    Image::gzip(vec![base, tar(&files), top])
}

/// An image in a registry, with an index of all its layers, and the program that pulls it.
struct Stage {
    registry: DemoRegistry,
    name: String,
    bytes: u64,
    puller: PathBuf,
    _directory: tempfile::TempDir,
}

impl Stage {
    /// `None`, with a word on standard error, where there is no Go.
    async fn new(with_index: bool) -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let puller = directory.path().join("pull");
        let mut build = Command::new("go");
        build.args(["build", "-o"]).arg(&puller).arg("./pull");
        build.current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("conformance"));
        match build.output() {
            Ok(output) => assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr)),
            Err(error) => {
                eprintln!("SKIPPED: pulling as Kubernetes does it needs go: {error}");
                return None;
            }
        }
        let registry = DemoRegistry::start(Duration::ZERO).await.unwrap();
        let image = image();
        image.push(&client(&registry.host()).repository("team/app"), "v1").await;
        let name = format!("{}/team/app:v1", registry.host());
        if with_index {
            drop(stdout(soci().args(["publish", &name, "--min-layer-size", "0", "--span-size", "1048576"])));
        }
        let bytes = image.blobs.iter().map(|blob| blob.len() as u64).sum();
        Some(Self { registry, name, bytes, puller, _directory: directory })
    }

    /// Bytes that a pull takes out of the registry.
    fn pull(&self, node: &Node, snapshotter: &str) -> u64 {
        let before = self.registry.traffic().bytes_sent;
        let mut command = Command::new(&self.puller);
        drop(stdout(command.arg(node.path("containerd.sock")).args([snapshotter, &self.name])));
        self.registry.traffic().bytes_sent - before
    }
}

fn status(node: &Node) -> Value {
    let root = node.path("soci");
    serde_json::from_str(&stdout(soci().arg("--root").arg(root).args(["status", "--json"]))).unwrap()
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

#[tokio::test(flavor = "multi_thread")]
async fn containers_start_lazily_and_outlive_the_snapshotter() {
    let Some(mut node) = Node::start() else { return };
    let Some(stage) = Stage::new(true).await else { return };
    let pulled = stage.pull(&node, "soci");
    assert!(pulled < stage.bytes / 4, "{pulled} of {} bytes were pulled", stage.bytes);
    let prepared = node.log().lines().filter(|line| line.contains(r#""remote-snapshot-prepared":"true""#)).count();
    assert_eq!(prepared, 3, "{}", node.log());

    let script =
        "cat /etc/greeting /srv/old/*; ls /etc/removed 2>/dev/null; echo written > /srv/data/0; cat /srv/data/0";
    assert_eq!(node.run(&stage.name, "one", script), "hello from above\nnew\nwritten\n");
    assert_eq!(node.run(&stage.name, "two", "cat /srv/data/0").into_bytes(), content(0));
    let read = |container: &str, file: u64| {
        let (id, path) = (format!("read-{file}"), format!("/srv/data/{file}"));
        stdout(node.ctr().args(["task", "exec", "--exec-id", &id, container, "/bin/cat", &path])).into_bytes()
    };

    // containerd keeps the state of containers in a place of its own, whatever its configuration.
    let long = format!("long-{}", std::process::id());
    // A container that runs reads on, file after file, while its server dies each time.
    let sleep = ["run", "--detach", "--snapshotter", "soci", &stage.name, &long, "/bin/sh", "-c", WAIT];
    drop(stdout(node.ctr().args(sleep)));
    for file in 1..5 {
        let pid = status(&node)["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok()).unwrap();
        kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
        assert_eq!(read(&long, file), content(file), "after the kill before file {file}");
        node.wait("another worker answers", || {
            let mut ask = soci();
            ask.arg("--root").arg(node.path("soci")).args(["status", "--json"]);
            ask.output().is_ok_and(|output| output.status.success())
        });
        assert_ne!(status(&node)["pid"].as_i64(), Some(i64::from(pid)));
    }
    drop(stdout(node.ctr().args(["task", "kill", "--signal", "KILL", &long])));
    node.wait("the container is gone", || {
        node.ctr().args(["container", "rm", &long]).output().is_ok_and(|output| output.status.success())
    });

    // All processes die, as in a power cut; then the registry is not needed for what is here.
    node.kill_snapshotter();
    node.start_snapshotter();
    node.wait("containerd connects again", || {
        node.ctr().args(["snapshots", "--snapshotter", "soci", "ls"]).output().is_ok_and(|out| out.status.success())
    });
    let before = stage.registry.traffic().requests;
    assert_eq!(node.run(&stage.name, "three", "cat /srv/data/1").into_bytes(), content(1));
    assert_eq!(stage.registry.traffic().requests, before);

    drop(stdout(node.ctr().args(["images", "rm", "--sync", &stage.name])));
    node.wait("removed images free their disk", || {
        node.snapshots().is_empty()
            && ["snapshotter/snapshots", "snapshotter/layers", "layers"].iter().all(|at| node.entries(at).is_empty())
    });
}

/// Layers without an index come whole and in parallel; what containers see is what overlayfs shows.
#[tokio::test(flavor = "multi_thread")]
async fn trees_are_those_of_overlayfs() {
    for with_index in [false, true] {
        let Some(node) = Node::start() else { return };
        let Some(stage) = Stage::new(with_index).await else { return };
        stage.pull(&node, "soci");
        stage.pull(&node, "overlayfs");
        let (ours, theirs) = (archive(&node, "soci", &stage.name), archive(&node, "overlayfs", &stage.name));
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
