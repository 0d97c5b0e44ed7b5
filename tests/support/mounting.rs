//! Images in a registry of this process, and their mounts with the `soci` binary.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use soci_cli::demo::registry::DemoRegistry;

use crate::image::Image;
use crate::registry::client;
use crate::{soci, stdout};

/// The repository that the image is in.
pub const REPOSITORY: &str = "team/app";

/// Whether a test can mount anything here; says loudly that it does nothing, if not.
#[must_use]
pub fn can_mount() -> bool {
    let can = Path::new("/dev/fuse").exists() && rustix::process::geteuid().is_root();
    if !can {
        eprintln!("SKIPPED: mounting needs /dev/fuse and root");
    }
    can
}

/// An image in a registry, and places to mount it. A node is a root directory and a mount point of its own.
#[derive(Debug)]
pub struct Mounting {
    /// Where the image is.
    pub registry: DemoRegistry,
    /// What it is made of.
    pub image: Image,
    /// Where the nodes are: each a directory of its name, its mount point `mnt-NAME` beside it.
    pub scratch: tempfile::TempDir,
}

impl Mounting {
    /// Pushes the image.
    ///
    /// # Panics
    /// When there is no port to listen on, or no directory.
    pub async fn new(image: Image) -> Self {
        let registry = DemoRegistry::start(Duration::ZERO).await.expect("a port");
        image.push(&client(&registry.host()).repository(REPOSITORY), "v1").await;
        Self { registry, image, scratch: tempfile::tempdir().expect("a directory") }
    }

    /// The image's name.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}/{REPOSITORY}:v1", self.registry.host())
    }

    /// Where a node mounts the image.
    #[must_use]
    pub fn mountpoint(&self, node: &str) -> PathBuf {
        self.scratch.path().join(format!("mnt-{node}"))
    }

    /// A command on a node.
    #[must_use]
    pub fn soci(&self, node: &str, arguments: &[&str]) -> Command {
        let mut command = soci();
        command.arg("--root").arg(self.scratch.path().join(node)).args(arguments);
        command
    }

    /// Publishes an index.
    pub fn publish(&self, more: &[&str]) {
        let name = self.name();
        drop(stdout(self.soci("build", &["publish", &name, "--min-layer-size", "1000"]).args(more)));
    }

    /// Mounts in the background; the mount ends with the returned value.
    ///
    /// # Panics
    /// When the mount does not come.
    #[must_use]
    pub fn mount(&self, node: &str, more: &[&str]) -> Serving {
        let (name, at) = (self.name(), self.mountpoint(node));
        std::fs::create_dir_all(&at).expect("a directory");
        let mut command = self.soci(node, &["mount", &name]);
        command.arg(&at).args(["--min-layer-size", "1000"]).args(more);
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary");
        let mut serving = Serving { child: Some(child), at };
        let start = Instant::now();
        while !serving.is_mounted() {
            let ended = serving.child.as_mut().expect("not taken yet").try_wait().expect("a state");
            if ended.is_some() {
                let (code, said) = serving.ended();
                panic!("ended with {code}: {said}");
            }
            assert!(start.elapsed() < Duration::from_secs(30), "the mount does not come");
            std::thread::sleep(Duration::from_millis(10));
        }
        serving
    }
}

/// A process that serves a mount; both end when it is dropped.
#[derive(Debug)]
pub struct Serving {
    child: Option<Child>,
    pub at: PathBuf,
}

impl Serving {
    fn is_mounted(&self) -> bool {
        let mounts = soci_fs::fuse::mount::mounts("soci").expect("the table of mounts");
        mounts.iter().any(|mount| mount.mountpoint == self.at)
    }

    /// Sends a signal to the process.
    ///
    /// # Panics
    /// When it is gone.
    pub fn signal(&self, signal: rustix::process::Signal) {
        let id = rustix::process::Pid::from_child(self.child.as_ref().expect("serving"));
        rustix::process::kill_process(id, signal).expect("a process");
    }

    /// What the mount says of itself.
    ///
    /// # Panics
    /// When it says nothing.
    #[must_use]
    pub fn status(&self) -> serde_json::Value {
        let document = std::fs::read(self.at.join(".soci/status.json")).expect("a file of the mount");
        serde_json::from_slice(&document).expect("JSON")
    }

    /// Waits until nothing has been fetched for a while, and gives the status.
    #[must_use]
    pub fn settled(&self) -> serde_json::Value {
        let (mut before, mut quiet) = (self.status(), 0);
        for _ in 0..200 {
            std::thread::sleep(Duration::from_millis(50));
            let now = self.status();
            quiet = if now["layers"] == before["layers"] { quiet + 1 } else { 0 };
            before = now;
            if quiet == 8 {
                break;
            }
        }
        before
    }

    /// Waits for the process to end by itself; its exit code and what it printed.
    ///
    /// # Panics
    /// When it is lost.
    #[must_use]
    pub fn ended(mut self) -> (i32, String) {
        let output = self.child.take().expect("serving").wait_with_output().expect("an end");
        let said = [output.stdout, output.stderr].concat();
        (output.status.code().unwrap_or(-1), String::from_utf8_lossy(&said).into_owned())
    }

    /// Unmounts, and gives what the process has printed.
    ///
    /// # Panics
    /// When it is not mounted.
    #[must_use]
    pub fn end(self) -> String {
        soci_fs::fuse::mount::unmount(&self.at, soci_fs::fuse::mount::Lazy::Yes).expect("a mount");
        self.ended().1
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = soci_fs::fuse::mount::unmount(&self.at, soci_fs::fuse::mount::Lazy::Yes);
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
