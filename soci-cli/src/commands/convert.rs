//! `soci convert`: make an image that carries its index within itself.

use std::path::PathBuf;

use anyhow::Context;
use parking_lot::Mutex;
use soci_index::format::digest::Digest;
use soci_index::format::platform::PlatformSelection;
use soci_index::format::reference::{REGISTRY_SCHEME, Reference, RegistryReference};
use soci_index::image::layout::Layout;
use soci_index::publish::PublishError;
use soci_index::publish::build::Format;
use soci_index::publish::convert::{ConvertOptions, Converted, Target, convert};
use soci_index::publish::local::{self, StoreLabels};
use soci_index::publish::v2::EntryNotes;
use soci_index::registry::{ClientOptions, Registry};

use crate::args::config::Config;
use crate::args::{self, Convert, Global};
use crate::commands::build::Build;
use crate::commands::catalogue;
use crate::commands::containerd;
use crate::commands::create::json;
use crate::commands::image::{self, block_on};
use crate::commands::outcome::span_lines;
use crate::commands::source;
use crate::report::exit::{Exit, fail};
use crate::report::output;

/// Runs the command.
///
/// # Errors
/// When the image cannot be read or indexed, or the destination not be written.
pub fn run(arguments: &Convert, config: &Config, global: &Global) -> anyhow::Result<()> {
    let client = image::client_options(&arguments.access)?;
    let missing = || fail(Exit::Usage, "destination needs to be specified".to_owned());
    let destined = arguments.destination.as_deref().ok_or_else(missing)?;
    let global = &as_meant(arguments, destined, global);
    let (source, target) = if arguments.standalone {
        standalone(arguments, destined)?
    } else {
        let source = source::meant(image::reference(&arguments.source)?, global);
        (source, destination(destined, &client, global)?)
    };
    let notes = if arguments.keep_annotations { EntryNotes::Kept } else { EntryNotes::Replaced };
    let format = if arguments.span_index { Format::Both } else { Format::Aws };
    let signed_by = image::signers(&arguments.signers, true)?;
    let build = Build::new(&arguments.building, format, &arguments.span_size, signed_by)?;
    let selection = image::whole_selection(&arguments.platforms, arguments.skip_missing_platforms)?;
    let local = if arguments.standalone { None } else { catalogue::layout(config)? };
    let conversion = Conversion {
        source,
        target,
        client,
        notes,
        build,
        selection,
        replaces: None,
        replaces_signed: arguments.replace_signed,
        signed_hint: "choose another destination, convert by `soci publish --v2` with --sign-with, or say --replace-signed",
        local,
    };
    let converted = conversion.run(global)?;
    if let Err(error) = list(&conversion, destined, &converted, config) {
        tracing::warn!(
            "{}: the image is there, but `soci index list` will not show its indexes: {error:#}",
            conversion.target
        );
    }
    if arguments.json {
        return conversion.print_json(&converted);
    }
    // Scripts for AWS's tool read nothing else than these lines.
    converted.images.iter().chain(&converted.skipped).try_for_each(|(_, report)| image::print_layers(report))?;
    conversion.summary(&converted).iter().for_each(|line| tracing::info!("{line}"));
    Ok(())
}

/// The options as if containerd had been named, where that of this machine has the source and nothing says that
/// registries are meant: so does AWS's tool, which knows no other place.
fn as_meant(arguments: &Convert, destination: &str, global: &Global) -> Global {
    let Convert { source, standalone, span_index, replace_signed, access, .. } = arguments;
    let says_registry = *span_index || *replace_signed || access.user.is_some();
    if *standalone || says_registry || !source::is_plain(destination) {
        return global.clone();
    }
    let Some(here) = source::here(source, global) else { return global.clone() };
    tracing::info!(
        "{source} is in this machine's containerd, and {destination} goes there; registries are meant by \
         {REGISTRY_SCHEME}{source} {REGISTRY_SCHEME}{destination}"
    );
    here
}

/// Has the local index store list the new indexes, which are kept with the image.
fn list(conversion: &Conversion, name: &str, converted: &Converted, config: &Config) -> anyhow::Result<()> {
    let Some(place) = conversion.target.kept_in() else { return Ok(()) };
    config.keep_private()?;
    let layout = Layout::open_or_create(&config.index_store())?;
    let name = source::name(&image::reference(name)?);
    let labels = StoreLabels { name, created: crate::commands::now() };
    let runtime = tokio::runtime::Builder::new_current_thread().build().context("starting threads")?;
    for (platform, json) in &converted.indexes {
        runtime.block_on(local::record_index(&layout, &labels, platform, json.clone(), &place))?;
    }
    Ok(())
}

/// Source and destination as paths.
fn standalone(arguments: &Convert, destination: &str) -> anyhow::Result<(Reference, Target)> {
    let (input, output) = (PathBuf::from(&arguments.source), PathBuf::from(destination));
    let kind = std::fs::metadata(&input)
        .map_err(|error| fail(Exit::Local, format!("failed to access input {}: {error}", input.display())))?;
    let source = if kind.is_dir() {
        Reference::Layout { directory: input, tag: None }
    } else {
        Reference::Archive { file: input, tag: None }
    };
    let target = match arguments.format {
        args::Container::OciDir => Target::NewLayout { directory: output },
        args::Container::OciArchive => Target::Archive { file: output, tag: None },
    };
    Ok((source, target))
}

