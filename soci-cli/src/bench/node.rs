//! containerd, driven by its own client `ctr` in each phase of a start.
//!
//! A well-kept tool is a better measure than calls of our own, and what it costs, a process, all snapshotters pay. Only
//! lazy pulls go by [`soci_fs::node::rpull`], because `ctr` passes nothing of the image to snapshotters.

use std::io::Read as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};

/// How long each phase may take.
const LIMIT: Duration = Duration::from_secs(900);
/// How often a process is asked whether it has ended: what a figure may be too large by.
const INTERVAL: Duration = Duration::from_micros(500);
/// What is kept of what a program says.
const OUTPUT_BYTES_MAX: u64 = 1 << 20;

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
        output(&mut command)
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

/// Runs a command to its end, and gives what it printed; it fails if the command does, with what it said.
///
/// # Errors
/// What it said.
pub fn output(command: &mut Command) -> anyhow::Result<String> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("starting {}", command.get_program().display()))?;
    let (out, err) = (child.stdout.take(), child.stderr.take());
    let out = std::thread::spawn(move || said(out));
    let err = std::thread::spawn(move || said(err));
    let start = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if start.elapsed() > LIMIT {
            child.kill()?;
            child.wait()?;
            bail!("{command:?} did not end within {} s", LIMIT.as_secs());
        }
        std::thread::sleep(INTERVAL);
    };
    let (out, err) = (out.join().unwrap_or_default(), err.join().unwrap_or_default());
    if !status.success() {
        bail!("{command:?} ended with {status}: {}", err.trim());
    }
    Ok(out)
}

/// All that comes from a pipe; its beginning is kept.
fn said(pipe: Option<impl std::io::Read>) -> String {
    let Some(mut pipe) = pipe else { return String::new() };
    let mut bytes = Vec::new();
    // A pipe that breaks has ended, too.
    let _ = pipe.by_ref().take(OUTPUT_BYTES_MAX).read_to_end(&mut bytes);
    let _ = std::io::copy(&mut pipe, &mut std::io::sink());
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_programs_say_is_kept() {
        let of = |script: &str| output(Command::new("/bin/sh").args(["-c", script]));
        assert_eq!(of("echo one; echo two >&2").unwrap(), "one\n");
        let error = of("echo because >&2; exit 3").unwrap_err().to_string();
        assert!(error.contains("because") && error.contains('3'), "{error}");
    }
}
