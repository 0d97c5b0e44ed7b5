//! What `docker save` writes: a tar file with `manifest.json`, configurations, and a file for each layer.
//!
//! `manifest.json` says what the images are, as it does for `docker load` and skopeo. Newer archives have an OCI layout
//! beside it, which several releases of Docker wrote wrong: layers in random order, wrong sizes. Its manifest is used
//! only if it says the same (`beside`); it is worth having, since it may be the registry's. Else one is made here, from
//! the bytes that are there, the same for the same archive: layers are described by their own digests, as plain tar
//! unless their first bytes say otherwise; the configuration stays as it is. Each layer is read once, in pieces.
//!
//! Invariants: a name is looked up only in the archive, never on the disk; links are followed a bounded number of times
//! and not out of the archive; nothing is read of images that were not asked for.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use serde::Deserialize;
use serde_json::json;

use crate::format::digest::{Algorithm, Digest, Hasher};
use crate::format::encoding::Encoding;
use crate::format::folded::Folded;
use crate::format::limits::Limits;
use crate::format::model::{Descriptor, Probe, annotation, media_type};
use crate::image::members::{Member, walk};
use crate::image::names;
use crate::image::saved::{LINKS_MAX, SavedError, shown};
use crate::image::store::{Located, StoreError, read_at, read_piece};

mod beside;

/// Images in one archive. Stops a list of a million names for the same layers.
const IMAGES_MAX: usize = 1000;
/// Layers of one image. Container runtimes take 127 or so.
const LAYERS_MAX: usize = 1000;
/// Bytes of all names and link targets of one archive. An image has three members for each layer.
const NAMES_BYTES_MAX: usize = 16 << 20;
/// Names in a message.
const NAMES_SHOWN_MAX: usize = 20;

/// Media types of layers.
const TAR: &str = "application/vnd.oci.image.layer.v1.tar";

/// An image of an archive.
pub(crate) struct Made {
    /// Whether its manifest was made here.
    pub(crate) is_made: bool,
    /// An index.json with one entry for each name.
    pub(crate) index: Located,
    /// Manifest, configuration and layers.
    pub(crate) blobs: HashMap<Digest, Located>,
}

/// Makes documents for the image `tag` of the tar file `path`, which is open as `file`; without a tag for its only one.
/// `None` if it has no `manifest.json`.
///
/// # Errors
/// [`StoreError`].
pub(crate) fn read(path: &Path, file: &Arc<File>, tag: Option<&str>) -> Result<Option<Made>, StoreError> {
    let contents = Contents::read(path, file)?;
    let Some(manifest) = contents.bytes("manifest.json")? else { return Ok(None) };
    let json = |error: serde_json::Error| contents.refuse(SavedError::Json { reason: error.to_string() });
    let images: Vec<Folded<Saved>> = serde_json::from_slice(&manifest).map_err(json)?;
    let images = images.into_iter().map(|Folded(image)| image).collect();
    let image = choose(images, tag).map_err(|error| contents.refuse(error))?;
    contents.make(&image).map(Some)
}

/// That a file holds nothing that `docker save` writes.
pub(crate) fn nothing_in(path: &Path) -> StoreError {
    StoreError::Saved { path: path.to_owned(), reason: SavedError::NoManifest }
}

/// An entry of `manifest.json`.
#[derive(Debug, Deserialize)]
struct Saved {
    config: String,
    /// Docker writes `null` for an image without a name.
    #[serde(default, rename = "repotags")]
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Option<Vec<String>>,
}

impl Saved {
    fn tags(&self) -> &[String] {
        self.repo_tags.as_deref().unwrap_or_default()
    }

    fn layers(&self) -> &[String] {
        self.layers.as_deref().unwrap_or_default()
    }
}

