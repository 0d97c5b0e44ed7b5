//! Listens to readers and notes which bytes they hand out, in the order in which they do so first.
//!
//! What is noted are the reads of the kernel, with its read-ahead, so that what is in a profile is what will be asked
//! for again. Reads that the page cache answers are not seen: for a complete recording, mount anew. A reader without a
//! recorder pays for one look at an empty cell.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use soci_index::format::limits::Limits;
use soci_index::format::profile::{Profile, ProfileError, Recording};

use crate::layer::reader::{LayerReader, Listener};

/// Notes what the readers that it was attached to hand out. Clones share everything.
#[derive(Debug, Clone)]
pub struct Recorder {
    recording: Arc<Mutex<Recording>>,
    /// When it stops listening.
    until: Option<Instant>,
}

/// A recorder as one layer's reader knows it.
#[derive(Debug)]
struct OfLayer {
    recorder: Recorder,
    layer: u32,
    size: u64,
}

impl Recorder {
    /// An empty recorder.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self { recording: Arc::new(Mutex::new(Recording::new(limits))), until: None }
    }

    /// One that listens for so long from now on: what is read later is no part of a start-up.
    #[must_use]
    pub fn for_time(limits: Limits, time: Duration) -> Self {
        Self { until: Instant::now().checked_add(time), ..Self::new(limits) }
    }

    /// Listens to a reader from now on.
    pub fn attach(&self, reader: &LayerReader) {
        let layer = self.recording.lock().layer(&reader.digest());
        let size = reader.store().size();
        reader.listen(Box::new(OfLayer { recorder: self.clone(), layer, size }));
    }

    /// What was noted until now.
    ///
    /// # Errors
    /// [`ProfileError`], which would be a mistake of ours.
    pub fn profile(&self) -> Result<Profile, ProfileError> {
        self.recording.lock().finish()
    }

    /// Whether the limits were reached, so that something is missing.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.recording.lock().is_full()
    }
}

impl Listener for OfLayer {
    fn on_read(&self, offset: u64, length: usize) -> bool {
        if self.recorder.until.is_some_and(|until| Instant::now() > until) {
            return false;
        }
        self.recorder.recording.lock().record(self.layer, offset..offset.saturating_add(length as u64), self.size);
        true
    }
}
