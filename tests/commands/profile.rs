//! Start-up profiles, end to end: recorded from a program that runs in a mount, pushed beside the image, and fetched
//! ahead at the next mount: by spans, and from a pack.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use soci_cli::args::config::Config;
use soci_fs::foresight::profile::{Choice, Replay, ReplayOptions};
use soci_fs::layer::store::Store;
use soci_fs::open::{OpenOptions, open_image};
use soci_index::format::digest::Digest;
use soci_index::format::limits::Limits;
use soci_index::format::platform::PlatformSelection;
use soci_index::format::profile::artifact::Notes;
use soci_index::format::profile::{PAGE_BYTES, Profile, Touched};
use soci_index::format::reference::ManifestName;
use soci_index::image::ImageSource;
use soci_index::publish::profiles;
use soci_tests::front::{Fault, Front};
use soci_tests::image::{Image, shell_layer, tar, text};
use soci_tests::mounting::{Mounting, Serving, can_mount};
use soci_tests::registry::client;
use soci_tests::{run, soci, stdout};
use tokio::runtime::Handle;

const SPAN_BYTES: u64 = 65_536;

/// An image with one layer of files, indexed.
struct Stage {
    mounting: Mounting,
    /// Profiles that were pushed.
    pushed: AtomicU32,
}

impl std::ops::Deref for Stage {
    type Target = Mounting;

    fn deref(&self) -> &Mounting {
        &self.mounting
    }
}

impl Stage {
    async fn new(image: Image) -> Self {
        let mounting = Mounting::new(image).await;
        mounting.publish(&["--index-span-size", &SPAN_BYTES.to_string()]);
        Self { mounting, pushed: AtomicU32::new(0) }
    }

    /// Pushes a profile by hand, a second newer than the one before, so that it is the one which is used.
    async fn push(&self, profile: &Profile, pack: Option<&Path>) {
        let repository = client(&self.registry.host()).repository("team/app");
        let source = ImageSource::in_registry(&repository, ManifestName::Tag("v1".to_owned()));
        let image = source.resolve(&PlatformSelection::Host).await.unwrap().remove(0);
        let created = format!("2026-01-01T00:00:{:02}Z", self.pushed.fetch_add(1, Ordering::Relaxed));
        let notes = Notes { name: "default".to_owned(), is_default: true, created, command: None };
        profiles::push(&repository, &image.raw.descriptor(), profile, pack, &notes).await.unwrap();
    }

    /// A profile of the pages of the first layer that hold these bytes.
    fn profile(&self, ranges: &[(u64, u64)]) -> Profile {
        let ranges = ranges.iter().map(|(start, length)| Touched { layer: 0, bytes: *start..start + length });
        Profile::new(vec![Digest::of(&self.image.blobs[0])], ranges.collect(), &Limits::DEFAULT).unwrap()
    }
}

/// Reads all files of a tree.
fn read_all(directory: &Path) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let entry = entry.unwrap();
        match entry.file_type().unwrap() {
            kind if kind.is_dir() => read_all(&entry.path()),
            kind if kind.is_file() => drop(std::fs::read(entry.path()).unwrap()),
            _ => {}
        }
    }
}

fn data_image(seed: u64) -> (Image, Vec<u8>) {
    let content = text(seed, 3_000_000);
    (Image::gzip(vec![tar(&[("data", content.clone())])]), content)
}

/// Exactly the spans of the profile are fetched, before any read; a budget ends it.
#[tokio::test(flavor = "multi_thread")]
async fn spans_come_ahead_of_reads_within_the_budget() {
    if !can_mount() {
        return;
    }
    let (image, _) = data_image(1);
    let stage = Stage::new(image).await;
    let serving = stage.mount("bare", &["--no-profile"]);
    assert_eq!(serving.settled()["layers"][0]["present_spans"], 0, "without a profile nothing is fetched");
    drop(serving);
    // Two spans' worth in the middle, and a page near the end; also what the layer does not have.
    let far = 40 * SPAN_BYTES;
    stage.push(&stage.profile(&[(far, PAGE_BYTES), (10 * SPAN_BYTES, 2 * SPAN_BYTES), (1 << 40, 5)]), None).await;
    let before = stage.registry.traffic().requests;
    let serving = stage.mount("ahead", &[]);
    let status = serving.settled();
    let layer = &status["layers"][0];
    let (present, requests) = (layer["present_spans"].as_u64().unwrap(), layer["requests"].as_u64().unwrap());
    // Checkpoints are not at round offsets: two spans' worth lie in two to four of them. There are two runs of spans,
    // each a request, with another one for its windows unless a neighbour has brought them.
    assert!((3..=5).contains(&present) && (2..=4).contains(&requests), "{status}");
    assert!(stage.registry.traffic().requests > before);
    drop(serving);
    let none = stage.mount("unwanted", &["--no-profile"]).settled();
    assert_eq!(none["layers"][0]["present_spans"], 0, "{none}");
    // A profile of everything, which is wrong: it costs what it is allowed to cost.
    stage.push(&stage.profile(&[(0, 1 << 20), (1 << 20, 1 << 20), (2 << 20, 900_000)]), None).await;
    let budget = stage.image.blobs[0].len() as u64 / 4;
    let node = stage.mount("poor", &["--profile-budget", &budget.to_string(), "--profile", "default"]);
    let status = node.settled();
    let layer = &status["layers"][0];
    let (present, fetched) = (layer["present_spans"].as_u64().unwrap(), layer["fetched_bytes"].as_u64().unwrap());
    // A quarter of 28 spans, or one less, since there are no halves. Windows, of nearly 8 kB each in this text, come on
    // top of what the budget counts.
    assert!((5..=7).contains(&present) && fetched <= budget + present * 8_000, "{fetched} of {budget}: {status}");
    drop(node);
    let at = stage.scratch.path().join("mnt-poor");
    let mut other = stage.soci("poor", &["mount", &stage.name(), at.to_str().unwrap(), "--profile", "absent"]);
    let refused = run(other.args(["--min-layer-size", "1000"]));
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(refused.status.code() == Some(1) && said.contains("has no profile absent"), "{said}");
}

