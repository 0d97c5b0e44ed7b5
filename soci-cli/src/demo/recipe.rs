//! What the demonstration's image is made of: files of this machine.
//!
//! With Python: a layer with a shell, some tools and their libraries, one with the interpreter and its standard
//! library, one with whatever else the installation brings, and a small one with a script. Without Python the shell and
//! the tools are the program. Files keep their paths, so the interpreter finds its library in the image as it does
//! here.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;

use crate::report::exit::{Exit, fail};

/// Most bytes of files in one layer: the demonstration should take seconds.
const LAYER_BYTES_MAX: u64 = 120 << 20;

/// An image to be made.
#[derive(Debug)]
pub struct Recipe {
    /// Files of each layer: path in the image -> file here.
    pub layers: Vec<BTreeMap<PathBuf, PathBuf>>,
    /// A script, for the last layer.
    pub script: (PathBuf, String),
    /// Command line to run in the image.
    pub command: Vec<String>,
    /// What it is, in words.
    pub what: String,
    /// Files that the program reads, for machines where nothing can be mounted.
    pub touched: Vec<PathBuf>,
}

const TOOLS: [&str; 12] = ["sh", "cat", "cp", "env", "find", "grep", "ls", "sed", "sort", "tar", "true", "wc"];

impl Recipe {
    /// Looks around on this machine.
    ///
    /// # Errors
    /// When not even a shell is found.
    pub fn of_this_machine() -> anyhow::Result<Self> {
        let mut base = BTreeMap::new();
        for tool in TOOLS {
            if let Some(file) = in_path(tool) {
                add_program(&mut base, &Path::new("/bin").join(tool), &file);
            }
        }
        if base.is_empty() {
            return Err(fail(Exit::Failure, "neither a shell nor Python is found here; name an image with --image"));
        }
        match Python::find() {
            Some(python) => Ok(python.recipe(base)),
            None => Ok(Self::of_tools(base)),
        }
    }

    fn of_tools(base: BTreeMap<PathBuf, PathBuf>) -> Self {
        let touched = base.values().cloned().collect();
        let mut bulk = BTreeMap::new();
        for directory in ["/usr/share", "/usr/lib", "/usr/bin"] {
            add_tree(&mut bulk, Path::new(directory), &|_| true);
        }
        let script = "#!/bin/sh\ncat /etc/demo | sort | grep -c line\n";
        let mut layers = vec![base];
        layers.extend((!bulk.is_empty()).then_some(bulk));
        Self {
            layers,
            script: ("/app/main".into(), script.to_owned()),
            command: vec!["/bin/sh".to_owned(), "-c".to_owned(), "ls / | sort | wc -l".to_owned()],
            what: "a shell with tools (no Python is installed here)".to_owned(),
            touched,
        }
    }
}

/// A Python installation.
struct Python {
    program: PathBuf,
    library: PathBuf,
    version: String,
    modules: Vec<PathBuf>,
}

impl Python {
    fn find() -> Option<Self> {
        let program = in_path("python3")?;
        let ask = "import sys, os, sysconfig; print(os.path.realpath(sys.executable)); print(sysconfig.get_path('stdlib')); \
                   print(sys.version.split()[0]); \
                   print('\\n'.join(m.__file__ for m in list(sys.modules.values()) if getattr(m, '__file__', None)))";
        let output =
            Command::new(program).args(["-I", "-c", ask]).output().ok().filter(|output| output.status.success())?;
        let text = String::from_utf8(output.stdout).ok()?;
        let mut lines = text.lines();
        let (program, library, version) = (lines.next()?.into(), lines.next()?.into(), lines.next()?.to_owned());
        Some(Self { program, library, version, modules: lines.map(PathBuf::from).collect() })
    }

    fn recipe(self, base: BTreeMap<PathBuf, PathBuf>) -> Recipe {
        let mut interpreter = BTreeMap::new();
        add_program(&mut interpreter, &self.program, &self.program);
        let site = |path: &Path| {
            path.components().any(|part| {
                matches!(part.as_os_str().to_str(), Some("site-packages" | "dist-packages" | "__pycache__" | "test"))
            })
        };
        let cache = |path: &Path| path.components().any(|part| part.as_os_str() == "__pycache__");
        add_tree(&mut interpreter, &self.library, &|path| {
            !site(path)
                || (cache(path) && path.ancestors().nth(1).is_some_and(|parent| parent.parent() == Some(&self.library)))
        });
        let extensions: Vec<PathBuf> = interpreter.keys().filter(|path| is_library(path)).cloned().collect();
        for extension in &extensions {
            add_libraries(&mut interpreter, extension);
        }
        let mut rest = BTreeMap::new();
        add_tree(&mut rest, &self.library, &|path| !interpreter.contains_key(path));
        let touched = self.modules.iter().chain([&self.program]).cloned().collect();
        let program = self.program.display().to_string();
        let mut layers = vec![base, interpreter];
        layers.extend((!rest.is_empty()).then_some(rest));
        Recipe {
            layers,
            script: ("/app/main.py".into(), "print('hello from a lazily mounted image')\n".to_owned()),
            command: vec![program, "/app/main.py".to_owned()],
            what: format!("Python {} with its library", self.version),
            touched,
        }
    }
}

