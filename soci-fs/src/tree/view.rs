//! The layers of an image merged into one read-only tree, so that a mount needs neither overlayfs nor root.
//!
//! Merging happens once, when the view is built: every directory is the union of what the layers have under its path,
//! upper layers first, cut off where a white-out or an opaque mark says so. What results is an ordinary [`Tree`], whose
//! nodes say which layer and entry they come from; serving it costs no more than serving a single layer. The road not
//! taken is to search the layers at every lookup, which is what a union file system must do because its top changes.
//!
//! Rules beyond the OCI image specification, each as overlay-based engines behave: a directory that a layer only
//! implies (it has files below, but no entry) keeps the metadata that lower layers give it; a hard link to a name that
//! its own layer lacks is resolved in the layers below, and left out where they do not have it either; the header of
//! the topmost link gives the file its mode, owner and time. The white-out convention of overlayfs (a character device
//! 0:0) means nothing here: such a device is a device.
//!
//! Invariants: node numbers depend on the layers only, so they serve as stable inode numbers; files with several names
//! in one layer are one node.

use std::collections::{HashMap, VecDeque};

use crate::tree::{Child, Header, Layout, Node, NodeKind, NodeNumber, Placed, Tree, TreeError};

#[cfg(test)]
mod tests;

/// Merges the trees of an image's layers, lowest first.
///
/// # Errors
/// [`TreeError`] when there are too many layers or files to number.
pub fn merge(layers: &[&Tree]) -> Result<Tree, TreeError> {
    // Engines stop at 127 or so; the cap keeps the layer numbers within 16 bits.
    const LIMIT: u16 = u16::MAX;
    if layers.len() > usize::from(LIMIT) {
        return Err(TreeError::TooManyLayers { layers: layers.len(), limit: LIMIT });
    }
    Merger::new(layers).run()
}

/// A node of one of the layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct MergedNode {
    layer: u16,
    node: NodeNumber,
}

/// The directories that make up one merged directory, topmost first. Mostly there is just one.
type Stack = Vec<MergedNode>;

/// What a name in a merged directory leads to.
enum MergedChild {
    /// Nothing: deleted, or a link without a target.
    Nothing,
    /// A file that is no directory.
    File(MergedNode),
    Directory(Directory),
}

/// A merged directory.
struct Directory {
    /// Where its children are.
    stack: Stack,
    /// The layer and entry that have its metadata: the topmost entry, even one below an opaque mark, which hides the
    /// children and not the directory.
    described: Option<(u16, u32)>,
}

impl Directory {
    fn placed(&self) -> Placed {
        let (layer, entry) = self.described.map_or((0, None), |(layer, entry)| (layer, Some(entry)));
        Placed { kind: NodeKind::Directory, entry, layer, opaque: false }
    }
}

/// The layers, and what is known of links between them.
struct Layers<'trees> {
    trees: &'trees [&'trees Tree],
    /// The files that hard links into lower layers mean. A link that means nothing is missing here.
    foreign: HashMap<MergedNode, MergedNode>,
    /// The topmost and last of the links to each of these files: its header counts.
    headers: HashMap<MergedNode, Header>,
}

struct Merger<'trees> {
    layers: Layers<'trees>,
    layout: Layout,
    queue: VecDeque<(u32, Stack)>,
    /// Files that are placed already: a second name may follow.
    placed: HashMap<MergedNode, u32>,
}

impl<'trees> Merger<'trees> {
    fn new(trees: &'trees [&'trees Tree]) -> Self {
        let layers = Layers::new(trees);
        let roots = layers.roots(trees.len());
        let capacity = trees.iter().map(|tree| tree.len()).sum::<usize>().max(1);
        let layout = Layout::new(roots.placed(), capacity);
        Self { layers, layout, queue: VecDeque::from([(0, roots.stack)]), placed: HashMap::new() }
    }

    fn run(mut self) -> Result<Tree, TreeError> {
        while let Some((number, stack)) = self.queue.pop_front() {
            self.layout.begin(number)?;
            if let [only] = stack[..] {
                self.copy(number, only)?;
            } else {
                self.union(number, &stack)?;
            }
        }
        Ok(self.layout.finish(Vec::new(), Vec::new()))
    }

    /// A directory that one layer alone has.
    fn copy(&mut self, number: u32, only: MergedNode) -> Result<(), TreeError> {
        let tree = self.layers.trees[usize::from(only.layer)];
        for Child { name, node } in tree.all_children(only.node) {
            let found = self.layers.settle(std::iter::once(MergedNode { layer: only.layer, node }));
            self.place(number, name, found)?;
        }
        Ok(())
    }

    /// A directory that several layers have.
    fn union(&mut self, number: u32, stack: &[MergedNode]) -> Result<(), TreeError> {
        let mut children: Vec<(&[u8], usize, MergedNode)> = Vec::new();
        for (depth, MergedNode { layer, node }) in stack.iter().enumerate() {
            let tree = self.layers.trees[usize::from(*layer)];
            let all = tree.all_children(*node);
            children.extend(all.map(|child| (child.name, depth, MergedNode { layer: *layer, node: child.node })));
        }
        children.sort_unstable_by_key(|(name, depth, _)| (*name, *depth));
        for group in children.chunk_by(|left, right| left.0 == right.0) {
            let found = self.layers.settle(group.iter().map(|(.., place)| *place));
            self.place(number, group[0].0, found)?;
        }
        Ok(())
    }

    fn place(&mut self, parent: u32, name: &[u8], found: MergedChild) -> Result<(), TreeError> {
        match found {
            MergedChild::Nothing => Ok(()),
            MergedChild::File(place) => {
                let number = self.file(place, parent)?;
                self.layout.name(parent, name, number)
            }
            MergedChild::Directory(directory) => {
                let number = self.layout.add(directory.placed(), parent)?;
                self.queue.push_back((number, directory.stack));
                self.layout.name(parent, name, number)
            }
        }
    }

    fn file(&mut self, place: MergedNode, parent: u32) -> Result<u32, TreeError> {
        if let Some(number) = self.placed.get(&place) {
            return Ok(*number);
        }
        let node = self.layers.node(place);
        let placed = Placed { kind: node.kind(), entry: node.entry(), layer: place.layer, opaque: false };
        let number = self.layout.add(placed, parent)?;
        if let Some(header) = self.layers.header(place) {
            self.layout.describe(number, header);
        }
        // Most files have one name and are looked up once. A link from above may name any file of a layer below.
        if node.links() > 1 || !self.layers.foreign.is_empty() {
            self.placed.insert(place, number);
        }
        Ok(number)
    }
}

