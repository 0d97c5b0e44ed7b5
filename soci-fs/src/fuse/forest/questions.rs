//! What a file system is asked, answered by the layer that the node id names.

use super::*;
use crate::fuse::device_file::DeviceFile;
use crate::fuse::file_system::{DirectoryEntry, FileSystem, Opening, Visit, Xattr};
use crate::fuse::forest::name::{RootName, What};
use crate::tree::device::BLOCK_BYTES;
use crate::tree::id_map;

/// A node of a layer that is open.
struct LayerNode {
    layer: Arc<OpenLayer>,
    map: Option<Arc<IdMap>>,
    id: NodeId,
}

impl LayerNode {
    fn attributes(&self, node: NodeNumber) -> Result<Attributes, FsError> {
        if node == STATE {
            return Ok(plain_directory(NodeId { node, ..self.id }.pack(), Timestamp::default(), 3));
        }
        if node == DEVICE {
            let (id, device) = (NodeId { node, ..self.id }, self.device()?);
            let attributes = Attributes::plain(id.pack(), NodeKind::Regular, 0o400, Timestamp::default(), 1);
            let size = device.map().bytes();
            return Ok(Attributes { size, blocks: size / BLOCK_BYTES, ..attributes });
        }
        self.layer.files().attributes(NodeId { node, ..self.id }, self.map.as_deref())
    }

    /// The layer as one file.
    fn device(&self) -> Result<&DeviceFile, FsError> {
        let layer = self.layer.reader().digest();
        self.layer.device().map_err(|cause| FsError::NoDevice { layer: Box::new(layer), cause })
    }
}

/// The layer as one file: above the numbers of all nodes of trees, as those of the status file are.
const DEVICE: NodeNumber = NodeNumber(u32::MAX - 3);
/// The directory that has the layer's status file only, and does not list it: for containers whose other directories are
/// not the forest's.
const STATE: NodeNumber = NodeNumber(u32::MAX - 4);

const ROOT: NodeId = NodeId::single(NodeNumber::ROOT);

impl FileSystem for Forest {
    fn waiting(self: &Arc<Self>, inode: u64, name: Option<&[u8]>) -> Option<BoxFuture<'static, Result<(), FsError>>> {
        let slot = self.closed_slot(inode, name)?;
        let forest = Arc::clone(self);
        Some(async move { forest.open(slot).await }.boxed())
    }

    fn is_constant(&self, inode: u64) -> bool {
        inode != ROOT.pack() && self.place(inode).is_ok_and(|place| !place.layer.files().is_status_file(place.id.node))
    }

    fn names_last(&self, directory: u64) -> bool {
        directory != ROOT.pack()
    }

    /// 0 for the root.
    fn generation(&self, inode: u64) -> u64 {
        let Some(NodeId { id_map, slot, .. }) = NodeId::unpack(inode) else { return 0 };
        let slots = self.slots.read();
        let map = slots.id_maps.get(&id_map).map(Arc::as_ref);
        slots.by_number.get(&slot).map_or(0, |held| generation(&held.digest, map))
    }

    fn opening(&self, inode: u64) -> Opening {
        let Some(NodeId { slot, node: DEVICE, .. }) = NodeId::unpack(inode) else { return Opening::Cached };
        let slots = self.slots.read();
        let digest = slots.by_number.get(&slot).map(|held| held.digest);
        // A slot without a layer gives no bytes, whatever the number.
        let first = digest.as_ref().and_then(|digest| digest.bytes().first_chunk().copied()).unwrap_or_default();
        Opening::Direct { handle: u64::from_be_bytes(first) | 1 }
    }

    fn has_direct_files(&self) -> bool {
        self.options.devices
    }

    fn can_have_xattrs(&self) -> bool {
        // Layers that are added later are unknown yet, and the kernel asks only once.
        true
    }

    fn lookup(&self, directory: u64, name: &[u8]) -> Result<Attributes, FsError> {
        if directory == ROOT.pack() {
            let RootName { slot, id_map, what } = name::parse(name).ok_or(FsError::NotFound)?;
            if what != What::Tree && !self.options.devices {
                return Err(FsError::NotFound);
            }
            let slots = self.slots.read();
            let is_there = slots.by_number.contains_key(&slot) && (id_map == 0 || slots.id_maps.contains_key(&id_map));
            drop(slots);
            if !is_there {
                return Err(FsError::NotFound);
            }
            let node = match what {
                What::Tree => NodeNumber::ROOT,
                What::Device => DEVICE,
                What::State => STATE,
            };
            return self.attributes(NodeId { id_map, slot, node }.pack());
        }
        let place = self.place(directory)?;
        if place.id.node == STATE {
            return place.attributes(place.layer.files().lookup_status(name).ok_or(FsError::NotFound)?);
        }
        place.attributes(place.layer.files().lookup(place.id, name)?)
    }

    fn attributes(&self, inode: u64) -> Result<Attributes, FsError> {
        if inode == ROOT.pack() {
            let slots = self.slots.read();
            let links = u32::try_from(slots.by_number.len()).unwrap_or(u32::MAX).saturating_add(2);
            return Ok(plain_directory(inode, slots.changed, links));
        }
        let place = self.place(inode)?;
        place.attributes(place.id.node)
    }

    fn parent(&self, directory: u64) -> Result<u64, FsError> {
        if directory == ROOT.pack() {
            return Ok(directory);
        }
        let place = self.place(directory)?;
        if place.id.node == STATE {
            return Ok(ROOT.pack());
        }
        let parent = place.layer.files().parent(place.id)?;
        Ok(parent.map_or(ROOT, |node| NodeId { node, ..place.id }).pack())
    }

    fn list(&self, directory: u64, from: u64, visit: Visit<'_>) -> Result<(), FsError> {
        if directory == ROOT.pack() {
            self.list_slots(from, visit);
            return Ok(());
        }
        let place = self.place(directory)?;
        if place.id.node == STATE {
            return Ok(());
        }
        let generation = generation(&place.layer.reader().digest(), place.map.as_deref());
        place.layer.files().list(place.id, from, generation, |node| place.attributes(node), visit)
    }

    fn read_link(&self, inode: u64) -> Result<Vec<u8>, FsError> {
        if inode == ROOT.pack() {
            return Err(FsError::NotLink);
        }
        let place = self.place(inode)?;
        place.layer.files().read_link(place.id)
    }

    fn xattrs(&self, inode: u64) -> Result<Vec<Xattr>, FsError> {
        if inode == ROOT.pack() {
            return Ok(Vec::new());
        }
        let place = self.place(inode)?;
        if place.id.node == STATE {
            return Ok(Vec::new());
        }
        let mut all = place.layer.files().xattrs(place.id, Some(self.options.opaque.name()))?;
        if let Some(map) = &place.map {
            for xattr in all.iter_mut().filter(|xattr| xattr.name == id_map::CAPABILITY) {
                xattr.value = id_map::capability(&xattr.value, map);
            }
        }
        Ok(all)
    }

    fn try_read(&self, inode: u64, offset: u64, length: usize, buffer: &mut Vec<u8>) -> Result<bool, FsError> {
        if inode == ROOT.pack() {
            return Err(FsError::IsDirectory);
        }
        if self.closed_slot(inode, None).is_some() {
            return Ok(false);
        }
        let place = self.place(inode)?;
        if place.id.node == DEVICE {
            return place.device()?.try_read(offset, length, buffer);
        }
        place.layer.files().try_read(place.id, offset, length, buffer)
    }

    /// Opens the layer first if need be.
    async fn read(&self, inode: u64, offset: u64, length: usize) -> Result<Vec<u8>, FsError> {
        if inode == ROOT.pack() {
            return Err(FsError::IsDirectory);
        }
        if let Some(slot) = self.closed_slot(inode, None) {
            self.open(slot).await?;
        }
        let place = self.place(inode)?;
        if place.id.node == DEVICE {
            return place.device()?.read(offset, length).await;
        }
        place.layer.files().read(place.id, offset, length).await
    }

    /// Of the layers that are open.
    fn totals(&self) -> (u64, u64) {
        self.open_layers().iter().fold((0, 0), |(files, bytes), layer| {
            let (tree, index) = (layer.files().tree(), layer.reader().index());
            (files + tree.len() as u64, bytes.saturating_add(index.uncompressed_size))
        })
    }

    fn counters(&self, inode: u64) -> Option<(&Counters, u16)> {
        Some((&self.counters, Self::slot_of(inode)?))
    }
}

