//! `soci demo`: lazy loading on this machine, against a full pull.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use soci_fs::fuse::file_system::FileSystem as _;
use soci_fs::layer::store::Store;
use soci_fs::open::OpenOptions;
use soci_fs::tree::node_id::NodeId;
use soci_index::format::digest::Digest;
use soci_index::image::layout::Layout;
use soci_index::image::{ImageSource, PlatformImage};
use soci_index::publish::Job;
use soci_index::publish::build::{BuildOptions, Format, Observer};
use soci_index::publish::local::{self, Keep, StoreLabels};
use soci_index::registry::{ClientOptions, CredentialSource};

use crate::args::Demo;
use crate::commands::image::{self, block_on};
use crate::demo::measure::{self, Opened, Way};
use crate::demo::process::Ended;
use crate::demo::recipe::Recipe;
use crate::demo::report::Report;
use crate::demo::stage::{LAYER_BYTES_MIN, Stage};
use crate::report::exit::{Exit, fail};
use crate::report::output;

/// Runs the command.
///
/// # Errors
/// When the image cannot be made, opened or run.
pub fn run(arguments: &Demo, timeout: Duration) -> anyhow::Result<()> {
    let report = block_on(timeout, async {
        match &arguments.image {
            Some(name) => foreign_image(arguments, name).await,
            None => own_image(arguments).await,
        }
    })?;
    if arguments.json { output::json(&report) } else { report.print() }
}

/// What to measure.
struct Play<'a> {
    source: ImageSource,
    image: PlatformImage,
    what: String,
    command: Vec<String>,
    touched: Vec<std::path::PathBuf>,
    index_seconds: Option<f64>,
    index_store: std::path::PathBuf,
    /// The index of AWS's form, to be measured beside the span index.
    aws_index: Option<Digest>,
    /// Whether the index was made here and so not fetched.
    local_index: bool,
    scratch: &'a Path,
}

async fn own_image(arguments: &Demo) -> anyhow::Result<Report> {
    let recipe = tokio::task::spawn_blocking(Recipe::of_this_machine).await??;
    note(arguments, &format!("making an image of {}", recipe.what))?;
    let stage = Stage::new(&recipe).await?;
    note(arguments, &format!("publishing its index in a registry of this process ({})", stage.registry.host()))?;
    let start = Instant::now();
    let aws_index = Some(stage.publish().await?.index);
    let index_seconds = Some(start.elapsed().as_secs_f64());
    let options = ClientOptions { credentials: CredentialSource::Anonymous, ..ClientOptions::default() };
    let source = ImageSource::open(&stage.name.parse()?, &options).await?;
    let image = image::of_platform(&source, None).await?;
    let scratch = scratch()?;
    let command = match &arguments.command {
        Some(command) => vec!["/bin/sh".to_owned(), "-c".to_owned(), command.clone()],
        None => recipe.command,
    };
    let (what, touched, index_store) = (recipe.what, recipe.touched, scratch.path().join("index"));
    let play = Play {
        source,
        image,
        what,
        command,
        touched,
        index_seconds,
        index_store,
        aws_index,
        local_index: false,
        scratch: scratch.path(),
    };
    perform(arguments, play).await
}

async fn foreign_image(arguments: &Demo, name: &str) -> anyhow::Result<Report> {
    let reference = image::reference(name)?;
    let options = image::client_options(&arguments.access)?;
    let source = ImageSource::open(&reference, &options).await?;
    let image = image::of_platform(&source, None).await?;
    let scratch = scratch()?;
    let index_store = scratch.path().join("index");
    let layout = Layout::open_or_create(&index_store)?;
    note(arguments, "building the index here (an index beside the image would save this)")?;
    let building = BuildOptions { format: Format::Span, layer_bytes_min: LAYER_BYTES_MIN, ..BuildOptions::default() };
    let labels = StoreLabels { name: name.to_owned(), created: crate::commands::now() };
    let observer: Observer = Arc::new(|_| {});
    let start = Instant::now();
    let job = Job { source: &source, image: &image, options: &building, force: false, observer: &observer };
    local::store(&job, &layout, &Keep::Here, &labels).await?;
    let index_seconds = Some(start.elapsed().as_secs_f64());
    let command = arguments.command.clone().unwrap_or_else(|| "python3 -c 'print()' 2>/dev/null || true".to_owned());
    let command = vec!["/bin/sh".to_owned(), "-c".to_owned(), command];
    let play = Play {
        source,
        image,
        what: name.to_owned(),
        command,
        touched: Vec::new(),
        index_seconds,
        index_store,
        aws_index: None,
        local_index: true,
        scratch: scratch.path(),
    };
    perform(arguments, play).await
}

fn scratch() -> anyhow::Result<tempfile::TempDir> {
    tempfile::Builder::new().prefix("soci-demo-").tempdir().context("making a directory for the demonstration")
}

