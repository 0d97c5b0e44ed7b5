//! The errno that the kernel gets when something fails: one table per error, without a catch-all.
//!
//! A program understands few of these numbers, so whatever concerns the network or the disk is `EIO`; the cause is in
//! the log and in the status file. The tables are exhaustive so that a new variant does not compile until it has its
//! number.

use rustix::io::Errno;

use crate::fuse::error::{FsError, OpenError};
use crate::layer::reader::Cause;
use crate::layer::source::SourceError;
use crate::layer::store::StoreError;

/// The number for a failed question about a file system.
#[must_use]
pub const fn of_fs(error: &FsError) -> Errno {
    match error {
        FsError::NotFound => Errno::NOENT,
        FsError::NoInode { .. } => Errno::STALE,
        FsError::NotDirectory => Errno::NOTDIR,
        FsError::IsDirectory => Errno::ISDIR,
        FsError::NotRegular | FsError::NotLink => Errno::INVAL,
        FsError::NoAttribute => Errno::NODATA,
        FsError::Read(error) => of_read(&error.cause),
        // Not ESTALE, which makes the kernel look the path up again and again, nor ENOENT, which a program takes for a
        // fact about the image.
        FsError::NoSlot { .. } | FsError::NoIdMap { .. } | FsError::NoDevice { .. } | FsError::Closed { .. } => {
            Errno::IO
        }
        FsError::Open { cause, .. } => of_open(cause),
    }
}

/// The number for a failed read.
#[must_use]
pub const fn of_read(cause: &Cause) -> Errno {
    match cause {
        Cause::Source(error) => of_source(error),
        Cause::Store(error) => of_store(error),
        Cause::Short { .. }
        | Cause::Decode(_)
        | Cause::Deadline { .. }
        | Cause::Header(_)
        | Cause::Window { .. }
        | Cause::WindowBlob(_)
        | Cause::Windows(_)
        | Cause::Suspended { .. }
        | Cause::NoWindow { .. }
        | Cause::Condemned { .. }
        | Cause::OutOfRange { .. }
        | Cause::Abandoned => Errno::IO,
    }
}

const fn of_open(error: &OpenError) -> Errno {
    match error {
        OpenError::Unknown { .. }
        | OpenError::Failed { .. }
        | OpenError::Mismatch { .. }
        | OpenError::Tree { .. }
        | OpenError::Deadline { .. }
        | OpenError::NoOpener { .. }
        | OpenError::Abandoned { .. } => Errno::IO,
    }
}

const fn of_source(error: &SourceError) -> Errno {
    match error {
        // Not EACCES: it would say that the *user* may not read the *file*.
        SourceError::Denied { .. }
        | SourceError::Local { .. }
        | SourceError::Registry(_)
        | SourceError::Stored(_)
        | SourceError::OutOfRange { .. }
        | SourceError::Unavailable { .. }
        | SourceError::Missing { .. }
        | SourceError::Empty
        | SourceError::NoParts
        | SourceError::Everywhere { .. }
        | SourceError::Protocol { .. } => Errno::IO,
    }
}

const fn of_store(error: &StoreError) -> Errno {
    match error {
        // Not ENOSPC: a reader has written nothing.
        StoreError::Io { .. } | StoreError::Busy { .. } | StoreError::Length { .. } | StoreError::Unproven { .. } => {
            Errno::IO
        }
    }
}
