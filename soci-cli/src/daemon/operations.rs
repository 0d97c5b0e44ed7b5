//! What operators look at while the daemon runs: metrics, health, state.
//!
//! `/metrics` and `/healthz` over HTTP where the configuration says, on TCP or a socket. `/status` is the same state
//! that `soci status` shows, as JSON, and is always served on a socket of its own below the root, too: every process
//! that may read the root may read it, and no port has to be open. `/noted/DIGEST`, what was recorded of an image's
//! start, is served there only: it reveals what programs do.

use std::collections::HashMap;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::{Path as Named, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde::{Deserialize, Serialize};
use soci_fs::fuse::forest::Forest;
use soci_fs::layer::status::LayerStatus;
use soci_fs::node::metrics::Metrics;
use soci_fs::node::remote::RemoteLayers;
use soci_fs::node::remote::slots::Slots;
use soci_fs::node::remote::trees::ShownTree;
use soci_index::format::digest::Digest;
use tokio::net::{TcpListener, UnixListener};

use crate::daemon::config::MetricsNetwork;
use crate::webhook::door::{Door, Places, one_request_each};

/// What a profile is, to HTTP.
const PROFILE: &str = "application/octet-stream";

/// Connections that request metrics over TCP, from untrusted clients.
const PLACES: Places = Places { all: 64, per_peer: 16 };

/// How often it is looked whether an image has come.
const LOOK: Duration = Duration::from_secs(1);

/// Name of the status socket below the root.
pub const STATUS_SOCKET: &str = "status.sock";

/// State of a daemon, as `soci status` shows it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DaemonStatus {
    /// The release.
    pub version: String,
    /// The process that serves.
    pub pid: u32,
    /// Slots that hold a layer, open or not.
    pub slots: usize,
    /// Whether layers are fetched whole and proven in the background. Where they are not, none that is read by an index
    /// is ever proven.
    #[serde(default)]
    pub proves: bool,
    /// The layers that are open.
    pub layers: Vec<SlotStatus>,
}

/// State of the layer in a slot.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SlotStatus {
    pub slot: u16,
    /// The image that it was first wanted for, and whose registry it comes from.
    #[serde(default)]
    pub image: String,
    /// What answers for its names.
    #[serde(default)]
    pub tree: ShownTree,
    /// What the kernel has asked the daemon about it: names, attributes, bytes.
    #[serde(default)]
    pub fuse_requests: u64,
    #[serde(flatten)]
    pub layer: LayerStatus,
}

/// What is looked at.
#[derive(Debug)]
pub struct Operations {
    /// The layers.
    pub forest: Arc<Forest>,
    /// Further facts about them.
    pub slots: Arc<Slots>,
    /// The counters.
    pub metrics: Arc<Metrics>,
    /// Where the layers are mounted.
    pub mountpoint: PathBuf,
    /// Has noted starts.
    pub remote: RemoteLayers,
    /// Whether there is a background fetch.
    pub proves: bool,
}

impl Operations {
    fn layers(&self) -> Vec<(u16, LayerStatus)> {
        let open = self.forest.slots().into_iter();
        open.filter_map(|(slot, _)| Some((slot, LayerStatus::of(&self.forest.reader(slot)?)))).collect()
    }

    fn slot(&self, slot: u16, layer: LayerStatus) -> SlotStatus {
        let image = self.slots.get(slot).map(|record| record.image().to_owned()).unwrap_or_default();
        let (tree, counts) = (self.remote.tree(slot), self.forest.counters().sum(&[slot]));
        let fuse_requests = counts.iter().map(|(_, count)| count).sum();
        SlotStatus { slot, image, tree, fuse_requests, layer }
    }

    fn text(&self) -> String {
        let directory = |slot: u16| self.remote.directory(slot, None).display().to_string();
        let layers: Vec<_> = self.layers().into_iter().map(|(slot, layer)| (slot, directory(slot), layer)).collect();
        self.metrics.text(&layers, self.forest.counters())
    }

