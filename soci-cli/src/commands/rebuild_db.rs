//! `soci rebuild-db`: bring the list of the local index store up to date with what is there.
//!
//! Indexes whose manifest is gone from where it was kept leave the list, with the zTOCs that no other index needs;
//! index manifests that lie in the store without being listed enter it, and with `--content-store containerd` those in
//! containerd. Where they come from is not known, so nothing is built upon them that the image's signature or this
//! machine would have to vouch for ([`origin::ORIGIN`] is set, to no repository).

use anyhow::Context as _;
use bytes::Bytes;
use soci_index::find::origin;
use soci_index::format::digest::Digest;
use soci_index::format::index_manifest::IndexManifest;
use soci_index::format::limits::Limits;
use soci_index::format::manifest::INDEX_V1;
use soci_index::format::model::{Descriptor, ImageConfig, ImageManifest, annotation, media_type};
use soci_index::format::platform::Platform;
use soci_index::format::span_index::SPAN_INDEX;
use soci_index::image::layout::Layout;
use soci_index::image::{ImageError, ImageSource};
use soci_index::publish::local::{KEPT_IN, containerd_namespace, containerd_place};

use crate::args::config::Config;
use crate::args::{ContentStore, Global};
use crate::commands::catalogue::{self, IndexEntry};
use crate::commands::containerd;
use crate::commands::image::block_on;
use crate::report::output;

/// Runs the command.
///
/// # Errors
/// When the store cannot be read or written, or containerd was asked for and does not answer.
pub fn run(json: bool, config: &Config, global: &Global) -> anyhow::Result<()> {
    config.keep_private()?;
    let layout = Layout::open_or_create(&config.index_store())?;
    let entries = catalogue::entries(config)?;
    let (left, entered) = block_on(global.timeout, async {
        let gone = gone(&layout, &entries, global).await?;
        let content = content(global).await?;
        let mut found = unlisted(&layout)?;
        if let (Some(content), Some(ContentStore::Containerd)) = (&content, global.content_store) {
            found.extend(in_containerd(content, global).await?);
        }
        found.retain(|found| !entries.iter().any(|entry| entry.descriptor.digest == found.digest));
        let mut writer = layout.lock()?;
        for digest in &gone {
            let removed = writer.remove_manifest(digest)?;
            tracing::info!(%digest, blobs = removed.len(), "left the list: its manifest is gone");
        }
        drop(writer);
        let entered: Vec<Digest> = found.iter().map(|found| found.digest).collect();
        for found in found {
            let platform = match &content {
                Some(content) => platform(content, &found.subject).await,
                None => None,
            };
            tracing::info!(digest = %found.digest, "entered the list");
            found.list(&layout, platform)?;
        }
        Ok((gone, entered))
    })?;
    if json { output::json(&serde_json::json!({ "left": left, "entered": entered })) } else { Ok(()) }
}

/// containerd's content, if it answers or has to.
async fn content(global: &Global) -> anyhow::Result<Option<ImageSource>> {
    match containerd::content(global, global.containerd_namespace()).await {
        Ok(content) => Ok(Some(ImageSource::foreign(content))),
        Err(error) if global.content_store == Some(ContentStore::Containerd) => Err(error),
        Err(error) => {
            tracing::debug!("containerd is not asked: {error:#}");
            Ok(None)
        }
    }
}

/// Listed indexes whose manifest is gone.
async fn gone(layout: &Layout, entries: &[IndexEntry], global: &Global) -> anyhow::Result<Vec<Digest>> {
    let mut gone = Vec::new();
    for entry in entries {
        let digest = entry.descriptor.digest;
        let is_there = match containerd_namespace(entry.annotation(KEPT_IN)) {
            // What cannot be read in this moment is neither gone nor damaged.
            None => {
                entry.index.is_some() || (layout.has_blob(&digest) && std::fs::read(layout.blob_path(&digest)).is_err())
            }
            Some(namespace) => match containerd::content(global, namespace).await {
                Ok(content) => content.size(&digest).await.map_err(ImageError::from)?.is_some(),
                Err(error) => {
                    tracing::warn!(%digest, "it is kept in containerd, and stays in the list: {error:#}");
                    true
                }
            },
        };
        if !is_there {
            gone.push(digest);
        }
    }
    Ok(gone)
}

