//! `soci mount` and `soci umount`.
//!
//! In the foreground the command serves until the mount is unmounted, or until SIGTERM or SIGINT, upon which it
//! unmounts itself. `--detach` starts the same command again as a process of its own and returns when that one says
//! that the mount is ready.

use std::fs::{File, Permissions};
use std::io::{BufRead, BufReader, ErrorKind};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use anyhow::Context;
use rustix::process::{Pid, Signal, kill_process};
use soci_fs::fuse::image::Image;
use soci_fs::fuse::mount::{Lazy, MountOptions, Mounted, mount, unmount};
use soci_fs::layer::private::ensure_private_dir;
use soci_fs::layer::reader::Policy;
use soci_fs::open::trust::TrustPolicy;
use soci_fs::open::{IndexModes, OpenOptions, open_image};
use soci_index::format::reference::Reference;
use soci_index::image::ImageSource;
use soci_index::image::output as output_file;
use soci_index::registry::ClientOptions;
use tokio::runtime::Handle;

use crate::args::config::Config;
use crate::args::{Mount, Umount};
use crate::commands::image::{self, run_to_end};
use crate::commands::layers::free_store;
use crate::report::exit::{Exit, Reported, fail};
use crate::report::output;
use crate::report::progress::Progress;
use crate::report::signals::Signals;

mod ahead;
mod report;

use ahead::{Ahead, Plan};
use report::Report;

/// What a detached process prints when its mount is ready.
const READY: &str = "ready";

/// What an interrupt during the preparations leads to.
const INTERRUPTED: &str = "interrupted before the mount was ready";

/// The log of detached mounts begins anew when it is longer.
const LOG_BYTES_MAX: u64 = 1 << 20;

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
        return run_to_end(detach(arguments));
    }
    run_to_end(serve(arguments, config))
}

fn check_directory(directory: &Path) -> anyhow::Result<()> {
    let shown = directory.display();
    if soci_fs::fuse::mount::is_stale(directory) {
        let hint = format!("{shown} is a mount whose process is gone; run `soci umount {shown}` first");
        return Err(fail(Exit::Local, hint));
    }
    match std::fs::metadata(directory) {
        Ok(metadata) if metadata.is_dir() => {}
        Ok(_) => return Err(fail(Exit::Usage, format!("{shown} is no directory"))),
        Err(error) => return Err(fail(Exit::Local, format!("{shown}: {error}; create the directory first"))),
    }
    check_device()
}

/// Refuses a directory with something in it, before anything is fetched.
fn check_empty(directory: &Path) -> anyhow::Result<()> {
    if std::fs::read_dir(directory).is_ok_and(|mut entries| entries.next().is_some()) {
        let hint = "mount on an empty directory, or what is there would be hidden";
        return Err(fail(Exit::Usage, format!("{} is not empty: {hint}", directory.display())));
    }
    Ok(())
}

/// Refuses where nothing can be mounted at all, in words that help.
///
/// # Errors
/// When there is no device for mounts.
pub(super) fn check_device() -> anyhow::Result<()> {
    match soci_fs::fuse::mount::may_open_device() {
        // Others than root mount through a helper, which may open what they may not.
        Err(error) if error.kind() != ErrorKind::PermissionDenied || rustix::process::geteuid().is_root() => {
            let hint = "load the fuse module, or give the container the device";
            Err(fail(Exit::Local, format!("/dev/fuse cannot be opened ({error}): {hint}")))
        }
        _ => Ok(()),
    }
}

