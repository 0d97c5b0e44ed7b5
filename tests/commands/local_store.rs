//! The local index store as AWS's tool shows its own: what is listed and removed, what `rebuild-db` does, where layers
//! are found, what sizes may look like.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use soci_cli::demo::registry::DemoRegistry;
use soci_index::format::model::{Descriptor, media_type};
use soci_index::image::layout::Layout;
use soci_tests::containerd::Containerd;
use soci_tests::image::{Image, tar, text};
use soci_tests::node::Node;
use soci_tests::registry::client;
use soci_tests::{on_each_containerd, run, soci, stdout};

on_each_containerd!(indexes_in_containerd, the_daemon_reads_them_there);

const BUILDING: [&str; 4] = ["--min-layer-size", "1000", "--span-size", "262144"];

fn image() -> Image {
    Image::gzip(vec![tar(&[("bin/tool", text(1, 1_200_000))]), tar(&[("app/data", text(3, 400_000))])])
}

fn local(root: &Path, arguments: &[&str]) -> Command {
    let mut command = soci();
    command.arg("--root").arg(root).args(arguments);
    command
}

fn lines(root: &Path, arguments: &[&str]) -> Vec<String> {
    stdout(&mut local(root, arguments)).lines().map(str::to_owned).collect()
}

fn blob(root: &Path, digest: &str) -> std::path::PathBuf {
    root.join("content/blobs/sha256").join(digest.strip_prefix("sha256:").unwrap())
}

/// A registry with an image, and its name there.
async fn published() -> (DemoRegistry, String) {
    let registry = DemoRegistry::start(Duration::ZERO).await.unwrap();
    image().push(&client(&registry.host()).repository("team/app"), "v1").await;
    let name = format!("{}/team/app", registry.host());
    (registry, name)
}

/// One digest after `create`, as scripts for AWS's tool expect; our own form is there on request.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_listed_and_removed() {
    let (_registry, name) = published().await;
    let (work, v1) = (tempfile::tempdir().unwrap(), format!("{name}:v1"));
    let root = work.path();
    drop(lines(root, &[&["create", &v1], &BUILDING[..]].concat()));
    let index = lines(root, &["index", "list", "-q"]);
    assert_eq!(index.len(), 1, "{index:?}");
    assert_eq!(lines(root, &["index", "list", "-q", "--ref", &v1]), index);
    assert_eq!(lines(root, &["index", "list"]).len(), 2, "a header and one row");
    let all = lines(root, &["index", "list", "-q", "--span-indexes"]);
    assert!(all.len() == 2 && all.contains(&index[0]), "{all:?}");
    let listed: Value = serde_json::from_str(&stdout(&mut local(root, &["index", "list", "--json"]))).unwrap();
    assert_eq!((listed.as_array().unwrap().len(), &listed[0]["version"]), (1, &Value::from("v1")));

    // Another index of the same image keeps the span index; the last one takes it along.
    drop(lines(root, &["create", &v1, "--min-layer-size", "1000", "--span-size", "65536"]));
    let both = lines(root, &["index", "list", "-q"]);
    assert_eq!(both.len(), 2, "{both:?}");
    drop(lines(root, &["index", "rm", &index[0]]));
    assert_eq!(lines(root, &["index", "list", "-q", "--span-indexes"]).len(), 2);
    let rest = lines(root, &["index", "list", "-q"]);
    drop(lines(root, &[&["index", "rm"], &rest.iter().map(String::as_str).collect::<Vec<_>>()[..]].concat()));
    assert!(lines(root, &["index", "list", "-q", "--span-indexes"]).is_empty());
    let left = std::fs::read_dir(root.join("content/blobs/sha256")).unwrap().count();
    assert!(left <= 1, "{left} blobs are left of which only the empty configuration may be");
}

