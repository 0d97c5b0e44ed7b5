//! The rules of the house, held by reading the sources as text.
//!
//! Each test is one rule; what breaks it is listed with file and line. The lists of exceptions are written out: a new
//! one is a decision, made here. `SOCI_TREE` names another checkout to look at.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

mod locks;

/// Longest file, tests apart. Longer ones are split.
const FILE_LINES_MAX: usize = 500;

/// What the top of the repository holds; anything else belongs somewhere below.
const TOP: [&str; 27] = [
    ".ci",
    ".git",
    ".gitattributes",
    ".github",
    ".gitignore",
    ".gitlab-ci.yml",
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "Cargo.lock",
    "Cargo.toml",
    "LICENSE",
    "README.md",
    "SECURITY.md",
    "SEMANTICS.md",
    "clippy.toml",
    "deny.toml",
    "docs",
    "examples",
    "justfile",
    "rust-toolchain.toml",
    "rustfmt.toml",
    "soci-cli",
    "soci-fs",
    "soci-index",
    "target",
    "tests",
];

/// The rooms of each crate, from the ground up: a room uses only rooms above it in this list.
const ROOMS: [(&str, &[&str]); 3] = [
    ("soci-index", &["format", "indexing", "registry", "image", "trust", "find", "publish"]),
    ("soci-fs", &["tree", "layer", "foresight", "open", "fuse", "node"]),
    ("soci-cli", &["report", "args", "webhook", "daemon", "demo", "bench", "commands"]),
];

/// Files and folders that turn values into values: they know no file, socket, clock, environment, thread or runtime.
const PURE: [&str; 20] = [
    "soci-index/src/format.rs",
    "soci-index/src/format",
    "soci-index/src/indexing.rs",
    "soci-index/src/indexing/choice.rs",
    "soci-index/src/indexing/hasher.rs",
    "soci-index/src/indexing/scanner.rs",
    "soci-index/src/registry/challenge.rs",
    "soci-index/src/image/names.rs",
    "soci-index/src/find/choose.rs",
    "soci-index/src/find/origin.rs",
    "soci-index/src/trust.rs",
    "soci-index/src/trust/bundle.rs",
    "soci-index/src/trust/chain.rs",
    "soci-index/src/trust/cosign.rs",
    "soci-index/src/trust/key.rs",
    "soci-index/src/trust/notation.rs",
    "soci-index/src/publish/v2.rs",
    "soci-fs/src/tree/device.rs",
    "soci-cli/src/webhook/event.rs",
    "soci-cli/src/webhook/queue.rs",
];

/// What no pure module may touch.
const IMPURE: [&str; 13] = [
    "std::env::",
    "std::fs",
    "std::io",
    "std::net",
    "std::process",
    "std::thread",
    "std::time",
    "tokio::",
    "reqwest::",
    "futures_util::",
    "tempfile::",
    "crate::registry",
    "clock::",
];

