//! Cold starts: ours, containerd's overlayfs, and the daemons of AWS and stargz, all by `soci bench` in the same run.
//!
//! Each start has a machine of its own (`machine`), so nothing of the one before is there: neither containerd's content
//! nor what a daemon keeps. The images (`images`) are made of Debian's and Python's packages, once. Each daemon has
//! what its makers publish for it: AWS's a SOCI-enabled image (version 2, its default), stargz's an eStargz copy, ours
//! the index beside the plain image. None fetches in the background, so that bytes do not depend on time.
//!
//! Beside the starts: how much of an index a start has read (`sent`), how much the registry keeps of it (`indexes`),
//! how long an image without an index takes to be here (`whole`), and what fetching all of one that has an index makes
//! of line and cores (`fetched`).

mod fetched;
mod images;
mod indexes;
mod machine;
mod names;
mod sent;
mod whole;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::Context as _;
use serde_json::Value;
use soci_cli::bench::picture;
use soci_cli::bench::relay::Network;
use soci_cli::bench::series::{Sample, Series};
use soci_cli::bench::waits::Waits;
use soci_tests::go;
use tokio::runtime::Runtime;

use crate::process::{output, soci_path};
use crate::report::{Goal, Report};
use images::{Image, Shelf};
use indexes::Indexes;
use machine::{Kind, Machine, Programs};
pub(crate) use names::names;

/// What was asked for.
#[derive(Debug, Default)]
pub(crate) struct Options {
    /// One round of one workload, on the nearer network.
    pub(crate) quick: bool,
    /// The large image, too.
    pub(crate) ml: bool,
    /// The image with a C++ interpreter, too.
    pub(crate) cppyy: bool,
    /// Names of the only workloads that are measured, if not all.
    pub(crate) only: Vec<String>,
    /// How many starts of each kind, if not as many as usual.
    pub(crate) rounds: Option<usize>,
    /// Where pictures go.
    pub(crate) pictures: Option<PathBuf>,
}

const ROUNDS: usize = 5;

impl Options {
    fn rounds(&self) -> usize {
        self.rounds.unwrap_or(if self.quick { 1 } else { ROUNDS })
    }
}

/// What is between node and registry.
#[derive(Debug)]
struct Line {
    name: &'static str,
    /// The rate in names of files.
    short: &'static str,
    network: Network,
}

impl Line {
    const fn new(name: &'static str, short: &'static str, milliseconds: u64, bits_per_second: u64) -> Self {
        let network = Network { round_trip: Duration::from_millis(milliseconds), rate: Some(bits_per_second / 8) };
        Self { name, short, network }
    }
}

const LINES: [Line; 2] = [
    Line::new("1 Gbit/s, 2 ms", "1gbit", 2, 1_000_000_000),
    Line::new("100 Mbit/s, 20 ms", "100mbit", 20, 100_000_000),
];

/// What is started in an image.
#[derive(Debug, Clone, Copy)]
struct Workload {
    name: &'static str,
    command: &'static str,
    /// Goals: seconds in units of stargz's and of AWS's, bytes in units of stargz's.
    goals: Option<[f64; 3]>,
    /// Goals for seconds with a profile, and with a pack on the farther network, in units of the better of the two
    /// peers'.
    prepared: Option<[f64; 2]>,
    /// Goal for the megabytes of the index that a start reads.
    index: Option<f64>,
}

const SHELL: Workload = Workload { name: "shell", command: "bash -c true", goals: None, prepared: None, index: None };
const PRINT: Workload = Workload {
    name: "print",
    command: "python3 -c 'print()'",
    goals: Some([0.75, 0.5, 0.75]),
    prepared: Some([0.5, 0.5]),
    index: None,
};
const SCIPY: Workload = Workload {
    name: "scipy",
    command: "python3 -c 'import numpy, scipy.stats'",
    goals: Some([0.5, 0.5, 0.95]),
    prepared: Some([0.3, 0.35]),
    index: None,
};
const CPPYY: Workload = Workload {
    name: "cppyy",
    command: "python3 -c 'import cppyy'",
    goals: Some([0.5, 0.5, 0.95]),
    prepared: Some([0.3, 0.35]),
    index: None,
};
const TENSORFLOW: Workload = Workload {
    name: "tensorflow",
    command: "python3 -c 'import tensorflow'",
    goals: Some([0.5, 0.5, 0.95]),
    prepared: Some([0.3, 0.25]),
    index: Some(1.2),
};

