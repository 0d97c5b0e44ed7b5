//! `soci profile`: the profiles beside an image, and those in files.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use soci_fs::foresight::profile::pack;
use soci_fs::open::{OpenOptions, open_image};
use soci_index::format::digest::Digest;
use soci_index::format::entry::Timestamp;
use soci_index::format::limits::Limits;
use soci_index::format::manifest::INDEX_DIGEST;
use soci_index::format::profile::Profile;
use soci_index::format::profile::artifact::{Notes, Published, is_name};
use soci_index::format::ztoc::rfc3339;
use soci_index::image::output as output_file;
use soci_index::image::{ImageSource, PlatformImage};
use soci_index::publish::prefetched::{self, Prefetched, PrefetchedError};
use soci_index::publish::profiles;
use soci_index::registry::{RegistryError, Repository};
use tokio::runtime::Handle;

use crate::args::config::Config;
use crate::args::{self, Access, PushProfile};
use crate::commands::image::{self, block_on};
use crate::commands::{found_by, layers, sign};
use crate::report::exit::{Exit, fail};
use crate::report::output;

/// Runs the command.
///
/// # Errors
/// When a file is no profile, or the image or its registry cannot be used.
pub fn run(arguments: &args::Profile, config: &Config, timeout: Duration) -> anyhow::Result<()> {
    match arguments {
        args::Profile::Push(push) => block_on(timeout, push_profile(push, config)),
        args::Profile::List { image, platform, json, access } => {
            block_on(timeout, list(image, platform.name(), *json, access))
        }
        args::Profile::Rm { image, name, platform, json, access } => {
            let deleted = block_on(timeout, remove(image, name, platform.name(), access))?;
            say_deleted(image, name, &deleted, *json)
        }
        args::Profile::Show { file, json } => show(file, *json),
        args::Profile::Merge { first, second, output, json } => merge(first, second, output, *json),
    }
}

/// Reads a file.
fn read(file: &Path) -> anyhow::Result<Profile> {
    let blob = std::fs::read(file).with_context(|| format!("reading {}", file.display()))?;
    let profile = Profile::decode(&blob, &Limits::DEFAULT);
    profile.map_err(|error| fail(Exit::BadContent, format!("{}: {error}", file.display())))
}

/// The image and its one platform that is meant.
async fn resolve(name: &str, platform: Option<&str>, access: &Access) -> anyhow::Result<(ImageSource, PlatformImage)> {
    let source = ImageSource::open(&image::reference(name)?, &image::client_options(access)?).await?;
    let image = image::of_platform(&source, platform).await?;
    Ok((source, image))
}

async fn push_profile(arguments: &PushProfile, config: &Config) -> anyhow::Result<()> {
    if !is_name(&arguments.name) {
        let hint = "a name has letters, digits, - _ . and at most 128 of them";
        return Err(fail(Exit::Usage, format!("{:?} is no name of a profile: {hint}", arguments.name)));
    }
    let recorded = read(&arguments.file)?;
    let own = Some(recorded.command()).filter(|command| !command.is_empty()).map(str::to_owned);
    let command = arguments.command.clone().or(own).filter(|command| !command.is_empty());
    // It goes into an annotation: what the same reads are published as stays the same blob.
    let mut profile = recorded.with_command("");
    let (source, found) = resolve(&arguments.image, arguments.platform.name(), &arguments.access).await?;
    let known = |layer: &Digest| found.manifest.layers.iter().any(|known| known.digest == *layer);
    if !profile.layers().iter().any(known) {
        let (file, image) = (arguments.file.display(), &arguments.image);
        return Err(fail(Exit::Usage, format!("{file} names no layer of {image}: it was recorded of another image")));
    }
    let repository = match (&arguments.to, source.repository()) {
        (Some(to), _) => image::repository(to, &image::client_options(&arguments.access)?)?,
        (None, Some(repository)) => repository.clone(),
        (None, None) => {
            let hint = "name the repository that it is pushed to by --to HOST/NAME";
            return Err(fail(Exit::Usage, format!("{} is not in a registry: {hint}", arguments.image)));
        }
    };
    // First, since it needs an index that may be missing: then nothing is pushed at all.
    let prefetched =
        if arguments.as_prefetch { Some(push_prefetch(arguments, &repository, &found, &profile).await?) } else { None };
    let pack_file = if arguments.pack {
        let file = tempfile::NamedTempFile::new().context("creating a file for the pack")?;
        config.keep_private()?;
        let store = Arc::new(layers::free_store(&config.layers())?);
        let urls = image::foreign_layers(arguments.foreign_layers)?;
        let options = OpenOptions { urls, ..layers::open_options(config, 0) };
        let opened = open_image(&source, &found, &store, &options, &Handle::current()).await?;
        profile = pack::make(&profile, &opened.readers, file.as_file()).await.context("making the pack")?;
        Some(file)
    } else {
        None
    };
    let created = crate::args::config::source_date()
        .map_or_else(crate::commands::now, |seconds| rfc3339::format(Timestamp { seconds, nanoseconds: 0 }));
    let notes = Notes { name: arguments.name.clone(), is_default: arguments.default, created, command };
    let path = pack_file.as_ref().map(tempfile::NamedTempFile::path);
    let pack_bytes = path.map(std::fs::metadata).transpose().context("looking at the pack")?.map(|file| file.len());
    let pushed = profiles::push(&repository, &found.raw.descriptor(), &profile, path, &notes).await?;
    sign::look_back(&repository, &[pushed.digest]).await;
    if arguments.json {
        return output::json(&serde_json::json!({
            "digest": pushed.digest,
            "image": found.descriptor.digest,
            "name": arguments.name,
            "default": arguments.default,
            "ranges": profile.ranges().len(),
            "bytes": profile.bytes(),
            "packBytes": pack_bytes,
            "prefetch": prefetched.as_ref().map(prefetch_json),
        }));
    }
    let packed = pack_bytes.map(|bytes| format!(", a pack of {}", output::size(bytes))).unwrap_or_default();
    output::line(format!(
        "profile {} of {} is {}: {} in {} ranges{packed}; found by {}",
        arguments.name,
        arguments.image,
        pushed.digest,
        output::size(profile.bytes()),
        profile.ranges().len(),
        found_by(&pushed.found_by),
    ))?;
    prefetched.map_or(Ok(()), |prefetched| say_prefetched(&repository, &prefetched))
}

