//! `soci verify`: build the index of an image again from its layers and compare.
//!
//! What is checked is what a runtime uses, found as a runtime finds it, and beside it the first index of the other
//! form.

use anyhow::Context;
use soci_fs::open::trust::{Provisional, TrustPolicy};
use soci_index::find::Search;
use soci_index::find::choose::{Candidate, IndexPlace, PassedOver};
use soci_index::format::digest::Digest;
use soci_index::format::index_manifest::IndexManifest;
use soci_index::format::manifest::INDEX_V2;
use soci_index::image::layout::Layout;
use soci_index::image::urls::UrlFetcher;
use soci_index::image::{ImageSource, PlatformImage};
use soci_index::publish::verify::{Checked, Verdict, verify, verify_spans};
use soci_index::registry::Repository;
use soci_index::trust::fetch as signature;

use crate::args::config::Config;
use crate::args::{Global, Verify};
use crate::commands::image::{self, block_on};
use crate::commands::{catalogue, choice, source};
use crate::report::exit::{Exit, fail};
use crate::report::output;

/// One index of a platform and what it turned out to be.
struct Outcome {
    platform: String,
    found: Candidate,
    checked: Vec<Checked>,
    /// Whether a trusted signer has signed it, if that was requested.
    signature: Option<signature::Verdict>,
    /// What was passed over for it, if it is the one that is used.
    used: Option<Vec<PassedOver>>,
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
    let urls = image::foreign_layers(arguments.foreign.foreign_layers)?;
    let outcomes = block_on(global.timeout, async {
        let source = source::open(&reference, &options, global).await?;
        let finder =
            Finder { source: &source, elsewhere: &elsewhere, wanted: wanted.as_ref(), policy: policy.as_ref() };
        let layout = catalogue::layout(config)?;
        let mut outcomes = Vec::new();
        for image in source.resolve(&selection).await? {
            let found = finder.find(&image, layout.as_ref()).await?;
            if found.is_empty() {
                let hint = format!("`soci publish {reference}` makes one");
                return Err(fail(Exit::Failure, format!("{reference} has no index for {}; {hint}", image.platform)));
            }
            for IndexToVerify { candidate: found, signature, used } in found {
                let origin = finder.origin(&found, layout.as_ref());
                let checked = check(&source, &image, &found, &origin, urls.as_ref()).await?;
                outcomes.push(Outcome { platform: image.platform.to_string(), found, checked, signature, used });
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

async fn check(
    source: &ImageSource,
    image: &PlatformImage,
    found: &Candidate,
    origin: &ImageSource,
    urls: Option<&UrlFetcher>,
) -> anyhow::Result<Vec<Checked>> {
    let building = soci_index::publish::build::BuildOptions { layer_bytes_min: 0, ..Default::default() };
    let indexed = image.manifest.layers.iter().filter(|layer| found.index.table(&layer.digest).is_some());
    let (progress, observer) = image::watch("verifying", indexed, &building);
    let checked = match &found.index {
        IndexManifest::Soci(index) => verify(source, image, index, origin, urls, &observer).await,
        IndexManifest::Spans(index) => verify_spans(source, image, index, origin, urls, &observer).await,
    };
    progress.finish();
    checked.with_context(|| format!("verifying index {}", found.digest))
}

/// What is looked for, and where.
struct Finder<'a> {
    source: &'a ImageSource,
    elsewhere: &'a [Repository],
    wanted: Option<&'a Digest>,
    policy: Option<&'a TrustPolicy>,
}

/// An index that is to be checked.
struct IndexToVerify {
    candidate: Candidate,
    signature: Option<signature::Verdict>,
    used: Option<Vec<PassedOver>>,
}

impl Finder<'_> {
    /// The index that a runtime uses, by the rules of the finder, then the first of the other form: another runtime, or
    /// one for which the first turns out to be of no use, takes that.
    async fn find(&self, image: &PlatformImage, local: Option<&Layout>) -> anyhow::Result<Vec<IndexToVerify>> {
        let search = Search {
            named: self.wanted,
            repositories: self.elsewhere,
            local,
            thorough: true,
            ..Search::new(self.source, image)
        };
        let gathered = search.gather().await?;
        let refused = gathered.refused().first().map(|refused| refused.error.clone());
        let failure = gathered.failure().cloned().or(refused);
        let ordered = gathered.order(self.wanted);
        if let (true, Some(failure)) = (ordered.candidates.is_empty(), failure) {
            return Err(failure.into());
        }
        let mut signatures = Vec::new();
        for candidate in &ordered.candidates {
            signatures.push(self.signature(image, candidate).await?);
        }
        let is_good = |place: &usize| !matches!(signatures.get(*place), Some(Some(signature::Verdict::None(_))));
        let first = |is_meant: &dyn Fn(&Candidate) -> bool| {
            let meant = ordered.candidates.iter().enumerate().filter(|(_, candidate)| is_meant(candidate));
            let places: Vec<usize> = meant.map(|(place, _)| place).collect();
            places.iter().find(|place| is_good(place)).or(places.first()).copied()
        };
        let Some(used) = first(&|_| true) else { return Ok(Vec::new()) };
        let is_spans = |candidate: &Candidate| matches!(candidate.index, IndexManifest::Spans(_));
        let form = ordered.candidates.get(used).map(is_spans);
        let other = first(&|candidate| Some(is_spans(candidate)) != form);
        let take = |place: usize| Some((ordered.candidates.get(place)?.clone(), signatures.get(place)?.clone()));
        let other = other.and_then(take);
        let mut found = Vec::new();
        if let Some((candidate, signature)) = take(used) {
            let doubt = |signature: &Option<signature::Verdict>| signature.as_ref().map(ToString::to_string);
            let doubts: Vec<String> = signatures.iter().map(|signature| doubt(signature).unwrap_or_default()).collect();
            let passed_over = ordered.take(used, &doubts).passed_over;
            choice::log(&passed_over);
            found.push(IndexToVerify { candidate, signature, used: Some(passed_over) });
        }
        found.extend(other.map(|(candidate, signature)| IndexToVerify { candidate, signature, used: None }));
        Ok(found)
    }

    /// Where the blobs of an index are.
    fn origin(&self, found: &Candidate, local: Option<&Layout>) -> ImageSource {
        match (&found.place, local) {
            (IndexPlace::Local, Some(layout)) => ImageSource::of_layout(layout),
            (_, Some(layout)) if found.cached => ImageSource::of_layout(layout),
            (IndexPlace::Named { position, .. }, _) => {
                self.elsewhere.get(*position).map_or_else(|| self.source.clone(), ImageSource::of_repository)
            }
            (IndexPlace::Local | IndexPlace::Image | IndexPlace::Beside, _) => self.source.clone(),
        }
    }

    /// Whether the index is signed, or the image that names it; looked for where a runtime looks.
    async fn signature(&self, image: &PlatformImage, found: &Candidate) -> anyhow::Result<Option<signature::Verdict>> {
        let Some(policy) = self.policy else { return Ok(None) };
        let own = self.source.repository();
        let names_it = (found.index.kind() == INDEX_V2).then_some((own, image.descriptor.digest));
        let of_image = names_it.into_iter().filter_map(|(own, digest)| Some((own?, digest)));
        let repositories = own.into_iter().chain(self.elsewhere);
        let signed = repositories.map(|repository| (repository, found.digest)).chain(of_image);
        let trust = policy.trust_for(own.map(ToString::to_string).as_deref());
        let now = soci_index::clock::seconds();
        let mut last = None;
        for (repository, digest) in signed {
            let verdict = signature::search(repository, &digest, &trust, now).await;
            if matches!(verdict, signature::Verdict::Good(_)) {
                return Ok(Some(verdict));
            }
            last.get_or_insert(verdict);
        }
        if last.is_none() {
            let hint = "signatures are looked for in registries only";
            return Err(fail(Exit::Usage, format!("the index {} is {}: {hint}", found.digest, found.whereabouts())));
        }
        Ok(last)
    }
}

/// AWS's have versions.
fn version(index: &IndexManifest) -> Option<u32> {
    match index {
        IndexManifest::Soci(index) => Some(index.version()),
        IndexManifest::Spans(_) => None,
    }
}

fn form(index: &IndexManifest) -> String {
    version(index).map_or_else(|| "span index".to_owned(), |version| format!("version {version}"))
}

fn describe(verdict: &Verdict) -> String {
    match verdict {
        Verdict::Identical => "identical".to_owned(),
        Verdict::SameFacts { tool } => format!("says the same in other bytes (made by {tool:?})"),
        Verdict::Differs(difference) => format!("DIFFERS: {difference}"),
        Verdict::Unusable { reason } => format!("UNUSABLE: {reason}"),
    }
}

fn print(outcome: &Outcome) -> anyhow::Result<()> {
    let Outcome { platform, found, .. } = outcome;
    let Candidate { digest, index, .. } = found;
    output::line(format!("{platform}: index {digest} ({}, {})", form(index), found.whereabouts()))?;
    if let Some(signature) = &outcome.signature {
        output::line(format!("index {digest} {signature}"))?;
    }
    for Checked { blob, layer, verdict } in &outcome.checked {
        output::line(format!("layer {layer} -> {blob} {}", describe(verdict)))?;
    }
    let others = outcome.used.iter().flatten().filter(|other| !other.reason.is_usual() && other.digest.is_some());
    match others.count() {
        0 => Ok(()),
        count => output::line(format!("{platform}: this one is used; {count} more are passed over, see --json")),
    }
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
            "detail": describe(&checked.verdict),
        })
    };
    serde_json::json!({
        "platform": outcome.platform,
        "index": outcome.found.digest,
        "version": version(&outcome.found.index),
        "form": outcome.found.index.form(),
        "place": outcome.found.whereabouts(),
        "used": outcome.used.is_some(),
        "passedOver": outcome.used.as_deref().map(choice::passed_over_json),
        "signature": outcome.signature.as_ref().map(ToString::to_string),
        "good": outcome.faults() == 0,
        "checked": outcome.checked.iter().map(checked).collect::<Vec<_>>(),
    })
}