/// An index that nothing lists.
struct UnlistedIndex {
    digest: Digest,
    json: Bytes,
    index: IndexManifest,
    subject: Descriptor,
    kept_in: Option<String>,
}

impl UnlistedIndex {
    /// An index that refers to an image, if these bytes are one.
    fn parse(digest: Digest, json: Bytes, kept_in: Option<String>) -> Option<Self> {
        if Digest::of(&json) != digest {
            return None;
        }
        let kind = serde_json::from_slice::<ImageManifest>(&json).ok()?.kind().to_owned();
        if !matches!(kind.as_str(), INDEX_V1 | SPAN_INDEX) {
            return None;
        }
        let index = IndexManifest::parse(&kind, &json, &Limits::DEFAULT).ok()?;
        let subject = index.subject()?.clone();
        Some(Self { digest, json, index, subject, kept_in })
    }

    fn list(self, layout: &Layout, platform: Option<Platform>) -> anyhow::Result<()> {
        let mut entry = Descriptor::of(media_type::MANIFEST, &self.json);
        entry.artifact_type = Some(self.index.kind().to_owned());
        entry.platform = platform;
        entry.annotations.insert(annotation::CREATED.to_owned(), crate::commands::now());
        entry.annotations.insert(origin::ORIGIN.to_owned(), String::new());
        entry.annotations.insert(origin::IMAGE.to_owned(), self.subject.digest.to_string());
        entry.annotations.extend(self.kept_in.map(|place| (KEPT_IN.to_owned(), place)));
        layout.lock()?.add_manifest(entry, &self.json)?;
        Ok(())
    }
}

/// Index manifests among the blobs of the store.
fn unlisted(layout: &Layout) -> anyhow::Result<Vec<UnlistedIndex>> {
    let directory = layout.directory().join("blobs/sha256");
    let reading = || format!("reading {}", directory.display());
    let mut found = Vec::new();
    for file in std::fs::read_dir(&directory).with_context(reading)? {
        let file = file.with_context(reading)?;
        let Ok(digest) = format!("sha256:{}", file.file_name().to_string_lossy()).parse::<Digest>() else { continue };
        let size = file.metadata().map_or(u64::MAX, |metadata| metadata.len());
        if size > Limits::DEFAULT.manifest_bytes_max {
            continue;
        }
        // What is deleted in this moment is no index, and neither is what cannot be read.
        let Ok(json) = std::fs::read(file.path()) else { continue };
        found.extend(UnlistedIndex::parse(digest, json.into(), None));
    }
    Ok(found)
}

/// Indexes in containerd.
async fn in_containerd(content: &ImageSource, global: &Global) -> anyhow::Result<Vec<UnlistedIndex>> {
    let namespace = global.containerd_namespace();
    let mut found = Vec::new();
    for blob in containerd::indexes(global, namespace).await? {
        let digest = blob.digest;
        match content.blob_bytes(&blob, Limits::DEFAULT.manifest_bytes_max).await {
            Ok(json) => found.extend(UnlistedIndex::parse(digest, json, Some(containerd_place(namespace)))),
            Err(error) => tracing::debug!(%digest, %error, "is passed over"),
        }
    }
    Ok(found)
}

/// The platform of an image that containerd has.
async fn platform(content: &ImageSource, image: &Descriptor) -> Option<Platform> {
    let most = Limits::DEFAULT.manifest_bytes_max;
    let manifest = content.blob_bytes(image, most).await.ok()?;
    let manifest: ImageManifest = serde_json::from_slice(&manifest).ok()?;
    let config = content.blob_bytes(&manifest.config, most).await.ok()?;
    Some(serde_json::from_slice::<ImageConfig>(&config).ok()?.platform)
}
