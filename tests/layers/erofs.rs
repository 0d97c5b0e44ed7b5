//! EROFS images of trees, judged by a reader of our own and by erofs-utils. The kernel's word is in `erofs_mount.rs`.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on stops")]

use std::fs;
use std::process::Command;

use proptest::prelude::*;
use soci_fs::tree::Tree;
use soci_fs::tree::device::DeviceMap;
use soci_fs::tree::erofs::{Layer, write};
use soci_fs::tree::view::merge;
use soci_index::format::entry::{Entry, EntryKind, Extra, PaxRecord, Piece, Timestamp};
use soci_tests::erofs::read;
use soci_tests::erofs_model::{checked, checked_layer, compare};
use soci_tests::golden::cases;
use soci_tests::reading::index;

/// How overlayfs marks opaque directories.
const OPAQUE: &[u8] = b"trusted.overlay.opaque";

/// An access control list: user, one named user, group, mask, others.
const LIST: &[u8] =
    b"\x02\0\0\0\x01\0\x06\0\xff\xff\xff\xff\x02\0\x04\0\xe8\x03\0\0\x04\0\x04\0\xff\xff\xff\xff\x10\0\x04\0\xff\xff\xff\xff\x20\0\0\0\xff\xff\xff\xff";

/// A name alphabet small enough that things collide, with names before and after `.` and `..`, of any bytes, and long.
fn path() -> impl Strategy<Value = Vec<u8>> {
    let long = [b'n'; 255];
    let names: Vec<Vec<u8>> = [&b"a"[..], b"b", b"c", b"..", b".", b"", b"l", b".wh.a", b".wh.d", b".wh..wh..opq"]
        .into_iter()
        .chain([&b"-"[..], b"!", b".-", b"...", b"\x01", b"\xff\xfe", b"d", &long])
        .map(<[u8]>::to_vec)
        .collect();
    prop::collection::vec(prop::sample::select(names), 1..5).prop_map(|parts| parts.join(&b'/'))
}

fn kind() -> impl Strategy<Value = EntryKind> {
    use EntryKind::{BlockDevice, CharDevice, Directory, Fifo, Hardlink, Regular, Symlink};
    prop::sample::select(vec![Regular, Regular, Directory, Directory, Symlink, Hardlink, CharDevice, BlockDevice, Fifo])
}

/// Extended attributes, possible ones and others.
fn pax() -> impl Strategy<Value = Vec<PaxRecord>> {
    let names = ["user.a", "user.", "user.overlay.opaque", "trusted.overlay.metacopy", "trusted.t", "security.selinux"];
    let more =
        ["system.posix_acl_access", "system.posix_acl_default", "system.other", "other", "user.long", "user.n\0"];
    let name = prop::sample::select([&names[..], &more].concat());
    let long = vec![7; 3000];
    let values = [&b""[..], b"y", b"value", b"\x02\0\0\0", LIST, &LIST[..20], &long].map(<[u8]>::to_vec);
    let value = prop_oneof![prop::sample::select(values.to_vec()), prop::collection::vec(any::<u8>(), 0..40)];
    prop::collection::btree_map(name, value, 0..5).prop_map(|all| {
        let record = |(name, value): (&str, Vec<u8>)| PaxRecord {
            key: format!("SCHILY.xattr.{name}").into_bytes().into(),
            value: value.into(),
        };
        all.into_iter().map(record).collect()
    })
}

/// An entry without a place in the layer yet: its size and whether it is sparse are given later.
fn entry() -> impl Strategy<Value = Entry> {
    let time =
        (any::<i64>(), 0..1_000_000_000_u32).prop_map(|(seconds, nanoseconds)| Timestamp { seconds, nanoseconds });
    let device = prop_oneof![Just((0, 0)), (0..5000_i64, 0..2_000_000_i64)];
    let link = prop_oneof![4 => path(), 1 => (1..4096_usize).prop_map(|length| vec![b't'; length])];
    let size = prop_oneof![Just(0), Just(512), 1..5000_u64, 1..1_000_000_u64];
    let numbers = (any::<u32>(), any::<u32>(), any::<i64>(), size);
    (path(), kind(), link, prop::option::of(time), pax(), device, numbers).prop_map(
        |(name, kind, link, modified, pax, (device_major, device_minor), (uid, gid, mode, size))| Entry {
            name: name.into(),
            link: link.into(),
            user_name: [].into(),
            group_name: [].into(),
            header_offset: 0,
            data_offset: 0,
            size: if kind == EntryKind::Regular { size } else { 0 },
            mode,
            modified,
            uid,
            gid,
            kind,
            extra: Some(Box::new(Extra { device_major, device_minor, pax: pax.into(), sparse: None })),
        },
    )
}

