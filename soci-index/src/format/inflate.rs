//! Raw deflate (RFC 1951) with a stop at every block boundary: the only unsafe code of this crate.
//!
//! Span indexes need four things of an inflater: stop after each block, report the bit position there, begin in the
//! middle of a byte, and begin with a given history. Of the fast decoders in Rust only zlib-rs has all four, and only
//! through its C-style interface (`Z_BLOCK`, `data_type`, `inflatePrime`, `inflateSetDictionary`); `miniz_oxide` can do
//! it in safe code at 60 % of the speed. This file wraps that interface; nothing else in the crate touches a pointer.
//!
//! Invariant: the `z_stream` never outlives a call with pointers into the caller's slices; both are reset on the way
//! out.

#![allow(unsafe_code, reason = "zlib-rs offers block stepping only through its C-style interface")]

use core::ffi::c_int;

use libz_rs_sys as z;

/// A raw inflate stream.
pub(crate) struct Inflater {
    stream: Box<z::z_stream>,
}

/// Why a call of [`Inflater::step`] came back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stop {
    /// Input or room for output ran out.
    More,
    /// A block has just ended.
    Block {
        /// Bits of the last consumed byte that belong to what follows: 0 to 7.
        bits: u8,
        /// Whether it was the stream's final block.
        last: bool,
    },
    /// The stream has ended; the next byte of input is not part of it.
    End,
}

/// What one call did.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Step {
    /// Bytes of input used up.
    pub(crate) consumed: usize,
    /// Bytes of output written.
    pub(crate) produced: usize,
    /// Why it stopped.
    pub(crate) stop: Stop,
}

/// The bytes are not deflate data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NotDeflate;

impl Inflater {
    pub(crate) fn new() -> Self {
        let mut stream = Box::<z::z_stream>::default();
        // SAFETY: `stream` is a valid, writable z_stream in its default state; version and size are those of the very
        // library that is called. It is not moved afterwards (boxed), and freed exactly once, in `drop`.
        let code = unsafe {
            z::inflateInit2_(
                &raw mut *stream,
                -15,
                z::zlibVersion(),
                c_int::try_from(size_of::<z::z_stream>()).unwrap_or(0),
            )
        };
        assert_eq!(code, z::Z_OK, "inflateInit2 with constant, valid arguments fails only without memory");
        Self { stream }
    }

    /// Forgets everything: the next byte begins a new stream.
    pub(crate) fn reset(&mut self) {
        // SAFETY: the stream was initialised in `new`.
        let code = unsafe { z::inflateReset(&raw mut *self.stream) };
        assert_eq!(code, z::Z_OK, "inflateReset of an initialised stream");
    }

    /// Begins with the top `bits` (1 to 7) of `byte`, then goes on with the input. Call before the first step.
    pub(crate) fn prime(&mut self, byte: u8, bits: u8) {
        assert!((1..8).contains(&bits), "bits were checked with the span table");
        // SAFETY: the stream was initialised in `new`.
        let code = unsafe { z::inflatePrime(&raw mut *self.stream, bits.into(), c_int::from(byte >> (8 - bits))) };
        assert_eq!(code, z::Z_OK, "inflatePrime of a fresh stream with at most 7 bits");
    }

    /// Begins with `history` (at most 32 KiB) as the output before. Call before the first step.
    pub(crate) fn set_history(&mut self, history: &[u8]) {
        let length = u32::try_from(history.len()).expect("a window is 32 KiB");
        // SAFETY: the stream was initialised in `new`; pointer and length are those of one slice, which is only read.
        let code = unsafe { z::inflateSetDictionary(&raw mut *self.stream, history.as_ptr(), length) };
        assert_eq!(code, z::Z_OK, "inflateSetDictionary of a fresh raw stream");
    }

