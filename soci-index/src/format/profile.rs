//! Profiles: which bytes of an image a start-up reads, in the order in which it reads them first.
//!
//! A profile speaks of *uncompressed* layers, never of spans: it is as good after an image was indexed anew, by
//! whatever kind of index, and for every image that shares a layer. What it names are whole pages of 4 KiB; pages that
//! follow each other are one [`Touched`] of at most 1 MiB. It is a hint: bytes that it names are fetched early, nothing
//! else depends on it, and one that is wrong or stale costs bytes, of which a reader spends no more than it allows.
//!
//! A profile can come with a *pack*: the named bytes themselves, one after another in the profile's order, as one zstd
//! stream. The profile then has the SHA-256 of each range, so that a reader can use a range as soon as it has come.
//!
//! # The blob
//!
//! One zstd frame that states the size of its content. The content, numbers little-endian:
//!
//! | bytes | what |
//! |--:|---|
//! | 8 | `SOCI-PRO` |
//! | 2 | version, 1 |
//! | 1 | bits: 1, with the SHA-256 of each range; 2, with the command that was recorded |
//! | 5 | zeros |
//! | 8 | number of layers, *l* |
//! | 8 | number of ranges, *r* |
//! | … | *l* layers: a varint length and the digest as text, `sha256:` and the like |
//! | … | *r* ranges, in order of first touch: a varint number of the layer; a signed number of pages from where the range before of the same layer ended, rounded up (from 0 at first), to where this one starts; a varint number of bytes |
//! | … | if so marked, *r* × 32 bytes: SHA-256 of the bytes |
//! | … | if so marked, a varint length and the command in UTF-8, neither empty nor longer than 4096 bytes |
//!
//! *varint*: seven bits per byte, lowest first, the top bit set on all bytes but the last, in its shortest form.
//! *signed*: a varint of twice the number, or of twice its complement plus one when it is negative (zigzag).
//!
//! # Invariants
//!
//! Pure. A [`Profile`] has no empty range, none of more than [`RANGE_BYTES_MAX`], none that overlaps another, and none
//! that starts within a page; in all it keeps the limits. Only the last page of a layer can be a short one, and a
//! length that ends elsewhere within a page is allowed: it does no harm. The command is a note for people, and goes
//! from the file that was recorded to an annotation of the manifest: what is published of the same reads is the same
//! blob.

use std::collections::HashMap;
use std::ops::Range;

use crate::format::class::{Class, Classified};
use crate::format::digest::Digest;
use crate::format::limits::Limits;
use crate::format::span::{SpanId, SpanTable};

pub mod artifact;
mod codec;
mod recording;
#[cfg(test)]
mod tests;

pub use recording::Recording;

/// Bytes of a page: what the kernel reads at least, and the grain of a profile. Part of the format.
pub const PAGE_BYTES: u64 = 4096;
/// Bytes of one range at most. A range is used only as a whole when it comes from a pack, so a long one would be waited
/// for; a commitment of the format, since readers reserve that much.
pub const RANGE_BYTES_MAX: u64 = 1 << 20;
/// Bytes of a recorded command at most; what is longer is cut. Part of the format, so that a note stays one.
pub(crate) const COMMAND_BYTES_MAX: usize = 4096;
/// Media type of a profile blob.
pub(crate) const PROFILE: &str = "application/vnd.soci.profile.ranges.v1+zstd";
/// Media type of a pack blob.
pub(crate) const PACK: &str = "application/vnd.soci.profile.pack.v1+zstd";

/// A stretch of one layer.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Touched {
    /// The layer's number in the profile.
    pub layer: u32,
    /// The bytes, of the uncompressed layer.
    pub bytes: Range<u64>,
}

impl Touched {
    /// Number of bytes.
    #[must_use]
    pub const fn length(&self) -> u64 {
        self.bytes.end - self.bytes.start
    }
}

