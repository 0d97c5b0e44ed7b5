//! The two ways to a running program, timed: pull and unpack everything, or mount and fetch what is touched.

use std::io::Read;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use futures_util::StreamExt;
use soci_fs::fuse::image::Image;
use soci_fs::fuse::mount::{Lazy, MountOptions, Mounted, mount};
use soci_fs::layer::store::Store;
use soci_fs::open::{OpenOptions, open_image};
use soci_index::image::{ImageSource, PlatformImage};
use soci_index::registry::pieces::Pieces;
use tokio::runtime::Handle;

use crate::demo::process::{self, Ended};

/// How long a program may run.
const PROGRAM_LIMIT: Duration = Duration::from_secs(300);

/// One way to a running program.
#[derive(Debug, Clone, Default, serde::Serialize)]
pub struct Way {
    /// Until the program could be started.
    pub prepare_seconds: f64,
    /// The program.
    pub run_seconds: f64,
    /// Bytes that came from the registry.
    pub fetched_bytes: u64,
    /// Requests to the registry.
    pub requests: u64,
}

/// Pulls all layers, unpacks them on top of one another, and runs the program.
///
/// # Errors
/// When a layer cannot be obtained or unpacked, or the program not run.
pub async fn pull(
    source: &ImageSource,
    image: &PlatformImage,
    directory: &Path,
    command: &[String],
) -> anyhow::Result<(Way, Ended)> {
    let before = traffic(source);
    let start = Instant::now();
    for layer in &image.manifest.layers {
        // As runtimes do: download and unpack one layer after the other, in order.
        let (send, receive) = std::sync::mpsc::sync_channel::<bytes::Bytes>(64);
        let (target, kind) = (directory.to_owned(), layer.media_type.clone());
        let unpack =
            tokio::task::spawn_blocking(move || unpack(Pieces::new(receive.into_iter().map(Ok)), &kind, &target));
        let mut stream = source.open_blob(layer);
        while let Some(chunk) = stream.next().await {
            let (chunk, send) = (chunk?, send.clone());
            // If the receiver is gone, it reports the reason.
            if tokio::task::spawn_blocking(move || send.send(chunk)).await?.is_err() {
                break;
            }
        }
        drop(send);
        unpack.await?.with_context(|| format!("unpacking layer {}", layer.digest))?;
    }
    let prepare_seconds = start.elapsed().as_secs_f64();
    let ran = run(directory, command)?;
    let after = traffic(source);
    let (fetched_bytes, requests) = (after.0 - before.0, after.1 - before.1);
    Ok((Way { prepare_seconds, run_seconds: ran.time.as_secs_f64(), fetched_bytes, requests }, ran))
}

fn unpack(reader: impl Read + 'static, kind: &str, directory: &Path) -> anyhow::Result<()> {
    let reader: Box<dyn Read> = if kind.ends_with("gzip") {
        Box::new(flate2::read::MultiGzDecoder::new(reader))
    } else if kind.ends_with("zstd") {
        anyhow::bail!("the comparison with a full pull knows gzip and plain layers only");
    } else {
        Box::new(reader)
    };
    let mut archive = tar::Archive::new(reader);
    archive.set_preserve_permissions(true);
    archive.set_overwrite(true);
    for entry in archive.entries()? {
        let mut entry = entry?;
        // Devices need privileges that the comparison can do without; white-outs are not followed.
        let kind = entry.header().entry_type();
        if !kind.is_character_special() && !kind.is_block_special() {
            entry.unpack_in(directory)?;
        }
    }
    // What follows the end of the tar.
    std::io::copy(&mut archive.into_inner(), &mut std::io::sink())?;
    Ok(())
}

fn traffic(source: &ImageSource) -> (u64, u64) {
    let traffic = source.repository().map(|repository| repository.registry().traffic()).unwrap_or_default();
    (traffic.bytes_received, traffic.requests)
}

/// An image that is opened lazily, and mounted if that is possible here.
#[derive(Debug)]
pub struct Opened {
    /// Its files.
    pub image: Arc<Image>,
    /// How long opening and mounting took.
    pub prepare: Duration,
    pub index_bytes: u64,
    mounted: Option<Mounted>,
    before: (u64, u64),
}

impl Opened {
    /// Opens the image, and mounts it on `directory` if one is given.
    ///
    /// # Errors
    /// When the image cannot be opened. That it cannot be mounted is a warning.
    pub async fn new(
        source: &ImageSource,
        image: &PlatformImage,
        store: &Arc<Store>,
        options: &OpenOptions,
        directory: Option<&Path>,
    ) -> anyhow::Result<Self> {
        let (before, start) = (traffic(source), Instant::now());
        let opened = open_image(source, image, store, options, &Handle::current()).await?;
        let index_bytes = opened.index_bytes;
        let image = Arc::new(Image::new(opened.readers).context("merging the layers")?);
        let mounted = directory
            .map(|directory| mount(Arc::clone(&image), directory, &MountOptions::default(), Handle::current()))
            .transpose()
            .inspect_err(|error| {
                tracing::warn!("nothing can be mounted here: {error}; reading the same files through the library");
            })
            .unwrap_or_default();
        Ok(Self { image, prepare: start.elapsed(), index_bytes, mounted, before })
    }

    #[must_use]
    pub const fn is_mounted(&self) -> bool {
        self.mounted.is_some()
    }

    /// What it took so far, with the program's time.
    #[must_use]
    pub fn way(&self, source: &ImageSource, run: Duration) -> Way {
        let after = traffic(source);
        Way {
            prepare_seconds: self.prepare.as_secs_f64(),
            run_seconds: run.as_secs_f64(),
            fetched_bytes: after.0 - self.before.0,
            requests: after.1 - self.before.1,
        }
    }

    /// Unmounts.
    ///
    /// # Errors
    /// When the mount cannot be taken away.
    pub fn close(self) -> anyhow::Result<()> {
        if let Some(mounted) = self.mounted {
            mounted.unmounter().unmount(Lazy::Yes)?;
            mounted.wait()?;
        }
        Ok(())
    }
}

/// Runs a command line with `root` as its root directory: by chroot as root, else in a user namespace.
///
/// # Errors
/// When neither is possible, or the program does not end in time.
pub fn run(root: &Path, command: &[String]) -> anyhow::Result<Ended> {
    // Looked for in our own way: the command's environment is the image's.
    let tool = |name: &str| {
        let places = crate::args::config::search_path().into_iter().chain(["/usr/sbin", "/sbin"].map(Into::into));
        let found = places.map(|place| place.join(name)).find(|file| file.is_file());
        found.with_context(|| format!("{name} is not installed"))
    };
    let mut line = if rustix::process::geteuid().is_root() {
        let mut line = Command::new(tool("chroot")?);
        line.arg(root);
        line
    } else {
        let mut line = Command::new(tool("unshare")?);
        line.arg("--map-root-user").arg(format!("--root={}", root.display()));
        line
    };
    line.args(command).env_clear().env("PATH", "/usr/local/bin:/usr/bin:/bin").env("PYTHONDONTWRITEBYTECODE", "1");
    process::run(&mut line, PROGRAM_LIMIT)
}