/// What is built again because another form is missing, and turns out to be the same, existed already.
#[tokio::test(flavor = "multi_thread")]
async fn a_ztoc_that_is_built_again_existed_already() {
    let (_registry, name) = published().await;
    let (work, v1) = (tempfile::tempdir().unwrap(), format!("{name}:v1"));
    let create = |more: &[&str]| lines(work.path(), &[&["create", &v1], &BUILDING[..], more].concat());
    let first = create(&["--format", "aws"]);
    assert!(!first.iter().any(|line| line.contains("already exists")), "{first:?}");
    let both = create(&["--format", "both"]);
    assert_eq!(both.iter().filter(|line| line.ends_with("(already exists)")).count(), 2, "{both:?}");
    assert_eq!(lines(work.path(), &["index", "list", "-q", "--span-indexes"]).len(), 2);
}

/// A conversion adds the version 2 index to the list, and reads no layer that `create` has read.
#[tokio::test(flavor = "multi_thread")]
async fn conversions_are_listed_and_reuse() {
    let (_registry, name) = published().await;
    let work = tempfile::tempdir().unwrap();
    let (root, v1, v2) = (work.path(), format!("{name}:v1"), format!("{name}:soci"));
    drop(lines(root, &[&["create", &v1], &BUILDING[..]].concat()));
    let created = lines(root, &["index", "list", "-q"]);
    let convert = [&["convert", &v1, &v2], &BUILDING[..]].concat();
    let converted = lines(root, &convert);
    assert_eq!(converted.iter().filter(|line| line.ends_with("(already exists)")).count(), 2, "{converted:?}");
    let forced = lines(root, &[&convert[..], &["--force"]].concat());
    assert!(!forced.iter().any(|line| line.contains("already exists")), "{forced:?}");
    let table = lines(root, &["index", "list", "--ref", &v2]);
    assert!(table.len() == 2 && table[1].contains(" v2 ") && table[1].contains(&v2), "{table:?}");
    let digests = lines(root, &["index", "list", "-q"]);
    assert!(digests.len() == 2 && digests.contains(&created[0]), "{digests:?}");
    let made = lines(root, &["index", "list", "-q", "--ref", &v2]);
    assert!(stdout(&mut local(root, &["index", "info", &made[0]])).contains("soci.index.v2"));

    // What another client has pushed is not taken into an image, nor what was made of it.
    let other = tempfile::tempdir().unwrap();
    drop(stdout(soci().args(["publish", &v1]).args(BUILDING)));
    let pulled = lines(other.path(), &convert);
    assert!(!pulled.iter().any(|line| line.contains("already exists")), "{pulled:?}");
}

/// A blob that is gone spoils nothing, and `rebuild-db` takes and gives entries.
#[tokio::test(flavor = "multi_thread")]
async fn lost_blobs_and_rebuilding() {
    let (_registry, name) = published().await;
    let (work, v1) = (tempfile::tempdir().unwrap(), format!("{name}:v1"));
    let root = work.path();
    drop(lines(root, &[&["create", &v1], &BUILDING[..]].concat()));
    drop(lines(root, &["create", &v1, "--min-layer-size", "1000", "--span-size", "65536", "--format", "aws"]));
    let both = lines(root, &["index", "list", "-q"]);
    let ztocs = lines(root, &["ztoc", "list", "-q"]);
    assert_eq!((both.len(), ztocs.len()), (2, 4));
    let kept = std::fs::read(blob(root, &both[0])).unwrap();
    std::fs::remove_file(blob(root, &both[0])).unwrap();
    assert_eq!(lines(root, &["index", "list", "-q"]), both, "what is listed is what the list says");
    assert_eq!(lines(root, &["ztoc", "list", "-q"]).len(), 2);
    assert!(lines(root, &["prefetch", "list"]).len() == 1);
    assert_eq!(run(&mut local(root, &["index", "info", &both[0]])).status.code(), Some(7));
    assert_eq!(stdout(&mut local(root, &["rebuild-db"])), "");
    assert_eq!(lines(root, &["index", "list", "-q"]), both[1..]);
    // A second time changes nothing, and an index that comes back is found.
    drop(lines(root, &["rebuild-db"]));
    std::fs::write(blob(root, &both[0]), kept).unwrap();
    drop(lines(root, &["rebuild-db"]));
    let mut again = lines(root, &["index", "list", "-q"]);
    again.sort();
    let mut expected = both.clone();
    expected.sort();
    assert_eq!(again, expected);
    let table = lines(root, &["index", "list"]);
    assert!(table.iter().all(|line| !line.contains("n/a")), "{table:?}");

    // A damaged one is neither.
    std::fs::write(blob(root, &both[1]), b"{").unwrap();
    assert_eq!(lines(root, &["index", "list", "-q"]).len(), 2);
    drop(lines(root, &["index", "rm", &both[0]]));
    assert_eq!(lines(root, &["index", "list", "-q"]), both[1..]);
    drop(lines(root, &["rebuild-db"]));
    assert!(lines(root, &["index", "list", "-q"]).is_empty());
}

