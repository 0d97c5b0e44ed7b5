//! What a proof is a proof of.
//!
//! That a layer was proven is worth something only together with the index by which it was: another index may give the
//! same spans other names. So beside the data stands the SHA-256 of everything in the index that decides what is shown:
//! spans, windows, and of each entry all that the proof compares. The fingerprints in `present` tell indexes apart that
//! are different by chance; this one those that are different on purpose.

use soci_index::digest::{Algorithm, Digest, Hasher};
use soci_index::entry::Entry;
use soci_index::index::{LayerIndex, Windows};

use super::StoreError;
use super::layer::LayerStore;

/// The file, beside `data` and `present`.
const FILE: &str = "proof";

impl LayerStore {
    /// Notes that the layer and every entry of `index` were compared with the image's own bytes. Takes as long as hashing
    /// the index does.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn set_index_proven(&self, index: &LayerIndex) -> Result<(), StoreError> {
        self.set_proven()?;
        let (file, temporary) = (self.directory().join(FILE), self.directory().join(".proof.new"));
        let written = std::fs::write(&temporary, identity(index).to_string());
        written.and_then(|()| std::fs::rename(&temporary, &file)).map_err(super::io_error("write", &file))
    }

    /// Whether the layer was proven, and by this very index.
    #[must_use]
    pub fn is_index_proven(&self, index: &LayerIndex) -> bool {
        // Anything wrong with the file means no proof, which costs time and nothing else.
        let noted = || std::fs::read_to_string(self.directory().join(FILE)).unwrap_or_default();
        self.is_proven() && noted() == identity(index).to_string()
    }
}

fn identity(index: &LayerIndex) -> Digest {
    let mut hasher = Hasher::new(Algorithm::Sha256);
    let mut numbers = |numbers: &[u64]| numbers.iter().for_each(|number| hasher.update(&number.to_le_bytes()));
    numbers(&[index.compressed_size, index.uncompressed_size, index.spans.len() as u64, index.entries.len() as u64]);
    for span in index.spans.spans() {
        let (compressed, uncompressed) = (&span.compressed, &span.uncompressed);
        numbers(&[compressed.start, compressed.end, uncompressed.start, uncompressed.end, span.bits.into()]);
    }
    for span in index.spans.spans() {
        text(&mut hasher, span.digest.as_ref().map_or(&[][..], |digest| digest));
    }
    match &index.windows {
        Windows::Held(windows) => windows.iter().for_each(|window| text(&mut hasher, &window.load()[..])),
        Windows::Placed(places) => places.iter().for_each(|place| text(&mut hasher, &place.digest)),
    }
    index.entries.iter().for_each(|entry| entry_of(&mut hasher, entry));
    hasher.finish()
}

fn entry_of(hasher: &mut Hasher, entry: &Entry) {
    text(hasher, &entry.name);
    text(hasher, &entry.link);
    let (major, minor) = entry.device();
    let modified = entry.modified.map_or([0; 3], |time| [1, time.seconds.cast_unsigned(), time.nanoseconds.into()]);
    let ids = [entry.uid.into(), entry.gid.into(), entry.kind as u64, entry.permissions().into()];
    let places = [entry.header_offset, entry.data_offset, entry.size, major.cast_unsigned(), minor.cast_unsigned()];
    for number in modified.into_iter().chain(ids).chain(places) {
        hasher.update(&number.to_le_bytes());
    }
    let pieces = entry.sparse().map_or(&[][..], |pieces| pieces);
    let is_sparse = u64::from(entry.sparse().is_some());
    let pieces = pieces.iter().flat_map(|piece| [1, piece.file_offset, piece.data_offset, piece.length]);
    for number in std::iter::once(is_sparse).chain(pieces).chain([0]) {
        hasher.update(&number.to_le_bytes());
    }
    for (key, value) in entry.xattrs() {
        hasher.update(&1_u64.to_le_bytes());
        text(hasher, key);
        text(hasher, value);
    }
    hasher.update(&0_u64.to_le_bytes());
}

fn text(hasher: &mut Hasher, text: &[u8]) {
    hasher.update(&(text.len() as u64).to_le_bytes());
    hasher.update(text);
}
