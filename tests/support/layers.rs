//! The layers of a daemon without the daemon: what containerd asks for and what the kernel sees, in this process.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use soci_fs::fuse::error::FsError;
use soci_fs::fuse::file_system::FileSystem as _;
use soci_fs::fuse::forest::{Forest, ForestOptions};

use soci_fs::layer::reader::Policy;
use soci_fs::layer::store::{Store, StoreError};
use soci_fs::node::remote::background::{Background, Pace};
use soci_fs::node::remote::id_maps::IdMaps;
use soci_fs::node::remote::labels::{IMAGE, INDEX, LAYER, MANIFEST};
use soci_fs::node::remote::slots::{SlotRecord, Slots};
use soci_fs::node::remote::{ProfileOptions, Registries, RemoteLayers, RemoteOptions, Reopener};
use soci_fs::open::OpenOptions;
use soci_index::format::digest::Digest;
use soci_index::registry::{Backoff, ClientOptions, CredentialSource};

use crate::image::Image;

/// What a daemon has of its own.
#[derive(Debug)]
pub struct Daemon {
    /// The layers as the kernel would see them.
    pub forest: Arc<Forest>,
    /// Provides them.
    pub layers: RemoteLayers,
    slots: Arc<Slots>,
    store: Arc<Store>,
}

impl Daemon {
    /// One that reads layers whole where there is no other way.
    ///
    /// # Panics
    /// When the root cannot be used.
    #[must_use]
    pub fn start(root: &Path, whole_layers: bool) -> Self {
        Self::start_with(root, whole_layers, ProfileOptions::default())
    }

    /// The same, with start-up profiles.
    ///
    /// # Panics
    /// When the root cannot be used.
    #[must_use]
    pub fn start_with(root: &Path, whole_layers: bool, profiles: ProfileOptions) -> Self {
        let change = |options: OpenOptions| OpenOptions { whole_layers, ..options };
        Self::start_by(root, profiles, change)
    }

    /// The same, with other options.
    ///
    /// # Panics
    /// When the root cannot be used.
    #[must_use]
    pub fn start_by(root: &Path, profiles: ProfileOptions, change: impl FnOnce(OpenOptions) -> OpenOptions) -> Self {
        Self::start_all(root, profiles, &[], change)
    }

    /// One whose clients may have these headers sent.
    ///
    /// # Panics
    /// When the root cannot be used.
    #[must_use]
    pub fn start_allowing(root: &Path, headers: &[&str]) -> Self {
        Self::start_all(root, ProfileOptions::default(), headers, |options| options)
    }

    fn start_all(
        root: &Path,
        profiles: ProfileOptions,
        headers: &[&str],
        change: impl FnOnce(OpenOptions) -> OpenOptions,
    ) -> Self {
        let runtime = tokio::runtime::Handle::current();
        let client = ClientOptions {
            credentials: CredentialSource::Anonymous,
            deadline: Duration::from_secs(2),
            backoff: Backoff::default(),
            ..ClientOptions::default()
        };
        let open = change(OpenOptions {
            layer_bytes_min: 10_000,
            policy: Policy { read_deadline: Duration::from_secs(5), ..Policy::default() },
            index_store: Some(root.join("content")),
            parallel: 4,
            ..OpenOptions::default()
        });
        let store = Arc::new(open_store(root));
        let slots = Arc::new(Slots::open(&root.join("slots")).unwrap());
        let id_maps = IdMaps::open(root.join("id-maps.json")).unwrap();
        let registries =
            Arc::new(Registries::new(client, Vec::new(), headers.iter().map(|&name| name.to_owned()).collect()));
        let reopener = Reopener {
            slots: Arc::clone(&slots),
            store: Arc::clone(&store),
            registries: Arc::clone(&registries),
            options: open.clone(),
            runtime: runtime.clone(),
            known_places: None,
            trees: None,
        };
        let forest =
            Arc::new(Forest::new(ForestOptions { opener: Some(Arc::new(reopener)), ..ForestOptions::default() }));
        let modes = open.modes;
        let options = RemoteOptions {
            open,
            images_max: 2,
            layers_at_once: 4,
            open_limit: Duration::from_secs(10),
            mountpoint: root.join("fs"),
            trees: None,
            profiles,
            index_quota: u64::MAX,
            only_named: modes.is_off(),
            known_places: None,
        };
        let (kept, known) = (Arc::clone(&store), Arc::clone(&slots));
        let layers =
            RemoteLayers::new(Arc::clone(&forest), kept, known, id_maps, registries, options, runtime).unwrap();
        Self { forest, layers, slots, store }
    }

