//! containerd's own suite for snapshotters, run by `go test` against the daemon: see `conformance/`.

use std::path::Path;
use std::process::Command;

use soci_tests::{run, soci_path};

/// Subtests that containerd's suite has; fewer would mean that it ended early.
const SUBTESTS: usize = 21;

#[test]
fn containerd_accepts_the_snapshotter() {
    let has_go = Command::new("go").arg("version").output().is_ok_and(|output| output.status.success());
    if !has_go || !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: containerd's suite for snapshotters needs go and root");
        return;
    }
    let daemon = soci_path().with_file_name("soci-snapshotter-grpc");
    assert!(daemon.exists(), "{} is missing: run `cargo build -p soci-cli` first", daemon.display());
    let mut suite = Command::new("go");
    suite
        .args(["test", "-count=1", "-v", "-timeout=300s", ".", "-test.root"])
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("conformance"))
        .env("SOCI_SNAPSHOTTER_BINARY", daemon);
    let output = run(&mut suite);
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{text}");
    let passed = text.lines().filter(|line| line.trim_start().starts_with("--- PASS: TestSnapshotter/")).count();
    assert_eq!(passed, SUBTESTS, "{text}");
}
