//! A machine that runs containers: containerd with all its state in one directory, and the snapshotter beside it.
//!
//! Two things of a container are outside of that directory, whatever containerd's configuration says: what runc and the
//! shims keep below `/run`. So containers are named after their machine (see [`Node::container`]), and a reboot ends
//! them one by one.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use crate::containerd::{Containerd, Programs};
use crate::daemon::{PATIENCE, clean, daemon, daemon_path};
use crate::{run, soci, stdout};

/// Where containerd has runc keep what it knows of the containers of the default namespace.
const RUNC_ROOT: &str = "/run/containerd/runc/default";

/// Shows the daemon another boot id: `$0` is the file that has it. What is mounted below the machine's directory, which
/// is shared, is seen outside all the same.
const IN_ANOTHER_BOOT: &str =
    r#"mount --make-rprivate /proc && mount --bind "$0" /proc/sys/kernel/random/boot_id && exec "$@""#;

/// The processes and their directory. Everything ends when it is dropped.
#[derive(Debug)]
pub struct Node {
    snapshotter: Option<Child>,
    containerd: Option<Child>,
    programs: Programs,
    /// The file with the boot id, if it is not the kernel's.
    boot: Option<PathBuf>,
    directory: TempDir,
}

impl Node {
    /// Starts both; `None`, with a word on standard error, where that is not possible.
    ///
    /// # Panics
    /// When it is possible and does not work.
    #[must_use]
    pub fn start(version: Containerd) -> Option<Self> {
        Self::start_on(version, None)
    }

    /// [`Node::start`] with a disk of so many bytes (as mount(8) writes them) for the snapshotter.
    ///
    /// # Panics
    /// When it is possible and does not work.
    #[must_use]
    pub fn start_on(version: Containerd, disk: Option<&str>) -> Option<Self> {
        // What tests count must not depend on how long they take.
        let configuration = format!("[background_fetch]\ndisable = true\n[fuse]\ntree = '{}'\n", version.tree());
        Self::start_as(version, disk, |directory| [version.configuration(directory), configuration])
    }

    /// [`Node::start_on`] with other configurations, of containerd and of the snapshotter, for what is in a directory.
    ///
    /// # Panics
    /// When it is possible and does not work.
    #[must_use]
    pub fn start_as(
        version: Containerd,
        disk: Option<&str>,
        configurations: impl FnOnce(&Path) -> [String; 2],
    ) -> Option<Self> {
        let programs = version.programs()?;
        let directory = tempfile::Builder::new().prefix("node").tempdir().expect("a directory");
        let [containerd, snapshotter] = configurations(directory.path());
        fs::write(directory.path().join("config.toml"), containerd).expect("a file");
        fs::write(directory.path().join("soci.toml"), snapshotter).expect("a file");
        let mut node = Self { snapshotter: None, containerd: None, programs, boot: None, directory };
        if let Some(size) = disk {
            fs::create_dir(node.path("soci")).expect("a directory");
            let options = ["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"];
            drop(stdout(Command::new("mount").args(options).arg(node.path("soci"))));
        }
        node.start_containerd();
        node.start_snapshotter();
        node.wait_for_containerd();
        Some(node)
    }

    fn start_containerd(&mut self) {
        let mut command = self.programs.command("containerd");
        command.arg("--config").arg(self.path("config.toml"));
        self.containerd = Some(logged(command, &self.path("containerd.log")));
    }

    /// Waits until containerd answers, and for the snapshotter, too.
    ///
    /// # Panics
    /// When it does not.
    pub fn wait_for_containerd(&self) {
        self.wait("containerd answers", || {
            let list = self.ctr().args(["snapshots", "--snapshotter", "soci", "ls"]).output();
            list.is_ok_and(|output| output.status.success())
        });
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
        let mut command = match &self.boot {
            None => daemon(),
            Some(boot) => {
                let mut command = clean(Command::new("unshare"));
                command.args(["--mount", "--propagation", "unchanged", "sh", "-c", IN_ANOTHER_BOOT]);
                command.arg(boot).arg(daemon_path());
                command
            }
        };
        command.arg("--root").arg(self.path("soci")).arg("--address").arg(self.path("soci.sock"));
        command.arg("--config").arg(self.path("soci.toml"));
        let log = self.path("soci.log");
        let before = self.log().len();
        self.snapshotter = Some(logged(command, &log));
        self.wait("the snapshotter starts", || self.log()[before..].contains("successfully started"));
    }

