//! The documents of the image specification, as far as this crate reads them.
//!
//! These are views for reading. A document that was fetched is never written again from its view: the raw bytes travel
//! beside it, because its digest is the digest of those bytes and unknown fields belong to others. Reading is lenient
//! where Go's encoder is sloppy (`null` for an empty list or map) and strict about what is relied on: sizes are not
//! negative, digests are well formed.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::{Deserialize, Deserializer, Serialize};

use crate::format::digest::Digest;
use crate::format::encoding::is_foreign;
use crate::format::folded::Folded;
use crate::format::platform::Platform;

/// Media types.
pub mod media_type {
    /// OCI image manifest.
    pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
    /// OCI image index.
    pub const INDEX: &str = "application/vnd.oci.image.index.v1+json";
    /// Docker's image manifest.
    pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
    /// Docker's manifest list.
    pub const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
    /// OCI image configuration.
    pub const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
    /// Docker's image configuration.
    pub const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";

    /// Whether `text` is the type of a list of manifests.
    #[must_use]
    pub fn is_index(text: &str) -> bool {
        matches!(text, INDEX | DOCKER_LIST)
    }

    /// Whether `text` is the type of one image's manifest.
    #[must_use]
    pub fn is_manifest(text: &str) -> bool {
        matches!(text, MANIFEST | DOCKER_MANIFEST)
    }
}

/// Annotation keys of the image specification.
pub mod annotation {
    /// When something was made, by RFC 3339.
    pub const CREATED: &str = "org.opencontainers.image.created";
    /// A tag in index.json.
    pub const REF_NAME: &str = "org.opencontainers.image.ref.name";
    /// The full name that containerd adds to its exports.
    pub const CONTAINERD_NAME: &str = "io.containerd.image.name";
    /// Set by BuildKit on entries that are attestations.
    pub const DOCKER_REFERENCE_TYPE: &str = "vnd.docker.reference.type";
    /// Set beside it: the digest of the image manifest that the attestation is about.
    pub const DOCKER_REFERENCE_DIGEST: &str = "vnd.docker.reference.digest";
}

/// Points at content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What the content is.
    #[serde(default)]
    pub media_type: String,
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
    /// Notes.
    #[serde(default, deserialize_with = "null_is_default", skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// Where else the content may be obtained, for layers that registries need not have.
    #[serde(default, deserialize_with = "null_is_default", skip_serializing_if = "Vec::is_empty")]
    pub urls: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
    /// What kind of artifact it is; absent on images.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
}

impl Descriptor {
    /// Describes `content`.
    #[must_use]
    pub fn of(media_type: &str, content: &[u8]) -> Self {
        Self::new(media_type, Digest::of(content), content.len() as u64)
    }

    /// A descriptor with nothing but the three facts.
    #[must_use]
    pub fn new(media_type: &str, digest: Digest, size: u64) -> Self {
        Self {
            media_type: media_type.to_owned(),
            digest,
            size,
            annotations: BTreeMap::new(),
            urls: Vec::new(),
            platform: None,
            artifact_type: None,
        }
    }

    /// Whether the entry of an index may be an image: not an attestation, and not an artifact such as a SOCI manifest.
    #[must_use]
    pub fn may_be_image(&self) -> bool {
        let kind = self.artifact_type.as_deref().unwrap_or_default();
        let image = matches!(kind, "" | media_type::CONFIG | media_type::DOCKER_CONFIG);
        let attestation = self.annotations.contains_key(annotation::DOCKER_REFERENCE_TYPE);
        let known = !self.platform.as_ref().is_some_and(Platform::is_unknown);
        image && known && !attestation && (media_type::is_manifest(&self.media_type) || self.is_index())
    }

    /// Whether it is a layer that its registry need not have.
    #[must_use]
    pub fn is_foreign(&self) -> bool {
        !self.urls.is_empty() || is_foreign(&self.media_type)
    }

