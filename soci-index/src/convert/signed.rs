//! Protects a signed image from being replaced under its name by an unsigned one.
//!
//! A signature is of a digest, and conversion makes a new one: where only signed content may be pulled, the name would be
//! of no use any more. An image that was converted before is told apart: converting it again usually changes nothing,
//! which is known only when its documents are made. Any other is refused before a layer is read.

use crate::convert::target::Target;
use crate::image::model::{Descriptor, ImageIndex};
use crate::image::reference::ManifestName;
use crate::manifest::INDEX_V2;
use crate::publish::PublishError;
use crate::signature::fetch;

/// Why the image that has the target's name now must not be replaced by another one; `None` if it may.
///
/// # Errors
/// The same, if it will be replaced by another one for certain.
pub(super) async fn find(target: &Target) -> Result<Option<PublishError>, PublishError> {
    let Target::Registry { repository, tag } = target else { return Ok(None) };
    // What cannot be read is nobody's image to pull; if it matters, reading the source meets it, too.
    let Ok(Some(there)) = repository.manifest(&ManifestName::Tag(tag.clone())).await else { return Ok(None) };
    let signatures = match fetch::present(repository, &there.digest).await {
        Ok(signatures) if signatures.is_empty() => return Ok(None),
        Ok(signatures) => signatures,
        Err(error) => {
            tracing::warn!("it is not known whether {target} is signed, so it may be replaced: {error}");
            return Ok(None);
        }
    };
    let digest = Box::new(there.digest);
    let refusal = PublishError::Signed { image: target.to_string(), digest, signatures: signatures.join(", ") };
    if is_converted(&there.bytes) { Ok(Some(refusal)) } else { Err(refusal) }
}

/// Whether an image index is that of an image that was converted.
pub(super) fn is_converted(index: &[u8]) -> bool {
    let is_soci = |entry: &Descriptor| entry.artifact_type.as_deref() == Some(INDEX_V2);
    let index: Result<ImageIndex, _> = serde_json::from_slice(index);
    index.is_ok_and(|index| index.manifests.iter().any(is_soci))
}
