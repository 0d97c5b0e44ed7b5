//! Finds the files of an image that names lead to, as a loader, a kernel and Python would.
//!
//! It is a guess, and may be wrong where only running the program would show: search paths come from the files that
//! were seen so far, variables of the environment do not count, a name of a deleted file of a lower layer may be found.
//! Pure: it knows trees and tables of files, no bytes.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use soci_index::format::entry::{Entry, EntryKind};
use soci_index::format::index::LayerIndex;

use crate::foresight::mentions::Mention;
use crate::foresight::mentions::stems::Stems;
use crate::tree::{NodeKind, NodeNumber, Tree};

/// Links on the way to a file.
const LINKS_MAX: usize = 8;
/// Roots of modules that are kept.
const ROOTS_MAX: usize = 16;
/// Directories that are remembered by their paths.
const DIRECTORIES_MAX: usize = 1024;
/// Modules that were looked for, whether they were found or not, and are remembered.
const MODULES_MAX: usize = 1 << 14;
/// Where libraries lie, if nothing else is said; directories of an architecture are added.
const LIBRARY_DIRECTORIES: [&str; 6] = ["lib", "usr/lib", "lib64", "usr/lib64", "usr/local/lib", "usr/local/lib64"];
/// Where Python has the compiled forms of modules.
const CACHE: &[u8] = b"__pycache__";
/// Packages that many modules name and no program imports.
const TESTS: [&[u8]; 2] = [b"test", b"tests"];
/// Where Python's own library has modules in C.
const DYNAMIC: &[u8] = b"lib-dynload";

/// A file of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileAt {
    /// Number of the layer among those that [`Names`] was made of.
    pub layer: usize,
    /// Position in the layer's table.
    pub entry: u32,
}

/// What a name leads to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resolved {
    pub files: Vec<FileAt>,
    /// A module of another package, by a single word: many a word is called like a module and means something else.
    pub is_far: bool,
}

/// The trees of an image, and what was learned of where programs look.
#[derive(Debug)]
pub struct Names {
    views: Vec<View>,
    layers: Vec<Arc<LayerIndex>>,
    /// Directories that were looked for, by path.
    directories: HashMap<Box<[u8]>, Directory>,
    /// What modules led to, by the directory of the file that named them and by name: files of one directory name the
    /// same ones. Good until another root is known.
    modules: HashMap<Box<[u8]>, HashMap<ModuleName, Resolved>>,
    modules_count: usize,
    /// Where Python looks for modules, the one that was found first in front.
    roots: Vec<Box<[u8]>>,
    /// Where the loader looks for libraries.
    libraries: Vec<Box<[u8]>>,
    /// What modules may be called; made when the first one is looked for.
    stems: Option<Stems>,
}

/// A tree, and the numbers of the layers that its nodes speak of.
#[derive(Debug)]
struct View {
    tree: Arc<Tree>,
    layers: Range<usize>,
}

/// The name of a module, with dots between its parts.
type ModuleName = Box<[u8]>;

/// A directory in those views that have it, by number of the view.
type Directory = Arc<[(usize, NodeNumber)]>;

impl Names {
    /// The files of layers that are stacked, lowest first, each with its tree.
    #[must_use]
    pub fn of_layers(layers: Vec<(Arc<Tree>, Arc<LayerIndex>)>) -> Self {
        let view = |(number, (tree, _)): (usize, &(Arc<Tree>, Arc<LayerIndex>))| View {
            tree: Arc::clone(tree),
            layers: number..number + 1,
        };
        // What is above comes first.
        let views = layers.iter().enumerate().map(view).rev().collect();
        Self::new(views, layers.into_iter().map(|(_, index)| index).collect())
    }

    /// The files of an image whose layers were merged into one tree.
    #[must_use]
    pub fn of_image(tree: Arc<Tree>, layers: Vec<Arc<LayerIndex>>) -> Self {
        Self::new(vec![View { tree, layers: 0..layers.len() }], layers)
    }

