//! How long the steps took that come before a layer can be read, and the requests for its bytes: the times that AWS's
//! snapshotter has under the same names.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Upper bounds of the buckets, in milliseconds, as AWS has them.
const MILLISECONDS: [u64; 15] = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384];

/// How long something took, how often.
#[derive(Debug, Default)]
pub struct Histogram {
    buckets: [AtomicU64; MILLISECONDS.len()],
    count: AtomicU64,
    microseconds: AtomicU64,
}

impl Histogram {
    /// Notes one that took so long.
    pub fn record(&self, time: Duration) {
        let milliseconds = u64::try_from(time.as_micros().div_ceil(1000)).unwrap_or(u64::MAX);
        for (bucket, bound) in self.buckets.iter().zip(MILLISECONDS) {
            if milliseconds <= bound {
                bucket.fetch_add(1, Ordering::Relaxed);
            }
        }
        self.count.fetch_add(1, Ordering::Relaxed);
        let microseconds = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.microseconds.fetch_add(microseconds, Ordering::Relaxed);
    }

    /// The lines of an operation.
    pub(crate) fn write(&self, text: &mut String, operation: &str) {
        let name = "soci_fs_operation_duration_milliseconds";
        let count = self.count.load(Ordering::Relaxed);
        let labels = format!("layer=\"\",operation_type=\"{operation}\"");
        for (bucket, bound) in self.buckets.iter().zip(MILLISECONDS) {
            let _ = writeln!(text, "{name}_bucket{{{labels},le=\"{bound}\"}} {}", bucket.load(Ordering::Relaxed));
        }
        let sum = self.microseconds.load(Ordering::Relaxed) as f64 / 1000.0;
        let _ = writeln!(text, "{name}_bucket{{{labels},le=\"+Inf\"}} {count}");
        let _ = writeln!(text, "{name}_sum{{{labels}}} {sum}\n{name}_count{{{labels}}} {count}");
    }
}

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
    pub(crate) fn write(&self, text: &mut String) {
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