/// Entries one after the other in a layer, mostly aligned as a tar's are; some files are sparse. Gives the layer's size.
pub(super) fn layer() -> impl Strategy<Value = (Vec<Entry>, u64)> {
    let one = (entry(), prop::option::weighted(0.2, 1..200_u64), prop::bool::weighted(0.1));
    prop::collection::vec(one, 0..30).prop_map(|list| {
        let mut at = 0;
        let mut entries = Vec::new();
        for (mut entry, hole, is_odd) in list {
            entry.header_offset = at;
            entry.data_offset = at + 512 + u64::from(is_odd);
            let stored = entry.size;
            if let (Some(blocks), EntryKind::Regular, Some(extra)) = (hole, entry.kind, &mut entry.extra) {
                // A hole, and all that is stored.
                entry.size += blocks * 512;
                let piece = Piece { file_offset: blocks * 512, data_offset: entry.data_offset, length: stored };
                extra.sparse = Some([piece].into());
            }
            at = (entry.data_offset + stored).next_multiple_of(512);
            entries.push(entry);
        }
        (entries, at + 1024)
    })
}

pub(super) fn config(cases: u32) -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(cases);
    ProptestConfig { cases, failure_persistence: None, max_shrink_iters: 2000, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(config(200))]

    /// Any layer's image says what its tree says: names, attributes, links, blocks; and is the same each time.
    #[test]
    fn any_layer_is_written_and_read((entries, size) in layer(), overlay in any::<bool>()) {
        let opaque = overlay.then_some(OPAQUE);
        let (image, _) = checked_layer(&entries, size, opaque);
        prop_assert_eq!(checked_layer(&entries, size, opaque).0, image);
    }

    /// The same of several layers merged into one tree, each with a device.
    #[test]
    fn any_merged_tree_is_written_and_read(layers in prop::collection::vec(layer(), 0..4)) {
        let trees: Vec<Tree> = layers.iter().map(|(entries, _)| Tree::of_layer(entries).unwrap()).collect();
        let merged = merge(&trees.iter().collect::<Vec<_>>()).unwrap();
        let maps: Vec<DeviceMap> =
            layers.iter().map(|(entries, size)| DeviceMap::of_layer(entries, *size).unwrap()).collect();
        let layers: Vec<Layer<'_>> =
            layers.iter().zip(&maps).map(|((entries, _), device)| Layer { entries, device }).collect();
        let _ = checked(&merged, &layers, None);
    }

    /// The reader sees damage wherever it is.
    #[test]
    fn damage_is_seen((entries, size) in layer(), at in any::<prop::sample::Index>(), bit in 0..8) {
        let (mut image, _) = checked_layer(&entries, size, None);
        let at = at.index(image.len());
        image[at] ^= 1_u8 << bit;
        let tree = Tree::of_layer(&entries).unwrap();
        let device = DeviceMap::of_layer(&entries, size).unwrap();
        let layer = Layer { entries: &entries, device: &device };
        // What can change without a contradiction is a value, and is then shown as another one.
        let seen = std::panic::catch_unwind(|| compare(&tree, &[layer], None, &read(&image).unwrap())).is_err();
        prop_assert!(seen || is_own_number(at), "byte {at}");
    }
}

/// Whether a byte may be part of an inode's own number, which nothing depends on. Inodes begin at multiples of 32.
fn is_own_number(at: usize) -> bool {
    at >= 1536 && (20..24).contains(&(at % 32))
}

/// A file of this name with these extended attributes.
fn with_xattrs(name: &str, xattrs: impl Iterator<Item = (String, Vec<u8>)>) -> Entry {
    let record = |(name, value): (String, Vec<u8>)| PaxRecord {
        key: format!("SCHILY.xattr.{name}").into_bytes().into(),
        value: value.into(),
    };
    let extra = Extra { pax: xattrs.map(record).collect(), ..Extra::default() };
    Entry {
        name: name.as_bytes().into(),
        link: [].into(),
        user_name: [].into(),
        group_name: [].into(),
        header_offset: 0,
        data_offset: 0,
        size: 0,
        mode: 0o644,
        modified: None,
        uid: 0,
        gid: 0,
        kind: EntryKind::Regular,
        extra: Some(Box::new(extra)),
    }
}

