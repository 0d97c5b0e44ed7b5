//! The benchmarks: the figures that the project promises, measured on this machine.
//!
//! `cargo build --release -p soci-cli && cargo run --release -p soci-tests --bin bench -- [--quick] [--json FILE]
//! [--compare FILE] [--pictures DIRECTORY] [--rounds N] [--ml] [--cppyy] [--only WORKLOAD] [NAMES]` with names out of
//! `ztoc`,
//! `publish`, `mount`, `read`, `start`, `pull`, `prepare`, `proof`, `warm`, `memory`, `cached`; `stage` only makes the image and waits,
//! for looking into things by hand. The data are made from this machine's own files, in a directory that goes at the
//! end; nothing is fetched from a network. Only `cold`, which must be asked for, starts images of Debian's and Python's
//! packages, which it fetches once; `names` only compares names from the kernel with names from the daemon, `whole` only pulls all of them, without an index and with one, and `index` only
//! looks at their indexes. `--ml` and `--cppyy` add the images with tensorflow and with cppyy, `--only` keeps those
//! workloads that it names. Where a goal is a ratio, both sides run in turn, several times, and the ratio of
//! neighbouring runs counts: machines are noisy, and noise hits both.

mod cold;
mod data;
mod files;
mod indexing;
mod node;
mod process;
mod proof;
mod pull;
mod report;
mod start;

use std::io::Write as _;
use std::path::PathBuf;

use anyhow::{Context as _, bail};

use data::Data;
use report::{Report, machine};

const NAMES: [&str; 11] =
    ["ztoc", "publish", "mount", "read", "start", "pull", "prepare", "proof", "warm", "memory", "cached"];

/// Those that work on the large data.
const ON_DATA: [&str; 4] = ["ztoc", "publish", "mount", "read"];

/// What was asked for.
#[derive(Debug, Default)]
struct Wanted {
    names: Vec<String>,
    quick: bool,
    json: Option<PathBuf>,
    compare: Option<PathBuf>,
    cold: cold::Options,
}

impl Wanted {
    fn of(mut arguments: impl Iterator<Item = String>) -> anyhow::Result<Self> {
        let mut wanted = Self::default();
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--quick" => wanted.quick = true,
                "--json" => wanted.json = Some(arguments.next().context("--json needs a file name")?.into()),
                "--compare" => wanted.compare = Some(arguments.next().context("--compare needs a file name")?.into()),
                "--pictures" => {
                    wanted.cold.pictures = Some(arguments.next().context("--pictures needs a directory")?.into());
                }
                "--rounds" => {
                    let rounds = arguments.next().and_then(|text| text.parse().ok()).filter(|rounds| *rounds > 0);
                    wanted.cold.rounds = Some(rounds.context("--rounds needs a number above 0")?);
                }
                "--ml" => wanted.cold.ml = true,
                "--cppyy" => wanted.cold.cppyy = true,
                "--only" => wanted.cold.only.push(arguments.next().context("--only needs the name of a workload")?),
                name if NAMES.contains(&name) => wanted.names.push(argument),
                "stage" | "cold" | "names" | "whole" | "index" => wanted.names.push(argument),
                other => bail!(
                    "{other:?} is none of --quick, --json FILE, --compare FILE, --pictures DIRECTORY, --rounds N, --ml, --cppyy, --only WORKLOAD, cold, names, whole, index, {}",
                    NAMES.join(", ")
                ),
            }
        }
        wanted.cold.quick = wanted.quick;
        if wanted.names.is_empty() {
            wanted.names = NAMES.map(str::to_owned).to_vec();
        }
        Ok(wanted)
    }

    fn is(&self, name: &str) -> bool {
        self.names.iter().any(|wanted| wanted == name)
    }
}

fn main() -> anyhow::Result<()> {
    let wanted = Wanted::of(std::env::args().skip(1))?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    // A mount's process outlives an interrupted benchmark unless it is ended here.
    runtime.spawn(async {
        if tokio::signal::ctrl_c().await.is_ok() {
            let cleaned = tokio::task::spawn_blocking(process::end_mounts).await;
            std::process::exit(if cleaned.is_ok() { 130 } else { 131 });
        }
    });
    let result = measure(&wanted, &runtime);
    process::end_mounts();
    let report = result?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}\n\n{}", machine(), report.markdown())?;
    if let Some(file) = &wanted.compare {
        let text = std::fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
        for regression in report.regressions(&serde_json::from_str(&text)?, cfg!(debug_assertions)) {
            writeln!(out, "REGRESSION: {regression}")?;
        }
    }
    if let Some(file) = &wanted.json {
        std::fs::write(file, format!("{:#}\n", report.json()))
            .with_context(|| format!("writing {}", file.display()))?;
    }
    Ok(())
}

fn measure(wanted: &Wanted, runtime: &tokio::runtime::Runtime) -> anyhow::Result<Report> {
    process::soci_path()?;
    let mut report = Report::default();
    if wanted.is("stage") {
        let data = Data::new(wanted.quick)?;
        let image = runtime.block_on(data.push())?;
        eprintln!("{} in {}; interrupt to end", image.name, data.path("").display());
        loop {
            std::thread::park();
        }
    }
    if wanted.names.iter().any(|name| ON_DATA.contains(&name.as_str())) {
        let data = Data::new(wanted.quick)?;
        if wanted.is("ztoc") {
            indexing::ztoc(&data, &mut report)?;
        }
        if ["publish", "mount", "read"].iter().any(|name| wanted.is(name)) {
            let image = runtime.block_on(data.push())?;
            if wanted.is("publish") {
                indexing::publish(&data, &image, &mut report)?;
            }
            if soci_tests::mounting::can_mount() {
                files::prepare(&data, &image)?;
                if wanted.is("mount") {
                    files::mount(&data, &image, &mut report)?;
                }
                if wanted.is("read") {
                    files::read(&data, &image, &mut report)?;
                }
            }
        }
    }
    if wanted.is("start") && soci_tests::mounting::can_mount() {
        start::python(runtime, &mut report)?;
    }
    if wanted.is("pull") && soci_tests::mounting::can_mount() {
        pull::pull(runtime, &mut report)?;
    }
    if wanted.is("cold") && soci_tests::mounting::can_mount() {
        cold::cold(runtime, &wanted.cold, &mut report)?;
    }
    if wanted.is("names") && soci_tests::mounting::can_mount() {
        cold::names(runtime, &wanted.cold, &mut report)?;
    }
    if wanted.is("whole") && soci_tests::mounting::can_mount() {
        cold::pulls(runtime, &wanted.cold, &mut report)?;
    }
    if wanted.is("index") && soci_tests::mounting::can_mount() {
        cold::index(runtime, &wanted.cold, &mut report)?;
    }
    if wanted.is("prepare") {
        node::prepare(runtime, &mut report)?;
    }
    if wanted.is("proof") {
        proof::proof(runtime, &mut report)?;
    }
    if wanted.is("warm") && soci_tests::mounting::can_mount() {
        node::warm(runtime, &mut report)?;
    }
    if wanted.is("memory") && soci_tests::mounting::can_mount() {
        node::memory(runtime, &mut report)?;
    }
    if wanted.is("cached") && soci_tests::mounting::can_mount() {
        node::cached(runtime, &mut report)?;
    }
    Ok(report)
}
