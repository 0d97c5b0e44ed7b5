//! An image as a read-only file system: the view of all layers is one tree.
//!
//! Invariant: inode numbers depend on the layers only; the root is 1.

use std::num::NonZero;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use crate::foresight::mentions::Names;
use crate::fuse::error::FsError;
use crate::fuse::file_system::{FileSystem, Visit, Xattr};
use crate::fuse::stack::{Stack, log_skipped};
use crate::fuse::status_file::StatusFile;
use crate::layer::reader::LayerReader;
use crate::layer::status::ImageStatus;
use crate::tree::attributes::Attributes;
use crate::tree::kernel_cache::Mounted;
use crate::tree::node_id::NodeId;
use crate::tree::view;
use crate::tree::{NodeKind, NodeNumber, Tree, TreeError};

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
    files: Stack,
    has_xattrs: bool,
    mounted: Arc<Mounted>,
}

impl Image {
    /// Merges `layers`, lowest first.
    ///
    /// # Errors
    /// [`TreeError`] when the image has more files than 32 bits can count.
    pub fn new(layers: Vec<LayerReader>) -> Result<Self, TreeError> {
        let trees = trees(&layers)?;
        layers.iter().zip(&trees).for_each(|(layer, tree)| log_skipped(layer, tree));
        let view = Arc::new(view::merge(&trees.iter().map(Arc::as_ref).collect::<Vec<_>>())?);
        let mounted = Arc::<Mounted>::default();
        for layer in &layers {
            // Names of one layer hide those of others, so all of the view is in doubt.
            let (view, mounted) = (Arc::clone(&view), Arc::clone(&mounted));
            layer.health().on_distrust(Arc::new(move || mounted.forget(&view, NodeId::single)));
        }
        let status = StatusFile::of_image(&layers);
        let files = Stack::new(view, layers, status);
        Ok(Self { has_xattrs: files.has_xattrs(), files, mounted })
    }

    /// The kernel that it is mounted in.
    pub(crate) const fn mounted(&self) -> &Arc<Mounted> {
        &self.mounted
    }

    /// The merged tree.
    #[must_use]
    pub fn view(&self) -> &Tree {
        self.files.tree()
    }

    /// Finds the image's files by what others call them.
    #[must_use]
    pub fn names(&self) -> Names {
        let indexes = self.layers().iter().map(|layer| Arc::clone(layer.index()));
        Names::of_image(Arc::clone(self.files.tree()), indexes.collect())
    }

    /// The layers' readers, lowest first.
    #[must_use]
    pub fn layers(&self) -> &[LayerReader] {
        self.files.layers()
    }

    /// What was fetched and what went wrong, layer by layer.
    #[must_use]
    pub fn status(&self) -> ImageStatus {
        ImageStatus::of(self.layers())
    }
}

/// The node that a number from the kernel means.
fn id_of(inode: u64) -> Result<NodeId, FsError> {
    NodeId::unpack(inode).filter(|id| id.slot == 0 && id.id_map == 0).ok_or(FsError::NoInode { inode })
}

impl FileSystem for Image {
    fn is_constant(&self, inode: u64) -> bool {
        id_of(inode).map_or(true, |id| !self.files.is_status_file(id.node))
    }

    fn can_have_xattrs(&self) -> bool {
        self.has_xattrs
    }

    fn lookup(&self, directory: u64, name: &[u8]) -> Result<Attributes, FsError> {
        self.files.attributes(NodeId::single(self.files.lookup(id_of(directory)?, name)?), None)
    }

    fn attributes(&self, inode: u64) -> Result<Attributes, FsError> {
        self.files.attributes(id_of(inode)?, None)
    }

    fn parent(&self, directory: u64) -> Result<u64, FsError> {
        let parent = self.files.parent(id_of(directory)?)?;
        Ok(NodeId::single(parent.unwrap_or(NodeNumber::ROOT)).pack())
    }

    fn list(&self, directory: u64, from: u64, visit: Visit<'_>) -> Result<(), FsError> {
        let attributes = |node| self.files.attributes(NodeId::single(node), None);
        self.files.list(id_of(directory)?, from, 0, attributes, visit)
    }

    fn read_link(&self, inode: u64) -> Result<Vec<u8>, FsError> {
        self.files.read_link(id_of(inode)?)
    }

    fn xattrs(&self, inode: u64) -> Result<Vec<Xattr>, FsError> {
        self.files.xattrs(id_of(inode)?, None)
    }

    fn try_read(&self, inode: u64, offset: u64, length: usize, buffer: &mut Vec<u8>) -> Result<bool, FsError> {
        self.files.try_read(id_of(inode)?, offset, length, buffer)
    }

    async fn read(&self, inode: u64, offset: u64, length: usize) -> Result<Vec<u8>, FsError> {
        self.files.read(id_of(inode)?, offset, length).await
    }

    fn totals(&self) -> (u64, u64) {
        let sizes = self.view().nodes().iter().filter(|node| node.kind() == NodeKind::Regular);
        let bytes = sizes.filter_map(|node| Some(self.files.entry_of(node)?.size)).fold(0, u64::saturating_add);
        (self.view().len() as u64, bytes)
    }
}
