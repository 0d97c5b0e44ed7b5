//! gzip (RFC 1952): any number of members, with a stop at every place where decoding could begin again.
//!
//! A decoder is stepped from outside: bytes in, at most one event out. It can also be started in the middle of a member
//! (`Gzip::resume`), which is what spans are for. Headers of any length are accepted (the AWS tools refuse names
//! above 512 bytes). Checked: header CRC where there is one, reserved flags, CRC-32 and length of each member that was
//! seen whole. Zero bytes behind the last member are padding, as tape blocks leave it; anything else there is an error,
//! because a layer with an unread tail is not what its digest promises.

use crate::format::checkpoint::Window;
use crate::format::class::{Class, Classified};
use crate::format::inflate::{Inflater, Stop};

/// Why bytes are not a gzip stream. Offsets are into the compressed layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum GzipError {
    /// The layer does not begin with a gzip header.
    #[error("not gzip: the bytes at offset {offset} are not a gzip header")]
    NotGzip { offset: u64 },
    /// A header with a compression method other than deflate.
    #[error("gzip header at offset {offset}: compression method {method} is not deflate")]
    Method { offset: u64, method: u8 },
    /// A header with flags that no version of gzip defines.
    #[error("gzip header at offset {offset}: reserved flags are set ({flags:#04x})")]
    ReservedFlags { offset: u64, flags: u8 },
    /// The header's own checksum is wrong.
    #[error("gzip header at offset {offset}: header checksum is wrong")]
    HeaderChecksum { offset: u64 },
    /// The deflate data are damaged.
    #[error("deflate data are damaged at offset {offset}")]
    Deflate { offset: u64 },
    /// CRC-32 or length in the trailer do not fit the data.
    #[error("gzip member ending at offset {offset}: {what} does not match the data")]
    Trailer {
        offset: u64,
        /// `CRC-32` or `length`.
        what: &'static str,
    },
    /// Bytes behind the last member that are neither a member nor zero.
    #[error("bytes at offset {offset}, after the last gzip member, are neither another member nor zero padding")]
    TrailingData { offset: u64 },
    /// The stream stops in the middle.
    #[error("gzip stream is cut off at offset {offset}")]
    Truncated { offset: u64 },
}

impl Classified for GzipError {
    fn class(&self) -> Class {
        Class::Content
    }
}

/// What a step ended with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    /// Input is used up or output is full.
    More,
    /// Decoding may begin here: behind a member's header, or behind a block that is not the member's last.
    Boundary {
        /// Offset in the layer of the first byte not yet touched.
        compressed: u64,
        /// How many (top) bits of the byte before it belong to what follows: 0 to 7.
        bits: u8,
    },
    /// A member has ended and its trailer fits.
    MemberEnd,
}

/// What one call did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Step {
    /// Bytes of input used up.
    pub consumed: usize,
    /// Bytes of output written.
    pub produced: usize,
    /// What it ended with.
    pub event: Event,
}

/// A decoder.
#[derive(Debug)]
pub(crate) struct Gzip {
    state: GzipState,
    inflater: Inflater,
    /// Offset in the layer of the next byte of input.
    offset: u64,
    /// CRC-32 and length of the current member; `None` when decoding began inside it.
    checks: Option<(crc32fast::Hasher, u32)>,
    /// Members that have ended.
    members: u64,
}

#[derive(Debug)]
enum GzipState {
    /// Between members; nothing of a header seen.
    Between,
    Header(Header),
    /// Resumed in the middle of a byte, which is the next one to come.
    Shared {
        bits: u8,
    },
    Deflate,
    Trailer {
        bytes: [u8; 8],
        have: usize,
    },
    Padding,
}

impl Default for Gzip {
    fn default() -> Self {
        Self::new()
    }
}

impl Gzip {
    /// Begins at the first byte of a layer.
    #[must_use]
    pub(crate) fn new() -> Self {
        Self { state: GzipState::Between, inflater: Inflater::new(), offset: 0, checks: None, members: 0 }
    }

    /// Begins at a checkpoint: the next input is the byte at `offset`, of which only the top `bits` count if `bits` is
    /// not 0. `bits` is 0 to 7. There is no `window` at the start of a layer, where nothing may be referred to.
    #[must_use]
    pub(crate) fn resume(offset: u64, bits: u8, window: Option<&Window>) -> Self {
        let mut inflater = Inflater::new();
        if let Some(window) = window {
            inflater.set_history(&window.load()[..]);
        }
        let state = if bits == 0 { GzipState::Deflate } else { GzipState::Shared { bits } };
        Self { state, inflater, offset, checks: None, members: 1 }
    }

