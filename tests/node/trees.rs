//! Layers whose names the kernel has: what containers stand on, what is asked of the daemon, what outlives it.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use soci_tests::containerd::Containerd;
use soci_tests::front::{Fault, Front};
use soci_tests::image::{Image, shell_layer, tar, text};
use soci_tests::node::Node;
use soci_tests::stage::Stage;
use soci_tests::{on_each_containerd, run, stdout};

on_each_containerd!(
    the_kernel_has_the_names,
    mounts_outlive_processes_and_are_made_again,
    a_whole_layer_needs_no_daemon,
    failures_heal,
    the_configuration_decides,
    a_silent_daemon_is_waited_for,
);

const FILES: u64 = 20;
/// Without the background fetch, so that what is counted does not depend on time.
const QUIET: &str = "[background_fetch]\ndisable = true\n";
/// The background fetch, at once and without rests.
const EAGER: &str = "[background_fetch]\nsilence_period_msec = 1\nfetch_period_msec = 1\n";

fn content(file: u64) -> Vec<u8> {
    text(file + 1, 100_000)
}

fn path(file: u64) -> String {
    format!("/srv/data/{file}")
}

fn image() -> Image {
    let names: Vec<String> = (0..FILES).map(|file| path(file)[1..].to_owned()).collect();
    let files: Vec<(&str, Vec<u8>)> = names.iter().zip(0..).map(|(name, file)| (&**name, content(file))).collect();
    Image::gzip(vec![shell_layer(("/etc/base", "")), tar(&files)])
}

/// A machine with the image, and the registry.
struct Scene {
    node: Node,
    front: Front,
    name: String,
    _stage: Stage,
}

impl Scene {
    /// `None`, with a word on standard error, where the kernel cannot show layers.
    async fn new(version: Containerd) -> Option<Self> {
        let stage = Stage::new().await?;
        let node = Node::start_as(version, None, |directory| [version.configuration(directory), QUIET.to_owned()])?;
        if !node.log().contains("the kernel shows layers (EROFS)") {
            eprintln!("SKIPPED: this kernel cannot show layers: {}", node.log());
            return None;
        }
        let front = Front::start(&stage.registry.host()).await.unwrap();
        drop(stage.publish(&image(), "v1", 64 << 10).await);
        let name = stage.name(&front.host(), "v1");
        let _ = stage.pull(&node, "soci", &name);
        Some(Self { node, front, name, _stage: stage })
    }

    fn assert_all_read(&self, container: &str) {
        for file in 0..FILES {
            self.node.assert_reads(container, &path(file), &content(file));
        }
    }

    /// How the layers are shown.
    fn shown(&self) -> Vec<String> {
        let status = self.node.status();
        let layers = status["layers"].as_array().unwrap().iter();
        layers.map(|layer| layer["tree"].as_str().unwrap().to_owned()).collect()
    }

    fn fuse_requests(&self) -> u64 {
        let status = self.node.status();
        status["layers"].as_array().unwrap().iter().filter_map(|layer| layer["fuseRequests"].as_u64()).sum()
    }

    /// Removes the containers, which have been stopped, and the image.
    fn remove(&self, containers: &[&str]) {
        for container in containers {
            self.node.remove_container(container);
        }
        self.node.remove_last_images(&[&self.name]);
        assert_eq!(trees(&self.node), BTreeMap::new());
        assert!(self.node.entries("trees").is_empty());
    }
}

/// What is mounted on entries of the daemon's directory of trees, by name: number and image of the topmost mount.
fn trees(node: &Node) -> BTreeMap<String, [String; 2]> {
    let directory = node.path("soci/trees");
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let mount = |line: &str| {
        let fields: Vec<&str> = line.split(' ').collect();
        let name = Path::new(fields[4]).strip_prefix(&directory).ok()?.to_str()?.to_owned();
        let image = fields[fields.iter().position(|field| *field == "-")? + 2];
        Some((name, [fields[0], image].map(str::to_owned)))
    };
    mounts.lines().filter_map(mount).collect()
}

