//! The fallback tag: a list of referrers kept by the clients, for registries without the referrers API.
//!
//! The tag `sha256-<hex>` names an image index whose entries are the referrers. No registry offers a safe way to change
//! it (conditional requests are ignored), so it is read, merged, written, and after a short random wait read again,
//! until our entry has been seen twice; a lost race is repaired by the loser. The wait is derived from the duration of
//! our own read and write: a client that read before our write writes within about that time. Invariants: nothing is
//! ever deleted; a tag that is not such a list, or that turns out to be the image itself, is left alone; entries and
//! fields of others survive as they are, in their order.

use std::time::{Duration, Instant};

use bytes::Bytes;
use serde_json::{Map, Value, json};

use crate::format::digest::Digest;
use crate::format::model::{Descriptor, ImageIndex, RawManifest, media_type};
use crate::format::reference::ManifestName;
use crate::registry::Repository;
use crate::registry::error::{ForeignTag, RegistryError};
use crate::registry::failover::HostedRepository;
use crate::registry::manifests::Manifests;
use crate::registry::need::Need;

/// How often to write before giving up: sixteen writers at a time needed two or three writes each in our trials, the
/// unluckiest five.
const WRITES_MAX: u32 = 24;
/// Longest time that our own reading and writing is taken to need, so that one slow answer does not hold up everything.
const SETTLE_MAX: Duration = Duration::from_secs(2);
/// How often our entry must be seen after a write. Once is not enough: another writer may have read before us.
const SIGHTINGS: u32 = 2;
/// The tag that lists the referrers of `subject`.
#[must_use]
pub fn tag(subject: &Digest) -> String {
    let (algorithm, encoded) = (subject.algorithm().name(), subject.hex());
    // The specification cuts both parts, so that the tag of a long digest is still a legal tag.
    let cut = |text: &str, length: usize| -> String { text.chars().take(length).collect() };
    format!("{}-{}", cut(algorithm, 32), cut(&encoded, 64))
}

impl Repository {
    /// The entries of the fallback tag of `subject`; `None` when there is no such tag.
    ///
    /// # Errors
    /// [`RegistryError::ForeignTag`] when the tag is something else, or any other when it cannot be read.
    pub async fn fallback_entries(&self, subject: &Digest) -> Result<Option<Vec<Descriptor>>, RegistryError> {
        self.first(Need::Referrers, |hosted| async move { FallbackTag::new(&hosted, subject).entries().await }).await
    }

    /// Puts `entry` on the list of `subject`'s referrers. Answers how often it had to write.
    ///
    /// # Errors
    /// [`RegistryError`] when the tag is not ours to write, or others keep overwriting it.
    pub async fn write_fallback(&self, subject: &Digest, entry: &Descriptor) -> Result<u32, RegistryError> {
        FallbackTag::new(&self.push_host()?, subject).add(entry).await
    }
}

/// The list of what refers to one manifest, on one host.
pub(crate) struct FallbackTag<'a> {
    hosted: &'a HostedRepository,
    subject: &'a Digest,
    tag: String,
}

impl<'a> FallbackTag<'a> {
    pub(crate) fn new(hosted: &'a HostedRepository, subject: &'a Digest) -> Self {
        Self { hosted, subject, tag: tag(subject) }
    }

    fn name(&self) -> ManifestName {
        ManifestName::Tag(self.tag.clone())
    }

    /// `None` when there is no such tag.
    pub(crate) async fn entries(&self) -> Result<Option<Vec<Descriptor>>, RegistryError> {
        let Some(raw) = self.list().await? else { return Ok(None) };
        let index: Result<ImageIndex, _> = serde_json::from_slice(&raw.bytes);
        let index = index.map_err(|error| self.foreign(ForeignTag::Malformed { reason: error.to_string() }))?;
        Ok(Some(index.manifests))
    }

    async fn list(&self) -> Result<Option<RawManifest>, RegistryError> {
        let Some(raw) = Manifests(self.hosted).get(&self.name(), &self.hosted.deadline(0)).await? else {
            return Ok(None);
        };
        // Some registries read the dash as a colon and answer with the image.
        if raw.digest == *self.subject || self.subject.matches(&raw.bytes) {
            return Err(self.foreign(ForeignTag::Subject));
        }
        if raw.media_type != media_type::INDEX {
            return Err(self.foreign(ForeignTag::NotAnIndex { media_type: raw.media_type }));
        }
        Ok(Some(raw))
    }

