//! Keeps the store's files out of the page cache once they rest.
//!
//! What a program reads through a mount is cached there, so the pages of the store's own file below are a second copy
//! of it; and prefetched pages may never be read. Spans that were neither written nor read for a while therefore have
//! their pages dropped. While a program starts nothing of this happens: what is fetched ahead of it is read from
//! memory.
//!
//! Of a file that the kernel reads by itself (see [`LayerStore::lend`]) no use is noted, so all of its pages are dropped.
//!
//! Pages that are not on the disk yet cannot be dropped; asking for it only has them written. So each span is asked for
//! twice, one look after the other.
//!
//! Invariants: no byte is lost, whatever is dropped is on the disk; a span whose last use is younger than one look is
//! left alone; a failure here only leaves memory in use, and is logged once.

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use rustix::fs::{Advice, fadvise};
use soci_index::format::span::SpanId;

use crate::layer::store::Store;
use crate::layer::store::error::StoreError;
use crate::layer::store::layer::LayerStore;

/// The store's clock at the last looks, oldest first: between the first two lie the spans that are asked for again,
/// between the second and the third those that are asked for now; those behind the third were used just now.
#[derive(Debug, Clone, Copy, Default)]
pub struct Looks([u32; 3]);

impl Looks {
    /// Looks at the clock, and gives the uses that are due.
    fn look(&mut self, now: u32) -> Range<u32> {
        let [_, before, last] = self.0;
        let due = self.0[0]..last;
        self.0 = [before, last, now];
        due
    }
}

/// Whether a use lies in a range of the clock, which begins anew behind its end.
const fn is_in(uses: &Range<u32>, used: u32) -> bool {
    used.wrapping_sub(uses.start) < uses.end.wrapping_sub(uses.start)
}

impl Store {
    /// Drops the pages of spans that rest: those that were used before the last of `looks`, and not since. Gives the
    /// number of bytes whose pages were asked for.
    ///
    /// # Errors
    /// [`StoreError::Io`]. The other layers are looked at nevertheless.
    pub fn drop_second_copies(&self, looks: &mut Looks) -> Result<u64, StoreError> {
        let uses = looks.look(self.common.ticks.load(Ordering::Relaxed));
        let open: Vec<Arc<LayerStore>> = {
            let layers = self.layers.lock();
            layers.values().filter_map(Weak::upgrade).collect()
        };
        let mut asked = Ok(0);
        for layer in open {
            match (layer.drop_pages(&uses), &mut asked) {
                (Ok(bytes), Ok(sum)) => *sum += bytes,
                (Ok(_), Err(_)) => {}
                (Err(error), asked) => *asked = Err(error),
            }
        }
        asked
    }

    /// Does [`Store::drop_second_copies`] at every interval, for as long as it is polled, on the blocking pool.
    pub async fn keep_single(self: Arc<Self>, interval: Duration) {
        let (mut looks, mut is_told) = (Looks::default(), false);
        loop {
            tokio::time::sleep(interval).await;
            let store = Arc::clone(&self);
            let dropping = tokio::task::spawn_blocking(move || (store.drop_second_copies(&mut looks), looks));
            match dropping.await {
                Ok((result, later)) => {
                    looks = later;
                    if let Err(error) = result
                        && !std::mem::replace(&mut is_told, true)
                    {
                        tracing::warn!(%error, "what is read stays in memory twice");
                    }
                }
                Err(_) => return,
            }
        }
    }
}

