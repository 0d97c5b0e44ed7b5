//! One tar header block: checksum, format, and fields, read exactly as Go's archive/tar reads them.
//!
//! Go's reader decides what the AWS tools put into a zTOC, so its leniencies are kept: signed or unsigned checksum,
//! base-256 numbers (negative ones too), blanks and NULs around octal digits, the prefix field of three formats.

/// Size of a tar block.
pub(super) const BLOCK: usize = 512;

/// Which field of a header cannot be read.
pub(super) type Field = &'static str;

/// A header block, numbers parsed, texts borrowed.
#[derive(Debug)]
pub(super) struct Header<'a> {
    pub(super) name: Vec<u8>,
    pub(super) link: &'a [u8],
    pub(super) flag: u8,
    pub(super) size: i64,
    pub(super) mode: i64,
    pub(super) uid: i64,
    pub(super) gid: i64,
    pub(super) seconds: i64,
    pub(super) user_name: &'a [u8],
    pub(super) group_name: &'a [u8],
    pub(super) device_major: i64,
    pub(super) device_minor: i64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    V7,
    Ustar,
    Star,
    Gnu,
}

impl<'a> Header<'a> {
    /// Reads a block that is not all zero.
    pub(super) fn parse(block: &'a [u8; BLOCK]) -> Result<Self, Field> {
        let format = format(block)?;
        let mut header = Self {
            name: text(&block[..100]).to_vec(),
            link: text(&block[157..257]),
            flag: block[156],
            size: number(&block[124..136], "size")?,
            mode: number(&block[100..108], "mode")?,
            uid: number(&block[108..116], "uid")?,
            gid: number(&block[116..124], "gid")?,
            seconds: number(&block[136..148], "modification time")?,
            user_name: b"",
            group_name: b"",
            device_major: 0,
            device_minor: 0,
        };
        if format != Format::V7 {
            header.user_name = text(&block[265..297]);
            header.group_name = text(&block[297..329]);
            header.device_major = number(&block[329..337], "device major")?;
            header.device_minor = number(&block[337..345], "device minor")?;
        }
        let prefix = prefix(block, format)?;
        if !prefix.is_empty() {
            header.name = [prefix, b"/", &header.name].concat();
        }
        Ok(header)
    }
}

fn format(block: &[u8; BLOCK]) -> Result<Format, Field> {
    let stored = octal(&block[148..156]).ok_or("checksum")?;
    // The checksum field itself counts as blanks. Some old writers summed signed bytes.
    let summed = || block[..148].iter().chain(&[b' '; 8]).chain(&block[156..]);
    let unsigned: i64 = summed().map(|byte| i64::from(*byte)).sum();
    let signed: i64 = summed().map(|byte| i64::from(byte.cast_signed())).sum();
    if stored != unsigned && stored != signed {
        return Err("checksum");
    }
    Ok(match (&block[257..263], &block[263..265]) {
        (b"ustar\0", _) if &block[508..] == b"tar\0" => Format::Star,
        (b"ustar\0", _) => Format::Ustar,
        (b"ustar ", b" \0") => Format::Gnu,
        _ => Format::V7,
    })
}

fn prefix(block: &[u8; BLOCK], format: Format) -> Result<&[u8], Field> {
    match format {
        Format::V7 => Ok(b""),
        Format::Ustar => Ok(text(&block[345..500])),
        Format::Star => {
            number(&block[476..488], "access time")?;
            number(&block[488..500], "change time")?;
            Ok(text(&block[345..476]))
        }
        Format::Gnu => {
            // Old GNU headers hold two times where ustar has the prefix. An archive whose times do not parse was made
            // by a writer that confused the two.
            let time = |field: &[u8]| field[0] == 0 || number(field, "").is_ok();
            let prefix = text(&block[345..500]);
            let confused = !(time(&block[345..357]) && time(&block[357..369]));
            Ok(if confused && prefix.is_ascii() { prefix } else { b"" })
        }
    }
}

/// A text field: up to its first NUL.
pub(super) fn text(field: &[u8]) -> &[u8] {
    field.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// A numeric field: base-256 when the top bit is set, else octal.
pub(super) fn number(field: &[u8], what: Field) -> Result<i64, Field> {
    match field.first() {
        Some(first) if first & 0x80 != 0 => binary(field).ok_or(what),
        _ => octal(field).ok_or(what),
    }
}

fn binary(field: &[u8]) -> Option<i64> {
    let invert = if field[0] & 0x40 != 0 { 0xff } else { 0 };
    let mut value: u64 = 0;
    for (index, byte) in field.iter().enumerate() {
        let byte = byte ^ invert;
        let byte = if index == 0 { byte & 0x7f } else { byte };
        if value >> 56 != 0 {
            return None;
        }
        value = value << 8 | u64::from(byte);
    }
    let value = i64::try_from(value).ok()?;
    Some(if invert == 0 { value } else { !value })
}

fn octal(field: &[u8]) -> Option<i64> {
    let blank = |byte: &u8| *byte == b' ' || *byte == 0;
    let Some(start) = field.iter().position(|byte| !blank(byte)) else { return Some(0) };
    let mut value: u64 = 0;
    let trimmed = &field[start..=field.iter().rposition(|byte| !blank(byte))?];
    for byte in text(trimmed) {
        if !(b'0'..=b'7').contains(byte) {
            return None;
        }
        value = value.checked_mul(8)?.checked_add(u64::from(byte - b'0'))?;
    }
    Some(value.cast_signed())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        let cases: &[(&[u8], Option<i64>)] = &[
            (b"0000644\0", Some(0o644)),
            (b" 644  \0\0", Some(0o644)),
            (b"\0\0\0 7\0 \0", Some(7)),
            (b"        ", Some(0)),
            (b"\0\0\0\0\0\0\0\0", Some(0)),
            (b"77777777", Some(0o77_777_777)),
            (b"00006x4\0", None),
            (b"12 34\0\0\0", None),
            (b"12\x0034\0\0\0", Some(0o12)),
            (b"-1\0\0\0\0\0\0", None),
            (b"\x80\0\0\0\0\0\0\x05", Some(5)),
            (b"\xff\xff\xff\xff\xff\xff\xff\xff", Some(-1)),
            (b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfe", Some(-2)),
            (b"\x80\0\0\0\x80\0\0\0\0\0\0\0", None),
            (b"\x80\0\0\x01\0\0\0\0\0\0\0\0", None),
            (b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff", Some(i64::MAX)),
        ];
        for (field, expected) in cases {
            assert_eq!(number(field, "x").ok(), *expected, "{field:?}");
        }
    }
}
