//! Errors and the layout of small images. What images mean is tested where the kernel and a reader of our own judge it:
//! `tests/layers/erofs.rs`.

use super::*;
use crate::tree::tests::{entry, script};
use soci_index::format::entry::EntryKind;

fn image(entries: &[Entry]) -> (Vec<u8>, Summary) {
    let tree = Tree::of_layer(entries).unwrap();
    let device = DeviceMap::of_layer(entries, 1 << 20).unwrap();
    let mut bytes = Vec::new();
    let summary = write(&tree, &[Layer { entries, device: &device }], None, &mut bytes).unwrap();
    assert_eq!(summary.bytes, bytes.len() as u64);
    (bytes, summary)
}

/// Superblock, one device and the root directory; always the same bytes.
#[test]
fn an_empty_tree() {
    let (bytes, summary) = image(&[]);
    assert_eq!(summary, Summary { bytes: 2048, inodes: 1, xattrs_left_out: 0 });
    assert_eq!(bytes[1024..1028], 0xE0F5_E1E2_u32.to_le_bytes());
    // The root has the number 16: 512 bytes behind where numbers begin.
    assert_eq!((&bytes[1024 + 14..][..2], &bytes[1024 + 40..][..4]), (&[16, 0][..], &[2, 0, 0, 0][..]));
    assert_eq!(image(&[]).0, bytes);
}

/// A tree is written with the layers that it was made of, or not at all.
#[test]
fn other_layers_are_refused() {
    let entries = script("d d; f d/a; s l d");
    let tree = Tree::of_layer(&entries).unwrap();
    let device = DeviceMap::of_layer(&entries, 1 << 20).unwrap();
    let refused = |layers: &[Layer<'_>]| write(&tree, layers, None, &mut io::sink()).unwrap_err();
    let none = ErofsError::NoEntry { layer: 0, entry: 0 };
    assert_eq!(refused(&[]).to_string(), none.to_string());
    assert!(matches!(refused(&[Layer { entries: &entries[..1], device: &device }]), ErofsError::NoEntry { .. }));
    let mut other = entries.clone();
    other[1] = Entry { size: 5, ..entry("d/a", EntryKind::Fifo, "", 1) };
    assert!(matches!(
        refused(&[Layer { entries: &other, device: &device }]),
        ErofsError::NoPlace { layer: 0, entry: 1 }
    ));
    let layer = Layer { entries: &entries, device: &device };
    let many = refused(&vec![layer; 65_536]);
    assert!(matches!(many, ErofsError::TooManyLayers { layers: 65_536, limit: 65_535 }));
    assert_eq!(many.class(), Class::Content);
}

/// What the output says is handed on.
#[test]
fn failing_output() {
    struct Full;
    impl io::Write for Full {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::StorageFull.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let tree = Tree::of_layer(&[]).unwrap();
    let error = write(&tree, &[], None, &mut Full).unwrap_err();
    assert!(matches!(&error, ErofsError::Write(error) if error.kind() == io::ErrorKind::StorageFull));
    assert_eq!(error.class(), Class::Local);
}
