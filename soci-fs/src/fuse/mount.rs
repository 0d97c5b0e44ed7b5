//! Mounts, and their end: by the caller, by another process, or found dead. A mount that outlives the process that
//! serves it is in [`device`].
//!
//! Root mounts directly. Other users go through the set-uid helper `fusermount3`, which the FUSE library calls for
//! mounting and which we call for unmounting.

use soci_index::format::class::{Class, Classified};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use rustix::mount::UnmountFlags;
use tokio::runtime::Handle;

use crate::fuse;
use crate::fuse::image::Image;

pub mod device;
pub(crate) mod erofs;
pub(crate) mod id_mapped;

/// How to mount.
#[derive(Debug, Clone)]
pub struct MountOptions {
    /// What `mount` shows as the device.
    pub source: String,
    /// The mount's type is `fuse.` and this.
    pub subtype: String,
    /// Whether other users may enter, subject to the files' permissions.
    pub allow_other: bool,
    /// Whether set-uid bits and devices are honoured. Only root can have that, and the image's author could then become
    /// root through any user of this machine.
    pub privileged: bool,
    /// Threads that take requests. Reads that wait for the network do not occupy one.
    pub threads: usize,
    /// The kernel's read-ahead in KiB; `None` leaves it alone. More than 128 fetches unneeded bytes; our own read-ahead
    /// is more precise.
    pub read_ahead_kib: Option<u32>,
    /// The directory whose file system `statfs` describes: best the store's.
    pub statistics_path: Option<PathBuf>,
}

impl Default for MountOptions {
    /// By the user: mounts by root can be entered by other users, all others cannot.
    fn default() -> Self {
        let is_root = rustix::process::geteuid().is_root();
        Self {
            source: "soci".to_owned(),
            subtype: "soci".to_owned(),
            allow_other: is_root,
            privileged: false,
            threads: 4,
            read_ahead_kib: Some(128),
            statistics_path: None,
        }
    }
}

/// Why a mount or its end failed.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The kernel or the mount helper refused.
    #[error("cannot mount {}: {cause}", mountpoint.display())]
    Mount {
        mountpoint: PathBuf,
        #[source]
        cause: io::Error,
    },
    /// There is a dead mount in the way.
    #[error("{} is a mount whose process is gone; unmount it first", mountpoint.display())]
    Stale { mountpoint: PathBuf },
    /// The mount could not be removed.
    #[error("cannot unmount {}: {cause}", mountpoint.display())]
    Unmount {
        mountpoint: PathBuf,
        #[source]
        cause: io::Error,
    },
    /// The mount helper failed.
    #[error("cannot unmount {}: {helper}: {message}", mountpoint.display())]
    Helper { mountpoint: PathBuf, helper: &'static str, message: String },
    /// The session broke.
    #[error("serving {} ended: {cause}", mountpoint.display())]
    Serve {
        mountpoint: PathBuf,
        #[source]
        cause: io::Error,
    },
}

impl Classified for MountError {
    fn class(&self) -> Class {
        Class::Local
    }
}

/// A mount that is being served. Dropping it unmounts, at the latest when its last user is gone.
#[derive(Debug)]
pub struct Mounted {
    session: Option<fuse::Serving>,
    unmounter: Unmounter,
}

/// Mounts `image` on the directory `mountpoint` and serves it from threads of its own; reads that need the network run
/// on `runtime`.
///
/// # Errors
/// [`MountError::Stale`] when a dead mount is in the way, [`MountError::Mount`].
pub fn mount(
    image: Arc<Image>,
    mountpoint: &Path,
    options: &MountOptions,
    runtime: Handle,
) -> Result<Mounted, MountError> {
    if is_stale(mountpoint) {
        return Err(MountError::Stale { mountpoint: mountpoint.to_owned() });
    }
    let failed = |cause| MountError::Mount { mountpoint: mountpoint.to_owned(), cause };
    let mountpoint = mountpoint.canonicalize().map_err(failed)?;
    let session = fuse::serve(image, &mountpoint, options, runtime).map_err(failed)?;
    if let Some(kib) = options.read_ahead_kib {
        set_read_ahead(&mountpoint, kib);
    }
    Ok(Mounted { session: Some(session), unmounter: Unmounter { mountpoint } })
}

