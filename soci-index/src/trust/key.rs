//! Public keys, and what they sign with.

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{SignatureVerificationAlgorithm, SubjectPublicKeyInfoDer};
use webpki::ring as algorithms;
use webpki::{Error, RawPublicKeyEntity};

use crate::format::digest::Digest;
use crate::trust::{SignatureError, TrustError};

/// What keys of cosign sign with. For each kind of key those that cosign has used; the key itself says its kind.
const ALGORITHMS: [&dyn SignatureVerificationAlgorithm; 6] = [
    algorithms::ECDSA_P256_SHA256,
    algorithms::ECDSA_P384_SHA256,
    algorithms::ECDSA_P384_SHA384,
    algorithms::ED25519,
    algorithms::RSA_PKCS1_2048_8192_SHA256,
    algorithms::RSA_PKCS1_2048_8192_SHA512,
];

const WANTED: &str = "public key";

/// A public key of a kind that can be used.
#[derive(Clone, PartialEq, Eq)]
pub struct PublicKey(SubjectPublicKeyInfoDer<'static>);

impl PublicKey {
    /// The keys in a PEM text: `-----BEGIN PUBLIC KEY-----`.
    ///
    /// # Errors
    /// [`TrustError`] when there is none, or one of a kind that cannot be used.
    pub fn from_pem(text: &[u8]) -> Result<Vec<Self>, TrustError> {
        let keys = SubjectPublicKeyInfoDer::pem_slice_iter(text).map(|key| {
            let malformed = |reason: String| TrustError::Malformed { wanted: WANTED, reason };
            let key = key.map_err(|error| malformed(error.to_string()))?;
            let parsed = RawPublicKeyEntity::try_from(&key).map_err(|error| malformed(error.to_string()))?;
            // A key that no algorithm fits refuses them all, whatever the signature.
            let fits = |algorithm: &&dyn SignatureVerificationAlgorithm| {
                matches!(parsed.verify_signature(*algorithm, b"", b""), Err(Error::InvalidSignatureForPublicKey))
            };
            if !ALGORITHMS.iter().any(fits) {
                return Err(TrustError::Kind);
            }
            Ok(Self(key))
        });
        let keys = keys.collect::<Result<Vec<_>, _>>()?;
        if keys.is_empty() { Err(TrustError::Nothing { wanted: WANTED }) } else { Ok(keys) }
    }

    /// The digest of the key's DER form.
    #[must_use]
    pub fn fingerprint(&self) -> Digest {
        Digest::of(&self.0)
    }

    fn has_signed(&self, message: &[u8], signature: &[u8]) -> bool {
        let Ok(key) = RawPublicKeyEntity::try_from(&self.0) else { return false };
        ALGORITHMS.iter().any(|algorithm| key.verify_signature(*algorithm, message, signature).is_ok())
    }
}

impl std::fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PublicKey({})", self.fingerprint())
    }
}

/// The key that has signed.
pub(super) fn signer<'k>(
    keys: &'k [PublicKey],
    message: &[u8],
    signature: &[u8],
) -> Result<&'k PublicKey, SignatureError> {
    if keys.is_empty() {
        return Err(SignatureError::NobodyTrusted { kind: "key" });
    }
    keys.iter().find(|key| key.has_signed(message, signature)).ok_or(SignatureError::WrongKey)
}
