//! How much of an index the registry sends for one start.
//!
//! The registry's own log is what counts: manifests and the list of them, TOCs and ranges of windows, zTOCs. Each start is
//! one of its own, without a second run, so that nothing but it is in the log.

use soci_tests::answers::Answer;

use super::indexes::Indexes;
use super::machine::Kind;
use super::{Image, Place, Workload};
use crate::report::{Goal, Pairs, Report};

/// Measures ours and AWS's in turn.
pub(crate) fn sent(
    place: &Place<'_>,
    image: &Image,
    workload: Workload,
    indexes: &Indexes,
    rounds: usize,
    report: &mut Report,
) -> anyhow::Result<()> {
    let megabytes = |kind: Kind| -> anyhow::Result<f64> {
        let before = place.shelf.registry.answers().len();
        place.start(image, workload, kind, &[])?;
        let answers: Vec<Answer> = place.shelf.registry.answers().split_off(before);
        let bytes = indexes.bytes_in(&answers);
        anyhow::ensure!(bytes > 0, "{} has read nothing of an index: is its start lazy?", kind.label());
        Ok(bytes as f64 / 1e6)
    };
    let mut pairs = Pairs::default();
    for _ in 0..rounds {
        let (our, their) = (megabytes(Kind::Soci)?, megabytes(Kind::Aws)?);
        pairs.push(our, their);
    }
    let what = format!("index that is sent for a start, {}, `{}`", place.line.name, workload.command);
    report.add(what.clone(), workload.index.map_or(Goal::None, Goal::AtMost), "MB", pairs.ours);
    report.add(format!("{what}, AWS's"), Goal::None, "MB", pairs.theirs);
    report.add(format!("{what}, in units of AWS's"), Goal::None, "", pairs.ratios);
    Ok(())
}
