//! The worker: everything the daemon does, in a process that may die.
//!
//! Order of the start: the descriptors come first, since before they do another worker may still be there; then the
//! mount is served, because a process may be waiting for a page; then the state that snapshots need is opened, then
//! containerd is answered. Nothing here asks the network: what was provided before is opened when it is touched.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use soci_fs::foresight::profile::Choice;
use soci_fs::fuse::forest::{Forest, ForestOptions, OpaqueAttribute};
use soci_fs::fuse::mount::device::{self, ServeOptions};
use soci_fs::layer::reader::Policy;
use soci_fs::layer::stages::Stages;
use soci_fs::layer::store::Store;
use soci_fs::node::grpc;
use soci_fs::node::metrics::Metrics;
use soci_fs::node::remote::background::Background;
use soci_fs::node::remote::id_maps::IdMaps;
use soci_fs::node::remote::known_places::KnownPlaces;
use soci_fs::node::remote::slots::Slots;
use soci_fs::node::remote::trees::{TreeOptions, Trees, take_down_all};
use soci_fs::node::remote::{Counted, Registries, RemoteLayers, RemoteOptions, Reopener};
use soci_fs::node::snapshots::{SnapshotOptions, Snapshots};
use soci_fs::node::supervisor::Inherited;
use soci_fs::open::OpenOptions;
use soci_index::image::urls::UrlFetcher;
use soci_index::registry::{ClientOptions, CredentialSource};
use tokio::runtime::Handle;

use crate::daemon::config::{DaemonConfig, Fuse, LeaveUnindexed, TreeMode};
use crate::daemon::keychain::Credentials;
use crate::daemon::operations::{self, Operations};
use crate::daemon::registries;
use crate::report::signals::Signals;

/// How long in-flight calls may take after the worker was signalled to end.
const STOP_LIMIT: Duration = Duration::from_secs(5);
/// How often the quota is looked at.
const QUOTA_INTERVAL: Duration = Duration::from_secs(10);
/// How long what was fetched or read stays in the page cache of the store, at least.
const SECOND_COPY_INTERVAL: Duration = Duration::from_secs(10);

/// The state of a worker.
struct WorkerContext {
    forest: Arc<Forest>,
    store: Arc<Store>,
    slots: Arc<Slots>,
    layers: RemoteLayers,
    stages: Arc<Stages>,
}

/// Runs a worker until it is signalled to end.
///
/// # Errors
/// Whatever kept it from starting, or stopped it.
pub(super) fn run(root: &Path, config: &DaemonConfig) -> anyhow::Result<()> {
    soci_fs::layer::limits::set(config.limits.caps());
    let inherited = Inherited::receive()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start threads")?;
    let result = runtime.block_on(serve(root, config, inherited));
    // What still waits for a disk or the network must not keep the process from ending.
    runtime.shutdown_background();
    result
}

/// Where the layers of a root are mounted.
pub(super) fn mountpoint(root: &Path) -> PathBuf {
    root.join("fs")
}

/// Where the kernel shows layers by file systems of its own.
pub(super) fn trees(root: &Path) -> PathBuf {
    root.join("trees")
}

async fn serve(root: &Path, config: &DaemonConfig, inherited: Inherited) -> anyhow::Result<()> {
    let mut signals = Signals::catch()?;
    let options = SnapshotOptions::of_this_system();
    let credentials = Credentials::of(config, inherited.memory)?;
    let context = WorkerContext::open(root, config, &options, credentials.source)?;
    let serving = ServeOptions { statistics_path: Some(root.to_owned()), ..ServeOptions::default() };
    let session = device::serve(Arc::clone(&context.forest), inherited.kept, &serving, Handle::current())
        .with_context(|| format!("cannot serve {}", mountpoint(root).display()))?;
    let metrics = Arc::new(Metrics { stages: Arc::clone(&context.stages), ..Metrics::default() });
    let provider = Arc::new(Counted { layers: context.layers.clone(), metrics: Arc::clone(&metrics) });
    let snapshots = Arc::new(Snapshots::open(root, options, provider).context("failed to configure snapshotter")?);
    context.layers.keep_only(&snapshots.layers_in_use()?);
    context.layers.show_all().await;
    context.look_after(config, &metrics);
    let operations = Arc::new(Operations {
        forest: context.forest,
        slots: context.slots,
        metrics,
        mountpoint: mountpoint(root),
        remote: context.layers,
        proves: config.background_pace().is_some(),
    });
    tokio::spawn(Arc::clone(&operations).count_images(config.counting_wait()));
    operations::serve_status(Arc::clone(&operations), root)
        .with_context(|| format!("cannot listen on {}", root.join(operations::STATUS_SOCKET).display()))?;
    if !config.no_prometheus && !config.metrics_address.is_empty() {
        operations::serve(operations, config.metrics_network, &config.metrics_address)
            .await
            .with_context(|| format!("cannot serve metrics on {}", config.metrics_address))?;
    }
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let address = inherited.listener.local_addr().ok().and_then(|address| address.as_pathname().map(PathBuf::from));
    let address = address.unwrap_or_default().display().to_string();
    let server = grpc::serve(inherited.listener, snapshots, credentials.images, async {
        // An error means that the other end is gone, which is the end, too.
        let _ = stopped.await;
    });
    let mut server = Box::pin(server);
    inherited.supervisor.ready()?;
    tracing::info!(address, "soci-snapshotter-grpc successfully started");
    let mut session = tokio::task::spawn_blocking(move || session.wait());
    tokio::select! {
        result = &mut server => return result.context("the service ended"),
        result = &mut session => {
            result.context("the mount's threads ended")?.context("the mount can no longer be served")?;
            anyhow::bail!("{} was unmounted by another process; it is mounted again", mountpoint(root).display());
        }
        () = signals.next() => {}
    }
    drop(stop);
    if let Ok(result) = tokio::time::timeout(STOP_LIMIT, server).await {
        return result.context("the service ended badly");
    }
    tracing::warn!(seconds = STOP_LIMIT.as_secs(), "in-flight calls were cancelled");
    Ok(())
}

