//! Keeps the local index store small: what was fetched for images that are gone, and the oldest beyond a number of
//! bytes.
//!
//! An edge. Only entries that were fetched are touched, since they can be fetched again; what was made on this machine
//! waits to be pushed and stays until it is removed by hand.

use std::collections::HashSet;
use std::time::SystemTime;

use crate::find::origin;
use crate::format::digest::Digest;
use crate::format::model::{Descriptor, ImageManifest};
use crate::image::layout::Layout;
use crate::image::store::{Store as _, StoreError};

/// What was removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Swept {
    pub indexes: usize,
    /// Bytes of blobs.
    pub bytes: u64,
}

/// Removes fetched indexes of images that `is_used` does not want, by the digest of the image's manifest, and the
/// oldest of the others until the store's blobs take at most `quota` bytes.
///
/// # Errors
/// [`StoreError`] when the store cannot be read or written; what was removed until then is gone.
pub fn sweep(layout: &Layout, is_used: &dyn Fn(&Digest) -> bool, quota: u64) -> Result<Swept, StoreError> {
    let fetched =
        || Ok::<_, StoreError>(layout.entries()?.into_iter().filter(|entry| origin::origins(entry).is_some()));
    let is_unused = |entry: &Descriptor| image_of(layout, entry).is_some_and(|image| !is_used(&image));
    let mut swept = Swept::default();
    let unused: Vec<Descriptor> = fetched()?.filter(is_unused).collect();
    let mut bytes = bytes_of(layout)?;
    if unused.is_empty() && bytes <= quota {
        return Ok(swept);
    }
    let mut writer = layout.lock()?;
    let mut oldest: Vec<(SystemTime, Descriptor)> = fetched()?.map(|entry| (made(layout, &entry), entry)).collect();
    oldest.sort_by(|one, other| one.0.cmp(&other.0).then(one.1.digest.cmp(&other.1.digest)));
    let unused: HashSet<Digest> = unused.into_iter().map(|entry| entry.digest).collect();
    let (first, then): (Vec<_>, Vec<_>) = oldest.into_iter().partition(|(_, entry)| unused.contains(&entry.digest));
    for (_, entry) in first.into_iter().chain(then) {
        if bytes <= quota && !unused.contains(&entry.digest) {
            break;
        }
        writer.remove_manifest(&entry.digest)?;
        let left = bytes_of(layout)?;
        swept.indexes += 1;
        swept.bytes += bytes.saturating_sub(left);
        bytes = left;
    }
    Ok(swept)
}

/// The image that an index is of: by its subject, or by what was noted when it was fetched.
fn image_of(layout: &Layout, entry: &Descriptor) -> Option<Digest> {
    if let Some(noted) = entry.annotations.get(origin::IMAGE) {
        return noted.parse().ok();
    }
    let raw = layout.manifest(entry).ok()??;
    let manifest: ImageManifest = serde_json::from_slice(&raw.bytes).ok()?;
    Some(manifest.subject?.digest)
}

fn made(layout: &Layout, entry: &Descriptor) -> SystemTime {
    let metadata = std::fs::metadata(layout.blob_path(&entry.digest));
    metadata.and_then(|metadata| metadata.modified()).unwrap_or(SystemTime::UNIX_EPOCH)
}

/// Bytes of all blobs.
fn bytes_of(layout: &Layout) -> Result<u64, StoreError> {
    let directory = layout.directory().join("blobs");
    let failed = |error: &std::io::Error| StoreError::io(&directory, "cannot list", error);
    let mut bytes = 0;
    for algorithm in std::fs::read_dir(&directory).map_err(|error| failed(&error))? {
        let algorithm = algorithm.map_err(|error| failed(&error))?.path();
        for blob in std::fs::read_dir(&algorithm).map_err(|error| failed(&error))? {
            // One that another process has just removed counts nothing.
            bytes += blob.and_then(|blob| blob.metadata()).map_or(0, |metadata| metadata.len());
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::model::media_type;

    /// An index of the image with this digest, with a zTOC of a thousand bytes.
    fn add(layout: &Layout, image: &Digest, origin: Option<&str>, seed: u8) -> Digest {
        let mut writer = layout.lock().unwrap();
        let ztoc = vec![seed; 1000];
        writer.add_blob(&ztoc).unwrap();
        let manifest = serde_json::json!({
            "schemaVersion": 2,
            "mediaType": media_type::MANIFEST,
            "config": Descriptor::of("application/vnd.amazon.soci.index.v1+json", b"{}"),
            "layers": [Descriptor::of("application/octet-stream", &ztoc)],
            "subject": Descriptor::new(media_type::MANIFEST, *image, 7),
        });
        let manifest = serde_json::to_vec(&manifest).unwrap();
        let mut entry = Descriptor::of(media_type::MANIFEST, &manifest);
        if let Some(origin) = origin {
            entry.annotations.insert(origin::ORIGIN.to_owned(), origin.to_owned());
        }
        writer.add_manifest(entry, &manifest).unwrap().digest
    }

    #[test]
    fn what_was_fetched_goes_and_what_was_made_stays() {
        let directory = tempfile::tempdir().unwrap();
        let layout = Layout::open_or_create(&directory.path().join("content")).unwrap();
        let images = [Digest::of(b"gone"), Digest::of(b"used"), Digest::of(b"used, too")];
        let gone = add(&layout, &images[0], Some("h/a"), 1);
        let made = add(&layout, &images[0], None, 2);
        let older = add(&layout, &images[1], Some("h/a"), 3);
        let newer = add(&layout, &images[2], Some("h/b"), 4);
        let old = std::fs::File::options().write(true).open(layout.blob_path(&older)).unwrap();
        old.set_modified(SystemTime::UNIX_EPOCH).unwrap();
        let left = || layout.entries().unwrap().into_iter().map(|entry| entry.digest).collect::<HashSet<_>>();
        let is_used = |image: &Digest| *image != images[0];
        let swept = sweep(&layout, &is_used, u64::MAX).unwrap();
        assert!(swept.indexes == 1 && swept.bytes > 1000, "{swept:?}");
        assert_eq!(left(), HashSet::from([made, older, newer]));
        assert!(!layout.has_blob(&gone) && !layout.has_blob(&Digest::of(&[1; 1000])));
        assert_eq!(sweep(&layout, &is_used, u64::MAX).unwrap(), Swept::default());
        // By quota the oldest goes first, and what was made here never does.
        let bytes = bytes_of(&layout).unwrap();
        assert_eq!(sweep(&layout, &|_| true, bytes - 1).unwrap().indexes, 1);
        assert_eq!(left(), HashSet::from([made, newer]));
        assert_eq!(sweep(&layout, &|_| true, 0).unwrap().indexes, 1);
        assert_eq!(left(), HashSet::from([made]));
    }
}
