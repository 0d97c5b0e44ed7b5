//! All layers of a node as one read-only file system, in our own words: a directory per layer, each a lower directory
//! for overlayfs.
//!
//! One mount for all layers makes mounting a layer cost no system call, and leaves one descriptor to hand on when the
//! process that serves it is replaced. The root has a directory per *slot*, named by its decimal number; `12-3` is the
//! layer in slot 12 with owners mapped by id map 3. Below is the layer's own tree, not merged with any other. `12.tar`,
//! which is not listed, is the layer as one file, for a file system of the kernel's that has the names itself. Node ids
//! are computed from slot and node ([`crate::tree::node_id`]), so a new process answers for the ids that an old one
//! gave out, and there is nothing to remember and nothing to forget.
//!
//! Layers come and go at any time. What the kernel caches below a slot never changes; names and listing of the root are
//! not cached at all. A slot that is used again for another layer has the same ids for other files: the *generation* of
//! its nodes, taken from the digest, lets the kernel see that its old ones are stale.
//!
//! A slot can be known without being open: [`Forest::expect`] notes which layer is there, and the first question about
//! it asks the [`Opener`]. So a restarted process serves at once, and opens what is used.
//!
//! Hard links into lower layers cannot be resolved in a tree that knows one layer; they are hidden, with a line in the
//! log. What differs from the road not taken, one mount per layer: no unmounting, no thread per layer, no stale mounts.
//!
//! Invariants: no lock is held while a layer is opened or read; one opening per slot at a time, and a failed one is not
//! remembered; every wait has an end.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::ops::Bound;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, Shared};
use soci_index::format::class::{Class, Classified};
use soci_index::format::digest::Digest;
use soci_index::format::entry::Timestamp;

use crate::fuse::counts::Counters;
use crate::fuse::error::{FsError, OpenError};
use crate::fuse::status_file::now;
use crate::layer::reader::LayerReader;
use crate::layer::stages::Stages;
use crate::tree::attributes::Attributes;
use crate::tree::id_map::IdMap;
use crate::tree::kernel_cache::Mounted;
use crate::tree::node_id::NodeId;
use crate::tree::{NodeKind, NodeNumber, Tree, TreeError};

mod layout;
mod name;
mod open_layer;
mod questions;

pub(crate) use layout::Layout;
use open_layer::{OpenLayer, generation};
use parking_lot::{Mutex, RwLock};

/// Opens the layer of a slot that is known but not open.
pub trait Opener: fmt::Debug + Send + Sync + 'static {
    /// A reader of the layer `digest` in `slot`.
    fn open(&self, slot: u16, digest: Digest) -> BoxFuture<'_, Result<LayerReader, OpenError>>;

    /// What was shown of the layer in `slot` has turned out to be wrong. Must not block.
    fn distrusted(&self, _slot: u16) {}
}

/// Why a layer cannot be put into a forest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ForestError {
    /// Slots are 1 to 65534.
    #[error("slot {slot} cannot hold a layer: slots are 1 to 65534")]
    Slot { slot: u16 },
    /// Id map 0 means owners as recorded.
    #[error("id map 0 is the one that changes nothing: use 1 to 255")]
    IdMap,
    /// The layer's files cannot be numbered.
    #[error(transparent)]
    Tree(#[from] TreeError),
}

impl Classified for ForestError {
    fn class(&self) -> Class {
        Class::Other
    }
}

/// Which extended attribute marks an opaque directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OpaqueAttribute {
    /// `trusted.overlay.opaque`, which overlayfs reads when root mounts it.
    #[default]
    Trusted,
    /// `user.overlay.opaque`, which it reads with the option `userxattr`, as in a user namespace.
    User,
}

impl OpaqueAttribute {
    pub(crate) const fn name(self) -> &'static [u8] {
        match self {
            Self::Trusted => b"trusted.overlay.opaque",
            Self::User => b"user.overlay.opaque",
        }
    }
}

