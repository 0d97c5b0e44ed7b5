//! The trees of the golden layers, compared with what an independent reader made of the same indexes.
//!
//! That reader knows no white-outs (it shows the marks as files), leaves out what goes through symbolic links, and
//! keeps some oddities of its own; every intended difference is listed in [`DIFFERENCES`] with its reason.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test that cannot go on stops, and says when it is skipped"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use soci_fs::fuse::file_system::{DirectoryEntry, FileSystem as _};
use soci_fs::fuse::image::Image;
use soci_fs::layer::proof::{Verdict, prove};
use soci_fs::layer::reader::Policy;
use soci_fs::layer::store::Store;
use soci_fs::layer::unpack::LayerClaim;
use soci_fs::tree::attributes::Attributes;
use soci_fs::tree::{NodeKind, NodeNumber, Tree};
use soci_index::format::entry::Entry;
use soci_index::format::index::Compression;
use soci_tests::reading::{Layer, golden, index};

/// Cases and the paths in them, with what is below, on which we differ on purpose.
const DIFFERENCES: &[(&str, &str, &str)] = &[
    ("071", "to-dir", "a hard link to a directory cannot exist"),
    ("072", "d/up", "a hard link to a directory cannot exist, least of all to its parent"),
    ("076", "empty-target", "a symbolic link needs a target"),
    ("078", "dir-then-file", "the later entry is a file, the other reader keeps the directory"),
    ("083", "through", "the engines follow the link inside the root"),
];

/// Longest name that the kernel can look up; the other reader shows longer ones too.
const NAME_BYTES_MAX: usize = 255;

/// Longest path in what the other reader lists; the archives have longer ones, and so have we.
const OTHER_PATH_BYTES_MAX: usize = 305;

/// One row of view.tsv.
#[derive(Debug, PartialEq, Eq)]
struct Row {
    kind: String,
    mode: String,
    owner: String,
    size: String,
    mtime: String,
    link: String,
    xattrs: String,
}

fn rows(path: &Path) -> BTreeMap<String, Row> {
    let text = std::fs::read_to_string(path).unwrap();
    let header: Vec<&str> = text.lines().next().unwrap().trim_start_matches('#').split('\t').collect();
    let at = |name: &str| header.iter().position(|column| *column == name);
    let parse = |line: &str| {
        let fields: Vec<&str> = line.split('\t').collect();
        let field = |name: &str| at(name).and_then(|at| fields.get(at)).map_or("", |field| *field).to_owned();
        let row = Row {
            kind: field("type"),
            mode: field("mode"),
            owner: format!("{}:{}", field("uid"), field("gid")),
            size: field("size"),
            mtime: field("mtime"),
            link: field("linkname"),
            xattrs: field("xattrs"),
        };
        (field("path"), row)
    };
    text.lines().skip(1).map(parse).collect()
}

fn escape(bytes: &[u8]) -> String {
    let one = |byte: &u8| match byte {
        0x20..=0x5b | 0x5d..=0x7e => char::from(*byte).to_string(),
        other => format!("\\x{other:02x}"),
    };
    bytes.iter().map(one).collect()
}

fn found(tree: &Tree, entries: &[Entry]) -> BTreeMap<String, Row> {
    let mut found = BTreeMap::new();
    let mut directories = vec![(NodeNumber::ROOT, String::new())];
    found.insert(".".to_owned(), row(tree, NodeNumber::ROOT, entries));
    while let Some((directory, path)) = directories.pop() {
        for (_, child) in tree.children(directory, 0) {
            let path = if path.is_empty() { escape(child.name) } else { format!("{path}/{}", escape(child.name)) };
            found.insert(path.clone(), row(tree, child.node, entries));
            directories.push((child.node, path));
        }
    }
    found
}

