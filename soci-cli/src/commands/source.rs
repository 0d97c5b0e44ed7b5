//! Where the image is that a command works on, containerd included.
//!
//! A plain name means a registry. For `create` and `convert`, which nerdctl calls, it means an image of containerd if
//! one was named by a flag or by the environment, as it does for AWS's tool. `containerd:NAME` means that everywhere.

use soci_index::format::reference::Reference;
use soci_index::image::{ImageSource, PlatformImage};
use soci_index::registry::ClientOptions;

use crate::args::Global;
use crate::commands::containerd;

/// What a name means to the commands that AWS's tool has, too: a plain one means an image of containerd if one was
/// named.
#[must_use]
pub fn meant(reference: Reference, global: &Global) -> Reference {
    match reference {
        Reference::Registry(plain) if global.names_containerd() => Reference::Containerd { name: plain.to_string() },
        other => other,
    }
}

/// Opens the image that `reference` names.
///
/// # Errors
/// When it is not there, or its place cannot be reached.
pub async fn open(reference: &Reference, options: &ClientOptions, global: &Global) -> anyhow::Result<ImageSource> {
    match reference {
        Reference::Containerd { name } => Ok(ImageSource::foreign(containerd::image(name, global).await?)),
        other => Ok(ImageSource::open(other, options).await?),
    }
}

/// The image as the local index store calls it: an image of containerd by its name alone, as users know it.
#[must_use]
pub fn name(reference: &Reference) -> String {
    match reference {
        Reference::Containerd { name } => name.clone(),
        other => other.to_string(),
    }
}

/// What one should know of an index of these images before it is made.
#[must_use]
pub fn caveat(reference: &Reference, source: &ImageSource, images: &[PlatformImage]) -> Option<String> {
    let Reference::Saved { .. } = reference else { return None };
    let is_plain = |image: &PlatformImage| image.manifest.layers.iter().any(|layer| layer.media_type.ends_with(".tar"));
    let digests = || images.iter().map(|image| image.descriptor.digest.to_string()).collect::<Vec<_>>().join(", ");
    let fits = "layers here are not those of the registry; the index will fit only the image pushed from this archive \
                with the same bytes";
    if source.has_made_manifest() {
        Some(format!("{reference}: {fits}. The archive has no manifest of its own: {} was made from it", digests()))
    } else if images.iter().any(is_plain) {
        Some(format!("{reference}: {fits}: its layers are not compressed. Its manifest is {}", digests()))
    } else {
        None
    }
}
