//! A container reads from a lazily pulled image while its registry, or its disk, fails.
//!
//! What is expected: a fault that is shorter than the read deadline costs time and nothing else; whatever comes, no
//! wrong byte is shown; what is here is read on; and after an error the next read is as good as any. The registry is
//! behind a [`Front`], so the requests are real ones, and each fault is met by reads of a layer that nothing has read
//! before.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{Advice, fadvise};
use soci_index::format::digest::Digest;
use soci_tests::containerd::Containerd;
use soci_tests::front::{Fault, Front};
use soci_tests::image::{Image, shell_layer, tar, text};
use soci_tests::node::Node;
use soci_tests::run;
use soci_tests::stage::Stage;

/// Layers with one file each. Nothing is read ahead from one to the next.
const FILES: u64 = 12;
/// A file of about six spans.
const FILE_BYTES: usize = 1 << 20;
const SPAN_BYTES: u32 = 64 << 10;
/// How long a fault lasts that is to be ridden out.
const OUTAGE: Duration = Duration::from_millis(1500);
/// What the daemon allows a read.
const READ_DEADLINE: Duration = Duration::from_secs(30);
const READER: &str = "reader";

fn content(file: u64) -> Vec<u8> {
    text(file + 1, FILE_BYTES)
}

/// A container that runs on a lazily pulled image.
struct Scene {
    node: Node,
    front: Front,
    image: Image,
    _stage: Stage,
}

impl Scene {
    async fn new(disk: Option<&str>) -> Option<Self> {
        let stage = Stage::new().await?;
        let node = Node::start_on(Containerd::V2, disk)?;
        let layers = (0..FILES).map(|file| tar(&[(&format!("srv/{file}"), content(file))]));
        let image = Image::gzip([shell_layer(("/etc/base", ""))].into_iter().chain(layers).collect());
        drop(stage.publish(&image, "v1", SPAN_BYTES).await);
        let front = Front::start(&stage.registry.host()).await.unwrap();
        let name = stage.name(&front.host(), "v1");
        assert!(stage.pull(&node, "soci", &name) > 0);
        node.start_container(&name, READER);
        // The programs themselves are here from now on.
        node.assert_reads(READER, "/srv/0", &content(0));
        let scene = Self { node, front, image, _stage: stage };
        assert!((1..FILES).all(|file| scene.requests(file) == 0), "something was read before it was asked for");
        Some(scene)
    }

    /// Requests for the layer of a file.
    fn requests(&self, file: u64) -> usize {
        let layer = &self.image.blobs[usize::try_from(file).unwrap() + 1];
        self.front.requests(&Digest::of(layer).to_string())
    }

