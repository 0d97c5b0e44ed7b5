//! The sections of the file, one structure each. Defaults are those of AWS's snapshotter 0.16.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use soci_fs::node::content::node::NodeContent;
use soci_index::image::ImageSource;

use crate::daemon::config::{
    ContentStoreType, DropPolicy, Limits, MetadataStore, MetricsNetwork, Profile, PullModes, Size, Trust,
};

/// Where containerd listens.
const CONTAINERD_SOCKET: &str = "/run/containerd/containerd.sock";

/// All keys of the file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DaemonConfig {
    /// Where spans are kept: always in the layer store here.
    pub http_cache_type: String,
    /// Where files are kept: always in the layer store here.
    pub filesystem_cache_type: String,
    /// Images that are remembered; 0 is 30.
    pub resolve_result_entry: i64,
    /// Log more.
    pub debug: bool,
    /// Spans are always verified.
    pub disable_verification: bool,
    /// Layers worked on at the same time; 0 is 100, negative is no limit.
    pub max_concurrency: i64,
    /// Seconds that a layer may take to open; 0 is 30.
    pub mount_timeout_sec: i64,
    /// When per-image counts are emitted.
    pub fuse_metrics_emit_wait_duration_sec: i64,
    /// Where metrics are served; empty is nowhere.
    pub metrics_address: String,
    /// What kind of address that is.
    pub metrics_network: MetricsNetwork,
    /// Serve no metrics.
    pub no_prometheus: bool,
    /// Where a profile of the Go runtime was served.
    pub debug_address: String,
    /// How file tables are kept: there is no database of files here.
    pub metadata_store: MetadataStore,
    /// The same.
    pub metadata_db_no_sync: bool,
    /// The same.
    pub metadata_insertion_chunk_size: i64,
    /// Do not try overlayfs at the start.
    pub skip_check_snapshotter_supported: bool,
    /// How registries are asked.
    pub http: Http,
    /// How layers are fetched.
    pub blob: Blob,
    /// How files are cached.
    pub directory_cache: DirectoryCache,
    /// Options of the kernel's FUSE cache.
    pub fuse: Fuse,
    /// Background fetching.
    pub background_fetch: BackgroundFetch,
    /// Where indexes are kept.
    pub content_store: ContentStore,
    /// What is fetched at the start.
    pub prefetch: Prefetch,
    /// Which indexes are used, and what becomes of layers without.
    pub pull_modes: PullModes,
    /// Credentials from Kubernetes.
    pub kubeconfig_keychain: KubeconfigKeychain,
    /// Credentials from the kubelet.
    pub cri_keychain: CriKeychain,
    /// Credentials from the kubelet's plugins.
    pub kubelet_keychain: KubeletKeychain,
    /// Mirrors.
    pub resolver: Resolver,
    /// Repositories that hold indexes of other repositories' images.
    pub index_repository: Vec<IndexRepository>,
    /// Snapshots.
    pub snapshotter: Snapshotter,
    /// The layer store.
    pub layer_store: LayerStore,
    /// Which indexes are used before they are proven.
    pub trust: Trust,
    /// What is done with start-up profiles.
    pub profile: Profile,
    /// What images may make the daemon hold.
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
    /// Milliseconds until an answer begins.
    pub response_header_timeout_msec: i64,
    /// Milliseconds for a request.
    pub request_timeout_msec: i64,
    /// Attempts after the first.
    pub max_retries: i64,
    /// Milliseconds before the first.
    pub min_wait_msec: i64,
    /// Milliseconds at most between two.
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
    /// Seconds between checks of a layer.
    pub valid_interval: i64,
    /// Check at every mount.
    pub check_always: bool,
    /// Seconds for a request.
    pub fetching_timeout_sec: i64,
    /// Attempts after the first.
    pub max_retries: i64,
    /// Milliseconds before the first.
    pub min_wait_msec: i64,
    /// Milliseconds at most between two.
    pub max_wait_msec: i64,
    /// Never ask for several ranges at once: that is always so.
    pub force_single_range_mode: bool,
    /// Fetches of a span that came damaged.
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
    /// Not through memory.
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
    /// Seconds that attributes are valid: unlimited here, since layers never change.
    pub attr_timeout: i64,
    /// Seconds that names are valid: the same.
    pub entry_timeout: i64,
    /// Seconds that missing names are valid: the same.
    pub negative_timeout: i64,
    /// Log every request.
    pub log_fuse_operations: bool,
}

