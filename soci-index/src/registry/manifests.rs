//! Reading and writing manifests.
//!
//! A manifest is its bytes: what is fetched is kept and passed on byte for byte, and what is pushed is exactly what the
//! caller gives. Invariants: the digest of what is returned has been computed here, and equals the one asked for; no
//! more than [`crate::format::limits::Limits::manifest_bytes_max`] is read.

use bytes::Bytes;

use crate::format::digest::{Digest, Hasher};
use crate::format::model::{Probe, RawManifest, media_type};
use crate::format::reference::ManifestName;
use crate::registry::Repository;
use crate::registry::auth::Scopes;
use crate::registry::error::RegistryError;
use crate::registry::exchange::Call;
use crate::registry::failover::{HostedRepository, Need};
use crate::registry::retry::Deadline;
use crate::registry::transport::{Body, Method};

/// What a registry said when it took a manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PushedManifest {
    /// The manifest's digest, computed here.
    pub digest: Digest,
    /// The `OCI-Subject` of the answer: the registry says that it processed the manifest's subject.
    pub subject: Option<Digest>,
}

impl Repository {
    /// Reads a manifest of any kind; `None` when there is none.
    ///
    /// # Errors
    /// [`RegistryError`] when it cannot be read, is too large or is not what its digest says.
    pub async fn manifest(&self, name: &ManifestName) -> Result<Option<RawManifest>, RegistryError> {
        check_tag(self, name)?;
        let deadline = &self.deadline(0);
        self.first(Need::of(name), |place| async move { place.manifest(name, deadline).await }).await
    }

    /// Writes a manifest, by tag or by its digest. What it points at must be there already.
    ///
    /// # Errors
    /// [`RegistryError`] when the registry refuses it.
    pub async fn push_manifest(
        &self,
        name: &ManifestName,
        media_type: &str,
        bytes: Bytes,
    ) -> Result<PushedManifest, RegistryError> {
        check_tag(self, name)?;
        self.push_place()?.push_manifest(name, media_type, bytes).await
    }

    /// Deletes a manifest by its digest; whether it was there. Only for deletions that the user requested: nothing in
    /// this crate calls it by itself.
    ///
    /// # Errors
    /// [`RegistryError`] when the registry refuses it, as many do (405).
    pub async fn delete_manifest(&self, digest: &Digest) -> Result<bool, RegistryError> {
        self.push_place()?.delete_manifest(digest).await
    }
}

