//! `soci bench`: how long images take to start with containerd's snapshotters, cold, and what comes over the network.

use std::collections::BTreeMap;
use std::net::{SocketAddr, ToSocketAddrs as _};
use std::path::Path;
use std::process::Command;

use anyhow::Context as _;
use serde_json::json;
use soci_index::format::reference::{Reference, RegistryReference};

use crate::args::config::Config;
use crate::args::{Bench, Global};
use crate::bench::node::{self, Node};
use crate::bench::picture;
use crate::bench::relay::{Network, Relay};
use crate::bench::run::Start;
use crate::bench::series::{HEADER, Sample, Series};
use crate::commands::image::{self, block_on};
use crate::demo::process;
use crate::report::exit::{Exit, fail};
use crate::report::output;

/// A snapshotter, and the tag that it wants.
#[derive(Debug)]
struct Snapshotter {
    name: String,
    tag: Option<String>,
}

#[derive(Debug)]
struct Workload {
    name: String,
    command: Vec<String>,
}

/// Runs the command.
///
/// # Errors
/// When a start fails, or was not what it would be reported as.
pub fn run(arguments: &Bench, config: &Config, global: &Global) -> anyhow::Result<()> {
    let snapshotters: Vec<Snapshotter> = arguments.snapshotters.iter().map(|text| snapshotter(text)).collect();
    let workloads: Vec<Workload> = arguments.workloads.iter().map(|text| workload(text)).collect::<Result<_, _>>()?;
    let network = Network { round_trip: arguments.sim_rtt, rate: arguments.sim_rate };
    let (socket, namespace) = (global.containerd_socket().to_owned(), global.containerd_namespace().to_owned());
    let node = Node { socket, namespace };
    let mut series = Vec::new();
    for text in &arguments.images {
        let Reference::Registry(name) = image::reference(text)? else {
            return Err(fail(Exit::Usage, format!("{text} is not in a registry")));
        };
        let relay = Relay::start(address(&name, arguments.plain_http)?, network).context("starting the relay")?;
        let job = Job { arguments, config, global, node: &node, relay: &relay, image: &name, text };
        series.extend(job.measure(&snapshotters, &workloads)?);
    }
    let rows: Vec<Vec<String>> = series.iter().map(Series::row).collect();
    let files = arguments.json.iter().chain(&arguments.picture);
    if !files.into_iter().any(|file| soci_index::image::output::is_standard_output(file)) {
        output::table(&HEADER, &rows)?;
    }
    let documents: Vec<serde_json::Value> = series.iter().map(Series::json).collect();
    if let Some(file) = &arguments.json {
        let network = json!({
            "rttMilliseconds": network.round_trip.as_secs_f64() * 1000.0,
            "bitsPerSecond": network.rate.map(|bytes| bytes * 8),
        });
        write(file, format!("{:#}\n", json!({ "network": network, "series": documents })).as_bytes())?;
    }
    if let Some(picture) = &arguments.picture {
        write(picture, picture::draw(&title(network), &series).as_bytes())?;
    }
    Ok(())
}

/// All starts of an image.
struct Job<'a> {
    arguments: &'a Bench,
    config: &'a Config,
    global: &'a Global,
    node: &'a Node,
    relay: &'a Relay,
    image: &'a RegistryReference,
    text: &'a str,
}

