//! Sequential output that knows its position.

use std::io::{self, Write};

use crate::tree::device::BLOCK_BYTES;

/// Bytes that are collected before they are written.
const BUFFER_BYTES: usize = 64 << 10;

/// A writer, and how much went to it.
#[derive(Debug)]
pub(super) struct Output<'w, W> {
    inner: &'w mut W,
    buffer: Vec<u8>,
    position: u64,
}

impl<'w, W: Write> Output<'w, W> {
    pub(super) fn new(inner: &'w mut W) -> Self {
        Self { inner, buffer: Vec::with_capacity(2 * BUFFER_BYTES), position: 0 }
    }

    pub(super) fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.buffer.extend_from_slice(bytes);
        self.position += bytes.len() as u64;
        if self.buffer.len() >= BUFFER_BYTES {
            self.flush()?;
        }
        Ok(())
    }

    /// Writes zeros up to a position. Positions that lie behind are left alone.
    pub(super) fn pad_to(&mut self, position: u64) -> io::Result<()> {
        while self.position < position {
            let zeros = [0; BLOCK_BYTES as usize];
            let missing = usize::try_from(position - self.position).unwrap_or(usize::MAX);
            self.put(&zeros[..missing.min(zeros.len())])?;
        }
        Ok(())
    }

    /// Writes zeros up to the next block, and gives the position.
    pub(super) fn pad_block(&mut self) -> io::Result<u64> {
        self.pad_to(self.position.next_multiple_of(BLOCK_BYTES))?;
        Ok(self.position)
    }

    pub(super) fn flush(&mut self) -> io::Result<()> {
        self.inner.write_all(&self.buffer)?;
        self.buffer.clear();
        Ok(())
    }
}
