//! Layers shown by file systems of the kernel: of each layer the names in an EROFS image, the bytes through the forest.
//!
//! Names, attributes and extended attributes are then answered by the kernel, and the forest is asked only for bytes
//! that are not in the page cache. A layer in slot 12 is mounted on `12`, with owners mapped by id map 3 on `12-3`; its
//! device is the forest's file `12.tar`. The image is written when the layer is provided, and has no name once it is
//! mounted: its blocks go when the mount does, also after a power cut.
//!
//! A mount outlives this process, and the next one finds it in the table of mounts. But it is of use only with the
//! forest's mount that it was made for, so that mount's device number is part of the image's path, which the table
//! shows. While a mount lives its forest does, too, and no other has that number.
//!
//! A layer that is whole and proven needs no daemon: the device is the store's file itself. A layer that becomes so is
//! mounted a second time, on top, for containers to come; those that run keep what they have. It is not done where a
//! quota may take bytes away, since the kernel would read zeros.
//!
//! Where a layer cannot be shown so the forest shows it: a layer with more blocks than an image can address, a kernel
//! that refuses. That costs speed, and nothing else.
//!
//! Invariants: nothing but what this module mounted on its own directory is unmounted; a slot that is free has no mount;
//! the lock is held over mounts and local files only, never by what the kernel waits for meanwhile.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, BufWriter, Write as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use soci_index::format::class::{Class, Classified};

use crate::fuse::forest::{Layout, OpaqueAttribute};
use crate::fuse::mount::erofs::{self, Device};
use crate::fuse::mount::{MountEntry, id_mapped, table};
use crate::tree::device::DeviceError;
use crate::tree::erofs::{ErofsError, Layer, write};
use crate::tree::id_map::IdMap;

/// Name of the images' type in the table of mounts.
const KIND: &str = "erofs";

/// Where layers are shown, and how.
#[derive(Debug, Clone)]
pub struct TreeOptions {
    /// The directory on whose entries layers are mounted.
    pub directory: PathBuf,
    /// The directory for images until they are mounted.
    pub images: PathBuf,
    /// Where the forest is mounted.
    pub forest: PathBuf,
    /// How opaque directories are marked.
    pub opaque: OpaqueAttribute,
    /// The kernel's read-ahead in KiB of layers that are not whole; `None` leaves it alone.
    pub read_ahead_kib: Option<u32>,
    /// Whether the kernel reads layers that are whole by itself: only where nothing is evicted.
    pub lends: bool,
}

/// Where the images of layers are that are read lazily, below [`TreeOptions::images`]. Tools for AWS's snapshotter count the
/// lines of the table of mounts that have this in them, one for each such layer.
const LAZY: &str = "fuse.rawBridge";

/// The same of layers that were fetched whole.
const FETCHED: &str = "fetched";

/// The same of layers that need no forest.
const WHOLE: &str = "whole";

/// What shows a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ShownTree {
    /// The daemon: it is asked for names and bytes.
    #[default]
    Fuse,
    /// The kernel: the daemon is asked for bytes.
    Erofs,
    /// The kernel: the daemon is asked for nothing.
    ErofsWhole,
}

impl ShownTree {
    /// For a table.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fuse => "fuse",
            Self::Erofs => "erofs",
            Self::ErofsWhole => "erofs-whole",
        }
    }
}

