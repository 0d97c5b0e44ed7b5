//! Containers of a real containerd on the snapshotter.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use soci_cli::demo::recipe::{Recipe, pack};
use soci_tests::daemon::{PATIENCE, Running, clean, started};
use soci_tests::image::{Image, tar};
use soci_tests::stdout;
use tempfile::TempDir;

const IMAGE: &str = "test.local/greeting:latest";

/// A containerd with all its state in one directory, and the snapshotter beside it.
struct Node {
    snapshotter: Running,
    containerd: Child,
    directory: TempDir,
}

impl Node {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let snapshotter = started(&at("soci"), &at("soci.sock"));
        let config = format!(
            "version = 2\nroot = {:?}\nstate = {:?}\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
             [grpc]\naddress = {:?}\n[proxy_plugins.soci]\ntype = \"snapshot\"\naddress = {:?}\n",
            at("root"),
            at("state"),
            at("containerd.sock"),
            at("soci.sock")
        );
        fs::write(at("config.toml"), config).unwrap();
        let log = fs::File::create(at("containerd.log")).unwrap();
        let mut command = Command::new("containerd");
        command.arg("--config").arg(at("config.toml")).stderr(log).stdout(Stdio::null());
        let containerd = command.spawn().unwrap();
        let node = Self { snapshotter, containerd, directory };
        node.wait("containerd answers", || node.ctr().arg("version").output().unwrap().status.success());
        node
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn ctr(&self) -> Command {
        let mut command = clean(Command::new("ctr"));
        command.arg("--address").arg(self.path("containerd.sock")).env_remove("CONTAINERD_NAMESPACE");
        command
    }

    /// What a script in a new container prints.
    fn run(&self, name: &str, script: &str) -> String {
        let command = ["run", "--rm", "--snapshotter", "soci", IMAGE, name, "/bin/sh", "-c", script];
        stdout(self.ctr().args(command))
    }

    fn snapshots(&self) -> Vec<String> {
        let list = stdout(self.ctr().args(["snapshots", "--snapshotter", "soci", "ls"]));
        list.lines().skip(1).map(|line| line.split_whitespace().next().unwrap().to_owned()).collect()
    }

    /// Numbers of the directories that snapshots have.
    fn directories(&self) -> BTreeSet<String> {
        let entries = fs::read_dir(self.path("soci/snapshotter/snapshots")).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    fn wait(&self, what: &str, done: impl Fn() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !done() {
            let log = || fs::read_to_string(self.path("containerd.log")).unwrap();
            assert!(Instant::now() < deadline, "{what}: not in time\n{}", log());
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // Each of them may be gone already.
        let _ = kill_process(Pid::from_child(&self.containerd), Signal::TERM);
        let _ = self.containerd.wait();
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let places = mounts.lines().filter_map(|line| line.split(' ').nth(1)).map(Path::new);
        for place in places.filter(|place| place.starts_with(self.directory.path())) {
            let _ = unmount(place, UnmountFlags::DETACH);
        }
    }
}

/// An image of this machine's shell, and on top of it a file and the removal of one.
fn image(path: &Path) {
    let recipe = Recipe::of_this_machine().unwrap();
    let base = pack(&recipe.layers[0], Some(&("/etc/removed".into(), "never seen\n".to_owned()))).unwrap();
    let top = tar(&[("etc/greeting", b"hello from above\n".to_vec()), ("etc/.wh.removed", Vec::new())]);
    let image = Image::gzip(vec![base, top]);
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
        files.push((format!("blobs/sha256/{}", soci_index::digest::Digest::of(blob).hex()), blob.to_vec()));
    }
    let files: Vec<(&str, Vec<u8>)> = files.iter().map(|(name, bytes)| (name.as_str(), bytes.clone())).collect();
    fs::write(path, tar(&files)).unwrap();
}

#[test]
fn containers_live_on_the_snapshotter() {
    let has = |program: &str| Command::new(program).arg("--version").output().is_ok();
    if !rustix::process::geteuid().is_root() || !["containerd", "ctr", "runc"].into_iter().all(has) {
        eprintln!("SKIPPED: containers need root, containerd, ctr and runc");
        return;
    }
    let mut node = Node::start();
    let archive = node.path("image.tar");
    image(&archive);
    let _ = stdout(node.ctr().args(["images", "import", "--snapshotter", "soci"]).arg(&archive));
    assert_eq!(node.snapshots().len(), 2);
    assert_eq!(node.directories().len(), 2);

    let script = "cat /etc/greeting; ls /etc/removed 2>/dev/null; echo written > /new; cat /new";
    assert_eq!(node.run("one", script), "hello from above\nwritten\n");
    assert_eq!(node.run("two", "ls /new 2>/dev/null || echo clean"), "clean\n");

    // A daemon that was killed is no more than a pause.
    node.snapshotter.signal(Signal::KILL);
    node.snapshotter.end();
    node.snapshotter = started(&node.path("soci"), &node.path("soci.sock"));
    node.wait("containerd connects again", || {
        node.ctr().args(["snapshots", "--snapshotter", "soci", "ls"]).output().unwrap().status.success()
    });
    assert_eq!(node.snapshots().len(), 2);
    assert_eq!(node.run("three", "cat /etc/greeting"), "hello from above\n");

    let _ = stdout(node.ctr().args(["images", "rm", "--sync", IMAGE]));
    node.wait("removed images free their disk", || node.snapshots().is_empty() && node.directories().is_empty());
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains("soci/snapshotter"), "{mounts}");
}
