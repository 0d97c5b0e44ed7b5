//! Opens layers again that an earlier process provided.
//!
//! After a restart the forest knows which layers are in which slots and opens none of them; the first question about
//! one comes here. Everything that takes is on this node, so no registry is asked. Only when the layer's directory was
//! lost one of its images is looked up again, and then the network may fail: that read fails, and the next one retries.

use std::sync::Arc;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use soci_index::format::digest::Digest;
use soci_index::format::platform::PlatformSelection;
use tokio::runtime::Handle;

use crate::fuse::error::OpenError as ForestError;
use crate::fuse::forest::Opener;
use crate::layer::reader::LayerReader;
use crate::layer::store::{Claim, Store};
use crate::node::remote::identity::place_of;
use crate::node::remote::known_places::KnownPlaces;
use crate::node::remote::slots::Slots;
use crate::node::remote::trees::Trees;
use crate::node::remote::{Registries, RemoteError};
use crate::open::{ImageOpener, KeptLayer, LayerOrigin, OpenOptions, reopen_layer};

/// The [`Opener`] of a daemon's forest.
#[derive(Debug)]
pub struct Reopener {
    pub slots: Arc<Slots>,
    /// Where the layers' bytes are kept.
    pub store: Arc<Store>,
    /// How registries are reached.
    pub registries: Arc<Registries>,
    /// How layers are opened.
    pub options: OpenOptions,
    /// Where readers run their work.
    pub runtime: Handle,
    /// Where else images were pulled from.
    pub known_places: Option<KnownPlaces>,
    /// Shows layers by file systems of the kernel.
    pub trees: Option<Arc<Trees>>,
}

impl Reopener {
    async fn reopen(&self, slot: u16, digest: Digest) -> Result<LayerReader, RemoteError> {
        let record = self.slots.get(slot).filter(|record| record.claim.layer == digest);
        let record = record.ok_or_else(|| RemoteError::NoLayer { image: format!("slot {slot}"), layer: digest })?;
        let origins: Vec<_> = record.origins.iter().filter_map(|origin| place_of(origin, &self.registries)).collect();
        let kept = KeptLayer { claim: record.claim, origins };
        if let Some(reader) = reopen_layer(&kept, &self.store, &self.options, &self.runtime).await? {
            return Ok(reader);
        }
        let mut last = RemoteError::NoImage { image: record.image().to_owned() };
        // Another blob with the same tar is no way to open this one.
        for origin in kept.origins.into_iter().filter(|origin| origin.layer.digest == digest) {
            tracing::warn!(layer = %digest, origin = %origin.image, "what is kept of the layer does not suffice; asking the registry");
            match self.look_up(origin, &record.claim).await {
                Ok(reader) => return Ok(reader),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// Opens the layer as one of its images would anew. It must be what the slot has shown: the same diff_id of the
    /// same blob.
    async fn look_up(&self, origin: LayerOrigin, claim: &Claim) -> Result<LayerReader, RemoteError> {
        let no_image = || RemoteError::NoImage { image: origin.image.to_string() };
        let image = origin.image.resolve(&PlatformSelection::Host).await?.pop().ok_or_else(no_image)?;
        let layers = image.manifest.layers.iter().zip(&image.config.diff_ids);
        let is_claimed =
            layers.into_iter().any(|(layer, diff_id)| (layer.digest, *diff_id) == (claim.layer, claim.diff_id));
        if !is_claimed {
            return Err(RemoteError::NoLayer { image: origin.image.to_string(), layer: claim.layer });
        }
        let (store, options) = (Arc::clone(&self.store), self.options.clone());
        let image = ImageOpener::new(origin.image.clone(), image, store, options, self.runtime.clone()).await?;
        Ok(image.open_layer(&origin.layer, claim.diff_id).await?.reader)
    }
}

impl Opener for Reopener {
    fn open(&self, slot: u16, digest: Digest) -> BoxFuture<'_, Result<LayerReader, ForestError>> {
        let failed = move |error| ForestError::Failed { digest, cause: Arc::new(error) };
        let attach = move |reader: LayerReader| {
            if let Some(places) = &self.known_places {
                places.attach(slot, &reader);
            }
            if self.trees.as_ref().is_some_and(|trees| trees.is_whole(slot)) {
                // The kernel reads it, as it has since a process before: nothing of it may be evicted.
                let _ = reader.store().lend();
            }
            reader
        };
        self.reopen(slot, digest).map(move |opened| opened.map(attach).map_err(failed)).boxed()
    }

    fn distrusted(&self, slot: u16) {
        if let Some(trees) = self.trees.clone() {
            // Pages that the kernel has are shown until the last user of the mount is gone; no other gets in.
            drop(self.runtime.spawn_blocking(move || trees.hide(slot)));
        }
    }
}
