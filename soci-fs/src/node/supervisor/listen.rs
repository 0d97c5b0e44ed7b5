//! Makes the socket on which the service listens.
//!
//! A socket file outlives its process, so a dead one is replaced. One that is answered, and anything that is no socket,
//! is not ours to take away. But a worker whose supervisor was killed is killed, too, and may need a moment to be gone,
//! while its socket still looks alive; so an answer counts only if it lasts.

use soci_index::format::class::{Class, Classified};
use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Every client that may connect may mount images as root.
const SOCKET_MODE: u32 = 0o600;
const DIRECTORY_MODE: u32 = 0o700;
/// How long a killed worker may take to be gone, with all its memory, files and connections.
pub(super) const ORPHAN_LIMIT: Duration = Duration::from_secs(5);
/// The longest pause between two looks. All of them must fit into the queue of a socket that is not accepting.
const PAUSE_MAX: Duration = Duration::from_millis(100);

/// Why there is no socket to listen on.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// A system call failed.
    #[error("cannot {operation} {}: {cause}", path.display())]
    Io { operation: &'static str, path: PathBuf, cause: io::Error },
    /// Another process answers there.
    #[error("another process listens on {}: stop it, or choose another --address", path.display())]
    InUse { path: PathBuf },
    /// There is a file of another kind.
    #[error("{} exists and is not a socket: remove it, or choose another --address", path.display())]
    NotASocket { path: PathBuf },
}

impl Classified for ListenError {
    fn class(&self) -> Class {
        Class::Local
    }
}

/// Listens on a path, in place of a socket that is dead, or whose listener ends within `patience`. A directory that is
/// missing is made.
///
/// # Errors
/// [`ListenError`].
pub(super) fn listen(path: &Path, patience: Duration) -> Result<UnixListener, ListenError> {
    if let Some(directory) = path.parent().filter(|directory| !directory.exists()) {
        let make = |mode| DirBuilder::new().recursive(true).mode(mode).create(directory);
        make(DIRECTORY_MODE).map_err(io_error("create", directory))?;
    }
    remove_dead(path, patience)?;
    let listener = UnixListener::bind(path).map_err(io_error("listen on", path))?;
    fs::set_permissions(path, Permissions::from_mode(SOCKET_MODE)).map_err(io_error("change the mode of", path))?;
    Ok(listener)
}

fn remove_dead(path: &Path, patience: Duration) -> Result<(), ListenError> {
    let metadata = match path.symlink_metadata() {
        Ok(metadata) => metadata,
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(cause) => return Err(io_error("look at", path)(cause)),
    };
    if !metadata.file_type().is_socket() {
        return Err(ListenError::NotASocket { path: path.to_owned() });
    }
    let deadline = Instant::now() + patience;
    let mut pause = Duration::from_millis(5);
    loop {
        match UnixStream::connect(path) {
            Ok(_) if Instant::now() < deadline => {
                tracing::debug!(path = %path.display(), "the socket is answered; a worker of before may be about to end");
                std::thread::sleep(pause);
                pause = (pause * 2).min(PAUSE_MAX);
            }
            Ok(_) => return Err(ListenError::InUse { path: path.to_owned() }),
            Err(cause) if cause.kind() == io::ErrorKind::ConnectionRefused => {
                return fs::remove_file(path).map_err(io_error("remove", path));
            }
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(cause) => return Err(io_error("connect to", path)(cause)),
        }
    }
}

fn io_error(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ListenError {
    move |cause| ListenError::Io { operation, path: path.to_owned(), cause }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_socket_is_replaced_and_a_living_one_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run/daemon/grpc.sock");
        let listen = |path: &Path| super::listen(path, Duration::from_millis(20));
        let first = listen(&path).unwrap();
        let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (SOCKET_MODE, DIRECTORY_MODE));
        assert!(matches!(listen(&path), Err(ListenError::InUse { .. })));
        drop(first);
        let second = listen(&path).unwrap();
        UnixStream::connect(&path).unwrap();
        drop(second);
    }

    #[test]
    fn who_is_about_to_end_is_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("grpc.sock");
        let first = listen(&path, Duration::ZERO).unwrap();
        let ending = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(150));
            drop(first);
        });
        listen(&path, ORPHAN_LIMIT).unwrap();
        ending.join().unwrap();
    }

    #[test]
    fn other_files_are_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        fs::write(&path, "precious").unwrap();
        assert!(matches!(listen(&path, ORPHAN_LIMIT), Err(ListenError::NotASocket { .. })));
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    }
}
