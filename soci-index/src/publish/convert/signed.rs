//! Protects a signed image from being replaced under its name by an unsigned one.
//!
//! A signature is of a digest, and conversion makes a new one: where only signed content may be pulled, the name would
//! be of no use any more. The same goes for a signature of one platform's manifest, which a policy may ask for instead:
//! a conversion changes that manifest, too. An image that was converted before is recognised: converting it again
//! usually changes nothing, which is known only when its documents are made. Any other is refused before a layer is
//! read.

use futures_util::{StreamExt as _, stream};

use crate::format::digest::Digest;
use crate::format::manifest::INDEX_V2;
use crate::format::model::{Descriptor, ImageIndex, RawManifest};
use crate::format::reference::ManifestName;
use crate::publish::PublishError;
use crate::publish::convert::destination::Target;
use crate::registry::{RegistryError, Repository};
use crate::trust::fetch;

/// Manifests of an index that are looked at. Stops an index of thousands from holding up a conversion.
const CHILDREN_MAX: usize = 64;
/// Manifests that are asked about at the same time.
const PARALLEL: usize = 8;

/// Why the image that has the target's name now must not be replaced by another one; `None` if it may.
///
/// # Errors
/// The same, if it will be replaced by another one for certain.
pub(super) async fn find(target: &Target) -> Result<Option<PublishError>, PublishError> {
    let Some((repository, tag)) = target.tagged() else { return Ok(None) };
    // An unreadable image cannot be pulled anyway; if it matters, reading the source fails, too.
    let Ok(Some(there)) = repository.manifest(&ManifestName::Tag(tag.to_owned())).await else { return Ok(None) };
    let signatures = match signatures(repository, &there).await {
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

/// The signatures of an image: of its own manifest, or if there is none, of those that its index lists.
async fn signatures(repository: &Repository, image: &RawManifest) -> Result<Vec<String>, RegistryError> {
    let own = fetch::present(repository, &image.digest).await;
    if own.as_ref().is_ok_and(|own| !own.is_empty()) {
        return own;
    }
    // A place that cannot be asked for the one may well answer for the other: cosign's tags are no list.
    let index: Result<ImageIndex, _> = serde_json::from_slice(&image.bytes);
    let listed = index.map(|index| index.manifests).unwrap_or_default();
    let children = listed.iter().filter(|entry| entry.may_be_image()).take(CHILDREN_MAX);
    let of_child = |child: Digest| async move {
        let found = fetch::present(repository, &child).await?;
        Ok::<_, RegistryError>(
            found.into_iter().map(|one| format!("{one}, of its manifest {child}")).collect::<Vec<_>>(),
        )
    };
    let asking: Vec<_> = children.map(|child| of_child(child.digest)).collect();
    let mut asked = stream::iter(asking).buffered(PARALLEL);
    let mut failed = own.err();
    while let Some(of_child) = asked.next().await {
        match of_child {
            Ok(found) if !found.is_empty() => return Ok(found),
            Ok(_) => {}
            Err(error) => failed = failed.or(Some(error)),
        }
    }
    failed.map_or_else(|| Ok(Vec::new()), Err)
}

/// Whether an image index is that of an image that was converted.
pub(super) fn is_converted(index: &[u8]) -> bool {
    let is_soci = |entry: &Descriptor| entry.artifact_type.as_deref() == Some(INDEX_V2);
    let index: Result<ImageIndex, _> = serde_json::from_slice(index);
    index.is_ok_and(|index| index.manifests.iter().any(is_soci))
}
