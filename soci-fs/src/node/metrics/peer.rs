//! Figures under the names of AWS's snapshotter, beyond those that `metrics.rs` has: docs/METRICS.md says of each what
//! it means here.

use std::fmt::Write as _;
use std::sync::atomic::Ordering;

use crate::fuse::counts::{Counters, MICROSECONDS, NAMES, Operation, Times};
use crate::layer::status::LayerStatus;
use crate::node::metrics::Metrics;

/// Open layers: slot, directory, state.
type Layers<'a> = &'a [(u16, String, LayerStatus)];

/// Times in milliseconds besides that of mounting.
pub(super) fn times(metrics: &Metrics, text: &mut String) {
    metrics.background.write(text, "background_fetch");
    metrics.stages.write(text);
}

/// Counts, in the family of operations.
pub(super) fn counts(metrics: &Metrics, text: &mut String, layers: Layers<'_>, counters: &Counters) {
    let name = "soci_fs_operation_count";
    let mut of_layers = |operation: &str, count: &dyn Fn(u16) -> u64| {
        for (slot, _, layer) in layers {
            let labels = format!("layer=\"{}\",operation_type=\"{operation}\"", layer.digest);
            let _ = writeln!(text, "{name}{{{labels}}} {}", count(*slot));
        }
    };
    of_layers("synchronous_read_count", &|slot| {
        counters.get(slot).map_or(0, |counts| counts.asked()[Operation::Read as usize])
    });
    for (operation, _, failures) in NAMES {
        if let Some(failures) = failures {
            of_layers(failures, &|slot| counters.get(slot).map_or(0, |counts| counts.failed()[operation as usize]));
        }
    }
    let read = |number: &std::sync::atomic::AtomicU64| number.load(Ordering::Relaxed);
    for (operation, count) in [
        ("fuse_failure_state", counters.states()),
        // Every question that can fail has a name of its own.
        ("fuse_unknown_operation_failure_count", 0),
        ("fuse_mount_failure_count", read(&metrics.lazy_failures) + read(&metrics.stages.fallbacks)),
        ("local_mount_failure_count", read(&metrics.whole_failures)),
        ("resolve_cache_hit", read(&metrics.ready)),
        ("resolve_cache_miss", read(&metrics.unready)),
        // Neither queue has an end.
        ("background_fetch_work_queue_evicted", 0),
        ("preresolve_queue_drop", 0),
    ] {
        let _ = writeln!(text, "{name}{{layer=\"\",operation_type=\"{operation}\"}} {count}");
    }
}

/// Families that have nothing else.
pub(super) fn own_families(metrics: &Metrics, text: &mut String, layers: Layers<'_>, counters: &Counters) {
    let name = "soci_fs_operation_duration_microseconds";
    let _ = write!(text, "# HELP {name} How long operations took.\n# TYPE {name} histogram\n");
    for (slot, _, layer) in layers {
        let Some(counts) = counters.get(*slot) else { continue };
        for (operation, times) in [("synchronous_read", &counts.reads), ("node_readdir", &counts.listings)] {
            short_times(text, operation, &layer.digest, times);
        }
    }
    let name = "soci_fs_bytes_served";
    let _ = write!(text, "# HELP {name} Bytes that reads were answered with.\n# TYPE {name} gauge\n");
    for (slot, _, layer) in layers {
        let bytes = counters.get(*slot).map_or(0, crate::fuse::counts::Counts::bytes);
        let labels = format!("layer=\"{}\",operation_type=\"synchronous_bytes_served\"", layer.digest);
        let _ = writeln!(text, "{name}{{{labels}}} {bytes}");
    }
    let name = "soci_fs_image_operation_count_key";
    let _ = write!(text, "# HELP {name} Operations of an image's first minute.\n# TYPE {name} gauge\n");
    let waiting = layers.iter().filter(|(_, _, layer)| layer.present_spans < layer.spans).count();
    let _ = writeln!(text, "{name}{{image=\"\",operation_type=\"background_fetch_work_queue_size\"}} {waiting}");
    for (image, counts) in metrics.images.lock().iter() {
        for (operation, count) in counts {
            let _ = writeln!(text, "{name}{{image=\"{image}\",operation_type=\"{operation}\"}} {count}");
        }
    }
}

fn short_times(text: &mut String, operation: &str, layer: &str, times: &Times) {
    let name = "soci_fs_operation_duration_microseconds";
    let labels = format!("layer=\"{layer}\",operation_type=\"{operation}\"");
    let (buckets, count, sum) = times.read();
    for (bucket, bound) in buckets.iter().zip(MICROSECONDS) {
        let _ = writeln!(text, "{name}_bucket{{{labels},le=\"{bound}\"}} {bucket}");
    }
    let _ = writeln!(text, "{name}_bucket{{{labels},le=\"+Inf\"}} {count}");
    let _ = writeln!(text, "{name}_sum{{{labels}}} {sum}\n{name}_count{{{labels}}} {count}");
}
