//! containerd, driven by its own client `ctr` in each phase of a start.
//!
//! A well-kept tool is a better measure than calls of our own, and what it costs, a process, all snapshotters pay. Only
//! lazy pulls go by [`soci_fs::node::rpull`], because `ctr` passes nothing of the image to snapshotters.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use crate::demo::process::output;

/// How long each phase may take.
pub const LIMIT: Duration = Duration::from_secs(900);

/// A containerd.
#[derive(Debug, Clone)]
pub struct Node {
    pub socket: PathBuf,
    /// Whose images and containers are used.
    pub namespace: String,
}

impl Node {
    fn ctr(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let mut command = Command::new("ctr");
        command.arg("--address").arg(&self.socket).args(["--namespace", &self.namespace]).args(arguments);
        output(&mut command, LIMIT)
    }

    /// Pulls an image as containerd does it by itself: everything, unpacked.
    ///
    /// # Errors
    /// What `ctr` said.
    pub fn pull(&self, snapshotter: &str, image: &str) -> anyhow::Result<()> {
        let mut arguments = vec!["images", "pull", "--plain-http", "--snapshotter", snapshotter];
        // Since 2.0 a server pulls for `ctr` unless that is disabled, with a snapshotter of its configuration's choice.
        if self.ctr(&["images", "pull", "--help"])?.contains("--local") {
            arguments.push("--local");
        }
        arguments.push(image);
        self.ctr(&arguments).map(drop)
    }

    /// Makes a container.
    ///
    /// # Errors
    /// What `ctr` said.
    pub fn create(&self, snapshotter: &str, image: &str, name: &str, command: &[String]) -> anyhow::Result<()> {
        // Before 2.0 `ctr` takes the program's options for its own unless its own end with `--`.
        let mut arguments = vec!["containers", "create", "--snapshotter", snapshotter, "--", image, name];
        arguments.extend(command.iter().map(String::as_str));
        self.ctr(&arguments).map(drop)
    }

    /// Runs a container's program to its end.
    ///
    /// # Errors
    /// What `ctr` or the program said.
    pub fn run(&self, name: &str) -> anyhow::Result<()> {
        self.ctr(&["tasks", "start", name]).map(drop)
    }

    /// Removes a container that does not run.
    ///
    /// # Errors
    /// What `ctr` said.
    pub fn remove_container(&self, name: &str) -> anyhow::Result<()> {
        self.ctr(&["containers", "rm", name]).map(drop)
    }

    /// Removes an image, and waits until containerd has collected what only it needed.
    ///
    /// # Errors
    /// What `ctr` said.
    pub fn remove_image(&self, image: &str) -> anyhow::Result<()> {
        self.ctr(&["images", "rm", "--sync", image]).map(drop)
    }
}
