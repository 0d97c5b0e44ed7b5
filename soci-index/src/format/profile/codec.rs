//! The blob of a profile, written and read.

use crate::format::digest::Digest;
use crate::format::limits::Limits;
use crate::format::profile::{COMMAND_BYTES_MAX, PAGE_BYTES, Profile, ProfileError, RANGE_BYTES_MAX, Touched};

const MAGIC: [u8; 8] = *b"SOCI-PRO";
const VERSION: u16 = 1;
/// Bytes before the tables.
const HEAD_BYTES: usize = 32;
/// Bits of the header: what follows the ranges.
const HAS_DIGESTS: u8 = 1;
const HAS_COMMAND: u8 = 2;
/// A digest as text is at most `sha512:` and 128 digits.
const DIGEST_TEXT_MAX: u64 = 256;
/// Bytes of the content for each range at most: three numbers and a digest. With the limit on ranges it stops a frame
/// that unpacks to gigabytes.
const RANGE_CONTENT_MAX: u64 = 3 * 10 + 32;
/// Blobs are made once and read often.
const LEVEL: i32 = 19;

pub(super) fn encode(profile: &Profile) -> Result<Vec<u8>, ProfileError> {
    let mut content = Vec::from(MAGIC);
    content.extend(VERSION.to_le_bytes());
    let marks = [(HAS_DIGESTS, profile.digests.is_empty()), (HAS_COMMAND, profile.command.is_empty())];
    content.push(marks.iter().filter(|(_, is_empty)| !is_empty).map(|(mark, _)| mark).sum());
    content.extend([0; 5]);
    content.extend((profile.layers.len() as u64).to_le_bytes());
    content.extend((profile.ranges.len() as u64).to_le_bytes());
    for layer in &profile.layers {
        let text = layer.to_string();
        put(&mut content, text.len() as u64);
        content.extend(text.as_bytes());
    }
    let mut next = vec![0_u64; profile.layers.len()];
    for range in &profile.ranges {
        let page = range.bytes.start / PAGE_BYTES;
        let expected = &mut next[range.layer as usize];
        // Pages are below 2^52, so their difference is a signed number.
        let step = page.cast_signed() - expected.cast_signed();
        put(&mut content, range.layer.into());
        put(&mut content, ((step << 1) ^ (step >> 63)).cast_unsigned());
        put(&mut content, range.length());
        *expected = range.bytes.end.div_ceil(PAGE_BYTES);
    }
    profile.digests.iter().for_each(|digest| content.extend(digest));
    if !profile.command.is_empty() {
        put(&mut content, profile.command.len() as u64);
        content.extend(profile.command.as_bytes());
    }
    zstd::bulk::compress(&content, LEVEL).map_err(|error| ProfileError::Frame { reason: error.to_string() })
}

fn put(content: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        content.push((number & 0x7f) as u8 | 0x80);
        number >>= 7;
    }
    content.push(number as u8);
}

pub(super) fn decode(blob: &[u8], limits: &Limits) -> Result<Profile, ProfileError> {
    let content = unpack(blob, limits)?;
    let (head, rest) = content.split_at_checked(HEAD_BYTES).ok_or_else(|| frame("it has no whole header"))?;
    let found = head.get(..8).unwrap_or_default();
    if found != MAGIC {
        return Err(ProfileError::Magic { found: found.escape_ascii().to_string() });
    }
    let version = u16::from_le_bytes([head[8], head[9]]);
    if version != VERSION {
        return Err(ProfileError::Version { found: version });
    }
    let count = |what, at: usize| {
        let found = head.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_le_bytes);
        let limit = limits.profile_ranges_max;
        let fits = usize::try_from(found).ok().filter(|found| *found <= limit);
        fits.ok_or(ProfileError::TooLarge { what, found, limit: limit as u64 })
    };
    let (layer_count, range_count) = (count("layers", 16)?, count("ranges", 24)?);
    let (marks @ 0..=3, [0, 0, 0, 0, 0]) = (head[10], &head[11..16]) else {
        return Err(frame("its header has marks that are not known"));
    };
    let has_digests = marks & HAS_DIGESTS != 0;
    let mut reader = Reader { rest, part: "layers", number: 0 };
    let layers = read_layers(&mut reader, layer_count)?;
    let ranges = read_ranges(&mut reader, range_count, layers.len())?;
    (reader.part, reader.number) = ("digests", 0);
    let mut digests = Vec::new();
    for _ in 0..if has_digests { range_count } else { 0 } {
        digests.push(reader.bytes(32)?.try_into().map_err(|_| reader.fault("it ends too early"))?);
        reader.number += 1;
    }
    let command = if marks & HAS_COMMAND == 0 { "" } else { read_command(&mut reader)? };
    if !reader.rest.is_empty() {
        return Err(reader.fault("the content goes on after its end"));
    }
    let profile = Profile::new(layers, ranges, limits)?.with_command(command);
    if has_digests { profile.with_digests(digests) } else { Ok(profile) }
}

