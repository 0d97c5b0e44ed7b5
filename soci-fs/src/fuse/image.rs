//! An image as a read-only file system, in our own words: lookup, attributes, directories, links, bytes.
//!
//! Not one FUSE type is known here, so everything a mount answers can be tested without mounting. The view of all
//! layers is one tree; a file's bytes come from the reader of the layer that its node names.
//!
//! Beside the image's files there is one of ours, `/.soci/status.json`: what was fetched and what went wrong (see
//! [`crate::layer::status`]). It is found by name and never listed, and where the image has a `/.soci` of its own, the
//! image wins. Its size is fixed, the text filled up with spaces, because a size that changes between `stat` and `read`
//! would cut the text. Why a file and not an extended attribute: most images have no extended attributes, and then the
//! kernel can be configured not to ask at all, which saves a round trip for nearly every `open` of many programs.
//!
//! Invariant: inode numbers depend on the layers only; the root is 1.

use std::num::NonZero;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use soci_index::format::class::{Class, Classified};
use soci_index::format::entry::{Entry, Timestamp};

use crate::foresight::mentions::Names;
use crate::fuse::forest::OpenError;
use crate::layer::reader::{LayerReader, ReadError};
use crate::layer::status::ImageStatus;
use crate::tree::attributes::Attributes;
use crate::tree::kernel_cache::Mounted;
use crate::tree::node_id::{NodeId, SLOTS};
use crate::tree::view;
use crate::tree::{Node, NodeKind, NodeNumber, Tree, TreeError};

/// Why a question about a file system, this one or a [`crate::fuse::forest`], has no answer.
///
/// Exhaustive on purpose: [`crate::fuse::errno`] decides about every variant.
#[derive(Debug, Clone, thiserror::Error)]
pub enum FsError {
    /// There is no such name.
    #[error("no such file")]
    NotFound,
    /// The inode number is none of ours.
    #[error("inode {inode} does not exist")]
    NoInode { inode: u64 },
    /// Something other than a directory was to be searched.
    #[error("not a directory")]
    NotDirectory,
    /// A directory was to be read as a file.
    #[error("is a directory")]
    IsDirectory,
    /// Something other than a regular file was to be read.
    #[error("not a regular file")]
    NotRegular,
    /// Something other than a symbolic link was to be read as one.
    #[error("not a symbolic link")]
    NotLink,
    /// There is no such extended attribute.
    #[error("no such extended attribute")]
    NoAttribute,
    /// The bytes could not be obtained.
    #[error(transparent)]
    Read(Box<ReadError>),
    /// The layer was removed.
    #[error("the layer of slot {slot} was removed")]
    NoSlot { slot: u16 },
    /// The mapped view was removed.
    #[error("slot {slot} has no view by id map {id_map}: the map was removed")]
    NoIdMap { id_map: u8, slot: u16 },
    /// The layer was asked before it was open.
    #[error("the layer of slot {slot} is not open")]
    Closed { slot: u16 },
    /// The layer cannot be opened.
    #[error("cannot open slot {slot}: {cause}")]
    Open { slot: u16, cause: Box<OpenError> },
}

impl Classified for FsError {
    fn class(&self) -> Class {
        match self {
            Self::Read(error) => error.class(),
            Self::NotFound
            | Self::NoInode { .. }
            | Self::NotDirectory
            | Self::IsDirectory
            | Self::NotRegular
            | Self::NotLink
            | Self::NoAttribute
            | Self::NoSlot { .. }
            | Self::NoIdMap { .. }
            | Self::Closed { .. }
            | Self::Open { .. } => Class::Other,
        }
    }
}

impl From<ReadError> for FsError {
    fn from(error: ReadError) -> Self {
        Self::Read(Box::new(error))
    }
}

/// A name in a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Listed<'image> {
    /// Where to go on listing behind this name.
    pub next: u64,
    pub name: &'image [u8],
    /// What it leads to.
    pub attributes: Attributes,
}

/// The name of our own directory.
const STATUS_DIRECTORY: &[u8] = b".soci";
/// The name of our own file.
const STATUS_FILE: &[u8] = b"status.json";
const STATUS_DIRECTORY_INODE: u64 = NodeId { id_map: 0, slot: SLOTS, node: NodeNumber(0) }.pack();
const STATUS_FILE_INODE: u64 = NodeId { id_map: 0, slot: SLOTS, node: NodeNumber(1) }.pack();
/// Room in the status file for each layer, generous.
const STATUS_BYTES_PER_LAYER: usize = 2048;

