//! `soci convert` and `soci publish --v2` as a user runs them: on AWS's images, between layouts, archives and
//! registries.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::Value;
use soci_index::format::digest::Digest;
use soci_index::format::reference::ManifestName;
use soci_tests::image::{Image, tar, text};
use soci_tests::registry::{DockerRegistry, client};
use soci_tests::{run, soci, stdout};

fn golden() -> PathBuf {
    std::env::var_os("SOCI_GOLDEN").map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("golden"), PathBuf::from)
}

/// The options of a command in a case's README: what stands between the command and its images.
fn options(readme: &str, kind: &str) -> Vec<String> {
    let section = readme.split(&format!("## {kind}\n")).nth(1).unwrap();
    let line = section.split('`').nth(1).unwrap();
    let words = line.split(' ').skip(2).take_while(|word| !matches!(*word, "SRC" | "DST"));
    words.filter(|word| *word != "--prefetch-file" && *word != "...").map(str::to_owned).collect()
}

fn wanted(readme: &str) -> Vec<String> {
    let line = readme.lines().find(|line| line.starts_with("Prefetch files asked for")).unwrap();
    line.split('`').skip(1).step_by(2).flat_map(|path| ["--prefetch-file".to_owned(), path.to_owned()]).collect()
}

/// Digests of the files in a directory of a case.
fn files(directory: &Path) -> BTreeSet<String> {
    let files = std::fs::read_dir(directory).unwrap().map(|file| file.unwrap().path());
    files.map(|file| Digest::of(&std::fs::read(file).unwrap()).hex()).collect()
}

