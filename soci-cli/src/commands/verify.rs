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
use soci_index::manifest::{INDEX_DIGEST, INDEX_V1, SociIndex};
use soci_index::registry::Repository;
use soci_index::signature::fetch as signature;
use soci_index::span_index::{SPAN_INDEX, SpanIndex};
use soci_index::verify::{Checked, Verdict, verify, verify_spans};

use super::image::{self, block_on};
use super::source;
use crate::args::{Global, Verify};
use crate::config::Config;
use crate::exit::{Exit, fail};
use crate::output;

/// An index that was found, and where its blobs are.
struct Found {
    digest: Digest,
    index: Index,
    origin: ImageSource,
    place: String,
}

/// AWS's or ours.
enum Index {
    Soci(SociIndex),
    Spans(SpanIndex),
}

impl Index {
    fn parse(digest: &Digest, kind: &str, json: &[u8]) -> anyhow::Result<Self> {
        let named = || format!("index {digest}");
        Ok(match kind {
            SPAN_INDEX => Self::Spans(SpanIndex::parse(json, &Limits::DEFAULT).with_context(named)?),
            _ => Self::Soci(SociIndex::parse(json, &Limits::DEFAULT).with_context(named)?),
        })
    }

    /// What people call it.
    fn form(&self) -> String {
        match self {
            Self::Soci(index) => format!("version {}", index.version()),
            Self::Spans(_) => "span index".to_owned(),
        }
    }

    fn version(&self) -> Option<u32> {
        match self {
            Self::Soci(index) => Some(index.version()),
            Self::Spans(_) => None,
        }
    }

    fn has(&self, layer: &Digest) -> bool {
        match self {
            Self::Soci(index) => index.ztoc(layer).is_some(),
            Self::Spans(index) => index.toc(layer).is_some(),
        }
    }
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
            let mut indexes = Vec::new();
            for kind in [INDEX_V1, SPAN_INDEX] {
                indexes.extend(find(&source, &image, wanted.as_ref(), &elsewhere, config, kind).await?);
            }
            if indexes.is_empty() {
                let hint = format!("`soci publish {reference}` makes one");
                return Err(fail(Exit::Failure, format!("{reference} has no index for {}; {hint}", image.platform)));
            }
            for found in indexes {
                let checked = check(&source, &image, &found).await?;
                let signature = signature(policy.as_ref(), &image, &found).await?;
                outcomes.push(Outcome { platform: image.platform.to_string(), found, checked, signature });
            }
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

async fn check(source: &ImageSource, image: &PlatformImage, found: &Found) -> anyhow::Result<Vec<Checked>> {
    let building = soci_index::build::BuildOptions { layer_bytes_min: 0, ..Default::default() };
    let indexed = image.manifest.layers.iter().filter(|layer| found.index.has(&layer.digest));
    let (progress, observer) = image::watch("verifying", indexed, &building);
    let checked = match &found.index {
        Index::Soci(index) => verify(source, image, index, &found.origin, &observer).await,
        Index::Spans(index) => verify_spans(source, image, index, &found.origin, &observer).await,
    };
    progress.finish();
    checked.with_context(|| format!("verifying index {}", found.digest))
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
    if found.index.version() == Some(2) && matches!(verdict, signature::Verdict::None(_)) {
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
    kind: &'static str,
) -> anyhow::Result<Option<Found>> {
    let kinds = &[kind];
    let which = wanted.map_or(Which::Newest, Which::Named);
    let subject = &image.descriptor.digest;
    for repository in elsewhere {
        if let Some(found) = accept(discover::preferred_on_registry(repository, subject, which, kinds).await?)? {
            return Ok(Some(found.at(ImageSource::of_repository(repository), repository.name())));
        }
    }
    let named = image.manifest.annotations.get(INDEX_DIGEST).and_then(|digest| digest.parse::<Digest>().ok());
    let is_meant = |digest: &Digest| kind == INDEX_V1 && wanted.is_none_or(|wanted| wanted == digest);
    if let Some(digest) = named.filter(is_meant) {
        let raw = source.manifest_by_digest(digest).await?;
        let raw = raw.with_context(|| format!("the image names the index {digest}, which is not there"))?;
        let index = Index::parse(&digest, kind, &raw.bytes)?;
        return Ok(Some(Found { digest, index, origin: source.clone(), place: "the image itself".to_owned() }));
    }
    let discovery = match source {
        ImageSource::Registry { repository, .. } => {
            Some(discover::preferred_on_registry(repository, subject, which, kinds).await?)
        }
        ImageSource::Store { store: Store::Layout(layout), .. } => {
            Some(discover::preferred_in_layout(layout, subject, which, kinds)?)
        }
        ImageSource::Store { .. } | ImageSource::Foreign(_) => None,
    };
    if let Some(found) = discovery.map(accept).transpose()?.flatten() {
        return Ok(Some(found.at(source.clone(), "beside the image")));
    }
    let store = config.index_store();
    if !store.join("oci-layout").exists() {
        return Ok(None);
    }
    let layout = Layout::open(&store)?;
    let found = accept(discover::preferred_in_layout(&layout, subject, which, kinds)?)?;
    let origin = ImageSource::Store { store: Store::Layout(layout), tag: None };
    Ok(found.map(|found| found.at(origin, "the local index store")))
}

/// An index whose place is yet to be said.
struct Accepted(Digest, Index);

impl Accepted {
    fn at(self, origin: ImageSource, place: &str) -> Found {
        Found { digest: self.0, index: self.1, origin, place: place.to_owned() }
    }
}

fn accept(discovery: Discovery) -> anyhow::Result<Option<Accepted>> {
    let Discovery::Found(found) = discovery else { return Ok(None) };
    let index = Index::parse(&found.digest, found.kind, &found.raw)?;
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
    output::line(format!("{}: index {digest} ({}, {place})", outcome.platform, index.form()))?;
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
        "form": outcome.found.index.form(),
        "place": outcome.found.place,
        "signature": outcome.signature.as_ref().map(ToString::to_string),
        "good": outcome.faults() == 0,
        "checked": outcome.checked.iter().map(checked).collect::<Vec<_>>(),
    })
}
