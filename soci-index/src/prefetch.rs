//! Which spans hold the files that somebody wants early.
//!
//! As AWS's tools work it out: wanted paths lose their leading slash, are compared byte for byte with the names in the
//! tar, from the top layer down, and the first layer that has one gives it. A range ends with the span of the byte
//! *after* the file, so a file that ends with its span names one span more than it needs; the artifacts are compared
//! byte for byte with theirs, so this is kept.

use crate::digest::Digest;
use crate::manifest::Prefetch;
use crate::ztoc::Ztoc;

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Per layer, in the order given, the spans to fetch. Layers without any are left out.
    pub layers: Vec<(Digest, Prefetch)>,
    /// Paths that no layer has.
    pub missing: Vec<String>,
}

/// Looks for `paths` in the layers of an image, bottom layer first.
#[must_use]
pub fn plan(layers: &[(Digest, &Ztoc)], paths: &[String]) -> Plan {
    let mut ranges: Vec<Vec<(u32, u32)>> = vec![Vec::new(); layers.len()];
    let mut missing = Vec::new();
    for path in paths {
        let wanted = clean(path);
        let found = layers.iter().enumerate().rev().find_map(|(index, (_, ztoc))| Some((index, range(ztoc, &wanted)?)));
        match found {
            Some((index, range)) => ranges[index].push(range),
            None => missing.push(path.clone()),
        }
    }
    let wanted = layers.iter().zip(ranges).filter(|(_, ranges)| !ranges.is_empty());
    Plan { layers: wanted.map(|((digest, _), ranges)| (*digest, Prefetch::new(ranges))).collect(), missing }
}

/// The spans of the first entry with this very name.
fn range(ztoc: &Ztoc, name: &[u8]) -> Option<(u32, u32)> {
    let entry = ztoc.entries.iter().find(|entry| *entry.name == *name)?;
    // For a plain tar the byte after the last file may lie in a span that does not exist.
    let last = u32::try_from(ztoc.max_span_id).unwrap_or_default();
    Some((ztoc.span_of(entry.data_offset).min(last), ztoc.span_of(entry.data_offset + entry.size).min(last)))
}

/// The path without `.`, `..`, doubled and leading slashes, as Go's `path.Clean` of the absolute path gives it.
fn clean(path: &str) -> Vec<u8> {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    parts.join("/").into_bytes()
}
