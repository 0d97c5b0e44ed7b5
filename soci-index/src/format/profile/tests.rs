//! What goes in comes out, damage is refused, order and bounds are kept.

use proptest::prelude::*;

use super::artifact::{self, Notes, Published};
use super::*;
use crate::format::model::{Descriptor, media_type};
use crate::format::span::Span;

fn digest(number: u8) -> Digest {
    Digest::of(&[number])
}

fn touched(layer: u32, first_page: u64, length: u64) -> Touched {
    let start = first_page * PAGE_BYTES;
    Touched { layer, bytes: start..start + length }
}

fn profile(ranges: &[(u32, u64, u64)]) -> Profile {
    let ranges = ranges.iter().map(|(layer, page, length)| touched(*layer, *page, *length)).collect();
    Profile::new(vec![digest(0), digest(1)], ranges, &Limits::DEFAULT).unwrap()
}

/// Layers of tables whose spans end at these bytes.
fn table(ends: &[u64]) -> SpanTable {
    let mut start = 0;
    let spans = ends.iter().map(|end| {
        let span = Span { compressed: start..*end, uncompressed: start..*end, bits: 0, digest: None };
        start = *end;
        span
    });
    let size = ends.last().copied().unwrap_or(0);
    SpanTable::new(spans.collect(), size, size, &Limits::DEFAULT).unwrap()
}

#[test]
fn what_is_no_profile() {
    let layers = || vec![digest(0)];
    for (ranges, what) in [
        (vec![touched(1, 0, 1)], "there is no such layer"),
        (vec![touched(0, 0, 0)], "it is empty or too long"),
        (vec![touched(0, 0, RANGE_BYTES_MAX + 1)], "it is empty or too long"),
        (vec![Touched { layer: 0, bytes: 1..5 }], "it starts within a page"),
        (vec![touched(0, 0, 8192), touched(0, 1, 4096)], "it overlaps another"),
    ] {
        let error = Profile::new(layers(), ranges, &Limits::DEFAULT).unwrap_err();
        assert!(matches!(error, ProfileError::Damaged { what: found, .. } if found == what), "{error}");
    }
    let few = Limits { profile_ranges_max: 1, profile_bytes_max: 5000, ..Limits::DEFAULT };
    for ranges in [vec![touched(0, 0, 1), touched(0, 1, 1)], vec![touched(0, 0, 5001)]] {
        assert!(matches!(Profile::new(layers(), ranges, &few), Err(ProfileError::TooLarge { .. })));
    }
}

#[test]
fn hostile_blobs() {
    let pack = |content: &[u8]| zstd::bulk::compress(content, 1).unwrap();
    let head = |version: u8, mark: u8, layers: u64, ranges: u64| {
        let mut content = b"SOCI-PRO".to_vec();
        content.extend([version, 0, mark, 0, 0, 0, 0, 0]);
        content.extend(layers.to_le_bytes());
        content.extend(ranges.to_le_bytes());
        content
    };
    let layer = digest(0).to_string();
    let with = |tail: &[u8]| {
        let mut content = head(1, 0, 1, 1);
        content.push(layer.len() as u8);
        content.extend(layer.as_bytes());
        content.extend(tail);
        pack(&content)
    };
    assert_eq!(Profile::decode(&with(&[0, 2, 1]), &Limits::DEFAULT).unwrap().ranges(), [touched(0, 1, 1)]);
    for (blob, what) in [
        (vec![], "no zstd frame"),
        (vec![0; 40], "no zstd frame"),
        (pack(b"short"), "no whole header"),
        (pack(&[0; 40]), "begins with"),
        (pack(&head(2, 0, 0, 0)), "version 2"),
        (pack(&head(1, 4, 0, 0)), "marks"),
        (pack(&head(1, 2, 0, 0)), "too early"),
        (pack(&[head(1, 2, 0, 0), vec![0]].concat()), "no text"),
        (pack(&[head(1, 2, 0, 0), vec![1, 0xff]].concat()), "no text"),
        (pack(&[head(1, 2, 0, 0), vec![0x81, 0x20]].concat()), "too long"),
        (pack(&[head(1, 2, 0, 0), vec![1, b'a', 0]].concat()), "after its end"),
        (pack(&head(1, 0, 0, u64::MAX)), "limit"),
        (pack(&head(1, 0, u64::MAX, 0)), "limit"),
        (pack(&head(1, 0, 0, 1)), "too early"),
        (pack(&head(1, 0, 1, 0)), "too early"),
        (with(&[0, 2]), "too early"),
        (with(&[0, 2, 1, 0]), "after its end"),
        (with(&[1, 2, 1]), "no such layer"),
        (with(&[0, 1, 1]), "beyond all numbers"),
        (with(&[0, 0x82, 0, 1]), "longer than it need be"),
        (with(&[0, 0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 1]), "beyond all numbers"),
        (with(&[0, 2, 0x81, 0x80, 0x40]), "too long"),
        (with(&[0, 2, 0]), "empty"),
    ] {
        let error = Profile::decode(&blob, &Limits::DEFAULT).unwrap_err().to_string();
        assert!(error.contains(what), "{error:?} should say {what:?}");
    }
}

