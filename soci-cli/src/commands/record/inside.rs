//! The inside of the namespaces in which root runs a command of an image: mounts, and then what is taken away.
//!
//! `unshare` starts this program again, as the first process of new namespaces (`soci inside`, which no help shows). It
//! makes the image's files the only ones that there are, as bubblewrap does for ordinary users: a directory in memory
//! for what is written, a `/dev` with nothing in it that leads to the machine, the processes of its own namespace below
//! `/proc`, `/sys` without a right to write. Then it gives up what root could undo that with, and becomes the command.
//!
//! Why not a program like runc: it need not be there, and this is a page. Where the image has symbolic links in the
//! places of those directories nothing is mounted: they would lead out of it.
//!
//! Invariants: whatever cannot be taken away ends the command before it began; no file of the machine is open or
//! mounted when it begins, but for standard input and output.

use std::ffi::CString;
use std::fs::{DirBuilder, File, Permissions};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _, symlink};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

use anyhow::Context as _;
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind, mount_remount, unmount};
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType};
use rustix::process::{chdir, pivot_root, setsid, umask};
use rustix::thread::{
    CapabilitySet, CapabilitySets, clear_ambient_capability_set, remove_capability_from_bounding_set, set_capabilities,
    set_no_new_privs,
};

use crate::args::Inside;
use crate::report::exit::{Exit, fail};

/// What root may still do: with files and processes that are all the image's own. A container may make devices, too,
/// since a control group keeps it from opening them; there is none here.
const CAPABILITIES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::KILL)
    .union(CapabilitySet::NET_BIND_SERVICE)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SYS_CHROOT);
/// Devices that every program may have.
const DEVICES: [&str; 6] = ["null", "zero", "full", "random", "urandom", "tty"];
/// The parts of `/proc` that expose the whole machine, or change it. As containers have it.
const HIDDEN: [&str; 9] =
    ["acpi", "asound", "kcore", "keys", "latency_stats", "sched_debug", "scsi", "timer_list", "timer_stats"];
const UNCHANGED: [&str; 5] = ["bus", "fs", "irq", "sys", "sysrq-trigger"];

/// Becomes the command.
///
/// # Errors
/// When it cannot be shut in, or not be started. It returns for no other reason.
pub fn run(arguments: &Inside) -> anyhow::Result<()> {
    let Some((program, words)) = arguments.command.split_first() else {
        return Err(fail(Exit::Usage, "there is no command"));
    };
    umask(rustix::fs::Mode::from_raw_mode(0o022));
    root(&arguments.image, &arguments.room)?;
    if !arguments.network {
        raise_loopback().context("setting up the network of its own")?;
    }
    // A new session: without it the program could inject input into the caller's terminal.
    setsid().context("leaving the session")?;
    give_up()?;
    let directory = &arguments.directory;
    chdir(directory.as_str()).with_context(|| format!("the image's working directory {directory:?}"))?;
    let variables = arguments.environment.iter().filter_map(|variable| variable.split_once('='));
    let cause = Command::new(program).args(words).env_clear().envs(variables).exec();
    Err(fail(Exit::Failure, format!("cannot run {program} in the image: {cause}")))
}

/// Makes the image, with a layer in memory over it, the root directory, and the only one.
fn root(image: &Path, room: &Path) -> anyhow::Result<()> {
    mounted("tmpfs", room, MountFlags::NOSUID | MountFlags::NODEV, "mode=755")?;
    for name in ["upper", "work", "root"] {
        directory(&room.join(name), 0o755)?;
    }
    let (root, flags) = (room.join("root"), MountFlags::NOSUID | MountFlags::NODEV);
    let escaped = |path: &Path| {
        let plain = path.as_os_str().as_bytes().iter();
        plain
            .flat_map(|byte| [b'\\', *byte].into_iter().skip(usize::from(!b",:\\".contains(byte))))
            .collect::<Vec<u8>>()
    };
    let (upper, work) = (room.join("upper"), room.join("work"));
    let options = [("lowerdir=", image), (",upperdir=", &upper), (",workdir=", &work)];
    let options = options.into_iter().flat_map(|(key, path)| [key.as_bytes().to_vec(), escaped(path)]).flatten();
    mounted("overlay", &root, flags, options.collect::<Vec<u8>>())?;
    chdir(&root).with_context(|| root.display().to_string())?;
    for (name, fill) in
        [("proc", proc as fn() -> anyhow::Result<()>), ("dev", dev), ("sys", sys), ("tmp", || temporary("tmp"))]
    {
        let place = Path::new(name);
        if place.is_symlink() {
            continue;
        }
        directory(place, 0o755)?;
        fill()?;
    }
    pivot_root(".", ".").context("making the image the root directory")?;
    // What was the root lies on top of it now.
    unmount(".", UnmountFlags::DETACH).context("leaving the machine's files behind")?;
    chdir("/").context("entering the image")
}

