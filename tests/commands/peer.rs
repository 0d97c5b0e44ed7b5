//! Side by side with AWS's soci-snapshotter v0.16.1 as a library: what it builds we build, bit by bit; what we push it
//! finds and reads; what it pushes we find, verify and read.

use std::io::Write as _;
use std::path::Path;
use std::process::Command;

use serde_json::json;
use soci_index::format::digest::Digest;
use soci_index::format::model::{Descriptor, ImageManifest, media_type};
use soci_index::image::layout::Layout;
use soci_tests::go::peer;
use soci_tests::image::{GZIP, Image, gzip, tar, text};
use soci_tests::registry::{BothKinds, client};
use soci_tests::{run, soci, stdout};

const PLAIN: &str = "application/vnd.oci.image.layer.v1.tar";

/// A random generator that any seed makes the same everywhere.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % sides
    }
}

/// A layer of files of all sizes, in the ways that layers are compressed.
fn layer(dice: &mut Dice) -> (&'static str, Vec<u8>, Vec<u8>) {
    let files: Vec<(String, Vec<u8>)> = (0..=dice.roll(40))
        .map(|number| {
            let length = match dice.roll(4) {
                0 => 0,
                1 => dice.roll(600),
                2 => 512 * dice.roll(40),
                _ => dice.roll(300_000),
            };
            let name = match dice.roll(5) {
                0 => {
                    format!("d{}/{}", dice.roll(4), "long-".repeat(usize::try_from(dice.roll(60)).unwrap()))
                        + &number.to_string()
                }
                1 => format!("./e/{number}"),
                _ => format!("f{}/{number}", dice.roll(9)),
            };
            (name, text(dice.roll(1 << 30), usize::try_from(length).unwrap()))
        })
        .collect();
    let borrowed: Vec<(&str, Vec<u8>)> = files.iter().map(|(name, content)| (name.as_str(), content.clone())).collect();
    let tar = tar(&borrowed);
    match dice.roll(4) {
        0 => (PLAIN, tar.clone(), tar),
        1 => {
            // As pigz and others do: one member after the other, cut anywhere.
            let cut = usize::try_from(dice.roll(tar.len() as u64)).unwrap();
            let members = [&tar[..cut], &tar[cut..]].map(|part| gzip(part, 6)).concat();
            (GZIP, members, tar)
        }
        _ => (GZIP, gzip(&tar, 1 + u32::try_from(dice.roll(9)).unwrap()), tar),
    }
}

/// An image of one or two platforms in a layout; one without annotations, as other tools write them.
fn layout(dice: &mut Dice, directory: &Path) -> Vec<Image> {
    let shared = layer(dice);
    let image = |dice: &mut Dice| {
        let mut layers = vec![shared.clone()];
        // At least one of its own: two platforms are never the same image.
        layers.extend((0..=dice.roll(2)).map(|_| layer(dice)));
        Image::new(layers)
    };
    let images: Vec<Image> = (0..=dice.roll(2)).map(|_| image(dice)).collect();
    let layout = Layout::open_or_create(directory).unwrap();
    let mut writer = layout.lock().unwrap();
    let mut entries = Vec::new();
    for (image, architecture) in images.iter().zip(["amd64", "arm64"]) {
        for blob in &image.blobs {
            writer.add_blob(blob).unwrap();
        }
        writer.add_blob(&image.manifest).unwrap();
        entries.push(json!({
            "mediaType": media_type::MANIFEST, "digest": image.digest(), "size": image.manifest.len(),
            "platform": { "architecture": architecture, "os": "linux" },
        }));
    }
    if images.len() == 1 {
        writer.add_manifest(Descriptor::of(media_type::MANIFEST, b""), &images[0].manifest).unwrap();
    } else {
        let index = json!({ "schemaVersion": 2, "mediaType": media_type::INDEX, "manifests": entries }).to_string();
        writer.add_manifest(Descriptor::of(media_type::INDEX, b""), index.as_bytes()).unwrap();
    }
    images
}

fn copied(from: &Path, to: &Path) {
    assert!(Command::new("cp").arg("-r").args([from, to]).status().unwrap().success());
}

