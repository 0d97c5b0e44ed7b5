//! The sections of the file, one structure each. Defaults are those of AWS's snapshotter 0.16.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use soci_fs::node::content::node::NodeContent;
use soci_index::image::ImageSource;

use crate::daemon::config::{
    ContentStoreType, DropPolicy, Limits, MetadataStore, MetricsNetwork, Profile, PullModes, Size, TreeMode, Trust,
};

/// Where containerd listens.
const CONTAINERD_SOCKET: &str = "/run/containerd/containerd.sock";

/// All keys of the file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DaemonConfig {
    /// Where spans are kept; always the layer store here.
    pub http_cache_type: String,
    /// Where files are kept; always the layer store here.
    pub filesystem_cache_type: String,
    /// Number of images whose resolution is kept in memory; 0 means 30.
    pub resolve_result_entry: i64,
    /// Log at level `debug`.
    pub debug: bool,
    /// Skip the verification of spans; here spans are always verified.
    pub disable_verification: bool,
    /// Layers that are prepared at the same time; 0 means 100, a negative number means no limit.
    pub max_concurrency: i64,
    /// Seconds within which a layer must open before it is left to containerd; 0 means 30.
    pub mount_timeout_sec: i64,
    /// Seconds after an image's first layer at which its operation counts are emitted as metrics; 0 means 60.
    pub fuse_metrics_emit_wait_duration_sec: i64,
    /// Address of `/metrics`: `HOST:PORT`, or the path of a socket; empty disables it.
    pub metrics_address: String,
    /// Kind of `metrics_address`: `tcp` or `unix`.
    pub metrics_network: MetricsNetwork,
    /// Serve no metrics.
    pub no_prometheus: bool,
    /// Address of the Go profiler in AWS's daemon.
    pub debug_address: String,
    /// How AWS's daemon keeps file tables; there is no such database here.
    pub metadata_store: MetadataStore,
    /// Belongs to `metadata_store`.
    pub metadata_db_no_sync: bool,
    /// Belongs to `metadata_store`.
    pub metadata_insertion_chunk_size: i64,
    /// Do not test at the start whether the root directory's file system supports overlayfs.
    pub skip_check_snapshotter_supported: bool,
    /// Requests to registries. The values shown are those of AWS's daemon and mean this daemon's own, tuned defaults;
    /// only other values have an effect.
    pub http: Http,
    /// Requests for layers. Set values take precedence over those of `[http]`.
    pub blob: Blob,
    /// AWS's file cache; there is none here.
    pub directory_cache: DirectoryCache,
    /// What the kernel may cache.
    pub fuse: Fuse,
    /// Fetching the rest of each layer while no program waits.
    pub background_fetch: BackgroundFetch,
    /// Where indexes are looked for besides registries.
    pub content_store: ContentStore,
    /// AWS's prefetch artifacts.
    pub prefetch: Prefetch,
    /// Which indexes are used, and what happens to layers without one.
    pub pull_modes: PullModes,
    /// Credentials from the secrets of a Kubernetes cluster.
    pub kubeconfig_keychain: KubeconfigKeychain,
    /// Credentials that the kubelet sends with a pull. The kubelet's `--image-service-endpoint` must be the daemon's
    /// socket.
    pub cri_keychain: CriKeychain,
    /// Credentials from the kubelet's credential plugins.
    pub kubelet_keychain: KubeletKeychain,
    /// Mirrors, certificates and headers of registries.
    pub resolver: Resolver,
    /// Repositories that hold the indexes of other repositories' images; the first rule that matches is asked before
    /// the image's own repository.
    pub index_repository: Vec<IndexRepository>,
    /// Snapshots.
    pub snapshotter: Snapshotter,
    /// Disk usage.
    pub layer_store: LayerStore,
    /// When an index may be used before the layer is proven.
    pub trust: Trust,
    /// Start-up profiles.
    pub profile: Profile,
    /// Memory that one image may cost; a layer that needs more is fetched whole or left to containerd.
    pub limits: Limits,
}

impl Default for DaemonConfig {
    fn default() -> Self {
        Self {
            http_cache_type: String::new(),
            filesystem_cache_type: String::new(),
            resolve_result_entry: 0,
            debug: false,
            disable_verification: false,
            max_concurrency: 100,
            mount_timeout_sec: 30,
            fuse_metrics_emit_wait_duration_sec: 60,
            metrics_address: String::new(),
            metrics_network: MetricsNetwork::Tcp,
            no_prometheus: false,
            debug_address: String::new(),
            metadata_store: MetadataStore::Db,
            metadata_db_no_sync: false,
            metadata_insertion_chunk_size: 5000,
            skip_check_snapshotter_supported: false,
            http: Http::default(),
            blob: Blob::default(),
            directory_cache: DirectoryCache::default(),
            fuse: Fuse::default(),
            background_fetch: BackgroundFetch::default(),
            content_store: ContentStore::default(),
            prefetch: Prefetch::default(),
            pull_modes: PullModes::default(),
            kubeconfig_keychain: KubeconfigKeychain::default(),
            cri_keychain: CriKeychain::default(),
            kubelet_keychain: KubeletKeychain::default(),
            resolver: Resolver::default(),
            index_repository: Vec::new(),
            snapshotter: Snapshotter::default(),
            layer_store: LayerStore::default(),
            trust: Trust::default(),
            profile: Profile::default(),
            limits: Limits::default(),
        }
    }
}

