//! `soci mount` and `soci umount`.
//!
//! In the foreground the command serves until somebody unmounts, or until SIGTERM or an interrupt, upon which it
//! unmounts itself. `--detach` starts the same command again as a process of its own and returns when that one says
//! that the mount is ready.

use std::fs::{File, Permissions};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use anyhow::Context;
use soci_fs::image::Image;
use soci_fs::mount::{Lazy, MountOptions, Mounted, mount, unmount};
use soci_fs::open::{IndexModes, LayerNote, NO_INDEX, OpenOptions, Way, open_image};
use soci_fs::private::ensure_private_dir;
use soci_fs::reader::Policy;
use soci_fs::store::{Store, StoreError};
use soci_fs::trust::TrustPolicy;
use soci_index::image::ImageSource;
use soci_index::output as output_file;
use soci_index::registry::ClientOptions;
use tokio::runtime::Handle;
use tokio::signal::unix::{SignalKind, signal};

use super::choice;
use super::image::{self, run_to_end};
use crate::args::{Mount, Umount};
use crate::config::Config;
use crate::exit::{Exit, fail};
use crate::output;
use crate::progress::Progress;

mod ahead;

use ahead::Plan;

/// What a detached process prints when its mount is ready.
const READY: &str = "ready";

/// Layer stores that are tried before giving up: one for each image that is mounted at the same time.
const STORES_MAX: u32 = 256;

/// Runs `mount`.
///
/// # Errors
/// When the image cannot be opened or the directory not mounted on.
pub fn run(arguments: &Mount, config: &Config) -> anyhow::Result<()> {
    check_directory(&arguments.directory)?;
    arguments.bounds.set();
    if arguments.suid && !rustix::process::geteuid().is_root() {
        return Err(fail(Exit::Usage, "--suid is for root: the kernel does not let others mount that way"));
    }
    config.keep_private()?;
    if arguments.detach {
        return detach(arguments, config);
    }
    run_to_end(serve(arguments, config))
}

fn check_directory(directory: &Path) -> anyhow::Result<()> {
    let shown = directory.display();
    if soci_fs::mount::is_stale(directory) {
        let hint = format!("{shown} is a mount whose process is gone; run `soci umount {shown}` first");
        return Err(fail(Exit::Local, hint));
    }
    match std::fs::metadata(directory) {
        Ok(metadata) if metadata.is_dir() => {}
        Ok(_) => return Err(fail(Exit::Usage, format!("{shown} is no directory"))),
        Err(error) => return Err(fail(Exit::Local, format!("{shown}: {error}; create the directory first"))),
    }
    if !Path::new("/dev/fuse").exists() {
        return Err(fail(Exit::Local, "/dev/fuse is missing: load the fuse module, or give the container the device"));
    }
    Ok(())
}

async fn serve(arguments: &Mount, config: &Config) -> anyhow::Result<()> {
    let start = Instant::now();
    let options = image::client_options(&arguments.access)?;
    let reference = image::reference(&arguments.image)?;
    let source = ImageSource::open(&reference, &options).await?;
    let progress = Arc::new(Progress::bytes("fetching layers that are read whole", None));
    let open = open_options(arguments, config, &options, &progress)?;
    let store = Arc::new(free_store(&config.layers())?);
    let (found, listing) = image::of_platform_with_listing(&source, arguments.platform.as_deref()).await?;
    let plan = Plan::new(arguments, config, &found);
    let open = OpenOptions { listing, ..open };
    let opened = open_image(&source, &found, &store, &open, &Handle::current()).await;
    progress.finish();
    let opened = opened.with_context(|| reference.to_string())?;
    let mut ahead = plan.follow(&source, &opened.readers, opened.profile)?;
    let (index, notes) = (opened.choice.chosen.clone(), opened.notes.clone());
    let image = Arc::new(Image::new(opened.readers).context("merging the layers")?);
    if !arguments.no_follow_names {
        ahead.follow_names(&image);
    }
    let mut options = MountOptions { source: reference.to_string(), ..MountOptions::default() };
    options.allow_other |= arguments.allow_other;
    options.privileged = arguments.suid;
    options.statistics_path = Some(store.root().to_owned());
    let mounted = mount(Arc::clone(&image), &arguments.directory, &options, Handle::current())?;
    if let Some(file) = &arguments.pid_file {
        write_pid(file).with_context(|| format!("writing {}", file.display()))?;
    }
    if arguments.serve_detached {
        output::line(READY)?;
        leave_terminal();
    } else {
        let how = index
            .as_ref()
            .map_or_else(|| "without an index".to_owned(), |index| format!("by {}", choice::words(index)));
        report(&notes)?;
        let lacks_index = |note: &LayerNote| matches!(&note.way, Way::Streamed(reason) if reason == NO_INDEX);
        if notes.iter().any(lacks_index) {
            output::line(format!(
                "the image has no index: `soci publish {reference}` makes the next mount fetch only what is read"
            ))?;
        }
        output::line(format!(
            "mounted {reference} on {} in {}, {how}; `soci umount {}` or Ctrl-C ends it",
            arguments.directory.display(),
            output::time(start.elapsed()),
            arguments.directory.display(),
        ))?;
    }
    until_unmounted(mounted).await?;
    ahead.end();
    if let Some(file) = &arguments.pid_file {
        let _ = output_file::remove(file);
    }
    summary(&image)
}

