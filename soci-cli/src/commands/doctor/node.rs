//! Checks this machine as a node: kernel and programs, containerd's configuration, the daemon.

mod containerd;

use soci_fs::node::remote::trees::ShownTree;

use crate::args::Doctor;
use crate::args::config::{self, Config};
use crate::commands::finding::{Finding, bad, good, note};
use crate::daemon::operations::DaemonStatus;

impl Finding {
    fn with_lines(self, lines: &'static str) -> Self {
        Self { paste: Some(lines), ..self }
    }
}

/// All checks of the machine.
///
/// # Errors
/// Only in a program that knows no nodes.
pub(super) fn findings(arguments: &Doctor, config: &Config) -> anyhow::Result<Vec<Finding>> {
    let mut findings = machine();
    findings.extend(names(config));
    findings.extend(containerd::findings(&arguments.containerd_config));
    findings.extend(daemon(config));
    Ok(findings)
}

/// Whether this machine runs the snapshotter, or is meant to.
pub(super) fn is_one(arguments: &Doctor, config: &Config) -> bool {
    containerd::has_plugin(&arguments.containerd_config) || crate::daemon::ask::status(&config.root).is_ok()
}

/// The kernel and the programs of this machine.
fn machine() -> Vec<Finding> {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release = release.trim().to_owned();
    let kernel = match kernel_version(&release) {
        Some(version) if version >= (6, 9) => good("kernel", release),
        Some(version) if version >= (5, 11) => note(
            "kernel",
            release,
            "before 6.9 reads that are under way while the snapshotter dies fail; later ones do not",
        ),
        Some(_) => bad("kernel", release, "5.11 or later is needed"),
        None => note("kernel", format!("{release:?} is no version"), "5.11 or later is needed"),
    };
    let fuse = match soci_fs::fuse::mount::may_open_device() {
        Ok(()) => good("/dev/fuse", "can be opened"),
        Err(error) => {
            bad("/dev/fuse", error.to_string(), "load the module (modprobe fuse), or give the container the device")
        }
    };
    let overlay = match std::fs::read_to_string("/proc/filesystems") {
        Ok(list) if list.lines().any(|line| line.ends_with("\toverlay")) => good("overlayfs", "is there"),
        Ok(_) => bad("overlayfs", "is not there", "load the module: modprobe overlay"),
        Err(error) => note("overlayfs", format!("/proc/filesystems: {error}"), "is /proc mounted?"),
    };
    let mut findings = vec![kernel, fuse, overlay];
    if !rustix::process::geteuid().is_root() {
        let there = config::search_path().iter().any(|directory| directory.join("fusermount3").exists());
        findings.push(if there {
            good("fusermount3", "is there")
        } else {
            bad("fusermount3", "is not there", "an ordinary user mounts with it: install the package fuse3")
        });
    }
    findings
}

/// What answers for the names in layers. The daemon that runs has found out; without one it is tried.
fn names(config: &Config) -> Option<Finding> {
    const WHAT: &str = "file names";
    const KERNEL: &str = "answered by the kernel (EROFS)";
    const FIX: &str =
        "works, and is slower: Linux 6.12 with CONFIG_EROFS_FS_BACKED_BY_FILE, on a disk, has the kernel do it";
    if let Ok(status) = crate::daemon::ask::status(&config.root)
        && !status.layers.is_empty()
    {
        let by_daemon = status.layers.iter().filter(|held| held.tree == ShownTree::Fuse).count();
        return Some(match by_daemon {
            0 => good(WHAT, KERNEL),
            count => {
                note(WHAT, format!("answered by the daemon for {count} of {} open layers", status.layers.len()), FIX)
            }
        });
    }
    if !rustix::process::geteuid().is_root() {
        return None;
    }
    let tried = tempfile::tempdir().and_then(|directory| soci_fs::fuse::mount::try_erofs(directory.path()));
    Some(match tried {
        Ok(()) => good(WHAT, KERNEL),
        Err(error) => note(WHAT, format!("answered by the daemon: {error}"), FIX),
    })
}

fn kernel_version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|letter: char| !letter.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn daemon(config: &Config) -> Vec<Finding> {
    match crate::daemon::ask::status(&config.root) {
        Ok(status) => {
            let runs = good("daemon", format!("{} runs, {} layers", status.version, status.slots));
            vec![runs, proofs(&status)]
        }
        Err(error) => vec![note("daemon", crate::report::exit::message(&error), "`soci mount` does not need it")],
    }
}

/// Whether what the daemon shows is, or will be, proven.
fn proofs(status: &DaemonStatus) -> Finding {
    let count =
        |word: &str| status.layers.iter().filter(|held| crate::commands::status::trust(&held.layer) == word).count();
    let (condemned, suspended) = (count("condemned"), count("suspended"));
    let found = format!("{} of {} open layers proven", count("proven"), status.layers.len());
    if condemned + suspended > 0 {
        let found = format!("{found}, {condemned} condemned, {suspended} suspended");
        return bad("proofs", found, "`soci status` has the reasons; remove these images and pull them anew");
    }
    if status.proves {
        return good("proofs", found);
    }
    let fix = "the background fetch is disabled, so layers that are read by an index are never proven";
    note(
        "proofs",
        found,
        format!("{fix}: set `disable = false` in [background_fetch], or require signatures in [trust]"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions() {
        for (release, version) in [("6.18.44-x", Some((6, 18))), ("5.4.0", Some((5, 4))), ("6", None), ("", None)] {
            assert_eq!(kernel_version(release), version, "{release}");
        }
    }
}