/// How registries are asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "PascalCase")]
pub struct Http {
    /// Milliseconds to connect.
    pub dial_timeout_msec: i64,
    /// Milliseconds until the response begins.
    pub response_header_timeout_msec: i64,
    /// Milliseconds for a whole request.
    pub request_timeout_msec: i64,
    /// Retries after the first attempt.
    pub max_retries: i64,
    /// Milliseconds of backoff before the first retry.
    pub min_wait_msec: i64,
    /// Longest backoff in milliseconds.
    pub max_wait_msec: i64,
}

impl Default for Http {
    fn default() -> Self {
        Self {
            dial_timeout_msec: 3000,
            response_header_timeout_msec: 3000,
            request_timeout_msec: 300_000,
            max_retries: 8,
            min_wait_msec: 30,
            max_wait_msec: 300_000,
        }
    }
}

/// How layers are fetched.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Blob {
    /// Seconds between two checks that a layer is still there.
    pub valid_interval: i64,
    /// Check a layer at every mount.
    pub check_always: bool,
    /// Seconds for a whole request.
    pub fetching_timeout_sec: i64,
    /// Retries after the first attempt.
    pub max_retries: i64,
    /// Milliseconds of backoff before the first retry.
    pub min_wait_msec: i64,
    /// Longest backoff in milliseconds.
    pub max_wait_msec: i64,
    /// Request one range at a time; always so here.
    pub force_single_range_mode: bool,
    /// Retries for a span that arrived damaged.
    pub max_span_verification_retries: i64,
}

impl Default for Blob {
    fn default() -> Self {
        Self {
            valid_interval: 60,
            check_always: false,
            fetching_timeout_sec: 300,
            max_retries: 8,
            min_wait_msec: 30,
            max_wait_msec: 300_000,
            force_single_range_mode: false,
            max_span_verification_retries: 0,
        }
    }
}

/// How files are cached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DirectoryCache {
    /// Entries in memory.
    pub max_lru_cache_entry: i64,
    /// Open files.
    pub max_cache_fds: i64,
    /// Write through.
    pub sync_add: bool,
    /// Bypass memory.
    pub direct: bool,
}

impl Default for DirectoryCache {
    fn default() -> Self {
        Self { max_lru_cache_entry: 0, max_cache_fds: 0, sync_add: false, direct: true }
    }
}

/// Options of the kernel's FUSE cache.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Fuse {
    /// Seconds for which attributes are cached; unlimited here, since layers never change.
    pub attr_timeout: i64,
    /// Seconds for which names are cached; unlimited here.
    pub entry_timeout: i64,
    /// Seconds for which missing names are cached; unlimited here.
    pub negative_timeout: i64,
    /// Log every FUSE request.
    pub log_fuse_operations: bool,
    /// What answers for the names, attributes and extended attributes of files: `"erofs"`, the kernel, by a file system
    /// of which only the bytes are asked of the daemon (Linux 6.12 with EROFS); `"fuse"`, the daemon; `"auto"`, the kernel
    /// where that works. It is tried at the start, and the log says which.
    pub tree: TreeMode,
    /// With `erofs`, KiB that the kernel reads ahead of a sequential reader. More saves requests and fetches bytes that
    /// no program reads.
    pub read_ahead_kib: u32,
}

impl Default for Fuse {
    fn default() -> Self {
        Self {
            attr_timeout: 1,
            entry_timeout: 1,
            negative_timeout: 1,
            log_fuse_operations: false,
            tree: TreeMode::Auto,
            read_ahead_kib: 128,
        }
    }
}

/// Background fetching.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BackgroundFetch {
    /// Disable the background fetch. Layers are then not proven either.
    pub disable: bool,
    /// Milliseconds after a pull before the first background request.
    pub silence_period_msec: i64,
    /// Milliseconds between two background requests.
    pub fetch_period_msec: i64,
    /// Spans that may be queued; the queue has no limit here.
    pub max_queue_size: i64,
    /// Which queued span is dropped: `newest` or `oldest`.
    pub drop_policy: DropPolicy,
    /// Seconds between two updates of the queue's metric.
    pub emit_metric_period_sec: i64,
}

impl Default for BackgroundFetch {
    fn default() -> Self {
        Self {
            disable: false,
            silence_period_msec: 30_000,
            fetch_period_msec: 500,
            max_queue_size: 300,
            drop_policy: DropPolicy::Newest,
            emit_metric_period_sec: 10,
        }
    }
}

/// Where indexes are kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ContentStore {
    /// `soci`: registries only. `containerd`: an index named by digest (by a label or by the image) and zTOCs are
    /// looked for in containerd's content store first.
    #[serde(rename = "type")]
    pub kind: ContentStoreType,
    /// containerd's socket. containerd also knows which other repositories an image was pulled from.
    pub containerd_address: String,
}

