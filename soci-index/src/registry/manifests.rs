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
use crate::registry::error::RegistryError;
use crate::registry::exchange::{Call, Retries};
use crate::registry::failover::HostedRepository;
use crate::registry::need::Need;
use crate::registry::retry::Deadline;
use crate::registry::scopes::Scopes;
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
        self.first(Need::of(name), |hosted| async move { Manifests(&hosted).get(name, deadline).await }).await
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
        Manifests(&self.push_host()?).put(name, media_type, bytes).await
    }

    /// Deletes a manifest by its digest; whether it was there. Only for deletions that the user requested: nothing in
    /// this crate calls it by itself.
    ///
    /// # Errors
    /// [`RegistryError`] when the registry refuses it, as many do (405).
    pub async fn delete_manifest(&self, digest: &Digest) -> Result<bool, RegistryError> {
        Manifests(&self.push_host()?).delete(digest).await
    }
}

/// The manifests of a repository on one host.
pub(crate) struct Manifests<'a>(pub(crate) &'a HostedRepository);

impl Manifests<'_> {
    fn call(&self, method: Method, name: &ManifestName, scopes: Scopes, what: String) -> Call {
        Call::new(method, self.0.url(&format!("manifests/{name}")), scopes, what)
    }

    pub(crate) async fn get(
        &self,
        name: &ManifestName,
        deadline: &Deadline,
    ) -> Result<Option<RawManifest>, RegistryError> {
        let accept = [media_type::MANIFEST, media_type::INDEX, media_type::DOCKER_MANIFEST, media_type::DOCKER_LIST];
        let call = self.call(Method::Get, name, Scopes::pull(self.0.name()), format!("manifest {name}"));
        let call = call.with_header("accept", accept.join(", ")).with_header("accept-encoding", "identity");
        let mut retries = Retries::new(self.0, &call.what, deadline);
        loop {
            let answer = self.0.call(&call, deadline).await?;
            match answer.status() {
                200 => {}
                404 => return Ok(None),
                _ => return Err(answer.error().await),
            }
            let transport_type = answer.response.media_type();
            let announced = answer.header("docker-content-digest").and_then(|text| text.parse().ok());
            match answer.document().await {
                Ok(bytes) => return self.checked(name, announced, &transport_type, bytes, &call.what).map(Some),
                // The body was cut: ask again.
                Err(error) if error.is_transient() => retries.after(error, None).await?,
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
        let probe: Probe = serde_json::from_slice(&bytes).map_err(|error| self.0.malformed(what, error))?;
        Ok(RawManifest { media_type: probe.media_type(transport_type), digest, bytes })
    }

    async fn delete(&self, digest: &Digest) -> Result<bool, RegistryError> {
        let (name, what) = (ManifestName::Digest(*digest), format!("deleting manifest {digest}"));
        let call = self.call(Method::Delete, &name, Scopes::delete(self.0.name()), what);
        let deadline = self.0.deadline(0);
        let answer = self.0.call(&call, &deadline).await?;
        match answer.status() {
            200 | 202 | 204 => Ok(true),
            404 => Ok(false),
            _ => Err(answer.error().await),
        }
    }

    pub(crate) async fn put(
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
        let call = self.call(Method::Put, name, Scopes::push(self.0.name()), what);
        let call = call.with_header("content-type", media_type).with_body(Body::Bytes(bytes));
        let deadline = self.0.deadline(call.body.len());
        let answer = self.0.call(&call, &deadline).await?;
        // The Location of the answer is not read: some registries leave it out, and we know the name already.
        if !matches!(answer.status(), 200..=204) {
            return Err(answer.error().await);
        }
        let stored: Option<Digest> = answer.header("docker-content-digest").and_then(|text| text.parse().ok());
        if let Some(stored) = stored.filter(|stored| stored.algorithm() == digest.algorithm() && *stored != digest) {
            return Err(self.wrong_digest(&call.what, digest, stored));
        }
        let subject = answer.header("oci-subject").and_then(|text| text.parse().ok());
        Ok(PushedManifest { digest, subject })
    }

    fn wrong_digest(&self, what: &str, expected: Digest, found: Digest) -> RegistryError {
        let ((registry, repository), expected) = (self.0.names(), Box::new(expected));
        RegistryError::Digest { registry, repository, what: what.to_owned(), expected, found: found.to_string() }
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
