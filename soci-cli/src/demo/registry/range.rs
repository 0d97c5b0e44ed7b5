//! Reading a `Range` header.

use std::ops::Range;

/// What a client asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum RequestedRange {
    /// Everything; also when the header is not understood or names several ranges, as the standard allows.
    Whole,
    /// These bytes.
    Part(Range<usize>),
    /// Bytes that do not exist.
    Nothing,
}

/// Reads `header` for content of `length` bytes.
pub(super) fn read(header: &str, length: usize) -> RequestedRange {
    let Some((first, last)) = header.strip_prefix("bytes=").and_then(|range| range.split_once('-')) else {
        return RequestedRange::Whole;
    };
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(first) || !digits(last) {
        return RequestedRange::Whole;
    }
    let part = match (first.parse::<usize>(), last.parse::<usize>()) {
        (Ok(first), Ok(last)) if first > last => return RequestedRange::Whole,
        (Ok(first), Ok(last)) => first..last.saturating_add(1).min(length),
        (Ok(first), Err(_)) => first..length,
        // The last so many bytes.
        (Err(_), Ok(count)) => length.saturating_sub(count)..length,
        (Err(_), Err(_)) => return RequestedRange::Whole,
    };
    if part.is_empty() { RequestedRange::Nothing } else { RequestedRange::Part(part) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table() {
        for (header, expected) in [
            ("", RequestedRange::Whole),
            ("bytes=0-9", RequestedRange::Part(0..10)),
            ("bytes=5-", RequestedRange::Part(5..100)),
            ("bytes=90-200", RequestedRange::Part(90..100)),
            ("bytes=-7", RequestedRange::Part(93..100)),
            ("bytes=-200", RequestedRange::Part(0..100)),
            ("bytes=100-", RequestedRange::Nothing),
            ("bytes=100-110", RequestedRange::Nothing),
            ("bytes=-0", RequestedRange::Nothing),
            ("bytes=9-0", RequestedRange::Whole),
            ("bytes=0-1,3-4", RequestedRange::Whole),
            ("items=0-1", RequestedRange::Whole),
            ("bytes=-", RequestedRange::Whole),
        ] {
            assert_eq!(read(header, 100), expected, "{header}");
        }
    }
}
