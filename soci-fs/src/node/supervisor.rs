//! A small process that keeps what must outlive a worker: the mount's device and the listener.
//!
//! Containers run on files that a user-space process serves. When that process dies the kernel fails every request at
//! once, unless the device is still open somewhere. So there are two processes: the supervisor, which holds descriptors
//! and does nothing that can go wrong, and the worker, which does all the rest and may crash, be killed or be replaced
//! by a new version. Requests wait in the kernel meanwhile; connections wait in the listener.
//!
//! | signal | effect |
//! |---|---|
//! | `SIGHUP` | the program is started anew; when the new worker runs, the old one is ended and hands over |
//! | `SIGTERM` | the worker is ended, then this process; the mount stays, and is dead unless a service manager keeps it |
//! | `SIGINT` | as `SIGTERM`, and the mount is removed |
//!
//! Under systemd the descriptors are also in the service manager's keeping (`FileDescriptorStoreMax=`), so that even
//! the supervisor can be killed.
//!
//! Invariants: the descriptors are never closed while a worker may need them; there are never two workers that serve;
//! only the end that was asked for ends the supervisor. What happens when is decided in `machine`, which does nothing.

use soci_index::format::class::{Class, Classified};
use std::collections::HashMap;
use std::ffi::OsString;
use std::io;
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{Pid, Signal};
use tokio::net::UnixDatagram;
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use crate::fuse::mount::device::DeviceOptions;
use crate::fuse::mount::{Lazy, MountError, unmount, unmount_entries};

mod channel;
mod holdings;
mod inherited;
mod listen;
mod machine;
mod systemd;

use channel::Word;
use holdings::Holdings;
pub use inherited::{InheritError, Inherited, Supervisor};
pub use listen::ListenError;
use machine::{Input, Machine, Step, Timer, Worker};
use systemd::Manager;

/// Where clients connect.
#[derive(Debug, Clone)]
pub enum Address {
    /// A socket that is made here.
    Path(PathBuf),
    /// The one that the service manager passes, or else one made here.
    Activated {
        /// Used when none is passed.
        default: PathBuf,
    },
}

/// What to supervise.
#[derive(Debug, Clone)]
pub struct SupervisorOptions {
    /// The worker's executable, looked up at every start, so that a replaced file takes effect.
    pub program: PathBuf,
    /// Its arguments. It is to call [`Inherited::receive`] as soon as it has understood them.
    pub arguments: Vec<OsString>,
    /// Variables of its environment, beside those of this process.
    pub environment: &'static [(&'static str, &'static str)],
    /// Where the layers are mounted. Made if it does not exist.
    pub mountpoint: PathBuf,
    /// Directories on whose entries workers mount, too: unmounted at the end, when the layers are.
    pub also_unmount: Vec<PathBuf>,
    /// How they are mounted.
    pub device: DeviceOptions,
    /// Where clients connect.
    pub address: Address,
    /// How long a worker may take to end before it is killed.
    pub end_limit: Duration,
}