    /// Adds up what was asked of each image, once, so long after its first layer came.
    pub(super) async fn count_images(self: Arc<Self>, wait: Duration) {
        let mut seen: HashMap<Digest, Option<Instant>> = HashMap::new();
        loop {
            tokio::time::sleep(LOOK.min(wait)).await;
            let mut images: HashMap<Digest, Vec<u16>> = HashMap::new();
            for (slot, _) in self.forest.slots() {
                let Some(image) = self.slots.get(slot).and_then(|record| record.manifests().next()) else { continue };
                images.entry(image).or_default().push(slot);
            }
            seen.retain(|image, _| images.contains_key(image));
            for (image, slots) in &images {
                let since = seen.entry(*image).or_insert_with(|| Some(Instant::now()));
                if since.is_some_and(|since| since.elapsed() >= wait) {
                    *since = None;
                    self.count_image(image, slots);
                }
            }
        }
    }

    fn count_image(&self, image: &Digest, slots: &[u16]) {
        let counts = self.forest.counters().sum(slots);
        for (operation, count) in &counts {
            tracing::info!("fuse operation count for image {image}: {operation} = {count}");
        }
        self.metrics.images.lock().insert(image.to_string(), counts);
    }

    fn status(&self) -> DaemonStatus {
        DaemonStatus {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            slots: self.forest.slots().len(),
            proves: self.proves,
            layers: self.layers().into_iter().map(|(slot, layer)| self.slot(slot, layer)).collect(),
        }
    }
}

/// What is offered where it was asked for.
fn public(operations: Arc<Operations>) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(async || "ok\n"))
        .route("/status", get(status))
        .with_state(operations)
}

async fn metrics(State(operations): State<Arc<Operations>>) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], operations.text()).into_response()
}

async fn status(State(operations): State<Arc<Operations>>) -> Response {
    match serde_json::to_string(&operations.status()) {
        Ok(text) => ([(header::CONTENT_TYPE, "application/json")], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

/// What was noted of the start of the image with a manifest.
async fn noted(State(operations): State<Arc<Operations>>, Named(manifest): Named<String>) -> Response {
    let Ok(manifest) = manifest.parse() else {
        return (StatusCode::BAD_REQUEST, format!("{manifest} is no digest\n")).into_response();
    };
    let missing = |reason: String| (StatusCode::NOT_FOUND, reason).into_response();
    match operations.remote.noted(&manifest) {
        Err(error) => missing(error.to_string()),
        Ok(None) => missing("no start of it was seen since it was pulled".to_owned()),
        Ok(Some(profile)) => match profile.encode() {
            Ok(profile) => ([(header::CONTENT_TYPE, PROFILE)], profile).into_response(),
            Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
        },
    }
}

/// Serves on the address of the configuration until the runtime ends. Returns when it listens.
///
/// # Errors
/// When it cannot listen.
pub async fn serve(operations: Arc<Operations>, network: MetricsNetwork, address: &str) -> io::Result<()> {
    let router = public(operations);
    match network {
        MetricsNetwork::Tcp => {
            let listener = TcpListener::bind(address).await?;
            tracing::info!(address = %listener.local_addr()?, "serving metrics");
            spawn(axum::serve(Door::new(listener, PLACES), one_request_each(router)).into_future());
        }
        MetricsNetwork::Unix => spawn(axum::serve(bind(Path::new(address), 0o660)?, router).into_future()),
    }
    Ok(())
}

/// Serves the status socket.
///
/// # Errors
/// When it cannot listen.
pub fn serve_status(operations: Arc<Operations>, root: &Path) -> io::Result<()> {
    let listener = bind(&root.join(STATUS_SOCKET), 0o600)?;
    let router = public(Arc::clone(&operations));
    let router = router.merge(Router::new().route("/noted/{manifest}", get(noted)).with_state(operations));
    spawn(axum::serve(listener, router).into_future());
    Ok(())
}

fn spawn(serving: impl Future<Output = io::Result<()>> + Send + 'static) {
    tokio::spawn(async move {
        if let Err(error) = serving.await {
            tracing::warn!(%error, "metrics are no longer served");
        }
    });
}

/// The root belongs to one daemon, and so does its socket: one that is there is of a daemon before.
fn bind(path: &Path, mode: u32) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
    Ok(listener)
}
