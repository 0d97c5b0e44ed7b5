//! Tells systemd how far the daemon is: one datagram per state, if systemd asked for it.

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// How far the daemon is.
#[derive(Debug, Clone, Copy)]
pub(super) enum State {
    /// The socket answers.
    Ready,
    /// It was told to end.
    Stopping,
}

/// Tells the service manager, if there is one. That it cannot be told is logged: the daemon works all the same, and the
/// manager has its own deadline.
pub(super) fn notify(state: State) {
    let Some(socket) = crate::config::notify_socket() else { return };
    if let Err(cause) = send(&socket, state) {
        tracing::warn!(socket = %socket.display(), ?state, %cause, "cannot tell the service manager");
    }
}

fn send(socket: &OsStr, state: State) -> io::Result<()> {
    let message = match state {
        State::Ready => "READY=1",
        State::Stopping => "STOPPING=1",
    };
    let address = match socket.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(socket)?,
    };
    UnixDatagram::unbound()?.send_to_addr(message.as_bytes(), &address).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_of_socket() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let name = format!("soci-notify-test-{}", std::process::id());
        let abstract_address = SocketAddr::from_abstract_name(&name).unwrap();
        for (socket, manager) in [
            (path.clone().into_os_string(), UnixDatagram::bind(&path).unwrap()),
            (format!("@{name}").into(), UnixDatagram::bind_addr(&abstract_address).unwrap()),
        ] {
            for (state, expected) in [(State::Ready, "READY=1"), (State::Stopping, "STOPPING=1")] {
                send(&socket, state).unwrap();
                let mut message = [0; 64];
                let length = manager.recv(&mut message).unwrap();
                assert_eq!(&message[..length], expected.as_bytes());
            }
        }
        assert!(send(directory.path().join("absent").as_os_str(), State::Ready).is_err());
    }
}
