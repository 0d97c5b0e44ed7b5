//! Publishing, end to end, on real registries.

use std::path::Path;
use std::process::Command;

use soci_index::format::checkpoint::Window;
use soci_index::format::digest::Digest;
use soci_index::format::limits::Limits;
use soci_index::format::manifest::SociIndex;
use soci_index::format::model::{Descriptor, media_type};
use soci_index::format::reference::ManifestName;
use soci_index::format::ztoc::{Spans, Ztoc};
use soci_index::image::layout::Layout;
use soci_index::registry::Body;
use soci_tests::gate::Gate;
use soci_tests::image::{Image, tar, text};
use soci_tests::registry::{DockerRegistry, Peryx, client, client_with_password};
use soci_tests::{run, soci, stdout};

fn image() -> Image {
    let base = tar(&[("bin/tool", text(1, 3_000_000)), ("etc/conf", text(2, 500))]);
    let top = tar(&[("app/data", text(3, 2_000_000)), ("app/main", text(4, 100))]);
    let tiny = tar(&[("tiny", text(5, 10))]);
    Image::gzip(vec![base, top, tiny])
}

/// Publishing twice: the second time reads no layer; the index is found; a half-done publish is repaired.
#[tokio::test(flavor = "multi_thread")]
async fn publish_on_docker_registry() {
    let Some(registry) = DockerRegistry::start() else { return };
    let repository = client(&registry.address).repository("team/app");
    let image = image();
    image.push(&repository, "v1").await;
    let name = format!("{}/team/app:v1", registry.address);
    let publish = ["publish", &name, "--min-layer-size", "1000", "--span-size", "262144", "--json"];

    let dry: serde_json::Value = serde_json::from_str(&stdout(soci().args(publish).arg("--dry-run"))).unwrap();
    assert_eq!(dry["images"][0]["status"], "dry run");
    assert_eq!(repository.fallback_entries(&image.digest()).await.unwrap(), None, "a dry run pushes nothing");

    let first: serde_json::Value = serde_json::from_str(&stdout(soci().args(publish))).unwrap();
    assert_eq!(first["images"][0]["status"], "published");
    assert_eq!(first["images"][0]["foundBy"], "the fallback tag");
    assert_eq!(first["images"][0]["index"]["digest"], dry["images"][0]["index"]["digest"], "the same bytes every time");
    let layers = first["images"][0]["layers"].as_array().unwrap();
    assert!(layers[0]["ztoc"]["digest"].is_string() && layers[1]["ztoc"]["digest"].is_string());
    assert!(
        layers[2]["skipped"].as_str().is_some_and(|text| text.contains("less than min-layer-size 1000")),
        "{layers:?}"
    );

    let second: serde_json::Value = serde_json::from_str(&stdout(soci().args(publish))).unwrap();
    assert_eq!(second["images"][0]["status"], "up to date");
    let layer_bytes: usize = image.blobs.iter().map(bytes::Bytes::len).sum();
    assert!(
        second["bytesReceived"].as_u64().unwrap() < 20_000,
        "no layer is read again ({layer_bytes} bytes): {second}"
    );
    assert_eq!(second["bytesSent"], 0);

    let entries = repository.fallback_entries(&image.digest()).await.unwrap().unwrap();
    let published = &first["images"][0];
    let listed: Vec<String> = entries.iter().map(|entry| entry.digest.to_string()).collect();
    let expected = [&published["index"], &published["spanIndex"]].map(|index| index["digest"].as_str().unwrap());
    assert_eq!(listed, expected);
}

/// Where a hosts.toml names another host for a registry, its own name need not lead anywhere.
#[tokio::test(flavor = "multi_thread")]
async fn publish_by_way_of_a_hosts_file() {
    let Some(registry) = DockerRegistry::start() else { return };
    let repository = client(&registry.address).repository("team/app");
    let image = image();
    image.push(&repository, "v1").await;
    let root = tempfile::tempdir().unwrap();
    let directory = root.path().join("registry.invalid_5000_");
    std::fs::create_dir(&directory).unwrap();
    std::fs::write(directory.join("hosts.toml"), format!("server = 'http://{}'\n", registry.address)).unwrap();
    let hosts = format!("/no/such/place,{}", root.path().display());
    let name = "registry.invalid:5000/team/app:v1";
    let publish = ["publish", name, "--min-layer-size", "1000", "--json", "--hosts-dir", &hosts];
    let published: serde_json::Value = serde_json::from_str(&stdout(soci().args(publish))).unwrap();
    assert_eq!(published["images"][0]["status"], "published");
    let entries = repository.fallback_entries(&image.digest()).await.unwrap().unwrap();
    assert_eq!(entries[0].digest.to_string(), published["images"][0]["index"]["digest"].as_str().unwrap());
}

