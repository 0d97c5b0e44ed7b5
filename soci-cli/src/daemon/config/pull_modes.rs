//! Which indexes are used, and what becomes of layers without. Defaults are those of AWS's snapshotter 0.16, but for
//! version 1.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::daemon::config::Size;

/// Which indexes are used, and what becomes of layers without.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PullModes {
    /// Leave layers that cannot be read lazily to containerd, instead of fetching them in parallel into the layer
    /// store.
    pub leave_unindexed: bool,
    /// Fetch layers that registries need not have from the URLs that the image names.
    pub foreign_layers: bool,
    /// Indexes that name the image.
    pub soci_v1: SociV1,
    /// Indexes that the image names.
    pub soci_v2: SociV2,
    /// How whole layers are fetched by AWS.
    pub parallel_pull_unpack: ParallelPullUnpack,
}

/// Indexes that name the image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SociV1 {
    /// Use them.
    pub enable: bool,
}

impl Default for SociV1 {
    fn default() -> Self {
        Self { enable: true }
    }
}

/// Indexes that the image names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SociV2 {
    /// Use them.
    pub enable: bool,
}

impl Default for SociV2 {
    fn default() -> Self {
        Self { enable: true }
    }
}

/// How whole layers are fetched by AWS: here each is one stream into the layer store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ParallelPullUnpack {
    /// Do it.
    pub enable: bool,
    /// Downloads at the same time.
    pub max_concurrent_downloads: i64,
    /// The same for one image.
    pub max_concurrent_downloads_per_image: i64,
    /// Bytes of one request.
    pub concurrent_download_chunk_size: Size,
    /// Layers unpacked at the same time.
    pub max_concurrent_unpacks: i64,
    /// The same for one image.
    pub max_concurrent_unpacks_per_image: i64,
    /// Do not keep blobs.
    pub discard_unpacked_layers: bool,
    /// Do it where there is no index.
    pub experimental_parallel_pull_as_fallback: bool,
    /// Programs that decompress, by format.
    pub decompress_streams: BTreeMap<String, DecompressStream>,
}

impl Default for ParallelPullUnpack {
    fn default() -> Self {
        Self {
            enable: false,
            max_concurrent_downloads: -1,
            max_concurrent_downloads_per_image: 3,
            concurrent_download_chunk_size: Size::default(),
            max_concurrent_unpacks: -1,
            max_concurrent_unpacks_per_image: 1,
            discard_unpacked_layers: false,
            experimental_parallel_pull_as_fallback: false,
            decompress_streams: BTreeMap::new(),
        }
    }
}

/// A program that decompresses.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DecompressStream {
    /// The program.
    pub path: String,
    /// Its arguments.
    pub args: Vec<String>,
}
