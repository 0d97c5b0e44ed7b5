//! What a daemon has done, as Prometheus text.
//!
//! Names and labels are those of AWS's snapshotter where it has the same figure, so that dashboards go on working; its
//! counters lack the suffix `_total`, which is why no metrics library writes the text: they all add it. Figures of ours
//! follow the usual rules. What AWS exports as gauges that only grow is exported with its right type.
//!
//! Counters of layers live as long as the layer is open, so a sum over layers can fall; per layer it cannot.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::layer::status::LayerStatus;

mod peer;

use crate::fuse::counts::Counters;
use crate::layer::stages::{Histogram, Stages};

/// A figure of a layer.
type Figure = fn(&LayerStatus) -> u64;

/// A figure of a layer that may be of any kind.
type Number = fn(&LayerStatus) -> f64;

/// Figures of a layer that AWS does not have: name, type, description.
const OURS: [(&str, &str, &str, Number); 9] = [
    ("soci_layer_ahead_spans", "gauge", "Spans that were fetched ahead of reads.", |layer| layer.ahead_spans.into()),
    ("soci_layer_unread_ahead_spans", "gauge", "Of these, the ones that were not read yet.", |layer| {
        layer.unread_ahead_spans.into()
    }),
    ("soci_layer_late_reads_total", "counter", "Reads that had to wait for the network.", |layer| {
        layer.late_reads as f64
    }),
    ("soci_layer_waited_seconds_total", "counter", "How long these waited, together.", |layer| layer.waited_seconds),
    ("soci_layer_present_bytes", "gauge", "Uncompressed bytes of the layer that are on this node.", |layer| {
        layer.present_bytes as f64
    }),
    ("soci_layer_uncompressed_bytes", "gauge", "Uncompressed size of the layer.", |layer| {
        layer.uncompressed_bytes as f64
    }),
    ("soci_layer_proven", "gauge", "Whether the layer was proven against the image's own digest.", |layer| {
        u8::from(layer.proven).into()
    }),
    ("soci_layer_condemned", "gauge", "Whether the layer was found wrong and is out of service.", |layer| {
        u8::from(layer.condemned.is_some()).into()
    }),
    ("soci_layer_suspended", "gauge", "Whether the layer is out of service until it is proven.", |layer| {
        u8::from(layer.suspended.is_some()).into()
    }),
];

/// Counters of a daemon, as far as they are not kept by its layers.
#[derive(Debug, Default)]
pub struct Metrics {
    /// How long it took to provide layers.
    pub mount: Histogram,
    /// Layers provided.
    pub provided: AtomicU64,
    /// Layers left to containerd.
    pub left: AtomicU64,
    /// Spans fetched in the background.
    pub background_spans: AtomicU64,
    /// Such fetches that failed.
    pub background_failures: AtomicU64,
    /// Claims whose proof found them wrong.
    pub condemned: AtomicU64,
    /// How long fetches in the background took.
    pub background: Histogram,
    /// Layers that are meant to be read lazily and were left to containerd because of an error.
    pub lazy_failures: AtomicU64,
    /// Layers that should have come whole and did not.
    pub whole_failures: AtomicU64,
    /// Layers that were open, or being opened, when containerd asked for them.
    pub ready: AtomicU64,
    /// Layers whose opening began when containerd asked for them.
    pub unready: AtomicU64,
    /// How long the steps of opening layers took.
    pub stages: Arc<Stages>,
    /// How often each operation was asked of an image, when its time had come.
    pub images: Mutex<BTreeMap<String, Vec<(&'static str, u64)>>>,
}

impl Metrics {
    /// The text, with the state of all open layers: slot, directory that shows the layer, state.
    #[must_use]
    pub fn text(&self, layers: &[(u16, String, LayerStatus)], counters: &Counters) -> String {
        let mut text = String::new();
        self.own(&mut text, layers.len());
        peer::own_families(self, &mut text, layers, counters);
        let figures: [(&str, &str, &str, &str, Figure); 4] = [
            (
                "soci_fs_operation_count",
                "counter",
                "synchronous_read_remote_registry_fetch_count",
                "Operations.",
                |layer| layer.requests,
            ),
            ("soci_fs_operation_count", "counter", "fuse_file_read_failure_count", "Operations.", |layer| {
                layer.failures
            }),
            ("soci_fs_layer_size_bytes", "gauge", "", "Compressed size of the layer.", |layer| layer.compressed_bytes),
            (
                "soci_fs_layer_fetched_size_bytes",
                "gauge",
                "",
                "Compressed bytes of the layer fetched by this process.",
                |layer| layer.fetched_bytes,
            ),
        ];
        let mut before = "";
        for (name, kind, operation, help, figure) in figures {
            if name != before {
                let _ = write!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
                before = name;
            }
            for (_, directory, layer) in layers {
                let labels = if operation.is_empty() {
                    format!("digest=\"{}\",mountpoint=\"{}\"", layer.digest, escaped(directory))
                } else {
                    format!("layer=\"{}\",operation_type=\"{operation}\"", layer.digest)
                };
                let _ = writeln!(text, "{name}{{{labels}}} {}", figure(layer));
            }
            if operation == "fuse_file_read_failure_count" {
                self.background(&mut text, name);
                peer::counts(self, &mut text, layers, counters);
            }
        }
        for (name, kind, help, figure) in OURS {
            let _ = write!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
            for (slot, _, layer) in layers {
                let _ = writeln!(text, "{name}{{digest=\"{}\",slot=\"{slot}\"}} {}", layer.digest, figure(layer));
            }
        }
        text
    }

