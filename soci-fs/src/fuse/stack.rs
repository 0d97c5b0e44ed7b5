//! A layer, or several merged into one tree, as files: lookup, attributes, directories, links, bytes, and the status
//! file among them. A file's bytes come from the reader of the layer that its node names.
//!
//! Invariant: while one of the layers is out of service nothing is shown but the root and the status file, to which it
//! leads: a view of which one layer is wrong is wrong as a whole.

use std::sync::Arc;

use soci_index::format::entry::Entry;

use crate::fuse::error::FsError;
use crate::fuse::file_system::{DirectoryEntry, Visit, Xattr};
use crate::fuse::status_file::StatusFile;
use crate::layer::reader::LayerReader;
use crate::tree::attributes::{Attributes, xattrs};
use crate::tree::id_map::IdMap;
use crate::tree::node_id::NodeId;
use crate::tree::{Node, NodeKind, NodeNumber, Tree};

/// Our own directory and file: above the numbers of all real nodes; see [`Stack::new`].
const STATUS_DIRECTORY: NodeNumber = NodeNumber(u32::MAX - 1);
const STATUS_FILE: NodeNumber = NodeNumber(u32::MAX - 2);

/// Layers that are shown as one tree.
#[derive(Debug)]
pub(super) struct Stack {
    tree: Arc<Tree>,
    /// The lowest first.
    layers: Vec<LayerReader>,
    status: StatusFile,
    /// Whether the layers leave the name of our directory free.
    shows_status: bool,
}

impl Stack {
    /// The files of `tree`, whose nodes count `layers` from the lowest on.
    pub(super) fn new(tree: Arc<Tree>, layers: Vec<LayerReader>, status: StatusFile) -> Self {
        let is_free = tree.lookup(NodeNumber::ROOT, status.directory).is_none();
        let shows_status = is_free && tree.len() <= STATUS_FILE.0 as usize;
        Self { tree, layers, status, shows_status }
    }

    pub(super) const fn tree(&self) -> &Arc<Tree> {
        &self.tree
    }

    pub(super) fn layers(&self) -> &[LayerReader] {
        &self.layers
    }

    /// Whether `node` is the status file, which alone changes.
    pub(super) fn is_status_file(&self, node: NodeNumber) -> bool {
        self.shows_status && node == STATUS_FILE
    }

    fn is_ours(&self, node: NodeNumber) -> bool {
        self.shows_status && matches!(node, STATUS_DIRECTORY | STATUS_FILE)
    }

    fn check_service(&self) -> Result<(), FsError> {
        self.layers.iter().try_for_each(|layer| Ok(layer.health().check_service()?))
    }

    /// The directory of the status file, if that is its name and the layers leave it free.
    pub(super) fn lookup_status(&self, name: &[u8]) -> Option<NodeNumber> {
        (self.shows_status && name == self.status.directory).then_some(STATUS_DIRECTORY)
    }

    pub(super) fn lookup(&self, directory: NodeId, name: &[u8]) -> Result<NodeNumber, FsError> {
        if self.shows_status && directory.node == STATUS_DIRECTORY {
            return if name == self.status.name { Ok(STATUS_FILE) } else { Err(FsError::NotFound) };
        }
        if self.is_ours(directory.node) || self.node(directory)?.kind() != NodeKind::Directory {
            return Err(FsError::NotDirectory);
        }
        if let (NodeNumber::ROOT, Some(found)) = (directory.node, self.lookup_status(name)) {
            return Ok(found);
        }
        self.check_service()?;
        self.tree.lookup(directory.node, name).ok_or(FsError::NotFound)
    }

    /// What `stat` shows, with owners mapped by `map`.
    pub(super) fn attributes(&self, id: NodeId, map: Option<&IdMap>) -> Result<Attributes, FsError> {
        if self.is_ours(id.node) {
            return Ok(self.status.attributes(id.pack(), id.node == STATUS_FILE));
        }
        self.shown(id)?;
        let found = Attributes::of_node(id.pack(), &self.tree, id.node, |layer, entry| self.entry(layer, entry));
        let mut attributes = found.ok_or_else(|| FsError::NoInode { inode: id.pack() })?;
        if let (Some(map), false) = (map, attributes.kind == NodeKind::Whiteout) {
            attributes.uid = map.uid(attributes.uid);
            attributes.gid = map.gid(attributes.gid);
        }
        Ok(attributes)
    }

