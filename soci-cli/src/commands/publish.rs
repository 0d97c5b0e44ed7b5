//! `soci publish`: index an image in a registry and push the index: beside it, into another repository, or into the
//! image.

use std::time::{Duration, Instant};

use anyhow::Context;
use soci_index::image::ImageSource;
use soci_index::image::reference::RegistryReference;
use soci_index::known::Known;
use soci_index::publish::{self, Done, Job, Report};
use soci_index::registry::{Repository, Traffic};
use soci_index::v2::EntryNotes;

use super::convert::{self, Conversion};
use super::create::json;
use super::image::{self, block_on};
use crate::args::Publish;
use crate::exit::{Exit, fail};
use crate::output;

/// Runs the command.
///
/// # Errors
/// When the image cannot be read or indexed, or the registry refuses the index. Also when there was nothing to do and
/// that was to be told by an exit code.
pub fn run(arguments: &Publish, timeout: Duration) -> anyhow::Result<()> {
    let up_to_date = if arguments.v2 { into_image(arguments, timeout)? } else { beside(arguments, timeout)? };
    if up_to_date && arguments.detailed_exit_code {
        return Err(fail(Exit::UpToDate, "everything was in place already"));
    }
    Ok(())
}

/// Makes the image a SOCI-enabled one.
fn into_image(arguments: &Publish, timeout: Duration) -> anyhow::Result<bool> {
    let name = arguments.new_name.as_ref().unwrap_or(&arguments.image);
    let client = image::client_options(&arguments.access)?;
    let conversion = Conversion {
        source: image::reference(&arguments.image)?,
        target: convert::target(name, &client)?,
        client,
        notes: EntryNotes::Kept,
        building: &arguments.building,
        platforms: &arguments.platforms,
    };
    let converted = conversion.run(timeout)?;
    if arguments.json {
        conversion.print_json(&converted)?;
        return Ok(converted.up_to_date);
    }
    converted.images.iter().chain(&converted.skipped).try_for_each(|(_, report)| image::print_layers(report))?;
    output::line(conversion.summary(&converted))?;
    Ok(converted.up_to_date)
}

/// Pushes indexes that refer to the image.
fn beside(arguments: &Publish, timeout: Duration) -> anyhow::Result<bool> {
    let reference = image::reference(&arguments.image)?;
    let (options, selection) = (image::client_options(&arguments.access)?, image::selection(&arguments.platforms)?);
    let start = Instant::now();
    let (reports, traffic) = block_on(timeout, async {
        let source = ImageSource::open(&reference, &options).await?;
        let ImageSource::Registry { repository, .. } = &source else {
            let hint = format!("{reference} is not in a registry: `soci create` indexes it into the local store");
            return Err(fail(Exit::Usage, hint));
        };
        let target = match &arguments.to {
            Some(name) => image::repository(name, &options)?,
            None => repository.clone(),
        };
        let origin = ImageSource::of_repository(&target);
        let (mut reports, mut known) = (Vec::new(), Known::default());
        for image in source.resolve(&selection).await? {
            let report = one(arguments, &source, &image, &target, &known).await;
            let report = report.with_context(|| format!("{reference} for {}", image.platform))?;
            // Platforms share layers.
            let ztocs = report.layers.iter().filter_map(|layer| Some(layer.outcome.as_ref().ok()?.reference.clone()));
            known.add_built(ztocs, &origin);
            reports.push((image.platform.to_string(), report));
        }
        let others = arguments.to.iter().map(|_| target.registry().traffic());
        Ok((reports, others.chain([repository.registry().traffic()]).sum::<Traffic>()))
    })?;
    reports.iter().for_each(|(_, report)| image::warn_missing(report));
    let up_to_date = reports.iter().all(|(_, report)| report.done == Done::UpToDate);
    if arguments.json {
        let images: Vec<_> = reports.iter().map(|(platform, report)| json(platform, report)).collect();
        output::json(&serde_json::json!({
            "image": reference.to_string(),
            "repository": arguments.to,
            "images": images,
            "requests": traffic.requests,
            "bytesReceived": traffic.bytes_received,
            "bytesSent": traffic.bytes_sent,
            "seconds": start.elapsed().as_secs_f64(),
        }))?;
        return Ok(up_to_date);
    }
    for (platform, report) in &reports {
        print(platform, report)?;
    }
    let (received, sent) = (output::size(traffic.bytes_received), output::size(traffic.bytes_sent));
    output::line(format!("{received} read, {sent} sent, {}", output::time(start.elapsed())))?;
    if let Some(repository) = &arguments.to {
        output::line(format!(
            "nodes find it by [[index_repository]] match = \"{}\", repository = \"{repository}\"; `soci mount` by --index-from",
            pattern(&arguments.image)
        ))?;
    }
    Ok(up_to_date)
}

/// The images of the same repository, as a rule for nodes names them.
fn pattern(image: &str) -> String {
    let parsed: Option<RegistryReference> = image.parse().ok();
    parsed.map_or_else(|| image.to_owned(), |parsed| format!("{}/{}", parsed.registry(), parsed.repository()))
}

async fn one(
    arguments: &Publish,
    source: &ImageSource,
    image: &soci_index::image::PlatformImage,
    repository: &Repository,
    known: &Known,
) -> anyhow::Result<Report> {
    let building = image::build_options(&arguments.building)?;
    let (progress, observer) = image::watch("indexing", image.manifest.layers.iter(), &building);
    let job = Job { source, image, options: &building, force: arguments.building.force, observer: &observer };
    let report = if arguments.dry_run {
        publish::rehearse(&job, Some(repository), known).await
    } else {
        publish::publish(&job, repository, known).await
    };
    progress.finish();
    Ok(report?)
}

fn print(platform: &str, report: &Report) -> anyhow::Result<()> {
    image::print_layers(report)?;
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