/// Why layers, or one of them, are not shown by the kernel.
#[derive(Debug, thiserror::Error)]
pub enum TreesError {
    /// This kernel, or where the root is, does not allow it.
    #[error("{0}")]
    Unsupported(#[source] io::Error),
    /// The forest is not mounted.
    #[error("nothing is mounted on {}", path.display())]
    NoForest { path: PathBuf },
    /// A system call failed.
    #[error("cannot {operation} {}: {cause}", path.display())]
    Io {
        operation: &'static str,
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    /// The layer cannot be a device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The layer's image cannot be written.
    #[error(transparent)]
    Image(#[from] ErofsError),
}

impl Classified for TreesError {
    fn class(&self) -> Class {
        match self {
            Self::Unsupported(_) | Self::NoForest { .. } | Self::Io { .. } => Class::Local,
            Self::Device(error) => error.class(),
            Self::Image(error) => error.class(),
        }
    }
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> TreesError {
    move |cause| TreesError::Io { operation, path: path.to_owned(), cause }
}

/// The mounts of layers.
#[derive(Debug)]
pub struct Trees {
    options: TreeOptions,
    /// Where images of this forest are written: of layers that are read lazily, and of those that were fetched whole.
    sessions: [PathBuf; 2],
    shown: Mutex<BTreeMap<u16, Shown>>,
    /// How many images were written: part of their names, so that two for one slot are not written to one file.
    written: AtomicU64,
}

/// How a slot is shown.
#[derive(Debug, Default, PartialEq, Eq)]
struct Shown {
    /// Whether without the forest.
    is_whole: bool,
    /// The id maps; 0 is owners as recorded.
    maps: BTreeSet<u8>,
}

impl Trees {
    /// Finds out whether layers can be shown so, takes over what a process before has mounted for the same forest, and
    /// takes down the rest. Blocks.
    ///
    /// # Errors
    /// [`TreesError`]: the forest has to show the layers.
    pub fn open(options: TreeOptions) -> Result<Self, TreesError> {
        for directory in [&options.directory, &options.images] {
            let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(directory);
            made.map_err(failed("make", directory))?;
        }
        let options = resolved(options)?;
        let mounts = table().map_err(failed("read", Path::new("/proc/self/mountinfo")))?;
        let forest = mounts.iter().rfind(|entry| entry.mountpoint == options.forest);
        let forest = forest.ok_or_else(|| TreesError::NoForest { path: options.forest.clone() })?;
        let session = forest.device.replace(':', "-");
        let sessions = [LAZY, FETCHED].map(|kind| options.images.join(kind).join(&session));
        let whole = options.images.join(WHOLE);
        let used = [&sessions[0], &sessions[1], &whole];
        clear(&options.images, &used)?;
        let shown = take_over(&options.directory, &sessions, &whole, &mounts);
        // What is shown works. A trial writes files, and on a full disk that must not end what works.
        if shown.is_empty() {
            erofs::probe(&options.images).map_err(TreesError::Unsupported)?;
        }
        for directory in used {
            fs::create_dir_all(directory).map_err(failed("make", directory))?;
        }
        Ok(Self { options, sessions, shown: Mutex::new(shown), written: AtomicU64::new(0) })
    }

    /// Whether a layer is shown.
    #[must_use]
    pub fn is_shown(&self, slot: u16) -> bool {
        self.shown.lock().contains_key(&slot)
    }

    /// Whether the kernel reads a layer by itself.
    pub(crate) fn is_whole(&self, slot: u16) -> bool {
        self.shown.lock().get(&slot).is_some_and(|shown| shown.is_whole)
    }

    /// Shows the layer in a slot, which the forest has open, if it is not shown yet, or if it has become whole. `is_lazy`
    /// says whether it is read lazily, or else was fetched whole. Blocks, also on the forest.
    ///
    /// # Errors
    /// [`TreesError`]; the forest shows it then.
    pub(crate) fn show(&self, slot: u16, layout: &Layout, is_lazy: bool) -> Result<(), TreesError> {
        let before = self.shown.lock().get(&slot).map(|shown| shown.is_whole);
        let whole = if self.options.lends && before != Some(true) { layout.lend() } else { None };
        if before.is_some() && whole.is_none() {
            return Ok(());
        }
        let start = Instant::now();
        let [lazy, fetched] = &self.sessions;
        let images = match (&whole, is_lazy) {
            (Some(_), _) => &self.options.images.join(WHOLE),
            (None, true) => lazy,
            (None, false) => fetched,
        };
        let number = self.written.fetch_add(1, Ordering::Relaxed);
        let image = images.join(format!("{slot}-{number}.erofs"));
        let shown = self.write(&image, layout).and_then(|bytes| {
            self.mount(slot, &image, whole.as_deref())?;
            Ok(bytes)
        });
        // The mount keeps it.
        let _ = fs::remove_file(&image);
        let (layer, elapsed) = (layout.digest(), start.elapsed());
        tracing::debug!(slot, %layer, is_whole = whole.is_some(), image_bytes = shown?, ?elapsed, "the kernel shows a layer");
        Ok(())
    }

    fn mount(&self, slot: u16, image: &Path, whole: Option<&Path>) -> Result<(), TreesError> {
        let (served, target) = (self.options.forest.join(format!("{slot}.tar")), self.place(slot, 0));
        let mut shown = self.shown.lock();
        if shown.get(&slot).is_some_and(|shown| shown.is_whole || whole.is_none()) {
            // Another call was quicker.
            return Ok(());
        }
        fs::create_dir_all(&target).map_err(failed("make", &target))?;
        let mounted = match whole {
            Some(file) => erofs::mount(image, Device::Local(file), &target, None),
            None => erofs::mount(image, Device::Served(&served), &target, self.options.read_ahead_kib),
        };
        mounted.map_err(|cause| {
            if !shown.contains_key(&slot) {
                erofs::take_down(&target);
            }
            failed("mount", &target)(cause)
        })?;
        let shown = shown.entry(slot).or_default();
        shown.is_whole = whole.is_some();
        shown.maps.insert(0);
        Ok(())
    }

    fn write(&self, path: &Path, layout: &Layout) -> Result<u64, TreesError> {
        let layers = [Layer { entries: layout.entries(), device: layout.device()? }];
        let file = fs::File::create(path).map_err(failed("write", path))?;
        let mut file = BufWriter::with_capacity(256 << 10, file);
        let written = write(layout.tree(), &layers, Some(self.options.opaque.name()), &mut file)?;
        file.flush().map_err(failed("write", path))?;
        Ok(written.bytes)
    }

    /// The directory that shows a slot, if it is shown; with mapped owners, if `mapping` is given: its number and what it
    /// says. Blocks when a mapping is used for the first time.
    ///
    /// # Errors
    /// [`TreesError::Io`] when the kernel cannot map owners.
    pub(crate) fn directory(&self, slot: u16, mapping: Option<(u8, &IdMap)>) -> Result<Option<PathBuf>, TreesError> {
        let mut shown = self.shown.lock();
        let Some(Shown { maps, .. }) = shown.get_mut(&slot) else { return Ok(None) };
        let place = self.place(slot, mapping.map_or(0, |(number, _)| number));
        if let Some((number, map)) = mapping
            && !maps.contains(&number)
        {
            fs::create_dir_all(&place).map_err(failed("make", &place))?;
            id_mapped::mount(&self.place(slot, 0), &place, map).map_err(|cause| {
                erofs::take_down(&place);
                failed("map the owners on", &place)(cause)
            })?;
            maps.insert(number);
        }
        Ok(Some(place))
    }

    /// Shows a slot no longer. Users of a mount keep it until they end, but get no more bytes once the forest has
    /// another layer in the slot, or none. Blocks.
    pub(crate) fn hide(&self, slot: u16) {
        let mut shown = self.shown.lock();
        for map in shown.remove(&slot).into_iter().flat_map(|shown| shown.maps) {
            erofs::take_down(&self.place(slot, map));
        }
    }

    /// Shows layers by no other mappings than these.
    pub(crate) fn keep_maps(&self, used: &BTreeSet<u8>) {
        let mut shown = self.shown.lock();
        for (slot, shown) in shown.iter_mut() {
            for map in shown.maps.extract_if(.., |map| *map != 0 && !used.contains(map)) {
                erofs::take_down(&self.place(*slot, map));
            }
        }
    }

    fn place(&self, slot: u16, map: u8) -> PathBuf {
        let name = if map == 0 { slot.to_string() } else { format!("{slot}-{map}") };
        self.options.directory.join(name)
    }
}

/// The options with paths as the table of mounts has them, without links. The forest is not asked for anything.
fn resolved(options: TreeOptions) -> Result<TreeOptions, TreesError> {
    let real = |path: &Path| path.canonicalize().map_err(failed("resolve", path));
    let forest = match (options.forest.parent(), options.forest.file_name()) {
        (Some(parent), Some(name)) => real(parent)?.join(name),
        _ => options.forest.clone(),
    };
    let (directory, images) = (real(&options.directory)?, real(&options.images)?);
    Ok(TreeOptions { directory, images, forest, ..options })
}

/// Removes what a process that was killed has left of images that it had not mounted yet, and directories that are not
/// used any more.
fn clear(images: &Path, used: &[&PathBuf]) -> Result<(), TreesError> {
    for entry in fs::read_dir(images).map_err(failed("list", images))? {
        let path = entry.map_err(failed("list", images))?.path();
        if path.is_dir() && used.iter().any(|used| used.starts_with(&path)) {
            clear(&path, used)?;
            continue;
        }
        let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        removed.map_err(failed("remove", &path))?;
    }
    Ok(())
}

/// What is mounted on entries of `directory` from images in `sessions` or `whole`. What is there from elsewhere is taken
/// down.
fn take_over(directory: &Path, sessions: &[PathBuf; 2], whole: &Path, mounts: &[MountEntry]) -> BTreeMap<u16, Shown> {
    let mut all: BTreeMap<u16, Shown> = BTreeMap::new();
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let (path, name) = (entry.path(), entry.file_name());
        let Some((slot, map)) = name.to_str().and_then(numbers) else { continue };
        // The last one lies on top.
        let mount = mounts.iter().rfind(|mount| mount.mountpoint == path).filter(|mount| mount.kind == KIND);
        let images = mount.and_then(|mount| Path::new(&mount.source).parent());
        let is_ours = |images: &Path| images == whole || sessions.iter().any(|session| images == session);
        if images.is_some_and(is_ours) {
            let shown = all.entry(slot).or_default();
            shown.is_whole |= map == 0 && images == Some(whole);
            shown.maps.insert(map);
        } else {
            erofs::take_down(&path);
        }
    }
    // Of a view without its layer nothing more could be said.
    for (slot, shown) in all.extract_if(.., |_, shown| !shown.maps.contains(&0)) {
        shown.maps.iter().for_each(|map| erofs::take_down(&directory.join(format!("{slot}-{map}"))));
    }
    all
}

/// Takes down what another configuration has mounted on entries of `directory`. Users of a mount keep it until they end.
pub fn take_down_all(directory: &Path) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_name().to_str().and_then(numbers).is_some() {
            erofs::take_down(&entry.path());
        }
    }
}

fn numbers(name: &str) -> Option<(u16, u8)> {
    match name.split_once('-') {
        None => Some((name.parse().ok()?, 0)),
        Some((slot, map)) => Some((slot.parse().ok()?, map.parse().ok()?)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_places() {
        assert_eq!((numbers("12"), numbers("12-3")), (Some((12, 0)), Some((12, 3))));
        assert_eq!((numbers("a"), numbers("12-"), numbers("65536"), numbers("1-256")), (None, None, None, None));
    }

    /// Files of a process that was killed go; directories that nothing is mounted on go.
    #[test]
    fn left_overs() {
        let root = tempfile::tempdir().unwrap();
        let (images, directory) = (root.path().join("images"), root.path().join("trees"));
        let used = images.join("fuse.rawBridge/0-50");
        for path in [
            &images.join("fuse.rawBridge/0-49"),
            &images.join("0-48"),
            &used,
            &directory.join("7"),
            &directory.join("8"),
            &directory.join("9"),
            &directory.join("kept"),
        ] {
            fs::create_dir_all(path).unwrap();
        }
        for path in ["fuse.rawBridge/0-49/1.erofs", "fuse.rawBridge/0-50/2.erofs", "0-48/1.erofs", "probe.tar"] {
            fs::write(images.join(path), "").unwrap();
        }
        clear(&images, &[&used]).unwrap();
        let left = |path: &Path| fs::read_dir(path).unwrap().count();
        assert_eq!((left(&images), left(&images.join("fuse.rawBridge")), left(&used)), (1, 1, 0));
        let mount = |name: &str, source: &str| MountEntry {
            mountpoint: directory.join(name),
            kind: KIND.to_owned(),
            source: images.join(source).display().to_string(),
            device: "0:60".to_owned(),
        };
        let mounts = [
            mount("8", "fuse.rawBridge/0-50/8-1.erofs"),
            mount("8", "whole/8-2.erofs"),
            mount("7", "fuse.rawBridge/0-49/7-0.erofs"),
            mount("9", "fetched/0-50/9-3.erofs"),
        ];
        let sessions = [LAZY, FETCHED].map(|kind| images.join(kind).join("0-50"));
        let shown = take_over(&directory, &sessions, &images.join(WHOLE), &mounts);
        let as_recorded = |is_whole| Shown { is_whole, maps: BTreeSet::from([0]) };
        assert_eq!(shown, BTreeMap::from([(8, as_recorded(true)), (9, as_recorded(false))]));
        assert!(!directory.join("7").exists() && directory.join("8").exists());
        take_down_all(&directory);
        assert!(!directory.join("8").exists() && directory.join("kept").exists());
    }
}
