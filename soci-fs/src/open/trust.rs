//! Whether an index may be used before this node has proven it.
//!
//! An index is a claim about a layer: until the whole layer was fetched and compared with what the image says
//! ([`crate::layer::proof`]), a forged one could show other content. How much that matters is for the operator to say:
//!
//! | `provisional` | an index is used |
//! |---|---|
//! | `allow` | at once; the proof comes when the layer is whole |
//! | `require-signature` | at once if a trusted signer has signed it, or the image that names it; else once proven |
//! | `deny` | once proven here |
//!
//! Where an index may not be used the layer is fetched whole, as if there were none, and the reason is reported. A
//! layer that was proven here stays usable under every policy: the proof is kept with the index that it is about.
//!
//! Keys and certificates count for every repository, or, in a [`SignerRule`], for the images of those repositories
//! whose name `HOST/REPOSITORY` is like its pattern: the key of one team does not speak for the images of another. What
//! counts is the repository of the *image*, wherever its index and the signature are. An image that is in no registry
//! has no such name.
//!
//! Invariants: a policy that needs keys has some, and keys are never given to a policy that looks at none; a signature
//! that cannot be fetched is no signature.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use soci_index::find::hedge;
use soci_index::format::class::{Class, Classified};
use soci_index::format::digest::Digest;
use soci_index::registry::Repository;
use soci_index::trust::fetch::{Verdict, search};
use soci_index::trust::{Certificate, PublicKey, Trust, TrustError};
use tokio::time::timeout;

use crate::layer::glob;

/// Bytes of a file with keys or certificates.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// How long a repository may take for its signatures that is not the image's own.
const PATIENCE_ELSEWHERE: Duration = Duration::from_secs(10);

/// When an index may be used that was not proven here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Provisional {
    #[default]
    Allow,
    /// When a trusted signer has signed it.
    RequireSignature,
    Deny,
}

impl Provisional {
    /// All, by their names, with what each means.
    pub const NAMES: [(&'static str, Self, &'static str); 3] = [
        ("allow", Self::Allow, "Always"),
        ("require-signature", Self::RequireSignature, "If a trusted key has signed it, or the image that names it"),
        ("deny", Self::Deny, "Never: layers are fetched whole"),
    ];
}

impl FromStr for Provisional {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::NAMES.iter().find(|(name, ..)| *name == text).map(|(_, policy, _)| *policy);
        found.ok_or_else(|| format!("{text:?} is none of {}", Self::NAMES.map(|(name, ..)| name).join(", ")))
    }
}

/// What an operator has decided about indexes.
#[derive(Debug, Clone, Default)]
pub struct TrustPolicy {
    provisional: Provisional,
    /// Signers for every repository.
    trust: Trust,
    /// Signers for some: the pattern, and the signers.
    bound: Vec<(String, Trust)>,
}

/// The signers for the images of some repositories.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignerRule {
    /// The repositories, `HOST/REPOSITORY`, in which `*` is any text, slashes included, and `?` any one letter.
    pub pattern: String,
    /// Files with public keys.
    pub keys: Vec<PathBuf>,
    /// Files with certificates.
    pub certificates: Vec<PathBuf>,
}

/// Why a policy makes no sense.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// A file cannot be read.
    #[error("{}: cannot be read: {cause}", path.display())]
    File { path: PathBuf, cause: std::io::Error },
    /// A file has no key, or no certificate.
    #[error("{}: {cause}", path.display())]
    Content { path: PathBuf, cause: TrustError },
    /// A rule names no key and no certificate.
    #[error("the signer of {pattern:?} has neither a key nor a certificate")]
    NoSigner { pattern: String },
    /// A rule is about nothing.
    #[error("a signer has an empty pattern: say which repositories it speaks for, HOST/REPOSITORY, * is any text")]
    NoPattern,
    /// Signatures are required, but no signer is trusted.
    #[error("signatures are required, and no key or certificate is given to check them with")]
    NobodyTrusted,
    /// Keys are given, and nothing is checked with them.
    #[error("keys or certificates are given, and only provisional = require-signature checks signatures")]
    NothingChecked,
}

impl Classified for PolicyError {
    fn class(&self) -> Class {
        match self {
            Self::File { .. } => Class::Local,
            Self::Content { .. }
            | Self::NoSigner { .. }
            | Self::NoPattern
            | Self::NobodyTrusted
            | Self::NothingChecked => Class::Usage,
        }
    }
}

