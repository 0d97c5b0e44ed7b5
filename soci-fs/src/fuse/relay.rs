//! Passes requests on to a server that may die, for kernels that cannot send a request twice (before Linux 6.9).
//!
//! There a request belongs to the process that has read it from the device: if that process dies, the request is never
//! answered. So the keeper of the device reads the requests, remembers each until it is answered, and passes it on
//! through a socket that the server takes for the device. The next server gets what the one before has not answered. It
//! costs one more copy of each message and a change of processes, and only where the kernel leaves no choice: where it
//! can resend, servers read from the device themselves and the keeper does nothing.
//!
//! What this cannot do is survive the keeper: requests in progress are lost with it. On a newer kernel they are not.
//!
//! Invariants: a request is remembered before it is passed on and forgotten after its answer was written; answers are
//! passed on unread but for their number; messages are never put together or split; no thread waits for another while
//! it holds the lock.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};

use parking_lot::Mutex;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SendFlags, Shutdown, SocketFlags, SocketType, shutdown, socketpair, sockopt};

/// The longest request that the library negotiates with the kernel: 16 MiB of data, and a page.
const REQUEST_BYTES_MAX: usize = (16 << 20) + 4096;
/// Answers are as long as the largest read, and a header.
const ANSWER_BYTES_MAX: usize = crate::fuse::READ_BYTES_MAX as usize + 4096;
/// What a socket may hold: the largest answer with all that the kernel counts in.
const SOCKET_BYTES: usize = 4 << 20;

/// Operations that are never answered.
const FORGET: u32 = 2;
const BATCH_FORGET: u32 = 42;
/// An operation about another request, which is of no use to another server.
const INTERRUPT: u32 = 36;

/// Passes requests on for as long as the device is mounted.
#[derive(Debug)]
pub(crate) struct Relay {
    shared: Arc<Shared>,
    answers: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Shared {
    device: OwnedFd,
    state: Mutex<RelayState>,
}

#[derive(Debug, Default)]
struct RelayState {
    /// Requests that were not answered, by their number.
    waiting: BTreeMap<u64, Vec<u8>>,
    /// Our end of the socket of the server that serves.
    server: Option<Arc<OwnedFd>>,
}

impl Relay {
    /// Begins to read requests from the device.
    pub(crate) fn start(device: &impl AsFd) -> io::Result<Self> {
        let device = rustix::io::fcntl_dupfd_cloexec(device, 3)?;
        let shared = Arc::new(Shared { device, state: Mutex::default() });
        let reading = Arc::clone(&shared);
        Builder::new().name("fuse-requests".to_owned()).spawn(move || reading.pass_requests())?;
        Ok(Self { shared, answers: Mutex::default() })
    }

    /// What the next server is to take for the device. The one before must be dead.
    pub(crate) fn attach(&self) -> io::Result<OwnedFd> {
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        for end in [&ours, &theirs] {
            // Beyond the system's limit only for root; without it large reads fail, and say so.
            sockopt::set_socket_send_buffer_size_force(end, SOCKET_BYTES)
                .or_else(|_| sockopt::set_socket_send_buffer_size(end, SOCKET_BYTES))?;
        }
        let mut answers = self.answers.lock();
        if let Some(before) = self.shared.state.lock().server.take() {
            // What the dead server has answered is read to its end.
            let _ = shutdown(&*before, Shutdown::Both);
        }
        if let Some(before) = answers.take() {
            let _ = before.join();
        }
        let ours = Arc::new(ours);
        let unanswered: Vec<Vec<u8>> = {
            let mut state = self.shared.state.lock();
            state.server = Some(Arc::clone(&ours));
            state.waiting.values().cloned().collect()
        };
        let (shared, socket) = (Arc::clone(&self.shared), Arc::clone(&ours));
        *answers = Some(Builder::new().name("fuse-answers".to_owned()).spawn(move || shared.pass_answers(&socket))?);
        // The server does not read yet, and there may be more than fits.
        Builder::new().name("fuse-again".to_owned()).spawn(move || {
            for request in unanswered {
                if send(&ours, &request).is_err() {
                    break;
                }
            }
        })?;
        Ok(theirs)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.end();
    }
}

impl Shared {
    /// Until the device is unmounted.
    fn pass_requests(&self) {
        let mut buffer = vec![0; REQUEST_BYTES_MAX];
        loop {
            let length = match rustix::io::read(&self.device, &mut buffer[..]) {
                Ok(length) => length,
                // The request, or this process, was interrupted.
                Err(Errno::NOENT | Errno::INTR | Errno::AGAIN) => continue,
                Err(errno) => {
                    if errno != Errno::NODEV {
                        tracing::error!(%errno, "requests can no longer be read from the device");
                    }
                    return self.end();
                }
            };
            let request = &buffer[..length];
            let server = {
                let mut state = self.state.lock();
                if let Some(number) = answered_number(request) {
                    state.waiting.insert(number, request.to_vec());
                }
                state.server.clone()
            };
            if let Some(server) = server {
                // One that has died leaves it to the next.
                let _ = send(&server, request);
            }
        }
    }

