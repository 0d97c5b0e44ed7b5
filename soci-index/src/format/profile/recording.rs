//! A profile in the making: reads go in, each page comes out once, where it was read first.
//!
//! Programs read several files in turn, and the kernel reads ahead in each, so a stretch that continues one of the
//! latest few is added to that one instead of becoming a range of its own: the order changes by next to nothing, and
//! the ranges become much fewer. Invariant: what it holds keeps the limits; when they are reached it notes nothing
//! more.

use std::collections::HashMap;
use std::ops::Range;

use crate::format::digest::Digest;
use crate::format::limits::Limits;
use crate::format::profile::{PAGE_BYTES, Profile, ProfileError, RANGE_BYTES_MAX, Touched};

/// How many ranges back one may still grow.
const OPEN_RANGES: usize = 64;

/// Reads that were noted.
#[derive(Debug, Clone)]
pub struct Recording {
    limits: Limits,
    layers: Vec<Digest>,
    /// One bit for each page of each layer.
    seen: Vec<Vec<u64>>,
    /// The ranges that ended last at these pages of these layers.
    ends: HashMap<(u32, u64), usize>,
    ranges: Vec<Touched>,
    bytes: u64,
    is_full: bool,
}

impl Recording {
    /// Nothing noted yet.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        let (layers, seen, ends, ranges) = (Vec::new(), Vec::new(), HashMap::new(), Vec::new());
        Self { limits, layers, seen, ends, ranges, bytes: 0, is_full: false }
    }

    /// The number of a layer, for [`Self::record`].
    pub fn layer(&mut self, layer: &Digest) -> u32 {
        let known = self.layers.iter().position(|other| other == layer);
        let number = known.unwrap_or_else(|| {
            self.layers.push(*layer);
            self.seen.push(Vec::new());
            self.layers.len() - 1
        });
        u32::try_from(number).unwrap_or(u32::MAX)
    }

    /// Records that `bytes` of a layer, which is `size` bytes long, were read.
    pub fn record(&mut self, layer: u32, bytes: Range<u64>, size: u64) {
        if bytes.is_empty() || bytes.start >= size {
            return;
        }
        let (first, last) = (bytes.start / PAGE_BYTES, bytes.end.min(size).div_ceil(PAGE_BYTES));
        self.note_up_to_page(layer, first * PAGE_BYTES..last.saturating_mul(PAGE_BYTES).min(size));
    }

    /// Notes whole pages, of which the last may be short.
    pub(super) fn note_up_to_page(&mut self, layer: u32, bytes: Range<u64>) {
        let pages = bytes.start / PAGE_BYTES..bytes.end.div_ceil(PAGE_BYTES);
        for page in pages.clone() {
            if self.is_full || !self.is_new(layer, page) {
                continue;
            }
            let end = if page + 1 == pages.end { bytes.end } else { (page + 1) * PAGE_BYTES };
            self.add(layer, page * PAGE_BYTES..end);
        }
    }

    /// Whether the limits were reached, so that something is missing.
    #[must_use]
    pub const fn is_full(&self) -> bool {
        self.is_full
    }

    /// Whether nothing was noted.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// The profile.
    ///
    /// # Errors
    /// [`ProfileError`], which would be a mistake of ours: what is noted keeps the limits.
    pub fn finish(&self) -> Result<Profile, ProfileError> {
        Profile::new(self.layers.clone(), self.ranges.clone(), &self.limits)
    }

    /// Marks a page; whether it was not marked yet.
    fn is_new(&mut self, layer: u32, page: u64) -> bool {
        // A page beyond this would be of a layer of 2^44 bytes.
        let Ok(word) = usize::try_from(page / 64).map(|word| word.min(1 << 26)) else { return false };
        let Some(seen) = self.seen.get_mut(layer as usize) else { return false };
        if word == 1 << 26 {
            return false;
        }
        if seen.len() <= word {
            seen.resize(word + 1, 0);
        }
        let bit = 1 << (page % 64);
        let is_new = seen[word] & bit == 0;
        seen[word] |= bit;
        is_new
    }

    fn add(&mut self, layer: u32, bytes: Range<u64>) {
        let length = bytes.end - bytes.start;
        if self.bytes + length > self.limits.profile_bytes_max {
            self.is_full = true;
            return;
        }
        let oldest = self.ranges.len().saturating_sub(OPEN_RANGES);
        let before = self.ends.remove(&(layer, bytes.start)).filter(|place| *place >= oldest);
        let end = bytes.end;
        let place = match before.filter(|place| self.ranges[*place].length() + length <= RANGE_BYTES_MAX) {
            Some(place) => {
                self.ranges[place].bytes.end = end;
                place
            }
            None if self.ranges.len() == self.limits.profile_ranges_max => {
                self.is_full = true;
                return;
            }
            None => {
                self.ranges.push(Touched { layer, bytes });
                self.ranges.len() - 1
            }
        };
        self.bytes += length;
        self.ends.insert((layer, end), place);
    }
}
