//! A tree that is being built: nodes that can be replaced, and one map from (directory, name) to node.
//!
//! Removing a name only forgets the map entry. What hung below it stays in the arrays, unreachable, and is left behind
//! when [`Draft::finish`] lays out what can be reached from the root.

use std::collections::{HashMap, HashSet, VecDeque};

use crate::tree::name::{components, is_mark, is_valid};
use crate::tree::{ForeignLink, Header, Layout, NodeKind, NodeNumber, Placed, SkipReason, Skipped, Tree, TreeError};

/// As many symbolic links as the container engines follow before they call it a loop.
const LINKS_MAX: usize = 255;

const ROOT: u32 = 0;

#[derive(Debug, Clone, Copy)]
struct DraftNode {
    entry: Option<u32>,
    parent: u32,
    kind: NodeKind,
    opaque: bool,
}

/// The tree of one layer in the making. `'a` is the life of the entries, whose names it borrows.
#[derive(Debug)]
pub(super) struct Draft<'a> {
    nodes: Vec<DraftNode>,
    names: HashMap<(u32, &'a [u8]), u32>,
    whiteouts: HashSet<(u32, &'a [u8])>,
    /// Targets of symbolic links and foreign links, by node.
    targets: HashMap<u32, &'a [u8]>,
    /// Hard links that were extracted last, by the node they lead to.
    headers: HashMap<u32, u32>,
    /// Files inside of marks, by their clean paths: not shown, but hard links may lead to them.
    hidden: HashMap<Vec<u8>, u32>,
    /// The directory that was resolved last, as it was spelled: archives list a directory's files in a row.
    latest: Option<(&'a [u8], u32)>,
    skipped: Vec<Skipped>,
}

impl<'a> Draft<'a> {
    pub(super) fn new(capacity: usize) -> Self {
        Self {
            nodes: vec![DraftNode { entry: None, parent: ROOT, kind: NodeKind::Directory, opaque: false }],
            names: HashMap::with_capacity(capacity),
            whiteouts: HashSet::new(),
            targets: HashMap::new(),
            headers: HashMap::new(),
            hidden: HashMap::new(),
            latest: None,
            skipped: Vec::new(),
        }
    }

    pub(super) fn skip(&mut self, entry: u32, reason: SkipReason) {
        self.skipped.push(Skipped { entry, reason });
    }

    pub(super) fn remember_directory(&mut self, spelled: &'a [u8], node: u32) {
        self.latest = Some((spelled, node));
    }

    pub(super) fn remembered_directory(&self, spelled: &[u8]) -> Option<u32> {
        self.latest.and_then(|(latest, node)| (latest == spelled).then_some(node))
    }

    pub(super) fn child(&self, directory: u32, name: &[u8]) -> Option<u32> {
        // The map borrows its keys for 'a, and a shorter key is as good for looking up.
        self.names.get(&(directory, name)).copied()
    }

    pub(super) fn kind(&self, node: u32) -> NodeKind {
        self.nodes[node as usize].kind
    }

    /// Gives the root directory the metadata of `entry`.
    pub(super) fn describe(&mut self, directory: u32, entry: u32) {
        self.nodes[directory as usize].entry = Some(entry);
    }

    pub(super) fn set_opaque(&mut self, directory: u32) {
        self.nodes[directory as usize].opaque = true;
    }

    pub(super) fn white_out(&mut self, directory: u32, name: &'a [u8]) {
        self.whiteouts.insert((directory, name));
    }

    pub(super) fn set_target(&mut self, node: u32, target: &'a [u8]) {
        self.targets.insert(node, target);
    }

    /// Puts a new node under a name, in the place of whatever had it.
    pub(super) fn put(&mut self, directory: u32, name: &'a [u8], kind: NodeKind, entry: Option<u32>) -> u32 {
        let node = self.add(directory, kind, entry);
        self.link(directory, name, node);
        node
    }

    fn add(&mut self, directory: u32, kind: NodeKind, entry: Option<u32>) -> u32 {
        #[expect(clippy::cast_possible_truncation, reason = "at most one implied node per path component of an entry")]
        let node = self.nodes.len() as u32;
        self.nodes.push(DraftNode { entry, parent: directory, kind, opaque: false });
        node
    }

    /// Keeps a regular file that is not shown, by its clean path.
    pub(super) fn hide(&mut self, path: Vec<u8>, entry: u32) {
        let node = self.add(ROOT, NodeKind::Regular, Some(entry));
        self.hidden.insert(path, node);
    }

    /// Keeps one more path, which is not shown, of a file.
    pub(super) fn hide_link(&mut self, path: Vec<u8>, node: u32) {
        self.hidden.insert(path, node);
    }

    /// A file that is not shown.
    pub(super) fn hidden(&self, path: &[u8]) -> Option<u32> {
        self.hidden.get(path).copied()
    }

    /// Gives a file the mode, owner and time of a hard link.
    pub(super) fn describe_link(&mut self, node: u32, entry: u32) {
        self.headers.insert(node, entry);
    }

    /// Puts an existing node under one more name.
    pub(super) fn link(&mut self, directory: u32, name: &'a [u8], node: u32) {
        if self.names.insert((directory, name), node).is_some() {
            // The remembered directory may just have gone.
            self.latest = None;
        }
    }

    /// Follows `path` from the root to a directory, through symbolic links, which cannot lead out of the root.
    /// With `create`, what is missing becomes an implied directory; without, the answer is `Ok(None)`.
    pub(super) fn directory(&mut self, path: &[&'a [u8]], create: bool) -> Result<Option<u32>, SkipReason> {
        let mut rest: Vec<&'a [u8]> = path.iter().rev().copied().collect();
        let mut current = ROOT;
        let mut links = 0;
        while let Some(name) = rest.pop() {
            match name {
                b"" | b"." => continue,
                b".." => {
                    current = self.nodes[current as usize].parent;
                    continue;
                }
                _ => {}
            }
            // A link that found no target is no obstacle: extraction would not have made it.
            let found = self.child(current, name).filter(|node| self.kind(*node) != NodeKind::ForeignLink);
            let Some(node) = found else {
                if !create {
                    return Ok(None);
                }
                // A link's target is not cleaned beforehand, so it may hold what no entry's path can.
                if !is_valid(name) {
                    return Err(SkipReason::Name);
                }
                if is_mark(name) {
                    return Err(SkipReason::Mark);
                }
                current = self.put(current, name, NodeKind::Directory, None);
                continue;
            };
            match self.kind(node) {
                NodeKind::Directory => current = node,
                NodeKind::Symlink => {
                    links += 1;
                    if links > LINKS_MAX {
                        return Err(SkipReason::LinkLoop);
                    }
                    let target = self.targets.get(&node).copied().unwrap_or_default();
                    if target.starts_with(b"/") {
                        current = ROOT;
                    }
                    rest.extend(target.split(|byte| *byte == b'/').rev());
                }
                NodeKind::Regular
                | NodeKind::CharDevice
                | NodeKind::BlockDevice
                | NodeKind::Fifo
                | NodeKind::Whiteout
                | NodeKind::ForeignLink => return Err(SkipReason::ParentNotDirectory),
            }
        }
        Ok(Some(current))
    }

    /// White-outs become nodes where the layer has nothing of that name, and opaque marks where it has a directory:
    /// they speak of lower layers only, whatever their order in the archive.
    fn settle_whiteouts(&mut self) {
        let mut whiteouts: Vec<_> = std::mem::take(&mut self.whiteouts).into_iter().collect();
        whiteouts.sort_unstable();
        for (directory, name) in whiteouts {
            match self.child(directory, name) {
                Some(node) if self.kind(node) == NodeKind::Directory => self.set_opaque(node),
                Some(_) => {}
                None => {
                    self.put(directory, name, NodeKind::Whiteout, None);
                }
            }
        }
    }

    /// Lays out what can be reached from the root.
    pub(super) fn finish(mut self) -> Result<Tree, TreeError> {
        self.settle_whiteouts();
        let mut names: Vec<(u32, &[u8], u32)> =
            self.names.iter().map(|((directory, name), node)| (*directory, *name, *node)).collect();
        names.sort_unstable();
        let mut layout = Layout::new(self.placed(ROOT), names.len() + 1);
        // Where each draft node went, for files with several names.
        let mut numbers = vec![None; self.nodes.len()];
        let mut foreign_links = Vec::new();
        let mut queue = VecDeque::from([(ROOT, 0)]);
        while let Some((directory, number)) = queue.pop_front() {
            layout.begin(number)?;
            let from = names.partition_point(|(parent, ..)| *parent < directory);
            for (_, name, node) in names[from..].iter().take_while(|(parent, ..)| *parent == directory) {
                let placed = self.placed(*node);
                let child = match numbers[*node as usize] {
                    Some(child) => child,
                    None => {
                        let child = layout.add(placed, number)?;
                        if let Some(entry) = self.headers.get(node) {
                            layout.describe(child, Header { layer: 0, entry: *entry });
                        }
                        child
                    }
                };
                numbers[*node as usize] = Some(child);
                layout.name(number, name, child)?;
                match placed.kind {
                    NodeKind::Directory => queue.push_back((*node, child)),
                    NodeKind::ForeignLink => {
                        let target = components(self.targets.get(node).copied().unwrap_or_default()).join(&b'/');
                        foreign_links.push(ForeignLink { node: NodeNumber(child), target });
                    }
                    _ => {}
                }
            }
        }
        Ok(layout.finish(foreign_links, self.skipped))
    }

    fn placed(&self, node: u32) -> Placed {
        let DraftNode { entry, kind, opaque, .. } = self.nodes[node as usize];
        Placed { kind, entry, layer: 0, opaque }
    }
}
