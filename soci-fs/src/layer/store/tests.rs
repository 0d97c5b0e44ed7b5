//! The store on a real directory: what it keeps, refuses and forgets.

use std::os::unix::fs::MetadataExt as _;

use soci_index::format::checkpoint::Window;
use soci_index::format::digest::Digest;
use soci_index::format::index::{Compression, Windows};
use soci_index::format::limits::Limits;
use soci_index::format::span::{Span, SpanTable};

use super::*;

const SPAN: usize = 16 << 10;

pub(super) fn table(spans: u64, bytes: u64) -> LayerIndex {
    let span = |number: u64| Span {
        compressed: number * 10..number * 10 + 10,
        uncompressed: number * bytes..(number + 1) * bytes,
        bits: 0,
        digest: None,
    };
    let table = SpanTable::new((0..spans).map(span).collect(), spans * 10, spans * bytes, &Limits::DEFAULT).unwrap();
    LayerIndex {
        compression: Compression::Gzip,
        compressed_size: spans * 10,
        uncompressed_size: spans * bytes,
        entries: Vec::new(),
        windows: Windows::Held((0..spans).map(|_| Window::EMPTY).collect()),
        spans: table,
    }
}

pub(super) fn claim(number: u8) -> Claim {
    Claim::whole(Digest::from_sha256([number; 32]), Digest::from_sha256([number; 32]))
}

fn fill(layer: &LayerStore, span: u32) {
    assert_eq!(layer.write(span, &content(span)).unwrap(), Parts::Agree);
}

fn content(span: u32) -> Vec<u8> {
    (0..SPAN).map(|place| u8::try_from((place + 7 * span as usize) % 251).unwrap()).collect()
}

pub(super) fn read(layer: &LayerStore, offset: usize, length: usize) -> Option<Vec<u8>> {
    let mut buffer = vec![0; length];
    (layer.read(offset as u64, &mut buffer).unwrap() == Reading::Done).then_some(buffer)
}

#[test]
fn spans_are_read_back() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path()).unwrap();
    let layer = store.layer(&claim(1), &table(4, SPAN as u64)).unwrap();
    assert_eq!((layer.size(), layer.present_spans(), layer.is_complete()), (4 * SPAN as u64, 0, false));
    fill(&layer, 1);
    fill(&layer, 2);
    let whole = [content(1), content(2)].concat();
    for (offset, length) in [(SPAN, 1), (SPAN, 2 * SPAN), (SPAN + 5, SPAN), (3 * SPAN - 1, 1), (SPAN, 0)] {
        assert_eq!(read(&layer, offset, length).unwrap(), whole[offset - SPAN..offset - SPAN + length]);
    }
    let mut buffer = vec![0; 2];
    for (offset, absent) in [(0, 0), (SPAN - 1, 0), (3 * SPAN - 1, 3), (4 * SPAN, 4)] {
        assert_eq!(layer.read(offset as u64, &mut buffer).unwrap(), Reading::Absent(absent));
    }
    let wrong = layer.write(0, b"short");
    assert!(matches!(wrong, Err(StoreError::Length { span: 0, expected: 16384, found: 5 })), "{wrong:?}");
    assert_eq!((layer.present_bytes(), layer.present_spans()), (2 * SPAN as u64, 2));
    assert!(Arc::ptr_eq(&layer, &store.layer(&claim(1), &table(4, SPAN as u64)).unwrap()));
}

#[test]
fn a_second_process_is_refused_with_the_number_of_the_first() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path()).unwrap();
    let second = Store::open(directory.path()).unwrap_err();
    let own = std::process::id();
    assert!(matches!(second, StoreError::Busy { pid: Some(pid), .. } if pid == own), "{second}");
    assert!(second.to_string().contains(&own.to_string()));
    drop(store);
    Store::open(directory.path()).unwrap();
}

#[test]
fn what_was_written_outlives_the_process() {
    let directory = tempfile::tempdir().unwrap();
    let open = || Store::open_in_boot(directory.path(), BootId([1; 16])).unwrap();
    {
        let store = open();
        let layer = store.layer(&claim(1), &table(4, SPAN as u64)).unwrap();
        fill(&layer, 0);
        fill(&layer, 3);
        layer.set_proven(&Proof::OwnTable).unwrap();
    }
    let layer = open().layer(&claim(1), &table(4, SPAN as u64)).unwrap();
    assert_eq!((layer.present_spans(), layer.is_proven()), (2, true));
    assert_eq!(read(&layer, 3 * SPAN, SPAN).unwrap(), content(3));
    drop(layer);
    // Another index, be it only in a window: nothing that was decoded by the first can be used.
    let mut forged = table(4, SPAN as u64);
    let mut windows = vec![Window::EMPTY; 4];
    windows[2] = Window::pack(&[1; 32_768]);
    forged.windows = Windows::Held(windows);
    let layer = open().layer(&claim(1), &forged).unwrap();
    assert_eq!(layer.present_spans(), 0);
    drop(layer);
    let layer = open().layer(&claim(1), &table(8, SPAN as u64 / 2)).unwrap();
    assert_eq!((layer.present_spans(), layer.is_proven()), (0, false));
}

