//! What the commands that work on images share: reference, access, platforms, runtime.

use std::future::Future;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context;
use soci_fs::open::ask_early;
use soci_fs::open::trust::read_trust;
use soci_index::format::digest::Digest;
use soci_index::format::encoding::obstacle;
use soci_index::format::model::Descriptor;
use soci_index::format::platform::{Platform, PlatformSelection};
use soci_index::format::reference::{Reference, RegistryReference};
use soci_index::image::urls::UrlFetcher;
use soci_index::image::{ImageSource, PlatformImage};
use soci_index::publish::Report;
use soci_index::publish::build::{self, BuildOptions, LayerReport, LayerSpans, Observer, Skip};
use soci_index::publish::reuse::Relied;
use soci_index::registry::credentials::Secret;
use soci_index::registry::referrers::Listing;
use soci_index::registry::{ClientCertificate, ClientOptions, CredentialSource, HostSource, Registry, Repository};
use soci_index::trust::Trust;
use tokio::runtime::Handle;

use crate::args::{Access, Platforms, Signers};
use crate::report::exit::{Exit, fail};
use crate::report::output;
use crate::report::progress::Progress;

/// Reads an image reference.
///
/// # Errors
/// When it is none.
pub fn reference(text: &str) -> anyhow::Result<Reference> {
    let parsed: Reference = text.parse().map_err(|error| fail(Exit::Usage, format!("{error}")))?;
    Ok(parsed.settled(Path::exists))
}

/// A repository by its name, `HOST/NAME`.
///
/// # Errors
/// When it is none.
pub fn repository(name: &str, options: &ClientOptions) -> anyhow::Result<Repository> {
    let parsed: RegistryReference = name.parse().map_err(|error| fail(Exit::Usage, format!("{error}")))?;
    if parsed.digest().is_some() || format!("{}/{}", parsed.registry(), parsed.repository()) != name {
        return Err(fail(Exit::Usage, format!("{name} is no repository: expected HOST/NAME without tag and digest")));
    }
    Ok(Registry::new(parsed.registry(), options.clone())?.repository(parsed.repository()))
}

/// Several of them.
///
/// # Errors
/// When one is none.
pub fn repositories(names: &[String], options: &ClientOptions) -> anyhow::Result<Vec<Repository>> {
    names.iter().map(|name| repository(name, options)).collect()
}

/// How to reach registries. Reads the password from standard input if that is asked for.
///
/// # Errors
/// When standard input has no password.
pub fn client_options(access: &Access) -> anyhow::Result<ClientOptions> {
    if access.peer.skip_verify {
        tracing::warn!(
            "the registry's certificate is not checked (--skip-verify): a man in the middle can impersonate it"
        );
    }
    let credentials = match &access.user {
        None if access.peer.refresh.is_some() => {
            CredentialSource::IdentityToken(Secret::new(access.peer.refresh.clone().unwrap_or_default()))
        }
        None => CredentialSource::DockerConfig,
        Some(user) if access.password_stdin => {
            let mut password = String::new();
            std::io::stdin().lock().take(64 << 10).read_to_string(&mut password).context("reading the password")?;
            let password = Secret::new(password.trim_end_matches(['\r', '\n']));
            CredentialSource::Password { user: user.clone(), password }
        }
        Some(user) => {
            let (user, password) = user
                .split_once(':')
                .ok_or_else(|| fail(Exit::Usage, "--user needs USER:PASSWORD, or USER with --password-stdin"))?;
            CredentialSource::Password { user: user.to_owned(), password: Secret::new(password) }
        }
    };
    let (plain_http, ca_file) = (access.plain_http, access.tls_ca_cert.clone());
    let client_certificate = access.tls_cert.clone().map(|certificate| {
        let key = access.tls_key.clone();
        ClientCertificate { certificate, key }
    });
    let hosts = match &access.hosts_dir[..] {
        [] => HostSource::of_this_system().with_registries_conf(),
        given => HostSource { directories: given.to_vec(), ..HostSource::default() },
    };
    let skip_verify = access.peer.skip_verify;
    Ok(ClientOptions {
        credentials,
        skip_verify,
        plain_http,
        hosts,
        ca_file,
        client_certificate,
        is_interactive: true,
        ..ClientOptions::default()
    })
}

/// Which platforms are meant.
///
/// # Errors
/// When one of them is no platform.
pub fn selection(platforms: &Platforms) -> anyhow::Result<PlatformSelection> {
    if platforms.all_platforms {
        return Ok(PlatformSelection::AllPresent);
    }
    let parse = |text: &String| {
        text.parse::<Platform>().map_err(|error| fail(Exit::Usage, format!("could not parse platform {text}: {error}")))
    };
    let platforms = platforms.platforms.iter().map(parse).collect::<anyhow::Result<Vec<_>>>()?;
    Ok(if platforms.is_empty() { PlatformSelection::Host } else { PlatformSelection::Only(platforms) })
}

