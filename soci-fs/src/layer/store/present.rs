//! The file `present`: which spans of a layer are in `data`, and how to check them.
//!
//! A header of 64 bytes, then eight bytes per span, all little-endian:
//!
//! | bytes | what |
//! |---|---|
//! | 0..8 | `SOCIspan` |
//! | 8..12 | version, 2 |
//! | 12..16 | number of spans |
//! | 16..24 | fingerprint of spans and windows (XXH3-64) |
//! | 24..40 | boot id |
//! | 40..64 | zero |
//! | 64.. | per span: 0 for absent, else the top 63 bits of its XXH3-64; bit 0 says that this boot has seen the bytes |
//!
//! A header that is not exactly what this process would write, apart from the boot id, means "nothing is
//! present": the file only saves work, so any doubt is settled by starting over. The numbers are a commitment of the
//! on-disk format; a change needs another version.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use soci_index::format::index::{LayerIndex, Windows};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

/// Bytes before the first checksum.
const HEADER_BYTES: usize = 64;

const MAGIC: [u8; 8] = *b"SOCIspan";
const VERSION: u32 = 2;

/// Identifies one run of the kernel: what was only in the page cache is gone in another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BootId(pub [u8; 16]);

impl BootId {
    /// The boot id of this system; where it has none, one that equals no stored one, so that everything is checked.
    #[must_use]
    pub fn current() -> Self {
        let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
        let number =
            u128::from_str_radix(&digits, 16).unwrap_or_else(|_| soci_index::clock::since_epoch().as_nanos().max(1));
        Self(number.to_be_bytes())
    }
}

/// A span's record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Checksum(pub(super) u64);

impl Checksum {
    pub(super) const ABSENT: Self = Self(0);

    /// The record of a span whose bytes have just been written.
    pub(super) fn of(bytes: &[u8]) -> Self {
        // 0 means absent, so the one hash in 2^63 that would be 0 is called 2.
        Self((xxh3_64(bytes) & !1).max(2) | 1)
    }

    pub(super) const fn is_absent(self) -> bool {
        self.0 & !1 == 0
    }

    /// Whether the bytes were written or compared in this boot.
    pub(super) const fn is_fresh(self) -> bool {
        self.0 & 1 == 1 && !self.is_absent()
    }

    pub(super) const fn stale(self) -> Self {
        Self(self.0 & !1)
    }

    pub(super) const fn fresh(self) -> Self {
        Self(self.0 | 1)
    }

    pub(super) fn matches(self, bytes: &[u8]) -> bool {
        Self::of(bytes).stale() == self.stale()
    }

    /// Where span `span` has its record in the file.
    pub(super) fn position(span: u32) -> u64 {
        HEADER_BYTES as u64 + 8 * u64::from(span)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) spans: u32,
    pub(super) fingerprint: u64,
    pub(super) boot: BootId,
}

impl Header {
    pub(super) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.spans.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.fingerprint.to_le_bytes());
        bytes[24..40].copy_from_slice(&self.boot.0);
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; HEADER_BYTES] = bytes.try_into().ok()?;
        let (magic, rest) = bytes.split_first_chunk::<8>()?;
        let (version, rest) = rest.split_first_chunk::<4>()?;
        let (spans, rest) = rest.split_first_chunk::<4>()?;
        let (fingerprint, rest) = rest.split_first_chunk::<8>()?;
        let (boot, _) = rest.split_first_chunk::<16>()?;
        if *magic != MAGIC || u32::from_le_bytes(*version) != VERSION {
            return None;
        }
        Some(Self {
            spans: u32::from_le_bytes(*spans),
            fingerprint: u64::from_le_bytes(*fingerprint),
            boot: BootId(*boot),
        })
    }
}

/// Distinguishes indexes by spans and windows: what was decoded with the windows of one index must not be served for
/// another.
pub(super) fn fingerprint(index: &LayerIndex) -> u64 {
    let mut hasher = Xxh3::new();
    let number = |hasher: &mut Xxh3, number: u64| hasher.update(&number.to_le_bytes());
    let text = |hasher: &mut Xxh3, text: &[u8]| {
        hasher.update(&(text.len() as u64).to_le_bytes());
        hasher.update(text);
    };
    for span in index.spans.spans() {
        number(&mut hasher, span.compressed.start);
        number(&mut hasher, span.compressed.end);
        number(&mut hasher, span.uncompressed.start);
        number(&mut hasher, span.uncompressed.end);
        number(&mut hasher, span.bits.into());
        text(&mut hasher, span.digest.as_ref().map_or(&[][..], |digest| digest));
    }
    match &index.windows {
        Windows::Held(windows) => windows.iter().for_each(|window| hasher.update(&window.load()[..])),
        Windows::Placed(places) => places.iter().for_each(|place| hasher.update(&place.digest)),
    }
    hasher.digest()
}

/// Reads the file `present`, or starts it over when it is not about these spans. In another boot than the one that
/// wrote it, all its records become stale: first the records are rewritten, then the boot id, so that a crash in
/// between only repeats this.
pub(super) fn load(present: &File, header: &Header) -> io::Result<Vec<Checksum>> {
    let spans = header.spans as usize;
    let mut bytes = vec![0; HEADER_BYTES + 8 * spans];
    let stored = match present.read_exact_at(&mut bytes, 0) {
        Ok(()) => Header::decode(&bytes[..HEADER_BYTES]),
        Err(_) => None,
    };
    let same = stored.filter(|stored| stored.spans == header.spans && stored.fingerprint == header.fingerprint);
    let Some(stored) = same else {
        present.set_len(0)?;
        present.write_all_at(&vec![0; 8 * spans], HEADER_BYTES as u64)?;
        present.write_all_at(&header.encode(), 0)?;
        return Ok(vec![Checksum::ABSENT; spans]);
    };
    let records = bytes[HEADER_BYTES..].chunks_exact(8);
    let mut checksums: Vec<Checksum> =
        records.map(|record| Checksum(record.try_into().map_or(0, u64::from_le_bytes))).collect();
    if stored.boot != header.boot {
        checksums.iter_mut().for_each(|checksum| *checksum = checksum.stale());
        let records: Vec<u8> = checksums.iter().flat_map(|checksum| checksum.0.to_le_bytes()).collect();
        present.write_all_at(&records, HEADER_BYTES as u64)?;
        present.write_all_at(&header.encode(), 0)?;
    }
    Ok(checksums)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_round_trip() {
        let header = Header { spans: 7, fingerprint: 0x0102_0304_0506_0708, boot: BootId([9; 16]) };
        assert_eq!(Header::decode(&header.encode()), Some(header));
        let mut other = header.encode();
        other[8] = 1;
        assert_eq!(Header::decode(&other), None);
        assert_eq!(Header::decode(&header.encode()[..63]), None);
        assert_eq!(Header::decode(&[0; 64]), None);
    }

    #[test]
    fn checksums() {
        assert!(Checksum::ABSENT.is_absent() && !Checksum::ABSENT.is_fresh());
        // A record of nothing but the freshness bit is damage, not a span.
        assert!(Checksum(1).is_absent() && !Checksum(1).is_fresh());
        let sum = Checksum::of(b"x");
        assert!(sum.is_fresh() && !sum.stale().is_fresh() && !sum.stale().is_absent());
        assert!(sum.matches(b"x") && sum.stale().matches(b"x") && !sum.matches(b"y"));
        assert_eq!(sum.stale().fresh(), sum);
    }
}
