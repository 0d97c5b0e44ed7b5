//! How long the steps took that come before a layer can be read, and the requests for its bytes: the times that AWS's
//! snapshotter has under the same names.

use std::sync::atomic::AtomicU64;

use super::Histogram;

/// Times of one process. Openers, readers and the mount note theirs here.
#[derive(Debug, Default)]
pub struct Stages {
    /// To find the index of an image and fetch it with the zTOCs of the image's layers, where it has one.
    pub index_fetch: Histogram,
    /// To fetch one part of an index: a zTOC or a TOC.
    pub table_fetch: Histogram,
    /// To decode a zTOC or a TOC.
    pub table_decode: Histogram,
    /// To build the tree of a layer's files.
    pub tree: Histogram,
    /// To show a layer in the mount, once its tree is built.
    pub mount: Histogram,
    /// Layers that an index names, and that were fetched whole because they could not be read by it.
    pub fallbacks: AtomicU64,
    /// From a request for spans of a layer until the answer begins.
    pub requests: Histogram,
}

impl Stages {
    /// The lines of all.
    pub(super) fn write(&self, text: &mut String) {
        for (operation, times) in [
            ("soci_index_fetch", &self.index_fetch),
            ("ztoc_fetch", &self.table_fetch),
            ("ztoc_unmarshal", &self.table_decode),
            ("init_metadata_store", &self.tree),
            ("fuse_mount", &self.mount),
            ("remote_registry_get", &self.requests),
            // The manifest has the size, so it is never asked for.
            ("get_layer_size", &Histogram::default()),
        ] {
            times.write(text, operation);
        }
    }
}