/// What the peer prints, layer lines apart.
fn said(command: &mut Command) -> Vec<String> {
    stdout(command).lines().filter(|line| line.starts_with("sha256:")).map(str::to_owned).collect()
}

/// Generated images with generated settings: version 1, version 2, the optimisation, prefetch artifacts.
#[test]
fn the_same_bytes() {
    let Some(peer) = peer() else { return };
    for seed in 0..16 {
        let (mut dice, work) = (Dice(seed), tempfile::tempdir().unwrap());
        let ours = work.path().join("ours");
        let images = layout(&mut dice, &ours);
        let theirs = work.path().join("theirs");
        copied(&ours, &theirs);
        // What it creates it lists in index.json, so a conversion starts from another copy.
        let to_convert = work.path().join("to-convert");
        copied(&ours, &to_convert);
        let span = (1 + dice.roll(300_000)).to_string();
        let least = (if dice.roll(2) == 0 { 0 } else { dice.roll(20_000) }).to_string();
        let (xattr, prefetch) = (dice.roll(2) == 0, dice.roll(2) == 0);
        let mut flags = vec!["--span-size", &span, "--min-layer-size", &least];
        let mut peer_flags = flags.clone();
        let create_flags = ["--format", "aws"];
        if xattr {
            flags.extend(["--optimizations", "xattr"]);
            peer_flags.push("--xattr");
        }
        if prefetch {
            flags.extend(["--prefetch-file", "/f1/1", "--prefetch-file", "f2/2"]);
            peer_flags.extend(["--prefetch", "/f1/1,f2/2"]);
        }
        let what = format!("seed {seed}: {flags:?}");
        let root = work.path().join("root");
        let name = format!("oci:{}", ours.display());
        let create = run(soci()
            .arg("--root")
            .arg(&root)
            .args(["create", &name, "--all-platforms"])
            .args(&flags)
            .args(create_flags));
        let peer_create = run(Command::new(&peer).arg("create").arg(&theirs).args(&peer_flags));
        assert_eq!(create.status.success(), peer_create.status.success(), "{what}: {create:?} {peer_create:?}");
        if !create.status.success() {
            // Every layer too small: both say the same.
            let reason = "no ztocs created, all layers either skipped or produced errors";
            assert!(
                [create, peer_create].iter().all(|output| String::from_utf8_lossy(&output.stderr).contains(reason))
            );
            continue;
        }
        let mut expected: Vec<String> = String::from_utf8(peer_create.stdout)
            .unwrap()
            .lines()
            .filter(|line| line.starts_with("sha256:"))
            .map(str::to_owned)
            .collect();
        let mut listed = said(soci().arg("--root").arg(&root).args(["index", "list", "-q"]));
        expected.sort();
        listed.sort();
        expected.dedup();
        assert_eq!(listed, expected, "{what}");
        for index in &listed {
            let file = root.join("content/blobs/sha256").join(&index["sha256:".len()..]);
            let again = stdout(Command::new(&peer).arg("again").arg(&file));
            assert_eq!(again.into_bytes(), std::fs::read(&file).unwrap(), "{what}: {index} is not kept as it is");
        }

        let converted = said(Command::new(&peer).arg("convert").arg(&to_convert).args(&peer_flags));
        let output = work.path().join("converted");
        let line = ["convert", "--standalone", "--format", "oci-dir", "--all-platforms", "--json"];
        let document: serde_json::Value =
            serde_json::from_str(&stdout(soci().args(line).args(&flags).args([&ours, &output]))).unwrap();
        assert_eq!(document["digest"], converted[0], "{what}, {} images", images.len());
    }
}

