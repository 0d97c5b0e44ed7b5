//! What a tar goes through while it is proven: a hash with marks, and the tar reader, compared with the table.

use std::sync::Arc;

use soci_index::format::entry::{Entry, Timestamp};
use soci_index::format::index::LayerIndex;
use soci_index::format::limits::Limits;
use soci_index::format::tar::TarReader;

use crate::layer::store::Mark;

/// A tar on its way through a hash that is marked at the end of each span.
pub(super) struct Marks {
    pub(super) index: Arc<LayerIndex>,
    pub(super) hash: Mark,
    offset: u64,
    pub(super) ends: Vec<Mark>,
}

impl Marks {
    pub(super) fn new(index: &Arc<LayerIndex>) -> Self {
        Self { index: Arc::clone(index), hash: Mark::START, offset: 0, ends: Vec::with_capacity(index.spans.len()) }
    }

    pub(super) fn push(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let end = self.index.spans.spans().get(self.ends.len()).map(|span| span.uncompressed.end);
            let rest = end.and_then(|end| usize::try_from(end - self.offset).ok()).unwrap_or(bytes.len());
            let (part, after) = bytes.split_at(rest.min(bytes.len()));
            self.hash.update(part);
            self.offset += part.len() as u64;
            bytes = after;
            while self.index.spans.spans().get(self.ends.len()).is_some_and(|span| span.uncompressed.end == self.offset)
            {
                self.ends.push(self.hash.clone());
            }
        }
    }
}

/// A tar on its way through the tar reader, its entries compared with a table as they come.
pub(super) struct TableCheck {
    index: Arc<LayerIndex>,
    tar: TarReader,
    next: usize,
    /// The first entry that is not what the table says.
    different: Option<usize>,
}

impl TableCheck {
    pub(super) fn new(index: Arc<LayerIndex>) -> Self {
        // One more than the table has is found out at once.
        let limits = Limits {
            entries_max: index.entries.len().saturating_add(1),
            ..crate::layer::limits::for_layer(index.compressed_size)
        };
        Self { index, tar: TarReader::new(limits), next: 0, different: None }
    }

    pub(super) fn push(&mut self, bytes: &[u8]) {
        if self.different.is_some() {
            return;
        }
        let parsed = self.tar.push(bytes);
        for entry in self.tar.take_entries() {
            if !self.index.entries.get(self.next).is_some_and(|said| same_entry(&entry, said)) {
                self.different.get_or_insert(self.next);
            }
            self.next += 1;
        }
        if parsed.is_err() {
            self.different.get_or_insert(self.next);
        }
    }

    /// The first entry that is not what the table says.
    pub(super) fn finish(self) -> Option<usize> {
        let is_short = self.next < self.index.entries.len() || self.tar.finish().is_err();
        self.different.or(is_short.then_some(self.next))
    }
}

/// Whether an index says of an entry what the tar says. An index may be unable to say a time, and one that says fewer
/// names of users loses nothing that is shown.
pub(super) fn same_entry(tar: &Entry, index: &Entry) -> bool {
    tar.name == index.name
        && tar.link == index.link
        && tar.header_offset == index.header_offset
        && tar.data_offset == index.data_offset
        && tar.size == index.size
        && tar.permissions() == index.permissions()
        && same_time(tar.modified, index.modified)
        && (tar.uid, tar.gid, tar.kind) == (index.uid, index.gid, index.kind)
        && tar.device() == index.device()
        && tar.sparse() == index.sparse()
        && tar.xattrs().eq(index.xattrs())
}

/// Whether an index says the time that the tar says, as far as a zTOC can: its text knows no years beyond 9999, and
/// offsets of time zones in minutes only, so the zones of a hundred years ago lose up to a minute.
fn same_time(tar: Option<Timestamp>, index: Option<Timestamp>) -> bool {
    match (tar, index) {
        (_, None) => true,
        (None, Some(_)) => false,
        (Some(tar), Some(index)) => tar.nanoseconds == index.nanoseconds && tar.seconds.abs_diff(index.seconds) < 60,
    }
}
