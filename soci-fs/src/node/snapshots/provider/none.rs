//! A provider without layers, for tests of what does not need any.

use std::collections::BTreeSet;
use std::path::PathBuf;

use futures_util::future::BoxFuture;

use crate::node::snapshots::provider::{LayerProvider, LayerRequest, Provided};
use crate::tree::id_map::IdMap;

/// Leaves all layers to containerd.
#[derive(Debug)]
pub(crate) struct NoLayers {
    directory: PathBuf,
}

impl NoLayers {
    /// Snapshots that stand on a layer, made in another configuration, look for it below `directory`, do not find it
    /// and say so.
    #[must_use]
    pub(crate) const fn new(directory: PathBuf) -> Self {
        Self { directory }
    }
}

impl LayerProvider for NoLayers {
    fn provide<'a>(&'a self, _: &'a LayerRequest) -> BoxFuture<'a, Provided> {
        let reason = "this daemon leaves all layers to containerd".to_owned();
        Box::pin(std::future::ready(Provided::Leave { reason }))
    }

    fn lower_directory(&self, slot: u16, _: Option<u8>) -> PathBuf {
        self.directory.join(slot.to_string())
    }

    fn assign_id_map(&self, _: &IdMap) -> Result<u8, String> {
        Err("this daemon maps no owners".to_owned())
    }

    fn id_map(&self, _: u8) -> Option<IdMap> {
        None
    }

    fn keep_id_maps(&self, _: &BTreeSet<u8>) {}

    fn release(&self, _: u16) {}
}
