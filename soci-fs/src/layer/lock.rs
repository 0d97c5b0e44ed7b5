//! Lock files: one process per store, one supervisor per mount.
//!
//! `flock` and not a pid file: the kernel drops the lock with the process, however it ends. The number in the file is
//! only informative.

use soci_index::format::class::{Class, Classified};
use std::fs::File;
use std::io::{self, Read as _, Seek as _, Write as _};
use std::path::Path;

use rustix::fs::{FlockOperation, flock};

/// Why a lock was not taken.
#[derive(Debug)]
pub enum LockError {
    /// Another process has it.
    Busy {
        /// This one, if it could write its number.
        pid: Option<u32>,
    },
    /// The file cannot be opened or locked.
    Io { action: &'static str, cause: io::Error },
}

impl Classified for LockError {
    fn class(&self) -> Class {
        Class::Local
    }
}

/// Held until it is dropped.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Takes the lock that the file `path` stands for; makes the file if need be.
    ///
    /// # Errors
    /// [`LockError`].
    pub fn take(path: &Path) -> Result<Self, LockError> {
        let io = |action| move |cause| LockError::Io { action, cause };
        let options = File::options().read(true).write(true).create(true).truncate(false).clone();
        let mut file = options.open(path).map_err(io("open"))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let mut text = String::new();
                let pid = file.read_to_string(&mut text).ok().and_then(|_| text.trim().parse().ok());
                return Err(LockError::Busy { pid });
            }
            Err(errno) => return Err(io("lock")(errno.into())),
        }
        let write = |file: &mut File| {
            file.set_len(0)?;
            file.rewind()?;
            writeln!(file, "{}", std::process::id())
        };
        // The lock holds without the number: a full disk must not keep us from serving what is there.
        if let Err(cause) = write(&mut file) {
            tracing::warn!(path = %path.display(), %cause, "cannot write the process number into the lock file");
        }
        Ok(Self { _file: file })
    }
}