fn frame(reason: &str) -> ProfileError {
    ProfileError::Frame { reason: reason.to_owned() }
}

fn unpack(blob: &[u8], limits: &Limits) -> Result<Vec<u8>, ProfileError> {
    let size = zstd::zstd_safe::get_frame_content_size(blob).map_err(|_| frame("it is no zstd frame"))?;
    let found = size.ok_or_else(|| frame("its frame does not state its size"))?;
    let around = (HEAD_BYTES + COMMAND_BYTES_MAX + 10) as u64;
    let limit = around + limits.profile_ranges_max as u64 * (RANGE_CONTENT_MAX + DIGEST_TEXT_MAX);
    let too_large = || ProfileError::TooLarge { what: "bytes of content", found, limit };
    let size = usize::try_from(found).ok().filter(|_| found <= limit).ok_or_else(too_large)?;
    zstd::bulk::decompress(blob, size).map_err(|error| frame(&error.to_string()))
}

fn read_layers(reader: &mut Reader<'_>, count: usize) -> Result<Vec<Digest>, ProfileError> {
    let mut layers = Vec::new();
    for number in 0..count {
        reader.number = number;
        let length = reader.number_up_to(DIGEST_TEXT_MAX, "a digest is longer than digests are")?;
        let text = reader.bytes(usize::try_from(length).unwrap_or(usize::MAX))?;
        let digest = std::str::from_utf8(text).ok().and_then(|text| text.parse().ok());
        layers.push(digest.ok_or_else(|| reader.fault("it is no digest"))?);
    }
    Ok(layers)
}

fn read_ranges(reader: &mut Reader<'_>, count: usize, layers: usize) -> Result<Vec<Touched>, ProfileError> {
    reader.part = "ranges";
    let (mut ranges, mut next) = (Vec::new(), vec![0_u64; layers]);
    for number in 0..count {
        reader.number = number;
        let layer = reader.number_up_to(u32::MAX.into(), "there is no such layer")? as u32;
        let step = reader.number()?;
        let step = (step >> 1).cast_signed() ^ -(step & 1).cast_signed();
        let length = reader.number_up_to(RANGE_BYTES_MAX, "it is too long")?;
        let Some(expected) = next.get_mut(layer as usize) else {
            return Err(reader.fault("there is no such layer"));
        };
        let start = expected.checked_add_signed(step).and_then(|page| page.checked_mul(PAGE_BYTES));
        let bytes = start.and_then(|start| Some(start..start.checked_add(length)?));
        let bytes = bytes.ok_or_else(|| reader.fault("it is beyond all numbers"))?;
        *expected = bytes.end.div_ceil(PAGE_BYTES);
        ranges.push(Touched { layer, bytes });
    }
    Ok(ranges)
}

fn read_command<'a>(reader: &mut Reader<'a>) -> Result<&'a str, ProfileError> {
    (reader.part, reader.number) = ("command", 0);
    let length = reader.number_up_to(COMMAND_BYTES_MAX as u64, "it is too long")?;
    let text = reader.bytes(usize::try_from(length).unwrap_or(usize::MAX))?;
    std::str::from_utf8(text).ok().filter(|text| !text.is_empty()).ok_or_else(|| reader.fault("it is no text"))
}

struct Reader<'a> {
    rest: &'a [u8],
    part: &'static str,
    number: usize,
}

impl<'a> Reader<'a> {
    fn fault(&self, what: &'static str) -> ProfileError {
        ProfileError::Damaged { part: self.part, number: self.number, what }
    }

    fn bytes(&mut self, length: usize) -> Result<&'a [u8], ProfileError> {
        let (bytes, rest) = self.rest.split_at_checked(length).ok_or_else(|| self.fault("it ends too early"))?;
        self.rest = rest;
        Ok(bytes)
    }

    /// A varint in its shortest form, of at most 64 bits.
    fn number(&mut self) -> Result<u64, ProfileError> {
        let mut number = 0_u64;
        for place in 0..10 {
            let byte = self.bytes(1)?.first().copied().unwrap_or_default();
            if (place == 9 && byte > 1) || (place > 0 && byte == 0) {
                return Err(self.fault("a number is longer than it need be"));
            }
            number |= u64::from(byte & 0x7f) << (7 * place);
            if byte & 0x80 == 0 {
                return Ok(number);
            }
        }
        Err(self.fault("a number has more than 64 bits"))
    }

    fn number_up_to(&mut self, limit: u64, what: &'static str) -> Result<u64, ProfileError> {
        Some(self.number()?).filter(|number| *number <= limit).ok_or_else(|| self.fault(what))
    }
}