    /// Whether it points at a list of manifests.
    #[must_use]
    pub fn is_index(&self) -> bool {
        media_type::is_index(&self.media_type)
    }

    /// What kind of referrer this manifest's entry names, `""` when the entry leaves it out.
    #[must_use]
    pub fn kind(&self) -> &str {
        self.artifact_type.as_deref().unwrap_or_default()
    }
}

/// A manifest's raw bytes beside the facts about them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawManifest {
    /// Its media type, as the body says, else as the transport says.
    pub media_type: String,
    /// Digest of `bytes`, checked.
    pub digest: Digest,
    /// The document, byte for byte.
    pub bytes: Bytes,
}

impl RawManifest {
    /// Its descriptor, without platform or annotations.
    #[must_use]
    pub fn descriptor(&self) -> Descriptor {
        Descriptor::new(&self.media_type, self.digest, self.bytes.len() as u64)
    }
}

/// An image manifest, or an artifact's.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ImageManifest {
    /// Its own media type.
    #[serde(default)]
    pub media_type: String,
    /// Kind of artifact, when it says so itself.
    #[serde(default)]
    pub artifact_type: Option<String>,
    /// The configuration.
    pub config: Descriptor,
    /// The layers, lowest first.
    #[serde(default, deserialize_with = "null_is_default")]
    pub layers: Vec<Descriptor>,
    /// What it refers to.
    #[serde(default)]
    pub subject: Option<Descriptor>,
    /// Notes.
    #[serde(default, deserialize_with = "null_is_default")]
    pub annotations: BTreeMap<String, String>,
}

impl ImageManifest {
    /// The artifact type that the referrers API lists: its own, else the configuration's media type.
    #[must_use]
    pub fn kind(&self) -> &str {
        match self.artifact_type.as_deref() {
            Some(kind) if !kind.is_empty() => kind,
            _ => &self.config.media_type,
        }
    }

    /// Why it is no artifact of this `kind` that refers to `image`, if it is none. AWS's tools say the kind by the
    /// configuration's type alone; others may use the field that is made for it.
    pub(crate) fn check_referrer(&self, kind: &str, image: &Digest) -> Result<(), String> {
        if self.config.media_type != kind && self.kind() != kind {
            return Err(format!("it is {:?}", self.kind()));
        }
        match &self.subject {
            Some(subject) if subject.digest == *image => Ok(()),
            Some(subject) => Err(format!("it belongs to {}", subject.digest)),
            None => Err("it names no subject".to_owned()),
        }
    }
}

/// An image index (or Docker's manifest list).
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ImageIndex {
    /// Its own media type.
    #[serde(default)]
    pub media_type: String,
    /// The entries.
    #[serde(default, deserialize_with = "null_is_default")]
    pub manifests: Vec<Descriptor>,
    /// What it refers to.
    #[serde(default)]
    pub subject: Option<Descriptor>,
    /// Notes.
    #[serde(default, deserialize_with = "null_is_default")]
    pub annotations: BTreeMap<String, String>,
}

/// The part of an image configuration that matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageConfig {
    /// The platform it was built for.
    pub platform: Platform,
    /// Digests of the uncompressed layers, lowest first.
    pub diff_ids: Vec<Digest>,
}

impl<'de> Deserialize<'de> for ImageConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Raw {
            #[serde(default)]
            os: Option<String>,
            #[serde(default)]
            architecture: Option<String>,
            #[serde(default)]
            variant: Option<String>,
            rootfs: Folded<RootFs>,
        }
        #[derive(Deserialize)]
        struct RootFs {
            #[serde(default, deserialize_with = "null_is_default")]
            diff_ids: Vec<Digest>,
        }
        let Folded(raw) = Folded::<Raw>::deserialize(deserializer)?;
        let text = |field: &Option<String>| field.clone().unwrap_or_default();
        let platform = Platform::new(&text(&raw.os), &text(&raw.architecture), &text(&raw.variant));
        Ok(Self { platform, diff_ids: raw.rootfs.0.diff_ids })
    }
}

