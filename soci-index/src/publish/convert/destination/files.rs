//! A converted image that becomes a layout of its own: a directory, or a tar file.
//!
//! Both come into being beside their name and get it at the end, in one step, so a file or directory of that name is
//! never half of something. An archive is written in one pass: what is new waits in a small layout, layers flow from
//! where they are straight into the tar, which may be a pipe or a device. Its members are sorted and bear no time, so
//! the same image gives the same file.

use std::path::{Path, PathBuf};

use futures_util::FutureExt as _;

use crate::format::digest::Digest;
use crate::format::model::{Descriptor, annotation, media_type};
use crate::format::v2_document::{Index, ManifestEntry};
use crate::image::ImageSource;
use crate::image::layout::Layout;
use crate::image::output::{self, Output};
use crate::image::sink::{Sink, SinkError, Written, on_disk, read_blocking, written};
use crate::image::store::StoreError;
use crate::publish::PublishError;
use crate::publish::convert::destination::OpenTarget;
use crate::publish::v2::Document;

/// A layout that is not a target yet: removed unless it becomes one.
pub(super) struct Staged {
    layout: Layout,
    _stage: tempfile::TempDir,
}

/// A directory that becomes a layout with one image.
pub(super) struct NewLayout<'t> {
    pub(super) directory: &'t Path,
    pub(super) staged: Staged,
}

/// A tar file that becomes a layout with one image.
pub(super) struct Archive<'t> {
    pub(super) file: &'t Path,
    pub(super) tag: Option<&'t str>,
    pub(super) staged: Staged,
    /// Blobs that go straight into the file.
    pub(super) later: Vec<Descriptor>,
}

impl OpenTarget for NewLayout<'_> {
    fn sink(&self) -> &dyn Sink {
        &self.staged.layout
    }

    fn as_source(&self) -> ImageSource {
        ImageSource::of_layout(&self.staged.layout)
    }

    fn finish<'a>(&'a mut self, _: &'a ImageSource, index: &'a Document) -> Written<'a, PublishError> {
        async move {
            let json = self.staged.index_json(index, None).await?;
            let (layout, directory) = (self.staged.layout.clone(), self.directory.to_owned());
            Ok(on_disk(move || swap(&layout, &directory, &json)).await?)
        }
        .boxed()
    }
}

impl OpenTarget for Archive<'_> {
    fn sink(&self) -> &dyn Sink {
        &self.staged.layout
    }

    fn as_source(&self) -> ImageSource {
        ImageSource::of_layout(&self.staged.layout)
    }

    fn copy<'a>(&'a mut self, _: &'a ImageSource, blob: &'a Descriptor) -> Written<'a> {
        if !self.later.iter().any(|later| later.digest == blob.digest) {
            self.later.push(blob.clone());
        }
        written()
    }

    fn finish<'a>(&'a mut self, source: &'a ImageSource, index: &'a Document) -> Written<'a, PublishError> {
        async move {
            let json = self.staged.index_json(index, self.tag).await?;
            Ok(pack(source, &self.staged.layout, self.file, json, std::mem::take(&mut self.later)).await?)
        }
        .boxed()
    }
}

impl Staged {
    /// Stores an image index; answers an index.json with that image alone.
    pub(super) async fn index_json(&self, index: &Document, tag: Option<&str>) -> Result<Vec<u8>, SinkError> {
        self.layout.put_bytes(index.bytes.clone()).await?;
        let mut entry = ManifestEntry::new(media_type::INDEX, index.digest, index.bytes.len() as u64);
        entry.annotations.extend(tag.map(|tag| (annotation::REF_NAME.to_owned(), tag.to_owned())));
        Ok(Index::of(vec![entry]).to_json())
    }
}

/// A layout beside `path`, in which things wait. What is at `path` must be something that may be replaced.
pub(super) async fn begin(path: &Path, is_directory: bool) -> Result<Staged, SinkError> {
    let path = path.to_owned();
    on_disk(move || stage(&path, is_directory)).await
}

fn stage(path: &Path, is_directory: bool) -> Result<Staged, StoreError> {
    if is_directory && path.exists() {
        // Refuses a directory that is used for something else.
        Layout::open_or_create(path)?;
    }
    let in_place =
        !is_directory && output::is_in_place(path).map_err(|error| StoreError::io(path, "cannot open", &error))?;
    let mut stage = tempfile::Builder::new();
    stage.prefix(".soci-new-");
    let parent = output::directory_of(path);
    // Beside a device or a descriptor there is no room for files.
    let stage = if in_place { stage.tempdir() } else { stage.tempdir_in(parent) };
    let stage = stage.map_err(|error| StoreError::io(parent, "cannot create a directory in", &error))?;
    Ok(Staged { layout: Layout::open_or_create(&stage.path().join("layout"))?, _stage: stage })
}

