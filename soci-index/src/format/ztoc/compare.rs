//! In what two zTOCs of one layer differ: the first difference, described for display.
//!
//! Compared is what a runtime would act on: every file's facts, every span's place, digest and window. How the same
//! facts are written (the tool's name, a time zone, the older checkpoint layout) is not; for that, compare the bytes.

use std::fmt;

use crate::format::checkpoint::Checkpoint;
use crate::format::entry::{Entry, Timestamp};
use crate::format::ztoc::{Spans, Ztoc};

/// The first difference between a zTOC and what the layer says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Difference {
    /// A number of the whole.
    Number {
        what: &'static str,
        /// By the layer.
        expected: i64,
        /// By the zTOC.
        found: i64,
    },
    /// A fact about a file.
    Entry {
        /// Its place in the tar, from 0.
        position: usize,
        /// Its name by the layer.
        name: String,
        /// Which fact.
        field: &'static str,
        /// By the layer.
        expected: String,
        /// By the zTOC.
        found: String,
    },
    /// A file that the zTOC leaves out, or makes up.
    EntryCount {
        /// By the layer.
        expected: usize,
        /// By the zTOC.
        found: usize,
        /// The first one that only one of them has.
        name: String,
    },
    /// Something about a span.
    Span {
        /// Which, from 0.
        span: usize,
        /// What: its place, its digest, its window.
        what: &'static str,
    },
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number { what, expected, found } => write!(f, "{what} is {found}, the layer says {expected}"),
            Self::Entry { position, name, field, expected, found } => {
                write!(f, "entry {position} ({name}): {field} is {found}, the layer says {expected}")
            }
            Self::EntryCount { expected, found, name } => {
                write!(f, "{found} entries, the layer has {expected}; the first that only one has is {name}")
            }
            Self::Span { span, what } => write!(f, "span {span}: {what} is not the layer's"),
        }
    }
}

/// The first difference of `found` from `expected`; `None` when both say the same.
#[must_use]
pub(crate) fn first_difference(expected: &Ztoc, found: &Ztoc) -> Option<Difference> {
    numbers(expected, found).or_else(|| entries(&expected.entries, &found.entries)).or_else(|| spans(expected, found))
}

fn numbers(expected: &Ztoc, found: &Ztoc) -> Option<Difference> {
    [
        ("the size of the layer", expected.compressed_size, found.compressed_size),
        ("the size of the uncompressed layer", expected.uncompressed_size, found.uncompressed_size),
        ("the last span", i64::from(expected.max_span_id), i64::from(found.max_span_id)),
        ("the span size", expected.span_bytes(), found.span_bytes()),
    ]
    .into_iter()
    .find(|(_, expected, found)| expected != found)
    .map(|(what, expected, found)| Difference::Number { what, expected, found })
}

fn entries(expected: &[Entry], found: &[Entry]) -> Option<Difference> {
    let differing = expected.iter().zip(found).enumerate().find_map(|(position, (expected, found))| {
        let (field, theirs, ours) = entry(expected, found)?;
        let name = text(&expected.name);
        Some(Difference::Entry { position, name, field, expected: theirs, found: ours })
    });
    if differing.is_some() || expected.len() == found.len() {
        return differing;
    }
    let longer = if expected.len() > found.len() { expected } else { found };
    let name = longer.get(expected.len().min(found.len())).map(|entry| text(&entry.name)).unwrap_or_default();
    Some(Difference::EntryCount { expected: expected.len(), found: found.len(), name })
}

/// The first field in which two entries differ, and both values.
fn entry(expected: &Entry, found: &Entry) -> Option<(&'static str, String, String)> {
    let number = |entry: &Entry| {
        let (major, minor) = entry.device();
        [
            ("its offset", i128::from(entry.data_offset)),
            ("its size", i128::from(entry.size)),
            ("its mode", i128::from(entry.mode)),
            ("its owner", i128::from(entry.uid)),
            ("its group", i128::from(entry.gid)),
            ("its device", i128::from(major)),
            ("its device", i128::from(minor)),
        ]
    };
    let texts = |entry: &Entry| {
        [
            ("its name", text(&entry.name)),
            ("its type", crate::format::ztoc::kind_name(entry.kind).to_owned()),
            ("its link", text(&entry.link)),
            ("its owner's name", text(&entry.user_name)),
            ("its group's name", text(&entry.group_name)),
            ("its time", time(entry.modified)),
        ]
    };
    for ((field, ours), (_, theirs)) in texts(expected).into_iter().zip(texts(found)) {
        if ours != theirs {
            return Some((field, ours, theirs));
        }
    }
    for ((field, ours), (_, theirs)) in number(expected).into_iter().zip(number(found)) {
        if ours != theirs {
            return Some((field, ours.to_string(), theirs.to_string()));
        }
    }
    if expected.pax() == found.pax() {
        return None;
    }
    let records = |entry: &Entry| entry.pax().iter().map(|record| text(&record.key)).collect::<Vec<_>>().join(" ");
    Some(("its extended attributes", records(expected), records(found)))
}

fn spans(expected: &Ztoc, found: &Ztoc) -> Option<Difference> {
    let wrong_digest = expected.digests.iter().zip(&found.digests).position(|(expected, found)| expected != found);
    let wrong_digest = wrong_digest.map(|span| Difference::Span { span, what: "its digest" });
    match (&expected.spans, &found.spans) {
        (Spans::Gzip { checkpoints: expected, .. }, Spans::Gzip { checkpoints: found, .. }) => {
            let each = |(span, (expected, found))| checkpoint(span, expected, found);
            expected.iter().zip(found).enumerate().find_map(each)
        }
        (Spans::Plain { size: expected, .. }, Spans::Plain { size: found, .. }) => (expected != found)
            .then_some(Difference::Number { what: "the size of the layer", expected: *expected, found: *found }),
        _ => Some(Difference::Span { span: 0, what: "its compression" }),
    }
    .or(wrong_digest)
}

fn checkpoint(span: usize, expected: &Checkpoint, found: &Checkpoint) -> Option<Difference> {
    let place = |checkpoint: &Checkpoint| (checkpoint.compressed, checkpoint.uncompressed, checkpoint.bits);
    let what = if place(expected) != place(found) {
        "its place"
    } else if expected.window.load() != found.window.load() {
        "its window"
    } else {
        return None;
    };
    Some(Difference::Span { span, what })
}

fn time(time: Option<Timestamp>) -> String {
    time.map_or_else(|| "none".to_owned(), crate::format::ztoc::rfc3339::format)
}

fn text(bytes: &[u8]) -> String {
    bytes.escape_ascii().to_string()
}