/// The programs, and a place for the images; `None`, with a word on standard error, where something is lacking.
fn ready() -> anyhow::Result<Option<(Programs, Shelf)>> {
    let (Some(containerd), Some(aws), Some(stargz)) = (go::programs(), go::aws(), go::stargz()) else {
        return Ok(None);
    };
    Ok(Shelf::open()?.map(|shelf| (Programs { containerd, aws, stargz }, shelf)))
}

/// The images, each with what is started in it.
fn jobs(options: &Options) -> anyhow::Result<Vec<(Image, Vec<Workload>)>> {
    let py = if options.quick { vec![PRINT] } else { vec![SHELL, PRINT] };
    let mut jobs = vec![(Image { name: "py", layers: &["base", "python"] }, py)];
    if !options.quick {
        jobs.push((Image { name: "hep", layers: &["base", "python", "hep"] }, vec![SCIPY]));
    }
    if options.cppyy {
        jobs.push((Image { name: "cppyy", layers: &["base", "python", "hep", "cppyy"] }, vec![CPPYY]));
    }
    if options.ml {
        jobs.push((Image { name: "ml", layers: &["base", "python", "ml"] }, vec![TENSORFLOW]));
    }
    for name in &options.only {
        let known = jobs.iter().flat_map(|(_, workloads)| workloads).any(|workload| workload.name == name);
        anyhow::ensure!(known, "--only {name}: no image has that workload; --ml and --cppyy add images");
    }
    let is_wanted =
        |workload: &Workload| options.only.is_empty() || options.only.iter().any(|name| name == workload.name);
    for (_, workloads) in &mut jobs {
        workloads.retain(is_wanted);
    }
    jobs.retain(|(_, workloads)| !workloads.is_empty());
    Ok(jobs)
}

/// Measures starts, and what belongs to them.
pub(crate) fn cold(runtime: &Runtime, options: &Options, report: &mut Report) -> anyhow::Result<()> {
    let Some((daemons, shelf)) = ready()? else { return Ok(()) };
    let jobs = jobs(options)?;
    for (image, _) in &jobs {
        runtime.block_on(shelf.publish(image, &daemons))?;
    }
    for (image, workloads) in &jobs {
        for workload in workloads {
            for kind in [Kind::Profile, Kind::Pack] {
                runtime.block_on(shelf.record(image, kind, workload.name, workload.command))?;
            }
        }
    }
    let lines = if options.quick { &LINES[..1] } else { &LINES[..] };
    for line in lines {
        let place = Place { shelf: &shelf, daemons: &daemons, line };
        let mut all = Vec::new();
        for (image, workloads) in &jobs {
            for workload in workloads {
                let series = place.starts(image, *workload, options.rounds())?;
                add(report, line, *workload, &series);
                all.extend(series);
            }
        }
        if let Some(directory) = &options.pictures {
            let file = directory.join(format!("cold-{}.svg", line.short));
            let title = format!("From nothing to the end of the program, {}", line.name);
            let picture = picture::draw(&title, &all);
            std::fs::write(&file, picture).with_context(|| format!("writing {}", file.display()))?;
        }
    }
    // Where the network is no matter, or the nearer one is what was asked about.
    let near = Place { shelf: &shelf, daemons: &daemons, line: &LINES[0] };
    for (image, workloads) in &jobs {
        near.indexes(runtime, image, workloads, options.rounds(), report)?;
        whole::whole(runtime, &near, image, options.rounds(), report)?;
        fetched::fetched(&near, image, options.rounds(), report)?;
    }
    Ok(())
}

