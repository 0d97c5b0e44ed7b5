//! Serves an [`image::Image`] or a [`forest::Forest`] to the kernel: the only folder that knows the FUSE library.
//!
//! Neither ever changes, but for the few things that they say do, so the kernel may cache replies for ever: names (also
//! that a name does not exist), attributes, directories, link targets, pages. `open` and `opendir` are answered "not
//! implemented" where the kernel then stops asking, and so is `getxattr` when no file of an image has extended
//! attributes; `listxattr` answers an empty list then, as on any other file system.
//!
//! A request is answered by the thread that received it when all it needs is on this node. Else it becomes a task, and
//! the thread goes on to the next request: the network never holds up a FUSE thread.
//!
//! An image is mounted by the library and served until it is unmounted. A forest is served on a device that the
//! supervisor has opened, mounted and keeps; see `takeover`.
//!
//! [`file_system`] says what is asked. [`image`] answers for one merged image, [`forest`] for all layers of a node at
//! once, both by `stack`, which shows the files of layers and `status_file`; [`mount`] hands either to the kernel. The
//! room uses `tree`, `layer` and `foresight`; `node` and `soci mount` use it.

use std::ffi::OsStr;
use std::fmt;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::{Arc, mpsc};

use fuser::{BackgroundSession, Config, INodeNo, InitFlags, KernelConfig, MountOption, Notifier, Session, SessionACL};
use tokio::runtime::Handle;

use crate::fuse::image::Image;
use crate::fuse::mount::MountOptions;
use crate::tree::kernel_cache::KernelCache;

mod adapter;
pub mod counts;
pub(crate) mod descriptor;
mod device_file;
pub mod errno;
pub mod error;
pub mod file_system;
pub mod forest;
pub mod image;
pub mod mount;
pub(crate) mod relay;
mod stack;
mod status_file;
pub(crate) mod takeover;

use adapter::Adapter;
use parking_lot::Mutex;

/// Requests that the kernel may have in progress in the background, of which read-ahead is one kind; its own default of
/// 12 leaves a fast connection idle.
const BACKGROUND_MAX: u16 = 256;

/// Largest read, and the kernel's own limit (256 pages).
pub(crate) const READ_BYTES_MAX: u32 = 1 << 20;

/// What the kernel is asked to do; each only if it can.
const WANTED: [InitFlags; 10] = [
    InitFlags::FUSE_ASYNC_READ,
    // For layers as one file: a file system reads ahead on them without waiting for each piece.
    InitFlags::FUSE_ASYNC_DIO,
    InitFlags::FUSE_DO_READDIRPLUS,
    InitFlags::FUSE_READDIRPLUS_AUTO,
    InitFlags::FUSE_PARALLEL_DIROPS,
    InitFlags::FUSE_CACHE_SYMLINKS,
    InitFlags::FUSE_MAX_PAGES,
    InitFlags::FUSE_NO_OPEN_SUPPORT,
    InitFlags::FUSE_NO_OPENDIR_SUPPORT,
    // For status files and changing directories: what is cached of them goes when their time changes.
    InitFlags::FUSE_AUTO_INVAL_DATA,
];

/// Asks for what we want and gives what we get.
fn negotiate(config: &mut KernelConfig) -> InitFlags {
    for flag in WANTED {
        // What an old kernel cannot do is only slower.
        let _ = config.add_capabilities(flag);
    }
    let _ = config.set_max_background(BACKGROUND_MAX);
    let _ = config.set_congestion_threshold(BACKGROUND_MAX / 4 * 3);
    config.capabilities() & WANTED.into_iter().collect::<InitFlags>()
}

/// Mounts `image` and starts serving it.
pub(crate) fn serve(
    image: Arc<Image>,
    mountpoint: &Path,
    options: &MountOptions,
    runtime: Handle,
) -> io::Result<Serving> {
    let mut mount_options = vec![
        MountOption::FSName(options.source.clone()),
        // The library's own option for this is lost when it mounts without a helper.
        MountOption::CUSTOM(format!("subtype={}", options.subtype)),
        MountOption::RO,
        MountOption::CUSTOM(format!("max_read={READ_BYTES_MAX}")),
    ];
    if options.privileged {
        mount_options.extend([MountOption::Suid, MountOption::Dev]);
    }
    if options.allow_other {
        // Others come in by the files' own permissions. A lone user may read all of an image that is theirs anyway.
        mount_options.push(MountOption::DefaultPermissions);
    }
    let acl = if options.allow_other { SessionACL::All } else { SessionACL::Owner };
    let mut config = session_config(acl, options.threads);
    config.mount_options = mount_options;
    let (serving, ended) = mpsc::channel();
    let mounted = Arc::clone(image.mounted());
    let adapter = Adapter::new(image, runtime, serving, options.statistics_path.clone());
    let session = Session::new(adapter, mountpoint, &config)?;
    mounted.set(Box::new(Kernel(session.notifier())));
    let session = session.spawn()?;
    Ok(Serving { session, ended: Mutex::new(ended) })
}

/// The kernel, by the notifications of a session.
struct Kernel(Notifier);

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Kernel")
    }
}

impl KernelCache for Kernel {
    fn forget_inode(&self, inode: u64) -> io::Result<()> {
        self.0.inval_inode(INodeNo(inode), 0, 0)
    }

    fn forget_name(&self, directory: u64, name: &[u8]) -> io::Result<()> {
        self.0.inval_entry(INodeNo(directory), OsStr::from_bytes(name))
    }
}

fn session_config(acl: SessionACL, threads: usize) -> Config {
    let mut config = Config::default();
    config.acl = acl;
    config.n_threads = Some(threads.max(1));
    // A take-over by another process needs one descriptor, not several.
    config.clone_fd = false;
    config
}

/// A session in the background.
#[derive(Debug)]
pub(crate) struct Serving {
    session: BackgroundSession,
    /// Disconnected when the session is over.
    ended: Mutex<mpsc::Receiver<()>>,
}

impl Serving {
    /// Waits until it is unmounted. `is_covered` then says whether something else is mounted in its place.
    pub(crate) fn join(self, is_covered: impl FnOnce() -> bool) -> io::Result<()> {
        // Nothing is ever sent: the sender goes with the session.
        let ended = self.ended.into_inner();
        let _ = ended.recv();
        if is_covered() {
            // The library unmounts by path when its session is dropped, also one that is unmounted already: that would
            // hit the other mount. A descriptor that stays open is the smaller evil.
            std::mem::forget(self.session);
            return Ok(());
        }
        self.session.join()
    }

    /// Lets go of a session that is out of the tree but perhaps still in use.
    pub(crate) fn release(self, is_covered: impl FnOnce() -> bool) {
        if is_covered() {
            std::mem::forget(self.session);
        }
    }
}