impl Forest {
    /// A slot's position is its number, so it stays when others come and go.
    fn list_slots(&self, from: u64, visit: Visit<'_>) {
        let Ok(from) = u16::try_from(from) else {
            return;
        };
        let slots = self.slots.read();
        for (slot, held) in slots.by_number.range((Bound::Included(from), Bound::Unbounded)) {
            let id = NodeId { id_map: 0, slot: *slot, node: NodeNumber::ROOT };
            let known = match &held.state {
                SlotState::Open(layer) => layer.files().attributes(id, None).ok(),
                SlotState::Closed | SlotState::Opening(_) => None,
            };
            // Listing its name must not open a layer. More is found by a lookup, because names of the root are not
            // cached.
            let attributes = known.unwrap_or_else(|| plain_directory(id.pack(), slots.changed, 2));
            let name = name::show(RootName { slot: *slot, id_map: 0, what: What::Tree });
            let next = u64::from(*slot) + 1;
            if !visit(DirectoryEntry {
                next,
                name: name.as_bytes(),
                attributes,
                generation: generation(&held.digest, None),
            }) {
                break;
            }
        }
    }

    fn place(&self, inode: u64) -> Result<LayerNode, FsError> {
        let id = NodeId::unpack(inode).ok_or(FsError::NoInode { inode })?;
        let NodeId { id_map, slot, .. } = id;
        let slots = self.slots.read();
        let Some(held) = slots.by_number.get(&slot) else {
            let is_news = !slots.missed.contains(&slot);
            drop(slots);
            if is_news {
                self.slots.write().missed.insert(slot);
                tracing::warn!(slot, "a file of a layer that was removed is asked for");
            }
            return Err(FsError::NoSlot { slot });
        };
        let SlotState::Open(layer) = &held.state else {
            return Err(FsError::Closed { slot });
        };
        let map = match id_map {
            0 => None,
            number => Some(Arc::clone(slots.id_maps.get(&number).ok_or(FsError::NoIdMap { id_map, slot })?)),
        };
        Ok(LayerNode { layer: Arc::clone(layer), map, id })
    }
}

const fn plain_directory(inode: u64, modified: Timestamp, links: u32) -> Attributes {
    Attributes::plain(inode, NodeKind::Directory, 0o755, modified, links)
}
