//! Directories that one user alone may enter.
//!
//! Below a root there are the files of private images, set-uid programs among them, and a mount whose files have the
//! modes that the images give them. None of it is for other users of the machine, so every directory is 0700, and one
//! that exists is tightened, whichever program made it: a DaemonSet's `DirectoryOrCreate` makes 0755. Files are 0600 by
//! the umask ([`set_umask`]); the directories would do, but a file may be passed on or copied with its mode.
//!
//! A directory that another user owns, or could replace by way of a symbolic link, cannot be made private: it is
//! refused. So is one that is shared, before its mode is changed: a root that was mistyped as `/tmp` must not lock all
//! other users out of it.

use soci_index::format::class::{Class, Classified};
use std::fs::{self, DirBuilder, File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::process::{Resource, Rlimit};

const DIRECTORY_MODE: u32 = 0o700;
/// What other users have no part in.
const OTHERS: u32 = 0o077;
/// The owner that a user namespace shows for unmapped users. No process in it can run as such a user.
const OVERFLOW_USER: u32 = 65_534;
/// Names that are found in the root of this snapshotter or of AWS's, or on a fresh disk.
const NAMES: [&str; 16] = [
    "artifacts.db",
    "condemned",
    "content",
    "fs",
    "fs.lock",
    "httpcache",
    "layers",
    "lock",
    "lost+found",
    "metadata.db",
    "profiles",
    "removed",
    "snapshotter",
    "soci",
    "status.sock",
    "webhook",
];

/// Where the system has its own files. What is directly below `/` is a place of many, too.
const SYSTEM: [&str; 6] = ["/usr", "/etc", "/boot", "/dev", "/proc", "/sys"];

/// Why a directory cannot be private.
#[derive(Debug, thiserror::Error)]
pub enum PrivateError {
    /// A system call failed.
    #[error("cannot {operation} {}: {cause}", path.display())]
    Io {
        operation: &'static str,
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    /// It belongs to another user, who can change its mode again.
    #[error(
        "{} belongs to user {owner}, and this process runs as user {user}: run it as that user, change the owner \
         (chown {user}), or name another directory by --root",
        path.display()
    )]
    Owner { path: PathBuf, owner: u32, user: u32 },
    /// A symbolic link leads to it through a place where another user could put something else.
    #[error(
        "{} leads to {}, and other users can change what is in {}: name the directory itself by --root, in a place \
         that only its owner may write to",
        path.display(), target.display(), place.display()
    )]
    Link {
        /// The path that has a link in it.
        path: PathBuf,
        target: PathBuf,
        place: PathBuf,
    },
    /// It is shared with others and not a root: changing its mode would lock them out of what is theirs.
    #[error(
        "{} is shared with other users and holds other things ({name}): name a directory of its own by --root, or close \
         it first (chmod 700)",
        path.display()
    )]
    Foreign { path: PathBuf, name: String },
}

impl Classified for PrivateError {
    fn class(&self) -> Class {
        Class::Local
    }
}

impl From<PrivateError> for io::Error {
    fn from(error: PrivateError) -> Self {
        let kind = match &error {
            PrivateError::Io { cause, .. } => cause.kind(),
            PrivateError::Owner { .. } | PrivateError::Link { .. } | PrivateError::Foreign { .. } => {
                io::ErrorKind::PermissionDenied
            }
        };
        Self::new(kind, error)
    }
}

/// Makes the files and directories that this process creates from now on its user's alone, where no mode is given to
/// them explicitly.
pub fn set_umask() {
    rustix::process::umask(Mode::from_raw_mode(OTHERS));
}

/// Keeps what is in memory, credentials among it, out of core dumps of this process and of those that it starts.
///
/// # Errors
/// What the system says.
pub fn forbid_core_dumps() -> io::Result<()> {
    Ok(rustix::process::setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?)
}

/// Makes a directory that only this user may enter, with those above it that are missing; tightens one that is there.
///
/// # Errors
/// [`PrivateError`], all but [`PrivateError::Foreign`].
pub fn ensure_private_dir(path: &Path) -> Result<(), PrivateError> {
    let (directory, metadata) = open(path)?;
    tighten(path, &directory, &metadata)
}

