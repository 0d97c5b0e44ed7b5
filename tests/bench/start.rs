//! A program's start from a mount that has nothing yet: what is fetched, against what must be.

use std::path::Path;

use anyhow::Context as _;
use serde_json::Value;
use soci_cli::bench::run::drop_caches;
use soci_cli::demo::measure::Opened;
use soci_cli::demo::recipe::Recipe;
use soci_cli::demo::stage::{LAYER_BYTES_MIN, Stage};
use soci_fs::layer::reader::Policy;
use soci_fs::layer::store::Store;
use soci_fs::open::OpenOptions;
use soci_index::format::platform::PlatformSelection;
use soci_index::image::ImageSource;
use soci_index::registry::{ClientOptions, CredentialSource};
use tokio::runtime::Runtime;

use crate::process::{Mount, output, soci};
use crate::report::{Goal, Report};

const ROUNDS: usize = 5;

/// Sums over the layers of a mount.
#[derive(Debug, Clone, Copy)]
struct Fetched {
    spans: u64,
    all_spans: u64,
}

/// `python3 -c 'print()'`, or a shell where there is no Python.
pub(crate) fn python(runtime: &Runtime, report: &mut Report) -> anyhow::Result<()> {
    let mut recipe = Recipe::of_this_machine()?;
    if recipe.command[0].contains("python") {
        recipe.command = vec![recipe.command[0].clone(), "-c".to_owned(), "print()".to_owned()];
    }
    let stage = runtime.block_on(Stage::new(&recipe))?;
    let scratch = tempfile::Builder::new().prefix("soci-bench-start-").tempdir()?;
    let least = LAYER_BYTES_MIN.to_string();
    for (name, span_bytes) in [("4 MiB", 4 << 20), ("1 MiB", 1 << 20)] {
        let at = |what: &str| scratch.path().join(format!("{what}-{span_bytes}"));
        let size = u64::to_string(&span_bytes);
        let arguments = ["publish", &stage.name, "--span-size", &size, "--min-layer-size", &least, "--json"];
        let published: Value = serde_json::from_str(&output(soci(&at("root"))?.args(arguments))?)?;
        let index =
            published["images"][0]["index"]["digest"].as_str().context("`publish --json` names the index")?.to_owned();
        let (least_spans, least_bytes, index_bytes) =
            runtime.block_on(touched(&stage, &recipe, &index, &at("touched")))?;
        let (mut bytes, mut requests, mut spans, mut times) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for round in 0..ROUNDS {
            drop_caches(2)?;
            let before = stage.registry.traffic();
            let arguments = ["--min-layer-size", &least, "--index", &index];
            let mounted = Mount::new(&at(&format!("root{round}")), &stage.name, &at("mnt"), &arguments)?;
            let ran = soci_cli::demo::measure::run(mounted.at(), &recipe.command)?;
            anyhow::ensure!(ran.status.success(), "{:?}: {}", recipe.command, ran.written());
            let fetched = status(mounted.at())?;
            let after = stage.registry.traffic();
            bytes.push((after.bytes_sent - before.bytes_sent) as f64 / 1e6);
            requests.push((after.requests - before.requests) as f64);
            spans.push(fetched.spans as f64);
            times.push((mounted.time + ran.time).as_secs_f64() * 1000.0);
            if round == 0 {
                eprintln!("  {} of {} spans", fetched.spans, fetched.all_spans);
            }
        }
        let what = format!("`{}` from a cold mount, spans of {name}", shown(&recipe));
        report.add(format!("{what}: spans fetched"), Goal::AtMost(least_spans as f64), "", spans);
        let limit = least_bytes as f64 / 1e6;
        report.add(format!("{what}: bytes, index included"), Goal::AtMost(limit), "MB", bytes);
        report.add(format!("{what}: bytes of the index"), Goal::None, "MB", vec![index_bytes as f64 / 1e6]);
        report.add(format!("{what}: requests"), Goal::None, "", requests);
        report.add(format!("{what}: mounting and running, 2 ms from the registry"), Goal::None, "ms", times);
    }
    Ok(())
}

fn shown(recipe: &Recipe) -> String {
    let program = Path::new(&recipe.command[0]).file_name().unwrap_or_default().to_string_lossy();
    format!("{program} {}", recipe.command[1..].join(" "))
}

fn sum(status: &Value, key: &str) -> u64 {
    status["layers"].as_array().into_iter().flatten().filter_map(|layer| layer[key].as_u64()).sum()
}

fn fetched(status: &Value) -> Fetched {
    Fetched { spans: sum(status, "present_spans"), all_spans: sum(status, "spans") }
}

fn status(at: &Path) -> anyhow::Result<Fetched> {
    Ok(fetched(&serde_json::from_slice(&std::fs::read(at.join(".soci/status.json"))?)?))
}

/// What the program touches: spans, bytes in all, and bytes of the index among them, when nothing is read ahead.
async fn touched(stage: &Stage, recipe: &Recipe, index: &str, at: &Path) -> anyhow::Result<(u64, u64, u64)> {
    let options = ClientOptions { credentials: CredentialSource::Anonymous, ..ClientOptions::default() };
    let before = stage.registry.traffic().bytes_sent;
    let source = ImageSource::open(&stage.name.parse()?, &options).await?;
    let image = source.resolve(&PlatformSelection::Host).await?.pop().context("the image has a platform")?;
    let open = OpenOptions {
        layer_bytes_min: LAYER_BYTES_MIN,
        policy: Policy { ahead_bytes_max: 0, ..Policy::default() },
        index: Some(index.parse()?),
        index_store: Some(at.join("index")),
        parallel: 4,
        ..OpenOptions::default()
    };
    let (mountpoint, store) = (at.join("mnt"), std::sync::Arc::new(Store::open(&at.join("store"))?));
    std::fs::create_dir_all(&mountpoint)?;
    let opened = Opened::new(&source, &image, &store, &open, Some(&mountpoint)).await?;
    let command = recipe.command.clone();
    let ran = tokio::task::spawn_blocking(move || soci_cli::demo::measure::run(&mountpoint, &command)).await??;
    anyhow::ensure!(ran.status.success(), "{:?}: {}", recipe.command, ran.written());
    let spans = fetched(&serde_json::to_value(opened.image.status())?).spans;
    let bytes = stage.registry.traffic().bytes_sent - before;
    let index_bytes = opened.index_bytes;
    tokio::task::spawn_blocking(move || opened.close()).await??;
    Ok((spans, bytes, index_bytes))
}