/// Tokens, and the referrers API, of a registry that is not ours; a mount from it too. Without credentials: exit code
/// 3.
#[tokio::test(flavor = "multi_thread")]
async fn publish_with_tokens() {
    let Some(registry) = Peryx::start() else { return };
    let repository = client_with_password(&registry.address, Peryx::PASSWORD).repository("team/app");
    let image = image();
    image.push(&repository, "v1").await;
    let name = format!("{}/team/app:v1", registry.address);
    let publish = ["publish", &name, "--min-layer-size", "1000", "--json"];
    let empty = tempfile::tempdir().unwrap();
    let anonymous = run(soci().args(publish).env("DOCKER_CONFIG", empty.path()));
    assert_eq!(anonymous.status.code(), Some(3), "{anonymous:?}");
    let wrong = run(soci().args(publish).args(["--user", "robot$team+ci:wrong"]));
    assert_eq!(wrong.status.code(), Some(3), "{wrong:?}");
    assert!(!String::from_utf8_lossy(&wrong.stderr).contains("wrong"), "no secret is shown: {wrong:?}");

    let by_stdin = |arguments: &[&str]| {
        let mut command = std::process::Command::new("sh");
        let quoted: Vec<String> = arguments.iter().map(|word| format!("'{word}'")).collect();
        let line = format!(
            "printf '%s\\n' '{}' | {} {}",
            Peryx::PASSWORD,
            soci_tests::soci_path().display(),
            quoted.join(" ")
        );
        command.args(["-c", &line]).env("CI", "true");
        command
    };
    let credentials = ["--user", "robot$team+ci", "--password-stdin"];
    let first: serde_json::Value =
        serde_json::from_str(&stdout(&mut by_stdin(&[&publish[..], &credentials].concat()))).unwrap();
    assert_eq!(first["images"][0]["status"], "published", "{first}");
    assert_eq!(first["images"][0]["foundBy"], "the referrers API", "{first}");
    let second: serde_json::Value =
        serde_json::from_str(&stdout(&mut by_stdin(&[&publish[..], &credentials].concat()))).unwrap();
    assert_eq!(second["images"][0]["status"], "up to date", "{second}");

    // Docker's configuration does as well.
    let login =
        serde_json::json!({ "auths": { &registry.address: { "auth": "cm9ib3QkdGVhbStjaTpjb3JyZWN0IGhvcnNl" } } });
    std::fs::write(empty.path().join("config.json"), login.to_string()).unwrap();
    let third = stdout(soci().args(publish).env("DOCKER_CONFIG", empty.path()));
    assert!(third.contains("up to date"), "{third}");
}

/// A command that keeps its state here.
fn soci_below(root: &Path, arguments: &[&str]) -> Command {
    let mut command = soci();
    command.arg("--root").arg(root).args(arguments);
    command
}