async fn the_kernel_has_the_names(version: Containerd) {
    let Some(scene) = Scene::new(version).await else { return };
    let node = &scene.node;
    assert_eq!((trees(node).len(), scene.shown()), (2, vec!["erofs".to_owned(); 2]), "{}", node.log());
    node.start_container(&scene.name, "one");
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    // Tools for AWS's snapshotter count layers so.
    let root = node.path("soci").display().to_string();
    let counted = mounts.lines().filter(|line| line.contains(&root) && line.contains("fuse.rawBridge")).count();
    assert_eq!(counted, 2, "{mounts}");
    let lower = format!("lowerdir={}", node.path("soci/trees").display());
    assert!(mounts.contains(&lower), "{lower}: {mounts}");
    let list = "find / -xdev | wc -l; ls /srv/data | wc -l; wc -c < /srv/data/7; ls /srv/absent";
    let before = scene.fuse_requests();
    let listed = run(&mut node.exec("one", list));
    assert!(String::from_utf8_lossy(&listed.stdout).ends_with("\n20\n100000\n"), "{listed:?}");
    let (pages, asked) = (5_927_936 / 4096, scene.fuse_requests() - before);
    assert!(asked < pages, "{asked} requests for names");
    // As with AWS's daemon: the state of the topmost layer can be read, and is not listed.
    let state = stdout(&mut node.exec("one", "ls -A /; cd /.soci-snapshotter; ls; cat *"));
    let digest = soci_index::format::digest::Digest::of(&image().blobs[1]).to_string();
    assert!(!state.lines().any(|name| name == ".soci-snapshotter"), "{state}");
    assert!(state.contains(&format!("{digest}.json")) && state.contains("fetchedPercent"), "{state}");
    // Once everything that a program reads is in memory the daemon is asked for nothing.
    let work = format!("{list}; cat /srv/data/* | wc -c");
    drop(run(&mut node.exec("one", &work)));
    let before = scene.fuse_requests();
    let again = run(&mut node.exec("one", &work));
    assert!(String::from_utf8_lossy(&again.stdout).ends_with("2000000\n"), "{again:?}");
    assert_eq!(scene.fuse_requests() - before, 0);
    scene.assert_all_read("one");
    node.stop_container("one");
    scene.remove(&["one"]);
}

async fn mounts_outlive_processes_and_are_made_again(version: Containerd) {
    let Some(mut scene) = Scene::new(version).await else { return };
    let mounts = trees(&scene.node);
    scene.node.start_container(&scene.name, "one");
    scene.node.assert_reads("one", &path(0), &content(0));
    // A worker that is killed is replaced; the mounts stay, and read from the next one.
    scene.node.kill_worker();
    assert_eq!(trees(&scene.node), mounts);
    scene.node.assert_reads("one", &path(5), &content(5));
    scene.node.stop_container("one");
    scene.node.remove_container("one");

    // Without a service manager the forest goes with the supervisor: its trees are made again before containerd is
    // answered, without the network.
    scene.node.kill_snapshotter();
    scene.front.set(Fault::Status(500, ""));
    scene.node.start_snapshotter();
    scene.node.wait_for_containerd();
    let again = trees(&scene.node);
    assert!(again.len() == 2 && again.iter().all(|(name, mount)| mounts[name][1] != mount[1]), "{again:?}");
    scene.front.set(Fault::None);
    scene.node.start_container(&scene.name, "two");
    scene.assert_all_read("two");

    scene.node.reboot(|_| {});
    assert_eq!(trees(&scene.node).len(), 2);
    let container = scene.node.container("two");
    drop(stdout(scene.node.ctr().args(["task", "start", "--detach", &container])));
    scene.assert_all_read("two");
    scene.node.stop_container("two");
    scene.remove(&["two"]);
}

