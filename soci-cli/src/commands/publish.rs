//! `soci publish`: index an image and push the index: beside it, into another repository, or into the image.

use std::time::{Duration, Instant};

use anyhow::Context;
use soci_index::format::digest::Digest;
use soci_index::format::reference::{Reference, RegistryReference};
use soci_index::image::ImageSource;
use soci_index::publish::known::Known;
use soci_index::publish::v2::EntryNotes;
use soci_index::publish::{self, Job, Report};
use soci_index::registry::{ClientOptions, Repository, Traffic};

use crate::args::{Global, Platforms, Publish};
use crate::commands::build::Build;
use crate::commands::convert::{self, Conversion};
use crate::commands::create::json;
use crate::commands::image::{self, block_on};
use crate::commands::outcome::{describe, span_lines};
use crate::commands::{sign, source};
use crate::report::exit::{Exit, fail};
use crate::report::output;

/// What helps where a signed image would be replaced.
const SIGNED_HINT: &str = "the image is signed: have the new one signed by --sign-with COMMAND, give it a name of its own \
     by --as IMAGE, or say --replace-signed";

/// Runs the command.
///
/// # Errors
/// When the image cannot be read or indexed, or the registry refuses the index. Also if there was nothing to do and an
/// exit code for that was requested.
pub fn run(arguments: &Publish, global: &Global) -> anyhow::Result<()> {
    if let Some(command) = &arguments.sign_with {
        sign::check(command)?;
    }
    let client = image::client_options(&arguments.indexing.access)?;
    let up_to_date =
        if arguments.v2 { into_image(arguments, client, global)? } else { beside(arguments, &client, global)? };
    if up_to_date && arguments.detailed_exit_code {
        return Err(fail(Exit::UpToDate, "everything was in place already"));
    }
    Ok(())
}

/// Makes the image a SOCI-enabled one. Answers whether it was one already.
fn into_image(arguments: &Publish, client: ClientOptions, global: &Global) -> anyhow::Result<bool> {
    let name = arguments.new_name.as_ref().unwrap_or(&arguments.image);
    let conversion = Conversion {
        source: image::reference(&arguments.image)?,
        target: convert::target(name, &client)?,
        client,
        notes: EntryNotes::Kept,
        // What becomes part of an image goes wherever that goes.
        build: Build::within(&arguments.indexing, image::signers(&arguments.signers, true)?)?,
        selection: image::selection(&arguments.indexing.platforms)?,
        replaces: None,
        local: None,
        replaces_signed: arguments.replace_signed || arguments.sign_with.is_some(),
        signed_hint: SIGNED_HINT,
    };
    let target = conversion.target.repository();
    if arguments.sign_with.is_some() && target.is_none() {
        let place = &conversion.target;
        return Err(fail(Exit::Usage, format!("--sign-with signs what is in a registry, and {place} is not")));
    }
    let converted = conversion.run(global)?;
    if arguments.json {
        conversion.print_json(&converted)?;
    } else {
        converted.images.iter().chain(&converted.skipped).try_for_each(|(_, report)| image::print_layers(report))?;
        conversion.summary(&converted).into_iter().try_for_each(output::line)?;
    }
    if let Some(repository) = target {
        // Clients look at the image and its manifests, a node at the indexes of its platform.
        sign_all(arguments, repository, &converted.signable, global.timeout)?;
        look_back(repository, &converted.signable, global.timeout)?;
    }
    Ok(converted.up_to_date)
}

/// Has manifests signed that are not yet.
fn sign_all(
    arguments: &Publish,
    repository: &Repository,
    manifests: &[Digest],
    timeout: Duration,
) -> anyhow::Result<()> {
    let Some(command) = &arguments.sign_with else { return Ok(()) };
    let trust = image::signers(&arguments.signers, true)?.unwrap_or_default();
    block_on(timeout, sign::sign_all(command, repository, manifests, &trust))
}

/// Warns of pushed indexes that the registry refuses to serve to clients.
fn look_back(repository: &Repository, manifests: &[Digest], timeout: Duration) -> anyhow::Result<()> {
    block_on(timeout, async {
        sign::look_back(repository, manifests).await;
        Ok(())
    })
}

/// Pushes indexes that refer to the image. Answers whether they were all there.
fn beside(arguments: &Publish, client: &ClientOptions, global: &Global) -> anyhow::Result<bool> {
    let signed_by = image::signers(&arguments.signers, arguments.sign_with.is_some())?;
    let plan = Plan {
        image: image::reference(&arguments.image)?,
        to: arguments.to.as_deref(),
        client,
        build: &Build::beside(&arguments.indexing, signed_by)?,
        platforms: &arguments.indexing.platforms,
        dry_run: arguments.dry_run,
        will_sign: arguments.sign_with.is_some(),
    };
    let start = Instant::now();
    let published = block_on(global.timeout, plan.carry_out(global))?;
    let Published { reports, traffic, target } = &published;
    reports.iter().for_each(|(_, report)| image::warn_missing(report));
    if arguments.json {
        let images: Vec<_> = reports.iter().map(|(platform, report)| json(platform, report)).collect();
        output::json(&serde_json::json!({
            "image": plan.image.to_string(),
            "repository": target.to_string(),
            "images": images,
            "requests": traffic.requests,
            "bytesReceived": traffic.bytes_received,
            "bytesSent": traffic.bytes_sent,
            "seconds": start.elapsed().as_secs_f64(),
        }))?;
    } else {
        reports.iter().try_for_each(|(platform, report)| print(platform, report))?;
        let (received, sent) = (output::size(traffic.bytes_received), output::size(traffic.bytes_sent));
        output::line(format!("{received} read, {sent} sent, {}", output::time(start.elapsed())))?;
        print_hint(&plan)?;
    }
    for (_, report) in reports.iter().filter(|_| !arguments.dry_run) {
        let indexes: Vec<Digest> = report.indexes().collect();
        sign_all(arguments, target, &indexes, global.timeout)?;
        if plan.will_sign {
            look_back(target, &indexes, global.timeout)?;
        }
    }
    Ok(published.up_to_date())
}

