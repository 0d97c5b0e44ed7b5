//! Trees of layers, from little scripts and from random ones.

use std::collections::BTreeMap;

use proptest::prelude::*;
use soci_index::format::entry::{Entry, EntryKind};

use super::*;

/// A made-up entry; `number` distinguishes entries of one name.
pub(crate) fn entry(name: &str, kind: EntryKind, link: &str, number: u32) -> Entry {
    Entry {
        name: name.as_bytes().into(),
        link: link.as_bytes().into(),
        user_name: [].into(),
        group_name: [].into(),
        header_offset: u64::from(number) * 512,
        data_offset: u64::from(number) * 512 + 512,
        size: 0,
        mode: 0o644,
        modified: None,
        uid: number,
        gid: 0,
        kind,
        extra: None,
    }
}

/// Entries from a short script: `f NAME`, `d NAME`, `s NAME TARGET`, `h NAME TARGET`, `c NAME`, separated by `;`.
pub(crate) fn script(text: &str) -> Vec<Entry> {
    let lines = text.split(';').map(str::trim).filter(|line| !line.is_empty());
    let parse = |(number, line): (usize, &str)| {
        let mut words = line.split(' ');
        let kind = match words.next() {
            Some("f") => EntryKind::Regular,
            Some("d") => EntryKind::Directory,
            Some("s") => EntryKind::Symlink,
            Some("h") => EntryKind::Hardlink,
            Some("c") => EntryKind::CharDevice,
            Some("p") => EntryKind::Fifo,
            other => panic!("{other:?} in {line}"),
        };
        let (name, link) = (words.next().unwrap(), words.next().unwrap_or(""));
        entry(name, kind, link, u32::try_from(number).unwrap())
    };
    lines.enumerate().map(parse).collect()
}

/// All paths of a tree with a letter for the kind and the number of the entry: `etc/a=f3`.
pub(crate) fn show(tree: &Tree) -> Vec<String> {
    let mut lines = Vec::new();
    walk(tree, NodeNumber::ROOT, "", &mut lines);
    lines
}

fn walk(tree: &Tree, directory: NodeNumber, path: &str, lines: &mut Vec<String>) {
    let letter = |node: &Node| match node.kind() {
        NodeKind::Directory if node.is_opaque() => 'o',
        NodeKind::Directory => 'd',
        NodeKind::Regular => 'f',
        NodeKind::Symlink => 's',
        NodeKind::CharDevice => 'c',
        NodeKind::BlockDevice => 'b',
        NodeKind::Fifo => 'p',
        NodeKind::Whiteout => 'w',
        NodeKind::ForeignLink => 'x',
    };
    for (_, Child { name, node }) in tree.children(directory, 0) {
        let path = format!("{path}{}", name.escape_ascii());
        let found = tree.node(node).unwrap();
        let entry = found.entry().map_or(String::new(), |entry| entry.to_string());
        lines.push(format!("{path}={}{entry}", letter(found)));
        assert_eq!(tree.lookup(directory, name), Some(node));
        walk(tree, node, &format!("{path}/"), lines);
    }
}

#[track_caller]
fn check(text: &str, expected: &str) {
    let tree = Tree::of_layer(&script(text)).unwrap();
    assert_eq!(show(&tree).join(" "), expected, "{text}");
}

/// Layers of AUFS keep files with several names inside of a mark.
#[test]
fn hard_links_into_marks() {
    check("d .wh..wh.plnk; f .wh..wh.plnk/9.1; h a .wh..wh.plnk/9.1; h d/b /.wh..wh.plnk/9.1", "a=f1 d=d d/b=f1");
    check("f a; h .wh..wh.plnk/9.1 a; h b ./.wh..wh.plnk/9.1", "a=f0 b=f0");
    check("f .wh..wh.plnk/1; h .wh..wh.plnk/2 .wh..wh.plnk/1; h a .wh..wh.plnk/2", "a=f0");
    check("f d/.wh..wh.x; h a d/.wh..wh.x", "a=f0");
    check("h a .wh..wh.plnk/none", "");
    check("d .wh..wh.plnk/d; h a .wh..wh.plnk/d; s .wh..wh.plnk/s t; h b .wh..wh.plnk/s", "");
    let tree = Tree::of_layer(&script("f .wh..wh.plnk/1; h a .wh..wh.plnk/1; h b .wh..wh.plnk/1")).unwrap();
    assert_eq!(tree.find(b"a"), tree.find(b"b"));
    assert_eq!(tree.node(tree.find(b"a").unwrap()).unwrap().links(), 2);
}

/// Mode, owner and time of a file are those of the hard link that was extracted last.
#[test]
fn headers_of_hard_links() {
    for (text, expected) in
        [("f a", 0), ("f a; h b a", 1), ("f a; h b a; h c b", 2), ("f a; h b a; f a", 2), ("f a; f b; h a b; h c b", 3)]
    {
        let tree = Tree::of_layer(&script(text)).unwrap();
        let header = tree.header(tree.find(b"a").unwrap());
        assert_eq!(header, Some(Header { layer: 0, entry: expected }), "{text}");
    }
}