fn choose(mut images: Vec<Saved>, tag: Option<&str>) -> Result<Saved, SavedError> {
    if images.len() > IMAGES_MAX {
        return Err(SavedError::TooMany { what: "images", limit: IMAGES_MAX });
    }
    let all: Vec<Vec<String>> = images.iter().map(|image| image.tags().to_vec()).collect();
    let tags = || names::typed(&all).into_iter().take(NAMES_SHOWN_MAX).collect();
    if let Some(tag) = tag {
        let places = names::meant(&all, tag);
        let mut place = 0..;
        images.retain(|_| place.next().is_some_and(|place| places.contains(&place)));
    }
    match (images.len(), tag) {
        (0, Some(tag)) => Err(SavedError::NoSuchTag { tag: shown(tag), tags: tags() }),
        (0, None) => Err(SavedError::Json { reason: "it lists no image".to_owned() }),
        (1, _) if images.iter().any(|image| image.layers().len() > LAYERS_MAX) => {
            Err(SavedError::TooMany { what: "layers", limit: LAYERS_MAX })
        }
        (1, _) => Ok(images.swap_remove(0)),
        (count, _) => Err(SavedError::Ambiguous { count, tags: tags() }),
    }
}

/// Where the members of an archive are.
struct Contents<'a> {
    path: &'a Path,
    members: HashMap<Box<[u8]>, MemberPlace>,
}

#[derive(Debug)]
enum MemberPlace {
    Here(Located),
    /// A symbolic link: as seen from where the link is.
    FromLink(PathBuf),
    /// Another name: as seen from the top.
    FromTop(PathBuf),
}

impl<'a> Contents<'a> {
    fn read(path: &'a Path, file: &Arc<File>) -> Result<Self, StoreError> {
        let mut contents = Self { path, members: HashMap::new() };
        let mut bytes = 0;
        walk(path, file, |name, member| {
            let (place, target) = match member {
                Member::File { offset, length } => (MemberPlace::Here(Located::file(file, offset, length)), 0),
                Member::Symlink(target) => (MemberPlace::FromLink(path_of(target)), target.len()),
                Member::HardLink(target) => (MemberPlace::FromTop(path_of(target)), target.len()),
            };
            bytes += name.len() + target;
            if bytes > NAMES_BYTES_MAX {
                let error = SavedError::TooMany { what: "bytes of names", limit: NAMES_BYTES_MAX };
                return Err(contents.refuse(error));
            }
            contents.members.insert(name.into(), place);
            Ok(())
        })?;
        Ok(contents)
    }

