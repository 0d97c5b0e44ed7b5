//! `soci push`: push the newest local index of an image beside it in the registry.

use anyhow::Context;
use soci_index::find::Search;
use soci_index::find::choose::Choice;
use soci_index::find::discover::{self, Discovery, Which};
use soci_index::format::digest::Digest;
use soci_index::format::manifest::INDEX_V1;
use soci_index::format::model::{Descriptor, media_type};
use soci_index::format::span_index::SPAN_INDEX;
use soci_index::image::layout::Layout;
use soci_index::image::{ImageSource, PlatformImage};
use soci_index::publish::local;
use soci_index::publish::refused::refusal;
use soci_index::registry::Repository;
use soci_index::registry::referrers::{Blemish, FoundBy};
use soci_index::registry::upload::PushedBlob;

use crate::args::config::Config;
use crate::args::{Existing, Global, Push};
use crate::commands::image::{self, block_on};
use crate::commands::{catalogue, choice};
use crate::report::exit::{Exit, fail};
use crate::report::output;

/// Runs the command.
///
/// # Errors
/// When there is no such index, or the registry refuses it.
pub fn run(arguments: &Push, config: &Config, global: &Global) -> anyhow::Result<()> {
    let reference = image::reference(&arguments.image)?;
    let (options, selection) = (image::client_options(&arguments.access)?, image::selection(&arguments.platforms)?);
    let layout = Layout::open(&config.index_store()).map_err(|error| {
        fail(Exit::Local, format!("there is no local index store: {error}; `soci create {reference}` makes one"))
    })?;
    let pushed = block_on(global.timeout, async {
        let source = ImageSource::open(&reference, &options).await?;
        let Some(repository) = source.repository() else {
            return Err(fail(Exit::Usage, format!("please provide an image in a registry to push, not {reference}")));
        };
        let mut pushed = Vec::new();
        for image in source.resolve(&selection).await? {
            let (aws, spans) = (first(&layout, &image, INDEX_V1).await?, first(&layout, &image, SPAN_INDEX).await?);
            let indexes: Vec<Choice> = [aws, spans].into_iter().flatten().collect();
            if indexes.is_empty() {
                return Err(nothing(&image));
            }
            for index in &indexes {
                let digest = index.chosen.as_ref().map(|chosen| chosen.digest);
                let elsewhere = match digest {
                    Some(digest) => catalogue::kept_elsewhere(&layout, &digest, &options, global).await?,
                    None => None,
                };
                let store = (&layout, elsewhere.as_ref());
                pushed.extend(one(arguments, store, &image, repository, index).await?);
            }
        }
        Ok(pushed)
    })?;
    if arguments.json {
        return output::json(&pushed);
    }
    Ok(())
}

async fn one(
    arguments: &Push,
    (layout, elsewhere): (&Layout, Option<&ImageSource>),
    image: &PlatformImage,
    repository: &Repository,
    choice: &Choice,
) -> anyhow::Result<Option<serde_json::Value>> {
    let Some(chosen) = &choice.chosen else { return Ok(None) };
    let mut index = Descriptor::of(media_type::MANIFEST, &chosen.raw);
    index.artifact_type = Some(chosen.index.kind().to_owned());
    let say = |text: String| if arguments.quiet || arguments.json { Ok(()) } else { output::line(text) };
    let kind = if index.kind() == SPAN_INDEX { SPAN_INDEX } else { INDEX_V1 };
    if arguments.existing_index != Existing::Allow {
        say("checking if a soci index already exists in remote repository...".to_owned())?;
        if let Discovery::Found(found) =
            discover::preferred_on_registry(repository, &image.descriptor.digest, Which::Newest, &[kind]).await?
        {
            let what = match found.others {
                0 => format!("soci index found in remote repository with digest: {}", found.digest),
                _ => "multiple soci indices found in remote repository".to_owned(),
            };
            if arguments.existing_index == Existing::Skip {
                say(format!("{what}: skipping pushing artifacts for image manifest: {}", image.descriptor.digest))?;
                return Ok(None);
            }
            // Also when quiet, as AWS's tool does.
            if !arguments.json {
                output::line(format!("[WARN] {what}: pushing index anyway"))?;
            }
        }
    }
    if arguments.quiet && !arguments.json {
        output::line(index.digest.to_string())?;
    }
    say(format!("pushing soci index with digest: {}", index.digest))?;
    let parallel = if arguments.max_concurrent_uploads == 0 { 3 } else { arguments.max_concurrent_uploads };
    let note = |digest: &Digest, pushed: PushedBlob| {
        let what = match pushed {
            PushedBlob::Present => "skipped",
            PushedBlob::Mounted | PushedBlob::Uploaded => "successfully pushed",
        };
        // A closed output is found out by the next line.
        let _ = say(format!("{what} artifact with digest: {digest}"));
    };
    let pushed = local::push(layout, elsewhere, &index, repository, parallel, note).await;
    let mut pushed = pushed.with_context(|| format!("pushing index {}", index.digest))?;
    if let Some(reason) = refusal(repository, &index.digest).await {
        pushed.visibility.add(Blemish::Refused { reason });
    }
    say(format!("successfully pushed artifact with digest: {}", index.digest))?;
    if let FoundBy::FallbackTag = pushed.found_by {
        say("the registry has no referrers API: the index is listed in the image's fallback tag".to_owned())?;
    }
    let warnings = pushed.visibility.warnings();
    for warning in &warnings {
        say(format!("[WARN] {warning}"))?;
    }
    let mut document = serde_json::json!({
        "platform": image.platform.to_string(),
        "image": image.descriptor.digest,
        "index": index.digest,
        "foundBy": crate::commands::found_by(&pushed.found_by),
        "warnings": warnings,
    });
    document.as_object_mut().into_iter().for_each(|document| document.extend(choice::json(choice)));
    Ok(Some(document))
}

/// The index of an image that was made here, of the kind that is first by the rules of the finder.
async fn first(layout: &Layout, image: &PlatformImage, kind: &'static str) -> anyhow::Result<Option<Choice>> {
    let search = Search { local: Some(layout), referring: &[kind], ..Search::of(image.descriptor.digest) };
    let choice = search.gather().await?.order(None).first();
    choice::log(&choice.passed_over);
    Ok(choice.chosen.is_some().then_some(choice))
}

fn nothing(image: &PlatformImage) -> anyhow::Error {
    let platform = &image.platform;
    let hint = "run `soci create` first, or `soci publish` to do both in one step";
    fail(Exit::Failure, format!("could not find any soci index manifest v1 to push for platform {platform}; {hint}"))
}
