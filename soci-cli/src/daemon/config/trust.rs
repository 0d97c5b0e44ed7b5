//! Which indexes are used before they are proven. A section of our own: AWS's snapshotter uses all.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use soci_fs::open::trust::{self, PolicyError, SignerRule, TrustPolicy};

/// Which indexes are used before they are proven.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Trust {
    /// When an index is used that was not proven here.
    pub provisional: Provisional,
    /// Files with public keys, as cosign writes them.
    pub keys: Vec<PathBuf>,
    /// Files with certificates of signers, or of authorities for signers, as notation uses them.
    pub certificates: Vec<PathBuf>,
    /// The same, for the images of certain repositories only.
    pub signer: Vec<Signer>,
    /// Seconds in all for which the source of a layer may fail before the layer, if it is in use and not proven, is
    /// suspended; negative means no limit.
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
    /// Which images, as `HOST/REPOSITORY`; `*` is any text.
    #[serde(rename = "match")]
    pub images: String,
    /// Files with public keys, as cosign writes them.
    pub keys: Vec<PathBuf>,
    /// Files with certificates of signers, or of authorities for signers, as notation uses them.
    pub certificates: Vec<PathBuf>,
}

/// When an index is used that was not proven here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Provisional {
    /// Always.
    #[default]
    Allow,
    /// When a trusted signer has signed it.
    RequireSignature,
    /// Never.
    Deny,
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
        let provisional = match self.provisional {
            Provisional::Allow => trust::Provisional::Allow,
            Provisional::RequireSignature => trust::Provisional::RequireSignature,
            Provisional::Deny => trust::Provisional::Deny,
        };
        let rule = |signer: &Signer| SignerRule {
            pattern: signer.images.clone(),
            keys: signer.keys.clone(),
            certificates: signer.certificates.clone(),
        };
        let signers: Vec<SignerRule> = self.signer.iter().map(rule).collect();
        TrustPolicy::with_signers(provisional, &self.keys, &self.certificates, &signers)
    }
}
