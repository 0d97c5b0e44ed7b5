//! Finds signatures of a manifest in its repository, and checks them until one is good.
//!
//! They are in two places: cosign's tag, which is made from the digest, and among what refers to the manifest. An
//! unreadable place makes no signature bad and none good: it is reported among the reasons. Invariant: the number of
//! documents that are fetched for one manifest is bounded, and so is each.

use bytes::Bytes;

use crate::format::digest::Digest;
use crate::format::model::{Descriptor, ImageManifest};
use crate::format::reference::ManifestName;
use crate::registry::{RegistryError, Repository};
use crate::trust::bundle::MEDIA_TYPE as BUNDLE;
use crate::trust::{SIGNATURE_BYTES_MAX, Signature, SignatureError, Signer, Trust, verify};

/// Signatures of one manifest that are looked at.
const SIGNATURES_MAX: usize = 64;
/// Media type of what cosign signs.
const SIMPLE: &str = "application/vnd.dev.cosign.simplesigning.v1+json";
/// Annotation with cosign's signature.
const SIMPLE_SIGNATURE: &str = "dev.cosignproject.cosign/signature";
/// Annotation with the certificate of a keyless signature.
const SIMPLE_CERTIFICATE: &str = "dev.sigstore.cosign/certificate";
/// Artifact type of cosign's signature as a referrer.
const SIMPLE_ARTIFACT: &str = "application/vnd.dev.cosign.artifact.sig.v1+json";
/// Artifact type of notation's signature.
const NOTATION: &str = "application/vnd.cncf.notary.signature";
/// How the artifact types of sigstore's bundles begin, whatever their version.
const ANY_BUNDLE: &str = "application/vnd.dev.sigstore.bundle";
/// Media type of its envelope as JWS.
const JWS: &str = "application/jose+json";

/// A signature that does not count.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    pub origin: String,
    /// Why it does not count.
    pub reason: SignatureError,
}

/// What became of the search for a good signature.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// There is one.
    Good(Signer),
    /// There is none: these were looked at.
    None(Vec<Refusal>),
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Good(signer) => write!(f, "signed by {signer}"),
            Self::None(refused) if refused.is_empty() => f.write_str("it has no signature"),
            Self::None(refused) => {
                f.write_str("it has no good signature")?;
                refused.iter().take(5).try_for_each(|refusal| write!(f, "; {}: {}", refusal.origin, refusal.reason))
            }
        }
    }
}

/// Looks for a good signature of `subject`; `now` is in seconds since 1970.
pub async fn search(repository: &Repository, subject: &Digest, trust: &Trust, now: u64) -> Verdict {
    let mut search = Search { repository, subject, trust, now, refused: Vec::new(), looked_at: 0 };
    match search.run().await {
        Some(signer) => Verdict::Good(signer),
        None => Verdict::None(search.refused),
    }
}

/// Names the signatures that `subject` has, of any signer: cosign's tag, and its referrers. None is checked.
///
/// # Errors
/// When the registry does not say what refers to `subject`, and there is no tag of cosign's.
pub(crate) async fn present(repository: &Repository, subject: &Digest) -> Result<Vec<String>, RegistryError> {
    let tag = cosign_tag(subject);
    let has_tag = repository.manifest(&ManifestName::Tag(tag.clone())).await.is_ok_and(|there| there.is_some());
    let mut found: Vec<String> = has_tag.then(|| format!("cosign's tag {tag}")).into_iter().collect();
    let entries = match repository.referrers(subject, None).await {
        Ok(referrers) => referrers.entries,
        Err(_) if has_tag => return Ok(found),
        Err(error) => return Err(error),
    };
    for entry in entries.iter().take(SIGNATURES_MAX) {
        let kind = match entry.kind() {
            "" => kind_of(repository, &entry.digest).await,
            kind => kind.to_owned(),
        };
        if is_signature(&kind) {
            found.push(format!("{} of type {kind}", entry.digest));
        }
    }
    Ok(found)
}

/// What a manifest says it is, where the list does not say it.
async fn kind_of(repository: &Repository, digest: &Digest) -> String {
    let Ok(Some(raw)) = repository.manifest(&ManifestName::Digest(*digest)).await else { return String::new() };
    serde_json::from_slice(&raw.bytes).map(|manifest: ImageManifest| manifest.kind().to_owned()).unwrap_or_default()
}

/// Whether an artifact type is one of signatures: also in versions that cannot be checked here.
fn is_signature(kind: &str) -> bool {
    kind == NOTATION || kind == SIMPLE_ARTIFACT || kind.starts_with(ANY_BUNDLE)
}

