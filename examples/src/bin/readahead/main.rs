//! Replays start-ups against policies of reading ahead and prints how each does: `readahead LOG...`.
//!
//! A log is made of a profile and the layers of its image: `readahead --log-of PROFILE LAYER.tar.gz... > LOG`. See
//! `log.rs` for what a log is, `network.rs` for what is simulated.

use std::path::Path;
use std::time::Duration;

use anyhow::Context;

use crate::log::Log;
use crate::network::{Network, Outcome, replay};
use crate::policies::{Near, Nothing, Policy, Streams};

mod log;
mod network;
mod policies;

/// A rack, a region, and two far places, one behind a thin line.
const NETWORKS: [(&str, Network); 4] = [
    ("0.3 ms, 10 Gbit/s", Network { round_trip: Duration::from_micros(300), rate: 1_250_000_000 }),
    ("2 ms, 1 Gbit/s", Network { round_trip: Duration::from_millis(2), rate: 125_000_000 }),
    ("20 ms, 1 Gbit/s", Network { round_trip: Duration::from_millis(20), rate: 125_000_000 }),
    ("20 ms, 100 Mbit/s", Network { round_trip: Duration::from_millis(20), rate: 12_500_000 }),
];

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.as_slice() {
        [] => anyhow::bail!("usage: readahead LOG... | readahead --log-of PROFILE LAYER.tar.gz..."),
        [flag, profile, layers @ ..] if flag == "--log-of" => {
            print!("{}", Log::of_profile(Path::new(profile), layers)?.text());
        }
        logs => {
            println!("| log | line | policy | hits | over-fetch | requests | stalled |\n|---|---|---|--:|--:|--:|--:|");
            for name in logs {
                let text = std::fs::read_to_string(name).with_context(|| format!("reading {name}"))?;
                table(name, &Log::parse(&text).with_context(|| format!("reading {name}"))?);
            }
        }
    }
    Ok(())
}

fn table(name: &str, log: &Log) {
    let name = Path::new(name).file_stem().unwrap_or_default().to_string_lossy();
    for (line, network) in NETWORKS {
        for (policy, outcome) in outcomes(log, network) {
            let Outcome { read_spans, hits, read_bytes, unread_bytes, requests, stalled, .. } = outcome;
            let percent = |part: f64, whole: f64| 100.0 * part / whole.max(1.0);
            println!(
                "| {name} | {line} | {policy} | {:.0} % | {:.0} % | {requests} | {:.0} ms |",
                percent(hits.into(), read_spans.into()),
                percent(unread_bytes as f64, read_bytes as f64),
                stalled.as_secs_f64() * 1000.0,
            );
        }
    }
}

/// How each policy does.
fn outcomes(log: &Log, network: Network) -> [(&'static str, Outcome); 3] {
    let run = |mut policy: Box<dyn Policy>| replay(log, network, policy.as_mut());
    [
        ("none", run(Box::new(Nothing))),
        ("streams", run(Box::new(Streams::new(log)))),
        ("near", run(Box::new(Near::new(log, network.round_trip, network.rate)))),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGS: [(&str, &str); 4] = [
        ("print", include_str!("../../../logs/print.log")),
        ("modules", include_str!("../../../logs/modules.log")),
        ("scipy", include_str!("../../../logs/scipy.log")),
        ("cppyy", include_str!("../../../logs/cppyy.log")),
    ];

    /// On recorded start-ups the product's policy waits for less time than the others, and what it fetches for nothing
    /// keeps its bound.
    #[test]
    fn recorded_start_ups() {
        for (name, text) in LOGS {
            let log = Log::parse(text).unwrap();
            for (line, network) in NETWORKS {
                let [(_, none), (_, streams), (_, near)] = outcomes(&log, network);
                let case = format!("{name}, {line}: {none:?} {streams:?} {near:?}");
                assert_eq!((none.hits, none.unread_spans, none.read_spans), (0, 0, near.read_spans), "{case}");
                assert!(near.stalled.as_secs_f64() <= 0.75 * streams.stalled.as_secs_f64(), "{case}");
                assert!(near.requests <= streams.requests, "{case}");
                // Layers have a credit each, of 384 KiB.
                let credit = log.layers.iter().map(|spans| {
                    let bytes: u64 = spans.iter().map(|span| span.0).sum();
                    u32::try_from((384 << 10) / (bytes / spans.len() as u64)).unwrap()
                });
                assert!(near.unread_spans <= near.read_spans / 3 + credit.sum::<u32>(), "{case}");
            }
        }
    }

    #[test]
    fn logs_are_text_and_back() {
        for (name, text) in LOGS {
            let log = Log::parse(text).unwrap();
            assert_eq!(Log::parse(&log.text()).unwrap(), log, "{name}");
        }
        let bad = ["what", "read 0 0 1 0 1", "layer 1:2\nread 0 1 2 0 1", "layer 1:2\nread 0 0 1 0", "layer 1"];
        for text in bad {
            assert!(Log::parse(text).is_err(), "{text}");
        }
    }
}
