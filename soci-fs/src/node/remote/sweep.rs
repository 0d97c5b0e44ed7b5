//! Reclaims abandoned resources: fetches without a waiter, slots that were not requested, indexes of removed images.

use std::collections::HashSet;
use std::time::Duration;

use soci_index::find::sweep::{self, Swept};
use soci_index::format::digest::Digest;
use soci_index::image::layout::Layout;
use tokio::sync::watch;

use crate::node::remote::slots::SlotRecord;
use crate::node::remote::{RemoteLayers, RemoteOptions, RemoteState};

/// How long a slot that was filled may wait to be asked for.
const UNCLAIMED_LIFE: Duration = Duration::from_secs(600);

/// How long a layer without a waiting request is still fetched: a client may retry after an interruption.
const IDLE_LIFE: Duration = Duration::from_secs(60);

impl RemoteLayers {
    /// Ends fetches without a waiting request for that long: the pull was given up.
    pub fn end_idle(&self, life: Duration) {
        let mut state = self.0.state.lock();
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
        self.take_away(|state| {
            let over = state.unclaimed.iter().filter(|(_, since)| since.elapsed() >= life);
            over.map(|(slot, _)| *slot).collect()
        });
    }

    /// Does [`RemoteLayers::sweep`], [`RemoteLayers::end_idle`] and [`RemoteLayers::sweep_indexes`] from time to time,
    /// for as long as it is polled.
    pub async fn keep_swept(&self) {
        loop {
            tokio::time::sleep(IDLE_LIFE / 2).await;
            self.end_idle(IDLE_LIFE);
            // It removes files, and waits for records that are being written.
            let layers = self.clone();
            if tokio::task::spawn_blocking(move || layers.sweep(UNCLAIMED_LIFE)).await.is_err() {
                tracing::error!("unused slots could not be reclaimed");
            }
            self.sweep_indexes().await;
            self.show_whole().await;
        }
    }

    /// Removes from the local index store what was fetched for images that no slot is of any more, and what is too
    /// much.
    pub async fn sweep_indexes(&self) {
        let RemoteOptions { open, index_quota, .. } = &self.0.options;
        let (Some(directory), quota) = (open.index_store.clone(), *index_quota) else { return };
        let mut used: HashSet<Digest> = self.0.state.lock().images.iter().map(|known| known.key.manifest).collect();
        used.extend(self.0.slots.all().iter().flat_map(|(_, record)| record.manifests()));
        let swept = tokio::task::spawn_blocking(move || {
            if !directory.join("oci-layout").exists() {
                return Ok(Swept::default());
            }
            sweep::sweep(&Layout::open(&directory)?, &|image| used.contains(image), quota)
        });
        match swept.await {
            Ok(Ok(Swept { indexes: 0, .. })) | Err(_) => {}
            Ok(Ok(swept)) => tracing::info!(?swept, "indexes of removed images were deleted"),
            Ok(Err(error)) => tracing::warn!(%error, "the local index store could not be cleaned"),
        }
    }

    /// Takes away the slots that `choose` names while nothing changes, with what is stored of their layers. Blocks.
    pub(super) fn take_away(&self, choose: impl FnOnce(&RemoteState) -> Vec<u16>) {
        let leaving: Vec<Leaving> = {
            let mut state = self.0.state.lock();
            let slots = choose(&state);
            slots.into_iter().map(|slot| self.withdraw(&mut state, slot)).collect()
        };
        for leaving in &leaving {
            leaving.erase();
        }
    }

    /// Takes a slot out of all that can be asked for it. It touches no file, which is why the lock may be held.
    fn withdraw(&self, state: &mut RemoteState, slot: u16) -> Leaving {
        state.unclaimed.remove(&slot);
        self.0.forest.remove(slot);
        let record = self.0.slots.withdraw(slot);
        let (done, watched) = watch::channel(());
        if let Some(record) = &record {
            // The claim by which it was asked for may be another one, whose proof was here.
            state.layers.retain(|claim, bringing| {
                *claim != record.claim && !matches!(bringing.underway.peek(), Some(Ok(brought)) if *brought == slot)
            });
            state.leaving.insert(record.claim, watched);
        }
        Leaving { layers: self.clone(), slot, record, _done: done }
    }

    /// Waits while a slot of this layer, or of another one with the same tar, is being given up.
    pub(super) async fn until_left(&self, layer: &Digest, diff_id: &Digest) {
        let next = || {
            let state = self.0.state.lock();
            let mut leaving = state.leaving.iter();
            leaving.find(|(claim, _)| claim.layer == *layer || claim.diff_id == *diff_id).map(|(_, done)| done.clone())
        };
        while let Some(mut done) = next() {
            // Nothing is ever sent: it closes.
            let _ = done.changed().await;
        }
    }
}

/// A slot that nothing finds any more, until its files are gone.
struct Leaving {
    layers: RemoteLayers,
    slot: u16,
    record: Option<SlotRecord>,
    /// Closes when this is dropped.
    _done: watch::Sender<()>,
}

impl Leaving {
    /// Removes its files.
    fn erase(&self) {
        let (inner, slot) = (&self.layers.0, self.slot);
        if let Some(trees) = &inner.options.trees {
            trees.hide(slot);
        }
        if let Err(error) = inner.slots.erase(slot, self.record.as_ref()) {
            tracing::warn!(slot, %error, "a slot stays taken");
            return;
        }
        let Some(SlotRecord { claim, .. }) = &self.record else { return };
        let layer = claim.layer;
        match inner.store.set_aside(claim) {
            Ok(removed) => drop(inner.runtime.spawn_blocking(move || removed.delete())),
            Err(error) => tracing::warn!(slot, %layer, %error, "the data of a layer stay behind"),
        }
        tracing::info!(slot, %layer, "an unused layer is removed");
    }
}

impl Drop for Leaving {
    fn drop(&mut self) {
        if let Some(record) = &self.record {
            self.layers.0.state.lock().leaving.remove(&record.claim);
        }
    }
}
