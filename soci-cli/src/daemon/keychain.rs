//! Which sources of credentials a configuration asks for, and in which order they are asked.
//!
//! Docker's configuration first, then the cluster's secrets, then what came with pulls: the order of AWS's snapshotter.
//! The kubelet's plugins, which that one does not know, come last.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use soci_fs::node::grpc::image_service::ImageService;
use soci_fs::node::keychain::cluster::Cluster;
use soci_fs::node::keychain::plugins::Plugins;
use soci_fs::node::keychain::pulls::Pulls;
use soci_index::registry::{CredentialSource, Keychain};
use tokio::runtime::Handle;

use crate::daemon::config::DaemonConfig;

/// The credentials of a daemon.
#[derive(Debug)]
pub(super) struct Credentials {
    /// Where they come from.
    pub(super) source: CredentialSource,
    /// The service by which some of them come.
    pub(super) images: Option<ImageService>,
}

impl Credentials {
    /// Sets up what `config` asks for. `memory` holds the credentials that an earlier worker was sent.
    ///
    /// # Errors
    /// When a section of the configuration makes no sense.
    pub(super) fn of(config: &DaemonConfig, memory: Option<File>) -> anyhow::Result<Self> {
        let mut sources = vec![CredentialSource::DockerConfig];
        let mut images = None;
        if config.kubeconfig_keychain.enable_keychain {
            let path = &config.kubeconfig_keychain.kubeconfig_path;
            let path = (!path.is_empty()).then(|| PathBuf::from(path));
            sources.push(keychain(Cluster::watch(path, &Handle::current())));
        }
        if config.cri_keychain.enable_keychain {
            let pulls = Arc::new(Pulls::new(memory));
            let containerd: &Path = config.cri_keychain.image_service().as_ref();
            let service = ImageService::new(containerd, Arc::clone(&pulls)).map_err(anyhow::Error::msg);
            images = Some(service.context("cri_keychain.image_service_path")?);
            sources.push(CredentialSource::Keychain(pulls));
        }
        let (file, directory) = (&config.kubelet_keychain.config_path, &config.kubelet_keychain.bin_dir);
        if !file.is_empty() && !directory.is_empty() {
            sources.push(keychain(Plugins::new(file.into(), directory.into())));
        }
        Ok(Self { source: CredentialSource::Chain(sources), images })
    }
}

fn keychain(keychain: impl Keychain + 'static) -> CredentialSource {
    CredentialSource::Keychain(Arc::new(keychain))
}
