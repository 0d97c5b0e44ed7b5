//! Brings the layers of images in registries to this node, for snapshots to stand on.
//!
//! containerd asks for one layer after another, from the lowest up, and waits for each answer. So the first question
//! about an image is taken as a question about all that will follow: its manifest and index are looked up once, and the
//! asked layer and those above it are opened at the same time. Layers that cannot be read lazily (small ones, without an
//! index, zstd) are streamed whole into the layer store meanwhile. Nobody is asked about a layer that is here already.
//!
//! What is done is remembered only when it succeeded; who asks again after a failure gets a new try. A layer that we
//! cannot provide is left to containerd, with the reason.
//!
//! Invariants: no lock is held while waiting; one look-up per image and one opening per layer at a time, however many
//! ask; a layer that was brought for a question still to come is not taken away before that had time to come.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, Shared};
use soci_index::digest::Digest;
use soci_index::image::model::Descriptor;
use soci_index::image::platform::PlatformSelection;
use soci_index::image::reference::ManifestName;
use soci_index::image::{ImageError, ImageSource};
use soci_index::registry::{ClientOptions, Registry, RegistryError};
use tokio::runtime::Handle;
use tokio::sync::Semaphore;

use crate::forest::{Forest, PlantError};
use crate::open::{ImageOpener, OpenError, OpenOptions};
use crate::reader::LayerReader;
use crate::store::Store;

pub mod labels;
mod provide;
mod reopen;
pub mod slots;

pub use provide::Counted;
pub use reopen::Reopener;

use labels::{LabelError, WantedLayer};
use slots::{SlotError, SlotRecord, Slots};

/// How long a slot that was filled may wait to be asked for.
const UNCLAIMED_LIFE: Duration = Duration::from_secs(600);

/// How long it is believed that an image has no index: long enough for all questions of one pull.
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
}

/// Why a layer is not provided.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    /// The labels do not say which layer.
    #[error(transparent)]
    Label(#[from] LabelError),
    /// The registry cannot be set up.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The image cannot be read.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The manifest is that of no platform.
    #[error("{image} names no image that can run")]
    NoImage {
        /// The image.
        image: String,
    },
    /// The image does not have the layer.
    #[error("{image} has no layer {layer}")]
    NoLayer {
        /// The image.
        image: String,
        /// The layer.
        layer: Digest,
    },
    /// The layer cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The layer links to files of layers below it, which a single layer cannot show.
    #[error("layer {layer} has {links} hard links to files of lower layers")]
    LowerLinks {
        /// The layer.
        layer: Digest,
        /// How many.
        links: usize,
    },
    /// There is no slot to put it.
    #[error(transparent)]
    Slot(#[from] SlotError),
    /// Its files cannot be numbered.
    #[error(transparent)]
    Plant(#[from] PlantError),
    /// It took too long.
    #[error("{what} did not come within {} s", limit.as_secs())]
    Deadline {
        /// What was waited for.
        what: String,
        /// How long.
        limit: Duration,
    },
    /// The process is shutting down.
    #[error("the layer was abandoned")]
    Abandoned,
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
}

impl fmt::Display for ImageKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}@{}", self.registry, self.repository, self.manifest)
    }
}

/// The registries that were spoken to, each with its connections and tokens.
#[derive(Debug)]
pub struct Registries {
    client: ClientOptions,
    known: Mutex<HashMap<String, Registry>>,
}

impl Registries {
    /// Reaches all registries by these options.
    #[must_use]
    pub fn new(client: ClientOptions) -> Self {
        Self { client, known: Mutex::default() }
    }

    fn source(&self, registry: &str, repository: &str, manifest: Digest) -> Result<ImageSource, RegistryError> {
        let known = || self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let found = known().get(registry).cloned();
        let registry = match found {
            Some(registry) => registry,
            None => {
                // Reads files, so not under the lock; who comes second takes what the first one made.
                let new = Registry::new(registry, self.client.clone())?;
                known().entry(registry.to_owned()).or_insert(new).clone()
            }
        };
        Ok(ImageSource::Registry { repository: registry.repository(repository), name: ManifestName::Digest(manifest) })
    }
}

/// The layers of images in registries. Clones share everything.
#[derive(Clone)]
pub struct RemoteLayers(Arc<Inner>);

struct Inner {
    forest: Arc<Forest>,
    store: Arc<Store>,
    slots: Arc<Slots>,
    options: RemoteOptions,
    registries: Arc<Registries>,
    runtime: Handle,
    gate: Semaphore,
    state: Mutex<State>,
}

/// An image that was looked up.
struct LookUp {
    key: ImageKey,
    since: Instant,
    found: Underway<Arc<ImageOpener>>,
}

impl LookUp {
    fn is_good(&self, key: &ImageKey) -> bool {
        let indexless = matches!(self.found.peek(), Some(Ok(image)) if image.index().is_none());
        self.key == *key && !(indexless && self.since.elapsed() > INDEXLESS_LIFE)
    }
}

