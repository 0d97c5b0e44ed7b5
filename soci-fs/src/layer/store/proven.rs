//! Proofs: which claims were proven here, and how their bytes are checked when they are fetched again.
//!
//! A proof is of the claim whose directory it is in: the stored tar, all of it, has the claim's diff_id, and the
//! entries of its table are those of the tar ([`crate::layer::proof`]). From then on the layer is found by its diff_id
//! alone, whichever image and layer digest ask for it, and is never again trusted as far as its index goes: a span that
//! was evicted and comes again is compared with what was proven.
//!
//! The file `proof`, little-endian but for the marks: `SOCIprof`, version 1 (4 bytes), number of spans (4), kind (4: 0
//! none, 1 marks), zero (4), then 96 bytes for each span's end, see [`crate::layer::store::marks`]. Kind 0 is for
//! layers whose table was made here from the whole blob: what decodes by it can only be the same. A file that is
//! anything else means that nothing is proven.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use parking_lot::Mutex;
use soci_index::format::digest::Digest;

use crate::layer::store::claim::Claim;
use crate::layer::store::marks::{MARK_BYTES, Mark};

/// The file, beside `data` and `present`.
pub(super) const FILE: &str = "proof";
const MAGIC: [u8; 8] = *b"SOCIprof";
const VERSION: u32 = 1;
pub(super) const HEADER_BYTES: usize = 24;

/// What a proof leaves behind for spans that are fetched again.
#[derive(Debug)]
pub(crate) enum Proof {
    /// The table was made here: it is enough.
    OwnTable,
    /// The state of the hash at the end of each span.
    Marks(Vec<Mark>),
}

impl Proof {
    pub(super) fn encode(&self, spans: u32) -> Vec<u8> {
        let (kind, marks): (u32, &[Mark]) = match self {
            Self::OwnTable => (0, &[]),
            Self::Marks(marks) => (1, marks),
        };
        let mut bytes = MAGIC.to_vec();
        bytes.extend([VERSION, spans, kind, 0].iter().flat_map(|number| number.to_le_bytes()));
        bytes.extend(marks.iter().flat_map(Mark::encode));
        bytes
    }
}

/// Whether the file is a proof of so many spans, and whether it has marks.
fn examine(file: &File, spans: u32) -> Option<bool> {
    let mut header = [0; HEADER_BYTES];
    file.read_exact_at(&mut header, 0).ok()?;
    let number = |at: usize| header.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes);
    let marks = match (header.starts_with(&MAGIC), number(8)?, number(12)? == spans, number(16)?) {
        (true, VERSION, true, 0) => 0,
        (true, VERSION, true, 1) => MARK_BYTES as u64 * u64::from(spans),
        _ => return None,
    };
    (file.metadata().ok()?.len() == HEADER_BYTES as u64 + marks).then_some(marks > 0)
}

/// What is proven, by diff_id.
#[derive(Debug, Default)]
pub(super) struct Proven(Mutex<HashMap<Digest, Vec<Claim>>>);

impl Proven {
    /// The claims of this diff_id.
    pub(super) fn of(&self, diff_id: &Digest) -> Vec<Claim> {
        self.0.lock().get(diff_id).cloned().unwrap_or_default()
    }

    pub(super) fn add(&self, claim: Claim) {
        let mut all = self.0.lock();
        let known = all.entry(claim.diff_id).or_default();
        if !known.contains(&claim) {
            known.push(claim);
        }
    }

    pub(super) fn forget(&self, claim: &Claim) {
        let mut all = self.0.lock();
        if let Some(known) = all.get_mut(&claim.diff_id) {
            known.retain(|known| known != claim);
            if known.is_empty() {
                all.remove(&claim.diff_id);
            }
        }
    }
}

/// Whether a directory of the store has a proof of its claim, as far as can be decided without its table.
pub(super) fn has_proof(directory: &Path) -> bool {
    directory.join(FILE).exists()
}

/// A layer's proof, opened.
#[derive(Debug)]
pub(super) struct OpenProof {
    pub(super) file: File,
    pub(super) has_marks: bool,
}

/// The proof of a layer of so many spans; `None` when it has none, or one that is damaged.
pub(super) fn open(directory: &Path, spans: u32) -> Option<OpenProof> {
    let file = File::open(directory.join(FILE)).ok()?;
    let has_marks = examine(&file, spans)?;
    Some(OpenProof { file, has_marks })
}
