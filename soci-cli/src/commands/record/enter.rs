//! Running a command with a mounted image as its root directory, and nothing of the machine around it.
//!
//! | | as root ([`crate::commands::record::inside`]) | otherwise (`bwrap`) |
//! |---|---|---|
//! | namespaces | mounts, processes, IPC, host name; network, unless it is asked for | the same, and users |
//! | files | the image, and what is written over it in memory | the image, read-only |
//! | `/dev`, `/proc`, `/tmp` | minimal; own processes; empty | the same |
//! | `/sys` | read-only | none |
//! | privileges | few capabilities, none to be gained | none |
//! | session | of its own | of its own |
//!
//! What is not kept away: CPU, memory and, in system calls, the kernel. An image that is not trusted belongs into a
//! machine of its own.

use std::fmt;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::Context;
use serde::Deserialize;

use crate::report::exit::{Exit, fail};
use crate::report::signals::Signals;

/// Default `PATH`.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A command in an image.
#[derive(Debug)]
pub(super) struct RecordedRun {
    words: Vec<String>,
    environment: Vec<String>,
    directory: String,
    network: bool,
}

/// How a command is run.
#[derive(Debug, Clone, Copy)]
pub(super) struct Terms {
    /// It is ended after this time, unless that is zero; on an interrupt always.
    pub(super) time: Duration,
    /// What it prints goes to standard error: standard output is for a document.
    pub(super) quiet: bool,
}

/// How a command ended.
#[derive(Debug, Clone, Copy)]
pub(super) enum Ending {
    Exited(ExitStatus),
    /// It was stopped when its time was over.
    Stopped,
    /// It was stopped by an interrupt.
    Interrupted,
}

#[derive(Deserialize)]
struct Configuration {
    #[serde(default)]
    config: Option<Process>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "PascalCase", default)]
struct Process {
    env: Option<Vec<String>>,
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    working_dir: Option<String>,
}

impl RecordedRun {
    /// The command, else what the image's configuration says; with the machine's network or without any.
    pub(super) fn new(config: &[u8], command: &[String], network: bool) -> anyhow::Result<Self> {
        let config: Configuration = serde_json::from_slice(config).context("reading the image's configuration")?;
        let process = config.config.unwrap_or_default();
        let own = || [process.entrypoint, process.cmd].into_iter().flatten().flatten().collect();
        let words: Vec<String> = if command.is_empty() { own() } else { command.to_vec() };
        if words.is_empty() {
            return Err(fail(Exit::Usage, "the image names no command: give one after --"));
        }
        let mut environment = process.env.unwrap_or_default();
        environment.retain(|variable| variable.contains('=') && !variable.starts_with('='));
        if !environment.iter().any(|variable| variable.starts_with("PATH=")) {
            environment.push(PATH.to_owned());
        }
        let directory = process.working_dir.filter(|directory| directory.starts_with('/'));
        Ok(Self { words, environment, directory: directory.unwrap_or_else(|| "/".to_owned()), network })
    }

    /// The command as a shell would take it, for a note.
    pub(super) fn line(&self) -> String {
        shlex::try_join(self.words.iter().map(String::as_str)).unwrap_or_else(|_| self.words.join(" "))
    }

    /// Runs it on the image mounted at `image`, with the empty directory `room` for what it writes. A signal ends it.
    pub(super) async fn run(
        &self,
        image: &Path,
        room: &Path,
        terms: Terms,
        signals: &mut Signals,
    ) -> anyhow::Result<Ending> {
        let limit = terms.time;
        let mut line =
            if rustix::process::geteuid().is_root() { self.as_root(image, room)? } else { self.in_bubble(image)? };
        if terms.quiet {
            let to_error = std::io::stderr().as_fd().try_clone_to_owned().context("passing on standard error")?;
            line.stdout(Stdio::from(to_error));
        }
        let mut child = line.kill_on_drop(true).spawn().with_context(|| format!("starting {self}"))?;
        let time =
            async { if limit.is_zero() { std::future::pending().await } else { tokio::time::sleep(limit).await } };
        let ending = tokio::select! {
            // First: a terminal sends it to the command, too, which ends by it.
            biased;
            () = signals.next() => Ending::Interrupted,
            status = child.wait() => {
                return Ok(Ending::Exited(status.with_context(|| format!("waiting for {self}"))?));
            }
            () = time => Ending::Stopped,
        };
        child.kill().await.with_context(|| format!("ending {self}"))?;
        Ok(ending)
    }

