//! EROFS images mounted by the kernel, from files and without a loop device; and what such a mount shows.

use std::collections::{BTreeMap, VecDeque};
use std::ffi::CString;
use std::fs;
use std::io::{self, Seek as _, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};
use soci_fs::tree::attributes::Attributes;
use soci_fs::tree::device::{DeviceMap, Part};
use soci_fs::tree::erofs::{Layer, write};
use soci_fs::tree::{NodeKind, NodeNumber, Tree};
use soci_index::format::entry::Entry;

use crate::erofs_model::xattrs;

/// A mounted image; unmounted when it is dropped, in use or not.
#[derive(Debug)]
pub struct Mounted {
    at: PathBuf,
}

impl Mounted {
    /// Mounts `image` with its extra `devices`, in their order. The paths have no commas.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn new(image: &Path, devices: &[PathBuf], at: &Path) -> Result<Self, Errno> {
        let options: Vec<String> = devices.iter().map(|path| format!("device={}", path.display())).collect();
        let options = CString::new(options.join(",")).expect("no NUL");
        rustix::mount::mount(image, at, "erofs", MountFlags::RDONLY, Some(&*options))?;
        Ok(Self { at: at.to_owned() })
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.at, UnmountFlags::DETACH);
    }
}

/// Whether a test can mount EROFS images from files here; says loudly that it does nothing, if not.
///
/// # Panics
/// When the kernel mounts such images, but not ours.
#[must_use]
pub fn can_mount_erofs() -> bool {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: mounting EROFS needs root");
        return false;
    }
    let work = tempfile::tempdir().expect("a directory");
    let (image, at) = (work.path().join("image"), work.path().join("mnt"));
    let mut bytes = Vec::new();
    write(&Tree::of_layer(&[]).expect("a tree"), &[], None, &mut bytes).expect("an image");
    fs::write(&image, bytes).expect("a file");
    fs::create_dir(&at).expect("a directory");
    match Mounted::new(&image, &[], &at) {
        Ok(_) => true,
        // No EROFS; none from files (before Linux 6.12, or configured without); no right to mount.
        Err(error @ (Errno::NODEV | Errno::NOTBLK | Errno::PERM | Errno::ACCESS)) => {
            eprintln!("SKIPPED: this kernel does not mount EROFS images from files: {error}");
            false
        }
        Err(error) => panic!("an empty image: {error}"),
    }
}

/// The bytes of a regular file as its layer has them, holes included.
#[must_use]
pub fn content(tar: &[u8], entry: &Entry) -> Vec<u8> {
    let size = usize::try_from(entry.size).unwrap();
    let at = |offset: u64| usize::try_from(offset).unwrap();
    let Some(pieces) = entry.sparse() else { return tar[at(entry.data_offset)..][..size].to_vec() };
    let mut bytes = vec![0; size];
    for piece in pieces {
        let length = at(piece.length);
        bytes[at(piece.file_offset)..][..length].copy_from_slice(&tar[at(piece.data_offset)..][..length]);
    }
    bytes
}

/// Writes a layer's device: the layer itself if that will do, else what the map says.
pub fn write_device(path: &Path, map: &DeviceMap, entries: &[Entry], tar: &[u8]) -> io::Result<()> {
    if map.is_plain() {
        return fs::write(path, tar);
    }
    let mut file = fs::File::create(path)?;
    for part in map.parts(entries, 0, u64::MAX) {
        match part {
            Part::File { entry, offset, length } => {
                let whole = content(tar, &entries[entry as usize]);
                let start = usize::try_from(offset).unwrap();
                file.write_all(&whole[start..start + usize::try_from(length).unwrap()])?;
            }
            Part::Zeros { length } => {
                file.seek_relative(i64::try_from(length).unwrap())?;
            }
        }
    }
    file.set_len(map.bytes())
}

