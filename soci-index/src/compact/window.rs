//! Windows by themselves.

use crate::checkpoint::{WINDOW_BYTES, Window};
use crate::digest::Digest;

/// Where a window stands in the windows blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WindowPlace {
    /// Its first byte.
    pub offset: u64,
    /// How many bytes it has; 0 for a window of zeros, which stands nowhere.
    pub length: u32,
    /// SHA-256 of these bytes.
    pub digest: [u8; 32],
}

/// Why bytes are not the window that they should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WindowError {
    /// They are others.
    #[error("the window at {offset} of the windows blob has another digest than the index says")]
    Digest {
        /// Where it should be.
        offset: u64,
    },
    /// They do not unpack to a window.
    #[error("the window at {offset} of the windows blob cannot be unpacked: {reason}")]
    Frame {
        /// Where it is.
        offset: u64,
        /// Why not.
        reason: String,
    },
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
            Ok(WINDOW_BYTES) => Ok(Window::pack(&window)),
            Ok(length) => Err(WindowError::Frame { offset, reason: format!("it has {length} bytes") }),
            Err(error) => Err(WindowError::Frame { offset, reason: error.to_string() }),
        }
    }
}
