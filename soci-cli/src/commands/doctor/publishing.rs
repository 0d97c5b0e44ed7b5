//! What publishing an image's index would meet: where the registry lists what refers to an image, which layers can be
//! indexed, whether there is an index, and whether this login may push.
//!
//! What a registry takes is known for certain only once it has taken it. These checks read, except for one upload that
//! is started and aborted on request.

use soci_index::find::Search;
use soci_index::find::choose::{Ordered, Reason};
use soci_index::format::index_manifest::IndexManifest;
use soci_index::format::manifest::{INDEX_V1, INDEX_V2};
use soci_index::format::platform::PlatformSelection;
use soci_index::format::span_index::SPAN_INDEX;
use soci_index::image::{ImageSource, PlatformImage};
use soci_index::publish::build::{BuildOptions, compression};
use soci_index::registry::referrers::FoundBy;
use soci_index::registry::upload::Trial;
use soci_index::registry::{RegistryError, Repository};

use crate::args::Doctor;
use crate::args::config::Config;
use crate::commands::finding::{Finding, bad, good, note};
use crate::commands::{catalogue, choice, image};
use crate::report::exit::{self, Exit, fail};
use crate::report::output;

/// The image, its registry, its index, and the way to one.
///
/// # Errors
/// When the arguments make no sense.
pub(super) async fn findings(arguments: &Doctor, name: &str, config: &Config) -> anyhow::Result<Vec<Finding>> {
    let reference = image::reference(name)?;
    let options = image::client_options(&arguments.access)?;
    let source = ImageSource::open(&reference, &options).await?;
    let repository = source.repository();
    if arguments.push && repository.is_none() {
        return Err(fail(Exit::Usage, format!("--push: {name} is not in a registry")));
    }
    let mut findings = match source.resolve(&PlatformSelection::Host).await {
        Ok(images) => match images.first() {
            Some(image) => of_image(&source, repository, image, name, config).await?,
            None => vec![bad("image", format!("{name} has no platform"), "name another image")],
        },
        Err(error) => vec![bad("image", error.to_string(), "check the name, the network and the login")],
    };
    if let (true, Some(repository)) = (arguments.push, repository) {
        findings.push(push(repository).await);
    }
    Ok(findings)
}

async fn of_image(
    source: &ImageSource,
    repository: Option<&Repository>,
    image: &PlatformImage,
    name: &str,
    config: &Config,
) -> anyhow::Result<Vec<Finding>> {
    let mut findings = vec![good("image", format!("{} layers, {}", image.manifest.layers.len(), image.platform))];
    let layout = catalogue::layout(config)?;
    let search = Search { local: layout.as_ref(), thorough: true, ..Search::new(source, image) };
    let found = search.gather().await?.order(None);
    findings.push(match found.candidates.first() {
        Some(used) => indexed_layers(image, &used.index, name),
        None => layers(image, name),
    });
    let Some(repository) = repository else { return Ok(findings) };
    match repository.referrers(&image.descriptor.digest, Some(INDEX_V1)).await {
        Ok(referrers) => findings.push(listing(repository, image, &referrers.found_by, name).await),
        Err(error) => findings.push(bad("referrers", error.to_string(), "see the registry's documentation")),
    }
    findings.push(index(found, name));
    Ok(findings)
}

/// How many of the layers the index has that a runtime uses.
fn indexed_layers(image: &PlatformImage, index: &IndexManifest, name: &str) -> Finding {
    let all = &image.manifest.layers;
    let count = all.iter().filter(|layer| index.table(&layer.digest).is_some()).count();
    let found = format!("{count} of {} are indexed", all.len());
    if count > 0 {
        return good("layers", if count < all.len() { format!("{found}; the others are read whole") } else { found });
    }
    bad("layers", found, format!("the index is of no use; run: soci publish {name} --force"))
}

