//! Serves a session that another process began, on a device that outlives both.
//!
//! The FUSE library insists on being greeted by the kernel, which greets only once. So the keeper of the device answers
//! the kernel's greeting itself ([`greet`]), through the library and with the same code that a server uses, and notes
//! what was agreed. Every server after that ([`take_over`]) is greeted by a socket pair that repeats the kernel's
//! greeting, reduced to what was agreed: a later version of this program must not believe that it got more. Then the
//! device takes the place of the socket, and the kernel is asked to send again what was sent and never answered.
//!
//! The road not taken is a special case for the first server: then it would matter whether it died before or after its
//! first answer, which cannot be determined.
//!
//! Kernels before 6.9 send nothing again; there the keeper reads the requests and passes them on: see
//! [`crate::fuse::relay`].
//!
//! Invariants: the keeper holds a descriptor of the device at all times, so the kernel never sees it closed; requests
//! that a dead server had taken are answered by the next one; two servers never serve at the same time.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::thread;

use fuser::{Config, Filesystem, InitFlags, KernelConfig, Request, Session, SessionACL};
use parking_lot::Mutex;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use tokio::runtime::Handle;

use crate::fuse::adapter::Adapter;
use crate::fuse::descriptor;
use crate::fuse::forest::Forest;
use crate::fuse::{Kernel, negotiate, session_config};

/// Protocol version 7 is the only one there is.
const MAJOR: u32 = 7;
/// Operation code of the greeting.
const INIT: u32 = 26;
/// Notification: send again what was not answered.
const NOTIFY_RESEND: i32 = 7;
/// Length of a request's header and of a greeting.
const HEADER_BYTES: u32 = 40;
const INIT_BYTES: u32 = 64;
/// Length of an answer's header.
const OUT_BYTES: u32 = 16;
/// Read-ahead that a repeated greeting offers. The kernel does not see the answer.
const READ_AHEAD_BYTES: u32 = 128 << 10;

/// What kernel and keeper have agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Negotiated {
    /// The kernel's minor protocol version.
    pub minor: u32,
    /// The features in use, as the protocol numbers them.
    pub flags: u64,
}

impl Negotiated {
    /// Whether the kernel can send unanswered requests again: Linux 6.9.
    #[must_use]
    pub const fn can_resend(self) -> bool {
        self.flags & InitFlags::FUSE_HAS_RESEND.bits() != 0
    }

    /// The same without that: another process resends requests.
    pub(crate) const fn without_resending(self) -> Self {
        Self { flags: self.flags & !InitFlags::FUSE_HAS_RESEND.bits(), ..self }
    }
}

/// Answers the kernel's greeting and nothing more.
#[derive(Debug)]
struct Greeter {
    agreed: Arc<Mutex<Option<Negotiated>>>,
}

impl Filesystem for Greeter {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let offered = config.capabilities();
        // The library asks for large writes by itself; of resending the kernel only says that it can.
        let also = InitFlags::FUSE_BIG_WRITES | InitFlags::FUSE_HAS_RESEND;
        let flags = negotiate(config) | (offered & also);
        let minor = config.kernel_abi().1;
        *self.agreed.lock() = Some(Negotiated { minor, flags: flags.bits() });
        Ok(())
    }
}

/// Answers the greeting of a device that was just mounted.
pub(crate) fn greet(device: &impl AsFd) -> io::Result<Negotiated> {
    let agreed = Arc::default();
    let greeter = Greeter { agreed: Arc::clone(&agreed) };
    let own = rustix::io::fcntl_dupfd_cloexec(device, 0)?;
    drop(Session::from_fd(greeter, own, SessionACL::All, Config::default())?);
    let agreed = agreed.lock().take();
    agreed.ok_or_else(|| io::Error::other("the kernel did not greet"))
}

/// A forest being served by this process.
#[derive(Debug)]
pub(crate) struct TakenOver {
    session: thread::JoinHandle<io::Result<()>>,
}

impl TakenOver {
    /// Waits until the file system is unmounted.
    pub(crate) fn join(self) -> io::Result<()> {
        self.session.join().unwrap_or_else(|_| Err(io::Error::other("the session's thread panicked")))
    }
}

/// Serves `forest` on `device`, whose kernel side has `agreed` with the keeper. Requests that the server before has
/// left unanswered come first.
pub(crate) fn take_over(
    forest: Arc<Forest>,
    device: OwnedFd,
    agreed: Negotiated,
    threads: usize,
    statistics_path: Option<PathBuf>,
    runtime: Handle,
) -> io::Result<TakenOver> {
    let (ours, kernels) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).map_err(io::Error::from)?;
    rustix::io::write(&kernels, &greeting(agreed))?;
    let (serving, _) = mpsc::channel();
    let mounted = Arc::clone(forest.mounted());
    let adapter = Adapter::new(forest, runtime, serving, statistics_path);
    let session = Session::from_fd(adapter, ours, SessionACL::All, session_config(SessionACL::All, threads))?;
    mounted.set(Box::new(Kernel(session.notifier())));
    check_answer(&kernels)?;
    descriptor::replace(&session, &device)?;
    // Where the kernel cannot, the keeper has a relay that does.
    if agreed.can_resend() {
        rustix::io::write(&device, &notification(NOTIFY_RESEND))?;
    }
    let is_relayed = rustix::net::sockopt::socket_type(&device).is_ok();
    let session = thread::Builder::new().name("fuse".to_owned()).spawn(move || match session.run() {
        // A relay says by closing that nothing is mounted any more; the library takes that for an empty request.
        Err(error) if is_relayed && error.kind() == io::ErrorKind::InvalidData => Ok(()),
        result => result,
    })?;
    Ok(TakenOver { session })
}

/// The kernel's greeting, in the kernel's layout.
fn greeting(agreed: Negotiated) -> Vec<u8> {
    let (low, high) = (agreed.flags as u32, (agreed.flags >> 32) as u32);
    let extended = if high == 0 { 0 } else { InitFlags::FUSE_INIT_EXT.bits() as u32 };
    let mut bytes = Vec::new();
    let mut put = |words: &[u32]| bytes.extend(words.iter().flat_map(|word| word.to_ne_bytes()));
    put(&[HEADER_BYTES + INIT_BYTES, INIT]);
    // Number 1 of the request, in two halves that are the same either way round, but for their order.
    put(&if cfg!(target_endian = "little") { [1, 0] } else { [0, 1] });
    // No node, no user, no extension.
    put(&[0; 6]);
    put(&[MAJOR, agreed.minor, READ_AHEAD_BYTES, low | extended, high]);
    put(&[0; 11]);
    bytes
}

/// Reads the answer to a greeting: header of length, error and number, then what is of no use here.
fn check_answer(kernels: &OwnedFd) -> io::Result<()> {
    let mut answer = [0_u8; 512];
    let length = rustix::io::read(kernels, &mut answer)?;
    let error = answer[..length].get(4..8).and_then(|bytes| bytes.try_into().ok()).map(i32::from_ne_bytes);
    match error {
        Some(0) => Ok(()),
        Some(error) => Err(io::Error::from_raw_os_error(-error)),
        None => Err(io::Error::other("the session did not answer its greeting")),
    }
}

fn notification(code: i32) -> Vec<u8> {
    let mut bytes = Vec::from(OUT_BYTES.to_ne_bytes());
    bytes.extend(code.to_ne_bytes());
    // Not the answer to any request.
    bytes.extend([0; 8]);
    bytes
}
