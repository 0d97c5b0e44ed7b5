//! `soci verify`: build the index of an image again from its layers and compare.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context;
use soci_fs::trust::{Provisional, TrustPolicy};
use soci_index::digest::Digest;
use soci_index::discover::{self, Discovery, Which};
use soci_index::image::layout::Layout;
use soci_index::image::store::Store;
use soci_index::image::{ImageSource, PlatformImage};
use soci_index::limits::Limits;
use soci_index::manifest::{INDEX_DIGEST, SociIndex};
use soci_index::registry::Repository;
use soci_index::signature::fetch as signature;
use soci_index::verify::{Checked, Verdict, verify};

use super::image::{self, block_on};
use super::source;
use crate::args::{Global, Verify};
use crate::config::Config;
use crate::exit::{Exit, fail};
use crate::output;

/// An index that was found, and where its blobs are.
struct Found {
    digest: Digest,
    index: SociIndex,
    origin: ImageSource,
    place: String,
}

/// One platform's index and what it turned out to be.
struct Outcome {
    platform: String,
    found: Found,
    checked: Vec<Checked>,
    /// Whether somebody who is trusted has signed, where that was asked.
    signature: Option<signature::Verdict>,
}

impl Outcome {
    /// How much of it is wrong.
    fn faults(&self) -> usize {
        let unsigned = matches!(self.signature, Some(signature::Verdict::None(_)));
        self.checked.iter().filter(|checked| !checked.verdict.is_good()).count() + usize::from(unsigned)
    }
}

/// Runs the command.
///
/// # Errors
/// When there is no index, it cannot be read, or it says something else than the layers.
pub fn run(arguments: &Verify, config: &Config, global: &Global) -> anyhow::Result<()> {
    let reference = image::reference(&arguments.image)?;
    let (options, selection) = (image::client_options(&arguments.access)?, image::selection(&arguments.platforms)?);
    let elsewhere = image::repositories(&arguments.index_from, &options)?;
    let wanted = arguments.index.as_deref().map(str::parse::<Digest>).transpose();
    let wanted = wanted.map_err(|error| fail(Exit::Usage, format!("{error}")))?;
    let policy = (!arguments.keys.is_empty() || !arguments.certificates.is_empty())
        .then(|| TrustPolicy::new(Provisional::RequireSignature, &arguments.keys, &arguments.certificates))
        .transpose()?;
    let outcomes = block_on(global.timeout, async {
        let source = source::open(&reference, &options, global).await?;
        let mut outcomes = Vec::new();
        for image in source.resolve(&selection).await? {
            let found = find(&source, &image, wanted.as_ref(), &elsewhere, config).await?;
            let found = found.ok_or_else(|| {
                let hint = format!("`soci publish {reference}` makes one");
                fail(Exit::Failure, format!("{reference} has no index for {}; {hint}", image.platform))
            })?;
            let building = soci_index::build::BuildOptions { layer_bytes_min: 0, ..Default::default() };
            let indexed = image.manifest.layers.iter().filter(|layer| found.index.ztoc(&layer.digest).is_some());
            let (progress, observer) = image::watch("verifying", indexed, &building);
            let checked = verify(&source, &image, &found.index, &found.origin, &observer).await;
            progress.finish();
            let checked = checked.with_context(|| format!("verifying index {}", found.digest))?;
            let signature = signature(policy.as_ref(), &image, &found).await?;
            outcomes.push(Outcome { platform: image.platform.to_string(), found, checked, signature });
        }
        Ok(outcomes)
    })?;
    if arguments.json {
        output::json(&outcomes.iter().map(json).collect::<Vec<_>>())?;
    } else {
        outcomes.iter().try_for_each(print)?;
    }
    let bad: usize = outcomes.iter().map(Outcome::faults).sum();
    if bad > 0 {
        let hint = "do not use this index; `soci publish --force` makes a right one, --sign-with has it signed";
        return Err(fail(Exit::BadContent, format!("{bad} things are wrong with the index of {reference}: {hint}")));
    }
    Ok(())
}

