//! Images as people have them: wrong labels, layers that are none, archives of several images, outputs that are no files.

use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use soci_index::format::digest::Digest;
use soci_index::format::model::media_type;
use soci_tests::image::{GZIP, Image, gzip, shell_layer, tar, text};
use soci_tests::mounting::can_mount;
use soci_tests::urls::serve;
use soci_tests::{run, soci, stdout};

const TAR: &str = "application/vnd.oci.image.layer.v1.tar";
const ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
const ENCRYPTED: &str = "application/vnd.oci.image.layer.v1.tar+gzip+encrypted";
const FOREIGN: &str = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip";

/// Writes blobs and an index.json into a layout directory.
fn write_layout(at: &Path, blobs: &[&[u8]], entries: &Value) {
    fs::create_dir_all(at.join("blobs/sha256")).unwrap();
    for blob in blobs {
        fs::write(at.join("blobs/sha256").join(Digest::of(blob).hex()), blob).unwrap();
    }
    fs::write(at.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    fs::write(at.join("index.json"), json!({ "schemaVersion": 2, "manifests": entries }).to_string()).unwrap();
}

fn entry(kind: &str, content: &[u8], annotations: &Value) -> Value {
    json!({ "mediaType": kind, "digest": Digest::of(content), "size": content.len(), "annotations": annotations })
}

/// An image in a layout directory, without the blobs that `lacks` names.
fn layout(at: &Path, image: &Image, lacks: &[Digest]) -> String {
    let blobs = image.blobs.iter().chain([&image.manifest]).filter(|blob| !lacks.contains(&Digest::of(blob)));
    let blobs: Vec<&[u8]> = blobs.map(|blob| &blob[..]).collect();
    write_layout(at, &blobs, &json!([entry(media_type::MANIFEST, &image.manifest, &json!({}))]));
    format!("oci:{}", at.display())
}

/// `soci` with a root of its own: exit code, standard output, standard error.
fn soci_at(root: &Path, arguments: &[&str]) -> (i32, String, String) {
    let output = run(soci().arg("--root").arg(root.join("root")).args(arguments));
    let said = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), said(output.stdout), said(output.stderr))
}

const WHOLE: [&str; 2] = ["--min-layer-size", "0"];

/// A mount in the foreground, until this is dropped.
struct Mounted(Child, std::path::PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.1).status();
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn mount(root: &Path, image: &str, more: &[&str]) -> Mounted {
    let at = root.join("mnt");
    fs::create_dir_all(&at).unwrap();
    let mut command = soci();
    command.arg("--root").arg(root.join("root")).args(["mount", image]).arg(&at).args(WHOLE).args(more);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let (start, before) = (Instant::now(), root.metadata().unwrap().dev());
    while at.metadata().is_ok_and(|at| at.dev() == before) {
        assert!(child.try_wait().unwrap().is_none(), "the mount of {image} ended");
        assert!(start.elapsed() < Duration::from_secs(30), "the mount of {image} does not come");
        std::thread::sleep(Duration::from_millis(20));
    }
    Mounted(child, at)
}

/// Layers under wrong media types: the bytes decide, for an index and for a mount.
#[test]
fn labels_that_are_wrong() {
    let work = tempfile::tempdir().unwrap();
    let tars = ["a", "b", "c", "d", "e"].map(|name| tar(&[(name, text(u64::from(name.as_bytes()[0]), 20_000))]));
    let zstd = |tar: &[u8]| zstd::encode_all(tar, 3).unwrap();
    let image = Image::new(vec![
        (TAR, gzip(&tars[0], 6), tars[0].clone()),
        (GZIP, tars[1].clone(), tars[1].clone()),
        (GZIP, zstd(&tars[2]), tars[2].clone()),
        (ZSTD, gzip(&tars[3], 6), tars[3].clone()),
        (GZIP, gzip(&tars[4], 6), tars[4].clone()),
    ]);
    let name = layout(&work.path().join("layout"), &image, &[]);
    let (code, said, warned) = soci_at(work.path(), &["create", &name, "--min-layer-size", "0"]);
    assert_eq!((code, said.matches("-> ztoc sha256:").count()), (0, 4), "{said}{warned}");
    assert!(said.contains("expect: [tar, gzip, unknown] but got \"zstd\""), "{said}");
    assert_eq!(warned.matches("whatever its media type says").count(), 4, "{warned}");
    if !can_mount() {
        return;
    }
    for with_index in [true, false] {
        if !with_index {
            fs::remove_dir_all(work.path().join("root")).unwrap();
        }
        let mounted = mount(work.path(), &name, &[]);
        for name in ["a", "b", "c", "d", "e"] {
            let read = fs::read(mounted.1.join(name)).unwrap();
            assert!(read == text(u64::from(name.as_bytes()[0]), 20_000), "{name}, index: {with_index}");
        }
    }
}