impl HostedRepository {
    /// Reads a manifest from this place.
    pub(crate) async fn manifest(
        &self,
        name: &ManifestName,
        deadline: &Deadline,
    ) -> Result<Option<RawManifest>, RegistryError> {
        let accept = [media_type::MANIFEST, media_type::INDEX, media_type::DOCKER_MANIFEST, media_type::DOCKER_LIST];
        let what = format!("manifest {name}");
        let call = Call {
            method: Method::Get,
            url: self.url(&format!("manifests/{name}")),
            headers: vec![("accept", accept.join(", ")), ("accept-encoding", "identity".to_owned())],
            body: Body::Empty,
            scopes: Scopes::pull(self.name()),
            what: what.clone(),
        };
        let mut retry = 0;
        loop {
            let answer = self.call(&call, deadline).await?;
            match answer.status() {
                200 => {}
                404 => return Ok(None),
                _ => return Err(self.status_error(answer, &what).await),
            }
            let transport_type = answer.response.media_type();
            let announced = answer.response.header("docker-content-digest").and_then(|text| text.parse().ok());
            match self.document(answer, &what, self.options().limits.manifest_bytes_max, deadline).await {
                Ok(bytes) => return self.checked(name, announced, &transport_type, bytes, &what).map(Some),
                // The body was cut: ask again.
                Err(error) if error.is_transient() => {
                    self.pause(&mut retry, None, &what, error, deadline).await?;
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn checked(
        &self,
        name: &ManifestName,
        announced: Option<Digest>,
        transport_type: &str,
        bytes: Bytes,
        what: &str,
    ) -> Result<RawManifest, RegistryError> {
        let expected = match name {
            ManifestName::Digest(digest) => Some(*digest),
            ManifestName::Tag(_) => announced,
        };
        let digest = expected.map_or_else(|| Digest::of(&bytes), |expected| digest_like(&expected, &bytes));
        if let Some(expected) = expected.filter(|expected| *expected != digest) {
            return Err(self.wrong_digest(what, expected, digest));
        }
        let probe: Probe = serde_json::from_slice(&bytes).map_err(|error| self.malformed(what, &error.to_string()))?;
        Ok(RawManifest { media_type: probe.media_type(transport_type), digest, bytes })
    }

    async fn delete_manifest(&self, digest: &Digest) -> Result<bool, RegistryError> {
        let what = format!("deleting manifest {digest}");
        let call = Call {
            method: Method::Delete,
            url: self.url(&format!("manifests/{digest}")),
            headers: Vec::new(),
            body: Body::Empty,
            scopes: Scopes::delete(self.name()),
            what: what.clone(),
        };
        let answer = self.call(&call, &self.deadline(0)).await?;
        match answer.status() {
            200 | 202 | 204 => Ok(true),
            404 => Ok(false),
            _ => Err(self.status_error(answer, &what).await),
        }
    }

    pub(crate) async fn push_manifest(
        &self,
        name: &ManifestName,
        media_type: &str,
        bytes: Bytes,
    ) -> Result<PushedManifest, RegistryError> {
        let what = format!("pushing manifest {name}");
        let digest = match name {
            ManifestName::Digest(expected) => {
                let digest = digest_like(expected, &bytes);
                if digest != *expected {
                    return Err(self.wrong_digest(&what, *expected, digest));
                }
                digest
            }
            ManifestName::Tag(_) => Digest::of(&bytes),
        };
        let call = Call {
            method: Method::Put,
            url: self.url(&format!("manifests/{name}")),
            headers: vec![("content-type", media_type.to_owned())],
            body: Body::Bytes(bytes),
            scopes: Scopes::push(self.name()),
            what: what.clone(),
        };
        let answer = self.call(&call, &self.deadline(call.body.len())).await?;
        // The Location of the answer is not read: some registries leave it out, and we know the name already.
        if !matches!(answer.status(), 200..=204) {
            return Err(self.status_error(answer, &what).await);
        }
        let stored: Option<Digest> = answer.response.header("docker-content-digest").and_then(|text| text.parse().ok());
        if let Some(stored) = stored.filter(|stored| stored.algorithm() == digest.algorithm() && *stored != digest) {
            return Err(self.wrong_digest(&what, digest, stored));
        }
        let subject = answer.response.header("oci-subject").and_then(|text| text.parse().ok());
        Ok(PushedManifest { digest, subject })
    }

    fn wrong_digest(&self, what: &str, expected: Digest, found: Digest) -> RegistryError {
        RegistryError::Digest {
            registry: self.host().to_owned(),
            repository: self.name().to_owned(),
            what: what.to_owned(),
            expected: Box::new(expected),
            found: found.to_string(),
        }
    }
}

/// A tag becomes part of a path: one with slashes and dots would lead elsewhere.
fn check_tag(repository: &Repository, name: &ManifestName) -> Result<(), RegistryError> {
    let ManifestName::Tag(tag) = name else { return Ok(()) };
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
    let starts = !tag.starts_with(['.', '-']);
    if starts && (1..=128).contains(&tag.len()) && tag.bytes().all(plain) {
        return Ok(());
    }
    Err(RegistryError::Malformed {
        registry: repository.registry().name().to_owned(),
        repository: repository.name().to_owned(),
        what: format!("manifest {name}"),
        reason: "this is no tag".to_owned(),
    })
}

/// The digest of `bytes` by the algorithm of `other`.
fn digest_like(other: &Digest, bytes: &[u8]) -> Digest {
    let mut hasher = Hasher::new(other.algorithm());
    hasher.update(bytes);
    hasher.finish()
}
