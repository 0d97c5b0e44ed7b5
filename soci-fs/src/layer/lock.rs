//! Lock files: one process per store, one supervisor per mount.
//!
//! `flock` and not a pid file: the kernel drops the lock with the process, however it ends. The number in the file is
//! only informative, but for this: a child of this process has a copy of every descriptor between `fork` and `exec`, and
//! holds the lock for that moment after it was dropped here. So a lock that this very process has is asked for again.

use soci_index::format::class::{Class, Classified};
use std::fs::File;
use std::io::{self, Read as _, Seek as _, Write as _};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};

/// How long a lock is asked for that this process has itself.
const INHERITED_LIMIT: Duration = Duration::from_millis(200);

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
        let start = Instant::now();
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    let pid = holder(&mut file);
                    if pid != Some(std::process::id()) || start.elapsed() >= INHERITED_LIMIT {
                        return Err(LockError::Busy { pid });
                    }
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(errno) => return Err(io("lock")(errno.into())),
            }
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

/// The process that has written its number into the file.
fn holder(file: &mut File) -> Option<u32> {
    let mut text = String::new();
    file.rewind().ok()?;
    file.read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_two_locks_one_is_taken() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        let first = Lock::take(&path).unwrap();
        let own = Some(std::process::id());
        assert!(matches!(Lock::take(&path), Err(LockError::Busy { pid }) if pid == own));
        // A copy of the descriptor, as a child has it for a moment.
        #[expect(clippy::used_underscore_binding, reason = "it is there to be held, and looked at here only")]
        let copy = first._file.try_clone().unwrap();
        drop(first);
        let child = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            drop(copy);
        });
        Lock::take(&path).unwrap();
        child.join().unwrap();
    }
}