/// The destination of `soci convert`: as with the source, a plain name means containerd if one was named.
fn destination(name: &str, options: &ClientOptions, global: &Global) -> anyhow::Result<Target> {
    let meant = image::reference(name).map(|reference| {
        if let Reference::Registry(plain) = &reference {
            tagged(plain)?;
        }
        Ok::<_, anyhow::Error>(source::meant(reference, global))
    });
    let Ok(Reference::Containerd { name: image }) = meant.unwrap_or_else(Err) else { return target(name, options) };
    Ok(Target::Foreign(containerd::target(&image, global)?))
}

fn untagged(reason: &str) -> anyhow::Error {
    let form = "the destination image must be a tagged ref of the form \"registry/repository:tag\"";
    fail(Exit::Usage, format!("{form}: {reason}"))
}

fn tagged(reference: &RegistryReference) -> anyhow::Result<&str> {
    if reference.digest().is_some() {
        return Err(untagged("reference must not contain a digest"));
    }
    reference.tag().ok_or_else(|| untagged("reference must be tagged"))
}

/// A destination by its name, outside of containerd.
///
/// # Errors
/// When it is none.
pub fn target(name: &str, options: &ClientOptions) -> anyhow::Result<Target> {
    Ok(match image::reference(name).map_err(|error| untagged(&error.to_string()))? {
        Reference::Registry(reference) => {
            let tag = tagged(&reference)?.to_owned();
            let repository = Registry::new(reference.registry(), options.clone())?.repository(reference.repository());
            Target::Registry { repository, tag }
        }
        Reference::Layout { directory, tag } => Target::Layout { directory, tag },
        Reference::Archive { file, tag } => Target::Archive { file, tag },
        Reference::Saved { .. } => return Err(untagged("docker's own form holds no indexes; write an oci-archive:")),
        Reference::Containerd { .. } => {
            return Err(untagged("this command does not write into containerd; `soci convert` does"));
        }
    })
}

/// One conversion, of either command.
pub(crate) struct Conversion {
    pub(crate) source: Reference,
    pub(crate) target: Target,
    pub(crate) client: ClientOptions,
    pub(crate) notes: EntryNotes,
    pub(crate) build: Build,
    /// Which platforms get an index.
    pub(crate) selection: PlatformSelection,
    /// What the target's tag must still name at the end, if that matters.
    pub(crate) replaces: Option<Digest>,
    /// The local index store, for what was built here.
    pub(crate) local: Option<Layout>,
    /// Whether a signed image may be replaced by one that is not.
    pub(crate) replaces_signed: bool,
    /// What helps if one would be.
    pub(crate) signed_hint: &'static str,
}

impl Conversion {
    /// Carries it out.
    pub(crate) fn run(&self, global: &Global) -> anyhow::Result<Converted> {
        block_on(global.timeout, self.carry_out(global))
    }

    /// The same inside a runtime.
    ///
    /// # Errors
    /// When the image cannot be read or indexed, or the destination not be written.
    pub(crate) async fn carry_out(&self, global: &Global) -> anyhow::Result<Converted> {
        let options = ConvertOptions {
            build: self.build.options.clone(),
            platforms: self.selection.clone(),
            notes: self.notes,
            force: self.build.force,
            replaces: self.replaces,
            local: self.local.clone(),
            replaces_signed: self.replaces_signed,
        };
        let source = source::open(&self.source, &self.client, global).await?;
        let bars = Mutex::new(Vec::new());
        let converted = convert(&source, &self.target, &options, |image| {
            let (progress, observer) = image::watch("indexing", image.manifest.layers.iter(), &options.build);
            bars.lock().push(progress);
            observer
        });
        let converted = converted.await;
        bars.lock().iter().for_each(|bar| bar.finish());
        let converted = match converted {
            Err(signed @ PublishError::Signed { .. }) => Err(anyhow::Error::from(signed).context(self.signed_hint)),
            other => other.map_err(anyhow::Error::from),
        };
        let converted = converted.with_context(|| format!("converting {}", self.source))?;
        converted.images.iter().for_each(|(_, report)| image::warn_missing(report));
        for (platform, _) in &converted.skipped {
            tracing::warn!("{platform}: no layer is indexed");
        }
        Ok(converted)
    }

    /// What was done, in a line for the image and one for each span index.
    pub(crate) fn summary(&self, converted: &Converted) -> Vec<String> {
        let what = if converted.up_to_date { "is up to date" } else { "written" };
        let line = format!("{}: image index {} {what}, was {}", self.target, converted.digest, converted.was);
        let spans = converted.images.iter().flat_map(|(platform, report)| span_lines(&platform.to_string(), report));
        let reused = converted.images.iter().filter_map(|(_, report)| image::reused_line(report));
        std::iter::once(line).chain(reused).chain(spans).collect()
    }

    /// The same for programs.
    pub(crate) fn print_json(&self, converted: &Converted) -> anyhow::Result<()> {
        let images: Vec<_> =
            converted.images.iter().map(|(platform, report)| json(&platform.to_string(), report)).collect();
        output::json(&serde_json::json!({
            "image": self.source.to_string(),
            "destination": self.target.to_string(),
            "status": if converted.up_to_date { "up to date" } else { "written" },
            "digest": converted.digest,
            "size": converted.size,
            "previousDigest": converted.was,
            "images": images,
            "skipped": converted.skipped.iter().map(|(platform, _)| platform.to_string()).collect::<Vec<_>>(),
        }))
    }
}
