//! What the demonstration's registry holds.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use serde_json::{Value, json};
use soci_index::format::digest::{Digest, Hasher};
use soci_index::format::model::{Descriptor, ImageIndex, ImageManifest, media_type};

/// Why a request is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Failure {
    #[error("there is nothing here")]
    Unknown,
    #[error("this is not supported")]
    Unsupported,
    #[error("unknown repository")]
    NameUnknown,
    #[error("unknown blob")]
    BlobUnknown,
    #[error("unknown manifest")]
    ManifestUnknown,
    #[error("the manifest needs something that is not here")]
    ManifestBlobUnknown,
    #[error("the manifest cannot be read")]
    ManifestInvalid,
    #[error("unknown upload")]
    UploadUnknown,
    #[error("the digest is malformed, or not that of the content")]
    BadDigest,
    #[error("the content is too large")]
    TooLarge,
}

impl Failure {
    /// Status and error code by the specification.
    pub(super) fn status(self) -> (u16, &'static str) {
        match self {
            Self::Unknown => (404, "NOT_FOUND"),
            Self::Unsupported => (405, "UNSUPPORTED"),
            Self::NameUnknown => (404, "NAME_UNKNOWN"),
            Self::BlobUnknown => (404, "BLOB_UNKNOWN"),
            Self::ManifestUnknown => (404, "MANIFEST_UNKNOWN"),
            Self::ManifestBlobUnknown => (400, "MANIFEST_BLOB_UNKNOWN"),
            Self::ManifestInvalid => (400, "MANIFEST_INVALID"),
            Self::UploadUnknown => (404, "BLOB_UPLOAD_UNKNOWN"),
            Self::BadDigest => (400, "DIGEST_INVALID"),
            Self::TooLarge => (413, "SIZE_INVALID"),
        }
    }
}

#[derive(Debug, Clone)]
pub(super) struct Manifest {
    pub(super) media_type: String,
    pub(super) digest: Digest,
    pub(super) bytes: Bytes,
}

impl Manifest {
    pub(super) fn of(media_type: String, bytes: Bytes) -> Self {
        Self { media_type, digest: Digest::of(&bytes), bytes }
    }
}

/// A manifest that was taken.
pub(super) struct Stored {
    pub(super) digest: Digest,
    pub(super) subject: Option<Digest>,
}

/// Everything.
#[derive(Debug, Default)]
pub(super) struct RegistryState(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    blobs: HashMap<Digest, Bytes>,
    repositories: HashMap<String, Contents>,
    uploads: HashMap<String, BytesMut>,
    uploads_begun: u64,
}

#[derive(Debug, Default)]
struct Contents {
    blobs: BTreeSet<Digest>,
    manifests: BTreeMap<Digest, Manifest>,
    tags: BTreeMap<String, Digest>,
    /// Subject and entry, in the order of arrival.
    referrers: Vec<(Digest, Descriptor)>,
}

impl RegistryState {
    pub(super) fn blob(&self, name: &str, digest: &Digest) -> Result<Bytes, Failure> {
        let inner = self.0.lock();
        let contents = inner.repositories.get(name).ok_or(Failure::NameUnknown)?;
        let found = contents.blobs.get(digest).and_then(|digest| inner.blobs.get(digest));
        found.cloned().ok_or(Failure::BlobUnknown)
    }

    pub(super) fn manifest(&self, name: &str, reference: &str) -> Result<Manifest, Failure> {
        let inner = self.0.lock();
        let contents = inner.repositories.get(name).ok_or(Failure::NameUnknown)?;
        let digest = reference.parse().ok().or_else(|| contents.tags.get(reference).copied());
        digest.and_then(|digest| contents.manifests.get(&digest)).cloned().ok_or(Failure::ManifestUnknown)
    }

    pub(super) fn tags(&self, name: &str) -> Result<Vec<String>, Failure> {
        let inner = self.0.lock();
        let contents = inner.repositories.get(name).ok_or(Failure::NameUnknown)?;
        Ok(contents.tags.keys().cloned().collect())
    }

    /// The list that the referrers API answers with.
    pub(super) fn referrers(&self, name: &str, subject: &Digest, kind: Option<&str>) -> Value {
        let inner = self.0.lock();
        let all = inner.repositories.get(name).map(|contents| contents.referrers.as_slice()).unwrap_or_default();
        let matching = all.iter().filter(|(of, entry)| of == subject && kind.is_none_or(|kind| entry.kind() == kind));
        let entries: Vec<&Descriptor> = matching.map(|(_, entry)| entry).collect();
        json!({"schemaVersion": 2, "mediaType": media_type::INDEX, "manifests": entries})
    }

