//! What bad things get: bad indexes, interrupted work, full disks, two processes on one place.
//!
//! The rows of the table of faults that the tests of mounts and of publishing leave out. Everything happens in this
//! process, except for what is killed.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use soci_cli::demo::registry::DemoRegistry;
use soci_fs::fuse::errno::of_read;
use soci_fs::layer::proof::{self, ProofError, Verdict};
use soci_fs::layer::reader::{Cause, LayerReader, Policy, ReadError};
use soci_fs::layer::source::Source;
use soci_fs::layer::source::memory::MemorySource;
use soci_fs::layer::store::{Claim, Parts, Store, StoreError};
use soci_fs::layer::unpack::LayerClaim;
use soci_fs::open::{OpenOptions, OpenedImage, Way, open_image};
use soci_index::find::discover::{self, Discovery, Which};
use soci_index::format::checkpoint::{WINDOW_BYTES, Window};
use soci_index::format::digest::Digest;
use soci_index::format::index::Compression;
use soci_index::format::limits::Limits;
use soci_index::format::manifest::{EMPTY_CONFIG, SociIndex, ZtocReference};
use soci_index::format::model::{Descriptor, media_type};
use soci_index::format::platform::PlatformSelection;
use soci_index::format::ztoc::{Spans, Ztoc};
use soci_index::image::{ImageSource, PlatformImage};
use soci_index::indexing::{Options, index_bytes};
use soci_index::registry::{Body, ClientOptions, CredentialSource, Repository};
use soci_tests::disk::SmallDisk;
use soci_tests::image::{GZIP, Image, gzip, tar, text};
use soci_tests::registry::{DockerRegistry, client};
use soci_tests::{run, soci, stdout};

const SPAN_BYTES: u64 = 65_536;

/// The zTOC of a gzip layer.
fn ztoc(layer: &[u8]) -> Ztoc {
    let options =
        Options { compression: Compression::Gzip, span_bytes: SPAN_BYTES, compact: None, limits: Limits::DEFAULT };
    index_bytes(layer, options).unwrap().into_ztoc().unwrap()
}

/// An image of one layer in a registry of this process, with an index that says of the layer what a test wants.
struct Stage {
    registry: DemoRegistry,
    image: Image,
    root: tempfile::TempDir,
}

impl Stage {
    async fn new(tar: Vec<u8>, ztoc: &[u8]) -> Self {
        let registry = DemoRegistry::start(Duration::ZERO).await.unwrap();
        let image = Image::gzip(vec![tar]);
        let stage = Self { registry, image, root: tempfile::tempdir().unwrap() };
        stage.image.push(&stage.repository(), "v1").await;
        stage.push_index(ztoc).await;
        stage
    }

    fn repository(&self) -> Repository {
        client(&self.registry.host()).repository("team/app")
    }

    async fn push_index(&self, ztoc: &[u8]) {
        let repository = self.repository();
        let reference = ZtocReference {
            digest: Digest::of(ztoc),
            size: ztoc.len() as u64,
            layer: Digest::of(&self.image.blobs[0]),
            layer_media_type: GZIP.to_owned(),
            span_bytes: SPAN_BYTES,
            disable_xattrs: true,
        };
        let subject = Descriptor::of(media_type::MANIFEST, &self.image.manifest);
        let index = SociIndex::v1(&[reference], &[], &subject).to_json();
        for blob in [ztoc, EMPTY_CONFIG] {
            repository.push_blob(&Digest::of(blob), Body::Bytes(Bytes::copy_from_slice(blob)), None).await.unwrap();
        }
        repository.push_referrer(media_type::MANIFEST, index.into()).await.unwrap();
    }

    async fn open(&self) -> (OpenedImage, Arc<Store>) {
        let reference = format!("{}/team/app:v1", self.registry.host()).parse().unwrap();
        let options = ClientOptions { credentials: CredentialSource::Anonymous, ..ClientOptions::default() };
        let source = ImageSource::open(&reference, &options).await.unwrap();
        let images: Vec<PlatformImage> = source.resolve(&PlatformSelection::Host).await.unwrap();
        let store = Arc::new(Store::open(self.root.path()).unwrap());
        let policy = Policy { read_deadline: Duration::from_secs(20), ..Policy::default() };
        let options = OpenOptions { layer_bytes_min: 1000, policy, ..OpenOptions::default() };
        let runtime = tokio::runtime::Handle::current();
        (open_image(&source, &images[0], &store, &options, &runtime).await.unwrap(), store)
    }

    fn claim(&self) -> LayerClaim {
        let blob = &self.image.blobs[0];
        LayerClaim { digest: Digest::of(blob), size: blob.len() as u64, diff_id: Digest::of(&self.image.tars[0]) }
    }
}