/// Why there is nothing to supervise.
#[derive(Debug, thiserror::Error)]
pub enum SupervisorError {
    /// The mount cannot be made or removed.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// The directory to mount on cannot be made.
    #[error("cannot create the directory {}: {cause}", path.display())]
    Directory { path: PathBuf, cause: io::Error },
    /// Another supervisor has the mount.
    #[error(
        "{} is served by another process{}; end it first",
        path.display(),
        pid.map(|pid| format!(" ({pid})")).unwrap_or_default()
    )]
    Busy {
        path: PathBuf,
        /// The other supervisor's process id, if known.
        pid: Option<u32>,
    },
    /// The lock of the mount cannot be taken.
    #[error("cannot {action} {}: {cause}", path.display())]
    Lock { action: &'static str, path: PathBuf, cause: io::Error },
    /// The socket cannot be made.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The service manager has passed several sockets.
    #[error("the service manager has passed {count} sockets, and only one can be used")]
    Sockets { count: usize },
    /// Signals or processes cannot be watched.
    #[error("cannot {what}: {cause}")]
    System { what: &'static str, cause: io::Error },
}

impl Classified for SupervisorError {
    fn class(&self) -> Class {
        Class::Local
    }
}

/// Keeps a worker running until a signal says that it is enough. Must be called from the main thread, before any other
/// thread reads the environment or opens descriptors: it takes those that a service manager has passed.
///
/// # Errors
/// [`SupervisorError`] when it cannot begin, or cannot remove the mount in the end. What happens to workers is no
/// error.
pub fn run(options: SupervisorOptions) -> Result<(), SupervisorError> {
    let system = |what| move |cause| SupervisorError::System { what, cause };
    let passed = systemd::passed().map_err(system("take what the service manager has passed"))?;
    let manager = Manager::of_environment();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(system("watch processes"))?;
    // Before there is anything that an end would leave behind.
    let signals = {
        let _context = runtime.enter();
        Signals::watch().map_err(system("watch signals"))?
    };
    let held = holdings::acquire(&options, passed, &manager)?;
    let (mountpoint, others) = (options.mountpoint.clone(), options.also_unmount.clone());
    let unmounts = runtime.block_on(async {
        let (inputs, incoming) = mpsc::unbounded_channel();
        let mut executor = Executor { options, held, manager: &manager, inputs, workers: HashMap::new() };
        executor.serve(incoming, signals).await
    });
    if unmounts {
        holdings::forget(&manager);
        unmount(&mountpoint, Lazy::Yes)?;
        others.iter().for_each(|directory| unmount_entries(directory));
    }
    Ok(())
}

/// The signals that count.
struct Signals {
    hangup: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    fn watch() -> io::Result<Self> {
        Ok(Self {
            hangup: signal(SignalKind::hangup())?,
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }
}

/// A worker, as its keeper sees it: the task that watches the process does the signalling, so that no number of a
/// process that is gone is ever used.
#[derive(Debug)]
struct Employed {
    /// Of packets; the library has no type of its own for that kind.
    socket: Arc<UnixDatagram>,
    signals: mpsc::UnboundedSender<Signal>,
}

/// Does what the machine decides.
struct Executor<'manager> {
    options: SupervisorOptions,
    held: Holdings,
    manager: &'manager Manager,
    inputs: mpsc::UnboundedSender<Input>,
    workers: HashMap<Worker, Employed>,
}

impl Executor<'_> {
    /// Whether the mount is to be removed in the end.
    async fn serve(&mut self, mut incoming: mpsc::UnboundedReceiver<Input>, mut signals: Signals) -> bool {
        let mut machine = Machine::new(self.options.end_limit);
        let mut input = Input::Begin;
        let mut unmounts = false;
        loop {
            for step in machine.step(input) {
                if step == Step::Finish {
                    return unmounts;
                }
                self.perform(step);
            }
            input = tokio::select! {
                Some(input) = incoming.recv() => input,
                Some(()) = signals.hangup.recv() => Input::Upgrade,
                Some(()) = signals.terminate.recv() => Input::Stop,
                Some(()) = signals.interrupt.recv() => {
                    unmounts = true;
                    Input::Stop
                }
            };
            if let Input::Exited { worker, .. } = input {
                self.workers.remove(&worker);
            }
        }
    }

    fn perform(&mut self, step: Step) {
        match step {
            Step::Start(worker) => {
                if let Err(cause) = self.start(worker) {
                    tracing::error!(program = %self.options.program.display(), %cause, "the worker cannot be started");
                    self.send_input(Input::Exited { worker, lived: Duration::ZERO, killed: false });
                }
            }
            Step::Hand(worker) => {
                if let Err(error) = self.held.renew(&self.options, self.manager) {
                    tracing::error!(%error, "the layers cannot be mounted again");
                }
                let employed = self.workers.get(&worker);
                let handed = employed.map(|employed| self.held.hand(&*employed.socket));
                if let Some(Err(cause)) = handed {
                    // It is dying, or it hangs: its exit, or the time limit, decides.
                    tracing::warn!(worker = worker.0, %cause, "a worker does not take the descriptors");
                    self.signal(worker, Signal::KILL);
                }
            }
            Step::Terminate(worker) => self.signal(worker, Signal::TERM),
            Step::Kill(worker) => {
                tracing::warn!(worker = worker.0, "a worker does not do what it was asked to and is killed");
                self.signal(worker, Signal::KILL);
            }
            Step::After(delay, timer) => self.later(delay, timer),
            Step::AnnounceReady => self.manager.notify("READY=1"),
            Step::AnnounceStopping => self.manager.notify("STOPPING=1"),
            Step::UpgradeFailed => tracing::error!("the new worker did not start; the upgrade is off"),
            Step::Finish => {}
        }
    }

    fn start(&mut self, worker: Worker) -> io::Result<()> {
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        let mut command = Command::new(&self.options.program);
        // A group of its own: what a terminal sends to the group is for the supervisor to interpret.
        command.args(&self.options.arguments).stdin(theirs).process_group(0);
        command.envs(self.options.environment.iter().copied());
        for variable in systemd::VARIABLES {
            command.env_remove(variable);
        }
        let child = command.spawn()?;
        tracing::info!(worker = worker.0, pid = child.id(), "a worker is started");
        let (signals, wanted) = mpsc::unbounded_channel();
        tokio::spawn(watch(worker, child, wanted, self.inputs.clone()));
        let ours = std::os::unix::net::UnixDatagram::from(ours);
        ours.set_nonblocking(true)?;
        let socket = Arc::new(UnixDatagram::from_std(ours)?);
        tokio::spawn(listen(worker, Arc::clone(&socket), self.inputs.clone()));
        self.workers.insert(worker, Employed { socket, signals });
        Ok(())
    }

    fn signal(&self, worker: Worker, signal: Signal) {
        if let Some(employed) = self.workers.get(&worker) {
            // The watching task is gone only when the process is.
            let _ = employed.signals.send(signal);
        }
    }

    fn later(&self, delay: Duration, timer: Timer) {
        let inputs = self.inputs.clone();
        tokio::spawn(async move {
            tokio::time::sleep(delay).await;
            let _ = inputs.send(Input::Elapsed(timer));
        });
    }

    fn send_input(&self, input: Input) {
        // The receiver is owned by the sender's owner.
        let _ = self.inputs.send(input);
    }
}

/// Waits for the end of a worker, and signals to it until then.
async fn watch(
    worker: Worker,
    mut child: Child,
    mut wanted: mpsc::UnboundedReceiver<Signal>,
    inputs: mpsc::UnboundedSender<Input>,
) {
    let started = Instant::now();
    let ended = loop {
        tokio::select! {
            ended = child.wait() => break ended,
            Some(signal) = wanted.recv() => {
                let pid = child.id().and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
                if let Some(Err(cause)) = pid.map(|pid| rustix::process::kill_process(pid, signal)) {
                    tracing::warn!(worker = worker.0, %cause, "a worker cannot be signalled");
                }
            }
        }
    };
    let lived = started.elapsed();
    let killed = match &ended {
        Ok(status) => {
            tracing::info!(worker = worker.0, %status, "a worker has ended");
            status.signal() == Some(Signal::KILL.as_raw())
        }
        Err(cause) => {
            tracing::error!(worker = worker.0, %cause, "a worker cannot be waited for");
            false
        }
    };
    let _ = inputs.send(Input::Exited { worker, lived, killed });
}

/// Passes on what a worker says, until its end of the line is closed.
async fn listen(worker: Worker, socket: Arc<UnixDatagram>, inputs: mpsc::UnboundedSender<Input>) {
    let mut text = [0; channel::WORD_BYTES_MAX];
    while let Ok(length @ 1..) = socket.recv(&mut text).await {
        let input = match Word::parse(&text[..length]) {
            Some(Word::Hello) => Input::Hello(worker),
            Some(Word::Ready) => Input::Ready(worker),
            None => continue,
        };
        let _ = inputs.send(input);
    }
}
