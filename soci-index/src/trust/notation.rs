//! notation's signatures: a JSON Web Signature with the signer's certificates beside it.
//!
//! Source: the Notary Project's signature specification, JWS envelope. The header is read only as far as it takes to
//! check the signature; what it says of expiry and content counts after that.

use ::base64::Engine as _;
use ::base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rustls::pki_types::SignatureVerificationAlgorithm;
use serde::Deserialize;
use webpki::ring as algorithms;

use crate::format::digest::Digest;
use crate::format::ztoc::rfc3339;
use crate::trust::chain::Chain;
use crate::trust::{SignatureError, Signer, Trust, base64};

/// What is signed.
const CONTENT: &str = "application/vnd.cncf.notary.payload.v1+json";
/// A signature whose time is the signer's word, with a chain of certificates. The other scheme rests on the word of an
/// authority about the time.
const SCHEME: &str = "notary.x509";
/// Header fields that a signer may demand to be understood, and that are.
const UNDERSTOOD: [&str; 2] = ["io.cncf.notary.signingScheme", "io.cncf.notary.expiry"];

#[derive(Deserialize)]
struct Envelope {
    payload: String,
    protected: String,
    header: Header,
    signature: String,
}

#[derive(Deserialize)]
struct Header {
    x5c: Vec<String>,
}

#[derive(Deserialize)]
struct Protected {
    alg: String,
    #[serde(default)]
    cty: String,
    #[serde(default)]
    crit: Vec<String>,
    #[serde(rename = "io.cncf.notary.signingScheme", default)]
    scheme: String,
    #[serde(rename = "io.cncf.notary.expiry", default)]
    expiry: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Payload {
    target_artifact: Target,
}

#[derive(Deserialize)]
struct Target {
    digest: String,
}

/// How a signature is written: as the certificate's own form, or as two numbers of so many bytes.
enum Form {
    Plain,
    Pair(usize),
}

/// Checks an envelope for a signature of `subject`.
pub(super) fn verify(envelope: &[u8], subject: &Digest, trust: &Trust, now: u64) -> Result<Signer, SignatureError> {
    let envelope: Envelope =
        serde_json::from_slice(envelope).map_err(|error| SignatureError::malformed("envelope", error))?;
    let protected: Protected = serde_json::from_slice(&base64_url("protected header", &envelope.protected)?)
        .map_err(|error| SignatureError::malformed("protected header", error))?;
    let (algorithm, form) = algorithm(&protected.alg)?;
    if let Some(unknown) = protected.crit.iter().find(|name| !UNDERSTOOD.contains(&name.as_str())) {
        return Err(SignatureError::unsupported(&format!("the critical header field {unknown}")));
    }
    if protected.scheme != SCHEME {
        return Err(SignatureError::unsupported(&format!("the signing scheme {:?}", protected.scheme)));
    }
    let certificates = envelope.header.x5c.iter().map(|certificate| base64("certificate", certificate));
    let chain = Chain::new(certificates.collect::<Result<_, _>>()?)?;
    let signature = base64_url("signature", &envelope.signature)?;
    let signature = match form {
        Form::Plain => signature,
        Form::Pair(half) => pair(&signature, half)?,
    };
    let message = format!("{}.{}", envelope.protected, envelope.payload);
    let signer = chain.verify(&trust.certificates, now, algorithm, message.as_bytes(), &signature)?;

    if protected.cty != CONTENT {
        return Err(SignatureError::unsupported(&format!("content of type {:?}", protected.cty)));
    }
    if let Some(expiry) = protected.expiry {
        let at = rfc3339::parse(expiry.as_bytes()).ok_or_else(|| SignatureError::malformed("expiry", &expiry))?;
        if u64::try_from(at.seconds).unwrap_or_default() <= now {
            return Err(SignatureError::Expired { at: expiry });
        }
    }
    let payload: Payload = serde_json::from_slice(&base64_url("payload", &envelope.payload)?)
        .map_err(|error| SignatureError::malformed("payload", error))?;
    if payload.target_artifact.digest != subject.to_string() {
        return Err(SignatureError::other_subject(subject, &payload.target_artifact.digest));
    }
    Ok(Signer::Certificate(signer))
}

/// The algorithms of the specification, but for ECDSA on P-521. `none`, and those with shared secrets, are not of it.
fn algorithm(name: &str) -> Result<(&'static dyn SignatureVerificationAlgorithm, Form), SignatureError> {
    Ok(match name {
        "PS256" => (algorithms::RSA_PSS_2048_8192_SHA256_LEGACY_KEY, Form::Plain),
        "PS384" => (algorithms::RSA_PSS_2048_8192_SHA384_LEGACY_KEY, Form::Plain),
        "PS512" => (algorithms::RSA_PSS_2048_8192_SHA512_LEGACY_KEY, Form::Plain),
        "ES256" => (algorithms::ECDSA_P256_SHA256, Form::Pair(32)),
        "ES384" => (algorithms::ECDSA_P384_SHA384, Form::Pair(48)),
        other => return Err(SignatureError::Algorithm { name: other.chars().take(50).collect() }),
    })
}

/// A signature of two numbers, each of `half` bytes, in DER: `SEQUENCE { INTEGER, INTEGER }`.
fn pair(signature: &[u8], half: usize) -> Result<Vec<u8>, SignatureError> {
    let (Some((r, s)), true) = (signature.split_at_checked(half), signature.len() == 2 * half) else {
        let reason = format!("it has {} bytes, not {}", signature.len(), 2 * half);
        return Err(SignatureError::malformed("signature", reason));
    };
    let mut numbers = Vec::new();
    for number in [r, s] {
        let zeros = number.iter().take_while(|byte| **byte == 0).count();
        let digits = number.get(zeros..).unwrap_or_default();
        // A number that begins with a set bit would be negative; zero has one digit, too.
        let pad = digits.first().is_none_or(|byte| *byte >= 0x80);
        numbers.extend([2, short(digits.len() + usize::from(pad))]);
        numbers.extend(pad.then_some(0));
        numbers.extend_from_slice(digits);
    }
    let mut sequence = vec![0x30, short(numbers.len())];
    sequence.append(&mut numbers);
    Ok(sequence)
}

/// A length in DER's short form: here at most 102.
fn short(length: usize) -> u8 {
    debug_assert!(length < 0x80, "{length} needs the long form");
    u8::try_from(length).unwrap_or(u8::MAX)
}

fn base64_url(what: &'static str, text: &str) -> Result<Vec<u8>, SignatureError> {
    URL_SAFE_NO_PAD.decode(text).map_err(|error| SignatureError::malformed(what, error))
}
