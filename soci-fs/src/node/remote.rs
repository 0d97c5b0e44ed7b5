//! Brings the layers of images in registries to this node, for snapshots to stand on.
//!
//! containerd asks for one layer after another, from the lowest up, and waits for each answer. So the first question
//! about an image is taken as a question about all that will follow: its manifest and index are looked up once, and the
//! asked layer and those above it are opened at the same time. Layers that cannot be read lazily (small ones, without
//! an index, zstd) are streamed whole into the layer store meanwhile. No request is made for a layer that is here
//! already.
//!
//! What is done is remembered only when it succeeded; after a failure the next question is a new try. That an index
//! which was asked for by its digest cannot be obtained is remembered for a minute, as is that an image has none: one
//! search serves all layers of a pull. A layer that we cannot provide is left to containerd, with the reason.
//!
//! A slot is of a *claim*, not of a layer: an image gets a slot of another one only if it would have made the same
//! claim, or if what it claims (the diff_id) was proven on this node. Every image that comes to use a slot becomes an
//! origin of its bytes. A slot whose claim is condemned is handed out to no other image.
//!
//! Invariants: no lock is held while waiting or over a file; one look-up per image and one opening per layer at a time,
//! however many ask; a layer that was brought for a question still to come is not taken away before that had time to
//! come; one that is being given up is opened anew only when that is done.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, Shared};
use soci_index::format::digest::Digest;
use soci_index::format::manifest::INDEX_DIGEST;
use soci_index::format::model::Descriptor;
use soci_index::format::platform::PlatformSelection;
use soci_index::image::ImageSource;
use soci_index::registry::RequestHeaders;
use soci_index::registry::referrers::Listing;
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, watch};
use tokio::task::AbortHandle;

use crate::foresight::profile::Choice;
use crate::fuse::forest::Forest;
use crate::layer::reader::LayerReader;
use crate::layer::store::{Claim, Store};
use crate::open::{self, ImageOpener, OpenOptions};

mod ahead;
pub mod background;
pub mod elsewhere;
mod error;
pub mod id_maps;
mod identity;
pub mod known_places;
pub mod labels;
mod provide;
mod registries;
mod reopen;
mod shown;
pub mod slots;
mod sweep;
pub mod trees;

pub use ahead::{NotNoted, ProfileOptions};
pub use error::RemoteError;
pub use provide::Counted;
pub use registries::Registries;
pub use reopen::Reopener;

use id_maps::IdMaps;
use identity::origin_of;
use known_places::KnownPlaces;
use labels::WantedLayer;
use parking_lot::Mutex;
use slots::{SlotRecord, Slots};
use trees::Trees;

/// How long it is believed that an image has no index that may be used: long enough for all questions of one pull.
const INDEXLESS_LIFE: Duration = Duration::from_secs(60);

/// How to provide layers.
#[derive(Debug, Clone)]
pub struct RemoteOptions {
    /// How images are opened. A snapshot's own label overrides `index`.
    pub open: OpenOptions,
    /// Images whose manifest and index are remembered.
    pub images_max: usize,
    /// Layers that are opened or fetched at the same time, over all images.
    pub layers_at_once: usize,
    /// How long a layer that is read lazily may take to open.
    pub open_limit: Duration,
    /// Where the forest is mounted.
    pub mountpoint: PathBuf,
    /// Shows layers by file systems of the kernel, where that is possible.
    pub trees: Option<Arc<Trees>>,
    /// What is done with start-up profiles.
    pub profiles: ProfileOptions,
    /// Bytes that the local index store may take.
    pub index_quota: u64,
    /// Whether images are left to containerd unless their index is named by a label.
    pub only_named: bool,
    /// Where else images were pulled from; `None` asks only the places that containerd has named.
    pub known_places: Option<KnownPlaces>,
}

type Failure = Arc<RemoteError>;
type Underway<T> = Shared<BoxFuture<'static, Result<T, Failure>>>;

/// What is asked about an image.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct ImageKey {
    registry: String,
    repository: String,
    manifest: Digest,
    index: Option<Digest>,
    /// What is sent with the requests.
    headers: RequestHeaders,
}

impl fmt::Display for ImageKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}@{}", self.registry, self.repository, self.manifest)
    }
}

/// The layers of images in registries. Clones share everything.
#[derive(Clone)]
pub struct RemoteLayers(Arc<Inner>);

struct Inner {
    forest: Arc<Forest>,
    store: Arc<Store>,
    slots: Arc<Slots>,
    id_maps: IdMaps,
    options: RemoteOptions,
    registries: Arc<Registries>,
    runtime: Handle,
    gate: Semaphore,
    /// For layers that are fetched ahead by prefetch artifacts.
    prefetching: Semaphore,
    state: Mutex<RemoteState>,
    start_ups: ahead::StartUps,
}

