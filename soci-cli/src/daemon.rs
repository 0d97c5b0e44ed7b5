//! The snapshotter daemon: from its command line to a service that answers containerd.
//!
//! It replaces AWS's daemon of the same name, so its flags, variables, paths and log lines are that one's.
//!
//! Order of the start: state is opened (one process per root), then the socket is made, then systemd is told. A client
//! never meets a daemon that is not ready, and a second daemon ends before it touches the socket of the first.

pub mod args;
mod listen;
pub mod log;
mod systemd;

use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use soci_fs::grpc;
use soci_fs::snapshots::provider::{LayerProvider, NoLayers};
use soci_fs::snapshots::{SnapshotOptions, Snapshots, check_overlay};
use tokio::signal::unix::{Signal, SignalKind, signal};

use args::Arguments;

/// How long calls under way may take after the daemon was told to end.
const STOP_SECONDS_MAX: Duration = Duration::from_secs(10);

/// Runs the daemon until it is told to end.
///
/// # Errors
/// Whatever kept it from starting, or stopped it.
pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let (version, revision) = (args::RELEASE, args::REVISION);
    tracing::info!(version, revision, "starting soci-snapshotter-grpc");
    check_config(arguments)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start threads")?;
    let provider = Arc::new(NoLayers::new(arguments.root.join("fs")));
    let result = runtime.block_on(serve(arguments, provider));
    // What still waits for a disk must not keep the process from ending.
    runtime.shutdown_background();
    result
}

/// Serves the snapshots of a root, with layers from `provider`, until SIGTERM or SIGINT.
async fn serve(arguments: &Arguments, provider: Arc<dyn LayerProvider>) -> anyhow::Result<()> {
    let (mut terminate, mut interrupt) = (on(SignalKind::terminate())?, on(SignalKind::interrupt())?);
    let snapshots = open(&arguments.root, provider)?;
    let listener = listen::listen(&arguments.address)?;
    let address = listen::shown(&listener);
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let server = grpc::serve(listener, snapshots, async {
        // An error means that the other end is gone, which is the end, too.
        let _ = stopped.await;
    });
    let mut server = Box::pin(server);
    tracing::info!(address, "soci-snapshotter-grpc successfully started");
    systemd::notify(systemd::State::Ready);
    let signal = tokio::select! {
        result = &mut server => return result.context("the service ended"),
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    };
    tracing::info!(signal, "stopping soci-snapshotter-grpc");
    systemd::notify(systemd::State::Stopping);
    drop(stop);
    match tokio::time::timeout(STOP_SECONDS_MAX, server).await {
        Ok(result) => result.context("the service ended badly"),
        Err(_) => {
            tracing::warn!(seconds = STOP_SECONDS_MAX.as_secs(), "calls were still under way; they are cut off");
            Ok(())
        }
    }
}

/// A configuration file that was named must be there.
fn check_config(arguments: &Arguments) -> anyhow::Result<()> {
    let Some(file) = &arguments.config else { return Ok(()) };
    std::fs::File::open(file).with_context(|| format!("failed to open config file {}", file.display()))?;
    tracing::warn!(file = %file.display(), "no setting of the configuration file has an effect yet");
    Ok(())
}

fn open(root: &Path, provider: Arc<dyn LayerProvider>) -> anyhow::Result<Arc<Snapshots>> {
    let mut directory = std::fs::DirBuilder::new();
    directory.recursive(true).mode(0o700).create(root).with_context(|| format!("cannot create {}", root.display()))?;
    // A relative root would mean another place to whoever carries out the mounts.
    let root = root.canonicalize().with_context(|| format!("cannot resolve {}", root.display()))?;
    let snapshots = Snapshots::open(&root, SnapshotOptions::of_this_system(), provider);
    let snapshots = snapshots.context("failed to configure snapshotter")?;
    // Not before the root is ours: the trial is made in it.
    check_overlay(&root).context("snapshotter is not supported")?;
    Ok(Arc::new(snapshots))
}

fn on(kind: SignalKind) -> anyhow::Result<Signal> {
    signal(kind).context("cannot wait for signals")
}