/// The number of this process, readable by all users that can enter the directory: it is no secret.
fn write_pid(path: &Path) -> std::io::Result<()> {
    output_file::write(path, format!("{}\n", std::process::id()).as_bytes())?;
    if output_file::is_in_place(path)? {
        return Ok(());
    }
    std::fs::set_permissions(path, Permissions::from_mode(0o644))
}

/// Serves until somebody unmounts, or a signal asks for it.
async fn until_unmounted(mounted: Mounted) -> anyhow::Result<()> {
    let unmounter = mounted.unmounter();
    let mut terminate = signal(SignalKind::terminate()).context("waiting for signals")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("waiting for signals")?;
    let mut served = tokio::task::spawn_blocking(move || mounted.wait());
    tokio::select! {
        result = &mut served => result.context("serving the mount")??,
        _ = terminate.recv() => end(&unmounter, served).await?,
        _ = interrupt.recv() => end(&unmounter, served).await?,
    }
    Ok(())
}

/// How the image is to be opened.
fn open_options(
    arguments: &Mount,
    config: &Config,
    client: &ClientOptions,
    progress: &Arc<Progress>,
) -> anyhow::Result<OpenOptions> {
    let (fetched, shown) = (AtomicU64::new(0), Arc::clone(progress));
    Ok(OpenOptions {
        observer: Arc::new(move |bytes| shown.at(fetched.fetch_add(bytes, Ordering::Relaxed) + bytes)),
        whole_layers: true,
        layer_bytes_min: arguments.min_layer_size,
        policy: Policy { read_deadline: arguments.read_timeout, ..Policy::default() },
        index: arguments
            .index
            .as_deref()
            .map(str::parse)
            .transpose()
            .map_err(|error| fail(Exit::Usage, format!("{error}")))?,
        modes: IndexModes::default(),
        index_repositories: image::repositories(&arguments.index_from, client)?,
        index_store: Some(config.index_store()),
        parallel: std::thread::available_parallelism().map_or(2, std::num::NonZero::get).max(4),
        trust: Arc::new(TrustPolicy::new(arguments.provisional.into(), &arguments.keys, &arguments.certificates)?),
        listing: None,
        profile: ahead::choice(arguments),
        urls: image::foreign_layers(arguments.foreign_layers)?,
    })
}

/// Takes the mount out of the tree; who has files open may go on until they are done, up to a limit.
async fn end(
    unmounter: &soci_fs::mount::Unmounter,
    served: tokio::task::JoinHandle<Result<(), soci_fs::mount::MountError>>,
) -> anyhow::Result<()> {
    unmounter.unmount(Lazy::Yes)?;
    match tokio::time::timeout(std::time::Duration::from_secs(5), served).await {
        Ok(result) => Ok(result.context("serving the mount")??),
        Err(_) => {
            tracing::warn!("files of the mount are still open; they can no longer be read");
            Ok(())
        }
    }
}

/// The first layer store that no other process has open. Images that are mounted one after the other thus share their
/// layers; images that are mounted at the same time have stores of their own.
///
/// # Errors
/// When the directory cannot be used.
pub fn free_store(root: &Path) -> anyhow::Result<Store> {
    for number in 0..STORES_MAX {
        match Store::open(&root.join(number.to_string())) {
            Err(StoreError::Busy { .. }) => {}
            result => return result.with_context(|| format!("opening a layer store below {}", root.display())),
        }
    }
    let hint = format!("all {STORES_MAX} layer stores below {} are in use; unmount some images", root.display());
    Err(fail(Exit::Local, hint))
}