async fn serve(arguments: &Mount, config: &Config) -> anyhow::Result<()> {
    let start = Instant::now();
    let reference = image::reference(&arguments.image)?;
    // While nothing is mounted there: later it would be this process that is asked.
    let mountpoint = absolute(&arguments.directory)?;
    // From here on: a signal between the mount and the wait for its end must not leave the mount behind.
    let mut signals = Signals::catch()?;
    let served = tokio::select! {
        served = prepare(arguments, config, &reference) => served?,
        () = signals.next() => return Err(fail(Exit::Interrupted, INTERRUPTED)),
    };
    let Served { image, mounted, ahead, report } = served;
    if let Some(file) = &arguments.pid_file {
        write_pid(file).with_context(|| format!("writing {}", file.display()))?;
    }
    let (directory, time) = (&arguments.directory, start.elapsed());
    let log = if arguments.serve_detached { Some(open_log(config)?) } else { None };
    match arguments.json {
        true => report.ready_json(&mountpoint, time, config)?,
        false => report.ready(directory, time, arguments.serve_detached)?,
    }
    if let Some(log) = log {
        leave_terminal();
        output::line(READY)?;
        let to_log = rustix::stdio::dup2_stdout(&log).and_then(|()| rustix::stdio::dup2_stderr(&log));
        to_log.context("writing to the log from now on")?;
    }
    until_unmounted(mounted, &mut signals).await?;
    ahead.end();
    if let Some(file) = &arguments.pid_file {
        let _ = output_file::remove(file);
    }
    report::ended(&image, &mountpoint, arguments.json)
}

/// An image that is mounted, and how it was opened.
struct Served {
    image: Arc<Image>,
    mounted: Mounted,
    ahead: Ahead,
    report: Report,
}

async fn prepare(arguments: &Mount, config: &Config, reference: &Reference) -> anyhow::Result<Served> {
    let options = image::client_options(&arguments.access)?;
    let source = ImageSource::open(reference, &options).await?;
    check_empty(&arguments.directory)?;
    let progress = Arc::new(Progress::bytes("fetching layers that are read whole", None));
    let open = open_options(arguments, config, &options, &progress)?;
    let store = Arc::new(free_store(&config.layers())?);
    let (found, listing) = image::of_platform_with_listing(&source, arguments.platform.name()).await?;
    let plan = Plan::new(arguments, config, &found);
    let open = OpenOptions { listing, ..open };
    let opened = open_image(&source, &found, &store, &open, &Handle::current()).await;
    progress.finish();
    let opened = opened.with_context(|| reference.to_string())?;
    let mut ahead = plan.follow(&source, &opened.readers, opened.profile)?;
    let report = Report { reference: reference.clone(), found, choice: opened.choice, notes: opened.notes };
    let image = Arc::new(Image::new(opened.readers).context("merging the layers")?);
    if !arguments.no_follow_names {
        ahead.follow_names(&image);
    }
    let mut options = MountOptions { source: reference.to_string(), ..MountOptions::default() };
    options.allow_other |= arguments.allow_other;
    options.privileged = arguments.suid;
    options.statistics_path = Some(store.root().to_owned());
    let mounted = mount(Arc::clone(&image), &arguments.directory, &options, Handle::current())?;
    Ok(Served { image, mounted, ahead, report })
}

/// The number of this process, readable by all users that can enter the directory: it is no secret.
fn write_pid(path: &Path) -> std::io::Result<()> {
    output_file::write(path, format!("{}\n", std::process::id()).as_bytes())?;
    if output_file::is_in_place(path)? {
        return Ok(());
    }
    std::fs::set_permissions(path, Permissions::from_mode(0o644))
}

