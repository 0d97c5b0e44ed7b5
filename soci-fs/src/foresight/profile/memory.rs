//! What a node remembers of the start-ups that it saw itself: one profile per image, in a file each.
//!
//! ```text
//! DIRECTORY/sha256-HEX.profile    named after the image's manifest
//! ```
//!
//! It needs no published profile, and is used again after the fetched spans were evicted. Invariants: a file is
//! replaced in one step; the number of files is bounded, the oldest go; one that cannot be read is as good as none.

use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use soci_index::format::class::{Class, Classified};
use soci_index::format::digest::Digest;
use soci_index::format::limits::Limits;
use soci_index::format::profile::{Profile, ProfileError};

use crate::foresight::profile::Recorder;

/// Images that are remembered. A profile takes some ten kilobytes.
const IMAGES_MAX: usize = 512;
const SUFFIX: &str = ".profile";

/// Why a profile could not be remembered.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The disk.
    #[error("cannot {operation} {}: {cause}", path.display())]
    Io { operation: &'static str, path: PathBuf, cause: io::Error },
    #[error(transparent)]
    Profile(#[from] ProfileError),
}

impl Classified for MemoryError {
    fn class(&self) -> Class {
        Class::Local
    }
}

/// The profiles that a node made itself.
#[derive(Debug, Clone)]
pub struct Memory {
    directory: PathBuf,
}

impl Memory {
    /// Those below `directory`, which is created when it is needed.
    #[must_use]
    pub fn new(directory: PathBuf) -> Self {
        Self { directory }
    }

    /// What is remembered of the image with this manifest.
    #[must_use]
    pub fn load(&self, image: &Digest) -> Option<Profile> {
        let file = self.file(image);
        let blob = std::fs::read(&file).ok()?;
        let profile = Profile::decode(&blob, &Limits::DEFAULT);
        profile.inspect_err(|error| tracing::warn!(file = %file.display(), %error, "forgetting a profile")).ok()
    }

    /// Remembers a profile of the image with this manifest, in the place of an older one.
    ///
    /// # Errors
    /// [`MemoryError`]; what was remembered before stays.
    pub fn store(&self, image: &Digest, profile: &Profile) -> Result<(), MemoryError> {
        let blob = profile.encode()?;
        let failed = |operation, path: &Path| {
            let path = path.to_owned();
            move |cause| MemoryError::Io { operation, path, cause }
        };
        crate::layer::private::ensure_private_dir(&self.directory)
            .map_err(|error| failed("use", &self.directory)(error.into()))?;
        self.make_room().map_err(failed("list", &self.directory))?;
        let file = self.file(image);
        let temporary = file.with_extension(format!("new-{}", std::process::id()));
        std::fs::write(&temporary, blob).map_err(failed("write", &temporary))?;
        std::fs::rename(&temporary, &file).map_err(failed("replace", &file))
    }

    /// Stores what was recorded of the image with this manifest. What is less than half of what is remembered is not
    /// believed to be a start-up: most of it was in the kernel's cache then.
    ///
    /// # Errors
    /// [`MemoryError`]; what was remembered before stays.
    pub fn remember(&self, image: &Digest, recorder: &Recorder) -> Result<(), MemoryError> {
        let profile = recorder.profile()?;
        let known = self.load(image).map_or(0, |known| known.bytes());
        if profile.ranges().is_empty() || profile.bytes() < known / 2 {
            return Ok(());
        }
        self.store(image, &profile)
    }

    fn file(&self, image: &Digest) -> PathBuf {
        self.directory.join(format!("{}-{}{SUFFIX}", image.algorithm().name(), image.hex()))
    }

    fn make_room(&self) -> io::Result<()> {
        let mut files = Vec::new();
        for entry in std::fs::read_dir(&self.directory)? {
            let entry = entry?;
            let modified = entry.metadata().and_then(|metadata| metadata.modified());
            files.push((modified.unwrap_or(SystemTime::UNIX_EPOCH), entry.path()));
        }
        files.sort();
        let surplus = (files.len() + 1).saturating_sub(IMAGES_MAX);
        files.iter().take(surplus).try_for_each(|(_, file)| std::fs::remove_file(file))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use soci_index::format::profile::Recording;

    #[test]
    fn remembers_and_forgets() {
        let scratch = tempfile::tempdir().unwrap();
        let memory = Memory::new(scratch.path().join("profiles"));
        let image = |number: u16| Digest::of(&number.to_le_bytes());
        assert_eq!(memory.load(&image(0)), None);
        let mut recording = Recording::new(Limits::DEFAULT);
        let layer = recording.layer(&image(9));
        recording.record(layer, 0..5000, 10_000);
        let first = recording.finish().unwrap();
        memory.store(&image(0), &first).unwrap();
        assert_eq!(memory.load(&image(0)), Some(first.clone()));
        recording.record(layer, 9000..9500, 10_000);
        let second = recording.finish().unwrap();
        memory.store(&image(0), &second).unwrap();
        assert_eq!(memory.load(&image(0)), Some(second));
        std::fs::write(memory.file(&image(0)), b"damaged").unwrap();
        assert_eq!(memory.load(&image(0)), None);
        (1..520).for_each(|number| memory.store(&image(number), &first).unwrap());
        assert_eq!(std::fs::read_dir(&memory.directory).unwrap().count(), IMAGES_MAX);
        assert_eq!(memory.load(&image(519)), Some(first));
    }
}