/// Measures pulls of all of an image, and nothing else.
pub(crate) fn pulls(runtime: &Runtime, options: &Options, report: &mut Report) -> anyhow::Result<()> {
    let Some((daemons, shelf)) = ready()? else { return Ok(()) };
    let near = Place { shelf: &shelf, daemons: &daemons, line: &LINES[0] };
    for (image, _) in &jobs(options)? {
        runtime.block_on(shelf.publish(image, &daemons))?;
        whole::whole(runtime, &near, image, options.rounds(), report)?;
        fetched::fetched(&near, image, options.rounds(), report)?;
    }
    Ok(())
}

/// Measures what a start reads of an index, what the registry keeps of it, and nothing else.
pub(crate) fn index(runtime: &Runtime, options: &Options, report: &mut Report) -> anyhow::Result<()> {
    let Some((daemons, shelf)) = ready()? else { return Ok(()) };
    let near = Place { shelf: &shelf, daemons: &daemons, line: &LINES[0] };
    for (image, workloads) in &jobs(options)? {
        runtime.block_on(shelf.publish(image, &daemons))?;
        near.indexes(runtime, image, workloads, options.rounds(), report)?;
    }
    Ok(())
}

/// What all starts in one network share.
#[derive(Debug, Clone, Copy)]
struct Place<'a> {
    shelf: &'a Shelf,
    daemons: &'a Programs,
    line: &'a Line,
}

impl Place<'_> {
    /// Starts by all snapshotters in turn: cold ones, and the warm ones after them.
    fn starts(&self, image: &Image, workload: Workload, rounds: usize) -> anyhow::Result<Vec<Series>> {
        self.starts_of(&Kind::ALL, image, workload, rounds)
    }

    /// The same by some of them.
    fn starts_of(
        &self,
        kinds: &[Kind],
        image: &Image,
        workload: Workload,
        rounds: usize,
    ) -> anyhow::Result<Vec<Series>> {
        let mut found: BTreeMap<(bool, usize), Series> = BTreeMap::new();
        for round in 0..rounds {
            for (position, kind) in kinds.iter().copied().enumerate() {
                for mut one in self.start(image, workload, kind, &["--warm"])? {
                    let samples = std::mem::take(&mut one.samples);
                    found.entry((one.warm, position)).or_insert(one).samples.extend(samples);
                }
            }
            eprintln!("  {}, {}: round {} of {rounds}", self.line.name, workload.name, round + 1);
        }
        Ok(found.into_values().collect())
    }

    /// The indexes of an image: what is kept of them, and what is sent for starts.
    fn indexes(
        &self,
        runtime: &Runtime,
        image: &Image,
        workloads: &[Workload],
        rounds: usize,
        report: &mut Report,
    ) -> anyhow::Result<()> {
        let indexes = runtime.block_on(Indexes::of(self.shelf, image))?;
        indexes.add_storage(image, report);
        for workload in workloads {
            sent::sent(self, image, *workload, &indexes, rounds, report)?;
        }
        Ok(())
    }

    /// One start on a machine of its own, which is gone when this is over.
    fn start(&self, image: &Image, workload: Workload, kind: Kind, more: &[&str]) -> anyhow::Result<Vec<Series>> {
        let machine = Machine::start(kind, self.daemons)?;
        let (file, name) = (machine.path("starts.json"), self.shelf.name_for(image, kind, workload.name));
        let mut command = Command::new(soci_path()?);
        command.env_remove("SOCI_LOG").env("PATH", self.daemons.search_path()?);
        command.arg("--root").arg(machine.path("daemon")).arg("--address").arg(machine.path("containerd.sock"));
        command.args(["bench", "--image", &name, "--snapshotter", kind.name()]);
        command.args(["--workload", &format!("{}={}", workload.name, workload.command), "--repeat", "1"]).args(more);
        command.args(["--sim-rtt", &format!("{}ms", self.line.network.round_trip.as_millis())]);
        command.args(["--sim-rate", self.line.short]).arg("--json").arg(&file);
        output(&mut command).with_context(|| format!("{}; its log:\n{}", kind.name(), machine.log()))?;
        let document: Value = serde_json::from_slice(&std::fs::read(&file)?)?;
        let series = document["series"].as_array().into_iter().flatten();
        let named = series.map(|one| {
            let one: Series = serde_json::from_value(one.clone())?;
            Ok(Series { image: image.name.to_owned(), snapshotter: kind.label().to_owned(), ..one })
        });
        let named: Vec<Series> = named.collect::<anyhow::Result<_>>()?;
        let is_reported = named.iter().flat_map(|one| &one.samples).all(|sample| sample.waits.is_some());
        anyhow::ensure!(
            is_reported || kind.name() != Kind::Soci.name(),
            "the daemon did not say how long reads waited"
        );
        Ok(named)
    }
}