#[test]
fn after_a_reboot_every_span_is_compared_once() {
    let directory = tempfile::tempdir().unwrap();
    let open = |boot| Store::open_in_boot(directory.path(), BootId([boot; 16])).unwrap();
    let layer = open(1).layer(&claim(1), &table(4, SPAN as u64)).unwrap();
    (0..4).for_each(|span| fill(&layer, span));
    let data = layer.directory().join("data");
    drop(layer);
    let mut bytes = std::fs::read(&data).unwrap();
    bytes[SPAN + 100] ^= 1;
    std::fs::write(&data, &bytes).unwrap();
    // In the same boot nothing is checked: the page cache cannot have lost anything.
    let layer = open(1).layer(&claim(1), &table(4, SPAN as u64)).unwrap();
    assert!(read(&layer, SPAN, SPAN).is_some());
    drop(layer);
    let layer = open(2).layer(&claim(1), &table(4, SPAN as u64)).unwrap();
    assert_eq!(layer.present_spans(), 4);
    assert_eq!(read(&layer, 0, SPAN).unwrap(), content(0));
    assert_eq!(read(&layer, SPAN, 1), None);
    assert_eq!((layer.present_spans(), layer.present_bytes()), (3, 3 * SPAN as u64));
    drop(layer);
    // What was not looked at in boot 2 is still to be compared in its next process.
    let mut bytes = std::fs::read(&data).unwrap();
    bytes[2 * SPAN] ^= 1;
    bytes.truncate(3 * SPAN + 5);
    std::fs::write(&data, &bytes).unwrap();
    let layer = open(2).layer(&claim(1), &table(4, SPAN as u64)).unwrap();
    assert_eq!(read(&layer, 2 * SPAN, 1), None);
    assert_eq!(read(&layer, 3 * SPAN, 1), None);
    assert_eq!(read(&layer, 0, SPAN).unwrap(), content(0));
    fill(&layer, 1);
    assert_eq!(read(&layer, SPAN, SPAN).unwrap(), content(1));
}

#[test]
fn damage_of_the_record_file_means_nothing_is_present() {
    for damage in [&b""[..], b"SOCIspan", &[0xff; 200]] {
        let directory = tempfile::tempdir().unwrap();
        let open = || Store::open(directory.path()).unwrap().layer(&claim(1), &table(4, SPAN as u64)).unwrap();
        let layer = open();
        fill(&layer, 0);
        std::fs::write(layer.directory().join("present"), damage).unwrap();
        drop(layer);
        assert_eq!(open().present_spans(), 0);
    }
}

#[test]
fn eviction_takes_what_was_not_used_for_longest() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path()).unwrap();
    for number in 1..4 {
        let layer = store.layer(&claim(number), &table(8, SPAN as u64)).unwrap();
        (0..8).for_each(|span| fill(&layer, span));
    }
    let open = store.layer(&claim(3), &table(8, SPAN as u64)).unwrap();
    for span in [0, 1, 2, 3, 4, 6] {
        assert!(read(&open, span * SPAN, 10).is_some());
    }
    let total = store.disk_bytes().unwrap();
    assert!(total >= 24 * SPAN as u64, "{total}");
    assert_eq!(store.evict_to(total).unwrap().layers, 0);
    // Closed layers go first, then the spans 5 and 7, which were not read since they were written.
    let evicted = store.evict_to(6 * SPAN as u64 + 5000).unwrap();
    assert_eq!((evicted.layers, evicted.spans), (2, 2), "{evicted:?}");
    assert!(evicted.after <= 6 * SPAN as u64 + 5000);
    let present: Vec<u32> = (0..8).filter(|span| open.is_present(*span)).collect();
    assert_eq!(present, [0, 1, 2, 3, 4, 6]);
    assert_eq!(read(&open, 5 * SPAN, 1), None);
    assert_eq!(read(&open, 6 * SPAN, SPAN).unwrap(), content(6));
    fill(&open, 5);
    assert_eq!(read(&open, 5 * SPAN, SPAN).unwrap(), content(5));
    open.pin();
    assert_eq!(store.evict_to(0).unwrap().spans, 0);
    let blocks = std::fs::metadata(open.directory().join("data")).unwrap().blocks();
    assert!(blocks * 512 < 8 * SPAN as u64);
}

