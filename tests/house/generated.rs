//! The code generated from protocol definitions is what the definitions say.
//!
//! It is committed so that a build needs neither a compiler of protocol buffers nor a build script. After a change of a
//! `.proto` file, `SOCI_REGENERATE=1 cargo test -p soci-tests --test house generated` writes it anew.

use std::fs;
use std::path::{Path, PathBuf};

/// Protocol packages, each with the file that holds its code and the first line of that file.
const PACKAGES: [(&str, &str, &str); 3] = [
    ("containerd.client", "client.rs", "//! Generated from `client.proto`: see `tests/house/generated.rs`."),
    ("containerd.types", "types.rs", "//! Generated from `mount.proto`: see `tests/house/generated.rs`."),
    (
        "containerd.services.snapshots.v1",
        "snapshots.rs",
        "//! Generated from `snapshots.proto`: see `tests/house/generated.rs`.",
    ),
];

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../soci-fs/src/node/grpc/generated")
}

#[test]
fn generated_code_is_current() {
    let directory = directory();
    let descriptors = protox::compile(["snapshots.proto", "client.proto"], [&directory]).unwrap();
    let out = tempfile::tempdir().unwrap();
    tonic_prost_build::configure()
        .out_dir(out.path())
        .build_client(false)
        .build_transport(false)
        .btree_map(".")
        .bytes(".")
        .extern_path(".containerd.types", "crate::node::grpc::generated::types")
        .compile_fds(descriptors.clone())
        .unwrap();
    // A package that is named by its path is not generated, so the one with the mounts has a turn of its own.
    let mounts = protox::compile(["mount.proto"], [&directory]).unwrap();
    tonic_prost_build::configure().out_dir(out.path()).compile_fds(mounts).unwrap();

    for (package, file, first_line) in PACKAGES {
        let generated = fs::read_to_string(out.path().join(format!("{package}.rs"))).unwrap();
        let text = format!("{first_line}\n\n{generated}");
        let path = directory.join(file);
        if std::env::var_os("SOCI_REGENERATE").is_some() {
            fs::write(&path, &text).unwrap();
        }
        let kept = fs::read_to_string(&path).unwrap();
        assert!(kept == text, "{} is not what its definition gives: regenerate it", path.display());
    }
}
