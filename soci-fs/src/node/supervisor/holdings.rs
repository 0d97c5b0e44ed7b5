//! What the supervisor holds: the mount's device, the listener, and a file in memory in which one worker leaves to the
//! next what must not be on a disk. Taken back from the service manager or made.

use std::fs;
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::MemfdFlags;

use crate::fuse::mount::device::{self, Kept, Negotiated};
use crate::fuse::relay::Relay;
use crate::layer::lock::{Lock, LockError};
use crate::node::supervisor::listen::{ORPHAN_LIMIT, listen};
use crate::node::supervisor::systemd::Manager;
use crate::node::supervisor::{Address, SupervisorError, SupervisorOptions, channel};

/// Names in the service manager's keeping.
const DEVICE: &str = "soci-fuse";
const AGREED: &str = "soci-fuse-agreed";
const LISTENER: &str = "soci-listener";
const MEMORY: &str = "soci-memory";

#[derive(Debug)]
pub(super) struct Holdings {
    pub(super) kept: Kept,
    pub(super) listener: UnixListener,
    pub(super) memory: OwnedFd,
    relay: Option<Relay>,
    _lock: Lock,
}

/// Takes what is among `passed`, makes what is not, and gives what was made into the service manager's keeping.
pub(super) fn acquire(
    options: &SupervisorOptions,
    passed: Vec<(String, OwnedFd)>,
    manager: &Manager,
) -> Result<Holdings, SupervisorError> {
    let (mut fuse, mut agreed, mut memory, mut stored, mut activated) = (None, None, None, None, Vec::new());
    for (name, descriptor) in passed {
        match name.as_str() {
            DEVICE => fuse = Some(descriptor),
            AGREED => agreed = Some(descriptor),
            MEMORY => memory = Some(descriptor),
            LISTENER => stored = Some(UnixListener::from(descriptor)),
            _ => activated.push(UnixListener::from(descriptor)),
        }
    }
    // First what can fail without harm: a mount of a live process is not touched.
    let lock = lock(&options.mountpoint)?;
    // From here on there is no other supervisor, at most a worker of one that was killed.
    let listener = listener(&options.address, stored, activated, manager)?;
    let memory = match memory {
        Some(memory) => memory,
        None => new_memory(manager)?,
    };
    let kept = match (fuse, agreed.and_then(recall)) {
        (Some(device), Some(negotiated)) if device::is_alive(&device, &options.mountpoint) => {
            tracing::info!(mountpoint = %options.mountpoint.display(), "the mount was kept by the service manager");
            Kept { device, negotiated }
        }
        _ => new_mount(options, manager)?,
    };
    let relay = relay(&kept, options)?;
    Ok(Holdings { kept, listener, memory, relay, _lock: lock })
}

/// Passes requests on, where the kernel cannot send them again.
fn relay(kept: &Kept, options: &SupervisorOptions) -> Result<Option<Relay>, SupervisorError> {
    if kept.negotiated.can_resend() && !options.device.always_relay {
        return Ok(None);
    }
    tracing::info!("requests pass through the supervisor: this kernel cannot resend them (Linux 6.9 can)");
    let failed = |cause| SupervisorError::System { what: "pass requests on", cause };
    Relay::start(&kept.device).map(Some).map_err(failed)
}

/// The socket that the service manager listens on, or else our own: the existing one, or a new one.
fn listener(
    address: &Address,
    stored: Option<UnixListener>,
    mut activated: Vec<UnixListener>,
    manager: &Manager,
) -> Result<UnixListener, SupervisorError> {
    let path = match (address, activated.len()) {
        (Address::Path(path), _) | (Address::Activated { default: path }, 0) => path,
        (Address::Activated { .. }, 1) => return Ok(activated.swap_remove(0)),
        (Address::Activated { .. }, count) => return Err(SupervisorError::Sockets { count }),
    };
    if let Some(stored) = stored.filter(|stored| is_bound_to(stored, path)) {
        return Ok(stored);
    }
    let listener = listen(path, ORPHAN_LIMIT)?;
    manager.forget(LISTENER);
    manager.store(LISTENER, listener.as_fd());
    Ok(listener)
}

/// Takes everything out of the service manager's keeping.
pub(super) fn forget(manager: &Manager) {
    for name in [DEVICE, AGREED, LISTENER, MEMORY] {
        manager.forget(name);
    }
}

fn new_memory(manager: &Manager) -> Result<OwnedFd, SupervisorError> {
    let made = rustix::fs::memfd_create(MEMORY, MemfdFlags::CLOEXEC);
    let memory =
        made.map_err(|errno| SupervisorError::System { what: "make a file in memory", cause: errno.into() })?;
    manager.forget(MEMORY);
    manager.store(MEMORY, memory.as_fd());
    Ok(memory)
}

