//! `soci mount` and `soci pull` where places fail and indexes lie: the commands' own share of what `identity.rs` asks of a
//! daemon's layers.

use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use soci_cli::demo::registry::DemoRegistry;
use soci_index::registry::Repository;
use soci_tests::forge::{Lie, SPAN_BYTES, push_spans, push_ztoc};
use soci_tests::front::{Fault, Front};
use soci_tests::image::{GZIP, Image, gzip, text};
use soci_tests::mounting::can_mount;
use soci_tests::registry::client;
use soci_tests::{run, soci, stdout};

const FILE: usize = 900_000;

/// How a place fails.
const OUTAGES: [Fault; 4] = [
    Fault::Status(404, ""),
    Fault::Stopped,
    Fault::Garbage,
    Fault::Slow { late: Duration::from_secs(60), bytes_per_second: 1000 },
];

/// An image of a layer with a file and a symbolic link to it.
fn image() -> Image {
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o644);
    header.set_size(FILE as u64);
    builder.append_data(&mut header, "file", &text(1, FILE)[..]).unwrap();
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Symlink);
    header.set_size(0);
    builder.append_link(&mut header, "link", "file").unwrap();
    let tar = builder.into_inner().unwrap();
    Image::new(vec![(GZIP, gzip(&tar, 6), tar)])
}

/// A mount by the binary, which ends when this is dropped.
struct Mount {
    child: Child,
    at: PathBuf,
}

impl Mount {
    fn new(root: &Path, arguments: &[&str]) -> Self {
        let at = root.join("mnt");
        std::fs::create_dir_all(&at).unwrap();
        let mut command = soci();
        command.arg("--root").arg(root.join("node")).arg("mount").args(arguments).arg(&at);
        command.args(["--min-layer-size", "1000", "--read-timeout", "20s", "--no-follow-names"]);
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let deadline = Instant::now() + Duration::from_secs(30);
        while std::fs::symlink_metadata(at.join("link")).is_err() {
            assert!(child.try_wait().unwrap().is_none() && Instant::now() < deadline, "the mount does not come");
            std::thread::sleep(Duration::from_millis(10));
        }
        Self { child, at }
    }

    fn assert_honest(&self) {
        assert_eq!(std::fs::read_link(self.at.join("link")).unwrap(), Path::new("file"));
        assert!(std::fs::read(self.at.join("file")).unwrap() == text(1, FILE), "other bytes than the layer has");
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = run(soci().args(["umount", "--lazy"]).arg(&self.at));
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a party has: a registry behind a front, and its repository.
struct Party {
    front: Front,
    repository: Repository,
}

impl Party {
    async fn new(registry: &DemoRegistry, repository: &str) -> Self {
        let front = Front::start(&registry.host()).await.unwrap();
        Self { front, repository: client(&registry.host()).repository(repository) }
    }

    fn name(&self) -> String {
        format!("{}/{}:v1", self.front.host(), self.repository.name())
    }
}

/// The same digest from a repository with an index, and then from one without, on one root; the first one has failed by
/// then.
#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_promoted_and_its_first_repository_fails() {
    if !can_mount() {
        return;
    }
    let forms = OUTAGES.into_iter().flat_map(|fault| [(fault, false), (fault, true)]);
    for (fault, spans) in forms {
        for two_hosts in [false, true] {
            let registry = DemoRegistry::start(Duration::ZERO).await.unwrap();
            let other = DemoRegistry::start(Duration::ZERO).await.unwrap();
            let (image, root) = (image(), tempfile::tempdir().unwrap());
            let dev = Party::new(&registry, "dev/app").await;
            let prod = Party::new(if two_hosts { &other } else { &registry }, "prod/app").await;
            for party in [&dev, &prod] {
                image.push(&party.repository, "v1").await;
            }
            if spans {
                push_spans(&dev.repository, &image, SPAN_BYTES, Lie::None).await;
            } else {
                push_ztoc(&dev.repository, &image, SPAN_BYTES, Lie::None).await;
            }
            let first = Mount::new(root.path(), &[&dev.name()]);
            assert_eq!(std::fs::read_link(first.at.join("link")).unwrap(), Path::new("file"));
            drop(first);
            dev.front.set(fault);
            Mount::new(root.path(), &[&prod.name()]).assert_honest();
        }
    }
}

/// The repository that holds the index goes, stops or lies while the mount is read, and still does so at the next
/// mount.
#[tokio::test(flavor = "multi_thread")]
async fn an_index_goes_while_a_mount_is_read() {
    if !can_mount() {
        return;
    }
    for fault in OUTAGES {
        let registry = DemoRegistry::start(Duration::ZERO).await.unwrap();
        let indexes = DemoRegistry::start(Duration::ZERO).await.unwrap();
        let (image, root) = (image(), tempfile::tempdir().unwrap());
        let (team, index) = (Party::new(&registry, "team/app").await, Party::new(&indexes, "soci/index").await);
        image.push(&team.repository, "v1").await;
        push_spans(&index.repository, &image, SPAN_BYTES, Lie::None).await;
        let from = format!("{}/soci/index", index.front.host());
        let name = team.name();
        let arguments = ["--index-from", &from, &name];
        let mount = Mount::new(root.path(), &arguments);
        // What the node keeps of the windows must not be what helps.
        for blob in std::fs::read_dir(root.path().join("node")).unwrap().flatten() {
            let blobs = blob.path().join("blobs");
            let _ = std::fs::remove_dir_all(&blobs);
        }
        index.front.set(fault);
        let start = Instant::now();
        mount.assert_honest();
        assert!(start.elapsed() < Duration::from_secs(12), "{fault:?}: {:?}", start.elapsed());
        drop(mount);
        Mount::new(root.path(), &arguments).assert_honest();
    }
}

/// `soci pull` proves names as well as bytes: a forged link fails the pull, is not believed again, and the next pull gets the
/// truth another way.
#[tokio::test(flavor = "multi_thread")]
async fn a_pull_finds_a_forged_table_out() {
    for spans in [false, true] {
        let registry = DemoRegistry::start(Duration::ZERO).await.unwrap();
        let (image, root) = (image(), tempfile::tempdir().unwrap());
        let repository = client(&registry.host()).repository("team/app");
        image.push(&repository, "v1").await;
        if spans {
            push_spans(&repository, &image, SPAN_BYTES, Lie::Link).await;
        } else {
            push_ztoc(&repository, &image, SPAN_BYTES, Lie::Link).await;
        }
        let name = format!("{}/team/app:v1", registry.host());
        let pull = || {
            let mut command = soci();
            command.arg("--root").arg(root.path().join("node")).args([
                "pull",
                &name,
                "--min-layer-size",
                "1000",
                "--json",
            ]);
            command
        };
        let failed = run(&mut pull());
        let said = String::from_utf8_lossy(&failed.stderr).into_owned();
        assert_eq!(failed.status.code(), Some(5), "{said}");
        assert!(said.contains("is not what the tar says"), "{said}");
        let document: Value = serde_json::from_str(&stdout(&mut pull())).unwrap();
        assert_eq!(document["layers"].as_array().unwrap().len(), 1);
        if can_mount() {
            Mount::new(root.path(), &[&name]).assert_honest();
        }
    }
}