#[test]
fn names_are_cleaned_and_parents_implied() {
    check("f a/b/c; d a/b", "a=d a/b=d1 a/b/c=f0");
    check(
        "d ./; f ./x; f .//y; f /z; f a/../../up; f a/b/../c; f ../../o; f ..y",
        "..y=f7 a=d a/c=f5 o=f6 up=f4 x=f1 y=f2 z=f3",
    );
    check("d ..; d a/b/../c; d a/..", "a=d a/c=d1");
    let root = Tree::of_layer(&script("d ..; d a/..; f .")).unwrap();
    assert_eq!(root.nodes()[0].entry(), Some(1));
    assert_eq!(root.skipped(), [Skipped { entry: 2, reason: SkipReason::Root }]);
}

#[test]
fn later_entries_replace_earlier_ones() {
    check("f a; f a", "a=f1");
    check("d a; f a/x; d a", "a=d2 a/x=f1");
    check("f a; d a; f a/x", "a=d1 a/x=f2");
    check("d a; f a/x; f a", "a=f2");
    check("d a; f a/x; s a t; d a; f a/y", "a=d3 a/y=f4");
    check("s a dir; d a; f a/x", "a=d1 a/x=f2");
    check("d a; f a/x; f a; d a", "a=d3");
}

#[test]
fn paths_through_links_and_files() {
    check("s esc ../../..; f esc/through; f after", "after=f2 esc=s0 through=f1");
    check("d usr/lib; s lib usr/lib; f lib/x; f lib/y", "lib=s1 usr=d usr/lib=d0 usr/lib/x=f2 usr/lib/y=f3");
    check("s l /nowhere/deep; f l/x", "l=s0 nowhere=d nowhere/deep=d nowhere/deep/x=f1");
    check("d a; s a/up ..; f a/up/x", "a=d0 a/up=s1 x=f2");
    check("s a b; s b a; f a/x", "a=s0 b=s1");
    check("f a; f a/x; f b", "a=f0 b=f2");
    let tree = Tree::of_layer(&script("s a b; s b a; f a/x; f f; f f/x")).unwrap();
    let reasons: Vec<_> = tree.skipped().iter().map(|skipped| (skipped.entry, skipped.reason)).collect();
    assert_eq!(reasons, [(2, SkipReason::LinkLoop), (4, SkipReason::ParentNotDirectory)]);
}

#[test]
fn hard_links() {
    check("f a; h b a; h c ./a; h d/e /c", "a=f0 b=f0 c=f0 d=d d/e=f0");
    check("f a; h b a; f a; h c a", "a=f2 b=f0 c=f2");
    check("f a; h a a", "a=f0");
    check("s s f; h t s; c c; h u c; p p; h v p", "c=c2 p=p4 s=s0 t=s0 u=c2 v=p4");
    // Missing, later, itself, rings, directories, own parent: left out, as by GNU tar.
    check("h b a; f a", "a=f1");
    check("h self self; h r1 r2; h r2 r1; f y", "y=f3");
    check("d d; f d/x; h to-dir d; h d/up d", "d=d0 d/x=f1");
    check("f etc/p; h in ../../etc/p; h no ../../etc/q", "etc=d etc/p=f0 in=f0");
    // Through a link among the parents, and in the place of what is there.
    check("d u; s l u; f u/a; h b l/a; d b; h b u/a", "b=f2 l=s1 u=d0 u/a=f2");
    let tree = Tree::of_layer(&script("f a; h b a; h c/d a; d c/s")).unwrap();
    let links = |path: &str| tree.node(tree.find(path.as_bytes()).unwrap()).unwrap().links();
    assert_eq!(tree.find(b"a"), tree.find(b"c/d"));
    assert_eq!((links("a"), links("c"), links("c/s"), links("")), (3, 3, 2, 3));
}

#[test]
fn whiteouts_stand_as_recorded() {
    check("d etc; f etc/.wh.gone; f etc/.wh.same; f etc/same", "etc=d0 etc/gone=w etc/same=f3");
    check("d o; f o/.wh..wh..opq; f o/new; f n/.wh..wh..opq", "n=o o=o0 o/new=f2");
    check("d d; f .wh.d; f .wh.e; d e", "d=o0 e=o3");
    check("f .wh.x; f x; d x; f .wh.y; f y", "x=o2 y=f4");
    check("d .wh.a; s .wh.b t; h .wh.c q; f .wh..opq", ".opq=w a=w b=w c=w");
    check("f .wh.; f .wh..; f .wh...; f .wh..wh.; f .wh..wh.aufs; d .wh..wh.plnk; f .wh..wh.plnk/1.2; f .wh.z/in", "");
    check("c c; f .whx; f a.wh.b; f wh./x", ".whx=f1 a.wh.b=f2 c=c0 wh.=d wh./x=f3");
}

