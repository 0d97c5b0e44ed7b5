//! Files that a user names as outputs: profiles, zTOCs, reports, pictures, archives.
//!
//! A regular file is written under another name in its own directory and then renamed, so readers see the whole new
//! content or the old one, and a failure leaves the old one. Everything else that exists under the name (a device, a
//! FIFO, one of our own descriptors such as `/dev/stdout`, or a symbolic link to one) is opened and written *into*.
//! Writing everything in place was not taken: an interrupted run would leave half a profile under a good name.
//!
//! Invariants: what exists and is not a regular file is never renamed over and never removed; a symbolic link stays,
//! and what it leads to is written.

use std::fs::{self, File, Metadata, Permissions};
use std::io::{self, Write};
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

/// As many symbolic links as Linux follows in one path.
const LINKS_MAX: usize = 40;

/// Number of `/dev/null`.
const NULL_DEVICE: u64 = 0x103;

/// An output that is being written. Dropped before [`Output::finish`], a regular file stays as it was.
#[derive(Debug)]
pub struct Output(Form);

#[derive(Debug)]
enum Form {
    /// Gets its name at the end.
    New { file: tempfile::NamedTempFile, path: PathBuf },
    /// Written where it is.
    InPlace(File),
}

impl Output {
    /// Begins to write to `path`. Opening a FIFO waits for its reader.
    ///
    /// # Errors
    /// When it can be neither created nor opened.
    pub fn create(path: &Path) -> io::Result<Self> {
        let Some(there) = existing(path)? else { return Self::renamed(followed(path)?, None) };
        if let Some(own) = own_stream(&there)? {
            return Ok(Self(Form::InPlace(own)));
        }
        if !there.is_file() || is_descriptor(path) {
            // Appends, since a descriptor's file may have content that its opener wants to keep.
            let file = File::options().append(there.is_file()).write(true).open(path)?;
            return Ok(Self(Form::InPlace(file)));
        }
        let place = path.canonicalize()?;
        match Self::renamed(place.clone(), Some(there.permissions())) {
            // The file may be written, its directory may not.
            Err(error) if refuses_new_files(error.kind()) => {
                let file = File::options().write(true).truncate(true).open(&place);
                file.map(|file| Self(Form::InPlace(file))).map_err(|_| error)
            }
            created => created,
        }
    }

    fn renamed(path: PathBuf, permissions: Option<Permissions>) -> io::Result<Self> {
        let directory = directory_of(&path);
        let file = tempfile::Builder::new()
            .prefix(".soci-")
            .permissions(Permissions::from_mode(0o666))
            .tempfile_in(directory)?;
        if let Some(permissions) = permissions {
            file.as_file().set_permissions(permissions)?;
        }
        Ok(Self(Form::New { file, path }))
    }

    /// Completes the output: a regular file reaches the disk and gets its name.
    ///
    /// # Errors
    /// When it cannot be written; a regular file is as it was before then.
    pub fn finish(self) -> io::Result<()> {
        match self.0 {
            Form::New { file, path } => {
                file.as_file().sync_all()?;
                file.persist(&path).map(drop).map_err(|error| error.error)
            }
            Form::InPlace(mut file) => file.flush(),
        }
    }

    fn file(&mut self) -> &mut File {
        match &mut self.0 {
            Form::New { file, .. } => file.as_file_mut(),
            Form::InPlace(file) => file,
        }
    }
}

impl Write for Output {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.file().write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file().flush()
    }
}

/// Writes a whole output.
///
/// # Errors
/// As [`Output::create`] and [`Output::finish`].
pub fn write(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut output = Output::create(path)?;
    output.write_all(content)?;
    output.finish()
}

/// Whether `path` is written in place: it exists and is not a regular file.
///
/// # Errors
/// When that cannot be found out.
pub fn is_in_place(path: &Path) -> io::Result<bool> {
    Ok(existing(path)?.is_some_and(|there| !there.is_file() || is_descriptor(path)))
}

/// Whether what is written to `path` goes where standard output goes.
#[must_use]
pub fn is_standard_output(path: &Path) -> bool {
    let own = io::stdout().as_fd().try_clone_to_owned().map(File::from).and_then(|file| file.metadata());
    let same = |own: &Metadata, there: &Metadata| (own.dev(), own.ino()) == (there.dev(), there.ino());
    // All that is written to the null device goes nowhere, and there are many of them.
    let is_null = |own: &Metadata| own.file_type().is_char_device() && own.rdev() == NULL_DEVICE;
    matches!((own, path.metadata()), (Ok(own), Ok(there)) if same(&own, &there) && !is_null(&own))
}

/// Removes an output that is no longer valid, if it is a regular file.
///
/// # Errors
/// When it cannot be removed.
pub fn remove(path: &Path) -> io::Result<()> {
    if is_in_place(path)? { Ok(()) } else { fs::remove_file(path) }
}