    pub(super) fn put_manifest(&self, name: &str, reference: &str, manifest: Manifest) -> Result<Stored, Failure> {
        let tag = match reference.parse::<Digest>() {
            Ok(digest) if digest == manifest.digest => None,
            Ok(_) => return Err(Failure::BadDigest),
            Err(_) => Some(reference.to_owned()),
        };
        let mut inner = self.0.lock();
        let contents = inner.repositories.entry(name.to_owned()).or_default();
        let entry = contents.examine(&manifest)?;
        let digest = manifest.digest;
        if contents.manifests.insert(digest, manifest).is_none() {
            contents.referrers.extend(entry.clone());
        }
        contents.tags.extend(tag.map(|tag| (tag, digest)));
        Ok(Stored { digest, subject: entry.map(|(subject, _)| subject) })
    }

    pub(super) fn delete_manifest(&self, name: &str, digest: &Digest) -> Result<(), Failure> {
        let mut inner = self.0.lock();
        let contents = inner.repositories.get_mut(name).ok_or(Failure::NameUnknown)?;
        contents.manifests.remove(digest).ok_or(Failure::ManifestUnknown)?;
        contents.tags.retain(|_, tagged| tagged != digest);
        contents.referrers.retain(|(_, entry)| entry.digest != *digest);
        Ok(())
    }

    pub(super) fn mount(&self, name: &str, from: &str, digest: &Digest) -> bool {
        let mut inner = self.0.lock();
        let there = inner.repositories.get(from).is_some_and(|contents| contents.blobs.contains(digest));
        if there {
            inner.repositories.entry(name.to_owned()).or_default().blobs.insert(*digest);
        }
        there
    }

    pub(super) fn begin(&self, bytes: Bytes) -> String {
        let mut inner = self.0.lock();
        inner.uploads_begun += 1;
        let id = inner.uploads_begun.to_string();
        inner.uploads.insert(id.clone(), bytes.into());
        id
    }

    /// Adds to an upload; answers its length.
    pub(super) fn append(&self, id: &str, bytes: &[u8]) -> Result<usize, Failure> {
        let mut inner = self.0.lock();
        let upload = inner.uploads.get_mut(id).ok_or(Failure::UploadUnknown)?;
        upload.extend_from_slice(bytes);
        Ok(upload.len())
    }

    /// Forgets an upload.
    pub(super) fn cancel(&self, id: &str) -> Result<(), Failure> {
        self.0.lock().uploads.remove(id).map(|_| ()).ok_or(Failure::UploadUnknown)
    }

    pub(super) fn finish(&self, name: &str, id: &str, digest: &Digest) -> Result<(), Failure> {
        let bytes = self.0.lock().uploads.remove(id).ok_or(Failure::UploadUnknown)?.freeze();
        // Outside the lock: hashing a large layer takes a second.
        let mut hasher = Hasher::new(digest.algorithm());
        hasher.update(&bytes);
        if hasher.finish() != *digest {
            return Err(Failure::BadDigest);
        }
        let mut inner = self.0.lock();
        inner.blobs.insert(*digest, bytes);
        inner.repositories.entry(name.to_owned()).or_default().blobs.insert(*digest);
        Ok(())
    }
}

impl Contents {
    /// Checks that what a manifest needs is here; answers its subject and its entry in the list of referrers.
    fn examine(&self, manifest: &Manifest) -> Result<Option<(Digest, Descriptor)>, Failure> {
        let mut entry = Descriptor::new(&manifest.media_type, manifest.digest, manifest.bytes.len() as u64);
        let (subject, complete) = if media_type::is_index(&manifest.media_type) {
            let index: ImageIndex = serde_json::from_slice(&manifest.bytes).map_err(|_| Failure::ManifestInvalid)?;
            entry.annotations = index.annotations;
            (index.subject, index.manifests.iter().all(|child| self.manifests.contains_key(&child.digest)))
        } else {
            let parsed: ImageManifest =
                serde_json::from_slice(&manifest.bytes).map_err(|_| Failure::ManifestInvalid)?;
            entry.artifact_type = Some(parsed.kind().to_owned());
            entry.annotations = parsed.annotations;
            let mut needed = std::iter::once(&parsed.config).chain(&parsed.layers);
            // Of a foreign layer the image says itself where it is.
            (parsed.subject, needed.all(|blob| blob.is_foreign() || self.blobs.contains(&blob.digest)))
        };
        if !complete {
            return Err(Failure::ManifestBlobUnknown);
        }
        Ok(subject.map(|subject| (subject.digest, entry)))
    }
}