fn add(report: &mut Report, line: &Line, workload: Workload, series: &[Series]) {
    let of = |kind: Kind, warm: bool| series.iter().find(|one| one.snapshotter == kind.label() && one.warm == warm);
    let values = |kind, warm, value: fn(&Sample) -> f64| -> Vec<f64> {
        of(kind, warm).into_iter().flat_map(|series| series.samples.iter().map(value)).collect()
    };
    let over = |ours, kind, warm, value: fn(&Sample) -> f64| -> Vec<f64> {
        values(ours, warm, value).iter().zip(values(kind, warm, value)).map(|(ours, theirs)| ours / theirs).collect()
    };
    let ratios = |kind, warm, value| over(Kind::Soci, kind, warm, value);
    let bytes: fn(&Sample) -> f64 = |sample| sample.bytes as f64 / 1e6;
    let run: fn(&Sample) -> f64 = |sample| sample.run;
    let what = format!("cold start, {}, `{}`", line.name, workload.command);
    let at_most = |index: usize| workload.goals.map_or(Goal::None, |goals| Goal::AtMost(goals[index]));
    report.add(
        format!("{what}: time, in units of stargz's"),
        at_most(0),
        "",
        ratios(Kind::Stargz, false, Sample::total),
    );
    report.add(format!("{what}: time, in units of AWS's"), at_most(1), "", ratios(Kind::Aws, false, Sample::total));
    let whole = ratios(Kind::Overlayfs, false, Sample::total);
    report.add(format!("{what}: time, in units of overlayfs's"), Goal::None, "", whole);
    report.add(format!("{what}: bytes, in units of stargz's"), at_most(2), "", ratios(Kind::Stargz, false, bytes));
    for (ours, goal) in [(Kind::Profile, 0), (Kind::Pack, 1)] {
        let peers = [Kind::Stargz, Kind::Aws].map(|theirs| over(ours, theirs, false, Sample::total));
        // Over the quicker of the two: the larger ratio.
        let time = peers[0].iter().zip(&peers[1]).map(|(one, other)| one.max(*other)).collect();
        let goal = workload.prepared.map_or(Goal::None, |goals| Goal::AtMost(goals[goal]));
        report.add(format!("{what}, {}: time, in units of the better peer's", ours.label()), goal, "", time);
    }
    let warm = ratios(Kind::Overlayfs, true, run);
    report.add(format!("{what}, again: running, in units of overlayfs's"), Goal::AtMost(1.03), "", warm);
    for kind in Kind::ALL {
        let name = kind.label();
        for (phase, value) in
            [("pull", (|sample| sample.pull) as fn(&Sample) -> f64), ("create", |sample| sample.create), ("run", run)]
        {
            report.add(format!("{what}, {name}: {phase}"), Goal::None, "s", values(kind, false, value));
        }
        report.add(format!("{what}, {name}: bytes"), Goal::None, "MB", values(kind, false, bytes));
        if kind.name() == Kind::Soci.name() {
            let waits = |value: fn(Waits) -> f64| {
                let samples = of(kind, false).into_iter().flat_map(|series| &series.samples);
                samples.filter_map(|sample| sample.waits.map(value)).collect::<Vec<_>>()
            };
            report.add(
                format!("{what}, {name}: reads that waited"),
                Goal::None,
                "reads",
                waits(|waits| waits.reads as f64),
            );
            report.add(format!("{what}, {name}: their waiting"), Goal::None, "s", waits(|waits| waits.seconds));
        }
    }
}
