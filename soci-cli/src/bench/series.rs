//! What was measured: starts of one workload in one image by one snapshotter.

use serde::{Deserialize, Serialize};

use crate::bench::waits::Waits;

/// A start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Sample {
    /// Seconds until the image was there.
    pub pull: f64,
    /// Seconds until the container was.
    pub create: f64,
    /// Seconds from the start of its program to its end.
    pub run: f64,
    /// Bytes that came from the registry during the pull.
    pub pull_bytes: u64,
    /// Bytes that came from the registry in all.
    pub bytes: u64,
    /// Reads of the program that waited for them, if the snapshotter says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waits: Option<Waits>,
}

impl Sample {
    /// Seconds in all.
    #[must_use]
    pub fn total(&self) -> f64 {
        self.pull + self.create + self.run
    }
}

/// Starts of the same kind.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Series {
    /// The image, as it was asked for.
    pub image: String,
    /// The snapshotter's name in containerd.
    pub snapshotter: String,
    /// What the workload is called.
    pub workload: String,
    /// Whether the program ran on this machine a moment before; then there is no pull.
    pub warm: bool,
    /// In the order of their making.
    pub samples: Vec<Sample>,
}

/// A number that was measured several times.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    /// The middle one; of an even count the mean of the middle two.
    pub median: f64,
    /// The least.
    pub min: f64,
    /// The largest.
    pub max: f64,
}

impl Spread {
    /// Of some numbers; all is zero when there are none.
    #[must_use]
    pub fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let at = |index: usize| values.get(index).copied().unwrap_or_default();
        let last = values.len().saturating_sub(1);
        Self { median: f64::midpoint(at(last / 2), at(values.len() / 2)), min: at(0), max: at(last) }
    }
}

impl Series {
    /// One of its numbers over all starts.
    #[must_use]
    pub fn spread(&self, of: impl Fn(&Sample) -> f64) -> Spread {
        Spread::of(self.samples.iter().map(of))
    }

    /// For programs.
    #[must_use]
    pub fn json(&self) -> serde_json::Value {
        serde_json::json!({
            "image": self.image, "snapshotter": self.snapshotter, "workload": self.workload, "warm": self.warm,
            "seconds": {
                "pull": self.spread(|sample| sample.pull), "create": self.spread(|sample| sample.create),
                "run": self.spread(|sample| sample.run), "total": self.spread(Sample::total),
            },
            "bytes": self.spread(|sample| sample.bytes as f64),
            "samples": self.samples,
        })
    }

    /// How long reads waited, and how many; `None` when the snapshotter does not say.
    fn waited(&self) -> Option<String> {
        let of = |value: fn(Waits) -> f64| self.spread(|sample| sample.waits.map_or(0.0, value)).median;
        self.samples
            .iter()
            .any(|sample| sample.waits.is_some())
            .then(|| format!("{:.2} s ({:.0})", of(|waits| waits.seconds), of(|waits| waits.reads as f64)))
    }

    /// For display: the cells of [`HEADER`].
    #[must_use]
    pub fn row(&self) -> Vec<String> {
        let seconds = |spread: Spread| format!("{:.2} s", spread.median);
        let total = self.spread(Sample::total);
        let bytes = self.spread(|sample| sample.bytes as f64).median;
        vec![
            self.image.clone(),
            self.workload.clone(),
            format!("{}{}", self.snapshotter, if self.warm { " (warm)" } else { "" }),
            seconds(self.spread(|sample| sample.pull)),
            seconds(self.spread(|sample| sample.create)),
            seconds(self.spread(|sample| sample.run)),
            seconds(total),
            format!("{:.2}-{:.2}", total.min, total.max),
            format!("{:.1} MB", bytes / 1e6),
            self.waited().unwrap_or_default(),
        ]
    }
}

/// What the cells of a row are.
pub const HEADER: [&str; 10] =
    ["IMAGE", "WORKLOAD", "SNAPSHOTTER", "PULL", "CREATE", "RUN", "TOTAL", "MIN-MAX", "NETWORK", "WAITS"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        let of = |values: &[f64]| Spread::of(values.iter().copied());
        assert_eq!(of(&[3.0, 1.0, 2.0]), Spread { median: 2.0, min: 1.0, max: 3.0 });
        assert_eq!(of(&[4.0, 1.0, 2.0, 3.0]), Spread { median: 2.5, min: 1.0, max: 4.0 });
        assert_eq!(of(&[5.0]), Spread { median: 5.0, min: 5.0, max: 5.0 });
        assert_eq!(of(&[]), Spread { median: 0.0, min: 0.0, max: 0.0 });
    }
}
