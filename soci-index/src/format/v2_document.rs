//! Image indexes and manifests as documents that are written again.
//!
//! Elsewhere a fetched document is never encoded again. Making a SOCI-enabled image is the exception: its manifests get
//! an annotation. AWS's tool decodes them into the structs of the image specification's Go package and encodes those,
//! so that key order, escapes and omissions are that package's; fields it does not know are lost. The same is done
//! here, from structs in the same order, because the result is compared byte for byte. Nothing is interpreted that need
//! not be: sizes, digests and platforms of entries that stay are passed on as they are.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::format::digest::Digest;
use crate::format::gojson;
use crate::format::model::{media_type, null_is_default};

/// Notes, by key. Go sorts them when it writes.
pub(crate) type Annotations = BTreeMap<String, String>;

/// Points at content, with every field that the specification's Go package has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ManifestEntry {
    /// What the content is.
    #[serde(default)]
    pub media_type: String,
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
    /// Where else it can be obtained.
    #[serde(default, deserialize_with = "null_is_default", skip_serializing_if = "Vec::is_empty")]
    pub urls: Vec<String>,
    /// Notes.
    #[serde(default, deserialize_with = "null_is_default", skip_serializing_if = "Annotations::is_empty")]
    pub annotations: Annotations,
    /// The content itself, in base64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<EntryPlatform>,
    /// What kind of artifact it is.
    #[serde(default, deserialize_with = "null_is_default", skip_serializing_if = "String::is_empty")]
    pub artifact_type: String,
}

/// A platform as an index writes it, not normalised.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EntryPlatform {
    /// The processor.
    #[serde(default)]
    pub architecture: String,
    /// The operating system.
    #[serde(default)]
    pub os: String,
    #[serde(rename = "os.version", default, skip_serializing_if = "String::is_empty")]
    pub os_version: String,
    /// What it must have.
    #[serde(
        rename = "os.features",
        default,
        deserialize_with = "null_is_default",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub os_features: Vec<String>,
    /// The processor's variant.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub variant: String,
}

/// An image index.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Index {
    #[serde(default)]
    schema_version: i64,
    /// Its own media type.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub media_type: String,
    #[serde(default, deserialize_with = "null_is_default", skip_serializing_if = "String::is_empty")]
    artifact_type: String,
    /// The entries.
    #[serde(default, deserialize_with = "null_is_default")]
    pub manifests: Vec<ManifestEntry>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    subject: Option<ManifestEntry>,
    #[serde(default, deserialize_with = "null_is_default", skip_serializing_if = "Annotations::is_empty")]
    annotations: Annotations,
}

/// An image manifest, or one of an attestation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Manifest {
    #[serde(default)]
    schema_version: i64,
    /// Its own media type.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub media_type: String,
    #[serde(default, deserialize_with = "null_is_default", skip_serializing_if = "String::is_empty")]
    artifact_type: String,
    /// The configuration.
    pub config: ManifestEntry,
    /// The layers, lowest first. Go distinguishes an absent list (`null`) from an empty one.
    #[serde(default)]
    pub layers: Option<Vec<ManifestEntry>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    subject: Option<ManifestEntry>,
    /// Notes.
    #[serde(default, deserialize_with = "null_is_default", skip_serializing_if = "Annotations::is_empty")]
    pub annotations: Annotations,
}

impl ManifestEntry {
    /// An entry with nothing but the three facts.
    #[must_use]
    pub(crate) fn new(media_type: &str, digest: Digest, size: u64) -> Self {
        Self {
            media_type: media_type.to_owned(),
            digest,
            size,
            urls: Vec::new(),
            annotations: Annotations::new(),
            data: None,
            platform: None,
            artifact_type: String::new(),
        }
    }
}

impl Index {
    /// An index of these entries.
    #[must_use]
    pub fn of(manifests: Vec<ManifestEntry>) -> Self {
        Self {
            schema_version: 2,
            media_type: media_type::INDEX.to_owned(),
            artifact_type: String::new(),
            manifests,
            subject: None,
            annotations: Annotations::new(),
        }
    }

    /// Reads one.
    ///
    /// # Errors
    /// When it is not such JSON.
    pub fn parse(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(bytes)
    }

    /// The document.
    #[must_use]
    pub(crate) fn to_json(&self) -> Vec<u8> {
        gojson::encode(self)
    }
}

impl Manifest {
    /// Reads one.
    ///
    /// # Errors
    /// When it is not such JSON.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(bytes)
    }

    /// Whether it is an image's or an attestation's, by the type of its configuration.
    #[must_use]
    pub(crate) fn has_image_config(&self) -> bool {
        matches!(self.config.media_type.as_str(), "" | media_type::CONFIG | media_type::DOCKER_CONFIG)
    }

    /// The document.
    #[must_use]
    pub(crate) fn to_json(&self) -> Vec<u8> {
        gojson::encode(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    /// Every known field, in another order than the specification's, and one that is unknown.
    #[test]
    fn key_order_is_that_of_the_go_package() {
        let text = format!(
            r#"{{"x":1,"annotations":{{"b":"<","a":"1"}},"manifests":[{{"artifactType":"a/t","platform":{{"variant":"v8","os.features":["f"],"os.version":"1","os":"linux","architecture":"arm64"}},"data":"eA==","annotations":{{"k":"v"}},"urls":["u"],"size":1,"digest":"{HEX}","mediaType":"m"}}],"mediaType":"i","schemaVersion":2}}"#
        );
        let expected = format!(
            r#"{{"schemaVersion":2,"mediaType":"i","manifests":[{{"mediaType":"m","digest":"{HEX}","size":1,"urls":["u"],"annotations":{{"k":"v"}},"data":"eA==","platform":{{"architecture":"arm64","os":"linux","os.version":"1","os.features":["f"],"variant":"v8"}},"artifactType":"a/t"}}],"annotations":{{"a":"1","b":"\u003c"}}}}"#
        );
        assert_eq!(String::from_utf8(Index::parse(text.as_bytes()).unwrap().to_json()).unwrap(), expected);
    }

    #[test]
    fn lists_that_are_absent_and_empty() {
        let manifest = |layers: &str| {
            format!(r#"{{"schemaVersion":2,"config":{{"mediaType":"c","digest":"{HEX}","size":2}}{layers}}}"#)
        };
        for (given, written) in [
            ("", r#","layers":null"#),
            (r#","layers":null"#, r#","layers":null"#),
            (r#","layers":[]"#, r#","layers":[]"#),
        ] {
            let json = Manifest::parse(manifest(given).as_bytes()).unwrap().to_json();
            assert_eq!(String::from_utf8(json).unwrap(), manifest(written));
        }
        for bad in ["{}", "[]", r#"{"config":{"digest":"x","size":1}}"#] {
            assert!(Manifest::parse(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
