//! What a node feels: the answer to one `Prepare`, a warm start of a container, the memory of a worker with many layers.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use soci_cli::demo::recipe::Recipe;
use soci_cli::demo::registry::DemoRegistry;
use soci_cli::demo::stage::Stage as DemoStage;
use soci_fs::fuse::forest::{Forest, ForestOptions};
use soci_fs::layer::store::Store;
use soci_fs::node::metrics::Metrics;
use soci_fs::node::remote::id_maps::IdMaps;
use soci_fs::node::remote::labels::{IMAGE, LAYER, MANIFEST};
use soci_fs::node::remote::slots::Slots;
use soci_fs::node::remote::{Counted, Registries, RemoteLayers, RemoteOptions};
use soci_fs::node::snapshots::provider::LayerRequest;
use soci_fs::node::snapshots::{Prepared, SnapshotOptions, Snapshots};
use soci_fs::open::OpenOptions;
use soci_index::format::digest::Digest;
use soci_index::registry::{ClientOptions, CredentialSource};
use soci_tests::containerd::Containerd;
use soci_tests::image::{Image, shell_layer, tar, text};
use soci_tests::node::Node;
use soci_tests::registry::client;
use soci_tests::stage::Stage;
use tokio::runtime::{Handle, Runtime};

use crate::process::{output, resident_mib, soci};
use crate::report::{Goal, Pairs, Report};

/// Images of the measurement of `Prepare`, each with layers of its own.
const IMAGES: u64 = 15;
const LAYERS: u64 = 4;
const LAYER_BYTES: usize = 4 << 20;
/// Pairs of warm starts.
const STARTS: usize = 25;
/// Layers and files of the measurement of memory.
const MANY_LAYERS: u64 = 100;
const FILES_PER_LAYER: u64 = 1000;
/// Files of the measurement of what is cached.
const CACHED_FILES: u64 = 100;
const CACHED_FILE_BYTES: usize = 2 << 20;
/// The store looks every ten seconds, and asks twice for what it did not see used.
const CACHED_REST: Duration = Duration::from_secs(40);

/// The snapshots of a daemon in this process, with a registry without any latency.
struct Desk {
    snapshots: Arc<Snapshots>,
    registry: DemoRegistry,
    _root: tempfile::TempDir,
}

impl Desk {
    async fn new() -> anyhow::Result<Self> {
        let root = tempfile::Builder::new().prefix("soci-bench-prepare-").tempdir()?;
        let client = ClientOptions { credentials: CredentialSource::Anonymous, ..ClientOptions::default() };
        let open = OpenOptions {
            whole_layers: false,
            index_store: Some(root.path().join("content")),
            ..OpenOptions::default()
        };
        let options = RemoteOptions {
            open,
            images_max: 30,
            layers_at_once: 100,
            open_limit: Duration::from_secs(30),
            mountpoint: root.path().join("fs"),
            trees: None,
            profiles: soci_fs::node::remote::ProfileOptions::default(),
            index_quota: u64::MAX,
            only_named: false,
            known_places: None,
        };
        let layers = RemoteLayers::new(
            Arc::new(Forest::new(ForestOptions::default())),
            Arc::new(Store::open(root.path())?),
            Arc::new(Slots::open(&root.path().join("slots"))?),
            IdMaps::open(root.path().join("id-maps.json"))?,
            Arc::new(Registries::new(client, Vec::new(), Vec::new())),
            options,
            Handle::current(),
        )?;
        let provider = Arc::new(Counted { layers, metrics: Arc::new(Metrics::default()) });
        let snapshots = Arc::new(Snapshots::open(root.path(), SnapshotOptions::default(), provider)?);
        let registry = DemoRegistry::start(Duration::ZERO).await?;
        Ok(Self { snapshots, registry, _root: root })
    }

    /// Prepares all layers of an image as containerd does; milliseconds for each.
    async fn prepare(&self, name: &str, image: &Image) -> anyhow::Result<Vec<f64>> {
        let (mut times, mut parent) = (Vec::new(), String::new());
        for layer in &image.blobs[..image.tars.len()] {
            let target = format!("{name} {}", Digest::of(layer));
            let labels = BTreeMap::from([
                ("containerd.io/snapshot.ref".to_owned(), target.clone()),
                (IMAGE.to_owned(), name.to_owned()),
                (MANIFEST.to_owned(), image.digest().to_string()),
                (LAYER.to_owned(), Digest::of(layer).to_string()),
            ]);
            let request = LayerRequest { namespace: None, key: format!("key {target}"), parent, labels };
            let start = Instant::now();
            let prepared = Arc::clone(&self.snapshots).prepare_or_provide(request).await?;
            times.push(start.elapsed().as_secs_f64() * 1000.0);
            anyhow::ensure!(prepared == Prepared::Remote { name: target.clone() }, "{target} is not provided");
            parent = target;
        }
        Ok(times)
    }
}

