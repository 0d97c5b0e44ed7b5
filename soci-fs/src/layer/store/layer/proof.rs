//! What a layer's own proof says: whether there is one, and whether bytes agree with it ([`crate::layer::store::proven`]).

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;

use soci_index::format::span::SpanId;

use crate::layer::store::error::{StoreError, io_error};
use crate::layer::store::layer::LayerStore;
use crate::layer::store::marks::{MARK_BYTES, Mark};
use crate::layer::store::proven::{FILE, HEADER_BYTES, OpenProof, Proof};

impl LayerStore {
    /// Whether the claim was proven: bytes and table.
    #[must_use]
    pub fn is_proven(&self) -> bool {
        self.proof.get().is_some()
    }

    /// Remembers that the claim is proven. All of the layer must have been present and compared.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub(crate) fn set_proven(&self, proof: &Proof) -> Result<(), StoreError> {
        let (path, new) = (self.directory().join(FILE), self.directory().join(".proof.new"));
        let bytes = proof.encode(self.spans());
        let write = || {
            let mut file = File::options().write(true).read(true).create(true).truncate(true).open(&new)?;
            file.write_all(&bytes)?;
            std::fs::rename(&new, &path)?;
            Ok(file)
        };
        let file = write().map_err(io_error("write", &path))?;
        let has_marks = matches!(proof, Proof::Marks(_));
        // A second proof of the same claim finds the same.
        let _ = self.proof.set(OpenProof { file, has_marks });
        self.common.proven.add(*self.claim());
        Ok(())
    }

    /// Whether a span's bytes are those that were proven; true of all bytes as long as nothing is.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn agrees(&self, span: SpanId, bytes: &[u8]) -> Result<bool, StoreError> {
        let Some(proof) = self.proof.get().filter(|proof| proof.has_marks) else { return Ok(true) };
        let mark = |span: SpanId| -> Result<Option<Mark>, StoreError> {
            let mut record = [0; MARK_BYTES];
            let at = HEADER_BYTES as u64 + u64::from(span) * MARK_BYTES as u64;
            proof.file.read_exact_at(&mut record, at).map_err(self.failed("read", FILE))?;
            Ok(Mark::decode(&record, self.place(span).end))
        };
        let start = match span.checked_sub(1) {
            Some(before) => mark(before)?,
            None => Some(Mark::START),
        };
        let (Some(start), Some(end)) = (start, mark(span)?) else { return Ok(false) };
        Ok(start.leads_to(bytes, &end))
    }
}
