//! Opens a layer again from what is on this node: its directory in the store is enough, and no registry is asked until
//! a byte is missing.

use std::sync::Arc;

use soci_index::format::model::Descriptor;
use soci_index::image::ImageSource;
use tokio::runtime::Handle;

use crate::layer::reader::LayerReader;
use crate::layer::source::Source;
use crate::layer::source::image::ImageBlob;
use crate::layer::source::origins::Origins;
use crate::layer::store::{Claim, Condemned, Record, Store};
use crate::open::layer::{Stored, origins, stored, windows_of};
use crate::open::trust::Provisional;
use crate::open::{OpenError, OpenOptions};

/// An image that uses a layer, as one place from which its parts can be obtained.
#[derive(Debug, Clone)]
pub struct LayerOrigin {
    pub image: ImageSource,
    /// The layer as that image names it.
    pub layer: Descriptor,
    /// Where the parts of its index are, if they are not beside the image.
    pub index_from: Option<ImageSource>,
}

impl LayerOrigin {
    /// Its name among the origins of the layer.
    fn name(&self) -> String {
        self.image.place()
    }

    fn blob(&self) -> Arc<dyn Source> {
        Arc::new(ImageBlob::new(self.image.clone(), self.layer.clone()))
    }

    /// Adds it to the places of a layer that is open already.
    pub fn join(&self, reader: &LayerReader) {
        // Another blob with the same tar has no spans for this layer's table.
        if self.layer.digest == reader.digest() {
            reader.fetching().source().add(self.name(), self.blob());
        }
        let Some(windows) = reader.fetching().windows() else { return };
        let record = reader.store().record();
        let places = self.index_from.iter().chain([&self.image]);
        let Some(blob) = record.and_then(|record| crate::open::find::windows_blob(record.table_kept.as_ref()?)) else {
            return;
        };
        for place in places {
            windows.add(place.place(), Arc::new(ImageBlob::new(place.clone(), blob.clone())));
        }
    }
}

/// A layer that was open before.
#[derive(Debug, Clone)]
pub struct KeptLayer {
    pub claim: Claim,
    /// Where its parts can be obtained. No request is made until one is missing.
    pub origins: Vec<LayerOrigin>,
}

/// Opens a layer again from what is on this node; `None` when the node no longer has what that takes, or may not use
/// it.
///
/// # Errors
/// [`OpenError`] when the local stores cannot be read; [`OpenError::Condemned`] for a claim that failed its proof.
pub async fn reopen_layer(
    kept: &KeptLayer,
    store: &Arc<Store>,
    options: &OpenOptions,
    runtime: &Handle,
) -> Result<Option<LayerReader>, OpenError> {
    let claim = kept.claim;
    if let Some(reason) = store.condemned(Condemned::Claim(claim.id())) {
        return Err(OpenError::Condemned { layer: Box::new(claim.layer), reason });
    }
    let Some(Stored { index, store, record }) = stored(store, claim).await? else { return Ok(None) };
    // Whether the index was signed is not kept, for the trusted keys may have changed.
    let may_be_used = store.is_proven() || options.trust.provisional() == Provisional::Allow && claim.table.is_some();
    if !may_be_used || claim.table.is_none() && store.is_pinned() && !store.is_complete() {
        return Ok(None);
    }
    // An image with another blob of the same tar could not fetch again what is lost.
    if kept.origins.iter().any(|origin| origin.layer.digest != claim.layer) && store.is_complete() {
        store.pin();
    }
    let own = kept.origins.iter().filter(|origin| origin.layer.digest == claim.layer);
    let Some(source) = origins(own.map(|origin| (origin.name(), origin.blob()))).or_else(|| any_origin(kept)) else {
        return Ok(None);
    };
    crate::layer::limits::count(&index);
    let local = local_place(&record, options).await?;
    let places = kept.origins.iter().flat_map(|origin| origin.index_from.iter().chain([&origin.image]));
    let windows = windows_of(&record, local.iter().chain(places));
    let reader = LayerReader::with_windows(claim.layer, index, store, source, windows, options.policy, runtime);
    reader.fetching().note_times(&options.stages);
    Ok(Some(reader))
}

/// The local index store, if it has the windows of a layer.
async fn local_place(record: &Record, options: &OpenOptions) -> Result<Option<ImageSource>, OpenError> {
    let windows = record.table_kept.as_ref().and_then(crate::open::find::windows_blob);
    let (Some(windows), Some(directory)) = (windows, &options.index_store) else { return Ok(None) };
    let layout = crate::open::find::open_layout(directory).await?;
    Ok(layout.has_blob(&windows.digest).then(|| ImageSource::of_layout(&layout)))
}

/// Images that have another blob with the same tar: it is here whole, so there is hardly anything to ask them.
fn any_origin(kept: &KeptLayer) -> Option<Origins> {
    let blob = |origin: &LayerOrigin| {
        let blob = Descriptor { digest: kept.claim.layer, ..origin.layer.clone() };
        Arc::new(ImageBlob::new(origin.image.clone(), blob)) as Arc<dyn Source>
    };
    origins(kept.origins.iter().map(|origin| (origin.name(), blob(origin))))
}