/// How long one answer takes when the network takes nothing.
pub(crate) fn prepare(runtime: &Runtime, report: &mut Report) -> anyhow::Result<()> {
    let scratch = tempfile::Builder::new().prefix("soci-bench-publish-").tempdir()?;
    let (first, later) = runtime.block_on(async {
        let desk = Desk::new().await?;
        let (mut first, mut later) = (Vec::new(), Vec::new());
        for number in 0..IMAGES {
            let layers = (0..LAYERS).map(|layer| tar(&[("data", text(number * LAYERS + layer, LAYER_BYTES))]));
            let image = Image::gzip(layers.collect());
            image.push(&client(&desk.registry.host()).repository(&format!("team/app{number}")), "v1").await;
            let name = format!("{}/team/app{number}:v1", desk.registry.host());
            let mut publish = soci(&scratch.path().join("root"))?;
            publish.args(["publish", &name, "--min-layer-size", "0"]);
            tokio::task::spawn_blocking(move || output(&mut publish)).await??;
            let mut times = desk.prepare(&name, &image).await?.into_iter();
            first.extend(times.next());
            later.extend(times);
        }
        anyhow::Ok((first, later))
    })?;
    let what = format!("Prepare of an indexed layer, image of {LAYERS}, registry without latency");
    report.add(format!("{what}: the first, which looks image and index up"), Goal::AtMost(5.0), "ms", first);
    report.add(format!("{what}: the others"), Goal::AtMost(5.0), "ms", later);
    Ok(())
}

/// Starts of a container whose image is all here, against containerd's overlayfs.
pub(crate) fn warm(runtime: &Runtime, report: &mut Report) -> anyhow::Result<()> {
    let recipe = Recipe::of_this_machine()?;
    let demo = runtime.block_on(DemoStage::new(&recipe))?;
    let scratch = tempfile::Builder::new().prefix("soci-bench-warm-").tempdir()?;
    output(soci(&scratch.path().join("root"))?.args(["publish", &demo.name, "--min-layer-size", "1000000"]))?;
    let Some(stage) = runtime.block_on(Stage::new()) else { return Ok(()) };
    let Some(node) = Node::start(Containerd::V2) else { return Ok(()) };
    for snapshotter in ["soci", "overlayfs"] {
        let _ = stage.pull(&node, snapshotter, &demo.name);
    }
    let start = |snapshotter: &str, number: usize| -> anyhow::Result<f64> {
        let mut command = node.ctr();
        let container = node.container(&format!("warm-{snapshotter}-{number}"));
        command.args(["run", "--rm", "--snapshotter", snapshotter, &demo.name, &container]).args(&recipe.command);
        let start = Instant::now();
        output(&mut command)?;
        Ok(start.elapsed().as_secs_f64() * 1000.0)
    };
    for number in 0..2 {
        start("soci", number)?;
        start("overlayfs", number)?;
    }
    let mut pairs = Pairs::default();
    for number in 2..STARTS + 2 {
        // The second of two may find the machine warmer.
        let (our, their) = if number % 2 == 0 {
            let our = start("soci", number)?;
            (our, start("overlayfs", number)?)
        } else {
            let their = start("overlayfs", number)?;
            (start("soci", number)?, their)
        };
        pairs.push(our, their);
    }
    let what = "warm start of a container, `ctr run` of Python from start to end";
    report.add(format!("{what}: time, in units of containerd's overlayfs"), Goal::AtMost(1.05), "", pairs.ratios);
    report.add(what, Goal::None, "ms", pairs.ours);
    report.add(format!("{what}, by containerd's overlayfs"), Goal::None, "ms", pairs.theirs);
    Ok(())
}

