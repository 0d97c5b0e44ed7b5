//! What publishing and converting say of an index that was made.

use soci_index::publish::{Done, Report, SpanReport};

use crate::commands::create::hidden;

/// The lines about a span index, and about clients that will not find what was pushed.
pub(super) fn span_lines(platform: &str, report: &Report) -> Vec<String> {
    let line = |spans: &SpanReport| format!("{platform}: span index {} {}", spans.index, describe(&spans.done));
    let mut lines: Vec<String> = report.spans.as_ref().map(line).into_iter().collect();
    // What refers to one image in one registry is found, or not, by the same clients.
    let done = std::iter::once(&report.done).chain(report.spans.as_ref().map(|spans| &spans.done));
    let warnings = done.filter_map(|done| match done {
        Done::Published(_, visibility) => Some(visibility.warnings()),
        Done::Hidden { reason } => Some(vec![hidden(reason)]),
        Done::UpToDate | Done::Stored | Done::Nothing => None,
    });
    lines.extend(warnings.take(1).flatten().map(|warning| format!("{platform}: warning: {warning}")));
    lines
}

pub(super) fn describe(done: &Done) -> String {
    match done {
        Done::UpToDate => "is up to date".to_owned(),
        Done::Published(found_by, visibility) if visibility.is_refused() => {
            format!("pushed, listed by {}, but the registry refuses to serve it", crate::commands::found_by(found_by))
        }
        Done::Hidden { .. } => "exists, but the registry refuses to serve it".to_owned(),
        Done::Published(found_by, _) => format!("published, found by {}", crate::commands::found_by(found_by)),
        Done::Stored => "stored".to_owned(),
        Done::Nothing => "built, not pushed (dry run)".to_owned(),
    }
}
