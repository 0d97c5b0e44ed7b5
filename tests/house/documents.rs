//! What the documents promise is what the tests test.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    std::env::var_os("SOCI_TREE").map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join(".."), PathBuf::from)
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// All Rust files below a directory.
fn sources_below(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let files = entries.flat_map(|path| if path.is_dir() { sources_below(&path) } else { vec![path] });
    files.filter(|path| path.extension().is_some_and(|extension| extension == "rs")).collect()
}

/// The names of all tests below `tests/`: functions, and those that `on_each_profile!` makes.
fn tests() -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for source in sources_below(&root().join("tests")) {
        let text = std::fs::read_to_string(source).unwrap();
        let mut is_test = false;
        for line in text.lines().map(str::trim_start) {
            is_test |= line == "#[test]" || line.starts_with("#[tokio::test");
            let function = line.strip_prefix("async ").unwrap_or(line).strip_prefix("fn ");
            let function = function.and_then(|rest| rest.split_once('(')).map(|(name, _)| name);
            let function = function.filter(|_| std::mem::take(&mut is_test));
            let made = line.split_once(" on ").filter(|(_, rest)| rest.ends_with(',')).map(|(name, _)| name);
            names.extend(function.or(made).map(str::to_owned));
        }
    }
    names
}

/// What stands between backticks and looks like the name of a test.
fn cited(document: &str) -> BTreeSet<String> {
    let is_name = |text: &str| {
        text.contains('_')
            && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_')
    };
    let quoted = document.lines().flat_map(|line| line.split('`').skip(1).step_by(2));
    quoted.filter(|text| is_name(text)).map(str::to_owned).collect()
}

/// The table of registries cites tests that exist, and every test of a registry is in it.
#[test]
fn registries_are_tested_as_they_say() {
    let (cited, tests) = (cited(&read("docs/REGISTRIES.md")), tests());
    let unknown: Vec<&String> = cited.difference(&tests).collect();
    assert!(unknown.is_empty(), "docs/REGISTRIES.md cites tests that there are not: {unknown:?}");
    let of_a_registry = |name: &&String| ["v1_on_", "v2_on_", "to_on_"].iter().any(|start| name.starts_with(start));
    let mut missing: Vec<&String> = tests.iter().filter(of_a_registry).filter(|name| !cited.contains(*name)).collect();
    missing.retain(|name| !name.ends_with("_on_each_profile"));
    assert!(missing.is_empty(), "docs/REGISTRIES.md lacks {missing:?}");
    assert!(cited.len() > 60, "{}", cited.len());
}

/// What the documents on meaning and security promise names tests that there are: `FILE: TEST`, or a file.
#[test]
fn promises_have_their_tests() {
    let mut missing = Vec::new();
    for document in ["SECURITY.md", "SEMANTICS.md"] {
        let text = read(document).replace('\n', " ");
        let quoted = text.split('`').skip(1).step_by(2).filter(|text| text.contains(".rs"));
        for cited in quoted {
            let (file, test) = cited.split_once(": ").map_or((cited, ""), |(file, test)| (file, test.trim()));
            let Ok(source) = std::fs::read_to_string(root().join(file)) else {
                missing.push(format!("{document}: {file}"));
                continue;
            };
            let is_there = test.is_empty() || source.contains(&format!("fn {test}(")) || source.contains(test);
            if !is_there {
                missing.push(format!("{document}: {file}: {test}"));
            }
        }
    }
    assert!(missing.is_empty(), "{missing:#?}");
}

/// Links between the documents lead somewhere.
#[test]
fn links_lead_somewhere() {
    let mut broken = Vec::new();
    for document in
        ["README.md", "ARCHITECTURE.md", "SECURITY.md", "SEMANTICS.md", "docs/REGISTRIES.md", "examples/README.md"]
    {
        let text = read(document);
        let links = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        for link in links.filter(|link| !link.contains("://") && !link.starts_with('#')) {
            let file = link.split('#').next().unwrap();
            let place = root().join(document).parent().unwrap().join(file);
            if !place.exists() {
                broken.push(format!("{document}: {link}"));
            }
        }
    }
    assert!(broken.is_empty(), "{broken:?}");
}