/// How a forest behaves.
#[derive(Debug, Clone)]
pub struct ForestOptions {
    /// How opaque directories are marked.
    pub opaque: OpaqueAttribute,
    /// Opens slots that are only known.
    pub opener: Option<Arc<dyn Opener>>,
    /// Whether layers can be opened as one file each.
    pub devices: bool,
    /// How long a waiter may wait for a layer to open. Programs cannot be interrupted meanwhile.
    pub open_limit: Duration,
    /// Where it is noted how long trees take to build, and layers to be shown.
    pub stages: Arc<Stages>,
}

impl Default for ForestOptions {
    /// 30 s, as long as a read may take.
    fn default() -> Self {
        Self {
            opaque: OpaqueAttribute::default(),
            opener: None,
            devices: false,
            open_limit: Duration::from_secs(30),
            stages: Arc::default(),
        }
    }
}

/// The layers of a node.
#[derive(Debug)]
pub struct Forest {
    options: ForestOptions,
    slots: RwLock<Slots>,
    mounted: Arc<Mounted>,
    /// The id maps by which layers were ever shown.
    maps_shown: Arc<Mutex<BTreeSet<u8>>>,
    counters: Counters,
}

#[derive(Debug)]
struct Slots {
    by_number: BTreeMap<u16, Slot>,
    id_maps: HashMap<u8, Arc<IdMap>>,
    /// When a slot came or went last: the root's modification time, by which the kernel knows that its listing is old.
    changed: Timestamp,
    /// Slots whose lookup failed, so that each is logged once.
    missed: BTreeSet<u16>,
}

#[derive(Debug)]
struct Slot {
    digest: Digest,
    state: SlotState,
}

/// The opening of a layer, shared by all its waiters.
type Opening = Shared<BoxFuture<'static, Result<Arc<OpenLayer>, OpenError>>>;

#[derive(Debug)]
enum SlotState {
    Closed,
    Opening(Opening),
    Open(Arc<OpenLayer>),
}

impl Forest {
    /// A forest without layers.
    #[must_use]
    pub fn new(options: ForestOptions) -> Self {
        let slots =
            Slots { by_number: BTreeMap::new(), id_maps: HashMap::new(), changed: now(), missed: BTreeSet::new() };
        let maps_shown = Arc::new(Mutex::new(BTreeSet::from([0])));
        Self { options, slots: RwLock::new(slots), mounted: Arc::default(), maps_shown, counters: Counters::default() }
    }

    /// What the kernel has asked.
    #[must_use]
    pub const fn counters(&self) -> &Counters {
        &self.counters
    }

    /// The slot that an inode belongs to; none for the root and what is no inode.
    pub(crate) fn slot_of(inode: u64) -> Option<u16> {
        NodeId::unpack(inode).map(|id| id.slot).filter(|slot| *slot != 0)
    }

    /// The kernel that it is mounted in.
    pub(crate) const fn mounted(&self) -> &Arc<Mounted> {
        &self.mounted
    }

    /// Has the kernel forget what it was shown of a layer, should that turn out to be wrong.
    fn guard(&self, slot: u16, layer: &Arc<OpenLayer>) {
        let (mounted, maps, weak_layer) =
            (Arc::clone(&self.mounted), Arc::clone(&self.maps_shown), Arc::downgrade(layer));
        let opener = self.options.opener.clone();
        layer.reader().health().on_distrust(Arc::new(move || {
            if let Some(opener) = &opener {
                opener.distrusted(slot);
            }
            let Some(layer) = weak_layer.upgrade() else { return };
            let maps = maps.lock().clone();
            for id_map in maps {
                mounted.forget(layer.files().tree(), |node| NodeId { id_map, slot, node });
            }
        }));
    }

    /// Puts a layer into a slot, in the place of what was there. Builds the layer's tree, which takes a moment.
    ///
    /// # Errors
    /// [`ForestError`].
    pub fn insert(&self, slot: u16, reader: LayerReader) -> Result<(), ForestError> {
        let digest = reader.digest();
        let layer = Arc::new(OpenLayer::timed(reader, &self.options.stages)?);
        let start = std::time::Instant::now();
        self.guard(slot, &layer);
        let shown = self.put(slot, Slot { digest, state: SlotState::Open(layer) });
        self.options.stages.mount.record(start.elapsed());
        shown
    }