/// `create` and `push` lead to the same index as `publish`.
#[tokio::test(flavor = "multi_thread")]
async fn create_push_list_remove() {
    let Some(registry) = DockerRegistry::start() else { return };
    let repository = client(&registry.address).repository("team/app");
    let image = image();
    image.push(&repository, "v1").await;
    let name = format!("{}/team/app:v1", registry.address);
    let root = tempfile::tempdir().unwrap();
    let local = |arguments: &[&str]| soci_below(root.path(), arguments);

    assert_eq!(stdout(&mut local(&["index", "list", "-q"])), "");
    let failed = run(&mut local(&["push", &name]));
    assert_eq!(failed.status.code(), Some(7), "{failed:?}");
    let created = stdout(&mut local(&["create", &name, "--min-layer-size", "1000"]));
    assert_eq!(created.lines().filter(|line| line.contains(" -> ztoc ")).count(), 2, "{created}");
    assert_eq!(stdout(&mut local(&["create", &name, "--min-layer-size", "1000"])).matches("already exists").count(), 2);
    let listed: serde_json::Value =
        serde_json::from_str(&stdout(&mut local(&["index", "list", "--ref", &name, "--json", "--span-indexes"])))
            .unwrap();
    let of_form = |form: &str| -> String {
        let entry = listed.as_array().unwrap().iter().find(|entry| entry["version"] == form);
        entry.unwrap()["digest"].as_str().unwrap().to_owned()
    };
    let (index, spans) = (of_form("v1"), of_form("spans"));
    let info: serde_json::Value = serde_json::from_str(&stdout(&mut local(&["index", "info", &index]))).unwrap();
    assert_eq!(info["subject"]["digest"], image.digest().to_string());
    assert_eq!(stdout(&mut local(&["ztoc", "list", "-q"])).lines().count(), 2);
    let ztoc = info["layers"][0]["digest"].as_str().unwrap();
    assert!(stdout(&mut local(&["ztoc", "info", ztoc])).contains("\"filename\": \"bin/tool\""));

    let pushed = stdout(&mut local(&["push", &name]));
    assert!(pushed.contains(&format!("pushing soci index with digest: {index}")), "{pushed}");
    let again = stdout(&mut local(&["push", &name, "--existing-index", "skip"]));
    assert!(again.contains("skipping pushing artifacts"), "{again}");
    let published = stdout(soci().args(["publish", &name, "--min-layer-size", "1000"]));
    assert!(published.contains(&format!("index {index} is up to date")), "{published}");

    assert_eq!(stdout(&mut local(&["index", "rm", &index])), "");
    assert_eq!(stdout(&mut local(&["index", "list", "-q", "--span-indexes"])), "", "{spans} went along");
    assert_eq!(run(&mut local(&["index", "rm", &index])).status.code(), Some(1));
}

/// Every failure has its exit code and one line that names the thing; nothing is published.
#[tokio::test(flavor = "multi_thread")]
async fn failures_have_codes() {
    let Some(registry) = DockerRegistry::start() else { return };
    let repository = client(&registry.address).repository("team/app");
    let mut image = image();
    let good = image.clone();
    good.push(&repository, "good").await;
    let name = |tag: &str| format!("{}/team/app:{tag}", registry.address);

    // A layer that does not unpack to what the configuration says.
    let forged = Image::new(vec![(soci_tests::image::GZIP, good.blobs[0].to_vec(), b"something else".to_vec())]);
    forged.push(&repository, "forged").await;
    // A damaged layer under its own right digest.
    let mut damaged = good.blobs[0].to_vec();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 0x55;
    image = Image::new(vec![(soci_tests::image::GZIP, damaged, good.tars[0].clone())]);
    image.push(&repository, "damaged").await;

    for (reference, more, code, text) in [
        (name("forged"), &["--min-layer-size", "0"][..], 5, "diff"),
        (name("damaged"), &["--min-layer-size", "0"], 5, "cannot be indexed"),
        (name("good"), &[], 6, "no ztocs created, all layers either skipped or produced errors"),
        (name("absent"), &[], 1, "no such image"),
        ("127.0.0.1:1/none:x".to_owned(), &["--timeout", "20s"], 4, "127.0.0.1:1"),
        ("no reference at all".to_owned(), &[], 2, "no reference"),
        (name("good"), &["--platform", "plan9/mips"], 1, "plan9/mips"),
        (name("good"), &["--platform", "x"], 2, "platform"),
    ] {
        let output = run(soci().args(["publish", &reference]).args(more));
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{reference}: {message}");
        let wanted = if text == "diff" { "unpacks to" } else { text };
        assert!(message.contains(wanted), "{reference}: {message}");
    }
    for digest in [forged.digest(), image.digest(), good.digest()] {
        assert_eq!(repository.fallback_entries(&digest).await.unwrap(), None, "nothing is published");
    }
    assert_ne!(Digest::of(&good.manifest), image.digest());
}

