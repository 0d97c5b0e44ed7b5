//! The daemon's configuration file, with all keys of AWS's snapshotter.
//!
//! Operators switch by changing the binary, so every key of theirs is understood here, with its default and with zero
//! for "default" where they have that. A key that changes nothing in this daemon is accepted and named once in the log,
//! if it asks for something else than the default. An unknown key or an invalid value stops the start with file, line
//! and key: an ignored typo would be found much later.
//!
//! The comments of the keys are docs/configuration.md: they say what a value means and in which unit.
//!
//! Keys of our own: `pull_modes.leave_unindexed`, `pull_modes.foreign_layers`, `resolver.config_path` (directories of `hosts.toml` files, separated by
//! colons; empty is none) and the sections `[[index_repository]]`, `[kubelet_keychain]`, `[layer_store]`, `[limits]`, `[profile]` and `[trust]`. One
//! default differs: version 1 indexes are used, because an index that names its image is what `soci publish` makes; `enable = false` is obeyed.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use soci_fs::node::remote::background::Pace;
use soci_fs::node::remote::elsewhere::{IndexRule, RuleError};
use soci_index::registry::request_headers;

mod limits;
mod profile;
mod pull_modes;
mod sections;
mod trust;
mod values;

pub use limits::Limits;
pub use profile::Profile;
pub use pull_modes::*;
pub use sections::*;
pub use trust::*;
pub use values::*;

/// How long after the last read that waited a start counts as over, and a claim in use is proven.
const START_QUIET: Duration = Duration::from_secs(3);

/// Keys that change something in this daemon, with all that is below them. All others are accepted.
const WITH_EFFECT: [&str; 49] = [
    "background_fetch.disable",
    "background_fetch.fetch_period_msec",
    "background_fetch.silence_period_msec",
    "blob.fetching_timeout_sec",
    "blob.max_retries",
    "blob.max_wait_msec",
    "blob.min_wait_msec",
    "content_store.containerd_address",
    "content_store.type",
    "cri_keychain.enable_keychain",
    "cri_keychain.image_service_path",
    "debug",
    "fuse_metrics_emit_wait_duration_sec",
    "http.DialTimeoutMsec",
    "http.MaxRetries",
    "http.MaxWaitMsec",
    "http.MinWaitMsec",
    "http.RequestTimeoutMsec",
    "http.ResponseHeaderTimeoutMsec",
    "fuse.read_ahead_kib",
    "fuse.tree",
    "index_repository",
    "kubeconfig_keychain.enable_keychain",
    "kubeconfig_keychain.kubeconfig_path",
    "kubelet_keychain.bin_dir",
    "kubelet_keychain.config_path",
    "layer_store.index_quota",
    "layer_store.quota",
    "limits",
    "max_concurrency",
    "metrics_address",
    "metrics_network",
    "mount_timeout_sec",
    "no_prometheus",
    "prefetch",
    "profile",
    "pull_modes.foreign_layers",
    "pull_modes.leave_unindexed",
    "pull_modes.parallel_pull_unpack.enable",
    "pull_modes.parallel_pull_unpack.experimental_parallel_pull_as_fallback",
    "pull_modes.soci_v1.enable",
    "pull_modes.soci_v2.enable",
    "resolve_result_entry",
    "resolver.config_path",
    "resolver.custom_headers",
    "resolver.host",
    "skip_check_snapshotter_supported",
    "snapshotter.min_layer_size",
    "trust",
];

/// Why the daemon cannot be configured.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("failed to open config file {}: {cause}", file.display())]
    Open {
        /// The file.
        file: PathBuf,
        /// What the system said.
        #[source]
        cause: std::io::Error,
    },
    /// The file does not say what it should.
    #[error("failed to load config file {}:{line}: {what} in {text:?}", file.display())]
    Load {
        /// The file.
        file: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong.
        what: String,
        /// The line's text.
        text: String,
    },
}

/// A configuration, and what of it has no effect.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// The values.
    pub config: DaemonConfig,
    /// Keys that ask for something that this daemon does not do.
    pub without_effect: Vec<String>,
}