impl TrustPolicy {
    /// A policy with keys and certificates from files, which count for every repository.
    ///
    /// # Errors
    /// [`PolicyError`].
    pub fn new(provisional: Provisional, keys: &[PathBuf], certificates: &[PathBuf]) -> Result<Self, PolicyError> {
        Self::with_signers(provisional, keys, certificates, &[])
    }

    /// The same, with some that count for certain repositories only.
    ///
    /// # Errors
    /// [`PolicyError`].
    pub fn with_signers(
        provisional: Provisional,
        keys: &[PathBuf],
        certificates: &[PathBuf],
        signers: &[SignerRule],
    ) -> Result<Self, PolicyError> {
        let required = provisional == Provisional::RequireSignature;
        match (required, keys.is_empty() && certificates.is_empty() && signers.is_empty()) {
            (true, true) => return Err(PolicyError::NobodyTrusted),
            (false, false) => return Err(PolicyError::NothingChecked),
            _ => {}
        }
        let mut bound = Vec::new();
        for SignerRule { pattern, keys, certificates } in signers {
            if pattern.is_empty() {
                return Err(PolicyError::NoPattern);
            }
            if keys.is_empty() && certificates.is_empty() {
                return Err(PolicyError::NoSigner { pattern: pattern.clone() });
            }
            bound.push((pattern.clone(), read_trust(keys, certificates)?));
        }
        Ok(Self { provisional, trust: read_trust(keys, certificates)?, bound })
    }

    /// Whose signatures count for the images of `repository`, `HOST/REPOSITORY`; `None` for an image that is in no
    /// registry.
    #[must_use]
    pub fn trust_for(&self, repository: Option<&str>) -> Trust {
        let mut all = self.trust.clone();
        let speaks = |pattern: &str| {
            repository.is_some_and(|repository| glob::is_like(pattern.as_bytes(), repository.as_bytes()))
        };
        for (_, trust) in self.bound.iter().filter(|(pattern, _)| speaks(pattern)) {
            all.keys.extend(trust.keys.iter().cloned());
            all.certificates.extend(trust.certificates.iter().cloned());
        }
        all
    }

    /// When an index may be used that was not proven here.
    #[must_use]
    pub const fn provisional(&self) -> Provisional {
        self.provisional
    }

    /// Why the index `index` of an image in `repository` may be used only where it was proven; `None` if it may be used
    /// at once. `signed` are the manifests of which one should have a good signature, each with the repository that may
    /// hold it.
    pub(crate) async fn doubt(
        &self,
        repository: Option<&str>,
        index: &Digest,
        signed: &[(&Repository, Digest)],
    ) -> Option<String> {
        match self.provisional {
            Provisional::Allow => return None,
            Provisional::Deny => return Some("no index is used before it is proven".to_owned()),
            Provisional::RequireSignature => {}
        }
        let reason = format!("the index {index} is not trusted: {}", self.unsigned(repository, index, signed).await?);
        tracing::warn!("{reason}");
        Some(reason)
    }

    /// Why the pack of a start-up profile may not be used; `None` if it may. `profile` is the digest of the profile's
    /// manifest, `repository` the image's own, which holds it.
    pub async fn pack_doubt(&self, repository: &Repository, profile: &Digest) -> Option<String> {
        match self.provisional {
            Provisional::Allow => return None,
            Provisional::Deny => return Some("no pack is used before the layer is proven".to_owned()),
            Provisional::RequireSignature => {}
        }
        let name = repository.to_string();
        let why = self.unsigned(Some(&name), profile, &[(repository, *profile)]).await?;
        let reason = format!("the pack of the profile {profile} is not trusted: {why}");
        tracing::warn!("{reason}");
        Some(reason)
    }

