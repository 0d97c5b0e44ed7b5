//! Parts of spans against a model: what was written and not taken away is read, and nothing else ever.

use std::collections::BTreeSet;
use std::sync::Arc;

use proptest::prelude::*;
use soci_index::format::profile::PAGE_BYTES;

use crate::layer::store::tests::{claim, read, table};
use crate::layer::store::{BootId, Claim, LayerStore, Parts, Store};

/// Spans that end within pages.
const SPAN: u64 = 10_000;
const SPANS: u64 = 5;

fn content(offset: u64, length: u64) -> Vec<u8> {
    (offset..offset + length).map(|place| (place * 31 % 251) as u8 + 1).collect()
}

fn open(store: &Store) -> Arc<LayerStore> {
    store.layer(&claim(1), &table(SPANS, SPAN)).unwrap()
}

fn has(layer: &LayerStore, offset: u64, length: u64) -> bool {
    let found = read(layer, offset as usize, length as usize);
    if let Some(found) = &found {
        assert!(*found == content(offset, length), "wrong bytes at {offset}+{length}");
    }
    found.is_some()
}

#[test]
fn pages_are_read_before_their_span_is_there() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path()).unwrap();
    let layer = open(&store);
    // A page that lies in two spans, and one after it.
    layer.write_part(8192, &content(8192, 8192)).unwrap();
    for (offset, length, expected) in [
        (8192, 8192, true),
        (9999, 2, true),
        (12_288, 4096, true),
        (8191, 1, false),
        (16_383, 2, false),
        (0, 1, false),
        (20_000, 1, false),
    ] {
        assert_eq!(has(&layer, offset, length), expected, "{offset}+{length}");
    }
    assert_eq!((layer.present_spans(), layer.present_bytes()), (0, 0));
    // Half a page is not shown.
    layer.write_part(20_480, &content(20_480, 100)).unwrap();
    assert!(!has(&layer, 20_480, 1));
    // With all of its pages there the span is absent all the same: it was not seen itself.
    layer.write_part(0, &content(0, 8192)).unwrap();
    assert_eq!((layer.present_spans(), layer.present_bytes(), layer.has_parts(0)), (0, 0, true));
    assert!(has(&layer, 0, 16_384));
    assert_eq!(layer.write(0, &content(0, SPAN)).unwrap(), Parts::Agree);
    assert_eq!((layer.present_spans(), layer.has_parts(0)), (1, false));
    // What comes for it later is passed over, and beyond the end there is nothing to write.
    layer.write_part(0, &[0; 4096]).unwrap();
    layer.write_part(SPANS * SPAN, &[1]).unwrap();
    assert!(has(&layer, 0, 16_384));
}

#[test]
fn a_span_is_compared_with_its_pages() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path()).unwrap();
    let layer = open(&store);
    // One byte of the page that spans 0 and 1 share, in the part that lies in span 1.
    let mut forged = content(8192, 4096);
    forged[2000] ^= 1;
    layer.write_part(8192, &forged).unwrap();
    assert_eq!(layer.write(0, &content(0, SPAN)).unwrap(), Parts::Agree);
    assert_eq!(layer.write(1, &content(SPAN, SPAN)).unwrap(), Parts::Differ { offset: SPAN });
    assert!(has(&layer, 0, 2 * SPAN), "the span has taken the page's place");
    // Bytes that no page shows do not count.
    layer.write_part(2 * SPAN, &[0; 100]).unwrap();
    assert_eq!(layer.write(2, &content(2 * SPAN, SPAN)).unwrap(), Parts::Agree);
    layer.write_part(3 * SPAN, &content(3 * SPAN, SPAN)).unwrap();
    layer.forget_parts().unwrap();
    assert!(!has(&layer, 3 * SPAN, 1));
}

#[test]
fn parts_go_with_eviction_distrust_and_restart() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path()).unwrap();
    let layer = open(&store);
    let fill = |layer: &LayerStore| {
        layer.write_part(4096, &content(4096, 4096)).unwrap();
        assert!(has(layer, 4096, 4096) && layer.has_parts(0));
    };
    fill(&layer);
    layer.evict(0).unwrap();
    assert!(!has(&layer, 4096, 1) && !layer.has_parts(0));
    fill(&layer);
    layer.distrust(0);
    assert!(!has(&layer, 4096, 1));
    fill(&layer);
    assert!(store.evict_to(0).unwrap().spans >= 1, "eviction finds parts");
    assert!(!has(&layer, 4096, 1));
    fill(&layer);
    drop((layer, store));
    let store = Store::open(directory.path()).unwrap();
    let layer = open(&store);
    assert!(!has(&layer, 4096, 1), "a restart forgets");
    fill(&layer);
    assert_eq!(layer.write(0, &content(0, SPAN)).unwrap(), Parts::Agree);
    assert!(has(&layer, 0, SPAN) && !layer.has_parts(0));
}

