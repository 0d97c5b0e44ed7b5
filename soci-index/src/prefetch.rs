//! Which spans hold the files that somebody wants early.
//!
//! As AWS's tools work it out: wanted paths lose their leading slash, are compared byte for byte with the names in the
//! tar, from the top layer down, and the first layer that has one gives it. A range ends with the span of the byte
//! *after* the file, so a file that ends with its span names one span more than it needs; the artifacts are compared
//! byte for byte with theirs, so this is kept.
//!
//! A start-up profile is translated by [`of_profile`]. It names bytes, so no span is named for the byte after. The ranges
//! of an artifact ascend, as AWS's tools write them: a node fetches all of them before it shows the layer, in whatever
//! order, so the order of the profile would only make more and shorter ranges.

use crate::digest::Digest;
use crate::manifest::Prefetch;
use crate::profile::Profile;
use crate::ztoc::Ztoc;

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Per layer, in the order given, the spans to fetch. Layers without any are left out.
    pub layers: Vec<(Digest, Prefetch)>,
    /// Paths that no layer has.
    pub missing: Vec<String>,
}

/// The spans of one wanted file; `None` when the layer does not have it.
pub type Wanted = Option<(u32, u32)>;

/// Looks for `paths` in one layer; an answer for each.
#[must_use]
pub fn find(ztoc: &Ztoc, paths: &[String]) -> Vec<Wanted> {
    paths.iter().map(|path| range(ztoc, &clean(path))).collect()
}

/// Looks for `paths` in the layers of an image, bottom layer first.
#[must_use]
pub fn plan(layers: &[(Digest, &Ztoc)], paths: &[String]) -> Plan {
    let found: Vec<_> = layers.iter().map(|(layer, ztoc)| (*layer, find(ztoc, paths))).collect();
    choose(&found, paths)
}

/// Chooses the layer that gives each of `paths`, when each layer has been looked through by [`find`].
#[must_use]
pub fn choose(layers: &[(Digest, Vec<Wanted>)], paths: &[String]) -> Plan {
    let mut ranges: Vec<Vec<(u32, u32)>> = vec![Vec::new(); layers.len()];
    let mut missing = Vec::new();
    for (place, path) in paths.iter().enumerate() {
        let in_layer = |(index, (_, found)): (usize, &(Digest, Vec<Wanted>))| {
            let range = found.get(place).copied().flatten()?;
            Some((index, range))
        };
        match layers.iter().enumerate().rev().find_map(in_layer) {
            Some((index, range)) => ranges[index].push(range),
            None => missing.push(path.clone()),
        }
    }
    let wanted = layers.iter().zip(ranges).filter(|(_, ranges)| !ranges.is_empty());
    Plan { layers: wanted.map(|((digest, _), ranges)| (*digest, Prefetch::new(ranges))).collect(), missing }
}

/// The spans of `layer` that hold what `profile` names of it; `None` when it names nothing that the layer has. `ztoc` is
/// the layer's.
#[must_use]
pub fn of_profile(profile: &Profile, layer: &Digest, ztoc: &Ztoc) -> Option<Prefetch> {
    let size = u64::try_from(ztoc.uncompressed_size).unwrap_or_default();
    let last = u32::try_from(ztoc.max_span_id).unwrap_or_default();
    let named = profile.ranges().iter().filter(|range| profile.layers().get(range.layer as usize) == Some(layer));
    // What is beyond the layer's end is nowhere, as for a mount.
    let within = named.map(|range| (range.bytes.start, range.bytes.end.min(size))).filter(|(start, end)| start < end);
    let spans = within.map(|(start, end)| {
        let first = ztoc.span_of(start).min(last);
        // A zTOC that nobody has judged may have checkpoints in disorder.
        (first, ztoc.span_of(end - 1).clamp(first, last))
    });
    let prefetch = Prefetch::new(spans.collect());
    (!prefetch.prefetch_spans.is_empty()).then_some(prefetch)
}

/// The spans of the first entry with this very name.
fn range(ztoc: &Ztoc, name: &[u8]) -> Wanted {
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
