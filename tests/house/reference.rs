//! docs/configuration.md is made from what the programs themselves say: the options by their command line, the keys of the
//! daemon's configuration by the comments of its structures.
//!
//! `SOCI_WRITE=1 cargo test -p soci-tests --test house reference` writes the page.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use soci_cli::commands::reference;
use soci_cli::daemon::config::{DaemonConfig, has_effect};

/// The files with the structures, below the daemon's configuration.
const STRUCTURES: [&str; 5] = ["sections.rs", "pull_modes.rs", "profile.rs", "trust.rs", "limits.rs"];

struct Field {
    key: String,
    kind: String,
    says: String,
}

/// The public fields of each structure, with their comments.
fn structures() -> BTreeMap<String, Vec<Field>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../soci-cli/src/daemon/config");
    let mut found = BTreeMap::new();
    for file in STRUCTURES {
        let text = std::fs::read_to_string(directory.join(file)).unwrap();
        for part in text.split("\npub struct ").skip(1) {
            let (name, body) = part.split_once(" {\n").unwrap();
            let (body, _) = body.split_once("\n}").unwrap();
            // The attribute stands before the structure.
            let is_pascal = text.contains(&format!("rename_all = \"PascalCase\")]\npub struct {name} "));
            found.insert(name.to_owned(), fields(body, is_pascal));
        }
    }
    found
}

fn fields(body: &str, is_pascal: bool) -> Vec<Field> {
    let (mut found, mut says, mut renamed) = (Vec::new(), Vec::new(), None);
    for line in body.lines().map(str::trim) {
        if let Some(comment) = line.strip_prefix("/// ") {
            says.push(comment);
        } else if let Some(rest) = line.strip_prefix("#[serde(rename = \"") {
            renamed = rest.split('"').next().map(str::to_owned);
        } else if let Some((name, kind)) = line.strip_prefix("pub ").and_then(|rest| rest.split_once(": ")) {
            let pascal = || name.split('_').map(|word| word[..1].to_uppercase() + &word[1..]).collect();
            let plain = if is_pascal { pascal() } else { name.to_owned() };
            let key = renamed.take().unwrap_or(plain);
            found.push(Field { key, kind: kind.trim_end_matches(',').to_owned(), says: says.join(" ") });
            says.clear();
        }
    }
    found
}

/// The default values, as they would be written, by section and key.
fn defaults() -> BTreeMap<String, String> {
    let (mut found, mut section) = (BTreeMap::new(), String::new());
    for line in DaemonConfig::default().to_string().lines() {
        if let Some(name) = line.strip_prefix('[') {
            section = format!("{}.", name.trim_end_matches(']'));
        } else if let Some((key, value)) = line.split_once(" = ") {
            found.insert(format!("{section}{key}"), value.to_owned());
        }
    }
    found
}

/// A table for a structure, and after it one for each that it holds.
fn section(path: &str, title: &str, says: &str, name: &str, known: &BTreeMap<String, Vec<Field>>) -> String {
    let (mut rows, mut idle, mut below) = (String::new(), Vec::new(), String::new());
    let defaults = defaults();
    for Field { key, kind, says } in &known[name] {
        let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        let inner = kind.trim_start_matches("Vec<").trim_start_matches("BTreeMap<String, ").trim_end_matches('>');
        if known.contains_key(inner) && has_effect_below(&path, inner, known) {
            let title = match kind {
                kind if kind.starts_with("Vec<") => format!("[[{path}]]"),
                kind if kind.starts_with("BTreeMap<") => format!("[{path}.\"HOST\"]"),
                _ => format!("[{path}]"),
            };
            let inner_path = if kind.starts_with("BTreeMap<") { format!("{path}.\"HOST\"") } else { path };
            below += &section(&inner_path, &title, says, inner, known);
        } else if has_effect(&path) {
            let default = defaults.get(&path).map(|value| format!("`{value}`")).unwrap_or_default();
            rows += &format!("| `{key}` | {default} | {} |\n", says.replace('|', "\\|"));
        } else if known.contains_key(inner) {
            idle.push(format!("`[{path}]`"));
        } else {
            idle.push(format!("`{key}`"));
        }
    }
    let mut page = format!("### {title}\n\n{says}\n\n");
    if !rows.is_empty() {
        page += &format!("| key | default | meaning |\n|---|---|---|\n{rows}\n");
    }
    if !idle.is_empty() {
        page += &format!("Accepted without effect: {}.\n\n", idle.join(", "));
    }
    // A section of nothing but sections needs no heading of its own.
    let is_empty = rows.is_empty() && idle.is_empty();
    if is_empty { below } else { page + &below }
}

fn has_effect_below(path: &str, name: &str, known: &BTreeMap<String, Vec<Field>>) -> bool {
    has_effect(path)
        || known[name].iter().any(|field| {
            let inner = format!("{path}.{}", field.key);
            has_effect(&inner) || known.contains_key(&field.kind) && has_effect_below(&inner, &field.kind, known)
        })
}

fn keys() -> String {
    section("", "Top level", "Before the first section of the file.", "DaemonConfig", &structures())
}

/// Puts `made` between the marks of this name.
fn put(page: &str, mark: &str, made: &str) -> String {
    let (begin, end) = (format!("<!-- made: {mark} -->\n"), format!("<!-- end: {mark} -->\n"));
    let (before, rest) = page.split_once(&begin).unwrap_or_else(|| panic!("no {begin}"));
    let (_, after) = rest.split_once(&end).unwrap_or_else(|| panic!("no {end}"));
    format!("{before}{begin}\n{}\n\n{end}{after}", made.trim())
}

/// The page of options and keys says what the programs say.
#[test]
fn reference_is_up_to_date() {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs/configuration.md");
    let page = std::fs::read_to_string(&path).unwrap();
    let made = put(&put(&page, "keys", &keys()), "options", &reference::markdown());
    if std::env::var_os("SOCI_WRITE").is_some() {
        std::fs::write(&path, &made).unwrap();
        return;
    }
    let differs = page.lines().zip(made.lines()).find(|(is, should)| is != should);
    assert!(
        page == made,
        "docs/configuration.md is not what the programs say; `SOCI_WRITE=1 cargo test -p soci-tests --test house \
         reference` writes it. First difference: {differs:#?}"
    );
}

/// Every key has a default and every section its comment: the structures are read as text, and none is passed over.
#[test]
fn every_key_is_in_the_reference() {
    let known = structures();
    for (name, fields) in &known {
        for field in fields {
            assert!(field.says.len() > 5, "{name}.{} has no comment", field.key);
        }
    }
    let page = keys();
    for (key, value) in defaults() {
        if value == "[]" && page.contains(&format!("### [[{key}]]")) {
            continue;
        }
        let last = key.rsplit('.').next().unwrap();
        let is_idle = key.split('.').next().is_some_and(|section| page.contains(&format!("`[{section}]`")));
        let is_idle =
            is_idle || key.rsplit_once('.').is_some_and(|(section, _)| page.contains(&format!("`[{section}]`")));
        assert!(is_idle || page.contains(&format!("`{last}`")), "{key} is not in the reference");
    }
}
