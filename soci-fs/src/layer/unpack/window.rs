//! How much memory a zstd layer takes to decompress, as its first frame says (RFC 8878, 3.1.1.1).
//!
//! The largest window that decoders usually take is 128 MiB. Layers need 8 MiB at most unless they were compressed at
//! the highest levels, so larger ones go one at a time, and one that begins small must stay so.

use std::io;

/// Windows up to this, as a power of two, need no turn.
const USUAL_LOG: u32 = 23;
/// The largest window that is taken.
const LARGEST_LOG: u32 = 27;

/// The largest window, as a power of two, that a layer beginning with these bytes may have: the usual one, or the
/// largest.
pub(super) fn window_log(first: &[u8]) -> u32 {
    if window(first).is_some_and(|bytes| bytes <= 1 << USUAL_LOG) { USUAL_LOG } else { LARGEST_LOG }
}

/// Whether a layer with such a window has to wait for its turn.
pub(super) const fn needs_turn(window_log: u32) -> bool {
    window_log > USUAL_LOG
}

/// The decoder that goes with it.
pub(super) fn limit(
    window_log: u32,
    decoder: &mut zstd::stream::read::Decoder<'_, impl io::BufRead>,
) -> io::Result<()> {
    decoder.window_log_max(window_log)
}

/// The window of the first frame in bytes; `None` when it is not to be seen.
fn window(first: &[u8]) -> Option<u64> {
    let rest = first.strip_prefix(&[0x28, 0xb5, 0x2f, 0xfd])?;
    let (descriptor, rest) = rest.split_first()?;
    if descriptor & 0x20 == 0 {
        let window = rest.first()?;
        let base = 1_u64 << (10 + (window >> 3));
        return Some(base + base / 8 * u64::from(window & 7));
    }
    // A single segment: the window is the content, whose size stands behind the dictionary's number.
    let dictionary = [0, 1, 2, 4][usize::from(descriptor & 3)];
    let size = rest.get(dictionary..)?;
    let number = |length: usize| {
        let mut bytes = [0; 8];
        bytes[..length].copy_from_slice(size.get(..length)?);
        Some(u64::from_le_bytes(bytes))
    };
    match descriptor >> 6 {
        0 => number(1),
        1 => Some(number(2)? + 256),
        2 => number(4),
        _ => number(8),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn windows_of_real_frames() {
        for log in [10, 20, 23, 24, 27] {
            let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
            encoder.window_log(log).unwrap();
            encoder.write_all(&[1; 100]).unwrap();
            encoder.flush().unwrap();
            encoder.write_all(&[2; 100]).unwrap();
            let frame = encoder.finish().unwrap();
            assert_eq!(window(&frame), Some(1 << log));
            assert_eq!(
                (window_log(&frame), needs_turn(window_log(&frame))),
                if log <= 23 { (23, false) } else { (27, true) }
            );
        }
        for length in [1, 255, 300, 70_000, 9 << 20] {
            let frame = zstd::bulk::compress(&vec![7; length], 1).unwrap();
            assert!(window(&frame).is_some_and(|bytes| bytes <= length as u64), "{length}");
        }
        // What is unknown may be large: a skippable frame, an empty one, a cut one.
        for other in [&b"\x50\x2a\x4d\x18\x04\0\0\0abcd"[..], b"", b"\x28\xb5\x2f\xfd", b"\x28\xb5\x2f\xfd\xe0\0"] {
            assert_eq!((window(other), window_log(other)), (None, 27));
        }
    }
}