/// Memory of the worker that shows many layers with many files, after all names were looked at.
pub(crate) fn memory(runtime: &Runtime, report: &mut Report) -> anyhow::Result<()> {
    let Some(stage) = runtime.block_on(Stage::new()) else { return Ok(()) };
    let Some(node) = Node::start(Containerd::V2) else { return Ok(()) };
    let layer = |layer: u64| {
        let names: Vec<String> = (0..FILES_PER_LAYER)
            .map(|file| format!("usr/lib/python3/dist-packages/layer{layer}/module{}/file{file}.py", file / 50))
            .collect();
        let files: Vec<(&str, Vec<u8>)> = names.iter().map(|name| (&**name, text(layer, 500))).collect();
        tar(&files)
    };
    let layers = std::iter::once(shell_layer(("/etc/base", ""))).chain((1..MANY_LAYERS).map(layer));
    let image = Image::gzip(layers.collect());
    let name = runtime.block_on(stage.publish(&image, "many", 4 << 20));
    let _ = stage.pull(&node, "soci", &name);
    let worker = node.status()["pid"].as_u64().context("a worker")?;
    let worker = u32::try_from(worker)?;
    let pulled = resident_mib(worker);
    let files = walk(&node.path("soci/fs"))?;
    anyhow::ensure!(files >= (MANY_LAYERS - 1) * FILES_PER_LAYER, "only {files} files are there");
    let what = format!("memory of a worker, {MANY_LAYERS} layers with {files} files");
    report.add(format!("{what}, after the pull"), Goal::AtMost(64.0), "MiB", vec![pulled]);
    report.add(format!("{what}, after `stat` of all"), Goal::AtMost(64.0), "MiB", vec![resident_mib(worker)]);
    Ok(())
}

/// How much memory the kernel takes for what is read: once for the mount, and once more below it for a while.
pub(crate) fn cached(runtime: &Runtime, report: &mut Report) -> anyhow::Result<()> {
    let Some(stage) = runtime.block_on(Stage::new()) else { return Ok(()) };
    let Some(node) = Node::start(Containerd::V2) else { return Ok(()) };
    let files: Vec<(String, Vec<u8>)> =
        (0..CACHED_FILES).map(|file| (format!("srv/file{file}"), text(file, CACHED_FILE_BYTES))).collect();
    let named: Vec<(&str, Vec<u8>)> = files.iter().map(|(name, bytes)| (&**name, bytes.clone())).collect();
    let image = Image::gzip(vec![shell_layer(("/etc/base", "")), tar(&named)]);
    let name = runtime.block_on(stage.publish(&image, "cached", 256 << 10));
    let _ = stage.pull(&node, "soci", &name);
    let (mut shown, mut stored) = (files_below(&node.path("soci/fs"))?, files_below(&node.path("soci/layers"))?);
    shown.retain(|path| path.components().any(|part| part.as_os_str() == "srv"));
    stored.retain(|path| path.ends_with("data"));
    let mut read = 0;
    for path in &shown {
        read += std::fs::read(path).with_context(|| path.display().to_string())?.len();
    }
    let of_read = |paths: &[PathBuf]| -> anyhow::Result<f64> { Ok(cached_bytes(paths)? / read as f64) };
    let what = format!("page cache per byte read, {} MB", read / 1_000_000);
    report.add(format!("{what}: of the mount"), Goal::None, "", vec![of_read(&shown)?]);
    report.add(format!("{what}: of the store, at once"), Goal::None, "", vec![of_read(&stored)?]);
    std::thread::sleep(CACHED_REST);
    report.add(
        format!("{what}: of the mount, {} s later", CACHED_REST.as_secs()),
        Goal::None,
        "",
        vec![of_read(&shown)?],
    );
    let what = format!("{what}: of the store, {} s later", CACHED_REST.as_secs());
    report.add(what, Goal::AtMost(0.05), "", vec![of_read(&stored)?]);
    Ok(())
}

/// Bytes of files that are in the page cache.
fn cached_bytes(paths: &[PathBuf]) -> anyhow::Result<f64> {
    let mut command = Command::new("fincore");
    command.args(["--bytes", "--noheadings", "--raw", "--output", "RES"]).args(paths);
    let sizes = output(&mut command).context("`fincore` of util-linux")?;
    sizes.lines().map(|size| size.trim().parse::<f64>().context("a number of bytes")).sum()
}

/// Looks at everything below a directory; gives the number of files.
fn walk(directory: &Path) -> anyhow::Result<u64> {
    Ok(files_below(directory)?.len() as u64)
}

fn files_below(directory: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut todo = vec![directory.to_owned()];
    while let Some(directory) = todo.pop() {
        for entry in std::fs::read_dir(&directory).with_context(|| directory.display().to_string())? {
            let metadata = entry?;
            let (path, metadata) = (metadata.path(), metadata.metadata()?);
            if metadata.is_dir() {
                todo.push(path);
            } else {
                files.push(path);
            }
        }
    }
    Ok(files)
}
