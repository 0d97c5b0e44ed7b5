//! The store on a real directory: what it keeps, refuses and forgets.

use std::os::unix::fs::MetadataExt as _;

use soci_index::checkpoint::Window;
use soci_index::index::{Compression, Windows};
use soci_index::limits::Limits;
use soci_index::span::{Span, SpanTable};

use super::*;

const SPAN: usize = 16 << 10;

fn table(spans: u64, bytes: u64) -> LayerIndex {
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

fn digest(number: u8) -> Digest {
    Digest::from_sha256([number; 32])
}

fn fill(layer: &LayerStore, span: u32) {
    layer.write(span, &content(span)).unwrap();
}

fn content(span: u32) -> Vec<u8> {
    (0..SPAN).map(|place| u8::try_from((place + 7 * span as usize) % 251).unwrap()).collect()
}

fn read(layer: &LayerStore, offset: usize, length: usize) -> Option<Vec<u8>> {
    let mut buffer = vec![0; length];
    (layer.read(offset as u64, &mut buffer).unwrap() == Reading::Done).then_some(buffer)
}

#[test]
fn spans_are_read_back() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path()).unwrap();
    let layer = store.layer(&digest(1), &table(4, SPAN as u64)).unwrap();
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
    assert!(Arc::ptr_eq(&layer, &store.layer(&digest(1), &table(4, SPAN as u64)).unwrap()));
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
        let layer = store.layer(&digest(1), &table(4, SPAN as u64)).unwrap();
        fill(&layer, 0);
        fill(&layer, 3);
        layer.set_proven().unwrap();
    }
    let layer = open().layer(&digest(1), &table(4, SPAN as u64)).unwrap();
    assert_eq!((layer.present_spans(), layer.is_proven()), (2, true));
    assert_eq!(read(&layer, 3 * SPAN, SPAN).unwrap(), content(3));
    drop(layer);
    // Another index, be it only in a window: nothing that was decoded by the first can be used.
    let mut forged = table(4, SPAN as u64);
    let mut windows = vec![Window::EMPTY; 4];
    windows[2] = Window::pack(&[1; 32_768]);
    forged.windows = Windows::Held(windows);
    let layer = open().layer(&digest(1), &forged).unwrap();
    assert_eq!((layer.present_spans(), layer.is_proven()), (0, false));
    drop(layer);
    let layer = open().layer(&digest(1), &table(8, SPAN as u64 / 2)).unwrap();
    assert_eq!((layer.present_spans(), layer.is_proven()), (0, false));
}

#[test]
fn after_a_reboot_every_span_is_compared_once() {
    let directory = tempfile::tempdir().unwrap();
    let open = |boot| Store::open_in_boot(directory.path(), BootId([boot; 16])).unwrap();
    let layer = open(1).layer(&digest(1), &table(4, SPAN as u64)).unwrap();
    (0..4).for_each(|span| fill(&layer, span));
    let data = layer.directory().join("data");
    drop(layer);
    let mut bytes = std::fs::read(&data).unwrap();
    bytes[SPAN + 100] ^= 1;
    std::fs::write(&data, &bytes).unwrap();
    // In the same boot nobody looks: the page cache cannot have lost anything.
    let layer = open(1).layer(&digest(1), &table(4, SPAN as u64)).unwrap();
    assert!(read(&layer, SPAN, SPAN).is_some());
    drop(layer);
    let layer = open(2).layer(&digest(1), &table(4, SPAN as u64)).unwrap();
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
    let layer = open(2).layer(&digest(1), &table(4, SPAN as u64)).unwrap();
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
        let open = || Store::open(directory.path()).unwrap().layer(&digest(1), &table(4, SPAN as u64)).unwrap();
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
        let layer = store.layer(&digest(number), &table(8, SPAN as u64)).unwrap();
        (0..8).for_each(|span| fill(&layer, span));
    }
    let open = store.layer(&digest(3), &table(8, SPAN as u64)).unwrap();
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
    let layer = store.layer(&digest(1), &table(4, SPAN as u64)).unwrap();
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