/// The profile as AWS's artifacts.
async fn push_prefetch(
    arguments: &PushProfile,
    repository: &Repository,
    found: &PlatformImage,
    profile: &Profile,
) -> anyhow::Result<Prefetched> {
    let image = &arguments.image;
    let carries = found.manifest.annotations.contains_key(INDEX_DIGEST);
    let pushed = prefetched::push(repository, found, profile).await;
    if pushed.is_ok() && carries {
        tracing::warn!(
            "{image} carries an index of version 2: AWS's snapshotter takes that one wherever it is enabled"
        );
    }
    pushed.map_err(|error| match error {
        PrefetchedError::NoIndex { .. } => {
            let to = arguments.to.as_ref().map(|to| format!(" --to {to}")).unwrap_or_default();
            let hint = format!("`soci publish --format aws {image}{to}` makes one");
            fail(Exit::Failure, format!("{image} has no index to name spans of for --as-prefetch: {error}; {hint}"))
        }
        error => error.into(),
    })
}

fn prefetch_json(pushed: &Prefetched) -> serde_json::Value {
    let artifact = |one: &prefetched::Artifact| serde_json::json!({ "layer": one.layer, "digest": one.digest, "spans": one.spans });
    serde_json::json!({
        "index": pushed.index.digest,
        "artifacts": pushed.artifacts.iter().map(artifact).collect::<Vec<_>>(),
        "otherIndexes": pushed.besides,
    })
}

fn say_prefetched(repository: &Repository, pushed: &Prefetched) -> anyhow::Result<()> {
    let spans: u64 = pushed.artifacts.iter().map(|one| one.spans).sum();
    let (layers, index) = (pushed.artifacts.len(), &pushed.index);
    let found_by = found_by(&index.found_by);
    let digest = index.digest;
    output::line(format!(
        "for AWS's snapshotter: {spans} spans of {layers} layers in index {digest}; found by {found_by}"
    ))?;
    for other in &pushed.besides {
        let hint = "AWS's snapshotter takes whichever is listed first";
        output::line(format!(
            "beside it {repository}@{other} is listed: {hint}, so delete that one if it is not needed"
        ))?;
    }
    Ok(())
}

async fn list(name: &str, platform: Option<&str>, json: bool, access: &Access) -> anyhow::Result<()> {
    let (source, found) = resolve(name, platform, access).await?;
    let published = profiles::list(&source, &found.descriptor.digest).await?;
    if json {
        let row = |one: &Published| {
            serde_json::json!({
                "name": one.name,
                "default": one.is_default,
                "digest": one.digest,
                "created": one.created,
                "command": one.command,
                "profileBytes": one.profile.size,
                "packBytes": one.pack.as_ref().map(|pack| pack.size),
            })
        };
        return output::json(&published.iter().map(row).collect::<Vec<_>>());
    }
    let row = |one: &Published| {
        let pack = one.pack.as_ref().map_or_else(|| "-".to_owned(), |pack| output::size(pack.size));
        let default = if one.is_default { "default" } else { "-" };
        let age = crate::commands::age(&one.created);
        vec![one.name.clone(), default.to_owned(), pack, age, one.digest.to_string(), one.command.clone()]
    };
    let rows: Vec<_> = published.iter().map(row).collect();
    output::table(&["NAME", "USE", "PACK", "CREATED", "DIGEST", "COMMAND"], &rows)
}