/// A layer that cannot be indexed costs the others nothing, and is named with the reason.
#[test]
fn layers_that_are_none() {
    let good = tar(&[("good", text(1, 20_000))]);
    let broken = [&good[..512], &text(9, 30_000)[..]].concat();
    let other = tar(&[("other", text(2, 20_000))]);
    for (kind, blob, is_there, reason) in [
        (ENCRYPTED, text(3, 5000), true, "it is encrypted"),
        ("application/wasm", b"\0asm\x01\0\0\0".to_vec(), true, "it is WebAssembly"),
        (FOREIGN, gzip(&other, 6), false, "it is to be had from http://127.0.0.1:1/layer"),
        (GZIP, gzip(&broken, 6), true, "not tar: "),
        (GZIP, text(4, 5000), true, "not tar: "),
        ("application/x-unheard-of", text(5, 5000), true, "not tar: "),
    ] {
        let work = tempfile::tempdir().unwrap();
        let mut image = Image::new(vec![(kind, blob.clone(), broken.clone()), (GZIP, gzip(&good, 6), good.clone())]);
        let mut manifest: Value = serde_json::from_slice(&image.manifest).unwrap();
        if kind == FOREIGN {
            manifest["layers"][0]["urls"] = json!(["http://127.0.0.1:1/layer"]);
        }
        image.manifest = manifest.to_string().into();
        let lacks = if is_there { vec![] } else { vec![Digest::of(&blob)] };
        let name = layout(&work.path().join("layout"), &image, &lacks);
        let (code, said, warned) = soci_at(work.path(), &["create", &name, "--min-layer-size", "0"]);
        assert_eq!((code, said.matches("-> ztoc sha256:").count()), (0, 1), "{kind}: {said}{warned}");
        let skipped = said.lines().find(|line| line.starts_with("ztoc skipped")).unwrap();
        assert!(skipped.contains(kind) && (skipped.contains(reason) || kind.contains("unheard")), "{skipped}");
        if can_mount() {
            let at = work.path().join("mnt");
            fs::create_dir(&at).unwrap();
            let (code, _, said) =
                soci_at(work.path(), &["mount", &name, at.to_str().unwrap(), "--min-layer-size", "0"]);
            assert!(
                code == 5 && said.contains(reason) && (kind == GZIP || said.contains(kind)),
                "{kind}: {code} {said}"
            );
            assert_eq!(said.matches(reason).count(), 1, "{said}");
        }
    }
}

