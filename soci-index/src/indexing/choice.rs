//! Chooses where the spans of a span index begin, and makes their windows.
//!
//! A zTOC's checkpoints are where AWS's builder sets them. Ours may be anywhere near the wanted distance, so of the
//! block boundaries around every multiple of it the cheapest is taken: the one before which the fewest bytes are
//! referred to by what follows, and which cuts no small file in two. What that is shows only when some more of the
//! stream has come, so the compressed bytes since the first boundary in question are held, a few hundred KiB, and
//! hashed afterwards.
//!
//! Pure. Invariants: what is held is bounded whatever the stream does; the spans cover the stream from its first block
//! on without a gap; the same stream gives the same spans, however it is cut into pieces.

use std::collections::VecDeque;

use sha2::{Digest as _, Sha256};

use crate::format::checkpoint::{Checkpoint, WINDOW_BYTES, Window, WindowBytes};
use crate::format::compact::used::{keep, used};
use crate::format::compact::{EncodeError, WindowsBlob};

/// Compressed bytes behind a boundary that are enough to know what they refer to: 32 KiB of output, and the codes.
const FOLLOW_BYTES: usize = 48 << 10;
/// Compressed bytes between the first and the last boundary that are compared. Empty blocks can make any number of them
/// without any output.
const REACH_BYTES: u64 = 512 << 10;
/// Boundaries that are looked at around one place.
const CANDIDATES: u64 = 8;
/// What it counts to cut a small file in two: so many bytes of a window.
const CUT_COST: usize = 1_024;

/// A block boundary at which a span may begin.
#[derive(Debug, Clone)]
pub struct Candidate {
    /// First byte of the layer blob that belongs to what follows alone.
    pub compressed: u64,
    /// Bytes of output before it.
    pub uncompressed: u64,
    /// How many top bits of the byte before belong to what follows: 0 to 7.
    pub bits: u8,
    /// Whether it lies within a file that is smaller than a span.
    pub cuts_file: bool,
    /// The output before it.
    pub window: WindowBytes,
}

/// Says which boundaries are worth being looked at. Known to the scanner, which has the windows at hand.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Zones {
    span_bytes: u64,
    /// Output before the last candidate; `None` before the first.
    last: Option<u64>,
}

impl Zones {
    /// Spans of about `span_bytes` of output, at least 1.
    #[must_use]
    pub(crate) const fn new(span_bytes: u64) -> Self {
        Self { span_bytes, last: None }
    }

    /// Whether the boundary after `uncompressed` bytes of output is a candidate. Each is asked about once, in order.
    pub(crate) fn wants(&mut self, uncompressed: u64) -> bool {
        let Some(last) = self.last else {
            self.last = Some(uncompressed);
            return true;
        };
        // Of the boundaries before the first byte the last one counts; the chooser sees to that.
        let at_start = uncompressed == 0;
        let far_enough = uncompressed - last >= (self.span_bytes / 4).div_ceil(CANDIDATES).max(1);
        // After a zone without any, the first boundary that comes.
        let overdue = uncompressed > self.end(self.zone(last) + 1);
        let wanted = at_start || overdue || (far_enough && self.within(uncompressed));
        if wanted {
            self.last = Some(uncompressed);
        }
        wanted
    }

    /// Which multiple of the span size is nearest.
    const fn zone(&self, uncompressed: u64) -> u64 {
        (uncompressed + self.span_bytes / 2) / self.span_bytes
    }

    /// Where the zone around a multiple ends: an eighth of a span behind it. It begins as much before it.
    const fn end(&self, zone: u64) -> u64 {
        zone * self.span_bytes + self.span_bytes / 8
    }

    /// Whether it lies in the zone around the nearest multiple.
    const fn within(&self, uncompressed: u64) -> bool {
        let zone = self.zone(uncompressed);
        zone > 0 && uncompressed.abs_diff(zone * self.span_bytes) <= self.span_bytes / 8
    }
}

