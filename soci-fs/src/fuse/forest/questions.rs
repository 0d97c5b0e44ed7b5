//! What a file system is asked, answered by the layer that the node id names.

use super::*;
use crate::fuse::forest::name::RootName;
use crate::tree::id_map;

/// A name in a directory of a forest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirectoryEntry<'name> {
    /// Where to go on listing behind this name.
    pub next: u64,
    pub name: &'name [u8],
    /// What it leads to.
    pub attributes: Attributes,
    /// [`Forest::generation`] of it.
    pub generation: u64,
}

/// A node of a layer that is open.
struct LayerNode {
    layer: Arc<OpenLayer>,
    map: Option<Arc<IdMap>>,
    id: NodeId,
}

impl LayerNode {
    fn attributes(&self, node: NodeNumber) -> Result<Attributes, FsError> {
        self.layer.attributes(NodeId { node, ..self.id }, self.map.as_deref())
    }
}

const ROOT: NodeId = NodeId::single(NodeNumber::ROOT);

impl Forest {
    /// Whether what `stat` shows of `inode` never changes.
    #[must_use]
    pub fn is_constant(&self, inode: u64) -> bool {
        inode != ROOT.pack() && self.place(inode).is_ok_and(|place| !place.layer.is_state_file(place.id.node))
    }

    /// Whether the names in a directory never change, nor their absence.
    #[must_use]
    pub fn names_last(&self, directory: u64) -> bool {
        directory != ROOT.pack()
    }

    /// The generation of the layer that `inode` belongs to, which distinguishes it from other ones in the same slot; 0
    /// for the root.
    #[must_use]
    pub fn generation(&self, inode: u64) -> u64 {
        let Some(NodeId { id_map, slot, .. }) = NodeId::unpack(inode) else { return 0 };
        let slots = self.slots.read();
        let map = slots.id_maps.get(&id_map).map(Arc::as_ref);
        slots.by_number.get(&slot).map_or(0, |held| generation(&held.digest, map))
    }

    /// Finds a name in a directory.
    ///
    /// # Errors
    /// [`FsError::NotFound`] and others; [`FsError::Closed`] when [`Forest::open`] is needed first.
    pub fn lookup(&self, directory: u64, name: &[u8]) -> Result<Attributes, FsError> {
        if directory == ROOT.pack() {
            let RootName { slot, id_map } = name::parse(name).ok_or(FsError::NotFound)?;
            let slots = self.slots.read();
            let is_there = slots.by_number.contains_key(&slot) && (id_map == 0 || slots.id_maps.contains_key(&id_map));
            drop(slots);
            if !is_there {
                return Err(FsError::NotFound);
            }
            return self.attributes(NodeId { id_map, slot, node: NodeNumber::ROOT }.pack());
        }
        let place = self.place(directory)?;
        place.attributes(place.layer.lookup(place.id, name)?)
    }

    /// What `stat` shows.
    ///
    /// # Errors
    /// [`FsError::NoInode`], [`FsError::NoSlot`], [`FsError::Closed`].
    pub fn attributes(&self, inode: u64) -> Result<Attributes, FsError> {
        if inode == ROOT.pack() {
            let slots = self.slots.read();
            let links = u32::try_from(slots.by_number.len()).unwrap_or(u32::MAX).saturating_add(2);
            return Ok(plain_directory(inode, slots.changed, links));
        }
        let place = self.place(inode)?;
        place.attributes(place.id.node)
    }

