//! `soci prefetch`: the prefetch artifacts in the local index store. Words and columns are those of AWS's tool.

use anyhow::Context;
use soci_index::format::digest::Digest;
use soci_index::format::limits::Limits;
use soci_index::format::manifest::{LAYER_DIGEST, PREFETCH, Prefetch};
use soci_index::format::model::{Descriptor, annotation};
use soci_index::image::layout::Layout;

use crate::args;
use crate::args::config::Config;
use crate::commands::catalogue::{self, IndexEntry};
use crate::report::exit::{Exit, fail};
use crate::report::output;

struct Artifact {
    descriptor: Descriptor,
    layer: String,
    created: String,
    content: Result<(Prefetch, String), String>,
}

impl Artifact {
    fn spans(&self) -> Option<u64> {
        self.content.as_ref().ok().map(|(prefetch, _)| prefetch.spans())
    }
}

/// Runs the command.
///
/// # Errors
/// When the store cannot be read, or has no such artifact.
pub fn run(arguments: &args::Prefetch, config: &Config) -> anyhow::Result<()> {
    match arguments {
        args::Prefetch::List { json } => list(&artifacts(config)?, *json),
        args::Prefetch::Info { digest, json } => info(config, digest, *json),
    }
}

fn artifacts(config: &Config) -> anyhow::Result<Vec<Artifact>> {
    let mut artifacts: Vec<Artifact> = Vec::new();
    let entries = catalogue::entries(config)?;
    let Some(layout) = catalogue::layout(config)? else { return Ok(artifacts) };
    for entry in entries {
        for blob in entry.blobs().iter().filter(|blob| blob.media_type == PREFETCH) {
            if !artifacts.iter().any(|known| known.descriptor.digest == blob.digest) {
                artifacts.push(artifact(&layout, &entry, blob));
            }
        }
    }
    Ok(artifacts)
}

fn artifact(layout: &Layout, entry: &IndexEntry, blob: &Descriptor) -> Artifact {
    let content = std::fs::read(layout.blob_path(&blob.digest)).map_err(|error| error.to_string()).and_then(|bytes| {
        let prefetch = Prefetch::parse(&bytes, &Limits::DEFAULT).map_err(|error| error.to_string())?;
        Ok((prefetch, String::from_utf8_lossy(&bytes).into_owned()))
    });
    Artifact {
        descriptor: blob.clone(),
        layer: blob.annotations.get(LAYER_DIGEST).cloned().unwrap_or_default(),
        created: entry.annotation(annotation::CREATED).to_owned(),
        content,
    }
}

fn list(artifacts: &[Artifact], json: bool) -> anyhow::Result<()> {
    if json {
        if artifacts.is_empty() {
            return output::line("null");
        }
        let row = |artifact: &Artifact| {
            serde_json::json!({
                "Digest": artifact.descriptor.digest,
                "LayerDigest": artifact.layer,
                "TotalSpans": artifact.spans().unwrap_or_default(),
                "CreatedAt": artifact.created,
            })
        };
        return output::json(&artifacts.iter().map(row).collect::<Vec<_>>());
    }
    let row = |artifact: &Artifact| {
        vec![
            artifact.descriptor.digest.to_string(),
            artifact.layer.clone(),
            artifact.spans().map_or_else(|| "N/A".to_owned(), |spans| spans.to_string()),
            crate::commands::age(&artifact.created),
        ]
    };
    output::table(&["DIGEST", "LAYER DIGEST", "SPANS", "CREATED"], &artifacts.iter().map(row).collect::<Vec<_>>())
}

fn info(config: &Config, digest: &str, json: bool) -> anyhow::Result<()> {
    let digest: Digest = digest.parse().map_err(|error| fail(Exit::Usage, format!("{error}")))?;
    let artifacts = artifacts(config)?;
    let Some(artifact) = artifacts.iter().find(|artifact| artifact.descriptor.digest == digest) else {
        return Err(not_one(config, &digest)?);
    };
    let read = artifact.content.as_ref();
    let (prefetch, raw) =
        read.map_err(|reason| fail(Exit::BadContent, format!("prefetch artifact {digest}: {reason}")))?;
    let fact = |name: &str, value: &str| output::line(format!("{:<15}{value}", format!("{name}:")));
    fact("Digest", &digest.to_string())?;
    fact("Version", "1.0")?;
    fact("Span Ranges", &prefetch.prefetch_spans.len().to_string())?;
    fact("Layer Digest", &artifact.layer)?;
    fact("Size", &format!("{} bytes", artifact.descriptor.size))?;
    // RFC 3339 without its T and zone.
    fact("Created", &artifact.created.replacen('T', " ", 1).chars().take(19).collect::<String>())?;
    output::line("\nPrefetch Spans:")?;
    for (place, range) in prefetch.prefetch_spans.iter().enumerate() {
        let (start, end) = (range.start_span, range.end_span);
        output::line(format!("  [{place}] StartSpan: {start}, EndSpan: {end} (covers {} spans)", end - start + 1))?;
        if range.priority != 0 {
            output::line(format!("      Priority: {}", range.priority))?;
        }
    }
    output::line(format!("\nTotal spans to prefetch: {}", artifact.spans().unwrap_or_default()))?;
    if json {
        output::line(format!("\nRaw JSON:\n{raw}"))?;
    }
    Ok(())
}

/// Why a digest is no prefetch artifact, in AWS's words where it is something else.
fn not_one(config: &Config, digest: &Digest) -> anyhow::Result<anyhow::Error> {
    let entries = catalogue::entries(config).context("reading the local index store")?;
    let kind = if entries.iter().any(|entry| entry.descriptor.digest == *digest) {
        "soci_index"
    } else if entries.iter().flat_map(IndexEntry::ztocs).any(|(_, ztoc)| ztoc.digest == *digest) {
        "soci_layer"
    } else {
        let hint = "`soci prefetch list` shows what there is";
        return Ok(fail(Exit::Failure, format!("the local index store has no prefetch artifact {digest}; {hint}")));
    };
    Ok(fail(Exit::Usage, format!("the provided digest is not a prefetch artifact (type: {kind})")))
}