/// Readers, a writer and an evictor at once: never a wrong byte.
#[test]
fn eviction_never_shows_a_hole() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path()).unwrap();
    let layer = store.layer(&claim(1), &table(4, SPAN as u64)).unwrap();
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let running = || !stop.load(std::sync::atomic::Ordering::Relaxed);
        for reader in 0..3 {
            let layer = &layer;
            scope.spawn(move || {
                while running() {
                    for span in 0..4_u32 {
                        if let Some(found) = read(layer, span as usize * SPAN + reader, 5000) {
                            assert!(found == content(span)[reader..reader + 5000]);
                        }
                    }
                }
            });
        }
        for step in 0..3000_u32 {
            fill(&layer, step % 4);
            layer.evict((step * 3 + 1) % 4).unwrap();
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}

/// A claim of four spans that was proven by marks, and its bytes.
fn proven(store: &Store) -> Arc<LayerStore> {
    let layer = store.layer(&claim(1), &table(4, SPAN as u64)).unwrap();
    let mut hash = Mark::START;
    let mut marks = Vec::new();
    for span in 0..4 {
        fill(&layer, span);
        hash.update(&content(span));
        marks.push(hash.clone());
    }
    layer.set_proven(&Proof::Marks(marks)).unwrap();
    layer
}

#[test]
fn a_proven_layer_takes_no_other_bytes() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path()).unwrap();
    let layer = proven(&store);
    assert_eq!(store.proven(&claim(1).diff_id), [claim(1)]);
    layer.evict(2).unwrap();
    layer.write_part(2 * SPAN as u64, &vec![9; SPAN]).unwrap();
    assert!(!layer.has_parts(2), "a pack is worth nothing here");
    let mut forged = content(2);
    forged[SPAN - 1] ^= 1;
    let refused = layer.write(2, &forged);
    assert!(matches!(refused, Err(StoreError::Unproven { span: 2, .. })), "{refused:?}");
    assert_eq!(read(&layer, 2 * SPAN, 1), None);
    fill(&layer, 2);
    // It is found again by its diff_id, after a restart too, and holds to what was proven.
    drop((layer, store));
    let store = Store::open(directory.path()).unwrap();
    assert_eq!(store.proven(&claim(1).diff_id), [claim(1)]);
    let layer = store.layer(&claim(1), &table(4, SPAN as u64)).unwrap();
    assert!(layer.is_proven() && layer.is_complete());
    layer.evict(0).unwrap();
    assert!(layer.write(0, &content(1)).is_err() && layer.write(0, &content(0)).is_ok());
    // A damaged proof is none.
    let file = layer.directory().join(proven::FILE);
    drop((layer, store));
    let bytes = std::fs::read(&file).unwrap();
    for damage in [&bytes[..bytes.len() - 1], b"", &[&bytes[..12], &[7], &bytes[13..]].concat()] {
        std::fs::write(&file, damage).unwrap();
        let layer = Store::open(directory.path()).unwrap().layer(&claim(1), &table(4, SPAN as u64)).unwrap();
        assert!(!layer.is_proven());
    }
}

#[test]
fn verdicts_last() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path()).unwrap();
    let (layer, pack) = (proven(&store), Digest::of(b"pack"));
    layer.condemn("its table is forged").unwrap();
    layer.condemn_pack(pack, "a page is forged").unwrap();
    assert!(store.proven(&claim(1).diff_id).is_empty());
    drop((layer, store));
    let store = Store::open(directory.path()).unwrap();
    let said = |what| store.condemned(what);
    assert_eq!(said(Condemned::Claim(claim(1).id())).as_deref(), Some("its table is forged"));
    assert_eq!(said(Condemned::Pack(pack)).as_deref(), Some("a page is forged"));
    assert_eq!(said(Condemned::Claim(claim(2).id())), None);
    assert_eq!(said(Condemned::Pack(Digest::of(b"other"))), None);
    // With the layer gone, too.
    store.remove(&claim(1)).unwrap();
    assert!(store.condemned(Condemned::Claim(claim(1).id())).is_some());
}

#[test]
fn what_is_not_ours_is_removed() {
    let directory = tempfile::tempdir().unwrap();
    let layers = directory.path().join("layers");
    let kept = {
        let store = Store::open(directory.path()).unwrap();
        let layer = store.layer(&claim(1), &table(4, SPAN as u64)).unwrap();
        fill(&layer, 0);
        layer.directory().to_owned()
    };
    // What a version before this one has left, and a directory that says that it is another claim's.
    std::fs::create_dir(layers.join(format!("sha256-{}", "0".repeat(64)))).unwrap();
    let stolen = layers.join(claim(2).id().to_string());
    std::fs::create_dir(&stolen).unwrap();
    std::fs::copy(kept.join("record.json"), stolen.join("record.json")).unwrap();
    std::fs::write(layers.join("file"), "").unwrap();
    let _store = Store::open(directory.path()).unwrap();
    let left: Vec<_> = std::fs::read_dir(&layers).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(left, [kept]);
}