/// What a start-up reads.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Profile {
    layers: Vec<Digest>,
    ranges: Vec<Touched>,
    /// SHA-256 of each range, or nothing.
    digests: Vec<[u8; 32]>,
    command: String,
}

/// Why something is no profile.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProfileError {
    /// It is no zstd frame, or does not state its size, or is damaged.
    #[error("not a profile: {reason}")]
    Frame { reason: String },
    /// It begins with other bytes.
    #[error("not a profile: its content begins with {found:?}")]
    Magic { found: String },
    /// A version that came later.
    #[error("the profile has version {found}; this program reads version 1")]
    Version { found: u16 },
    /// A value that cannot be.
    #[error("the profile is damaged in its {part}, at {number}: {what}")]
    Damaged {
        part: &'static str,
        /// Which value, from 0.
        number: usize,
        what: &'static str,
    },
    /// More than we are willing to hold or to fetch.
    #[error("the profile has {found} {what}, more than the limit of {limit}")]
    TooLarge { what: &'static str, found: u64, limit: u64 },
    /// There are digests, though not one for each range.
    #[error("the profile has {ranges} ranges and {digests} digests of them")]
    Digests { ranges: usize, digests: usize },
}

impl Classified for ProfileError {
    fn class(&self) -> Class {
        Class::Content
    }
}

impl Profile {
    /// A profile of `ranges`, in order of first touch, whose layers are numbers in `layers`.
    ///
    /// # Errors
    /// [`ProfileError`] when a range is none, or there is more than `limits` allow.
    pub fn new(layers: Vec<Digest>, ranges: Vec<Touched>, limits: &Limits) -> Result<Self, ProfileError> {
        let check = |what, found: u64, limit: u64| {
            if found > limit { Err(ProfileError::TooLarge { what, found, limit }) } else { Ok(()) }
        };
        check("layers", layers.len() as u64, limits.profile_ranges_max as u64)?;
        check("ranges", ranges.len() as u64, limits.profile_ranges_max as u64)?;
        let damaged = |number, what| ProfileError::Damaged { part: "ranges", number, what };
        let mut sum = 0_u64;
        for (number, range) in ranges.iter().enumerate() {
            if range.layer as usize >= layers.len() {
                return Err(damaged(number, "there is no such layer"));
            }
            if range.bytes.is_empty() || range.length() > RANGE_BYTES_MAX {
                return Err(damaged(number, "it is empty or too long"));
            }
            if !range.bytes.start.is_multiple_of(PAGE_BYTES) {
                return Err(damaged(number, "it starts within a page"));
            }
            sum = sum.saturating_add(range.length());
        }
        check("bytes", sum, limits.profile_bytes_max)?;
        let mut places: Vec<usize> = (0..ranges.len()).collect();
        places.sort_unstable_by_key(|place| (ranges[*place].layer, ranges[*place].bytes.start));
        for pair in places.windows(2) {
            let (one, other) = (&ranges[pair[0]], &ranges[pair[1]]);
            if one.layer == other.layer && one.bytes.end > other.bytes.start {
                return Err(damaged(pair[1], "it overlaps another"));
            }
        }
        Ok(Self { layers, ranges, digests: Vec::new(), command: String::new() })
    }

    /// The same with the SHA-256 of each range, as it goes with a pack.
    ///
    /// # Errors
    /// [`ProfileError::Digests`] when there is not one for each.
    pub fn with_digests(self, digests: Vec<[u8; 32]>) -> Result<Self, ProfileError> {
        if digests.len() != self.ranges.len() {
            return Err(ProfileError::Digests { ranges: self.ranges.len(), digests: digests.len() });
        }
        Ok(Self { digests, ..self })
    }

    /// The same with the command that was recorded, cut to `COMMAND_BYTES_MAX`; an empty text takes it out.
    #[must_use]
    pub fn with_command(self, command: &str) -> Self {
        let command = command[..command.floor_char_boundary(COMMAND_BYTES_MAX)].to_owned();
        Self { command, ..self }
    }

