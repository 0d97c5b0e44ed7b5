//! The layers of images in registries, as the store of snapshots asks for them.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;

use crate::node::metrics::Metrics;
use crate::node::remote::RemoteLayers;
use crate::node::remote::error::Failed;
use crate::node::snapshots::provider::{LayerProvider, LayerRequest, Provided};
use crate::tree::id_map::IdMap;

/// [`RemoteLayers`] whose work is counted.
#[derive(Debug)]
pub struct Counted {
    pub layers: RemoteLayers,
    /// The counters.
    pub metrics: Arc<Metrics>,
}

impl LayerProvider for Counted {
    fn provide<'a>(&'a self, request: &'a LayerRequest) -> BoxFuture<'a, Provided> {
        let start = Instant::now();
        let is_ready = self.layers.is_under_way(&request.labels);
        let counter = if is_ready { &self.metrics.ready } else { &self.metrics.unready };
        counter.fetch_add(1, Ordering::Relaxed);
        let provided = self.layers.provide(&request.labels);
        let counted = provided.map(move |provided| match provided {
            Ok(slot) => {
                self.metrics.mount.record(start.elapsed());
                self.metrics.provided.fetch_add(1, Ordering::Relaxed);
                Provided::Layer { slot, is_whole: self.layers.is_whole(slot) }
            }
            Err(error) => {
                match error.failure() {
                    Some(Failed::Lazy) => drop(self.metrics.lazy_failures.fetch_add(1, Ordering::Relaxed)),
                    Some(Failed::Whole) => drop(self.metrics.whole_failures.fetch_add(1, Ordering::Relaxed)),
                    None => {}
                }
                self.metrics.left.fetch_add(1, Ordering::Relaxed);
                Provided::Leave { reason: error.to_string() }
            }
        });
        counted.boxed()
    }

    fn lower_directory(&self, slot: u16, id_map: Option<u8>) -> PathBuf {
        self.layers.directory(slot, id_map)
    }

    fn state_directory(&self, slot: u16) -> Option<PathBuf> {
        self.layers.state_directory(slot)
    }

    fn assign_id_map(&self, map: &IdMap) -> Result<u8, String> {
        self.layers.assign_id_map(map).map_err(|error| error.to_string())
    }

    fn id_map(&self, number: u8) -> Option<IdMap> {
        self.layers.id_map(number)
    }

    fn keep_id_maps(&self, used: &BTreeSet<u8>) {
        self.layers.keep_id_maps(used);
    }

    fn release(&self, slot: u16) {
        self.layers.release(slot);
    }
}
