//! cosign's simple signing: a small JSON document that names a digest, and a signature over its bytes.

use serde::Deserialize;

use crate::format::digest::Digest;
use crate::trust::key::signer;
use crate::trust::{SignatureError, Signer, Trust, base64};

/// What the document says it is.
const KIND: &str = "cosign container image signature";

#[derive(Deserialize)]
struct Payload {
    critical: Critical,
}

#[derive(Deserialize)]
struct Critical {
    image: Image,
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Deserialize)]
struct Image {
    #[serde(rename = "docker-manifest-digest")]
    digest: String,
}

/// Checks a signature of `subject`. The name in the document, under which the signer knew the image, is not compared:
/// the same content may be in several repositories.
pub(super) fn verify(
    payload: &[u8],
    signature: &str,
    is_keyless: bool,
    subject: &Digest,
    trust: &Trust,
) -> Result<Signer, SignatureError> {
    let key = match signer(&trust.keys, payload, &base64("signature", signature)?) {
        Err(SignatureError::WrongKey) if is_keyless => return Err(SignatureError::Keyless),
        key => key?,
    };
    let parsed: Payload =
        serde_json::from_slice(payload).map_err(|error| SignatureError::malformed("payload", error))?;
    let Critical { image, kind } = parsed.critical;
    if kind != KIND {
        return Err(SignatureError::unsupported(&format!("a payload of type {kind}")));
    }
    if image.digest != subject.to_string() {
        return Err(SignatureError::other_subject(subject, &image.digest));
    }
    Ok(Signer::Key(key.fingerprint()))
}