fn blobs(layout: &Path) -> BTreeSet<String> {
    let blobs = std::fs::read_dir(layout.join("blobs/sha256")).unwrap();
    blobs.map(|blob| blob.unwrap().file_name().into_string().unwrap()).collect()
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Every image of the golden data, to a directory, to an archive and through both again: AWS's bytes.
#[test]
fn golden_images() {
    let mut compared = 0;
    for case in std::fs::read_dir(golden().join("images")).unwrap().map(|entry| entry.unwrap().path()) {
        if !case.is_dir() {
            continue;
        }
        let readme = std::fs::read_to_string(case.join("README.md")).unwrap();
        let work = tempfile::tempdir().unwrap();
        let (layout, output, archive) = (case.join("layout"), work.path().join("out"), work.path().join("out.tar"));
        let convert = |kind: &str, from: &Path, to: &Path, format: &str, more: &[String]| {
            let line = ["convert", "--standalone", "--format", format];
            stdout(soci().args(line).args(options(&readme, kind)).args(more).args([from, to]))
        };
        let printed = convert("v2", &layout, &output, "oci-dir", &[]);
        let expected = readme.split("## v2\n").nth(1).unwrap().split("```\n").nth(1).unwrap();
        let sorted = |text: &str| {
            let lines = text.lines().filter(|line| !line.starts_with("level=")).map(str::to_owned);
            // Which of two runs of one layer says "already exists" is chance.
            lines.map(|line| line.replace(" (already exists)", "")).collect::<BTreeSet<_>>()
        };
        assert_eq!(sorted(&printed), sorted(expected), "{}", case.display());
        let index_json = std::fs::read_to_string(output.join("index.json")).unwrap();
        assert_eq!(index_json, std::fs::read_to_string(case.join("v2-standalone/index.json")).unwrap());
        let made = files(&case.join("v2"));
        assert!(made.is_subset(&blobs(&output)), "{}: {:?}", case.display(), made.difference(&blobs(&output)));

        // Once more, from the result, by way of an archive, which is the same file every time.
        convert("v2-again", &output, &archive, "oci-archive", &[]);
        let first = std::fs::read(&archive).unwrap();
        let again = work.path().join("again");
        convert("v2-again", &archive, &again, "oci-dir", &[]);
        assert!(files(&case.join("v2-again")).is_subset(&blobs(&again)), "{}", case.display());
        convert("v2-again", &again, &archive, "oci-archive", &[]);
        assert!(first == std::fs::read(&archive).unwrap(), "{}: the archive differs", case.display());

        // In its own place, with prefetch artifacts.
        convert("v2-prefetch", &layout, &output, "oci-dir", &wanted(&readme));
        assert!(files(&case.join("v2-prefetch")).is_subset(&blobs(&output)), "{}", case.display());
        let leftovers = std::fs::read_dir(work.path()).unwrap().count();
        assert_eq!(leftovers, 3, "nothing but the three results is left");
        compared += 1;
    }
    assert!(compared >= 4, "{compared}");
}

/// Attestations keep saying what they are of: of the new manifests.
#[test]
fn attestations_are_kept() {
    let layout = golden().join("images/04-index-with-attestations/layout");
    let work = tempfile::tempdir().unwrap();
    let output = work.path().join("out");
    let options = ["--min-layer-size", "0", "--span-size", "65536", "--all-platforms", "--keep-annotations"];
    let to = format!("oci:{}:v2", output.display());
    let _ = stdout(soci().args(["convert", &format!("oci:{}", layout.display()), &to]).args(options));
    let read = |digest: &str| {
        let blob = output.join("blobs/sha256").join(digest.trim_start_matches("sha256:"));
        serde_json::from_slice::<Value>(&std::fs::read(blob).unwrap()).unwrap()
    };
    let root: Value = serde_json::from_slice(&std::fs::read(output.join("index.json")).unwrap()).unwrap();
    assert_eq!(root["manifests"][0]["annotations"]["org.opencontainers.image.ref.name"], "v2");
    let index = read(root["manifests"][0]["digest"].as_str().unwrap());
    let entries = index["manifests"].as_array().unwrap();
    let images: Vec<&Value> =
        entries.iter().filter(|entry| entry["annotations"]["com.amazon.soci.index-digest"].is_string()).collect();
    let attestations: Vec<&Value> = entries
        .iter()
        .filter(|entry| entry["annotations"]["vnd.docker.reference.type"] == "attestation-manifest")
        .collect();
    assert_eq!((images.len(), attestations.len(), entries.len()), (2, 2, 6), "{index}");
    for (image, attestation) in images.iter().zip(&attestations) {
        assert_eq!(image["digest"], attestation["annotations"]["vnd.docker.reference.digest"]);
        read(attestation["digest"].as_str().unwrap());
    }
    // A second image in the same layout; the first stays.
    let to = format!("oci:{}:other", output.display());
    let _ = stdout(soci().args(["convert", &format!("oci:{}", layout.display()), &to]).args(options).arg("--force"));
    let root: Value = serde_json::from_slice(&std::fs::read(output.join("index.json")).unwrap()).unwrap();
    assert_eq!(root["manifests"].as_array().unwrap().len(), 1, "the same image has one entry: {root}");
}

fn image() -> Image {
    let base = tar(&[("bin/tool", text(1, 3_000_000)), ("etc/conf", text(2, 500))]);
    let top = tar(&[("app/data", text(3, 2_000_000)), ("app/main", text(4, 100))]);
    Image::gzip(vec![base, top])
}

const BUILDING: [&str; 4] = ["--min-layer-size", "1000", "--span-size", "262144"];

fn json(arguments: &[&str]) -> Value {
    serde_json::from_str(&stdout(soci().args(arguments).args(BUILDING).arg("--json"))).unwrap()
}

/// In a registry: under the same tag, again with the same result, under another name, in another repository and
/// another registry.
#[tokio::test(flavor = "multi_thread")]
async fn within_and_between_registries() {
    let (Some(registry), Some(other)) = (DockerRegistry::start(), DockerRegistry::start()) else { return };
    let repository = client(&registry.address).repository("team/app");
    let image = image();
    image.push(&repository, "v1").await;
    let name = |address: &str, image: &str| format!("{address}/{image}");
    let here = name(&registry.address, "team/app:v1");

    let copy = name(&registry.address, "team/app:v1-soci");
    let first = json(&["publish", &here, "--v2", "--as", &copy]);
    assert_eq!(first["status"], "written", "{first}");
    assert_eq!(first["previousDigest"], image.digest().to_string());
    let tag = |tag: &str| ManifestName::Tag(tag.to_owned());
    let unchanged = repository.manifest(&tag("v1")).await.unwrap().unwrap();
    assert_eq!(unchanged.digest, image.digest(), "the other name is as it was");

    let second = json(&["publish", &here, "--v2"]);
    assert_eq!(second["digest"], first["digest"], "the same bytes every time: {second}");
    let layers: Vec<&Value> = second["images"][0]["layers"].as_array().unwrap().iter().collect();
    // Any client with push access can have put an index there, and no trusted key is given.
    assert!(layers.iter().all(|layer| layer["reused"] == false), "every layer is read again: {second}");
    let third = json(&["publish", &here, "--v2"]);
    assert_eq!((&third["status"], &third["digest"]), (&Value::from("up to date"), &first["digest"]), "{third}");
    let code = run(soci().args(["publish", &here, "--v2", "--detailed-exit-code"]).args(BUILDING)).status.code();
    assert_eq!(code, Some(10));

    for there in [name(&registry.address, "other/app:v1"), name(&other.address, "app:v1")] {
        let copied = json(&["convert", &here, &there]);
        assert_eq!(copied["digest"], first["digest"], "{there}");
        assert_eq!(json(&["convert", &here, &there])["status"], "up to date", "{there}");
    }

    let work = tempfile::tempdir().unwrap();
    let archive = format!("oci-archive:{}/image.tar:v1", work.path().display());
    assert_eq!(json(&["convert", &name(&other.address, "app:v1"), &archive])["digest"], first["digest"]);
    let back = name(&other.address, "back:v1");
    assert_eq!(json(&["convert", &archive, &back])["digest"], first["digest"]);
}

/// What cannot be a destination, and what must not be overwritten.
#[test]
fn refused_destinations() {
    let layout = golden().join("images/01-single-platform/layout");
    let source = format!("oci:{}", layout.display());
    let work = tempfile::tempdir().unwrap();
    let home = work.path().join("home");
    std::fs::create_dir(&home).unwrap();
    std::fs::write(home.join("letter"), "dear").unwrap();
    let digest = Digest::of(b"");
    for (arguments, code, text) in [
        (vec!["convert", &source, &format!("h.example/app@{digest}")], 2, "must not contain a digest"),
        (vec!["convert", &source, "UPPER"], 2, "must be a tagged ref"),
        (vec!["convert", "--standalone", "/no/such/file", "x"], 7, "failed to access input /no/such/file"),
        (vec!["convert", "--standalone", "/no/such/file"], 2, "destination needs to be specified"),
        (vec!["convert", "--standalone", "--format", "x", "a", "b"], 2, "unsupported output format"),
        (vec!["convert", "--standalone", "--format", "oci-dir", path(&layout), path(&home)], 7, "other files"),
        (vec!["convert", "--standalone", path(&layout), path(&work.path().join("x.tar"))], 6, "no ztocs created"),
    ] {
        let output = run(soci().args(&arguments));
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {message}");
        assert!(message.contains(text), "{arguments:?}: {message}");
    }
    assert_eq!(std::fs::read_dir(work.path()).unwrap().count(), 1, "nothing half-done is left");
    assert_eq!(std::fs::read(home.join("letter")).unwrap(), b"dear");
}
