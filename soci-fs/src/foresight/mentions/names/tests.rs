//! Layers by the names of their files, and what names lead to in them.

use super::*;
use crate::tree::tests::entry;

/// Layers of names; `->` makes a link.
fn layers(layers: &[&[&str]]) -> Vec<(Arc<Tree>, Arc<LayerIndex>)> {
    let layer = |names: &&[&str]| {
        let one = |name: &&str| match name.split_once("->") {
            Some((name, target)) => entry(name, EntryKind::Symlink, target, 0),
            None => entry(name, EntryKind::Regular, "", 0),
        };
        let entries: Vec<Entry> = names.iter().map(one).collect();
        let tree = Arc::new(Tree::of_layer(&entries).unwrap());
        let mut index = soci_index::indexing::index_bytes(
            &[0; 1024],
            soci_index::indexing::Options::of(soci_index::format::index::Compression::None),
        )
        .unwrap()
        .index;
        index.entries = entries;
        (tree, Arc::new(index))
    };
    layers.iter().map(layer).collect()
}

const BASE: &[&str] = &[
    "lib->usr/lib",
    "lib64->usr/lib64",
    "usr/lib64/ld-linux-x86-64.so.2->../lib/x86_64-linux-gnu/ld-2.36.so",
    "usr/lib/x86_64-linux-gnu/ld-2.36.so",
    "usr/lib/x86_64-linux-gnu/libm.so.6->libm-2.36.so",
    "usr/lib/x86_64-linux-gnu/libm-2.36.so",
    "usr/lib/loop.so->loop.so",
    "usr/bin/python3",
];
const PYTHON: &[&str] = &[
    "usr/lib/python3.11/os.py",
    "usr/lib/python3.11/__pycache__/os.cpython-311.pyc",
    "usr/lib/python3.11/__pycache__/os.cpython-311.opt-1.pyc",
    "usr/lib/python3.11/lib-dynload/_ssl.cpython-311-x86_64-linux-gnu.so",
    "usr/lib/python3.11/only.py",
    "usr/lib/python3.11/json/__init__.py",
    "usr/lib/python3.11/json/decoder.py",
    "usr/lib/python3.11/json/__pycache__/__init__.cpython-311.pyc",
];
const PACKAGES: &[&str] = &[
    "opt/site/big/__init__.py",
    "opt/site/big/sub/__init__.py",
    "opt/site/big/sub/_c.cpython-311-x86_64-linux-gnu.so",
    "opt/site/big/sub/other.py",
    "opt/site/big/up.py",
    "opt/site/big.libs/libblas-1.so",
];