    /// Starts the snapshotter anew with another configuration.
    ///
    /// # Panics
    /// When it does not start.
    pub fn configure(&mut self, text: &str) {
        self.kill_snapshotter();
        fs::write(self.path("soci.toml"), text).expect("a file");
        self.start_snapshotter();
        self.wait_for_containerd();
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

    /// What a power cut and another boot leave: no process, no mount, nothing of `/run`; the disk as it is after
    /// `meanwhile`; and another boot id.
    ///
    /// # Panics
    /// When something of it does not work.
    pub fn reboot(&mut self, meanwhile: impl FnOnce(&Self)) {
        let containers = self.containers();
        self.kill_snapshotter();
        let mut containerd = self.containerd.take().expect("a containerd that runs");
        containerd.kill().expect("a process of ours");
        containerd.wait().expect("a process of ours");
        for shim in self.shims() {
            // It may be about to end by itself.
            let _ = kill_process(shim, Signal::KILL);
        }
        for container in &containers {
            // Those that never ran are not there.
            let _ = run(Command::new("runc").args(["--root", RUNC_ROOT, "delete", "--force", container]));
        }
        let directory = self.directory.path();
        self.wait("nothing is mounted any more", || {
            unmount_below(directory);
            let mounts = fs::read_to_string("/proc/self/mounts").expect("a list of mounts");
            !mounts.contains(&directory.display().to_string())
        });
        fs::remove_dir_all(self.path("state")).expect("a directory of ours");
        meanwhile(self);

        let boot = self.path("boot-id");
        fs::write(&boot, format!("{:032x}\n", std::process::id())).expect("a file");
        self.boot = Some(boot);
        let mount = Command::new("mount").arg("--bind").arg(directory).arg(directory).output();
        assert!(mount.is_ok_and(|output| output.status.success()), "a directory can be bound to itself");
        drop(stdout(Command::new("mount").arg("--make-shared").arg(directory)));
        self.start_containerd();
        self.start_snapshotter();
        self.wait_for_containerd();
    }

    /// The shims that belong to this machine's containerd.
    fn shims(&self) -> Vec<Pid> {
        let processes = fs::read_dir("/proc").expect("a list of processes").flatten();
        let numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let ours = self.path("containerd.sock").display().to_string();
        let is_ours = |pid: &i32| {
            let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let mut words = command.split(|byte| *byte == 0);
            words.next().is_some_and(|program| program.ends_with(b"containerd-shim-runc-v2"))
                && words.any(|word| word == ours.as_bytes())
        };
        numbers.filter(is_ours).filter_map(Pid::from_raw).collect()
    }

    /// The name that this machine gives to a container: those of all machines are in one place.
    #[must_use]
    pub fn container(&self, name: &str) -> String {
        format!("{name}-{}", self.directory.path().file_name().unwrap_or_default().to_string_lossy())
    }

    /// Names of the containers.
    #[must_use]
    pub fn containers(&self) -> Vec<String> {
        stdout(self.ctr().args(["containers", "ls", "-q"])).lines().map(str::to_owned).collect()
    }

    /// What the snapshotter has said, from its first start on.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.path("soci.log")).unwrap_or_default()
    }

    /// The client of containerd.
    #[must_use]
    pub fn ctr(&self) -> Command {
        let mut command = clean(self.programs.command("ctr"));
        command.arg("--address").arg(self.path("containerd.sock")).env_remove("CONTAINERD_NAMESPACE");
        command
    }

    /// What a script in a new container prints.
    #[must_use]
    pub fn run(&self, image: &str, name: &str, script: &str) -> String {
        let name = self.container(name);
        let command = ["run", "--rm", "--snapshotter", "soci", image, &name, "/bin/sh", "-c", script];
        stdout(self.ctr().args(command))
    }

    /// Starts an idle container, for `exec`.
    pub fn start_container(&self, image: &str, name: &str) {
        let name = self.container(name);
        let command = ["run", "--detach", "--snapshotter", "soci", image, &name, "/bin/sh", "-c", WAIT];
        drop(stdout(self.ctr().args(command)));
    }