fn is_library(path: &Path) -> bool {
    path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.ends_with(".so") || name.contains(".so."))
}

/// A program of that name in the usual places.
fn in_path(name: &str) -> Option<PathBuf> {
    let path = crate::args::config::search_path();
    path.iter().map(|directory| directory.join(name)).find(|file| {
        file.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
    })
}

/// A program under the path `at`, with the libraries that the loader would load.
fn add_program(files: &mut BTreeMap<PathBuf, PathBuf>, at: &Path, program: &Path) {
    files.insert(at.to_owned(), program.to_owned());
    add_libraries(files, program);
}

/// What `ldd` names. Static programs and machines without `ldd` have none to add.
fn add_libraries(files: &mut BTreeMap<PathBuf, PathBuf>, program: &Path) {
    let Ok(output) = Command::new("ldd").arg(program).output() else { return };
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        // `libc.so.6 => /lib/libc.so.6 (0x...)` or `/lib64/ld-linux.so.2 (0x...)`.
        if let Some(path) = line.split_whitespace().find(|word| word.starts_with('/')).map(PathBuf::from) {
            files.insert(path.clone(), path);
        }
    }
}

/// The regular files below a directory that `wanted` accepts, up to the limit of a layer.
fn add_tree(files: &mut BTreeMap<PathBuf, PathBuf>, root: &Path, wanted: &dyn Fn(&Path) -> bool) {
    let mut bytes: u64 = 0;
    let mut open = vec![root.to_owned()];
    while let Some(directory) = open.pop() {
        let Ok(entries) = std::fs::read_dir(&directory) else { continue };
        let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
        paths.sort();
        for path in paths {
            let Ok(metadata) = path.symlink_metadata() else { continue };
            if metadata.is_dir() {
                open.push(path);
            } else if metadata.is_file() && wanted(&path) {
                bytes += metadata.len();
                if bytes > LAYER_BYTES_MAX {
                    return;
                }
                files.insert(path.clone(), path);
            }
        }
    }
}

/// Packs a layer: directories before the files in them, everything owned by root, times of the files.
///
/// # Errors
/// When a file cannot be read.
pub fn pack(files: &BTreeMap<PathBuf, PathBuf>, script: Option<&(PathBuf, String)>) -> anyhow::Result<Vec<u8>> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut directories = std::collections::BTreeSet::new();
    let mut parents = |builder: &mut tar::Builder<Vec<u8>>, path: &Path| -> anyhow::Result<()> {
        let mut parents: Vec<&Path> = path.ancestors().skip(1).filter(|parent| parent.parent().is_some()).collect();
        parents.reverse();
        for parent in parents {
            if directories.insert(parent.to_owned()) {
                let mut header = header(tar::EntryType::Directory, 0o755, 0);
                builder.append_data(&mut header, parent.strip_prefix("/").unwrap_or(parent), &[][..])?;
            }
        }
        Ok(())
    };
    for (at, file) in files {
        parents(&mut builder, at)?;
        // Files may vanish or be private: then the image does without.
        let Ok(content) = std::fs::read(file) else { continue };
        let executable = file.metadata().is_ok_and(|metadata| metadata.permissions().mode() & 0o111 != 0);
        let mut header = header(tar::EntryType::Regular, if executable { 0o755 } else { 0o644 }, content.len() as u64);
        // Byte code is only used when it is as old as its source says.
        let time = file.metadata().map(|metadata| std::os::unix::fs::MetadataExt::mtime(&metadata)).unwrap_or_default();
        header.set_mtime(u64::try_from(time).unwrap_or_default());
        builder.append_data(&mut header, at.strip_prefix("/").unwrap_or(at), &content[..])?;
    }
    if let Some((path, text)) = script {
        parents(&mut builder, path)?;
        let mut header = header(tar::EntryType::Regular, 0o755, text.len() as u64);
        builder.append_data(&mut header, path.strip_prefix("/").unwrap_or(path), text.as_bytes())?;
        for empty in ["dev", "proc", "tmp"] {
            let mut directory = self::header(tar::EntryType::Directory, 0o755, 0);
            builder.append_data(&mut directory, empty, &[][..])?;
        }
    }
    builder.into_inner().context("packing a layer")
}

fn header(kind: tar::EntryType, mode: u32, size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(size);
    header.set_mtime(0);
    header
}
