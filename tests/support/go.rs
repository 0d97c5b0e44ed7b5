//! Programs written in Go: containerd 2.2 with its client and its shim, a client that pulls as Kubernetes does, one that
//! asks as the kubelet does, the distribution project's registry, and the snapshotters of AWS and stargz.
//!
//! They are built from the module in `conformance/` and the one below it, which pin their versions, once for all tests:
//! the directory is named after what they are built from, and appears only when all of them are in it. Whoever comes
//! while another process builds waits for it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use soci_index::digest::Digest;

use crate::{soci_path, stdout};

/// What containerd's module asks for.
pub const GO_MINOR_MIN: u32 = 24;

/// Commands of containerd, and our own.
const PACKAGES: [&str; 5] = [
    "github.com/containerd/containerd/v2/cmd/containerd",
    "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2",
    "github.com/containerd/containerd/v2/cmd/ctr",
    "./cri",
    "./pull",
];

/// What is left out of containerd: file systems that no test uses, and which need headers of C.
const TAGS: &str = "no_btrfs,no_devmapper,no_zfs";

/// The second number of the version of Go, if there is one.
#[must_use]
pub fn go_minor() -> Option<u32> {
    let output = Command::new("go").args(["env", "GOVERSION"]).output().ok()?;
    let version = String::from_utf8(output.stdout).ok()?;
    version.strip_prefix("go1.")?.split(['.', '\n']).next()?.parse().ok()
}

/// The module.
#[must_use]
pub fn module() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("conformance")
}

/// The directory with the programs; `None`, with a word on standard error, where there is no Go to build them.
///
/// # Panics
/// When they cannot be built.
#[must_use]
pub fn programs() -> Option<PathBuf> {
    static PROGRAMS: OnceLock<Option<PathBuf>> = OnceLock::new();
    PROGRAMS
        .get_or_init(|| {
            if go_minor().is_none_or(|minor| minor < GO_MINOR_MIN) {
                eprintln!("SKIPPED: containerd 2.2, and pulling as Kubernetes does it, need Go 1.{GO_MINOR_MIN}");
                return None;
            }
            let sources = ["go.mod", "go.sum", "cri/main.go", "pull/main.go"];
            Some(built(&module(), &sources, &["-tags", TAGS], &PACKAGES))
        })
        .clone()
}

/// What the module of the distribution project's registry asks for.
const DISTRIBUTION_GO_MINOR_MIN: u32 = 25;

/// The directory with the program `registry`; `None`, with a word on standard error, where there is no Go to build it.
///
/// # Panics
/// When it cannot be built.
#[must_use]
pub fn distribution() -> Option<PathBuf> {
    static PROGRAM: OnceLock<Option<PathBuf>> = OnceLock::new();
    PROGRAM
        .get_or_init(|| {
            if go_minor().is_none_or(|minor| minor < DISTRIBUTION_GO_MINOR_MIN) {
                eprintln!("SKIPPED: the distribution project's registry needs Go 1.{DISTRIBUTION_GO_MINOR_MIN}");
                return None;
            }
            let package = "github.com/distribution/distribution/v3/cmd/registry";
            Some(built(&module().join("distribution"), &["go.mod", "go.sum"], &[], &[package]))
        })
        .clone()
}

/// What AWS's module asks for.
const PEER_GO_MINOR_MIN: u32 = 26;

/// AWS's library as a program; `None`, with a word on standard error, where it cannot be built: it needs Go, a C compiler
/// and zlib.
///
/// # Panics
/// When it cannot be built although these are there.
#[must_use]
pub fn peer() -> Option<PathBuf> {
    static PROGRAM: OnceLock<Option<PathBuf>> = OnceLock::new();
    PROGRAM
        .get_or_init(|| {
            if !builds_peers() {
                return None;
            }
            let sources = ["go.mod", "go.sum", "main.go"];
            Some(built(&module().join("peer"), &sources, &[], &["."]).join("peer"))
        })
        .clone()
}

/// AWS's snapshotter v0.16.1 as a daemon; `None`, with a word on standard error, where it cannot be built.
///
/// # Panics
/// When it cannot be built although Go and zlib are there.
#[must_use]
pub fn aws() -> Option<PathBuf> {
    static PROGRAM: OnceLock<Option<PathBuf>> = OnceLock::new();
    PROGRAM
        .get_or_init(|| {
            if !builds_peers() {
                return None;
            }
            let package = "github.com/awslabs/soci-snapshotter/cmd/soci-snapshotter-grpc";
            let directory = built(&module().join("aws"), &["go.mod", "go.sum"], &[], &[package]);
            Some(directory.join("soci-snapshotter-grpc"))
        })
        .clone()
}

/// stargz-snapshotter v0.18.1 as a daemon, and its converter; `None`, with a word on standard error, where it cannot be
/// built.
///
/// # Panics
/// When it cannot be built although Go is there.
#[must_use]
pub fn stargz() -> Option<PathBuf> {
    static PROGRAM: OnceLock<Option<PathBuf>> = OnceLock::new();
    PROGRAM
        .get_or_init(|| {
            if !builds_peers() {
                return None;
            }
            let sources = ["go.mod", "go.sum", "main.go"];
            Some(built(&module().join("stargz"), &sources, &[], &["."]).join("stargz"))
        })
        .clone()
}

fn builds_peers() -> bool {
    let builds =
        Path::new("/usr/include/zlib.h").exists() && go_minor().is_some_and(|minor| minor >= PEER_GO_MINOR_MIN);
    if !builds {
        eprintln!("SKIPPED: the peers need Go 1.{PEER_GO_MINOR_MIN} and zlib1g-dev");
    }
    builds
}

fn built(module: &Path, sources: &[&str], options: &[&str], packages: &[&str]) -> PathBuf {
    let target = soci_path().ancestors().nth(2).expect("target/PROFILE/soci").join("go");
    fs::create_dir_all(&target).expect("a directory");
    let lock = File::create(target.join("lock")).expect("a file");
    // Given back when the file is closed, however this process ends.
    lock.lock().expect("a lock");
    let sources: Vec<_> = sources.iter().map(|name| fs::read(module.join(name)).expect("a source")).collect();
    let name = &Digest::of(&sources.concat()).hex()[..16];
    let done = target.join(name);
    if done.exists() {
        return done;
    }
    let unfinished = target.join("unfinished");
    if unfinished.exists() {
        fs::remove_dir_all(&unfinished).expect("what an interrupted build has left");
    }
    fs::create_dir(&unfinished).expect("a directory");
    let mut build = Command::new("go");
    build.args(["build", "-buildvcs=false", "-trimpath", "-ldflags", "-s -w"]).args(options);
    // With a slash at the end it is a directory, also for a single program.
    drop(stdout(build.arg("-o").arg(unfinished.join("")).args(packages).current_dir(module)));
    fs::rename(&unfinished, &done).expect("a directory of ours");
    done
}
