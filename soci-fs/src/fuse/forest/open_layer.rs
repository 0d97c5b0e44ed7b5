//! One layer in a forest: its tree as overlayfs wants it, and the state file.
//!
//! Overlayfs reads a deleted name from a character device 0:0 and an opaque directory from an extended attribute, so
//! that is what the tree's white-outs and marks are shown as. Attributes in overlayfs's own name space that the layer
//! itself carries are not shown: they are instructions to the kernel (take this directory from elsewhere, this file has
//! no data), and a layer has no business to give them.
//!
//! The state file, `/.soci-snapshotter/<layer digest>.json`, is found by name and never listed; where the layer has a
//! directory of that name, the layer wins. Its size is fixed, filled up with spaces, because a size that changes
//! between `stat` and `read` would cut the text.

use std::sync::{Arc, OnceLock};
use std::time::Instant;

use serde::Serialize;
use soci_index::format::digest::Digest;
use soci_index::format::entry::{Entry, Timestamp};
use soci_index::format::index::LayerIndex;
use soci_index::format::span::SpanId;

use crate::fuse::forest::OpaqueAttribute;
use crate::fuse::image::FsError;
use crate::layer::reader::LayerReader;
use crate::layer::stages::Stages;
use crate::tree::attributes::Attributes;
use crate::tree::id_map::IdMap;
use crate::tree::node_id::NodeId;
use crate::tree::{Node, NodeKind, NodeNumber, Tree, TreeError};

const STATE_DIRECTORY: &[u8] = b".soci-snapshotter";
/// Above the numbers of all real nodes; see [`OpenLayer::new`].
const STATE_DIRECTORY_NODE: NodeNumber = NodeNumber(u32::MAX - 1);
const STATE_FILE_NODE: NodeNumber = NodeNumber(u32::MAX - 2);
const STATE_BYTES: usize = 1024;
/// Room for an error's text, so that the rest always fits, even if every character has to be escaped.
const STATE_ERROR_BYTES: usize = 120;

/// Name spaces of overlayfs's own attributes.
const OVERLAY_NAMES: [&[u8]; 2] = [b"trusted.overlay.", b"user.overlay."];

/// What the state file says. The names are those that AWS's snapshotter uses.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct StateFile<'text> {
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'text str>,
    digest: String,
    size: u64,
    fetched_size: u64,
    fetched_percent: f64,
}

/// Name and value of an extended attribute.
type Xattr<'layer> = (&'layer [u8], &'layer [u8]);

/// A layer that can answer.
#[derive(Debug)]
pub(super) struct OpenLayer {
    reader: LayerReader,
    tree: Arc<Tree>,
    /// Whether the layer leaves the name of our directory free.
    shows_state: bool,
    /// The spans that hold files' content, made when first asked for.
    content_spans: OnceLock<Box<[SpanId]>>,
}

impl OpenLayer {
    /// [`OpenLayer::new`], and notes how long that took.
    pub(super) fn timed(reader: LayerReader, stages: &Stages) -> Result<Self, TreeError> {
        let start = Instant::now();
        let layer = Self::new(reader);
        stages.tree.record(start.elapsed());
        layer
    }

    /// Builds the layer's tree: work for a thread that may be busy for a moment.
    pub(super) fn new(reader: LayerReader) -> Result<Self, TreeError> {
        let tree = Arc::new(Tree::of_layer(&reader.index().entries)?);
        for skipped in tree.skipped() {
            tracing::debug!(layer = %reader.digest(), entry = skipped.entry, reason = %skipped.reason, "an entry has no place");
        }
        if let Some(first) = tree.foreign_links().first() {
            let target = String::from_utf8_lossy(&first.target).into_owned();
            let links = tree.foreign_links().len();
            tracing::warn!(layer = %reader.digest(), links, target, "hard links to files of lower layers are hidden");
        }
        let is_free = tree.lookup(NodeNumber::ROOT, STATE_DIRECTORY).is_none();
        let shows_state = is_free && tree.len() <= STATE_FILE_NODE.0 as usize;
        Ok(Self { reader, tree, shows_state, content_spans: OnceLock::new() })
    }

    pub(super) const fn reader(&self) -> &LayerReader {
        &self.reader
    }

    pub(super) const fn tree(&self) -> &Arc<Tree> {
        &self.tree
    }

    /// Whether `node` is the state file, which alone changes.
    pub(super) fn is_state_file(&self, node: NodeNumber) -> bool {
        self.shows_state && node == STATE_FILE_NODE
    }

    fn is_state(&self, node: NodeNumber) -> bool {
        self.shows_state && matches!(node, STATE_DIRECTORY_NODE | STATE_FILE_NODE)
    }

