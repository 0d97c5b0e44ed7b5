//! `soci create`: index an image into the local index store.

use anyhow::Context;
use soci_index::format::reference::{REGISTRY_SCHEME, Reference};
use soci_index::image::layout::Layout;
use soci_index::publish::build::Format;
use soci_index::publish::local::{self, Keep, StoreLabels};
use soci_index::publish::{Done, Job, Report};

use crate::args::config::Config;
use crate::args::{ContentStore, Create, Global, Indexing};
use crate::commands::build::Build;
use crate::commands::containerd::ContainerdIndexStore;
use crate::commands::image::{self, block_on};
use crate::commands::source;
use crate::report::exit::{Exit, fail};
use crate::report::output;

/// Runs the command.
///
/// # Errors
/// When the image cannot be read or indexed, or the store not written.
pub fn run(arguments: &Create, config: &Config, global: &Global) -> anyhow::Result<()> {
    let indexing = &arguments.indexing;
    let here = source::here(&arguments.image, global).filter(|_| indexing.access.user.is_none());
    if here.is_some() {
        let name = &arguments.image;
        tracing::info!("{name} is in this machine's containerd; one in a registry is meant by {REGISTRY_SCHEME}{name}");
    }
    let global = here.as_ref().unwrap_or(global);
    let reference = source::meant(image::reference(&arguments.image)?, global);
    let options = image::client_options(&indexing.access)?;
    let selection = image::whole_selection(&indexing.platforms, arguments.skip_missing_platforms)?;
    let Build { options: building, force } = build(indexing, global)?;
    config.keep_private()?;
    let layout = Layout::open_or_create(&config.index_store())?;
    let reports = block_on(global.timeout, async {
        let source = source::open(&reference, &options, global).await?;
        let mut reports = Vec::new();
        let images = source.resolve(&selection).await?;
        if let Some(caveat) = source::caveat(&reference, &source, &images) {
            tracing::warn!("{caveat}");
        }
        let index_store = index_store(&reference, global).await?;
        let keep = || index_store.as_ref().map_or(Keep::Here, ContainerdIndexStore::keep);
        for image in images {
            let labels = StoreLabels { name: source::name(&reference), created: crate::commands::now() };
            let (progress, observer) = image::watch("indexing", image.manifest.layers.iter(), &building);
            let job = Job { source: &source, image: &image, options: &building, force, observer: &observer };
            let report = local::store(&job, &layout, &keep(), &labels).await;
            progress.finish();
            let report = report.with_context(|| format!("{reference} for {}", image.platform))?;
            reports.push((image.platform.to_string(), report));
        }
        if let Some(index_store) = &index_store {
            index_store.close(&reports).await?;
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

/// containerd keeps AWS's form only: span indexes are looked for in the local index store.
fn build(indexing: &Indexing, global: &Global) -> anyhow::Result<Build> {
    if global.content_store != Some(ContentStore::Containerd) {
        return Build::beside(indexing, None);
    }
    match indexing.forms.format {
        None | Some(Format::Aws) => Build::new(&indexing.building, Format::Aws, &indexing.forms.span_size, None),
        Some(Format::Span | Format::Both) => {
            let hint = "leave out --content-store containerd, which keeps AWS's form only";
            Err(fail(Exit::Usage, format!("span indexes are kept in the local index store: {hint}")))
        }
    }
}

/// The image of containerd that the indexes are put beside, if they are not put into the local index store.
async fn index_store(reference: &Reference, global: &Global) -> anyhow::Result<Option<ContainerdIndexStore>> {
    if global.content_store != Some(ContentStore::Containerd) {
        return Ok(None);
    }
    let Reference::Containerd { name } = reference else {
        let hint = "--content-store containerd keeps the index of an image that is in containerd";
        return Err(fail(Exit::Usage, format!("{reference}: {hint}: name it as containerd:NAME")));
    };
    Ok(Some(ContainerdIndexStore::open(name, global).await?))
}

/// A report for programs.
#[must_use]
pub fn json(platform: &str, report: &Report) -> serde_json::Value {
    let (status, found_by, warnings) = describe(&report.done);
    let spans = report.spans.as_ref().map(|spans| {
        let (status, found_by, warnings) = describe(&spans.done);
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
        "no client can read it, so its content is unknown: {reason}; have it signed as the registry demands, or build \
         it again by --force"
    )
}

fn describe(done: &Done) -> (&'static str, Option<String>, Vec<String>) {
    match done {
        Done::UpToDate => ("up to date", None, Vec::new()),
        Done::Published(found_by, visibility) => {
            ("published", Some(crate::commands::found_by(found_by).to_owned()), visibility.warnings())
        }
        Done::Hidden { reason } => ("refused", None, vec![hidden(reason)]),
        Done::Stored => ("stored", None, Vec::new()),
        Done::Nothing => ("dry run", None, Vec::new()),
    }
}
