//! Translates between the kernel's FUSE requests and [`Image`]: the only file that knows the FUSE library.
//!
//! An image never changes, so the kernel may keep what it is told for ever: names (also that a name does not exist),
//! attributes, directories, link targets, pages. `open` and `opendir` are answered "not implemented" where the kernel
//! then stops asking, and so is `getxattr` when no file of the image has extended attributes.
//!
//! A read is answered by the thread that received it when the bytes are on this node. Else it becomes a task, and the
//! thread goes on to the next request: the network never holds up a FUSE thread.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    AccessFlags, BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, InitFlags, IoctlFlags, KernelConfig, LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData,
    ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyOpen, ReplyStatfs, ReplyXattr,
    Request, Session, SessionACL,
};
use soci_index::entry::Timestamp;
use tokio::runtime::Handle;

use crate::attributes::Attributes;
use crate::errno;
use crate::image::{FsError, Image};
use crate::mount::MountOptions;
use crate::tree::NodeKind;

/// How long the kernel may keep what never changes: some 34 years.
const FOREVER: Duration = Duration::from_secs(1 << 30);

/// Requests that the kernel may have under way in the background, of which read-ahead is one kind; its own default of 12
/// leaves a fast connection idle.
const BACKGROUND_MAX: u16 = 256;

/// Largest read, and the kernel's own limit (256 pages).
const READ_BYTES_MAX: u32 = 1 << 20;

/// What the kernel is asked to do; each only if it can.
const WANTED: [InitFlags; 9] = [
    InitFlags::FUSE_ASYNC_READ,
    InitFlags::FUSE_DO_READDIRPLUS,
    InitFlags::FUSE_READDIRPLUS_AUTO,
    InitFlags::FUSE_PARALLEL_DIROPS,
    InitFlags::FUSE_CACHE_SYMLINKS,
    InitFlags::FUSE_MAX_PAGES,
    InitFlags::FUSE_NO_OPEN_SUPPORT,
    InitFlags::FUSE_NO_OPENDIR_SUPPORT,
    // For the status file: its pages go when its time changes.
    InitFlags::FUSE_AUTO_INVAL_DATA,
];