fn proc() -> anyhow::Result<()> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mounted("proc", Path::new("proc"), flags, "")?;
    for name in HIDDEN {
        let path = Path::new("proc").join(name);
        match path.symlink_metadata() {
            Ok(metadata) if metadata.is_dir() => mounted("tmpfs", &path, flags | MountFlags::RDONLY, "mode=555")?,
            Ok(_) => bound(Path::new("/dev/null"), &path)?,
            Err(_) => {}
        }
    }
    for path in UNCHANGED.map(|name| Path::new("proc").join(name)).iter().filter(|path| path.exists()) {
        bound(path, path)?;
        let remounted = mount_remount(path, MountFlags::BIND | MountFlags::RDONLY | flags, c"");
        remounted.with_context(|| format!("shutting /{}", path.display()))?;
    }
    Ok(())
}

fn dev() -> anyhow::Result<()> {
    mounted("tmpfs", Path::new("dev"), MountFlags::NOSUID | MountFlags::NOEXEC, "mode=755")?;
    for name in DEVICES {
        let (theirs, ours) = (Path::new("/dev").join(name), Path::new("dev").join(name));
        if theirs.exists() {
            File::create(&ours).with_context(|| format!("making /{}", ours.display()))?;
            bound(&theirs, &ours)?;
        }
    }
    let terminals = Path::new("dev/pts");
    directory(terminals, 0o755)?;
    let flags = MountFlags::NOSUID | MountFlags::NOEXEC;
    mounted("devpts", terminals, flags, "newinstance,ptmxmode=0666,mode=0620")?;
    directory(Path::new("dev/shm"), 0o755)?;
    temporary("dev/shm")?;
    for (target, name) in [
        ("pts/ptmx", "ptmx"),
        ("/proc/self/fd", "fd"),
        ("/proc/self/fd/0", "stdin"),
        ("/proc/self/fd/1", "stdout"),
        ("/proc/self/fd/2", "stderr"),
    ] {
        symlink(target, Path::new("dev").join(name)).with_context(|| format!("making /dev/{name}"))?;
    }
    Ok(())
}

fn sys() -> anyhow::Result<()> {
    let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mounted("sysfs", Path::new("sys"), flags, "")?;
    let firmware = Path::new("sys/firmware");
    if firmware.exists() { mounted("tmpfs", firmware, flags, "mode=555") } else { Ok(()) }
}

fn temporary(place: &'static str) -> anyhow::Result<()> {
    mounted("tmpfs", Path::new(place), MountFlags::NOSUID | MountFlags::NODEV, "mode=1777")
}

fn mounted(kind: &str, place: &Path, flags: MountFlags, options: impl Into<Vec<u8>>) -> anyhow::Result<()> {
    let options = CString::new(options).context("a path has a zero in it")?;
    mount("soci", place, kind, flags, &*options).with_context(|| format!("mounting {kind} on {}", place.display()))
}

fn bound(from: &Path, place: &Path) -> anyhow::Result<()> {
    mount_bind(from, place).with_context(|| format!("putting {} on {}", from.display(), place.display()))
}

/// Makes a directory with this mode, unless there is one.
fn directory(path: &Path, mode: u32) -> anyhow::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    let made = DirBuilder::new().mode(mode).create(path);
    made.and_then(|()| std::fs::set_permissions(path, Permissions::from_mode(mode)))
        .with_context(|| format!("making {}", path.display()))
}

/// Turns the loopback interface on, without which programs cannot even talk to themselves: a message of route netlink
/// (`RTM_NEWLINK` of interface 1, which is `lo` in every new namespace, with the flag `IFF_UP`).
fn raise_loopback() -> std::io::Result<()> {
    const RTM_NEWLINK: u16 = 16;
    const NLM_F_REQUEST: u16 = 1;
    const IFF_UP: u32 = 1;
    let mut message = Vec::with_capacity(32);
    message.extend(32_u32.to_ne_bytes());
    message.extend([RTM_NEWLINK, NLM_F_REQUEST].map(u16::to_ne_bytes).as_flattened());
    // Sequence and sender; family and type; then index, flags, and which of them change.
    message.extend([0, 0, 0, 1, IFF_UP, IFF_UP].map(u32::to_ne_bytes).as_flattened());
    // The protocol that has the number zero is that of routes.
    let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
    rustix::net::send(&socket, &message, SendFlags::empty())?;
    Ok(())
}

/// Gives up what the kernel lets root do to the machine, for good: neither a set-uid program nor a file's capabilities
/// bring it back.
fn give_up() -> anyhow::Result<()> {
    for capability in CapabilitySet::all().difference(CAPABILITIES).iter() {
        match remove_capability_from_bounding_set(capability) {
            // One that this kernel does not know.
            Ok(()) | Err(rustix::io::Errno::INVAL) => {}
            Err(errno) => return Err(errno).context("giving up capabilities"),
        }
    }
    clear_ambient_capability_set().context("giving up capabilities")?;
    let sets = CapabilitySets { effective: CAPABILITIES, permitted: CAPABILITIES, inheritable: CapabilitySet::empty() };
    set_capabilities(None, sets).context("giving up capabilities")?;
    set_no_new_privs(true).context("giving up to gain privileges")
}