    pub(super) fn lookup(&self, directory: NodeId, name: &[u8]) -> Result<NodeNumber, FsError> {
        if self.shows_state && directory.node == STATE_DIRECTORY_NODE {
            let is_ours = name.strip_suffix(b".json") == Some(self.reader.digest().to_string().as_bytes());
            return if is_ours { Ok(STATE_FILE_NODE) } else { Err(FsError::NotFound) };
        }
        if self.is_state(directory.node) || self.node(directory)?.kind() != NodeKind::Directory {
            return Err(FsError::NotDirectory);
        }
        let is_ours = self.shows_state && directory.node == NodeNumber::ROOT && name == STATE_DIRECTORY;
        if is_ours {
            return Ok(STATE_DIRECTORY_NODE);
        }
        self.reader.health().check_service()?;
        let found = self.tree.lookup(directory.node, name);
        found.ok_or(FsError::NotFound)
    }

    pub(super) fn attributes(&self, id: NodeId, map: Option<&IdMap>) -> Result<Attributes, FsError> {
        if self.is_state(id.node) {
            return Ok(state_attributes(id));
        }
        let node = self.shown(id)?;
        let mut attributes = Attributes::new(id.pack(), node, self.entry_of(node)).with_header(self.header_of(id.node));
        if let (Some(map), false) = (map, node.kind() == NodeKind::Whiteout) {
            attributes.uid = map.uid(attributes.uid);
            attributes.gid = map.gid(attributes.gid);
        }
        Ok(attributes)
    }

    /// Checks that `id` is a directory whose children may be listed; the state directory has none to show.
    pub(super) fn directory(&self, id: NodeId) -> Result<(), FsError> {
        if self.is_state(id.node) {
            return if id.node == STATE_DIRECTORY_NODE { Ok(()) } else { Err(FsError::NotDirectory) };
        }
        match self.shown(id)?.kind() {
            NodeKind::Directory => Ok(()),
            _ => Err(FsError::NotDirectory),
        }
    }

    /// The directory above; `None` above the layer's own root.
    pub(super) fn parent(&self, id: NodeId) -> Result<Option<NodeNumber>, FsError> {
        if self.is_state(id.node) {
            return Ok(Some(NodeNumber::ROOT));
        }
        self.node(id)?;
        Ok((id.node != NodeNumber::ROOT).then(|| self.tree.parent(id.node)))
    }

    pub(super) fn read_link(&self, id: NodeId) -> Result<Vec<u8>, FsError> {
        if self.is_state(id.node) {
            return Err(FsError::NotLink);
        }
        let node = self.shown(id)?;
        match (node.kind(), self.entry_of(node)) {
            (NodeKind::Symlink, Some(entry)) => Ok(entry.link.to_vec()),
            _ => Err(FsError::NotLink),
        }
    }

    /// The names and values of a file's extended attributes.
    pub(super) fn xattrs(&self, id: NodeId, opaque: OpaqueAttribute) -> Result<Vec<Xattr<'_>>, FsError> {
        if self.is_state(id.node) {
            return Ok(Vec::new());
        }
        let node = self.shown(id)?;
        let own = self.entry_of(node).into_iter().flat_map(Entry::xattrs);
        let shown = own.filter(|(name, _)| !OVERLAY_NAMES.iter().any(|space| name.starts_with(space)));
        Ok(shown.chain(node.is_opaque().then_some((opaque.name(), &b"y"[..]))).collect())
    }

    pub(super) fn try_read(
        &self,
        id: NodeId,
        offset: u64,
        length: usize,
        buffer: &mut Vec<u8>,
    ) -> Result<bool, FsError> {
        if self.is_state_file(id.node) {
            let text = self.state_text();
            let from = usize::try_from(offset).map_or(text.len(), |offset| offset.min(text.len()));
            buffer.clear();
            buffer.extend(text[from..].iter().take(length));
            return Ok(true);
        }
        Ok(self.reader.try_read_file(self.content(id)?, offset, length, buffer)?)
    }

    pub(super) async fn read(&self, id: NodeId, offset: u64, length: usize) -> Result<Vec<u8>, FsError> {
        if self.is_state_file(id.node) {
            let mut buffer = Vec::new();
            self.try_read(id, offset, length, &mut buffer)?;
            return Ok(buffer);
        }
        Ok(self.reader.read_file(self.content(id)?, offset, length).await?)
    }

    fn content(&self, id: NodeId) -> Result<u32, FsError> {
        if self.is_state(id.node) {
            return Err(FsError::IsDirectory);
        }
        let node = self.node(id)?;
        match (node.kind(), node.entry()) {
            (NodeKind::Regular, Some(entry)) => Ok(entry),
            (NodeKind::Directory, _) => Err(FsError::IsDirectory),
            _ => Err(FsError::NotRegular),
        }
    }

    /// A node, unless the layer is out of service: then nothing of it is shown but its state, and its root, which leads
    /// there.
    fn shown(&self, id: NodeId) -> Result<&Node, FsError> {
        if id.node != NodeNumber::ROOT {
            self.reader.health().check_service()?;
        }
        self.node(id)
    }

    fn node(&self, id: NodeId) -> Result<&Node, FsError> {
        self.tree.node(id.node).ok_or_else(|| FsError::NoInode { inode: id.pack() })
    }

    fn entry_of(&self, node: &Node) -> Option<&Entry> {
        self.reader.index().entries.get(node.entry()? as usize)
    }

    fn header_of(&self, node: NodeNumber) -> Option<&Entry> {
        self.reader.index().entries.get(self.tree.header(node)?.entry as usize)
    }

    fn state_text(&self) -> Vec<u8> {
        let (index, store) = (self.reader.index(), self.reader.store());
        let spans = self.content_spans.get_or_init(|| content_spans(index));
        let present = spans.iter().filter(|span| store.is_present(**span)).count() as u64;
        // Counted in spans of content: what no file needs need not be fetched to have everything.
        let share = |whole: u64| match spans.len() as u64 {
            0 => whole,
            all => u64::try_from(u128::from(whole) * u128::from(present) / u128::from(all)).unwrap_or(whole),
        };
        let error = self.reader.health().last_error();
        let state = StateFile {
            error: error.as_deref().map(|error| shortened(error, STATE_ERROR_BYTES)),
            digest: self.reader.digest().to_string(),
            size: index.compressed_size,
            fetched_size: share(index.compressed_size),
            // Ten thousandths are exact in a float.
            fetched_percent: f64::from(u32::try_from(share(1_000_000)).unwrap_or(u32::MAX)) / 10_000.0,
        };
        let mut text = serde_json::to_vec(&state).unwrap_or_default();
        text.resize(STATE_BYTES, b' ');
        text[STATE_BYTES - 1] = b'\n';
        text
    }
}

