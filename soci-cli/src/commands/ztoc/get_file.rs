//! `soci ztoc get-file`: one file of a layer, by the spans that hold it; and where zTOCs and layers are found.
//!
//! AWS's tool finds the layer in containerd. Here it is looked for there, too, and in the image that the zTOC's index
//! was made of, in a registry or a layout: of a layer in a registry only the spans of the file are fetched.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use bytes::{Bytes, BytesMut};
use futures_util::TryStreamExt as _;
use soci_index::format::access::LayerReader;
use soci_index::format::digest::Digest;
use soci_index::format::entry::{Entry as TarEntry, EntryKind};
use soci_index::format::index::LayerIndex;
use soci_index::format::limits::Limits;
use soci_index::format::manifest::LAYER_MEDIA_TYPE;
use soci_index::format::model::Descriptor;
use soci_index::format::ztoc::Ztoc;
use soci_index::image::ImageSource;
use tokio::runtime::Runtime;

use crate::args::config::Config;
use crate::args::{Access, GetFile, Global};
use crate::commands::catalogue::{self, IndexEntry};
use crate::commands::image;
use crate::commands::ztoc::write_whole;
use crate::report::exit::{Exit, fail};
use crate::report::output;

/// Runs the command.
///
/// # Errors
/// When the zTOC, the layer or the file is not there, or the layer is not the one that was indexed.
pub fn run(arguments: &GetFile, config: &Config, global: &Global) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("starting threads")?;
    let found = runtime.block_on(open(&arguments.ztoc, config, &arguments.access, global))?;
    let layer = match &arguments.layer {
        Some(file) => Layer::open(file)?,
        None => runtime.block_on(found.layer(config, &arguments.access, global))?,
    };
    let content = extract(&found.bytes, &arguments.file, &layer, &runtime)?;
    runtime.shutdown_background();
    match &arguments.output {
        Some(out) => write_whole(out, std::iter::once(content)).with_context(|| format!("writing {}", out.display())),
        None => output::bytes(&[&content[..], b"\n"].concat()),
    }
}

/// The zTOC that `soci ztoc info` is to describe.
///
/// # Errors
/// When it is not there.
pub fn ztoc(name: &str, config: &Config, global: &Global) -> anyhow::Result<Bytes> {
    image::block_on(global.timeout, async { Ok(open(name, config, &Access::default(), global).await?.bytes) })
}

/// A zTOC, and what is known of its layer.
struct FoundZtoc {
    bytes: Bytes,
    /// The layer, and the index that says so.
    layer: Option<(Digest, IndexEntry)>,
}

/// A zTOC by its digest in the local store, or by the name of a file.
async fn open(name: &str, config: &Config, access: &Access, global: &Global) -> anyhow::Result<FoundZtoc> {
    match name.parse::<Digest>() {
        Ok(digest) if !Path::new(name).exists() => stored(&digest, config, access, global).await,
        _ => Ok(FoundZtoc { bytes: crate::commands::ztoc::read_file(&PathBuf::from(name))?, layer: None }),
    }
}

async fn stored(digest: &Digest, config: &Config, access: &Access, global: &Global) -> anyhow::Result<FoundZtoc> {
    let mut entries = catalogue::entries(config)?;
    if entries.iter().any(|entry| entry.descriptor.digest == *digest) {
        let hint = "the provided digest belongs to a SOCI index. Use \"soci index info\" to get the detailed information about it";
        return Err(fail(Exit::Usage, hint));
    }
    let missing = || {
        fail(Exit::Failure, format!("the local index store has no zTOC {digest}; `soci ztoc list` shows what it has"))
    };
    let layout = catalogue::layout(config)?.ok_or_else(missing)?;
    let listed = |entry: &IndexEntry| {
        let (layer, ztoc) = entry.ztocs().into_iter().find(|(_, ztoc)| ztoc.digest == *digest)?;
        Some((layer, ztoc.clone()))
    };
    // An index that is kept here may have what one that is kept elsewhere lacks.
    let at = entries.iter().position(|entry| listed(entry).is_some());
    let Some((at, (layer, blob))) = at.and_then(|at| Some((at, listed(entries.get(at)?)?))) else {
        let file = Some(layout.blob_path(digest)).filter(|file| file.exists()).ok_or_else(missing)?;
        return Ok(FoundZtoc { bytes: crate::commands::ztoc::read_file(&file)?, layer: None });
    };
    let entry = entries.swap_remove(at);
    let options = image::client_options(access)?;
    let places = catalogue::places_of_parts(&layout, Some(&entry), &options, global).await;
    let place = catalogue::first_with(places, &blob).await.ok_or_else(missing)?;
    let bytes = place.blob_bytes(&blob, Limits::DEFAULT.ztoc_bytes_max).await?;
    Ok(FoundZtoc { bytes, layer: Some((layer, entry)) })
}

