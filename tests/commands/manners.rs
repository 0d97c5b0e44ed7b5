//! What a person at a terminal, or a script, may expect of every command: the same message and exit code whichever way a
//! mount is made, nothing of others' that a terminal would obey, an interrupt that is one.

use std::net::TcpListener;
use std::os::unix::process::CommandExt as _;
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};
use soci_index::format::limits::Limits;
use soci_index::format::profile::{Profile, Touched};
use soci_tests::image::{Image, shell_layer, tar, text};
use soci_tests::mounting::{Mounting, can_mount};
use soci_tests::{run, soci, stdout};

/// `mount --detach` fails with the message and the exit code of the foreground.
#[tokio::test(flavor = "multi_thread")]
async fn detached_mounts_fail_as_others_do() {
    if !can_mount() {
        return;
    }
    let stage = Mounting::new(Image::gzip(vec![tar(&[("file", text(1, 300_000))])])).await;
    let (name, host, at) = (stage.name(), stage.registry.host(), stage.mountpoint("node"));
    std::fs::create_dir(&at).unwrap();
    let full = stage.scratch.path().join("full");
    std::fs::create_dir(&full).unwrap();
    std::fs::write(full.join("file"), "mine").unwrap();
    let (at, full) = (at.to_str().unwrap(), full.to_str().unwrap());
    let missing = format!("{host}/team/missing:v1");
    let cases: [(&[&str], i32, &str); 5] = [
        (&[&missing, at], 1, "no such image"),
        (&[&name, full], 2, "is not empty"),
        (&[&name, "/nowhere/at/all"], 7, "create the directory first"),
        (&[&name, at, "--platform", "plan9/vax"], 1, "plan9"),
        (&[&name, at, "--index", "nonsense"], 2, "nonsense"),
    ];
    for (arguments, code, part) in cases {
        let one_way = |detach: bool| {
            let mut command = stage.soci("node", &["mount"]);
            command.args(detach.then_some("--detach")).args(&arguments[2..]).arg("--").args(&arguments[..2]);
            let Output { status, stderr, .. } = run(&mut command);
            (status.code(), String::from_utf8(stderr).unwrap())
        };
        let (foreground, detached) = (one_way(false), one_way(true));
        assert_eq!(foreground, detached, "{arguments:?}");
        assert!(foreground.0 == Some(code) && foreground.1.contains(part), "{arguments:?}: {foreground:?}");
    }
    assert_eq!(std::fs::read(format!("{full}/file")).unwrap(), b"mine");
}