fn row(tree: &Tree, number: NodeNumber, entries: &[Entry]) -> Row {
    let node = tree.node(number).unwrap();
    let entry = node.entry().map(|entry| &entries[entry as usize]);
    let attributes = Attributes::new(1, node, entry);
    let kind = match attributes.kind {
        NodeKind::Directory => "dir",
        NodeKind::Regular => "reg",
        NodeKind::Symlink => "symlink",
        NodeKind::CharDevice => "char",
        NodeKind::BlockDevice => "block",
        NodeKind::Fifo => "fifo",
        NodeKind::Whiteout => "whiteout",
        NodeKind::ForeignLink => "foreign",
    };
    let total = i128::from(attributes.modified.seconds) * 1_000_000_000 + i128::from(attributes.modified.nanoseconds);
    let sign = if total < 0 { "-" } else { "" };
    let (seconds, rest) = (total.unsigned_abs() / 1_000_000_000, total.unsigned_abs() % 1_000_000_000);
    let mtime = format!("{sign}{seconds}.{rest:09}").trim_end_matches('0').trim_end_matches('.').to_owned();
    let xattrs = entry.into_iter().flat_map(Entry::xattrs);
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let xattrs: Vec<String> = xattrs.map(|(name, value)| format!("{}={}", escape(name), hex(value))).collect();
    Row {
        kind: kind.to_owned(),
        mode: format!("{:04o}", attributes.permissions),
        owner: format!("{}:{}", attributes.uid, attributes.gid),
        size: if attributes.kind == NodeKind::Regular { attributes.size.to_string() } else { "0".to_owned() },
        mtime,
        link: entry.filter(|_| attributes.kind == NodeKind::Symlink).map_or(String::new(), |entry| escape(&entry.link)),
        xattrs: xattrs.join(";"),
    }
}

fn is_mark(path: &str) -> bool {
    path.split('/').any(|component| component.starts_with(".wh."))
}

fn compare(case: &str, expected: &BTreeMap<String, Row>, found: &BTreeMap<String, Row>) -> Vec<String> {
    let paths: BTreeSet<&String> = expected.keys().chain(found.keys()).collect();
    let mut differences = Vec::new();
    for path in paths {
        let below =
            |listed: &str| path.strip_prefix(listed).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
        let listed = DIFFERENCES.iter().any(|(number, listed, _)| case.starts_with(number) && below(listed))
            || path.split('/').any(|component| component.len() > NAME_BYTES_MAX);
        let marked = is_mark(path) || found.get(path).is_some_and(|row| row.kind == "whiteout");
        if listed || marked {
            continue;
        }
        match (expected.get(path), found.get(path)) {
            (Some(theirs), Some(ours)) => {
                // They show the mode that a symbolic link has in the archive, where Linux has one mode for all.
                // They show an implied directory's time as the year 1, and replaced files' leftovers in sizes and links.
                let implied = theirs.mtime == "-62135596800";
                let same = theirs.kind == ours.kind
                    && (theirs.mode == ours.mode || (theirs.kind == "symlink" && ours.mode == "0777"))
                    && theirs.owner == ours.owner
                    && (theirs.size == ours.size || theirs.kind != "reg")
                    && (implied || theirs.mtime == ours.mtime)
                    && (theirs.link == ours.link || theirs.kind != "symlink")
                    && theirs.xattrs == ours.xattrs;
                if !same {
                    differences.push(format!("{case}: {path}:\n  theirs {theirs:?}\n  ours   {ours:?}"));
                }
            }
            (None, Some(_)) if path.len() > OTHER_PATH_BYTES_MAX => {}
            (theirs, ours) => differences.push(format!("{case}: {path}: theirs {theirs:?}, ours {ours:?}")),
        }
    }
    differences
}

#[test]
fn trees_agree_with_an_independent_reader() {
    let Some(root) = golden() else { return };
    let mut differences = Vec::new();
    let mut compared = 0;
    let mut cases: Vec<_> = std::fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path()).collect();
    cases.sort();
    for case in cases {
        let view = case.join("view.tsv");
        let name = case.file_name().unwrap().to_string_lossy().into_owned();
        let Some((blob, compression)) = blob(&case) else { continue };
        let Ok((indexed, _)) = index(&blob, compression, 65_536) else { continue };
        let tree = Tree::of_layer(&indexed.index.entries).unwrap();
        if !view.exists() {
            continue;
        }
        compared += 1;
        differences.extend(compare(&name, &rows(&view), &found(&tree, &indexed.index.entries)));
    }
    assert!(compared > 80, "only {compared} cases");
    assert!(
        differences.is_empty(),
        "{} differences in {compared} cases:\n{}",
        differences.len(),
        differences.join("\n")
    );
}