/// Images share layers: one that was indexed under another tag is not read again.
#[tokio::test(flavor = "multi_thread")]
async fn shared_layers_are_read_once() {
    let Some(registry) = DockerRegistry::start() else { return };
    let repository = client(&registry.address).repository("team/app");
    let first = image();
    let top = tar(&[("app/data", text(77, 1_500_000))]);
    let second = Image::gzip(vec![first.tars[0].clone(), top]);
    let third = Image::gzip(first.tars[..1].to_vec());
    for (image, tag) in [(&first, "v1.9"), (&second, "v1.10"), (&third, "base")] {
        image.push(&repository, tag).await;
    }
    let publish = |tag: &str, span: &str| -> serde_json::Value {
        let name = format!("{}/team/app:{tag}", registry.address);
        let line = ["publish", &name, "--min-layer-size", "1000", "--span-size", span, "--json"];
        serde_json::from_str(&stdout(soci().args(line))).unwrap()
    };
    let reused = |published: &serde_json::Value| -> Vec<Option<bool>> {
        published["images"][0]["layers"].as_array().unwrap().iter().map(|layer| layer["reused"].as_bool()).collect()
    };
    assert_eq!(reused(&publish("v1.9", "262144")), [Some(false), Some(false), None]);
    let again = publish("v1.10", "262144");
    assert_eq!(reused(&again), [Some(true), Some(false)], "{again}");
    let received = again["bytesReceived"].as_u64().unwrap();
    assert!(received < second.blobs[1].len() as u64 + 50_000, "only the new layer is read: {again}");
    let base = publish("base", "262144");
    assert_eq!(reused(&base), [Some(true)], "{base}");
    assert!(base["bytesReceived"].as_u64().unwrap() < 50_000, "no layer is read: {base}");
    // Another span size is another zTOC.
    assert_eq!(reused(&publish("base", "524288")), [Some(false)]);
    // No more tags are looked at than configured.
    let last = Image::gzip(vec![first.tars[1].clone(), first.tars[0].clone()]);
    last.push(&repository, "v1.11").await;
    let name = format!("{}/team/app:v1.11", registry.address);
    let line = ["publish", &name, "--min-layer-size", "1000", "--span-size", "262144", "--json", "--reuse-tags", "0"];
    assert_eq!(reused(&serde_json::from_str(&stdout(soci().args(line))).unwrap()), [Some(false), Some(false)]);
}

/// The index of an image beside which nothing may be pushed: in another repository, which only --index-from finds.
#[tokio::test(flavor = "multi_thread")]
async fn to_on_docker_registry() {
    let (Some(images), Some(indexes)) = (DockerRegistry::start(), DockerRegistry::start()) else { return };
    let repository = client(&images.address).repository("library/app");
    let image = image();
    image.push(&repository, "v1").await;
    let (name, to) = (format!("{}/library/app:v1", images.address), format!("{}/soci/index", indexes.address));
    let publish = ["publish", &name, "--to", &to, "--min-layer-size", "1000", "--json"];
    let first: serde_json::Value = serde_json::from_str(&stdout(soci().args(publish))).unwrap();
    assert_eq!(first["images"][0]["status"], "published", "{first}");
    let second: serde_json::Value = serde_json::from_str(&stdout(soci().args(publish))).unwrap();
    assert_eq!((&second["images"][0]["status"], &second["bytesSent"]), (&"up to date".into(), &0.into()), "{second}");
    assert_eq!(repository.fallback_entries(&image.digest()).await.unwrap(), None, "nothing is beside the image");
    let target = client(&indexes.address).repository("soci/index");
    assert_eq!(target.fallback_entries(&image.digest()).await.unwrap().unwrap().len(), 2);

    let code = run(soci().args(publish).arg("--detailed-exit-code")).status.code();
    assert_eq!(code, Some(10), "nothing to do has a code of its own where that is asked for");
    for bad in ["h.example/a:tag", "oci:/tmp/x", "app"] {
        let refused = run(soci().args(["publish", &name, "--to", bad]));
        assert_eq!(refused.status.code(), Some(2), "{bad}: {refused:?}");
    }
}