fn new_mount(options: &SupervisorOptions, manager: &Manager) -> Result<Kept, SupervisorError> {
    // Ahead of the mount's own check, because a dead mount in the way makes creating the directory fail.
    device::clear(&options.mountpoint)?;
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&options.mountpoint)
        .map_err(|cause| SupervisorError::Directory { path: options.mountpoint.clone(), cause })?;
    let kept = device::mount(&options.mountpoint, &options.device)?;
    // What the service manager has by these names belongs to a mount that is gone.
    manager.forget(DEVICE);
    manager.forget(AGREED);
    manager.store(DEVICE, kept.device.as_fd());
    match remember(kept.negotiated) {
        Ok(memory) => manager.store(AGREED, memory.as_fd()),
        Err(cause) => tracing::warn!(%cause, "the mount will not outlive this process"),
    }
    Ok(kept)
}

impl Holdings {
    /// Mounts anew after an unmount. A mount that is out of the tree but in use is left to its users.
    pub(super) fn renew(&mut self, options: &SupervisorOptions, manager: &Manager) -> Result<(), SupervisorError> {
        if !device::is_connected(&self.kept.device) {
            tracing::warn!(mountpoint = %options.mountpoint.display(), "unmounted by another process; mounting again");
            self.kept = new_mount(options, manager)?;
            self.relay = relay(&self.kept, options)?;
        }
        Ok(())
    }

    /// Hands everything over to a worker, at the other end of `socket`.
    pub(super) fn hand(&self, socket: &impl AsFd) -> io::Result<()> {
        let Self { kept, listener, memory, relay, _lock } = self;
        match relay {
            None => {
                let descriptors = [kept.device.as_fd(), listener.as_fd(), memory.as_fd()];
                channel::hand(socket, &descriptors, kept.negotiated)
            }
            Some(relay) => {
                let device = relay.attach()?;
                let descriptors = [device.as_fd(), listener.as_fd(), memory.as_fd()];
                channel::hand(socket, &descriptors, kept.negotiated.without_resending())
            }
        }
    }
}

/// Makes sure that no other supervisor has the mount. The file stands beside the mount.
fn lock(mountpoint: &Path) -> Result<Lock, SupervisorError> {
    let mut name = mountpoint.as_os_str().to_owned();
    name.push(".lock");
    let path = PathBuf::from(name);
    if let Some(parent) = path.parent() {
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(parent);
        made.map_err(|cause| SupervisorError::Directory { path: parent.to_owned(), cause })?;
    }
    Lock::take(&path).map_err(|error| match error {
        LockError::Busy { pid } => SupervisorError::Busy { path: mountpoint.to_owned(), pid },
        LockError::Io { action, cause } => SupervisorError::Lock { action, path, cause },
    })
}

fn is_bound_to(listener: &UnixListener, path: &Path) -> bool {
    listener.local_addr().is_ok_and(|address| address.as_pathname() == Some(path)) && path.exists()
}

/// What was agreed with the kernel, in a file without a name.
fn remember(agreed: Negotiated) -> io::Result<OwnedFd> {
    let mut file = fs::File::from(rustix::fs::memfd_create(AGREED, MemfdFlags::CLOEXEC)?);
    file.write_all(channel::show(agreed).as_bytes())?;
    Ok(file.into())
}

fn recall(memory: OwnedFd) -> Option<Negotiated> {
    let mut file = fs::File::from(memory);
    let mut text = String::new();
    file.rewind().ok()?;
    file.take(256).read_to_string(&mut text).ok()?;
    channel::parse(&text)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn listeners_are_chosen() {
        let directory = tempfile::tempdir().unwrap();
        let manager = Manager::none();
        let path = |name: &str| directory.path().join(name);
        let at = |name: &str| listen(&path(name), Duration::ZERO).unwrap();
        let name = |listener: UnixListener| {
            let address = listener.local_addr().unwrap();
            address.as_pathname().unwrap().file_name().unwrap().to_str().unwrap().to_owned()
        };
        let activated = Address::Activated { default: path("default") };
        let choose = |address, stored, activated| listener(address, stored, activated, &manager).map(name);
        assert_eq!(choose(&activated, None, vec![at("a")]).unwrap(), "a");
        assert_eq!(choose(&activated, Some(at("b")), vec![at("c")]).unwrap(), "c");
        assert_eq!(choose(&activated, None, vec![]).unwrap(), "default");
        let refused = choose(&activated, None, vec![at("d"), at("e")]);
        assert!(matches!(refused, Err(SupervisorError::Sockets { count: 2 })));
        let fixed = Address::Path(path("fixed"));
        assert_eq!(choose(&fixed, Some(at("f")), vec![at("g")]).unwrap(), "fixed");
        // One that is kept is used: to make it anew would fail, as it is alive.
        let kept = at("fixed");
        assert_eq!(choose(&fixed, Some(kept.try_clone().unwrap()), vec![]).unwrap(), "fixed");
        assert!(matches!(choose(&fixed, None, vec![]), Err(SupervisorError::Listen { .. })));
    }

    #[test]
    fn what_was_agreed_is_remembered() {
        let agreed = Negotiated { minor: 44, flags: 0x80_0000_0021 };
        assert_eq!(recall(remember(agreed).unwrap()), Some(agreed));
    }
}