impl Default for Fuse {
    fn default() -> Self {
        Self { attr_timeout: 1, entry_timeout: 1, negative_timeout: 1, log_fuse_operations: false }
    }
}

/// Background fetching.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BackgroundFetch {
    /// Fetch nothing.
    pub disable: bool,
    /// Milliseconds of rest after a mount.
    pub silence_period_msec: i64,
    /// Milliseconds between two fetches.
    pub fetch_period_msec: i64,
    /// Spans that wait.
    pub max_queue_size: i64,
    /// Which of too many is dropped.
    pub drop_policy: DropPolicy,
    /// Seconds between two metrics.
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
    /// Whose store.
    #[serde(rename = "type")]
    pub kind: ContentStoreType,
    /// Where containerd is.
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
    /// Use prefetch artifacts.
    pub enable: bool,
    /// Layers that are fetched ahead at the same time; zero and less is no limit.
    pub max_concurrency: i64,
}

/// Credentials from Kubernetes.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KubeconfigKeychain {
    /// Use them.
    pub enable_keychain: bool,
    /// The configuration of the client.
    pub kubeconfig_path: String,
}

/// Credentials from the kubelet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CriKeychain {
    /// Use them.
    pub enable_keychain: bool,
    /// Where the image service is.
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
    /// The kubelet's `--image-credential-provider-config`.
    pub config_path: String,
    /// The kubelet's `--image-credential-provider-bin-dir`.
    pub bin_dir: String,
}

/// Mirrors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Resolver {
    /// Seconds that a login is valid.
    pub auth_client_ttl_sec: i64,
    /// Share logins.
    pub enable_auth_client_sharing: bool,
    /// Directories of `hosts.toml` files, separated by colons. They need not exist.
    pub config_path: String,
    /// Registries, by host.
    pub host: BTreeMap<String, Host>,
}

impl Default for Resolver {
    fn default() -> Self {
        Self {
            auth_client_ttl_sec: 3600,
            enable_auth_client_sharing: false,
            config_path: "/etc/containerd/certs.d:/etc/docker/certs.d".to_owned(),
            host: BTreeMap::new(),
        }
    }
}

/// A registry.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Host {
    /// Hosts that are asked before it.
    pub mirrors: Vec<Mirror>,
}

/// A mirror of a registry.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Mirror {
    /// Where.
    pub host: String,
    /// Without TLS.
    pub insecure: bool,
    /// Seconds that it may be silent; 0 is the default, negative is no limit.
    pub request_timeout_sec: i64,
}

/// A repository that holds indexes of other repositories' images, which is asked before the image's own.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct IndexRepository {
    /// Which images, as `HOST/REPOSITORY`; `*` is any text.
    #[serde(rename = "match")]
    pub images: String,
    /// The repository, as `HOST/NAME`.
    pub repository: String,
}

/// Snapshots.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Snapshotter {
    /// Layers below this many compressed bytes are not read lazily.
    pub min_layer_size: i64,
    /// Start although a layer is not there: that is always so.
    pub allow_invalid_mounts_on_restart: bool,
}

/// The layer store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LayerStore {
    /// Bytes of disk that layers may take; what was not used for longest goes first.
    pub quota: Size,
    /// Bytes of disk that fetched indexes may take in addition; the oldest go first.
    pub index_quota: Size,
}

impl Default for LayerStore {
    fn default() -> Self {
        Self { quota: Size::default(), index_quota: Size::gigabytes(1) }
    }
}