/// `soci verify` finds an index that says of a file what the layer does not, and names the file.
#[tokio::test(flavor = "multi_thread")]
async fn verify_names_what_is_forged() {
    let Some(registry) = DockerRegistry::start() else { return };
    let repository = client(&registry.address).repository("team/app");
    let image = image();
    image.push(&repository, "v1").await;
    let name = format!("{}/team/app:v1", registry.address);
    let root = tempfile::tempdir().unwrap();
    let soci = || {
        let mut command = soci();
        command.arg("--root").arg(root.path());
        command
    };
    let none = run(soci().args(["verify", &name]));
    assert_eq!(none.status.code(), Some(1), "{none:?}");
    let _ = stdout(soci().args(["publish", &name, "--min-layer-size", "1000", "--span-size", "262144"]));
    let verified = stdout(soci().args(["verify", &name]));
    assert_eq!(verified.matches(" identical").count(), 6, "two zTOCs, two TOCs, two windows blobs: {verified}");

    // The same zTOC but for the mode of one file, and but for one byte of a window.
    let index = repository.fallback_entries(&image.digest()).await.unwrap().unwrap().remove(0);
    let raw = repository.manifest(&ManifestName::Digest(index.digest)).await.unwrap().unwrap();
    let parsed = SociIndex::parse(&raw.bytes, &Limits::DEFAULT).unwrap();
    let blob = parsed.layers[0].clone();
    let bytes = repository.blob_bytes(&blob, u64::MAX).await.unwrap();
    let ztoc = Ztoc::decode(&bytes, &Limits::DEFAULT).unwrap();
    let mut setuid = ztoc.clone();
    let tool = setuid.entries.iter_mut().find(|entry| *entry.name == *b"bin/tool").unwrap();
    tool.mode = 0o4755;
    let mut window = ztoc.clone();
    let Spans::Gzip { checkpoints, .. } = &mut window.spans else { panic!("gzip") };
    let mut bytes = *checkpoints[2].window.load();
    bytes[40] ^= 1;
    checkpoints[2].window = Window::pack(&bytes);
    let mut tool = ztoc.clone();
    tool.build_tool = "another tool".to_owned();
    for (forged, code, text) in [
        (setuid, 5, "(bin/tool): its mode is 2541, the layer says 420"),
        (window, 5, "DIFFERS: span 2: its window is not the layer's"),
        (tool, 0, "says the same in other bytes (made by \"another tool\")"),
    ] {
        let forged = bytes::Bytes::from(forged.encode().unwrap().to_vec());
        let mut index = parsed.clone();
        (index.layers[0].digest, index.layers[0].size) = (Digest::of(&forged), forged.len() as u64);
        let json = bytes::Bytes::from(index.to_json());
        repository.push_blob(&Digest::of(&forged), Body::Bytes(forged), None).await.unwrap();
        let digest = repository.push_referrer(media_type::MANIFEST, json).await.unwrap().digest.to_string();
        let output = run(soci().args(["verify", &name, "--index", &digest]));
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        assert_eq!(output.status.code(), Some(code), "{output:?}");
        assert!(printed.contains(text), "{printed}");
        assert_eq!(printed.matches(" identical").count(), 1, "the other layer is right: {printed}");
    }
}

