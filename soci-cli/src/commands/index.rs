//! `soci index`, `soci ztoc list`: what is in the local index store.

use std::cmp::Reverse;

use anyhow::Context;
use soci_index::digest::Digest;
use soci_index::find::choose::Created;
use soci_index::find::origin;
use soci_index::image::layout::Layout;
use soci_index::image::model::{Descriptor, annotation};
use soci_index::index_manifest::IndexManifest;
use soci_index::limits::Limits;
use soci_index::manifest::{INDEX_V1, INDEX_V2};
use soci_index::publish::local::IMAGE_NAME;
use soci_index::span_index::SPAN_INDEX;

use super::image;
use crate::args::{Index, Platforms};
use crate::config::Config;
use crate::exit::{Exit, fail};
use crate::output;

/// Runs an `index` command.
///
/// # Errors
/// When the store cannot be read, or has no such index.
pub fn run(arguments: &Index, config: &Config) -> anyhow::Result<()> {
    match arguments {
        Index::List { image, platforms, quiet, json } => list(config, image.as_deref(), platforms, *quiet, *json),
        Index::Info { digest } => info(config, digest),
        Index::Remove { digests, image } => remove(config, digests, image.as_deref()),
    }
}

/// An index of the store.
pub(super) struct Entry {
    pub(super) descriptor: Descriptor,
    pub(super) index: IndexManifest,
}

impl Entry {
    pub(super) fn note(&self, key: &str) -> &str {
        self.descriptor.annotations.get(key).map_or("", String::as_str)
    }

    fn platform(&self) -> String {
        self.descriptor.platform.as_ref().map(ToString::to_string).unwrap_or_default()
    }
}

pub(crate) fn layout(config: &Config) -> anyhow::Result<Option<Layout>> {
    let directory = config.index_store();
    // A store that nobody has written to yet is empty, not broken.
    if !directory.exists() { Ok(None) } else { Ok(Some(Layout::open(&directory)?)) }
}

/// All indexes, newest first.
pub(super) fn entries(config: &Config) -> anyhow::Result<Vec<Entry>> {
    config.check_listed()?;
    let Some(layout) = layout(config)? else { return Ok(Vec::new()) };
    let mut entries = Vec::new();
    for descriptor in
        layout.entries()?.into_iter().filter(|entry| matches!(entry.kind(), INDEX_V1 | INDEX_V2 | SPAN_INDEX))
    {
        let bytes = std::fs::read(layout.blob_path(&descriptor.digest));
        let bytes = bytes.with_context(|| format!("reading index {} of the local store", descriptor.digest))?;
        let index = IndexManifest::parse(descriptor.kind(), &bytes, &Limits::DEFAULT);
        let index = index.with_context(|| format!("index {}", descriptor.digest))?;
        entries.push(Entry { descriptor, index });
    }
    entries.sort_by_cached_key(|entry| Reverse(Created::parse(entry.note(annotation::CREATED))));
    Ok(entries)
}

fn list(config: &Config, of: Option<&str>, platforms: &Platforms, quiet: bool, json: bool) -> anyhow::Result<()> {
    let of = of.map(image::reference).transpose()?.map(|reference| reference.to_string());
    let wanted = |entry: &Entry| {
        let named = of.as_ref().is_none_or(|of| entry.note(IMAGE_NAME) == of);
        named && (platforms.platforms.is_empty() || platforms.platforms.contains(&entry.platform()))
    };
    let entries: Vec<Entry> = entries(config)?.into_iter().filter(wanted).collect();
    if json {
        let row = |entry: &Entry| {
            serde_json::json!({
                "digest": entry.descriptor.digest,
                "size": entry.descriptor.size,
                "imageRef": entry.note(IMAGE_NAME),
                "imageDigest": entry.index.subject().map(|subject| subject.digest),
                "platform": entry.platform(),
                "mediaType": entry.descriptor.media_type,
                "version": entry.index.form().to_owned(),
                "createdAt": entry.note(annotation::CREATED),
                "fetchedFrom": origin::origins(&entry.descriptor),
            })
        };
        return output::json(&entries.iter().map(row).collect::<Vec<_>>());
    }
    if quiet {
        return entries.iter().try_for_each(|entry| output::line(entry.descriptor.digest.to_string()));
    }
    let row = |entry: &Entry| {
        vec![
            entry.descriptor.digest.to_string(),
            entry.descriptor.size.to_string(),
            entry.note(IMAGE_NAME).to_owned(),
            entry.platform(),
            entry.descriptor.media_type.clone(),
            entry.index.form().to_owned(),
            super::age(entry.note(annotation::CREATED)),
        ]
    };
    let header = ["DIGEST", "SIZE", "IMAGE REF", "PLATFORM", "MEDIA TYPE", "MANIFEST VERSION", "CREATED"];
    output::table(&header, &entries.iter().map(row).collect::<Vec<_>>())
}