#[derive(Default)]
struct State {
    /// In the order of their last use.
    images: Vec<LookUp>,
    layers: HashMap<Digest, Underway<u16>>,
    /// Slots that nobody has asked for yet, and since when.
    unclaimed: HashMap<u16, Instant>,
}

impl RemoteLayers {
    /// Provides layers through `forest`, and tells it what was provided before.
    ///
    /// # Errors
    /// [`RemoteError::Plant`] when the forest does not take what was there.
    pub fn new(
        forest: Arc<Forest>,
        store: Arc<Store>,
        slots: Arc<Slots>,
        registries: Arc<Registries>,
        options: RemoteOptions,
        runtime: Handle,
    ) -> Result<Self, RemoteError> {
        for (slot, record) in slots.all() {
            forest.expect(slot, record.layer.digest)?;
        }
        let gate = Semaphore::new(options.layers_at_once.max(1));
        Ok(Self(Arc::new(Inner { forest, store, slots, options, registries, runtime, gate, state: Mutex::default() })))
    }

    /// Makes the layer that `labels` describe available, and says in which slot it is.
    ///
    /// # Errors
    /// [`RemoteError`]: the layer is containerd's to fetch.
    pub async fn provide(&self, labels: &BTreeMap<String, String>) -> Result<u16, Failure> {
        let wanted = WantedLayer::of(labels).map_err(RemoteError::from)?;
        if let Some(slot) = self.claim(&wanted.layer) {
            return Ok(slot);
        }
        let key = ImageKey {
            registry: wanted.image.registry().to_owned(),
            repository: wanted.image.repository().to_owned(),
            manifest: wanted.manifest,
            index: wanted.index,
        };
        let image = self.image(&key).await?;
        let layers = &image.image().manifest.layers;
        let first = layers.iter().position(|layer| layer.digest == wanted.layer);
        let Some(first) = first else {
            return Err(RemoteError::NoLayer { image: key.to_string(), layer: wanted.layer }.into());
        };
        for position in first..layers.len() {
            // Runs by itself.
            drop(self.bring(&key, &image, position));
        }
        self.bring(&key, &image, first).await?;
        // Whoever swept in between was quicker than ten minutes.
        self.claim(&wanted.layer).ok_or_else(|| RemoteError::Abandoned.into())
    }

    /// The directory that shows a slot's layer.
    #[must_use]
    pub fn directory(&self, slot: u16) -> PathBuf {
        self.0.options.mountpoint.join(slot.to_string())
    }

    /// Takes a slot away, with what is stored of its layer. The disk is freed a little later.
    pub fn release(&self, slot: u16) {
        let mut state = self.0.state();
        self.take_away(&mut state, slot);
    }

    /// Takes all slots away but these. For the start, when a process before may have left some.
    pub fn keep_only(&self, used: &BTreeSet<u16>) {
        let mut state = self.0.state();
        for (slot, _) in self.0.slots.all() {
            if !used.contains(&slot) {
                self.take_away(&mut state, slot);
            }
        }
    }

    /// Takes slots away that were filled for questions that never came.
    pub fn sweep(&self, life: Duration) {
        let mut state = self.0.state();
        let over = state.unclaimed.iter().filter(|(_, since)| since.elapsed() >= life);
        for slot in over.map(|(slot, _)| *slot).collect::<Vec<_>>() {
            self.take_away(&mut state, slot);
        }
    }

    /// [`RemoteLayers::sweep`]s from time to time, for as long as it is polled.
    pub async fn keep_swept(&self) {
        loop {
            tokio::time::sleep(UNCLAIMED_LIFE / 10).await;
            self.sweep(UNCLAIMED_LIFE);
        }
    }

    fn take_away(&self, state: &mut State, slot: u16) {
        state.unclaimed.remove(&slot);
        self.0.forest.remove(slot);
        match self.0.slots.release(slot) {
            Ok(None) => {}
            Ok(Some(record)) => {
                let layer = record.layer.digest;
                state.layers.remove(&layer);
                match self.0.store.set_aside(&layer) {
                    Ok(removed) => drop(self.0.runtime.spawn_blocking(move || removed.delete())),
                    Err(error) => tracing::warn!(slot, %layer, %error, "the data of a layer stay behind"),
                }
                tracing::info!(slot, %layer, "a layer that nobody uses is removed");
            }
            Err(error) => tracing::warn!(slot, %error, "a slot stays taken"),
        }
    }

    /// The slot of a layer that is here.
    fn claim(&self, layer: &Digest) -> Option<u16> {
        let mut state = self.0.state();
        // A slot is on disk a moment before it can be read.
        let slot = self.0.slots.find(layer).filter(|slot| self.0.forest.has(*slot))?;
        state.unclaimed.remove(&slot);
        Some(slot)
    }

