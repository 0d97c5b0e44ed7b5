//! Windows by themselves, and the blob that they stand in.

use crate::format::checkpoint::{WINDOW_BYTES, Window};
use crate::format::class::{Class, Classified};
use crate::format::compact::{EncodeError, WINDOWS_MAGIC};
use crate::format::digest::Digest;
use crate::format::index::WindowPlace;

/// How hard windows are compressed. Level 6 gains a thirtieth in twice the time, 19 a tenth in ninety times, for each
/// of thousands of windows that are made while a layer is read.
const LEVEL: i32 = 3;

/// A windows blob that is being written.
#[derive(Debug, Clone)]
pub struct WindowsBlob {
    bytes: Vec<u8>,
    places: Vec<WindowPlace>,
}

impl Default for WindowsBlob {
    fn default() -> Self {
        Self { bytes: WINDOWS_MAGIC.to_vec(), places: Vec::new() }
    }
}

impl WindowsBlob {
    /// Puts the next span's window at the end. Unreferenced bytes should be zeros.
    ///
    /// # Errors
    /// [`EncodeError::Compress`].
    pub fn push(&mut self, window: &[u8; WINDOW_BYTES]) -> Result<(), EncodeError> {
        let offset = self.bytes.len() as u64;
        if window.iter().all(|byte| *byte == 0) {
            self.places.push(WindowPlace { offset, length: 0, digest: [0; 32] });
            return Ok(());
        }
        let failed = |reason: String| EncodeError::Compress { reason };
        let frame = zstd::bulk::compress(window, LEVEL).map_err(|error| failed(error.to_string()))?;
        let length = u32::try_from(frame.len()).map_err(|error| failed(error.to_string()))?;
        let digest = Digest::of(&frame).bytes().try_into().unwrap_or_default();
        self.places.push(WindowPlace { offset, length, digest });
        self.bytes.extend_from_slice(&frame);
        Ok(())
    }

    /// The blob, and where each span's window stands in it.
    #[must_use]
    pub fn finish(self) -> (Vec<u8>, Vec<WindowPlace>) {
        (self.bytes, self.places)
    }
}

/// Why bytes are not the window that they should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WindowError {
    /// They are others.
    #[error("the window at {offset} of the windows blob has another digest than the index says")]
    Digest { offset: u64 },
    /// They do not unpack to a window.
    #[error("the window at {offset} of the windows blob cannot be unpacked: {reason}")]
    Frame { offset: u64, reason: String },
}

impl Classified for WindowError {
    fn class(&self) -> Class {
        Class::Content
    }
}

impl WindowPlace {
    /// The window out of the bytes that stand in its place.
    ///
    /// # Errors
    /// [`WindowError`] unless they are the very bytes that the index means.
    pub fn window(&self, bytes: &[u8]) -> Result<Window, WindowError> {
        let offset = self.offset;
        if self.length == 0 {
            return Ok(Window::EMPTY);
        }
        if Digest::from_sha256(self.digest) != Digest::of(bytes) {
            return Err(WindowError::Digest { offset });
        }
        let mut window = Box::new([0; WINDOW_BYTES]);
        match zstd::bulk::decompress_to_buffer(bytes, &mut window[..]) {
            Ok(WINDOW_BYTES) => {
                let whole: Box<[u8]> = window;
                Ok(Window::from_bytes(whole.into()).unwrap_or(Window::EMPTY))
            }
            Ok(length) => Err(WindowError::Frame { offset, reason: format!("it has {length} bytes") }),
            Err(error) => Err(WindowError::Frame { offset, reason: error.to_string() }),
        }
    }
}
