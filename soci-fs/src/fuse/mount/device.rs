//! A mount whose device one process keeps and others serve, one after the other.
//!
//! [`mount`] is for the keeper: it opens the device, mounts it and answers the kernel's greeting. [`serve`] is for a
//! server, which gets a copy of the descriptor and what was agreed. When it dies, requests wait in the kernel until the
//! next one serves; users of the mount see no more than a pause. The mount ends when it is unmounted, or becomes stale
//! when no process has the descriptor any more.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{Mode, OFlags};
use rustix::mount::MountFlags;
use tokio::runtime::Handle;

use crate::fuse::forest::Forest;
use crate::fuse::mount::{Lazy, MountError, is_mountpoint, set_read_ahead, unmount};
pub use crate::fuse::takeover::Negotiated;
use crate::fuse::{READ_BYTES_MAX, takeover};

/// How to mount.
#[derive(Debug, Clone)]
pub struct DeviceOptions {
    /// What `mount` shows as the device.
    pub source: String,
    /// The mount's type is `fuse.` and this.
    pub subtype: String,
    /// The kernel's read-ahead in KiB; `None` leaves it alone.
    pub read_ahead_kib: Option<u32>,
    /// Pass requests on through the keeper, as is done anyway where the kernel cannot send them again.
    pub always_relay: bool,
}

impl Default for DeviceOptions {
    /// Tools for AWS's snapshotter count mounts of its type, `fuse.rawBridge`, as layers; this is the mount of all of them.
    fn default() -> Self {
        Self {
            source: "soci".to_owned(),
            subtype: "soci-layers".to_owned(),
            read_ahead_kib: Some(128),
            always_relay: false,
        }
    }
}

/// A device with a mount: what its keeper has.
#[derive(Debug)]
pub struct Kept {
    /// The descriptor. As long as one copy of it is open in any process, the mount lives.
    pub device: OwnedFd,
    /// What every server has to know.
    pub negotiated: Negotiated,
}

/// Mounts a new device on the directory `mountpoint` and answers the kernel's greeting. Mounts that are there already,
/// left by a process before, are taken out of the tree; their last users keep them.
///
/// # Errors
/// [`MountError::Mount`], [`MountError::Unmount`].
pub fn mount(mountpoint: &Path, options: &DeviceOptions) -> Result<Kept, MountError> {
    let failed = |cause| MountError::Mount { mountpoint: mountpoint.to_owned(), cause };
    clear(mountpoint)?;
    let mountpoint = mountpoint.canonicalize().map_err(failed)?;
    let device = rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| failed(errno.into()))?;
    let data = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions,max_read={READ_BYTES_MAX}",
        device.as_raw_fd()
    );
    let data = CString::new(data).map_err(|error| failed(error.into()))?;
    let kind = format!("fuse.{}", options.subtype);
    // Set-uid bits and devices count: the root file systems of containers are on it.
    rustix::mount::mount(&options.source, &mountpoint, kind, MountFlags::RDONLY, &*data)
        .map_err(|errno| failed(errno.into()))?;
    let negotiated = takeover::greet(&device).map_err(|cause| {
        if let Err(error) = unmount(&mountpoint, Lazy::Yes) {
            tracing::warn!(%error, "a mount stays behind");
        }
        failed(cause)
    })?;
    if let Some(kib) = options.read_ahead_kib {
        set_read_ahead(&mountpoint, kib);
    }
    Ok(Kept { device, negotiated })
}

/// Takes whatever is mounted on `mountpoint` out of the tree.
pub(crate) fn clear(mountpoint: &Path) -> Result<(), MountError> {
    /// More than mistakes could have piled up; the loop ends if unmounting has no effect.
    const MOUNTS_MAX: usize = 64;
    let resolved = resolved(mountpoint);
    for _ in 0..MOUNTS_MAX {
        if !is_mountpoint(&resolved) {
            break;
        }
        tracing::info!(mountpoint = %resolved.display(), "a mount of a process before is taken out of the tree");
        unmount(&resolved, Lazy::Yes)?;
    }
    Ok(())
}

/// The path as the table of mounts has it, without links. A dead mount does not keep us from finding it: its parent is
/// alive.
fn resolved(mountpoint: &Path) -> PathBuf {
    match (mountpoint.parent().map(Path::canonicalize), mountpoint.file_name()) {
        (Some(Ok(parent)), Some(name)) => parent.join(name),
        _ => mountpoint.to_owned(),
    }
}

/// Whether the mount that belongs to `device` still exists and is the one on `mountpoint`.
#[must_use]
pub fn is_alive(device: &impl AsFd, mountpoint: &Path) -> bool {
    is_connected(device) && is_mountpoint(&resolved(mountpoint))
}

/// Whether the mount that belongs to `device` can still be used, be it only through files that are open.
pub(crate) fn is_connected(device: &impl AsFd) -> bool {
    let mut asked = [PollFd::new(device, PollFlags::empty())];
    let polled = rustix::event::poll(&mut asked, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
    polled.is_ok() && !asked[0].revents().intersects(PollFlags::ERR | PollFlags::NVAL)
}

/// How to serve.
#[derive(Debug, Clone)]
pub struct ServeOptions {
    /// Threads that take requests. Requests that wait for the network do not occupy one.
    pub threads: usize,
    /// The directory whose file system `statfs` describes: best the store's.
    pub statistics_path: Option<PathBuf>,
}

impl Default for ServeOptions {
    fn default() -> Self {
        Self { threads: 4, statistics_path: None }
    }
}

/// A forest being served by this process. Dropping it goes on serving: what ends serving is the end of the process, or
/// of the mount.
#[derive(Debug)]
pub struct ForestSession {
    session: takeover::TakenOver,
}

impl ForestSession {
    /// Waits for the unmount. Blocks the thread.
    ///
    /// # Errors
    /// What broke the session.
    pub fn wait(self) -> io::Result<()> {
        self.session.join()
    }
}

/// Serves `forest` on a kept device, from threads of its own. Requests that the server before has left unanswered come
/// first. There must be no other server.
///
/// # Errors
/// What the system says.
pub fn serve(forest: Arc<Forest>, kept: Kept, options: &ServeOptions, runtime: Handle) -> io::Result<ForestSession> {
    let Kept { device, negotiated } = kept;
    let session =
        takeover::take_over(forest, device, negotiated, options.threads, options.statistics_path.clone(), runtime)?;
    Ok(ForestSession { session })
}