/// It says that the image has no index, as the foreground does, and both only then.
#[tokio::test(flavor = "multi_thread")]
async fn detached_mounts_name_a_missing_index() {
    if !can_mount() {
        return;
    }
    let stage = Mounting::new(Image::gzip(vec![tar(&[("file", text(1, 300_000))])])).await;
    let (name, at) = (stage.name(), stage.mountpoint("node"));
    std::fs::create_dir(&at).unwrap();
    let at = at.to_str().unwrap();
    for has_index in [false, true] {
        if has_index {
            stage.publish(&[]);
        }
        let said = stdout(&mut stage.soci("node", &["mount", &name, at, "--detach", "--min-layer-size", "1000"]));
        let _ = stdout(&mut stage.soci("node", &["umount", at]));
        assert!(said.starts_with("mounted ") && said.contains("(process "), "{said}");
        assert_eq!(said.contains("the image has no index: `soci publish "), !has_index, "{said}");
        assert_eq!(said.contains("without an index"), !has_index, "{said}");
    }
    // What is said while it serves, and at its end, is in the log.
    let log = stage.scratch.path().join("node/layers/mount.log");
    let start = Instant::now();
    while !std::fs::read_to_string(&log).unwrap().matches("unmounted;").count().eq(&2) {
        assert!(start.elapsed() < Duration::from_secs(20), "{}", std::fs::read_to_string(&log).unwrap());
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// An interrupt is exit code 130, whatever a command waits for.
#[test]
fn interrupts() {
    // A registry that accepts and never answers.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let name = format!("{}/team/app:v1", silent.local_addr().unwrap());
    let scratch = tempfile::tempdir().unwrap();
    let at = scratch.path().join("at");
    std::fs::create_dir(&at).unwrap();
    let at = at.to_str().unwrap();
    let mut lines: Vec<Vec<&str>> = vec![vec!["publish", &name], vec!["pull", &name], vec!["profile", "list", &name]];
    if can_mount() {
        lines.extend([
            vec!["mount", &name, at],
            vec!["mount", "--detach", &name, at],
            vec!["record", &name, "--", "true"],
        ]);
    }
    for line in lines {
        let mut command = soci();
        command.arg("--root").arg(scratch.path().join("root")).args(&line).process_group(0);
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        // It has begun when it knocks.
        let waiting = silent.accept().unwrap();
        std::thread::sleep(Duration::from_millis(300));
        kill_process_group(Pid::from_child(&child), Signal::INT).unwrap();
        let Output { status, stderr, .. } = child.wait_with_output().unwrap();
        drop(waiting);
        let said = String::from_utf8_lossy(&stderr);
        assert_eq!(status.code(), Some(130), "{line:?}: {status}: {said}");
        assert!(said.contains("interrupted"), "{line:?}: {said}");
    }
}

/// What others have written reaches a terminal as text.
#[tokio::test(flavor = "multi_thread")]
async fn texts_of_others_are_cleaned() {
    const HOSTILE: &str = "a\u{1b}]0;owned\u{7}\nb\u{9b}2J\rc";
    let stage = Mounting::new(Image::gzip(vec![tar(&[("file", text(1, 300_000))])])).await;
    let name = stage.name();
    let layer = soci_index::format::digest::Digest::of(&stage.image.blobs[0]);
    let profile = Profile::new(vec![layer], vec![Touched { layer: 0, bytes: 0..1000 }], &Limits::DEFAULT).unwrap();
    let file = stage.scratch.path().join("default.profile");
    std::fs::write(&file, profile.encode().unwrap()).unwrap();
    let file = file.to_str().unwrap();
    let _ = stdout(&mut stage.soci("node", &["profile", "push", &name, file, "--command", HOSTILE]));
    let listed = stdout(&mut stage.soci("node", &["profile", "list", &name]));
    assert!(listed.contains("owned") && listed.lines().count() == 2, "{listed:?}");
    is_clean(&listed);
    let listed = stdout(&mut stage.soci("node", &["profile", "list", &name, "--json"]));
    is_clean(&listed);
    let listed: serde_json::Value = serde_json::from_str(&listed).unwrap();
    assert_eq!(listed[0]["command"], HOSTILE, "a program gets what was pushed");
    // Errors, too.
    for line in [["profile", "show", HOSTILE], ["mount", HOSTILE, "/"], ["publish", HOSTILE, "--dry-run"]] {
        let Output { status, stderr, .. } = run(&mut stage.soci("node", &line));
        assert!(!status.success());
        is_clean(&String::from_utf8(stderr).unwrap());
    }
}

fn is_clean(text: &str) {
    let bad = |letter: char| letter.is_control() && letter != '\n';
    assert!(!text.contains(bad), "{text:?}");
}

fn json(text: &str) -> serde_json::Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// A mount says in one line each, for programs, what it is and what it came to; in the background it says the first.
#[tokio::test(flavor = "multi_thread")]
async fn mounts_have_documents() {
    if !can_mount() {
        return;
    }
    let content = text(1, 600_000);
    let stage = Mounting::new(Image::gzip(vec![shell_layer(("etc/x", "x")), tar(&[("data", content.clone())])])).await;
    stage.publish(&["--index-span-size", "65536"]);
    let serving = stage.mount("node", &["--json", "--no-profile"]);
    assert!(std::fs::read(serving.at.join("data")).unwrap() == content);
    let at = serving.at.clone();
    let said = serving.end();
    // What comes after these went to standard error.
    let lines: Vec<&str> = said.lines().filter(|line| line.starts_with('{')).collect();
    assert_eq!(lines.len(), 2, "{said}");
    let (ready, ended) = (json(lines[0]), json(lines[1]));
    assert_eq!((&ready["event"], &ended["event"]), (&"mounted".into(), &"unmounted".into()));
    assert_eq!(ready["digest"], stage.image.digest().to_string());
    assert_eq!((&ready["image"], &ready["form"]), (&stage.name().into(), &"spans".into()));
    assert_eq!(ready["mountpoint"], at.to_str().unwrap());
    assert_eq!(ready["root"], stage.scratch.path().join("node").to_str().unwrap());
    let layers = ready["layers"].as_array().unwrap();
    assert_eq!((layers.len(), &layers[1]["way"], &layers[1]["index"]), (2, &"lazy".into(), &"spans".into()), "{ready}");
    assert!(ready["process"].as_u64() > Some(1) && ready["passedOver"].is_array(), "{ready}");
    assert!(ended["bytesFetched"].as_u64() > Some(10_000) && ended["requests"].as_u64() > Some(0), "{ended}");
    assert!(ended["presentSpans"].as_u64() > Some(0) && ended["layers"].as_array().unwrap().len() == 2, "{ended}");

    let at = stage.mountpoint("other");
    std::fs::create_dir(&at).unwrap();
    let line = ["mount", "--detach", "--json", "--min-layer-size", "100000000", &stage.name(), at.to_str().unwrap()];
    let ready = json(&stdout(&mut stage.soci("other", &line)));
    drop(stdout(&mut stage.soci("other", &["umount", at.to_str().unwrap()])));
    assert_eq!((&ready["event"], &ready["layers"][1]["way"]), (&"mounted".into(), &"whole".into()), "{ready}");
    assert!(ready["layers"][1]["reason"].is_string() && ready["layers"][1]["index"].is_null(), "{ready}");
}

/// What is recorded, merged, removed and brought up to date has a document, too, and nothing else on standard output.
#[tokio::test(flavor = "multi_thread")]
async fn changes_have_documents() {
    if !can_mount() {
        return;
    }
    let stage = Mounting::new(Image::gzip(vec![shell_layer(("etc/x", "x")), tar(&[("data", text(2, 300_000))])])).await;
    let (name, at) = (stage.name(), |name: &str| stage.scratch.path().join(name).to_str().unwrap().to_owned());
    let (first, both) = (at("first.profile"), at("both.profile"));
    let script = "read -r word < /etc/x; echo \"$word on standard output\"";
    let line = ["record", &name, "--json", "--min-layer-size", "1000", "-o", &first, "--", "/bin/sh", "-c", script];
    let recorded = json(&stdout(&mut stage.soci("node", &line)));
    assert_eq!((&recorded["output"], &recorded["image"]), (&first.clone().into(), &name.clone().into()));
    assert_eq!(recorded["digest"], stage.image.digest().to_string());
    assert!(recorded["bytes"].as_u64() > Some(10_000) && recorded["ending"] == "exit status: 0", "{recorded}");
    let failed = run(&mut stage.soci("node", &[&line[..10], &["exit 3"]].concat()));
    let document = json(&String::from_utf8(failed.stdout).unwrap());
    assert_eq!((failed.status.code(), &document["ending"]), (Some(1), &"exit status: 3".into()));
    let recorded = json(&stdout(&mut stage.soci("node", &line)));

    let merged = json(&stdout(&mut stage.soci("node", &["profile", "merge", &first, &first, "-o", &both, "--json"])));
    assert_eq!((&merged["bytes"], &merged["command"]), (&recorded["bytes"], &recorded["command"]));
    assert!(merged["ranges"].as_u64() > Some(0) && merged["output"] == both, "{merged}");
    let piped = run(&mut stage.soci("node", &["profile", "merge", &first, &first, "-o", "/dev/stdout", "--json"]));
    assert_eq!(piped.stdout, std::fs::read(&both).unwrap(), "the profile alone");
    assert_eq!(json(&String::from_utf8(piped.stderr).unwrap())["bytes"], merged["bytes"]);

    let pushed = json(&stdout(&mut stage.soci("node", &["profile", "push", &name, &both, "--json"])));
    let deleted = json(&stdout(&mut stage.soci("node", &["profile", "rm", &name, "default", "--json"])));
    assert_eq!(deleted, serde_json::json!({ "image": name, "name": "default", "deleted": [pushed["digest"]] }));

    drop(stdout(&mut stage.soci("node", &["create", &name, "--min-layer-size", "1000"])));
    let listed = json(&stdout(&mut stage.soci("node", &["index", "list", "--json"])));
    let index = listed[0]["digest"].as_str().unwrap();
    let nothing = json(&stdout(&mut stage.soci("node", &["rebuild-db", "--json"])));
    assert_eq!(nothing, serde_json::json!({ "left": [], "entered": [] }));
    let removed = json(&stdout(&mut stage.soci("node", &["index", "rm", index, "--json"])));
    assert_eq!(removed["removed"][0]["digest"], index, "{removed}");
    assert!(removed["removed"][0]["blobs"].as_array().unwrap().len() > 1, "{removed}");
    assert!(json(&stdout(&mut stage.soci("node", &["index", "list", "--json"]))).as_array().unwrap().is_empty());
}

/// A root that is not there, or of something else, is not an empty table.
#[test]
fn wrong_roots_are_named() {
    let scratch = tempfile::tempdir().unwrap();
    let other = scratch.path().join("other");
    std::fs::create_dir(&other).unwrap();
    let list = |root: &str, line: &[&str]| run(soci().args(["--root", root]).args(line));
    let lines: [&[&str]; 4] =
        [&["index", "list"], &["ztoc", "list"], &["prefetch", "list"], &["index", "list", "--json"]];
    for line in lines {
        let fresh = list(other.to_str().unwrap(), line);
        assert!(fresh.status.success() && fresh.stderr.is_empty(), "an empty directory will do: {fresh:?}");
        let missing = list("/nowhere/at/all", line);
        let said = String::from_utf8(missing.stderr).unwrap();
        assert!(said.contains("/nowhere/at/all does not exist") && said.contains("--root"), "{line:?}: {said}");
        let usr = list("/usr", line);
        let said = String::from_utf8(usr.stderr).unwrap();
        assert!(usr.status.code() == Some(2) && said.contains("/usr is no root of soci's"), "{line:?}: {said}");
    }
    let status = list("/nowhere/at/all", &["status"]);
    assert_eq!(status.status.code(), Some(7), "{status:?}");
}

/// The first recipe of the README, as it is written there but for names: it publishes, mounts, runs and unmounts.
#[tokio::test(flavor = "multi_thread")]
async fn the_first_recipe_runs() {
    if !can_mount() {
        return;
    }
    let readme = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md")).unwrap();
    let (_, usage) = readme.split_once("\n## Use\n").unwrap();
    let (_, recipe) = usage.split_once("```sh\n").unwrap();
    let (recipe, _) = recipe.split_once("```").unwrap();
    // A layer that is large enough for an index of its own, and one with a shell.
    let mut state = 1_u64;
    let noise = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    });
    let noise = noise.take(11 << 20).collect();
    let stage = Mounting::new(Image::gzip(vec![shell_layer(("etc/x", "x")), tar(&[("noise", noise)])])).await;
    let at = stage.scratch.path().join("new/app");
    let script: String = recipe
        .replace("registry.example/team/app:v1", &stage.name())
        .replace("/mnt/app", at.to_str().unwrap())
        .replace("python3 -c 'print(\"hi\")'", "/bin/sh -c 'echo hi'")
        .lines()
        .filter(|line| !line.starts_with("cargo install"))
        .map(|line| format!("{line}\n"))
        .collect();
    assert!(
        script.contains("soci publish 127.") && script.contains("echo hi") && script.contains("soci umount"),
        "{script}"
    );
    let programs = soci_tests::soci_path();
    let programs = programs.parent().unwrap().display();
    let mut shell = std::process::Command::new("sh");
    shell.args(["-euc", &format!("PATH={programs}:$PATH\n{script}")]).env("CI", "true").env_remove("SOCI_LOG");
    let said = stdout(shell.env("SOCI_ROOT", stage.scratch.path().join("root")));
    assert!(said.contains("\nhi\n") && said.contains("mounted "), "{said}");
    assert!(std::fs::read_dir(&at).unwrap().next().is_none(), "it is unmounted");
}