/// A program is recorded, its profile pushed with a pack, and the next node gets all of it by one request.
#[tokio::test(flavor = "multi_thread")]
async fn recorded_pushed_and_replayed_from_a_pack() {
    if !can_mount() {
        return;
    }
    let mut noise = text(7, 2_000_000);
    noise.splice(..0, *b"first line\n");
    let image = Image::gzip(vec![shell_layer(("etc/greeting", "hello")), tar(&[("data", noise.clone())])]);
    let stage = Stage::new(image).await;
    let (name, file) = (stage.name(), stage.scratch.path().join("p.profile"));
    let file = file.to_str().unwrap();
    let words = ["record", &name, "--min-layer-size", "1000", "-o", file, "--", "/bin/sh", "-c"];
    let script = "read -r word < /etc/greeting; echo \"$word\"; read -r line < /data; : > /tmp/x";
    let said = stdout(stage.soci("recorder", &words).arg(script));
    assert!(said.contains("hello") && said.contains("ranges, read within"), "{said}");
    let failed = run(stage.soci("recorder", &words).arg("exit 7"));
    assert_eq!(failed.status.code(), Some(1), "{failed:?}");
    assert!(String::from_utf8_lossy(&failed.stderr).contains("exit status: 7"), "{failed:?}");
    let _ = stdout(stage.soci("recorder", &words).arg(script));
    let shown: serde_json::Value =
        serde_json::from_str(&stdout(&mut stage.soci("recorder", &["profile", "show", file, "--json"]))).unwrap();
    let bytes = shown["bytes"].as_u64().unwrap();
    assert!(bytes > 100_000, "{shown}");
    let leftovers: Vec<_> = std::fs::read_dir(stage.scratch.path().join("recorder/layers")).unwrap().collect();
    assert!(leftovers.is_empty(), "{leftovers:?}");

    let mut push = stage.soci("recorder", &["profile", "push", &name, file, "--default", "--pack"]);
    let pushed = stdout(push.env("SOURCE_DATE_EPOCH", "86400"));
    assert!(pushed.contains("a pack of"), "{pushed}");
    let listed: serde_json::Value =
        serde_json::from_str(&stdout(&mut stage.soci("x", &["profile", "list", &name, "--json"]))).unwrap();
    assert_eq!(listed[0]["created"], "1970-01-02T00:00:00Z");
    // The command is a note in the manifest; the blob is that of the same reads by any other.
    let command = format!("/bin/sh -c '{script}'");
    assert_eq!((&listed[0]["command"], &shown["command"]), (&command.clone().into(), &command.clone().into()));
    let again = ["profile", "push", &name, file, "--name", "other", "--command", ""];
    let other: serde_json::Value =
        serde_json::from_str(&stdout(stage.soci("recorder", &again).arg("--json").env("SOURCE_DATE_EPOCH", "86400")))
            .unwrap();
    let listed_now: serde_json::Value =
        serde_json::from_str(&stdout(&mut stage.soci("x", &["profile", "list", &name, "--json"]))).unwrap();
    let unnamed = listed_now.as_array().unwrap().iter().find(|one| one["digest"] == other["digest"]).unwrap();
    assert_eq!(unnamed["command"], "", "an empty text publishes no command");
    assert!(listed[0]["default"] == true && listed[0]["packBytes"].as_u64() > Some(1000), "{listed}");
    let table = stdout(&mut stage.soci("x", &["profile", "list", &name]));
    assert!(table.contains("default") && table.contains(&command), "{table}");

    let serving = stage.mount("cold", &[]);
    let run_there = |serving: &Serving| {
        let mut command = Command::new("chroot");
        let read = "read -r word < /etc/greeting; echo \"$word\"; read -r line < /data; :";
        stdout(command.arg(&serving.at).args(["/bin/sh", "-c", read]))
    };
    assert_eq!(run_there(&serving), "hello\n");
    let status = serving.settled();
    // No span was fetched, and the pack counts as what it is: one request, and its bytes.
    let sum = |key: &str| -> u64 {
        status["layers"].as_array().unwrap().iter().map(|layer| layer[key].as_u64().unwrap()).sum()
    };
    assert_eq!((sum("requests"), sum("fetched_bytes")), (1, listed[0]["packBytes"].as_u64().unwrap()), "{status}");
    // All that the pack lacks comes by spans.
    assert!(std::fs::read(serving.at.join("data")).unwrap() == noise);
    assert!(serving.status()["layers"][1]["requests"].as_u64() > status["layers"][1]["requests"].as_u64());
    // Once all is here, nothing is fetched ahead, and no pack.
    read_all(&serving.at);
    drop(serving);
    let before = stage.registry.traffic().bytes_sent;
    let serving = stage.mount("cold", &[]);
    let _ = serving.settled();
    let sent = stage.registry.traffic().bytes_sent - before;
    assert!(sent < 100_000, "{sent} bytes for a mount of what is here");
    drop(serving);
    // Where signatures are required, bytes are not taken from an unsigned pack.
    let strict = stage.mount("strict", &["--provisional", "deny"]);
    assert_eq!(run_there(&strict), "hello\n");
}