    /// Shows the names in a directory with the attributes that `attributes` gives. Our own directory is not among those of
    /// the root.
    pub(super) fn list(
        &self,
        directory: NodeId,
        from: u64,
        generation: u64,
        attributes: impl Fn(NodeNumber) -> Result<Attributes, FsError>,
        visit: Visit<'_>,
    ) -> Result<(), FsError> {
        if self.shows_status && directory.node == STATUS_DIRECTORY {
            if from == 0 {
                let (name, attributes) = (&self.status.name[..], attributes(STATUS_FILE)?);
                visit(DirectoryEntry { next: 1, name, attributes, generation });
            }
            return Ok(());
        }
        if self.is_ours(directory.node) || self.shown(directory)?.kind() != NodeKind::Directory {
            return Err(FsError::NotDirectory);
        }
        let skip = usize::try_from(from).unwrap_or(usize::MAX);
        for (position, child) in self.tree.children(directory.node, skip) {
            let (next, attributes) = (position as u64 + 1, attributes(child.node)?);
            if !visit(DirectoryEntry { next, name: child.name, attributes, generation }) {
                break;
            }
        }
        Ok(())
    }

    /// The directory above; `None` above the root.
    pub(super) fn parent(&self, id: NodeId) -> Result<Option<NodeNumber>, FsError> {
        if self.is_ours(id.node) {
            return Ok(Some(NodeNumber::ROOT));
        }
        self.node(id)?;
        Ok((id.node != NodeNumber::ROOT).then(|| self.tree.parent(id.node)))
    }

    pub(super) fn read_link(&self, id: NodeId) -> Result<Vec<u8>, FsError> {
        if self.is_ours(id.node) {
            return Err(FsError::NotLink);
        }
        let node = self.shown(id)?;
        match (node.kind(), self.entry_of(node)) {
            (NodeKind::Symlink, Some(entry)) => Ok(entry.link.to_vec()),
            _ => Err(FsError::NotLink),
        }
    }

    /// Whether any file has extended attributes.
    pub(super) fn has_xattrs(&self) -> bool {
        let mut entries = self.tree.nodes().iter().filter_map(|node| self.entry_of(node));
        entries.any(|entry| entry.xattrs().next().is_some())
    }

    /// A file's extended attributes. For overlayfs, which has opaque directories marked by the
    /// attribute `opaque`, its own are hidden.
    pub(super) fn xattrs(&self, id: NodeId, opaque: Option<&[u8]>) -> Result<Vec<Xattr>, FsError> {
        if self.is_ours(id.node) {
            return Ok(Vec::new());
        }
        let node = self.shown(id)?;
        let all = xattrs(node, self.entry_of(node), opaque);
        Ok(all.map(|(name, value)| Xattr { name: name.to_vec(), value: value.to_vec() }).collect())
    }

    pub(super) fn try_read(
        &self,
        id: NodeId,
        offset: u64,
        length: usize,
        buffer: &mut Vec<u8>,
    ) -> Result<bool, FsError> {
        if self.is_status_file(id.node) {
            let text = self.status.text();
            let from = usize::try_from(offset).map_or(text.len(), |offset| offset.min(text.len()));
            buffer.clear();
            buffer.extend(text[from..].iter().take(length));
            return Ok(true);
        }
        let (layer, entry) = self.content(id)?;
        Ok(layer.try_read_file(entry, offset, length, buffer)?)
    }

    pub(super) async fn read(&self, id: NodeId, offset: u64, length: usize) -> Result<Vec<u8>, FsError> {
        if self.is_status_file(id.node) {
            let mut buffer = Vec::new();
            self.try_read(id, offset, length, &mut buffer)?;
            return Ok(buffer);
        }
        let (layer, entry) = self.content(id)?;
        Ok(layer.read_file(entry, offset, length).await?)
    }

    fn content(&self, id: NodeId) -> Result<(&LayerReader, u32), FsError> {
        if self.is_ours(id.node) {
            return Err(FsError::IsDirectory);
        }
        let node = self.node(id)?;
        match (node.kind(), node.entry(), self.layers.get(usize::from(node.layer()))) {
            (NodeKind::Regular, Some(entry), Some(layer)) => Ok((layer, entry)),
            (NodeKind::Directory, ..) => Err(FsError::IsDirectory),
            _ => Err(FsError::NotRegular),
        }
    }

    /// A node, unless a layer is out of service.
    fn shown(&self, id: NodeId) -> Result<&Node, FsError> {
        if id.node != NodeNumber::ROOT {
            self.check_service()?;
        }
        self.node(id)
    }

    fn node(&self, id: NodeId) -> Result<&Node, FsError> {
        self.tree.node(id.node).ok_or_else(|| FsError::NoInode { inode: id.pack() })
    }

    pub(super) fn entry_of(&self, node: &Node) -> Option<&Entry> {
        self.entry(node.layer(), node.entry()?)
    }

    fn entry(&self, layer: u16, entry: u32) -> Option<&Entry> {
        self.layers.get(usize::from(layer))?.index().entries.get(entry as usize)
    }
}

/// Logs the entries of a layer that its tree leaves out.
pub(super) fn log_skipped(layer: &LayerReader, tree: &Tree) {
    for skipped in tree.skipped() {
        tracing::debug!(layer = %layer.digest(), entry = skipped.entry, reason = %skipped.reason, "an entry has no place");
    }
}