/// The tag under which cosign keeps the signatures of a manifest.
fn cosign_tag(subject: &Digest) -> String {
    format!("{}-{}.sig", subject.algorithm().name(), subject.hex())
}

struct Search<'a> {
    repository: &'a Repository,
    subject: &'a Digest,
    trust: &'a Trust,
    now: u64,
    refused: Vec<Refusal>,
    looked_at: usize,
}

impl Search<'_> {
    async fn run(&mut self) -> Option<Signer> {
        let tag = cosign_tag(self.subject);
        if let Some(manifest) = self.manifest(&ManifestName::Tag(tag.clone())).await
            && let Some(signer) = self.layers(&tag, SIMPLE_ARTIFACT, &manifest).await
        {
            return Some(signer);
        }
        let referrers = match self.repository.referrers(self.subject, None).await {
            Ok(referrers) => referrers.entries,
            Err(error) => {
                self.refuse("the list of referrers", unreadable(&error));
                return None;
            }
        };
        // An entry may leave out what it is; then only the manifest says it.
        let may_be = |entry: &&Descriptor| matches!(entry.kind(), "" | BUNDLE | NOTATION | SIMPLE_ARTIFACT);
        for entry in referrers.iter().filter(may_be).take(SIGNATURES_MAX) {
            let origin = entry.digest.to_string();
            let Some(manifest) = self.manifest(&ManifestName::Digest(entry.digest)).await else { continue };
            let kind = manifest.kind().to_owned();
            let of_subject = manifest.subject.as_ref().is_some_and(|subject| subject.digest == *self.subject);
            if !of_subject || !matches!(kind.as_str(), BUNDLE | NOTATION | SIMPLE_ARTIFACT) {
                continue;
            }
            if let Some(signer) = self.layers(&origin, &kind, &manifest).await {
                return Some(signer);
            }
        }
        None
    }

    /// A manifest; `None` when it is not there, or cannot be obtained, which is noted.
    async fn manifest(&mut self, name: &ManifestName) -> Option<ImageManifest> {
        let raw = match self.repository.manifest(name).await {
            Ok(raw) => raw?,
            Err(error) => {
                self.refuse(&name.to_string(), unreadable(&error));
                return None;
            }
        };
        match serde_json::from_slice(&raw.bytes) {
            Ok(manifest) => Some(manifest),
            Err(error) => {
                self.refuse(&name.to_string(), SignatureError::malformed("manifest", error));
                None
            }
        }
    }

    /// Checks the signatures in a manifest of the given kind.
    async fn layers(&mut self, origin: &str, kind: &str, manifest: &ImageManifest) -> Option<Signer> {
        for layer in &manifest.layers {
            if self.looked_at >= SIGNATURES_MAX {
                let what = format!("more than {SIGNATURES_MAX} signatures of one manifest");
                self.refuse(origin, SignatureError::Unsupported { what });
                return None;
            }
            self.looked_at += 1;
            let bytes = match self.repository.blob_bytes(layer, SIGNATURE_BYTES_MAX).await {
                Ok(bytes) => bytes,
                Err(error) => {
                    self.refuse(origin, unreadable(&error));
                    continue;
                }
            };
            match verify(&signature(kind, layer, bytes), self.subject, self.trust, self.now) {
                Ok(signer) => return Some(signer),
                Err(reason) => self.refuse(origin, reason),
            }
        }
        None
    }

    fn refuse(&mut self, origin: &str, reason: SignatureError) {
        self.refused.push(Refusal { origin: origin.to_owned(), reason });
    }
}

/// The signature in a layer of a manifest of the given kind.
fn signature(kind: &str, layer: &Descriptor, bytes: Bytes) -> Signature {
    let other = || Signature::Other { kind: layer.media_type.clone() };
    match (kind, layer.media_type.as_str()) {
        (SIMPLE_ARTIFACT, SIMPLE) => match layer.annotations.get(SIMPLE_SIGNATURE) {
            Some(signature) => Signature::Simple {
                payload: bytes,
                signature: signature.clone(),
                is_keyless: layer.annotations.contains_key(SIMPLE_CERTIFICATE),
            },
            None => other(),
        },
        (BUNDLE, BUNDLE) => Signature::Bundle(bytes),
        (NOTATION, JWS) => Signature::Jws(bytes),
        _ => other(),
    }
}

fn unreadable(error: &RegistryError) -> SignatureError {
    SignatureError::Unreadable { reason: error.to_string() }
}