/// More attributes than can be shared, longer ones than the format has, and more than a file has room for.
#[test]
fn many_and_long_attributes() {
    let many = |_: u8| (0..300).map(|number| (format!("user.{number:03}"), vec![7; 5]));
    let _ = checked_layer(&[with_xattrs("a", many(0)), with_xattrs("b", many(1))], 0, None);
    let long = [65_535, 65_536].map(|length| (format!("user.{length}"), vec![1; length]));
    let long = [with_xattrs("a", long.into_iter())];
    let tree = Tree::of_layer(&long).unwrap();
    let device = DeviceMap::of_layer(&long, 0).unwrap();
    assert_eq!(checked(&tree, &[Layer { entries: &long, device: &device }], None).1.xattrs_left_out, 1);
    // 255 of them shared, and what fits into 262,148 bytes.
    let entries = [with_xattrs("a", (0..400).map(|number| (format!("user.{number:03}"), vec![1; 3000])))];
    let tree = Tree::of_layer(&entries).unwrap();
    let device = DeviceMap::of_layer(&entries, 0).unwrap();
    let mut image = Vec::new();
    let summary = write(&tree, &[Layer { entries: &entries, device: &device }], None, &mut image).unwrap();
    let image = read(&image).unwrap();
    let found = image.inodes.values().map(|inode| inode.xattrs.len()).sum::<usize>();
    assert_eq!((found, summary.xattrs_left_out), (341, 59));
}

/// All golden layers that can be indexed.
#[test]
fn golden_layers_are_written_and_read() {
    let (mut layers, mut plain) = (0, 0);
    for case in cases() {
        let Ok((indexed, _)) = index(&case.layer, case.compression, 65_536) else { continue };
        let (entries, size) = (&indexed.index.entries, indexed.index.uncompressed_size);
        // Sizes that no tar of this length can have.
        if DeviceMap::of_layer(entries, size).is_err() {
            continue;
        }
        let (_, map) = checked_layer(entries, size, Some(OPAQUE));
        layers += 1;
        plain += u32::from(map.is_plain());
    }
    assert!(layers > 100 && plain + 8 > layers, "{plain} of {layers} layers are plain");
}

/// What erofs-utils says of images with everything in them.
#[test]
fn fsck_has_no_complaint() {
    if Command::new("fsck.erofs").arg("--version").output().is_err() {
        eprintln!("SKIPPED: needs fsck.erofs and dump.erofs (erofs-utils)");
        return;
    }
    let work = tempfile::tempdir().unwrap();
    let (image, device) = (work.path().join("image"), work.path().join("device"));
    let option = format!("--device={}", device.display());
    let run = |program: &str, more: &[&str]| {
        let output = Command::new(program).args(more).arg(&option).arg(&image).output().unwrap();
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        (output.status.success(), said)
    };
    let mut checked = 0;
    for case in cases() {
        let Ok((indexed, tar)) = index(&case.layer, case.compression, 65_536) else { continue };
        let (entries, size) = (&indexed.index.entries, indexed.index.uncompressed_size);
        let (mut bytes, map) = checked_layer(entries, size, Some(OPAQUE));
        // Up to 1.8 it dies of a checksum over blocks of less than 1024 bytes; the kernel judges that.
        bytes[1024 + 8] &= !1;
        fs::write(&image, &bytes).unwrap();
        soci_tests::erofs_mount::write_device(&device, &map, entries, &tar).unwrap();
        let (_, said) = run("dump.erofs", &["-s"]);
        // Debian 12 has 1.5, which knows blocks of 4096 bytes alone.
        if said.contains("blksize 512 isn't supported") {
            eprintln!("SKIPPED: this fsck.erofs knows no blocks of 512 bytes; 1.8 does");
            return;
        }
        for (program, arguments) in [("fsck.erofs", &["--extract"][..]), ("dump.erofs", &["-s"])] {
            let (is_well, said) = run(program, arguments);
            assert!(is_well, "{}: {program}: {said}", case.name);
        }
        checked += 1;
    }
    assert!(checked > 100, "only {checked} layers");
}
