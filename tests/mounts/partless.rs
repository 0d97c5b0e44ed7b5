//! Registries that serve no parts of blobs: a layer costs one transfer, and every read its own bytes.

use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use soci_cli::demo::registry::DemoRegistry;
use soci_index::registry::Repository;
use soci_tests::disk::SmallDisk;
use soci_tests::forge::{Lie, SPAN_BYTES, push_spans, push_ztoc};
use soci_tests::front::{Fault, Front, NoParts};
use soci_tests::image::{Image, tar, text};
use soci_tests::layers::{Daemon, labels};
use soci_tests::mounting::can_mount;
use soci_tests::registry::client;
use soci_tests::{run, soci};

const MANNERS: [NoParts; 6] = [
    NoParts::Whole,
    NoParts::Status(400),
    NoParts::Status(405),
    NoParts::Status(416),
    NoParts::Status(501),
    NoParts::PartUnder200,
];

const FILE: usize = 1_500_000;
const FILES: [&str; 5] = ["a", "b", "c", "d", "e"];

/// An image of one layer with five files, and one that its compression does not shorten much.
fn image() -> Image {
    let mut state = 1_u64;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 56) as u8
    })
    .take(FILE)
    .collect();
    let files = FILES.iter().enumerate().map(|(number, name)| (*name, content(number)));
    Image::gzip(vec![tar(&files.chain([("noise", noise)]).collect::<Vec<_>>())])
}

fn content(number: usize) -> Vec<u8> {
    text(number as u64, FILE)
}

async fn push(repository: &Repository, image: &Image, spans: bool) {
    image.push(repository, "v1").await;
    if spans {
        push_spans(repository, image, SPAN_BYTES, Lie::None).await;
    } else {
        push_ztoc(repository, image, SPAN_BYTES, Lie::None).await;
    }
}

struct Stage {
    registry: DemoRegistry,
    front: Front,
    image: Image,
    root: tempfile::TempDir,
}

impl Stage {
    async fn new(spans: bool) -> Self {
        let registry = DemoRegistry::start(Duration::ZERO).await.unwrap();
        let image = image();
        push(&client(&registry.host()).repository("team/app"), &image, spans).await;
        let front = Front::start(&registry.host()).await.unwrap();
        Self { registry, front, image, root: tempfile::tempdir().unwrap() }
    }

    fn layer_bytes(&self) -> u64 {
        self.image.blobs[0].len() as u64
    }

    fn name(&self) -> String {
        format!("{}/team/app:v1", self.front.host())
    }

    /// The layer passes once, and besides it the windows of its index at most.
    fn assert_sent_once(&self, before: u64, what: &str) {
        let (sent, layer) = (self.front.blob_bytes_sent() - before, self.layer_bytes());
        assert!(sent >= layer && sent < layer * 13 / 10, "{what}: {sent} bytes were sent of a layer of {layer}");
    }
}

/// A mount by the binary, which ends when this is dropped.
struct Mount<'a> {
    child: Child,
    at: &'a Path,
}

impl<'a> Mount<'a> {
    fn new(stage: &Stage, at: &'a Path) -> Self {
        let mut command = soci();
        command.arg("--root").arg(stage.root.path().join("node")).arg("mount").arg(stage.name()).arg(at);
        command.args(["--min-layer-size", "1000", "--no-follow-names"]);
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let mount = Self { child, at };
        let deadline = Instant::now() + Duration::from_secs(30);
        while std::fs::symlink_metadata(at.join("a")).is_err() {
            assert!(Instant::now() < deadline, "the mount does not come");
            std::thread::sleep(Duration::from_millis(10));
        }
        mount
    }
}

impl Mount<'_> {
    fn present_spans(&self) -> (u64, u64) {
        let status: serde_json::Value =
            serde_json::from_slice(&std::fs::read(self.at.join(".soci/status.json")).unwrap()).unwrap();
        let layer = &status["layers"][0];
        (layer["present_spans"].as_u64().unwrap(), layer["spans"].as_u64().unwrap())
    }
}