/// Foreign layers come from their URLs if that is allowed, and only right ones.
#[test]
fn foreign_layers_from_their_urls() {
    let (foreign, own) = (tar(&[("foreign", text(1, 20_000))]), tar(&[("own", text(2, 20_000))]));
    let blob = gzip(&foreign, 6);
    let mut wrong = blob.clone();
    wrong[200] ^= 1;
    let (right, asked) = serve(blob.clone());
    let (damaged, _) = serve(wrong);
    let (short, _) = serve(blob[..5000.min(blob.len() - 1)].to_vec());
    for (urls, is_good) in [
        (json!([format!("{right}/moved")]), true),
        (json!(["ftp://127.0.0.1/x", "http://127.0.0.1:1/x", format!("{right}/layer")]), true),
        (json!([format!("{damaged}/layer")]), false),
        (json!([format!("{short}/layer")]), false),
        (json!(["file:///etc/passwd"]), false),
    ] {
        let work = tempfile::tempdir().unwrap();
        let mut image = Image::new(vec![(FOREIGN, blob.clone(), foreign.clone()), (GZIP, gzip(&own, 6), own.clone())]);
        let mut manifest: Value = serde_json::from_slice(&image.manifest).unwrap();
        manifest["layers"][0]["urls"] = urls.clone();
        image.manifest = manifest.to_string().into();
        let name = layout(&work.path().join("layout"), &image, &[Digest::of(&blob)]);
        let before = asked.lock().unwrap().len();
        let (code, said, _) = soci_at(work.path(), &["create", &name, "--min-layer-size", "0"]);
        assert_eq!(
            (code, said.matches("-> ztoc").count(), asked.lock().unwrap().len()),
            (0, 1, before),
            "{urls} {said}"
        );
        let allowed = ["create", &name, "--min-layer-size", "0", "--foreign-layers"];
        let (code, said, warned) = soci_at(work.path(), &allowed);
        assert_eq!(
            (code == 0, said.matches("-> ztoc").count() == 2),
            (is_good, is_good),
            "{urls} {code} {said}{warned}"
        );
        if can_mount() && is_good {
            let mounted = mount(work.path(), &name, &["--foreign-layers"]);
            assert!(fs::read(mounted.1.join("foreign")).unwrap() == text(1, 20_000), "{urls}");
        } else if can_mount() {
            let at = tempfile::tempdir().unwrap();
            let at = at.path().to_str().unwrap();
            let (code, _, said) = soci_at(work.path(), &[&["mount", &name, at][..], &allowed[2..]].concat());
            assert!(code != 0 && said.contains("the layer by its URLs"), "{urls} {code} {said}");
        }
    }
    assert!(!asked.lock().unwrap().iter().any(|head| head.contains("authorization")));
}

/// What was indexed by its URLs is verified, reused and recorded by them, too, and a command that may not ask them says which
/// option allows it.
#[test]
fn foreign_layers_are_verified_and_recorded() {
    let (foreign, own) = (tar(&[("foreign", text(1, 20_000))]), shell_layer(("etc/x", "x")));
    let blob = gzip(&foreign, 6);
    let (url, asked) = serve(blob.clone());
    let work = tempfile::tempdir().unwrap();
    let mut image = Image::new(vec![(FOREIGN, blob.clone(), foreign), (GZIP, gzip(&own, 6), own)]);
    let mut manifest: Value = serde_json::from_slice(&image.manifest).unwrap();
    manifest["layers"][0]["urls"] = json!([format!("{url}/layer")]);
    image.manifest = manifest.to_string().into();
    let name = layout(&work.path().join("layout"), &image, &[Digest::of(&blob)]);
    let create = ["create", &name, "--min-layer-size", "0", "--foreign-layers"];
    assert_eq!(soci_at(work.path(), &create).0, 0);
    let asked = || asked.lock().unwrap().len();
    let before = asked();

    let (code, said, _) = soci_at(work.path(), &["verify", &name]);
    assert!(code == 5 && said.contains("--foreign-layers") && asked() == before, "{code} {said}");
    let (code, said, warned) = soci_at(work.path(), &["verify", &name, "--foreign-layers"]);
    // A zTOC, a TOC and windows for each of two layers.
    assert_eq!((code, said.matches(" identical").count()), (0, 6), "{said}{warned}");
    assert!(asked() > before);
    let before = asked();
    let (code, said, warned) = soci_at(work.path(), &[&create[..], &["--verify-reused", "--json"]].concat());
    let document: Value = serde_json::from_str(&said).unwrap();
    let reused: Vec<bool> = layers(&document).iter().map(|layer| layer["reused"] == true).collect();
    assert_eq!((code, reused, asked() > before), (0, vec![true, true], true), "{said}{warned}");

    if can_mount() {
        let file = work.path().join("p.profile");
        let record = ["record", &name, "-o", file.to_str().unwrap(), "--min-layer-size", "1000"];
        let command = ["--", "/bin/sh", "-c", "read -r line < /foreign; :"];
        let (code, _, said) = soci_at(work.path(), &[&record[..], &command].concat());
        assert!(code == 5 && said.contains("--foreign-layers"), "{code} {said}");
        let (code, said, warned) = soci_at(work.path(), &[&record[..], &["--foreign-layers"], &command].concat());
        assert!(code == 0 && file.exists(), "{code} {said}{warned}");
    }
}

