//! The snapshotter daemon under test.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::soci_path;

/// Longest wait for a daemon to start or to end.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// The daemon's binary.
///
/// # Panics
/// When it has not been built.
#[must_use]
pub fn daemon_path() -> PathBuf {
    let path = soci_path().with_file_name("soci-snapshotter-grpc");
    assert!(path.exists(), "{} is missing: run `cargo build -p soci-cli` first", path.display());
    path
}

/// A command line of the daemon that nothing outside of the test speaks into.
#[must_use]
pub fn daemon() -> Command {
    clean(Command::new(daemon_path()))
}

/// Removes the environment variables that a daemon reads.
#[must_use]
pub fn clean(mut command: Command) -> Command {
    for name in ["ADDRESS", "CONFIG", "LOG_LEVEL", "ROOT"] {
        command.env_remove(format!("SOCI_SNAPSHOTTER_{name}"));
    }
    for name in ["NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"] {
        command.env_remove(name);
    }
    command
}

/// A daemon that runs until it is stopped, at the latest at the end of the test.
#[derive(Debug)]
pub struct Running {
    /// The process.
    pub child: Child,
    /// Its log.
    pub lines: std::io::Lines<BufReader<ChildStderr>>,
    /// Where its mount is to be removed in the end.
    pub root: PathBuf,
}

impl Running {
    /// Starts a command line whose daemon keeps its state in `root`.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn start(mut command: Command, root: &Path) -> Self {
        let mut child = command.stderr(Stdio::piped()).spawn().expect("a daemon under test");
        let lines = BufReader::new(child.stderr.take().expect("a daemon under test")).lines();
        Self { child, lines, root: root.to_owned() }
    }

    /// The log up to the line with this message, that one included.
    ///
    /// # Panics
    /// When the log ends before, or is not JSON.
    pub fn until(&mut self, message: &str) -> Vec<Value> {
        let mut read = Vec::new();
        for line in self.lines.by_ref() {
            let line = line.expect("a daemon under test");
            let object: Value = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{line}: {error}"));
            read.push(object);
            if read.last().is_some_and(|object| object["msg"] == message) {
                return read;
            }
        }
        panic!("the log ended without {message:?}: {read:?}");
    }

    /// Sends a signal.
    ///
    /// # Panics
    /// When the process is gone.
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("a daemon under test");
    }

    /// Waits for the end.
    ///
    /// # Panics
    /// When it does not come.
    pub fn end(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().expect("a daemon under test") {
                return status;
            }
            assert!(Instant::now() < deadline, "the daemon does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        crate::node::unmount_below(&self.root);
    }
}

/// A daemon that answers on `socket`.
///
/// # Panics
/// When it does not start.
#[must_use]
pub fn started(root: &Path, socket: &Path) -> Running {
    let mut command = daemon();
    command.arg("--root").arg(root).arg("--address").arg(socket);
    let mut running = Running::start(command, root);
    running.until("soci-snapshotter-grpc successfully started");
    running
}
