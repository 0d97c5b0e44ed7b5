//! The socket: made at a path, or inherited from systemd.

use std::os::unix::net::UnixListener;
use std::path::Path;

use anyhow::{Context as _, bail};
use listenfd::ListenFd;
use soci_fs::grpc::listen;

use super::args::{ADDRESS, Address};

/// Listens where the command line says. Without an inherited socket `fd://` means the usual path; which one of several
/// is meant nobody could tell.
pub(super) fn listen(address: &Address) -> anyhow::Result<UnixListener> {
    match address {
        Address::Path(path) => Ok(listen::listen(path)?),
        Address::Inherited => inherited(&mut ListenFd::from_env()),
    }
}

fn inherited(sockets: &mut ListenFd) -> anyhow::Result<UnixListener> {
    match sockets.len() {
        0 => Ok(listen::listen(Path::new(ADDRESS))?),
        1 => {
            let taken = sockets.take_unix_listener(0).context("the socket passed by systemd is not a unix socket")?;
            taken.context("the socket passed by systemd was taken already")
        }
        several => bail!("systemd passed {several} sockets, --address fd:// needs exactly one"),
    }
}

/// The address of a listener, for people.
pub(super) fn shown(listener: &UnixListener) -> String {
    let address = listener.local_addr().ok();
    let path = address.as_ref().and_then(|address| address.as_pathname());
    path.map_or_else(|| "unnamed socket".to_owned(), |path| path.display().to_string())
}
