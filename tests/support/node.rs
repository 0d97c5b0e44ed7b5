//! A machine that runs containers: containerd with all its state in one directory, and the snapshotter beside it.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::daemon::{PATIENCE, clean, daemon};
use crate::stdout;

/// The processes and their directory. Everything ends when it is dropped.
#[derive(Debug)]
pub struct Node {
    snapshotter: Option<Child>,
    containerd: Child,
    directory: TempDir,
}

impl Node {
    /// Starts both; `None`, with a word on standard error, where that is not possible.
    ///
    /// # Panics
    /// When it is possible and does not work.
    #[must_use]
    pub fn start() -> Option<Self> {
        let has = |program: &str| Command::new(program).arg("--version").output().is_ok();
        if !rustix::process::geteuid().is_root() || !["containerd", "ctr", "runc"].into_iter().all(has) {
            eprintln!("SKIPPED: containers need root, containerd, ctr and runc");
            return None;
        }
        let directory = tempfile::tempdir().expect("a directory");
        let at = |name: &str| directory.path().join(name);
        let config = format!(
            "version = 2\nroot = {:?}\nstate = {:?}\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
             [grpc]\naddress = {:?}\n[proxy_plugins.soci]\ntype = \"snapshot\"\naddress = {:?}\n",
            at("root"),
            at("state"),
            at("containerd.sock"),
            at("soci.sock")
        );
        fs::write(at("config.toml"), config).expect("a file");
        let mut command = Command::new("containerd");
        command.arg("--config").arg(at("config.toml"));
        let containerd = logged(command, &at("containerd.log"));
        let mut node = Self { snapshotter: None, containerd, directory };
        node.start_snapshotter();
        node.wait("containerd answers", || node.ctr().arg("version").output().is_ok_and(|out| out.status.success()));
        Some(node)
    }

    /// A file of this machine.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Starts the snapshotter, which is not running, and waits until it serves.
    ///
    /// # Panics
    /// When it does not start.
    pub fn start_snapshotter(&mut self) {
        let mut command = daemon();
        command.arg("--root").arg(self.path("soci")).arg("--address").arg(self.path("soci.sock"));
        let log = self.path("soci.log");
        let before = self.log().len();
        self.snapshotter = Some(logged(command, &log));
        self.wait("the snapshotter starts", || self.log()[before..].contains("successfully started"));
    }

    /// Kills the snapshotter's supervisor, and with it the worker, as a power cut would.
    ///
    /// # Panics
    /// When it is not running.
    pub fn kill_snapshotter(&mut self) {
        let mut child = self.snapshotter.take().expect("a snapshotter that runs");
        child.kill().expect("a process of ours");
        child.wait().expect("a process of ours");
    }

    /// What the snapshotter has said, from its first start on.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.path("soci.log")).unwrap_or_default()
    }

    /// The client of containerd.
    #[must_use]
    pub fn ctr(&self) -> Command {
        let mut command = clean(Command::new("ctr"));
        command.arg("--address").arg(self.path("containerd.sock")).env_remove("CONTAINERD_NAMESPACE");
        command
    }

    /// What a script in a new container prints.
    #[must_use]
    pub fn run(&self, image: &str, name: &str, script: &str) -> String {
        let command = ["run", "--rm", "--snapshotter", "soci", image, name, "/bin/sh", "-c", script];
        stdout(self.ctr().args(command))
    }

    /// Names of the snapshots.
    ///
    /// # Panics
    /// When the listing makes no sense.
    #[must_use]
    pub fn snapshots(&self) -> Vec<String> {
        let list = stdout(self.ctr().args(["snapshots", "--snapshotter", "soci", "ls"]));
        list.lines().skip(1).map(|line| line.split_whitespace().next().expect("a name").to_owned()).collect()
    }

    /// Names of the entries of a directory of the snapshotter.
    ///
    /// # Panics
    /// When there is no such directory.
    #[must_use]
    pub fn entries(&self, directory: &str) -> BTreeSet<String> {
        let entries = fs::read_dir(self.path("soci").join(directory)).expect("a directory");
        entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect()
    }

    /// Waits for something to become true.
    ///
    /// # Panics
    /// When it does not.
    pub fn wait(&self, what: &str, done: impl Fn() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !done() {
            let containerd = || fs::read_to_string(self.path("containerd.log")).unwrap_or_default();
            assert!(Instant::now() < deadline, "{what}: not in time\n{}\n{}", containerd(), self.log());
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Starts a process whose words go to the end of a file.
fn logged(mut command: Command, log: &Path) -> Child {
    let log = File::options().create(true).append(true).open(log).expect("a file");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().expect("a program that is there")
}

/// Takes all mounts below a directory out of the tree.
pub fn unmount_below(directory: &Path) {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let places = mounts.lines().rev().filter_map(|line| line.split(' ').nth(1)).map(Path::new);
    for place in places.filter(|place| place.starts_with(directory)) {
        let _ = unmount(place, UnmountFlags::DETACH);
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let tasks = self.ctr().args(["task", "ls", "-q"]).output().map(|output| output.stdout).unwrap_or_default();
        for task in String::from_utf8_lossy(&tasks).lines() {
            let _ = self.ctr().args(["task", "rm", "--force", task]).output();
        }
        // Each of them may be gone already.
        let _ = kill_process(Pid::from_child(&self.containerd), Signal::TERM);
        let _ = self.containerd.wait();
        if let Some(mut snapshotter) = self.snapshotter.take() {
            let _ = kill_process(Pid::from_child(&snapshotter), Signal::INT);
            let _ = snapshotter.wait();
        }
        unmount_below(self.directory.path());
    }
}
