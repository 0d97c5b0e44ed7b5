//! `soci status`: what the snapshotter of this machine serves.

use soci_fs::layer::status::LayerStatus;

use crate::args::Status;
use crate::args::config::Config;
use crate::daemon::ask;
use crate::report::output;

/// Runs `status`.
///
/// # Errors
/// When no daemon answers.
pub fn run(arguments: &Status, config: &Config) -> anyhow::Result<()> {
    let status = ask::status(&config.root)?;
    if arguments.json {
        return output::json(&status);
    }
    let rows = status.layers.iter().map(|held| {
        let layer = &held.layer;
        vec![
            held.slot.to_string(),
            layer.digest.clone(),
            format!("{} of {}", output::size(layer.present_bytes), output::size(layer.uncompressed_bytes)),
            output::size(layer.fetched_bytes),
            layer.requests.to_string(),
            format!("{} in {:.2} s", layer.late_reads, layer.waited_seconds),
            layer.failures.to_string(),
            held.tree.name().to_owned(),
            trust(layer).to_owned(),
            held.image.split('@').next().unwrap_or_default().to_owned(),
        ]
    });
    let rows: Vec<Vec<String>> = rows.collect();
    output::table(
        &["SLOT", "LAYER", "HERE", "FETCHED", "REQUESTS", "WAITS", "ERRORS", "TREE", "TRUST", "FROM"],
        &rows,
    )?;
    for held in &status.layers {
        let layer = &held.layer;
        for said in [&layer.condemned, &layer.suspended, &layer.last_error].into_iter().flatten().take(1) {
            output::line(format!("slot {}: {said}", held.slot))?;
        }
    }
    if !status.proves && status.layers.iter().any(|held| trust(&held.layer) == PROVISIONAL) {
        output::line(
            "the background fetch is disabled, so provisional layers are never proven: see [background_fetch]",
        )?;
    }
    let closed = status.slots.saturating_sub(status.layers.len());
    output::line(format!(
        "soci-snapshotter-grpc {} (process {}): {} layers open, {closed} more on first use",
        status.version,
        status.pid,
        status.layers.len(),
    ))
}

/// Trusted as far as the index is.
pub(super) const PROVISIONAL: &str = "provisional";

/// How far a layer is to be trusted, in a word.
pub(super) fn trust(layer: &LayerStatus) -> &'static str {
    match layer {
        LayerStatus { condemned: Some(_), .. } => "condemned",
        LayerStatus { suspended: Some(_), .. } => "suspended",
        LayerStatus { proven: true, .. } => "proven",
        _ => PROVISIONAL,
    }
}
