//! What a snapshot's labels say about the layer that is wanted.
//!
//! Labels come from image annotations and from flags of clients, so they are untrusted input: a reference that names
//! anything but a registry is refused (so that no label can open local files), digests are parsed, lists are not
//! trusted at all. Their names are the contract of containerd and of AWS's snapshotter.

use std::collections::BTreeMap;

use soci_index::format::class::{Class, Classified};
use soci_index::format::digest::{Digest, DigestError};
use soci_index::format::reference::{Reference, ReferenceError, RegistryReference};

/// The image as it was pulled.
pub const IMAGE: &str = "containerd.io/snapshot/cri.image-ref";
/// Digest of the manifest of this platform.
pub const MANIFEST: &str = "containerd.io/snapshot/cri.manifest-digest";
/// Digest of the layer blob.
pub const LAYER: &str = "containerd.io/snapshot/cri.layer-digest";
/// An index that the client insists on; empty when it does not.
pub const INDEX: &str = "containerd.io/snapshot/remote/soci.index.digest";

/// Before the name of a header that the client wants to be sent to the registry.
pub const HEADER: &str = "containerd.io/snapshot/remote/soci.header.";

/// The layer that is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WantedLayer {
    pub image: RegistryReference,
    pub manifest: Digest,
    pub layer: Digest,
    /// The index to use, and no other.
    pub index: Option<Digest>,
    /// Headers that the client wants to be sent to the registry, whether or not that is allowed.
    pub headers: BTreeMap<String, String>,
}

/// Why labels do not name a layer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LabelError {
    /// A label is not there: the client does not pass image annotations on.
    #[error("the label {label} is missing; containerd must be configured to pass image annotations to snapshotters")]
    Missing { label: &'static str },
    /// A digest is not well formed.
    #[error("the label {label}: {cause}")]
    Digest { label: &'static str, cause: DigestError },
    /// The image's name is not well formed.
    #[error("the label {IMAGE}: {0}")]
    Reference(#[from] ReferenceError),
    /// The image's name is one of a local directory or file.
    #[error("the label {IMAGE} names no image in a registry: {text:?}")]
    NotRemote {
        /// What it says, cut at 300 characters.
        text: String,
    },
}

impl Classified for LabelError {
    fn class(&self) -> Class {
        Class::Usage
    }
}

impl WantedLayer {
    /// Reads the labels.
    ///
    /// # Errors
    /// [`LabelError`].
    pub fn of(labels: &BTreeMap<String, String>) -> Result<Self, LabelError> {
        let text = |label| labels.get(label).filter(|text| !text.is_empty()).ok_or(LabelError::Missing { label });
        let digest = |label| -> Result<Digest, LabelError> {
            text(label)?.parse().map_err(|cause| LabelError::Digest { label, cause })
        };
        let image = match text(IMAGE)?.parse()? {
            Reference::Registry(image) => image,
            Reference::Layout { .. }
            | Reference::Archive { .. }
            | Reference::Saved { .. }
            | Reference::Containerd { .. } => {
                return Err(LabelError::NotRemote { text: text(IMAGE)?.chars().take(300).collect() });
            }
        };
        let index = match digest(INDEX) {
            Ok(index) => Some(index),
            Err(LabelError::Missing { .. }) => None,
            Err(error) => return Err(error),
        };
        let header = |(label, value): (&String, &String)| Some((label.strip_prefix(HEADER)?.to_owned(), value.clone()));
        let headers = labels.iter().filter_map(header).collect();
        Ok(Self { image, manifest: digest(MANIFEST)?, layer: digest(LAYER)?, index, headers })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(changes: &[(&str, &str)]) -> BTreeMap<String, String> {
        let good = [
            (IMAGE, "registry.example/team/app:v1".to_owned()),
            (MANIFEST, Digest::of(b"manifest").to_string()),
            (LAYER, Digest::of(b"layer").to_string()),
            (INDEX, String::new()),
        ];
        let mut labels: BTreeMap<String, String> = good.map(|(key, value)| (key.to_owned(), value)).into();
        labels.extend(changes.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())));
        labels
    }

    #[test]
    fn a_layer_is_named() {
        let wanted = WantedLayer::of(&labels(&[])).unwrap();
        assert_eq!((wanted.image.registry(), wanted.image.repository()), ("registry.example", "team/app"));
        assert_eq!((wanted.manifest, wanted.layer), (Digest::of(b"manifest"), Digest::of(b"layer")));
        assert_eq!(wanted.index, None);
        let index = Digest::of(b"index");
        assert_eq!(WantedLayer::of(&labels(&[(INDEX, &index.to_string())])).unwrap().index, Some(index));
        let traced = WantedLayer::of(&labels(&[("containerd.io/snapshot/remote/soci.header.x-request-id", "7")]));
        assert_eq!(traced.unwrap().headers, [("x-request-id".to_owned(), "7".to_owned())].into());
    }

    #[test]
    fn strangers_are_not_trusted() {
        for label in [IMAGE, MANIFEST, LAYER] {
            assert_eq!(WantedLayer::of(&labels(&[(label, "")])), Err(LabelError::Missing { label }));
        }
        for label in [MANIFEST, LAYER, INDEX] {
            let refused = WantedLayer::of(&labels(&[(label, "sha256:../../etc/passwd")]));
            assert!(matches!(refused, Err(LabelError::Digest { label: named, .. }) if named == label), "{refused:?}");
        }
        for name in ["oci:/etc", "oci-archive:/etc/shadow"] {
            assert!(matches!(WantedLayer::of(&labels(&[(IMAGE, name)])), Err(LabelError::NotRemote { .. })), "{name}");
        }
        assert!(matches!(WantedLayer::of(&labels(&[(IMAGE, "a b")])), Err(LabelError::Reference(_))));
    }
}
