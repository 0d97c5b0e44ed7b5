//! Mounts: how long until they are there, how fast they are walked and read, against the same files on the disk.

use std::io::Read as _;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use soci_cli::bench::run::drop_caches;

use crate::data::{Data, Pushed};
use crate::process::{Mount, measured, output, soci};
use crate::report::{Goal, Pairs, Report};

/// Every layer of the image is indexed.
const SMALL: [&str; 2] = ["--min-layer-size", "1000000"];

/// How often files are read that are cached: once is over before the noise of the machine evens out.
const PASSES: usize = 5;

/// Size of one read.
const READ_BYTES: usize = 1 << 20;

/// Publishes the index and mounts once, so that the index is on this machine.
pub(crate) fn prepare(data: &Data, image: &Pushed) -> anyhow::Result<()> {
    output(soci(&data.path("root"))?.args(["publish", &image.name]).args(SMALL))?;
    new_mount(data, image).map(drop)
}

fn new_mount(data: &Data, image: &Pushed) -> anyhow::Result<Mount> {
    Mount::new(&data.path("root"), &image.name, &data.path("mnt"), &SMALL)
}

fn rounds(data: &Data) -> usize {
    if data.quick { 3 } else { 9 }
}

/// Time to mount, memory, and a walk over all files.
pub(crate) fn mount(data: &Data, image: &Pushed, report: &mut Report) -> anyhow::Result<()> {
    let (mut times, mut fresh, mut requests) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..2 * rounds(data) {
        let before = image.registry.traffic().requests;
        let mounted = new_mount(data, image)?;
        requests.push((image.registry.traffic().requests - before) as f64);
        times.push(mounted.time.as_secs_f64() * 1000.0);
        fresh.push(mounted.resident_mib());
    }
    let (mut cold_times, mut walked) = (Vec::new(), Vec::new());
    let mut walks: [Pairs; 3] = Default::default();
    for _ in 0..rounds(data) {
        drop_caches(3)?;
        let mounted = new_mount(data, image)?;
        cold_times.push(mounted.time.as_secs_f64() * 1000.0);
        for (which, cold) in [Some(3), Some(2), None].into_iter().enumerate() {
            let prepared = |at: &Path| -> anyhow::Result<f64> {
                match cold {
                    Some(what) => drop_caches(what)?,
                    // Whatever the walk before left out, this one brings in.
                    None => drop(walk(at)?),
                }
                walk(at)
            };
            let (disk, ours) = (prepared(&data.tree())?, prepared(mounted.at())?);
            walks[which].push(ours * 1000.0, disk * 1000.0);
        }
        walked.push(mounted.peak_mib());
    }
    let count = output(Command::new("find").arg(data.tree()).args(["-type", "f"]))?.lines().count();
    let what = format!("`mount` of {count} files, index here");
    report.add(format!("{what}: time until ready"), Goal::AtMost(150.0), "ms", times);
    report.add("the same, program and index read from the disk", Goal::None, "ms", cold_times);
    report.add("`mount`: requests to the registry", Goal::None, "", requests);
    report.add("`mount`: memory when ready", Goal::AtMost(64.0), "MiB", fresh);
    report.add("`mount`: peak memory after walks", Goal::AtMost(64.0), "MiB", walked);
    let kinds = ["nothing cached", "no names cached, disk blocks cached", "all cached"];
    for (kind, pairs) in kinds.into_iter().zip(walks) {
        let what = format!("walk with `stat` of {count} files, {kind}");
        report.add(format!("{what}: time, in units of ext4's"), Goal::AtMost(1.2), "", pairs.ratios);
        report.add(what, Goal::None, "ms", pairs.ours);
    }
    Ok(())
}

/// Seconds.
fn walk(at: &Path) -> anyhow::Result<f64> {
    let mut command = Command::new("find");
    Ok(measured(command.arg(at).args(["-type", "f", "-printf", "%s\\n"]))?.wall.as_secs_f64())
}

/// Sequential reads of large files that are in the layer store.
pub(crate) fn read(data: &Data, image: &Pushed, report: &mut Report) -> anyhow::Result<()> {
    // Brings everything into the store.
    let bytes = read_all(data, new_mount(data, image)?.at(), 1)?.0;
    let (mut first, mut again) = (Vec::new(), Pairs::default());
    for _ in 0..rounds(data) {
        let mounted = new_mount(data, image)?;
        first.push(rate(read_all(data, mounted.at(), 1)?));
        read_all(data, &data.tree(), 1)?;
        for _ in 0..3 {
            let (disk, ours) =
                (rate(read_all(data, &data.tree(), PASSES)?), rate(read_all(data, mounted.at(), PASSES)?));
            again.push(ours, disk);
        }
    }
    let what = format!("{} MB in {} files, in the store", bytes / 1_000_000, data.large.len());
    report.add(format!("read of {what}, first after mounting"), Goal::AtLeast(1.0), "GB/s", first);
    report.add("read again: speed, in units of ext4's", Goal::AtLeast(0.95), "", again.ratios);
    report.add("read again", Goal::None, "GB/s", again.ours);
    report.add("the same from ext4", Goal::None, "GB/s", again.theirs);
    Ok(())
}

fn rate((bytes, seconds): (u64, f64)) -> f64 {
    bytes as f64 / seconds / 1e9
}

/// Reads all large files below a directory, `passes` times: bytes and seconds.
fn read_all(data: &Data, below: &Path, passes: usize) -> anyhow::Result<(u64, f64)> {
    let mut buffer = vec![0; READ_BYTES];
    let mut sum = 0;
    let start = Instant::now();
    for name in std::iter::repeat_n(&data.large, passes).flatten() {
        let mut file = std::fs::File::open(below.join(name))?;
        loop {
            let length = file.read(&mut buffer)?;
            if length == 0 {
                break;
            }
            sum += length as u64;
        }
    }
    Ok((sum, start.elapsed().as_secs_f64()))
}
