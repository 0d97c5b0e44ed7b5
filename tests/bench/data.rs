//! The data: a tree of this machine's files, as layers, as an image, and on the local disk.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::Context as _;
use bytes::Bytes;
use soci_cli::demo::registry::DemoRegistry;
use soci_tests::image::{GZIP, Image, text};
use soci_tests::registry::client;

/// Layers of the image.
const LAYERS: usize = 3;
/// Larger files are left to the other sort.
const SMALL_BYTES_MAX: u64 = 64 << 10;
/// The end of a tar.
const END: [u8; 1024] = [0; 1024];

/// The data of all benchmarks but one, in a directory that goes with this value.
#[derive(Debug)]
pub(crate) struct Data {
    scratch: tempfile::TempDir,
    /// Whether to be content with less.
    pub(crate) quick: bool,
    /// Large files: paths below [`Data::tree`].
    pub(crate) large: Vec<PathBuf>,
}

/// An image in a registry of this process.
#[derive(Debug)]
pub(crate) struct Pushed {
    /// The registry.
    pub(crate) registry: DemoRegistry,
    /// The image's name.
    pub(crate) name: String,
}

impl Data {
    /// Collects files, packs and compresses them.
    pub(crate) fn new(quick: bool) -> anyhow::Result<Self> {
        let scratch = tempfile::Builder::new().prefix("soci-bench-").tempdir()?;
        let (count, bytes) = if quick { (6_000, 160 << 20) } else { (45_000, 512 << 20) };
        eprintln!("making data in {}: {count} files, {} MiB", scratch.path().display(), bytes >> 20);
        let mut data = Self { scratch, quick, large: Vec::new() };
        let files = data.choose(count, bytes)?;
        std::fs::create_dir(data.tree())?;
        let per_layer = files.len().div_ceil(LAYERS);
        for (number, files) in files.chunks(per_layer).enumerate() {
            let mut builder = tar::Builder::new(BufWriter::new(File::create(data.tar(number))?));
            for (name, file) in files {
                add(&mut builder, name, file)?;
            }
            builder.into_inner()?.flush()?;
            let tree = data.tree();
            crate::process::output(Command::new("tar").arg("-C").arg(tree).arg("-xf").arg(data.tar(number)))?;
        }
        let whole = data.path("layer.tar");
        let mut layer = BufWriter::new(File::create(&whole)?);
        for number in 0..LAYERS {
            // Each tar ends with two blocks of zeros, which may only be the last.
            let length = std::fs::metadata(data.tar(number))?.len() - END.len() as u64;
            std::io::copy(&mut std::io::Read::take(File::open(data.tar(number))?, length), &mut layer)?;
        }
        layer.write_all(&END)?;
        layer.flush()?;
        drop(layer);
        let tars = (0..LAYERS).map(|number| data.tar(number)).chain([whole]);
        gzip(&tars.collect::<Vec<_>>())?;
        Ok(data)
    }

    /// Files of this machine, in order of their paths: `count` in all, of which some are large, with about `bytes`
    /// bytes. What the machine lacks is made up.
    fn choose(&mut self, count: usize, bytes: u64) -> anyhow::Result<Vec<(PathBuf, Source)>> {
        let mut found = Vec::new();
        collect(Path::new("/usr"), &mut found);
        let small = found.iter().filter(|(_, size)| *size <= SMALL_BYTES_MAX);
        let mut chosen: Vec<(PathBuf, Source)> = Vec::new();
        let mut sum = 0;
        for (path, size) in small.take(count - 100) {
            sum += size;
            chosen.push((relative(path), Source::File(path.clone())));
        }
        let large = found.iter().filter(|(_, size)| (1 << 20..=64 << 20).contains(size));
        for (path, size) in large {
            if sum + size <= bytes && self.large.len() < 80 {
                sum += size;
                self.large.push(relative(path));
                chosen.push((relative(path), Source::File(path.clone())));
            }
        }
        for number in chosen.len()..count {
            let size = if sum + (1 << 20) < bytes && count - number <= 80 { 4 << 20 } else { 5_000 };
            sum += size;
            let name = PathBuf::from(format!("made/{}/{}/file{number}", number / 500, number / 20));
            if size > SMALL_BYTES_MAX {
                self.large.push(name.clone());
            }
            chosen.push((name, Source::Made(number as u64, usize::try_from(size)?)));
        }
        chosen.sort_by(|left, right| left.0.cmp(&right.0));
        Ok(chosen)
    }

    /// A path in the scratch directory.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    /// The files on the local disk.
    pub(crate) fn tree(&self) -> PathBuf {
        self.path("tree")
    }

    /// One layer with all files.
    pub(crate) fn layer(&self) -> PathBuf {
        self.path("layer.tar.gz")
    }

    fn tar(&self, number: usize) -> PathBuf {
        self.path(&format!("layer{number}.tar"))
    }

    /// The image of all layers.
    pub(crate) fn image(&self) -> anyhow::Result<Image> {
        let mut layers = Vec::new();
        for number in 0..LAYERS {
            let tar = self.tar(number);
            let blob = std::fs::read(tar.with_extension("tar.gz"))?;
            layers.push((GZIP, blob, std::fs::read(tar)?));
        }
        let Image { blobs, manifest, tars: _ } = Image::new(layers);
        // The tars are not needed any more.
        Ok(Image { blobs, manifest, tars: Vec::new() })
    }

    /// Starts a registry and pushes the image.
    pub(crate) async fn push(&self) -> anyhow::Result<Pushed> {
        let image = self.image()?;
        let registry = DemoRegistry::start(std::time::Duration::ZERO).await?;
        image.push(&client(&registry.host()).repository("bench/files"), "v1").await;
        let name = format!("{}/bench/files:v1", registry.host());
        Ok(Pushed { registry, name })
    }
}

/// Where a file's content comes from.
#[derive(Debug)]
enum Source {
    File(PathBuf),
    /// Seed and length of a text.
    Made(u64, usize),
}

fn relative(path: &Path) -> PathBuf {
    path.strip_prefix("/").unwrap_or(path).to_owned()
}

/// Regular files below a directory with their sizes, in order of their names.
fn collect(directory: &Path, found: &mut Vec<(PathBuf, u64)>) {
    let Ok(listed) = std::fs::read_dir(directory) else { return };
    let mut entries: Vec<_> = listed.flatten().collect();
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => collect(&entry.path(), found),
            Ok(metadata) if metadata.is_file() => found.push((entry.path(), metadata.len())),
            _ => {}
        }
    }
}

fn add(builder: &mut tar::Builder<impl std::io::Write>, name: &Path, source: &Source) -> anyhow::Result<()> {
    let content = match source {
        Source::File(file) => Bytes::from(std::fs::read(file).unwrap_or_default()),
        Source::Made(seed, length) => text(*seed, *length).into(),
    };
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o644);
    header.set_mtime(1_700_000_000);
    header.set_size(content.len() as u64);
    builder.append_data(&mut header, name, &content[..]).with_context(|| name.display().to_string())
}

/// Compresses files as `gzip -6`, each into one beside it, on all cores.
fn gzip(files: &[PathBuf]) -> anyhow::Result<()> {
    let mut running = Vec::new();
    for file in files {
        let packed = File::create(file.with_extension("tar.gz"))?;
        let mut command = Command::new("gzip");
        command.arg("-6c").arg(file).stdin(Stdio::null()).stdout(packed);
        running.push(command.spawn().context("gzip")?);
    }
    for mut child in running {
        anyhow::ensure!(child.wait()?.success(), "gzip failed");
    }
    Ok(())
}