impl Mounted {
    /// Where it is.
    #[must_use]
    pub fn mountpoint(&self) -> &Path {
        &self.unmounter.mountpoint
    }

    /// A handle that ends the mount from elsewhere: a signal handler, say.
    #[must_use]
    pub fn unmounter(&self) -> Unmounter {
        self.unmounter.clone()
    }

    /// Waits for the unmount. Blocks the thread.
    ///
    /// # Errors
    /// [`MountError::Serve`] when the session broke.
    pub fn wait(mut self) -> Result<(), MountError> {
        let Some(session) = self.session.take() else {
            return Ok(());
        };
        let ended = session.join(|| is_mountpoint(self.mountpoint()));
        ended.map_err(|cause| MountError::Serve { mountpoint: self.mountpoint().to_owned(), cause })
    }

    /// Unmounts and waits until the last request is answered. Fails while files are open, and then goes on serving
    /// until the mount is dropped.
    ///
    /// # Errors
    /// [`MountError::Unmount`].
    pub fn unmount(self) -> Result<(), MountError> {
        self.unmounter.unmount(Lazy::No)?;
        self.wait()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let Some(session) = self.session.take() else {
            return;
        };
        // It may have been unmounted before.
        if is_mountpoint(self.mountpoint())
            && let Err(error) = self.unmounter.unmount(Lazy::Yes)
        {
            tracing::warn!(%error, "a mount stays behind");
        }
        session.release(|| is_mountpoint(self.mountpoint()));
    }
}

/// Whether to wait for users of the mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lazy {
    /// Refuse while it is in use.
    No,
    /// Take it out of the tree at once; it ends when its last user does.
    Yes,
}

/// Ends a mount.
#[derive(Debug, Clone)]
pub struct Unmounter {
    mountpoint: PathBuf,
}

impl Unmounter {
    /// Unmounts.
    ///
    /// # Errors
    /// [`MountError::Unmount`], [`MountError::Helper`].
    pub fn unmount(&self, lazy: Lazy) -> Result<(), MountError> {
        unmount(&self.mountpoint, lazy)
    }
}

/// Unmounts what is mounted on `mountpoint`, whichever process serves it; a dead mount too.
///
/// # Errors
/// [`MountError::Unmount`], or [`MountError::Helper`] where the helper was needed.
pub fn unmount(mountpoint: &Path, lazy: Lazy) -> Result<(), MountError> {
    let flags = match lazy {
        Lazy::No => UnmountFlags::NOFOLLOW,
        Lazy::Yes => UnmountFlags::NOFOLLOW | UnmountFlags::DETACH,
    };
    match rustix::mount::unmount(mountpoint, flags) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::PERM) => unmount_by_helper(mountpoint, lazy),
        Err(errno) => Err(MountError::Unmount { mountpoint: mountpoint.to_owned(), cause: errno.into() }),
    }
}

/// Takes everything that is mounted on an entry of `directory` out of the tree; its users keep it until they end.
pub(crate) fn unmount_entries(directory: &Path) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        while rustix::mount::unmount(entry.path(), UnmountFlags::NOFOLLOW | UnmountFlags::DETACH).is_ok() {}
    }
}

fn unmount_by_helper(mountpoint: &Path, lazy: Lazy) -> Result<(), MountError> {
    let mut message = "not found".to_owned();
    let mut used = "fusermount3";
    for helper in ["fusermount3", "fusermount"] {
        let mut command = Command::new(helper);
        command.arg("-u").args((lazy == Lazy::Yes).then_some("-z")).arg("--").arg(mountpoint);
        match command.stdin(Stdio::null()).output() {
            Ok(output) if output.status.success() => return Ok(()),
            Ok(output) => {
                (used, message) = (helper, String::from_utf8_lossy(&output.stderr).trim().to_owned());
                break;
            }
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => {}
            Err(cause) => {
                (used, message) = (helper, cause.to_string());
                break;
            }
        }
    }
    Err(MountError::Helper { mountpoint: mountpoint.to_owned(), helper: used, message })
}