impl FoundZtoc {
    /// Looks for the layer.
    async fn layer(&self, config: &Config, access: &Access, global: &Global) -> anyhow::Result<Layer> {
        let nowhere =
            |which: &str| fail(Exit::Failure, format!("the layer{which} is not found: name its file with --layer"));
        let (Some((digest, entry)), Some(layout)) = (&self.layer, catalogue::layout(config)?) else {
            return Err(nowhere(""));
        };
        let size = Ztoc::decode(&self.bytes, &Limits::DEFAULT)?.compressed_size;
        let media_type = entry.ztocs().iter().find_map(|(layer, ztoc)| {
            (layer == digest).then(|| ztoc.annotations.get(LAYER_MEDIA_TYPE).cloned().unwrap_or_default())
        });
        let size =
            u64::try_from(size).map_err(|_| fail(Exit::BadContent, format!("the zTOC's layer has {size} bytes")))?;
        let blob = Descriptor::new(&media_type.unwrap_or_default(), *digest, size);
        let places = catalogue::places_of_layers(&layout, Some(entry), &image::client_options(access)?, global).await;
        let place = catalogue::first_with(places, &blob).await;
        let place = place.ok_or_else(|| {
            nowhere(&format!(" {digest}, looked for in the local store, in containerd and where the image was,"))
        })?;
        Ok(Layer::Blob(Box::new((place, blob))))
    }
}

/// A layer blob.
enum Layer {
    File { file: File, size: u64, path: PathBuf },
    Blob(Box<(ImageSource, Descriptor)>),
}

impl Layer {
    fn open(path: &Path) -> anyhow::Result<Self> {
        let shown = path.display();
        let file = File::open(path).with_context(|| format!("opening the layer {shown}"))?;
        let size = file.metadata().with_context(|| format!("reading the layer {shown}"))?.len();
        Ok(Self::File { file, size, path: path.to_owned() })
    }

    const fn size(&self) -> u64 {
        match self {
            Self::File { size, .. } => *size,
            Self::Blob(found) => found.1.size,
        }
    }

    fn shown(&self) -> String {
        match self {
            Self::File { path, .. } => path.display().to_string(),
            Self::Blob(found) => format!("{} in {}", found.1.digest, found.0.place()),
        }
    }

    fn read(&self, range: Range<u64>, runtime: &Runtime) -> std::io::Result<Bytes> {
        match self {
            Self::File { file, .. } => {
                let mut buffer = vec![0; usize::try_from(range.end - range.start).map_err(std::io::Error::other)?];
                file.read_exact_at(&mut buffer, range.start)?;
                Ok(Bytes::from(buffer))
            }
            Self::Blob(found) => {
                let (place, blob) = &**found;
                let pieces = place.read_range(blob, range).try_fold(BytesMut::new(), |mut all, piece| async move {
                    all.extend_from_slice(&piece);
                    Ok(all)
                });
                Ok(runtime.block_on(pieces).map_err(std::io::Error::other)?.freeze())
            }
        }
    }
}

/// Decodes the spans that hold one file of a layer.
fn extract(ztoc: &Bytes, name: &str, layer: &Layer, runtime: &Runtime) -> anyhow::Result<Bytes> {
    let index = Ztoc::decode(ztoc, &Limits::DEFAULT)?.into_index(layer.size(), &Limits::DEFAULT)?;
    let entry = find(&index, name)?;
    let mut reader = LayerReader::new(&index, |range: Range<u64>| layer.read(range, runtime));
    let mut content = Vec::new();
    let read = reader.read_file(entry, 0..entry.size, &mut |piece| content.extend_from_slice(piece));
    read.map_err(|error| fail(Exit::BadContent, error.to_string()))
        .with_context(|| format!("reading {name:?} of the layer {}", layer.shown()))?;
    Ok(Bytes::from(content))
}

/// The entry of a name: exactly as the tar has it, else cleaned; the last of several, as extraction would leave it; for
/// a hard link the file that it names.
fn find<'i>(index: &'i LayerIndex, name: &str) -> anyhow::Result<&'i TarEntry> {
    let (mut wanted, mut before) = (name.as_bytes().to_vec(), index.entries.len());
    loop {
        let entries = &index.entries[..before];
        let exact = entries.iter().rposition(|entry| *entry.name == *wanted);
        let cleaned = || entries.iter().rposition(|entry| clean(&entry.name) == clean(&wanted));
        let lossy = String::from_utf8_lossy(&wanted).into_owned();
        let missing =
            || fail(Exit::Failure, format!("the layer has no file {lossy:?}; `soci ztoc info` lists its files"));
        let at = exact.or_else(cleaned).ok_or_else(missing)?;
        let entry = &index.entries[at];
        match entry.kind {
            EntryKind::Regular => return Ok(entry),
            // Only earlier entries count, so this ends.
            EntryKind::Hardlink => (wanted, before) = (entry.link.to_vec(), at),
            EntryKind::Symlink => {
                let link = String::from_utf8_lossy(&entry.link);
                return Err(fail(Exit::Failure, format!("{lossy:?} is a symbolic link to {link:?}")));
            }
            other => return Err(fail(Exit::Failure, format!("{lossy:?} is no regular file but a {other:?}"))),
        }
    }
}

fn clean(name: &[u8]) -> Vec<&[u8]> {
    let mut parts: Vec<&[u8]> = Vec::new();
    for part in name.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    parts
}
