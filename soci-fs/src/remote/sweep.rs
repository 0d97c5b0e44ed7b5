//! What is given up: fetches that are not waited for, slots that were not asked for, indexes of images that are gone.

use std::collections::HashSet;
use std::time::Duration;

use soci_index::digest::Digest;
use soci_index::find::sweep::{self, Swept};
use soci_index::image::layout::Layout;

use super::{RemoteLayers, RemoteOptions, State};

/// How long a slot that was filled may wait to be asked for.
const UNCLAIMED_LIFE: Duration = Duration::from_secs(600);

/// How long a layer without a waiting request is still fetched: a client may retry after an interruption.
const IDLE_LIFE: Duration = Duration::from_secs(60);

impl RemoteLayers {
    /// Ends fetches without a waiting request for that long: the pull was given up.
    pub fn end_idle(&self, life: Duration) {
        let mut state = self.0.state();
        let idle = state.layers.iter().filter(|(_, bringing)| bringing.is_idle(life));
        for claim in idle.map(|(claim, _)| *claim).collect::<Vec<_>>() {
            tracing::info!(layer = %claim.layer, "a layer is not waited for any more; its fetch is ended");
            if let Some(bringing) = state.layers.remove(&claim) {
                bringing.work.abort();
            }
        }
    }

    /// Takes slots away that were filled for questions that never came. Blocks.
    pub fn sweep(&self, life: Duration) {
        let mut state = self.0.state();
        let over = state.unclaimed.iter().filter(|(_, since)| since.elapsed() >= life);
        for slot in over.map(|(slot, _)| *slot).collect::<Vec<_>>() {
            self.take_away(&mut state, slot);
        }
    }

    /// Does [`RemoteLayers::sweep`], [`RemoteLayers::end_idle`] and [`RemoteLayers::sweep_indexes`] from time to time, for as
    /// long as it is polled.
    pub async fn keep_swept(&self) {
        loop {
            tokio::time::sleep(IDLE_LIFE / 2).await;
            self.end_idle(IDLE_LIFE);
            // It removes files, and waits for records that are being written.
            let layers = self.clone();
            if tokio::task::spawn_blocking(move || layers.sweep(UNCLAIMED_LIFE)).await.is_err() {
                tracing::error!("slots that were not asked for could not be swept");
            }
            self.sweep_indexes().await;
        }
    }

    /// Removes from the local index store what was fetched for images that no slot is of any more, and what is too much.
    pub async fn sweep_indexes(&self) {
        let RemoteOptions { open, index_quota, .. } = &self.0.options;
        let (Some(directory), quota) = (open.index_store.clone(), *index_quota) else { return };
        let mut used: HashSet<Digest> = self.0.state().images.iter().map(|known| known.key.manifest).collect();
        used.extend(self.0.slots.all().iter().flat_map(|(_, record)| record.manifests()));
        let swept = tokio::task::spawn_blocking(move || {
            if !directory.join("oci-layout").exists() {
                return Ok(Swept::default());
            }
            sweep::sweep(&Layout::open(&directory)?, &|image| used.contains(image), quota)
        });
        match swept.await {
            Ok(Ok(Swept { indexes: 0, .. })) | Err(_) => {}
            Ok(Ok(swept)) => tracing::info!(?swept, "indexes of images that are gone are removed"),
            Ok(Err(error)) => tracing::warn!(%error, "the local index store is not swept"),
        }
    }

    pub(super) fn take_away(&self, state: &mut State, slot: u16) {
        state.unclaimed.remove(&slot);
        self.0.forest.remove(slot);
        match self.0.slots.release(slot) {
            Ok(None) => {}
            Ok(Some(record)) => {
                let layer = record.claim.layer;
                // The claim by which it was asked for may be another one, whose proof was here.
                state.layers.retain(|claim, bringing| {
                    *claim != record.claim && !matches!(bringing.underway.peek(), Some(Ok(brought)) if *brought == slot)
                });
                match self.0.store.set_aside(&record.claim) {
                    Ok(removed) => drop(self.0.runtime.spawn_blocking(move || removed.delete())),
                    Err(error) => tracing::warn!(slot, %layer, %error, "the data of a layer stay behind"),
                }
                tracing::info!(slot, %layer, "an unused layer is removed");
            }
            Err(error) => tracing::warn!(slot, %error, "a slot stays taken"),
        }
    }
}