/// Serves until the directory is unmounted, or a signal asks for it.
async fn until_unmounted(mounted: Mounted, signals: &mut Signals) -> anyhow::Result<()> {
    let unmounter = mounted.unmounter();
    let mut served = tokio::task::spawn_blocking(move || mounted.wait());
    tokio::select! {
        result = &mut served => result.context("serving the mount")??,
        () = signals.next() => end(&unmounter, served).await?,
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
        whole_beside_index: true,
        layer_bytes_min: arguments.min_layer_size,
        policy: Policy { read_deadline: arguments.read_timeout, ..Policy::default() },
        index: arguments
            .index
            .as_deref()
            .map(str::parse)
            .transpose()
            .map_err(|error| fail(Exit::Usage, format!("{error}")))?,
        any_subject: false,
        modes: IndexModes::default(),
        index_repositories: image::repositories(&arguments.index_from, client)?,
        index_store: Some(config.index_store()),
        content: None,
        parallel: std::thread::available_parallelism().map_or(2, std::num::NonZero::get).max(4),
        trust: Arc::new(TrustPolicy::new(arguments.provisional, &arguments.keys, &arguments.certificates)?),
        listing: None,
        profile: ahead::choice(arguments),
        urls: image::foreign_layers(arguments.foreign.foreign_layers)?,
        stages: Arc::default(),
    })
}

/// Takes the mount out of the tree; open files stay readable until they are closed, up to a limit.
async fn end(
    unmounter: &soci_fs::fuse::mount::Unmounter,
    served: tokio::task::JoinHandle<Result<(), soci_fs::fuse::mount::MountError>>,
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

/// Starts a process that serves, and waits until it says that it is ready. Until then what it says goes where this
/// process would have said it, and from then on to the log.
async fn detach(arguments: &Mount) -> anyhow::Result<()> {
    let mut command = Command::new(crate::args::config::own_program().context("finding this program")?);
    // The same words again, but for the one that led here, whose place matters: after `--` there are no options.
    // Secrets come from standard input or a file, not from a word.
    let words = std::env::args_os().skip(1);
    command.args(words.map(|word| if word == "--detach" { "--serve-detached".into() } else { word }));
    let input = if arguments.access.password_stdin { Stdio::inherit() } else { Stdio::null() };
    command.stdin(input).stdout(Stdio::piped()).stderr(Stdio::inherit());
    let child = command.spawn().context("starting the serving process")?;
    let id = Pid::from_child(&child);
    let mut signals = Signals::catch()?;
    let mut waiting = tokio::task::spawn_blocking(move || until_ready(child));
    loop {
        tokio::select! {
            said = &mut waiting => return said.context("waiting for the serving process")?,
            // It has its own reasons to end then, and its own words.
            () = signals.next() => drop(kill_process(id, Signal::INT)),
        }
    }
}

/// Waits for the serving process to say that it is ready, or to end, and passes on what it said.
fn until_ready(mut child: Child) -> anyhow::Result<()> {
    let mut said = Vec::new();
    // All of it is read before any of it is printed: a reader of ours that goes away must not end the mount.
    for line in child.stdout.take().map(BufReader::new).into_iter().flat_map(BufRead::lines) {
        let line = line.context("waiting for the serving process")?;
        if line == READY {
            return said.iter().try_for_each(output::line);
        }
        said.push(line);
    }
    let status = child.wait().context("waiting for the serving process")?;
    match status.code().and_then(|code| u8::try_from(code).ok()) {
        Some(code @ 1..) => Err(Reported { code }.into()),
        _ if status.signal() == Some(Signal::INT.as_raw()) => Err(fail(Exit::Interrupted, INTERRUPTED)),
        _ => Err(fail(Exit::Failure, format!("the serving process ended before the mount was ready ({status})"))),
    }
}

/// The log of processes that serve in the background, one for all below a root: each adds its lines at the end.
fn open_log(config: &Config) -> anyhow::Result<File> {
    let path = config.layers().join("mount.log");
    ensure_private_dir(&config.layers())?;
    let file = File::options().append(true).create(true).open(&path);
    let file = file.with_context(|| format!("opening {}", path.display()))?;
    if file.metadata().is_ok_and(|log| log.len() > LOG_BYTES_MAX) {
        file.set_len(0).with_context(|| format!("shortening {}", path.display()))?;
    }
    Ok(file)
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
    let mounts = soci_fs::fuse::mount::mounts("soci").context("reading the table of mounts")?;
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
