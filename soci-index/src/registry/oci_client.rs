//! For programs that use the `oci-client` crate: its references, credentials and manifests in place of ours, and ours in
//! place of its.
//!
//! With the feature `oci-client`. The registry client of this crate stays its own, because lazy reading depends on what
//! `oci-client` hides: whether a range was honoured, where a redirect led, which host answered. A program that moves the
//! bytes with its own client needs [`crate::indexing`] and [`crate::format`] alone; `examples/src/bin/with_oci_client.rs`
//! shows that.

use ::oci_client::manifest::{OciDescriptor, OciImageManifest};
use ::oci_client::secrets::RegistryAuth;

use crate::format::digest::{Digest, DigestError};
use crate::format::model::{Descriptor, ImageManifest};
use crate::format::reference::{ReferenceError, RegistryReference};
use crate::registry::credentials::{CredentialSource, Secret};

/// Why a value of `oci-client` has no counterpart here.
#[derive(Debug, thiserror::Error)]
pub enum ConversionError {
    /// Not a digest, or of an algorithm that is not known here.
    #[error("{digest}: {source}")]
    Digest {
        /// As it stands there.
        digest: String,
        /// What is wrong with it.
        source: DigestError,
    },
    /// The size of a descriptor is negative.
    #[error("{digest} has the size {size}")]
    Size {
        /// Of the descriptor.
        digest: String,
        /// As it stands there.
        size: i64,
    },
    /// An access token is good for one repository and some minutes: this crate fetches its own.
    #[error("a bearer token cannot be used: give a user name and a password, or an identity token")]
    Bearer,
}

impl TryFrom<&::oci_client::Reference> for RegistryReference {
    type Error = ReferenceError;

    fn try_from(reference: &::oci_client::Reference) -> Result<Self, ReferenceError> {
        reference.whole().parse()
    }
}

impl From<&RegistryReference> for ::oci_client::Reference {
    /// By its constructors, which cost nothing: its parser compiles a regular expression first.
    fn from(reference: &RegistryReference) -> Self {
        let (registry, repository) = (reference.registry().to_owned(), reference.repository().to_owned());
        let tag = reference.tag().map(str::to_owned);
        match (tag, reference.digest().map(|digest| digest.to_string())) {
            (Some(tag), Some(digest)) => Self::with_tag_and_digest(registry, repository, tag, digest),
            (None, Some(digest)) => Self::with_digest(registry, repository, digest),
            (Some(tag), None) => Self::with_tag(registry, repository, tag),
            (None, None) => Self::with_tag(registry, repository, "latest".to_owned()),
        }
    }
}

impl TryFrom<&RegistryAuth> for CredentialSource {
    type Error = ConversionError;

    fn try_from(auth: &RegistryAuth) -> Result<Self, ConversionError> {
        match auth {
            RegistryAuth::Anonymous => Ok(Self::Anonymous),
            RegistryAuth::Basic(user, password) => {
                Ok(Self::Password { user: user.clone(), password: Secret::new(password) })
            }
            RegistryAuth::Bearer(_) => Err(ConversionError::Bearer),
        }
    }
}

impl TryFrom<&OciDescriptor> for Descriptor {
    type Error = ConversionError;

    fn try_from(descriptor: &OciDescriptor) -> Result<Self, ConversionError> {
        let digest = || descriptor.digest.clone();
        let parsed: Digest =
            descriptor.digest.parse().map_err(|source| ConversionError::Digest { digest: digest(), source })?;
        let size = u64::try_from(descriptor.size)
            .map_err(|_| ConversionError::Size { digest: digest(), size: descriptor.size })?;
        Ok(Self {
            annotations: descriptor.annotations.clone().unwrap_or_default(),
            urls: descriptor.urls.clone().unwrap_or_default(),
            artifact_type: descriptor.artifact_type.clone(),
            ..Self::new(&descriptor.media_type, parsed, size)
        })
    }
}

