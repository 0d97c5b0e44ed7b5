//! The snapshotter daemon as its operator sees it: command line, log, signals, systemd.

use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;
use soci_tests::daemon::{PATIENCE, Running, clean, daemon, daemon_path, started};
use soci_tests::{run, stdout};

#[test]
fn version_and_help() {
    let version = stdout(daemon().arg("--version"));
    assert_eq!(version, format!("soci-snapshotter-grpc version v{} unknown\n", env!("CARGO_PKG_VERSION")));
    let help = stdout(daemon().arg("--help"));
    for word in ["--address", "--config", "--log-level", "--root", "SOCI_SNAPSHOTTER_ROOT", "fd://"] {
        assert!(help.contains(word), "{word}: {help}");
    }
}

#[test]
fn the_log_is_json_and_signals_end_the_daemon_well() {
    for signal in [Signal::TERM, Signal::INT] {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("run/grpc.sock");
        let mut command = daemon();
        command
            .env("SOCI_SNAPSHOTTER_ROOT", directory.path().join("state"))
            .env("SOCI_SNAPSHOTTER_ADDRESS", format!("unix://{}", socket.display()));
        let mut running = Running::start(command, directory.path());
        let lines = running.until("soci-snapshotter-grpc successfully started");
        assert_eq!(lines[0]["msg"], "starting soci-snapshotter-grpc");
        assert_eq!(lines[0]["version"], format!("v{}", env!("CARGO_PKG_VERSION")));
        assert_eq!(lines[0]["revision"], "unknown");
        let last = lines.last().unwrap();
        assert_eq!((last["level"].as_str(), last["address"].as_str()), (Some("info"), socket.to_str()));
        let time = last["time"].as_str().unwrap();
        assert!(time.starts_with("20") && time.ends_with('Z') && time.contains('.'), "{time}");
        UnixStream::connect(&socket).unwrap();
        running.signal(signal);
        assert!(running.end().success(), "{signal:?}");
    }
}

#[test]
fn a_killed_daemon_is_replaced_and_a_living_one_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let (root, socket) = (directory.path().join("state"), directory.path().join("grpc.sock"));
    let mut first = started(&root, &socket);
    first.signal(Signal::KILL);
    first.end();
    assert!(socket.exists());
    let second = started(&root, &socket);
    let pid = second.child.id();

    let mut third = daemon();
    third.arg("--root").arg(&root).arg("--address").arg(directory.path().join("other.sock"));
    let output = run(&mut third);
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stderr).unwrap();
    let last: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    let message = last["msg"].as_str().unwrap();
    assert_eq!(last["level"], "fatal");
    assert!(message.contains(&format!("is served by another process ({pid}); end it first")), "{message}");

    let mut fourth = daemon();
    fourth.arg("--root").arg(directory.path().join("elsewhere")).arg("--address").arg(&socket);
    let output = run(&mut fourth);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8(output.stderr).unwrap().contains("another process listens on"));
    UnixStream::connect(&socket).unwrap();
}

#[test]
fn a_named_configuration_must_be_there() {
    let directory = tempfile::tempdir().unwrap();
    let mut command = daemon();
    command.arg("--root").arg(directory.path()).arg("--config").arg(directory.path().join("absent.toml"));
    let output = run(&mut command);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8(output.stderr).unwrap().contains("failed to open config file"));
}

#[test]
fn a_mirror_that_is_no_host_stops_the_start() {
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("config.toml");
    std::fs::write(&config, "[[resolver.host.'r.example'.mirrors]]\nhost = 'user@m.example'\n").unwrap();
    let mut command = daemon();
    command.arg("--root").arg(directory.path()).arg("--config").arg(&config);
    let output = run(&mut command);
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8(output.stderr).unwrap();
    for word in ["config.toml", "r.example", "user@m.example", "neither user"] {
        assert!(error.contains(word), "{word}: {error}");
    }
}

#[test]
fn levels() {
    for (level, lines) in [("info", true), ("debug", true), ("warn", false), ("fatal", false)] {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("grpc.sock");
        let mut command = daemon();
        command.arg("--root").arg(directory.path()).arg("--address").arg(&socket).args(["--log-level", level]);
        let mut running = Running::start(command, directory.path());
        let deadline = Instant::now() + PATIENCE;
        while UnixStream::connect(&socket).is_err() {
            assert!(Instant::now() < deadline, "the daemon does not start");
            std::thread::sleep(Duration::from_millis(5));
        }
        running.signal(Signal::TERM);
        assert!(running.end().success());
        assert_eq!(running.lines.next().is_some(), lines, "{level}");
    }
    assert!(!run(daemon().args(["--log-level", "loud"])).status.success());
}

#[test]
fn systemd_passes_a_socket_and_is_notified() {
    let directory = tempfile::tempdir().unwrap();
    let (socket, notify) = (directory.path().join("passed.sock"), directory.path().join("notify"));
    let listener = UnixListener::bind(&socket).unwrap();
    let manager = UnixDatagram::bind(&notify).unwrap();
    manager.set_read_timeout(Some(PATIENCE)).unwrap();
    let notified = || {
        loop {
            let mut message = [0; 64];
            let length = manager.recv(&mut message).unwrap();
            let text = String::from_utf8(message[..length].to_vec()).unwrap();
            // What is given into its keeping is another test's matter.
            if !text.starts_with("FDSTORE") {
                return text;
            }
        }
    };
    // The shell moves the socket to where systemd would put it, and keeps its process number.
    let script = r#"LISTEN_FDS=1 LISTEN_PID=$$ exec "$0" --address fd:// --root "$1" 3<&0 0</dev/null"#;
    let mut command = clean(Command::new("sh"));
    command.args(["-c", script]).arg(daemon_path()).arg(directory.path().join("state"));
    command.env("NOTIFY_SOCKET", &notify).stdin(OwnedFd::from(listener));
    let mut running = Running::start(command, directory.path());
    let lines = running.until("soci-snapshotter-grpc successfully started");
    assert_eq!(lines.last().unwrap()["address"].as_str(), socket.to_str());
    assert_eq!(notified(), "READY=1");
    UnixStream::connect(&socket).unwrap();
    running.signal(Signal::TERM);
    assert_eq!(notified(), "STOPPING=1");
    assert!(running.end().success());
}

#[test]
fn several_passed_sockets_are_one_too_many() {
    let directory = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(directory.path().join("passed.sock")).unwrap();
    let script = r#"LISTEN_FDS=2 LISTEN_PID=$$ exec "$0" --address fd:// --root "$1" 3<&0 4<&0 0</dev/null"#;
    let mut command = clean(Command::new("sh"));
    command.args(["-c", script]).arg(daemon_path()).arg(directory.path().join("state"));
    let output = run(command.stdin(OwnedFd::from(listener)));
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8(output.stderr).unwrap().contains("passed 2 sockets"));
}
