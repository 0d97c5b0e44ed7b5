//! What `soci pull` uses of the line and of the cores while it fetches and proves an image that has an index.
//!
//! The slower of network and cores should decide, so the larger of the two shares is what has a goal. The whole machine's
//! processor time counts: registry and relay run on the same cores, and what they take, the pull cannot have.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use soci_cli::bench::relay::{Network, Relay};
use soci_cli::bench::run::drop_caches;

use super::images::Image;
use super::machine::Kind;
use super::{LINES, Place, Shelf};
use crate::process::{output, soci};
use crate::report::{Goal, Report};

/// Beside the lines of the cold starts.
const NO_LIMIT: (&str, Network) = ("no limit", Network { round_trip: Duration::ZERO, rate: None });

/// Goal for the larger of the two shares.
const GOAL: f64 = 0.9;

/// One pull.
#[derive(Debug)]
struct Pulled {
    seconds: f64,
    /// Bytes from the registry, in units of what the line could have brought; 0 where it is no limit.
    line: f64,
    /// Busy processor time of the machine, in units of all there was.
    processors: f64,
}

/// Measures each line.
pub(crate) fn fetched(place: &Place<'_>, image: &Image, rounds: usize, report: &mut Report) -> anyhow::Result<()> {
    for (name, network) in LINES.map(|line| (line.name, line.network)).into_iter().chain([NO_LIMIT]) {
        let pulls: Vec<Pulled> =
            (0..rounds).map(|_| pulled(place.shelf, image, network)).collect::<anyhow::Result<_>>()?;
        let values = |value: fn(&Pulled) -> f64| pulls.iter().map(value).collect::<Vec<_>>();
        let what = format!("`soci pull` of {}, {name}", image.name);
        let larger = values(|pull| pull.line.max(pull.processors));
        report.add(format!("{what}: the larger share in use, of line and processors"), Goal::AtLeast(GOAL), "", larger);
        if network.rate.is_some() {
            report.add(format!("{what}: share of the line"), Goal::None, "", values(|pull| pull.line));
        }
        report.add(format!("{what}: share of the processors"), Goal::None, "", values(|pull| pull.processors));
        report.add(what, Goal::None, "s", values(|pull| pull.seconds));
    }
    Ok(())
}

/// One pull into an empty store.
fn pulled(shelf: &Shelf, image: &Image, network: Network) -> anyhow::Result<Pulled> {
    let relay = Relay::start(shelf.registry.address.parse()?, network).context("starting the relay")?;
    let name = format!("{}/cold/{}:{}", relay.address(), image.name, Kind::Soci.tag());
    let root = tempfile::Builder::new().prefix("soci-bench-fetch-").tempdir()?;
    drop_caches(1)?;
    let (start, before) = (Instant::now(), Ticks::now()?);
    output(soci(root.path())?.args(["pull", &name]))?;
    let (seconds, after) = (start.elapsed().as_secs_f64(), Ticks::now()?);
    let could = network.rate.map(|rate| rate as f64 * seconds);
    Ok(Pulled {
        seconds,
        line: could.map_or(0.0, |could| relay.bytes_down() as f64 / could),
        processors: after.busy_since(&before),
    })
}

/// Processor time of the whole machine since its start, in the kernel's ticks.
#[derive(Debug)]
struct Ticks {
    busy: u64,
    all: u64,
}

impl Ticks {
    fn now() -> anyhow::Result<Self> {
        let text = std::fs::read_to_string("/proc/stat").context("reading /proc/stat")?;
        let line =
            text.lines().next().and_then(|line| line.strip_prefix("cpu ")).context("/proc/stat begins with cpu")?;
        // user, nice, system, idle, waiting for a disk, interrupts of both kinds, taken by the host
        let ticks: Vec<u64> = line.split_whitespace().take(8).map(str::parse).collect::<Result<_, _>>()?;
        let all = ticks.iter().sum();
        let idle = ticks.iter().skip(3).take(2).sum::<u64>();
        Ok(Self { busy: all - idle, all })
    }

    /// Share of the processors' time that was used between `before` and this.
    fn busy_since(&self, before: &Self) -> f64 {
        (self.busy - before.busy) as f64 / (self.all - before.all).max(1) as f64
    }
}
