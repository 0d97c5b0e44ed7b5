//! Times as RFC 3339 text, as Go's `time.Time.MarshalText` writes them in UTC.
//!
//! jiff knows the calendar, by its civil time: its `Timestamp` ends a day before the year 9999 does. What it reads beyond
//! RFC 3339 (a space for the `T`, the name of a zone) and what Go does not read (a leap second) is no time here, so the
//! form is compared first.

use jiff::SignedDuration;
use jiff::civil::DateTime;

use crate::format::entry::Timestamp;

const EPOCH: DateTime = DateTime::constant(1970, 1, 1, 0, 0, 0, 0);

/// The text; empty for years that RFC 3339 cannot say (before 0 or after 9999).
#[must_use]
pub fn format(time: Timestamp) -> String {
    let fraction = SignedDuration::from_nanos(i64::from(time.nanoseconds));
    let since = SignedDuration::from_secs(time.seconds).checked_add(fraction);
    let at = since.and_then(|since| EPOCH.checked_add(since).ok()).filter(|at| at.year() >= 0);
    at.map_or_else(String::new, |at| format!("{at}Z"))
}

/// Reads a text with any zone; `None` when it is not such a time.
#[must_use]
pub fn parse(text: &[u8]) -> Option<Timestamp> {
    let text = std::str::from_utf8(text).ok()?;
    let (local, zone) = text.split_at(19 + text.get(19..)?.find(['Z', '+', '-'])?);
    let form = "0000-00-00T00:00:00.000000000".get(..local.len())?;
    if !has_form(local, form) || local.ends_with('.') || local[17..19] == *"60" {
        return None;
    }
    let offset = match zone {
        "Z" => 0,
        zone if has_form(zone, "+00:00") || has_form(zone, "-00:00") => {
            let minutes = zone[1..3].parse::<i64>().ok()? * 60 + zone[4..].parse::<i64>().ok()?;
            if zone.starts_with('+') { minutes * 60 } else { -minutes * 60 }
        }
        _ => return None,
    };
    let at: DateTime = local.parse().ok()?;
    let nanoseconds = u32::try_from(at.subsec_nanosecond()).ok()?;
    let whole = at.duration_since(EPOCH) - SignedDuration::from_nanos(i64::from(nanoseconds));
    Some(Timestamp { seconds: whole.as_secs() - offset, nanoseconds })
}

/// Whether a text is like this one, with any digits for its zeros.
fn has_form(text: &str, form: &str) -> bool {
    let is_like = |(byte, wanted): (u8, u8)| if wanted == b'0' { byte.is_ascii_digit() } else { byte == wanted };
    text.len() == form.len() && text.bytes().zip(form.bytes()).all(is_like)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways() {
        for (seconds, nanoseconds, text) in [
            (0, 0, "1970-01-01T00:00:00Z"),
            (-1, 0, "1969-12-31T23:59:59Z"),
            (1_600_000_000, 500_000_000, "2020-09-13T12:26:40.5Z"),
            (951_782_400, 1, "2000-02-29T00:00:00.000000001Z"),
            (253_402_300_799, 0, "9999-12-31T23:59:59Z"),
            (-62_135_596_800, 0, "0001-01-01T00:00:00Z"),
            (-62_167_219_200, 0, "0000-01-01T00:00:00Z"),
        ] {
            let time = Timestamp { seconds, nanoseconds };
            assert_eq!(format(time), text);
            assert_eq!(parse(text.as_bytes()), Some(time), "{text}");
        }
        assert_eq!(format(Timestamp { seconds: 253_402_300_800, nanoseconds: 0 }), "");
        assert_eq!(format(Timestamp { seconds: i64::MIN / 2, nanoseconds: 0 }), "");
        assert_eq!(parse(b"1970-01-01T09:00:00+09:00"), Some(Timestamp::default()));
        for bad in [
            "",
            "garbage",
            "2020-13-01T00:00:00Z",
            "2021-02-29T00:00:00Z",
            "2020-01-01 00:00:00Z",
            "2020-01-01T00:00:00",
            "2020-01-01T00:00:00.Z",
            // jiff reads these.
            "2016-12-31T23:59:60Z",
            "2020-01-01t00:00:00Z",
            "2020-01-01T00:00:00z",
            "2020-01-01T00:00:00,5Z",
            "2020-01-01T00:00Z",
            "20200101T000000Z",
            "+002020-01-01T00:00:00Z",
            "2020-01-01T00:00:00+09",
            "2020-01-01T00:00:00Z[UTC]",
            "2020-01-01T00:00:00.1234567890Z",
        ] {
            assert_eq!(parse(bad.as_bytes()), None, "{bad}");
        }
    }

    #[test]
    fn every_day_of_four_centuries() {
        for day in -146_097..146_097 {
            let time = Timestamp { seconds: day * 86_400, nanoseconds: 0 };
            assert_eq!(parse(format(time).as_bytes()), Some(time));
        }
    }
}
