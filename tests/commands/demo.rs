//! `soci demo`, the first thing that a new user runs, and the other commands that explain themselves.

use std::path::Path;

use soci_tests::{soci, stdout};

/// It makes an image, mounts it, runs a program, and fetches less than all of it.
#[test]
fn demo_measures_a_lazy_start() {
    let report: serde_json::Value = serde_json::from_str(&stdout(soci().args(["demo", "--json"]))).unwrap();
    let number = |value: &serde_json::Value| value.as_u64().unwrap();
    assert!(number(&report["layers"]) >= 2, "{report}");
    assert!(number(&report["lazy"]["fetched_bytes"]) < number(&report["image_bytes"]), "{report}");
    assert!(number(&report["inflated_spans"]) < number(&report["spans"]), "{report}");
    // The span index is what is shown first; AWS's stands beside it.
    assert!(number(&report["index_bytes"]) * 10 < number(&report["aws_index_bytes"]), "{report}");
    assert!(number(&report["lazy"]["fetched_bytes"]) < number(&report["lazy_aws"]["fetched_bytes"]), "{report}");
    if !Path::new("/dev/fuse").exists() || !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED in part: without /dev/fuse and root the demo reads through the library");
        return;
    }
    assert_eq!(report["mounted"], true, "{report}");
    assert!(number(&report["pull"]["fetched_bytes"]) >= number(&report["image_bytes"]), "{report}");
    assert!(report["lazy"]["run_seconds"].as_f64().unwrap() > 0.0);
}

/// Where the device for mounts is missing or may not be opened, the same files are read through the library.
#[test]
fn demo_without_the_device() {
    if !Path::new("/dev/fuse").exists() || !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: hiding /dev/fuse in a namespace needs root");
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    // All in a mount namespace of its own. A device on a file system without devices is refused to root, too; what is no
    // device of FUSE's can be opened, and not mounted by.
    let forbidden = "mount -t tmpfs -o nodev none $1 && mknod $1/fuse c 10 229 && mount --bind $1/fuse /dev/fuse";
    let other = ": > $1/fuse && mount --bind $1/fuse /dev/fuse";
    for (hide, code) in [(forbidden, Some("Permission denied")), (other, None)] {
        let script = format!("{hide} && exec $0 demo");
        let mut command = std::process::Command::new("unshare");
        command.args(["--mount", "sh", "-c", &script]).arg(soci_tests::soci_path()).arg(scratch.path());
        let text = stdout(command.env("CI", "true"));
        assert!(text.contains("read lazily"), "{hide}: {text}");
        assert!(code.is_none_or(|code| text.contains(code)), "{hide}: {text}");
    }
}

/// People get a table and bars.
#[test]
fn demo_for_people() {
    let text = stdout(soci().args(["demo", "--command", "echo hello"]));
    for part in ["mount lazily", "OF IMAGE", "█", "spans inflated:"] {
        assert!(text.contains(part) || text.contains("read lazily"), "{part}: {text}");
    }
    assert!(text.contains('█'), "{text}");
}

#[test]
fn help_pages_and_completions() {
    let help = stdout(soci().arg("--help"));
    for word in ["publish", "mount", "Exit codes", "soci demo"] {
        assert!(help.contains(word), "{word}: {help}");
    }
    assert!(help.lines().all(|line| line.chars().count() <= 110), "{help}");
    // nerdctl takes the first such number and wants at least 0.10.0.
    let version = stdout(soci().arg("--version"));
    let number: Vec<u32> =
        version.split('v').next_back().unwrap().trim().split('.').map(|part| part.parse().unwrap()).collect();
    assert!(number >= vec![0, 10, 0], "{version}");
    for shell in ["bash", "zsh", "fish"] {
        assert!(stdout(soci().args(["completions", shell])).contains("publish"), "{shell}");
    }
    let pages = tempfile::tempdir().unwrap();
    assert!(stdout(soci().arg("man").arg(pages.path())).contains("manual pages"));
    let page = std::fs::read_to_string(pages.path().join("soci-publish.1")).unwrap();
    assert!(page.contains("min\\-layer\\-size"), "{page}");
}