    fn make(&self, image: &Saved) -> Result<Made, StoreError> {
        let mut blobs = HashMap::new();
        let missing = || self.refuse(SavedError::Missing { name: shown(&image.config) });
        let config = self.bytes(&image.config)?.ok_or_else(missing)?;
        let places = image.layers().iter().map(|name| self.locate(name)).collect::<Result<Vec<_>, _>>()?;
        if let Some(manifest) = beside::manifest(self, &config, &places) {
            blobs.extend(manifest.layers.into_iter().map(|layer| layer.digest).zip(places));
            return Ok(finish(blobs, image, config, manifest.bytes, false));
        }
        let mut layers = Vec::new();
        // Layers that were saved once and are named more often are read once.
        let mut known: HashMap<u64, Descriptor> = HashMap::new();
        for located in places {
            let layer = match located.offset().and_then(|offset| known.get(&offset)) {
                Some(layer) => layer.clone(),
                None => self.describe(&located)?,
            };
            known.extend(located.offset().map(|offset| (offset, layer.clone())));
            blobs.insert(layer.digest, located);
            layers.push(layer);
        }
        let config_descriptor = Descriptor::of(media_type::CONFIG, &config);
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": media_type::MANIFEST,
            "config": config_descriptor,
            "layers": layers,
        });
        Ok(finish(blobs, image, config, Bytes::from(manifest.to_string()), true))
    }

    /// Reads a layer to its end, to know its digest.
    fn describe(&self, located: &Located) -> Result<Descriptor, StoreError> {
        let mut hasher = Hasher::new(Algorithm::Sha256);
        let (mut position, mut start) = (0, Bytes::new());
        while position < located.length {
            let piece = read_piece(self.path, located, position, located.length)?;
            hasher.update(&piece);
            if position == 0 {
                start = piece.slice(..piece.len().min(4));
            }
            position += piece.len() as u64;
        }
        let kind = match Encoding::sniff(&start) {
            Encoding::Tar => TAR.to_owned(),
            packed @ (Encoding::Gzip | Encoding::Zstd) => format!("{TAR}+{}", packed.name()),
        };
        Ok(Descriptor::new(&kind, hasher.finish(), located.length))
    }

    /// A whole member; `None` if there is none of that name.
    fn bytes(&self, name: &str) -> Result<Option<Bytes>, StoreError> {
        let limit = Limits::DEFAULT.manifest_bytes_max;
        let located = match self.find(name) {
            Ok(located) => located,
            Err(SavedError::Missing { .. }) => return Ok(None),
            Err(error) => return Err(self.refuse(error)),
        };
        if located.length > limit {
            return Err(StoreError::TooLarge { path: self.path.to_owned(), what: shown(name), limit });
        }
        read_at(self.path, &located, 0, located.length).map(Some)
    }

    fn locate(&self, name: &str) -> Result<Located, StoreError> {
        self.find(name).map_err(|error| self.refuse(error))
    }

    fn find(&self, name: &str) -> Result<Located, SavedError> {
        let outside = || SavedError::Outside { name: shown(name) };
        let mut at = inside(Path::new(""), Path::new(name)).ok_or_else(outside)?;
        for _ in 0..=LINKS_MAX {
            let place = self.members.get(at.as_os_str().as_encoded_bytes());
            at = match place.ok_or_else(|| SavedError::Missing { name: shown(name) })? {
                MemberPlace::Here(located) => return Ok(located.clone()),
                MemberPlace::FromLink(target) => {
                    inside(at.parent().unwrap_or(Path::new("")), target).ok_or_else(outside)?
                }
                MemberPlace::FromTop(target) => inside(Path::new(""), target).ok_or_else(outside)?,
            };
        }
        Err(SavedError::Links { name: shown(name) })
    }

    fn refuse(&self, reason: SavedError) -> StoreError {
        StoreError::Saved { path: self.path.to_owned(), reason }
    }
}

/// Puts an index.json before a manifest and its configuration.
fn finish(mut blobs: HashMap<Digest, Located>, image: &Saved, config: Bytes, manifest: Bytes, is_made: bool) -> Made {
    let kind = match serde_json::from_slice::<Probe>(&manifest) {
        Ok(probe) => probe.media_type(media_type::MANIFEST),
        Err(_) => media_type::MANIFEST.to_owned(),
    };
    let entry = Descriptor::of(&kind, &manifest);
    let entries: Vec<Descriptor> = match image.tags() {
        [] => vec![entry.clone()],
        tags => tags.iter().map(|tag| named(&entry, tag)).collect(),
    };
    let index = json!({ "schemaVersion": 2, "mediaType": media_type::INDEX, "manifests": entries });
    blobs.insert(Digest::of(&config), Located::memory(config));
    blobs.insert(entry.digest, Located::memory(manifest));
    Made { is_made, index: Located::memory(Bytes::from(index.to_string())), blobs }
}

/// The entry of an index for one name, as Docker annotates it today.
fn named(entry: &Descriptor, tag: &str) -> Descriptor {
    let mut entry = entry.clone();
    entry.annotations.insert(annotation::CONTAINERD_NAME.to_owned(), tag.to_owned());
    entry
}

/// A path, seen from a directory of the archive, without `.` and `..`; `None` if it is not in the archive.
fn inside(directory: &Path, path: &Path) -> Option<PathBuf> {
    use std::path::Component;
    let mut at = directory.to_owned();
    for component in path.components() {
        match component {
            Component::Normal(name) => at.push(name),
            Component::CurDir => {}
            Component::ParentDir if at.pop() => {}
            Component::ParentDir | Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    Some(at)
}

fn path_of(bytes: &[u8]) -> PathBuf {
    use std::os::unix::ffi::OsStrExt as _;
    PathBuf::from(std::ffi::OsStr::from_bytes(bytes))
}

#[cfg(test)]
mod tests;
