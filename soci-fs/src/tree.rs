//! The file tree of one layer, or of several merged: flat arrays that answer lookups without a database.
//!
//! A layer's file table is a list; a file system is a tree with rules (implied parents, duplicate names, hard links,
//! white-outs). [`Tree::of_layer`] applies the rules of tar extraction once, and the result is three arrays: nodes of
//! fixed size, directory entries sorted by name within each directory, and one blob of names. Roads not taken: a map of
//! paths (memory for every full path), and a database (seconds of CPU for 100,000 files). Fixed-size plain records
//! leave the way open to mapping the arrays from a file.
//!
//! A node holds no attributes. It names the layer and the entry that has them, so a tree costs 24 bytes per file and 12
//! bytes plus the name per directory entry; see [`crate::tree::attributes`].
//!
//! Invariants: node 0 is the root directory; the children of a node are one contiguous range of directory entries with
//! ascending unique names; no name is empty, `.`, `..`, longer than 255 bytes or has a slash or NUL in it; directories
//! have one parent and form a tree, so a walk ends; the same layers give the same arrays.
//!
//! The room uses `soci-index` alone; `foresight`, `fuse` and `node` use it. [`view`] merges the trees of an image's
//! layers, [`id_map`] shows other owners. [`erofs`] writes a tree as a file system of the kernel's, whose files are ranges
//! of the layers as [`device`] lays them out.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;

use soci_index::format::class::{Class, Classified};
use soci_index::format::entry::Entry;

pub mod attributes;
mod build;
pub mod device;
mod draft;
pub mod erofs;
pub mod id_map;
pub(crate) mod kernel_cache;
mod name;
pub mod node_id;
#[cfg(test)]
pub(crate) mod tests;
pub mod view;

/// Number of a node within its tree, from 0 (the root).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeNumber(pub u32);

impl NodeNumber {
    /// The root directory.
    pub const ROOT: Self = Self(0);
}

/// What a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NodeKind {
    Directory,
    /// A regular file.
    Regular,
    /// A symbolic link.
    Symlink,
    /// A character device.
    CharDevice,
    BlockDevice,
    /// A named pipe.
    Fifo,
    /// The record that lower layers' file of this name is deleted. Only in the tree of a single layer.
    Whiteout,
    /// A hard link to a name that this layer does not have. Only in the tree of a single layer, and never shown.
    ForeignLink,
}

/// One file, whatever its kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Node {
    first: u32,
    count: u32,
    parent: u32,
    links: u32,
    entry: u32,
    layer: u16,
    kind: NodeKind,
    opaque: bool,
}

/// [`Node::entry`] of a directory that no entry describes.
const IMPLIED: u32 = u32::MAX;

impl Node {
    /// What it is.
    #[must_use]
    pub const fn kind(&self) -> NodeKind {
        self.kind
    }

    /// Position, in the list the tree was made from, of the layer that describes it; 0 in the tree of a single layer.
    #[must_use]
    pub const fn layer(&self) -> u16 {
        self.layer
    }

    /// Position of the entry that describes it in that layer's table; `None` for a directory that is merely implied.
    #[must_use]
    pub const fn entry(&self) -> Option<u32> {
        if self.entry == IMPLIED { None } else { Some(self.entry) }
    }

    /// Link count: names of a file; 2 and the number of subdirectories for a directory.
    #[must_use]
    pub const fn links(&self) -> u32 {
        self.links
    }

    /// Whether the directory hides what lower layers have in it. Always false in a merged tree.
    #[must_use]
    pub const fn is_opaque(&self) -> bool {
        self.opaque
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Dirent {
    name_start: u32,
    name_length: u32,
    node: u32,
}

/// A name in a directory and the node it leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Child<'tree> {
    pub name: &'tree [u8],
    pub node: NodeNumber,
}

/// The tree.
#[derive(Clone, PartialEq, Eq)]
pub struct Tree {
    nodes: Vec<Node>,
    dirents: Vec<Dirent>,
    names: Vec<u8>,
    /// Whose mode, owner and time count, for files with hard links.
    headers: HashMap<u32, Header>,
    foreign_links: Vec<ForeignLink>,
    skipped: Vec<Skipped>,
}

/// An entry in the table of one of the layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Header {
    pub(crate) layer: u16,
    pub(crate) entry: u32,
}

/// A hard link that needs a lower layer: its node, and its target as a clean path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ForeignLink {
    pub(crate) node: NodeNumber,
    pub(crate) target: Vec<u8>,
}

/// An entry that has no place in the tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Skipped {
    /// Position in the layer's table.
    pub entry: u32,
    pub reason: SkipReason,
}

