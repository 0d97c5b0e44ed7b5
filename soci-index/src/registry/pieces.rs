//! Bytes that come in pieces, for code that reads in the blocking way.
//!
//! Pieces from an iterator, not tokio-util's `SyncIoBridge`: what is read comes from the pool or from memory as often as
//! from a task, and a plain thread has no runtime to wait on. An error of the iterator's is the reader's.

use std::io::{self, Read};

use bytes::Bytes;

/// An iterator over pieces as a reader; that of a channel is `iter::from_fn(|| receive.blocking_recv())`.
#[derive(Debug)]
pub struct Pieces<I> {
    pieces: I,
    current: Bytes,
}

impl<I: Iterator<Item = io::Result<Bytes>>> Pieces<I> {
    /// Nothing is taken from the iterator before the first read.
    pub fn new(pieces: impl IntoIterator<IntoIter = I>) -> Self {
        Self { pieces: pieces.into_iter(), current: Bytes::new() }
    }
}

impl<I: Iterator<Item = io::Result<Bytes>>> Read for Pieces<I> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            match self.pieces.next() {
                Some(piece) => self.current = piece?,
                None => return Ok(0),
            }
        }
        let taken = self.current.split_to(self.current.len().min(buffer.len()));
        buffer[..taken.len()].copy_from_slice(&taken);
        Ok(taken.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_read_up_to_what_breaks() {
        let piece = |text: &'static str| Ok(Bytes::from_static(text.as_bytes()));
        let mut reader = Pieces::new([piece("ab"), piece(""), piece("cde"), Err(io::Error::other("broken"))]);
        let mut bytes = [0; 4];
        reader.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"abcd");
        let mut rest = Vec::new();
        assert_eq!(reader.read_to_end(&mut rest).unwrap_err().to_string(), "broken");
        assert_eq!(rest, b"e");
        assert_eq!(reader.read(&mut bytes).unwrap(), 0);
    }
}
