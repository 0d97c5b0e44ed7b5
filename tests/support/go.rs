//! Programs written in Go: containerd 2.2 with its client and its shim, a client that pulls as Kubernetes does, one
//! that asks as the kubelet does, the distribution project's registry, and the snapshotters of AWS and stargz.
//!
//! They are built from the module in `conformance/` and the one below it, which pin their versions, once for all tests:
//! the directory is named after what they are built from, and appears only when all of them are in it. A process that
//! comes while another one builds waits for it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use soci_index::format::digest::Digest;

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

#[must_use]
pub fn module() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("conformance")
}

/// What is built from a module, once for all tests of this process.
struct Built(OnceLock<Option<PathBuf>>);

impl Built {
    const fn new() -> Self {
        Self(OnceLock::new())
    }

    /// The directory with the programs of `packages`; `None`, with a word on standard error, where something is
    /// lacking.
    fn get(
        &self,
        lacks: impl FnOnce() -> Option<String>,
        module: &Path,
        sources: &[&str],
        (options, packages): (&[&str], &[&str]),
    ) -> Option<PathBuf> {
        let build = || match lacks() {
            Some(lack) => {
                eprintln!("SKIPPED: {lack}");
                None
            }
            None => Some(built(module, sources, options, packages)),
        };
        self.0.get_or_init(build).clone()
    }
}

/// Says so if there is no Go of this age.
fn lacks_go(what: &str, minor_min: u32) -> Option<String> {
    go_minor().is_none_or(|minor| minor < minor_min).then(|| format!("{what} needs Go 1.{minor_min}"))
}

/// The directory with the programs; `None`, with a word on standard error, where there is no Go to build them.
///
/// # Panics
/// When they cannot be built.
#[must_use]
pub fn programs() -> Option<PathBuf> {
    static PROGRAMS: Built = Built::new();
    let lacks = || lacks_go("containerd 2.2, and pulling as Kubernetes does it,", GO_MINOR_MIN);
    let sources = ["go.mod", "go.sum", "cri/main.go", "pull/main.go"];
    PROGRAMS.get(lacks, &module(), &sources, (&["-tags", TAGS], &PACKAGES))
}

/// What the module of the distribution project's registry asks for.
const DISTRIBUTION_GO_MINOR_MIN: u32 = 25;

/// The directory with the program `registry`; `None`, with a word on standard error, where there is no Go to build it.
///
/// # Panics
/// When it cannot be built.
#[must_use]
pub fn distribution() -> Option<PathBuf> {
    static PROGRAM: Built = Built::new();
    let lacks = || lacks_go("the distribution project's registry", DISTRIBUTION_GO_MINOR_MIN);
    let package = "github.com/distribution/distribution/v3/cmd/registry";
    PROGRAM.get(lacks, &module().join("distribution"), &["go.mod", "go.sum"], (&[], &[package]))
}

/// What AWS's module asks for.
const PEER_GO_MINOR_MIN: u32 = 26;

/// AWS's library as a program; `None`, with a word on standard error, where it cannot be built: it needs Go, a C
/// compiler and zlib.
///
/// # Panics
/// When it cannot be built although these are there.
#[must_use]
pub fn peer() -> Option<PathBuf> {
    static PROGRAM: Built = Built::new();
    let built = PROGRAM.get(lacks_for_peers, &module().join("peer"), &["go.mod", "go.sum", "main.go"], (&[], &["."]));
    built.map(|directory| directory.join("peer"))
}

/// AWS's snapshotter v0.16.1 as a daemon; `None`, with a word on standard error, where it cannot be built.
///
/// # Panics
/// When it cannot be built although Go and zlib are there.
#[must_use]
pub fn aws() -> Option<PathBuf> {
    static PROGRAM: Built = Built::new();
    let package = "github.com/awslabs/soci-snapshotter/cmd/soci-snapshotter-grpc";
    let built = PROGRAM.get(lacks_for_peers, &module().join("aws"), &["go.mod", "go.sum"], (&[], &[package]));
    built.map(|directory| directory.join("soci-snapshotter-grpc"))
}

/// stargz-snapshotter v0.18.1 as a daemon, and its converter; `None`, with a word on standard error, where it cannot be
/// built.
///
/// # Panics
/// When it cannot be built although Go is there.
#[must_use]
pub fn stargz() -> Option<PathBuf> {
    static PROGRAM: Built = Built::new();
    let module = module().join("stargz");
    let built = PROGRAM.get(lacks_for_peers, &module, &["go.mod", "go.sum", "main.go"], (&[], &["."]));
    built.map(|directory| directory.join("stargz"))
}

fn lacks_for_peers() -> Option<String> {
    let has_zlib = Path::new("/usr/include/zlib.h").exists();
    (!has_zlib || go_minor().is_none_or(|minor| minor < PEER_GO_MINOR_MIN))
        .then(|| format!("the peers need Go 1.{PEER_GO_MINOR_MIN} and zlib1g-dev"))
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
