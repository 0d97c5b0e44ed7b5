//! Where a converted image goes: a tag in a registry, a layout directory, a layout in a tar file, or a name in another
//! program's store.
//!
//! A layout that is made anew, and an archive, come into being beside their name and get it at the end, in one step, so
//! a file or directory of that name is never half of something. An archive is written in one pass: what is new waits in
//! a small layout, layers flow from where they are straight into the tar, which may be a pipe or a device. Its members
//! are sorted and bear no time, so the same image gives the same file.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::format::digest::Digest;
use crate::format::model::{Descriptor, annotation, media_type};
use crate::format::reference::ManifestName;
use crate::format::v2_document::{Index, ManifestEntry};
use crate::image::foreign::ContentTarget;
use crate::image::layout::Layout;
use crate::image::output::{self, Output};
use crate::image::sink::{Sink, SinkError, on_disk, read_blocking};
use crate::image::store::{Store, StoreError};
use crate::image::{ImageError, ImageSource};
use crate::publish::PublishError;
use crate::publish::convert::signed;
use crate::publish::v2::Document;
use crate::registry::{RegistryError, Repository};

/// Where a converted image goes.
#[derive(Debug, Clone)]
pub enum Target {
    /// A tag in a repository.
    Registry { repository: Repository, tag: String },
    /// Into a layout directory, beside what is there.
    Layout {
        /// The directory; made if need be.
        directory: PathBuf,
        tag: Option<String>,
    },
    /// A layout directory with nothing but this image. A layout that is there is replaced.
    NewLayout { directory: PathBuf },
    /// A layout in a tar file, which is replaced.
    Archive { file: PathBuf, tag: Option<String> },
    /// A name in another program's store.
    Foreign(Arc<dyn ContentTarget>),
}

/// A target that is being written to.
pub(super) struct OpenTarget {
    target: Target,
    sink: Sink,
    /// What is not a target yet: removed unless it becomes one.
    stage: Option<tempfile::TempDir>,
    /// Blobs that go straight into an archive.
    later: Vec<Descriptor>,
}

impl Target {
    pub(super) async fn open(&self, source: &ImageSource) -> Result<OpenTarget, PublishError> {
        let target = self.clone();
        let (sink, stage) = match self.clone() {
            Self::Registry { repository, .. } => (Sink::Registry(repository), None),
            Self::Foreign(there) => (Sink::Foreign(there.open().await.map_err(ImageError::from)?), None),
            Self::Layout { directory, .. } => {
                (Sink::Layout(on_disk(move || Layout::open_or_create(&directory)).await?), None)
            }
            Self::NewLayout { directory: path } | Self::Archive { file: path, .. } => {
                let directory = matches!(self, Self::NewLayout { .. });
                let (layout, stage) = on_disk(move || begin(&path, directory)).await?;
                (Sink::Layout(layout), Some(stage))
            }
        };
        tracing::debug!(image = %source, "converting");
        Ok(OpenTarget { target, sink, stage, later: Vec::new() })
    }
}

impl Target {
    /// The place of an image's parts as the local index store calls it; `None` for files, which have no lasting name.
    #[must_use]
    pub fn kept_in(&self) -> Option<String> {
        match self {
            Self::Registry { repository, .. } => Some(repository.to_string()),
            Self::Foreign(there) => Some(there.place()),
            Self::Layout { .. } | Self::NewLayout { .. } | Self::Archive { .. } => None,
        }
    }
}

impl OpenTarget {
    pub(super) fn sink(&self) -> &Sink {
        &self.sink
    }

    /// The image that is there now, if there may be one.
    pub(super) fn as_image(&self) -> Option<ImageSource> {
        match &self.target {
            Target::Registry { repository, tag } => {
                let (repository, name) = (repository.clone(), ManifestName::Tag(tag.clone()));
                Some(ImageSource::Registry { repository, name })
            }
            Target::Layout { directory, tag } => {
                let store = Store::Layout(Layout::open(directory).ok()?);
                Some(ImageSource::Store { store, tag: tag.clone() })
            }
            Target::Foreign(_) => Some(self.as_source()),
            // They are made anew, from nothing.
            Target::NewLayout { .. } | Target::Archive { .. } => None,
        }
    }