fn say_deleted(image: &str, name: &str, deleted: &[Digest], json: bool) -> anyhow::Result<()> {
    if json {
        return output::json(&serde_json::json!({ "image": image, "name": name, "deleted": deleted }));
    }
    let line = |digest: &Digest| output::line(format!("profile {name} of {image} is deleted: {digest}"));
    deleted.iter().try_for_each(line)
}

/// Deletes the profiles of a name, and says which.
async fn remove(image: &str, name: &str, platform: Option<&str>, access: &Access) -> anyhow::Result<Vec<Digest>> {
    let (source, found) = resolve(image, platform, access).await?;
    let Some(repository) = source.repository() else {
        return Err(fail(Exit::Usage, format!("{image} is not in a registry: profiles are deleted there only")));
    };
    let mut published = profiles::list(&source, &found.descriptor.digest).await?;
    published.retain(|one| one.name == name);
    if published.is_empty() {
        let hint = format!("`soci profile list {image}` shows what there is");
        return Err(fail(Exit::Failure, format!("{image} has no profile {name}; {hint}")));
    }
    for one in &published {
        let deleted = repository.delete_manifest(&one.digest).await;
        deleted.map_err(|error| match error {
            RegistryError::Status { status: 400 | 403 | 405 | 501, .. } => fail(
                Exit::Refused,
                format!(
                    "{error}; this registry does not let its clients delete: delete {repository}@{} by its own means, or \
                     push another profile as default, which is used in its place",
                    one.digest
                ),
            ),
            error => error.into(),
        })?;
        tracing::info!(digest = %one.digest, name, "a profile is deleted");
    }
    Ok(published.into_iter().map(|one| one.digest).collect())
}

fn show(file: &Path, json: bool) -> anyhow::Result<()> {
    let profile = read(file)?;
    let of_layer = |number: usize| profile.ranges().iter().filter(move |range| range.layer as usize == number);
    if json {
        let layers: Vec<_> = profile.layers().iter().map(ToString::to_string).collect();
        let ranges = profile.ranges().iter().map(|range| (range.layer, range.bytes.start, range.length()));
        return output::json(&serde_json::json!({
            "bytes": profile.bytes(),
            "command": profile.command(),
            "layers": layers,
            "ranges": ranges.collect::<Vec<_>>(),
            "verified": !profile.digests().is_empty(),
        }));
    }
    let row = |(number, layer): (usize, &Digest)| {
        let bytes = of_layer(number).map(soci_index::format::profile::Touched::length).sum();
        vec![layer.to_string(), of_layer(number).count().to_string(), output::size(bytes)]
    };
    let rows: Vec<_> = profile.layers().iter().enumerate().map(row).collect();
    output::table(&["LAYER", "RANGES", "BYTES"], &rows)?;
    match profile.command() {
        "" => Ok(()),
        command => output::line(format!("recorded of {}", output::clean(command))),
    }
}

fn merge(first: &Path, second: &Path, file: &Path, json: bool) -> anyhow::Result<()> {
    let merged = read(first)?.merge(&read(second)?, &Limits::DEFAULT);
    let merged = merged.map_err(|error| fail(Exit::Failure, format!("{}: {error}", file.display())))?;
    write(file, &merged)?;
    if json {
        return output::json_beside(file, &document(file, &merged));
    }
    let (bytes, ranges) = (output::size(merged.bytes()), merged.ranges().len());
    output::line_beside(file, format!("{}: {bytes} in {ranges} ranges", file.display()))
}

/// A profile that was written, for programs.
#[must_use]
pub fn document(file: &Path, profile: &Profile) -> serde_json::Value {
    serde_json::json!({
        "output": file.display().to_string(),
        "bytes": profile.bytes(),
        "ranges": profile.ranges().len(),
        "layers": profile.layers(),
        "command": profile.command(),
    })
}

/// Writes a profile.
///
/// # Errors
/// When it cannot be written.
pub fn write(file: &Path, profile: &Profile) -> anyhow::Result<()> {
    let written = profile.encode().map_err(std::io::Error::other).and_then(|bytes| output_file::write(file, &bytes));
    written.with_context(|| format!("writing {}", file.display()))
}