/// Why an entry has no place in the tree. Tar extraction reports an error for such an entry and goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum SkipReason {
    /// Its path leads through something that is neither a directory nor a link to one.
    #[error("a parent of the path is not a directory")]
    ParentNotDirectory,
    /// Its path leads through symbolic links that never end.
    #[error("too many symbolic links in the path")]
    LinkLoop,
    /// A component has more than 255 bytes, or has a NUL byte in it.
    #[error("a component of the path cannot be a file name")]
    Name,
    /// It would replace the root directory.
    #[error("the path is the root and the entry is no directory")]
    Root,
    /// A hard link to a directory.
    #[error("hard link to a directory")]
    LinkToDirectory,
    /// The target of a symbolic link is empty, longer than 4095 bytes, or has a NUL byte in it.
    #[error("the target cannot be that of a symbolic link")]
    LinkTarget,
    /// A white-out without a name, or of `.` or `..`, or a bookkeeping file of an old union file system.
    #[error("a white-out mark that marks nothing")]
    Mark,
}

/// Why a tree could not be built.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TreeError {
    /// More nodes, names or bytes of names than 32 bits can count.
    #[error("the file tree has more than {limit} {what}")]
    TooLarge { what: &'static str, limit: u32 },
    /// More layers than 16 bits can count.
    #[error("{layers} layers are more than the {limit} that one tree can merge")]
    TooManyLayers { layers: usize, limit: u16 },
}

impl Classified for TreeError {
    fn class(&self) -> Class {
        Class::Content
    }
}

impl Tree {
    /// Builds the tree of one layer, white-outs as recorded.
    ///
    /// No entry makes it fail: what extraction would refuse is left out and listed by [`Tree::skipped`].
    ///
    /// # Errors
    /// [`TreeError::TooLarge`], which the limits of the index rule out in practice.
    pub fn of_layer(entries: &[Entry]) -> Result<Self, TreeError> {
        build::of_layer(entries)
    }

    /// How many nodes there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Never: there is always a root.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// All nodes, in the order of their numbers.
    #[must_use]
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The node with this number.
    #[must_use]
    pub fn node(&self, number: NodeNumber) -> Option<&Node> {
        self.nodes.get(number.0 as usize)
    }

    /// The directory that holds a directory; the root is its own parent. For other files, the directory of one of
    /// their names.
    #[must_use]
    pub fn parent(&self, number: NodeNumber) -> NodeNumber {
        self.node(number).map_or(NodeNumber::ROOT, |node| NodeNumber(node.parent))
    }

    /// Finds a name in a directory.
    #[must_use]
    pub fn lookup(&self, directory: NodeNumber, name: &[u8]) -> Option<NodeNumber> {
        let dirents = &self.dirents[self.dirent_range(directory)];
        let found = dirents.binary_search_by(|dirent| self.name(dirent).cmp(name)).ok()?;
        let number = NodeNumber(dirents[found].node);
        self.is_shown(number).then_some(number)
    }

    /// Walks a slash-separated path from the root, following nothing.
    #[must_use]
    pub fn find(&self, path: &[u8]) -> Option<NodeNumber> {
        let components = path.split(|byte| *byte == b'/').filter(|component| !component.is_empty());
        components.into_iter().try_fold(NodeNumber::ROOT, |directory, name| self.lookup(directory, name))
    }

    /// The names in a directory, ascending, from position `skip` on. Positions are stable, so they may serve as
    /// directory offsets.
    pub fn children(&self, directory: NodeNumber, skip: usize) -> impl Iterator<Item = (usize, Child<'_>)> {
        let dirents = &self.dirents[self.dirent_range(directory)];
        dirents.iter().enumerate().skip(skip).filter_map(|(position, dirent)| {
            let node = NodeNumber(dirent.node);
            self.is_shown(node).then(|| (position, Child { name: self.name(dirent), node }))
        })
    }

    /// The names in a directory that begin with `prefix`, ascending.
    pub fn children_with<'tree>(
        &'tree self,
        directory: NodeNumber,
        prefix: &'tree [u8],
    ) -> impl Iterator<Item = Child<'tree>> {
        let dirents = &self.dirents[self.dirent_range(directory)];
        let first = dirents.partition_point(|dirent| self.name(dirent) < prefix);
        let named = dirents[first..].iter().take_while(move |dirent| self.name(dirent).starts_with(prefix));
        named
            .map(|dirent| Child { name: self.name(dirent), node: NodeNumber(dirent.node) })
            .filter(|child| self.is_shown(child.node))
    }

    /// Entries of the layer that have no place in the tree. Empty for a merged tree.
    #[must_use]
    pub fn skipped(&self) -> &[Skipped] {
        &self.skipped
    }

    /// The entry whose mode, owner and time a file has: the hard link to it that was extracted last, else its own.
    pub(crate) fn header(&self, number: NodeNumber) -> Option<Header> {
        let own = || {
            let node = self.node(number)?;
            Some(Header { layer: node.layer, entry: node.entry()? })
        };
        self.linked_header(number).or_else(own)
    }

    /// The same, of hard links only.
    pub(crate) fn linked_header(&self, number: NodeNumber) -> Option<Header> {
        self.headers.get(&number.0).copied()
    }

    fn is_shown(&self, number: NodeNumber) -> bool {
        self.node(number).is_some_and(|node| node.kind != NodeKind::ForeignLink)
    }

    /// All names in all directories.
    pub(crate) fn names(&self) -> impl Iterator<Item = Child<'_>> + Clone {
        self.dirents.iter().map(|dirent| Child { name: self.name(dirent), node: NodeNumber(dirent.node) })
    }

    /// All children, foreign links too.
    pub(crate) fn all_children(&self, directory: NodeNumber) -> impl Iterator<Item = Child<'_>> {
        let dirents = &self.dirents[self.dirent_range(directory)];
        dirents.iter().map(|dirent| Child { name: self.name(dirent), node: NodeNumber(dirent.node) })
    }

    /// Hard links that need a lower layer.
    pub(crate) fn foreign_links(&self) -> &[ForeignLink] {
        &self.foreign_links
    }

    /// Finds a name, foreign links too.
    pub(crate) fn lookup_any(&self, directory: NodeNumber, name: &[u8]) -> Option<NodeNumber> {
        let dirents = &self.dirents[self.dirent_range(directory)];
        let found = dirents.binary_search_by(|dirent| self.name(dirent).cmp(name)).ok()?;
        Some(NodeNumber(dirents[found].node))
    }

    fn name(&self, dirent: &Dirent) -> &[u8] {
        let start = dirent.name_start as usize;
        &self.names[start..start + dirent.name_length as usize]
    }

    fn dirent_range(&self, directory: NodeNumber) -> Range<usize> {
        self.node(directory).map_or(0..0, |node| {
            let first = node.first as usize;
            first..first + node.count as usize
        })
    }
}

