//! The static binary, in a directory that holds nothing else.
//!
//! It is built by `just static`, which takes minutes, so this says SKIPPED unless `SOCI_STATIC` names it.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use soci_cli::demo::registry::DemoRegistry;
use soci_index::find::discover::{Discovery, Which, on_registry};
use soci_tests::image::{Image, tar, text};
use soci_tests::registry::client;
use soci_tests::run;

fn program() -> Option<PathBuf> {
    let Some(program) = std::env::var_os("SOCI_STATIC") else {
        eprintln!("SKIPPED: SOCI_STATIC names no static binary (just static builds one)");
        return None;
    };
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: chroot needs root");
        return None;
    }
    Some(program.into())
}

/// Publishes from a root directory with nothing in it but the program: no libraries, no certificates, no name service.
#[tokio::test(flavor = "multi_thread")]
async fn publishes_from_an_empty_root() {
    let Some(program) = program() else { return };
    let root = tempfile::tempdir().unwrap();
    std::fs::copy(&program, root.path().join("soci")).unwrap();
    let registry = DemoRegistry::start(Duration::ZERO).await.unwrap();
    let repository = client(&registry.host()).repository("team/app");
    let image = Image::gzip(vec![tar(&[("bin/tool", text(1, 900_000))])]);
    image.push(&repository, "v1").await;
    let mut command = Command::new("chroot");
    command.arg(root.path()).args(["/soci", "publish", &format!("{}/team/app:v1", registry.host())]);
    let output =
        run(command.args(["--min-layer-size", "1000"]).env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"));
    assert!(output.status.success(), "{output:?}");
    let found = on_registry(&repository, &image.digest(), Which::Newest).await.unwrap();
    assert!(matches!(found, Discovery::Found(_)), "{found:?}");
    let left: Vec<_> = std::fs::read_dir(root.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["soci"], "nothing is written");
}