/// The same for commands of AWS's tool that fail where a platform was not pulled, unless `skip_missing` allows it.
///
/// # Errors
/// As [`selection`].
pub fn whole_selection(platforms: &Platforms, skip_missing: bool) -> anyhow::Result<PlatformSelection> {
    Ok(match selection(platforms)? {
        PlatformSelection::AllPresent if !skip_missing => PlatformSelection::All,
        selection => selection,
    })
}

/// The one platform that is named, else this machine's.
///
/// # Errors
/// When it is no platform.
pub fn one_platform(name: Option<&str>) -> anyhow::Result<PlatformSelection> {
    selection(&Platforms { platforms: name.into_iter().map(str::to_owned).collect(), all_platforms: false })
}

/// The image for the one platform that is meant: the first of those that are named, else this machine's.
///
/// # Errors
/// When it is no platform, or the image has none of the kind.
pub async fn of_platform(source: &ImageSource, platform: Option<&str>) -> anyhow::Result<PlatformImage> {
    of_platform_with(source, platform, |_| {}).await
}

/// The same, and what refers to that image, which is requested concurrently.
///
/// # Errors
/// As [`of_platform`].
pub async fn of_platform_with_listing(
    source: &ImageSource,
    platform: Option<&str>,
) -> anyhow::Result<(PlatformImage, Option<Arc<Listing>>)> {
    let mut listing = None;
    let ask = |image: &Digest| listing = ask_early(source, *image, &Handle::current());
    let image = of_platform_with(source, platform, ask).await?;
    Ok((image, listing))
}

async fn of_platform_with(
    source: &ImageSource,
    platform: Option<&str>,
    on_digest: impl FnMut(&Digest),
) -> anyhow::Result<PlatformImage> {
    let images = source.resolve_with(&one_platform(platform)?, on_digest).await?;
    images.into_iter().next().context("the image has no platform")
}

/// What fetches foreign layers from their URLs, where the user allows it.
///
/// # Errors
/// When no client can be set up.
pub fn foreign_layers(is_allowed: bool) -> anyhow::Result<Option<UrlFetcher>> {
    Ok(is_allowed.then(UrlFetcher::new).transpose()?)
}

/// Whose signatures count for what is reused; `None` where all is reused that fits. `strict` is for what will be
/// signed, or becomes part of an image: then nothing unsigned is.
///
/// # Errors
/// When a file has no key or certificate.
pub fn signers(signers: &Signers, strict: bool) -> anyhow::Result<Option<Arc<Trust>>> {
    let trust = read_trust(&signers.keys, &signers.certificates)?;
    Ok((strict || !trust.is_empty()).then(|| Arc::new(trust)))
}

/// What is said of a report's reused parts, if there are any.
#[must_use]
pub fn reused_line(report: &Report) -> Option<String> {
    let hint = match report.reused? {
        Relied::Unverified => "not verified (--verify-reused checks it, --force builds it again)",
        Relied::Verified => "verified",
        Relied::Signed => "signed",
        Relied::BuiltHere => "built on this machine",
    };
    let from = report.reused_from.iter().map(|from| format!("index {} in {}", from.index, from.place));
    Some(format!("what existed already is reused, {hint}, as listed by {}", from.collect::<Vec<_>>().join(", ")))
}

/// Runs `work` to its end, or until `timeout` (0: none) or an interrupt.
///
/// # Errors
/// What `work` says, or that it was stopped.
pub fn block_on<T>(timeout: Duration, work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let limit = async {
        match timeout {
            Duration::ZERO => std::future::pending().await,
            timeout => tokio::time::sleep(timeout).await,
        }
    };
    run_to_end(async {
        tokio::select! {
            result = interruptible(work, "interrupted; nothing half-done was published") => result,
            () = limit => Err(fail(Exit::Failure, format!("the command did not end within --timeout {timeout:?}"))),
        }
    })
}

/// Does `work` until its end, or until an interrupt, of which `said` is what the command says.
///
/// # Errors
/// What `work` says, or that it was interrupted.
pub async fn interruptible<T>(work: impl Future<Output = anyhow::Result<T>>, said: &str) -> anyhow::Result<T> {
    tokio::select! {
        result = work => result,
        _ = tokio::signal::ctrl_c() => Err(fail(Exit::Interrupted, said)),
    }
}