impl fmt::Debug for Tree {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tree")
            .field("nodes", &self.nodes.len())
            .field("names", &self.dirents.len())
            .field("skipped", &self.skipped.len())
            .finish()
    }
}

/// Lays a tree out: directories in breadth-first order, each one's children in one go.
#[derive(Debug, Default)]
pub(crate) struct Layout {
    nodes: Vec<Node>,
    dirents: Vec<Dirent>,
    names: Vec<u8>,
    headers: HashMap<u32, Header>,
}

/// What [`Layout`] needs to know of a new node.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Placed {
    pub(crate) kind: NodeKind,
    pub(crate) entry: Option<u32>,
    pub(crate) layer: u16,
    pub(crate) opaque: bool,
}

impl Layout {
    /// Starts with the root.
    pub(crate) fn new(root: Placed, capacity: usize) -> Self {
        let mut layout = Self { nodes: Vec::with_capacity(capacity), ..Self::default() };
        layout.nodes.push(node(root, 0, 2));
        layout.dirents.reserve(capacity);
        layout.names.reserve(capacity.saturating_mul(12));
        layout
    }

    /// Adds a node below `parent` and gives its number.
    pub(crate) fn add(&mut self, placed: Placed, parent: u32) -> Result<u32, TreeError> {
        let number = counted(self.nodes.len(), "files")?;
        let is_directory = placed.kind == NodeKind::Directory;
        self.nodes.push(node(placed, parent, if is_directory { 2 } else { 0 }));
        if is_directory {
            self.nodes[parent as usize].links += 1;
        }
        Ok(number)
    }

    /// Gives a file the mode, owner and time of another entry.
    pub(crate) fn describe(&mut self, node: u32, header: Header) {
        self.headers.insert(node, header);
    }

    /// Marks that the children of `directory` follow.
    pub(crate) fn begin(&mut self, directory: u32) -> Result<(), TreeError> {
        self.nodes[directory as usize].first = counted(self.dirents.len(), "names")?;
        Ok(())
    }

    /// Adds a name for `node` to the directory begun last; names come in ascending order.
    pub(crate) fn name(&mut self, directory: u32, name: &[u8], node: u32) -> Result<(), TreeError> {
        let name_start = counted(self.names.len(), "bytes of names")?;
        let name_length = counted(name.len(), "bytes of names")?;
        self.names.extend_from_slice(name);
        self.dirents.push(Dirent { name_start, name_length, node });
        self.nodes[directory as usize].count += 1;
        let target = &mut self.nodes[node as usize];
        if target.kind != NodeKind::Directory {
            target.links += 1;
        }
        Ok(())
    }

    /// The finished tree.
    pub(crate) fn finish(mut self, foreign_links: Vec<ForeignLink>, skipped: Vec<Skipped>) -> Tree {
        self.nodes.shrink_to_fit();
        self.dirents.shrink_to_fit();
        self.names.shrink_to_fit();
        let Self { nodes, dirents, names, headers } = self;
        Tree { nodes, dirents, names, headers, foreign_links, skipped }
    }
}

const fn node(placed: Placed, parent: u32, links: u32) -> Node {
    let entry = match placed.entry {
        Some(entry) => entry,
        None => IMPLIED,
    };
    Node { first: 0, count: 0, parent, links, entry, layer: placed.layer, kind: placed.kind, opaque: placed.opaque }
}

/// One below 2^32, so that [`IMPLIED`] is never a number.
fn counted(count: usize, what: &'static str) -> Result<u32, TreeError> {
    const LIMIT: u32 = u32::MAX - 1;
    match u32::try_from(count) {
        Ok(count) if count <= LIMIT => Ok(count),
        _ => Err(TreeError::TooLarge { what, limit: LIMIT }),
    }
}