/// An image that was looked up.
struct LookUp {
    key: ImageKey,
    since: Instant,
    found: Underway<Arc<ImageOpener>>,
}

/// A layer that is being opened, or was.
struct Bringing {
    underway: Underway<u16>,
    /// Held by every question for which the layer is needed, or will be.
    wanted: Arc<()>,
    /// When it was last asked for.
    asked: Instant,
    work: AbortHandle,
}

impl Bringing {
    /// True if no caller has waited for it for this long.
    fn is_idle(&self, life: Duration) -> bool {
        !self.work.is_finished() && Arc::strong_count(&self.wanted) == 1 && self.asked.elapsed() >= life
    }
}

impl LookUp {
    fn is_good(&self, key: &ImageKey) -> bool {
        // An index, or a signature of it, may have been added meanwhile.
        let indexless = match self.found.peek() {
            Some(Ok(image)) => image.index().is_none() || image.doubt().is_some(),
            Some(Err(_)) => true,
            None => false,
        };
        self.key == *key && !(indexless && self.since.elapsed() > INDEXLESS_LIFE)
    }
}

#[derive(Default)]
struct RemoteState {
    /// In the order of their last use.
    images: Vec<LookUp>,
    layers: HashMap<Claim, Bringing>,
    /// Slots that were not asked for yet, and since when.
    unclaimed: HashMap<u16, Instant>,
    /// Claims of slots that are being given up; the channel closes when that is done.
    leaving: HashMap<Claim, watch::Receiver<()>>,
}

impl RemoteLayers {
    /// Provides layers through `forest`, and registers in it what was provided before.
    ///
    /// # Errors
    /// [`RemoteError::Forest`] when the forest does not take what was there.
    pub fn new(
        forest: Arc<Forest>,
        store: Arc<Store>,
        slots: Arc<Slots>,
        id_maps: IdMaps,
        registries: Arc<Registries>,
        options: RemoteOptions,
        runtime: Handle,
    ) -> Result<Self, RemoteError> {
        for (number, map) in id_maps.all() {
            forest.define_id_map(number, map)?;
        }
        for (slot, record) in slots.all() {
            forest.expect(slot, record.claim.layer)?;
        }
        let gate = Semaphore::new(options.layers_at_once.max(1));
        let prefetching = Semaphore::new(options.profiles.prefetch_layers.unwrap_or(Semaphore::MAX_PERMITS).max(1));
        Ok(Self(Arc::new(Inner {
            forest,
            store,
            slots,
            id_maps,
            options,
            registries,
            runtime,
            gate,
            prefetching,
            state: Mutex::default(),
            start_ups: ahead::StartUps::default(),
        })))
    }

    /// Makes the layer that `labels` describe available, and says in which slot it is.
    ///
    /// # Errors
    /// [`RemoteError`]: the layer is containerd's to fetch.
    pub async fn provide(&self, labels: &BTreeMap<String, String>) -> Result<u16, Failure> {
        let wanted = WantedLayer::of(labels).map_err(RemoteError::from)?;
        let key = ImageKey {
            registry: wanted.image.registry().to_owned(),
            repository: wanted.image.repository().to_owned(),
            manifest: wanted.manifest,
            index: wanted.index,
            headers: self.0.registries.allowed(&wanted.headers),
        };
        if self.0.options.only_named && key.index.is_none() {
            return Err(RemoteError::Off.into());
        }
        if let Some(slot) = self.of_same_image(&key, &wanted.layer).and_then(|slot| self.take(slot)) {
            return Ok(slot);
        }
        let image = self.image(&key).await?;
        let layers = &image.image().manifest.layers;
        let first = layers.iter().position(|layer| layer.digest == wanted.layer);
        let Some(first) = first else {
            return Err(RemoteError::NoLayer { image: key.to_string(), layer: wanted.layer }.into());
        };
        // All of them are wanted for as long as this question is: the next ones will be asked for later.
        let brought = (first..layers.len()).map(|position| self.bring(&key, &image, position));
        let brought: Vec<_> = brought.collect::<Result<_, _>>()?;
        self.run_ahead(&key, &image, brought.iter().map(|(underway, _)| underway.clone()).collect());
        let Some((underway, _)) = brought.first() else { return Err(RemoteError::Abandoned.into()) };
        let slot = underway.clone().await?;
        self.join_all(&key, &image, slot, &wanted.layer).await;
        // The slot may have been reclaimed concurrently.
        self.take(slot).ok_or_else(|| RemoteError::Abandoned.into())
    }

    /// Whether the layer that labels describe is here, or being opened, already.
    fn is_under_way(&self, labels: &BTreeMap<String, String>) -> bool {
        let Ok(wanted) = WantedLayer::of(labels) else { return false };
        let is_known = self.0.slots.all().iter().any(|(_, record)| record.claim.layer == wanted.layer);
        is_known || self.0.state.lock().layers.keys().any(|claim| claim.layer == wanted.layer)
    }