    fn new(views: Vec<View>, layers: Vec<Arc<LayerIndex>>) -> Self {
        let (directories, modules, roots, libraries) = (HashMap::new(), HashMap::new(), Vec::new(), Vec::new());
        let mut names = Self { views, layers, directories, modules, modules_count: 0, roots, libraries, stems: None };
        for usual in LIBRARY_DIRECTORIES {
            let directory = names.directory(usual.as_bytes());
            let below = names.children(&directory).filter(|name| name.ends_with(b"-linux-gnu"));
            let below: Vec<Box<[u8]>> = below.map(|name| join(usual.as_bytes(), name)).collect();
            names.libraries.extend(below);
            names.libraries.push(usual.as_bytes().into());
        }
        names
    }

    /// What the layer says of a file.
    #[must_use]
    pub fn entry(&self, file: FileAt) -> Option<&Entry> {
        self.layers.get(file.layer)?.entries.get(file.entry as usize)
    }

    /// The files that `mention`, found in `from`, leads to.
    pub fn find(&mut self, from: FileAt, mention: &Mention) -> Resolved {
        if let Mention::Module(name) = mention
            && !self.may_have_module(name)
        {
            return Resolved::default();
        }
        let Some(name) = self.entry(from).map(|entry| entry.name.clone()) else { return Resolved::default() };
        let path = clean(&name);
        let directory = parent(&path);
        let sure = |files: Vec<FileAt>| Resolved { files, is_far: false };
        match mention {
            Mention::Path(path) => sure(self.path(path).into_iter().collect()),
            Mention::Library { name, directories } => {
                sure(self.library(directory, name, directories).into_iter().collect())
            }
            Mention::Module(name) => self.known_module(directory, name),
        }
    }

    /// Records that Python reads a file: where its package begins, other modules are looked for from now on.
    pub fn learn(&mut self, module: FileAt) {
        let Some(name) = self.entry(module).map(|entry| entry.name.clone()) else { return };
        let path = clean(&name);
        let directory = parent(&path);
        let mut base = if last(directory) == CACHE { parent(directory) } else { directory };
        loop {
            let here = self.directory(base);
            if base.is_empty() || !self.is_package(&here) {
                break;
            }
            base = parent(base);
        }
        if self.roots.len() < ROOTS_MAX && !self.roots.iter().any(|known| **known == *base) {
            self.roots.push(base.into());
            self.forget_modules();
        }
    }

    /// The regular file at a path, links followed.
    fn path(&mut self, path: &[u8]) -> Option<FileAt> {
        let mut path = clean(path);
        for _ in 0..LINKS_MAX {
            let found = self.entry_at(&path)?;
            let entry = self.entry(found)?;
            if entry.kind != EntryKind::Symlink {
                return (entry.kind == EntryKind::Regular).then_some(found);
            }
            let link = entry.link.clone();
            path = if link.starts_with(b"/") { clean(&link) } else { clean(&join(parent(&path), &link)) };
        }
        None
    }

    /// What is at a path whose directories may be links.
    fn entry_at(&mut self, path: &[u8]) -> Option<FileAt> {
        let (mut directory, name) = (parent(path).to_vec(), last(path));
        for _ in 0..LINKS_MAX {
            let found = self.directory(&directory);
            if !found.is_empty() {
                return self.child(&found, name);
            }
            // The first part that is a link is replaced.
            let mut parts = directory.split(|byte| *byte == b'/');
            let mut walked = Vec::new();
            let link = loop {
                let part = parts.next()?;
                let above = self.directory(&walked);
                let entry = self.child(&above, part).and_then(|file| self.entry(file));
                match entry.filter(|entry| entry.kind == EntryKind::Symlink) {
                    Some(entry) => break entry.link.clone(),
                    None => walked = join(&walked, part).into(),
                }
            };
            let target = if link.starts_with(b"/") { link } else { join(&walked, &link) };
            let rest: Vec<&[u8]> = std::iter::once(&target[..]).chain(parts).collect();
            directory = clean(&rest.join(&b'/')).into();
        }
        None
    }

