//! `soci create`: index an image into the local index store.

use anyhow::Context;
use soci_index::image::layout::Layout;
use soci_index::publish::local::{self, StoreLabels};
use soci_index::publish::{Done, Job, Report};

use super::image::{self, block_on};
use super::source;
use crate::args::{Create, Global};
use crate::config::Config;
use crate::output;

/// Runs the command.
///
/// # Errors
/// When the image cannot be read or indexed, or the store not written.
pub fn run(arguments: &Create, config: &Config, global: &Global) -> anyhow::Result<()> {
    let reference = source::meant(image::reference(&arguments.image)?, global);
    let indexing = &arguments.indexing;
    let (options, selection) = (image::client_options(&indexing.access)?, image::selection(&indexing.platforms)?);
    let building = image::build_options_in(&indexing.building, &indexing.forms)?;
    config.keep_private()?;
    let layout = Layout::open_or_create(&config.index_store())?;
    let reports = block_on(global.timeout, async {
        let source = source::open(&reference, &options, global).await?;
        let mut reports = Vec::new();
        let images = source.resolve(&selection).await?;
        if let Some(caveat) = source::caveat(&reference, &source, &images) {
            tracing::warn!("{caveat}");
        }
        for image in images {
            let labels = StoreLabels { name: source::name(&reference), created: super::now() };
            let (progress, observer) = image::watch("indexing", image.manifest.layers.iter(), &building);
            let (image, force) = (&image, indexing.building.force);
            let job = Job { source: &source, image, options: &building, force, observer: &observer };
            let report = local::store(&job, &layout, &labels).await;
            progress.finish();
            let report = report.with_context(|| format!("{reference} for {}", image.platform))?;
            reports.push((image.platform.to_string(), report));
        }
        Ok(reports)
    })?;
    reports.iter().for_each(|(_, report)| image::warn_missing(report));
    reports.iter().filter_map(|(_, report)| image::reused_line(report)).for_each(|line| tracing::info!("{line}"));
    if arguments.json {
        let document: Vec<_> = reports.iter().map(|(platform, report)| json(platform, report)).collect();
        return output::json(&document);
    }
    reports.iter().try_for_each(|(_, report)| image::print_layers(report))
}

/// A report for programs.
#[must_use]
pub fn json(platform: &str, report: &Report) -> serde_json::Value {
    let (status, found_by, warnings) = words(&report.done);
    let spans = report.spans.as_ref().map(|spans| {
        let (status, found_by, warnings) = words(&spans.done);
        serde_json::json!({
            "digest": spans.index, "size": spans.index_size, "status": status, "foundBy": found_by,
            "warnings": warnings,
        })
    });
    serde_json::json!({
        "platform": platform,
        "status": status,
        "foundBy": found_by,
        "warnings": warnings,
        "index": { "digest": report.index, "size": report.index_size },
        "spanIndex": spans,
        "reused": report.reused.map(|relied| relied.to_string()),
        "reusedFrom": report.reused_from.iter().map(|from| {
            serde_json::json!({ "index": from.index, "place": from.place })
        }).collect::<Vec<_>>(),
        "usedInstead": report.used_instead,
        "layers": report.layers.iter().map(image::layer_json).collect::<Vec<_>>(),
        "prefetch": report.prefetch.iter().map(|(layer, artifact)| {
            serde_json::json!({ "layer": layer, "digest": artifact })
        }).collect::<Vec<_>>(),
    })
}

/// What there is to say of an index that the registry refuses to show.
#[must_use]
pub fn hidden(reason: &str) -> String {
    format!(
        "nobody can read it, so it is not known what it says: {reason}; have it signed as the registry demands, or build \
         it again by --force"
    )
}

fn words(done: &Done) -> (&'static str, Option<String>, Vec<String>) {
    match done {
        Done::UpToDate => ("up to date", None, Vec::new()),
        Done::Published(found_by, visibility) => {
            ("published", Some(super::found_by(found_by).to_owned()), visibility.warnings())
        }
        Done::Hidden { reason } => ("refused", None, vec![hidden(reason)]),
        Done::Stored => ("stored", None, Vec::new()),
        Done::Nothing => ("dry run", None, Vec::new()),
    }
}