fn layers(document: &Value) -> Vec<Value> {
    document[0]["layers"].as_array().cloned().unwrap_or_default()
}

/// A file that will not change is not worth another try, and what is wrong with it is said once.
#[test]
fn a_layout_without_a_layer() {
    let work = tempfile::tempdir().unwrap();
    let tar = tar(&[("file", text(1, 20_000))]);
    let image = Image::gzip(vec![tar]);
    let name = layout(&work.path().join("layout"), &image, &[Digest::of(&image.blobs[0])]);
    let at = tempfile::tempdir().unwrap();
    let at = at.path().to_str().unwrap();
    for arguments in [&["create", &name, "--min-layer-size", "0"][..], &["mount", &name, at, "--min-layer-size", "0"]] {
        if arguments[0] == "mount" && !can_mount() {
            continue;
        }
        let (code, _, said) = soci_at(work.path(), arguments);
        assert!(code == 5 && said.matches("has no blob").count() == 1, "{arguments:?}: {code} {said}");
        assert!(!said.contains("unavailable"), "{said}");
    }
}

/// An index of nothing but attestations.
#[test]
fn an_index_without_an_image() {
    let work = tempfile::tempdir().unwrap();
    let attestation = json!({ "vnd.docker.reference.type": "attestation-manifest" });
    let manifest = br#"{"schemaVersion":2}"#;
    let entries = json!([entry(media_type::MANIFEST, manifest, &attestation)]);
    let index = json!({ "schemaVersion": 2, "mediaType": media_type::INDEX, "manifests": entries }).to_string();
    write_layout(
        &work.path().join("nested"),
        &[index.as_bytes(), manifest],
        &json!([entry(media_type::INDEX, index.as_bytes(), &json!({}))]),
    );
    write_layout(&work.path().join("flat"), &[manifest], &entries);
    for layout in ["nested", "flat"] {
        let name = format!("oci:{}", work.path().join(layout).display());
        for more in [&[][..], &["--all-platforms"]] {
            let (code, _, said) = soci_at(work.path(), &[&["create", &name][..], more].concat());
            assert!(code == 6 && said.contains("is an attestation or another artifact"), "{code} {said}");
            assert_eq!(said.lines().count(), 1, "{said}");
        }
    }
}