/// Runs `work` to its end; signals are its own business.
///
/// # Errors
/// What `work` says.
pub fn run_to_end<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("starting threads")?;
    let result = runtime.block_on(work);
    // A blocked background thread must not keep the command from ending.
    runtime.shutdown_timeout(Duration::from_millis(200));
    result
}

/// A progress bar over the layers that will be read, and the builder's listener that drives it.
#[must_use]
pub fn watch<'l>(
    what: &str,
    layers: impl Iterator<Item = &'l Descriptor>,
    options: &BuildOptions,
) -> (Arc<Progress>, Observer) {
    let total = layers.filter(|layer| layer.size >= options.layer_bytes_min).map(|layer| layer.size).sum();
    let progress = Arc::new(Progress::bytes(what, Some(total)));
    let (done, shown) = (AtomicU64::new(0), Arc::clone(&progress));
    let observer = move |event: build::Progress| match event {
        build::Progress::Read { bytes } => shown.at(done.fetch_add(bytes, Ordering::Relaxed) + bytes),
        build::Progress::LayerDone { layer } => tracing::debug!(%layer, "indexed"),
    };
    (progress, Arc::new(observer))
}

/// The line about a layer, as AWS's tool words it.
#[must_use]
pub fn layer_line(report: &LayerReport) -> String {
    let (digest, kind, size) = (report.layer.digest, &report.layer.media_type, report.layer.size);
    match &report.outcome {
        Ok(ztoc) if ztoc.origin.existed() => {
            format!("layer {digest} -> ztoc {} (already exists)", ztoc.reference.digest)
        }
        Ok(ztoc) => format!("layer {digest} -> ztoc {}", ztoc.reference.digest),
        Err(Skip::NotWanted) => match &report.spans {
            Some(spans) if spans.origin.existed() => {
                format!("layer {digest} -> toc {} (already exists)", spans.reference.toc.0)
            }
            Some(spans) => format!("layer {digest} -> toc {}", spans.reference.toc.0),
            None => format!("layer {digest} ({kind}) is left out of the span index"),
        },
        Err(Skip::Small { least }) => {
            format!("ztoc skipped - layer {digest} ({kind}) size {size} is less than min-layer-size {least}")
        }
        Err(Skip::Compression { name }) => format!(
            "ztoc skipped - layer {digest} ({kind}) is compressed in an unsupported format. \
             expect: [tar, gzip, unknown] but got \"{name}\"{}",
            obstacle(kind).map(|reason| format!(": {reason}")).unwrap_or_default()
        ),
        Err(skip @ (Skip::Foreign { .. } | Skip::Damaged { .. } | Skip::Inexpressible { .. })) => {
            format!("ztoc skipped - layer {digest} ({kind}): {skip}")
        }
    }
}

/// Prints what AWS's tool prints about an index: a line for each layer, then for each prefetch artifact.
///
/// # Errors
/// When standard output is closed.
pub fn print_layers(report: &Report) -> anyhow::Result<()> {
    for (layer, artifact) in &report.prefetch {
        output::line(format!("Created prefetch artifact for layer {layer}: {artifact}"))?;
    }
    for layer in &report.layers {
        output::line(layer_line(layer))?;
    }
    Ok(())
}

/// Warns of files that were asked for early and that no layer has.
pub fn warn_missing(report: &Report) {
    for path in &report.missing {
        tracing::warn!("prefetch file {path} not found in any layer (names are compared letter by letter)");
    }
}

/// The same for programs.
#[must_use]
pub fn layer_json(report: &LayerReport) -> serde_json::Value {
    let mut layer = serde_json::json!({
        "digest": report.layer.digest,
        "mediaType": report.layer.media_type,
        "size": report.layer.size,
    });
    let spans = report.spans.as_ref().map(|LayerSpans { reference, origin }| {
        serde_json::json!({
            "toc": { "digest": reference.toc.0, "size": reference.toc.1 },
            "windows": { "digest": reference.windows.0, "size": reference.windows.1 },
            "spanSize": reference.span_bytes,
            "reused": origin.is_reused(),
        })
    });
    let more = match &report.outcome {
        Ok(ztoc) => serde_json::json!({
            "ztoc": { "digest": ztoc.reference.digest, "size": ztoc.reference.size, "spanSize": ztoc.reference.span_bytes },
            "reused": ztoc.origin.is_reused(),
        }),
        Err(Skip::NotWanted) => serde_json::json!({}),
        Err(_) => serde_json::json!({ "skipped": layer_line(report) }),
    };
    if let (Some(layer), serde_json::Value::Object(more)) = (layer.as_object_mut(), more) {
        layer.extend(more);
        layer.extend(spans.map(|spans| ("spans".to_owned(), spans)));
    }
    layer
}