fn info(config: &Config, digest: &str) -> anyhow::Result<()> {
    let digest: Digest = digest.parse().map_err(|error| fail(Exit::Usage, format!("{error}")))?;
    let entries = entries(config)?;
    if entries.iter().flat_map(|entry| entry.index.ztocs()).any(|(_, ztoc)| ztoc.digest == digest) {
        let hint = "the provided digest is of ztoc not SOCI index. Use \"soci ztoc info\" command to get detailed info of ztoc";
        return Err(fail(Exit::Usage, hint));
    }
    let entry = entries.iter().find(|entry| entry.descriptor.digest == digest);
    let entry = entry.ok_or_else(|| missing(&digest))?;
    output::json(&serde_json::from_slice::<serde_json::Value>(&entry.index.to_json()).context("printing the index")?)
}

fn missing(digest: &Digest) -> anyhow::Error {
    fail(Exit::Failure, format!("the local index store has no index {digest}; `soci index list` shows what it has"))
}

fn remove(config: &Config, digests: &[String], of: Option<&str>) -> anyhow::Result<()> {
    config.keep_private()?;
    let mut wanted: Vec<Digest> = Vec::new();
    for digest in digests {
        wanted.push(digest.parse().map_err(|error| fail(Exit::Usage, format!("{error}")))?);
    }
    let entries = entries(config)?;
    if let Some(of) = of {
        let of = image::reference(of)?.to_string();
        wanted.extend(entries.iter().filter(|entry| entry.note(IMAGE_NAME) == of).map(|entry| entry.descriptor.digest));
        if wanted.is_empty() {
            return Err(fail(Exit::Failure, format!("the local index store has no index of {of}")));
        }
    }
    if let Some(unknown) = wanted.iter().find(|digest| !entries.iter().any(|entry| entry.descriptor.digest == **digest))
    {
        return Err(missing(unknown));
    }
    let Some(layout) = layout(config)? else { return Ok(()) };
    let mut writer = layout.lock()?;
    for digest in &wanted {
        let removed = writer.remove_manifest(digest)?;
        tracing::debug!(%digest, blobs = removed.len(), "removed");
    }
    Ok(())
}

/// `soci ztoc list`.
///
/// # Errors
/// When the store cannot be read.
pub fn list_ztocs(
    config: &Config,
    digest: Option<&str>,
    of: Option<&str>,
    quiet: bool,
    json: bool,
) -> anyhow::Result<()> {
    let of = of.map(image::reference).transpose()?.map(|reference| reference.to_string());
    let mut rows: Vec<(Digest, u64, Digest)> = Vec::new();
    for entry in entries(config)?.iter().filter(|entry| of.as_ref().is_none_or(|of| entry.note(IMAGE_NAME) == of)) {
        rows.extend(entry.index.ztocs().into_iter().map(|(layer, ztoc)| (ztoc.digest, ztoc.size, layer)));
    }
    rows.sort_unstable();
    rows.dedup();
    rows.retain(|(ztoc, ..)| digest.is_none_or(|wanted| ztoc.to_string() == wanted));
    if digest.is_some() && rows.is_empty() {
        return Err(fail(
            Exit::Failure,
            "the specified ztoc doesn't exist or is not associated with the specified image",
        ));
    }
    if json {
        let row = |(ztoc, size, layer): &(Digest, u64, Digest)| serde_json::json!({ "digest": ztoc, "size": size, "layerDigest": layer });
        return output::json(&rows.iter().map(row).collect::<Vec<_>>());
    }
    if quiet {
        return rows.iter().try_for_each(|(ztoc, ..)| output::line(ztoc.to_string()));
    }
    let row = |(ztoc, size, layer): &(Digest, u64, Digest)| vec![ztoc.to_string(), size.to_string(), layer.to_string()];
    output::table(&["DIGEST", "SIZE", "LAYER DIGEST"], &rows.iter().map(row).collect::<Vec<_>>())
}

/// The file of a zTOC that is in the store, and the digest of its layer if an index tells.
///
/// # Errors
/// When the store has no such blob, or it is an index.
pub fn ztoc_file(config: &Config, digest: &Digest) -> anyhow::Result<(std::path::PathBuf, Option<Digest>)> {
    let entries = entries(config)?;
    if entries.iter().any(|entry| entry.descriptor.digest == *digest) {
        let hint = "the provided digest belongs to a SOCI index. Use \"soci index info\" to get the detailed information about it";
        return Err(fail(Exit::Usage, hint));
    }
    let layer = entries.iter().flat_map(|entry| entry.index.ztocs()).find(|(_, ztoc)| ztoc.digest == *digest);
    let layer = layer.map(|(layer, _)| layer);
    let file = layout(config)?.map(|layout| layout.blob_path(digest)).filter(|file| file.exists());
    let file = file.ok_or_else(|| {
        fail(Exit::Failure, format!("the local index store has no zTOC {digest}; `soci ztoc list` shows what it has"))
    })?;
    Ok((file, layer))
}
