//! `soci index`, `soci ztoc list`: what is in the local index store.

use anyhow::Context;
use soci_index::find::origin;
use soci_index::format::digest::Digest;
use soci_index::format::model::annotation;
use soci_index::publish::local::{IMAGE_NAME, KEPT_IN, containerd_namespace};

use crate::args::config::Config;
use crate::args::{Global, Index, IndexList, Platforms};
use crate::commands::catalogue::{IndexEntry, entries, layout};
use crate::commands::containerd;
use crate::commands::image::{self, block_on};
use crate::report::exit::{Exit, fail};
use crate::report::output;

/// Runs an `index` command.
///
/// # Errors
/// When the store cannot be read, or has no such index.
pub fn run(arguments: &Index, config: &Config, global: &Global) -> anyhow::Result<()> {
    match arguments {
        Index::List(arguments) => list(config, arguments),
        Index::Info { digest } => info(config, digest),
        Index::Remove { digests, image, json } => {
            let removed = remove(config, digests, image.as_deref(), global)?;
            if *json { output::json(&removed_json(&removed)) } else { Ok(()) }
        }
    }
}

fn list(config: &Config, arguments: &IndexList) -> anyhow::Result<()> {
    let entries = listed(config, arguments)?;
    if arguments.json {
        let row = |entry: &IndexEntry| {
            serde_json::json!({
                "digest": entry.descriptor.digest,
                "size": entry.descriptor.size,
                "imageRef": entry.annotation(IMAGE_NAME),
                "imageDigest": entry.subject(),
                "platform": entry.platform(),
                "mediaType": entry.descriptor.media_type,
                "version": entry.form(),
                "createdAt": entry.annotation(annotation::CREATED),
                "fetchedFrom": origin::origins(&entry.descriptor),
            })
        };
        return output::json(&entries.iter().map(row).collect::<Vec<_>>());
    }
    if arguments.quiet {
        return entries.iter().try_for_each(|entry| output::line(entry.descriptor.digest.to_string()));
    }
    let row = |entry: &IndexEntry| {
        vec![
            entry.descriptor.digest.to_string(),
            entry.descriptor.size.to_string(),
            entry.annotation(IMAGE_NAME).to_owned(),
            entry.platform(),
            entry.descriptor.media_type.clone(),
            entry.form().to_owned(),
            crate::commands::age(entry.annotation(annotation::CREATED)),
        ]
    };
    let header = ["DIGEST", "SIZE", "IMAGE REF", "PLATFORM", "MEDIA TYPE", "MANIFEST VERSION", "CREATED"];
    output::table(&header, &entries.iter().map(row).collect::<Vec<_>>())
}

/// The indexes that are shown: AWS's forms, as its tool does, and span indexes where they are asked for.
fn listed(config: &Config, arguments: &IndexList) -> anyhow::Result<Vec<IndexEntry>> {
    let of = arguments.image.as_deref().map(image::reference).transpose()?.map(|reference| reference.to_string());
    let Platforms { platforms, .. } = &arguments.platforms;
    let is_wanted = |entry: &IndexEntry| {
        let is_named = of.as_ref().is_none_or(|of| entry.annotation(IMAGE_NAME) == of);
        let is_of_platform = platforms.is_empty() || platforms.contains(&entry.platform());
        is_named && is_of_platform && (arguments.span_indexes || !entry.is_span_index())
    };
    Ok(entries(config)?.into_iter().filter(is_wanted).collect())
}

