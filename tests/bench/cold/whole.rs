//! How long an image without any index takes to be here whole: ours, and containerd's overlayfs.
//!
//! Both are pulled as Kubernetes does it, through the same relay, each on a machine of its own. Ours finds no index and
//! streams the layers into its store; that containerd did not do it is checked in containerd's content.

use std::process::Command;
use std::time::Instant;

use anyhow::Context as _;
use soci_cli::bench::relay::Relay;
use soci_cli::bench::run::drop_caches;
use soci_index::format::model::{Descriptor, ImageManifest};
use soci_index::format::reference::ManifestName;
use soci_tests::registry::client;
use tokio::runtime::Runtime;

use super::machine::{Kind, Machine};
use super::{Image, Place};
use crate::process::output;
use crate::report::{Goal, Pairs, Report};

/// Goal for our time in units of overlayfs's.
const GOAL: f64 = 0.4;

/// Measures pairs.
pub(crate) fn whole(
    runtime: &Runtime,
    place: &Place<'_>,
    image: &Image,
    rounds: usize,
    report: &mut Report,
) -> anyhow::Result<()> {
    let repository = runtime.block_on(place.shelf.plain(image))?;
    let address = &place.shelf.registry.address;
    let manifest = client(address).repository(&repository);
    let manifest = runtime.block_on(manifest.manifest(&ManifestName::Tag("latest".to_owned())))?;
    let manifest: ImageManifest = serde_json::from_slice(&manifest.context("the image was pushed")?.bytes)?;
    let mut pairs = Pairs::default();
    for _ in 0..rounds {
        let relay = Relay::start(address.parse()?, place.line.network).context("starting the relay")?;
        let name = format!("{}/{repository}:latest", relay.address());
        let our = pulled(place, &name, &manifest.layers, Kind::Soci)?;
        let their = pulled(place, &name, &manifest.layers, Kind::Overlayfs)?;
        pairs.push(our, their);
    }
    let what = format!("pull of {} without index, {}", image.name, place.line.name);
    report.add(format!("{what}: time, in units of overlayfs's"), Goal::AtMost(GOAL), "", pairs.ratios);
    report.add(format!("{what}, soci"), Goal::None, "s", pairs.ours);
    report.add(format!("{what}, overlayfs"), Goal::None, "s", pairs.theirs);
    Ok(())
}

/// Seconds of a pull.
fn pulled(place: &Place<'_>, name: &str, layers: &[Descriptor], kind: Kind) -> anyhow::Result<f64> {
    let machine = Machine::start(kind, place.daemons)?;
    let mut pull = Command::new(place.daemons.containerd.join("pull"));
    pull.arg(machine.path("containerd.sock")).args([kind.name(), name]);
    drop_caches(1)?;
    let start = Instant::now();
    output(&mut pull).with_context(|| format!("{}; its log:\n{}", kind.label(), machine.log()))?;
    let seconds = start.elapsed().as_secs_f64();
    let content = machine.path("root/io.containerd.content.v1.content/blobs/sha256");
    for layer in layers {
        let by_containerd = content.join(layer.digest.hex()).exists();
        anyhow::ensure!(
            by_containerd == (kind == Kind::Overlayfs),
            "{}: layer {} was {}fetched by containerd; its log:\n{}",
            kind.label(),
            layer.digest,
            if by_containerd { "" } else { "not " },
            machine.log()
        );
    }
    Ok(seconds)
}
