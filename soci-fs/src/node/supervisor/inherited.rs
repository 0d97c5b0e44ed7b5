//! The worker's side: takes what the supervisor keeps.

use soci_index::format::class::{Class, Classified};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;

use rustix::process::Signal;

use crate::fuse::mount::device::Kept;
use crate::node::supervisor::channel::{self, Word};

/// Why a worker did not get what it needs.
#[derive(Debug, thiserror::Error)]
pub enum InheritError {
    /// Standard input is not a supervisor's socket.
    #[error("a worker is started by the supervisor only: standard input is not its socket: {cause}")]
    NotASocket { cause: io::Error },
    /// The supervisor has died.
    #[error("the supervisor is gone")]
    Gone,
    /// The supervisor said nonsense, or the system failed.
    #[error("cannot receive the descriptors from the supervisor: {cause}")]
    Receive { cause: io::Error },
}

impl Classified for InheritError {
    fn class(&self) -> Class {
        Class::Local
    }
}

/// What a worker gets from the supervisor.
#[derive(Debug)]
pub struct Inherited {
    /// The device of the mount, for [`crate::fuse::mount::device::serve`].
    pub kept: Kept,
    /// Where clients connect. It is in non-blocking mode.
    pub listener: UnixListener,
    /// A file in memory, with what an earlier worker left there. It outlives this process, not the supervisor's last
    /// end.
    pub memory: Option<File>,
    /// For the word that all is well.
    pub supervisor: Supervisor,
}

/// The line to the supervisor.
#[derive(Debug)]
pub struct Supervisor {
    socket: OwnedFd,
}

impl Inherited {
    /// Says that this process runs and waits for the descriptors: as long as a worker before is still there, but not
    /// longer. What only one process may have (locks, databases) must be opened after this, and what can fail because
    /// the configuration is bad before. From here on this process ends with the supervisor.
    ///
    /// # Errors
    /// [`InheritError`].
    pub fn receive() -> Result<Self, InheritError> {
        let not_a_socket = |cause: rustix::io::Errno| InheritError::NotASocket { cause: cause.into() };
        let socket = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3).map_err(not_a_socket)?;
        rustix::net::sockopt::socket_type(&socket).map_err(not_a_socket)?;
        let failed = |cause| InheritError::Receive { cause };
        // Two workers must not serve at once, which a supervisor started anew could not prevent. Should the supervisor
        // have died before this line, its end of the socket is closed.
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).map_err(|errno| failed(errno.into()))?;
        channel::say(&socket, Word::Hello).map_err(failed)?;
        let handed = channel::receive(&socket).map_err(failed)?.ok_or(InheritError::Gone)?;
        let listener = UnixListener::from(handed.listener);
        listener.set_nonblocking(true).map_err(failed)?;
        let kept = Kept { device: handed.device, negotiated: handed.agreed };
        Ok(Self { kept, listener, memory: handed.memory.map(File::from), supervisor: Supervisor { socket } })
    }
}

impl Supervisor {
    /// Says that this process serves, which the supervisor passes on to the service manager.
    ///
    /// # Errors
    /// [`InheritError::Receive`] when the supervisor is gone.
    pub fn ready(&self) -> Result<(), InheritError> {
        channel::say(&self.socket, Word::Ready).map_err(|cause| InheritError::Receive { cause })
    }
}