impl LayerStore {
    /// Drops the pages of all spans whose last use is one of `uses`; gives the bytes of these spans.
    fn drop_pages(&self, uses: &Range<u32>) -> Result<u64, StoreError> {
        let is_due = |span: SpanId| {
            (self.is_lent() || is_in(uses, self.last_used(span))) && (self.is_present(span) || self.has_parts(span))
        };
        let (mut asked, mut run) = (0, 0..0);
        for span in 0..=self.spans() {
            if span < self.spans() && is_due(span) {
                let place = self.place(span);
                run = if run.is_empty() { place } else { run.start..place.end };
            } else if !run.is_empty() {
                let length = std::num::NonZeroU64::new(run.end - run.start);
                fadvise(&self.data, run.start, length, Advice::DontNeed)
                    .map_err(|errno| self.failed("drop cached pages of", "data")(errno.into()))?;
                asked += run.end - run.start;
                run = 0..0;
            }
        }
        Ok(asked)
    }
}

#[cfg(test)]
mod tests {
    use std::io::IoSliceMut;

    use rustix::io::{Errno, ReadWriteFlags, preadv2};

    use super::super::Parts;
    use super::super::tests::{claim, table};
    use super::*;

    const SPAN: usize = 1 << 20;

    /// Whether a byte of the file is in the page cache; `None` where the file system does not report it.
    fn is_cached(layer: &LayerStore, offset: usize) -> Option<bool> {
        let mut byte = [0];
        let mut buffer = [IoSliceMut::new(&mut byte)];
        match preadv2(&layer.data, &mut buffer, offset as u64, ReadWriteFlags::NOWAIT) {
            Ok(_) => Some(true),
            Err(Errno::AGAIN) => Some(false),
            Err(_) => None,
        }
    }

    #[test]
    fn pages_of_what_rests_are_dropped() {
        // Beside the build, which is on a disk: what is in memory only has no other copy.
        let program = std::env::current_exe().unwrap();
        let directory = tempfile::tempdir_in(program.parent().unwrap()).unwrap();
        let store = Store::open(directory.path()).unwrap();
        let layer = store.layer(&claim(1), &table(4, SPAN as u64)).unwrap();
        for span in 0..3 {
            assert_eq!(layer.write(span, &vec![7; SPAN]).unwrap(), Parts::Agree);
        }
        let (middle, mut looks) = (SPAN / 2, Looks::default());
        if is_cached(&layer, middle) != Some(true) {
            eprintln!("SKIPPED: this file system does not report what is cached");
            return;
        }
        // What was used just now stays.
        assert_eq!(store.drop_second_copies(&mut looks).unwrap(), 0);
        assert_eq!(is_cached(&layer, middle), Some(true));
        // One span is used again; the others are asked for, and are on the disk at the second time.
        layer.touch(1);
        assert_eq!(store.drop_second_copies(&mut looks).unwrap(), 2 * SPAN as u64);
        layer.data.sync_data().unwrap();
        layer.touch(1);
        assert_eq!(store.drop_second_copies(&mut looks).unwrap(), 2 * SPAN as u64);
        let cached = [0, 1, 2].map(|span| is_cached(&layer, span * SPAN + middle).unwrap());
        assert_eq!(cached, [false, true, false]);
        // Nothing is lost.
        let mut bytes = vec![0; 3 * SPAN];
        layer.read(0, &mut bytes).unwrap();
        assert!(bytes.iter().all(|byte| *byte == 7));
    }

    #[test]
    fn uses_are_due_twice_and_not_at_once() {
        let mut looks = Looks::default();
        let mut due = |now| looks.look(now);
        // A use at 5.
        for (now, is_due) in [(10, false), (20, true), (30, true), (40, false), (40, false), (40, false)] {
            let uses = due(now);
            assert_eq!(is_in(&uses, 5), is_due, "{now}: {uses:?}");
        }
        // Nothing happens: nothing is due.
        assert!(due(40).is_empty());
        // The clock begins anew.
        let mut looks = Looks([u32::MAX - 10, u32::MAX - 5, u32::MAX - 2]);
        looks.look(3);
        let uses = looks.look(20);
        for (used, is_due) in [(u32::MAX - 6, false), (u32::MAX - 3, true), (u32::MAX, true), (2, true), (3, false)] {
            assert_eq!(is_in(&uses, used), is_due, "{used}: {uses:?}");
        }
    }
}