    /// Whether the layer in a slot was fetched whole, instead of being read lazily.
    fn is_whole(&self, slot: u16) -> bool {
        self.0.slots.get(slot).is_some_and(|record| record.claim.table.is_none())
    }

    /// Takes a slot away, with what is stored of its layer. The disk is freed a little later. Blocks.
    pub fn release(&self, slot: u16) {
        self.take_away(|_| vec![slot]);
    }

    /// Takes all slots away but these. For the start, when a process before may have left some.
    pub fn keep_only(&self, used: &BTreeSet<u16>) {
        let all = self.0.slots.all().into_iter().map(|(slot, _)| slot);
        let unused: Vec<u16> = all.filter(|slot| !used.contains(slot)).collect();
        self.take_away(|_| unused);
    }

    /// Whether the layer of a slot is still being opened: it may yet turn out to be containerd's.
    fn is_being_opened(&self, slot: u16) -> bool {
        let Some(record) = self.0.slots.get(slot) else { return false };
        self.0.state.lock().layers.get(&record.claim).is_some_and(|bringing| !bringing.work.is_finished())
    }

    /// Hands out a slot that can be read.
    fn take(&self, slot: u16) -> Option<u16> {
        // A slot is on disk a moment before it can be read.
        let mut state = self.0.state.lock();
        let slot = Some(slot).filter(|slot| self.0.forest.has(*slot))?;
        state.unclaimed.remove(&slot);
        Some(slot)
    }

    /// The image, looked up once.
    async fn image(&self, key: &ImageKey) -> Result<Arc<ImageOpener>, Failure> {
        let underway = {
            let mut state = self.0.state.lock();
            let look_up = match state.images.iter().position(|known| known.is_good(key)) {
                Some(position) => state.images.remove(position),
                None => {
                    let (this, wanted) = (self.clone(), key.clone());
                    let found = async move { this.look_up(&wanted).await.map(Arc::new).map_err(Arc::new) };
                    LookUp { key: key.clone(), since: Instant::now(), found: self.spawned(found).0 }
                }
            };
            let underway = look_up.found.clone();
            state.images.retain(|known| known.key != *key);
            state.images.push(look_up);
            let surplus = state.images.len().saturating_sub(self.0.options.images_max.max(1));
            state.images.drain(..surplus);
            underway
        };
        let found = underway.await;
        if found.as_ref().is_err_and(|error| !error.is_lasting()) {
            self.0.state.lock().images.retain(|known| known.key != *key);
        }
        found
    }

    async fn look_up(&self, key: &ImageKey) -> Result<ImageOpener, RemoteError> {
        let source = self.0.registries.source(&key.registry, &key.repository, key.manifest, &key.headers)?;
        let listing = self.listing(&source, key);
        let mut tried = None;
        let found = async {
            let image = source.resolve(&PlatformSelection::Host).await?.pop();
            let image = image.ok_or_else(|| RemoteError::NoImage { image: key.to_string() })?;
            let index_repositories = self.0.registries.index_repositories(&key.registry, &key.repository)?;
            let profile = if self.0.options.profiles.replay { Choice::Default } else { Choice::None };
            let open = self.0.options.open.clone();
            let annotated = || image.manifest.annotations.get(INDEX_DIGEST)?.parse().ok();
            if let Some(digest) = key.index.or_else(|| annotated().filter(|_| open.modes.annotated)) {
                tried = Some(digest);
                announce(&digest, key);
            }
            let options = OpenOptions { index: key.index, index_repositories, listing, profile, ..open };
            let (store, runtime) = (Arc::clone(&self.0.store), self.0.runtime.clone());
            Ok(ImageOpener::new(source, image, store, options, runtime).await?)
        };
        let limit = self.0.options.open_limit;
        let found: Result<ImageOpener, RemoteError> = match tokio::time::timeout(limit, found).await {
            Ok(found) => found,
            Err(_) => Err(RemoteError::Deadline { what: key.to_string(), limit }),
        };
        match found.as_ref().map(ImageOpener::index) {
            Ok(Some(digest)) if tried != Some(digest) => announce(&digest, key),
            Ok(None) => tracing::info!(image = %key, "no valid SOCI index found"),
            Ok(Some(_)) | Err(_) => {}
        }
        found
    }

    /// Starts the referrers lookup of an image early, if its result will be needed, while its own documents are being
    /// fetched.
    fn listing(&self, source: &ImageSource, key: &ImageKey) -> Option<Arc<Listing>> {
        let RemoteOptions { open, profiles, .. } = &self.0.options;
        let is_wanted = profiles.replay || open.modes.referring && key.index.is_none();
        is_wanted.then(|| open::ask_early(source, key.manifest, &self.0.runtime))?
    }

