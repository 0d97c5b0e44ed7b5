//! The snapshotter daemon: from its command line to a service that answers containerd.
//!
//! It replaces AWS's daemon of the same name, so its flags, variables, paths and log lines are that one's.
//!
//! One program, two processes: what is started is the supervisor, which keeps the mount and the socket and starts
//! itself again as the worker, which does the work and may die ([`soci_fs::node::supervisor`]). The configuration is
//! read by both: by the supervisor so that a mistake stops the start, by each worker so that `SIGHUP` takes a new one
//! into use.

pub mod args;
pub mod ask;
pub mod config;
mod keychain;
pub mod log;
pub mod operations;
mod registries;
mod worker;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use soci_fs::fuse::mount::device::DeviceOptions;
use soci_fs::layer::private::{ensure_private_root, forbid_core_dumps, set_umask};
use soci_fs::node::snapshots::check_overlay;
use soci_fs::node::supervisor::{self, Address, SupervisorOptions};

use crate::report::output;
use args::{Arguments, Command, ConfigCommand};
use config::Loaded;

/// Where the configuration is looked for when none is named.
const CONFIG_FILE: &str = "/etc/soci-snapshotter-grpc/config.toml";

/// glibc gives each of many threads a heap of its own, and keeps in all of them what many layers need while they are
/// opened at the same time: 84 MiB instead of 54 with 100 layers of 1000 files. Spans are decoded into memory that
/// stays.
const WORKER_ENVIRONMENT: [(&str, &str); 3] =
    [("MALLOC_ARENA_MAX", "2"), ("MALLOC_MMAP_THRESHOLD_", "8388608"), ("MALLOC_TRIM_THRESHOLD_", "1048576")];

/// How long a worker may take to end before it is killed. Longer than the worker gives to calls that are in progress.
const END_LIMIT: Duration = Duration::from_secs(10);

/// Carries out the command line.
///
/// # Errors
/// Whatever kept the daemon from starting, or stopped it.
pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    if let Some(Command::Config { what: ConfigCommand::Default }) = arguments.command {
        return output::line(config::DaemonConfig::default().to_string().trim_end());
    }
    let file = arguments.config.clone().unwrap_or_else(|| CONFIG_FILE.into());
    let loaded = Loaded::read(&file, arguments.config.is_none())?;
    if let Some(Command::Config { what: ConfigCommand::Dump }) = arguments.command {
        return output::line(loaded.config.to_string().trim_end());
    }
    log::start(if loaded.config.debug { arguments.log_level.or_debug() } else { arguments.log_level });
    set_umask();
    forbid_core_dumps().context("cannot forbid core dumps")?;
    if arguments.worker {
        return worker::run(&arguments.root, &loaded.config);
    }
    let (version, revision) = (args::RELEASE, args::REVISION);
    tracing::info!(version, revision, "starting soci-snapshotter-grpc");
    for key in &loaded.without_effect {
        tracing::warn!(key, file = %file.display(), "this key of the configuration has no effect here");
    }
    // A mistake that only the worker would find would end one worker after the other.
    registries::client_options(&loaded.config).with_context(|| file.display().to_string())?;
    loaded.config.trust.policy().with_context(|| format!("{}: [trust]", file.display()))?;
    let root = root(&arguments.root)?;
    if !loaded.config.skip_check_snapshotter_supported {
        check_overlay(&root).context("snapshotter is not supported")?;
    }
    supervise(arguments, &root)
}

fn supervise(arguments: &Arguments, root: &Path) -> anyhow::Result<()> {
    let mut worker: Vec<OsString> = vec!["--worker".into(), "--root".into(), root.into()];
    worker.extend(["--log-level".into(), arguments.log_level.name().into()]);
    if let Some(config) = &arguments.config {
        let absolute = std::path::absolute(config).with_context(|| config.display().to_string())?;
        worker.extend(["--config".into(), absolute.into()]);
    }
    supervisor::run(SupervisorOptions {
        program: crate::args::config::own_program().context("cannot determine the path of this program")?,
        arguments: worker,
        environment: &WORKER_ENVIRONMENT,
        mountpoint: worker::mountpoint(root),
        also_unmount: vec![worker::trees(root), root.join("snapshotter/mapped")],
        device: DeviceOptions::default(),
        address: match &arguments.address {
            args::Address::Path(path) => Address::Path(path.clone()),
            args::Address::Inherited => Address::Activated { default: args::ADDRESS.into() },
        },
        end_limit: END_LIMIT,
    })?;
    Ok(())
}

/// The root as an absolute path, since a relative one would mean another place to containerd, which carries out the
/// mounts; and closed to other users, since set-uid programs of images and the files of private ones are below it.
fn root(root: &Path) -> anyhow::Result<PathBuf> {
    Ok(ensure_private_root(root)?)
}