/// One publishing of version 1 indexes.
#[derive(Debug)]
pub struct Plan<'a> {
    pub image: Reference,
    /// The repository of the indexes, unless it is the image's own.
    pub to: Option<&'a str>,
    /// How to reach registries.
    pub client: &'a ClientOptions,
    pub build: &'a Build,
    pub platforms: &'a Platforms,
    /// Push nothing.
    pub dry_run: bool,
    /// Whether the indexes are signed afterwards.
    pub will_sign: bool,
}

#[derive(Debug)]
pub struct Published {
    /// The platforms, each with its report.
    pub reports: Vec<(String, Report)>,
    /// What went over the network.
    pub traffic: Traffic,
    /// The repository of the indexes.
    pub target: Repository,
}

impl Published {
    /// Whether all was there already.
    #[must_use]
    pub fn up_to_date(&self) -> bool {
        self.reports.iter().all(|(_, report)| report.is_up_to_date())
    }
}

impl Plan<'_> {
    /// Carries it out.
    ///
    /// # Errors
    /// When the image cannot be read or indexed, or the registry refuses an index.
    pub async fn carry_out(&self, global: &Global) -> anyhow::Result<Published> {
        let selection = image::selection(self.platforms)?;
        let Build { options, force } = self.build;
        let source = source::open(&self.image, self.client, global).await?;
        let target = self.target(&source)?;
        let images = source.resolve(&selection).await?;
        if let Some(caveat) = source::caveat(&self.image, &source, &images) {
            tracing::warn!("{caveat}");
        }
        let origin = ImageSource::of_repository(&target);
        let (mut reports, mut known) = (Vec::new(), Known::default());
        for image in images {
            let (progress, observer) = image::watch("indexing", image.manifest.layers.iter(), options);
            let job = Job { source: &source, image: &image, options, force: *force, observer: &observer };
            let report = if self.dry_run {
                publish::rehearse(&job, Some(&target), &known).await
            } else {
                publish::publish(&job, &target, &known).await
            };
            progress.finish();
            let mut report = report.with_context(|| format!("{} for {}", self.image, image.platform))?;
            // What will be signed is looked at after that.
            if !self.will_sign {
                report.look_back(&target).await;
            }
            // Platforms share layers.
            known.add_built(&report.layers, &origin, &report.reused_from);
            reports.push((image.platform.to_string(), report));
        }
        let own = source.repository().filter(|_| self.to.is_some()).map(|repository| repository.registry().traffic());
        let traffic = own.into_iter().chain([target.registry().traffic()]).sum();
        Ok(Published { reports, traffic, target })
    }

    /// Where the indexes go.
    fn target(&self, source: &ImageSource) -> anyhow::Result<Repository> {
        match (self.to, source.repository()) {
            (Some(name), _) => image::repository(name, self.client),
            (None, Some(repository)) => Ok(repository.clone()),
            (None, None) => {
                let image = &self.image;
                let hint = "name the repository that the image is pushed to by --to HOST/NAME";
                Err(fail(Exit::Usage, format!("{image} is not in a registry: {hint}, or index it by `soci create`")))
            }
        }
    }
}

/// How clients find the index that do not query the image's referrers.
fn print_hint(plan: &Plan<'_>) -> anyhow::Result<()> {
    let (Some(repository), Reference::Registry(image)) = (plan.to, &plan.image) else { return Ok(()) };
    if own_repository(image) == repository {
        return Ok(());
    }
    let own = own_repository(image);
    output::line(format!(
        "nodes find it by [[index_repository]] match = \"{own}\", repository = \"{repository}\"; `soci mount` by \
         --index-from {repository}"
    ))
}

fn own_repository(image: &RegistryReference) -> String {
    format!("{}/{}", image.registry(), image.repository())
}

fn print(platform: &str, report: &Report) -> anyhow::Result<()> {
    image::print_layers(report)?;
    let what = describe(&report.done);
    let indexed = report.layers.iter().filter(|layer| layer.outcome.is_ok() || layer.spans.is_some()).count();
    output::line(format!(
        "{platform}: index {} {what}; {indexed} of {} layers indexed",
        report.index,
        report.layers.len()
    ))?;
    if let Some(line) = image::reused_line(report) {
        output::line(format!("{platform}: {line}"))?;
    }
    for other in &report.used_instead {
        output::line(format!(
            "{platform}: warning: index {other} is beside the image, too, and goes before this one; delete it in the \
             registry, or name the index that is meant by --index"
        ))?;
    }
    span_lines(platform, report).into_iter().try_for_each(output::line)
}