/// The indexed part of a layer, read in pieces; bytes before an error are right or the test fails.
async fn read_all(reader: &LayerReader, tar: &[u8]) -> Result<(), ReadError> {
    let (mut offset, mut failed) = (0, Ok(()));
    let size = reader.index().uncompressed_size;
    while offset < size {
        let length = usize::try_from(size - offset).unwrap().min(50_000);
        match reader.read(offset, length).await {
            Ok(bytes) => {
                let at = usize::try_from(offset).unwrap();
                assert!(!bytes.is_empty() && bytes[..] == tar[at..at + bytes.len()], "wrong bytes at {offset}");
                offset += bytes.len() as u64;
            }
            Err(error) => {
                failed = failed.and(Err(error));
                offset += 50_000;
            }
        }
    }
    failed
}

/// A zTOC that is none, or of another layer's size, costs laziness and nothing else; the note says why.
#[tokio::test(flavor = "multi_thread")]
async fn malformed_ztoc_is_streamed() {
    let content = tar(&[("file", text(1, 400_000))]);
    let good = ztoc(&gzip(&content, 6)).encode().unwrap().to_vec();
    let other = ztoc(&gzip(&tar(&[("other", text(2, 100_000))]), 6)).encode().unwrap().to_vec();
    for (bad, why) in [
        (b"this is not a zTOC at all".to_vec(), "not a zTOC"),
        (good[..good.len() / 2].to_vec(), "zTOC"),
        (other, "for a layer of"),
    ] {
        let stage = Stage::new(content.clone(), &bad).await;
        let (opened, _store) = stage.open().await;
        let Way::Streamed(reason) = &opened.notes[0].way else { panic!("{:?}", opened.notes) };
        assert!(reason.contains("its zTOC cannot be used") && reason.contains(why), "{reason}");
        read_all(&opened.readers[0], &content).await.unwrap();
    }
}

/// A zTOC whose digests are of other bytes: the reads fail with EIO, no wrong byte is ever shown, and other spans work.
#[tokio::test(flavor = "multi_thread")]
async fn span_digest_mismatch_is_eio() {
    let content = tar(&[("file", text(1, 600_000))]);
    let mut bad = ztoc(&gzip(&content, 6));
    assert!(bad.digests.len() > 3);
    bad.digests[1] = Some([7; 32]);
    bad.digests[2] = None;
    let stage = Stage::new(content.clone(), &bad.encode().unwrap().to_vec()).await;
    let (opened, _store) = stage.open().await;
    assert_eq!(opened.notes[0].way, Way::Lazy);
    let reader = &opened.readers[0];
    let error = read_all(reader, &content).await.unwrap_err();
    assert_eq!(of_read(&error.cause), rustix::io::Errno::IO, "{error}");
    assert!(error.to_string().contains("span 1") && error.to_string().contains("SHA-256"), "{error}");
    let last = reader.index().spans.spans().last().unwrap().uncompressed.clone();
    let bytes = reader.read(last.start, 100).await.unwrap();
    assert!(bytes[..] == content[usize::try_from(last.start).unwrap()..][..bytes.len()]);
}

/// The index of another layer of the very same size: refused by the digests of its spans.
#[tokio::test(flavor = "multi_thread")]
async fn index_of_another_layer_yields_nothing() {
    // Stored blocks: the same length of content is the same length of layer.
    let (one, two) = (tar(&[("file", text(1, 300_000))]), tar(&[("file", text(2, 300_000))]));
    let (layer, other) = (gzip(&one, 0), gzip(&two, 0));
    assert_eq!(layer.len(), other.len());
    let registry = DemoRegistry::start(Duration::ZERO).await.unwrap();
    let image = Image::new(vec![(GZIP, layer, one.clone())]);
    let stage = Stage { registry, image, root: tempfile::tempdir().unwrap() };
    stage.image.push(&stage.repository(), "v1").await;
    stage.push_index(&ztoc(&other).encode().unwrap().to_vec()).await;
    let (opened, _store) = stage.open().await;
    assert_eq!(opened.notes[0].way, Way::Lazy);
    for span in opened.readers[0].index().spans.spans() {
        let error = opened.readers[0].read(span.uncompressed.start, 10).await.unwrap_err();
        assert_eq!(of_read(&error.cause), rustix::io::Errno::IO, "{error}");
    }
}