    /// Offset in the layer of the next byte of input.
    #[must_use]
    pub(crate) const fn offset(&self) -> u64 {
        self.offset
    }

    /// Uses some of `input`, writes some of `output`, stops at the first event.
    ///
    /// # Errors
    /// [`GzipError`]; the decoder is of no use afterwards.
    pub(crate) fn step(&mut self, input: &[u8], output: &mut [u8]) -> Result<Step, GzipError> {
        let mut consumed = 0;
        loop {
            let rest = &input[consumed..];
            if let GzipState::Deflate = self.state {
                let step = self.deflate(rest, output)?;
                // A member that ends (not a block that is last) goes on to its trailer at once.
                if step.event != Event::MemberEnd {
                    return Ok(Step { consumed: consumed + step.consumed, ..step });
                }
                consumed += step.consumed;
                self.state = GzipState::Trailer { bytes: [0; 8], have: 0 };
                if step.produced > 0 {
                    return Ok(Step { consumed, produced: step.produced, event: Event::More });
                }
                continue;
            }
            let Some((byte, _)) = rest.split_first() else {
                return Ok(Step { consumed, produced: 0, event: Event::More });
            };
            let event = self.byte(*byte)?;
            consumed += 1;
            self.offset += 1;
            if event != Event::More {
                return Ok(Step { consumed, produced: 0, event: self.placed(event) });
            }
        }
    }

    /// Whether the stream may end here.
    ///
    /// # Errors
    /// [`GzipError::Truncated`] when it may not.
    pub(crate) fn finish(&self) -> Result<(), GzipError> {
        match self.state {
            GzipState::Between | GzipState::Padding if self.members > 0 => Ok(()),
            _ => Err(GzipError::Truncated { offset: self.offset }),
        }
    }

    /// Deflate data; a step that ends the member says so with [`Event::MemberEnd`], before the trailer is read.
    fn deflate(&mut self, input: &[u8], output: &mut [u8]) -> Result<Step, GzipError> {
        let step = self.inflater.step(input, output).map_err(|_| GzipError::Deflate { offset: self.offset })?;
        self.offset += step.consumed as u64;
        if let Some((crc, length)) = &mut self.checks {
            crc.update(&output[..step.produced]);
            // The trailer holds the length modulo 2^32.
            {
                *length = length.wrapping_add(step.produced as u32);
            }
        }
        let event = match step.stop {
            Stop::Block { bits, last: false } => Event::Boundary { compressed: self.offset, bits },
            Stop::Block { last: true, .. } | Stop::More => Event::More,
            Stop::End => Event::MemberEnd,
        };
        Ok(Step { consumed: step.consumed, produced: step.produced, event })
    }

    /// Everything that is not deflate data, byte by byte: there is little of it.
    fn byte(&mut self, byte: u8) -> Result<Event, GzipError> {
        let offset = self.offset;
        match &mut self.state {
            GzipState::Between if byte == 0x1f => self.state = GzipState::Header(Header::new(offset)),
            GzipState::Between if self.members == 0 => return Err(GzipError::NotGzip { offset }),
            GzipState::Between | GzipState::Padding if byte == 0 => self.state = GzipState::Padding,
            GzipState::Between | GzipState::Padding => return Err(GzipError::TrailingData { offset }),
            GzipState::Header(header) => {
                if header.byte(byte, self.members == 0)? {
                    self.inflater.reset();
                    self.checks = Some((crc32fast::Hasher::new(), 0));
                    self.state = GzipState::Deflate;
                    return Ok(Event::Boundary { compressed: offset, bits: 0 });
                }
            }
            GzipState::Shared { bits } => {
                self.inflater.prime(byte, *bits);
                self.state = GzipState::Deflate;
            }
            GzipState::Trailer { bytes, have } => {
                bytes[*have] = byte;
                *have += 1;
                if *have == 8 {
                    let bytes = *bytes;
                    self.check_trailer(bytes)?;
                    self.members += 1;
                    self.state = GzipState::Between;
                    return Ok(Event::MemberEnd);
                }
            }
            GzipState::Deflate => unreachable!("step() handles deflate data itself"),
        }
        Ok(Event::More)
    }