    /// Starts to open a layer unless that is in progress or done.
    fn bring(
        &self,
        key: &ImageKey,
        image: &Arc<ImageOpener>,
        position: usize,
    ) -> Result<(Underway<u16>, Arc<()>), RemoteError> {
        let (layer, diff_id) =
            match (image.image().manifest.layers.get(position), image.image().config.diff_ids.get(position)) {
                (Some(layer), Some(diff_id)) => (layer.clone(), *diff_id),
                _ => return Err(RemoteError::Abandoned),
            };
        let claim = image.claim(&layer, diff_id);
        let mut state = self.0.state.lock();
        // A failure is worth another try, and what turned out to be a lie is worth another way.
        let is_good = |known: &&mut Bringing| match known.underway.peek() {
            None => true,
            Some(Ok(slot)) => self.is_believed(*slot),
            Some(Err(_)) => false,
        };
        if let Some(bringing) = state.layers.get_mut(&claim).filter(is_good) {
            bringing.asked = Instant::now();
            return Ok((bringing.underway.clone(), Arc::clone(&bringing.wanted)));
        }
        let (this, key, image) = (self.clone(), key.clone(), Arc::clone(image));
        let open = async move { this.open(&key, &image, layer, diff_id).await.map_err(Arc::new) };
        let (underway, work) = self.spawned(open);
        let wanted = Arc::new(());
        let bringing =
            Bringing { underway: underway.clone(), wanted: Arc::clone(&wanted), asked: Instant::now(), work };
        state.layers.insert(claim, bringing);
        Ok((underway, wanted))
    }

    async fn open(
        &self,
        key: &ImageKey,
        image: &ImageOpener,
        layer: Descriptor,
        diff_id: Digest,
    ) -> Result<u16, RemoteError> {
        self.until_left(&layer.digest, &diff_id).await;
        if let Some(slot) = self.shared_slot(image, &layer, diff_id).await {
            return Ok(slot);
        }
        let _permit = self.0.gate.acquire().await.map_err(|_| RemoteError::Abandoned)?;
        let opened = image.open_layer(&layer, diff_id).await?;
        tracing::debug!(layer = %layer.digest, way = ?opened.note.way, "a layer is open");
        let origin = origin_of(key, image, &layer, opened.index_from.as_ref());
        let record = SlotRecord { claim: opened.claim, origins: vec![origin] };
        // Under the same claim as another image after all, once its table was looked at.
        let known = self.0.slots.find(&opened.claim).filter(|slot| self.is_believed(*slot));
        let slots = Arc::clone(&self.0.slots);
        let assigned = tokio::task::spawn_blocking(move || slots.assign(record)).await;
        let slot = assigned.map_err(|_| RemoteError::Abandoned)??;
        if known == Some(slot) && self.0.forest.has(slot) {
            return Ok(slot);
        }
        self.0.state.lock().unclaimed.insert(slot, Instant::now());
        let added = self.add_to_forest(slot, opened.reader).await;
        if added.is_err() {
            self.0.forest.remove(slot);
            let slots = Arc::clone(&self.0.slots);
            let released = tokio::task::spawn_blocking(move || slots.release(slot)).await;
            released.map_err(|_| RemoteError::Abandoned)??;
        }
        added.map(|()| slot)
    }

    async fn add_to_forest(&self, slot: u16, reader: LayerReader) -> Result<(), RemoteError> {
        let (forest, layer) = (Arc::clone(&self.0.forest), reader.digest());
        if let Some(places) = &self.0.options.known_places {
            places.attach(slot, &reader);
        }
        let inserted = tokio::task::spawn_blocking(move || forest.insert(slot, reader));
        inserted.await.map_err(|_| RemoteError::Abandoned)??;
        match self.0.forest.hidden_links(slot) {
            None | Some(0) => {}
            Some(links) => return Err(RemoteError::LowerLinks { layer, links }),
        }
        self.show(slot).await;
        Ok(())
    }

    /// Work that continues after its caller is gone.
    fn spawned<T: Clone + Send + Sync + 'static>(
        &self,
        work: impl Future<Output = Result<T, Failure>> + Send + 'static,
    ) -> (Underway<T>, AbortHandle) {
        let task = self.0.runtime.spawn(work);
        let handle = task.abort_handle();
        (async move { task.await.unwrap_or_else(|_| Err(RemoteError::Abandoned.into())) }.boxed().shared(), handle)
    }
}

impl fmt::Debug for RemoteLayers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RemoteLayers").field("options", &self.0.options).finish_non_exhaustive()
    }
}

/// Logs which index is fetched for an image, in the words of AWS's daemon.
fn announce(digest: &Digest, image: &ImageKey) {
    tracing::info!(%digest, %image, "fetching SOCI artifacts using index descriptor");
}
