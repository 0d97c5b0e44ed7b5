//! `soci record`: what a command of an image gets at, and what becomes of an output that is no file.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use soci_tests::image::{Image, shell_layer, tar, text};
use soci_tests::mounting::{Mounting, can_mount};
use soci_tests::{run, stdout};

async fn stage() -> Mounting {
    Mounting::new(Image::gzip(vec![shell_layer(("etc/greeting", "hello")), tar(&[("data", text(7, 100_000))])])).await
}

/// Records a script of the shell.
fn record(stage: &Mounting, output: &Path, more: &[&str], script: &str) -> Output {
    let name = stage.name();
    let mut command = stage.soci("recorder", &["record", &name, "--min-layer-size", "1000", "-o"]);
    run(command.arg(output).args(more).args(["--", "/bin/sh", "-c", script]))
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The command has nothing of this machine: no files, no devices, no processes, no network, and no way to get them.
#[tokio::test(flavor = "multi_thread")]
async fn a_command_is_shut_in() {
    if !can_mount() {
        return;
    }
    let stage = stage().await;
    let file = stage.scratch.path().join("p.profile");
    let secret = stage.scratch.path().join("secret");
    fs::write(&secret, "of this machine").unwrap();
    let script = format!(
        r#"read -r word < /etc/greeting; echo "greeting $word"
        for name in /dev/*; do echo "device $name"; done
        while read -r line; do echo "status $line"; done < /proc/self/status
        while read -r line; do echo "interface $line"; done < /proc/net/dev
        while read -r line; do echo "mount $line"; done < /proc/self/mounts
        for name in /proc/[0-9]*; do echo "process $name"; done
        for name in {secret} /proc/1/root{secret}; do if [ -e "$name" ]; then echo "found $name"; fi; done
        for name in /proc/sys/kernel/core_pattern /proc/sysrq-trigger /sys/kernel/uevent_helper; do
            if [ -e "$name" ] && (: > "$name") 2>/dev/null; then echo "writable $name"; fi
        done
        if (: < /proc/kcore) 2>/dev/null && read -r byte < /proc/kcore; then echo "memory"; fi
        if (: < /dev/tty) 2>/dev/null; then echo "terminal"; fi
        echo x > /written && echo "umask $(umask)"; echo x > /dev/null"#,
        secret = secret.display()
    );
    let before = fs::read("/proc/sys/kernel/core_pattern").unwrap();
    let output = record(&stage, &file, &[], &script);
    let text = said(&output);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(fs::read("/proc/sys/kernel/core_pattern").unwrap(), before);
    let of = |word: &str| -> Vec<&str> {
        text.lines().filter_map(|line| line.strip_prefix(word)?.strip_prefix(' ')).map(str::trim).collect()
    };
    assert_eq!(of("greeting"), ["hello"]);
    let devices: Vec<_> = of("device").into_iter().map(|name| name.rsplit('/').next().unwrap()).collect();
    let allowed =
        ["fd", "full", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout", "tty", "urandom", "zero"];
    assert!(devices.contains(&"null") && devices.iter().all(|name| allowed.contains(name)), "{devices:?}");
    let status = |key: &str| {
        let line = of("status").into_iter().find_map(|line| line.strip_prefix(key)).expect(key);
        line.trim_start_matches(':').trim().to_owned()
    };
    assert_eq!(status("NoNewPrivs"), "1");
    for sets in ["CapEff", "CapPrm", "CapBnd"] {
        // CHOWN, DAC_OVERRIDE, FOWNER, FSETID, KILL, SETGID, SETUID, NET_BIND_SERVICE, SYS_CHROOT.
        assert_eq!(u64::from_str_radix(&status(sets), 16).unwrap() & !0x0004_04fb, 0, "{sets}: {}", status(sets));
    }
    assert_eq!(status("CapInh").trim_start_matches('0'), "");
    let interfaces: Vec<_> = of("interface").into_iter().filter_map(|line| line.split_once(':')).collect();
    assert!(matches!(interfaces[..], [("lo", _)]), "{interfaces:?}");
    let scratch = stage.scratch.path().to_str().unwrap();
    for line in of("mount") {
        let at = line.split(' ').nth(1).unwrap();
        assert!(!at.starts_with(scratch), "{line}");
        let options: Vec<_> = line.split(' ').nth(3).unwrap().split(',').collect();
        let is_device = at.starts_with("/dev") || line.starts_with("devtmpfs") || line.starts_with("udev");
        assert!(is_device || at.starts_with("/proc/") || options.contains(&"nodev"), "{line}");
    }
    assert!(of("process").iter().all(|name| name.trim_start_matches("/proc/").parse::<u32>().unwrap() < 10), "{text}");
    for word in ["found", "writable"] {
        assert_eq!(of(word), [""; 0]);
    }
    assert!(!text.contains("\nmemory") && !text.contains("\nterminal"), "{text}");
    assert_eq!(of("umask"), ["0022"]);

    // Where it is asked for, the network is this machine's.
    let interfaces = "while read -r line; do echo \"interface $line\"; done < /proc/net/dev; read -r w < /etc/greeting";
    let output = record(&stage, &file, &["--network"], interfaces);
    let ours = fs::read_to_string("/proc/net/dev").unwrap().lines().count();
    assert_eq!(said(&output).lines().filter(|line| line.starts_with("interface")).count(), ours, "{output:?}");
    let leftovers: Vec<_> = fs::read_dir(stage.scratch.path().join("recorder/layers")).unwrap().collect();
    assert!(leftovers.is_empty(), "{leftovers:?}");
}

/// An image cannot have the programs that shut it in load its libraries.
#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_run_is_said() {
    if !can_mount() {
        return;
    }
    let stage = stage().await;
    let name = stage.name();
    let file = stage.scratch.path().join("p.profile");
    let mut command = stage.soci("recorder", &["record", &name, "--min-layer-size", "1000", "-o"]);
    let output = run(command.arg(&file).args(["--", "/no/such/program"]));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(1) && said.contains("/no/such/program"), "{said}");
    assert!(!file.exists());
}

/// A signal ends the command, keeps what was read, and leaves no mount behind.
#[tokio::test(flavor = "multi_thread")]
async fn signals_leave_nothing_behind() {
    if !can_mount() {
        return;
    }
    let stage = stage().await;
    let name = stage.name();
    for signal in [Signal::TERM, Signal::INT] {
        let file = stage.scratch.path().join(format!("{}.profile", signal.as_raw()));
        let mut command = stage.soci("recorder", &["record", &name, "--min-layer-size", "1000", "-o"]);
        let script = "read -r word < /etc/greeting; echo $word; while :; do :; done";
        command.arg(&file).args(["--", "/bin/sh", "-c", script]).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert_eq!(lines.next().unwrap().unwrap(), "hello");
        kill_process(Pid::from_child(&child), signal).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(130), "{output:?}");
        assert!(fs::metadata(&file).unwrap().len() > 0);
        let below = stage.scratch.path();
        let left = soci_fs::fuse::mount::mounts("soci").unwrap();
        assert!(left.iter().all(|mount| !mount.mountpoint.starts_with(below)), "{left:?}");
    }
}

/// Devices and pipes are written into, never replaced; of a link, what it leads to is.
#[tokio::test(flavor = "multi_thread")]
async fn an_output_that_is_no_file_stays_what_it_is() {
    if !can_mount() {
        return;
    }
    let stage = stage().await;
    let at = |name: &str| stage.scratch.path().join(name);
    let script = "read -r word < /etc/greeting; :";
    drop(stdout(Command::new("mknod").arg(at("null")).args(["c", "1", "3"])));
    drop(stdout(Command::new("mkfifo").arg(at("pipe"))));
    std::os::unix::fs::symlink(at("target"), at("link")).unwrap();
    fs::write(at("target"), "old").unwrap();

    let output = record(&stage, &at("null"), &[], script);
    assert!(output.status.success(), "{output:?}");
    let null = at("null").symlink_metadata().unwrap();
    assert!(null.file_type().is_char_device() && null.rdev() == rustix::fs::makedev(1, 3));
    assert!(fs::read_dir(stage.scratch.path()).unwrap().flatten().all(|entry| entry.file_name() != "default.profile"));

    let pipe = at("pipe");
    let reader = std::thread::spawn(move || fs::read(pipe).unwrap());
    assert!(record(&stage, &at("pipe"), &[], script).status.success());
    assert!(at("pipe").symlink_metadata().unwrap().file_type().is_fifo());
    let piped = reader.join().unwrap();

    assert!(record(&stage, &at("link"), &[], script).status.success());
    assert!(at("link").symlink_metadata().unwrap().is_symlink());
    assert_eq!(fs::read(at("target")).unwrap().len(), piped.len());
    assert_eq!(at("target").metadata().unwrap().mode() & 0o777, 0o644);
}
