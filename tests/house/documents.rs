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

/// All documents that people read: at the top, in docs/ and in examples/.
pub(crate) fn documents() -> Vec<String> {
    let mut found = Vec::new();
    for directory in ["", "docs/", "examples/"] {
        for entry in std::fs::read_dir(root().join(directory)).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            if name.ends_with(".md") {
                found.push(format!("{directory}{name}"));
            }
        }
    }
    found.sort();
    found
}

/// The anchors of a page's headings, as forges make them.
fn anchors(page: &str) -> BTreeSet<String> {
    let headings = page.lines().filter(|line| line.starts_with('#'));
    let anchor = |heading: &str| {
        let lower = heading.trim_start_matches('#').trim().to_lowercase().replace(' ', "-");
        lower.chars().filter(|letter| letter.is_alphanumeric() || matches!(letter, '-' | '_')).collect()
    };
    headings.map(anchor).collect()
}

/// Links between the documents lead somewhere: to a file, and in it to a heading.
#[test]
fn links_lead_somewhere() {
    let mut broken = Vec::new();
    let documents = documents();
    assert!(documents.len() > 20, "{documents:?}");
    for document in &documents {
        let text = read(document);
        let links = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        for link in links.filter(|link| !link.contains("://")) {
            let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
            let directory = root().join(document).parent().unwrap().to_owned();
            let place = if file.is_empty() { root().join(document) } else { directory.join(file) };
            let is_there = place.exists()
                && (anchor.is_empty() || anchors(&std::fs::read_to_string(&place).unwrap()).contains(anchor));
            if !is_there {
                broken.push(format!("{document}: {link}"));
            }
        }
    }
    assert!(broken.is_empty(), "{broken:#?}");
}

/// Every page below docs/ can be reached from the README or from a page that can.
#[test]
fn pages_can_be_reached() {
    let readme = read("README.md");
    let lost: Vec<String> =
        documents().into_iter().filter(|page| page != "README.md" && !readme.contains(&format!("]({page}"))).collect();
    assert!(lost.is_empty(), "the README does not link {lost:?}");
}

/// The README says what it is, and leaves the rest to the pages; ARCHITECTURE.md is one page.
#[test]
fn first_pages_are_short() {
    for (page, lines_max) in [("README.md", 130), ("ARCHITECTURE.md", 90)] {
        let lines = read(page).lines().count();
        assert!(lines <= lines_max, "{page} has {lines} lines");
    }
}

/// The messages that the page on troubleshooting quotes are some that the programs print.
#[test]
fn quoted_messages_are_printed() {
    let crates = ["soci-index", "soci-fs", "soci-cli"].map(|name| root().join(name).join("src"));
    let sources = crates.iter().flat_map(|directory| sources_below(directory));
    let sources: String = sources.map(|source| std::fs::read_to_string(source).unwrap()).collect();
    let page = read("docs/troubleshooting.md");
    let (page, _) = page.split_once("\n## Limits\n").unwrap();
    // What stands between backticks is code.
    let plain: Vec<&str> = page.lines().flat_map(|line| line.split('`').step_by(2)).collect();
    let quoted = plain.iter().flat_map(|text| text.split('"').skip(1).step_by(2)).flat_map(|text| text.split(" ..."));
    let parts: Vec<&str> = quoted.map(|part| part.trim_start_matches(", ")).collect();
    assert!(parts.len() > 8, "{parts:?}");
    let missing: Vec<&&str> = parts.iter().filter(|part| !sources.contains(**part)).collect();
    assert!(missing.is_empty(), "docs/troubleshooting.md quotes what no program says: {missing:?}");
}

/// The table of exit codes in docs/ has those of `soci --help`, and the other way round.
#[test]
fn exit_codes_are_those_of_the_help() {
    use clap::CommandFactory as _;
    let help = soci_cli::args::Arguments::command().get_after_help().unwrap().to_string();
    let (_, codes) = help.split_once("Exit codes:").unwrap();
    let is_number = |word: &&str| word.bytes().all(|byte| byte.is_ascii_digit());
    let said: BTreeSet<&str> =
        codes.split_whitespace().map(|word| word.trim_end_matches([':', ','])).filter(is_number).collect();
    let page = read("docs/publish.md");
    let (_, table) = page.split_once("\n## Exit codes\n").unwrap();
    let table = table.split("\n## ").next().unwrap();
    let rows: BTreeSet<&str> = table
        .lines()
        .filter_map(|line| line.split('|').nth(1))
        .map(str::trim)
        .filter(is_number)
        .filter(|code| !code.is_empty())
        .collect();
    assert_eq!(rows, said);
}