/// A command is a note: cut where it is too long, never within a letter, and joined when profiles are.
#[test]
fn commands_are_notes() {
    let (one, other) = (profile(&[(0, 0, 1)]), profile(&[(0, 1, 1)]));
    assert_eq!(one.command(), "");
    let long = one.clone().with_command(&format!("a{}", "é".repeat(COMMAND_BYTES_MAX)));
    assert_eq!(long.command().len(), COMMAND_BYTES_MAX - 1);
    assert_eq!(Profile::decode(&long.encode().unwrap(), &Limits::DEFAULT).unwrap(), long);
    for (first, second, joined) in [("a", "b", "a; b"), ("a", "a", "a"), ("", "b", "b"), ("a", "", "a"), ("", "", "")] {
        let merged = one.clone().with_command(first).merge(&other.clone().with_command(second), &Limits::DEFAULT);
        assert_eq!(merged.unwrap().command(), joined);
    }
    // Without one the blob is what it was before there were commands.
    assert_eq!(long.with_command("").encode().unwrap(), one.encode().unwrap());
}

#[test]
fn recording_joins_what_continues() {
    let mut recording = Recording::new(Limits::DEFAULT);
    let (a, b) = (recording.layer(&digest(0)), recording.layer(&digest(1)));
    assert_eq!(recording.layer(&digest(0)), a);
    let size = 50_000;
    // Two files in turn, the second one of another layer, then again what is known, then the short end of the layer.
    for (layer, bytes) in
        [(a, 512..5000), (b, 0..100), (a, 8192..9000), (a, 0..12_000), (b, 4096..8192), (a, 49_500..60_000)]
    {
        recording.record(layer, bytes, size);
    }
    let found = recording.finish().unwrap();
    assert_eq!(found.ranges(), [touched(a, 0, 12_288), touched(b, 0, 8192), touched(a, 12, size - 49_152)]);
    // A range is not longer than allowed.
    recording.record(b, 8192..3 << 20, 1 << 30);
    assert!(recording.finish().unwrap().ranges().iter().all(|range| range.length() <= RANGE_BYTES_MAX));
}

#[test]
fn recording_stops_at_its_limits() {
    for limits in
        [Limits { profile_ranges_max: 2, ..Limits::DEFAULT }, Limits { profile_bytes_max: 10_000, ..Limits::DEFAULT }]
    {
        let mut recording = Recording::new(limits);
        let layer = recording.layer(&digest(0));
        (0..5).for_each(|number| recording.record(layer, number * 40_960..number * 40_960 + 1, 1 << 30));
        assert!(recording.is_full());
        assert_eq!(recording.finish().unwrap().ranges().len(), 2);
    }
}

#[test]
fn spans_in_order_and_once() {
    let (one, other) = (table(&[10_000, 20_000, 30_000]), table(&[4096, 8192]));
    let found = profile(&[(1, 1, 100), (0, 4, 4096), (0, 0, 10), (0, 5, 10), (0, 100, 4096), (1, 0, 4096)]);
    let image = [(digest(0), &one), (digest(1), &other)];
    // Page 4 is in the second span and, by its end, in the third; page 100 is beyond the layer.
    assert_eq!(found.spans(&image), [(1, 1), (0, 1), (0, 2), (0, 0), (1, 0)]);
    assert_eq!(found.spans(&[(digest(1), &other)]), [(0, 1), (0, 0)], "layers that the image lacks are passed over");
    assert!(found.spans(&[]).is_empty());
}

#[test]
fn merging() {
    let (one, other) = (profile(&[(1, 0, 4096), (0, 3, 8192)]), profile(&[(0, 4, 8192), (1, 9, 50)]));
    let both = one.merge(&other, &Limits::DEFAULT).unwrap();
    assert_eq!(both.bytes(), 4096 + 3 * 4096 + 50);
    assert_eq!(both.ranges()[0].bytes, 0..4096);
    assert_eq!(both.merge(&one, &Limits::DEFAULT).unwrap(), both);
    let few = Limits { profile_bytes_max: 13_000, ..Limits::DEFAULT };
    assert!(matches!(one.merge(&other, &few), Err(ProfileError::TooLarge { .. })));
}

fn published(name: &str, is_default: bool, created: &str) -> Published {
    let image = Descriptor::new(media_type::MANIFEST, digest(9), 3);
    let blob = Descriptor::new(PROFILE, digest(8), 4);
    let notes = Notes { name: name.to_owned(), is_default, created: created.to_owned(), command: None };
    let json = artifact::manifest(&notes, &blob, None, &image);
    artifact::parse(Digest::of(&json), &json, &digest(9)).unwrap()
}