/// The layers' trees, made on all cores. Layers that occur twice (empty ones often do) share a tree.
fn trees(layers: &[LayerReader]) -> Result<Vec<Arc<Tree>>, TreeError> {
    let twin = |position: usize| {
        layers[..position].iter().position(|other| Arc::ptr_eq(other.index(), layers[position].index()))
    };
    let made: Vec<OnceLock<Result<Arc<Tree>, TreeError>>> = layers.iter().map(|_| OnceLock::new()).collect();
    let next = AtomicUsize::new(0);
    let work = || {
        while let Some((position, layer)) = {
            let position = next.fetch_add(1, Ordering::Relaxed);
            layers.get(position).map(|layer| (position, layer))
        } {
            if twin(position).is_none() {
                made[position].get_or_init(|| Tree::of_layer(&layer.index().entries).map(Arc::new));
            }
        }
    };
    std::thread::scope(|scope| {
        let helpers = std::thread::available_parallelism().map_or(1, NonZero::get).min(layers.len());
        for _ in 1..helpers {
            // If no thread can be started, this one does all the work.
            let _ = std::thread::Builder::new().spawn_scoped(scope, work);
        }
        work();
    });
    let tree = |position| made[twin(position).unwrap_or(position)].get().expect("every first of its kind is made");
    (0..layers.len()).map(|position| tree(position).clone()).collect()
}

/// An image, ready to be mounted.
#[derive(Debug)]
pub struct Image {
    view: Arc<Tree>,
    layers: Vec<LayerReader>,
    has_xattrs: bool,
    /// Whether the image leaves the name of our directory free.
    shows_status: bool,
    mounted: Arc<Mounted>,
}

impl Image {
    /// Merges `layers`, lowest first.
    ///
    /// # Errors
    /// [`TreeError`] when the image has more files than 32 bits can count.
    pub fn new(layers: Vec<LayerReader>) -> Result<Self, TreeError> {
        let trees = trees(&layers)?;
        for (layer, tree) in layers.iter().zip(&trees) {
            for skipped in tree.skipped() {
                tracing::debug!(layer = %layer.digest(), entry = skipped.entry, reason = %skipped.reason, "an entry has no place");
            }
        }
        let view = Arc::new(view::merge(&trees.iter().map(Arc::as_ref).collect::<Vec<_>>())?);
        let shows_status = view.lookup(NodeNumber::ROOT, STATUS_DIRECTORY).is_none();
        let mounted = Arc::<Mounted>::default();
        for layer in &layers {
            // Names of one layer hide those of others, so all of the view is in doubt.
            let (view, mounted) = (Arc::clone(&view), Arc::clone(&mounted));
            layer.health().on_distrust(Arc::new(move || mounted.forget(&view, NodeId::single)));
        }
        let mut image = Self { view, layers, has_xattrs: false, shows_status, mounted };
        image.has_xattrs = image
            .view
            .nodes()
            .iter()
            .any(|node| image.entry_of(node).is_some_and(|entry| entry.xattrs().next().is_some()));
        Ok(image)
    }

    /// The kernel that it is mounted in.
    pub(crate) const fn mounted(&self) -> &Arc<Mounted> {
        &self.mounted
    }

    /// That all layers are in service: a view of which one is wrong is wrong as a whole.
    fn in_service(&self) -> Result<(), FsError> {
        self.layers.iter().try_for_each(|layer| Ok(layer.health().check_service()?))
    }

    /// The merged tree.
    #[must_use]
    pub fn view(&self) -> &Tree {
        &self.view
    }

    /// Finds the image's files by what others call them.
    #[must_use]
    pub fn names(&self) -> Names {
        Names::of_image(Arc::clone(&self.view), self.layers.iter().map(|layer| Arc::clone(layer.index())).collect())
    }

    /// The layers' readers, lowest first.
    #[must_use]
    pub fn layers(&self) -> &[LayerReader] {
        &self.layers
    }

    /// Whether any file has extended attributes.
    #[must_use]
    pub const fn has_xattrs(&self) -> bool {
        self.has_xattrs
    }

    /// Number of files and sum of their sizes.
    #[must_use]
    pub fn totals(&self) -> (u64, u64) {
        let sizes = self.view.nodes().iter().filter(|node| node.kind() == NodeKind::Regular);
        let bytes = sizes.filter_map(|node| Some(self.entry_of(node)?.size)).fold(0, u64::saturating_add);
        (self.view.len() as u64, bytes)
    }

