//! Other users of the machine: they get at nothing below a root, and nothing that an image brings makes them more than
//! they are.

use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use soci_tests::containerd::Containerd;
use soci_tests::daemon::{Running, daemon};
use soci_tests::image::{Image, shell_layer, tar, text};
use soci_tests::mounting::{Mounting, can_mount};
use soci_tests::node::Node;
use soci_tests::stage::Stage;
use soci_tests::{run, soci};

const NODE: &str = "node";
const SECRET: &[u8] = b"the key of a private image\n";

/// A layer with a file that only its owner may read, and a set-user-ID program of root's.
fn tempting_layer() -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let program = fs::read("/usr/bin/id").expect("a program");
    for (name, mode, content) in [("srv/key", 0o600, SECRET), ("srv/id", 0o4755, &program)] {
        let mut header = tar::Header::new_gnu();
        header.set_mode(mode);
        header.set_size(content.len() as u64);
        builder.append_data(&mut header, name, content).unwrap();
    }
    let mut device = tar::Header::new_gnu();
    device.set_entry_type(tar::EntryType::Char);
    device.set_mode(0o666);
    device.set_size(0);
    device.set_device_major(1).unwrap();
    device.set_device_minor(3).unwrap();
    builder.append_data(&mut device, "srv/null", &b""[..]).unwrap();
    builder.into_inner().unwrap()
}

fn image() -> Image {
    let data = tar(&[("srv/data", text(7, 3 << 20))]);
    Image::gzip(vec![shell_layer(("/etc/base", "from below\n")), data, tempting_layer()])
}

/// A shell command as the user `nobody`.
fn as_nobody(script: &str, word: &Path) -> Output {
    let nobody = ["--reuid=65534", "--regid=65534", "--clear-groups", "--", "sh", "-c", script, "sh"];
    run(Command::new("setpriv").args(nobody).arg(word))
}