    /// Whether what has the target's name now was converted before.
    pub(super) async fn was_converted(&self) -> bool {
        let Target::Registry { repository, tag } = &self.target else { return false };
        let there = repository.manifest(&ManifestName::Tag(tag.clone())).await;
        there.ok().flatten().is_some_and(|there| signed::is_converted(&there.bytes))
    }

    /// Whether the image is there already.
    pub(super) async fn holds(&self, index: &Document) -> Result<bool, PublishError> {
        match (&self.target, &self.sink) {
            (Target::Registry { repository, tag }, _) => {
                match repository.manifest(&ManifestName::Tag(tag.clone())).await {
                    Ok(there) => Ok(there.is_some_and(|there| there.digest == index.digest)),
                    // A policy may let a tag be written that it does not let be read.
                    Err(RegistryError::Status { status: 412, .. }) => Ok(false),
                    Err(error) => Err(error.into()),
                }
            }
            (_, Sink::Foreign(sink)) => Ok(sink.store().root().is_some_and(|root| root.digest == index.digest)),
            (_, Sink::Registry(_) | Sink::Layout(_) | Sink::Nowhere) => Ok(false),
        }
    }

    /// The place as the local index store calls it.
    pub(super) fn kept_in(&self) -> Option<String> {
        self.target.kept_in()
    }

    /// Whether a part of an image that is there may have gone since, so that it is put again.
    pub(super) const fn may_have_lost(&self) -> bool {
        matches!(self.target, Target::Foreign(_))
    }

    /// Whether parts that the source lacks may be lacking here, too: both are stores of what was pulled, and the next
    /// pull fetches them.
    pub(super) const fn may_lack(&self, source: &ImageSource) -> bool {
        matches!((&self.target, source), (Target::Foreign(_), ImageSource::Foreign(_)))
    }

    /// The place as one to take blobs from.
    pub(super) fn as_source(&self) -> ImageSource {
        match &self.sink {
            Sink::Registry(repository) => ImageSource::of_repository(repository),
            Sink::Layout(layout) => ImageSource::Store { store: Store::Layout(layout.clone()), tag: None },
            Sink::Foreign(sink) => ImageSource::Foreign(sink.store()),
            Sink::Nowhere => unreachable!("no target is nowhere"),
        }
    }

    /// Whether the image comes from here, so that all it needs is here.
    pub(super) fn is_home_of(&self, source: &ImageSource) -> bool {
        match (&self.sink, source) {
            (Sink::Registry(to), ImageSource::Registry { repository: from, .. }) => {
                to.registry().name() == from.registry().name() && to.name() == from.name()
            }
            (Sink::Layout(to), ImageSource::Store { store: Store::Layout(from), .. }) => to == from,
            _ => false,
        }
    }

    pub(super) async fn copy(&mut self, source: &ImageSource, blob: &Descriptor) -> Result<(), PublishError> {
        if self.is_home_of(source) {
            return Ok(());
        }
        if matches!(self.target, Target::Archive { .. }) {
            if !self.later.iter().any(|later| later.digest == blob.digest) {
                self.later.push(blob.clone());
            }
            return Ok(());
        }
        Ok(self.sink.copy(source, blob).await?)
    }

    /// Makes sure that the tag still names this. Registries have no way to do that and to push in one step: what is
    /// pushed between the two is lost all the same.
    pub(super) async fn expect(&self, expected: &Digest) -> Result<(), PublishError> {
        let Target::Registry { repository, tag } = &self.target else { return Ok(()) };
        let there = repository.manifest(&ManifestName::Tag(tag.clone())).await?.map(|there| there.digest);
        if there.as_ref() == Some(expected) {
            return Ok(());
        }
        let image = format!("{}/{}:{tag}", repository.registry().name(), repository.name());
        Err(PublishError::Moved { image, expected: Box::new(*expected), there: there.map(Box::new) })
    }