    /// Whether the file's content and attributes never change. True of all but the status file.
    #[must_use]
    pub const fn is_constant(&self, inode: u64) -> bool {
        inode != STATUS_FILE_INODE
    }

    /// Finds a name in a directory.
    ///
    /// # Errors
    /// [`FsError::NotFound`] and others.
    pub fn lookup(&self, directory: u64, name: &[u8]) -> Result<Attributes, FsError> {
        if directory == STATUS_DIRECTORY_INODE && self.shows_status {
            return if name == STATUS_FILE { self.attributes(STATUS_FILE_INODE) } else { Err(FsError::NotFound) };
        }
        let (number, node) = self.node(directory)?;
        if node.kind() != NodeKind::Directory {
            return Err(FsError::NotDirectory);
        }
        if number == NodeNumber::ROOT && name == STATUS_DIRECTORY && self.shows_status {
            return self.attributes(STATUS_DIRECTORY_INODE);
        }
        self.in_service()?;
        self.view.lookup(number, name).map_or(Err(FsError::NotFound), |found| self.attributes(inode_of(found)))
    }

    /// What `stat` shows.
    ///
    /// # Errors
    /// [`FsError::NoInode`].
    pub fn attributes(&self, inode: u64) -> Result<Attributes, FsError> {
        if self.shows_status && matches!(inode, STATUS_DIRECTORY_INODE | STATUS_FILE_INODE) {
            return Ok(self.status_attributes(inode));
        }
        let (number, node) = self.node(inode)?;
        if number != NodeNumber::ROOT {
            self.in_service()?;
        }
        Ok(Attributes::new(inode, node, self.entry_of(node)).with_header(self.header_of(number)))
    }

