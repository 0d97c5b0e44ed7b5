//! Fetches the rest of layers while nothing else goes on, and then proves them.
//!
//! A layer that is here whole needs no registry and no credentials any more, and can be compared with the digest that
//! the image itself names: until then it is a *claim*, trusted as far as its index is. What to do next is decided by
//! `machine`; here it is done, a few megabytes at a time, so that a program that starts waits for one request at most.
//!
//! Invariants: a layer that is removed is left alone at once; nothing is fetched that the quota would only throw out
//! again; a layer that fails its proof is taken out of service, with a line in the log that says why.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use soci_index::format::digest::Digest;
use tokio::time::Instant;

mod machine;

pub use machine::Pace;

use crate::layer::proof::{self, Verdict};
use crate::layer::unpack::LayerClaim;
use crate::node::metrics::Metrics;
use crate::node::remote::RemoteLayers;
use machine::{Layer, Machine, Step};

/// Compressed bytes of one fetch: less than a tenth of a second at 1 Gbit/s.
const FETCH_BYTES: u64 = 4 << 20;
/// Between two fetches of a claim that is to be proven: enough for a read to be seen.
const PAUSE: Duration = Duration::from_millis(20);
/// How often a proof in progress looks whether its layer is still wanted.
const LOOK: Duration = Duration::from_secs(1);

/// What is done in the background, and how fast.
#[derive(Debug)]
pub struct Background {
    pub layers: RemoteLayers,
    /// When to be quiet.
    pub pace: Pace,
    /// Bytes of disk that the store may take; nothing more is fetched when nine tenths of it are taken.
    pub quota: Option<u64>,
    /// The counters.
    pub metrics: Arc<Metrics>,
}

impl Background {
    /// Works for as long as it is polled.
    pub async fn run(self) {
        let mut machine = Machine::new(self.pace);
        loop {
            let layers = self.state();
            let added = self.metrics.provided.load(Ordering::Relaxed);
            match machine.step(Instant::now(), added, self.has_room().await, &layers) {
                Step::Wait(time) => tokio::time::sleep(time).await,
                Step::Fetch(slot) => {
                    self.done(&mut machine, slot, self.fetch(slot).await);
                    tokio::time::sleep(self.pace.period).await;
                }
                Step::FetchOn(slot) => {
                    self.done(&mut machine, slot, self.fetch(slot).await);
                    tokio::time::sleep(self.pace.period.min(PAUSE)).await;
                }
                Step::Prove(slot) => self.done(&mut machine, slot, self.prove(slot, true).await),
                Step::ProveBySource(slot) => self.done(&mut machine, slot, self.prove(slot, false).await),
                Step::Suspend(slot) => self.suspend(slot),
            }
        }
    }

    fn done(&self, machine: &mut Machine, slot: u16, is_good: bool) {
        let is_proven = self.layers.0.forest.reader(slot).is_some_and(|reader| reader.store().is_proven());
        machine.ended(Instant::now(), slot, is_good, is_proven);
    }

    fn suspend(&self, slot: u16) {
        if let Some(reader) = self.layers.0.forest.reader(slot) {
            let cause = reader.health().last_error().unwrap_or_else(|| "its source does not deliver".to_owned());
            reader.health().suspend(format!(
                "it could not be proven for {} s: {cause}",
                self.pace.withheld.unwrap_or_default().as_secs()
            ));
        }
    }

    /// The layers that are open: those that are not are opened when they are looked at.
    fn state(&self) -> Vec<Layer> {
        let slots = self.layers.0.forest.slots().into_iter();
        let open = slots.filter_map(|(slot, _)| Some((slot, self.layers.0.forest.reader(slot)?)));
        open.map(|(slot, reader)| Layer {
            slot,
            is_complete: reader.store().is_complete(),
            is_proven: reader.store().is_proven(),
            is_condemned: reader.health().condemned().is_some(),
            is_suspended: reader.health().suspended().is_some(),
            is_used: reader.is_used(),
            is_busy: reader.is_busy(),
            is_awaited: reader.waits().any_within(self.pace.quiet),
        })
        .collect()
    }

    async fn has_room(&self) -> bool {
        let Some(quota) = self.quota else { return true };
        let store = Arc::clone(&self.layers.0.store);
        let used = tokio::task::spawn_blocking(move || store.disk_bytes()).await;
        matches!(used, Ok(Ok(used)) if used < quota / 10 * 9)
    }

    async fn fetch(&self, slot: u16) -> bool {
        let Some(reader) = self.layers.0.forest.reader(slot) else { return true };
        let (before, start) = (reader.store().present_spans(), std::time::Instant::now());
        let fetched = reader.fetching().fetch_some(FETCH_BYTES).await;
        self.metrics.background.record(start.elapsed());
        match fetched {
            Ok(spans) => {
                self.metrics.background_spans.fetch_add(spans.into(), Ordering::Relaxed);
                // A full disk does not keep what was fetched: fetching more would be wasted.
                spans == 0 || reader.store().present_spans() > before
            }
            Err(error) => {
                self.metrics.background_failures.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(slot, layer = %reader.digest(), %error, "a fetch in the background failed; the layer rests");
                false
            }
        }
    }

    /// Proves a layer: by what is stored, all of which is there, or else by the blob alone.
    async fn prove(&self, slot: u16, is_whole: bool) -> bool {
        let (Some(reader), Some(record)) = (self.layers.0.forest.reader(slot), self.layers.0.slots.get(slot)) else {
            return true;
        };
        let layer = reader.digest();
        if record.claim.layer != layer {
            return true;
        }
        let size = reader.index().compressed_size;
        let claim = LayerClaim { digest: layer, size, diff_id: record.claim.diff_id };
        let proof = async {
            if is_whole { proof::prove(&reader, claim).await } else { proof::by_source(&reader, claim).await }
        };
        let verdict = tokio::select! {
            verdict = proof => verdict,
            () = self.gone(slot, layer) => return true,
        };
        match verdict {
            Ok(Verdict::Proven) => {
                tracing::info!(slot, %layer, is_whole, "a layer is proven");
                reader.health().resume();
                self.layers.show(slot).await;
                true
            }
            // Both say so about a layer that cannot be judged; asking again soon would not help.
            Ok(Verdict::Undecided) => false,
            // The log has it: see `Health::condemn`.
            Err(_) if reader.health().condemned().is_some() => {
                self.metrics.condemned.fetch_add(1, Ordering::Relaxed);
                true
            }
            Err(error) => {
                tracing::warn!(slot, %layer, %error, "a layer cannot be proven yet");
                false
            }
        }
    }

    /// Ends when the slot has no longer this layer.
    async fn gone(&self, slot: u16, layer: Digest) {
        while self.layers.0.forest.reader(slot).is_some_and(|reader| reader.digest() == layer) {
            tokio::time::sleep(LOOK).await;
        }
    }
}