impl Loaded {
    /// Reads the file. One that is merely the default need not exist.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn read(file: &Path, is_default: bool) -> Result<Self, ConfigError> {
        let text = match std::fs::read_to_string(file) {
            Ok(text) => text,
            Err(cause) if is_default && cause.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(cause) => return Err(ConfigError::Open { file: file.to_owned(), cause }),
        };
        Self::parse(&text, file)
    }

    fn parse(text: &str, file: &Path) -> Result<Self, ConfigError> {
        let failed = |error: toml::de::Error| {
            let at = error.span().map_or(0, |span| span.start).min(text.len());
            let line = text.as_bytes()[..at].iter().filter(|byte| **byte == b'\n').count();
            ConfigError::Load {
                file: file.to_owned(),
                line: line + 1,
                what: error.message().to_owned(),
                text: text.lines().nth(line).unwrap_or_default().trim().to_owned(),
            }
        };
        let mut config: DaemonConfig = toml::from_str(text).map_err(failed)?;
        // What only several keys together can get wrong is shown by the section that they are in.
        let wrong = |section: &str, what: String| {
            let line = text.lines().position(|line| line.contains(section)).unwrap_or_default();
            let text = text.lines().nth(line).unwrap_or_default().trim().to_owned();
            ConfigError::Load { file: file.to_owned(), line: line + 1, what, text }
        };
        if config.kubelet_keychain.config_path.is_empty() != config.kubelet_keychain.bin_dir.is_empty() {
            return Err(wrong("kubelet_keychain", "config_path and bin_dir must be given together".to_owned()));
        }
        let unsendable = config.resolver.custom_headers.iter().find_map(|name| request_headers::check_name(name).err());
        if let Some(error) = unsendable {
            return Err(wrong("custom_headers", format!("resolver.custom_headers: {error}")));
        }
        config.index_rules().map_err(|error| wrong("index_repository", error.to_string()))?;
        let given: toml::Table = toml::from_str(text).map_err(failed)?;
        config.pull_modes.complete(given.get("pull_modes"));
        let default = toml::Table::try_from(DaemonConfig::default()).unwrap_or_default();
        let mut without_effect = Vec::new();
        differing("", &given, &default, &mut without_effect);
        without_effect.retain(|key| !has_effect(key));
        Ok(Self { config, without_effect })
    }
}

/// Whether a key, as `section.key`, changes something in this daemon.
#[must_use]
pub fn has_effect(key: &str) -> bool {
    let below = |known: &str| key.strip_prefix(known).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
    WITH_EFFECT.into_iter().any(below)
}

/// Names the keys whose value is neither the default nor zero, which means the default.
fn differing(above: &str, given: &toml::Table, default: &toml::Table, found: &mut Vec<String>) {
    for (key, value) in given {
        let path = if above.is_empty() { key.clone() } else { format!("{above}.{key}") };
        match (value, default.get(key)) {
            (toml::Value::Table(value), Some(toml::Value::Table(default))) => differing(&path, value, default, found),
            (value, default) if default == Some(value) || is_zero(value) => {}
            _ => found.push(path),
        }
    }
}

fn is_zero(value: &toml::Value) -> bool {
    match value {
        toml::Value::String(text) => text.is_empty(),
        toml::Value::Integer(number) => *number == 0,
        toml::Value::Boolean(_) | toml::Value::Float(_) | toml::Value::Datetime(_) => false,
        toml::Value::Array(items) => items.is_empty(),
        toml::Value::Table(table) => table.is_empty(),
    }
}

impl DaemonConfig {
    /// Where else indexes are looked for.
    ///
    /// # Errors
    /// The first rule that makes no sense.
    pub fn index_rules(&self) -> Result<Vec<IndexRule>, RuleError> {
        self.index_repository.iter().map(|rule| IndexRule::new(&rule.images, &rule.repository)).collect()
    }

    /// Layers that are worked on at the same time.
    #[must_use]
    pub fn layers_at_once(&self) -> usize {
        match self.max_concurrency {
            0 => 100,
            limit => usize::try_from(limit).unwrap_or(tokio::sync::Semaphore::MAX_PERMITS),
        }
    }

    /// When layers are fetched in the background; `None` is never.
    #[must_use]
    pub fn background_pace(&self) -> Option<Pace> {
        let given = &self.background_fetch;
        let time = |milliseconds: i64, default: u64| {
            Duration::from_millis(u64::try_from(milliseconds).ok().filter(|given| *given > 0).unwrap_or(default))
        };
        let pace = Pace {
            silence: time(given.silence_period_msec, 30_000),
            period: time(given.fetch_period_msec, 500),
            quiet: START_QUIET,
            withheld: self.trust.withheld(),
        };
        (!given.disable).then_some(pace)
    }

    /// Images that are remembered.
    #[must_use]
    pub fn images_max(&self) -> usize {
        usize::try_from(self.resolve_result_entry).ok().filter(|entries| *entries > 0).unwrap_or(30)
    }

    /// How long a layer may take to open.
    #[must_use]
    pub fn mount_timeout(&self) -> Duration {
        match u64::try_from(self.mount_timeout_sec) {
            Ok(seconds) if seconds > 0 => Duration::from_secs(seconds),
            _ => Duration::from_secs(30),
        }
    }