/// The directory in which `path` is.
#[must_use]
pub(crate) fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn existing(path: &Path) -> io::Result<Option<Metadata>> {
    match path.metadata() {
        Ok(metadata) => Ok(Some(metadata)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Where a link to nothing leads: the file that opening it would create.
fn followed(path: &Path) -> io::Result<PathBuf> {
    let mut at = path.to_owned();
    for _ in 0..LINKS_MAX {
        match fs::read_link(&at) {
            Ok(target) => at = directory_of(&at).join(target),
            Err(_) => return Ok(at),
        }
    }
    Err(io::Error::new(io::ErrorKind::InvalidInput, "too many symbolic links"))
}

/// Standard output or standard error as a file, if `there` is the same one: writing goes on where that is.
fn own_stream(there: &Metadata) -> io::Result<Option<File>> {
    let streams = [io::stdout().as_fd().try_clone_to_owned(), io::stderr().as_fd().try_clone_to_owned()];
    for stream in streams.into_iter().flatten() {
        let file = File::from(stream);
        let own = file.metadata()?;
        let is_device = own.file_type().is_char_device() || own.file_type().is_block_device();
        // A device has one state for all open descriptors, and a terminal may be open for reading only here.
        if !is_device && (own.dev(), own.ino()) == (there.dev(), there.ino()) {
            return Ok(Some(file));
        }
    }
    Ok(None)
}

/// Whether a path leads through a descriptor of a process: `/dev/stdout`, `/dev/fd/3`, `/proc/self/fd/3`.
fn is_descriptor(path: &Path) -> bool {
    let mut at = path.to_owned();
    for _ in 0..LINKS_MAX {
        // `/dev/fd` is itself a link to `/proc/self/fd`.
        let directory = directory_of(&at).canonicalize().unwrap_or_default();
        if directory.starts_with("/proc") && directory.ends_with("fd") {
            return true;
        }
        match fs::read_link(&at) {
            Ok(target) => at = directory_of(&at).join(target),
            Err(_) => return false,
        }
    }
    false
}

const fn refuses_new_files(kind: io::ErrorKind) -> bool {
    matches!(kind, io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::process::Command;

    use super::*;

    fn fifo(path: &Path) {
        assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
    }

    /// What a FIFO's reader gets while `write` runs.
    fn through(path: &Path, write: impl FnOnce()) -> Vec<u8> {
        let reader = path.to_owned();
        let reader = std::thread::spawn(move || fs::read(reader).unwrap());
        write();
        reader.join().unwrap()
    }

    #[test]
    fn files_are_replaced_whole() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        write(&path, b"one").unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
        let mut given_up = Output::create(&path).unwrap();
        given_up.write_all(b"half").unwrap();
        drop(given_up);
        assert_eq!(fs::read(&path).unwrap(), b"one");
        write(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o640);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "a temporary file is left");
        assert!(write(directory.path(), b"").is_err());
    }

    #[test]
    fn links_stay() {
        let directory = tempfile::tempdir().unwrap();
        let [file, link, dangling] = ["file", "link", "dangling"].map(|name| directory.path().join(name));
        fs::write(&file, "old").unwrap();
        symlink("file", &link).unwrap();
        symlink("made", &dangling).unwrap();
        write(&link, b"new").unwrap();
        write(&dangling, b"new").unwrap();
        assert!(link.is_symlink() && dangling.is_symlink());
        assert_eq!(fs::read(&file).unwrap(), b"new");
        assert_eq!(fs::read(directory.path().join("made")).unwrap(), b"new");
    }

    #[test]
    fn pipes_are_written_into() {
        let directory = tempfile::tempdir().unwrap();
        let (pipe, link) = (directory.path().join("pipe"), directory.path().join("link"));
        fifo(&pipe);
        symlink("pipe", &link).unwrap();
        for path in [&pipe, &link] {
            assert!(is_in_place(path).unwrap());
            assert_eq!(through(path, || write(path, b"text").unwrap()), b"text");
            remove(path).unwrap();
            assert!(pipe.metadata().unwrap().file_type().is_fifo() && link.is_symlink());
        }
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 2, "something else was made");
    }

    #[test]
    fn descriptors_are_appended_to() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "kept ").unwrap();
        let descriptor = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(file.as_file()));
        assert!(is_in_place(Path::new(&descriptor)).unwrap());
        let before = file.as_file().metadata().unwrap().ino();
        write(Path::new(&descriptor), b"new").unwrap();
        assert_eq!(fs::read(file.path()).unwrap(), b"kept new");
        assert_eq!(file.path().metadata().unwrap().ino(), before);
    }

    /// A device of our own, like `/dev/full`: the error is reported and the device stays.
    #[test]
    fn devices_stay() {
        let directory = tempfile::tempdir().unwrap();
        let full = directory.path().join("full");
        let made = Command::new("mknod").arg(&full).args(["c", "1", "7"]).output().unwrap();
        let usable = made.status.success().then(|| File::options().write(true).open(&full));
        if !matches!(usable, Some(Ok(_))) {
            eprintln!("SKIPPED devices_stay: no device can be made or opened here");
            return;
        }
        assert_eq!(write(&full, b"text").unwrap_err().kind(), io::ErrorKind::StorageFull);
        remove(&full).unwrap();
        assert!(full.metadata().unwrap().file_type().is_char_device());
    }
}
