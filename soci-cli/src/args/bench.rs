//! Arguments of `soci bench`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use soci_index::format::gotime::duration;

/// `soci bench`
#[derive(Debug, Args)]
#[command(after_help = "\
Each start is cold: the image is removed and the kernel's caches are dropped before it. What a snapshotter keeps in spite of
that is removed by the command of --before-each. A start is not reported if layers did not come lazily where they should.
Bytes are counted by a relay before the registry, which speaks HTTP without TLS; --sim-rtt and --sim-rate make it a network.
For the snapshotter whose root is --root it also shows how long reads waited for the network, and how many did.

  soci bench --image localhost:5000/py:v1 --snapshotter overlayfs,soci --workload 'print=python3 -c \"print()\"'
  soci bench --image localhost:5000/py:v1 --snapshotter soci,stargz:v1-esgz --workload 'shell=bash -c true' \\
      --sim-rtt 20ms --sim-rate 100mbit --json starts.json --picture starts.svg")]
pub struct Bench {
    /// An image in a registry without TLS; may be repeated
    #[arg(long = "image", required = true, value_name = "IMAGE")]
    pub images: Vec<String>,
    /// containerd's snapshotters, separated by commas; with :TAG that tag of the image is used, for those that need
    /// images of their own
    #[arg(long = "snapshotter", required = true, value_delimiter = ',', value_name = "NAME[:TAG]")]
    pub snapshotters: Vec<String>,
    /// A program to start, as a shell would read it, and what to call it; may be repeated
    #[arg(long = "workload", required = true, value_name = "NAME=COMMAND")]
    pub workloads: Vec<String>,
    /// How many starts of each kind
    #[arg(long, default_value_t = 5, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub repeat: u32,
    /// Start each program a second time, with all that the first start has brought
    #[arg(long)]
    pub warm: bool,
    /// Run this by a shell before each start, for example to empty a snapshotter's cache
    #[arg(long, value_name = "COMMAND")]
    pub before_each: Option<String>,
    /// Layers below this size may come whole from a lazy snapshotter
    #[arg(long, default_value_t = 10_485_760, value_name = "SIZE", value_parser = crate::args::size::layer, allow_negative_numbers = true)]
    pub min_layer_size: u64,
    /// Simulate so long a way to the registry and back
    #[arg(long, default_value = "0", value_parser = duration, value_name = "TIME")]
    pub sim_rtt: Duration,
    /// Simulate so fast a network, for example 100mbit or 1gbit [default: as fast as it is]
    #[arg(long, value_parser = rate, value_name = "RATE")]
    pub sim_rate: Option<u64>,
    /// Use a registry on another machine without TLS
    #[arg(long)]
    pub plain_http: bool,
    /// Write the figures to this file
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Draw bars of pull, create and run into this file, whose name ends with .svg
    #[arg(long, alias = "svg", value_name = "FILE", value_parser = drawing)]
    pub picture: Option<PathBuf>,
}

/// A file for a picture.
fn drawing(text: &str) -> Result<PathBuf, String> {
    let is_svg = Path::new(text).extension().is_some_and(|extension| extension.eq_ignore_ascii_case("svg"));
    if is_svg { Ok(text.into()) } else { Err(format!("pictures are SVG: {text:?} does not end with .svg")) }
}

/// Bytes per second of a rate in bits: `100mbit`.
fn rate(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is no rate: expected for example 500kbit, 100mbit or 1gbit");
    let text = text.to_ascii_lowercase();
    let units = [("kbit", 1_000), ("mbit", 1_000_000), ("gbit", 1_000_000_000)];
    let (number, unit) =
        units.iter().find_map(|(name, unit)| Some((text.strip_suffix(name)?, unit))).ok_or_else(wrong)?;
    let number: u64 = number.trim().parse().map_err(|_| wrong())?;
    let rate = number.checked_mul(*unit).map(|bits| bits / 8).filter(|rate| *rate > 0);
    rate.ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_pictures() {
        for text in ["a.svg", "a.b/c.SVG"] {
            assert_eq!(drawing(text), Ok(text.into()));
        }
        for wrong in ["", "svg", ".svg", "a.png", "a.svg.gz", "a."] {
            assert!(drawing(wrong).unwrap_err().contains("does not end with .svg"), "{wrong}");
        }
    }

    #[test]
    fn rates() {
        for (text, expected) in
            [("100mbit", Some(12_500_000)), ("1Gbit", Some(125_000_000)), ("8kbit", Some(1000)), ("0mbit", None)]
        {
            assert_eq!(rate(text).ok(), expected, "{text}");
        }
        for wrong in ["", "mbit", "5", "5MB", "-1mbit", "99999999999999gbit"] {
            assert!(rate(wrong).is_err(), "{wrong}");
        }
    }
}