impl Drop for Mount<'_> {
    fn drop(&mut self) {
        let _ = run(soci().args(["umount", "--lazy"]).arg(self.at));
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mount_transfers_the_layer_once() {
    if !can_mount() {
        return;
    }
    for spans in [false, true] {
        for manner in MANNERS {
            let stage = Stage::new(spans).await;
            stage.front.set(Fault::NoParts(manner));
            let at = stage.root.path().join("mnt");
            std::fs::create_dir(&at).unwrap();
            let mount = Mount::new(&stage, &at);
            let before = stage.front.blob_bytes_sent();
            for (number, name) in FILES.iter().enumerate().rev() {
                let (mut some, offset) = ([0; 1000], 1_000_000 + number);
                std::fs::File::open(mount.at.join(name)).unwrap().read_exact_at(&mut some, offset as u64).unwrap();
                assert!(some == content(number)[offset..offset + 1000], "{manner:?} {name}");
            }
            for (number, name) in FILES.iter().enumerate() {
                assert!(std::fs::read(mount.at.join(name)).unwrap() == content(number), "{manner:?} {name}");
            }
            drop(mount);
            stage.assert_sent_once(before, &format!("{manner:?}, spans: {spans}"));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshotter_transfers_the_layer_once() {
    for spans in [false, true] {
        for manner in MANNERS {
            let stage = Stage::new(spans).await;
            stage.front.set(Fault::NoParts(manner));
            let daemon = Daemon::start(stage.root.path(), true);
            let slot = daemon.layers.provide(&labels(&stage.name(), &stage.image, 0)).await.unwrap();
            let before = stage.front.blob_bytes_sent();
            for (number, name) in FILES.iter().enumerate().rev() {
                assert!(daemon.read(slot, name).await == content(number), "{manner:?} {name}");
            }
            stage.assert_sent_once(before, &format!("{manner:?}, spans: {spans}"));
        }
    }
}

/// A transfer that breaks is taken up again; what has passed is not lost, and readers get their bytes.
#[tokio::test(flavor = "multi_thread")]
async fn a_pass_that_breaks_off_goes_on() {
    for spans in [false, true] {
        let stage = Stage::new(spans).await;
        stage.front.set(Fault::NoParts(NoParts::Status(400)));
        let daemon = Daemon::start(stage.root.path(), true);
        let slot = daemon.layers.provide(&labels(&stage.name(), &stage.image, 0)).await.unwrap();
        let reading = async { assert!(daemon.read(slot, "e").await == content(4)) };
        let breaking = async {
            for _ in 0..5 {
                stage.front.set(Fault::Stopped);
                tokio::time::sleep(Duration::from_millis(50)).await;
                stage.front.set(Fault::NoParts(NoParts::Status(400)));
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        tokio::join!(reading, breaking);
        for (number, name) in FILES.iter().enumerate() {
            assert!(daemon.read(slot, name).await == content(number), "{name}");
        }
    }
}

/// The image is in two repositories, of which one serves parts: nothing is transferred that is not read.
#[tokio::test(flavor = "multi_thread")]
async fn an_origin_that_serves_parts_is_preferred() {
    for manner in MANNERS {
        let stage = Stage::new(true).await;
        let good = Front::start(&stage.registry.host()).await.unwrap();
        let daemon = Daemon::start(stage.root.path(), true);
        let slot = daemon.layers.provide(&labels(&stage.name(), &stage.image, 0)).await.unwrap();
        let name = format!("{}/team/app:v1", good.host());
        assert_eq!(daemon.layers.provide(&labels(&name, &stage.image, 0)).await.unwrap(), slot);
        stage.front.set(Fault::NoParts(manner));
        let before = good.blob_bytes_sent();
        assert!(daemon.read(slot, "c").await == content(2), "{manner:?}");
        let (sent, layer) = (good.blob_bytes_sent() - before, stage.layer_bytes());
        assert!(sent < layer * 3 / 4, "{manner:?}: {sent} bytes of {layer} were sent for a sixth of the layer");
    }
}

/// The disk is full in the middle of a pass: all that waits gets its bytes, and the right ones, from memory; with room
/// again the layer is kept, by this process and by the next one.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_in_the_middle_of_a_pass() {
    for (spans, manner) in [(false, NoParts::Whole), (true, NoParts::Status(400))] {
        let Some(disk) = SmallDisk::new("40m") else { return };
        let stage = Stage::new(spans).await;
        stage.front.set(Fault::NoParts(manner));
        let wanted = labels(&stage.name(), &stage.image, 0);
        let (slot, present) = {
            let daemon = Daemon::start(disk.path(), true);
            let slot = daemon.layers.provide(&wanted).await.unwrap();
            disk.leave(2 << 20);
            let read = async |number: usize| {
                assert!(daemon.read(slot, FILES[number]).await == content(number), "{manner:?} {number}");
            };
            // Side by side, so that one waits while the other's pass goes on; then again, of what is in memory or comes
            // anew.
            tokio::join!(read(0), read(1), read(2), read(3), read(4));
            for number in (0..FILES.len()).rev() {
                read(number).await;
            }
            let store = daemon.forest.reader(slot).unwrap();
            let present = store.store().present_spans();
            assert!(
                present > 0 && !store.store().is_complete() && store.health().condemned().is_none(),
                "{present} spans"
            );
            disk.resize("40m");
            read(4).await;
            (slot, present)
        };
        let daemon = Daemon::start(disk.path(), true);
        for (number, name) in FILES.iter().enumerate() {
            assert!(daemon.read(slot, name).await == content(number), "{manner:?} {name}");
        }
        let reader = daemon.forest.reader(slot).unwrap();
        assert!(reader.store().present_spans() > present && reader.health().condemned().is_none(), "{manner:?}");
        reader.fetching().complete().await.unwrap();
        assert!(reader.store().is_complete());
    }
}

/// The process is killed in the middle of a pass: the next mount shows right bytes only, has what was stored until
/// then, and goes on.
#[tokio::test(flavor = "multi_thread")]
async fn a_kill_in_the_middle_of_a_pass() {
    if !can_mount() {
        return;
    }
    for (spans, manner) in [(false, NoParts::Status(400)), (true, NoParts::Whole)] {
        let stage = Stage::new(spans).await;
        stage.front.set(Fault::NoParts(manner));
        stage.front.pause(10);
        let at = stage.root.path().join("mnt");
        std::fs::create_dir(&at).unwrap();
        let mut mount = Mount::new(&stage, &at);
        let reading = at.join("e");
        // It fails when the process is killed, or has been answered by then.
        let reader = std::thread::spawn(move || std::fs::read(reading));
        let deadline = Instant::now() + Duration::from_secs(20);
        let (before, all) = loop {
            let (present, all) = mount.present_spans();
            if present >= 5 {
                break (present, all);
            }
            assert!(Instant::now() < deadline, "the pass does not begin");
            tokio::time::sleep(Duration::from_millis(2)).await;
        };
        assert!(before < all, "{manner:?}: all {all} spans were there before it could be killed");
        mount.child.kill().unwrap();
        mount.child.wait().unwrap();
        drop(mount);
        if let Ok(read) = reader.join().unwrap() {
            assert!(read == content(4), "{manner:?}");
        }

        stage.front.pause(0);
        let mount = Mount::new(&stage, &at);
        let (kept, _) = mount.present_spans();
        assert!(kept >= before, "{manner:?}: {kept} of {before} spans are kept");
        for (number, name) in FILES.iter().enumerate() {
            assert!(std::fs::read(mount.at.join(name)).unwrap() == content(number), "{manner:?} {name}");
        }
        let (present, _) = mount.present_spans();
        assert!(present > kept, "{manner:?}");
    }
}
