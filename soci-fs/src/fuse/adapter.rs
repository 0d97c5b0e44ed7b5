//! Translates the kernel's requests into ours, one after the other, and the replies back.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use fuser::{
    AccessFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    IoctlFlags, KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyDirectoryPlus,
    ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyOpen, ReplyStatfs, ReplyXattr, Request,
};
use soci_index::format::entry::Timestamp;
use tokio::runtime::Handle;

use crate::fuse::counts::Operation;
use crate::fuse::errno;
use crate::fuse::error::FsError;
use crate::fuse::file_system::{DirectoryEntry, FileSystem, Opening, Visit};
use crate::fuse::{READ_BYTES_MAX, negotiate};
use crate::tree::NodeKind;
use crate::tree::attributes::Attributes;

/// How long the kernel may keep what never changes: some 34 years.
const FOREVER: Duration = Duration::from_secs(1 << 30);

/// Directory offsets taken by `.` and `..`.
const DOTS: u64 = 2;

thread_local! {
    /// One buffer per FUSE thread: a reply copies out of it.
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

#[derive(Debug)]
pub(super) struct Adapter<S> {
    served: Arc<S>,
    runtime: Handle,
    /// Signals, when dropped, that the session is over.
    _serving: mpsc::Sender<()>,
    /// Whose free space `statfs` shows.
    statistics_path: Option<PathBuf>,
    no_open: AtomicBool,
    no_opendir: AtomicBool,
}

const fn lasting(constant: bool) -> Duration {
    if constant { FOREVER } else { Duration::ZERO }
}

impl<S: FileSystem> Adapter<S> {
    pub(super) const fn new(
        served: Arc<S>,
        runtime: Handle,
        serving: mpsc::Sender<()>,
        statistics_path: Option<PathBuf>,
    ) -> Self {
        let (no_open, no_opendir) = (AtomicBool::new(false), AtomicBool::new(false));
        Self { served, runtime, _serving: serving, statistics_path, no_open, no_opendir }
    }

    /// Answers at once where that is possible, else as soon as what has to be waited for is there.
    /// `answer` says what kept it from answering; that is counted, as is the question.
    fn when_ready(
        &self,
        operation: Operation,
        inode: INodeNo,
        name: Option<&OsStr>,
        answer: impl FnOnce(Result<&S, FsError>) -> Result<(), Errno> + Send + 'static,
    ) {
        if let Some((counters, slot)) = self.served.counters(inode.0) {
            counters.asked(slot, operation);
        }
        match self.served.waiting(inode.0, name.map(OsStr::as_bytes)) {
            None => count_failure(&*self.served, inode, operation, answer(Ok(&self.served))),
            Some(ready) => {
                let served = Arc::clone(&self.served);
                self.runtime.spawn(async move {
                    let answered = answer(ready.await.map(|()| &*served));
                    count_failure(&*served, inode, operation, answered);
                });
            }
        }
    }
}

impl<S: FileSystem> Filesystem for Adapter<S> {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let granted = negotiate(config);
        self.no_open = granted.contains(InitFlags::FUSE_NO_OPEN_SUPPORT).into();
        self.no_opendir = granted.contains(InitFlags::FUSE_NO_OPENDIR_SUPPORT).into();
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let wanted = name.to_owned();
        self.when_ready(Operation::Lookup, parent, Some(name), move |served| {
            let found = served.map(|served| (served.lookup(parent.0, wanted.as_bytes()), served));
            match found {
                Ok((Ok(attributes), served)) => {
                    let constant = served.is_constant(attributes.inode);
                    let name_ttl = lasting(constant && served.names_last(parent.0));
                    let generation = Generation(served.generation(attributes.inode));
                    let attributes = file_attributes(&attributes);
                    reply.entry_with_ttls(&lasting(constant), &name_ttl, &attributes, generation);
                    Ok(())
                }
                Ok((Err(FsError::NotFound), served)) if served.names_last(parent.0) => {
                    reply.entry(&FOREVER, &absent(), Generation(0));
                    Ok(())
                }
                Ok((Err(error), _)) | Err(error) => refused(&error, |number| reply.error(number)),
            }
        });
    }

    fn getattr(&self, _request: &Request, inode: INodeNo, handle: Option<FileHandle>, reply: ReplyAttr) {
        let operation = if handle.is_some() { Operation::FileGetattr } else { Operation::Getattr };
        self.when_ready(operation, inode, None, move |served| {
            let found = served.and_then(|served| Ok((served.attributes(inode.0)?, served)));
            match found {
                Ok((attributes, served)) => {
                    if let (NodeKind::Whiteout, Some((counters, slot))) = (attributes.kind, served.counters(inode.0)) {
                        counters.was_rather(slot, operation, Operation::WhiteoutGetattr);
                    }
                    reply.attr(&lasting(served.is_constant(inode.0)), &file_attributes(&attributes));
                    Ok(())
                }
                Err(error) => refused(&error, |number| reply.error(number)),
            }
        });
    }

    fn readlink(&self, _request: &Request, inode: INodeNo, reply: ReplyData) {
        self.when_ready(Operation::Readlink, inode, None, move |served| {
            match served.and_then(|served| served.read_link(inode.0)) {
                Ok(target) => {
                    reply.data(&target);
                    Ok(())
                }
                Err(error) => refused(&error, |number| reply.error(number)),
            }
        });
    }

    fn open(&self, _request: &Request, inode: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        if let Some((counters, slot)) = self.served.counters(inode.0) {
            counters.asked(slot, Operation::Open);
        }
        match self.served.opening(inode.0) {
            Opening::Direct { handle } => reply.opened(FileHandle(handle), FopenFlags::FOPEN_DIRECT_IO),
            // Once for all files.
            Opening::Cached if self.no_open.load(Ordering::Relaxed) && !self.served.has_direct_files() => {
                reply.error(Errno::ENOSYS);
            }
            Opening::Cached => reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE),
        }
    }

    fn opendir(&self, _request: &Request, _inode: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        // A kernel that is not to ask caches the listing. That of a directory whose names do not last has a
        // modification time that changes with them, by which the kernel drops it.
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
        handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let (length, start) = (size.min(READ_BYTES_MAX) as usize, Instant::now());
        if let Some((counters, slot)) = self.served.counters(inode.0) {
            counters.asked(slot, Operation::Read);
        }
        // A slot may have another layer since the file was opened.
        if handle.0 != 0 && self.served.opening(inode.0) != (Opening::Direct { handle: handle.0 }) {
            reply.error(Errno::EIO);
            return count_failure(&*self.served, inode, Operation::Read, Err(Errno::EIO));
        }
        let waiting = BUFFER.with_borrow_mut(|buffer| match self.served.try_read(inode.0, offset, length, buffer) {
            Ok(true) => {
                reply.data(buffer);
                count_read(&*self.served, inode, buffer.len(), start);
                None
            }
            Ok(false) => Some(reply),
            Err(error) => {
                let number = logged(&error);
                reply.error(number);
                count_failure(&*self.served, inode, Operation::Read, Err(number));
                None
            }
        });
        let Some(reply) = waiting else {
            return;
        };
        let served = Arc::clone(&self.served);
        self.runtime.spawn(async move {
            match served.read(inode.0, offset, length).await {
                Ok(bytes) => {
                    reply.data(&bytes);
                    count_read(&*served, inode, bytes.len(), start);
                }
                Err(error) => {
                    let number = logged(&error);
                    reply.error(number);
                    count_failure(&*served, inode, Operation::Read, Err(number));
                }
            }
        });
    }

    fn readdir(&self, _request: &Request, inode: INodeNo, _handle: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        self.when_ready(Operation::Readdir, inode, None, move |served| {
            let mut add = |seen: DirectoryEntry<'_>| {
                let kind = file_type(seen.attributes.kind);
                !reply.add(INodeNo(seen.attributes.inode), seen.next, kind, OsStr::from_bytes(seen.name))
            };
            match served.and_then(|served| list(served, inode.0, offset, &mut add)) {
                Ok(()) => {
                    reply.ok();
                    Ok(())
                }
                Err(error) => refused(&error, |number| reply.error(number)),
            }
        });
    }

    fn readdirplus(
        &self,
        _request: &Request,
        inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        self.when_ready(Operation::Readdir, inode, None, move |served| {
            let ttl = lasting(served.as_ref().is_ok_and(|served| served.names_last(inode.0)));
            let mut add = |seen: DirectoryEntry<'_>| {
                let (inode, attr) = (INodeNo(seen.attributes.inode), file_attributes(&seen.attributes));
                !reply.add(inode, seen.next, OsStr::from_bytes(seen.name), &ttl, &attr, Generation(seen.generation))
            };
            match served.and_then(|served| list(served, inode.0, offset, &mut add)) {
                Ok(()) => {
                    reply.ok();
                    Ok(())
                }
                Err(error) => refused(&error, |number| reply.error(number)),
            }
        });
    }

    fn getxattr(&self, _request: &Request, inode: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        if !self.served.can_have_xattrs() {
            return reply.error(Errno::ENOSYS);
        }
        let name = name.to_owned();
        self.when_ready(Operation::Getxattr, inode, None, move |served| {
            match served.and_then(|served| served.xattr(inode.0, name.as_bytes())) {
                Ok(value) => {
                    sized(&value, size, reply);
                    Ok(())
                }
                Err(error) => refused(&error, |number| reply.error(number)),
            }
        });
    }

    /// Never "not implemented", even where no file has any: programs take that for a failure, an empty list for what it
    /// is.
    fn listxattr(&self, _request: &Request, inode: INodeNo, size: u32, reply: ReplyXattr) {
        self.when_ready(Operation::Listxattr, inode, None, move |served| {
            match served.and_then(|served| served.xattrs(inode.0)) {
                Ok(all) => {
                    let joined: Vec<u8> = all.into_iter().flat_map(|xattr| xattr.name.into_iter().chain([0])).collect();
                    sized(&joined, size, reply);
                    Ok(())
                }
                Err(error) => refused(&error, |number| reply.error(number)),
            }
        });
    }

    fn statfs(&self, _request: &Request, _inode: INodeNo, reply: ReplyStatfs) {
        let (files, bytes) = self.served.totals();
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

/// Answers with the error, and passes it to the operation counter.
fn refused(error: &FsError, reply: impl FnOnce(Errno)) -> Result<(), Errno> {
    let number = number(error);
    reply(number);
    Err(number)
}

/// Counts an answer that is a failure of ours. That there is no such name, or attribute, is none.
fn count_failure<S: FileSystem>(served: &S, inode: INodeNo, operation: Operation, answered: Result<(), Errno>) {
    if let (Err(number), Some((counters, slot))) = (answered, served.counters(inode.0))
        && number.code() == Errno::EIO.code()
    {
        counters.failed(slot, operation);
    }
}

fn count_read<S: FileSystem>(served: &S, inode: INodeNo, bytes: usize, start: Instant) {
    if let Some((counters, slot)) = served.counters(inode.0) {
        counters.read(slot, bytes, start.elapsed());
    }
}

/// Shows the names of a directory behind `offset`, dots first, until `visit` says that there is no more room.
fn list(served: &impl FileSystem, inode: u64, offset: u64, visit: Visit<'_>) -> Result<(), FsError> {
    let start = Instant::now();
    let listed = list_names(served, inode, offset, visit);
    if let Some((counters, slot)) = served.counters(inode) {
        counters.listed(slot, start.elapsed());
    }
    listed
}

fn list_names(served: &impl FileSystem, inode: u64, offset: u64, visit: Visit<'_>) -> Result<(), FsError> {
    let dots = [(1, b".".as_slice(), Ok(inode)), (2, b"..", served.parent(inode))];
    for (next, name, found) in dots.into_iter().filter(|dot| dot.0 > offset) {
        let Ok(attributes) = found.and_then(|inode| served.attributes(inode)) else {
            continue;
        };
        if !visit(DirectoryEntry { next, name, attributes, generation: served.generation(attributes.inode) }) {
            return Ok(());
        }
    }
    served
        .list(inode, offset.saturating_sub(DOTS), &mut |seen| visit(DirectoryEntry { next: seen.next + DOTS, ..seen }))
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

/// The one place where a failed read is logged. What concerns a whole slot is logged once, by the forest.
fn logged(error: &FsError) -> Errno {
    if !matches!(error, FsError::NoSlot { .. } | FsError::Open { .. }) {
        tracing::warn!(%error, "a read failed");
    }
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