/// Says how each layer was opened.
fn report(notes: &[LayerNote]) -> anyhow::Result<()> {
    let row = |note: &LayerNote| {
        let way = match &note.way {
            Way::Lazy => "on demand".to_owned(),
            Way::Kept => "all here".to_owned(),
            Way::Streamed(reason) => format!("fetched: {reason}"),
        };
        vec![note.layer.digest.to_string(), output::size(note.layer.size), way]
    };
    output::table(&["LAYER", "SIZE", "FILES"], &notes.iter().map(row).collect::<Vec<_>>())
}

/// Says what was fetched.
fn summary(image: &Image) -> anyhow::Result<()> {
    let status = image.status();
    let sum = |count: fn(&soci_fs::status::LayerStatus) -> u64| status.layers.iter().map(count).sum::<u64>();
    let (fetched, all) = (sum(|layer| layer.fetched_bytes), sum(|layer| layer.compressed_bytes));
    let (present, spans) = (sum(|layer| layer.present_spans.into()), sum(|layer| layer.spans.into()));
    output::line(format!(
        "unmounted; {} of {} fetched in {} requests, {present} of {spans} spans are here; {} reads waited for them, \
         {:.1} s in all",
        output::size(fetched),
        output::size(all),
        sum(|layer| layer.requests),
        sum(|layer| layer.late_reads),
        status.layers.iter().map(|layer| layer.waited_seconds).sum::<f64>(),
    ))
}

/// Starts a process that serves, and waits until it says that it is ready.
fn detach(arguments: &Mount, config: &Config) -> anyhow::Result<()> {
    let log = config.layers().join("mount.log");
    ensure_private_dir(&config.layers())?;
    let file = File::create(&log).with_context(|| format!("creating {}", log.display()))?;
    let program = std::env::current_exe().context("finding this program")?;
    let mut command = Command::new(program);
    // The same words again, less the one that led here. Secrets come from standard input or a file, not from a word.
    command.args(std::env::args_os().skip(1).filter(|word| word != "--detach")).arg("--serve-detached");
    command.stdout(Stdio::piped()).stderr(file).stdin(if arguments.access.password_stdin {
        Stdio::inherit()
    } else {
        Stdio::null()
    });
    let mut child = command.spawn().context("starting the serving process")?;
    let mut line = String::new();
    if let Some(stdout) = child.stdout.take() {
        BufReader::new(stdout).read_line(&mut line).context("waiting for the serving process")?;
    }
    if line.trim_end() == READY {
        output::line(format!(
            "mounted {} on {} (process {})",
            arguments.image,
            arguments.directory.display(),
            child.id()
        ))?;
        return Ok(());
    }
    let status = child.wait().context("waiting for the serving process")?;
    let said = std::fs::read_to_string(&log).unwrap_or_default();
    let exit = match status.code() {
        Some(2) => Exit::Usage,
        Some(3) => Exit::Credentials,
        Some(4) => Exit::Registry,
        Some(5) => Exit::BadContent,
        Some(7) => Exit::Local,
        _ => Exit::Failure,
    };
    let last = said.lines().last().unwrap_or("the serving process ended without a word");
    Err(fail(exit, last.strip_prefix("soci: ").unwrap_or(last)))
}

/// A session of its own, so that closing the terminal does not end the mount.
fn leave_terminal() {
    if let Err(error) = rustix::process::setsid() {
        tracing::debug!(%error, "stays in its session");
    }
}

/// Runs `umount`.
///
/// # Errors
/// When nothing is mounted there, or it is in use.
pub fn run_umount(arguments: &Umount) -> anyhow::Result<()> {
    let directory = absolute(&arguments.directory)?;
    let mounts = soci_fs::mount::mounts("soci").context("reading the table of mounts")?;
    if !mounts.iter().any(|mount| mount.mountpoint == directory) {
        let there: Vec<String> = mounts.iter().map(|mount| mount.mountpoint.display().to_string()).collect();
        let hint = if there.is_empty() {
            "no image is mounted".to_owned()
        } else {
            format!("images are mounted on {}", there.join(", "))
        };
        return Err(fail(Exit::Failure, format!("no image is mounted on {}; {hint}", directory.display())));
    }
    let lazy = if arguments.lazy { Lazy::Yes } else { Lazy::No };
    unmount(&directory, lazy)
        .map_err(|error| fail(Exit::Local, format!("{error}; --lazy detaches it even if files are open")))
}

/// The absolute path of a mount point, which may be dead: its parent is resolved, itself not touched.
fn absolute(directory: &Path) -> anyhow::Result<PathBuf> {
    if let Ok(path) = directory.canonicalize() {
        return Ok(path);
    }
    let path = std::path::absolute(directory)?;
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) => {
            Ok(parent.canonicalize().with_context(|| parent.display().to_string())?.join(name))
        }
        _ => Ok(path),
    }
}