    /// Why none of `signed` has a good signature by a signer for `repository`; `None` if one has.
    async fn unsigned(
        &self,
        repository: Option<&str>,
        about: &Digest,
        signed: &[(&Repository, Digest)],
    ) -> Option<String> {
        let trust = self.trust_for(repository);
        if trust.is_empty() {
            let name = repository.unwrap_or("an image that is in no registry");
            return Some(format!("no key and no certificate speaks for {name}"));
        }
        let now = soci_index::clock::seconds();
        let attempt = async |place: &Repository, digest: &Digest| {
            let asking = search(place, digest, &trust, now);
            let verdict = match repository == Some(place.to_string().as_str()) {
                true => Ok(asking.await),
                false => timeout(PATIENCE_ELSEWHERE, asking).await,
            };
            let why = match verdict {
                Ok(verdict @ Verdict::Good(_)) => {
                    tracing::info!(manifest = %digest, %about, "{verdict}");
                    return Ok(());
                }
                Ok(verdict @ Verdict::None(_)) => verdict.to_string(),
                Err(_) => format!("{place} gave no signature within {PATIENCE_ELSEWHERE:?}"),
            };
            let is_of_image = digest != about;
            Err(if is_of_image { format!("nor is the image that names it signed: {why}") } else { why })
        };
        let attempts: Vec<_> = signed.iter().map(|(place, digest)| attempt(place, digest)).collect();
        let Err(mut reasons) = hedge::first(attempts).await else { return None };
        if reasons.is_empty() {
            reasons.push("signatures are looked for in registries only".to_owned());
        }
        reasons.dedup();
        Some(reasons.join("; "))
    }
}

/// The keys and certificates of files.
///
/// # Errors
/// [`PolicyError`] when one cannot be read or has none.
pub fn read_trust(keys: &[PathBuf], certificates: &[PathBuf]) -> Result<Trust, PolicyError> {
    let mut trust = Trust::default();
    for path in keys {
        let content = |cause| PolicyError::Content { path: path.clone(), cause };
        trust.keys.extend(PublicKey::from_pem(&read(path)?).map_err(content)?);
    }
    for path in certificates {
        let content = |cause| PolicyError::Content { path: path.clone(), cause };
        trust.certificates.extend(Certificate::from_pem(&read(path)?).map_err(content)?);
    }
    Ok(trust)
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

    #[test]
    fn signers_speak_for_their_repositories() {
        let place = tempfile::tempdir().unwrap();
        let key = place.path().join("key.pem");
        std::fs::write(&key, KEY).unwrap();
        let rule =
            |pattern: &str| SignerRule { pattern: pattern.to_owned(), keys: vec![key.clone()], certificates: vec![] };
        let with = |keys: &[PathBuf], signers: &[SignerRule]| {
            TrustPolicy::with_signers(Provisional::RequireSignature, keys, &[], signers)
        };
        let bound = with(&[], &[rule("h.example/a/*"), rule("*/b/app")]).unwrap();
        for (repository, keys) in [
            (Some("h.example/a/app"), 1),
            (Some("h.example/a/deep/app"), 1),
            (Some("h.example/aa/app"), 0),
            (Some("h.example/a"), 0),
            (Some("evil.example/h.example/a/app"), 0),
            (Some("h.example/b/app"), 1),
            (None, 0),
        ] {
            assert_eq!(bound.trust_for(repository).keys.len(), keys, "{repository:?}");
        }
        let both = with(std::slice::from_ref(&key), &[rule("h.example/a/*")]).unwrap();
        assert_eq!([both.trust_for(None).keys.len(), both.trust_for(Some("h.example/a/b")).keys.len()], [1, 2]);
        let empty = SignerRule { keys: vec![], ..rule("h.example/*") };
        assert!(matches!(with(&[], &[empty]), Err(PolicyError::NoSigner { .. })));
        assert!(matches!(with(&[], &[rule("")]), Err(PolicyError::NoPattern)));
        let allowed = TrustPolicy::with_signers(Provisional::Allow, &[], &[], &[rule("*")]);
        assert!(matches!(allowed, Err(PolicyError::NothingChecked)));
    }

    #[tokio::test]
    async fn doubts() {
        let place = tempfile::tempdir().unwrap();
        let key = place.path().join("key.pem");
        std::fs::write(&key, KEY).unwrap();
        let index = Digest::of(b"index");
        assert_eq!(TrustPolicy::default().doubt(None, &index, &[]).await, None);
        let deny = TrustPolicy::new(Provisional::Deny, &[], &[]).unwrap();
        assert!(deny.doubt(None, &index, &[]).await.unwrap().contains("proven"));
        let required = TrustPolicy::new(Provisional::RequireSignature, &[key], &[]).unwrap();
        assert!(required.doubt(None, &index, &[]).await.unwrap().contains("registries only"));
    }
}
