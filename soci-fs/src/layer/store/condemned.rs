//! What was found to be a lie, on disk: claims and packs that are not believed again.
//!
//! `ROOT/condemned/ID.json` is a claim that failed its proof, `ROOT/condemned/pack-HEX.json` a pack that brought other
//! bytes than the layer has; each says why and when. They outlive the data, restarts and the images that made them:
//! only something new (another index, another pack, another diff_id) is worth another try. The oldest go when there are
//! too many.

use std::fs;
use std::path::PathBuf;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use soci_index::format::digest::Digest;

use crate::layer::store::Store;
use crate::layer::store::claim::{Claim, ClaimId};
use crate::layer::store::error::{StoreError, io_error};
use crate::layer::store::layer::{Common, LayerStore};

/// The directory below the root.
pub(super) const DIRECTORY: &str = "condemned";
/// Verdicts that are kept. Stops an endless series of forged images from filling the disk with them.
const KEPT_MAX: usize = 4096;

/// What a verdict is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Condemned {
    Claim(ClaimId),
    Pack(Digest),
}

impl Condemned {
    fn file(self) -> String {
        match self {
            Self::Claim(id) => format!("{id}.json"),
            Self::Pack(digest) => format!("pack-{}.json", digest.hex()),
        }
    }
}

/// A verdict as it is written down.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Verdict {
    reason: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    claim: Option<Claim>,
}

impl Store {
    /// Records that something is not to be believed again.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn condemn(&self, what: Condemned, reason: &str) -> Result<(), StoreError> {
        self.common.condemn(what, reason, None)
    }

    /// Why something is not believed, if it is not.
    #[must_use]
    pub fn condemned(&self, what: Condemned) -> Option<String> {
        let text = fs::read(self.root().join(DIRECTORY).join(what.file())).ok()?;
        // A verdict that cannot be read is one all the same.
        let reason = serde_json::from_slice::<Verdict>(&text).map(|verdict| verdict.reason);
        Some(reason.unwrap_or_else(|_| "the reason cannot be read".to_owned()))
    }

    /// Removes the oldest verdicts beyond a number.
    pub(super) fn sweep_condemned(&self) -> Result<(), StoreError> {
        let directory = self.root().join(DIRECTORY);
        let mut all: Vec<(SystemTime, PathBuf)> = Vec::new();
        for entry in fs::read_dir(&directory).map_err(io_error("list", &directory))? {
            let entry = entry.map_err(io_error("list", &directory))?;
            let time = entry.metadata().and_then(|metadata| metadata.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
            all.push((time, entry.path()));
        }
        all.sort_unstable();
        for (_, path) in all.iter().take(all.len().saturating_sub(KEPT_MAX)) {
            fs::remove_file(path).map_err(io_error("remove", path))?;
        }
        Ok(())
    }
}

impl Common {
    fn condemn(&self, what: Condemned, reason: &str, claim: Option<Claim>) -> Result<(), StoreError> {
        let (directory, name) = (self.root.join(DIRECTORY), what.file());
        let (path, new) = (directory.join(&name), directory.join(format!(".{name}.new")));
        let text = serde_json::to_vec_pretty(&Verdict { reason: reason.to_owned(), claim }).unwrap_or_default();
        let write = || {
            let mut file = fs::File::create(&new)?;
            std::io::Write::write_all(&mut file, &text)?;
            // A verdict must outlive a power cut: what it is about was shown until now.
            file.sync_all()?;
            fs::rename(&new, &path)
        };
        write().map_err(io_error("write", &path))
    }
}

impl LayerStore {
    /// Records that the claim is not to be believed again, with whichever pack: a pack does not make a table right. If
    /// it was proven, it is no longer.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn condemn(&self, reason: &str) -> Result<(), StoreError> {
        self.common.proven.forget(self.claim());
        let without_pack = Claim { pack: None, ..*self.claim() };
        self.common.condemn(Condemned::Claim(without_pack.id()), reason, Some(without_pack))?;
        self.common.condemn(Condemned::Claim(self.claim().id()), reason, Some(*self.claim()))
    }

    /// Records that the blob has another tar than the claim says, by whichever table it is read.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn condemn_diff_id(&self, reason: &str) -> Result<(), StoreError> {
        let whole = Claim::whole(self.claim().layer, self.claim().diff_id);
        self.common.condemn(Condemned::Claim(whole.id()), reason, Some(whole))
    }

    /// Records that a pack is not to be believed again.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn condemn_pack(&self, pack: Digest, reason: &str) -> Result<(), StoreError> {
        self.common.condemn(Condemned::Pack(pack), reason, None)
    }
}