async fn perform(arguments: &Demo, play: Play<'_>) -> anyhow::Result<Report> {
    let Play { source, image, command, scratch, .. } = &play;
    note(arguments, "pulling and unpacking everything")?;
    let (full, mountpoint) = (scratch.join("full"), scratch.join("mnt"));
    std::fs::create_dir(&full)?;
    std::fs::create_dir(&mountpoint)?;
    let pulled = match measure::pull(source, image, &full, command).await {
        Ok((way, ran)) => check(&ran).map(|()| way),
        Err(error) => Err(error),
    };
    // The program may not run here at all (no chroot, no namespaces): then only the reading can be shown.
    let runs = pulled.is_ok();
    if let Err(error) = &pulled {
        note(
            arguments,
            &format!(
                "running the program from a full pull is not possible here: {}",
                crate::report::exit::message(error)
            ),
        )?;
    }
    std::fs::remove_dir_all(&full).context("removing the unpacked image")?;
    let device = soci_fs::fuse::mount::may_open_device();
    if let Err(error) = &device {
        let hint = "nothing can be mounted: reading the same files through the library";
        note(arguments, &format!("/dev/fuse cannot be opened here ({error}), so {hint}"))?;
    }
    let mountpoint = (device.is_ok() && runs).then_some(mountpoint.as_path());
    note(arguments, if mountpoint.is_some() { "mounting lazily and running the program" } else { "reading lazily" })?;
    let lazy = lazily(&play, "store", None, mountpoint).await?;
    let by_aws = match play.aws_index {
        Some(index) => {
            note(arguments, "the same by AWS's form of the index")?;
            Some(lazily(&play, "store-aws", Some(index), mountpoint.filter(|_| lazy.mounted)).await?)
        }
        None => None,
    };
    Ok(Report {
        image: play.what.clone(),
        command: command.clone(),
        image_bytes: image.manifest.layers.iter().map(|layer| layer.size).sum(),
        layers: image.manifest.layers.len(),
        indexed_layers: image.manifest.layers.iter().filter(|layer| layer.size >= LAYER_BYTES_MIN).count(),
        files: lazy.files,
        index_seconds: play.index_seconds,
        spans: lazy.spans,
        inflated_spans: lazy.inflated_spans,
        pull: pulled.ok(),
        index_bytes: if play.local_index { 0 } else { lazy.index_bytes },
        aws_index_bytes: by_aws.as_ref().map(|by_aws| by_aws.index_bytes),
        lazy: lazy.way,
        lazy_aws: by_aws.map(|by_aws| by_aws.way),
        again_seconds: lazy.again_seconds,
        mounted: lazy.mounted,
    })
}

/// What a lazy start took.
struct Lazily {
    way: Way,
    again_seconds: f64,
    index_bytes: u64,
    files: usize,
    spans: u64,
    inflated_spans: u64,
    mounted: bool,
}

/// Opens the image by an index with nothing of it in a cache, runs the program twice, and closes it.
async fn lazily(
    play: &Play<'_>,
    store: &str,
    index: Option<Digest>,
    mountpoint: Option<&Path>,
) -> anyhow::Result<Lazily> {
    let store = Arc::new(Store::open(&play.scratch.join(store)).context("making a layer store")?);
    let options = OpenOptions {
        layer_bytes_min: LAYER_BYTES_MIN,
        index,
        index_store: Some(play.index_store.clone()),
        parallel: 4,
        ..OpenOptions::default()
    };
    let opened = Opened::new(&play.source, &play.image, &store, &options, mountpoint).await?;
    let mountpoint = mountpoint.filter(|_| opened.is_mounted());
    let first = once(&opened, mountpoint, play).await?;
    let way = opened.way(&play.source, first);
    let again_seconds = once(&opened, mountpoint, play).await?.as_secs_f64();
    let status = opened.image.status();
    let lazily = Lazily {
        way,
        again_seconds,
        index_bytes: opened.index_bytes,
        files: opened.image.view().len(),
        spans: status.layers.iter().map(|layer| u64::from(layer.spans)).sum(),
        inflated_spans: status.layers.iter().map(|layer| u64::from(layer.present_spans)).sum(),
        mounted: opened.is_mounted(),
    };
    tokio::task::spawn_blocking(move || opened.close()).await??;
    Ok(lazily)
}

/// The program once, from the mount; or its files, through the library.
async fn once(opened: &Opened, mount: Option<&Path>, play: &Play<'_>) -> anyhow::Result<Duration> {
    let Some(mountpoint) = mount else { return read_files(opened, &play.touched).await };
    let (mountpoint, command) = (mountpoint.to_owned(), play.command.clone());
    let ran = tokio::task::spawn_blocking(move || measure::run(&mountpoint, &command)).await??;
    check(&ran)?;
    Ok(ran.time)
}

async fn read_files(opened: &Opened, files: &[std::path::PathBuf]) -> anyhow::Result<Duration> {
    let start = Instant::now();
    for file in files {
        let Some(node) = opened.image.view().find(file.as_os_str().as_encoded_bytes()) else { continue };
        let inode = NodeId::single(node).pack();
        let size = opened.image.attributes(inode)?.size;
        opened.image.read(inode, 0, usize::try_from(size)?).await.with_context(|| file.display().to_string())?;
    }
    Ok(start.elapsed())
}

fn check(ran: &Ended) -> anyhow::Result<()> {
    if ran.status.success() {
        return Ok(());
    }
    let said = ran.written().lines().last().unwrap_or("nothing").to_owned();
    Err(fail(Exit::Failure, format!("the program ended with {}: {said}", ran.status)))
}

/// A line about what is being done; none with `--json`.
fn note(arguments: &Demo, text: &str) -> anyhow::Result<()> {
    if arguments.json { Ok(()) } else { output::line(format!("- {text}")) }
}
