//! What images and indexes that were made to take memory can make a program hold: no more than is in proportion to their
//! layers. Peaks are those of a process of its own, against one that mounts next to nothing.

use std::fs;
use std::io::Write as _;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use soci_index::format::compact::WINDOWS_MAGIC;
use soci_index::format::digest::Digest;
use soci_index::format::icon;
use soci_index::format::manifest::EMPTY_CONFIG;
use soci_index::format::model::{Descriptor, media_type};
use soci_index::format::span_index::{SpanIndex, SpanReference};
use soci_index::registry::Body;
use soci_tests::image::{GZIP, Image, gzip, tar, text};
use soci_tests::mounting::{Mounting, REPOSITORY, can_mount};
use soci_tests::registry::client;
use soci_tests::{run, soci, stdout};

/// How much more than an idle program may be held.
const ABOVE_IDLE_KIB: u64 = 128 << 10;

/// The most that a process has held so far.
fn peak_kib(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?.split_whitespace().next()?.parse().ok()
}

/// What became of an attempt to mount.
struct Attempt {
    peak_kib: u64,
    said: String,
    /// What a command in the mount printed; `None` if there was no mount.
    read: Option<String>,
}

/// Mounts the image on a node, runs a script in the mount, and unmounts.
fn attempt(stage: &Mounting, node: &str, flags: &[&str], script: &str) -> Attempt {
    let at = stage.mountpoint(node);
    fs::create_dir_all(&at).unwrap();
    let mut command = stage.soci(node, &["mount", &stage.name()]);
    command.arg(&at).args(["--min-layer-size", "0", "--no-profile", "--no-follow-names"]).args(flags);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let (start, mut peak) = (Instant::now(), 0);
    let is_mounted = || soci_fs::fuse::mount::mounts("soci").unwrap().iter().any(|mount| mount.mountpoint == at);
    let read = loop {
        peak = peak_kib(child.id()).unwrap_or(peak);
        if is_mounted() {
            let output = run(Command::new("sh").args(["-c", script]).current_dir(&at));
            peak = peak_kib(child.id()).unwrap_or(peak);
            soci_fs::fuse::mount::unmount(&at, soci_fs::fuse::mount::Lazy::Yes).unwrap();
            break Some(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        if child.try_wait().unwrap().is_some() {
            break None;
        }
        assert!(start.elapsed() < Duration::from_secs(120), "neither a mount nor an end");
        std::thread::sleep(Duration::from_millis(1));
    };
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    Attempt { peak_kib: peak, said, read }
}

/// The peak of a program that mounts next to nothing.
async fn idle_kib() -> u64 {
    let stage = Mounting::new(Image::gzip(vec![tar(&[("a", b"small".to_vec())])])).await;
    attempt(&stage, "idle", &[], "cat a").peak_kib
}

fn assert_modest(attempt: &Attempt, idle: u64, what: &str) {
    let above = attempt.peak_kib.saturating_sub(idle);
    assert!(above <= ABOVE_IDLE_KIB, "{what}: {above} KiB above idle ({idle} KiB): {}", attempt.said);
    println!("{what}: {above} KiB above idle ({idle} KiB)");
}

/// The content of a TOC with these counts, whose columns have these bytes.
fn toc(layer: u64, uncompressed: u64, spans: u64, entries: u64, columns: &[(usize, Vec<u8>)]) -> Vec<u8> {
    let mut content = b"SOCI-TOC\x01\x00\x01\x00\x00\x00\x00\x00".to_vec();
    for number in [layer, uncompressed, layer, spans, entries] {
        content.extend(number.to_le_bytes());
    }
    for column in 0..24 {
        let bytes = columns.iter().find(|(number, _)| *number == column).map_or(&[][..], |(_, bytes)| bytes);
        content.extend((bytes.len() as u64).to_le_bytes());
        content.extend(bytes);
    }
    zstd::bulk::compress(&content, 3).unwrap()
}

/// Pushes a span index of the image's only layer with this TOC.
async fn push_toc(stage: &Mounting, toc: Vec<u8>) {
    let repository = client(&stage.registry.host()).repository(REPOSITORY);
    let windows = WINDOWS_MAGIC.to_vec();
    let reference = SpanReference {
        layer: Digest::of(&stage.image.blobs[0]),
        toc: (Digest::of(&toc), toc.len() as u64),
        windows: (Digest::of(&windows), windows.len() as u64),
        span_bytes: 1 << 20,
    };
    let subject = Descriptor::of(media_type::MANIFEST, &stage.image.manifest);
    let index = serde_json::to_vec(&SpanIndex::new(&[reference], &subject)).unwrap();
    for blob in [toc, windows, EMPTY_CONFIG.to_vec(), icon::PNG.to_vec()] {
        repository.push_blob(&Digest::of(&blob), Body::Bytes(blob.into()), None).await.unwrap();
    }
    repository.push_referrer(media_type::MANIFEST, Bytes::from(index)).await.unwrap();
}

/// Some kilobytes that unpack to a gigabyte, or to millions of entries, words, records or pieces: the head alone says no.
#[tokio::test(flavor = "multi_thread")]
async fn a_small_table_takes_little_memory() {
    if !can_mount() {
        return;
    }
    let idle = idle_kib().await;
    let zeros = |count: u64| vec![0; usize::try_from(count).unwrap()];
    let layer = gzip(&tar(&[("file", text(1, 600_000))]), 6).len() as u64;
    let most = layer * 1032;
    let rows = |entries: u64| {
        let all = (6..24).filter(|column| ![9, 11, 12, 23].contains(column)).map(|column| (column, zeros(entries)));
        all.chain([(12, vec![1, 0]), (0, zeros(1)), (1, zeros(1)), (2, zeros(1)), (3, zeros(32)), (4, zeros(1))])
            .collect::<Vec<_>>()
    };
    let names = zeros(1 << 30);
    // One entry with a sparse file of as many pieces as there are bytes.
    let mut pieces = vec![0, 0, 0, 0];
    pieces.extend([0x80, 0x80, 0x80, 0x08]);
    pieces.extend(zeros(48 << 20));
    let words = [vec![0x80, 0x80, 0x80, 0x10], zeros(32 << 20)].concat();
    for (what, toc) in [
        ("names", toc(layer, most, 1, 1, &[(9, names)])),
        ("entries", toc(layer, most, 1, 3_900_000, &rows(3_900_000))),
        ("entries within a tar", toc(layer, most, 1, most / 512, &rows(most / 512))),
        ("pieces", toc(layer, most, 1, 1, &[rows(1), vec![(23, pieces)]].concat())),
        ("words", toc(layer, most, 1, 1, &[(12, words)])),
        (
            "spans",
            toc(
                layer,
                most,
                900_000,
                1,
                &[(0, zeros(900_000)), (1, zeros(900_000)), (2, zeros(900_000)), (3, zeros(900_000 * 32))],
            ),
        ),
    ] {
        assert!(toc.len() < 200_000, "{what}: {} bytes", toc.len());
        let stage = Mounting::new(Image::gzip(vec![tar(&[("file", text(1, 600_000))])])).await;
        assert_eq!(stage.image.blobs[0].len() as u64, layer);
        push_toc(&stage, toc).await;
        let tried = attempt(&stage, "node", &[], "wc -c < file");
        assert_eq!(tried.read.as_deref().map(str::trim), Some("600000"), "{what}: {}", tried.said);
        assert!(tried.said.contains("cannot be used"), "{what}: {}", tried.said);
        assert_modest(&tried, idle, what);
    }
}

/// A layer of nothing but headers.
fn headers(count: u32) -> (Vec<u8>, Vec<u8>) {
    let mut header = tar::Header::new_gnu();
    header.set_size(0);
    header.set_mode(0o644);
    let mut tar = Vec::with_capacity(count as usize * 512 + 1024);
    for number in 0..count {
        header.set_path(format!("d{}/{number}", number / 1000)).unwrap();
        header.set_cksum();
        tar.extend_from_slice(header.as_bytes());
    }
    tar.resize(tar.len() + 1024, 0);
    let mut encoder = GzEncoder::new(Vec::new(), Compression::new(6));
    encoder.write_all(&tar).unwrap();
    (encoder.finish().unwrap(), tar)
}

/// A layer of some megabytes with half a million files takes no more, indexed or not, unless the operator says so.
#[tokio::test(flavor = "multi_thread")]
async fn a_layer_of_headers_takes_little_memory() {
    if !can_mount() {
        return;
    }
    let idle = idle_kib().await;
    let (blob, tar) = headers(500_000);
    assert!(blob.len() < 8 << 20, "{}", blob.len());
    let stage = Mounting::new(Image::new(vec![(GZIP, blob, tar)])).await;
    for format in ["none", "span", "aws"] {
        if format != "none" {
            drop(stdout(soci().args(["publish", &stage.name(), "--min-layer-size", "0", "--format", format])));
        }
        let tried = attempt(&stage, format, &[], "ls");
        assert_eq!(tried.read, None, "{format}: {}", tried.said);
        assert!(tried.said.contains("max_table_bytes"), "{format}: {}", tried.said);
        assert_modest(&tried, idle, format);
    }
    let allowed = attempt(&stage, "allowed", &["--max-table-bytes", "1073741824"], "ls d7 | wc -l");
    assert_eq!(allowed.read.as_deref().map(str::trim), Some("1000"), "{}", allowed.said);
}

/// A span that decodes to hundreds of megabytes is not decoded; the layer is read whole, bit by bit, unless the operator
/// says so.
#[tokio::test(flavor = "multi_thread")]
async fn large_spans_are_read_whole() {
    if !can_mount() {
        return;
    }
    let idle = idle_kib().await;
    let size = 200 << 20;
    let content = tar(&[("zeros", vec![0; size]), ("end", b"reached\n".to_vec())]);
    let stage = Mounting::new(Image::new(vec![(GZIP, gzip(&content, 6), content)])).await;
    drop(stdout(
        soci()
            .args(["publish", &stage.name(), "--min-layer-size", "0", "--format", "aws", "--span-size"])
            .arg(size.to_string()),
    ));
    let script = "cat end; wc -c < zeros";
    let expected = format!("reached\n{size}\n");
    let tried = attempt(&stage, "node", &[], script);
    assert_eq!(tried.read.as_deref(), Some(&*expected), "{}", tried.said);
    assert!(tried.said.contains("max_span_bytes") && tried.said.contains("fetched:"), "{}", tried.said);
    assert_modest(&tried, idle, "spans");
    let allowed = attempt(&stage, "allowed", &["--max-span-bytes", "1073741824"], script);
    assert_eq!(allowed.read.as_deref(), Some(&*expected), "{}", allowed.said);
    assert!(allowed.said.contains("on demand"), "{}", allowed.said);
}

/// Each layer may have its tables, and all of them together no more than the operator says.
#[tokio::test(flavor = "multi_thread")]
async fn many_layers_have_one_bound() {
    if !can_mount() {
        return;
    }
    let layers = (1..6).map(|number| {
        let (blob, tar) = headers(20_000 + number);
        (GZIP, blob, tar)
    });
    let stage = Mounting::new(Image::new(layers.collect())).await;
    for format in ["none", "span"] {
        if format != "none" {
            drop(stdout(soci().args(["publish", &stage.name(), "--min-layer-size", "0", "--format", format])));
        }
        let tried = attempt(&stage, format, &["--max-total-table-bytes", "30000000"], "ls");
        assert_eq!(tried.read, None, "{format}: {}", tried.said);
        assert!(tried.said.contains("max_total_table_bytes"), "{format}: {}", tried.said);
        let allowed = attempt(&stage, format, &["--max-total-table-bytes", "60000000"], "ls d20 | wc -l");
        assert_eq!(allowed.read.as_deref().map(str::trim), Some("5"), "{format}: {}", allowed.said);
    }
}
