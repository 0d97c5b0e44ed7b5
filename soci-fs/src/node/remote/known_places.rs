//! Where else an image was pulled from, by containerd's word.
//!
//! containerd does not ask for a layer whose chain id it has, so an image that is pulled from a second repository may
//! use our snapshots without a word to us. But it notes on the manifest every repository that it was pulled from. When
//! no known origin of a layer delivers, that is looked up; what is found becomes an origin of the slot like any other.
//!
//! A read of a container's waits for containerd here, which answers from its own store and reads nothing of ours. It is
//! asked when a read would otherwise fail, for a few seconds at most, and not again soon.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use soci_index::format::digest::Digest;
use soci_index::format::model::Descriptor;
use soci_index::format::reference::Reference;
use soci_index::image::ImageSource;

use crate::layer::reader::LayerReader;
use crate::layer::source::Source;
use crate::layer::source::image::ImageBlob;
use crate::layer::source::origins::MoreOrigins;
use crate::node::grpc::containerd::{Containerd, ContainerdError};
use crate::node::remote::Registries;
use crate::node::remote::slots::{SlotOrigin, Slots};

/// How long containerd may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// containerd, as far as it knows where images were pulled from.
#[derive(Debug, Clone)]
pub struct KnownPlaces {
    socket: PathBuf,
    slots: Arc<Slots>,
    registries: Arc<Registries>,
}

impl KnownPlaces {
    /// Asks the containerd at `socket`.
    #[must_use]
    pub const fn new(socket: PathBuf, slots: Arc<Slots>, registries: Arc<Registries>) -> Self {
        Self { socket, slots, registries }
    }

    /// Has them searched when no origin of a slot's layer delivers, nor any of its windows.
    pub(super) fn attach(&self, slot: u16, reader: &LayerReader) {
        let search = |blob: Option<Descriptor>| Arc::new(Search { places: self.clone(), slot, blob });
        reader.fetching().source().search_by(search(None));
        if let Some(windows) = reader.fetching().windows() {
            let blob = reader
                .store()
                .record()
                .and_then(|record| record.table_kept)
                .as_ref()
                .and_then(crate::open::windows_blob);
            if let Some(blob) = blob {
                windows.search_by(search(Some(blob)));
            }
        }
    }

    /// The repositories that a manifest was pulled from.
    async fn of_manifest(&self, manifest: &Digest) -> Result<Vec<(String, String)>, ContainerdError> {
        let containerd = Containerd::connect(&self.socket, "default").await?;
        let mut places = BTreeSet::new();
        for namespace in containerd.namespaces().await? {
            places.extend(containerd.in_namespace(&namespace)?.content_sources(manifest).await?);
        }
        Ok(places.into_iter().collect())
    }
}

/// A search for places of one blob of a slot.
#[derive(Debug)]
struct Search {
    places: KnownPlaces,
    slot: u16,
    /// The windows; else the layer as each image names it.
    blob: Option<Descriptor>,
}

impl MoreOrigins for Search {
    fn search(&self) -> BoxFuture<'_, Vec<(String, Arc<dyn Source>)>> {
        async move {
            match tokio::time::timeout(PATIENCE, self.found()).await {
                Ok(found) => found,
                Err(_) => {
                    tracing::warn!(slot = self.slot, "containerd does not say where else the image was pulled from");
                    Vec::new()
                }
            }
        }
        .boxed()
    }
}

impl Search {
    async fn found(&self) -> Vec<(String, Arc<dyn Source>)> {
        let KnownPlaces { slots, registries, .. } = &self.places;
        let Some(record) = slots.get(self.slot) else { return Vec::new() };
        let mut found = Vec::new();
        let mut seen = BTreeSet::new();
        for origin in record.origins.iter().filter(|origin| origin.layer.digest == record.claim.layer) {
            let Some(manifest) = manifest_of(origin).filter(|manifest| seen.insert(*manifest)) else { continue };
            let places = self.places.of_manifest(&manifest).await.unwrap_or_else(|error| {
                tracing::debug!(slot = self.slot, %error, "containerd cannot say where else the image was pulled from");
                Vec::new()
            });
            for (registry, repository) in places {
                let Ok(image) =
                    registries.source(&registry, &repository, manifest, &registries.allowed(&origin.headers))
                else {
                    continue;
                };
                let blob = self.blob.clone().unwrap_or_else(|| origin.layer.clone());
                found.push((image.place(), Arc::new(ImageBlob::new(image.clone(), blob)) as Arc<dyn Source>));
                self.remember(&image, manifest, origin).await;
            }
        }
        found
    }

    /// The place is an origin from now on, after a restart too.
    async fn remember(&self, image: &ImageSource, manifest: Digest, like: &SlotOrigin) {
        let origin = SlotOrigin { image: format!("{}@{manifest}", image.place()), index_from: None, ..like.clone() };
        let (slots, slot) = (Arc::clone(&self.places.slots), self.slot);
        if let Ok(Err(error)) = tokio::task::spawn_blocking(move || slots.join(slot, origin)).await {
            tracing::warn!(slot, %error, "another origin of a layer is not remembered");
        }
    }
}

fn manifest_of(origin: &SlotOrigin) -> Option<Digest> {
    match origin.image.parse() {
        Ok(Reference::Registry(image)) => image.digest(),
        _ => None,
    }
}