/// [`ensure_private_dir`] for a directory that an operator named, and its path without links.
///
/// # Errors
/// [`PrivateError`].
pub fn ensure_private_root(path: &Path) -> Result<PathBuf, PrivateError> {
    let (directory, metadata) = open(path)?;
    if metadata.mode() & OTHERS != 0 {
        refuse_foreign(path, &metadata)?;
    }
    tighten(path, &directory, &metadata)?;
    path.canonicalize().map_err(failed("resolve", path))
}

/// Makes the directory if need be, and looks at what it is and where it really is.
fn open(path: &Path) -> Result<(File, Metadata), PrivateError> {
    DirBuilder::new().recursive(true).mode(DIRECTORY_MODE).create(path).map_err(failed("create", path))?;
    let target = path.canonicalize().map_err(failed("resolve", path))?;
    if std::path::absolute(path).map_err(failed("resolve", path))? != target {
        check_links(path, &target)?;
    }
    #[expect(clippy::cast_possible_wrap, reason = "flags, not a number")]
    let flags = (OFlags::DIRECTORY | OFlags::NOFOLLOW).bits() as i32;
    let directory = OpenOptions::new().read(true).custom_flags(flags).open(&target).map_err(failed("open", &target))?;
    let metadata = directory.metadata().map_err(failed("examine", path))?;
    let user = rustix::process::geteuid().as_raw();
    if metadata.uid() != user {
        return Err(PrivateError::Owner { path: path.to_owned(), owner: metadata.uid(), user });
    }
    Ok((directory, metadata))
}

/// A link may be changed by its owner, and its target be renamed by any user with write access to a parent directory.
fn check_links(path: &Path, target: &Path) -> Result<(), PrivateError> {
    let refused =
        |place: &Path| PrivateError::Link { path: path.to_owned(), target: target.to_owned(), place: place.to_owned() };
    for part in path.ancestors().filter(|part| !part.as_os_str().is_empty()) {
        let metadata = part.symlink_metadata().map_err(failed("examine", part))?;
        if metadata.is_symlink() && !is_trusted(metadata.uid()) {
            return Err(refused(part));
        }
    }
    for place in target.ancestors().skip(1) {
        let metadata = place.metadata().map_err(failed("examine", place))?;
        // In a directory with the sticky bit, only its owner and that of a file may rename the file.
        let is_open = metadata.mode() & 0o022 != 0 && metadata.mode() & 0o1000 == 0;
        if is_open || !is_trusted(metadata.uid()) {
            return Err(refused(place));
        }
    }
    Ok(())
}

fn is_trusted(owner: u32) -> bool {
    [0, OVERFLOW_USER, rustix::process::geteuid().as_raw()].contains(&owner)
}

/// Refuses a place whose closing would lock others out of what is theirs: one that they may write to, that is of the
/// system's own, or in which something is theirs. A root is known by its names.
fn refuse_foreign(path: &Path, metadata: &Metadata) -> Result<(), PrivateError> {
    let target = path.canonicalize().map_err(failed("resolve", path))?;
    let is_of_system = target.components().count() <= 2 || SYSTEM.iter().any(|place| target.starts_with(place));
    let mut is_shared = is_of_system || metadata.mode() & 0o002 != 0;
    let mut other = None;
    for entry in fs::read_dir(path).map_err(failed("list", path))? {
        let entry = entry.map_err(failed("list", path))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if NAMES.contains(&name.as_str()) {
            return Ok(());
        }
        is_shared |= entry.metadata().is_ok_and(|entry| entry.uid() != metadata.uid());
        other = Some(name);
    }
    match other {
        Some(name) if is_shared => Err(PrivateError::Foreign { path: path.to_owned(), name }),
        _ => Ok(()),
    }
}