/// Without `--layer`: from the registry, from a layout, and never wrong bytes.
#[tokio::test(flavor = "multi_thread")]
async fn layers_of_files_are_found() {
    let (_registry, name) = published().await;
    let (work, v1) = (tempfile::tempdir().unwrap(), format!("{name}:v1"));
    let layout = work.path().join("layout");
    let stored = Layout::open_or_create(&layout).unwrap();
    let image = image();
    let mut writer = stored.lock().unwrap();
    for blob in &image.blobs {
        writer.add_blob(blob).unwrap();
    }
    writer.add_manifest(Descriptor::of(media_type::MANIFEST, b""), &image.manifest).unwrap();
    drop(writer);
    for (number, source) in [v1, format!("oci:{}", layout.display())].iter().enumerate() {
        let root = work.path().join(number.to_string());
        drop(lines(&root, &[&["create", source], &BUILDING[..]].concat()));
        let index = lines(&root, &["index", "list", "-q"]);
        let info: Value = serde_json::from_str(&stdout(&mut local(&root, &["index", "info", &index[0]]))).unwrap();
        let ztoc = info["layers"][1]["digest"].as_str().unwrap();
        let out = work.path().join("out");
        let file = ["ztoc", "get-file", ztoc, "app/data", "-o", out.to_str().unwrap()];
        assert_eq!(stdout(&mut local(&root, &file)), "");
        assert!(std::fs::read(&out).unwrap() == text(3, 400_000), "{source}");
        assert_eq!(run(&mut local(&root, &["ztoc", "get-file", ztoc, "no/such"])).status.code(), Some(1));
    }
    std::fs::remove_dir_all(&layout).unwrap();
    let root = work.path().join("1");
    let ztoc = lines(&root, &["ztoc", "list", "-q"]).remove(0);
    let lost = run(&mut local(&root, &["ztoc", "get-file", &ztoc, "app/data"]));
    let said = String::from_utf8_lossy(&lost.stderr).into_owned();
    assert!(lost.status.code() == Some(1) && said.contains("name its file with --layer"), "{said}");
}