impl<'trees> Layers<'trees> {
    /// Resolves the links into lower layers from the bottom up, so that each link finds those below it resolved and
    /// no chain is ever followed twice.
    fn new(trees: &'trees [&'trees Tree]) -> Self {
        let mut layers = Self { trees, foreign: HashMap::new(), headers: HashMap::new() };
        for (layer, tree) in (0_u16..).zip(trees) {
            for link in tree.foreign_links() {
                if let Some(MergedChild::File(target)) = layers.find(usize::from(layer), &link.target) {
                    layers.foreign.insert(MergedNode { layer, node: link.node }, target);
                    if let Some(header) = tree.header(link.node).map(|header| Header { layer, ..header }) {
                        let last = layers.headers.entry(target).or_insert(header);
                        *last = header.max(*last);
                    }
                }
            }
        }
        layers
    }

    /// The header of the last hard link to a file.
    fn header(&self, place: MergedNode) -> Option<Header> {
        let own = || self.trees[usize::from(place.layer)].linked_header(place.node);
        self.headers.get(&place).copied().or_else(|| own().map(|header| Header { layer: place.layer, ..header }))
    }

    fn node(&self, place: MergedNode) -> &'trees Node {
        &self.trees[usize::from(place.layer)].nodes()[place.node.0 as usize]
    }

    /// The merged root of the lowest `count` layers.
    fn roots(&self, count: usize) -> Directory {
        #[expect(clippy::cast_possible_truncation, reason = "merge() bounds the number of layers")]
        let roots = (0..count).rev().map(|layer| MergedNode { layer: layer as u16, node: NodeNumber::ROOT });
        match self.settle(roots) {
            MergedChild::Directory(directory) => directory,
            MergedChild::Nothing | MergedChild::File(_) => Directory { stack: Stack::new(), described: None },
        }
    }

    /// What a name leads to, given the nodes of that name from the topmost layer down.
    fn settle(&self, candidates: impl Iterator<Item = MergedNode>) -> MergedChild {
        let mut directory = Directory { stack: Stack::new(), described: None };
        let mut closed = false;
        for mut place in candidates {
            if self.node(place).kind() == NodeKind::ForeignLink {
                match self.foreign.get(&place) {
                    Some(target) => place = *target,
                    None => continue,
                }
            }
            let node = self.node(place);
            match node.kind() {
                NodeKind::Directory => {
                    directory.described = directory.described.or(node.entry().map(|entry| (place.layer, entry)));
                    if !closed {
                        directory.stack.push(place);
                    }
                    closed |= node.is_opaque();
                    if closed && directory.described.is_some() {
                        break;
                    }
                }
                NodeKind::Whiteout => break,
                NodeKind::Regular
                | NodeKind::Symlink
                | NodeKind::CharDevice
                | NodeKind::BlockDevice
                | NodeKind::Fifo
                | NodeKind::ForeignLink => {
                    if directory.stack.is_empty() {
                        return MergedChild::File(place);
                    }
                    break;
                }
            }
        }
        if directory.stack.is_empty() { MergedChild::Nothing } else { MergedChild::Directory(directory) }
    }

    /// Walks a clean path in the union of the lowest `count` layers, following nothing.
    fn find(&self, count: usize, path: &[u8]) -> Option<MergedChild> {
        let mut current = MergedChild::Directory(self.roots(count));
        for name in path.split(|byte| *byte == b'/') {
            let MergedChild::Directory(directory) = current else {
                return None;
            };
            let candidates = directory.stack.into_iter().filter_map(|MergedNode { layer, node }| {
                let node = self.trees[usize::from(layer)].lookup_any(node, name)?;
                Some(MergedNode { layer, node })
            });
            current = self.settle(candidates);
        }
        Some(current)
    }
}