    /// Decodes until a block ends, the stream ends, `input` is used up or `output` is full.
    pub(crate) fn step(&mut self, input: &[u8], output: &mut [u8]) -> Result<Step, NotDeflate> {
        // The C interface counts in 32 bits: a larger slice is used in part, and the caller comes back.
        let input = &input[..input.len().min(1 << 30)];
        let room = output.len().min(1 << 30);
        let output = &mut output[..room];
        let (input_length, output_length) = (input.len() as u32, output.len() as u32);
        self.stream.next_in = input.as_ptr();
        self.stream.avail_in = input_length;
        self.stream.next_out = output.as_mut_ptr();
        self.stream.avail_out = output_length;
        // SAFETY: the stream was initialised in `new`; next_in/avail_in and next_out/avail_out describe two slices that
        // are borrowed (the second one exclusively) for the whole call.
        let code = unsafe { z::inflate(&raw mut *self.stream, z::Z_BLOCK) };
        let consumed = input.len() - self.stream.avail_in as usize;
        let produced = output.len() - self.stream.avail_out as usize;
        self.stream.next_in = core::ptr::null();
        self.stream.next_out = core::ptr::null_mut();
        self.stream.avail_in = 0;
        self.stream.avail_out = 0;
        let stop = match code {
            z::Z_STREAM_END => Stop::End,
            z::Z_OK if self.stream.data_type & 128 != 0 => self.boundary(),
            // No progress was possible: that is for the caller to judge.
            z::Z_OK | z::Z_BUF_ERROR => Stop::More,
            _ => return Err(NotDeflate),
        };
        Ok(Step { consumed, produced, stop })
    }

    fn boundary(&self) -> Stop {
        let bits = self.stream.data_type & 63;
        assert!(bits < 8, "the decoder returns whole unused bytes before it stops at a block");
        Stop::Block { bits: bits as u8, last: self.stream.data_type & 64 != 0 }
    }
}

impl Drop for Inflater {
    fn drop(&mut self) {
        // SAFETY: initialised in `new`, ended only here.
        let _ = unsafe { z::inflateEnd(&raw mut *self.stream) };
    }
}

impl core::fmt::Debug for Inflater {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Inflater").field("in", &self.stream.total_in).field("out", &self.stream.total_out).finish()
    }
}

// SAFETY: the state behind the pointers is owned by this value alone (allocated in `new`, freed in `drop`), and no
// method hands a pointer out.
unsafe impl Send for Inflater {}
// SAFETY: every method that touches the state takes `&mut self`; `Debug` reads two integers.
unsafe impl Sync for Inflater {}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn deflate(data: &[u8], level: u32) -> Vec<u8> {
        let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::new(level));
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    /// The whole stream, `piece` bytes at a time, and how many blocks it has.
    fn inflate(data: &[u8], piece: usize) -> (Vec<u8>, usize) {
        let (mut inflater, mut out, mut blocks, mut at) = (Inflater::new(), Vec::new(), 0, 0);
        let mut buffer = vec![0; 1000];
        loop {
            let end = data.len().min(at + piece);
            let step = inflater.step(&data[at..end], &mut buffer).unwrap();
            at += step.consumed;
            out.extend_from_slice(&buffer[..step.produced]);
            match step.stop {
                Stop::End => return (out, blocks),
                Stop::Block { .. } => blocks += 1,
                Stop::More => assert!(step.consumed + step.produced > 0, "stuck at {at}"),
            }
        }
    }

    #[test]
    fn pieces_of_any_size_give_the_same() {
        let text: Vec<u8> =
            (0..200_000u32).flat_map(|n| (n.wrapping_mul(2_654_435_761) >> 20).to_string().into_bytes()).collect();
        for level in [0, 1, 6, 9] {
            let packed = deflate(&text, level);
            let whole = inflate(&packed, usize::MAX - packed.len());
            assert_eq!(whole.0, text);
            assert!(whole.1 > 1, "level {level} has several blocks");
            assert_eq!(inflate(&packed, 1), whole);
            assert_eq!(inflate(&packed, 777), whole);
        }
    }

    #[test]
    fn noise_is_refused() {
        assert!(Inflater::new().step(&[0xff; 64], &mut [0; 64]).is_err());
    }
}
