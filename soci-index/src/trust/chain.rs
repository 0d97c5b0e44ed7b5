//! Certificates of signers, and the way from them to one that is trusted.

use core::time::Duration;

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, SignatureVerificationAlgorithm, TrustAnchor, UnixTime};
use webpki::{EndEntityCert, KeyUsage, anchor_from_trusted_cert};

use crate::format::digest::Digest;
use crate::trust::{PARTS_MAX, SignatureError, TrustError};

/// The extended key usage of code signing, 1.3.6.1.5.5.7.3.3, in DER.
const CODE_SIGNING: &[u8] = &[0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x03, 0x03];

const WANTED: &str = "certificate";

/// A certificate that is trusted: that of an authority, or a signer's own.
#[derive(Clone, PartialEq, Eq)]
pub struct Certificate(CertificateDer<'static>);

impl Certificate {
    /// The certificates in a PEM text.
    ///
    /// # Errors
    /// [`TrustError`] when there is none, or one that cannot be read.
    pub fn from_pem(text: &[u8]) -> Result<Vec<Self>, TrustError> {
        let malformed = |reason: String| TrustError::Malformed { wanted: WANTED, reason };
        let certificates = CertificateDer::pem_slice_iter(text).map(|certificate| {
            let certificate = certificate.map_err(|error| malformed(error.to_string()))?;
            anchor_from_trusted_cert(&certificate).map_err(|error| malformed(error.to_string()))?;
            Ok(Self(certificate))
        });
        let certificates = certificates.collect::<Result<Vec<_>, _>>()?;
        if certificates.is_empty() { Err(TrustError::Nothing { wanted: WANTED }) } else { Ok(certificates) }
    }

    /// The digest of the certificate's DER form.
    #[must_use]
    pub fn fingerprint(&self) -> Digest {
        Digest::of(&self.0)
    }
}

impl std::fmt::Debug for Certificate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Certificate({})", self.fingerprint())
    }
}

/// A certificate that comes with a signature, and those that lead on from it.
pub(super) struct Chain(Vec<CertificateDer<'static>>);

impl Chain {
    /// Of certificates in DER form, the signer's first.
    pub(super) fn new(certificates: Vec<Vec<u8>>) -> Result<Self, SignatureError> {
        if certificates.is_empty() || certificates.len() > PARTS_MAX {
            let reason = format!("it has {} certificates, not 1 to {PARTS_MAX}", certificates.len());
            return Err(SignatureError::malformed("chain of certificates", reason));
        }
        Ok(Self(certificates.into_iter().map(CertificateDer::from).collect()))
    }

    /// Checks that the chain leads to a trusted certificate, that the times of the certificates are right and that the
    /// signer's may sign; then that its key has signed `message`. Gives the digest of the signer's certificate.
    ///
    /// A signer's own certificate may be the trusted one. Then its issuer need not be trusted, but must have issued it.
    pub(super) fn verify(
        &self,
        trusted: &[Certificate],
        now: u64,
        algorithm: &dyn SignatureVerificationAlgorithm,
        message: &[u8],
        signature: &[u8],
    ) -> Result<Digest, SignatureError> {
        if trusted.is_empty() {
            return Err(SignatureError::NobodyTrusted { kind: "certificate" });
        }
        let untrusted = |reason: webpki::Error| SignatureError::Chain { reason: reason.to_string() };
        let Some((leaf, above)) = self.0.split_first() else {
            return Err(SignatureError::malformed("chain of certificates", "it is empty"));
        };
        let is_pinned = trusted.iter().any(|trusted| trusted.0 == *leaf);
        let own = self.0.iter().filter(|_| is_pinned);
        let anchors = trusted.iter().map(|trusted| &trusted.0).chain(own);
        let anchors: Vec<TrustAnchor<'_>> =
            anchors.map(anchor_from_trusted_cert).collect::<Result<_, _>>().map_err(untrusted)?;
        let signer = EndEntityCert::try_from(leaf).map_err(untrusted)?;
        let path = signer.verify_for_usage(
            webpki::ALL_VERIFICATION_ALGS,
            &anchors,
            above,
            UnixTime::since_unix_epoch(Duration::from_secs(now)),
            KeyUsage::required_if_present(CODE_SIGNING),
            None,
            None,
        );
        path.map_err(untrusted)?;
        let signed = signer.verify_signature(algorithm, message, signature);
        signed.map_err(|_| SignatureError::NotByCertificate)?;
        Ok(Digest::of(leaf))
    }
}