/// Foreign protocols and libraries, each with the only files that may name it.
const FOREIGN: [(&str, &[&str]); 31] = [
    ("reqwest", &["soci-index/src/registry/transport.rs"]),
    ("oci_spec", &["soci-index/src/format/reference/grammar.rs"]),
    ("oci_client", &["soci-index/src/registry/oci_client.rs", "examples/src/bin/with_oci_client.rs"]),
    ("docker_credential", &["soci-index/src/registry/credentials/docker.rs"]),
    ("httpdate", &["soci-index/src/registry/retry.rs"]),
    ("jiff", &["soci-index/src/format/ztoc/rfc3339.rs"]),
    ("planus", &["soci-index/src/format/ztoc/flat_read.rs", "soci-index/src/format/ztoc/zinfo.rs"]),
    ("libz_rs_sys", &["soci-index/src/format/inflate.rs"]),
    ("crc32fast", &["soci-index/src/format/gzip.rs"]),
    ("crc32c", &["soci-fs/src/tree/erofs/superblock.rs"]),
    (
        "sha2",
        &[
            "soci-index/src/format/digest.rs",
            "soci-index/src/format/decode.rs",
            "soci-index/src/indexing/hasher.rs",
            "soci-index/src/indexing/choice.rs",
            "soci-fs/src/layer/store/marks.rs",
        ],
    ),
    ("fuser", &["soci-fs/src/fuse.rs", "soci-fs/src/fuse"]),
    ("xxhash_rust", &["soci-fs/src/layer/store/present.rs"]),
    ("tonic", &["soci-fs/src/node/grpc.rs", "soci-fs/src/node/grpc"]),
    ("tonic_prost", &["soci-fs/src/node/grpc"]),
    ("prost", &["soci-fs/src/node/grpc"]),
    ("prost_types", &["soci-fs/src/node/grpc.rs", "soci-fs/src/node/grpc"]),
    // `database.rs` speaks to it, the module's error carries what it said.
    ("http_body_util", &["soci-fs/src/node/grpc"]),
    ("libc", &["soci-fs/src/fuse/mount/id_mapped.rs"]),
    ("kube", &["soci-fs/src/node/keychain/cluster.rs"]),
    ("k8s_openapi", &["soci-fs/src/node/keychain/cluster.rs"]),
    ("serde_saphyr", &["soci-fs/src/node/keychain/plugins.rs"]),
    ("redb", &["soci-fs/src/node/snapshots/error.rs", "soci-fs/src/node/snapshots/database.rs"]),
    ("regex", &["soci-fs/src/node/snapshots/filter.rs"]),
    // `main.rs` parses, `args.rs` declares, `help.rs` writes completions and manual pages of it.
    (
        "clap",
        &[
            "soci-cli/src/args.rs",
            "soci-cli/src/args/bench.rs",
            "soci-cli/src/args/node.rs",
            "soci-cli/src/args/profile.rs",
            "soci-cli/src/args/publish.rs",
            "soci-cli/src/args/serve.rs",
            "soci-cli/src/main.rs",
            "soci-cli/src/commands/help.rs",
            "soci-cli/src/commands/reference.rs",
            "soci-cli/src/daemon/args.rs",
            "soci-cli/src/snapshotter_main.rs",
        ],
    ),
    ("clap_complete", &["soci-cli/src/args.rs", "soci-cli/src/commands/help.rs"]),
    ("clap_mangen", &["soci-cli/src/commands/help.rs"]),
    (
        "axum",
        &[
            "soci-cli/src/demo/registry.rs",
            "soci-cli/src/daemon/operations.rs",
            "soci-cli/src/webhook/door.rs",
            "soci-cli/src/webhook/server.rs",
        ],
    ),
    ("indicatif", &["soci-cli/src/report/progress.rs"]),
    (
        "shlex",
        &["soci-cli/src/commands/bench.rs", "soci-cli/src/commands/record/enter.rs", "soci-cli/src/commands/sign.rs"],
    ),
    ("webpki", &["soci-index/src/registry/certificates.rs", "soci-index/src/trust"]),
];

/// Where unsafe code is.
const UNSAFE: [&str; 3] = [
    // The C-style interface of the inflater is the only one that stops at block boundaries.
    "soci-index/src/format/inflate.rs",
    // Descriptors known by number: one inside the FUSE library, and those that a service manager passes.
    "soci-fs/src/fuse/descriptor.rs",
    // A system call that no library wraps.
    "soci-fs/src/fuse/mount/id_mapped.rs",
];

/// Files that read the environment.
const ENVIRONMENT: [&str; 6] = [
    // The validated configuration: where state is kept.
    "soci-cli/src/args/config.rs",
    // Whether a person is watching.
    "soci-cli/src/report/output.rs",
    // Its own command line, to start itself again in the background.
    "soci-cli/src/commands/mount.rs",
    // What a service manager passes.
    "soci-fs/src/node/supervisor/systemd.rs",
    // Whether a proxy is on the way: the HTTP library does not say.
    "soci-index/src/registry/address.rs",
    // Where Docker and Podman keep logins.
    "soci-index/src/registry/credentials/docker.rs",
];

struct Source {
    /// Relative to the repository, with slashes.
    path: String,
    text: String,
}

impl Source {
    /// Lines of the product: numbered, without comments and without the tests at the end.
    fn lines(&self) -> impl Iterator<Item = (usize, &str)> {
        let lines = self.text.lines().enumerate().map(|(index, line)| (index + 1, line));
        lines.take(self.length()).filter(|(_, line)| !line.trim_start().starts_with("//"))
    }

    /// How many lines stand before the tests.
    fn length(&self) -> usize {
        let lines: Vec<&str> = self.text.lines().collect();
        let tests = lines.windows(2).position(|pair| pair[0] == "#[cfg(test)]" && pair[1].starts_with("mod tests {"));
        tests.unwrap_or(lines.len())
    }

    fn is_under(&self, places: &[&str]) -> bool {
        places.iter().any(|place| self.path == *place || self.path.starts_with(&format!("{place}/")))
    }

    /// Written by a program, for programs.
    fn is_generated(&self) -> bool {
        self.path.contains("/generated/")
    }

    /// The room that it is in: the first folder or file below `src`, but for the crate's own root and the clock.
    fn room(&self) -> Option<&str> {
        let (_, below) = self.path.split_once("/src/")?;
        let room = below.split('/').next()?.trim_end_matches(".rs");
        (!matches!(room, "lib" | "main" | "snapshotter_main" | "clock")).then_some(room)
    }

