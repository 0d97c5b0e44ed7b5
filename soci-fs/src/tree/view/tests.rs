//! Merged views, from little scripts and from random ones.

use std::collections::BTreeMap;

use proptest::prelude::*;
use soci_index::format::entry::{Entry, EntryKind};

use super::*;
use crate::tree::tests::{entry, script, show};

fn trees(layers: &[&str]) -> Vec<Tree> {
    layers.iter().map(|text| Tree::of_layer(&script(text)).unwrap()).collect()
}

/// Merges layers given as scripts and shows paths with the layer that each file comes from.
fn merged(layers: &[&str]) -> String {
    let trees = trees(layers);
    let view = merge(&trees.iter().collect::<Vec<_>>()).unwrap();
    let layer = |line: &String| {
        let path = line.split('=').next().unwrap();
        let node = view.node(view.find(path.as_bytes()).unwrap()).unwrap();
        format!("{line}@{}", node.layer())
    };
    show(&view).iter().map(layer).collect::<Vec<_>>().join(" ")
}

#[test]
fn upper_layers_win_and_directories_unite() {
    for (layers, expected) in [
        (&[][..], ""),
        (&["f a"], "a=f0@0"),
        (&["f a; f b", "f a"], "a=f0@1 b=f1@0"),
        (&["d d; f d/a", "d d; f d/b"], "d=d0@1 d/a=f1@0 d/b=f1@1"),
        // An implied directory keeps the lower one's metadata.
        (&["d d; f d/a", "f d/b"], "d=d0@0 d/a=f1@0 d/b=f0@1"),
        (&["f d", "f d/b"], "d=d@0 d/b=f0@1"),
        (&["d d; f d/a", "f d"], "d=f0@1"),
        (&["d d; f d/a", "f d", "d d; f d/c"], "d=d0@2 d/c=f1@2"),
        (&["s l t", "d l; f l/x"], "l=d0@1 l/x=f1@1"),
    ] {
        assert_eq!(merged(layers), expected, "{layers:?}");
    }
}

/// The topmost hard link to a file gives it mode, owner and time, in its own layer and from above.
#[test]
fn headers_of_hard_links() {
    for (layers, path, expected) in [
        (&["f a; h b a"][..], "a", (0, 1)),
        (&["f a; h b a", "f c"], "b", (0, 1)),
        (&["f x", "f a; h b a"], "a", (1, 1)),
        (&["f a", "f x; h b a"], "a", (1, 1)),
        (&["f a", "f x; h b a"], "b", (1, 1)),
        (&["f a", "h b a", "h c b; h d a"], "a", (2, 1)),
        (&["f a", "h b none"], "a", (0, 0)),
    ] {
        let trees = trees(layers);
        let view = merge(&trees.iter().collect::<Vec<_>>()).unwrap();
        let (layer, entry) = expected;
        assert_eq!(
            view.header(view.find(path.as_bytes()).unwrap()),
            Some(Header { layer, entry }),
            "{layers:?} {path}"
        );
    }
}

#[test]
fn whiteouts_hide_lower_layers_only() {
    for (layers, expected) in [
        (&["f a; f b", "f .wh.a"][..], "b=f1@0"),
        (&["d d; f d/a; f d/b", "f d/.wh.a"], "d=d0@0 d/b=f2@0"),
        (&["d d; f d/a", "f .wh.d"], ""),
        (&["d d; f d/a", "f .wh.d; d d; f d/n"], "d=d1@1 d/n=f2@1"),
        (&["d d; f d/a", "d d; f d/n; f .wh.d"], "d=d0@1 d/n=f1@1"),
        (&["d d; f d/a", "f d/.wh..wh..opq; f d/n"], "d=d0@0 d/n=f1@1"),
        (&["f a; d d", "f .wh..wh..opq; f n"], "n=f1@1"),
        (&["f a", "f .wh.a", "f a"], "a=f0@2"),
        (&["f .wh.x; f y"], "y=f1@0"),
        (&["d a/b; f a/b/c", "f a/.wh.b", "f a/b/d"], "a=d@0 a/b=d@0 a/b/d=f0@2"),
    ] {
        assert_eq!(merged(layers), expected, "{layers:?}");
    }
}