    fn begin(&self, file: u64) -> std::process::Child {
        let mut command = self.node.exec(READER, &format!("cat /srv/{file}"));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// Reads a file while the fault is there: what is shown is right as far as it goes.
    fn read_through(&self, file: u64) -> Output {
        let output = run(&mut self.node.exec(READER, &format!("cat /srv/{file}")));
        let content = content(file);
        assert!(content.starts_with(&output.stdout), "wrong bytes of file {file}");
        assert_eq!(output.status.success(), output.stdout == content, "an end without an error: {output:?}");
        output
    }

    /// The kernel's copy of a file goes, the store's stays.
    fn evict(&self, file: u64) {
        let slots = std::fs::read_dir(self.node.path("soci/fs")).unwrap();
        let files = slots.map(|slot| slot.unwrap().path().join(format!("srv/{file}")));
        let found: Vec<_> = files.filter_map(|path| File::open(path).ok()).collect();
        assert_eq!(found.len(), 1);
        fadvise(&found[0], 0, None, Advice::DontNeed).unwrap();
    }

    /// A file that is here is read without a request.
    fn read_what_is_here(&self, file: u64) {
        self.evict(file);
        let before = self.requests(file);
        self.node.assert_reads(READER, &format!("/srv/{file}"), &content(file));
        assert_eq!(self.requests(file), before);
    }
}

/// Faults during which a reader waits.
#[tokio::test(flavor = "multi_thread")]
async fn short_faults_cost_time_and_nothing_else() {
    let Some(scene) = Scene::new(None).await else { return };
    let faults = [
        Fault::Stopped,
        Fault::Cut,
        Fault::Status(429, "retry-after: 1\r\n"),
        Fault::Status(500, ""),
        // Credentials that are renewed meanwhile, somewhere else.
        Fault::Status(401, "www-authenticate: Basic realm=\"elsewhere\"\r\n"),
        Fault::Status(403, ""),
        Fault::Status(503, "retry-after: 1\r\n"),
    ];
    for (fault, file) in faults.into_iter().zip(1..) {
        let before = scene.front.set(fault);
        let start = Instant::now();
        let mut reading = scene.begin(file);
        scene.read_what_is_here(0);
        std::thread::sleep(OUTAGE.saturating_sub(start.elapsed()));
        let ended = reading.try_wait().unwrap();
        // A connection that is cut makes progress each time.
        assert!(ended.is_none() || fault == Fault::Cut, "{fault:?}: the read did not wait: {ended:?}");
        let struck = scene.front.set(Fault::None) - before;
        assert!(struck > 0 || fault == Fault::Stopped, "{fault:?} was not met");
        let output = reading.wait_with_output().unwrap();
        assert!(output.status.success() && output.stdout == content(file), "{fault:?}: {:?}", output.status);
        scene.read_what_is_here(file);
    }
    // This one need not end.
    let slow = Fault::Slow { late: Duration::from_secs(1), bytes_per_second: 150_000 };
    let before = scene.front.set(slow);
    let start = Instant::now();
    assert!(scene.read_through(9).status.success());
    assert!(start.elapsed() > Duration::from_secs(2), "{:?}", start.elapsed());
    assert!(scene.front.set(Fault::None) > before);
}

/// Answers that trying again does not help against for long: an error, never wrong bytes, and no memory of it.
#[tokio::test(flavor = "multi_thread")]
async fn refusals_and_damage_are_errors_until_they_end() {
    let Some(scene) = Scene::new(None).await else { return };
    let faults =
        [Fault::Status(401, "www-authenticate: Basic realm=\"elsewhere\"\r\n"), Fault::Status(403, ""), Fault::Garbage];
    for (fault, file) in faults.into_iter().zip(1..) {
        let before = scene.front.set(fault);
        let output = scene.read_through(file);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains("Input/output error"), "{fault:?}: {said}");
        scene.read_what_is_here(0);
        assert!(scene.front.set(Fault::None) > before, "{fault:?} was not met");
        let path = format!("/srv/{file}");
        scene.node.assert_reads(READER, &path, &content(file));
        scene.read_what_is_here(file);
    }
    // A registry that sends other parts than it was asked for is asked for the whole.
    let before = scene.front.set(Fault::WrongRange);
    assert!(scene.read_through(9).status.success());
    assert!(scene.front.set(Fault::None) > before);
}

/// A registry that is away for longer than a read may take.
#[tokio::test(flavor = "multi_thread")]
async fn long_outages_end_reads_and_nothing_else() {
    let Some(scene) = Scene::new(None).await else { return };
    scene.front.set(Fault::Stopped);
    let start = Instant::now();
    let output = scene.read_through(1);
    let took = start.elapsed();
    assert!(!output.status.success(), "{output:?}");
    // The kernel asks twice, for a run of pages and then for the one that is needed, and each question has its
    // deadline.
    assert!(took < 2 * READ_DEADLINE + Duration::from_secs(10), "the read took {took:?}");
    scene.read_what_is_here(0);
    // Nor does a worker need the registry to start.
    scene.node.kill_worker();
    scene.read_what_is_here(0);
    scene.front.set(Fault::None);
    for file in 1..3 {
        scene.node.assert_reads(READER, &format!("/srv/{file}"), &content(file));
    }
}

/// A disk without room: what is fetched is shown, only not kept; writers get an error.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_costs_no_read() {
    let Some(scene) = Scene::new(Some("48m")).await else { return };
    let ballast = scene.node.path("soci/ballast");
    fill(&ballast);
    for file in 1..4 {
        scene.node.assert_reads(READER, &format!("/srv/{file}"), &content(file));
    }
    scene.read_what_is_here(0);
    let write = run(&mut scene.node.exec(READER, "cp /srv/0 /srv/copy"));
    let said = String::from_utf8_lossy(&write.stderr);
    assert!(!write.status.success() && said.contains("No space left"), "{said}");

    // A worker can start without room, too.
    scene.node.kill_worker();
    scene.read_what_is_here(0);
    scene.evict(1);
    let before = scene.requests(1);
    scene.node.assert_reads(READER, "/srv/1", &content(1));
    assert!(scene.requests(1) > before, "it was kept on a disk without room");

    // With room again it is kept: another worker has it without asking.
    std::fs::remove_file(&ballast).unwrap();
    scene.node.assert_reads(READER, "/srv/5", &content(5));
    scene.node.kill_worker();
    scene.read_what_is_here(5);
    assert!(run(&mut scene.node.exec(READER, "cp /srv/0 /srv/copy")).status.success());
    scene.node.assert_reads(READER, "/srv/copy", &content(0));
}

/// Writes to a file until nothing more fits its disk.
fn fill(path: &Path) {
    let mut file = File::create(path).unwrap();
    // To the last byte: pieces become smaller as they do not fit.
    for size in [1 << 20, 4096, 1] {
        while file.write_all(&vec![1; size]).is_ok() {}
    }
}