    fn library(&mut self, directory: &[u8], name: &[u8], said: &[Box<[u8]>]) -> Option<FileAt> {
        let origin = |path: &[u8]| -> Box<[u8]> {
            let behind = path.strip_prefix(b"$ORIGIN").or_else(|| path.strip_prefix(b"${ORIGIN}"));
            behind.map_or_else(|| path.into(), |behind| join(directory, behind.strip_prefix(b"/").unwrap_or(behind)))
        };
        let said: Vec<Box<[u8]>> = said.iter().map(|path| origin(path)).collect();
        let usual = self.libraries.clone();
        said.iter().chain(&usual).find_map(|directory| self.path(&join(directory, name)))
    }

    fn may_have_module(&mut self, name: &[u8]) -> bool {
        let views = &self.views;
        self.stems.get_or_insert_with(|| Stems::of(views.iter().flat_map(View::names))).may_have(name)
    }

    /// [`Names::module`], looked for once.
    fn known_module(&mut self, directory: &[u8], name: &[u8]) -> Resolved {
        if let Some(known) = self.modules.get(directory).and_then(|modules| modules.get(name)) {
            return known.clone();
        }
        let meant = self.module(directory, name);
        if self.modules_count >= MODULES_MAX {
            self.forget_modules();
        }
        self.modules_count += 1;
        self.modules.entry(directory.into()).or_default().insert(name.into(), meant.clone());
        meant
    }

    fn forget_modules(&mut self) {
        self.modules.clear();
        self.modules_count = 0;
    }

    /// The files of a module, and of the packages that it is in: from the directory of the file that names it up to the
    /// root of that one's package, then from all roots.
    fn module(&mut self, directory: &[u8], name: &[u8]) -> Resolved {
        if name.split(|byte| *byte == b'.').any(|part| TESTS.contains(&part)) {
            return Resolved::default();
        }
        let mut base = if last(directory) == CACHE { parent(directory) } else { directory };
        loop {
            let here = self.directory(base);
            let found = self.module_below(&here, name);
            if !found.is_empty() {
                return Resolved { files: found, is_far: false };
            }
            if base.is_empty() || !self.is_package(&here) {
                break;
            }
            base = parent(base);
        }
        // The package's own root first, then those that are known.
        let own = Box::<[u8]>::from(base);
        for root in std::iter::once(own).chain(self.roots.clone()) {
            let root = self.directory(&root);
            let mut found = self.module_below(&root, name);
            if found.is_empty() {
                found = self.module_below(&self.below(&root, DYNAMIC), name);
            }
            if !found.is_empty() {
                return Resolved { files: found, is_far: !name.contains(&b'.') };
            }
        }
        Resolved::default()
    }

    fn is_package(&self, directory: &Directory) -> bool {
        self.child(directory, b"__init__.py").is_some() || !self.forms(directory, b"__init__").is_empty()
    }

    fn module_below(&self, base: &Directory, name: &[u8]) -> Vec<FileAt> {
        let (mut found, mut directory) = (Vec::new(), Arc::clone(base));
        for part in name.split(|byte| *byte == b'.') {
            let package = self.below(&directory, part);
            if package.is_empty() {
                found.extend(self.forms(&directory, part));
                break;
            }
            found.extend(self.forms(&package, b"__init__"));
            directory = package;
        }
        found
    }

    /// The files of the module `name` in a directory: libraries, the compiled form, and the source where there is none.
    fn forms(&self, directory: &Directory, name: &[u8]) -> Vec<FileAt> {
        let prefix = [name, b"."].concat();
        let mut forms = self.regular_with(directory, &prefix, |rest| rest.ends_with(b"so"));
        let is_plain = |rest: &[u8]| rest.ends_with(b".pyc") && !contains(rest, b"opt-");
        forms.extend(self.regular_with(&self.below(directory, CACHE), &prefix, is_plain));
        if forms.is_empty() {
            forms = self.regular_with(directory, &prefix, |rest| rest == b"py");
        }
        forms
    }