/// Sizes as people write them, and refusals as AWS's tool words them.
#[tokio::test(flavor = "multi_thread")]
async fn sizes() {
    let (_registry, name) = published().await;
    let (work, v1, v2) = (tempfile::tempdir().unwrap(), format!("{name}:v1"), format!("{name}:soci"));
    let root = work.path();
    let over = "9223372036854775808";
    for (least, span, expected) in [
        ("-1", "0", "min layer size must be >= 0".to_owned()),
        ("0", "-1", "span size must be >= 0".to_owned()),
        (over, "0", format!("invalid value \"{over}\" for flag -min-layer-size")),
        ("0", over, format!("invalid value \"{over}\" for flag -span-size")),
    ] {
        for command in [&["create"][..], &["convert", &v1]] {
            let sizes = ["--min-layer-size", least, "--span-size", span, if command.len() == 1 { &v1 } else { &v2 }];
            let output = run(&mut local(root, &[command, &sizes].concat()));
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(output.status.code() == Some(2) && said.contains(&expected), "{command:?} {least} {span}: {said}");
        }
    }
    let plain = tar(&[("plain", text(9, 300_000))]);
    let layer = ("application/vnd.oci.image.layer.v1.tar", plain.clone(), plain);
    Image::new(vec![layer]).push(&client(name.split('/').next().unwrap()).repository("team/plain"), "v1").await;
    let most = "9223372036854775807";
    let plain = format!("{}/team/plain:v1", name.split('/').next().unwrap());
    drop(lines(root, &["create", &plain, "--min-layer-size", "0", "--span-size", most]));
    let ztoc = lines(root, &["ztoc", "list", "-q", "--image-ref", &plain]).remove(0);
    let read = run(&mut local(root, &["ztoc", "get-file", &ztoc, "plain"]));
    assert!(read.stdout == [text(9, 300_000), b"\n".to_vec()].concat(), "{}", String::from_utf8_lossy(&read.stderr));

    for (size, bytes) in [("1M", 1 << 20), ("8MiB", 8 << 20), ("64kb", 64 << 10), (most, i64::MAX)] {
        drop(lines(root, &["create", &v1, "--min-layer-size", "1k", "--span-size", size, "--format", "aws"]));
        let index = lines(root, &["index", "list", "-q"]).remove(0);
        let info = stdout(&mut local(root, &["index", "info", &index]));
        assert!(info.contains(&format!("\"com.amazon.soci.span-size\": \"{bytes}\"")), "{size}: {info}");
    }
}

