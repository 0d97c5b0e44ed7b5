//! Whether an index may be used before this node has proven it.
//!
//! An index is a claim about a layer: until the whole layer was fetched and compared with what the image says
//! ([`crate::proof`]), a forged one could show other content. How much that matters is for the operator to say:
//!
//! | `provisional` | an index is used |
//! |---|---|
//! | `allow` | at once; the proof comes when the layer is whole |
//! | `require-signature` | at once if somebody who is trusted has signed it, or the image that names it; else once proven |
//! | `deny` | once proven here |
//!
//! Where an index may not be used the layer is fetched whole, as if there were none, and the reason is told. A layer that
//! was proven here stays usable under every policy: the proof is kept with the index that it is about.
//!
//! Invariants: a policy that needs keys has some, and keys are never given to a policy that looks at none; a signature
//! that cannot be fetched is no signature.

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use soci_index::digest::Digest;
use soci_index::registry::Repository;
use soci_index::signature::fetch::{Verdict, search};
use soci_index::signature::{Certificate, PublicKey, Trust, TrustError};

/// Bytes of a file with keys or certificates.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// When an index may be used that was not proven here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Provisional {
    /// Always.
    #[default]
    Allow,
    /// When somebody who is trusted has signed it.
    RequireSignature,
    /// Never.
    Deny,
}

/// What an operator has decided about indexes.
#[derive(Debug, Clone, Default)]
pub struct TrustPolicy {
    provisional: Provisional,
    trust: Trust,
}

/// Why a policy makes no sense.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// A file cannot be read.
    #[error("{}: cannot be read: {cause}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        cause: std::io::Error,
    },
    /// A file has no key, or no certificate.
    #[error("{}: {cause}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        cause: TrustError,
    },
    /// Signatures are required, and nobody is trusted.
    #[error("signatures are required, and no key or certificate is given to check them with")]
    NobodyTrusted,
    /// Keys are given, and nothing is checked with them.
    #[error("keys or certificates are given, and only provisional = require-signature checks signatures")]
    NothingChecked,
}

impl TrustPolicy {
    /// A policy with keys and certificates from files.
    ///
    /// # Errors
    /// [`PolicyError`].
    pub fn new(provisional: Provisional, keys: &[PathBuf], certificates: &[PathBuf]) -> Result<Self, PolicyError> {
        let required = provisional == Provisional::RequireSignature;
        match (required, keys.is_empty() && certificates.is_empty()) {
            (true, true) => return Err(PolicyError::NobodyTrusted),
            (false, false) => return Err(PolicyError::NothingChecked),
            _ => {}
        }
        let mut trust = Trust::default();
        for path in keys {
            let content = |cause| PolicyError::Content { path: path.clone(), cause };
            trust.keys.extend(PublicKey::from_pem(&read(path)?).map_err(content)?);
        }
        for path in certificates {
            let content = |cause| PolicyError::Content { path: path.clone(), cause };
            trust.certificates.extend(Certificate::from_pem(&read(path)?).map_err(content)?);
        }
        Ok(Self { provisional, trust })
    }

    /// Whose signatures count.
    #[must_use]
    pub const fn trust(&self) -> &Trust {
        &self.trust
    }

    /// When an index may be used that was not proven here.
    #[must_use]
    pub const fn provisional(&self) -> Provisional {
        self.provisional
    }

    /// Why the index `index` may be used only where it was proven; `None` if it may be used at once. `signed` are the
    /// manifests of which one should have a good signature, each with the repository that may hold it.
    pub(crate) async fn doubt(&self, index: &Digest, signed: &[(&Repository, Digest)]) -> Option<String> {
        match self.provisional {
            Provisional::Allow => return None,
            Provisional::Deny => return Some("no index is used before it is proven".to_owned()),
            Provisional::RequireSignature => {}
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let mut reasons = Vec::new();
        for (repository, digest) in signed {
            match search(repository, digest, &self.trust, now).await {
                verdict @ Verdict::Good(_) => {
                    tracing::info!(index = %index, manifest = %digest, "{verdict}");
                    return None;
                }
                verdict @ Verdict::None(_) if digest == index => reasons.push(verdict.to_string()),
                verdict @ Verdict::None(_) => reasons.push(format!("nor is the image that names it signed: {verdict}")),
            }
        }
        if reasons.is_empty() {
            reasons.push("signatures are looked for in registries only".to_owned());
        }
        reasons.dedup();
        let reason = format!("the index {index} is not trusted: {}", reasons.join("; "));
        tracing::warn!("{reason}");
        Some(reason)
    }
}

fn read(path: &Path) -> Result<Vec<u8>, PolicyError> {
    use std::io::Read as _;
    let failed = |cause| PolicyError::File { path: path.to_owned(), cause };
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(failed)?;
    file.take(FILE_BYTES_MAX).read_to_end(&mut bytes).map_err(failed)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A key of the Ed25519 standard's first test (RFC 8032, 7.1), in PEM.
    const KEY: &str = "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=\n\
                       -----END PUBLIC KEY-----\n";

    #[test]
    fn policies() {
        let place = tempfile::tempdir().unwrap();
        let (key, text) = (place.path().join("key.pem"), place.path().join("text"));
        std::fs::write(&key, KEY).unwrap();
        std::fs::write(&text, "no key").unwrap();
        let (key, text, gone) = ([key], [text], [place.path().join("gone")]);
        for provisional in [Provisional::Allow, Provisional::Deny] {
            assert_eq!(TrustPolicy::new(provisional, &[], &[]).unwrap().provisional(), provisional);
            assert!(matches!(TrustPolicy::new(provisional, &key, &[]), Err(PolicyError::NothingChecked)));
        }
        let required = |keys: &[PathBuf], certificates: &[PathBuf]| {
            TrustPolicy::new(Provisional::RequireSignature, keys, certificates)
        };
        assert_eq!(required(&key, &[]).unwrap().trust.keys.len(), 1);
        assert!(matches!(required(&[], &[]), Err(PolicyError::NobodyTrusted)));
        assert!(matches!(required(&text, &[]), Err(PolicyError::Content { .. })));
        assert!(matches!(required(&[], &key), Err(PolicyError::Content { .. })), "a key is no certificate");
        assert!(matches!(required(&gone, &[]), Err(PolicyError::File { .. })));
        assert_eq!(TrustPolicy::default().provisional(), Provisional::Allow);
    }

    #[tokio::test]
    async fn doubts() {
        let place = tempfile::tempdir().unwrap();
        let key = place.path().join("key.pem");
        std::fs::write(&key, KEY).unwrap();
        let index = Digest::of(b"index");
        assert_eq!(TrustPolicy::default().doubt(&index, &[]).await, None);
        let deny = TrustPolicy::new(Provisional::Deny, &[], &[]).unwrap();
        assert!(deny.doubt(&index, &[]).await.unwrap().contains("proven"));
        let required = TrustPolicy::new(Provisional::RequireSignature, &[key], &[]).unwrap();
        assert!(required.doubt(&index, &[]).await.unwrap().contains("registries only"));
    }
}