#[test]
fn hard_links_into_lower_layers() {
    for (layers, expected) in [
        (&["f a", "h b a"][..], "a=f0@0 b=f0@0"),
        (&["f a", "f .wh.a", "h b a"], ""),
        (&["f a", "h b a", "h c b; f .wh.a"], "b=f0@0 c=f0@0"),
        (&["d d; f d/a", "h x/y d/a"], "d=d0@0 d/a=f1@0 x=d@0 x/y=f1@0"),
        (&["d d", "h x d"], "d=d0@0"),
        (&["f y", "h y nothing"], "y=f0@0"),
        (&["f a", "h a a; f z"], "a=f0@0 z=f1@1"),
    ] {
        assert_eq!(merged(layers), expected, "{layers:?}");
    }
    let trees = trees(&["f a", "h b a"]);
    let view = merge(&[&trees[0], &trees[1]]).unwrap();
    assert_eq!(view.find(b"a"), view.find(b"b"));
    assert_eq!(view.node(view.find(b"a").unwrap()).unwrap().links(), 2);
}

/// Links that name each other through many layers are resolved in linear time, not by trying all chains.
#[test]
fn chains_of_missing_links_end_soon() {
    let trees: Vec<Tree> = (0..200).map(|_| Tree::of_layer(&script("h a a; h b a; h c b")).unwrap()).collect();
    assert_eq!(merge(&trees.iter().collect::<Vec<_>>()).unwrap().len(), 1);
}

fn layer() -> impl Strategy<Value = Vec<Entry>> {
    let component = prop::sample::select(vec!["a", "b", "c"]);
    let path = prop::collection::vec(component, 1..4);
    // 0 file, 1 directory, 2 white-out, 3 opaque mark
    prop::collection::vec((path, 0..4), 0..12).prop_map(|list| {
        let make = |(number, (path, what)): (u32, (Vec<&str>, i32))| {
            let name = path.join("/");
            let (last, parents) = path.split_last().unwrap();
            let marked = |mark: &str| parents.iter().copied().chain([mark]).collect::<Vec<_>>().join("/");
            match what {
                0 => entry(&name, EntryKind::Regular, "", number),
                1 => entry(&name, EntryKind::Directory, "", number),
                2 => entry(&marked(&format!(".wh.{last}")), EntryKind::Regular, "", number),
                _ => entry(&format!("{name}/.wh..wh..opq"), EntryKind::Regular, "", number),
            }
        };
        (0..).zip(list).map(make).collect()
    })
}

type Files = BTreeMap<String, (NodeKind, Option<(u16, u32)>)>;

/// Every path of a tree.
fn files(tree: &Tree, layer: Option<u16>) -> Vec<(String, Node)> {
    show(tree)
        .iter()
        .map(|line| {
            let path = line.split('=').next().unwrap().to_owned();
            let node = *tree.node(tree.find(path.as_bytes()).unwrap()).unwrap();
            assert!(layer.is_none() || node.layer() == 0);
            (path, node)
        })
        .collect()
}

/// The model: the layers' own trees laid over each other one after another in a map of paths. First a layer's marks
/// remove what is below, then its files come.
fn model(trees: &[Tree]) -> Files {
    let mut merged = Files::new();
    for (layer, tree) in (0..).zip(trees) {
        let remove = |merged: &mut Files, path: &str, itself: bool| {
            let below = if path.is_empty() { String::new() } else { format!("{path}/") };
            merged.retain(|other, _| !(other.starts_with(&below) || (itself && other == path)));
        };
        if tree.nodes()[0].is_opaque() {
            remove(&mut merged, "", false);
        }
        let own = files(tree, Some(layer));
        for (path, node) in &own {
            if node.is_opaque() || node.kind() != NodeKind::Directory {
                remove(&mut merged, path, node.kind() == NodeKind::Whiteout);
            }
        }
        for (path, node) in own {
            if node.kind() == NodeKind::Whiteout {
                continue;
            }
            let described = node.entry().map(|entry| (layer, entry));
            let below = merged.get(&path).filter(|file| file.0 == node.kind() && node.kind() == NodeKind::Directory);
            let described = described.or_else(|| below.and_then(|file| file.1));
            merged.insert(path, (node.kind(), described));
        }
    }
    merged
}

proptest! {
    #[test]
    fn view_equals_layers_applied_one_after_another(layers in prop::collection::vec(layer(), 0..5)) {
        let trees: Vec<Tree> = layers.iter().map(|entries| Tree::of_layer(entries).unwrap()).collect();
        let view = merge(&trees.iter().collect::<Vec<_>>()).unwrap();
        let found: Files = files(&view, None).into_iter().map(|(path, node)| {
            (path, (node.kind(), node.entry().map(|entry| (node.layer(), entry))))
        }).collect();
        prop_assert_eq!(found, model(&trees));
    }
}
