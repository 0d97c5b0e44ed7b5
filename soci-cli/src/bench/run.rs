//! One start: pull, create, run, each timed and its bytes counted.

use std::path::Path;
use std::time::Instant;

use anyhow::Context as _;
use parking_lot::Mutex;
use soci_fs::node::grpc::containerd::Containerd;
use soci_fs::node::rpull::{self, PullOptions, PulledLayer};
use soci_index::format::model::RawManifest;
use soci_index::format::platform::PlatformSelection;
use soci_index::format::reference::{Reference, RegistryReference};
use soci_index::image::{ImageSource, PlatformImage};
use soci_index::registry::{ClientOptions, CredentialSource};

use crate::bench::honesty::{self, LayerArrival};
use crate::bench::node::Node;
use crate::bench::relay::Relay;
use crate::bench::series::Sample;
use crate::bench::waits::Waits;
use crate::report::exit::{Exit, fail};

/// containerd's own snapshotters: what they have was downloaded and unpacked.
const WHOLE: [&str; 7] = ["overlayfs", "native", "btrfs", "zfs", "devmapper", "blockfile", "erofs"];

#[derive(Debug)]
pub struct Start<'a> {
    pub node: &'a Node,
    /// The registry.
    pub relay: &'a Relay,
    /// The snapshotter's name in containerd.
    pub snapshotter: &'a str,
    /// The image in the registry that the relay stands before: `NAME:TAG` or `NAME@DIGEST`.
    pub image: &'a str,
    /// The program and its arguments.
    pub command: &'a [String],
    /// Layers below this size, in bytes, may come whole.
    pub layer_bytes_min: u64,
    /// The root of our daemon, if it is what is measured.
    pub daemon: &'a Path,
    /// A name that no other container of this machine has.
    pub container: String,
}

impl Start<'_> {
    /// The image's name in containerd.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}/{}", self.relay.address(), self.image)
    }

    /// The repository that it is in, as our daemon names it: that of the relay, and thus unique.
    fn repository(&self) -> String {
        let name = self.image.split('@').next().unwrap_or_default();
        let name = name.split(':').next().unwrap_or_default();
        format!("{}/{name}", self.relay.address())
    }

    /// Starts the program with nothing here yet, and removes everything afterwards. With `warm` it is started a second
    /// time before that, and the second sample is of that start.
    ///
    /// # Errors
    /// When a phase fails, or the pull was not what the snapshotter promises. What is left then is left for a look at
    /// it.
    pub async fn measure(&self, warm: bool) -> anyhow::Result<Vec<Sample>> {
        drop_caches(3)?;
        let before = self.relay.bytes_down();
        let start = Instant::now();
        if WHOLE.contains(&self.snapshotter) {
            self.pull_whole().await?;
        } else {
            self.pull_lazily().await?;
        }
        let mut sample = Sample { pull: start.elapsed().as_secs_f64(), ..Sample::default() };
        sample.pull_bytes = self.relay.bytes_down() - before;
        let mut samples = vec![self.start(sample, before)?];
        if warm {
            samples.push(self.start(Sample::default(), self.relay.bytes_down())?);
        }
        self.node.remove_image(&self.name())?;
        Ok(samples)
    }

    /// Makes a container, runs it and removes it.
    fn start(&self, mut sample: Sample, bytes_before: u64) -> anyhow::Result<Sample> {
        let waited = || Waits::of(self.daemon, &self.repository());
        let waits_before = waited();
        let start = Instant::now();
        self.node.create(self.snapshotter, &self.name(), &self.container, self.command)?;
        sample.create = start.elapsed().as_secs_f64();
        let start = Instant::now();
        self.node.run(&self.container)?;
        sample.run = start.elapsed().as_secs_f64();
        sample.bytes = self.relay.bytes_down() - bytes_before;
        sample.waits = waited().map(|waits| waits.since(waits_before.unwrap_or_default()));
        self.node.remove_container(&self.container)?;
        Ok(sample)
    }

    async fn pull_whole(&self) -> anyhow::Result<()> {
        let before = self.relay.bytes_down();
        let (node, snapshotter, name) = (self.node.clone(), self.snapshotter.to_owned(), self.name());
        tokio::task::spawn_blocking(move || node.pull(&snapshotter, &name)).await??;
        let bytes = self.relay.bytes_down() - before;
        // Read from the registry itself, this is no part of the measurement.
        let (_, _, image, _) = self.resolve().await?;
        let size: u64 = image.manifest.layers.iter().map(|layer| layer.size).sum();
        anyhow::ensure!(
            bytes >= size,
            "{} pulled {bytes} bytes of an image of {size}: some layers were here already, this is no cold start. Remove \
             all images that have them",
            self.snapshotter
        );
        Ok(())
    }

    async fn resolve(&self) -> anyhow::Result<(RegistryReference, RawManifest, PlatformImage, ImageSource)> {
        let options = ClientOptions { credentials: CredentialSource::Anonymous, ..ClientOptions::default() };
        let reference: Reference = self.name().parse().map_err(|error| fail(Exit::Usage, format!("{error}")))?;
        let Reference::Registry(name) = &reference else {
            return Err(fail(Exit::Usage, format!("{} is not in a registry", self.image)));
        };
        let source = ImageSource::open(&reference, &options).await?;
        let (root, mut images) = source.resolve_with_root(&PlatformSelection::Host).await?;
        let image = images.pop().context("the image has a platform")?;
        Ok((name.clone(), root, image, source))
    }

    async fn pull_lazily(&self) -> anyhow::Result<()> {
        let containerd = Containerd::connect(&self.node.socket, &self.node.namespace).await?;
        let (image, root, platform, source) = self.resolve().await?;
        let options = PullOptions { image, snapshotter: self.snapshotter.to_owned(), index: None, urls: None };
        let seen = Mutex::new((self.relay.bytes_down(), Vec::new()));
        let note = |pulled: &PulledLayer| {
            let mut seen = seen.lock();
            let (now, PulledLayer { layer, came, .. }) = (self.relay.bytes_down(), pulled);
            let bytes = now - std::mem::replace(&mut seen.0, now);
            seen.1.push(LayerArrival { layer: layer.digest, size: layer.size, came: *came, bytes });
        };
        rpull::pull(&containerd, &source, &root, &platform, &options, &note).await?;
        let (_, layers) = seen.into_inner();
        honesty::check(self.snapshotter, &layers, self.layer_bytes_min)?;
        Ok(())
    }
}

/// Has the kernel forget files: 1 contents, 2 names and attributes, 3 both.
///
/// # Errors
/// When this is not root.
pub fn drop_caches(which: u8) -> anyhow::Result<()> {
    rustix::fs::sync();
    std::fs::write("/proc/sys/vm/drop_caches", which.to_string()).map_err(|error| {
        fail(Exit::Local, format!("the kernel's caches cannot be dropped: {error}; a cold start is measured as root"))
    })
}
