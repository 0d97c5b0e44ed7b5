//! Which indexes are used before they are proven. A section of our own: AWS's snapshotter uses all.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use soci_fs::open::trust::{PolicyError, Provisional, SignerRule, TrustPolicy};

/// Which indexes are used before they are proven.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Trust {
    /// When an index is used before this node has proven the layer: `allow`, `require-signature` or `deny`.
    pub provisional: Provisional,
    /// Public key files as cosign writes them; they count for every repository.
    pub keys: Vec<PathBuf>,
    /// Certificate files of signers or authorities, as notation uses them; they count for every repository.
    pub certificates: Vec<PathBuf>,
    /// Keys and certificates that count for some repositories only.
    pub signer: Vec<Signer>,
    /// Seconds in total for which the source of an unproven layer in use may fail before the layer is suspended (its
    /// reads fail until it is proven); a negative number means never.
    pub withheld_sec: i64,
}

impl Default for Trust {
    fn default() -> Self {
        let (keys, certificates, signer) = (Vec::new(), Vec::new(), Vec::new());
        Self { provisional: Provisional::default(), keys, certificates, signer, withheld_sec: 3600 }
    }
}

/// The signers for the images of certain repositories.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Signer {
    /// Images as `HOST/REPOSITORY`; `*` matches any text, slashes included.
    #[serde(rename = "match")]
    pub images: String,
    /// Public key files as cosign writes them.
    pub keys: Vec<PathBuf>,
    /// Certificate files of signers or authorities, as notation uses them.
    pub certificates: Vec<PathBuf>,
}

impl Trust {
    /// How long in all the source of a layer may fail before the layer is suspended.
    pub(super) fn withheld(&self) -> Option<Duration> {
        u64::try_from(self.withheld_sec).ok().map(Duration::from_secs)
    }

    /// The policy, with the files read.
    ///
    /// # Errors
    /// [`PolicyError`].
    pub fn policy(&self) -> Result<TrustPolicy, PolicyError> {
        let rule = |signer: &Signer| SignerRule {
            pattern: signer.images.clone(),
            keys: signer.keys.clone(),
            certificates: signer.certificates.clone(),
        };
        let signers: Vec<SignerRule> = self.signer.iter().map(rule).collect();
        TrustPolicy::with_signers(self.provisional, &self.keys, &self.certificates, &signers)
    }
}
