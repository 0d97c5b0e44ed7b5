//! The lock file that lets one process write to a root.
//!
//! `flock` and not a pid file: the kernel drops the lock with the process, however it ends. The number in the file is
//! only there to be shown.

use std::fs::File;
use std::io::{Read as _, Seek as _, Write as _};
use std::path::Path;

use rustix::fs::{FlockOperation, flock};

use super::{StoreError, io_error};

/// Held as long as the store is open.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: File,
}

impl Lock {
    pub(crate) fn take(root: &Path) -> Result<Self, StoreError> {
        let path = root.join("lock");
        let options = File::options().read(true).write(true).create(true).truncate(false).clone();
        let mut file = options.open(&path).map_err(io_error("open", &path))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let mut text = String::new();
                let pid = file.read_to_string(&mut text).ok().and_then(|_| text.trim().parse().ok());
                return Err(StoreError::Busy { path: root.to_owned(), pid });
            }
            Err(errno) => return Err(io_error("lock", &path)(errno.into())),
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