/// A pack of other bytes is given up at the first wrong range, with one line, and spans bring the right ones.
#[tokio::test(flavor = "multi_thread")]
async fn damaged_pack_is_given_up() {
    if !can_mount() {
        return;
    }
    let (image, content) = data_image(3);
    let layer = image.tars[0].clone();
    let stage = Stage::new(image).await;
    let ranges = [(0, 65_536), (20 * SPAN_BYTES, 65_536), (30 * SPAN_BYTES, 65_536)];
    let part = |(start, length): (u64, u64)| layer[start as usize..(start + length) as usize].to_vec();
    let digests = ranges.iter().map(|range| Digest::of(&part(*range)).bytes().try_into().unwrap()).collect();
    let profile = stage.profile(&ranges).with_digests(digests).unwrap();
    let mut wrong = part(ranges[1]);
    wrong[500] ^= 1;
    for (number, (second, cut)) in [(wrong, 0), (part(ranges[1]), 40_000)].into_iter().enumerate() {
        let all = [part(ranges[0]), second, part(ranges[2])].concat();
        let mut packed = zstd::bulk::compress(&all, 3).unwrap();
        packed.truncate(packed.len() - cut.min(packed.len() / 2));
        let file = stage.scratch.path().join("pack");
        std::fs::write(&file, packed).unwrap();
        stage.push(&profile, Some(&file)).await;
        let serving = stage.mount(&format!("node{number}"), &["--profile", "default"]);
        let status = serving.settled();
        assert!(status["layers"][0]["present_spans"].as_u64() >= Some(3), "spans take over: {status}");
        assert!(std::fs::read(serving.at.join("data")).unwrap() == content);
        let said = serving.end();
        let lines: Vec<&str> = said.lines().filter(|line| line.contains("pack")).collect();
        let names =
            lines.len() == 1 && lines[0].contains("range ") && lines[0].contains(&profile.layers()[0].to_string());
        assert!(names, "{said}");
    }
}