/// Compares a mount with the tree it was made of: `stat`, attributes, targets and bytes of all files.
///
/// # Panics
/// When they differ.
pub fn compare_mount(root: &Path, tree: &Tree, layers: &[(Layer<'_>, &[u8])], opaque: Option<&[u8]>) {
    let entry = |layer: u16, entry: u32| layers[usize::from(layer)].0.entries.get(entry as usize);
    let mut numbers = BTreeMap::new();
    let mut queue = VecDeque::from([(NodeNumber::ROOT, root.to_owned())]);
    while let Some((number, path)) = queue.pop_front() {
        let (node, shown) = (tree.node(number).unwrap(), path.display());
        let expected = Attributes::of_node(1, tree, number, entry).unwrap();
        let found = fs::symlink_metadata(&path).unwrap_or_else(|error| panic!("{shown}: {error}"));
        assert_eq!(found.mode() & 0o7777, u32::from(expected.permissions), "{shown}");
        // The largest number stands for none, and is shown as the overflow owner.
        let owner = |number: u32| if number == u32::MAX { 65_534 } else { number };
        assert_eq!((found.uid(), found.gid()), (owner(expected.uid), owner(expected.gid)), "{shown}");
        assert_eq!(found.nlink(), u64::from(expected.links), "{shown}");
        let modified = (expected.modified.seconds, i64::from(expected.modified.nanoseconds));
        assert_eq!((found.mtime(), found.mtime_nsec()), modified, "{shown}");
        let (major, minor) = (rustix::fs::major(found.rdev()), rustix::fs::minor(found.rdev()));
        assert_eq!((minor & 0xff) | (major << 8) | ((minor & !0xff) << 12), expected.device, "{shown}");
        assert!(found.ino() > 0, "{shown}");
        assert_eq!(*numbers.entry(number).or_insert(found.ino()), found.ino(), "{shown}");
        let own = node.entry().and_then(|own| entry(node.layer(), own));
        assert_eq!(found_xattrs(&path), xattrs(node, own, opaque).0, "{shown}");
        match node.kind() {
            NodeKind::Directory => {
                let mut names: Vec<Vec<u8>> =
                    fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().file_name().as_bytes().to_vec()).collect();
                names.sort_unstable();
                let children: Vec<_> = tree.children(number, 0).map(|(_, child)| child).collect();
                assert!(names.iter().eq(children.iter().map(|child| child.name)), "{shown}");
                let below = |name: &[u8]| path.join(std::ffi::OsStr::from_bytes(name));
                queue.extend(children.into_iter().map(|child| (child.node, below(child.name))));
            }
            NodeKind::Regular => {
                let bytes = fs::read(&path).unwrap_or_else(|error| panic!("{shown}: {error}"));
                assert!(found.is_file() && found.len() == expected.size, "{shown}");
                assert!(bytes == content(layers[usize::from(node.layer())].1, own.unwrap()), "{shown}: other bytes");
            }
            NodeKind::Symlink => {
                assert_eq!(fs::read_link(&path).unwrap().as_os_str().as_bytes(), &*own.unwrap().link, "{shown}");
            }
            NodeKind::CharDevice | NodeKind::BlockDevice | NodeKind::Fifo | NodeKind::Whiteout => {}
            NodeKind::ForeignLink => panic!("{shown} is shown"),
        }
    }
}

/// The extended attributes that the kernel shows.
#[must_use]
pub fn found_xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut names = vec![0; 1 << 16];
    let length = rustix::fs::llistxattr(path, &mut names[..]).unwrap();
    let names = names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty());
    let value = |name: &[u8]| {
        let mut value = vec![0; 1 << 16];
        let name = CString::new(name).unwrap();
        let length = rustix::fs::lgetxattr(path, &*name, &mut value[..])
            .unwrap_or_else(|error| panic!("{} {name:?}: {error}", path.display()));
        value.truncate(length);
        value
    };
    names.map(|name| (name.to_vec(), value(name))).collect()
}