/// `[content_store] type = "containerd"`: an index that containerd has is used when a label names it, or when the local
/// store lists it; without the key the image is left to containerd.
async fn the_daemon_reads_them_there(version: Containerd) {
    for (kind, root, is_named, expected) in [
        ("soci", "soci", true, (0, 2)),
        ("containerd", "elsewhere", true, (2, 0)),
        ("containerd", "soci", false, (2, 0)),
    ] {
        let configurations = |directory: &Path| {
            let socket = directory.join("containerd.sock");
            let soci = format!(
                "[background_fetch]\ndisable = true\n[content_store]\ntype = {kind:?}\ncontainerd_address = {socket:?}\n"
            );
            [version.configuration(directory), soci]
        };
        let Some(node) = Node::start_as(version, None, configurations) else { return };
        let (_registry, name) = published().await;
        let (v1, root) = (format!("{name}:v1"), node.path(root));
        let socket = node.path("containerd.sock").display().to_string();
        let soci = |arguments: &[&str]| {
            let mut command = local(&root, &["--address", &socket]);
            command.args(arguments);
            command
        };
        drop(stdout(&mut soci(&["rpull", "--snapshotter", "overlayfs", &v1])));
        drop(stdout(&mut soci(&[&["--content-store", "containerd", "create", &v1], &BUILDING[..]].concat())));
        let index = lines(&root, &["index", "list", "-q"]).remove(0);
        let named: &[&str] = if is_named { &["--soci-index-digest", &index] } else { &[] };
        drop(run(&mut soci(&[&["rpull"], named, &[&v1]].concat())));
        let log = node.log();
        let lines = |value: &str| log.lines().filter(|line| line.contains(value)).count();
        let prepared = (lines(r#""remote-snapshot-prepared":"true""#), lines(r#""defer-snapshot-runtime":"true""#));
        assert_eq!(prepared, expected, "{kind}: {log}");
    }
}

/// `--content-store containerd`: the index is kept by the image and goes with it, and all commands find its parts there.
async fn indexes_in_containerd(version: Containerd) {
    let Some(node) = Node::start(version) else { return };
    let (_registry, name) = published().await;
    let (v1, v2, root) = (format!("{name}:v1"), format!("{name}:soci"), node.path("store"));
    let socket = node.path("containerd.sock").display().to_string();
    let soci = |arguments: &[&str]| {
        let mut command = local(&root, &["--address", &socket]);
        command.args(arguments);
        command
    };
    let there = |digest: &str| run(node.ctr().args(["content", "get", digest])).status.success();
    let labels = |digest: &str| {
        let list = stdout(node.ctr().args(["content", "ls"]));
        list.lines().find(|line| line.starts_with(digest)).unwrap().to_owned()
    };
    drop(stdout(&mut soci(&["rpull", "--snapshotter", "overlayfs", &v1])));
    let create = [&["--content-store", "containerd", "create", &v1], &BUILDING[..]].concat();
    let created = stdout(&mut soci(&create));
    assert_eq!(created.lines().filter(|line| line.contains(" -> ztoc ")).count(), 2, "{created}");
    let index = lines(&root, &["index", "list", "-q", "--span-indexes"]);
    assert_eq!(index.len(), 1, "{index:?}");
    let ztocs = lines(&root, &["ztoc", "list", "-q"]);
    for blob in index.iter().chain(&ztocs) {
        assert!(there(blob), "{blob}");
    }
    assert!(!blob(&root, &ztocs[0]).exists(), "no second copy");
    let of_index = labels(&index[0]);
    for part in ["ztoc.0=", "ztoc.1=", "config="] {
        assert!(of_index.contains(&format!("containerd.io/gc.ref.content.{part}")), "{of_index}");
    }
    let of_image = stdout(node.ctr().args(["images", "ls", &format!("name=={v1}")]));
    assert!(of_image.contains(&format!("containerd.io/gc.ref.content.soci-index={}", index[0])), "{of_image}");
    let again = stdout(&mut soci(&create));
    assert_eq!(again.matches("(already exists)").count(), 2, "{again}");
    let both = run(&mut soci(&[&create[..], &["--format", "both"]].concat()));
    assert_eq!(both.status.code(), Some(2));

    assert!(stdout(&mut soci(&["ztoc", "info", &ztocs[0]])).contains("num_spans"));
    let info: Value = serde_json::from_str(&stdout(&mut soci(&["index", "info", &index[0]]))).unwrap();
    let ztoc = info["layers"][1]["digest"].as_str().unwrap();
    let read = run(&mut soci(&["ztoc", "get-file", ztoc, "app/data"]));
    assert!(read.stdout == [text(3, 400_000), b"\n".to_vec()].concat(), "{}", String::from_utf8_lossy(&read.stderr));
    let converted = stdout(&mut soci(&[&["convert", &v1, &v2], &BUILDING[..]].concat()));
    assert_eq!(converted.matches("(already exists)").count(), 2, "{converted}");
    let listed = lines(&root, &["index", "list", "-q"]);
    assert_eq!(listed.len(), 2, "{listed:?}");
    assert!(stdout(&mut soci(&["push", &v1])).contains("successfully pushed"));

    // A list that was lost is made anew.
    std::fs::remove_dir_all(&root).unwrap();
    drop(stdout(&mut soci(&["--content-store", "containerd", "rebuild-db"])));
    let table = lines(&root, &["index", "list"]);
    assert!(table.len() == 2 && table[1].starts_with(&index[0]) && table[1].contains("linux/"), "{table:?}");
    // With the image goes the index, and after that its place in the list.
    drop(stdout(node.ctr().args(["images", "rm", "--sync", &v1])));
    assert!(!there(&index[0]));
    drop(stdout(&mut soci(&["--content-store", "containerd", "rebuild-db"])));
    assert!(lines(&root, &["index", "list", "-q"]).is_empty());
    assert_eq!(stdout(node.ctr().args(["leases", "ls", "-q"])), "");

    // Removed by hand: what another image needs stays.
    drop(stdout(&mut soci(&["rpull", "--snapshotter", "overlayfs", &v1])));
    drop(stdout(&mut soci(&create)));
    drop(stdout(&mut soci(&["index", "rm", &index[0]])));
    assert!(!there(&index[0]));
    assert!(lines(&root, &["index", "list", "-q"]).is_empty());
}
