//! Numbers of bytes on the command line: `4194304`, `8MiB`, `1M`.
//!
//! Units are powers of 1024, whether or not they are written with an `i`, as in the daemon's configuration. What AWS's
//! tool refuses is refused in its words: scripts and its own tests look for them.

use std::num::IntErrorKind;

/// The largest number: AWS's tool keeps sizes in 64 bits with a sign.
const SIZE_MAX: u64 = i64::MAX.cast_unsigned();

/// `--span-size`.
pub(super) fn span(text: &str) -> Result<u64, String> {
    of_flag(text, "span-size", "span size")
}

/// `--min-layer-size`.
pub(super) fn layer(text: &str) -> Result<u64, String> {
    of_flag(text, "min-layer-size", "min layer size")
}

/// Any other.
pub(super) fn bytes(text: &str) -> Result<u64, String> {
    parse(text).map_err(|error| match error {
        Unreadable::Negative => "a size must be >= 0".to_owned(),
        Unreadable::TooLarge => "a size must be less than 2^63".to_owned(),
        Unreadable::Malformed => "expected a number of bytes, for example 4194304, 8MiB or 1G".to_owned(),
    })
}

fn of_flag(text: &str, flag: &str, what: &str) -> Result<u64, String> {
    parse(text).map_err(|error| match error {
        Unreadable::Negative => format!("{what} must be >= 0"),
        Unreadable::TooLarge => format!("invalid value \"{text}\" for flag -{flag}: value out of range"),
        Unreadable::Malformed => {
            format!("invalid value \"{text}\" for flag -{flag}: expected a number, for example 4194304, 8MiB or 1M")
        }
    })
}

/// Why a text is no size.
#[derive(Debug, PartialEq, Eq)]
enum Unreadable {
    Negative,
    TooLarge,
    Malformed,
}

fn parse(text: &str) -> Result<u64, Unreadable> {
    let (number, is_negative) = text.strip_prefix('-').map_or((text, false), |number| (number, true));
    let digits = number.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(number.len());
    let (digits, unit) = number.split_at(digits);
    let shift = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(Unreadable::Malformed),
    };
    let number = match digits.parse::<u64>() {
        Ok(number) => number,
        Err(error) if *error.kind() == IntErrorKind::PosOverflow => return Err(Unreadable::TooLarge),
        Err(_) => return Err(Unreadable::Malformed),
    };
    if is_negative && number > 0 {
        return Err(Unreadable::Negative);
    }
    number.checked_mul(1 << shift).filter(|bytes| *bytes <= SIZE_MAX).ok_or(Unreadable::TooLarge)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, expected) in [
            ("0", Ok(0)),
            ("4194304", Ok(4 << 20)),
            ("1M", Ok(1 << 20)),
            ("8MiB", Ok(8 << 20)),
            ("64 kb", Ok(64 << 10)),
            ("2g", Ok(2 << 30)),
            ("1TiB", Ok(1 << 40)),
            ("-0", Ok(0)),
            ("9223372036854775807", Ok(i64::MAX as u64)),
            ("9223372036854775808", Err(Unreadable::TooLarge)),
            ("99999999999999999999", Err(Unreadable::TooLarge)),
            ("8388608T", Err(Unreadable::TooLarge)),
            ("-1", Err(Unreadable::Negative)),
            ("-1M", Err(Unreadable::Negative)),
            ("", Err(Unreadable::Malformed)),
            ("M", Err(Unreadable::Malformed)),
            ("1.5M", Err(Unreadable::Malformed)),
            ("1 apple", Err(Unreadable::Malformed)),
            ("+1", Err(Unreadable::Malformed)),
        ] {
            assert_eq!(parse(text), expected, "{text:?}");
        }
    }

    #[test]
    fn refusals_in_the_words_of_the_peer() {
        assert_eq!(span("-1").unwrap_err(), "span size must be >= 0");
        assert_eq!(layer("-5M").unwrap_err(), "min layer size must be >= 0");
        let over = "9223372036854775808";
        assert!(span(over).unwrap_err().starts_with(&format!("invalid value \"{over}\" for flag -span-size")));
        assert!(layer(over).unwrap_err().starts_with(&format!("invalid value \"{over}\" for flag -min-layer-size")));
    }
}
