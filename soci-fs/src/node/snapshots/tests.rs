//! The store of snapshots as its callers see it.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tempfile::TempDir;

use super::provider::LayerProvider;
use super::provider::none::NoLayers;
use super::*;

/// A root with snapshots that can be closed and opened again.
pub(super) struct Node {
    pub(super) root: TempDir,
}

impl Node {
    pub(super) fn new() -> Self {
        Self { root: tempfile::tempdir().unwrap() }
    }

    fn open(&self) -> Snapshots {
        self.open_with(Arc::new(NoLayers::new(self.root.path().join("fs"))))
    }

    pub(super) fn open_with(&self, provider: Arc<dyn LayerProvider>) -> Snapshots {
        Snapshots::open(self.root.path(), SnapshotOptions::default(), provider).unwrap()
    }

    fn directory(&self) -> PathBuf {
        self.root.path().join("snapshotter/snapshots")
    }

    /// Names of the snapshot directories.
    fn directories(&self) -> BTreeSet<String> {
        let entries = fs::read_dir(self.directory()).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

pub(super) fn none() -> Labels {
    Labels::new()
}

pub(super) fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

fn set<const N: usize>(names: [&str; N]) -> BTreeSet<String> {
    names.map(str::to_owned).into()
}

/// Prepares and commits one snapshot with a file in it.
pub(super) fn committed(snapshots: &Snapshots, name: &str, parent: &str) {
    let key = format!("{name}-active");
    let mounts = snapshots.prepare(&key, parent, none()).unwrap();
    fs::write(upper(&mounts).join(name), name).unwrap();
    snapshots.commit(name, &key, none(), "").unwrap();
}

fn upper(mounts: &[Mount]) -> PathBuf {
    let [mount] = mounts else { panic!("{mounts:?}") };
    let upper = mount.options.iter().find_map(|option| option.strip_prefix("upperdir="));
    upper.map_or_else(|| mount.source.clone().into(), PathBuf::from)
}

fn mode(path: &Path) -> u32 {
    path.metadata().unwrap().permissions().mode() & 0o7777
}

#[test]
fn a_life() {
    let node = Node::new();
    let snapshots = node.open();
    committed(&snapshots, "base", "");
    let mounts = snapshots.prepare("key", "base", labels(&[("a", "1"), ("empty", "")])).unwrap();
    let top = node.directory();
    let expected = ["workdir=", "upperdir=", "lowerdir="].map(str::to_owned);
    let path = |part: &str| top.join(part).display().to_string();
    let expected: Vec<String> = expected
        .iter()
        .zip([path("2/work"), path("2/fs"), path("1/fs")])
        .map(|(option, path)| option.clone() + &path)
        .collect();
    assert_eq!(mounts, [Mount { kind: "overlay", source: "overlay".into(), options: expected }]);
    assert_eq!(snapshots.mounts("key").unwrap(), mounts);
    let active = snapshots.stat("key").unwrap();
    assert_eq!(
        (active.kind, active.parent.as_deref(), &active.labels),
        (Kind::Active, Some("base"), &labels(&[("a", "1")]))
    );
    assert_eq!(active.created, active.updated);

    snapshots.commit("top", "key", labels(&[("b", "2")]), "base").unwrap();
    let info = snapshots.stat("top").unwrap();
    assert_eq!(
        (info.kind, info.parent.as_deref(), &info.labels),
        (Kind::Committed, Some("base"), &labels(&[("b", "2")]))
    );
    assert!(info.created == info.updated && info.created > active.created, "{info:?}");
    assert!(matches!(snapshots.stat("key"), Err(SnapshotError::NotFound { .. })));
    assert!(matches!(snapshots.mounts("top"), Err(SnapshotError::NotMountable { .. })));

    let view = snapshots.view("view", "top", none()).unwrap();
    let lower = format!("lowerdir={}:{}", path("2/fs"), path("1/fs"));
    assert_eq!(view, [Mount { kind: "overlay", source: "overlay".into(), options: vec![lower] }]);
    assert_eq!(snapshots.usage("view").unwrap(), Usage::default());
    assert!(matches!(snapshots.remove("top"), Err(SnapshotError::HasChildren { child, .. }) if child == "view"));
    for key in ["view", "top", "base"] {
        snapshots.remove(key).unwrap();
    }
    assert!(snapshots.list(&[]).unwrap().is_empty());
    assert_eq!(node.directories(), set(["1", "2", "3"]));
    snapshots.cleanup().unwrap();
    assert_eq!(node.directories(), set([]));
    // A key is free at once, a number never again.
    committed(&snapshots, "base", "");
    assert_eq!(node.directories(), set(["4"]));
}

#[test]
fn refusals() {
    let node = Node::new();
    let snapshots = node.open();
    committed(&snapshots, "base", "");
    committed(&snapshots, "other", "");
    snapshots.prepare("active", "base", none()).unwrap();
    snapshots.view("view", "base", none()).unwrap();
    let before = node.directories();
    for (what, result) in [
        ("NoKey", snapshots.prepare("", "", none()).map(drop)),
        ("Exists", snapshots.prepare("active", "", none()).map(drop)),
        ("Exists", snapshots.view("base", "", none()).map(drop)),
        ("NotFound", snapshots.prepare("new", "absent", none()).map(drop)),
        ("ParentNotCommitted", snapshots.prepare("new", "active", none()).map(drop)),
        ("ParentNotCommitted", snapshots.view("new", "view", none()).map(drop)),
        ("LabelTooLong", snapshots.prepare("new", "base", labels(&[("k", &"v".repeat(4096))])).map(drop)),
        ("NoKey", snapshots.commit("", "active", none(), "")),
        ("Exists", snapshots.commit("base", "active", none(), "")),
        ("NotFound", snapshots.commit("new", "absent", none(), "")),
        ("NotActive", snapshots.commit("new", "view", none(), "")),
        ("NotActive", snapshots.commit("new", "base", none(), "")),
        ("ParentChanged", snapshots.commit("new", "active", none(), "other")),
        ("LabelTooLong", snapshots.commit("new", "active", labels(&[("k", &"v".repeat(4096))]), "")),
        ("HasChildren", snapshots.remove("base")),
        ("NotFound", snapshots.remove("absent")),
        ("NotFound", snapshots.stat("absent").map(drop)),
        ("NotFound", snapshots.mounts("absent").map(drop)),
        ("NotFound", snapshots.usage("absent").map(drop)),
        ("NotFound", snapshots.update("absent", &none(), &[]).map(drop)),
        ("Unchangeable", snapshots.update("base", &none(), &["parent".to_owned()]).map(drop)),
        ("Filter", snapshots.list(&["kind=".to_owned()]).map(drop)),
    ] {
        let error = format!("{:?}", result.expect_err(what));
        assert!(error.starts_with(what), "{what}: {error}");
    }
    assert_eq!(node.directories(), before, "a refused call leaves nothing");
}

#[test]
fn a_commit_can_bring_the_parent() {
    let node = Node::new();
    let snapshots = node.open();
    committed(&snapshots, "base", "");
    for key in ["one", "two", "three"] {
        snapshots.prepare(key, "", none()).unwrap();
    }
    snapshots.commit("top", "one", none(), "base").unwrap();
    assert_eq!(snapshots.stat("top").unwrap().parent.as_deref(), Some("base"));
    assert!(matches!(snapshots.remove("base"), Err(SnapshotError::HasChildren { .. })));
    assert!(matches!(snapshots.commit("x", "two", none(), "absent"), Err(SnapshotError::NotFound { .. })));
    assert!(matches!(snapshots.commit("x", "two", none(), "three"), Err(SnapshotError::ParentNotCommitted { .. })));
    assert!(snapshots.stat("two").is_ok(), "a refused commit changes nothing");
}

#[test]
fn directories_have_the_right_modes_and_owners() {
    let node = Node::new();
    let snapshots = node.open();
    let mounts = snapshots.prepare("base-active", "", none()).unwrap();
    assert_eq!((mounts[0].kind, mounts[0].options.join(",")), ("bind", "rw,rbind".to_owned()));
    let files = upper(&mounts);
    let work = files.with_file_name("work");
    assert_eq!((mode(&node.directory()), mode(&files), mode(&work)), (0o700, 0o755, 0o711));
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED in part: giving files away needs root");
        return;
    }
    chown(&files, Some(1234), Some(4321)).unwrap();
    snapshots.commit("base", "base-active", none(), "").unwrap();
    let metadata = upper(&snapshots.prepare("key", "base", none()).unwrap()).metadata().unwrap();
    assert_eq!((metadata.uid(), metadata.gid()), (1234, 4321));
}

#[test]
fn usage_is_kept_at_the_commit() {
    let node = Node::new();
    let snapshots = node.open();
    let files = upper(&snapshots.prepare("key", "", none()).unwrap());
    let empty = snapshots.usage("key").unwrap();
    fs::write(files.join("file"), vec![1; 100_000]).unwrap();
    let full = snapshots.usage("key").unwrap();
    assert!(full.bytes >= empty.bytes + 100_000 && full.inodes == empty.inodes + 1, "{empty:?} {full:?}");
    snapshots.commit("name", "key", none(), "").unwrap();
    fs::write(files.join("another"), "not measured any more").unwrap();
    assert_eq!(snapshots.usage("name").unwrap(), full);
}

#[test]
fn an_update_changes_labels_and_the_time() {
    let node = Node::new();
    let snapshots = node.open();
    committed(&snapshots, "base", "");
    let before = snapshots.stat("base").unwrap();
    let given = labels(&[("a", "1"), ("b", "2")]);
    let after = snapshots.update("base", &given, &["labels.a".to_owned()]).unwrap();
    assert_eq!((&after.labels, after.created), (&labels(&[("a", "1")]), before.created));
    assert!(after.updated > before.updated);
    assert_eq!(snapshots.stat("base").unwrap(), after);
    assert_eq!(snapshots.update("base", &given, &[]).unwrap().labels, given);
}

#[test]
fn a_listing_takes_what_any_filter_accepts() {
    let node = Node::new();
    let snapshots = node.open();
    committed(&snapshots, "base", "");
    committed(&snapshots, "top", "base");
    snapshots.view("view", "top", none()).unwrap();
    for (filters, expected) in [
        (&[][..], &["base", "top", "view"][..]),
        (&["kind==view", "parent==base"], &["top", "view"]),
        (&["kind==committed,parent==\"\""], &["base"]),
        (&["name==absent"], &[]),
    ] {
        let filters: Vec<String> = filters.iter().map(|text| (*text).to_owned()).collect();
        let found: Vec<String> = snapshots.list(&filters).unwrap().into_iter().map(|info| info.name).collect();
        assert_eq!(found, expected, "{filters:?}");
    }
}

#[test]
fn a_restart_changes_nothing_and_cleans_what_a_crash_left() {
    let node = Node::new();
    let snapshots = node.open();
    committed(&snapshots, "base", "");
    let mounts = snapshots.prepare("key", "base", none()).unwrap();
    fs::write(upper(&mounts).join("file"), "content").unwrap();
    snapshots.prepare("gone", "base", none()).unwrap();
    snapshots.remove("gone").unwrap();
    let before = snapshots.list(&[]).unwrap();
    drop(snapshots);
    // Killed between making a directory and its record, once before and once after it had its number, and in the middle
    // of a deletion.
    for leftover in ["new-0/fs", "9/fs/deep", "4/fs", "removed-7/fs"] {
        fs::create_dir_all(node.directory().join(leftover)).unwrap();
    }
    let snapshots = node.open();
    assert_eq!(snapshots.list(&[]).unwrap(), before);
    assert_eq!(snapshots.mounts("key").unwrap(), mounts);
    assert_eq!(fs::read_to_string(upper(&mounts).join("file")).unwrap(), "content");
    assert!(!node.directories().contains("new-0"));
    // The number of the directory that never had a record is given out, and its content is not taken over.
    fs::write(node.directory().join("4/fs/stale"), "").unwrap();
    let fresh = upper(&snapshots.prepare("fresh", "base", none()).unwrap());
    assert!(fresh.ends_with("4/fs") && fs::read_dir(&fresh).unwrap().next().is_none());
    snapshots.cleanup().unwrap();
    assert_eq!(node.directories(), set(["1", "2", "4"]));
}

#[test]
fn a_snapshot_without_files_says_so_and_harms_no_other() {
    let node = Node::new();
    let snapshots = node.open();
    committed(&snapshots, "base", "");
    committed(&snapshots, "well", "");
    snapshots.prepare("key", "base", none()).unwrap();
    drop(snapshots);
    fs::remove_dir_all(node.directory().join("1")).unwrap();
    let snapshots = node.open();
    for result in [snapshots.mounts("key"), snapshots.prepare("new", "base", none())] {
        let error = result.unwrap_err();
        assert!(matches!(&error, SnapshotError::Unavailable { key, .. } if key == "base"), "{error}");
    }
    snapshots.prepare("fine", "well", none()).unwrap();
    snapshots.remove("key").unwrap();
    snapshots.remove("base").unwrap();
}

/// What is on disk while a process is at work is what a killed one leaves.
#[test]
fn a_killed_process_loses_nothing_that_it_confirmed() {
    let (node, copy) = (Node::new(), Node::new());
    let snapshots = node.open();
    committed(&snapshots, "base", "");
    snapshots.prepare("key", "base", none()).unwrap();
    snapshots.update("key", &labels(&[("a", "1")]), &[]).unwrap();
    snapshots.remove("key").unwrap();
    snapshots.prepare("key", "base", none()).unwrap();
    let before = snapshots.list(&[]).unwrap();
    for id in ["1", "2", "3"] {
        fs::create_dir_all(copy.directory().join(id).join("fs")).unwrap();
    }
    let database = "snapshotter/soci.redb";
    fs::copy(node.root.path().join(database), copy.root.path().join(database)).unwrap();
    let survivor = copy.open();
    assert_eq!(survivor.list(&[]).unwrap(), before);
    assert!(survivor.mounts("key").is_ok());
    survivor.cleanup().unwrap();
    assert_eq!(copy.directories(), set(["1", "3"]));
    drop(snapshots);
}

/// Cleaning takes no directory away that a call is about to record.
#[test]
fn many_calls_at_once() {
    const CALLERS: usize = 4;
    const ROUNDS: usize = 40;

    let node = Node::new();
    let snapshots = node.open();
    committed(&snapshots, "base", "");
    std::thread::scope(|scope| {
        let cleaner = scope.spawn(|| (0..ROUNDS).try_for_each(|_| snapshots.cleanup()));
        for caller in 0..CALLERS {
            let snapshots = &snapshots;
            scope.spawn(move || {
                for round in 0..ROUNDS {
                    let name = format!("{caller}-{round}");
                    committed(snapshots, &name, "base");
                    let key = format!("{name}-container");
                    let mounts = snapshots.prepare(&key, &name, none()).unwrap();
                    assert_eq!(snapshots.mounts(&key).unwrap(), mounts);
                    if round % 2 == 0 {
                        snapshots.remove(&key).unwrap();
                        snapshots.remove(&name).unwrap();
                    }
                }
            });
        }
        cleaner.join().unwrap().unwrap();
    });
    snapshots.cleanup().unwrap();
    let expected = 1 + CALLERS * ROUNDS;
    assert_eq!((snapshots.list(&[]).unwrap().len(), node.directories().len()), (expected, expected));
    let ids: BTreeSet<PathBuf> = snapshots
        .list(&["kind==active".to_owned()])
        .unwrap()
        .iter()
        .map(|info| upper(&snapshots.mounts(&info.name).unwrap()))
        .collect();
    assert_eq!(ids.len(), CALLERS * ROUNDS / 2, "no two snapshots share a directory");
}

#[test]
fn a_full_disk_is_no_end() {
    use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

    struct Mounted(PathBuf);
    impl Drop for Mounted {
        fn drop(&mut self) {
            unmount(&self.0, UnmountFlags::DETACH).unwrap();
        }
    }

    let node = Node::new();
    if mount("tmpfs", node.root.path(), "tmpfs", MountFlags::empty(), Some(c"size=2m")).is_err() {
        eprintln!("SKIPPED: a small disk needs the right to mount one");
        return;
    }
    let _mounted = Mounted(node.root.path().to_owned());
    let snapshots = node.open();
    committed(&snapshots, "base", "");
    let ballast = node.root.path().join("ballast");
    // Fails when the disk is full, which is what is wanted.
    let _ = fs::write(&ballast, vec![1; 4 << 20]);
    let long = labels(&[("label", &"v".repeat(4000))]);
    let error = (0..2000).find_map(|number| snapshots.prepare(&format!("key-{number}"), "base", long.clone()).err());
    assert!(error.is_some(), "the disk was not full");
    let error = error.unwrap();
    assert!(matches!(error, SnapshotError::Database { .. } | SnapshotError::Io { .. }), "{error}");
    snapshots.stat("base").expect("reading goes on");
    fs::remove_file(&ballast).unwrap();
    snapshots.prepare("after", "base", none()).unwrap();
    committed(&snapshots, "another", "base");
    assert_eq!(snapshots.stat("another").unwrap().parent.as_deref(), Some("base"));
    drop(snapshots);
}

#[test]
fn a_database_of_a_later_program_is_left_alone() {
    let node = Node::new();
    drop(node.open());
    let path = node.root.path().join("snapshotter/soci.redb");
    let database = redb::Database::create(&path).unwrap();
    let transaction = database.begin_write().unwrap();
    let numbers = redb::TableDefinition::<&str, u64>::new("numbers");
    transaction.open_table(numbers).unwrap().insert("format", 2).unwrap();
    transaction.commit().unwrap();
    drop(database);
    let provider = Arc::new(NoLayers::new(node.root.path().join("fs")));
    let error = Snapshots::open(node.root.path(), SnapshotOptions::default(), provider).unwrap_err();
    assert!(matches!(error, SnapshotError::Format { found: 2, expected: 1, .. }), "{error}");
}

#[test]
fn one_process_per_root() {
    let node = Node::new();
    let first = node.open();
    let provider = Arc::new(NoLayers::new(node.root.path().join("fs")));
    let second = Snapshots::open(node.root.path(), SnapshotOptions::default(), provider);
    let error = second.unwrap_err().to_string();
    assert!(error.contains(&format!("in use by process {}", std::process::id())), "{error}");
    drop(first);
    node.open();
}

#[test]
fn a_root_that_mount_options_cannot_say_is_refused() {
    let top = tempfile::tempdir().unwrap();
    for name in ["a,b", "a:b", "a\\b"] {
        let root = top.path().join(name);
        let provider = Arc::new(NoLayers::new(root.join("fs")));
        let result = Snapshots::open(&root, SnapshotOptions::default(), provider);
        assert!(matches!(result, Err(SnapshotError::Root { .. })), "{name}");
        assert!(!root.exists());
    }
}
