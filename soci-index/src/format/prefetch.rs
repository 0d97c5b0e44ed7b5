//! Which spans hold the files of a prefetch list.
//!
//! As AWS's tools work it out: wanted paths lose their leading slash, are compared byte for byte with the names in the
//! tar, from the top layer down, and the first layer that has one gives it. A range ends with the span of the byte
//! *after* the file, so a file that ends with its span names one span more than it needs; the artifacts are compared
//! byte for byte with theirs, so this is kept.
//!
//! A start-up profile is translated by `of_profile`. It names bytes, so no span is named for the byte after. The
//! ranges of an artifact ascend, as AWS's tools write them: a node fetches all of them before it shows the layer, in
//! whatever order, so the order of the profile would only make more and shorter ranges.

use crate::format::digest::Digest;
use crate::format::manifest::Prefetch;
use crate::format::profile::Profile;
use crate::format::ztoc::Ztoc;

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Per layer, in the order given, the spans to fetch. Layers without any are left out.
    pub layers: Vec<(Digest, Prefetch)>,
    /// Paths that no layer has.
    pub missing: Vec<String>,
}

/// The spans of one wanted file; `None` when the layer does not have it.
pub(crate) type Wanted = Option<(u32, u32)>;

/// Looks for `paths` in one layer; an answer for each.
#[must_use]
pub(crate) fn find(ztoc: &Ztoc, paths: &[String]) -> Vec<Wanted> {
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
pub(crate) fn choose(layers: &[(Digest, Vec<Wanted>)], paths: &[String]) -> Plan {
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

/// The spans of `layer` that hold what `profile` names of it; `None` when it names nothing that the layer has. `ztoc`
/// is the layer's.
#[must_use]
pub(crate) fn of_profile(profile: &Profile, layer: &Digest, ztoc: &Ztoc) -> Option<Prefetch> {
    let size = u64::try_from(ztoc.uncompressed_size).unwrap_or_default();
    let last = u32::try_from(ztoc.max_span_id).unwrap_or_default();
    let named = profile.ranges().iter().filter(|range| profile.layers().get(range.layer as usize) == Some(layer));
    // What is beyond the layer's end is nowhere, as for a mount.
    let within = named.map(|range| (range.bytes.start, range.bytes.end.min(size))).filter(|(start, end)| start < end);
    let spans = within.map(|(start, end)| {
        let first = ztoc.span_of(start).min(last);
        // The checkpoints of an unverified zTOC may be out of order.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::checkpoint::{Checkpoint, Window};
    use crate::format::limits::Limits;
    use crate::format::profile::{PAGE_BYTES, Touched};
    use crate::format::ztoc::Spans;

    fn layer(number: u8) -> Digest {
        Digest::of(&[number])
    }

    /// Ranges of layer 1, in pages; and all of layer 2.
    fn profile(pages: &[(u64, u64)]) -> Profile {
        let one = |(start, end): &(u64, u64)| Touched { layer: 1, bytes: start * PAGE_BYTES..end * PAGE_BYTES };
        let mut ranges: Vec<Touched> = pages.iter().map(one).collect();
        ranges.push(Touched { layer: 0, bytes: 0..100 * PAGE_BYTES });
        Profile::new(vec![layer(2), layer(1)], ranges, &Limits::DEFAULT).unwrap()
    }

    fn ztoc(spans: Spans, max_span_id: i32, uncompressed_size: u64) -> Ztoc {
        let uncompressed_size = uncompressed_size.cast_signed();
        let (version, build_tool) = (String::new(), String::new());
        let (entries, digests) = (Vec::new(), Vec::new());
        Ztoc { version, build_tool, compressed_size: 9, uncompressed_size, entries, max_span_id, digests, spans }
    }

    /// A gzip layer whose spans begin at these bytes.
    fn gzip(starts: &[u64], size: u64) -> Ztoc {
        let checkpoint = |uncompressed: &u64| Checkpoint {
            compressed: 10 + uncompressed / 2,
            uncompressed: *uncompressed,
            bits: 0,
            window: Window::EMPTY,
        };
        let checkpoints = starts.iter().map(checkpoint).collect();
        let spans = Spans::Gzip { span_bytes: 10_000, checkpoints, first_implied: false };
        ztoc(spans, i32::try_from(starts.len()).unwrap() - 1, size)
    }

    fn spans(profile: &Profile, ztoc: &Ztoc) -> Option<Vec<(u32, u32)>> {
        let ranges = of_profile(profile, &layer(1), ztoc)?.prefetch_spans;
        Some(ranges.iter().map(|range| (range.start_span, range.end_span)).collect())
    }

    #[test]
    fn profiles_become_spans() {
        // Spans of layer 1: pages 0..2, 2..4 and some bytes, then up to 10 and up to half of page 13.
        let starts = [0, 2 * PAGE_BYTES, 4 * PAGE_BYTES + 100, 10 * PAGE_BYTES];
        let ztoc = gzip(&starts, 12 * PAGE_BYTES + 2000);
        for (pages, expected) in [
            // The byte after a range is not wanted.
            (vec![(0, 2)], Some(vec![(0, 0)])),
            (vec![(1, 3)], Some(vec![(0, 1)])),
            // The fifth page is in two spans.
            (vec![(4, 5)], Some(vec![(1, 2)])),
            // Ascending, and joined where they touch or meet.
            (vec![(10, 11), (0, 1)], Some(vec![(0, 0), (3, 3)])),
            (vec![(10, 11), (5, 6), (8, 9), (0, 1)], Some(vec![(0, 0), (2, 3)])),
            // The end of the layer, and beyond.
            (vec![(12, 40)], Some(vec![(3, 3)])),
            (vec![(13, 40)], None),
            (vec![(50, 51), (1, 2)], Some(vec![(0, 0)])),
            (vec![], None),
        ] {
            assert_eq!(spans(&profile(&pages), &ztoc), expected, "{pages:?}");
        }
        assert_eq!(of_profile(&profile(&[(0, 1)]), &layer(7), &ztoc), None, "another layer");
        assert_eq!(of_profile(&profile(&[(0, 1)]), &layer(2), &ztoc).unwrap().spans(), 4);
    }

    #[test]
    fn profiles_of_plain_layers() {
        let size = 10 * PAGE_BYTES;
        let plain = |last| {
            let spans = Spans::Plain { span_bytes: 3 * PAGE_BYTES.cast_signed(), size: size.cast_signed() };
            ztoc(spans, last, size)
        };
        assert_eq!(spans(&profile(&[(9, 10), (0, 3)]), &plain(3)), Some(vec![(0, 0), (3, 3)]));
        // Numbers that disagree name no span that there is not.
        assert_eq!(spans(&profile(&[(0, 10)]), &plain(1)), Some(vec![(0, 1)]));
        assert_eq!(spans(&profile(&[(0, 10)]), &plain(-1)), Some(vec![(0, 0)]));
    }

    #[test]
    fn disorder_of_checkpoints_is_survived() {
        let ztoc = gzip(&[0, 90_000, 5, 80_000, 10, 30_000], 100_000);
        for pages in [(0, 1), (1, 24), (5, 9), (20, 24)] {
            for (start, end) in spans(&profile(&[pages]), &ztoc).unwrap() {
                assert!(start <= end && end <= 5, "{start}..{end} of {pages:?}");
            }
        }
    }
}
