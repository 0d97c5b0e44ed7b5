//! A program that is run to its end, with a limit, and timed.

use std::io::Read;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};

/// How often a process is asked whether it has ended: what a figure may be too large by.
const INTERVAL: Duration = Duration::from_micros(500);
/// What is kept of each stream that a program writes.
const OUTPUT_BYTES_MAX: u64 = 16 << 20;

/// A program that has ended.
#[derive(Debug)]
pub struct Ended {
    pub status: ExitStatus,
    /// From its start to its end.
    pub time: Duration,
    /// What it wrote to standard output.
    pub out: String,
    /// What it wrote to standard error.
    pub err: String,
}

impl Ended {
    /// All that it wrote, errors last.
    #[must_use]
    pub fn written(&self) -> String {
        self.out.clone() + &self.err
    }
}

/// Runs a command to its end, whatever that is; it is killed when it takes longer than `limit`.
///
/// # Errors
/// When it cannot be started, or does not end in time.
pub fn run(command: &mut Command, limit: Duration) -> anyhow::Result<Ended> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let start = Instant::now();
    let mut child = command.spawn().with_context(|| format!("starting {}", command.get_program().display()))?;
    let (out, err) = (child.stdout.take(), child.stderr.take());
    let out = std::thread::spawn(move || written(out));
    let err = std::thread::spawn(move || written(err));
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if start.elapsed() > limit {
            child.kill()?;
            child.wait()?;
            bail!("{command:?} did not end within {} s", limit.as_secs());
        }
        std::thread::sleep(INTERVAL);
    };
    let time = start.elapsed();
    Ok(Ended { status, time, out: out.join().unwrap_or_default(), err: err.join().unwrap_or_default() })
}

/// Runs a command to its end, and gives what it wrote to standard output.
///
/// # Errors
/// As [`run`]; or when the command fails, with what it wrote to standard error.
pub fn output(command: &mut Command, limit: Duration) -> anyhow::Result<String> {
    let ended = run(command, limit)?;
    if !ended.status.success() {
        bail!("{command:?} ended with {}: {}", ended.status, ended.err.trim());
    }
    Ok(ended.out)
}

/// All that comes from a pipe; its beginning is kept.
fn written(pipe: Option<impl Read>) -> String {
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
        let of = |script: &str| output(Command::new("/bin/sh").args(["-c", script]), Duration::from_secs(60));
        assert_eq!(of("echo one; echo two >&2").unwrap(), "one\n");
        let error = of("echo because >&2; exit 3").unwrap_err().to_string();
        assert!(error.contains("because") && error.contains('3'), "{error}");
    }
}