fn blob(case: &Path) -> Option<(Vec<u8>, Compression)> {
    let gzip = std::fs::read(case.join("layer.tar.gz")).map(|blob| (blob, Compression::Gzip));
    gzip.or_else(|_| std::fs::read(case.join("layer.tar")).map(|blob| (blob, Compression::None))).ok()
}

/// Every file of every layer that can be indexed, read through spans, has the content that the tar has.
#[tokio::test]
async fn files_read_through_spans_are_the_files_of_the_tar() {
    let Some(root) = golden() else { return };
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path()).unwrap();
    let mut files = 0;
    for case in std::fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path()) {
        let Some((blob, compression)) = blob(&case) else { continue };
        if index(&blob, compression, 16_384).is_err() {
            continue;
        }
        let layer = Layer::from_blob(blob, compression, 16_384);
        store.remove(&layer.indexed()).unwrap();
        let reader = layer.reader(&store, layer.memory(), Policy::default());
        for (number, entry) in (0_u32..).zip(&layer.index.entries).collect::<Vec<_>>().into_iter().rev() {
            let read = reader.read_file(number, 0, 1 << 24).await;
            let bytes = read.unwrap_or_else(|error| panic!("{}: {error}", case.display()));
            assert_eq!(bytes.len() as u64, entry.size.min(1 << 24), "{}", case.display());
            if entry.sparse().is_none() {
                let start = usize::try_from(entry.data_offset).unwrap();
                assert!(bytes == layer.tar[start..start + bytes.len()], "{}", case.display());
            }
            files += 1;
        }
        let _ = Arc::strong_count(&layer.index);
    }
    assert!(files > 1000, "only {files} files");
}

/// Layers whose index by AWS's tools says something else than the tar does, so that its proof has to fail.
const AWS_SAYS_OTHERWISE: &[(&str, &str)] = &[
    ("074", "a hard link with a size field: later offsets are wrong"),
    ("075", "a link, a directory and a fifo with a size field: the same"),
];

/// What AWS's tools have indexed is proven by the layer: bytes and every entry of the table.
#[tokio::test]
async fn indexes_of_aws_are_proven() {
    let Some(root) = golden() else { return };
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path()).unwrap();
    let (mut proven, mut failed) = (0, Vec::new());
    let mut cases: Vec<_> = std::fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path()).collect();
    cases.sort();
    for case in cases {
        let name = case.file_name().unwrap().to_string_lossy().into_owned();
        let Some((blob, compression)) = blob(&case) else { continue };
        let tables = std::fs::read_dir(&case).unwrap().map(|entry| entry.unwrap().path());
        for table in tables.filter(|path| path.extension().is_some_and(|extension| extension == "ztoc")) {
            let bytes = std::fs::read(&table).unwrap().into();
            let limits = soci_index::format::limits::Limits::DEFAULT;
            let decoded = soci_index::format::ztoc::Ztoc::decode(&bytes, &limits);
            let Ok(of_aws) = decoded.and_then(|ztoc| ztoc.into_index(blob.len() as u64, &limits)) else { continue };
            let Ok((indexed, tar)) = index(&blob, compression, 65_536) else { continue };
            let claim = LayerClaim { digest: indexed.layer_digest, size: blob.len() as u64, diff_id: indexed.diff_id };
            let layer = Layer { tar, blob: blob.clone().into(), index: Arc::new(of_aws), claim };
            store.remove(&layer.indexed()).unwrap();
            let reader = layer.reader(&store, layer.memory(), Policy::default());
            let verdict = match reader.fetching().complete().await {
                Ok(()) => prove(&reader, claim).await.map_err(|error| error.to_string()),
                Err(error) => Err(error.to_string()),
            };
            match verdict {
                Ok(Verdict::Proven) => proven += 1,
                other => failed.push(format!("{name} {}: {other:?}", table.file_name().unwrap().display())),
            }
        }
    }
    let is_known = |line: &String| AWS_SAYS_OTHERWISE.iter().any(|(number, _)| line.starts_with(number));
    let unknown: Vec<_> = failed.iter().filter(|line| !is_known(line)).collect();
    assert!(unknown.is_empty(), "{unknown:#?}");
    assert!(proven > 100, "only {proven} indexes");
}