    /// The last of its family, which is of no single layer.
    fn background(&self, text: &mut String, name: &str) {
        for (operation, count) in [
            ("background_span_fetch_count", &self.background_spans),
            ("background_span_fetch_failure_count", &self.background_failures),
        ] {
            let count = count.load(Ordering::Relaxed);
            let _ = writeln!(text, "{name}{{layer=\"\",operation_type=\"{operation}\"}} {count}");
        }
    }

    fn own(&self, text: &mut String, open: usize) {
        let name = "soci_fs_operation_duration_milliseconds";
        let _ = write!(text, "# HELP {name} How long operations took.\n# TYPE {name} histogram\n");
        self.mount.write(text, "mount");
        peer::times(self, text);
        let name = "soci_layers_prepared_total";
        let _ = write!(text, "# HELP {name} Layers that containerd asked for.\n# TYPE {name} counter\n");
        let _ = writeln!(text, "{name}{{outcome=\"provided\"}} {}", self.provided.load(Ordering::Relaxed));
        let _ = writeln!(text, "{name}{{outcome=\"left\"}} {}", self.left.load(Ordering::Relaxed));
        let name = "soci_claims_condemned_total";
        let condemned = self.condemned.load(Ordering::Relaxed);
        let _ = write!(
            text,
            "# HELP {name} Layers whose proof found them wrong.\n# TYPE {name} counter\n{name} {condemned}\n"
        );
        let name = "soci_layers_open";
        let _ = write!(text, "# HELP {name} Layers that are open.\n# TYPE {name} gauge\n{name} {open}\n");
    }
}

/// A label's value: the format escapes three characters.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn layer(requests: u64) -> LayerStatus {
        LayerStatus {
            digest: "sha256:00".to_owned(),
            compressed_bytes: 10,
            uncompressed_bytes: 30,
            present_bytes: 20,
            spans: 3,
            present_spans: 2,
            fetched_bytes: 7,
            ahead_spans: 2,
            unread_ahead_spans: 1,
            requests,
            late_reads: 4,
            waited_seconds: 1.25,
            failures: 1,
            proven: false,
            condemned: None,
            suspended: None,
            origins: Vec::new(),
            last_error: None,
        }
    }

    #[test]
    fn names_are_those_of_dashboards() {
        let metrics = Metrics::default();
        metrics.mount.record(Duration::from_micros(2500));
        metrics.mount.record(Duration::from_secs(60));
        metrics.left.store(1, Ordering::Relaxed);
        let counters = Counters::default();
        counters.asked(3, crate::fuse::counts::Operation::Read);
        let text = metrics.text(&[(3, "/a \"b\"".to_owned(), layer(5))], &counters);
        for line in [
            "soci_fs_operation_duration_milliseconds_bucket{layer=\"\",operation_type=\"mount\",le=\"2\"} 0",
            "soci_fs_operation_duration_milliseconds_bucket{layer=\"\",operation_type=\"mount\",le=\"4\"} 1",
            "soci_fs_operation_duration_milliseconds_bucket{layer=\"\",operation_type=\"mount\",le=\"+Inf\"} 2",
            "soci_fs_operation_duration_milliseconds_sum{layer=\"\",operation_type=\"mount\"} 60002.5",
            "soci_fs_operation_count{layer=\"sha256:00\",operation_type=\"synchronous_read_remote_registry_fetch_count\"} 5",
            "soci_fs_layer_fetched_size_bytes{digest=\"sha256:00\",mountpoint=\"/a \\\"b\\\"\"} 7",
            "soci_layers_prepared_total{outcome=\"left\"} 1",
            "soci_layer_late_reads_total{digest=\"sha256:00\",slot=\"3\"} 4",
            "soci_layer_waited_seconds_total{digest=\"sha256:00\",slot=\"3\"} 1.25",
            "soci_layer_present_bytes{digest=\"sha256:00\",slot=\"3\"} 20",
            "soci_layers_open 1",
            "soci_fs_operation_count{layer=\"sha256:00\",operation_type=\"synchronous_read_count\"} 1",
            "soci_fs_operation_count{layer=\"\",operation_type=\"background_fetch_work_queue_evicted\"} 0",
            "soci_fs_bytes_served{layer=\"sha256:00\",operation_type=\"synchronous_bytes_served\"} 0",
            "soci_fs_image_operation_count_key{image=\"\",operation_type=\"background_fetch_work_queue_size\"} 1",
            "soci_fs_operation_count{layer=\"\",operation_type=\"background_span_fetch_count\"} 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
    }

    /// The format wants each name described once, with its samples together.
    #[test]
    fn families_are_whole() {
        let metrics = Metrics::default();
        metrics.images.lock().insert("sha256:01".to_owned(), vec![("node.Lookup", 4)]);
        let layers = [(1, "/1".to_owned(), layer(1)), (2, "/2".to_owned(), layer(2))];
        let text = metrics.text(&layers, &Counters::default());
        let mut seen = std::collections::BTreeSet::new();
        let mut family = "";
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                family = rest.split(' ').next().unwrap();
                assert!(seen.insert(family), "{family} is described twice");
            } else if !line.starts_with('#') {
                assert!(line.starts_with(family), "{line} stands below {family}");
                line.rsplit(' ').next().unwrap().parse::<f64>().unwrap();
            }
        }
    }
}