/// Every file of a layer, read by the peer with our zTOC.
#[test]
fn our_ztocs_are_read() {
    let Some(peer) = peer() else { return };
    let (mut dice, work) = (Dice(7), tempfile::tempdir().unwrap());
    let mut read = 0;
    for number in 0..6 {
        let (_, blob, tar) = layer(&mut dice);
        let (layer, ztoc) = (work.path().join("layer"), work.path().join("ztoc"));
        std::fs::File::create(&layer).unwrap().write_all(&blob).unwrap();
        let span = (1 + dice.roll(100_000)).to_string();
        let line = [&layer, Path::new("-o"), &ztoc, Path::new("--span-size"), Path::new(&span)];
        let _ = stdout(soci().args(["ztoc", "create"]).args(line));
        let listed = stdout(Command::new(&peer).arg("files").args([&layer, &ztoc]));
        let mut expected = Vec::new();
        for entry in tar::Archive::new(&tar[..]).entries().unwrap() {
            let mut entry = entry.unwrap();
            if entry.header().entry_type().is_file() {
                let mut content = Vec::new();
                std::io::Read::read_to_end(&mut entry, &mut content).unwrap();
                let name = String::from_utf8(entry.path_bytes().into_owned()).unwrap();
                expected.push(format!("{} {name}", Digest::of(&content).hex()));
            }
        }
        read += expected.len();
        assert_eq!(listed.lines().collect::<Vec<_>>(), expected, "layer {number}");
    }
    assert!(read > 50, "{read}");
}

/// Through registries, without and with the referrers API, in both directions.
#[tokio::test(flavor = "multi_thread")]
async fn through_registries() {
    let Some(peer) = peer() else { return };
    let registries = BothKinds::start();
    for address in registries.addresses() {
        let mut dice = Dice(11);
        let image = Image::new(vec![layer(&mut dice), layer(&mut dice)]);
        let flags = ["--span-size", "50000", "--min-layer-size", "0"];

        // Ours, read by the peer as its daemon does.
        let repository = client(address).repository("team/ours");
        image.push(&repository, "v1").await;
        let name = format!("{address}/team/ours:v1");
        let published: serde_json::Value = serde_json::from_str(&stdout(
            soci().args(["publish", &name, "--json", "--prefetch-file", "f1/1"]).args(flags),
        ))
        .unwrap();
        let index = published["images"][0]["index"]["digest"].as_str().unwrap();
        let work = tempfile::tempdir().unwrap();
        let size = image.manifest.len().to_string();
        let mut pull = Command::new(&peer);
        pull.args(["pull", &format!("{address}/team/ours"), &image.digest().to_string(), &size]).arg(work.path());
        let pulled = said(&mut pull);
        assert_eq!(pulled[0], index, "{address}");
        let manifest: ImageManifest = serde_json::from_slice(
            &repository
                .manifest(&soci_index::format::reference::ManifestName::Digest(index.parse().unwrap()))
                .await
                .unwrap()
                .unwrap()
                .bytes,
        )
        .unwrap();
        let blobs: Vec<String> = manifest.layers.iter().map(|blob| blob.digest.to_string()).collect();
        assert_eq!(pulled[1..], blobs, "{address}");

        // The peer's, found, verified bit by bit, and enough for us not to read a layer.
        let repository = client(address).repository("team/theirs");
        image.push(&repository, "v1").await;
        let theirs = work.path().join("layout");
        let layout = Layout::open_or_create(&theirs).unwrap();
        let mut writer = layout.lock().unwrap();
        for blob in &image.blobs {
            writer.add_blob(blob).unwrap();
        }
        writer.add_manifest(Descriptor::of(media_type::MANIFEST, b""), &image.manifest).unwrap();
        drop(writer);
        let created = said(Command::new(&peer).arg("create").arg(&theirs).args(flags));
        let to = format!("{address}/team/theirs");
        let pushed = run(Command::new(&peer).arg("push").arg(&theirs).args([&created[0], &to]));
        // Where deletion is off, its library says so after all is in place.
        let message = String::from_utf8_lossy(&pushed.stderr).into_owned();
        assert!(pushed.status.success() || message.contains("405"), "{address}: {message}");
        let name = format!("{to}:v1");
        let verified = stdout(soci().args(["verify", &name]));
        assert!(verified.contains(&created[0]), "{address}: {verified}");
        assert_eq!(verified.matches(" identical").count(), 2, "{address}: {verified}");
        let again: serde_json::Value =
            serde_json::from_str(&stdout(soci().args(["publish", &name, "--json"]).args(flags))).unwrap();
        assert_eq!(again["images"][0]["status"], "up to date", "{address}: {again}");
    }
}