fn info(config: &Config, digest: &str) -> anyhow::Result<()> {
    let digest: Digest = digest.parse().map_err(|error| fail(Exit::Usage, format!("{error}")))?;
    let entries = entries(config)?;
    if entries.iter().flat_map(IndexEntry::ztocs).any(|(_, ztoc)| ztoc.digest == digest) {
        let hint = "the provided digest is of ztoc not SOCI index. Use \"soci ztoc info\" command to get detailed info of ztoc";
        return Err(fail(Exit::Usage, hint));
    }
    let entry = entries.iter().find(|entry| entry.descriptor.digest == digest);
    let entry = entry.ok_or_else(|| missing(&digest))?;
    let index = entry.index.as_ref().ok_or_else(|| {
        fail(
            Exit::Local,
            format!("index {digest} is listed, but its manifest is gone or damaged: see `soci rebuild-db`"),
        )
    })?;
    output::json(&serde_json::from_slice::<serde_json::Value>(&index.to_json()).context("printing the index")?)
}

fn missing(digest: &Digest) -> anyhow::Error {
    fail(Exit::Failure, format!("the local index store has no index {digest}; `soci index list` shows what it has"))
}

/// An index that was removed, with all blobs of the store that went with it.
type Removed = (Digest, Vec<Digest>);

fn removed_json(removed: &[Removed]) -> serde_json::Value {
    let one = |(digest, blobs): &Removed| serde_json::json!({ "digest": digest, "blobs": blobs });
    serde_json::json!({ "removed": removed.iter().map(one).collect::<Vec<_>>() })
}

fn remove(config: &Config, digests: &[String], of: Option<&str>, global: &Global) -> anyhow::Result<Vec<Removed>> {
    config.keep_private()?;
    let entries = entries(config)?;
    let wanted = to_remove(&entries, digests, of)?;
    let Some(layout) = layout(config)? else { return Ok(Vec::new()) };
    for entry in entries.iter().filter(|entry| wanted.contains(&entry.descriptor.digest)) {
        if let Some(namespace) = containerd_namespace(entry.annotation(KEPT_IN)) {
            block_on(global.timeout, containerd::delete(&entry.descriptor.digest, global, namespace))?;
        }
    }
    let mut writer = layout.lock()?;
    let mut all = Vec::new();
    for digest in wanted {
        let removed = writer.remove_manifest(&digest)?;
        tracing::debug!(%digest, blobs = removed.len(), "removed");
        all.push((digest, removed));
    }
    Ok(all)
}

/// What was named, and the span index of an image whose last other index goes.
fn to_remove(entries: &[IndexEntry], digests: &[String], of: Option<&str>) -> anyhow::Result<Vec<Digest>> {
    let mut wanted: Vec<Digest> = Vec::new();
    for digest in digests {
        wanted.push(digest.parse().map_err(|error| fail(Exit::Usage, format!("{error}")))?);
    }
    if let Some(of) = of {
        let of = image::reference(of)?.to_string();
        wanted.extend(
            entries.iter().filter(|entry| entry.annotation(IMAGE_NAME) == of).map(|entry| entry.descriptor.digest),
        );
        if wanted.is_empty() {
            return Err(fail(Exit::Failure, format!("the local index store has no index of {of}")));
        }
    }
    if let Some(unknown) = wanted.iter().find(|digest| !entries.iter().any(|entry| entry.descriptor.digest == **digest))
    {
        return Err(missing(unknown));
    }
    let (going, staying): (Vec<&IndexEntry>, Vec<&IndexEntry>) =
        entries.iter().partition(|entry| wanted.contains(&entry.descriptor.digest));
    let is_left_alone = |entry: &&&IndexEntry| {
        let is_of = |other: &&IndexEntry| !other.is_span_index() && other.subject() == entry.subject();
        entry.is_span_index() && going.iter().copied().any(|other| is_of(&other)) && !staying.iter().any(is_of)
    };
    wanted.extend(staying.iter().filter(is_left_alone).map(|entry| entry.descriptor.digest));
    Ok(wanted)
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
    for entry in entries(config)?.iter().filter(|entry| of.as_ref().is_none_or(|of| entry.annotation(IMAGE_NAME) == of))
    {
        rows.extend(entry.ztocs().into_iter().map(|(layer, ztoc)| (ztoc.digest, ztoc.size, layer)));
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
