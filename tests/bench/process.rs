//! Child processes: what they took, and their end.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions};

/// How often a running process is asked for its memory. What it reports is a high-water mark, so only what happens in
/// the last of these intervals can be missed.
const INTERVAL: Duration = Duration::from_millis(2);

/// How long a command may take: images are made from packages of the network.
const LIMIT: Duration = Duration::from_secs(3600);

/// Mounts that are served by processes of ours.
static MOUNTS: Mutex<Vec<(PathBuf, u32)>> = Mutex::new(Vec::new());

/// What a process took.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Usage {
    /// From its start to its end.
    pub(crate) wall: Duration,
    /// Time on processors.
    pub(crate) processor: Duration,
    /// Peak of resident memory in MiB.
    pub(crate) peak_mib: f64,
}

/// The `soci` program beside this one.
pub(crate) fn soci_path() -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe().context("finding this program")?;
    let path = own.with_file_name("soci");
    anyhow::ensure!(path.exists(), "{} is missing: run `cargo build --release -p soci-cli` first", path.display());
    Ok(path)
}

/// A command line that begins with the `soci` program.
pub(crate) fn soci(root: &Path) -> anyhow::Result<Command> {
    let mut command = Command::new(soci_path()?);
    command.env_remove("SOCI_LOG").env("CI", "true").arg("--root").arg(root);
    Ok(command)
}

/// Runs a command to its end and measures it; its output goes nowhere.
pub(crate) fn measured(command: &mut Command) -> anyhow::Result<Usage> {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let start = Instant::now();
    let child = command.spawn().with_context(|| format!("{command:?}"))?;
    let id = child.id();
    let watch = std::thread::spawn(move || {
        let mut peak = 0;
        // Memory is gone from the record as soon as the process is.
        while let Some(kib) = status_kib(id, "VmHWM:") {
            peak = peak.max(kib);
            std::thread::sleep(INTERVAL);
        }
        peak
    });
    let pid = Pid::from_raw(id.cast_signed()).context("a process has a number")?;
    rustix::process::waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT)?;
    let wall = start.elapsed();
    let processor = processor_time(id)?;
    let peak = watch.join().unwrap_or(0);
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!("{command:?} ended with {}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(Usage { wall, processor, peak_mib: peak as f64 / 1024.0 })
}

/// Runs a command to its end; gives what it printed.
pub(crate) fn output(command: &mut Command) -> anyhow::Result<String> {
    soci_cli::demo::process::output(command, LIMIT)
}

/// A number of KiB out of a process's record; `None` when it has no memory any more.
fn status_kib(id: u32, key: &str) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{id}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(key))?;
    line.trim().trim_end_matches(" kB").parse().ok()
}

/// Resident memory of a process, in MiB.
pub(crate) fn resident_mib(id: u32) -> f64 {
    status_kib(id, "VmRSS:").unwrap_or(0) as f64 / 1024.0
}

/// User and system time of a process that has ended and was not waited for.
fn processor_time(id: u32) -> anyhow::Result<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{id}/stat"))?;
    // The name in parentheses may hold spaces.
    let (_, fields) = stat.rsplit_once(')').context("/proc/PID/stat has a name")?;
    let ticks: u64 = fields.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
    let per_second = rustix::param::clock_ticks_per_second();
    Ok(Duration::from_secs_f64(ticks as f64 / per_second as f64))
}

/// A mount that a `soci` process serves. Unmounted when dropped.
#[derive(Debug)]
pub(crate) struct Mount {
    at: PathBuf,
    id: u32,
    /// How long the command took.
    pub(crate) time: Duration,
}

impl Mount {
    /// Mounts `image` on `at`.
    pub(crate) fn new(root: &Path, image: &str, at: &Path, arguments: &[&str]) -> anyhow::Result<Self> {
        std::fs::create_dir_all(at)?;
        let mut command = soci(root)?;
        command.args(["mount", image]).arg(at).arg("--detach").args(arguments);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        let start = Instant::now();
        let mut child: Child = command.spawn()?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().context("a pipe")?).read_line(&mut line)?;
        let status = child.wait()?;
        let time = start.elapsed();
        let id = line.rsplit_once("(process ").and_then(|(_, rest)| rest.trim_end().trim_end_matches(')').parse().ok());
        let Some(id) = id.filter(|_| status.success()) else { bail!("{command:?} ended with {status}: {line}") };
        MOUNTS.lock().unwrap_or_else(PoisonError::into_inner).push((at.to_owned(), id));
        Ok(Self { at: at.to_owned(), id, time })
    }

    /// Where it is.
    pub(crate) fn at(&self) -> &Path {
        &self.at
    }

    /// Peak of the serving process's resident memory so far, in MiB.
    pub(crate) fn peak_mib(&self) -> f64 {
        status_kib(self.id, "VmHWM:").unwrap_or(0) as f64 / 1024.0
    }

    /// The serving process's resident memory now, in MiB.
    pub(crate) fn resident_mib(&self) -> f64 {
        resident_mib(self.id)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        MOUNTS.lock().unwrap_or_else(PoisonError::into_inner).retain(|(_, id)| *id != self.id);
        end(&self.at, self.id);
    }
}

/// Unmounts all that is mounted still.
pub(crate) fn end_mounts() {
    let mounts = std::mem::take(&mut *MOUNTS.lock().unwrap_or_else(PoisonError::into_inner));
    for (at, id) in mounts {
        end(&at, id);
    }
}

/// Unmounts and waits for the process that served; one that does not end by itself is killed.
fn end(at: &Path, id: u32) {
    let _ = rustix::mount::unmount(at, rustix::mount::UnmountFlags::DETACH);
    let start = Instant::now();
    while Path::new(&format!("/proc/{id}")).exists() {
        if start.elapsed() > Duration::from_secs(10) {
            eprintln!("process {id} did not end after its mount {} was taken away; killing it", at.display());
            if let Some(pid) = Pid::from_raw(id.cast_signed()) {
                let _ = rustix::process::kill_process(pid, Signal::KILL);
            }
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