/// A directory as a DaemonSet's `DirectoryOrCreate` makes it, or a lax umask.
fn open_directory(path: &Path) {
    fs::create_dir_all(path).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// What is below a root and not its user's alone. Mounts, and the files that containers see, have modes of their own.
fn open_to_others(root: &Path) -> Vec<(PathBuf, u32)> {
    let device = root.metadata().unwrap().dev();
    let (mut found, mut left) = (Vec::new(), vec![root.to_owned()]);
    while let Some(path) = left.pop() {
        let metadata = path.symlink_metadata().unwrap();
        if metadata.dev() != device || metadata.is_symlink() {
            continue;
        }
        let is_of_a_snapshot = path.parent().and_then(Path::parent).is_some_and(|above| above.ends_with("snapshots"));
        if is_of_a_snapshot {
            continue;
        }
        let mode = metadata.mode() & 0o7777;
        let kind = metadata.file_type();
        if mode != if kind.is_dir() { 0o700 } else { 0o600 } {
            found.push((path.clone(), mode));
        }
        assert!(kind.is_dir() || kind.is_file() || kind.is_socket(), "{}", path.display());
        if kind.is_dir() {
            left.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
    }
    found
}

/// Other users get nowhere below a root, even by names that they may know.
fn assert_closed(root: &Path, program: &str) {
    assert_eq!(open_to_others(root), []);
    for (place, script) in [("", "ls \"$1\""), ("layers", "ls \"$1\""), ("fs/1", "ls \"$1\""), (program, "\"$1\"")] {
        let output = as_nobody(script, &root.join(place));
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains("ermission denied"), "{place}: {output:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_below_the_snapshotters_root_is_for_others() {
    let Some(stage) = Stage::new().await else { return };
    let Some(mut node) = Node::start(Containerd::V2) else { return };
    // As it is found when another program has made it, or an older version.
    let root = node.path("soci");
    node.kill_snapshotter();
    soci_fs::fuse::mount::unmount(&root.join("fs"), soci_fs::fuse::mount::Lazy::Yes).unwrap();
    fs::remove_dir_all(&root).unwrap();
    open_directory(&root.join("layers"));
    open_directory(&root.join("snapshotter/layers"));
    open_directory(&root);
    fs::set_permissions(node.path(""), fs::Permissions::from_mode(0o711)).unwrap();
    node.start_snapshotter();
    node.wait_for_containerd();

    let name = stage.publish(&image(), "v1", 1 << 20).await;
    let _ = stage.pull(&node, "soci", &name);
    node.start_container(&name, "long");
    assert_eq!(node.read("long", "/srv/key"), SECRET);
    node.assert_reads("long", "/srv/data", &text(7, 3 << 20));
    // Nor is there a dump of its memory, with credentials in it.
    let worker = node.status()["pid"].as_i64().unwrap();
    let limits = fs::read_to_string(format!("/proc/{worker}/limits")).unwrap();
    let cores = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(cores.split_whitespace().skip(4).take(2).collect::<Vec<_>>(), ["0", "0"], "{cores}");
    // What it is protected from is there.
    let slots = (1..=3).map(|slot| format!("fs/{slot}/srv/id")).find(|program| root.join(program).exists());
    let program = slots.expect("a slot with the layer");
    assert_eq!(root.join(&program).metadata().unwrap().mode() & 0o7777, 0o4755);
    assert_closed(&root, &program);
    node.kill_worker();
    node.assert_reads("long", "/srv/data", &text(7, 3 << 20));
    assert_closed(&root, &program);
}

#[tokio::test(flavor = "multi_thread")]
async fn mounts_are_for_reading_only_unless_asked() {
    if !can_mount() {
        return;
    }
    let mounting = Mounting::new(image()).await;
    let root = mounting.scratch.path().join(NODE);
    open_directory(&root);
    open_directory(mounting.scratch.path());
    let options = |at: &Path| {
        let table = fs::read_to_string("/proc/self/mounts").unwrap();
        let line = table.lines().find(|line| line.split(' ').nth(1) == at.to_str()).expect("a mount").to_owned();
        line.split(' ').nth(3).unwrap().split(',').map(str::to_owned).collect::<Vec<_>>()
    };
    for (flags, may) in [(&[][..], false), (&["--suid"][..], true)] {
        let serving = mounting.mount(NODE, flags);
        let options = options(&serving.at);
        for option in ["nosuid", "nodev"] {
            assert_eq!(options.iter().any(|given| given == option), !may, "{option} with {flags:?}: {options:?}");
        }
        // Others see the mount, by the modes of its files.
        let user = as_nobody("exec \"$1\" -u", &serving.at.join("srv/id"));
        assert_eq!(String::from_utf8_lossy(&user.stdout).trim(), if may { "0" } else { "65534" }, "{user:?}");
        let device = as_nobody(": < \"$1\"", &serving.at.join("srv/null"));
        assert_eq!(device.status.success(), may, "{device:?}");
        assert!(!as_nobody("cat \"$1\"", &serving.at.join("srv/key")).status.success());
        let at = serving.at.clone();
        drop(serving.end());
        assert_eq!(open_to_others(&root), []);
        assert!(!as_nobody("ls \"$1\"", &root).status.success(), "{}", at.display());
    }
}

#[test]
fn a_root_that_others_can_change_is_refused() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: directories of other users can be made by root only");
        return;
    }
    let place = tempfile::tempdir().unwrap();
    let path = |name: &str| place.path().join(name);
    for name in ["theirs", "shared", "drop/root"] {
        open_directory(&path(name));
    }
    chown(path("theirs"), Some(65_533), None).unwrap();
    fs::write(path("shared/thesis.tex"), "").unwrap();
    fs::set_permissions(path("shared"), fs::Permissions::from_mode(0o1777)).unwrap();
    fs::set_permissions(path("drop"), fs::Permissions::from_mode(0o777)).unwrap();
    symlink(path("drop/root"), path("link")).unwrap();
    for (name, hint) in [("theirs", "chown 0"), ("shared", "thesis.tex"), ("link", "drop")] {
        let root = path(name);
        let mode = || root.metadata().unwrap().mode() & 0o7777;
        let before = mode();
        let mut worker = daemon();
        worker.arg("--root").arg(&root).arg("--address").arg(path("grpc.sock"));
        let mut running = Running::start(worker, &root);
        let said: Vec<String> = running.lines.by_ref().map(|line| line.expect("a daemon under test")).collect();
        let last = said.last().expect("a reason");
        assert!(!running.end().success() && last.contains(hint) && last.contains("--root"), "{name}: {said:?}");

        let mut command = soci();
        command.arg("--root").arg(&root).args(["pull", "registry.invalid/team/app:v1"]);
        let output = run(&mut command);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(7), "{name}: {said}");
        assert!(said.contains(hint) && said.contains("--root"), "{name}: {said}");
        assert_eq!(mode(), before, "{name}");
    }
}