#[derive(Debug, Clone, Default)]
pub struct Chosen {
    /// Where the spans begin, with empty windows.
    pub checkpoints: Vec<Checkpoint>,
    /// SHA-256 of each span's compressed bytes.
    pub digests: Vec<[u8; 32]>,
    pub windows: WindowsBlob,
}

/// Takes the compressed stream and its candidates, and chooses.
#[derive(Debug)]
pub struct Chooser {
    zones: Zones,
    /// Candidates not yet decided on, in order.
    open: VecDeque<Candidate>,
    /// Compressed bytes that are not hashed yet, from `held_from` on.
    held: Vec<u8>,
    held_from: u64,
    /// The last byte that was hashed.
    last_byte: u8,
    /// The span in progress; `None` before the first.
    span: Option<Sha256>,
    spans_max: usize,
    chosen: Chosen,
    failed: Option<EncodeError>,
}

impl Chooser {
    /// Chooses spans of about `span_bytes` of output, at least 1; of more than `spans_max` nothing is kept.
    #[must_use]
    pub fn new(span_bytes: u64, spans_max: usize) -> Self {
        Self {
            zones: Zones::new(span_bytes),
            spans_max,
            open: VecDeque::new(),
            held: Vec::new(),
            held_from: 0,
            last_byte: 0,
            span: None,
            chosen: Chosen::default(),
            failed: None,
        }
    }

    /// The next piece of the layer blob, the candidates in it, and how much output there is up to its end.
    pub fn push(&mut self, piece: &[u8], candidates: Vec<Candidate>, produced: u64) {
        self.held.extend_from_slice(piece);
        for candidate in candidates {
            // While nothing has come out, each boundary takes the place of the one before.
            if candidate.uncompressed == 0 {
                self.open.clear();
            }
            self.open.push_back(candidate);
        }
        while self.decide(produced, false) {}
        self.hash_what_is_settled();
    }

    /// Compressed bytes that wait for a choice.
    #[must_use]
    pub fn held_bytes(&self) -> usize {
        self.held.len()
    }

    /// Ends the stream.
    ///
    /// # Errors
    /// [`EncodeError`] when a window could not be compressed.
    pub fn finish(mut self) -> Result<Chosen, EncodeError> {
        while self.decide(u64::MAX, true) {}
        self.hash(self.held.len());
        if let Some(span) = self.span.take() {
            self.chosen.digests.push(span.finalize().into());
        }
        match self.failed {
            Some(error) => Err(error),
            None => Ok(self.chosen),
        }
    }

    /// Decides on the first open zone if all is known that it takes.
    fn decide(&mut self, produced: u64, at_end: bool) -> bool {
        let Some(first) = self.open.front() else { return false };
        let (zone, reach) = (self.zones.zone(first.uncompressed), first.compressed + REACH_BYTES);
        let fits =
            |candidate: &&Candidate| self.zones.zone(candidate.uncompressed) == zone && candidate.compressed <= reach;
        let of_zone = self.open.iter().take_while(fits).count();
        let Some(last) = self.open.get(of_zone - 1) else { return false };
        let held_to = self.held_from + self.held.len() as u64;
        let followed = held_to >= last.compressed + FOLLOW_BYTES as u64;
        let over = of_zone < self.open.len() || produced > self.zones.end(zone) || held_to > reach;
        if !(at_end || followed && over) {
            return false;
        }
        let cost = |candidate: &Candidate| self.cost(candidate);
        let best =
            self.open.iter().take(of_zone).map(cost).enumerate().min_by_key(|(number, (cost, _))| (*cost, *number));
        let Some((best, (_, window))) = best else { return false };
        let mut taken: Vec<Candidate> = self.open.drain(..of_zone).collect();
        self.begin(taken.swap_remove(best), &window);
        true
    }