    /// The image, looked up once.
    async fn image(&self, key: &ImageKey) -> Result<Arc<ImageOpener>, Failure> {
        let underway = {
            let mut state = self.0.state();
            let look_up = match state.images.iter().position(|known| known.is_good(key)) {
                Some(position) => state.images.remove(position),
                None => {
                    let (this, wanted) = (self.clone(), key.clone());
                    let found = async move { this.look_up(&wanted).await.map(Arc::new).map_err(Arc::new) };
                    LookUp { key: key.clone(), since: Instant::now(), found: self.spawned(found) }
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
        if found.is_err() {
            self.0.state().images.retain(|known| known.key != *key);
        }
        found
    }

    async fn look_up(&self, key: &ImageKey) -> Result<ImageOpener, RemoteError> {
        let source = self.0.registries.source(&key.registry, &key.repository, key.manifest)?;
        let found = async {
            let image = source.resolve(&PlatformSelection::Host).await?.pop();
            let image = image.ok_or_else(|| RemoteError::NoImage { image: key.to_string() })?;
            let options = OpenOptions { index: key.index, ..self.0.options.open.clone() };
            let (store, runtime) = (Arc::clone(&self.0.store), self.0.runtime.clone());
            Ok(ImageOpener::new(source, image, store, options, runtime).await?)
        };
        let limit = self.0.options.open_limit;
        let found: Result<ImageOpener, RemoteError> = match tokio::time::timeout(limit, found).await {
            Ok(found) => found,
            Err(_) => Err(RemoteError::Deadline { what: key.to_string(), limit }),
        };
        let index = found.as_ref().ok().and_then(ImageOpener::index).map(|index| index.to_string());
        match index {
            Some(digest) => tracing::info!(digest, image = %key, "fetching SOCI artifacts using index descriptor"),
            None if found.is_ok() => tracing::info!(image = %key, "no valid SOCI index found"),
            None => {}
        }
        found
    }

    /// Starts to open a layer unless that is under way or done.
    fn bring(&self, key: &ImageKey, image: &Arc<ImageOpener>, position: usize) -> Underway<u16> {
        let (layer, diff_id) =
            match (image.image().manifest.layers.get(position), image.image().config.diff_ids.get(position)) {
                (Some(layer), Some(diff_id)) => (layer.clone(), *diff_id),
                _ => return futures_util::future::ready(Err(RemoteError::Abandoned.into())).boxed().shared(),
            };
        let mut state = self.0.state();
        let digest = layer.digest;
        if let Some(underway) = state.layers.get(&digest) {
            // A failure is worth another try.
            if !matches!(underway.peek(), Some(Err(_))) {
                return underway.clone();
            }
        }
        let (this, key, image) = (self.clone(), key.clone(), Arc::clone(image));
        let open = async move { this.open(&key, &image, layer, diff_id).await.map_err(Arc::new) };
        let underway = self.spawned(open);
        state.layers.insert(digest, underway.clone());
        underway
    }

    async fn open(
        &self,
        key: &ImageKey,
        image: &ImageOpener,
        layer: Descriptor,
        diff_id: Digest,
    ) -> Result<u16, RemoteError> {
        if let Some(slot) = self.0.slots.find(&layer.digest) {
            return Ok(slot);
        }
        let _permit = self.0.gate.acquire().await.map_err(|_| RemoteError::Abandoned)?;
        let opened = image.open_layer(&layer, diff_id).await?;
        tracing::debug!(layer = %layer.digest, way = ?opened.note.way, "a layer is open");
        let record = SlotRecord { layer, diff_id, image: key.to_string(), ztoc: opened.ztoc };
        let slot = self.0.slots.assign(record)?;
        self.0.state().unclaimed.insert(slot, Instant::now());
        let planted = self.plant(slot, opened.reader).await;
        if planted.is_err() {
            self.0.forest.remove(slot);
            self.0.slots.release(slot)?;
        }
        planted.map(|()| slot)
    }

    async fn plant(&self, slot: u16, reader: LayerReader) -> Result<(), RemoteError> {
        let (forest, layer) = (Arc::clone(&self.0.forest), reader.digest());
        let inserted = tokio::task::spawn_blocking(move || forest.insert(slot, reader));
        inserted.await.map_err(|_| RemoteError::Abandoned)??;
        match self.0.forest.hidden_links(slot) {
            None | Some(0) => Ok(()),
            Some(links) => Err(RemoteError::LowerLinks { layer, links }),
        }
    }

    /// Work that goes on when nobody waits for it any more.
    fn spawned<T: Clone + Send + Sync + 'static>(
        &self,
        work: impl Future<Output = Result<T, Failure>> + Send + 'static,
    ) -> Underway<T> {
        let task = self.0.runtime.spawn(work);
        async move { task.await.unwrap_or_else(|_| Err(RemoteError::Abandoned.into())) }.boxed().shared()
    }
}

impl Inner {
    /// Locks for bookkeeping; a panic cannot leave it half done.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for RemoteLayers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RemoteLayers").field("options", &self.0.options).finish_non_exhaustive()
    }
}
