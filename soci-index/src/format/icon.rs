//! The icon of span indexes and start-up profiles, for registries that show one.
//!
//! Harbor shows the picture of an artifact that lists it as a layer with an annotation, and looks for it in no other
//! place. So the manifests of ours list it after all that is read of them. It is one blob, the same in every repository
//! and version of this program: manifests name its digest, and would be others with another picture. No reader of
//! indexes or profiles asks for it, since all of them go by media types and digests of what they know.

use crate::format::digest::Digest;
use crate::format::manifest::EMPTY_CONFIG;
use crate::format::model::{Descriptor, ImageManifest};

/// The picture: three layers of which parts are there. Part of the format.
pub const PNG: &[u8] = include_bytes!("icon.png");
pub(crate) const MEDIA_TYPE: &str = "image/png";
/// Annotation by which Harbor knows it; any value will do.
pub const ANNOTATION: &str = "io.goharbor.artifact.v1alpha1.icon";

/// The icon as a manifest lists it.
#[must_use]
pub(crate) fn descriptor() -> Descriptor {
    let mut descriptor = Descriptor::of(MEDIA_TYPE, PNG);
    descriptor.annotations.insert(ANNOTATION.to_owned(), String::new());
    descriptor
}

/// The blobs of a manifest of ours or of AWS's form that are the same everywhere, so that nothing need be read to have
/// them: the configuration, and the icon if it is listed.
pub(crate) fn constant_blobs(manifest: &[u8]) -> Vec<&'static [u8]> {
    let manifest: Result<ImageManifest, _> = serde_json::from_slice(manifest);
    let icon = Digest::of(PNG);
    let has_icon = manifest.is_ok_and(|manifest| manifest.layers.iter().any(|layer| layer.digest == icon));
    if has_icon { vec![EMPTY_CONFIG, PNG] } else { vec![EMPTY_CONFIG] }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Another picture would make another manifest of every index that there is.
    #[test]
    fn the_picture_stays_the_same() {
        assert!(PNG.starts_with(b"\x89PNG\r\n\x1a\n") && PNG.len() < 1000);
        let digest = "sha256:eef2a1886fea90b8c52ff956eaacc02b487d01b50aab4815c7f8256bb8b86f2c";
        assert_eq!(descriptor().digest.to_string(), digest);
    }
}
