//! Which indexes are used, and what becomes of layers without. Defaults are those of AWS's snapshotter 0.16, but for
//! version 1.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use soci_fs::open::IndexModes;

use crate::daemon::config::{LeaveUnindexed, Size};

/// Which indexes are used, and what becomes of layers without.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PullModes {
    /// Leave layers that cannot be read lazily to containerd, instead of fetching them in parallel into the layer store:
    /// `true`, each such layer; `"images"`, those of images without a usable index, while layers that an index leaves out
    /// are fetched. The latter is what AWS's daemon does, and the default of a file that has `pull_modes.soci_v1` or
    /// `pull_modes.soci_v2`, unless `parallel_pull_unpack` asks for all layers to be fetched (`enable`,
    /// `experimental_parallel_pull_as_fallback`).
    pub leave_unindexed: LeaveUnindexed,
    /// Fetch foreign (non-distributable) layers from the URLs that the image names. Size and digest are checked, but
    /// the image then chooses which hosts this node contacts.
    pub foreign_layers: bool,
    /// SOCI index, version 1, and span indexes.
    pub soci_v1: SociV1,
    /// SOCI index, version 2.
    pub soci_v2: SociV2,
    /// How AWS's daemon fetches whole layers; here each layer is one stream into the layer store.
    pub parallel_pull_unpack: ParallelPullUnpack,
}

impl PullModes {
    /// Decides what becomes of layers without an index when the file, whose section `given` is, does not say it.
    ///
    /// A file that chooses among versions of indexes is written for AWS's daemon, which leaves images without a usable
    /// index to containerd unless its parallel pull is on.
    pub(super) fn complete(&mut self, given: Option<&toml::Value>) {
        let names = |key: &str| given.is_some_and(|section| section.get(key).is_some());
        let parallel = &self.parallel_pull_unpack;
        let fetches = parallel.enable || parallel.experimental_parallel_pull_as_fallback;
        if !names("leave_unindexed") && (names("soci_v1") || names("soci_v2")) {
            self.leave_unindexed = if fetches { LeaveUnindexed::None } else { LeaveUnindexed::Images };
        }
    }

    /// The kinds of indexes that are looked for.
    #[must_use]
    pub fn indexes(&self) -> IndexModes {
        let is_lazy = !self.parallel_pull_unpack.enable;
        IndexModes { referring: is_lazy && self.soci_v1.enable, annotated: is_lazy && self.soci_v2.enable }
    }
}

/// Indexes that name the image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SociV1 {
    /// Use indexes that refer to the image (`subject`). AWS's default is `false`.
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
    /// Use the index that a SOCI-enabled image names.
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
    /// Fetch all layers whole into the layer store, whatever index an image has, unless a label names one.
    pub enable: bool,
    /// Downloads at the same time.
    pub max_concurrent_downloads: i64,
    /// Downloads at the same time for one image.
    pub max_concurrent_downloads_per_image: i64,
    /// Bytes of one request.
    pub concurrent_download_chunk_size: Size,
    /// Layers unpacked at the same time.
    pub max_concurrent_unpacks: i64,
    /// Layers unpacked at the same time for one image.
    pub max_concurrent_unpacks_per_image: i64,
    /// Do not keep blobs.
    pub discard_unpacked_layers: bool,
    /// Use this mode for images without an index.
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