    /// Records that the layer `digest` is in a slot, to be opened at its first access.
    ///
    /// # Errors
    /// [`ForestError::Slot`].
    pub fn expect(&self, slot: u16, digest: Digest) -> Result<(), ForestError> {
        self.put(slot, Slot { digest, state: SlotState::Closed })
    }

    /// Empties a slot; `false` if it was empty. Reads that are in progress end, later ones fail.
    pub fn remove(&self, slot: u16) -> bool {
        let mut slots = self.slots.write();
        let was_there = slots.by_number.remove(&slot).is_some();
        if was_there {
            slots.touch();
        }
        was_there
    }

    /// Defines id map `number`, or defines it anew. The kernel keeps owners that it has seen, so the generation of a
    /// view's nodes is taken from the mapping, too.
    ///
    /// # Errors
    /// [`ForestError::IdMap`] for number 0.
    pub fn define_id_map(&self, number: u8, map: IdMap) -> Result<(), ForestError> {
        if number == 0 {
            return Err(ForestError::IdMap);
        }
        self.maps_shown.lock().insert(number);
        self.slots.write().id_maps.insert(number, Arc::new(map));
        Ok(())
    }

    /// Forgets id map `number`; `false` if there was none. Its views are gone.
    pub fn remove_id_map(&self, number: u8) -> bool {
        self.slots.write().id_maps.remove(&number).is_some()
    }

    /// The slots in use, ascending, each with its layer.
    #[must_use]
    pub fn slots(&self) -> Vec<(u16, Digest)> {
        self.slots.read().by_number.iter().map(|(slot, held)| (*slot, held.digest)).collect()
    }

    /// The reader of the layer in a slot, if it is open.
    #[must_use]
    pub fn reader(&self, slot: u16) -> Option<LayerReader> {
        match &self.slots.read().by_number.get(&slot)?.state {
            SlotState::Open(layer) => Some(layer.reader().clone()),
            SlotState::Closed | SlotState::Opening(_) => None,
        }
    }

    /// The tree of the layer in a slot, if it is open.
    pub(crate) fn tree(&self, slot: u16) -> Option<Arc<Tree>> {
        match &self.slots.read().by_number.get(&slot)?.state {
            SlotState::Open(layer) => Some(Arc::clone(layer.files().tree())),
            SlotState::Closed | SlotState::Opening(_) => None,
        }
    }

    /// The layer in a slot as one file, if it is open.
    pub(crate) fn layout(&self, slot: u16) -> Option<Layout> {
        match &self.slots.read().by_number.get(&slot)?.state {
            SlotState::Open(layer) => Some(Layout::new(Arc::clone(layer))),
            SlotState::Closed | SlotState::Opening(_) => None,
        }
    }

    /// Whether there is a layer in the slot, open or not.
    #[must_use]
    pub fn has(&self, slot: u16) -> bool {
        self.slots.read().by_number.contains_key(&slot)
    }

    /// How many names of an open layer are hidden because they are hard links into lower layers. If they are needed,
    /// the layer has to be unpacked.
    #[must_use]
    pub fn hidden_links(&self, slot: u16) -> Option<usize> {
        match &self.slots.read().by_number.get(&slot)?.state {
            SlotState::Open(layer) => Some(layer.files().tree().foreign_links().len()),
            SlotState::Closed | SlotState::Opening(_) => None,
        }
    }

    /// The slot that has to be opened before a question about `inode`, or about `name` in it, can be answered.
    #[must_use]
    pub fn closed_slot(&self, inode: u64, name: Option<&[u8]>) -> Option<u16> {
        let slot = match NodeId::unpack(inode)?.slot {
            0 => name::parse(name?)?.slot,
            slot => slot,
        };
        let slots = self.slots.read();
        slots.by_number.get(&slot).filter(|held| !matches!(held.state, SlotState::Open(_))).map(|_| slot)
    }