/// Whether this process may open the device that mounts are served through: it may be missing, or be forbidden by its
/// mode, by the rules of a container for devices, or by a mount without devices.
///
/// # Errors
/// What opening it says.
pub fn may_open_device() -> io::Result<()> {
    fs::File::options().read(true).write(true).open("/dev/fuse").map(drop)
}

/// Finds out whether file systems of the kernel can show layers below `directory`, an existing one: by a mount, which
/// needs root, and leaves nothing behind.
///
/// # Errors
/// What the system says of the first step that failed, with that step.
pub fn try_erofs(directory: &Path) -> io::Result<()> {
    erofs::probe(directory)
}

/// Whether `path` is a FUSE mount whose process is gone.
#[must_use]
pub fn is_stale(path: &Path) -> bool {
    matches!(rustix::fs::statfs(path), Err(rustix::io::Errno::NOTCONN | rustix::io::Errno::CONNABORTED))
}

/// A line of the table of mounts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountEntry {
    pub mountpoint: PathBuf,
    /// Its type.
    pub kind: String,
    /// What is mounted.
    pub source: String,
    /// The device number that files on it have.
    pub device: String,
}

/// The FUSE mounts of this process's view of the system with the given subtype.
///
/// # Errors
/// What reading the table says.
pub fn mounts(subtype: &str) -> io::Result<Vec<MountEntry>> {
    let kind = format!("fuse.{subtype}");
    Ok(table()?.into_iter().filter(|entry| entry.kind == kind).collect())
}

/// All mounts of this process's view of the system, in their order.
pub(crate) fn table() -> io::Result<Vec<MountEntry>> {
    let table = fs::read("/proc/self/mountinfo")?;
    Ok(table.split(|byte| *byte == b'\n').filter_map(parse_mount).collect())
}

fn parse_mount(line: &[u8]) -> Option<MountEntry> {
    let fields: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
    let dash = fields.iter().position(|field| *field == b"-")?;
    let text = |field: Option<&&[u8]>| Some(String::from_utf8_lossy(&unescape(field?)).into_owned());
    Some(MountEntry {
        mountpoint: PathBuf::from(std::ffi::OsString::from_vec(unescape(fields.get(4)?))),
        kind: text(fields.get(dash + 1))?,
        source: text(fields.get(dash + 2))?,
        device: text(fields.get(2))?,
    })
}

/// Undoes the table's octal escapes (`\040` for a space).
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, behind)) = rest.split_first() {
        let digits = behind.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        let escaped = digits.filter(|_| *first == b'\\').and_then(|digits| u8::from_str_radix(digits, 8).ok());
        plain.push(escaped.unwrap_or(*first));
        rest = if escaped.is_some() { &behind[3..] } else { behind };
    }
    plain
}

/// Whether something is mounted on `path`.
fn is_mountpoint(path: &Path) -> bool {
    table().unwrap_or_default().iter().any(|entry| entry.mountpoint == path)
}

/// Sets the kernel's read-ahead for the mount. Only root may, and without it things are only slower.
fn set_read_ahead(mountpoint: &Path, kib: u32) {
    let set = || -> io::Result<()> {
        // The last one lies on top.
        let Some(entry) = table()?.into_iter().rfind(|entry| entry.mountpoint == mountpoint) else {
            return Err(io::ErrorKind::NotFound.into());
        };
        fs::write(format!("/sys/class/bdi/{}/read_ahead_kb", entry.device), kib.to_string())
    };
    if let Err(cause) = set() {
        tracing::debug!(mountpoint = %mountpoint.display(), %cause, "the kernel's read-ahead stays as it is");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_table_lines() {
        let line = br"36 35 0:52 / /mnt/a\040b ro,nosuid shared:1 master:2 - fuse.soci img\134x ro,user_id=0";
        let entry = parse_mount(line).unwrap();
        assert_eq!(entry.mountpoint, Path::new("/mnt/a b"));
        assert_eq!((&*entry.kind, &*entry.source, &*entry.device), ("fuse.soci", r"img\x", "0:52"));
        assert_eq!(parse_mount(b""), None);
        assert_eq!(parse_mount(b"36 35 0:52 / /mnt -"), None);
    }
}