    /// Until the server is dead.
    fn pass_answers(&self, server: &OwnedFd) {
        let mut buffer = vec![0; ANSWER_BYTES_MAX];
        loop {
            let length = match rustix::io::read(server, &mut buffer[..]) {
                Ok(0) => return,
                Ok(length) => length,
                Err(Errno::INTR) => continue,
                Err(_) => return,
            };
            let answer = &buffer[..length];
            match rustix::io::write(&self.device, answer) {
                // The asker is gone, or it was answered before.
                Ok(_) | Err(Errno::NOENT) => {}
                Err(errno) => tracing::warn!(%errno, "an answer was refused by the kernel"),
            }
            if let Some(number) = word(answer, 8) {
                self.state.lock().waiting.remove(&number);
            }
        }
    }

    /// Signals the server that there is nothing to serve any more.
    fn end(&self) {
        if let Some(server) = self.state.lock().server.take() {
            let _ = shutdown(&*server, Shutdown::Both);
        }
    }
}

/// The number of a request that another server could answer. A request begins with its length, its operation and its
/// number.
fn answered_number(request: &[u8]) -> Option<u64> {
    let operation = u32::from_ne_bytes(request.get(4..8)?.try_into().ok()?);
    (!matches!(operation, FORGET | BATCH_FORGET | INTERRUPT)).then(|| word(request, 8)).flatten()
}

fn word(message: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(message.get(at..at + 8)?.try_into().ok()?))
}

fn send(socket: &OwnedFd, message: &[u8]) -> io::Result<()> {
    loop {
        match rustix::net::send(socket, message, SendFlags::NOSIGNAL) {
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
            Ok(_) => return Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(operation: u32, number: u64, rest: &[u8]) -> Vec<u8> {
        let length = u32::try_from(16 + rest.len()).unwrap();
        [&length.to_ne_bytes()[..], &operation.to_ne_bytes(), &number.to_ne_bytes(), rest].concat()
    }

    fn read(from: &OwnedFd) -> Vec<u8> {
        let mut buffer = vec![0; 2 << 20];
        let length = rustix::io::read(from, &mut buffer[..]).unwrap();
        buffer.truncate(length);
        buffer
    }

    /// A socket plays the device: messages keep their bounds there, too.
    #[test]
    fn the_next_server_gets_what_was_not_answered() {
        let (kernel, device) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        for end in [&kernel, &device] {
            sockopt::set_socket_send_buffer_size_force(end, SOCKET_BYTES).unwrap();
        }
        let relay = Relay::start(&device).unwrap();
        let ask = |operation, number| {
            let request = message(operation, number, b"request");
            send(&kernel, &request).unwrap();
            request
        };
        // Sent before a server runs.
        let first = ask(15, 1);
        while relay.shared.state.lock().waiting.is_empty() {
            std::thread::yield_now();
        }
        let server = relay.attach().unwrap();
        assert_eq!(read(&server), first);
        let (second, _, third) = (ask(15, 2), ask(FORGET, 3), ask(1, 4));
        assert_eq!(read(&server), second);
        assert_eq!(read(&server).get(4..8), Some(&FORGET.to_ne_bytes()[..]));
        assert_eq!(read(&server), third);
        // An answer as long as the largest read.
        let answer = message(0, 2, &vec![7; super::super::READ_BYTES_MAX as usize]);
        send(&server, &answer).unwrap();
        assert_eq!(read(&kernel), answer);
        // It dies with an answer in flight and two requests in hand.
        let last = message(0, 1, b"answer");
        send(&server, &last).unwrap();
        drop(server);
        let server = relay.attach().unwrap();
        assert_eq!(read(&kernel), last);
        assert_eq!(read(&server), third);
        let fifth = ask(15, 5);
        assert_eq!(read(&server), fifth);
        // The mount ends, and so does the server's session.
        drop(relay);
        assert_eq!(rustix::io::read(&server, &mut [0; 16]).unwrap(), 0);
    }
}