#[test]
fn names_lead_to_files() {
    let layers = layers(&[BASE, PYTHON, PACKAGES]);
    let mut names = Names::of_layers(layers);
    let at = |names: &Names, path: &str| {
        let find = |(layer, index): (usize, &Arc<LayerIndex>)| {
            let entry = index.entries.iter().position(|entry| *entry.name == *path.as_bytes())?;
            Some(FileAt { layer, entry: u32::try_from(entry).unwrap() })
        };
        names.layers.iter().enumerate().find_map(find).unwrap_or_else(|| panic!("{path}"))
    };
    let path = |path: &str| Mention::Path(path.as_bytes().into());
    let module = |name: &str| Mention::Module(name.as_bytes().into());
    let library = |name: &str, directories: &[&str]| Mention::Library {
        name: name.as_bytes().into(),
        directories: directories.iter().map(|path| path.as_bytes().into()).collect(),
    };
    let extension = "opt/site/big/sub/_c.cpython-311-x86_64-linux-gnu.so";
    names.learn(at(&names, "usr/lib/python3.11/json/__pycache__/__init__.cpython-311.pyc"));
    assert_eq!(names.roots, [Box::from(b"usr/lib/python3.11".as_slice())]);
    for (from, mention, expected) in [
        ("usr/bin/python3", path("/lib64/ld-linux-x86-64.so.2"), vec!["usr/lib/x86_64-linux-gnu/ld-2.36.so"]),
        ("usr/bin/python3", path("/usr/lib/loop.so"), vec![]),
        ("usr/bin/python3", path("/usr/lib"), vec![]),
        ("usr/bin/python3", path("/"), vec![]),
        ("usr/bin/python3", library("libm.so.6", &[]), vec!["usr/lib/x86_64-linux-gnu/libm-2.36.so"]),
        ("usr/bin/python3", library("libnone.so", &["$ORIGIN"]), vec![]),
        (
            extension,
            library("libblas-1.so", &["/lib", "$ORIGIN/../../big.libs"]),
            vec!["opt/site/big.libs/libblas-1.so"],
        ),
        // Python's own.
        (
            "usr/lib/python3.11/os.py",
            module("json.decoder"),
            vec!["usr/lib/python3.11/json/__pycache__/__init__.cpython-311.pyc", "usr/lib/python3.11/json/decoder.py"],
        ),
        (
            "usr/lib/python3.11/__pycache__/os.cpython-311.pyc",
            module("_ssl"),
            vec!["usr/lib/python3.11/lib-dynload/_ssl.cpython-311-x86_64-linux-gnu.so"],
        ),
        (
            "usr/lib/python3.11/json/__init__.py",
            module("os"),
            vec!["usr/lib/python3.11/__pycache__/os.cpython-311.pyc"],
        ),
        // A package's: beside, above, from its root, from the other root.
        ("opt/site/big/sub/other.py", module("_c"), vec![extension]),
        ("opt/site/big/sub/other.py", module("up"), vec!["opt/site/big/up.py"]),
        (
            "opt/site/big/sub/other.py",
            module("big.sub._c"),
            vec!["opt/site/big/__init__.py", "opt/site/big/sub/__init__.py", extension],
        ),
        ("opt/site/big/up.py", module("only"), vec!["usr/lib/python3.11/only.py"]),
        ("opt/site/big/up.py", module("nothing.of.this"), vec![]),
    ] {
        let start = at(&names, from);
        let expected: Vec<FileAt> = expected.into_iter().map(|path| at(&names, path)).collect();
        assert_eq!(names.find(start, &mention).files, expected, "{from}: {mention:?}");
    }
}

#[test]
fn what_is_above_hides_what_is_below() {
    let all = layers(&[&["a/m.py", "a/x.py"], &["a/m.py"]]);
    let mut names = Names::of_layers(all.clone());
    let found = names.find(FileAt { layer: 0, entry: 1 }, &Mention::Module(b"m".as_slice().into()));
    assert_eq!(found.files, [FileAt { layer: 1, entry: 0 }]);
    assert!(names.find(FileAt { layer: 7, entry: 0 }, &Mention::Path(b"/a/m.py".as_slice().into())).files.is_empty());
    // The same as one tree.
    let merged = crate::tree::view::merge(&all.iter().map(|(tree, _)| &**tree).collect::<Vec<_>>()).unwrap();
    let mut names = Names::of_image(Arc::new(merged), all.into_iter().map(|(_, index)| index).collect());
    let found = names.find(FileAt { layer: 0, entry: 1 }, &Mention::Path(b"/a/m.py".as_slice().into()));
    assert_eq!(found.files, [FileAt { layer: 1, entry: 0 }]);
}

/// What led nowhere is looked for again when another root is known, and what is remembered is the same.
#[test]
fn another_root_is_asked_for_what_was_not_found() {
    let mut names = Names::of_layers(layers(&[&["a/x.py", "b/m.py", "b/n.py"]]));
    let (from, mention) = (FileAt { layer: 0, entry: 0 }, Mention::Module(b"n".as_slice().into()));
    assert!(names.find(from, &mention).files.is_empty());
    names.learn(FileAt { layer: 0, entry: 1 });
    let found = names.find(from, &mention);
    assert_eq!(found, Resolved { files: vec![FileAt { layer: 0, entry: 2 }], is_far: true });
    assert_eq!(names.find(from, &mention), found);
    // However many are looked for, what is remembered is bounded.
    for number in 0..=MODULES_MAX {
        names.find(from, &Mention::Module(format!("m{number}").into_bytes().into()));
        assert!(names.modules.values().map(HashMap::len).sum::<usize>() <= MODULES_MAX);
    }
    assert_eq!(names.find(from, &mention), found);
}
