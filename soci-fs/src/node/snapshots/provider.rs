//! The seam between snapshots and layers: a provider makes the files of a layer visible without containerd unpacking
//! them.
//!
//! The store of snapshots decides *that* a snapshot is to stand on a layer and remembers it; a provider knows images,
//! registries and mounts. It names a layer by a *slot*, a number that means the same after a restart.

#[cfg(test)]
pub(crate) mod none;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;

use futures_util::future::BoxFuture;

use crate::tree::id_map::IdMap;

/// Makes layers visible.
pub trait LayerProvider: Send + Sync + fmt::Debug + 'static {
    /// Makes the layer that the labels describe available, or says why containerd should do it.
    ///
    /// It runs with no lock held, and several of them at once; it may be dropped half-way, when the client gives up.
    fn provide<'a>(&'a self, request: &'a LayerRequest) -> BoxFuture<'a, Provided>;

    /// The directory that shows a layer, to be a lower directory of an overlay; with mapped owners, if `id_map` is the
    /// number of a mapping.
    fn lower_directory(&self, slot: u16, id_map: Option<u8>) -> PathBuf;

    /// A directory to be the lowest one of an overlay that stands on a layer, for what the directory of the layer itself
    /// does not show: the layer's state.
    fn state_directory(&self, _slot: u16) -> Option<PathBuf> {
        None
    }

    /// A number for a mapping of owners, which means the same after a restart.
    ///
    /// # Errors
    /// Why there is none, in words.
    fn assign_id_map(&self, map: &IdMap) -> Result<u8, String>;

    /// The mapping with a number.
    fn id_map(&self, number: u8) -> Option<IdMap>;

    /// No snapshot refers to other mappings than these. Never called while a number is being assigned.
    fn keep_id_maps(&self, used: &BTreeSet<u8>);

    /// No snapshot refers to the layer any more. Never called while a [`LayerProvider::provide`] is in progress, so
    /// that a layer just promised is not taken away; it must not wait for anything, because the next one waits for it.
    fn release(&self, slot: u16);
}

/// What containerd asks for when it prepares a snapshot to unpack a layer into.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerRequest {
    /// The namespace of the client, if it is known.
    pub namespace: Option<String>,
    /// Key of the snapshot that would be unpacked into.
    pub key: String,
    /// Name of the snapshot below; empty for the lowest layer.
    pub parent: String,
    /// All labels of the request. They are untrusted input.
    pub labels: BTreeMap<String, String>,
}

/// What a provider says to a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Provided {
    /// The layer can be read.
    Layer {
        /// Its number.
        slot: u16,
        /// Whether it was fetched whole, instead of being read lazily.
        is_whole: bool,
    },
    /// containerd should download and unpack it.
    Leave {
        /// Why, for the log.
        reason: String,
    },
}
