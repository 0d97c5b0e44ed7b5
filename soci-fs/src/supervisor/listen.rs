//! Makes the socket on which the service listens.
//!
//! A socket file outlives its process, so one that nobody answers on is replaced. One that is answered, and anything that
//! is no socket, is not ours to take away.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// Whoever may connect may mount images as root.
const SOCKET_MODE: u32 = 0o600;
const DIRECTORY_MODE: u32 = 0o700;

/// Why there is no socket to listen on.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// A system call failed.
    #[error("cannot {operation} {}: {cause}", path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
    /// Another process answers there.
    #[error("another process listens on {}: stop it, or choose another --address", path.display())]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// There is a file of another kind.
    #[error("{} exists and is not a socket: remove it, or choose another --address", path.display())]
    NotASocket {
        /// The file.
        path: PathBuf,
    },
}

/// Listens on a path, in the place of a socket that nobody listens on any more. A directory that is missing is made.
///
/// # Errors
/// [`ListenError`].
pub(super) fn listen(path: &Path) -> Result<UnixListener, ListenError> {
    if let Some(directory) = path.parent().filter(|directory| !directory.exists()) {
        let make = |mode| DirBuilder::new().recursive(true).mode(mode).create(directory);
        make(DIRECTORY_MODE).map_err(io_error("create", directory))?;
    }
    remove_dead(path)?;
    let listener = UnixListener::bind(path).map_err(io_error("listen on", path))?;
    fs::set_permissions(path, Permissions::from_mode(SOCKET_MODE)).map_err(io_error("change the mode of", path))?;
    Ok(listener)
}

fn remove_dead(path: &Path) -> Result<(), ListenError> {
    let metadata = match path.symlink_metadata() {
        Ok(metadata) => metadata,
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(cause) => return Err(io_error("look at", path)(cause)),
    };
    if !metadata.file_type().is_socket() {
        return Err(ListenError::NotASocket { path: path.to_owned() });
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(ListenError::InUse { path: path.to_owned() }),
        Err(cause) if cause.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(io_error("remove", path))
        }
        Err(cause) => Err(io_error("connect to", path)(cause)),
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
    fn other_files_are_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        fs::write(&path, "precious").unwrap();
        assert!(matches!(listen(&path), Err(ListenError::NotASocket { .. })));
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    }
}
