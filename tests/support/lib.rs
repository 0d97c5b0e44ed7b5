//! What the end-to-end tests share: the binary, images to work on, registries to work with.

pub mod answers;
pub mod archive;
pub mod containerd;
pub mod daemon;
pub mod disk;
pub mod erofs;
pub mod erofs_model;
pub mod erofs_mount;
pub mod forge;
pub mod front;
pub mod gate;
pub mod go;
pub mod golden;
pub mod image;
pub mod layers;
pub mod mounting;
pub mod node;
pub mod profile;
pub mod publishing;
pub mod reading;
pub mod registry;
pub mod signer;
pub mod stage;
pub mod trees;
pub mod urls;

use std::path::PathBuf;
use std::process::{Command, Output};

/// The `soci` binary that belongs to the running program: cargo puts it beside programs, and a directory above tests.
///
/// # Panics
/// When it has not been built: `cargo build --workspace` builds it, `cargo test` does not.
#[must_use]
pub fn soci_path() -> PathBuf {
    let test = std::env::current_exe().expect("a test knows its own path");
    let directory = test.ancestors().skip(1).find(|directory| !directory.ends_with("deps")).expect("target/PROFILE");
    let path = directory.join("soci");
    assert!(path.exists(), "{} is missing: run `cargo build -p soci-cli` first", path.display());
    path
}

/// A command line that begins with the `soci` binary.
#[must_use]
pub fn soci() -> Command {
    let mut command = Command::new(soci_path());
    command.env_remove("SOCI_ROOT").env_remove("SOCI_LOG").env("CI", "true");
    command
}

/// Runs a command line to its end and returns what it printed.
///
/// # Panics
/// When it fails.
#[must_use]
pub fn stdout(command: &mut Command) -> String {
    let output = run(command);
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

/// Runs a command line to its end.
///
/// # Panics
/// When it cannot be started.
#[must_use]
pub fn run(command: &mut Command) -> Output {
    command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"))
}