async fn a_whole_layer_needs_no_daemon(version: Containerd) {
    let Some(mut scene) = Scene::new(version).await else { return };
    assert_eq!(scene.shown(), ["erofs"; 2]);
    scene.node.configure(EAGER);
    scene.node.wait("the layers are whole", || scene.shown() == ["erofs-whole"; 2]);
    scene.node.start_container(&scene.name, "late");
    let before = scene.fuse_requests();
    scene.assert_all_read("late");
    assert_eq!(scene.fuse_requests(), before);
    // No daemon, no registry: what is here is read, also what is not in memory.
    scene.front.set(Fault::Stopped);
    scene.node.kill_snapshotter();
    fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
    scene.assert_all_read("late");
    scene.node.stop_container("late");
    // The next daemon finds them.
    let mounts = trees(&scene.node);
    scene.node.start_snapshotter();
    scene.node.wait_for_containerd();
    assert_eq!(trees(&scene.node), mounts);
    scene.node.start_container(&scene.name, "last");
    scene.assert_all_read("last");
    scene.node.stop_container("last");
    scene.remove(&["late", "last"]);
}

/// A page that could not be had is asked for again at the next access.
async fn failures_heal(version: Containerd) {
    let Some(scene) = Scene::new(version).await else { return };
    let node = &scene.node;
    node.start_container(&scene.name, "one");
    node.assert_reads("one", &path(0), &content(0));
    scene.front.set(Fault::Status(404, ""));
    let failed = run(&mut node.exec("one", "cat /srv/data/9 > /dev/null"));
    assert!(!failed.status.success(), "{failed:?}");
    assert!(String::from_utf8_lossy(&failed.stderr).contains("Input/output error"), "{failed:?}");
    scene.front.set(Fault::None);
    node.wait("the next access gets the bytes", || node.read("one", &path(9)) == content(9));
    scene.assert_all_read("one");
    node.stop_container("one");
    scene.remove(&["one"]);
}

async fn the_configuration_decides(version: Containerd) {
    let Some(mut scene) = Scene::new(version).await else { return };
    scene.node.configure(&format!("{QUIET}[fuse]\ntree = 'fuse'\n"));
    assert_eq!(trees(&scene.node), BTreeMap::new());
    scene.node.start_container(&scene.name, "one");
    scene.assert_all_read("one");
    assert_eq!(scene.shown(), ["fuse"; 2]);
    scene.node.stop_container("one");
    scene.node.configure(&format!("{QUIET}[fuse]\ntree = 'erofs'\n"));
    assert_eq!((trees(&scene.node).len(), scene.shown()), (2, vec!["erofs".to_owned(); 2]));
    let container = scene.node.container("one");
    drop(stdout(scene.node.ctr().args(["task", "start", "--detach", &container])));
    scene.assert_all_read("one");
    scene.node.stop_container("one");
    scene.remove(&["one"]);
}

/// A daemon that answers nothing for a while delays reads of what is not in memory, and nothing else.
async fn a_silent_daemon_is_waited_for(version: Containerd) {
    let Some(scene) = Scene::new(version).await else { return };
    let node = &scene.node;
    node.start_container(&scene.name, "one");
    node.assert_reads("one", &path(0), &content(0));
    let list = "find / -xdev | wc -l; cat /srv/data/0 | wc -c";
    let expected = stdout(&mut node.exec("one", list));
    let worker = i32::try_from(node.status()["pid"].as_i64().unwrap()).ok().and_then(Pid::from_raw).unwrap();
    kill_process(worker, Signal::STOP).unwrap();
    let mut command = node.exec("one", "cat /srv/data/15");
    let reader = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
    assert_eq!(stdout(&mut node.exec("one", list)), expected, "names and what is in memory");
    std::thread::sleep(Duration::from_secs(3));
    kill_process(worker, Signal::CONT).unwrap();
    let output = reader.wait_with_output().unwrap();
    assert!(output.status.success() && output.stdout == content(15), "{:?}", output.status);
    node.stop_container("one");
    scene.remove(&["one"]);
}