/// Files that are wanted early, through `create`, a second `create` that reads no layer, and `prefetch`.
#[tokio::test(flavor = "multi_thread")]
async fn prefetch_artifacts() {
    let Some(registry) = DockerRegistry::start() else { return };
    let repository = client(&registry.address).repository("team/app");
    image().push(&repository, "v1").await;
    let name = format!("{}/team/app:v1", registry.address);
    let root = tempfile::tempdir().unwrap();
    let local = |arguments: &[&str]| soci_below(root.path(), arguments);
    assert_eq!(stdout(&mut local(&["prefetch", "list", "--json"])), "null\n");
    let list = root.path().join("early.json");
    std::fs::write(&list, r#"["app/main", "no/such/file"]"#).unwrap();
    let create = ["create", &name, "--min-layer-size", "1000", "--span-size", "262144"];
    let more = ["--prefetch-file", "/bin/tool", "--prefetch-files-json", list.to_str().unwrap()];
    let created = run(&mut local(&[&create[..], &more].concat()));
    let printed = String::from_utf8(created.stdout).unwrap();
    assert_eq!(printed.matches("Created prefetch artifact for layer sha256:").count(), 2, "{printed}");
    let warned = String::from_utf8(created.stderr).unwrap();
    assert!(warned.contains("prefetch file no/such/file not found in any layer"), "{warned}");
    // The zTOCs that are there already know where the files are.
    let again = stdout(&mut local(&[&create[..], &more].concat()));
    assert_eq!(again.matches("(already exists)").count(), 2, "{again}");
    assert_eq!(again.matches("Created prefetch artifact").count(), 2, "{again}");

    let listed: serde_json::Value = serde_json::from_str(&stdout(&mut local(&["prefetch", "ls", "--json"]))).unwrap();
    assert_eq!(listed.as_array().unwrap().len(), 2, "{listed}");
    let digest = listed[0]["Digest"].as_str().unwrap();
    let info = stdout(&mut local(&["prefetch", "info", digest, "--json"]));
    for line in
        ["Version:       1.0", "Span Ranges:   1", "Prefetch Spans:", "  [0] StartSpan: 0, EndSpan: ", "Raw JSON:"]
    {
        assert!(info.contains(line), "{line}: {info}");
    }
    let index = stdout(&mut local(&["index", "list", "-q"])).lines().next().unwrap().to_owned();
    let wrong = run(&mut local(&["prefetch", "info", &index]));
    assert!(String::from_utf8_lossy(&wrong.stderr).contains("is not a prefetch artifact (type: soci_index)"));
    assert_eq!(stdout(&mut local(&["rebuild-db"])), "");

    let pushed = stdout(&mut local(&["push", &name]));
    assert!(pushed.contains("successfully pushed"), "{pushed}");
    let verified = stdout(&mut local(&["verify", &name]));
    assert_eq!(verified.matches(" identical").count(), 8, "{verified}");
}

/// One request for each layer, and nothing on disk: neither in a temporary directory nor in the index store.
#[tokio::test(flavor = "multi_thread")]
async fn layers_are_streamed_once() {
    let Some(registry) = DockerRegistry::start() else { return };
    let gate = Gate::start(&registry.address).await.unwrap();
    let image = image();
    image.push(&client(&registry.address).repository("team/app"), "v1").await;
    let root = tempfile::tempdir().unwrap();
    let mut command = soci();
    command.arg("--root").arg(root.path().join("root")).env("TMPDIR", "/no/such/directory");
    command.args(["publish", &format!("{}/team/app:v1", gate.host()), "--min-layer-size", "1000"]);
    let (status, requests) = gate.run(&mut command, None).await;
    assert!(status.success(), "{requests:?}");
    for blob in &image.blobs[..2] {
        let digest = Digest::of(blob).to_string();
        let asked = requests.iter().filter(|line| line.contains(&digest)).collect::<Vec<_>>();
        assert!(asked.len() == 1 && asked[0].starts_with("GET "), "{asked:?}");
    }
    assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 0, "nothing is left, and nothing was made");
}

/// A layer that inflates as it should and is another one than its name says: nothing is kept of it.
#[test]
fn a_layer_of_another_name() {
    let work = tempfile::tempdir().unwrap();
    let layout = Layout::open_or_create(&work.path().join("layout")).unwrap();
    let image = image();
    let mut writer = layout.lock().unwrap();
    for blob in &image.blobs {
        writer.add_blob(blob).unwrap();
    }
    writer.add_manifest(Descriptor::of(media_type::MANIFEST, b""), &image.manifest).unwrap();
    drop(writer);
    // The byte of a gzip header that names the operating system.
    let file = layout.blob_path(&Digest::of(&image.blobs[1]));
    let mut layer = std::fs::read(&file).unwrap();
    layer[9] ^= 1;
    std::fs::write(&file, &layer).unwrap();
    let name = format!("oci:{}", layout.directory().display());
    let root = work.path().join("root");
    let created = run(soci().arg("--root").arg(&root).args(["create", &name, "--min-layer-size", "1000"]));
    assert_eq!(created.status.code(), Some(5), "{created:?}");
    let said = String::from_utf8_lossy(&created.stderr).into_owned();
    let names = [Digest::of(&image.blobs[1]), Digest::of(&layer)].map(|digest| digest.to_string());
    assert!(names.iter().all(|name| said.contains(name)), "{said}");
    assert_eq!(stdout(soci().arg("--root").arg(&root).args(["index", "list", "-q"])), "");
}
