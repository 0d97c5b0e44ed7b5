//! Bundles of sigstore, version 0.3, as cosign 3 writes them: an envelope (DSSE) around a statement (in-toto) that
//! names digests.
//!
//! A bundle may as well hold an attestation, say of how an image was built, signed by the same key. That is no
//! signature of the image: only the predicate that cosign writes for signing counts.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::format::digest::Digest;
use crate::trust::key::signer;
use crate::trust::{PARTS_MAX, SignatureError, Signer, Trust, base64};

/// Media type of a bundle.
pub(super) const MEDIA_TYPE: &str = "application/vnd.dev.sigstore.bundle.v0.3+json";
const STATEMENT: &str = "application/vnd.in-toto+json";
const STATEMENT_TYPE: &str = "https://in-toto.io/Statement/v1";
const PREDICATE: &str = "https://sigstore.dev/cosign/sign/v1";

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Bundle {
    media_type: String,
    verification_material: Material,
    #[serde(default)]
    dsse_envelope: Option<Envelope>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Material {
    #[serde(default)]
    certificate: Option<IgnoredAny>,
    #[serde(default)]
    x509_certificate_chain: Option<IgnoredAny>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Envelope {
    payload: String,
    payload_type: String,
    signatures: Vec<Sig>,
}

#[derive(Deserialize)]
struct Sig {
    sig: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Statement {
    #[serde(rename = "_type")]
    kind: String,
    predicate_type: String,
    subject: Vec<Subject>,
}

#[derive(Deserialize)]
struct Subject {
    digest: BTreeMap<String, String>,
}

/// Checks a bundle for a signature of `subject`.
pub(super) fn verify(bundle: &[u8], subject: &Digest, trust: &Trust) -> Result<Signer, SignatureError> {
    let bundle: Bundle = serde_json::from_slice(bundle).map_err(|error| SignatureError::malformed("bundle", error))?;
    if bundle.media_type != MEDIA_TYPE {
        return Err(SignatureError::unsupported(&format!("a bundle of type {}", bundle.media_type)));
    }
    let material = &bundle.verification_material;
    if material.certificate.is_some() || material.x509_certificate_chain.is_some() {
        return Err(SignatureError::Keyless);
    }
    let envelope = bundle.dsse_envelope.ok_or_else(|| SignatureError::unsupported("a bundle without an envelope"))?;
    if envelope.signatures.is_empty() || envelope.signatures.len() > PARTS_MAX {
        let reason = format!("it has {} signatures, not 1 to {PARTS_MAX}", envelope.signatures.len());
        return Err(SignatureError::malformed("envelope", reason));
    }
    let payload = base64("payload", &envelope.payload)?;
    let message = pre_authentication(&envelope.payload_type, &payload);
    let mut by = Err(SignatureError::WrongKey);
    for signature in &envelope.signatures {
        by = signer(&trust.keys, &message, &base64("signature", &signature.sig)?);
        if by.is_ok() {
            break;
        }
    }
    let key = by?;
    if envelope.payload_type != STATEMENT {
        return Err(SignatureError::unsupported(&format!("a payload of type {}", envelope.payload_type)));
    }
    let statement: Statement =
        serde_json::from_slice(&payload).map_err(|error| SignatureError::malformed("statement", error))?;
    if statement.kind != STATEMENT_TYPE || statement.predicate_type != PREDICATE {
        let what = format!("a statement {} of {}", statement.kind, statement.predicate_type);
        return Err(SignatureError::unsupported(&what));
    }
    let (algorithm, hex) = (subject.algorithm().name(), subject.hex().to_string());
    if !statement.subject.iter().any(|named| named.digest.get(algorithm) == Some(&hex)) {
        let named = statement.subject.iter().flat_map(|named| &named.digest);
        let named: Vec<String> = named.take(3).map(|(algorithm, hex)| format!("{algorithm}:{hex}")).collect();
        return Err(SignatureError::other_subject(subject, &named.join(", ")));
    }
    Ok(Signer::Key(key.fingerprint()))
}

/// What is signed of an envelope: its type and its payload, each with its length before it. Source: the DSSE protocol,
/// `PAE`.
fn pre_authentication(kind: &str, payload: &[u8]) -> Vec<u8> {
    let mut message = format!("DSSEv1 {} {kind} {} ", kind.len(), payload.len()).into_bytes();
    message.extend_from_slice(payload);
    message
}