    /// A file of tests in the middle of the product.
    fn is_test(&self) -> bool {
        self.path.ends_with("/tests.rs")
    }
}

fn root() -> PathBuf {
    std::env::var_os("SOCI_TREE").map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join(".."), PathBuf::from)
}

/// All Rust files of the repository whose path has `part` in it.
fn sources(part: &str) -> Vec<Source> {
    let (root, mut found) = (root(), Vec::new());
    for top in ["soci-index", "soci-fs", "soci-cli", "examples", "tests"] {
        collect(&root, &root.join(top), &mut found);
    }
    found.retain(|source| source.path.contains(part));
    found.sort_by(|a, b| a.path.cmp(&b.path));
    assert!(!found.is_empty(), "no sources under {}", root.display());
    found
}

fn collect(root: &Path, directory: &Path, found: &mut Vec<Source>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() && !path.ends_with("target") {
            collect(root, &path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let relative = path.strip_prefix(root).unwrap().to_str().unwrap().replace('\\', "/");
            found.push(Source { path: relative, text: fs::read_to_string(&path).unwrap() });
        }
    }
}

/// Whether `word` occurs as a whole identifier, followed by `then`.
fn names(line: &str, word: &str, then: &str) -> bool {
    line.match_indices(word).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        !before.is_some_and(|letter| letter.is_alphanumeric() || letter == '_')
            && line[at + word.len()..].starts_with(then)
    })
}

fn assert_none(rule: &str, found: &[String]) {
    assert!(found.is_empty(), "{rule}:\n{}", found.join("\n"));
}

/// Architecture invariant: a room uses only rooms below it, so that there is no circle among them.
#[test]
fn rooms_use_only_rooms_below() {
    let mut found = Vec::new();
    for (name, rooms) in ROOMS {
        let sources = sources(&format!("{name}/src/"));
        let floor = |room: &str| rooms.iter().position(|known| *known == room);
        let mut seen = BTreeSet::new();
        for source in sources.iter().filter(|source| !source.is_test() && !source.is_generated()) {
            let Some(room) = source.room() else { continue };
            let own = floor(room).unwrap_or_else(|| panic!("{}: {room} is not in the list of rooms", source.path));
            seen.insert(room);
            for (number, line) in source.lines() {
                let uses = line.match_indices("crate::").map(|(at, word)| &line[at + word.len()..]);
                let above =
                    uses.filter_map(|rest| floor(&rest[..rest.find(|c: char| c != '_' && !c.is_alphanumeric())?]));
                found.extend(above.filter(|above| *above > own).map(|_| format!("{}:{number}: {line}", source.path)));
            }
        }
        assert_eq!(seen.len(), rooms.len(), "{name} has {seen:?}, the list says {rooms:?}");
    }
    assert_none("a room uses one above it", &found);
}

/// Architecture invariant: what is pure knows no file, socket, clock, environment, thread or runtime.
#[test]
fn pure_modules_touch_nothing() {
    let mut found = Vec::new();
    let sources = sources("/src/");
    for path in PURE {
        assert!(sources.iter().any(|source| source.is_under(&[path])), "{path} is gone");
    }
    for source in sources.iter().filter(|source| source.is_under(&PURE) && !source.is_test()) {
        for (number, line) in source.lines() {
            let grouped = line.trim_start().starts_with("use std::{") || line.trim_start().starts_with("use crate::{");
            // The platform that the program was built for is a constant, and an address is a value.
            let line = line.replace("std::env::consts", "").replace("std::net::Ipv6Addr", "");
            if grouped || IMPURE.iter().any(|word| line.contains(word)) {
                found.push(format!("{}:{number}: {line}", source.path));
            }
        }
    }
    assert_none("pure modules touch the world", &found);
}

/// Architecture invariant: each foreign library is known to one place.
#[test]
fn foreign_libraries_have_one_place() {
    let mut found = Vec::new();
    for source in sources("/src/").iter().filter(|source| !source.is_test()) {
        for (number, line) in source.lines() {
            for (library, places) in FOREIGN {
                if names(line, library, "::") && !source.is_under(places) {
                    found.push(format!("{}:{number}: {line}", source.path));
                }
            }
        }
    }
    assert_none("a foreign library is named outside its place", &found);
}