/// What a manifest says about itself, to distinguish an index from an image before reading the rest.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Probe {
    #[serde(default)]
    pub(crate) media_type: Option<String>,
    #[serde(default)]
    manifests: Option<serde::de::IgnoredAny>,
    #[serde(default)]
    config: Option<serde::de::IgnoredAny>,
}

impl Probe {
    /// The body's own media type; else `transport`'s, if it names a manifest; else a guess by the fields.
    pub(crate) fn media_type(&self, transport: &str) -> String {
        let own = self.media_type.as_deref().unwrap_or_default();
        if !own.is_empty() {
            return own.to_owned();
        }
        if media_type::is_index(transport) || media_type::is_manifest(transport) {
            return transport.to_owned();
        }
        match (&self.manifests, &self.config) {
            (Some(_), None) => media_type::INDEX.to_owned(),
            (None, Some(_)) => media_type::MANIFEST.to_owned(),
            _ => transport.to_owned(),
        }
    }
}

/// Go writes `null` where it has an empty slice or map.
pub(crate) fn null_is_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn null_and_absent_are_empty() {
        for text in [
            format!(r#"{{"config":{{"digest":"{HEX}","size":2}},"layers":null,"annotations":null}}"#),
            format!(r#"{{"config":{{"digest":"{HEX}","size":2}}}}"#),
        ] {
            let manifest: ImageManifest = serde_json::from_str(&text).unwrap();
            assert!(manifest.layers.is_empty() && manifest.annotations.is_empty());
        }
        for bad in [format!(r#"{{"config":{{"digest":"{HEX}","size":-1}}}}"#), r#"{"config":null}"#.into()] {
            assert!(serde_json::from_str::<ImageManifest>(&bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn configurations_as_go_reads_them() {
        for text in [
            format!(r#"{{"OS":"linux","Architecture":"amd64","RootFS":{{"Diff_IDs":["{HEX}"]}}}}"#),
            format!(r#"{{"os":"linux","architecture":"amd64","variant":null,"rootfs":{{"diff_ids":["{HEX}"]}}}}"#),
        ] {
            let config: ImageConfig = serde_json::from_str(&text).unwrap();
            let expected = (Platform::new("linux", "amd64", ""), vec![HEX.parse().unwrap()]);
            assert_eq!((config.platform, config.diff_ids), expected, "{text}");
        }
    }

    #[test]
    fn media_type_of_a_body() {
        for (body, transport, expected) in [
            (r#"{"mediaType":"a/b"}"#, media_type::INDEX, "a/b"),
            (r#"{"manifests":[]}"#, media_type::DOCKER_LIST, media_type::DOCKER_LIST),
            (r#"{"manifests":[]}"#, "application/json", media_type::INDEX),
            (r#"{"config":{}}"#, "text/plain", media_type::MANIFEST),
            (r"{}", "application/json", "application/json"),
        ] {
            let probe: Probe = serde_json::from_str(body).unwrap();
            assert_eq!(probe.media_type(transport), expected, "{body}");
        }
    }

    #[test]
    fn images_among_index_entries() {
        let mut entry = Descriptor::of(media_type::MANIFEST, b"");
        assert!(entry.may_be_image());
        entry.platform = Some(Platform::new("unknown", "unknown", ""));
        assert!(!entry.may_be_image());
        entry.platform = None;
        entry.artifact_type = Some("application/vnd.amazon.soci.index.v2+json".into());
        assert!(!entry.may_be_image());
        entry.artifact_type = None;
        entry.annotations.insert(annotation::DOCKER_REFERENCE_TYPE.into(), "attestation-manifest".into());
        assert!(!entry.may_be_image());
        assert!(!Descriptor::of("application/octet-stream", b"").may_be_image());
    }
}
