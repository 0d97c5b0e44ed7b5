//! Signatures of manifests: those of cosign, made with a key, and those of notation, made with a certificate.
//!
//! What a signature proves here: an index is bound to its image by what it says itself, and every client with push
//! access to the repository can claim it. A signature of the index's digest by a signer that the operator trusts
//! confirms that binding.
//!
//! [`verify`] is pure: it gets the bytes, the digest that should be signed, the [`Trust`] and the time. [`fetch`] finds
//! signatures beside a manifest in a registry.
//!
//! | signature | where | checked |
//! |---|---|---|
//! | cosign, simple signing | tag `sha256-<hex>.sig`, or a referrer | the key; the digest in the payload |
//! | cosign, bundle 0.3 | a referrer | the key; type, predicate and subject of the statement |
//! | notation, JWS | a referrer | chain to a trusted certificate, its times and use; the digest; the expiry |
//!
//! Not checked: keyless signatures (Fulcio, Rekor), because they need roots that change and a log; COSE envelopes;
//! transparency logs, timestamps of authorities and revocation lists. All of these are refused with their name or play
//! no part, and none is taken for good. Invariants: nothing a signer says is believed before the signature over it is
//! right; only algorithms of the lists in `key` and `notation` exist, whatever an envelope claims; sizes and counts are
//! bounded.
//!
//! The room uses `format` and `registry`; `publish` uses it, and `soci-fs` for its policy.

use bytes::Bytes;

use crate::format::class::{Class, Classified};
use crate::format::digest::Digest;

mod bundle;
mod chain;
mod cosign;
pub mod fetch;
mod key;
mod notation;

pub use chain::Certificate;
pub use key::PublicKey;

/// Bytes of one signature, with what is signed: real ones have some kilobytes.
pub(crate) const SIGNATURE_BYTES_MAX: u64 = 1 << 20;
/// Signatures in one document, and certificates in one chain.
const PARTS_MAX: usize = 16;

/// The signers that an operator trusts.
#[derive(Debug, Clone, Default)]
pub struct Trust {
    /// Keys, for cosign's signatures.
    pub keys: Vec<PublicKey>,
    /// Certificates, for notation's: of an authority, or of a signer.
    pub certificates: Vec<Certificate>,
}

impl Trust {
    /// Whether no signer is trusted.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.keys.is_empty() && self.certificates.is_empty()
    }
}

/// Why a text gives no key or certificate to trust.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TrustError {
    /// It is not PEM, or has nothing of the kind in it.
    #[error("it has no {wanted} in PEM form")]
    Nothing { wanted: &'static str },
    /// A block of it cannot be read.
    #[error("it has a {wanted} that cannot be read: {reason}")]
    Malformed { wanted: &'static str, reason: String },
    /// A key of a kind that cannot be used.
    #[error(
        "its key is of a kind that is not supported: ECDSA on P-256 or P-384, Ed25519, or RSA of 2048 bits or more"
    )]
    Kind,
}

impl Classified for TrustError {
    fn class(&self) -> Class {
        Class::Content
    }
}

/// A signature as it was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Signature {
    /// cosign's simple signing.
    Simple {
        /// What was signed.
        payload: Bytes,
        /// The signature, in base64.
        signature: String,
        /// Whether it comes with a certificate, as keyless ones do.
        is_keyless: bool,
    },
    /// A bundle of sigstore.
    Bundle(Bytes),
    /// An envelope of notation, as JWS.
    Jws(Bytes),
    /// Something else that is a signature.
    Other {
        /// Its media type.
        kind: String,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Signer {
    /// A trusted key: the digest of its DER form.
    Key(Digest),
    /// The holder of a certificate that is trusted or issued by a trusted authority: the digest of its DER form.
    Certificate(Digest),
}

impl std::fmt::Display for Signer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Key(digest) => write!(f, "the key {digest}"),
            Self::Certificate(digest) => write!(f, "the certificate {digest}"),
        }
    }
}

/// Why a signature does not count.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SignatureError {
    /// It is not well formed.
    #[error("its {what} cannot be read: {reason}")]
    Malformed { what: &'static str, reason: String },
    /// It is right, and about something else.
    #[error("it signs {found}, not {expected}")]
    OtherSubject {
        expected: Box<Digest>,
        /// What it signs, cut at 200 characters.
        found: String,
    },
    /// It is by another signer, or over other bytes.
    #[error("it is by none of the trusted keys")]
    WrongKey,
    /// No trusted signer is configured.
    #[error("no {kind} is trusted that it could be checked with")]
    NobodyTrusted {
        /// `key` or `certificate`.
        kind: &'static str,
    },
    /// The signer's certificate is not trusted.
    #[error("its certificate is not trusted: {reason}")]
    Chain { reason: String },
    /// It was not made by the certificate that comes with it.
    #[error("it was not made with the key of its certificate")]
    NotByCertificate,
    /// It is over.
    #[error("it expired at {at}")]
    Expired { at: String },
    /// Its algorithm is none that is used for signing.
    #[error("its algorithm {name:?} is not accepted")]
    Algorithm {
        /// The algorithm's name, cut at 50 characters.
        name: String,
    },
    /// It was made without a key of the signer's own.
    #[error("keyless signatures are not checked; use a key")]
    Keyless,
    /// It is of a kind, or demands something, that is not known here.
    #[error("{what} is not supported")]
    Unsupported { what: String },
    /// It could not be fetched.
    #[error("it cannot be fetched: {reason}")]
    Unreadable { reason: String },
}

impl Classified for SignatureError {
    fn class(&self) -> Class {
        Class::Content
    }
}

impl SignatureError {
    fn malformed(what: &'static str, reason: impl std::fmt::Display) -> Self {
        Self::Malformed { what, reason: reason.to_string().chars().take(200).collect() }
    }

    fn unsupported(what: &str) -> Self {
        Self::Unsupported { what: what.chars().take(200).collect() }
    }

    fn other_subject(expected: &Digest, found: &str) -> Self {
        Self::OtherSubject { expected: Box::new(*expected), found: found.chars().take(200).collect() }
    }
}

/// Checks a signature of `subject`; `now` is in seconds since 1970.
///
/// # Errors
/// [`SignatureError`]: it does not count.
pub fn verify(signature: &Signature, subject: &Digest, trust: &Trust, now: u64) -> Result<Signer, SignatureError> {
    match signature {
        Signature::Simple { payload, signature, is_keyless } => {
            cosign::verify(payload, signature, *is_keyless, subject, trust)
        }
        Signature::Bundle(bundle) => bundle::verify(bundle, subject, trust),
        Signature::Jws(envelope) => notation::verify(envelope, subject, trust, now),
        Signature::Other { kind } => Err(SignatureError::unsupported(&format!("a signature of type {kind}"))),
    }
}

/// A part of a signature in standard base64.
fn base64(what: &'static str, text: &str) -> Result<Vec<u8>, SignatureError> {
    use ::base64::Engine as _;
    let decoded = ::base64::engine::general_purpose::STANDARD.decode(text.trim_ascii());
    decoded.map_err(|error| SignatureError::malformed(what, error))
}