/// Architecture invariant: an error says what kind of failure it is, beside its variants, and without a catch-all.
#[test]
fn errors_have_a_class() {
    // Generic over another's error, or with no way out of its module.
    const WITHOUT: [&str; 3] = ["AccessError", "EncodeError", "ConversionError"];
    let mut found = Vec::new();
    let sources = sources("/src/");
    let library = |source: &&Source| ["soci-index/", "soci-fs/"].iter().any(|name| source.path.starts_with(name));
    for source in sources.iter().filter(library) {
        for (number, line) in source.lines() {
            let Some(name) = line.strip_prefix("pub enum ").and_then(|rest| rest.split([' ', '<']).next()) else {
                continue;
            };
            if name.ends_with("Error")
                && !WITHOUT.contains(&name)
                && !source.text.contains(&format!("impl Classified for {name}"))
            {
                found.push(format!("{}:{number}: {name}", source.path));
            }
        }
    }
    assert_none("errors without a class", &found);
}

/// Architecture invariant: unsafe code is in two files.
#[test]
fn unsafe_code_is_fenced() {
    let mut found = Vec::new();
    for source in sources("/src/").iter().filter(|source| !source.is_under(&UNSAFE)) {
        let lines = source.lines().filter(|(_, line)| names(line, "unsafe", " ") || line.contains("allow(unsafe_code"));
        found.extend(lines.map(|(number, line)| format!("{}:{number}: {line}", source.path)));
    }
    assert_none("unsafe code outside of its files", &found);
}

/// Architecture invariant: `soci-cli` -> `soci-fs` -> `soci-index`, and nothing the other way.
#[test]
fn crates_depend_one_way() {
    for (name, allowed) in [
        ("soci-index", &[][..]),
        ("soci-fs", &["soci-index"]),
        ("soci-cli", &["soci-fs", "soci-index"]),
        ("examples", &["soci-fs", "soci-index"]),
        ("tests", &["soci-cli", "soci-fs", "soci-index"]),
    ] {
        let manifest = fs::read_to_string(root().join(name).join("Cargo.toml")).unwrap();
        let dependencies = manifest
            .split("\n[")
            .filter(|section| section.split(']').next().is_some_and(|title| title.ends_with("dependencies")))
            .flat_map(str::lines)
            .filter(|line| line.starts_with("soci-"))
            .map(|line| line.split(['.', ' ', '=']).next().unwrap());
        let unexpected: Vec<&str> = dependencies.filter(|dependency| !allowed.contains(dependency)).collect();
        assert_eq!(unexpected, [""; 0], "{name} depends on what it must not know");
    }
}

/// Every file says first what it is.
#[test]
fn files_open_with_documentation() {
    let sources = sources(".rs");
    let bare = sources.iter().filter(|source| !source.text.starts_with("//!"));
    assert_none(
        "files without a first line of documentation",
        &bare.map(|source| source.path.clone()).collect::<Vec<_>>(),
    );
}

/// No file of the product is longer than a person reads in one go.
#[test]
fn files_are_short() {
    let sources = sources("/src/");
    let long = sources.iter().filter(|source| !source.is_generated() && source.length() > FILE_LINES_MAX);
    let shown: Vec<String> = long.map(|source| format!("{}: {} lines", source.path, source.length())).collect();
    assert_none("files to split", &shown);
}

/// The top of the repository is a table of contents.
#[test]
fn top_of_the_repository_is_known() {
    let entries = fs::read_dir(root()).unwrap();
    let found: BTreeSet<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    let unknown: Vec<String> = found.into_iter().filter(|name| !TOP.contains(&name.as_str())).collect();
    assert_none("unexpected at the top of the repository", &unknown);
}

/// Nothing half-done is kept, and no test is switched off without saying why.
#[test]
fn nothing_is_half_done() {
    let mut found = Vec::new();
    for source in sources(".rs").iter().filter(|source| source.path != "tests/house/architecture.rs") {
        for (index, line) in source.text.lines().enumerate() {
            let unfinished = ["todo!(", "unimplemented!(", "dbg!("].iter().any(|word| line.contains(word));
            // Only measurements are left out of an ordinary run.
            let skipped = line.contains("#[ignore") && !line.contains("#[ignore = \"a measurement");
            if unfinished || skipped {
                found.push(format!("{}:{}: {line}", source.path, index + 1));
            }
        }
    }
    assert_none("half-done", &found);
}

/// Architecture invariant: the environment is read in a few known places.
#[test]
fn environment_is_read_in_few_places() {
    let mut found = Vec::new();
    let sources = sources("/src/");
    let product = sources.iter().filter(|source| source.path.starts_with("soci-") && !source.is_test());
    for source in product.filter(|source| !source.is_under(&ENVIRONMENT)) {
        let lines = source.lines().filter(|(_, line)| {
            let line = line.replace("std::env::consts", "");
            line.contains("std::env") || names(&line, "env", "::var") || names(&line, "env", "::args")
        });
        found.extend(lines.map(|(number, line)| format!("{}:{number}: {line}", source.path)));
    }
    assert_none("the environment is read elsewhere", &found);
}