    /// What a candidate costs, and its window without unreferenced bytes.
    fn cost(&self, candidate: &Candidate) -> (usize, WindowBytes) {
        let mut window = candidate.window.clone();
        let shared = u64::from(candidate.bits > 0);
        let from =
            usize::try_from((candidate.compressed - self.held_from).saturating_sub(shared)).unwrap_or(usize::MAX);
        let follows = self.held.get(from..).unwrap_or_default();
        // No more than is there whenever the choice is made, so that it is always the same.
        let follows = follows.get(..FOLLOW_BYTES).unwrap_or(follows);
        let bytes = match used(follows, candidate.bits) {
            Some(mask) => {
                keep(&mut window, &mask);
                mask.iter().filter(|used| **used).count()
            }
            None => WINDOW_BYTES,
        };
        (bytes + if candidate.cuts_file { CUT_COST } else { 0 }, window)
    }

    /// Ends the span in progress and begins the next.
    fn begin(&mut self, at: Candidate, window: &[u8; WINDOW_BYTES]) {
        self.hash(usize::try_from(at.compressed - self.held_from).unwrap_or(usize::MAX).min(self.held.len()));
        if let Some(span) = self.span.take() {
            self.chosen.digests.push(span.finalize().into());
        }
        let mut span = Sha256::new();
        if at.bits > 0 {
            span.update([self.last_byte]);
        }
        self.span = Some(span);
        if self.chosen.checkpoints.len() == self.spans_max {
            self.failed = Some(EncodeError::Spans { limit: self.spans_max });
            self.chosen = Chosen::default();
        }
        if self.failed.is_some() {
            return;
        }
        let Candidate { compressed, uncompressed, bits, .. } = at;
        self.chosen.checkpoints.push(Checkpoint { compressed, uncompressed, bits, window: Window::EMPTY });
        // What comes before the first byte is zeros, and the first block may not refer to it.
        let pushed = self.chosen.windows.push(if uncompressed == 0 { &[0; WINDOW_BYTES] } else { window });
        self.failed = pushed.err();
    }

    /// Hashes what belongs to the span in progress, whatever is decided.
    fn hash_what_is_settled(&mut self) {
        let end = self.held_from + self.held.len() as u64;
        // One byte stays: the next boundary may be in the middle of it.
        let settled = self.open.front().map_or(end, |first| first.compressed).saturating_sub(1);
        self.hash(usize::try_from(settled.saturating_sub(self.held_from)).unwrap_or(0));
    }

    fn hash(&mut self, length: usize) {
        let Some(bytes) = self.held.get(..length) else { return };
        if let Some(span) = &mut self.span {
            span.update(bytes);
        }
        self.last_byte = bytes.last().copied().unwrap_or(self.last_byte);
        self.held_from += length as u64;
        self.held.drain(..length);
    }
}

/// The spans of a plain tar: equal pieces of it.
#[derive(Debug)]
pub(crate) struct Pieces {
    span_bytes: u64,
    /// Bytes until the span in progress is full.
    left: u64,
    span: Sha256,
    digests: Vec<[u8; 32]>,
}

impl Pieces {
    /// Spans of `span_bytes`, at least 1.
    #[must_use]
    pub(crate) fn new(span_bytes: u64) -> Self {
        Self { span_bytes, left: span_bytes, span: Sha256::new(), digests: Vec::new() }
    }

    /// The next piece of the layer blob.
    pub(crate) fn push(&mut self, mut piece: &[u8]) {
        while !piece.is_empty() {
            let length = piece.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
            let (here, rest) = piece.split_at(length);
            self.span.update(here);
            self.left -= length as u64;
            if self.left == 0 {
                self.digests.push(self.span.finalize_reset().into());
                self.left = self.span_bytes;
            }
            piece = rest;
        }
    }

    /// SHA-256 of each span.
    #[must_use]
    pub(crate) fn finish(mut self) -> Vec<[u8; 32]> {
        if self.left < self.span_bytes {
            self.digests.push(self.span.finalize().into());
        }
        self.digests
    }
}