/// What `docker save team/app:latest team/db:latest` writes, and the same as a layout.
#[test]
fn images_by_their_whole_names() {
    let work = tempfile::tempdir().unwrap();
    let images =
        ["app", "db"].map(|name| Image::new(vec![(TAR, tar(&[(name, text(1, 5000))]), tar(&[(name, text(1, 5000))]))]));
    let mut files: Vec<(String, Vec<u8>)> = Vec::new();
    let mut saved = Vec::new();
    for (image, name) in images.iter().zip(["app", "db"]) {
        files.push((format!("{name}.json"), image.blobs[1].to_vec()));
        files.push((format!("{name}/layer.tar"), image.blobs[0].to_vec()));
        saved.push(json!({ "config": format!("{name}.json"), "repoTags": [format!("team/{name}:latest")],
            "layers": [format!("{name}/layer.tar")] }));
    }
    files.push(("manifest.json".to_owned(), json!(saved).to_string().into_bytes()));
    let files: Vec<(&str, Vec<u8>)> = files.iter().map(|(name, bytes)| (name.as_str(), bytes.clone())).collect();
    fs::write(work.path().join("image.tar"), tar(&files)).unwrap();
    let blobs = images.iter().flat_map(|image| image.blobs.iter().chain([&image.manifest]));
    let named = |image: &Image, name: &str| {
        let names = json!({ "io.containerd.image.name": format!("docker.io/team/{name}:latest"),
            "org.opencontainers.image.ref.name": "latest" });
        let mut entry = entry(media_type::MANIFEST, &image.manifest, &names);
        entry["platform"] = json!({ "os": "linux", "architecture": "amd64" });
        entry
    };
    let entries = json!([named(&images[0], "app"), named(&images[1], "db")]);
    write_layout(&work.path().join("layout"), &blobs.map(|blob| &blob[..]).collect::<Vec<_>>(), &entries);
    for place in [
        format!("docker-archive:{}", work.path().join("image.tar").display()),
        format!("oci:{}", work.path().join("layout").display()),
    ] {
        let ztoc = |name: &str| {
            let (code, said, warned) =
                soci_at(work.path(), &["create", &format!("{place}:{name}"), "--min-layer-size", "0"]);
            assert_eq!(code, 0, "{place}:{name} {warned}");
            said.split("layer ").nth(1).unwrap().split(' ').next().unwrap().to_owned()
        };
        assert_eq!(ztoc("team/db:latest"), Digest::of(&images[1].tars[0]).to_string());
        assert_eq!(ztoc("docker.io/team/app"), Digest::of(&images[0].tars[0]).to_string());
        assert_eq!(ztoc("@1"), Digest::of(&images[1].tars[0]).to_string());
        for name in [place.clone(), format!("{place}:latest")] {
            let (code, _, said) = soci_at(work.path(), &["create", &name]);
            assert!(code == 1 && said.contains("team/app:latest") && said.contains("team/db:latest"), "{code} {said}");
        }
    }
}

/// Whatever exists and is no regular file is written into, by every command that writes a file.
#[test]
fn outputs_that_are_no_files() {
    type Arguments<'a> = &'a dyn Fn(&str) -> Vec<String>;
    let work = tempfile::tempdir().unwrap();
    let at = |name: &str| work.path().join(name).to_str().unwrap().to_owned();
    let image = Image::gzip(vec![tar(&[("file", text(1, 20_000))])]);
    let name = layout(&work.path().join("layout"), &image, &[]);
    fs::write(at("layer"), &image.blobs[0]).unwrap();
    drop(stdout(soci().args(["ztoc", "create", "-o", &at("ztoc"), &at("layer")])));
    let convert = |to: &str| {
        vec!["convert".to_owned(), name.clone(), format!("oci-archive:{to}"), "--min-layer-size=0".to_owned()]
    };
    let create = |to: &str| ["ztoc", "create", "-o", to, &at("layer")].map(str::to_owned).to_vec();
    let get = |to: &str| {
        ["ztoc", "get-file", "-o", to, "--layer", &at("layer"), &at("ztoc"), "file"].map(str::to_owned).to_vec()
    };
    let commands: [Arguments<'_>; 3] = [&convert, &create, &get];
    for (number, command) in commands.iter().enumerate() {
        let arguments = |to: &str| command(to);
        let of = |arguments: Vec<String>| {
            let mut command = soci();
            command.arg("--root").arg(at("root")).args(arguments);
            command
        };
        let (file, pipe, link) =
            (at(&format!("file{number}")), at(&format!("pipe{number}")), at(&format!("link{number}")));
        drop(stdout(&mut of(arguments(&file))));
        assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        std::os::unix::fs::symlink(&pipe, &link).unwrap();
        for to in [&pipe, &link] {
            let reading = pipe.clone();
            let reader = std::thread::spawn(move || fs::read(reading).unwrap());
            drop(stdout(&mut of(arguments(to))));
            assert!(reader.join().unwrap() == fs::read(&file).unwrap(), "{:?}", arguments(to));
            assert!(fs::symlink_metadata(&pipe).unwrap().file_type().is_fifo(), "{:?}", arguments(to));
            assert!(fs::symlink_metadata(&link).unwrap().is_symlink(), "{:?}", arguments(to));
        }
        let full = at(&format!("full{number}"));
        let made = Command::new("mknod").args([&full, "c", "1", "7"]).output().unwrap().status.success();
        if !made || fs::File::options().write(true).open(&full).is_err() {
            eprintln!("SKIPPED: no device can be made or opened here");
            continue;
        }
        let output = run(&mut of(arguments(&full)));
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(7) && said.contains("No space left"), "{:?} {said}", output.status);
        assert!(fs::symlink_metadata(&full).unwrap().file_type().is_char_device());
    }
    let left: Vec<String> =
        fs::read_dir(work.path()).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
    assert!(!left.iter().any(|name| name.starts_with('.')), "{left:?}");
}