/// What GNU tar makes of the archives where it has no complaint: the same files with the same content.
#[tokio::test]
async fn files_are_those_that_tar_extracts() {
    let Some(root) = golden() else { return };
    let work = tempfile::tempdir().unwrap();
    let store = Store::open(&work.path().join("store")).unwrap();
    let mut compared = 0;
    let mut cases: Vec<_> = std::fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path()).collect();
    cases.sort();
    for case in cases {
        let name = case.file_name().unwrap().to_string_lossy().into_owned();
        let Some((blob, compression)) = blob(&case) else { continue };
        if TAR_DIFFERS.iter().any(|number| name.starts_with(number)) || index(&blob, compression, 65_536).is_err() {
            continue;
        }
        let layer = Layer::from_blob(blob, compression, 65_536);
        let extracted = work.path().join(&name);
        std::fs::create_dir(&extracted).unwrap();
        if !extract(&layer.tar, &extracted) {
            continue;
        }
        compared += 1;
        store.remove(&layer.indexed()).unwrap();
        let reader = layer.reader(&store, layer.memory(), Policy::default());
        let image = Image::new(vec![reader]).unwrap();
        let mut found = BTreeMap::new();
        let mut directories = vec![(1, String::new())];
        while let Some((directory, path)) = directories.pop() {
            let mut listed = Vec::new();
            let mut list = |entry: DirectoryEntry<'_>| {
                listed.push((escape(entry.name), entry.attributes));
                true
            };
            image.list(directory, 0, &mut list).unwrap();
            for (name, Attributes { inode, kind, .. }) in listed {
                let path = format!("{path}/{name}");
                let text = match kind {
                    NodeKind::Directory => "directory".to_owned(),
                    NodeKind::Regular => {
                        soci_index::format::digest::Digest::of(&image.read(inode, 0, 64 << 20).await.unwrap())
                            .to_string()
                    }
                    NodeKind::Symlink => escape(&image.read_link(inode).unwrap()),
                    _ => "special".to_owned(),
                };
                found.insert(path.clone(), text);
                if kind == NodeKind::Directory {
                    directories.push((inode, path));
                }
            }
        }
        let mut expected = BTreeMap::new();
        describe(&extracted, "", &mut expected);
        assert_eq!(found, expected, "{name}");
    }
    assert!(compared > 70, "only {compared} cases");
}

/// Cases in which tar is no measure: white-outs (files to it), names with `..` (it cuts them off), and links out of the
/// root with something behind them (it delays them); and a file whose name ends in a slash (a directory to it, a file to
/// the engines).
const TAR_DIFFERS: &[&str] = &["078", "081", "082", "083", "084", "102", "125", "126"];

/// Extracts with GNU tar; false if it complains.
fn extract(tar: &[u8], into: &Path) -> bool {
    use std::io::Write as _;
    let mut command = std::process::Command::new("tar");
    command.args(["--numeric-owner", "-xf", "-", "-C"]).arg(into);
    command.stdin(std::process::Stdio::piped()).stderr(std::process::Stdio::null());
    let Ok(mut child) = command.spawn() else { return false };
    let _ = child.stdin.take().unwrap().write_all(tar);
    child.wait().is_ok_and(|status| status.success())
}

fn describe(directory: &Path, path: &str, into: &mut BTreeMap<String, String>) {
    use std::os::unix::ffi::OsStrExt as _;
    for entry in std::fs::read_dir(directory).unwrap() {
        let entry = entry.unwrap();
        let path = format!("{path}/{}", escape(entry.file_name().as_bytes()));
        let kind = entry.file_type().unwrap();
        let text = if kind.is_dir() {
            describe(&entry.path(), &path, into);
            "directory".to_owned()
        } else if kind.is_file() {
            soci_index::format::digest::Digest::of(&std::fs::read(entry.path()).unwrap()).to_string()
        } else if kind.is_symlink() {
            escape(std::fs::read_link(entry.path()).unwrap().as_os_str().as_bytes())
        } else {
            "special".to_owned()
        };
        into.insert(path, text);
    }
}