    /// Reads a blob.
    ///
    /// # Errors
    /// [`ProfileError`]. Time and memory are bounded by the limits.
    pub fn decode(blob: &[u8], limits: &Limits) -> Result<Self, ProfileError> {
        codec::decode(blob, limits)
    }

    /// The blob: the same bytes for the same profile.
    ///
    /// # Errors
    /// [`ProfileError::Frame`] when the compressor fails.
    pub fn encode(&self) -> Result<Vec<u8>, ProfileError> {
        codec::encode(self)
    }

    /// The layers that ranges speak of, by their numbers.
    #[must_use]
    pub fn layers(&self) -> &[Digest] {
        &self.layers
    }

    /// The ranges, in order of first touch.
    #[must_use]
    pub fn ranges(&self) -> &[Touched] {
        &self.ranges
    }

    /// The SHA-256 of each range; nothing when the profile has no pack.
    #[must_use]
    pub fn digests(&self) -> &[[u8; 32]] {
        &self.digests
    }

    /// The command that was recorded; empty when the profile does not say.
    #[must_use]
    pub fn command(&self) -> &str {
        &self.command
    }

    /// Bytes of all ranges.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.ranges.iter().map(Touched::length).sum()
    }

    /// What either names: all of this one, in its order, then what the other has besides, in its order. Digests are
    /// lost; commands are joined by `; `.
    ///
    /// # Errors
    /// [`ProfileError::TooLarge`] when that is more than `limits` allow.
    pub fn merge(&self, other: &Self, limits: &Limits) -> Result<Self, ProfileError> {
        let mut recording = Recording::new(*limits);
        for profile in [self, other] {
            let numbers: Vec<u32> = profile.layers.iter().map(|layer| recording.layer(layer)).collect();
            for range in &profile.ranges {
                recording.note_up_to_page(numbers[range.layer as usize], range.bytes.clone());
            }
        }
        if recording.is_full() {
            let (found, limit) = (self.bytes().saturating_add(other.bytes()), limits.profile_bytes_max);
            return Err(ProfileError::TooLarge { what: "ranges or bytes in both", found, limit });
        }
        let mut commands = vec![self.command.as_str(), &other.command];
        commands.dedup();
        commands.retain(|command| !command.is_empty());
        Ok(recording.finish()?.with_command(&commands.join("; ")))
    }

    /// The spans that hold the ranges, in order of first touch, each once. `tables` are the layers of an image with
    /// their tables; layers of the profile that are not among them, and what is beyond a layer's end, are passed over.
    /// The first number is the layer's place in `tables`.
    #[must_use]
    pub fn spans(&self, tables: &[(Digest, &SpanTable)]) -> Vec<(usize, SpanId)> {
        let place: Vec<Option<usize>> = self
            .layers
            .iter()
            .map(|layer| tables.iter().position(|(digest, table)| digest == layer && !table.is_empty()))
            .collect();
        let mut seen: Vec<Vec<bool>> = tables.iter().map(|(_, table)| vec![false; table.len()]).collect();
        let mut spans = Vec::new();
        for range in &self.ranges {
            let Some(place) = place.get(range.layer as usize).copied().flatten() else { continue };
            let table = tables[place].1;
            let size = table.spans().last().map_or(0, |span| span.uncompressed.end);
            let bytes = range.bytes.start..range.bytes.end.min(size);
            if bytes.is_empty() {
                continue;
            }
            for span in table.covering(bytes) {
                if let Some(seen) = seen[place].get_mut(span as usize).filter(|seen| !**seen) {
                    *seen = true;
                    spans.push((place, span));
                }
            }
        }
        spans
    }

    /// Where each range's layer is among `layers`.
    #[must_use]
    pub fn places(&self, layers: &[Digest]) -> HashMap<u32, usize> {
        let numbered = self.layers.iter().zip(0_u32..);
        numbered.filter_map(|(layer, number)| Some((number, layers.iter().position(|other| other == layer)?))).collect()
    }
}