impl WorkerContext {
    fn open(
        root: &Path,
        config: &DaemonConfig,
        snapshots: &SnapshotOptions,
        credentials: CredentialSource,
    ) -> anyhow::Result<Self> {
        let (runtime, stages) = (Handle::current(), Arc::new(Stages::default()));
        let leave_unindexed = config.pull_modes.leave_unindexed;
        let open = OpenOptions {
            observer: Arc::new(|_| {}),
            layer_bytes_min: config.layer_bytes_min(),
            whole_layers: leave_unindexed == LeaveUnindexed::None,
            whole_beside_index: leave_unindexed == LeaveUnindexed::Images,
            policy: Policy { asks_again: !registries::limits_retries(config), ..Policy::default() },
            index: None,
            any_subject: true,
            modes: config.pull_modes.indexes(),
            index_repositories: Vec::new(),
            index_store: Some(root.join("content")),
            content: config.content_store.source(),
            parallel: 1,
            trust: Arc::new(config.trust.policy().context("[trust]")?),
            listing: None,
            profile: Choice::None,
            urls: config.pull_modes.foreign_layers.then(UrlFetcher::new).transpose()?,
            stages: Arc::clone(&stages),
        };
        let store = Arc::new(Store::open(root).context("the layer store")?);
        let slots = Arc::new(Slots::open(&root.join("snapshotter/layers")).context("the table of layers")?);
        let id_maps = IdMaps::open(root.join("snapshotter/id-maps.json"))?;
        let client = ClientOptions { credentials, ..registries::client_options(config)? };
        let registries =
            Arc::new(Registries::new(client, config.index_rules()?, config.resolver.custom_headers.clone()));
        let socket = config.content_store.address();
        let known_places = Some(KnownPlaces::new(socket, Arc::clone(&slots), Arc::clone(&registries)));
        let opaque = if snapshots.user_xattr { OpaqueAttribute::User } else { OpaqueAttribute::Trusted };
        let trees = open_trees(root, config, opaque)?.map(Arc::new);
        let reopener = Reopener {
            known_places: known_places.clone(),
            slots: Arc::clone(&slots),
            store: Arc::clone(&store),
            registries: Arc::clone(&registries),
            options: open.clone(),
            runtime: runtime.clone(),
            trees: trees.clone(),
        };
        let forest = ForestOptions {
            opaque,
            opener: Some(Arc::new(reopener)),
            devices: trees.is_some(),
            stages: Arc::clone(&stages),
            ..ForestOptions::default()
        };
        let forest = Arc::new(Forest::new(forest));
        let open_modes = open.modes;
        let options = RemoteOptions {
            open,
            images_max: config.images_max(),
            layers_at_once: config.layers_at_once(),
            open_limit: config.mount_timeout(),
            mountpoint: mountpoint(root),
            trees,
            profiles: config.profile.options(root, &config.prefetch),
            index_quota: config.layer_store.index_quota.limit().unwrap_or(u64::MAX),
            only_named: open_modes.is_off() && !config.pull_modes.parallel_pull_unpack.enable,
            known_places,
        };
        let (served, kept) = (Arc::clone(&forest), Arc::clone(&store));
        let layers = RemoteLayers::new(served, kept, Arc::clone(&slots), id_maps, registries, options, runtime)?;
        Ok(Self { forest, store, slots, layers, stages })
    }

    /// Starts what is done from time to time.
    fn look_after(&self, config: &DaemonConfig, metrics: &Arc<Metrics>) {
        let layers = self.layers.clone();
        tokio::spawn(async move { layers.keep_swept().await });
        let quota = config.layer_store.quota.limit();
        match config.background_pace() {
            None => tracing::info!("background fetch is disabled"),
            Some(pace) => {
                tracing::info!("constructing background fetcher");
                let (layers, metrics) = (self.layers.clone(), Arc::clone(metrics));
                tokio::spawn(Background { layers, pace, quota, metrics }.run());
            }
        }
        if let Some(quota) = quota {
            tokio::spawn(Arc::clone(&self.store).keep_within(quota, QUOTA_INTERVAL));
        }
        tokio::spawn(Arc::clone(&self.store).keep_single(SECOND_COPY_INTERVAL));
    }
}

/// What shows layers by file systems of the kernel; `None` where this process answers for their names.
fn open_trees(root: &Path, config: &DaemonConfig, opaque: OpaqueAttribute) -> anyhow::Result<Option<Trees>> {
    let Fuse { tree, read_ahead_kib, .. } = config.fuse;
    if tree == TreeMode::Fuse {
        take_down_all(&trees(root));
        return Ok(None);
    }
    let opened = Trees::open(TreeOptions {
        directory: trees(root),
        images: root.join("snapshotter/images"),
        forest: mountpoint(root),
        opaque,
        read_ahead_kib: (read_ahead_kib > 0).then_some(read_ahead_kib),
        lends: config.layer_store.quota.limit().is_none(),
    });
    match opened {
        Ok(trees) => {
            tracing::info!("the kernel shows layers (EROFS); their bytes come from this process");
            Ok(Some(trees))
        }
        Err(reason) if tree == TreeMode::Auto => {
            take_down_all(&trees(root));
            tracing::info!(%reason, "this process shows layers: the kernel cannot");
            Ok(None)
        }
        Err(error) => Err(error).context("[fuse] tree = \"erofs\""),
    }
}
