//! PAX extended headers: `<length> key=value\n`, again and again.
//!
//! As Go's archive/tar reads them: lengths are decimal and count themselves, keys and the values of names hold no NUL,
//! the last record of a key wins. The sparse records of format 0.0 repeat one key in pairs and become one list.

use crate::format::entry::PaxRecord;

/// Records of one extended header, keys ascending and unique.
pub(super) type Records = Vec<PaxRecord>;

pub(super) const SPARSE_MAP: &[u8] = b"GNU.sparse.map";
const SPARSE_OFFSET: &[u8] = b"GNU.sparse.offset";
const SPARSE_LENGTH: &[u8] = b"GNU.sparse.numbytes";

/// Reads all records; `None` when the text is malformed.
pub(super) fn parse(mut text: &[u8]) -> Option<Records> {
    let mut records = std::collections::BTreeMap::<Box<[u8]>, Box<[u8]>>::new();
    let mut sparse = Vec::new();
    while !text.is_empty() {
        let (key, value, rest) = record(text)?;
        text = rest;
        if key == SPARSE_OFFSET || key == SPARSE_LENGTH {
            let wanted = if sparse.len() % 2 == 0 { SPARSE_OFFSET } else { SPARSE_LENGTH };
            if key != wanted || value.contains(&b',') {
                return None;
            }
            sparse.push(value);
        } else {
            records.insert(key.into(), value.into());
        }
    }
    if !sparse.is_empty() {
        records.insert(SPARSE_MAP.into(), sparse.join(&b',').into());
    }
    Some(records.into_iter().map(|(key, value)| PaxRecord { key, value }).collect())
}

fn record(text: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = text.iter().position(|byte| *byte == b' ')?;
    let length = usize::try_from(integer(&text[..space])?).ok()?;
    if length < 5 || length > text.len() || length <= space + 1 {
        return None;
    }
    let (body, rest) = (&text[space + 1..length - 1], &text[length..]);
    if text[length - 1] != b'\n' {
        return None;
    }
    let equals = body.iter().position(|byte| *byte == b'=')?;
    let (key, value) = (&body[..equals], &body[equals + 1..]);
    let checked = match key {
        b"" => return None,
        b"path" | b"linkpath" | b"uname" | b"gname" => value,
        _ => key,
    };
    (!checked.contains(&0)).then_some((key, value, rest))
}

/// The value of `key`, if it is there and not empty: an empty value unsets a record.
pub(super) fn find<'a>(records: &'a Records, key: &[u8]) -> Option<&'a [u8]> {
    let index = records.binary_search_by(|record| (*record.key).cmp(key)).ok()?;
    let value = &*records[index].value;
    (!value.is_empty()).then_some(value)
}

/// A decimal integer with an optional sign, as Go's `ParseInt` reads it.
pub(super) fn integer(text: &[u8]) -> Option<i64> {
    let (negative, digits) = match text {
        [b'-', digits @ ..] => (true, digits),
        [b'+', digits @ ..] => (false, digits),
        digits => (false, digits),
    };
    if digits.is_empty() {
        return None;
    }
    let mut value: i64 = 0;
    for digit in digits {
        let digit = i64::from(digit.checked_sub(b'0').filter(|digit| *digit <= 9)?);
        value = value.checked_mul(10)?;
        value = if negative { value.checked_sub(digit)? } else { value.checked_add(digit)? };
    }
    Some(value)
}

/// A PAX time: seconds with an optional fraction, of which nine digits count.
pub(super) fn time(text: &[u8]) -> Option<(i64, u32)> {
    let (whole, fraction) = match text.iter().position(|byte| *byte == b'.') {
        Some(dot) => (&text[..dot], &text[dot + 1..]),
        None => (text, &b""[..]),
    };
    let seconds = integer(whole)?;
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let digits = fraction.iter().copied().chain(std::iter::repeat(b'0')).take(9);
    let nanoseconds = digits.fold(0, |value, digit| value * 10 + u32::from(digit - b'0'));
    if whole.starts_with(b"-") && nanoseconds > 0 {
        // -1.5 is one and a half seconds before 1970.
        return Some((seconds.checked_sub(1)?, 1_000_000_000 - nanoseconds));
    }
    Some((seconds, nanoseconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records() {
        let text = b"30 mtime=1350244992.023960108\n9 path=a\n7 abc=\n9 path=b\n";
        let records = parse(text).unwrap();
        assert_eq!(find(&records, b"path"), Some(&b"b"[..]));
        assert_eq!(find(&records, b"abc"), None);
        assert_eq!(records.len(), 3);
        let sparse = b"23 GNU.sparse.offset=0\n25 GNU.sparse.numbytes=5\n";
        assert_eq!(find(&parse(sparse).unwrap(), SPARSE_MAP), Some(&b"0,5"[..]));
        for bad in [
            &b"9 path=a"[..],
            b"99 path=a\n",
            b"8 path=a\n",
            b"x path=a\n",
            b"5 =a\n",
            b"4 a\n",
            b"12 path=a\0\0\n",
            b"24 GNU.sparse.numbytes=5\n",
        ] {
            assert_eq!(parse(bad), None, "{}", String::from_utf8_lossy(bad));
        }
    }

    #[test]
    fn times() {
        for (text, expected) in [
            (&b"0"[..], Some((0, 0))),
            (b"1.5", Some((1, 500_000_000))),
            (b"1.", Some((1, 0))),
            (b"-1.5", Some((-2, 500_000_000))),
            (b"-0.25", Some((-1, 750_000_000))),
            (b"1.0123456789", Some((1, 12_345_678))),
            (b"+7", Some((7, 0))),
            (b".5", None),
            (b"1.x", None),
            (b"1-2", None),
            (b"\x012", None),
            (b"9223372036854775808", None),
        ] {
            assert_eq!(time(text), expected, "{}", String::from_utf8_lossy(text));
        }
    }
}