thread_local! {
    /// One buffer per FUSE thread: a reply copies out of it.
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
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
    let mut config = Config::default();
    config.mount_options = mount_options;
    config.acl = if options.allow_other { SessionACL::All } else { SessionACL::Owner };
    config.n_threads = Some(options.threads.max(1));
    // A take-over by another process needs one descriptor, not several.
    config.clone_fd = false;
    let (serving, ended) = mpsc::channel();
    let adapter = Adapter {
        image,
        runtime,
        _serving: serving,
        statistics_path: options.statistics_path.clone(),
        no_open: AtomicBool::new(false),
        no_opendir: AtomicBool::new(false),
    };
    let session = Session::new(adapter, mountpoint, &config)?.spawn()?;
    Ok(Serving { session, ended: Mutex::new(ended) })
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
        let ended = self.ended.into_inner().unwrap_or_else(PoisonError::into_inner);
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

#[derive(Debug)]
struct Adapter {
    image: Arc<Image>,
    runtime: Handle,
    /// Tells, by going, that the session is over.
    _serving: mpsc::Sender<()>,
    /// Whose free space `statfs` shows.
    statistics_path: Option<std::path::PathBuf>,
    no_open: AtomicBool,
    no_opendir: AtomicBool,
}

impl Adapter {
    fn ttl(&self, inode: u64) -> Duration {
        if self.image.is_constant(inode) { FOREVER } else { Duration::ZERO }
    }
}

impl Filesystem for Adapter {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        for flag in WANTED {
            // What an old kernel cannot do is only slower.
            let _ = config.add_capabilities(flag);
        }
        let offered = config.capabilities();
        self.no_open = offered.contains(InitFlags::FUSE_NO_OPEN_SUPPORT).into();
        self.no_opendir = offered.contains(InitFlags::FUSE_NO_OPENDIR_SUPPORT).into();
        let _ = config.set_max_background(BACKGROUND_MAX);
        let _ = config.set_congestion_threshold(BACKGROUND_MAX / 4 * 3);
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.image.lookup(parent.0, name.as_bytes()) {
            Ok(attributes) => {
                reply.entry(&self.ttl(attributes.inode), &file_attributes(&attributes), Generation(0));
            }
            Err(FsError::NotFound) => reply.entry(&FOREVER, &absent(), Generation(0)),
            Err(error) => reply.error(number(&error)),
        }
    }

    fn getattr(&self, _request: &Request, inode: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        match self.image.attributes(inode.0) {
            Ok(attributes) => reply.attr(&self.ttl(inode.0), &file_attributes(&attributes)),
            Err(error) => reply.error(number(&error)),
        }
    }

    fn readlink(&self, _request: &Request, inode: INodeNo, reply: ReplyData) {
        match self.image.read_link(inode.0) {
            Ok(target) => reply.data(target),
            Err(error) => reply.error(number(&error)),
        }
    }

    fn open(&self, _request: &Request, _inode: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        if self.no_open.load(Ordering::Relaxed) {
            reply.error(Errno::ENOSYS);
        } else {
            reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE);
        }
    }

    fn opendir(&self, _request: &Request, _inode: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        if self.no_opendir.load(Ordering::Relaxed) {
            reply.error(Errno::ENOSYS);
        } else {
            reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_CACHE_DIR);
        }
    }

    fn read(
        &self,
        _request: &Request,
        inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let length = size.min(READ_BYTES_MAX) as usize;
        let waiting = BUFFER.with_borrow_mut(|buffer| match self.image.try_read(inode.0, offset, length, buffer) {
            Ok(true) => {
                reply.data(buffer);
                None
            }
            Ok(false) => Some(reply),
            Err(error) => {
                reply.error(logged(&error));
                None
            }
        });
        let Some(reply) = waiting else {
            return;
        };
        let image = Arc::clone(&self.image);
        self.runtime.spawn(async move {
            match image.read(inode.0, offset, length).await {
                Ok(bytes) => reply.data(&bytes),
                Err(error) => reply.error(logged(&error)),
            }
        });
    }

    fn readdir(&self, _request: &Request, inode: INodeNo, _handle: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let listed = match self.image.list(inode.0, offset.saturating_sub(DOTS)) {
            Ok(listed) => listed,
            Err(error) => return reply.error(number(&error)),
        };
        for (next, name, attributes) in self.dots(inode.0, offset) {
            if reply.add(INodeNo(attributes.inode), next, FileType::Directory, OsStr::new(name)) {
                return reply.ok();
            }
        }
        for entry in listed {
            let kind = file_type(entry.attributes.kind);
            let name = OsStr::from_bytes(entry.name);
            if reply.add(INodeNo(entry.attributes.inode), entry.next + DOTS, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn readdirplus(
        &self,
        _request: &Request,
        inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let listed = match self.image.list(inode.0, offset.saturating_sub(DOTS)) {
            Ok(listed) => listed,
            Err(error) => return reply.error(number(&error)),
        };
        for (next, name, attributes) in self.dots(inode.0, offset) {
            let (inode, attr) = (INodeNo(attributes.inode), file_attributes(&attributes));
            if reply.add(inode, next, OsStr::new(name), &FOREVER, &attr, Generation(0)) {
                return reply.ok();
            }
        }
        for entry in listed {
            let (inode, attr) = (INodeNo(entry.attributes.inode), file_attributes(&entry.attributes));
            let name = OsStr::from_bytes(entry.name);
            if reply.add(inode, entry.next + DOTS, name, &FOREVER, &attr, Generation(0)) {
                break;
            }
        }
        reply.ok();
    }

    fn getxattr(&self, _request: &Request, inode: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        if !self.image.has_xattrs() {
            return reply.error(Errno::ENOSYS);
        }
        match self.image.xattr(inode.0, name.as_bytes()) {
            Ok(value) => sized(value, size, reply),
            Err(error) => reply.error(number(&error)),
        }
    }

    fn listxattr(&self, _request: &Request, inode: INodeNo, size: u32, reply: ReplyXattr) {
        if !self.image.has_xattrs() {
            return reply.error(Errno::ENOSYS);
        }
        match self.image.xattrs(inode.0) {
            Ok(all) => {
                let names: Vec<u8> = all.flat_map(|(name, _)| name.iter().copied().chain([0])).collect();
                sized(&names, size, reply);
            }
            Err(error) => reply.error(number(&error)),
        }
    }

    fn statfs(&self, _request: &Request, _inode: INodeNo, reply: ReplyStatfs) {
        let (files, bytes) = self.image.totals();
        let host = self.statistics_path.as_deref().and_then(|path| rustix::fs::statvfs(path).ok());
        let (blocks, free) = host.map_or((bytes.div_ceil(4096), 0), |host| {
            let scale = |count: u64| count.saturating_mul(host.f_frsize) / 4096;
            (scale(host.f_blocks), scale(host.f_bavail))
        });
        reply.statfs(blocks, free, free, files, 0, 4096, 255, 4096);
    }

    fn access(&self, _request: &Request, _inode: INodeNo, _mask: AccessFlags, reply: ReplyEmpty) {
        // "Not implemented" makes the kernel stop asking and decide by itself.
        reply.error(Errno::ENOSYS);
    }

    fn ioctl(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        _flags: IoctlFlags,
        _command: u32,
        _input: &[u8],
        _room: u32,
        reply: ReplyIoctl,
    ) {
        // What a file that is no terminal answers to programs that ask.
        reply.error(Errno::ENOTTY);
    }

    fn flush(&self, _request: &Request, _inode: INodeNo, _handle: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }
}

/// Directory offsets taken by `.` and `..`.
const DOTS: u64 = 2;

impl Adapter {
    /// `.` and `..`, as far as `offset` does not lie behind them.
    fn dots(&self, inode: u64, offset: u64) -> impl Iterator<Item = (u64, &'static str, Attributes)> {
        let here = self.image.attributes(inode).ok();
        let above = self.image.parent(inode).and_then(|parent| self.image.attributes(parent)).ok();
        let both = [(1, ".", here), (2, "..", above)];
        both.into_iter()
            .filter_map(move |(next, name, found)| Some((next, name, found?)))
            .filter(move |dot| dot.0 > offset)
    }
}

/// Answers a question for bytes whose size may be asked for first.
fn sized(bytes: &[u8], size: u32, reply: ReplyXattr) {
    match u32::try_from(bytes.len()) {
        Ok(length) if size == 0 => reply.size(length),
        Ok(length) if length <= size => reply.data(bytes),
        _ => reply.error(Errno::ERANGE),
    }
}

fn number(error: &FsError) -> Errno {
    Errno::from_i32(errno::of_fs(error).raw_os_error())
}

/// The one place where a failed read is logged.
fn logged(error: &FsError) -> Errno {
    tracing::warn!(%error, "a read failed");
    number(error)
}

fn file_type(kind: NodeKind) -> FileType {
    match kind {
        NodeKind::Directory => FileType::Directory,
        NodeKind::Regular | NodeKind::ForeignLink => FileType::RegularFile,
        NodeKind::Symlink => FileType::Symlink,
        NodeKind::CharDevice | NodeKind::Whiteout => FileType::CharDevice,
        NodeKind::BlockDevice => FileType::BlockDevice,
        NodeKind::Fifo => FileType::NamedPipe,
    }
}

fn file_attributes(attributes: &Attributes) -> FileAttr {
    let time = system_time(attributes.modified);
    FileAttr {
        ino: INodeNo(attributes.inode),
        size: attributes.size,
        blocks: attributes.blocks,
        atime: time,
        mtime: time,
        ctime: time,
        crtime: time,
        kind: file_type(attributes.kind),
        perm: attributes.permissions,
        nlink: attributes.links,
        uid: attributes.uid,
        gid: attributes.gid,
        rdev: attributes.device,
        blksize: 4096,
        flags: 0,
    }
}

/// "There is no such name", in a form that the kernel may remember.
fn absent() -> FileAttr {
    FileAttr {
        ino: INodeNo(0),
        size: 0,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: FileType::RegularFile,
        perm: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

/// A time for the library; one that it cannot hold becomes the nearest that every system can.
fn system_time(time: Timestamp) -> SystemTime {
    let nanoseconds = Duration::from_nanos(u64::from(time.nanoseconds));
    let seconds = Duration::from_secs(time.seconds.unsigned_abs());
    let whole = if time.seconds < 0 { UNIX_EPOCH.checked_sub(seconds) } else { UNIX_EPOCH.checked_add(seconds) };
    whole.and_then(|whole| whole.checked_add(nanoseconds)).unwrap_or(UNIX_EPOCH)
}