/// Whether the index is signed, or the image that names it.
async fn signature(
    policy: Option<&TrustPolicy>,
    image: &PlatformImage,
    found: &Found,
) -> anyhow::Result<Option<signature::Verdict>> {
    let Some(policy) = policy else { return Ok(None) };
    let ImageSource::Registry { repository, .. } = &found.origin else {
        let hint = "signatures are looked for in registries only";
        return Err(fail(Exit::Usage, format!("the index {} is in {}: {hint}", found.digest, found.place)));
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let verdict = signature::search(repository, &found.digest, policy.trust(), now).await;
    if found.index.version() == 2 && matches!(verdict, signature::Verdict::None(_)) {
        let of_image = signature::search(repository, &image.descriptor.digest, policy.trust(), now).await;
        if matches!(of_image, signature::Verdict::Good(_)) {
            return Ok(Some(of_image));
        }
    }
    Ok(Some(verdict))
}

/// The index that a runtime would use: one that is named; in repositories that were given; the image's own; beside the
/// image; in the local index store.
async fn find(
    source: &ImageSource,
    image: &PlatformImage,
    wanted: Option<&Digest>,
    elsewhere: &[Repository],
    config: &Config,
) -> anyhow::Result<Option<Found>> {
    let which = wanted.map_or(Which::Newest, Which::Named);
    let subject = &image.descriptor.digest;
    for repository in elsewhere {
        if let Some(found) = accept(discover::on_registry(repository, subject, which).await?)? {
            return Ok(Some(found.at(ImageSource::of_repository(repository), repository.name())));
        }
    }
    let named = image.manifest.annotations.get(INDEX_DIGEST).and_then(|digest| digest.parse::<Digest>().ok());
    if let Some(digest) = named.filter(|digest| wanted.is_none_or(|wanted| wanted == digest)) {
        let raw = source.manifest_by_digest(digest).await?;
        let raw = raw.with_context(|| format!("the image names the index {digest}, which is not there"))?;
        let index = SociIndex::parse(&raw.bytes, &Limits::DEFAULT).with_context(|| format!("index {digest}"))?;
        return Ok(Some(Found { digest, index, origin: source.clone(), place: "the image itself".to_owned() }));
    }
    let discovery = match source {
        ImageSource::Registry { repository, .. } => Some(discover::on_registry(repository, subject, which).await?),
        ImageSource::Store { store: Store::Layout(layout), .. } => Some(discover::in_layout(layout, subject, which)?),
        _ => None,
    };
    if let Some(found) = discovery.map(accept).transpose()?.flatten() {
        return Ok(Some(found.at(source.clone(), "beside the image")));
    }
    let store = config.index_store();
    if !store.join("oci-layout").exists() {
        return Ok(None);
    }
    let layout = Layout::open(&store)?;
    let found = accept(discover::in_layout(&layout, subject, which)?)?;
    let origin = ImageSource::Store { store: Store::Layout(layout), tag: None };
    Ok(found.map(|found| found.at(origin, "the local index store")))
}

/// An index whose place is yet to be said.
struct Accepted(Digest, SociIndex);

impl Accepted {
    fn at(self, origin: ImageSource, place: &str) -> Found {
        Found { digest: self.0, index: self.1, origin, place: place.to_owned() }
    }
}

fn accept(discovery: Discovery) -> anyhow::Result<Option<Accepted>> {
    let Discovery::Found(found) = discovery else { return Ok(None) };
    let index = SociIndex::parse(&found.raw, &Limits::DEFAULT).with_context(|| format!("index {}", found.digest))?;
    Ok(Some(Accepted(found.digest, index)))
}

fn words(verdict: &Verdict) -> String {
    match verdict {
        Verdict::Identical => "identical".to_owned(),
        Verdict::SameFacts { tool } => format!("says the same in other bytes (made by {tool:?})"),
        Verdict::Differs(difference) => format!("DIFFERS: {difference}"),
        Verdict::Unusable { reason } => format!("UNUSABLE: {reason}"),
    }
}

fn print(outcome: &Outcome) -> anyhow::Result<()> {
    let Found { digest, index, place, .. } = &outcome.found;
    output::line(format!("{}: index {digest} (version {}, {place})", outcome.platform, index.version()))?;
    if let Some(signature) = &outcome.signature {
        output::line(format!("index {digest} {signature}"))?;
    }
    for Checked { blob, layer, verdict } in &outcome.checked {
        output::line(format!("layer {layer} -> {blob} {}", words(verdict)))?;
    }
    Ok(())
}

fn json(outcome: &Outcome) -> serde_json::Value {
    let checked = |checked: &Checked| {
        let status = match &checked.verdict {
            Verdict::Identical => "identical",
            Verdict::SameFacts { .. } => "same facts",
            Verdict::Differs(_) => "differs",
            Verdict::Unusable { .. } => "unusable",
        };
        serde_json::json!({
            "digest": checked.blob,
            "layer": checked.layer,
            "status": status,
            "good": checked.verdict.is_good(),
            "detail": words(&checked.verdict),
        })
    };
    serde_json::json!({
        "platform": outcome.platform,
        "index": outcome.found.digest,
        "version": outcome.found.index.version(),
        "place": outcome.found.place,
        "signature": outcome.signature.as_ref().map(ToString::to_string),
        "good": outcome.faults() == 0,
        "checked": outcome.checked.iter().map(checked).collect::<Vec<_>>(),
    })
}