/// How many of the layers an index can be made of, by default.
fn layers(image: &PlatformImage, name: &str) -> Finding {
    let (smallest, all) = (BuildOptions::default().layer_bytes_min, &image.manifest.layers);
    let unfit: Vec<&str> = all
        .iter()
        .filter(|layer| compression(&layer.media_type).is_err())
        .map(|layer| layer.media_type.as_str())
        .collect();
    let small = all.iter().filter(|layer| compression(&layer.media_type).is_ok() && layer.size < smallest).count();
    let (count, fit) = (all.len(), all.len() - unfit.len() - small);
    let mut found = format!("{fit} of {count} are indexed");
    if small > 0 {
        found += &format!("; {small} below {}", output::size(smallest));
    }
    if let Some(first) = unfit.first() {
        found += &format!("; {} cannot be: {first}", unfit.len());
    }
    let gzip = "build with `--output type=image,compression=gzip,force-compression=true`";
    match (fit, small, unfit.is_empty()) {
        (0, 0, _) => bad("layers", found, gzip),
        (0, ..) => note("layers", found, format!("to index small ones, too: soci publish {name} --min-layer-size 0")),
        (.., false) => note("layers", found, gzip),
        _ => good("layers", found),
    }
}

/// Where the registry lists what refers to the image.
async fn listing(repository: &Repository, image: &PlatformImage, found_by: &FoundBy, name: &str) -> Finding {
    let elsewhere = format!(
        "`soci publish {name} --v2` puts the index into the image, `soci publish {name} --to HOST/NAME` into another repository"
    );
    let reason = match found_by {
        FoundBy::Api => return good("referrers", "the registry has the API"),
        FoundBy::FallbackTag => return good("referrers", "the registry has no API; the fallback tag is there"),
        FoundBy::Nothing(reason) => reason,
    };
    match repository.fallback_entries(&image.descriptor.digest).await {
        Err(error @ RegistryError::ForeignTag { .. }) => {
            note("referrers", format!("neither the API nor a place for the fallback tag: {error}"), elsewhere)
        }
        _ => note(
            "referrers",
            format!("no API ({reason}) and no fallback tag"),
            format!("`soci publish {name}` makes the tag; if the registry refuses that, {elsewhere}"),
        ),
    }
}

/// Which indexes there are, and the one that a runtime uses.
fn index(found: Ordered, name: &str) -> Finding {
    let count = |kind: &str| found.candidates.iter().filter(|one| one.index.kind() == kind).count();
    let mut there = Vec::new();
    if count(INDEX_V2) > 0 {
        there.push("the image names its index (version 2)".to_owned());
    }
    for (kind, what) in [(INDEX_V1, "of version 1"), (SPAN_INDEX, "of spans")] {
        there.extend(Some(count(kind)).filter(|count| *count > 0).map(|count| format!("{count} {what}")));
    }
    let choice = found.first();
    let others = choice.passed_over.iter().filter(|other| !other.reason.is_usual());
    let others: String = others.map(|other| format!("; {other}")).collect();
    match &choice.chosen {
        Some(chosen) => good("index", format!("{}; used: {}{others}", there.join(", "), choice::describe(chosen))),
        None if choice.passed_over.iter().any(|other| matches!(other.reason, Reason::Refused(_))) => {
            let fix = "have it signed as the registry demands, or have unsigned content admitted";
            bad("index", format!("no client can read it, so the image is read whole{others}"), fix)
        }
        None => {
            bad("index", format!("the image has none, and is read whole{others}"), format!("run: soci publish {name}"))
        }
    }
}

/// Whether this login may push.
async fn push(repository: &Repository) -> Finding {
    let host = repository.registry().name();
    let error = match repository.try_upload().await {
        Ok(Trial::Cancelled) => return good("push", "allowed: an upload was begun, and cancelled"),
        Ok(Trial::LeftOpen { reason }) => {
            let open = "an upload was begun; the registry does not cancel it, and will forget it";
            return good("push", format!("allowed: {open} ({reason})"));
        }
        Err(error) => anyhow::Error::from(error),
    };
    let fix = match exit::code(&error) {
        Exit::Credentials => format!("log in by `docker login {host}` or --user, with push access"),
        Exit::Refused => format!("have the login for {host} given the right to push, or publish elsewhere by --to"),
        _ => "check the name, the network and the registry's documentation".to_owned(),
    };
    bad("push", error.to_string(), fix)
}
