//! containerd's own suite for snapshotters, run by `go test` against the daemon: see `conformance/`.

use std::process::Command;

use soci_tests::daemon::daemon_path;
use soci_tests::go::{GO_MINOR_MIN, go_minor, module};
use soci_tests::run;

/// Subtests that containerd's suite has; fewer would mean that it ended early.
const SUBTESTS: usize = 21;

#[test]
fn containerd_accepts_the_snapshotter() {
    if !rustix::process::geteuid().is_root() || go_minor().is_none_or(|minor| minor < GO_MINOR_MIN) {
        eprintln!("SKIPPED: containerd's suite for snapshotters needs root and Go 1.{GO_MINOR_MIN}");
        return;
    }
    let mut suite = Command::new("go");
    suite
        .args(["test", "-count=1", "-v", "-timeout=300s", ".", "-test.root"])
        .current_dir(module())
        .env("SOCI_SNAPSHOTTER_BINARY", daemon_path());
    let output = run(&mut suite);
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{text}");
    let passed = text.lines().filter(|line| line.trim_start().starts_with("--- PASS: TestSnapshotter/")).count();
    assert_eq!(passed, SUBTESTS, "{text}");
}