/// A pack that crawls does not hold up reads: what it lacks, and what is far behind in it, comes by spans at once.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_pack_delays_no_read() {
    let mut state = 1_u64;
    let noise = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    });
    let noise: Vec<u8> = noise.take(3_000_000).collect();
    let image = Image::gzip(vec![tar(&[("data", noise)])]);
    let layer = image.tars[0].clone();
    let stage = Stage::new(image).await;
    let ranges = [(0, 1 << 20), (1 << 20, 1 << 20)];
    let parts = ranges.map(|(start, length)| &layer[start as usize..(start + length) as usize]);
    let digests = parts.map(|part| Digest::of(part).bytes().try_into().unwrap()).to_vec();
    let file = stage.scratch.path().join("pack");
    std::fs::write(&file, zstd::bulk::compress(&parts.concat(), 1).unwrap()).unwrap();
    stage.push(&stage.profile(&ranges).with_digests(digests).unwrap(), Some(&file)).await;

    let front = Front::start(&stage.registry.host()).await.unwrap();
    let repository = client(&front.host()).repository("team/app");
    let source = ImageSource::in_registry(&repository, ManifestName::Tag("v1".to_owned()));
    let found = source.resolve(&PlatformSelection::Host).await.unwrap().remove(0);
    let store = Arc::new(Store::open(&stage.scratch.path().join("store")).unwrap());
    let (config, runtime) =
        (Config { root: stage.scratch.path().join("node"), root_is_named: true }, Handle::current());
    let open = soci_cli::commands::layers::open_options(&config, 1000);
    let open = OpenOptions { profile: Choice::Default, ..open };
    let opened = open_image(&source, &found, &store, &open, &runtime).await.unwrap();
    let wanted = opened.profile.clone().unwrap();
    front.set(Fault::Slow { late: Duration::from_millis(1), bytes_per_second: 100_000 });
    let options = ReplayOptions { budget_bytes: 1 << 30 };
    let readers = opened.readers.clone();
    let replay = Replay::start(wanted, source, readers, options, &runtime);
    let reader = &opened.readers[0];
    for offset in [2_500_000_usize, (2 << 20) - 5000] {
        let start = Instant::now();
        let bytes = reader.read(offset as u64, 4000).await.unwrap();
        assert!(bytes == layer[offset..offset + 4000]);
        // The whole pack takes twenty seconds.
        assert!(start.elapsed() < Duration::from_secs(8), "{:?} at {offset}", start.elapsed());
    }
    assert!(reader.counts().requests >= 2 && reader.store().present_spans() < 10, "by spans, of which there were few");
    drop(replay);
}

/// A node remembers what it read at the last mount, and fetches it ahead after everything is gone from its store.
#[tokio::test(flavor = "multi_thread")]
async fn node_remembers() {
    if !can_mount() {
        return;
    }
    let (image, content) = data_image(4);
    let stage = Stage::new(image).await;
    let read = |serving: &Serving| {
        use std::os::unix::fs::FileExt as _;
        let mut part = [0; 100];
        std::fs::File::open(serving.at.join("data")).unwrap().read_exact_at(&mut part, 1_500_000).unwrap();
        assert_eq!(part, content[1_500_000..1_500_100]);
    };
    let serving = stage.mount("node", &[]);
    read(&serving);
    let _ = serving.end();
    assert_eq!(std::fs::read_dir(stage.scratch.path().join("node/profiles")).unwrap().count(), 1);
    std::fs::remove_dir_all(stage.scratch.path().join("node/layers")).unwrap();
    let serving = stage.mount("node", &[]);
    let ahead = serving.settled();
    assert!(ahead["layers"][0]["present_spans"].as_u64() >= Some(1), "{ahead}");
    read(&serving);
    let after = serving.settled();
    assert_eq!(ahead["layers"][0]["requests"], after["layers"][0]["requests"], "the read found it all");
}

/// A profile is deleted by its name; a registry that does not let us is named, with what to do.
#[tokio::test(flavor = "multi_thread")]
async fn deleted_by_name() {
    let (image, _) = data_image(6);
    let stage = Stage::new(image).await;
    let listed = async || {
        client(&stage.registry.host()).repository("team/app").referrers(&stage.image.digest(), None).await.unwrap()
    };
    let indexes = listed().await.entries.len();
    stage.push(&stage.profile(&[(0, PAGE_BYTES)]), None).await;
    assert_eq!(listed().await.entries.len(), indexes + 1);
    let front = Front::start(&stage.registry.host()).await.unwrap();
    let refused = run(&mut stage.soci("x", &["profile", "rm", &format!("{}/team/app:v1", front.host()), "default"]));
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(refused.status.code() == Some(8) && said.contains("by its own means"), "{said}");
    let name = stage.name();
    assert!(stdout(&mut stage.soci("x", &["profile", "rm", &name, "default"])).contains("is deleted"));
    let again = run(&mut stage.soci("x", &["profile", "rm", &name, "default"]));
    assert!(again.status.code() == Some(1), "{again:?}");
    let index = stdout(&mut stage.soci("x", &["profile", "list", &name, "--json"]));
    assert_eq!(index.trim(), "[]");
    assert_eq!(listed().await.entries.len(), indexes, "the indexes stay");
}

/// Wrong words are refused with a hint.
#[tokio::test(flavor = "multi_thread")]
async fn refusals() {
    let scratch = tempfile::tempdir().unwrap();
    let bad = scratch.path().join("bad");
    std::fs::write(&bad, b"no profile").unwrap();
    let bad = bad.to_str().unwrap();
    let show = run(soci().args(["profile", "show", bad]));
    assert_eq!(show.status.code(), Some(5), "{show:?}");
    let named = run(soci().args(["profile", "push", "127.0.0.1:1/a/b:c", bad, "--name", "no name"]));
    assert!(named.status.code() == Some(2), "{named:?}");
    let missing = run(soci().args(["profile", "show", "/nowhere"]));
    assert_eq!(missing.status.code(), Some(7), "{missing:?}");
}
