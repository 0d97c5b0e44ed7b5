//! Pulls by a real containerd: with an index, without one, and by containerd's own snapshotter.

use std::process::Command;
use std::time::Instant;

use anyhow::Context as _;
use soci_cli::bench::run::drop_caches;
use soci_cli::demo::recipe::Recipe;
use soci_cli::demo::stage::{LAYER_BYTES_MIN, Stage};
use soci_tests::containerd::Containerd;
use soci_tests::go;
use soci_tests::node::Node;
use tokio::runtime::Runtime;

use crate::process::{output, soci};
use crate::report::{Goal, Pairs, Report};

const ROUNDS: usize = 5;

/// Time until an image can be run.
pub(crate) fn pull(runtime: &Runtime, report: &mut Report) -> anyhow::Result<()> {
    let Some(programs) = go::programs() else { return Ok(()) };
    let puller = programs.join("pull");
    let scratch = tempfile::Builder::new().prefix("soci-bench-pull-").tempdir()?;
    let recipe = Recipe::of_this_machine()?;
    let (plain, indexed) = (runtime.block_on(Stage::new(&recipe))?, runtime.block_on(Stage::new(&recipe))?);
    let least = LAYER_BYTES_MIN.to_string();
    output(soci(&scratch.path().join("root"))?.args(["publish", &indexed.name, "--min-layer-size", &least]))?;
    let (mut lazy, mut whole) = (Vec::new(), Pairs::default());
    for _ in 0..ROUNDS {
        let pulled = |stage: &Stage, snapshotter: &str| -> anyhow::Result<Option<f64>> {
            // A machine of its own each time: nothing of the image is there.
            let Some(node) = Node::start(Containerd::Installed) else { return Ok(None) };
            drop_caches(1)?;
            let start = Instant::now();
            output(Command::new(&puller).arg(node.path("containerd.sock")).args([snapshotter, &stage.name]))?;
            Ok(Some(start.elapsed().as_secs_f64() * 1000.0))
        };
        let Some(time) = pulled(&indexed, "soci")? else { return Ok(()) };
        lazy.push(time);
        let ours = pulled(&plain, "soci")?.context("it could be started before")?;
        let other = pulled(&plain, "overlayfs")?.context("it could be started before")?;
        whole.push(ours, other);
    }
    let what = format!("pull of an image of {} layers, 2 ms from the registry", recipe.layers.len() + 1);
    report.add(format!("{what}, with index"), Goal::AtMost(250.0), "ms", lazy);
    report.add(
        format!("{what}, without index: time, in units of containerd's overlayfs"),
        Goal::AtMost(0.5),
        "",
        whole.ratios,
    );
    report.add(format!("{what}, without index"), Goal::None, "ms", whole.ours);
    report.add(format!("{what}, by containerd's overlayfs"), Goal::None, "ms", whole.theirs);
    Ok(())
}