    /// Opens the layer in a slot; concurrent calls share one opening. Runs on the current runtime.
    ///
    /// # Errors
    /// [`FsError::Open`], [`FsError::NoSlot`].
    pub async fn open(&self, slot: u16) -> Result<(), FsError> {
        let opening = {
            let mut slots = self.slots.write();
            let Some(held) = slots.by_number.get_mut(&slot) else {
                return Err(FsError::NoSlot { slot });
            };
            match &held.state {
                SlotState::Open(_) => return Ok(()),
                SlotState::Opening(opening) => opening.clone(),
                SlotState::Closed => {
                    let opening = self.launch(slot, held.digest);
                    held.state = SlotState::Opening(opening.clone());
                    opening
                }
            }
        };
        let opened = opening.clone().await;
        self.settle(slot, &opening, opened.as_ref().ok());
        opened.map(drop).map_err(|cause| {
            tracing::warn!(slot, %cause, "a layer cannot be opened");
            FsError::Open { slot, cause: Box::new(cause) }
        })
    }

    /// Starts opening a layer, in a task of its own: a caller that gives up does not take it down.
    fn launch(&self, slot: u16, digest: Digest) -> Opening {
        let ForestOptions { opener, open_limit: limit, stages, .. } = self.options.clone();
        let work = tokio::spawn(async move {
            let opener = opener.ok_or(OpenError::NoOpener { digest })?;
            let opened = tokio::time::timeout(limit, opener.open(slot, digest)).await;
            let reader = opened.map_err(|_| OpenError::Deadline { digest, limit })??;
            if reader.digest() != digest {
                return Err(OpenError::Mismatch { expected: digest, found: reader.digest() });
            }
            let made = tokio::task::spawn_blocking(move || OpenLayer::timed(reader, &stages)).await;
            let layer = made.map_err(|_| OpenError::Abandoned { digest })?;
            layer.map(Arc::new).map_err(|cause| OpenError::Tree { digest, cause })
        });
        async move { work.await.unwrap_or(Err(OpenError::Abandoned { digest })) }.boxed().shared()
    }

    /// Notes how an opening ended, unless the slot has been used otherwise meanwhile.
    fn settle(&self, slot: u16, opening: &Opening, opened: Option<&Arc<OpenLayer>>) {
        let mut slots = self.slots.write();
        let Some(held) = slots.by_number.get_mut(&slot) else {
            return;
        };
        if matches!(&held.state, SlotState::Opening(current) if current.ptr_eq(opening)) {
            if let Some(layer) = opened {
                self.guard(slot, layer);
            }
            held.state = opened.map_or(SlotState::Closed, |layer| SlotState::Open(Arc::clone(layer)));
        }
    }

    fn put(&self, number: u16, slot: Slot) -> Result<(), ForestError> {
        if !name::is_slot(number) {
            return Err(ForestError::Slot { slot: number });
        }
        let mut slots = self.slots.write();
        if slots.by_number.get(&number).is_none_or(|before| before.digest != slot.digest) {
            self.counters.reset(number);
        }
        slots.by_number.insert(number, slot);
        slots.missed.remove(&number);
        slots.touch();
        Ok(())
    }

    fn open_layers(&self) -> Vec<Arc<OpenLayer>> {
        let slots = self.slots.read();
        let open = slots.by_number.values().filter_map(|slot| match &slot.state {
            SlotState::Open(layer) => Some(Arc::clone(layer)),
            SlotState::Closed | SlotState::Opening(_) => None,
        });
        open.collect()
    }
}

impl Slots {
    /// Notes a change. Two changes within one tick of the clock have different times all the same.
    fn touch(&mut self) {
        let (now, last) = (now(), self.changed);
        let is_later = (now.seconds, now.nanoseconds) > (last.seconds, last.nanoseconds);
        self.changed = if is_later {
            now
        } else if last.nanoseconds < 999_999_999 {
            Timestamp { nanoseconds: last.nanoseconds + 1, ..last }
        } else {
            Timestamp { seconds: last.seconds + 1, nanoseconds: 0 }
        };
    }
}