impl Job<'_> {
    /// In turn, so that noise hits all.
    fn measure(&self, snapshotters: &[Snapshotter], workloads: &[Workload]) -> anyhow::Result<Vec<Series>> {
        let mut samples: BTreeMap<(usize, usize, bool), Vec<Sample>> = BTreeMap::new();
        for round in 0..self.arguments.repeat {
            for (w, workload) in workloads.iter().enumerate() {
                for (s, snapshotter) in snapshotters.iter().enumerate() {
                    let measured = self
                        .start(snapshotter, workload, round)
                        .with_context(|| format!("{} by {} in {}", workload.name, snapshotter.name, self.text))?;
                    for (sample, warm) in measured.into_iter().zip([false, true]) {
                        samples.entry((w, s, warm)).or_default().push(sample);
                    }
                }
            }
        }
        let series = |((w, s, warm), samples): ((usize, usize, bool), Vec<Sample>)| {
            let (workload, snapshotter) = (workloads.get(w)?, snapshotters.get(s)?);
            let (image, snapshotter) = (self.text.to_owned(), snapshotter.name.clone());
            Some(Series { image, snapshotter, workload: workload.name.clone(), warm, samples })
        };
        Ok(samples.into_iter().filter_map(series).collect())
    }

    fn start(&self, snapshotter: &Snapshotter, workload: &Workload, round: u32) -> anyhow::Result<Vec<Sample>> {
        if let Some(command) = &self.arguments.before_each {
            let mut shell = Command::new("/bin/sh");
            shell.args(["-c", command]).env("SOCI_BENCH_SNAPSHOTTER", &snapshotter.name);
            process::output(&mut shell, node::LIMIT).context("--before-each")?;
        }
        let tag = snapshotter.tag.as_deref().or(self.image.tag());
        let image = match (tag, self.image.digest()) {
            (None, Some(digest)) => format!("{}@{digest}", self.image.repository()),
            (tag, _) => format!("{}:{}", self.image.repository(), tag.unwrap_or("latest")),
        };
        let start = Start {
            node: self.node,
            relay: self.relay,
            snapshotter: &snapshotter.name,
            image: &image,
            command: &workload.command,
            layer_bytes_min: self.arguments.min_layer_size,
            daemon: &self.config.root,
            container: format!("soci-bench-{}-{round}", std::process::id()),
        };
        let samples = block_on(self.global.timeout, start.measure(self.arguments.warm))?;
        if let Some(sample) = samples.first() {
            let (total, bytes) = (sample.total(), output::size(sample.bytes));
            tracing::info!(snapshotter = snapshotter.name, workload = workload.name, "{total:.2} s, {bytes}");
        }
        Ok(samples)
    }
}

fn snapshotter(text: &str) -> Snapshotter {
    match text.split_once(':') {
        Some((name, tag)) => Snapshotter { name: name.to_owned(), tag: Some(tag.to_owned()) },
        None => Snapshotter { name: text.to_owned(), tag: None },
    }
}

fn workload(text: &str) -> anyhow::Result<Workload> {
    let wrong = || fail(Exit::Usage, format!("{text:?} is no workload: expected NAME=COMMAND, in a shell's quotes"));
    let (name, line) = text.split_once('=').ok_or_else(wrong)?;
    let command = shlex::split(line).filter(|words| !words.is_empty()).ok_or_else(wrong)?;
    Ok(Workload { name: name.to_owned(), command })
}

/// Where the registry is. Behind a name of the relay's no certificate would be right, so it must do without.
fn address(image: &RegistryReference, plain_http: bool) -> anyhow::Result<SocketAddr> {
    let host = image.registry();
    let with_port = if host.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok()) {
        host.to_owned()
    } else {
        format!("{host}:80")
    };
    let address = with_port.to_socket_addrs().ok().and_then(|mut found| found.next());
    let address = address.ok_or_else(|| fail(Exit::Registry, format!("{host} cannot be found")))?;
    if !address.ip().is_loopback() && !plain_http {
        return Err(fail(
            Exit::Usage,
            format!(
                "{host} is on another machine: bytes are counted by a relay, which no certificate names. Copy the image to a \
                 registry on this machine, or give --plain-http if {host} speaks HTTP without TLS"
            ),
        ));
    }
    Ok(address)
}

/// What the network was, in words.
#[must_use]
pub fn title(network: Network) -> String {
    let rate = network.rate.map(|bytes| format!(", {} Mbit/s", bytes as f64 * 8.0 / 1e6)).unwrap_or_default();
    format!("Cold starts, {:.0} ms from the registry{rate}", network.round_trip.as_secs_f64() * 1000.0)
}

fn write(file: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    soci_index::image::output::write(file, bytes).with_context(|| format!("writing {}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_the_command_line() {
        let print = workload("print=python3 -c 'print(1 + 1)'").unwrap();
        assert_eq!(
            (print.name.as_str(), print.command.as_slice()),
            ("print", ["python3", "-c", "print(1 + 1)"].map(str::to_owned).as_slice())
        );
        for wrong in ["print", "print=", "print='open"] {
            assert!(workload(wrong).unwrap_err().to_string().contains("NAME=COMMAND"), "{wrong}");
        }
        let stargz = snapshotter("stargz:v1-esgz");
        assert_eq!((stargz.name.as_str(), stargz.tag.as_deref()), ("stargz", Some("v1-esgz")));
        assert_eq!(snapshotter("soci").tag, None);
    }

    #[test]
    fn only_registries_without_tls() {
        let of = |text: &str, plain| address(&text.parse().unwrap(), plain);
        assert_eq!(of("127.0.0.1:5000/a:b", false).unwrap().port(), 5000);
        assert!(of("192.0.2.1/a:b", false).unwrap_err().to_string().contains("--plain-http"));
        assert_eq!(of("192.0.2.1/a:b", true).unwrap().to_string(), "192.0.2.1:80");
    }
}