#[test]
fn impossible_names_are_left_out() {
    let long = "n".repeat(256);
    let tree =
        Tree::of_layer(&script(&format!("f {long}; f {long}/x; f ok; s e ; f a/{long}; f a/b; f a/{long}"))).unwrap();
    assert_eq!(show(&tree), ["a=d", "a/b=f5", "ok=f2"]);
    assert_eq!(tree.skipped().len(), 5);
}

/// A name alphabet small enough that things collide.
fn path() -> impl Strategy<Value = String> {
    let component = prop::sample::select(vec!["a", "b", "c", "..", ".", "", "l", ".wh.a", ".wh..wh..opq"]);
    prop::collection::vec(component, 1..5).prop_map(|parts| parts.join("/"))
}

fn entries() -> impl Strategy<Value = Vec<Entry>> {
    let kind = prop::sample::select(vec![
        EntryKind::Regular,
        EntryKind::Directory,
        EntryKind::Directory,
        EntryKind::Symlink,
        EntryKind::Hardlink,
        EntryKind::Fifo,
    ]);
    prop::collection::vec((path(), kind, path()), 0..30).prop_map(|list| {
        (0..).zip(list).map(|(number, (name, kind, link))| entry(&name, kind, &link, number)).collect()
    })
}

/// The model: a map from full path to what is there, with no symbolic links among the parents.
fn model(entries: &[Entry]) -> BTreeMap<String, (EntryKind, Option<u32>)> {
    let mut files: BTreeMap<String, (EntryKind, Option<u32>)> = BTreeMap::new();
    for (number, entry) in (0..).zip(entries) {
        let parts: Vec<String> =
            name::components(&entry.name).iter().map(|part| String::from_utf8_lossy(part).into_owned()).collect();
        let full = parts.join("/");
        let parents: Vec<String> = (1..parts.len()).map(|end| parts[..end].join("/")).collect();
        if parts.is_empty()
            || parents.iter().any(|parent| files.get(parent).is_some_and(|file| file.0 != EntryKind::Directory))
        {
            continue;
        }
        for parent in parents {
            files.entry(parent).or_insert((EntryKind::Directory, None));
        }
        let below = format!("{full}/");
        let was_directory = files.get(&full).is_some_and(|file| file.0 == EntryKind::Directory);
        if !(was_directory && entry.kind == EntryKind::Directory) {
            files.retain(|path, _| !path.starts_with(&below));
        }
        files.insert(full, (entry.kind, Some(number)));
    }
    files
}

proptest! {
    /// Any list of entries gives a tree that keeps its invariants, always the same one.
    #[test]
    fn any_entries_give_a_sound_tree(entries in entries()) {
        let tree = Tree::of_layer(&entries).unwrap();
        prop_assert_eq!(&Tree::of_layer(&entries).unwrap(), &tree);
        prop_assert_eq!(tree.nodes()[0].kind(), NodeKind::Directory);
        let mut named = vec![0_u32; tree.len()];
        for number in (0..).take(tree.len()).map(NodeNumber) {
            let node = tree.node(number).unwrap();
            let children: Vec<_> = tree.all_children(number).collect();
            prop_assert!(children.is_empty() || node.kind() == NodeKind::Directory);
            prop_assert!(children.windows(2).all(|pair| pair[0].name < pair[1].name));
            for child in children {
                prop_assert!(name::is_valid(child.name) && !child.name.contains(&b'/'));
                prop_assert!(child.name != b"." && child.name != b".." && !child.name.starts_with(b".wh."));
                // Directories in breadth-first order have larger numbers than their parents: no cycles.
                prop_assert!(tree.node(child.node).unwrap().kind() != NodeKind::Directory || child.node > number);
                named[child.node.0 as usize] += 1;
            }
        }
        for (node, names) in tree.nodes().iter().zip(named).skip(1) {
            prop_assert!(names >= 1);
            prop_assert!(node.kind() == NodeKind::Directory || node.links() == names);
        }
    }

    /// Without links and marks, the tree is the map that applying the entries one by one gives.
    #[test]
    fn tree_equals_the_map_model(entries in entries()) {
        let plain = |entry: &Entry| !matches!(entry.kind, EntryKind::Symlink | EntryKind::Hardlink) && !entry.name.windows(4).any(|part| part == b".wh.");
        let entries: Vec<Entry> = entries.into_iter().filter(plain).collect();
        let tree = Tree::of_layer(&entries).unwrap();
        let mut expected: Vec<String> = model(&entries).into_iter().map(|(path, (kind, number))| {
            let letter = match kind { EntryKind::Directory => 'd', EntryKind::Fifo => 'p', _ => 'f' };
            format!("{path}={letter}{}", number.map_or(String::new(), |number: u32| number.to_string()))
        }).collect();
        expected.sort();
        let mut found = show(&tree);
        found.sort();
        prop_assert_eq!(found, expected);
    }
}
