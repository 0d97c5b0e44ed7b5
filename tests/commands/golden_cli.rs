//! `soci ztoc` as a user runs it, over the golden layers.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use soci_index::format::digest::Digest;

fn golden() -> PathBuf {
    std::env::var_os("SOCI_GOLDEN").map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("golden"), PathBuf::from)
}

fn soci(arguments: &[&str]) -> Output {
    soci_tests::soci().args(arguments).output().expect("the soci binary runs")
}

fn cases() -> Vec<PathBuf> {
    let mut cases: Vec<PathBuf> = std::fs::read_dir(golden())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.join("README.md").exists() && path.join("files.tsv").exists())
        .collect();
    cases.sort();
    cases
}

fn layer(case: &Path) -> PathBuf {
    let gzip = case.join("layer.tar.gz");
    if gzip.exists() { gzip } else { case.join("layer.tar") }
}

/// `ztoc info` prints the same document as AWS's tool, for every zTOC that it can read.
#[test]
fn info_is_the_same_document() {
    let mut compared = 0;
    for case in cases() {
        let (Ok(info), Some(ztoc)) = (std::fs::read_to_string(case.join("info.json")), first_ztoc(&case)) else {
            continue;
        };
        let bytes = bytes::Bytes::from(std::fs::read(&ztoc).unwrap());
        let ours =
            soci_cli::commands::ztoc::info_text(&bytes).unwrap_or_else(|error| panic!("{}: {error}", case.display()));
        assert_eq!(ours.trim_end(), info.trim_end(), "{}", case.display());
        compared += 1;
    }
    assert!(compared > 0, "no document was compared");
}

/// The zTOC with the first span size of the table in the README, which info.json describes.
fn first_ztoc(case: &Path) -> Option<PathBuf> {
    let readme = std::fs::read_to_string(case.join("README.md")).ok()?;
    let row = readme.lines().skip_while(|line| !line.starts_with("| span size")).nth(2)?;
    let span = row.split('|').nth(1)?.trim();
    Some(case.join(format!("ztoc-{span}.ztoc"))).filter(|path| path.exists())
}

/// From a layer file to a file of it, by the command line alone.
#[test]
fn create_then_get_file() {
    let scratch = tempfile::tempdir().unwrap();
    let ztoc = scratch.path().join("out.ztoc");
    let mut read = 0;
    for case in cases() {
        let created = soci(&[
            "ztoc",
            "create",
            layer(&case).to_str().unwrap(),
            "-o",
            ztoc.to_str().unwrap(),
            "--span-size",
            "65536",
        ]);
        if !created.status.success() {
            let message = String::from_utf8_lossy(&created.stderr).into_owned();
            assert!(created.status.code().is_some_and(|code| code == 5), "{}: {message}", case.display());
            assert_eq!(message.lines().count(), 1, "{}: one line says why: {message}", case.display());
            assert!(!ztoc.exists(), "{}: nothing half-done is left", case.display());
            continue;
        }
        let listing = std::fs::read_to_string(case.join("files.tsv")).unwrap();
        let lines: Vec<Vec<&str>> = listing.lines().skip(1).map(|line| line.split('\t').collect()).collect();
        for (index, fields) in lines.iter().enumerate() {
            // Names with escapes, and names that a later entry takes again, are for other tests.
            let again = lines[index + 1..]
                .iter()
                .any(|later| later[0].trim_start_matches("./") == fields[0].trim_start_matches("./"));
            if fields[1] != "reg"
                || fields[0].contains('\\')
                || again
                || read > 400
                || fields[0].starts_with('-')
                || fields[0].contains("..")
            {
                continue;
            }
            let (out, layer) = (scratch.path().join("file"), layer(&case));
            let arguments = [
                "ztoc",
                "get-file",
                ztoc.to_str().unwrap(),
                fields[0],
                "--layer",
                layer.to_str().unwrap(),
                "-o",
                out.to_str().unwrap(),
            ];
            let got = soci(&arguments);
            assert!(
                got.status.success(),
                "{}: {}: {}",
                case.display(),
                fields[0],
                String::from_utf8_lossy(&got.stderr)
            );
            assert_eq!(Digest::of(&std::fs::read(&out).unwrap()).hex(), fields[8], "{}: {}", case.display(), fields[0]);
            read += 1;
        }
        std::fs::remove_file(&ztoc).unwrap();
    }
    assert!(read > 300 || std::env::var_os("SOCI_GOLDEN").is_some(), "only {read} files");
}

