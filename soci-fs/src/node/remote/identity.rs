//! Which slot an image may share, and what it adds to one: the rule that nothing one image claims reaches another.
//!
//! | the slot | is shared with an image |
//! |---|---|
//! | of the same image in the same repository | always: the manifest fixes every claim |
//! | of a proven layer | if it claims the same diff_id; with another blob, if all of the layer is here |
//! | of a layer that is not proven | if it would have made the same claim by itself |
//! | whose claim is condemned | never |

use soci_index::format::digest::Digest;
use soci_index::format::model::Descriptor;
use soci_index::format::reference::Reference;
use soci_index::image::ImageSource;

use crate::layer::store::{Claim, Condemned};
use crate::node::remote::slots::{SlotOrigin, SlotRecord};
use crate::node::remote::{ImageKey, Registries, RemoteLayers};
use crate::open::{ImageOpener, LayerOrigin};

/// What an image adds to the slot of a layer.
pub(super) fn origin_of(
    key: &ImageKey,
    image: &ImageOpener,
    layer: &Descriptor,
    index_from: Option<&ImageSource>,
) -> SlotOrigin {
    let index_from = index_from.map(|from| from.place());
    let headers = key.headers.iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    SlotOrigin { image: key.to_string(), layer: layer.clone(), index: image.index(), index_from, headers }
}

/// A recorded origin as a place to fetch from; `None` when its name makes no sense.
pub(super) fn place_of(origin: &SlotOrigin, registries: &Registries) -> Option<LayerOrigin> {
    let Ok(Reference::Registry(image)) = origin.image.parse() else { return None };
    let manifest = image.digest()?;
    let headers = registries.allowed(&origin.headers);
    let source = |registry: &str, repository: &str| registries.source(registry, repository, manifest, &headers);
    let index_from = origin.index_from.as_deref().and_then(|place| match place.parse() {
        Ok(Reference::Registry(place)) => source(place.registry(), place.repository()).ok(),
        _ => None,
    });
    let image = source(image.registry(), image.repository());
    let image =
        image.inspect_err(|error| tracing::warn!(origin = origin.image, %error, "an origin is left out")).ok()?;
    Some(LayerOrigin { image, layer: origin.layer.clone(), index_from })
}

impl RemoteLayers {
    /// The slot that this very image uses for a layer already: no look-up is needed to know what it claims.
    pub(super) fn of_same_image(&self, key: &ImageKey, layer: &Digest) -> Option<u16> {
        let all = self.0.slots.of_image(&key.to_string(), layer).into_iter();
        // One that insists on an index gets what was opened by it.
        let fits = all.filter(|(_, origin)| key.index.is_none() || key.index == origin.index);
        let mut fits = fits.map(|(slot, _)| slot).filter(|slot| self.is_believed(*slot) && self.0.forest.has(*slot));
        fits.next().filter(|slot| !self.is_being_opened(*slot))
    }

    /// Whether the slot's claim is not condemned.
    pub(super) fn is_believed(&self, slot: u16) -> bool {
        let Some(SlotRecord { claim, .. }) = self.0.slots.get(slot) else { return false };
        let is_condemned = || self.0.store.condemned(Condemned::Claim(claim.id())).is_some();
        self.0.forest.reader(slot).map_or_else(|| !is_condemned(), |reader| reader.health().condemned().is_none())
    }

    /// The slot that an image may share for one of its layers, if there is one.
    pub(super) async fn shared_slot(&self, image: &ImageOpener, layer: &Descriptor, diff_id: Digest) -> Option<u16> {
        let usable = |claim: &Claim| {
            let slot = self.0.slots.find(claim)?;
            (self.is_believed(slot) && self.0.forest.has(slot)).then_some(slot)
        };
        for claim in self.0.store.proven(&diff_id) {
            let Some(slot) = usable(&claim) else { continue };
            if claim.layer == layer.digest || self.is_here_whole(slot).await {
                return Some(slot);
            }
        }
        usable(&image.claim(layer, diff_id))
    }

    /// Whether all of a proven layer is here; it stays then, since the image that asks has another blob.
    async fn is_here_whole(&self, slot: u16) -> bool {
        if self.0.forest.open(slot).await.is_err() {
            return false;
        }
        let Some(reader) = self.0.forest.reader(slot) else { return false };
        reader.store().pin();
        let is_whole = reader.store().is_proven() && reader.store().is_complete();
        if !is_whole {
            reader.store().unpin();
        }
        is_whole
    }

    /// Makes an image an origin of the slot that it was given, and of all others that it shares: containerd asks only
    /// for layers that it does not have yet.
    pub(super) async fn join_all(&self, key: &ImageKey, image: &ImageOpener, given: u16, layer: &Digest) {
        let layers = image.image().manifest.layers.iter().zip(&image.image().config.diff_ids);
        for (other, diff_id) in layers {
            let slot =
                if other.digest == *layer { Some(given) } else { self.shared_slot(image, other, *diff_id).await };
            let Some(slot) = slot else { continue };
            let origin = origin_of(key, image, other, image.index_from().as_ref());
            if let (Some(reader), Some(place)) = (self.0.forest.reader(slot), place_of(&origin, &self.0.registries)) {
                place.join(&reader);
            }
            let slots = std::sync::Arc::clone(&self.0.slots);
            let joined = tokio::task::spawn_blocking(move || slots.join(slot, origin)).await;
            if let Ok(Err(error)) = joined {
                tracing::warn!(slot, image = %key, %error, "the image is not remembered as an origin of a layer");
            }
        }
    }
}