    /// The names in a directory from position `from` on, without `.` and `..`. Positions come from [`Listed::next`];
    /// the first is 0.
    ///
    /// # Errors
    /// [`FsError::NotDirectory`], [`FsError::NoInode`].
    pub fn list(&self, directory: u64, from: u64) -> Result<impl Iterator<Item = Listed<'_>>, FsError> {
        let number = if directory == STATUS_DIRECTORY_INODE && self.shows_status {
            None
        } else {
            let (number, node) = self.node(directory)?;
            if node.kind() != NodeKind::Directory {
                return Err(FsError::NotDirectory);
            }
            self.in_service()?;
            Some(number)
        };
        let from = usize::try_from(from).unwrap_or(usize::MAX);
        let children = number.into_iter().flat_map(move |number| self.view.children(number, from));
        Ok(children.filter_map(|(position, child)| {
            let attributes = self.attributes(inode_of(child.node)).ok()?;
            Some(Listed { next: position as u64 + 1, name: child.name, attributes })
        }))
    }

    /// The directory that holds a directory.
    ///
    /// # Errors
    /// [`FsError::NoInode`].
    pub fn parent(&self, directory: u64) -> Result<u64, FsError> {
        if matches!(directory, STATUS_DIRECTORY_INODE | STATUS_FILE_INODE) {
            return Ok(inode_of(NodeNumber::ROOT));
        }
        let (number, _) = self.node(directory)?;
        Ok(inode_of(self.view.parent(number)))
    }

    /// The target of a symbolic link.
    ///
    /// # Errors
    /// [`FsError::NotLink`], [`FsError::NoInode`].
    pub fn read_link(&self, inode: u64) -> Result<&[u8], FsError> {
        let (_, node) = self.node(inode)?;
        self.in_service()?;
        match (node.kind(), self.entry_of(node)) {
            (NodeKind::Symlink, Some(entry)) => Ok(&entry.link),
            _ => Err(FsError::NotLink),
        }
    }

    /// The extended attributes of a file.
    ///
    /// # Errors
    /// [`FsError::NoInode`].
    pub fn xattrs(&self, inode: u64) -> Result<impl Iterator<Item = (&[u8], &[u8])>, FsError> {
        let node = match self.node(inode) {
            Ok((_, node)) => {
                self.in_service()?;
                Some(node)
            }
            Err(_) if matches!(inode, STATUS_DIRECTORY_INODE | STATUS_FILE_INODE) => None,
            Err(error) => return Err(error),
        };
        let entry = node.and_then(|node| self.entry_of(node));
        Ok(entry.into_iter().flat_map(Entry::xattrs))
    }

    /// The value of one extended attribute.
    ///
    /// # Errors
    /// [`FsError::NoAttribute`], [`FsError::NoInode`].
    pub fn xattr(&self, inode: u64, name: &[u8]) -> Result<&[u8], FsError> {
        let mut all = self.xattrs(inode)?;
        all.find_map(|(key, value)| (key == name).then_some(value)).ok_or(FsError::NoAttribute)
    }

    /// Reads a file if no network is needed for it; `false` if it is. What `buffer` held is replaced.
    ///
    /// # Errors
    /// [`FsError`].
    pub fn try_read(&self, inode: u64, offset: u64, length: usize, buffer: &mut Vec<u8>) -> Result<bool, FsError> {
        if inode == STATUS_FILE_INODE && self.shows_status {
            let text = self.status_text();
            let from = usize::try_from(offset).map_or(text.len(), |offset| offset.min(text.len()));
            buffer.clear();
            buffer.extend(text[from..].iter().take(length));
            return Ok(true);
        }
        let (layer, entry) = self.content(inode)?;
        Ok(layer.try_read_file(entry, offset, length, buffer)?)
    }

    /// Reads a file.
    ///
    /// # Errors
    /// [`FsError`], at the latest after the reader's deadline.
    pub async fn read(&self, inode: u64, offset: u64, length: usize) -> Result<Vec<u8>, FsError> {
        let mut buffer = Vec::new();
        if inode == STATUS_FILE_INODE {
            self.try_read(inode, offset, length, &mut buffer)?;
            return Ok(buffer);
        }
        let (layer, entry) = self.content(inode)?;
        Ok(layer.read_file(entry, offset, length).await?)
    }

    /// What was fetched and what went wrong, layer by layer.
    #[must_use]
    pub fn status(&self) -> ImageStatus {
        ImageStatus::of(&self.layers)
    }

    fn content(&self, inode: u64) -> Result<(&LayerReader, u32), FsError> {
        let (_, node) = self.node(inode)?;
        match (node.kind(), node.entry(), self.layers.get(usize::from(node.layer()))) {
            (NodeKind::Regular, Some(entry), Some(layer)) => Ok((layer, entry)),
            (NodeKind::Directory, ..) => Err(FsError::IsDirectory),
            _ => Err(FsError::NotRegular),
        }
    }

    fn node(&self, inode: u64) -> Result<(NodeNumber, &Node), FsError> {
        let id = NodeId::unpack(inode).filter(|id| id.slot == 0 && id.id_map == 0);
        let found = id.and_then(|id| Some((id.node, self.view.node(id.node)?)));
        found.ok_or(FsError::NoInode { inode })
    }

    fn entry_of(&self, node: &Node) -> Option<&Entry> {
        self.layers.get(usize::from(node.layer()))?.index().entries.get(node.entry()? as usize)
    }

    /// The entry that has the mode, owner and time of a file.
    fn header_of(&self, number: NodeNumber) -> Option<&Entry> {
        let header = self.view.header(number)?;
        self.layers.get(usize::from(header.layer))?.index().entries.get(header.entry as usize)
    }

    fn status_attributes(&self, inode: u64) -> Attributes {
        let is_file = inode == STATUS_FILE_INODE;
        let size = if is_file { self.status_size() as u64 } else { 0 };
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        Attributes {
            inode,
            kind: if is_file { NodeKind::Regular } else { NodeKind::Directory },
            permissions: if is_file { 0o444 } else { 0o555 },
            uid: 0,
            gid: 0,
            size,
            blocks: 0,
            // Now, so that the kernel drops what it has cached of the file.
            modified: Timestamp {
                seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
                nanoseconds: since.subsec_nanos(),
            },
            links: if is_file { 1 } else { 2 },
            device: 0,
        }
    }

    fn status_size(&self) -> usize {
        (self.layers.len() + 1) * STATUS_BYTES_PER_LAYER
    }

    fn status_text(&self) -> Vec<u8> {
        let size = self.status_size();
        let mut status = self.status();
        let mut text = serde_json::to_vec_pretty(&status).unwrap_or_default();
        if text.len() > size {
            // Only error texts can be this long.
            status.shorten_errors(STATUS_BYTES_PER_LAYER / 4);
            text = serde_json::to_vec(&status).unwrap_or_default();
        }
        text.resize(size, b' ');
        if let Some(last) = text.last_mut() {
            *last = b'\n';
        }
        text
    }
}

const fn inode_of(node: NodeNumber) -> u64 {
    NodeId::single(node).pack()
}
