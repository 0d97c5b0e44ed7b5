//! The files that operators copy: they must say what the programs look for.

use std::path::{Path, PathBuf};

use serde_json::Value;
use soci_tests::run;

mod harbor;
mod nodes;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The files below `examples/` with this ending.
fn with_ending(ending: &str) -> Vec<String> {
    let (mut open, mut found) = (vec![root().join("examples")], Vec::new());
    while let Some(directory) = open.pop() {
        for path in std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()) {
            if path.is_dir() {
                open.push(path);
            } else if path.to_str().unwrap().ends_with(ending) {
                found.push(path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned());
            }
        }
    }
    found.sort();
    assert!(!found.is_empty(), "{ending}");
    found
}

/// The documents of a YAML file.
fn yaml(path: &str) -> Vec<Value> {
    serde_saphyr::from_multiple(&read(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn yaml_files() -> Vec<String> {
    [with_ending(".yml"), with_ending(".yaml")].concat()
}

/// Calls `visit` with every key of a document and what it holds.
fn walk(value: &Value, visit: &mut impl FnMut(&str, &Value)) {
    match value {
        Value::Object(object) => object.iter().for_each(|(key, value)| {
            visit(key, value);
            walk(value, visit);
        }),
        Value::Array(items) => items.iter().for_each(|item| walk(item, visit)),
        _ => {}
    }
}

/// A text, or a list of them.
fn texts(value: &Value) -> Vec<String> {
    match value {
        Value::String(text) => vec![text.clone()],
        Value::Array(items) => items.iter().filter_map(|item| Some(item.as_str()?.to_owned())).collect(),
        _ => Vec::new(),
    }
}

/// Every piece of shell in the examples and documents, with its place.
fn scripts() -> Vec<(String, String)> {
    let mut scripts = Vec::new();
    for path in yaml_files() {
        for document in yaml(&path) {
            walk(&document, &mut |key, value| {
                if matches!(key, "run" | "script" | "before_script" | "after_script") {
                    scripts.push((path.clone(), texts(value).join("\n")));
                }
            });
        }
    }
    for path in with_ending(".sh") {
        scripts.push((path.clone(), read(&path)));
    }
    let pipeline = read("examples/ci/Jenkinsfile");
    for script in pipeline.split("sh '''").skip(1) {
        scripts.push(("examples/ci/Jenkinsfile".to_owned(), script.split("'''").next().unwrap().to_owned()));
    }
    for path in crate::documents::documents() {
        for block in read(&path).split("```sh\n").skip(1) {
            scripts.push((path.clone(), block.split("```").next().unwrap().to_owned()));
        }
    }
    scripts
}

/// What is YAML is YAML, and what is shell is shell.
#[test]
fn examples_are_well_formed() {
    for path in yaml_files() {
        assert!(yaml(&path).iter().all(Value::is_object), "{path}");
    }
    for (path, script) in scripts() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("script");
        std::fs::write(&file, &script).unwrap();
        let output = run(std::process::Command::new("sh").arg("-n").arg(&file));
        assert!(output.status.success(), "{path}: {}\n{script}", String::from_utf8_lossy(&output.stderr));
    }
}

/// The `soci` command lines of a piece of shell, variables filled in.
fn command_lines(script: &str) -> Vec<String> {
    let joined = script.replace("\\\n", " ").replace("|\n", "| ");
    let mut found = Vec::new();
    for line in joined.lines().map(str::trim_start).filter(|line| !line.starts_with('#')) {
        let starts = ["soci ", "| soci ", "&& soci ", "; soci "];
        let at = starts.iter().filter_map(|start| {
            let at = if start.starts_with("soci") { line.starts_with(start).then_some(0) } else { line.find(start) };
            at.map(|at| at + start.len() - "soci ".len())
        });
        let Some(at) = at.min() else { continue };
        let spaced = line[at..].split(" #").next().unwrap();
        let end = ["||", "&&", " | ", " > ", ";"].iter().filter_map(|end| spaced.find(end)).min();
        found.push(filled_in(&spaced[..end.unwrap_or(spaced.len())]));
    }
    found
}

/// Puts images in the place of variables that are named so, and a word in that of others.
fn filled_in(line: &str) -> String {
    let (mut out, mut rest) = (String::new(), line);
    while let Some((before, after)) = rest.split_once('$') {
        let after = after.strip_prefix('{').unwrap_or(after);
        let end = after.find(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_').unwrap_or(after.len());
        let value = if after[..end].to_lowercase().contains("image") { "registry.example/team/app:v1" } else { "word" };
        out.push_str(before);
        out.push_str(value);
        rest = &after[end..];
        rest = rest.strip_prefix('}').unwrap_or(rest);
    }
    out + rest
}

fn assert_parses(place: &str, words: &[String]) {
    use clap::Parser as _;
    let parsed = soci_cli::args::Arguments::try_parse_from(words);
    parsed.unwrap_or_else(|error| panic!("{place}: {words:?}: {error}"));
}

/// Every command line that one may copy is one that the program understands.
#[test]
fn command_lines_parse() {
    let mut count = 0;
    for (path, script) in scripts() {
        for line in command_lines(&script) {
            // Single quotes keep a `$` that is meant.
            let words = shlex::split(&line).unwrap_or_else(|| panic!("{path}: {line}"));
            assert_parses(&path, &words);
            count += 1;
        }
    }
    for path in yaml_files() {
        for document in yaml(&path) {
            walk(&document, &mut |key, value| {
                let words = texts(value);
                if matches!(key, "args" | "command") && words.first().is_some_and(|word| word == "serve-webhook") {
                    assert_parses(&path, &[vec!["soci".to_owned()], words].concat());
                    count += 1;
                }
            });
        }
    }
    assert!(count > 15, "{count}");
}

/// No example puts a secret into an argument, where every user of a machine can read it.
#[test]
fn no_secret_in_arguments() {
    for (path, script) in scripts() {
        for line in command_lines(&script) {
            let words = shlex::split(&line).unwrap();
            let user = words.iter().position(|word| word == "--user" || word == "-u");
            let given = user.and_then(|at| words.get(at + 1));
            let bare = given.is_none_or(|user| !user.contains(':'));
            assert!(bare && (given.is_none() || words.iter().any(|word| word == "--password-stdin")), "{path}: {line}");
        }
        let told = script.lines().filter(|line| line.contains("PASSWORD") && !line.trim_start().starts_with('#'));
        for line in told {
            let start = line.trim_start().trim_start_matches("- ");
            assert!(start.starts_with("printf '%s' ") || start.starts_with("read "), "{path}: {line}");
        }
    }
}

/// Each says what it needs, what it makes of exit codes, and which version it is for.
#[test]
fn pipelines_say_what_they_need() {
    for path in ["github.yml", "gitlab.yml", "Jenkinsfile", "tekton.yaml", "harbor/compose.yaml"] {
        let text = read(&format!("examples/ci/{path}"));
        let head: String = text.lines().take_while(|line| line.starts_with('#') || line.starts_with("//")).collect();
        for word in ["Needs:", "Exit codes:", "Version:", "--v2"] {
            assert!(head.contains(word), "{path} does not say {word}");
        }
    }
}
