//! Where the image is that a command works on, containerd included.
//!
//! A plain name means a registry. For `create` and `convert`, which nerdctl calls, it means an image of containerd if
//! one was named by a flag or by the environment, as it does for AWS's tool. `containerd:NAME` means that everywhere.

use std::time::Duration;

use soci_index::format::reference::{REGISTRY_SCHEME, Reference};
use soci_index::image::{ImageSource, PlatformImage};
use soci_index::registry::ClientOptions;

use crate::args::Global;
use crate::commands::{containerd, image};

/// How long containerd may take to say whether it has an image that was not named explicitly.
const CONTAINERD_PATIENCE: Duration = Duration::from_secs(2);

/// What a name means to the commands that AWS's tool has, too: a plain one means an image of containerd if one was
/// named.
#[must_use]
pub fn meant(reference: Reference, global: &Global) -> Reference {
    match reference {
        Reference::Registry(plain) if global.names_containerd() => Reference::Containerd { name: plain.to_string() },
        other => other,
    }
}

/// The options as if containerd had been named, where that of this machine has the image and nothing says that another
/// place is meant.
#[must_use]
pub fn here(name: &str, global: &Global) -> Option<Global> {
    let is_open = !global.names_containerd() && is_plain(name);
    let is_here = is_open && image::block_on(CONTAINERD_PATIENCE, containerd::image(name, global)).is_ok();
    is_here.then(|| Global { namespace: Some(global.containerd_namespace().to_owned()), ..global.clone() })
}

/// Whether a name says neither that it is in a registry, nor that it is elsewhere.
#[must_use]
pub fn is_plain(name: &str) -> bool {
    !name.starts_with(REGISTRY_SCHEME) && matches!(image::reference(name), Ok(Reference::Registry(_)))
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