/// A forged window passes every check of the index. The proof finds it and takes the layer out of service.
#[tokio::test(flavor = "multi_thread")]
async fn forged_window_is_condemned_by_the_proof() {
    let content = tar(&[("file", text(1, 600_000))]);
    let mut forged = ztoc(&gzip(&content, 6));
    let Spans::Gzip { checkpoints, .. } = &mut forged.spans else { panic!("a gzip layer") };
    // The last one: what an earlier one yields is compared with the window after it.
    let last = checkpoints.last_mut().unwrap();
    let mut window = last.window.load().to_vec();
    window[WINDOW_BYTES / 2..].iter_mut().for_each(|byte| *byte ^= 0x20);
    last.window = Window::from_bytes(window.into()).unwrap();
    let stage = Stage::new(content.clone(), &forged.encode().unwrap().to_vec()).await;
    let (opened, _store) = stage.open().await;
    assert_eq!(opened.notes[0].way, Way::Lazy);
    let reader = &opened.readers[0];
    let span = reader.index().spans.spans().last().unwrap().uncompressed.clone();
    let length = usize::try_from(span.end - span.start).unwrap();
    // Read by itself, the span yields what the forger wanted: an index is a hint until it is proven.
    let shown = reader.read(span.start, length).await.unwrap();
    assert!(shown[..] != content[usize::try_from(span.start).unwrap()..][..shown.len()], "the forgery is seen");

    let error = proof::by_source(reader, stage.claim()).await.unwrap_err();
    assert!(matches!(error, ProofError::Content { .. }), "{error}");
    let refused = reader.read(0, 10).await.unwrap_err();
    assert_eq!(of_read(&refused.cause), rustix::io::Errno::IO, "{refused}");
}

/// The proof by the stored data alone does not call a forged layer proven, and does call a right one so.
#[tokio::test(flavor = "multi_thread")]
async fn proof_by_data_distinguishes_forged_from_right() {
    let content = tar(&[("file", text(1, 600_000))]);
    let layer = Bytes::from(gzip(&content, 6));
    let claim = LayerClaim { digest: Digest::of(&layer), size: layer.len() as u64, diff_id: Digest::of(&content) };
    for forge in [false, true] {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path()).unwrap();
        let index = ztoc(&layer).into_index(layer.len() as u64, &Limits::DEFAULT).unwrap();
        let kept = store.layer(&claim.whole(), &index).unwrap();
        // The store as a reader that followed a forged window would have left it.
        for (id, span) in index.spans.spans().iter().enumerate() {
            let range =
                usize::try_from(span.uncompressed.start).unwrap()..usize::try_from(span.uncompressed.end).unwrap();
            let mut bytes = content[range].to_vec();
            bytes[0] ^= u8::from(forge && id == 2);
            assert_eq!(kept.write(u32::try_from(id).unwrap(), &bytes).unwrap(), Parts::Agree);
        }
        let source = Arc::new(MemorySource::new(layer.clone()));
        let runtime = tokio::runtime::Handle::current();
        let reader = LayerReader::new(claim.digest, Arc::new(index), kept, source, Policy::default(), &runtime);
        let verdict = proof::by_data(&reader, claim.diff_id).await.unwrap();
        assert_eq!(verdict, if forge { Verdict::Undecided } else { Verdict::Proven });
        let by_source = proof::by_source(&reader, claim).await;
        assert_eq!(by_source.is_err(), forge, "{by_source:?}");
    }
}

/// Every index that the registry lists has all its zTOCs.
async fn check_listed(repository: &Repository, image: &Digest) -> bool {
    let Discovery::Found(found) = discover::on_registry(repository, image, Which::Newest).await.unwrap() else {
        return false;
    };
    let index = SociIndex::parse(&found.raw, &Limits::DEFAULT).unwrap();
    assert!(index.ztocs().count() > 0);
    for (_, ztoc) in index.ztocs() {
        let bytes = repository.blob_bytes(ztoc, 1 << 30).await.unwrap();
        assert!(ztoc.digest.matches(&bytes));
    }
    true
}

/// A publish that is killed at any moment leaves no index that misses something, and the next one completes it.
#[tokio::test(flavor = "multi_thread")]
async fn killed_publish_is_continued() {
    let registry = DemoRegistry::start(Duration::from_millis(8)).await.unwrap();
    let repository = client(&registry.host()).repository("team/app");
    let mut killed = 0;
    for attempt in 0..10u64 {
        let layers = (0..3).map(|layer| tar(&[("file", text(attempt * 10 + layer, 500_000))])).collect();
        let image = Image::gzip(layers);
        let tag = format!("v{attempt}");
        image.push(&repository, &tag).await;
        let name = format!("{}/team/app:{tag}", registry.host());
        let publish = ["publish", &name, "--min-layer-size", "1000", "--span-size", "65536"];
        let mut child = soci().args(publish).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        // From before the first request to about the end.
        tokio::time::sleep(Duration::from_millis(20 + attempt * 30)).await;
        child.kill().unwrap();
        killed += u32::from(!child.wait().unwrap().success());
        check_listed(&repository, &image.digest()).await;
        let output = tokio::task::spawn_blocking(move || {
            stdout(soci().args(["publish", &name, "--min-layer-size", "1000", "--span-size", "65536"]))
        });
        let output = output.await.unwrap();
        assert!(check_listed(&repository, &image.digest()).await, "{output}");
    }
    assert!(killed >= 3, "only {killed} were killed before their end");
}