    /// A boundary behind a header stands behind the byte that completed it.
    const fn placed(&self, event: Event) -> Event {
        match event {
            Event::Boundary { bits, .. } => Event::Boundary { compressed: self.offset, bits },
            other => other,
        }
    }

    fn check_trailer(&mut self, bytes: [u8; 8]) -> Result<(), GzipError> {
        let offset = self.offset - 7;
        let Some((crc, length)) = self.checks.take() else { return Ok(()) };
        let [a, b, c, d, e, f, g, h] = bytes;
        if crc.finalize() != u32::from_le_bytes([a, b, c, d]) {
            return Err(GzipError::Trailer { offset, what: "CRC-32" });
        }
        if length != u32::from_le_bytes([e, f, g, h]) {
            return Err(GzipError::Trailer { offset, what: "length" });
        }
        Ok(())
    }
}

/// A member header that comes byte by byte.
#[derive(Debug)]
struct Header {
    /// Where it begins in the layer.
    offset: u64,
    part: Part,
    flags: u8,
    crc: crc32fast::Hasher,
}

/// What the next byte of a header is.
#[derive(Debug, Clone, Copy)]
enum Part {
    /// One of the ten fixed bytes.
    Fixed(u8),
    ExtraLength {
        first: Option<u8>,
    },
    Extra {
        left: u16,
    },
    Name,
    Comment,
    Checksum {
        first: Option<u8>,
    },
}

const FLAG_CHECKSUM: u8 = 2;
const FLAG_EXTRA: u8 = 4;
const FLAG_NAME: u8 = 8;
const FLAG_COMMENT: u8 = 16;
const FLAGS_RESERVED: u8 = 0xe0;

impl Header {
    /// The first byte, 1f, has been seen.
    fn new(offset: u64) -> Self {
        let mut crc = crc32fast::Hasher::new();
        crc.update(&[0x1f]);
        Self { offset, part: Part::Fixed(1), flags: 0, crc }
    }

    /// Takes a byte; true when it was the header's last.
    fn byte(&mut self, byte: u8, first_member: bool) -> Result<bool, GzipError> {
        let offset = self.offset;
        if !matches!(self.part, Part::Checksum { .. }) {
            self.crc.update(&[byte]);
        }
        let next = match self.part {
            Part::Fixed(1) if byte != 0x8b && first_member => return Err(GzipError::NotGzip { offset }),
            Part::Fixed(1) if byte != 0x8b => return Err(GzipError::TrailingData { offset }),
            Part::Fixed(2) if byte != 8 => return Err(GzipError::Method { offset, method: byte }),
            Part::Fixed(3) if byte & FLAGS_RESERVED != 0 => {
                return Err(GzipError::ReservedFlags { offset, flags: byte });
            }
            Part::Fixed(at) => {
                if at == 3 {
                    self.flags = byte;
                }
                if at < 9 { Some(Part::Fixed(at + 1)) } else { self.after_fixed() }
            }
            Part::ExtraLength { first: None } => Some(Part::ExtraLength { first: Some(byte) }),
            Part::ExtraLength { first: Some(low) } => match u16::from_le_bytes([low, byte]) {
                0 => self.after_extra(),
                left => Some(Part::Extra { left }),
            },
            Part::Extra { left: 1 } => self.after_extra(),
            Part::Extra { left } => Some(Part::Extra { left: left - 1 }),
            Part::Name if byte != 0 => Some(Part::Name),
            Part::Name => self.after_name(),
            Part::Comment if byte != 0 => Some(Part::Comment),
            Part::Comment => self.after_comment(),
            Part::Checksum { first: None } => Some(Part::Checksum { first: Some(byte) }),
            Part::Checksum { first: Some(low) } => {
                let [a, b, _, _] = self.crc.clone().finalize().to_le_bytes();
                if [low, byte] != [a, b] {
                    return Err(GzipError::HeaderChecksum { offset });
                }
                None
            }
        };
        if let Some(part) = next {
            self.part = part;
        }
        Ok(next.is_none())
    }

    const fn after_fixed(&self) -> Option<Part> {
        if self.flags & FLAG_EXTRA != 0 { Some(Part::ExtraLength { first: None }) } else { self.after_extra() }
    }

    const fn after_extra(&self) -> Option<Part> {
        if self.flags & FLAG_NAME != 0 { Some(Part::Name) } else { self.after_name() }
    }