    /// Where the store keeps what is in a slot.
    ///
    /// # Panics
    /// When it is empty.
    #[must_use]
    pub fn directory(&self, slot: u16) -> PathBuf {
        self.store.directory(&self.slots.get(slot).expect("a layer in the slot").claim.id())
    }

    /// What is known of a slot.
    #[must_use]
    pub fn record(&self, slot: u16) -> Option<SlotRecord> {
        self.slots.get(slot)
    }

    /// Fetches and proves in the background, as a daemon does, with hardly a pause.
    #[must_use]
    pub fn background(&self, withheld: Option<Duration>) -> Background {
        let pace = Pace {
            silence: Duration::from_secs(60),
            period: Duration::from_millis(5),
            quiet: Duration::from_millis(200),
            withheld,
        };
        Background { layers: self.layers.clone(), pace, quota: None, metrics: Arc::default() }
    }

    /// Waits until there are so many slots.
    ///
    /// # Panics
    /// When that takes five seconds.
    pub async fn until_slots(&self, count: usize) {
        for _ in 0..500 {
            if self.forest.slots().len() == count {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{} slots instead of {count}", self.forest.slots().len());
    }

    /// A file of a slot, asked for as the kernel does.
    ///
    /// # Panics
    /// When it cannot be read.
    pub async fn read(&self, slot: u16, path: &str) -> Vec<u8> {
        self.try_read(slot, path).await.unwrap()
    }

    /// The same, if it can be read.
    ///
    /// # Errors
    /// What the kernel would get.
    ///
    /// # Panics
    /// On a file beyond this machine's memory.
    pub async fn try_read(&self, slot: u16, path: &str) -> Result<Vec<u8>, FsError> {
        let inode = self.inode(slot, path).await?;
        let size = usize::try_from(self.forest.attributes(inode)?.size).expect("a size");
        self.forest.read(inode, 0, size).await
    }

    /// Where a symbolic link leads.
    ///
    /// # Errors
    /// What the kernel would get.
    pub async fn link(&self, slot: u16, path: &str) -> Result<Vec<u8>, FsError> {
        self.forest.read_link(self.inode(slot, path).await?)
    }

    async fn inode(&self, slot: u16, path: &str) -> Result<u64, FsError> {
        self.forest.open(slot).await?;
        let mut inode = self.forest.lookup(1, slot.to_string().as_bytes())?.inode;
        for name in path.split('/') {
            inode = self.forest.lookup(inode, name.as_bytes())?.inode;
        }
        Ok(inode)
    }
}

/// Opens a store, which a daemon before may hold for a moment longer: until its last task has ended.
fn open_store(root: &Path) -> Store {
    for _ in 0..100 {
        match Store::open(root) {
            Err(StoreError::Busy { .. }) => std::thread::sleep(Duration::from_millis(50)),
            result => return result.expect("a store"),
        }
    }
    panic!("{} is in use", root.display());
}

/// What containerd says when it wants a layer of an image.
#[must_use]
pub fn labels(name: &str, image: &Image, layer: usize) -> BTreeMap<String, String> {
    BTreeMap::from([
        (IMAGE.to_owned(), name.to_owned()),
        (MANIFEST.to_owned(), image.digest().to_string()),
        (LAYER.to_owned(), Digest::of(&image.blobs[layer]).to_string()),
        (INDEX.to_owned(), String::new()),
    ])
}
