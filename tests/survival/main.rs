//! Readers outlive the processes that serve them: workers are killed, replaced and stopped under load.
//!
//! This program is test, supervisor and worker in one: it starts itself again with a word that says which. Needs
//! /dev/fuse and root, and says so when it has neither. Whatever happens, its processes are ended and its mount is
//! removed.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a test that cannot go on stops, and one without a harness speaks for itself"
)]

mod processes;

use std::fs;
use std::io::{IoSliceMut, Read as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::{FileExt as _, symlink};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use processes::{supervisor, worker};
use rustix::fs::Advice;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use rustix::process::{Pid, Signal};
use soci_fs::fuse::mount::{Lazy, unmount};
use soci_tests::reading::{Layer, files_tar, noise};

const LAYERS: u16 = 3;
const FILES: u64 = 8;
const FILE_BYTES: usize = 500_000;
/// How long a range request takes: longer than nothing, so that reads are under way when a worker dies.
const SOURCE_DELAY: Duration = Duration::from_millis(15);
/// Nothing here takes longer unless it is broken.
const PATIENCE: Duration = Duration::from_secs(30);

fn content(slot: u16, file: u64) -> Vec<u8> {
    noise(u64::from(slot) * 100 + file, FILE_BYTES)
}

fn tar_of(slot: u16) -> Vec<u8> {
    files_tar((0..FILES).map(|file| (format!("file{file}"), content(slot, file))))
}

/// A supervisor with its worker, and the readers' expectations.
struct Scene {
    supervisor: Mutex<Option<Child>>,
    directory: tempfile::TempDir,
    contents: Vec<Vec<Vec<u8>>>,
}

impl Scene {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        if RELAYED.load(Ordering::Relaxed) {
            fs::write(directory.path().join("relay"), "").unwrap();
        }
        for slot in 1..=LAYERS {
            let tar = tar_of(slot);
            let layer = Layer::plain(tar.clone(), 64 << 10);
            fs::write(directory.path().join(format!("{slot}.tar")), tar).unwrap();
            fs::write(directory.path().join(format!("{slot}.digest")), layer.digest().to_string()).unwrap();
        }
        symlink(std::env::current_exe().unwrap(), directory.path().join("program")).unwrap();
        let contents = (1..=LAYERS).map(|slot| (0..FILES).map(|file| content(slot, file)).collect()).collect();
        let scene = Self { supervisor: Mutex::new(None), directory, contents };
        scene.start(&mut scene.command());
        scene
    }

    fn command(&self) -> Command {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.arg("supervisor").arg(self.path(""));
        command
    }

    /// Starts a supervisor and waits for its first worker.
    fn start(&self, command: &mut Command) {
        let before = self.pid();
        *self.supervisor.lock().unwrap() = Some(command.stdin(Stdio::null()).spawn().unwrap());
        self.next_pid(before);
        // A kernel that closes its first file of a mount asks the server, and never again. This process must have done
        // that: closing the copies of its files is part of starting another supervisor, which could not be waited for
        // without one.
        drop(fs::File::open(self.file(1, 0)).unwrap());
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn file(&self, slot: u16, file: u64) -> PathBuf {
        self.path(&format!("fs/{slot}/file{file}"))
    }

    /// Process id of the worker that has begun to serve last.
    fn pid(&self) -> Option<Pid> {
        fs::read_to_string(self.path("pid")).ok().and_then(|text| Pid::from_raw(text.parse().ok()?))
    }

    /// Waits until another worker serves.
    fn next_pid(&self, before: Option<Pid>) -> Pid {
        wait_for(|| self.pid().filter(|pid| Some(*pid) != before))
    }

    /// The file that changes at every look, so that only a living worker can show it.
    fn probe(&self) -> PathBuf {
        let digest = fs::read_to_string(self.path("1.digest")).unwrap();
        self.path(&format!("fs/1/.soci-snapshotter/{digest}.json"))
    }

    fn signal(&self, signal: Signal) {
        let pid = self.supervisor.lock().unwrap().as_ref().unwrap().id();
        rustix::process::kill_process(Pid::from_raw(i32::try_from(pid).unwrap()).unwrap(), signal).unwrap();
    }

    /// Waits for the end of the supervisor.
    fn ended(&self) -> ExitStatus {
        let mut child = self.supervisor.lock().unwrap().take().unwrap();
        wait_for(|| child.try_wait().unwrap())
    }

    /// Asks the listener which process answers.
    fn ask(&self) -> Pid {
        let mut text = String::new();
        let mut connection = UnixStream::connect(self.path("socket")).unwrap();
        connection.set_read_timeout(Some(PATIENCE)).unwrap();
        connection.read_to_string(&mut text).unwrap();
        Pid::from_raw(text.parse().unwrap()).unwrap()
    }

    /// Reads at random places by eight threads while `work` runs, and checks every byte. Says how many reads there
    /// were.
    fn under_load(&self, work: impl FnOnce()) -> u64 {
        let (done, reads) = (AtomicBool::new(false), AtomicU64::new(0));
        std::thread::scope(|scope| {
            let readers: Vec<_> = (0..8)
                .map(|seed| {
                    scope.spawn({
                        let (done, reads) = (&done, &reads);
                        move || self.read(seed, done, reads)
                    })
                })
                .collect();
            // The readers end also when this fails.
            let worked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
            done.store(true, Ordering::Relaxed);
            for reader in readers {
                reader.join().unwrap();
            }
            if let Err(panic) = worked {
                std::panic::resume_unwind(panic);
            }
        });
        reads.into_inner()
    }

    fn read(&self, seed: u64, done: &AtomicBool, reads: &AtomicU64) {
        let mut state = seed * 0x9e37_79b9 + 1;
        let mut random = |below: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            usize::try_from(state >> 33).unwrap() % below
        };
        while !done.load(Ordering::Relaxed) {
            let (slot, number) = (random(usize::from(LAYERS)), random(usize::try_from(FILES).unwrap()));
            let path = self.file(u16::try_from(slot).unwrap() + 1, number as u64);
            let file = fs::File::open(&path).unwrap_or_else(|error| panic!("open {}: {error}", path.display()));
            // Not what the kernel has kept.
            rustix::fs::fadvise(&file, 0, None, Advice::DontNeed).unwrap();
            let mut buffer = vec![0; 1 + random(100_000)];
            let offset = random(FILE_BYTES - buffer.len());
            let read = file.read_exact_at(&mut buffer, offset as u64);
            read.unwrap_or_else(|error| panic!("read {} at {offset}: {error}", path.display()));
            let expected = &self.contents[slot][number][offset..offset + buffer.len()];
            assert!(buffer == expected, "wrong bytes in {} at {offset}", path.display());
            reads.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        if let Some(mut child) = self.supervisor.lock().unwrap_or_else(PoisonError::into_inner).take() {
            // Its worker ends with it.
            let _ = child.kill();
            let _ = child.wait();
        }
        while unmount(&self.path("fs"), Lazy::Yes).is_ok() {}
    }
}

fn wait_for<T>(mut look: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(started.elapsed() < PATIENCE, "waited too long");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// How often to kill: 20 times, or as the environment says.
fn kills() -> u32 {
    std::env::var("SOCI_CHAOS_KILLS").map_or(20, |text| text.parse().unwrap())
}

/// Workers are killed every 200 ms while eight threads read.
fn killed_workers_cost_no_read() {
    let scene = Scene::new();
    let mut pauses = Vec::new();
    let reads = scene.under_load(|| {
        let mut pid = scene.pid().unwrap();
        for _ in 0..kills() {
            std::thread::sleep(Duration::from_millis(200));
            rustix::process::kill_process(pid, Signal::KILL).unwrap();
            let killed = Instant::now();
            fs::read(scene.probe()).unwrap();
            pauses.push(killed.elapsed());
            pid = scene.next_pid(Some(pid));
        }
    });
    pauses.sort_unstable();
    println!(
        "    {reads} reads; from kill to first answered read: {:?} at least, {:?} in the middle, {:?} at most",
        pauses[0],
        pauses[pauses.len() / 2],
        pauses[pauses.len() - 1]
    );
    // A read that waits out every pause would make fewer.
    assert!(reads > 100, "{reads}");
}

/// Workers are killed around the moment at which they begin to serve, wherever that finds them.
fn workers_killed_while_they_start_cost_no_read() {
    let scene = Scene::new();
    let mut answered = 0;
    scene.under_load(|| {
        for round in 0..u64::from(kills()) {
            let before = scene.pid();
            rustix::process::kill_process(before.unwrap(), Signal::KILL).unwrap();
            let next = scene.next_pid(before);
            // Each time a little later: its threads take their first requests now.
            std::thread::sleep(Duration::from_micros(round * 137 % 3000));
            rustix::process::kill_process(next, Signal::KILL).unwrap();
            scene.next_pid(Some(next));
            fs::read(scene.probe()).unwrap();
            answered += 1;
        }
    });
    assert_eq!(answered, kills());
}

fn the_listener_waits_for_the_next_worker() {
    let scene = Scene::new();
    let pid = scene.pid().unwrap();
    assert_eq!(scene.ask(), pid);
    rustix::process::kill_process(pid, Signal::KILL).unwrap();
    let answered = scene.ask();
    assert_ne!(answered, pid);
    assert_eq!(scene.next_pid(Some(pid)), answered);
}

fn an_upgrade_costs_no_read() {
    let scene = Scene::new();
    scene.under_load(|| {
        for _ in 0..3 {
            let before = scene.pid();
            std::thread::sleep(Duration::from_millis(100));
            scene.signal(Signal::HUP);
            scene.next_pid(before);
        }
        // One that cannot start leaves everything as it is.
        let before = scene.pid();
        fs::remove_file(scene.path("program")).unwrap();
        symlink("/bin/false", scene.path("program")).unwrap();
        scene.signal(Signal::HUP);
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(scene.pid(), before);
        assert_eq!(scene.ask(), before.unwrap());
    });
}

fn signals_end_it() {
    let scene = Scene::new();
    let held = fs::File::open(scene.file(1, 0)).unwrap();
    let worker = scene.pid().unwrap();
    // The mount stays, and is dead.
    scene.signal(Signal::TERM);
    assert!(scene.ended().success());
    assert!(rustix::process::test_kill_process(worker).is_err());
    assert_eq!(fs::metadata(scene.file(1, 0)).unwrap_err().raw_os_error(), Some(107));
    // The next one replaces it.
    scene.start(&mut scene.command());
    assert!(fs::read(scene.file(1, 0)).unwrap() == content(1, 0));
    assert_eq!(held.read_at(&mut [0], 0).unwrap_err().raw_os_error(), Some(107));
    // A second one refuses to push it away.
    let second = scene.command().stdin(Stdio::null()).stderr(Stdio::null()).status().unwrap();
    assert!(!second.success());
    assert!(fs::read(scene.file(1, 1)).unwrap() == content(1, 1));
    scene.signal(Signal::INT);
    assert!(scene.ended().success());
    assert!(!scene.file(1, 0).exists() && fs::read_dir(scene.path("fs")).unwrap().next().is_none());
}

fn an_unmounted_tree_is_mounted_again() {
    let scene = Scene::new();
    let pid = scene.pid();
    assert!(fs::read(scene.file(2, 3)).unwrap() == content(2, 3));
    unmount(&scene.path("fs"), Lazy::No).unwrap();
    scene.next_pid(pid);
    assert!(fs::read(scene.file(2, 3)).unwrap() == content(2, 3));
}

/// Descriptors that a service manager got to keep.
fn stored(manager: &UnixDatagram, wanted: usize) -> Vec<(String, OwnedFd)> {
    let mut found = Vec::new();
    while found.len() < wanted {
        let mut text = [0; 200];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let parts = &mut [IoSliceMut::new(&mut text)];
        let received = rustix::net::recvmsg(manager, parts, &mut control, RecvFlags::empty()).unwrap();
        let text = String::from_utf8(text[..received.bytes].to_vec()).unwrap();
        for message in control.drain() {
            let RecvAncillaryMessage::ScmRights(descriptors) = message else { continue };
            let name = text.strip_prefix("FDSTORE=1\nFDNAME=").unwrap();
            found.extend(descriptors.map(|descriptor| (name.to_owned(), descriptor)));
        }
    }
    found
}

/// Both processes are killed; the service manager has kept what matters.
fn a_killed_supervisor_costs_no_read() {
    if !can_resend() {
        eprintln!("SKIPPED: to survive both processes needs Linux 6.9");
        return;
    }
    let scene = Scene::new();
    scene.signal(Signal::INT);
    scene.ended();
    let path = scene.path("notify");
    let manager = UnixDatagram::bind(&path).unwrap();
    manager.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut command = scene.command();
    command.env("NOTIFY_SOCKET", &path);
    scene.start(&mut command);
    let kept = stored(&manager, 4);
    let mut word = [0; 100];
    let length = manager.recv(&mut word).unwrap();
    assert_eq!(&word[..length], b"READY=1");
    scene.under_load(|| {
        for _ in 0..3 {
            let before = scene.pid();
            std::thread::sleep(Duration::from_millis(100));
            scene.signal(Signal::KILL);
            scene.ended();
            scene.start(&mut restarted_with(&scene, &kept, &path));
            assert_ne!(scene.pid(), before);
        }
    });
}

/// How systemd would start a supervisor: descriptors from 3 on, and variables that name them.
fn restarted_with(scene: &Scene, kept: &[(String, OwnedFd)], notify: &Path) -> Command {
    let names: Vec<&str> = kept.iter().map(|(name, _)| name.as_str()).collect();
    let mut script = "export LISTEN_PID=$$; exec \"$@\"".to_owned();
    for (number, (_, descriptor)) in (3..).zip(kept) {
        rustix::io::fcntl_setfd(descriptor, rustix::io::FdFlags::empty()).unwrap();
        script += &format!(" {number}<&{}", descriptor.as_raw_fd());
    }
    let mut command = Command::new("bash");
    command.args(["-c", &script, "bash"]).arg(std::env::current_exe().unwrap()).arg("supervisor").arg(scene.path(""));
    command.env("LISTEN_FDS", kept.len().to_string()).env("LISTEN_FDNAMES", names.join(":"));
    command.env("NOTIFY_SOCKET", notify);
    command
}

/// Whether requests pass through the supervisor, as on kernels that cannot send them again.
static RELAYED: AtomicBool = AtomicBool::new(false);

fn relayed(test: fn()) {
    RELAYED.store(true, Ordering::Relaxed);
    let outcome = std::panic::catch_unwind(test);
    RELAYED.store(false, Ordering::Relaxed);
    if let Err(panic) = outcome {
        std::panic::resume_unwind(panic);
    }
}

/// Whether the kernel is new enough, by its name.
fn can_resend() -> bool {
    let name = rustix::system::uname();
    let mut numbers = name.release().to_str().unwrap().split(['.', '-']).map(|part| part.parse::<u32>().unwrap_or(0));
    (numbers.next(), numbers.next()) >= (Some(6), Some(9))
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["supervisor", directory] => return supervisor(Path::new(directory)),
        ["worker", directory] => return worker(Path::new(directory)),
        _ => {}
    }
    if !soci_tests::trees::can_mount() {
        return ExitCode::SUCCESS;
    }
    let tests: [(&str, fn()); 11] = [
        ("relayed: killed_workers_cost_no_read", || relayed(killed_workers_cost_no_read)),
        ("relayed: workers_killed_while_they_start_cost_no_read", || {
            relayed(workers_killed_while_they_start_cost_no_read);
        }),
        ("relayed: an_upgrade_costs_no_read", || relayed(an_upgrade_costs_no_read)),
        ("relayed: an_unmounted_tree_is_mounted_again", || relayed(an_unmounted_tree_is_mounted_again)),
        ("killed_workers_cost_no_read", killed_workers_cost_no_read),
        ("workers_killed_while_they_start_cost_no_read", workers_killed_while_they_start_cost_no_read),
        ("the_listener_waits_for_the_next_worker", the_listener_waits_for_the_next_worker),
        ("an_upgrade_costs_no_read", an_upgrade_costs_no_read),
        ("signals_end_it", signals_end_it),
        ("an_unmounted_tree_is_mounted_again", an_unmounted_tree_is_mounted_again),
        ("a_killed_supervisor_costs_no_read", a_killed_supervisor_costs_no_read),
    ];
    // What test runners pass to ordinary tests is no name of one.
    let is_name = |argument: &&String| !argument.starts_with('-') && argument.parse::<u32>().is_err();
    let filters: Vec<&String> = arguments.iter().filter(is_name).collect();
    let mut failed = 0;
    for (name, test) in tests {
        if !filters.is_empty() && !filters.iter().any(|filter| name.contains(filter.as_str())) {
            continue;
        }
        let outcome = std::panic::catch_unwind(test);
        println!("test {name} ... {}", if outcome.is_ok() { "ok" } else { "FAILED" });
        failed += u32::from(outcome.is_err());
    }
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
