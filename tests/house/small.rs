//! The programs that are built without all features: what they depend on.

use std::process::Command;

/// The names of all packages that a `soci` with these features is made of.
fn packages(features: &str) -> Vec<String> {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).args(["tree", "-p", "soci-cli", "-e", "normal"]);
    cargo.args(["--prefix", "none", "--format", "{p}", "--offline", "--no-default-features", "--features", features]);
    let output = cargo.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().filter_map(|line| Some(line.split_whitespace().next()?.to_owned())).collect()
}

/// A pipeline's program knows no FUSE, no containerd and no cluster; the one for mounts knows FUSE alone.
#[test]
fn features_are_walls() {
    const NODE: [&str; 8] = ["kube", "k8s-openapi", "tonic", "prost", "redb", "regex", "serde-saphyr", "tonic-prost"];
    let has = |packages: &[String], name: &str| packages.iter().any(|package| package == name);
    for (features, fuse, node) in [("", false, false), ("mount", true, false), ("node", true, true)] {
        let packages = packages(features);
        assert!(has(&packages, "soci-index") && has(&packages, "soci-fs"), "{packages:?}");
        assert_eq!(has(&packages, "fuser"), fuse, "--features {features:?}: fuser");
        for name in NODE {
            assert_eq!(has(&packages, name), node, "--features {features:?}: {name}");
        }
    }
}