fn tighten(path: &Path, directory: &File, metadata: &Metadata) -> Result<(), PrivateError> {
    if metadata.mode() & OTHERS == 0 {
        return Ok(());
    }
    tracing::info!(path = %path.display(), was = format!("{:o}", metadata.mode() & 0o7777), "closed to other users");
    let mode = fs::Permissions::from_mode(DIRECTORY_MODE);
    directory.set_permissions(mode).map_err(failed("change the mode of", path))
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> PrivateError {
    move |cause| PrivateError::Io { operation, path: path.to_owned(), cause }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{chown, symlink};

    use super::*;

    fn mode(path: &Path) -> u32 {
        path.metadata().unwrap().mode() & 0o7777
    }

    fn open_directory(path: &Path, mode: u32) {
        fs::create_dir(path).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn what_is_made_and_what_is_there_is_closed() {
        let place = tempfile::tempdir().unwrap();
        let (new, old) = (place.path().join("a/b/new"), place.path().join("old"));
        ensure_private_dir(&new).unwrap();
        assert_eq!((mode(&new), mode(new.parent().unwrap())), (0o700, 0o700));
        // As `DirectoryOrCreate` makes it, as a temporary file system has it, and stricter than asked for.
        for (before, after) in [(0o755, 0o700), (0o1777, 0o700), (0o500, 0o500)] {
            open_directory(&old, before);
            ensure_private_root(&old).unwrap();
            assert_eq!(mode(&old), after, "{before:o}");
            fs::remove_dir(&old).unwrap();
        }
    }

    #[test]
    fn a_place_of_other_things_is_left_alone() {
        let place = tempfile::tempdir().unwrap();
        let shared = place.path().join("shared");
        open_directory(&shared, 0o1777);
        fs::write(shared.join("thesis.tex"), "").unwrap();
        let error = ensure_private_root(&shared).unwrap_err();
        assert!(matches!(&error, PrivateError::Foreign { name, .. } if name == "thesis.tex"), "{error}");
        assert!(error.to_string().contains("--root"), "{error}");
        assert_eq!(mode(&shared), 0o1777);
        // Where only its owner can have put something, and something of a stranger.
        let (own, mixed) = (place.path().join("own"), place.path().join("mixed"));
        for directory in [&own, &mixed] {
            open_directory(directory, 0o755);
            fs::write(directory.join("thesis.tex"), "").unwrap();
        }
        ensure_private_root(&own).unwrap();
        assert_eq!(mode(&own), 0o700);
        if rustix::process::geteuid().is_root() {
            chown(mixed.join("thesis.tex"), Some(65_533), None).unwrap();
            assert!(matches!(ensure_private_root(&mixed), Err(PrivateError::Foreign { .. })));
        }
        assert!(matches!(
            ensure_private_root(Path::new("/usr/lib")),
            Err(PrivateError::Foreign { .. }) | Err(PrivateError::Owner { .. })
        ));
        // A root of before may hold more than is known.
        fs::create_dir(shared.join("snapshotter")).unwrap();
        ensure_private_root(&shared).unwrap();
        assert_eq!(mode(&shared), 0o700);
    }

    #[test]
    fn links_lead_to_safe_places_only() {
        let place = tempfile::tempdir().unwrap();
        let (target, link) = (place.path().join("disk"), place.path().join("link"));
        open_directory(&target, 0o755);
        symlink(&target, &link).unwrap();
        assert_eq!(ensure_private_root(&link).unwrap(), target.canonicalize().unwrap());
        assert_eq!(mode(&target), 0o700);

        let open = place.path().join("open");
        open_directory(&open, 0o777);
        open_directory(&open.join("disk"), 0o755);
        fs::remove_file(&link).unwrap();
        symlink(open.join("disk"), &link).unwrap();
        let error = ensure_private_root(&link).unwrap_err();
        assert!(matches!(&error, PrivateError::Link { place, .. } if *place == open), "{error}");
        assert_eq!(mode(&open.join("disk")), 0o755);
    }

    #[test]
    fn what_others_own_is_refused() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("SKIPPED: directories of other users can be made by root only");
            return;
        }
        let place = tempfile::tempdir().unwrap();
        let (theirs, target, link) =
            (place.path().join("theirs"), place.path().join("ours"), place.path().join("link"));
        open_directory(&theirs, 0o700);
        chown(&theirs, Some(65_533), None).unwrap();
        let error = ensure_private_root(&theirs).unwrap_err();
        assert!(matches!(error, PrivateError::Owner { owner: 65_533, user: 0, .. }), "{error}");
        assert!(error.to_string().contains("chown 0"), "{error}");
        open_directory(&target, 0o755);
        symlink(&target, &link).unwrap();
        std::os::unix::fs::lchown(&link, Some(65_533), None).unwrap();
        let error = ensure_private_root(&link).unwrap_err();
        assert!(matches!(&error, PrivateError::Link { place, .. } if *place == link), "{error}");
        assert_eq!(mode(&target), 0o755);
    }
}