    const fn after_name(&self) -> Option<Part> {
        if self.flags & FLAG_COMMENT != 0 { Some(Part::Comment) } else { self.after_comment() }
    }

    const fn after_comment(&self) -> Option<Part> {
        if self.flags & FLAG_CHECKSUM != 0 { Some(Part::Checksum { first: None }) } else { None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A member with these header bytes behind the flags, holding nothing: two bytes of an empty fixed block.
    fn member(flags: u8, rest: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0x1f, 0x8b, 8, flags, 0, 0, 0, 0, 0, 255];
        bytes.extend_from_slice(rest);
        bytes.extend_from_slice(&[3, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        bytes
    }

    /// The events of a stream, `piece` bytes at a time.
    fn events(bytes: &[u8], piece: usize) -> Result<Vec<Event>, GzipError> {
        let (mut decoder, mut events) = (Gzip::new(), Vec::new());
        for chunk in bytes.chunks(piece) {
            let mut at = 0;
            loop {
                let step = decoder.step(&chunk[at..], &mut [0; 64])?;
                at += step.consumed;
                match step.event {
                    Event::More if at == chunk.len() && step.produced == 0 => break,
                    Event::More => {}
                    event => events.push(event),
                }
            }
        }
        decoder.finish()?;
        Ok(events)
    }

    #[test]
    fn headers_of_all_kinds() {
        let extra = [4, 0, b'a', b'b', 0, 0];
        for (flags, rest) in [
            (0, &b""[..]),
            (FLAG_EXTRA, &extra[..]),
            (FLAG_EXTRA, &[0, 0]),
            (FLAG_NAME, b"name\0"),
            (FLAG_NAME, b"\0"),
            (FLAG_COMMENT, b"comment\0"),
            (FLAG_NAME | FLAG_COMMENT, b"name\0comment\0"),
            (FLAG_EXTRA | FLAG_NAME, b"\x01\x00xname\0"),
        ] {
            let bytes = member(flags, rest);
            let header = 10 + rest.len() as u64;
            let expected = Ok(vec![Event::Boundary { compressed: header, bits: 0 }, Event::MemberEnd]);
            assert_eq!(events(&bytes, usize::MAX), expected, "{flags} {rest:?}");
            assert_eq!(events(&bytes, 1), expected, "{flags} {rest:?} byte by byte");
        }
        let mut checked = member(FLAG_CHECKSUM, b"");
        let [low, high, ..] = crc32fast::hash(&checked[..10]).to_le_bytes();
        checked.splice(10..10, [low, high]);
        assert!(events(&checked, 1).is_ok());
        checked[10] ^= 1;
        assert_eq!(events(&checked, 1), Err(GzipError::HeaderChecksum { offset: 0 }));
    }

    #[test]
    fn what_is_no_gzip() {
        let good = member(0, b"");
        let with = |at: usize, byte: u8| {
            let mut bytes = good.clone();
            bytes[at] = byte;
            bytes
        };
        let twice = [&good[..], &good].concat();
        let padded = [&good[..], &[0; 700]].concat();
        for (bytes, expected) in [
            (Vec::new(), Some(GzipError::Truncated { offset: 0 })),
            (b"text".to_vec(), Some(GzipError::NotGzip { offset: 0 })),
            (with(1, 0x9d), Some(GzipError::NotGzip { offset: 0 })),
            (with(2, 7), Some(GzipError::Method { offset: 0, method: 7 })),
            (with(3, 0x20), Some(GzipError::ReservedFlags { offset: 0, flags: 0x20 })),
            (with(12, 1), Some(GzipError::Trailer { offset: 12, what: "CRC-32" })),
            (with(16, 1), Some(GzipError::Trailer { offset: 12, what: "length" })),
            (good[..15].to_vec(), Some(GzipError::Truncated { offset: 15 })),
            (twice.clone(), None),
            (padded.clone(), None),
            ([&padded[..], b"x"].concat(), Some(GzipError::TrailingData { offset: 720 })),
            ([&twice[..], b"x"].concat(), Some(GzipError::TrailingData { offset: 40 })),
            ([&good[..], &[0x1f]].concat(), Some(GzipError::Truncated { offset: 21 })),
            ([&good[..], &[0x1f, 0x9d]].concat(), Some(GzipError::TrailingData { offset: 20 })),
        ] {
            for piece in [1, 7, 4096] {
                assert_eq!(events(&bytes, piece).err(), expected, "{bytes:?} by {piece}");
            }
        }
    }
}
