//! Starts with names from the kernel (EROFS), with names from the daemon (FUSE), and on overlayfs, in the same run.

use super::machine::Kind;
use super::*;

/// In the order of their turns.
const KINDS: [Kind; 5] = [Kind::Overlayfs, Kind::Fuse, Kind::Soci, Kind::FusePack, Kind::Pack];

/// Measures starts, cold and warm.
pub(crate) fn names(runtime: &Runtime, options: &Options, report: &mut Report) -> anyhow::Result<()> {
    let Some((daemons, shelf)) = ready()? else { return Ok(()) };
    let near = Place { shelf: &shelf, daemons: &daemons, line: &LINES[0] };
    for (image, workloads) in &jobs(options)? {
        runtime.block_on(shelf.publish(image, &daemons))?;
        for workload in workloads {
            runtime.block_on(shelf.record(image, Kind::Pack, workload.name, workload.command))?;
            let series = near.starts_of(&KINDS, image, *workload, options.rounds())?;
            add(report, *workload, &series);
        }
    }
    Ok(())
}

fn add(report: &mut Report, workload: Workload, series: &[Series]) {
    let values = |kind: Kind, warm, value: fn(&Sample) -> f64| -> Vec<f64> {
        let of = series.iter().filter(|one| one.snapshotter == kind.label() && one.warm == warm);
        of.flat_map(|series| series.samples.iter().map(value)).collect()
    };
    let over = |ours, theirs, warm, value: fn(&Sample) -> f64| -> Vec<f64> {
        values(ours, warm, value).iter().zip(values(theirs, warm, value)).map(|(ours, theirs)| ours / theirs).collect()
    };
    let bytes: fn(&Sample) -> f64 = |sample| sample.bytes as f64 / 1e6;
    let run: fn(&Sample) -> f64 = |sample| sample.run;
    let what = format!("`{}`", workload.command);
    for (kind, goal) in [(Kind::Soci, Goal::AtMost(1.0)), (Kind::Fuse, Goal::None)] {
        let warm = over(kind, Kind::Overlayfs, true, run);
        report.add(format!("{what} again, {}: running, in units of overlayfs's", kind.label()), goal, "", warm);
    }
    for (ours, theirs, goal) in [(Kind::Soci, Kind::Fuse, Goal::None), (Kind::Pack, Kind::FusePack, Goal::AtMost(0.88))]
    {
        let label = ours.label();
        let time = over(ours, theirs, false, Sample::total);
        report.add(format!("{what}, {label}: time, in units of names from the daemon"), goal, "", time);
        let sent = over(ours, theirs, false, bytes);
        report.add(format!("{what}, {label}: bytes, in units of names from the daemon"), Goal::None, "", sent);
    }
    for kind in KINDS {
        report.add(format!("{what}, {}: run", kind.label()), Goal::None, "s", values(kind, false, run));
        report.add(format!("{what} again, {}: run", kind.label()), Goal::None, "s", values(kind, true, run));
        report.add(format!("{what}, {}: bytes", kind.label()), Goal::None, "MB", values(kind, false, bytes));
    }
}