impl Default for ContentStore {
    fn default() -> Self {
        Self { kind: ContentStoreType::Soci, containerd_address: CONTAINERD_SOCKET.to_owned() }
    }
}

impl ContentStore {
    /// containerd's content, if it may have indexes.
    #[must_use]
    pub fn source(&self) -> Option<ImageSource> {
        match self.kind {
            ContentStoreType::Soci => None,
            ContentStoreType::Containerd => Some(NodeContent::source(self.address())),
        }
    }

    /// Where containerd is.
    #[must_use]
    pub fn address(&self) -> PathBuf {
        let given = Some(self.containerd_address.as_str()).filter(|given| !given.is_empty());
        given.unwrap_or(CONTAINERD_SOCKET).into()
    }
}

/// What is fetched at the start.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Prefetch {
    /// Use AWS's prefetch artifacts where no profile is published.
    pub enable: bool,
    /// Layers that are prefetched at the same time; 0 or less means no limit.
    pub max_concurrency: i64,
}

/// Credentials from Kubernetes.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KubeconfigKeychain {
    /// Use all secrets of type `kubernetes.io/dockerconfigjson` in the cluster.
    pub enable_keychain: bool,
    /// A kubeconfig that may list and watch secrets; empty means the usual places.
    pub kubeconfig_path: String,
}

/// Credentials from the kubelet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CriKeychain {
    /// Serve the CRI image service, and use the credentials of its pulls.
    pub enable_keychain: bool,
    /// Socket of the CRI image service that pulls are forwarded to.
    pub image_service_path: String,
}

impl CriKeychain {
    /// Where the image service is; nothing means the default.
    #[must_use]
    pub fn image_service(&self) -> &str {
        if self.image_service_path.is_empty() { CONTAINERD_SOCKET } else { &self.image_service_path }
    }
}

impl Default for CriKeychain {
    fn default() -> Self {
        Self { enable_keychain: false, image_service_path: CONTAINERD_SOCKET.to_owned() }
    }
}

/// Credentials from the kubelet's plugins. Both keys are settings of the kubelet; they are used when both are given.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KubeletKeychain {
    /// The kubelet's `--image-credential-provider-config`. Needs `bin_dir`.
    pub config_path: String,
    /// The kubelet's `--image-credential-provider-bin-dir`. Needs `config_path`.
    pub bin_dir: String,
}

/// Mirrors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Resolver {
    /// Seconds for which a login is kept.
    pub auth_client_ttl_sec: i64,
    /// Share logins between layers.
    pub enable_auth_client_sharing: bool,
    /// Names of headers that a client may add to the requests for an image, by labels of its snapshots
    /// (`containerd.io/snapshot/remote/soci.header.NAME`). Others are not sent; what every request needs cannot be
    /// replaced.
    pub custom_headers: Vec<String>,
    /// Directories with a `hosts.toml` (containerd) or certificates (docker) per registry, separated by colons; they
    /// need not exist.
    pub config_path: String,
    /// Registries by host name.
    pub host: BTreeMap<String, Host>,
}

impl Default for Resolver {
    fn default() -> Self {
        Self {
            auth_client_ttl_sec: 3600,
            enable_auth_client_sharing: false,
            custom_headers: Vec::new(),
            config_path: "/etc/containerd/certs.d:/etc/docker/certs.d".to_owned(),
            host: BTreeMap::new(),
        }
    }
}

/// A registry.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Host {
    /// Mirrors of this registry, asked before those of `hosts.toml`. A mirror that fails is skipped at once.
    pub mirrors: Vec<Mirror>,
}

/// A mirror of a registry.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Mirror {
    /// Host name, with a port if needed.
    pub host: String,
    /// Use HTTP without TLS.
    pub insecure: bool,
    /// Seconds without any byte after which the mirror is skipped; 0 means the default, a negative number no limit.
    pub request_timeout_sec: i64,
}

/// A repository that holds indexes of other repositories' images, which is asked before the image's own.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct IndexRepository {
    /// Images as `HOST/REPOSITORY`; `*` matches any text, slashes included.
    #[serde(rename = "match")]
    pub images: String,
    /// The repository that holds their indexes, `HOST/NAME`.
    pub repository: String,
}

/// Snapshots.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Snapshotter {
    /// Compressed bytes below which a layer is fetched whole.
    pub min_layer_size: i64,
    /// Start although a layer cannot be opened; always so here.
    pub allow_invalid_mounts_on_restart: bool,
}

/// The layer store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LayerStore {
    /// Disk that fetched layers may take, for example `50gb` (powers of 1024); least recently used layers are evicted.
    /// Empty means no limit.
    pub quota: Size,
    /// Disk that fetched indexes may take in addition; the oldest are evicted.
    pub index_quota: Size,
}

impl Default for LayerStore {
    fn default() -> Self {
        Self { quota: Size::default(), index_quota: Size::gigabytes(1) }
    }
}
