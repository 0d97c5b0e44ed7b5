//! What it takes to write a layer's names into a file system of the kernel's.

use std::path::PathBuf;
use std::sync::Arc;

use soci_index::format::digest::Digest;
use soci_index::format::entry::Entry;

use crate::fuse::forest::open_layer::OpenLayer;
use crate::tree::Tree;
use crate::tree::device::{DeviceError, DeviceMap};

/// A layer's names, and where the bytes of its files are in the layer as one file.
#[derive(Debug)]
pub(crate) struct Layout(Arc<OpenLayer>);

impl Layout {
    pub(super) const fn new(layer: Arc<OpenLayer>) -> Self {
        Self(layer)
    }

    pub(crate) fn digest(&self) -> Digest {
        self.0.reader().digest()
    }

    pub(crate) fn tree(&self) -> &Tree {
        self.0.files().tree()
    }

    pub(crate) fn entries(&self) -> &[Entry] {
        &self.0.reader().index().entries
    }

    /// The file with all of the layer, if it is whole and can be a device as it is: see [`LayerStore::lend`].
    ///
    /// [`LayerStore::lend`]: crate::layer::store::LayerStore
    pub(crate) fn lend(&self) -> Option<PathBuf> {
        let store = self.0.reader().store();
        let is_device = self.device().is_ok_and(|device| device.is_plain() && device.bytes() == store.size());
        is_device.then(|| store.lend())?
    }

    pub(crate) fn device(&self) -> Result<&DeviceMap, DeviceError> {
        self.0.device().map(|device| device.map())
    }
}
