//! `soci doctor`: one line for each thing that lazy loading needs, and what to do where it is missing.
//!
//! Nothing is changed; with `--push` an upload is begun and given up. A check that cannot be made says so; it does not count
//! as passed.

mod publishing;

use std::path::Path;

use serde::Serialize;

use super::image;
use crate::args::Doctor;
use crate::config::{self, Config};
use crate::daemon::operations::DaemonStatus;
use crate::exit::{Exit, fail};
use crate::output;

/// How a check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Good,
    /// It works, but not as well as it might.
    Note,
    Bad,
}

/// A check.
#[derive(Debug, Serialize)]
struct Finding {
    verdict: Verdict,
    what: &'static str,
    found: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    fix: Option<String>,
}

fn good(what: &'static str, found: impl Into<String>) -> Finding {
    Finding { verdict: Verdict::Good, what, found: found.into(), fix: None }
}

fn note(what: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Finding {
    Finding { verdict: Verdict::Note, what, found: found.into(), fix: Some(fix.into()) }
}

fn bad(what: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Finding {
    Finding { verdict: Verdict::Bad, ..note(what, found, fix) }
}

/// Runs `doctor`.
///
/// # Errors
/// When something is wrong, with exit code 1, after all has been said.
pub fn run(arguments: &Doctor, config: &Config) -> anyhow::Result<()> {
    let mut findings = machine();
    findings.extend(containerd(&arguments.containerd_config));
    findings.extend(daemon(config));
    if let Some(name) = &arguments.image {
        findings.extend(image::run_to_end(publishing::findings(arguments, name, config))?);
    }
    if arguments.json {
        output::json(&findings)?;
    } else {
        for finding in &findings {
            let mark = match finding.verdict {
                Verdict::Good => "ok   ",
                Verdict::Note => "note ",
                Verdict::Bad => "WRONG",
            };
            let fix = finding.fix.as_ref().map(|fix| format!("; {fix}")).unwrap_or_default();
            output::line(format!("{mark} {:<12} {}{fix}", finding.what, finding.found))?;
        }
    }
    match findings.iter().filter(|finding| finding.verdict == Verdict::Bad).count() {
        0 => Ok(()),
        count => Err(fail(Exit::Failure, format!("{count} of the checks found something wrong"))),
    }
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
    let fuse = match soci_fs::mount::may_open_device() {
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

fn kernel_version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|letter: char| !letter.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// What containerd is told about the snapshotter.
fn containerd(file: &Path) -> Vec<Finding> {
    let shown = file.display();
    let text = match std::fs::read_to_string(file) {
        Ok(text) => text,
        Err(error) => {
            let fix = "without it containerd knows no snapshotter of ours; `soci mount` does not need it";
            return vec![note("containerd", format!("{shown}: {error}"), fix)];
        }
    };
    match text.parse::<toml::Table>() {
        Ok(table) => containerd_tells(&table, &shown.to_string()),
        Err(error) => vec![bad("containerd", format!("{shown}: {}", error.message()), "mend the file")],
    }
}

fn containerd_tells(table: &toml::Table, shown: &str) -> Vec<Finding> {
    let plugin = table.get("proxy_plugins").and_then(|plugins| plugins.get("soci"));
    let address = plugin.and_then(|plugin| plugin.get("address")).and_then(toml::Value::as_str);
    let mut findings = vec![match address {
        Some(address) if Path::new(address).exists() => good("plugin", format!("soci at {address}")),
        Some(address) => bad("plugin", format!("{address} does not exist"), "start soci-snapshotter-grpc"),
        None => bad("plugin", format!("{shown} has no [proxy_plugins.soci]"), "add it, with type and address"),
    }];
    let plugins = table.get("plugins").and_then(toml::Value::as_table);
    let section = |name: &str| plugins.and_then(|plugins| plugins.get(name));
    let old = section("io.containerd.grpc.v1.cri").and_then(|cri| cri.get("containerd"));
    let images = section("io.containerd.cri.v1.images").or(old);
    let annotations = images.and_then(|images| images.get("disable_snapshot_annotations"));
    let exported = plugin
        .and_then(|plugin| plugin.get("exports"))
        .and_then(|exports| exports.get("enable_remote_snapshot_annotations"));
    findings.push(match (annotations.and_then(toml::Value::as_bool), exported.and_then(toml::Value::as_str)) {
        (Some(false), _) => good("annotations", "CRI passes them to snapshotters"),
        (_, Some("true")) => good("annotations", "the transfer service passes them to snapshotters"),
        _ => bad(
            "annotations",
            "images pulled by CRI come without them, and are pulled whole",
            "set disable_snapshot_annotations = false in CRI's section (before 2.1), or \
             enable_remote_snapshot_annotations = \"true\" in [proxy_plugins.soci.exports]",
        ),
    });
    findings
}

fn daemon(config: &Config) -> Vec<Finding> {
    match super::status::ask(&config.root) {
        Ok(status) => {
            let runs = good("daemon", format!("{} runs, {} layers", status.version, status.slots));
            vec![runs, proofs(&status)]
        }
        Err(error) => vec![note("daemon", crate::exit::words(&error), "`soci mount` does not need it")],
    }
}

/// Whether what the daemon shows is, or will be, proven.
fn proofs(status: &DaemonStatus) -> Finding {
    let count = |word: &str| status.layers.iter().filter(|held| super::status::trust(&held.layer) == word).count();
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

    #[test]
    fn what_containerd_is_told() {
        let plugin = "[proxy_plugins.soci]\ntype = 'snapshot'\naddress = '/dev/null'\n";
        let old = "[plugins.\"io.containerd.grpc.v1.cri\".containerd]\ndisable_snapshot_annotations = false\n";
        let new = "[plugins.'io.containerd.cri.v1.images']\ndisable_snapshot_annotations = false\n";
        let exports = "[proxy_plugins.soci.exports]\nenable_remote_snapshot_annotations = 'true'\n";
        let verdicts = |text: &str| -> Vec<Verdict> {
            containerd_tells(&text.parse().unwrap(), "config.toml").iter().map(|finding| finding.verdict).collect()
        };
        for good in [old, new, exports] {
            assert_eq!(verdicts(&format!("{plugin}{good}")), [Verdict::Good, Verdict::Good], "{good}");
        }
        assert_eq!(verdicts(plugin), [Verdict::Good, Verdict::Bad]);
        assert_eq!(verdicts(""), [Verdict::Bad, Verdict::Bad]);
        assert_eq!(verdicts(&plugin.replace("null", "no-such")), [Verdict::Bad, Verdict::Bad]);
    }
}
