//! An uncompressed layer as one file: the device of a file system that the kernel has the names of.
//!
//! Such a file system (EROFS, see [`crate::tree::erofs`]) finds the bytes of each file at an offset of this one. They are
//! read by file all the same, so that everything holds here that holds where the kernel asks for files: the header is
//! checked, reads are noted, what is likely to follow is fetched. What is between files is zeros.

use crate::fuse::error::FsError;
use crate::layer::reader::LayerReader;
use crate::tree::device::{DeviceError, DeviceMap, Part};

/// A layer as one file.
#[derive(Debug)]
pub(super) struct DeviceFile {
    map: DeviceMap,
    reader: LayerReader,
}

impl DeviceFile {
    pub(super) fn new(reader: LayerReader) -> Result<Self, DeviceError> {
        let index = reader.index();
        Ok(Self { map: DeviceMap::of_layer(&index.entries, index.uncompressed_size)?, reader })
    }

    pub(super) const fn map(&self) -> &DeviceMap {
        &self.map
    }

    /// Reads if nothing has to be waited for; `false` if it has. What `buffer` held is replaced.
    pub(super) fn try_read(&self, offset: u64, length: usize, buffer: &mut Vec<u8>) -> Result<bool, FsError> {
        let mut parts = self.parts(offset, length);
        // Most reads are of one file: its bytes go where they are wanted.
        match parts.next() {
            Some((Part::File { entry, offset, .. }, length)) => {
                if !self.reader.try_read_file(entry, offset, length, buffer)? {
                    return Ok(false);
                }
                buffer.resize(length, 0);
            }
            Some((Part::Zeros { .. }, length)) => {
                buffer.clear();
                buffer.resize(length, 0);
            }
            None => buffer.clear(),
        }
        let mut bytes = Vec::new();
        for (part, length) in parts {
            let end = buffer.len() + length;
            if let Part::File { entry, offset, .. } = part {
                if !self.reader.try_read_file(entry, offset, length, &mut bytes)? {
                    return Ok(false);
                }
                buffer.extend_from_slice(&bytes);
            }
            buffer.resize(end, 0);
        }
        Ok(true)
    }

    pub(super) async fn read(&self, offset: u64, length: usize) -> Result<Vec<u8>, FsError> {
        let mut buffer = Vec::new();
        for (part, length) in self.parts(offset, length) {
            let end = buffer.len() + length;
            if let Part::File { entry, offset, .. } = part {
                buffer.append(&mut self.reader.read_file(entry, offset, length).await?);
            }
            buffer.resize(end, 0);
        }
        Ok(buffer)
    }

    /// The parts of a range with their lengths.
    fn parts(&self, offset: u64, length: usize) -> impl Iterator<Item = (Part, usize)> {
        let parts = self.map.parts(&self.reader.index().entries, offset, length as u64);
        // No part is longer than what was asked for.
        parts.map(move |part| (part, usize::try_from(part.length()).unwrap_or(length)))
    }
}