/// The beginning of `text` that has at most `bytes` bytes.
fn shortened(text: &str, bytes: usize) -> &str {
    let end = (0..=bytes.min(text.len())).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    &text[..end]
}

/// The spans that must be present before every file can be read, ascending.
fn content_spans(index: &LayerIndex) -> Box<[SpanId]> {
    let mut spans = Vec::new();
    for entry in index.entries.iter().filter(|entry| entry.size > 0) {
        let whole = entry.data_offset..entry.data_offset.saturating_add(entry.size);
        let stored = match entry.sparse() {
            Some(pieces) => pieces.iter().fold(entry.data_offset..entry.data_offset, |range, piece| {
                range.start..range.end.max(piece.data_offset.saturating_add(piece.length))
            }),
            None => whole,
        };
        let header = entry.header_offset..entry.header_offset.saturating_add(1);
        spans.extend(index.spans.covering(header));
        spans.extend(index.spans.covering(stored));
    }
    spans.sort_unstable();
    spans.dedup();
    spans.into()
}

fn state_attributes(id: NodeId) -> Attributes {
    let is_file = id.node == STATE_FILE_NODE;
    Attributes {
        inode: id.pack(),
        kind: if is_file { NodeKind::Regular } else { NodeKind::Directory },
        permissions: if is_file { 0o400 } else { 0o500 },
        uid: 0,
        gid: 0,
        size: if is_file { STATE_BYTES as u64 } else { 0 },
        blocks: 0,
        // Now, so that the kernel drops what it has cached of the file.
        modified: now(),
        links: if is_file { 1 } else { 2 },
        device: 0,
    }
}

/// The time by the system's clock.
pub(super) fn now() -> Timestamp {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    Timestamp { seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX), nanoseconds: since.subsec_nanos() }
}

/// The generation, which distinguishes one layer in a slot from the next one there, and one mapping of owners from
/// another with the same number: taken from the digest and the mapping, and never 0.
pub(super) fn generation(digest: &Digest, map: Option<&IdMap>) -> u64 {
    let bytes = digest.bytes().iter().take(4).fold(0_u64, |number, byte| number << 8 | u64::from(*byte));
    // Of FNV, which spreads small differences and needs no table.
    let mix = |hash: u64, number: u32| (hash ^ u64::from(number)).wrapping_mul(0x0100_0000_01b3);
    let ranges = map.map(|map| map.uids.iter().chain(&map.gids)).into_iter().flatten();
    let numbers = ranges.flat_map(|range| [range.container, range.host, range.size]);
    let mapping = numbers.fold(0, mix);
    // 31 bits: the kernel keeps it in an `int`.
    ((bytes ^ mapping ^ (mapping >> 31)) & 0x7fff_ffff).max(1)
}