    /// Puts `entry` on the list; returns how often it had to write.
    pub(crate) async fn add(&self, entry: &Descriptor) -> Result<u32, RegistryError> {
        let (mut writes, mut seen) = (0, 0);
        // Between a write and a look, and between two looks: at least this long.
        let mut settle = self.hosted.options().backoff.first / 2;
        loop {
            let begun = Instant::now();
            let raw = self.list().await?;
            let merged = merge(raw.as_ref().map(|raw| &*raw.bytes), entry)
                .map_err(|reason| self.foreign(ForeignTag::Malformed { reason }))?;
            match merged {
                Merged::Present => {
                    seen += 1;
                    if writes == 0 || seen >= SIGHTINGS {
                        return Ok(writes);
                    }
                }
                Merged::Changed(_) if writes >= WRITES_MAX => {
                    let ((registry, repository), tag) = (self.hosted.names(), self.tag.clone());
                    let digest = Box::new(entry.digest);
                    return Err(RegistryError::FallbackLost { registry, repository, tag, digest, writes });
                }
                Merged::Changed(bytes) => {
                    Manifests(self.hosted).put(&self.name(), media_type::INDEX, bytes).await?;
                    writes += 1;
                    seen = 0;
                    settle = settle.max(begun.elapsed().min(SETTLE_MAX));
                }
            }
            // Randomised backoff, so that colliding writers do not collide again; it grows with the number of writers.
            let spread = f64::from(2 + writes) * fastrand::f64();
            tokio::time::sleep(settle + settle.mul_f64(spread)).await;
        }
    }

    fn foreign(&self, reason: ForeignTag) -> RegistryError {
        let (registry, repository) = self.hosted.names();
        RegistryError::ForeignTag { registry, repository, tag: self.tag.clone(), reason }
    }
}

/// A list after our entry was looked for.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Merged {
    Present,
    Changed(Bytes),
}

/// Adds `entry` to a list, unless it is there. Everything else stays: the document is edited, not rebuilt.
fn merge(list: Option<&[u8]>, entry: &Descriptor) -> Result<Merged, String> {
    let mut document: Map<String, Value> = match list {
        Some(list) => serde_json::from_slice(list).map_err(|error| error.to_string())?,
        None => empty_list(),
    };
    let manifests = document.entry("manifests").or_insert_with(|| json!([]));
    if manifests.is_null() {
        *manifests = json!([]);
    }
    let Value::Array(entries) = manifests else { return Err("its manifests are no list".to_owned()) };
    let digest = Value::String(entry.digest.to_string());
    if entries.iter().any(|listed| listed.get("digest") == Some(&digest)) {
        return Ok(Merged::Present);
    }
    entries.push(serde_json::to_value(entry).map_err(|error| error.to_string())?);
    let bytes = serde_json::to_vec(&document).map_err(|error| error.to_string())?;
    Ok(Merged::Changed(bytes.into()))
}

fn empty_list() -> Map<String, Value> {
    let mut document = Map::new();
    document.insert("schemaVersion".to_owned(), json!(2));
    document.insert("mediaType".to_owned(), json!(media_type::INDEX));
    document
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry() -> Descriptor {
        let mut entry = Descriptor::of(media_type::MANIFEST, b"ours");
        entry.artifact_type = Some("a/b".into());
        entry.annotations.insert("k".into(), "v".into());
        entry
    }

    #[test]
    fn tags() {
        let digest = Digest::of(b"");
        assert_eq!(tag(&digest), format!("sha256-{}", digest.hex()));
        let mut hasher = crate::format::digest::Hasher::new(crate::format::digest::Algorithm::Sha512);
        hasher.update(b"");
        assert_eq!(tag(&hasher.finish()).len(), "sha512-".len() + 64);
    }

    #[test]
    fn a_new_list() {
        let Merged::Changed(bytes) = merge(None, &entry()).unwrap() else { panic!("nothing written") };
        let digest = Digest::of(b"ours");
        let expected = format!(
            r#"{{"schemaVersion":2,"mediaType":"{}","manifests":[{{"mediaType":"{}","digest":"{digest}","size":4,"annotations":{{"k":"v"}},"artifactType":"a/b"}}]}}"#,
            media_type::INDEX,
            media_type::MANIFEST
        );
        assert_eq!(String::from_utf8(bytes.to_vec()).unwrap(), expected);
        assert_eq!(merge(Some(&bytes), &entry()), Ok(Merged::Present));
    }

    #[test]
    fn everything_else_survives() {
        let before = r#"{"z":1,"schemaVersion":2,"manifests":[{"digest":"sha999:zz","x":{"b":1,"a":[null,1.5]},"size":-1},7],"annotations":{"t":"u"},"a":18446744073709551615}"#;
        let Merged::Changed(bytes) = merge(Some(before.as_bytes()), &entry()).unwrap() else {
            panic!("nothing written")
        };
        let after = String::from_utf8(bytes.to_vec()).unwrap();
        let ours = serde_json::to_string(&entry()).unwrap();
        assert_eq!(after, before.replace(",7]", &format!(",7,{ours}]")));
    }

    #[test]
    fn refused_lists() {
        for text in ["[]", "{", r#"{"manifests":{}}"#, "7"] {
            assert!(merge(Some(text.as_bytes()), &entry()).is_err(), "{text}");
        }
        assert!(matches!(merge(Some(br#"{"manifests":null}"#), &entry()), Ok(Merged::Changed(_))));
    }
}