/// Puts a finished layout in the place of what is at `directory`.
fn swap(layout: &Layout, directory: &Path, index_json: &[u8]) -> Result<(), StoreError> {
    let failed = |error: std::io::Error| StoreError::io(directory, "cannot write", &error);
    layout.replace("index.json", index_json)?;
    let lock = layout.directory().join(".lock");
    if lock.exists() {
        std::fs::remove_file(&lock).map_err(failed)?;
    }
    let old = layout.directory().with_file_name("old");
    if directory.exists() {
        std::fs::rename(directory, &old).map_err(failed)?;
    }
    // Should this fail, the old one goes back.
    std::fs::rename(layout.directory(), directory).map_err(|error| {
        let _ = std::fs::rename(&old, directory);
        failed(error)
    })
}

/// Writes the archive: what is in `layout`, and the blobs of `later` as they come.
async fn pack(
    source: &ImageSource,
    layout: &Layout,
    file: &Path,
    index_json: Vec<u8>,
    mut later: Vec<Descriptor>,
) -> Result<(), SinkError> {
    later.sort_by_key(|blob| blob.digest);
    let file = file.to_owned();
    let mut packing = on_disk(move || Packing::begin(&file)).await?;
    packing = packing.file("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec()).await?;
    packing = packing.file("index.json", index_json).await?;
    for digest in stored(layout)? {
        if !later.iter().any(|blob| blob.digest == digest) {
            let content = std::fs::File::open(layout.blob_path(&digest));
            let content = content.map_err(|error| StoreError::io(&layout.blob_path(&digest), "cannot open", &error))?;
            packing = on_disk(move || packing.blob(&digest, content)).await?;
        }
    }
    for blob in &later {
        let (digest, size) = (blob.digest, blob.size);
        let stream = source.open_blob(blob);
        packing = read_blocking(stream, move |reader| {
            packing.member(&blob_name(&digest), size, reader)?;
            Ok(packing)
        })
        .await?;
    }
    on_disk(move || packing.end()).await
}

/// The blobs of a layout, sorted.
fn stored(layout: &Layout) -> Result<Vec<Digest>, StoreError> {
    let directory = layout.directory().join("blobs/sha256");
    let failed = |error: std::io::Error| StoreError::io(&directory, "cannot read", &error);
    let mut digests = Vec::new();
    for file in std::fs::read_dir(&directory).map_err(failed)? {
        let name = file.map_err(failed)?.file_name();
        digests.extend(format!("sha256:{}", name.to_string_lossy()).parse::<Digest>().ok());
    }
    digests.sort_unstable();
    Ok(digests)
}

fn blob_name(digest: &Digest) -> String {
    format!("blobs/{}/{}", digest.algorithm().name(), digest.hex())
}

/// A tar file that is being written.
struct Packing {
    builder: tar::Builder<Output>,
    path: PathBuf,
}

impl Packing {
    fn begin(path: &Path) -> Result<Self, StoreError> {
        let output = Output::create(path).map_err(|error| StoreError::io(path, "cannot write", &error))?;
        Ok(Self { builder: tar::Builder::new(output), path: path.to_owned() })
    }

    async fn file(mut self, name: &'static str, content: Vec<u8>) -> Result<Self, SinkError> {
        on_disk(move || {
            self.member(name, content.len() as u64, &mut &content[..])?;
            Ok(self)
        })
        .await
    }

    fn blob(mut self, digest: &Digest, mut content: std::fs::File) -> Result<Self, StoreError> {
        let name = blob_name(digest);
        let length = content.metadata().map_err(|error| StoreError::io(Path::new(&name), "cannot read", &error))?.len();
        self.member(&name, length, &mut content)?;
        Ok(self)
    }

    fn member(&mut self, name: &str, size: u64, content: &mut dyn std::io::Read) -> Result<(), StoreError> {
        let mut header = tar::Header::new_ustar();
        header.set_mode(0o644);
        header.set_size(size);
        let failed = |error: std::io::Error| StoreError::io(&self.path, "cannot write", &error);
        self.builder.append_data(&mut header, name, content).map_err(failed)
    }

    fn end(self) -> Result<(), StoreError> {
        let failed = |error: std::io::Error| StoreError::io(&self.path, "cannot write", &error);
        self.builder.into_inner().and_then(Output::finish).map_err(failed)
    }
}
