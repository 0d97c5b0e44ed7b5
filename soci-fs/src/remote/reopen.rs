//! Opens layers again that an earlier process provided.
//!
//! After a restart the forest knows which layers are in which slots and opens none of them; the first question about
//! one comes here. Everything that takes is on this node, so no registry is asked. Only when the local index was lost
//! the image is looked up again, and then the network may fail: that read fails, and the next one tries again.

use std::sync::Arc;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use soci_index::digest::Digest;
use soci_index::image::platform::PlatformSelection;
use soci_index::image::reference::Reference;
use tokio::runtime::Handle;

use super::slots::Slots;
use super::{Registries, RemoteError};
use crate::forest::{OpenError as ForestError, Opener};
use crate::open::{ImageOpener, KeptLayer, OpenOptions, reopen_layer};
use crate::reader::LayerReader;
use crate::store::Store;

/// The [`Opener`] of a daemon's forest.
#[derive(Debug)]
pub struct Reopener {
    /// What is in which slot.
    pub slots: Arc<Slots>,
    /// Where the layers' bytes are kept.
    pub store: Arc<Store>,
    /// How registries are reached.
    pub registries: Arc<Registries>,
    /// How layers are opened.
    pub options: OpenOptions,
    /// Where readers run their work.
    pub runtime: Handle,
}

impl Reopener {
    async fn reopen(&self, slot: u16, digest: Digest) -> Result<LayerReader, RemoteError> {
        let record = self.slots.get(slot).filter(|record| record.layer.digest == digest);
        let record = record.ok_or_else(|| RemoteError::NoLayer { image: format!("slot {slot}"), layer: digest })?;
        let no_image = || RemoteError::NoImage { image: record.image.clone() };
        let (registry, repository, manifest) = match record.image.parse() {
            Ok(Reference::Registry(image)) => {
                (image.registry().to_owned(), image.repository().to_owned(), image.digest().ok_or_else(no_image)?)
            }
            _ => return Err(no_image()),
        };
        let source = self.registries.source(&registry, &repository, manifest)?;
        let kept = KeptLayer { source, layer: record.layer.clone(), ztoc: record.ztoc.clone() };
        if let Some(reader) = reopen_layer(&kept, &self.store, &self.options, &self.runtime).await? {
            return Ok(reader);
        }
        tracing::warn!(layer = %digest, image = record.image, "what is kept of the layer does not suffice; asking the registry");
        let image = kept.source.resolve(&PlatformSelection::Host).await?.pop().ok_or_else(no_image)?;
        let (store, options) = (Arc::clone(&self.store), self.options.clone());
        let image = ImageOpener::new(kept.source, image, store, options, self.runtime.clone()).await?;
        Ok(image.open_layer(&record.layer, record.diff_id).await?.reader)
    }
}

impl Opener for Reopener {
    fn open(&self, slot: u16, digest: Digest) -> BoxFuture<'_, Result<LayerReader, ForestError>> {
        let failed = move |error| ForestError::Failed { digest, cause: Arc::new(error) };
        self.reopen(slot, digest).map(move |opened| opened.map_err(failed)).boxed()
    }
}
