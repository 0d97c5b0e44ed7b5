//! The service manager: sockets and stored descriptors that it passes, and notifications to it.
//!
//! The protocol is that of `sd_listen_fds` and `sd_notify`: environment variables, and datagrams to a socket. It is
//! small enough to be spoken here. Without a service manager all of it is nothing.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;

use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};

use crate::fuse::descriptor;

/// What a worker must not see: none of it is meant for it.
pub(super) const VARIABLES: [&str; 6] =
    ["LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID", "NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC"];

/// Takes the descriptors that the service manager has passed, with their names. Works once.
pub(super) fn passed() -> io::Result<Vec<(String, OwnedFd)>> {
    let variable = |name: &str| std::env::var(name).ok();
    let number = |name: &str| variable(name).and_then(|text| text.parse::<u32>().ok());
    if number("LISTEN_PID") != Some(std::process::id()) {
        return Ok(Vec::new());
    }
    let count = number("LISTEN_FDS").and_then(|count| usize::try_from(count).ok()).unwrap_or(0);
    let names = variable("LISTEN_FDNAMES").unwrap_or_default();
    let names = names.split(':').map(str::to_owned).chain(std::iter::repeat("unknown".to_owned()));
    Ok(names.zip(descriptor::adopt_passed(count)?).collect())
}

/// Talks to the service manager.
#[derive(Debug)]
pub(super) struct Manager {
    address: Option<SocketAddrUnix>,
}

impl Manager {
    /// The one that the environment names, if any.
    pub(super) fn of_environment() -> Self {
        let name = std::env::var_os("NOTIFY_SOCKET");
        let address = name.as_deref().and_then(|name| match name.as_bytes() {
            [b'@', name @ ..] => SocketAddrUnix::new_abstract_name(name).ok(),
            [b'/', ..] => SocketAddrUnix::new(name).ok(),
            _ => None,
        });
        Self { address }
    }

    /// No service manager.
    #[cfg(test)]
    pub(super) const fn none() -> Self {
        Self { address: None }
    }

    /// Sends a notification. A service manager that does not listen is no reason to stop.
    pub(super) fn notify(&self, state: &str) {
        self.send(state, &[]);
    }

    /// Gives a descriptor into its keeping, to be passed at the next start.
    pub(super) fn store(&self, name: &str, descriptor: BorrowedFd<'_>) {
        self.send(&format!("FDSTORE=1\nFDNAME={name}"), &[descriptor]);
    }

    /// Takes a descriptor out of its keeping.
    pub(super) fn forget(&self, name: &str) {
        self.send(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), &[]);
    }

    fn send(&self, state: &str, descriptors: &[BorrowedFd<'_>]) {
        let Some(address) = &self.address else {
            return;
        };
        if let Err(cause) = send(address, state, descriptors) {
            tracing::warn!(state, %cause, "cannot notify the service manager");
        }
    }
}

fn send(address: &SocketAddrUnix, state: &str, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::ErrorKind::OutOfMemory.into());
    }
    let text = [IoSlice::new(state.as_bytes())];
    rustix::net::sendmsg_addr(&socket, address, &text, &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;
    use std::os::unix::net::UnixDatagram;

    use super::*;

    #[test]
    fn messages_with_and_without_descriptors() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let listening = UnixDatagram::bind(&path).unwrap();
        let manager = Manager { address: Some(SocketAddrUnix::new(&path).unwrap()) };
        let (read, _write) = rustix::pipe::pipe().unwrap();
        manager.notify("READY=1");
        manager.store("name", read.as_fd());
        manager.forget("name");
        let mut text = [0; 100];
        for expected in ["READY=1", "FDSTORE=1\nFDNAME=name", "FDSTOREREMOVE=1\nFDNAME=name"] {
            let length = listening.recv(&mut text).unwrap();
            assert_eq!(std::str::from_utf8(&text[..length]).unwrap(), expected);
        }
        // Not listening.
        drop(listening);
        manager.notify("READY=1");
        Manager::none().notify("READY=1");
    }
}
