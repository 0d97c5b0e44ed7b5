//! `soci publish`: index an image in a registry and push the index beside it.

use std::time::{Duration, Instant};

use anyhow::Context;
use soci_index::image::{ImageSource, PlatformImage};
use soci_index::manifest::ZtocReference;
use soci_index::publish::{self, Done, Report};
use soci_index::registry::Repository;

use super::create::json;
use super::image::{self, block_on};
use crate::args::Publish;
use crate::exit::{Exit, fail};
use crate::output;

/// Runs the command.
///
/// # Errors
/// When the image cannot be read or indexed, or the registry refuses the index.
pub fn run(arguments: &Publish, timeout: Duration) -> anyhow::Result<()> {
    let reference = image::reference(&arguments.image)?;
    let (options, selection) = (image::client_options(&arguments.access)?, image::selection(&arguments.platforms)?);
    let start = Instant::now();
    let (reports, traffic) = block_on(timeout, async {
        let source = ImageSource::open(&reference, &options).await?;
        let ImageSource::Registry { repository, .. } = &source else {
            let hint = format!("{reference} is not in a registry: `soci create` indexes it into the local store");
            return Err(fail(Exit::Usage, hint));
        };
        let (mut reports, mut known) = (Vec::new(), Vec::new());
        for image in source.resolve(&selection).await? {
            let report = one(arguments, &source, &image, repository, &known).await;
            let report = report.with_context(|| format!("{reference} for {}", image.platform))?;
            // Platforms share layers.
            known.extend(report.layers.iter().filter_map(|layer| Some(layer.outcome.as_ref().ok()?.reference.clone())));
            reports.push((image.platform.to_string(), report));
        }
        Ok((reports, repository.registry().traffic()))
    })?;
    if arguments.json {
        let images: Vec<_> = reports.iter().map(|(platform, report)| json(platform, report)).collect();
        return output::json(&serde_json::json!({
            "image": reference.to_string(),
            "images": images,
            "requests": traffic.requests,
            "bytesReceived": traffic.bytes_received,
            "bytesSent": traffic.bytes_sent,
            "seconds": start.elapsed().as_secs_f64(),
        }));
    }
    for (platform, report) in &reports {
        print(platform, report)?;
    }
    let (received, sent) = (output::size(traffic.bytes_received), output::size(traffic.bytes_sent));
    output::line(format!("{received} read, {sent} sent, {}", output::time(start.elapsed())))
}

async fn one(
    arguments: &Publish,
    source: &ImageSource,
    image: &PlatformImage,
    repository: &Repository,
    known: &[ZtocReference],
) -> anyhow::Result<Report> {
    let building = image::build_options(&arguments.building);
    let (progress, observer) = image::watch("indexing", image.manifest.layers.iter(), &building);
    let force = arguments.building.force;
    let report = if arguments.dry_run {
        publish::rehearse(source, image, Some(repository), &building, force, &observer).await
    } else {
        publish::publish(source, image, repository, &building, known, force, &observer).await
    };
    progress.finish();
    Ok(report?)
}

fn print(platform: &str, report: &Report) -> anyhow::Result<()> {
    for layer in &report.layers {
        output::line(image::layer_line(layer))?;
    }
    let what = match &report.done {
        Done::UpToDate => "is up to date".to_owned(),
        Done::Published(found_by, _) => format!("published, found by {}", super::found_by(found_by)),
        Done::Stored => "stored".to_owned(),
        Done::Nothing => "built, not pushed (dry run)".to_owned(),
    };
    let indexed = report.layers.iter().filter(|layer| layer.outcome.is_ok()).count();
    output::line(format!(
        "{platform}: index {} {what}; {indexed} of {} layers indexed",
        report.index,
        report.layers.len()
    ))?;
    if let Done::Published(_, visibility) = &report.done {
        for warning in visibility.warnings() {
            output::line(format!("{platform}: warning: {warning}"))?;
        }
    }
    Ok(())
}