#[test]
fn choice_among_several() {
    let mut all = vec![
        published("old", true, "2020-01-01T00:00:00Z"),
        published("new", true, "2021-01-01T00:00:00Z"),
        published("other", false, "2022-01-01T00:00:00Z"),
    ];
    artifact::order(&mut all);
    assert_eq!(artifact::choose(&all, None).unwrap().name, "new");
    assert_eq!(artifact::choose(&all, Some("other")).unwrap().name, "other");
    assert_eq!(artifact::choose(&all, Some("none")), None);
    assert_eq!(artifact::choose(&all[2..], None), None, "one that is no default is not used by itself");
}

#[test]
fn manifests() {
    let image = Descriptor::new(media_type::MANIFEST, digest(9), 3);
    let (blob, pack) = (Descriptor::new(PROFILE, digest(8), 4), Descriptor::new(PACK, digest(7), 5));
    let command = Some("python3 -c 'print()'".to_owned());
    let notes = Notes { name: "web".to_owned(), is_default: true, created: "2020-01-01T00:00:00Z".to_owned(), command };
    let json = artifact::manifest(&notes, &blob, Some(&pack), &image);
    let read = artifact::parse(Digest::of(&json), &json, &digest(9)).unwrap();
    assert_eq!((read.name.as_str(), read.is_default, read.command.as_str()), ("web", true, "python3 -c 'print()'"));
    assert_eq!((read.profile, read.pack), (blob, Some(pack)));
    assert!(artifact::parse(Digest::of(&json), &json, &digest(1)).unwrap_err().contains("belongs to"));
    assert!(artifact::parse(digest(0), b"{}", &digest(9)).is_err());
    for (name, good) in [("a", true), ("a-b_c.1", true), ("", false), ("a b", false), ("é", false)] {
        assert_eq!(artifact::is_name(name), good, "{name:?}");
    }
    assert!(!artifact::is_name(&"x".repeat(129)));
}

fn recordings() -> impl Strategy<Value = Profile> {
    let note = (0_u8..3, 0_u64..3_000_000, 1_u64..300_000);
    proptest::collection::vec(note, 0..40).prop_map(|notes| {
        let mut recording = Recording::new(Limits::DEFAULT);
        for (layer, start, length) in notes {
            let layer = recording.layer(&digest(layer));
            recording.record(layer, start..start + length, 2_999_999);
        }
        recording.finish().unwrap()
    })
}

proptest! {
    #[test]
    fn round_trip(profile in recordings(), packed: bool, command in ".{0,20}") {
        let digests = if packed { profile.ranges().iter().map(|range| [range.layer as u8; 32]).collect() } else { vec![] };
        let profile = if packed { profile.with_digests(digests).unwrap() } else { profile }.with_command(&command);
        let blob = profile.encode().unwrap();
        prop_assert_eq!(Profile::decode(&blob, &Limits::DEFAULT).unwrap(), profile);
    }

    #[test]
    fn any_content_is_judged(tail in proptest::collection::vec(any::<u8>(), 0..200), counts: (u8, u8, u8)) {
        let mut content = b"SOCI-PRO".to_vec();
        content.extend([1, 0, counts.2 % 5, 0, 0, 0, 0, 0, counts.0, 0, 0, 0, 0, 0, 0, 0, counts.1, 0, 0, 0, 0, 0, 0, 0]);
        content.extend(tail);
        if let Ok(profile) = Profile::decode(&zstd::bulk::compress(&content, 1).unwrap(), &Limits::DEFAULT) {
            prop_assert_eq!(Profile::decode(&profile.encode().unwrap(), &Limits::DEFAULT).unwrap(), profile);
        }
    }

    /// All pages that were read are named, each once, in whatever order reads came.
    #[test]
    fn every_page_once(notes in proptest::collection::vec((0_u64..500_000, 1_u64..50_000), 1..30)) {
        let size = 400_000;
        let mut recording = Recording::new(Limits::DEFAULT);
        let layer = recording.layer(&digest(0));
        let mut expected = std::collections::BTreeSet::new();
        for (start, length) in notes {
            recording.record(layer, start..start + length, size);
            let end = (start + length).min(size);
            expected.extend((start / PAGE_BYTES..end.div_ceil(PAGE_BYTES)).filter(|_| start < size));
        }
        let profile = recording.finish().unwrap();
        let pages = |range: &Touched| range.bytes.start / PAGE_BYTES..range.bytes.end.div_ceil(PAGE_BYTES);
        let mut found: Vec<u64> = profile.ranges().iter().flat_map(pages).collect();
        found.sort_unstable();
        prop_assert_eq!(found, expected.into_iter().collect::<Vec<_>>());
    }
}