/// A hostile zTOC makes `info` and `get-file` fail with a line, or give right bytes: never a crash, never wrong bytes.
#[test]
fn hostile_ztocs_on_the_command_line() {
    let directory = golden().join("hostile");
    let readme = std::fs::read_to_string(directory.join("README.md")).unwrap();
    let mut tried = 0;
    for line in readme.lines() {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let Some(name) = cells.get(1).filter(|name| name.ends_with(".ztoc")) else { continue };
        let layer =
            if cells[4] == "plain" { "layer-plain.tar".to_owned() } else { format!("layer-{}.tar.gz", cells[4]) };
        let (ztoc, layer) = (directory.join(name), directory.join(layer));
        let info = soci(&["ztoc", "info", ztoc.to_str().unwrap()]);
        assert!(matches!(info.status.code(), Some(0 | 5)), "{name}: {info:?}");
        for file in ["etc/conf", "opt/data/victim.txt", "last.bin"] {
            let arguments = ["ztoc", "get-file", ztoc.to_str().unwrap(), file, "--layer", layer.to_str().unwrap()];
            let got = soci(&arguments);
            assert!(matches!(got.status.code(), Some(0 | 1 | 5)), "{name}: {got:?}");
            let good = directory.join(match cells[4] {
                "plain" => "000-good-plain.ztoc",
                "gz2" => "001-good-gz2.ztoc",
                _ => "002-good-gz3.ztoc",
            });
            let right = soci(&["ztoc", "get-file", good.to_str().unwrap(), file, "--layer", layer.to_str().unwrap()]);
            // A forged window makes other content of a good layer: only the proof of the whole layer finds that.
            let forged = name.contains("-window-");
            assert!(!got.status.success() || got.stdout == right.stdout || forged, "{name}: {file} is wrong");
        }
        tried += 1;
    }
    assert!(tried > 100, "{tried}");
}

/// `soci create` of whole images, from their layouts to the same index manifests as AWS's.
#[test]
fn create_of_layouts() {
    let number =
        |readme: &str, flag: &str| readme.split(flag).nth(1).unwrap().split_whitespace().next().unwrap().to_owned();
    let mut compared = 0;
    for case in std::fs::read_dir(golden().join("images")).unwrap().map(|entry| entry.unwrap().path()) {
        let Ok(readme) = std::fs::read_to_string(case.join("README.md")) else { continue };
        let root = tempfile::tempdir().unwrap();
        let local = |arguments: &[&str]| {
            let mut command = soci_tests::soci();
            command.arg("--root").arg(root.path()).args(arguments);
            command
        };
        let image = format!("oci:{}", case.join("layout").display());
        let (span, least) = (number(&readme, "--span-size "), number(&readme, "--min-layer-size "));
        let arguments = ["create", &image, "--span-size", &span, "--min-layer-size", &least, "--all-platforms"];
        let created = soci_tests::stdout(&mut local(&arguments));
        // The same lines as AWS's, in any order.
        let theirs = readme.split("## v1\n").nth(1).unwrap().split("```").nth(1).unwrap().trim();
        let sorted = |text: &str| {
            let mut lines: Vec<String> = text.lines().map(|line| line.replace(" (already exists)", "")).collect();
            lines.sort();
            lines.dedup();
            lines
        };
        assert_eq!(sorted(&created), sorted(theirs), "{}", case.display());
        let digests = soci_tests::stdout(&mut local(&["index", "list", "-q"]));
        for golden in std::fs::read_dir(case.join("v1")).unwrap().map(|entry| entry.unwrap().path()) {
            let digest = Digest::of(&std::fs::read(&golden).unwrap()).to_string();
            assert!(digests.lines().any(|line| line == digest), "{}: {digests}", golden.display());
            compared += 1;
        }
    }
    assert!(compared >= 5, "{compared}");
}

#[test]
fn standard_input_and_output() {
    let case = golden().join("001-small-tree-gzip6");
    if !case.exists() {
        return;
    }
    let command = format!(
        "{} ztoc create - -o - --span-size 65536 < {}",
        soci_tests::soci_path().display(),
        layer(&case).display()
    );
    let output = Command::new("sh").args(["-c", &command]).output().unwrap();
    assert!(
        output.stdout == std::fs::read(case.join("ztoc-65536.ztoc")).unwrap(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}