    /// Shows the names in a directory from position `from` on, without `.` and `..`, to `visit` until it says `false`.
    /// Positions come from [`DirectoryEntry::next`]; the first is 0.
    ///
    /// # Errors
    /// [`FsError::NotDirectory`] and others; [`FsError::Closed`] when [`Forest::open`] is needed first.
    pub fn list(
        &self,
        directory: u64,
        from: u64,
        visit: &mut dyn FnMut(DirectoryEntry<'_>) -> bool,
    ) -> Result<(), FsError> {
        if directory == ROOT.pack() {
            self.list_slots(from, visit);
            return Ok(());
        }
        let place = self.place(directory)?;
        place.layer.directory(place.id)?;
        let generation = generation(&place.layer.reader().digest(), place.map.as_deref());
        if let Some((name, node)) = place.layer.state_file(place.id.node) {
            if from == 0 {
                let attributes = place.attributes(node)?;
                visit(DirectoryEntry { next: 1, name: name.as_bytes(), attributes, generation });
            }
            return Ok(());
        }
        let skip = usize::try_from(from).unwrap_or(usize::MAX);
        for (position, child) in place.layer.tree().children(place.id.node, skip) {
            let attributes = place.attributes(child.node)?;
            let seen = DirectoryEntry { next: position as u64 + 1, name: child.name, attributes, generation };
            if !visit(seen) {
                break;
            }
        }
        Ok(())
    }

    /// A slot's position is its number, so it stays when others come and go.
    fn list_slots(&self, from: u64, visit: &mut dyn FnMut(DirectoryEntry<'_>) -> bool) {
        let Ok(from) = u16::try_from(from) else {
            return;
        };
        let slots = self.slots.read();
        for (slot, held) in slots.by_number.range((Bound::Included(from), Bound::Unbounded)) {
            let id = NodeId { id_map: 0, slot: *slot, node: NodeNumber::ROOT };
            let known = match &held.state {
                SlotState::Open(layer) => layer.attributes(id, None).ok(),
                SlotState::Closed | SlotState::Opening(_) => None,
            };
            // Listing its name must not open a layer. More is found by a lookup, because names of the root are not
            // cached.
            let attributes = known.unwrap_or_else(|| plain_directory(id.pack(), slots.changed, 2));
            let name = name::show(RootName { slot: *slot, id_map: 0 });
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

    /// The directory that holds a directory.
    ///
    /// # Errors
    /// [`FsError::NoInode`], [`FsError::NoSlot`], [`FsError::Closed`].
    pub fn parent(&self, directory: u64) -> Result<u64, FsError> {
        if directory == ROOT.pack() {
            return Ok(directory);
        }
        let place = self.place(directory)?;
        let parent = place.layer.parent(place.id)?;
        Ok(parent.map_or(ROOT, |node| NodeId { node, ..place.id }).pack())
    }

    /// The target of a symbolic link.
    ///
    /// # Errors
    /// [`FsError::NotLink`], [`FsError::NoInode`], [`FsError::NoSlot`], [`FsError::Closed`].
    pub fn read_link(&self, inode: u64) -> Result<Vec<u8>, FsError> {
        if inode == ROOT.pack() {
            return Err(FsError::NotLink);
        }
        let place = self.place(inode)?;
        place.layer.read_link(place.id)
    }

    /// The names of a file's extended attributes.
    ///
    /// # Errors
    /// [`FsError::NoInode`], [`FsError::NoSlot`], [`FsError::Closed`].
    pub fn xattr_names(&self, inode: u64) -> Result<Vec<Vec<u8>>, FsError> {
        if inode == ROOT.pack() {
            return Ok(Vec::new());
        }
        let place = self.place(inode)?;
        let all = place.layer.xattrs(place.id, self.options.opaque)?;
        Ok(all.into_iter().map(|(name, _)| name.to_vec()).collect())
    }

    /// The value of one extended attribute.
    ///
    /// # Errors
    /// [`FsError::NoAttribute`], [`FsError::NoInode`], [`FsError::NoSlot`], [`FsError::Closed`].
    pub fn xattr(&self, inode: u64, name: &[u8]) -> Result<Vec<u8>, FsError> {
        if inode == ROOT.pack() {
            return Err(FsError::NoAttribute);
        }
        let place = self.place(inode)?;
        let all = place.layer.xattrs(place.id, self.options.opaque)?;
        let (_, value) = all.iter().find(|(key, _)| *key == name).ok_or(FsError::NoAttribute)?;
        Ok(match &place.map {
            Some(map) if name == id_map::CAPABILITY => id_map::capability(value, map),
            _ => value.to_vec(),
        })
    }

    /// Reads a file if nothing has to be waited for; `false` if it has. What `buffer` held is replaced.
    ///
    /// # Errors
    /// [`FsError`].
    pub fn try_read(&self, inode: u64, offset: u64, length: usize, buffer: &mut Vec<u8>) -> Result<bool, FsError> {
        if inode == ROOT.pack() {
            return Err(FsError::IsDirectory);
        }
        if self.closed_slot(inode, None).is_some() {
            return Ok(false);
        }
        let place = self.place(inode)?;
        place.layer.try_read(place.id, offset, length, buffer)
    }

    /// Reads a file, and opens its layer first if need be.
    ///
    /// # Errors
    /// [`FsError`], at the latest after the limits for opening and reading.
    pub async fn read(self: &Arc<Self>, inode: u64, offset: u64, length: usize) -> Result<Vec<u8>, FsError> {
        if inode == ROOT.pack() {
            return Err(FsError::IsDirectory);
        }
        if let Some(slot) = self.closed_slot(inode, None) {
            self.open(slot).await?;
        }
        let place = self.place(inode)?;
        place.layer.read(place.id, offset, length).await
    }

    /// Number of files and sum of their sizes, of the layers that are open.
    #[must_use]
    pub fn totals(&self) -> (u64, u64) {
        self.open_layers().iter().fold((0, 0), |(files, bytes), layer| {
            (files + layer.tree().len() as u64, bytes.saturating_add(layer.reader().index().uncompressed_size))
        })
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

fn plain_directory(inode: u64, modified: Timestamp, links: u32) -> Attributes {
    Attributes {
        inode,
        kind: NodeKind::Directory,
        permissions: 0o755,
        uid: 0,
        gid: 0,
        size: 0,
        blocks: 0,
        modified,
        links,
        device: 0,
    }
}