    fn as_root(&self, image: &Path, room: &Path) -> anyhow::Result<tokio::process::Command> {
        let mut line = tokio::process::Command::new(tool("unshare")?);
        line.args(["--mount", "--propagation", "private", "--pid", "--ipc", "--uts", "--fork", "--kill-child"]);
        line.args((!self.network).then_some("--net")).arg("--");
        line.arg(crate::args::config::own_program().context("cannot determine the path of this program")?);
        line.arg("inside").arg("--image").arg(image).arg("--room").arg(room);
        line.arg("--directory").arg(&self.directory).args(self.network.then_some("--network"));
        line.args(self.environment.iter().map(|variable| format!("--environment={variable}")));
        line.arg("--").args(&self.words);
        Ok(line)
    }

    fn in_bubble(&self, image: &Path) -> anyhow::Result<tokio::process::Command> {
        let bubble = tool("bwrap").map_err(|_| {
            fail(
                Exit::Local,
                "to run a command in an image, be root or install bubblewrap (apt-get install bubblewrap)",
            )
        })?;
        let mut line = tokio::process::Command::new(bubble);
        line.arg("--ro-bind").arg(image).arg("/");
        line.args(["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]);
        line.args([
            "--unshare-pid",
            "--unshare-ipc",
            "--unshare-uts",
            "--new-session",
            "--die-with-parent",
            "--clearenv",
        ]);
        line.args((!self.network).then_some("--unshare-net"));
        for (name, value) in self.environment.iter().filter_map(|variable| variable.split_once('=')) {
            line.args(["--setenv", name, value]);
        }
        line.arg("--chdir").arg(&self.directory).arg("--").args(&self.words);
        Ok(line)
    }
}

/// A program of this system.
fn tool(name: &str) -> anyhow::Result<PathBuf> {
    let places = crate::args::config::search_path()
        .into_iter()
        .chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(Into::into));
    let found = places.map(|place| place.join(name)).find(|file| file.is_file());
    found.ok_or_else(|| fail(Exit::Local, format!("{name} is not installed")))
}

impl fmt::Display for RecordedRun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}`", self.words.join(" "))
    }
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited(status) => write!(f, "{status}"),
            Self::Stopped => f.write_str("stopped"),
            Self::Interrupted => f.write_str("interrupted"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_image_says() {
        let config = br#"{"config":{"Env":["A=1","bad"],"Entrypoint":["e"],"Cmd":["c","d"],"WorkingDir":"/w"}}"#;
        let own = RecordedRun::new(config, &[], false).unwrap();
        assert_eq!((own.words, own.directory.as_str()), (vec!["e".to_owned(), "c".into(), "d".into()], "/w"));
        assert_eq!(own.environment, ["A=1", PATH]);
        let other = RecordedRun::new(b"{}", &["x".to_owned()], false).unwrap();
        assert_eq!(
            RecordedRun::new(b"{}", &["sh".to_owned(), "-c".into(), "a b".into()], false).unwrap().line(),
            "sh -c 'a b'"
        );
        assert_eq!((other.to_string(), other.directory.as_str()), ("`x`".to_owned(), "/"));
        assert_eq!(crate::report::exit::code(&RecordedRun::new(b"{}", &[], false).unwrap_err()), Exit::Usage);
    }
}
