//! SHA-256 with marks: the state of the hash at chosen offsets, by which any piece between two of them can be checked
//! later on its own.
//!
//! A proof hashes a whole layer anyway. The chaining value of SHA-256 behind a span stands for everything up to there,
//! so hashing the span's bytes from the chaining value before it must end at the one behind it: to make other bytes do
//! that is to find a collision of the compression function. That costs nothing while proving, and 96 bytes a span.
//!
//! A mark within a block of 64 bytes is of the block's beginning, with the bytes in between.

use sha2::block_api::compress256;
use soci_index::format::digest::Digest;

/// Bytes that SHA-256 takes at a time.
const BLOCK: usize = 64;
/// Bytes of an encoded mark.
pub(crate) const MARK_BYTES: usize = 32 + BLOCK;
/// The state of SHA-256 before the first byte (FIPS 180-4, 5.3.3).
const INITIAL: [u32; 8] =
    [0x6a09_e667, 0xbb67_ae85, 0x3c6e_f372, 0xa54f_f53a, 0x510e_527f, 0x9b05_688c, 0x1f83_d9ab, 0x5be0_cd19];

/// The state of a hash at an offset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mark {
    /// The chaining value at the beginning of the block that the offset lies in.
    state: [u32; 8],
    /// The block up to the offset; zeros behind it.
    block: [u8; BLOCK],
    /// How many bytes of the block there are.
    length: usize,
}

impl Mark {
    /// Before the first byte.
    pub(crate) const START: Self = Self { state: INITIAL, block: [0; BLOCK], length: 0 };

    /// The mark at `offset` as it was encoded; `None` when it is none.
    pub(crate) fn decode(bytes: &[u8], offset: u64) -> Option<Self> {
        let (words, rest) = bytes.split_first_chunk::<32>()?;
        let block: [u8; BLOCK] = rest.try_into().ok()?;
        let mut state = [0; 8];
        for (word, bytes) in state.iter_mut().zip(words.chunks_exact(4)) {
            *word = u32::from_be_bytes(bytes.try_into().ok()?);
        }
        Some(Self { state, block, length: within_block(offset) })
    }

    pub(crate) fn encode(&self) -> [u8; MARK_BYTES] {
        let mut bytes = [0; MARK_BYTES];
        for (bytes, word) in bytes.chunks_exact_mut(4).zip(self.state) {
            bytes.copy_from_slice(&word.to_be_bytes());
        }
        bytes[32..].copy_from_slice(&self.block);
        bytes
    }

    /// Adds bytes.
    pub(crate) fn update(&mut self, mut bytes: &[u8]) {
        if self.length > 0 {
            let taken = bytes.len().min(BLOCK - self.length);
            self.block[self.length..self.length + taken].copy_from_slice(&bytes[..taken]);
            self.length += taken;
            bytes = &bytes[taken..];
            if self.length < BLOCK {
                return;
            }
            compress256(&mut self.state, &[self.block]);
        }
        let (blocks, rest) = bytes.as_chunks::<BLOCK>();
        compress256(&mut self.state, blocks);
        self.block = [0; BLOCK];
        self.block[..rest.len()].copy_from_slice(rest);
        self.length = rest.len();
    }

    /// The digest of the bytes so far, `total` of them.
    pub(crate) fn digest(&self, total: u64) -> Digest {
        let mut last = self.clone();
        let bits = total.wrapping_mul(8).to_be_bytes();
        let zeros = (BLOCK + BLOCK - 1 - 8 - last.length) % BLOCK;
        let mut padding = vec![0; 1 + zeros];
        padding[0] = 0x80;
        padding.extend_from_slice(&bits);
        last.update(&padding);
        let mut bytes = [0; 32];
        for (bytes, word) in bytes.chunks_exact_mut(4).zip(last.state) {
            bytes.copy_from_slice(&word.to_be_bytes());
        }
        Digest::from_sha256(bytes)
    }

    /// Whether `bytes` lead from this mark to `end`.
    pub(crate) fn leads_to(&self, bytes: &[u8], end: &Self) -> bool {
        let mut hash = self.clone();
        hash.update(bytes);
        hash == *end
    }
}

fn within_block(offset: u64) -> usize {
    usize::try_from(offset % BLOCK as u64).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn as_the_library_hashes(bytes in proptest::collection::vec(any::<u8>(), 0..400), cuts in proptest::collection::vec(0_usize..400, 0..6)) {
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(bytes.len())).chain([0, bytes.len()]).collect();
            cuts.sort_unstable();
            let mut hash = Mark::START;
            let mut marks = vec![hash.clone()];
            for pair in cuts.windows(2) {
                hash.update(&bytes[pair[0]..pair[1]]);
                marks.push(hash.clone());
            }
            prop_assert_eq!(hash.digest(bytes.len() as u64), Digest::of(&bytes));
            // Every piece by itself, from marks that were written down.
            let written = |place: usize| Mark::decode(&marks[place].encode(), cuts[place] as u64).unwrap();
            for place in 0..cuts.len() - 1 {
                let piece = &bytes[cuts[place]..cuts[place + 1]];
                prop_assert!(written(place).leads_to(piece, &written(place + 1)));
                for at in 0..piece.len() {
                    let mut other = piece.to_vec();
                    other[at] ^= 1;
                    prop_assert!(!written(place).leads_to(&other, &written(place + 1)));
                }
            }
        }
    }

    #[test]
    fn what_is_no_mark() {
        assert_eq!(Mark::decode(&[0; MARK_BYTES - 1], 0), None);
        assert_eq!(Mark::decode(&[0; MARK_BYTES + 1], 0), None);
        assert_eq!(Mark::decode(&Mark::START.encode(), 64), Some(Mark::START));
    }
}
