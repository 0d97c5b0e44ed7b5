//! Numbers and texts of a column, written and read.

use crate::format::compact::{Column, CompactError};

/// A column that is being written.
#[derive(Debug, Default)]
pub(super) struct Writer(pub(super) Vec<u8>);

impl Writer {
    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    pub(super) fn number(&mut self, mut number: u64) {
        while number >= 0x80 {
            self.0.push((number & 0x7f) as u8 | 0x80);
            number >>= 7;
        }
        self.0.push(number as u8);
    }

    pub(super) fn signed(&mut self, number: i64) {
        self.number(((number << 1) ^ (number >> 63)).cast_unsigned());
    }
}

/// A column that is being read.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    column: Column,
    rest: &'a [u8],
    /// How many values were read.
    count: usize,
}

impl<'a> Reader<'a> {
    pub(super) fn new(column: Column, bytes: &'a [u8]) -> Self {
        Self { column, rest: bytes, count: 0 }
    }

    pub(super) fn fault(&self, what: &'static str) -> CompactError {
        CompactError::Column { column: self.column, entry: Some(self.count), what }
    }

    pub(super) fn bytes(&mut self, length: usize) -> Result<&'a [u8], CompactError> {
        let (bytes, rest) = self.rest.split_at_checked(length).ok_or_else(|| self.fault("it ends too early"))?;
        self.rest = rest;
        self.count += 1;
        Ok(bytes)
    }

    pub(super) fn byte(&mut self) -> Result<u8, CompactError> {
        Ok(self.bytes(1)?.first().copied().unwrap_or_default())
    }

    pub(super) fn digest(&mut self) -> Result<[u8; 32], CompactError> {
        let bytes = self.bytes(32)?;
        bytes.try_into().map_err(|_| self.fault("it ends too early"))
    }

    /// A varint. Only the shortest form of a number is one, and none has more than 64 bits.
    pub(super) fn number(&mut self) -> Result<u64, CompactError> {
        let mut number = 0_u64;
        for (place, byte) in self.rest.iter().enumerate().take(10) {
            let bits = u64::from(byte & 0x7f);
            if place == 9 && bits > 1 {
                return Err(self.fault("a number has more than 64 bits"));
            }
            number |= bits << (7 * place);
            if byte & 0x80 == 0 {
                if *byte == 0 && place > 0 {
                    return Err(self.fault("a number is longer than it need be"));
                }
                self.rest = self.rest.get(place + 1..).unwrap_or_default();
                self.count += 1;
                return Ok(number);
            }
        }
        Err(self.fault(if self.rest.len() < 10 { "it ends too early" } else { "a number has more than 64 bits" }))
    }

    pub(super) fn signed(&mut self) -> Result<i64, CompactError> {
        let number = self.number()?;
        Ok((number >> 1).cast_signed() ^ -(number & 1).cast_signed())
    }

    /// A number that counts or measures something in memory, at most `limit`.
    pub(super) fn length(&mut self, limit: usize, what: &'static str) -> Result<usize, CompactError> {
        let number = self.number()?;
        usize::try_from(number).ok().filter(|length| *length <= limit).ok_or_else(|| self.fault(what))
    }

    /// Whether all was read.
    pub(super) fn is_at_end(&self) -> bool {
        self.rest.is_empty()
    }

    /// Nothing may be left.
    pub(super) fn end(self) -> Result<(), CompactError> {
        if self.rest.is_empty() {
            return Ok(());
        }
        Err(CompactError::Column { column: self.column, entry: None, what: "it goes on after its last value" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        let numbers = [0, 1, 127, 128, 300, u64::from(u32::MAX), u64::MAX - 1, u64::MAX];
        let signed = [0, -1, 1, 63, -64, i64::MIN, i64::MAX];
        let mut writer = Writer::default();
        numbers.iter().for_each(|number| writer.number(*number));
        signed.iter().for_each(|number| writer.signed(*number));
        let mut reader = Reader::new(Column::Sizes, &writer.0);
        assert!(numbers.iter().all(|number| reader.number() == Ok(*number)));
        assert!(signed.iter().all(|number| reader.signed() == Ok(*number)));
        reader.end().unwrap();
        for bad in [
            &[][..],
            &[0x80],
            &[0x80, 0],
            &[0xff; 9],
            &[0xff; 10],
            &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2],
        ] {
            assert!(Reader::new(Column::Sizes, bad).number().is_err(), "{bad:?}");
        }
    }
}