/// A full disk: what was fetched is served all the same, it only is not kept.
#[tokio::test(flavor = "multi_thread")]
async fn full_disk_serves_reads() {
    let Some(disk) = SmallDisk::new("600k") else { return };
    let content = tar(&[("file", text(1, 3_000_000))]);
    let layer = Bytes::from(gzip(&content, 6));
    let index = Arc::new(ztoc(&layer).into_index(layer.len() as u64, &Limits::DEFAULT).unwrap());
    let store = Store::open(disk.path()).unwrap();
    let digest = Digest::of(&layer);
    let kept = store.layer(&Claim::whole(digest, Digest::of(&content)), &index).unwrap();
    let runtime = tokio::runtime::Handle::current();
    let source = Arc::new(MemorySource::new(layer.clone()));
    let reader = || {
        let (index, kept, source) = (Arc::clone(&index), Arc::clone(&kept), Arc::clone(&source));
        LayerReader::new(digest, index, kept, source as Arc<dyn Source>, Policy::default(), &runtime)
    };
    let full = reader();
    for _ in 0..2 {
        read_all(&full, &content).await.unwrap();
    }
    assert!(!kept.is_complete() && kept.present_spans() > 0, "{} spans fit the disk", kept.present_spans());
    assert!(full.health().condemned().is_none());
    let incomplete = full.fetching().complete().await.unwrap_err();
    let Cause::Store(StoreError::Io { cause, .. }) = &incomplete.cause else { panic!("{incomplete}") };
    assert_eq!(cause.kind(), std::io::ErrorKind::StorageFull, "{incomplete}");
    // With room again, the next mount keeps everything.
    disk.resize("20m");
    let roomy = reader();
    read_all(&roomy, &content).await.unwrap();
    roomy.fetching().complete().await.unwrap();
    assert!(kept.is_complete());
}

/// `soci pull` onto a full disk says so, once, and what it brought counts when there is room.
#[tokio::test(flavor = "multi_thread")]
async fn a_pull_onto_a_full_disk() {
    let (Some(disk), Some(registry)) = (SmallDisk::new("3m"), DockerRegistry::start()) else { return };
    let image = Image::gzip(vec![tar(&[("file", text(1, 9_000_000))]), tar(&[("etc/motd", text(2, 2000))])]);
    image.push(&client(&registry.address).repository("team/app"), "v1").await;
    let name = format!("{}/team/app:v1", registry.address);
    let small = ["--min-layer-size", "0"];
    let _ = stdout(soci().args(["publish", &name]).args(small));
    let pull = || run(soci().arg("--root").arg(disk.path()).args(["pull", &name]).args(small));
    let output = pull();
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(7), "{message}");
    assert!(message.lines().last().unwrap().contains("No space left"), "{message}");
    assert!(message.matches("WARN").count() <= image.tars.len(), "a line for a layer, not for a span: {message}");
    disk.resize("40m");
    let again = pull();
    assert!(again.status.success(), "{}", String::from_utf8_lossy(&again.stderr));
}

/// The other process of [`two_processes_on_one_root`]: holds a store until it is killed. Does nothing by itself.
#[test]
fn holder_of_a_store() {
    let Some(root) = std::env::var_os("SOCI_TEST_HOLD") else { return };
    let _store = Store::open(Path::new(&root)).unwrap();
    println!("held");
    std::thread::sleep(Duration::from_secs(60));
}

struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The second process on one store is refused with the process id of the first; when that is gone, however it ended,
/// the store is free.
#[test]
fn two_processes_on_one_root() {
    let root = tempfile::tempdir().unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["faults::holder_of_a_store", "--exact", "--nocapture"]).env("SOCI_TEST_HOLD", root.path());
    let mut holder = Ended(command.stdout(Stdio::piped()).spawn().unwrap());
    let lines = BufReader::new(holder.0.stdout.take().unwrap()).lines();
    assert!(lines.map_while(Result::ok).any(|line| line.contains("held")));
    match Store::open(root.path()) {
        Err(error @ StoreError::Busy { pid, .. }) => {
            assert_eq!(pid, Some(holder.0.id()));
            assert!(error.to_string().contains(&holder.0.id().to_string()), "{error}");
        }
        other => panic!("{other:?}"),
    }
    drop(holder);
    let start = Instant::now();
    while let Err(error) = Store::open(root.path()) {
        assert!(start.elapsed() < Duration::from_secs(5), "{error}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