/// What is written to `/dev/stdout` is the output and nothing else, appended where standard output is a file.
#[test]
fn outputs_to_standard_output() {
    let work = tempfile::tempdir().unwrap();
    let at = |name: &str| work.path().join(name);
    fs::write(at("layer"), gzip(&tar(&[("file", text(1, 20_000))]), 6)).unwrap();
    drop(stdout(soci().args(["ztoc", "create", "-o"]).arg(at("ztoc")).arg(at("layer"))));
    let expected = fs::read(at("ztoc")).unwrap();
    let create = || {
        let mut command = soci();
        command.args(["ztoc", "create", "-o", "/dev/stdout"]).arg(at("layer"));
        command
    };
    assert!(run(&mut create()).stdout == expected);
    fs::write(at("file"), "before ").unwrap();
    let file = fs::File::options().append(true).open(at("file")).unwrap();
    assert!(create().stdout(file).status().unwrap().success());
    assert!(fs::read(at("file")).unwrap() == [b"before ", &expected[..]].concat());
}

/// A list of extended attributes is never an error.
#[test]
fn lists_of_attributes_are_empty() {
    if !can_mount() {
        return;
    }
    let work = tempfile::tempdir().unwrap();
    let mut builder = tar::Builder::new(Vec::new());
    let mut link = tar::Header::new_gnu();
    link.set_entry_type(tar::EntryType::Symlink);
    link.set_mode(0o755);
    link.set_size(0);
    builder.append_link(&mut link, "link", "file").unwrap();
    let mut file = tar::Header::new_gnu();
    file.set_mode(0o644);
    file.set_size(4);
    builder.append_data(&mut file, ".wh..wh.plnk/1.2", &b"text"[..]).unwrap();
    let mut hard = tar::Header::new_gnu();
    hard.set_entry_type(tar::EntryType::Link);
    hard.set_mode(0o600);
    hard.set_size(0);
    builder.append_link(&mut hard, "file", ".wh..wh.plnk/1.2").unwrap();
    let image = Image::gzip(vec![builder.into_inner().unwrap()]);
    let name = layout(&work.path().join("layout"), &image, &[]);
    let mounted = mount(work.path(), &name, &[]);
    for path in [mounted.1.clone(), mounted.1.join("file"), mounted.1.join("link")] {
        assert_eq!(rustix::fs::llistxattr(&path, &mut [0_u8; 100][..]), Ok(0), "{}", path.display());
        assert_eq!(rustix::fs::llistxattr(&path, &mut [0_u8; 0][..]), Ok(0), "{}", path.display());
    }
    let mode = |name: &str| fs::symlink_metadata(mounted.1.join(name)).unwrap().permissions().mode() & 0o7777;
    assert_eq!((mode("link"), mode("file")), (0o777, 0o600));
    assert_eq!(fs::read(mounted.1.join("link")).unwrap(), b"text");
    assert!(!mounted.1.join(".wh..wh.plnk").exists());
}
