//! Images in a registry, with and without an index, and their pull as Kubernetes does it.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use soci_cli::demo::registry::DemoRegistry;

use crate::image::Image;
use crate::node::Node;
use crate::registry::client;
use crate::{go, soci, stdout};

/// The repository that all images are in.
const REPOSITORY: &str = "team/app";

/// A registry and the program that pulls.
#[derive(Debug)]
pub struct Stage {
    /// Where the images are.
    pub registry: DemoRegistry,
    puller: PathBuf,
}

impl Stage {
    /// A registry without images; `None`, with a word on standard error, where there is no Go.
    ///
    /// # Panics
    /// When there is no port to listen on.
    pub async fn new() -> Option<Self> {
        let puller = go::programs()?.join("pull");
        let registry = DemoRegistry::start(Duration::ZERO).await.expect("a port");
        Some(Self { registry, puller })
    }

    /// Pushes an image and gives its name.
    pub async fn push(&self, image: &Image, tag: &str) -> String {
        image.push(&client(&self.registry.host()).repository(REPOSITORY), tag).await;
        self.name(&self.registry.host(), tag)
    }

    /// Pushes an image and an index of all its layers with spans of `span_bytes`, and gives the image's name.
    pub async fn publish(&self, image: &Image, tag: &str, span_bytes: u32) -> String {
        let name = self.push(image, tag).await;
        let spans = span_bytes.to_string();
        drop(stdout(soci().args(["publish", &name, "--min-layer-size", "0", "--span-size", &spans])));
        name
    }

    /// The name of an image at another address of this registry.
    #[must_use]
    pub fn name(&self, host: &str, tag: &str) -> String {
        format!("{host}/{REPOSITORY}:{tag}")
    }

    /// Pulls an image as Kubernetes does it; gives the bytes that this takes out of the registry.
    #[must_use]
    pub fn pull(&self, node: &Node, snapshotter: &str, name: &str) -> u64 {
        let before = self.registry.traffic().bytes_sent;
        let mut command = Command::new(&self.puller);
        drop(stdout(command.arg(node.path("containerd.sock")).args([snapshotter, name])));
        self.registry.traffic().bytes_sent - before
    }
}
