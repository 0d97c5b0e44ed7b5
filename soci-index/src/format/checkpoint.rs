//! Checkpoints: the places in a deflate stream at which decoding may begin, and the history each one needs.
//!
//! Deflate may refer back 32 KiB, so a checkpoint carries a [`Window`]: the 32,768 bytes of output before it. A layer
//! of 10 GB has thousands of them, so windows made by the indexer are held compressed, and windows read from a zTOC are
//! slices of that file: nothing is copied until a span is decoded.

use bytes::Bytes;

/// Bytes of history a deflate stream may refer to (RFC 1951, section 2).
pub const WINDOW_BYTES: usize = 32_768;

/// A window, whole, as the decoder wants it.
pub type WindowBytes = Box<[u8; WINDOW_BYTES]>;

/// A place at which decoding may begin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// Offset in the layer blob of the first byte that is not yet touched.
    pub compressed: u64,
    /// Bytes of output before this point.
    pub uncompressed: u64,
    /// How many bits (the top ones) of the byte at `compressed - 1` still belong to what follows: 0 to 7.
    pub bits: u8,
    /// The history.
    pub window: Window,
}

/// The output before a checkpoint, oldest byte first; zero bytes stand for what lies before the start of the layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Window(Form);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Form {
    /// 32,768 zero bytes.
    Zero,
    /// The bytes themselves.
    Whole(Bytes),
    /// One zstd frame of them.
    Packed(Bytes),
}

impl Window {
    /// The window at the start of a layer: zeros only.
    pub const EMPTY: Self = Self(Form::Zero);

    /// A window over bytes that live elsewhere. `None` unless they are exactly [`WINDOW_BYTES`].
    #[must_use]
    pub fn from_bytes(bytes: Bytes) -> Option<Self> {
        (bytes.len() == WINDOW_BYTES).then_some(Self(Form::Whole(bytes)))
    }

    /// Compresses `bytes` to keep them for long.
    #[must_use]
    pub fn pack(bytes: &[u8; WINDOW_BYTES]) -> Self {
        if bytes.iter().all(|byte| *byte == 0) {
            return Self::EMPTY;
        }
        // Level 1: a window is packed once per span while the indexer waits.
        match zstd::bulk::compress(bytes, 1) {
            Ok(frame) if frame.len() < WINDOW_BYTES => Self(Form::Packed(frame.into())),
            // Noise does not shrink, and a failure to compress loses nothing either.
            _ => Self(Form::Whole(Bytes::copy_from_slice(bytes))),
        }
    }

    /// The bytes.
    #[must_use]
    pub fn load(&self) -> WindowBytes {
        let mut bytes = Box::new([0; WINDOW_BYTES]);
        match &self.0 {
            Form::Zero => {}
            Form::Whole(whole) => bytes.copy_from_slice(whole),
            Form::Packed(frame) => {
                let length = zstd::bulk::decompress_to_buffer(frame, &mut bytes[..]).expect("a frame made by pack()");
                assert_eq!(length, WINDOW_BYTES, "a frame made by pack() holds a whole window");
            }
        }
        bytes
    }
}