    /// The regular files of a directory whose names begin with `prefix`, and what is behind that is as it should be.
    fn regular_with(&self, directory: &Directory, prefix: &[u8], is_good: impl Fn(&[u8]) -> bool) -> Vec<FileAt> {
        let mut found: Vec<(&[u8], FileAt)> = Vec::new();
        for (view, node) in directory.iter() {
            let view = &self.views[*view];
            for child in view.tree.children_with(*node, prefix).filter(|child| is_good(&child.name[prefix.len()..])) {
                let is_new = found.iter().all(|(name, _)| *name != child.name);
                found.extend(view.regular(child.node).filter(|_| is_new).map(|file| (child.name, file)));
            }
        }
        found.into_iter().map(|(_, file)| file).collect()
    }

    fn children<'here>(&'here self, directory: &'here Directory) -> impl Iterator<Item = &'here [u8]> {
        let of = |(view, node): &(usize, NodeNumber)| self.views[*view].tree.children(*node, 0);
        directory.iter().flat_map(of).map(|(_, child)| child.name)
    }

    /// What is called `name` in a directory.
    fn child(&self, directory: &Directory, name: &[u8]) -> Option<FileAt> {
        directory.iter().find_map(|(view, node)| {
            let view = &self.views[*view];
            view.file(view.tree.lookup(*node, name)?)
        })
    }

    /// The directory `name` in a directory; empty if there is none.
    fn below(&self, directory: &Directory, name: &[u8]) -> Directory {
        let in_view = |(number, node): &(usize, NodeNumber)| {
            let node = self.views[*number].tree.lookup(*node, name)?;
            self.views[*number].is_directory(node).then_some((*number, node))
        };
        directory.iter().filter_map(in_view).collect()
    }

    /// The directory at a path; empty if there is none.
    fn directory(&mut self, path: &[u8]) -> Directory {
        if let Some(known) = self.directories.get(path) {
            return Arc::clone(known);
        }
        let in_view = |(number, view): (usize, &View)| {
            let node = view.tree.find(path)?;
            view.is_directory(node).then_some((number, node))
        };
        let found: Directory = self.views.iter().enumerate().filter_map(in_view).collect();
        if self.directories.len() >= DIRECTORIES_MAX {
            self.directories.clear();
        }
        self.directories.insert(path.into(), Arc::clone(&found));
        found
    }
}

impl View {
    /// All names, and which of them are directories'.
    fn names(&self) -> impl Iterator<Item = (&[u8], bool)> + Clone {
        self.tree.names().map(|child| (child.name, self.is_directory(child.node)))
    }

    fn is_directory(&self, node: NodeNumber) -> bool {
        self.tree.node(node).is_some_and(|node| node.kind() == NodeKind::Directory)
    }

    fn file(&self, node: NodeNumber) -> Option<FileAt> {
        let node = self.tree.node(node)?;
        let layer = self.layers.start + usize::from(node.layer());
        (layer < self.layers.end).then_some(FileAt { layer, entry: node.entry()? })
    }

    fn regular(&self, node: NodeNumber) -> Option<FileAt> {
        self.file(node).filter(|_| self.tree.node(node).is_some_and(|node| node.kind() == NodeKind::Regular))
    }
}

/// A path without a slash in front, without `.` and `..`.
fn clean(path: &[u8]) -> Box<[u8]> {
    let mut parts: Vec<&[u8]> = Vec::new();
    for part in path.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.join(&b'/').into()
}

fn parent(path: &[u8]) -> &[u8] {
    path.iter().rposition(|byte| *byte == b'/').map_or(b"", |slash| &path[..slash])
}

fn last(path: &[u8]) -> &[u8] {
    path.iter().rposition(|byte| *byte == b'/').map_or(path, |slash| &path[slash + 1..])
}

fn join(directory: &[u8], name: &[u8]) -> Box<[u8]> {
    if directory.is_empty() { name.into() } else { [directory, b"/", name].concat().into() }
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

#[cfg(test)]
mod tests;