    /// How long after an image's first layer its operations are added up.
    #[must_use]
    pub fn counting_wait(&self) -> Duration {
        match u64::try_from(self.fuse_metrics_emit_wait_duration_sec) {
            Ok(seconds) if seconds > 0 => Duration::from_secs(seconds),
            _ => Duration::from_secs(60),
        }
    }

    /// Layers below this many compressed bytes are not read lazily.
    #[must_use]
    pub fn layer_bytes_min(&self) -> u64 {
        u64::try_from(self.snapshotter.min_layer_size).unwrap_or(0)
    }
}

impl fmt::Display for DaemonConfig {
    /// As a file that could be read again.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&toml::to_string(self).map_err(|_| fmt::Error)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Loaded, ConfigError> {
        Loaded::parse(text, Path::new("/etc/soci/config.toml"))
    }

    #[test]
    fn what_is_printed_can_be_read() {
        let default = DaemonConfig::default();
        let loaded = parse(&default.to_string()).unwrap();
        assert_eq!((loaded.config, loaded.without_effect), (default, vec![]));
        assert_eq!(parse("").unwrap().config, DaemonConfig::default());
    }

    #[test]
    fn zero_means_default() {
        let config =
            parse("max_concurrency = 0\nmount_timeout_sec = 0\nresolve_result_entry = 0\n[fuse]\nattr_timeout = 0\n");
        let loaded = config.unwrap();
        assert_eq!(loaded.without_effect, [""; 0]);
        assert_eq!((loaded.config.layers_at_once(), loaded.config.images_max()), (100, 30));
        assert_eq!(loaded.config.mount_timeout(), Duration::from_secs(30));
        assert_eq!(parse("max_concurrency = -1").unwrap().config.layers_at_once(), tokio::sync::Semaphore::MAX_PERMITS);
    }

    #[test]
    fn keys_without_effect_are_named() {
        let text = "metadata_store = 'db-multi'\n[http]\nMaxRetries = 3\n[blob]\nmax_retries = 3\nvalid_interval = 5\n[background_fetch]\nmax_queue_size = 7\n\
                    [pull_modes.soci_v1]\nenable = false\n[[resolver.host.\"registry.example\".mirrors]]\nhost = 'mirror.example'\n\
                    [resolver]\nconfig_path = '/certs.d'\nauth_client_ttl_sec = 5\n";
        let loaded = parse(text).unwrap();
        let mut named = loaded.without_effect;
        named.sort();
        assert_eq!(
            named,
            [
                "background_fetch.max_queue_size",
                "blob.valid_interval",
                "metadata_store",
                "resolver.auth_client_ttl_sec"
            ]
        );
        assert!(!loaded.config.pull_modes.soci_v1.enable);
        assert_eq!(loaded.config.resolver.host["registry.example"].mirrors[0].host, "mirror.example");
    }

    #[test]
    fn without_an_index_aws_pull_modes_leave_a_layer_to_containerd() {
        use LeaveUnindexed::{Images, Layers, None};
        let v1 = "[pull_modes.soci_v1]\nenable = true\n";
        let parallel = |key: &str| format!("{v1}[pull_modes.parallel_pull_unpack]\n{key} = true\n");
        for (text, leaves) in [
            ("", None),
            ("[pull_modes]\nforeign_layers = true\n", None),
            (v1, Images),
            ("[pull_modes.soci_v2]\nenable = false\n", Images),
            (&parallel("discard_unpacked_layers"), Images),
            (&parallel("enable"), None),
            (&parallel("experimental_parallel_pull_as_fallback"), None),
            (&format!("[pull_modes]\nleave_unindexed = false\n{v1}"), None),
            ("[pull_modes]\nleave_unindexed = true\n", Layers),
            ("[pull_modes]\nleave_unindexed = 'images'\n", Images),
        ] {
            let config = parse(text).unwrap().config;
            assert_eq!(config.pull_modes.leave_unindexed, leaves, "{text}");
            // What `config dump` prints means the same.
            let dumped = toml::to_string(&config).unwrap();
            assert_eq!(parse(&dumped).unwrap().config, config, "{text}");
        }
        assert!(parse("[pull_modes]\nleave_unindexed = 'some'\n").is_err());
        // Its parallel pull comes before lazy reading, its fallback behind it.
        let is_lazy = |text: &str| !parse(text).unwrap().config.pull_modes.indexes().is_off();
        assert!(is_lazy("") && is_lazy(&parallel("experimental_parallel_pull_as_fallback")));
        assert!(!is_lazy(&parallel("enable")));
    }

    #[test]
    fn headers_of_clients_are_named_by_valid_names() {
        let listed = |name: &str| parse(&format!("[resolver]\ncustom_headers = [{name:?}]\n"));
        let loaded = listed("x-request-id").unwrap();
        assert_eq!(
            (loaded.config.resolver.custom_headers, loaded.without_effect),
            (vec!["x-request-id".into()], vec![])
        );
        for name in ["", "x:y", "x\r\nInjected", "Authorization", "range"] {
            let error = listed(name).unwrap_err().to_string();
            assert!(error.contains("resolver.custom_headers"), "{error}");
        }
    }

    #[test]
    fn no_image_service_is_the_usual_one() {
        let service = |text: &str| parse(text).unwrap().config.cri_keychain.image_service().to_owned();
        assert_eq!(service("[cri_keychain]\nimage_service_path = ''\n"), "/run/containerd/containerd.sock");
        assert_eq!(service("[cri_keychain]\nimage_service_path = '/x.sock'\n"), "/x.sock");
    }

    #[test]
    fn limits_are_read() {
        let loaded = parse("[limits]\nmax_span_bytes = 1073741824\n").unwrap();
        assert_eq!(loaded.without_effect, [""; 0]);
        let (caps, default) = (loaded.config.limits.caps(), soci_fs::layer::limits::Caps::default());
        assert_eq!((caps.layer.span_bytes_max, caps.total_table_bytes), (1 << 30, default.total_table_bytes));
        let zero = parse("[limits]\nmax_span_bytes = 0\nmax_table_bytes = 0\nmax_total_table_bytes = 0\n").unwrap();
        assert_eq!(zero.config.limits.caps(), default);
        assert!(parse("[limits]\nmax_span = 1\n").is_err());
    }

    #[test]
    fn trust_is_read() {
        let loaded =
            parse("[trust]\nprovisional = 'require-signature'\nkeys = ['/k.pem']\ncertificates = ['/c.pem']\n")
                .unwrap();
        assert_eq!(loaded.without_effect, [""; 0]);
        let trust = loaded.config.trust;
        assert_eq!(trust.provisional, soci_fs::open::trust::Provisional::RequireSignature);
        assert_eq!((trust.keys, trust.certificates), (vec!["/k.pem".into()], vec!["/c.pem".into()]));
        let bound = "[trust]\nprovisional = 'require-signature'\n[[trust.signer]]\nmatch = 'h.example/a/*'\nkeys = ['/a.pem']\n\
                     [[trust.signer]]\nmatch = 'h.example/b/*'\ncertificates = ['/b.pem']\n";
        let bound = parse(bound).unwrap();
        assert_eq!(bound.without_effect, [""; 0]);
        let signers: Vec<&str> = bound.config.trust.signer.iter().map(|signer| signer.images.as_str()).collect();
        assert_eq!(signers, ["h.example/a/*", "h.example/b/*"]);
        assert!(parse("[trust]\n[[trust.signer]]\nmatch = '*'\nkeys = []\n").unwrap().config.trust.policy().is_err());
        assert!(parse("[trust]\nprovisional = 'deny'\n").unwrap().config.trust.policy().is_ok());
        assert!(parse("[trust]\nprovisional = 'require-signature'\n").unwrap().config.trust.policy().is_err());
    }

    #[test]
    fn mistakes_stop_the_start() {
        for (text, line, key) in [
            ("debug = true\nno_such_key = 1\n", 2, "no_such_key"),
            ("[fuse]\nattr_timeout = 'long'\n", 2, "attr_timeout"),
            ("[background_fetch]\n\ndrop_policy = 'middle'\n", 3, "drop_policy"),
            ("metadata_store = 'sqlite'\n", 1, "metadata_store"),
            ("[layer_store]\nquota = '5 apples'\n", 2, "quota"),
            ("[pull_modes.parallel_pull_unpack]\nconcurrent_download_chunk_size = '1tb'\n", 2, "chunk_size"),
            ("a = = 1\n", 1, "a = = 1"),
            ("[[index_repository]]\nmatch = '*'\nrepository = 'busybox'\n", 1, "index_repository"),
            ("[trust]\nprovisional = 'maybe'\n", 2, "maybe"),
            ("[trust]\nkey = '/k.pem'\n", 2, "key"),
            ("[[trust.signer]]\nrepository = 'h/a'\n", 2, "repository"),
            ("debug = true\n[kubelet_keychain]\nbin_dir = '/opt'\n", 2, "kubelet_keychain"),
        ] {
            match parse(text).unwrap_err() {
                ConfigError::Load { line: found, text: shown, .. } => {
                    assert_eq!(found, line, "{text}");
                    assert!(shown.contains(key), "{shown}");
                }
                ConfigError::Open { .. } => panic!("nothing was opened"),
            }
        }
    }
}