/// Spans that a pack has filled are there after a restart, and after another boot if the disk has kept them; never as
/// present ones, and not once they were evicted or the pack was condemned.
#[test]
fn spans_that_a_pack_has_filled_are_remembered() {
    let directory = tempfile::tempdir().unwrap();
    let with_pack = Claim { pack: Some(claim(9).layer), ..claim(1) };
    let open = |boot: u8| {
        let store = Store::open_in_boot(directory.path(), BootId([boot; 16])).unwrap();
        let layer = store.layer(&with_pack, &table(SPANS, SPAN)).unwrap();
        (store, layer)
    };
    let (store, layer) = open(1);
    layer.write_part(0, &content(0, 3 * SPAN)).unwrap();
    let seen = |layer: &LayerStore| [0, 1, 2].map(|span| has(layer, span * SPAN, SPAN));
    assert_eq!((seen(&layer), [0, 1, 2].map(|span| layer.is_readable(span))), ([true; 3], [true; 3]));
    layer.evict(2).unwrap();
    drop((layer, store));
    let (store, layer) = open(1);
    assert_eq!((seen(&layer), layer.present_spans()), ([true, true, false], 0));
    // Another boot, and a span that the disk has lost.
    let data = layer.directory().join("data");
    drop((layer, store));
    let file = std::fs::File::options().write(true).open(data).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[0; 100], 0).unwrap();
    let (store, layer) = open(2);
    assert_eq!(seen(&layer), [false, true, false]);
    layer.forget_parts().unwrap();
    drop((layer, store));
    assert_eq!(seen(&open(2).1), [false; 3]);
}

#[derive(Debug, Clone)]
enum Step {
    Part(u64, u64),
    Write(u32),
    Evict(u32),
    Distrust(u32),
    Restart,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let span = || 0..SPANS as u32;
    let step = prop_oneof![
        6 => (0..SPANS * SPAN / PAGE_BYTES + 1, 1_u64..20_000).prop_map(|(page, length)| Step::Part(page * PAGE_BYTES, length)),
        2 => span().prop_map(Step::Write),
        2 => span().prop_map(Step::Evict),
        1 => span().prop_map(Step::Distrust),
        1 => Just(Step::Restart),
    ];
    proptest::collection::vec(step, 0..40)
}

/// A page as far as it lies in a span.
type Piece = (u32, u64);

fn pieces() -> impl Iterator<Item = (Piece, u64, u64)> {
    (0..SPANS).flat_map(|span| {
        let (start, end) = (span * SPAN, (span + 1) * SPAN);
        (start / PAGE_BYTES..end.div_ceil(PAGE_BYTES)).map(move |page| {
            let (from, to) = ((page * PAGE_BYTES).max(start), ((page + 1) * PAGE_BYTES).min(end));
            ((span as u32, page), from, to)
        })
    })
}

proptest! {
    #[test]
    fn as_the_model_says(steps in steps(), boots: bool) {
        let directory = tempfile::tempdir().unwrap();
        let mut boot = 0_u8;
        let start = |boot: u8| Store::open_in_boot(directory.path(), BootId([boot; 16])).unwrap();
        let mut store = start(boot);
        let mut layer = open(&store);
        let mut model: BTreeSet<Piece> = BTreeSet::new();
        // Spans that came as such.
        let mut written: BTreeSet<u32> = BTreeSet::new();
        for step in steps {
            match step {
                Step::Part(offset, length) => {
                    let length = length.min((SPANS * SPAN).saturating_sub(offset));
                    layer.write_part(offset, &content(offset, length)).unwrap();
                    let inside = |from, to| offset <= from && to <= offset + length;
                    model.extend(pieces().filter(|(_, from, to)| inside(*from, *to)).map(|(piece, _, _)| piece));
                }
                Step::Write(span) => {
                    prop_assert_eq!(layer.write(span, &content(u64::from(span) * SPAN, SPAN)).unwrap(), Parts::Agree);
                    written.insert(span);
                    model.extend(pieces().filter(|(piece, _, _)| piece.0 == span).map(|(piece, _, _)| piece));
                }
                Step::Evict(span) => {
                    layer.evict(span).unwrap();
                    written.remove(&span);
                    model.retain(|piece| piece.0 != span);
                }
                Step::Distrust(span) => {
                    layer.distrust(span);
                    written.remove(&span);
                    model.retain(|piece| piece.0 != span);
                    // The file was not updated, so that a restart would find the span again: it is updated now.
                    layer.evict(span).unwrap();
                    prop_assert_eq!(layer.write(span, &content(u64::from(span) * SPAN, SPAN)).unwrap(), Parts::Agree);
                    layer.evict(span).unwrap();
                }
                Step::Restart => {
                    drop((layer, store));
                    boot += u8::from(boots);
                    store = start(boot);
                    layer = open(&store);
                    model.retain(|piece| written.contains(&piece.0));
                }
            }
            for (piece, from, to) in pieces() {
                prop_assert_eq!(has(&layer, from, to - from), model.contains(&piece), "{:?}", piece);
            }
            prop_assert_eq!(layer.present_bytes(), written.len() as u64 * SPAN);
        }
    }
}
