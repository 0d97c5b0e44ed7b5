//! Where a layer is shown: by a file system of the kernel where that is possible, else by the forest.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use futures_util::{StreamExt as _, stream};

use crate::node::remote::RemoteLayers;
use crate::node::remote::trees::ShownTree;

/// Layers that are opened at the same time to be shown after a restart.
const SHOWN_AT_ONCE: usize = 4;

/// How long a start waits for that: a layer whose table was lost asks a registry for it.
const SHOWN_LIMIT: Duration = Duration::from_secs(10);

impl RemoteLayers {
    /// The directory that shows a slot's layer, with owners mapped if `id_map` is given. Blocks when the kernel shows the
    /// layer by that mapping for the first time.
    #[must_use]
    pub fn directory(&self, slot: u16, id_map: Option<u8>) -> PathBuf {
        let map = id_map.and_then(|number| Some((number, self.0.id_maps.get(number)?)));
        // Of a layer that is out of service the forest shows nothing.
        let is_served = || self.0.forest.reader(slot).is_none_or(|reader| reader.health().check_service().is_ok());
        if let Some(trees) = &self.0.options.trees
            && id_map.is_some() == map.is_some()
            && is_served()
        {
            match trees.directory(slot, map.as_ref().map(|(number, map)| (*number, map))) {
                Ok(Some(place)) => return place,
                Ok(None) => {}
                Err(error) => tracing::info!(slot, %error, "owners are mapped by the daemon"),
            }
        }
        let name = id_map.map_or_else(|| slot.to_string(), |map| format!("{slot}-{map}"));
        self.0.options.mountpoint.join(name)
    }

    /// The directory that has the status file of a slot's layer only, if another one shows its names: not if the kernel
    /// does without the daemon, which is then not to be needed for this either.
    #[must_use]
    pub fn state_directory(&self, slot: u16) -> Option<PathBuf> {
        (self.tree(slot) == ShownTree::Erofs).then(|| self.0.options.mountpoint.join(format!("{slot}.state")))
    }

    /// What shows the layer in a slot to containers that are made now.
    #[must_use]
    pub fn tree(&self, slot: u16) -> ShownTree {
        let trees = self.0.options.trees.as_ref().filter(|trees| trees.is_shown(slot));
        trees.map_or(
            ShownTree::Fuse,
            |trees| if trees.is_whole(slot) { ShownTree::ErofsWhole } else { ShownTree::Erofs },
        )
    }

    /// Has the kernel show the layer in a slot, which is open, where that is possible.
    pub(super) async fn show(&self, slot: u16) {
        let (Some(trees), Some(layout)) = (self.0.options.trees.clone(), self.0.forest.layout(slot)) else { return };
        let layers = self.clone();
        let shown = tokio::task::spawn_blocking(move || {
            let layer = layout.digest();
            if let Err(error) = trees.show(slot, &layout, !layers.is_whole(slot)) {
                tracing::warn!(slot, %layer, %error, "the daemon shows a layer's names, which is slower");
            }
            // It may have been removed, or proven wrong, meanwhile.
            if !layers.0.forest.has(slot) || !layers.is_believed(slot) {
                trees.hide(slot);
            }
        });
        if shown.await.is_err() {
            tracing::error!(slot, "a layer could not be shown by the kernel");
        }
    }

    /// Has the kernel read the layers by itself that have become whole.
    pub(super) async fn show_whole(&self) {
        for (slot, _) in self.0.forest.slots() {
            self.show(slot).await;
        }
    }

    /// Has the kernel show the layers that were provided before, where it does not do so already: after a reboot, or
    /// when the forest was mounted anew. The forest must be served. Waits for a few seconds at most; the rest follows.
    pub async fn show_all(&self) {
        let layers = self.clone();
        let shown = self.0.runtime.spawn(async move { layers.show_missing().await });
        if tokio::time::timeout(SHOWN_LIMIT, shown).await.is_err() {
            tracing::warn!("some layers cannot be opened yet; the daemon shows their names until then");
        }
    }

    async fn show_missing(&self) {
        let Some(trees) = &self.0.options.trees else { return };
        let start = Instant::now();
        let missing = self.0.forest.slots().into_iter().map(|(slot, _)| slot).filter(|slot| !trees.is_shown(*slot));
        let missing: Vec<u16> = missing.collect();
        let count = missing.len();
        let show = |slot| async move {
            match self.0.forest.open(slot).await {
                Ok(()) => self.show(slot).await,
                Err(error) => tracing::warn!(slot, %error, "the daemon shows a layer's names, once it can be opened"),
            }
        };
        stream::iter(missing).for_each_concurrent(SHOWN_AT_ONCE, show).await;
        if count > 0 {
            tracing::info!(layers = count, elapsed = ?start.elapsed(), "layers are shown by the kernel again");
        }
    }
}