    /// A command line that runs a script in a container that waits, in its namespaces.
    ///
    /// Not by `ctr task exec`, which may lose the end of what a program says: it stops listening when the program has
    /// ended (containerd's pull request 13931). What is read would seem cut off, and it is that what tests compare.
    #[must_use]
    pub fn exec(&self, name: &str, script: &str) -> Command {
        let (tasks, name) = (stdout(self.ctr().args(["task", "ls"])), self.container(name));
        let line = tasks.lines().find(|line| line.split_whitespace().next() == Some(&name));
        let process = line.and_then(|line| line.split_whitespace().nth(1)).expect("a container that runs");
        let mut command = Command::new("nsenter");
        command.args(["--target", process, "--all", "--root", "--wd", "/bin/sh", "-c", script]);
        command
    }

    /// A file, read in a container that waits.
    #[must_use]
    pub fn read(&self, name: &str, path: &str) -> Vec<u8> {
        stdout(&mut self.exec(name, &format!("cat '{path}'"))).into_bytes()
    }

    /// A container that waits reads the right bytes from a file.
    ///
    /// # Panics
    /// When it does not; the message names the place, and spares the reader the rest.
    pub fn assert_reads(&self, name: &str, path: &str, expected: &[u8]) {
        let read = self.read(name, path);
        let differs = read.iter().zip(expected).position(|(read, expected)| read != expected);
        assert!(differs.is_none(), "{path} in {name} is wrong from byte {differs:?} on");
        assert_eq!(read.len(), expected.len(), "{path} in {name} has another length");
    }

    /// Kills the processes of a container; its files stay.
    pub fn stop_container(&self, name: &str) {
        let name = self.container(name);
        drop(stdout(self.ctr().args(["task", "kill", "--signal", "KILL", &name])));
        self.wait("the task is gone", || run(self.ctr().args(["task", "rm", &name])).status.success());
    }

    /// Removes a container that has been stopped, and its files.
    pub fn remove_container(&self, name: &str) {
        drop(stdout(self.ctr().args(["container", "rm", &self.container(name)])));
    }

    /// Removes images, and waits until the snapshotter has freed what they used.
    pub fn remove_last_images(&self, images: &[&str]) {
        drop(stdout(self.ctr().args(["images", "rm", "--sync"]).args(images)));
        self.wait("removed images free their disk", || {
            let places = ["snapshotter/snapshots", "snapshotter/layers", "layers"];
            self.snapshots().is_empty() && places.iter().all(|place| self.entries(place).is_empty())
        });
    }

    /// Where the snapshotter keeps the layer `digest`.
    ///
    /// # Panics
    /// When it does not.
    #[must_use]
    pub fn layer_directory(&self, digest: &str) -> PathBuf {
        let layers =
            fs::read_dir(self.path("soci/layers")).expect("a store").map(|entry| entry.expect("an entry").path());
        let is_it = |directory: &PathBuf| {
            fs::read_to_string(directory.join("record.json")).is_ok_and(|record| record.contains(digest))
        };
        layers.into_iter().find(is_it).expect("the layer")
    }

    /// What the worker says of itself.
    ///
    /// # Panics
    /// When it does not.
    #[must_use]
    pub fn status(&self) -> Value {
        let status = stdout(soci().arg("--root").arg(self.path("soci")).args(["status", "--json"]));
        serde_json::from_str(&status).expect("JSON")
    }

    /// Kills the worker and waits for the next one to answer.
    ///
    /// # Panics
    /// When there is none.
    pub fn kill_worker(&self) {
        let pid = self.worker();
        kill_process(pid, Signal::KILL).expect("a process of ours");
        self.wait("another worker answers", || {
            let mut ask = soci();
            ask.arg("--root").arg(self.path("soci")).args(["status", "--json"]);
            ask.output().is_ok_and(|output| output.status.success()) && self.worker() != pid
        });
    }

    fn worker(&self) -> Pid {
        let pid = self.status()["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok());
        pid.and_then(Pid::from_raw).expect("the number of a process")
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

/// Does nothing until it is killed, with a shell alone.
const WAIT: &str = "sh -c 'kill -STOP $$' & wait";

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
        if let Some(mut containerd) = self.containerd.take() {
            let _ = kill_process(Pid::from_child(&containerd), Signal::TERM);
            let _ = containerd.wait();
        }
        if let Some(mut snapshotter) = self.snapshotter.take() {
            let _ = kill_process(Pid::from_child(&snapshotter), Signal::INT);
            let _ = snapshotter.wait();
        }
        unmount_below(self.directory.path());
    }
}
