//! What was measured, as a table for people and as JSON.

use std::fmt::Write as _;

use serde_json::{Value, json};
use soci_cli::bench::series::Spread;

/// By how much a figure may be worse than in an earlier run without a word: measurements are noisy.
const WORSE: f64 = 1.1;

/// What a figure should be.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Goal {
    /// This much or less.
    AtMost(f64),
    /// This much or more.
    AtLeast(f64),
    /// Shown for comparison.
    None,
}

/// A figure that was measured several times.
#[derive(Debug)]
struct Row {
    figure: String,
    goal: Goal,
    unit: &'static str,
    /// In order of size, at least one.
    samples: Vec<f64>,
    spread: Spread,
}

impl Row {
    fn is_met(&self) -> Option<bool> {
        match self.goal {
            Goal::AtMost(most) => Some(self.spread.median <= most),
            Goal::AtLeast(least) => Some(self.spread.median >= least),
            Goal::None => None,
        }
    }

    fn shown(&self, value: f64) -> String {
        let number = if value.abs() >= 100.0 || (value.fract() == 0.0 && value.abs() >= 3.0) {
            format!("{value:.0}")
        } else if value.abs() >= 10.0 {
            format!("{value:.1}")
        } else if value.abs() >= 0.1 || value == 0.0 {
            format!("{value:.2}")
        } else {
            format!("{value:.3}")
        };
        if self.unit.is_empty() { number } else { format!("{number} {}", self.unit) }
    }
}

/// What was measured in turn of ours and of something else; the ratio of neighbouring runs counts.
#[derive(Debug, Default)]
pub(crate) struct Pairs {
    pub(crate) ours: Vec<f64>,
    pub(crate) theirs: Vec<f64>,
    /// Ours in units of theirs.
    pub(crate) ratios: Vec<f64>,
}

impl Pairs {
    /// Adds one of each.
    pub(crate) fn push(&mut self, ours: f64, theirs: f64) {
        self.ours.push(ours);
        self.theirs.push(theirs);
        self.ratios.push(ours / theirs);
    }
}

/// All figures so far.
#[derive(Debug, Default)]
pub(crate) struct Report {
    rows: Vec<Row>,
}

impl Report {
    /// Adds a figure, and prints it on standard error as progress.
    pub(crate) fn add(&mut self, figure: impl Into<String>, goal: Goal, unit: &'static str, mut samples: Vec<f64>) {
        let figure = figure.into();
        if samples.is_empty() {
            return eprintln!("  {figure}: SKIPPED");
        }
        samples.sort_by(f64::total_cmp);
        let spread = Spread::of(samples.iter().copied());
        let row = Row { figure, goal, unit, samples, spread };
        eprintln!("  {}: {}", row.figure, row.shown(row.spread.median));
        self.rows.push(row);
    }

    /// The table: the median decides.
    pub(crate) fn markdown(&self) -> String {
        let mut table =
            "| figure | goal | median | min | max | runs | verdict |\n|---|--:|--:|--:|--:|--:|---|\n".to_owned();
        for row in &self.rows {
            let goal = match row.goal {
                Goal::AtMost(most) => format!("≤ {}", row.shown(most)),
                Goal::AtLeast(least) => format!("≥ {}", row.shown(least)),
                Goal::None => String::new(),
            };
            let verdict = match row.is_met() {
                Some(true) => "met",
                Some(false) => "**missed**",
                None => "",
            };
            let Spread { median, min, max } = row.spread;
            let [median, min, max] = [median, min, max].map(|value| row.shown(value));
            let (figure, runs) = (&row.figure, row.samples.len());
            let _ = writeln!(table, "| {figure} | {goal} | {median} | {min} | {max} | {runs} | {verdict} |");
        }
        table
    }

    /// Ratios that are more than a tenth worse than those of an earlier run, in words: what is measured in seconds
    /// says more of the machine. With `bytes_only` times are left alone, as those of a build that is not made for
    /// speed.
    pub(crate) fn regressions(&self, earlier: &Value, bytes_only: bool) -> Vec<String> {
        let figures = earlier["figures"].as_array().map(Vec::as_slice).unwrap_or_default();
        let worse = |row: &Row| {
            let was = figures.iter().find(|figure| figure["figure"] == row.figure)?["median"].as_f64()?;
            let is = row.spread.median;
            let regressed = row.unit.is_empty()
                && (!bytes_only || row.figure.contains(": bytes"))
                && match row.goal {
                    Goal::AtMost(_) => is > was * WORSE,
                    Goal::AtLeast(_) => is < was / WORSE,
                    Goal::None => false,
                };
            regressed.then(|| format!("{}: {} was {}", row.figure, row.shown(is), row.shown(was)))
        };
        self.rows.iter().filter_map(worse).collect()
    }

    /// The same for programs.
    pub(crate) fn json(&self) -> Value {
        let row = |row: &Row| {
            let goal = match row.goal {
                Goal::AtMost(most) => json!({ "atMost": most }),
                Goal::AtLeast(least) => json!({ "atLeast": least }),
                Goal::None => Value::Null,
            };
            json!({
                "figure": row.figure, "goal": goal, "unit": row.unit,
                "median": row.spread.median, "samples": row.samples, "met": row.is_met(),
            })
        };
        json!({ "machine": machine(), "figures": self.rows.iter().map(row).collect::<Vec<_>>() })
    }
}

/// What this machine is, in one line.
pub(crate) fn machine() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let of = |text: &str, key: &str| -> Option<String> {
        text.lines().find_map(|line| Some(line.strip_prefix(key)?.trim_start_matches([' ', '\t', ':']).to_owned()))
    };
    let processor = of(&read("/proc/cpuinfo"), "model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned());
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let memory = of(&read("/proc/meminfo"), "MemTotal").and_then(|text| text.split(' ').next()?.parse::<u64>().ok());
    let memory = memory.map_or_else(String::new, |kib| format!(", {} GiB", (kib + (1 << 19)) >> 20));
    let kernel = read("/proc/sys/kernel/osrelease");
    format!("{processor}, {cores} cores{memory}, Linux {}", kernel.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_ratios_that_are_much_worse_are_regressions() {
        let mut report = Report::default();
        report.add("much", Goal::AtMost(1.0), "", vec![0.6]);
        report.add("little", Goal::AtMost(1.0), "", vec![0.54]);
        report.add("speed", Goal::AtLeast(1.0), "", vec![0.8]);
        report.add("seconds", Goal::AtMost(1.0), "s", vec![9.0]);
        report.add("new", Goal::AtMost(1.0), "", vec![9.0]);
        let figure = |name: &str, median: f64| json!({ "figure": name, "median": median });
        let figures = [figure("much", 0.5), figure("little", 0.5), figure("speed", 1.0), figure("seconds", 1.0)];
        assert_eq!(
            report.regressions(&json!({ "figures": figures }), false),
            ["much: 0.60 was 0.50", "speed: 0.80 was 1.00"]
        );
        report.add("x: bytes, in units of y's", Goal::AtMost(1.0), "", vec![2.0]);
        let figures = [figure("much", 0.5), figure("x: bytes, in units of y's", 1.0)];
        assert_eq!(
            report.regressions(&json!({ "figures": figures }), true),
            ["x: bytes, in units of y's: 2.00 was 1.00"]
        );
        assert_eq!(report.regressions(&Value::Null, false), [""; 0]);
    }
}