impl From<&Descriptor> for OciDescriptor {
    /// Of a size that only unsigned numbers hold, the largest signed one is left: no blob has it.
    fn from(descriptor: &Descriptor) -> Self {
        Self {
            media_type: descriptor.media_type.clone(),
            digest: descriptor.digest.to_string(),
            size: i64::try_from(descriptor.size).unwrap_or(i64::MAX),
            urls: (!descriptor.urls.is_empty()).then(|| descriptor.urls.clone()),
            annotations: (!descriptor.annotations.is_empty()).then(|| descriptor.annotations.clone()),
            artifact_type: descriptor.artifact_type.clone(),
        }
    }
}

impl TryFrom<&OciImageManifest> for ImageManifest {
    type Error = ConversionError;

    fn try_from(manifest: &OciImageManifest) -> Result<Self, ConversionError> {
        Ok(Self {
            media_type: manifest.media_type.clone().unwrap_or_default(),
            artifact_type: manifest.artifact_type.clone(),
            config: (&manifest.config).try_into()?,
            layers: manifest.layers.iter().map(Descriptor::try_from).collect::<Result<_, _>>()?,
            subject: manifest.subject.as_ref().map(Descriptor::try_from).transpose()?,
            annotations: manifest.annotations.clone().unwrap_or_default(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn references() {
        let digest = format!("sha256:{HEX}");
        for text in [
            "docker.io/library/debian:latest".to_owned(),
            "localhost:5000/team/app:v1".to_owned(),
            format!("[::1]:5000/a/b/c@{digest}"),
            format!("r.example/a:v1@{digest}"),
        ] {
            let ours: RegistryReference = text.parse().unwrap();
            let theirs = ::oci_client::Reference::from(&ours);
            assert_eq!(theirs.whole(), text);
            assert_eq!(RegistryReference::try_from(&theirs).unwrap(), ours);
        }
        let other = ::oci_client::Reference::with_digest("h".into(), "a".into(), format!("md5:{}", &HEX[..32]));
        assert!(RegistryReference::try_from(&other).is_err());
    }

    #[test]
    fn logins() {
        assert!(matches!(CredentialSource::try_from(&RegistryAuth::Anonymous), Ok(CredentialSource::Anonymous)));
        let basic = CredentialSource::try_from(&RegistryAuth::Basic("me".into(), "pw".into())).unwrap();
        assert!(
            matches!(&basic, CredentialSource::Password { user, password } if user == "me" && password.expose() == "pw")
        );
        let bearer = CredentialSource::try_from(&RegistryAuth::Bearer("secret".into())).unwrap_err();
        assert!(!bearer.to_string().contains("secret"), "{bearer}");
    }

    #[test]
    fn manifests() {
        let json = format!(
            r#"{{"schemaVersion":2,"mediaType":"m","artifactType":"a","config":{{"mediaType":"c","digest":"sha256:{HEX}","size":2}},
            "layers":[{{"mediaType":"l","digest":"sha256:{HEX}","size":3,"urls":["https://u"],"annotations":{{"k":"v"}}}}],
            "subject":{{"mediaType":"s","digest":"sha256:{HEX}","size":4}},"annotations":{{"x":"y"}}}}"#
        );
        let theirs: OciImageManifest = serde_json::from_str(&json).unwrap();
        let ours: ImageManifest = serde_json::from_str(&json).unwrap();
        assert_eq!(ImageManifest::try_from(&theirs).unwrap(), ours);
        let back = OciDescriptor::from(&ours.layers[0]);
        assert_eq!(Descriptor::try_from(&back).unwrap(), ours.layers[0]);
        for (digest, size) in [("sha256:0", 1), ("", 1), (&*format!("sha256:{HEX}"), -1)] {
            let wrong = OciDescriptor { digest: digest.to_owned(), size, ..OciDescriptor::default() };
            assert!(Descriptor::try_from(&wrong).is_err(), "{wrong}");
        }
    }
}