    /// Gives the image its name.
    pub(super) async fn finish(self, source: &ImageSource, index: &Document) -> Result<(), PublishError> {
        let bytes = index.bytes.clone();
        match (&self.target, &self.sink) {
            (Target::Registry { repository, tag }, _) => {
                let tag = ManifestName::Tag(tag.clone());
                repository.push_manifest(&tag, media_type::INDEX, bytes).await?;
            }
            (Target::Layout { tag, .. }, Sink::Layout(layout)) => {
                let (layout, tag) = (layout.clone(), tag.clone());
                let mut entry = Descriptor::of(media_type::INDEX, &bytes);
                entry.annotations.extend(tag.map(|tag| (annotation::REF_NAME.to_owned(), tag)));
                on_disk(move || layout.lock()?.add_manifest(entry, &bytes)).await?;
            }
            (Target::Foreign(_), Sink::Foreign(sink)) => {
                self.sink.add_manifest(media_type::INDEX, index.digest, bytes.clone()).await?;
                sink.name_image(&Descriptor::of(media_type::INDEX, &bytes)).await.map_err(ImageError::from)?;
            }
            (Target::NewLayout { directory }, Sink::Layout(layout)) => {
                self.sink.add_bytes(bytes).await?;
                let (layout, directory, json) = (layout.clone(), directory.clone(), index_json(index, None));
                on_disk(move || swap(&layout, &directory, &json)).await?;
            }
            (Target::Archive { file, tag }, Sink::Layout(layout)) => {
                self.sink.add_bytes(bytes).await?;
                let json = index_json(index, tag.as_deref());
                pack(source, layout, file, json, self.later).await?;
            }
            _ => unreachable!("files are written by way of a layout"),
        }
        drop(self.stage);
        Ok(())
    }
}

/// An index.json with one image.
fn index_json(index: &Document, tag: Option<&str>) -> Vec<u8> {
    let mut entry = ManifestEntry::new(media_type::INDEX, index.digest, index.bytes.len() as u64);
    entry.annotations.extend(tag.map(|tag| (annotation::REF_NAME.to_owned(), tag.to_owned())));
    Index::of(vec![entry]).to_json()
}

/// A layout beside `path`, in which things wait. What is at `path` must be something that may be replaced.
fn begin(path: &Path, directory: bool) -> Result<(Layout, tempfile::TempDir), StoreError> {
    if directory && path.exists() {
        // Refuses a directory that is used for something else.
        Layout::open_or_create(path)?;
    }
    let in_place =
        !directory && output::is_in_place(path).map_err(|error| StoreError::io(path, "cannot open", &error))?;
    let mut stage = tempfile::Builder::new();
    stage.prefix(".soci-new-");
    let parent = output::directory_of(path);
    // Beside a device or a descriptor there is no room for files.
    let stage = if in_place { stage.tempdir() } else { stage.tempdir_in(parent) };
    let stage = stage.map_err(|error| StoreError::io(parent, "cannot create a directory in", &error))?;
    Ok((Layout::open_or_create(&stage.path().join("layout"))?, stage))
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
) -> Result<(), PublishError> {
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
    Ok(on_disk(move || packing.end()).await?)
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

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let tagged = |tag: &Option<String>| tag.as_ref().map(|tag| format!(":{tag}")).unwrap_or_default();
        match self {
            Self::Registry { repository, tag } => {
                write!(f, "{}/{}:{tag}", repository.registry().name(), repository.name())
            }
            Self::Layout { directory, tag } => write!(f, "oci:{}{}", directory.display(), tagged(tag)),
            Self::NewLayout { directory } => write!(f, "{}", directory.display()),
            Self::Foreign(there) => f.write_str(there.name()),
            Self::Archive { file, tag } => write!(f, "{}{}", file.display(), tagged(tag)),
        }
    }
}
