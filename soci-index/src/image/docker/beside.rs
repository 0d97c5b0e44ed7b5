//! The OCI layout that newer releases of Docker put beside `manifest.json`, as far as it says the same.
//!
//! Docker 25.0 wrote layouts with layers in random order, with wrong sizes and with wrong media types, while
//! `manifest.json` was right. So a manifest of the layout counts only if all that can be compared agrees: the
//! configuration, and for each layer in turn the place in the file, the size, what the first bytes are, and for plain
//! tar the `diff_id`. Invariant: a layout that is damaged, missing or different is no error; a manifest is made then.

use bytes::Bytes;

use crate::format::digest::Digest;
use crate::format::encoding::{Declared, Encoding, SNIFF_BYTES};
use crate::format::model::{Descriptor, ImageConfig, ImageIndex, ImageManifest};
use crate::image::docker::Contents;
use crate::image::store::{Located, read_at};

/// How deep an index may hold indexes.
const DEPTH_MAX: usize = 3;
/// Manifests that are looked at.
const MANIFESTS_MAX: usize = 1000;

/// A manifest that agrees.
pub(super) struct Manifest {
    /// Byte for byte.
    pub(super) bytes: Bytes,
    pub(super) layers: Vec<Descriptor>,
}

/// The layout's manifest of the image with this configuration and with layers at these places, if there is one.
pub(super) fn manifest(contents: &Contents<'_>, config: &Bytes, layers: &[Located]) -> Option<Manifest> {
    contents.find("oci-layout").ok()?;
    let index: ImageIndex = serde_json::from_slice(&contents.bytes("index.json").ok()??).ok()?;
    let mut open: Vec<(Descriptor, usize)> = index.manifests.into_iter().rev().map(|entry| (entry, 1)).collect();
    let mut seen = 0;
    while let Some((entry, depth)) = open.pop() {
        seen += 1;
        if seen > MANIFESTS_MAX {
            return None;
        }
        let Some(bytes) = document(contents, &entry) else { continue };
        if entry.is_index() {
            if let Ok(index) = serde_json::from_slice::<ImageIndex>(&bytes).map(|index| index.manifests)
                && depth < DEPTH_MAX
            {
                open.extend(index.into_iter().rev().map(|entry| (entry, depth + 1)));
            }
            continue;
        }
        if let Ok(manifest) = serde_json::from_slice::<ImageManifest>(&bytes)
            && agrees(contents, &manifest, config, layers)
        {
            return Some(Manifest { bytes, layers: manifest.layers });
        }
    }
    None
}

/// A document by its descriptor, if it is what that says.
fn document(contents: &Contents<'_>, descriptor: &Descriptor) -> Option<Bytes> {
    let bytes = descriptor.may_be_image().then(|| contents.bytes(&blob_name(&descriptor.digest)).ok()?)??;
    let is_right = bytes.len() as u64 == descriptor.size && Digest::of(&bytes) == descriptor.digest;
    is_right.then_some(bytes)
}

fn agrees(contents: &Contents<'_>, manifest: &ImageManifest, config: &Bytes, layers: &[Located]) -> bool {
    let Ok(configuration) = serde_json::from_slice::<ImageConfig>(config) else { return false };
    let same_config = manifest.config.digest == Digest::of(config) && manifest.config.size == config.len() as u64;
    let counts = [manifest.layers.len(), configuration.diff_ids.len()];
    same_config
        && counts.iter().all(|count| *count == layers.len())
        && manifest.layers.iter().zip(&configuration.diff_ids).zip(layers).all(|((layer, diff_id), located)| {
            let blob = contents.find(&blob_name(&layer.digest));
            let same_place = blob.is_ok_and(|blob| blob.offset() == located.offset() && blob.length == located.length);
            same_place && layer.size == located.length && is_as_labelled(contents, layer, diff_id, located)
        })
}

fn is_as_labelled(contents: &Contents<'_>, layer: &Descriptor, diff_id: &Digest, located: &Located) -> bool {
    let Ok(first) = read_at(contents.path, located, 0, located.length.min(SNIFF_BYTES)) else { return false };
    let encoding = Encoding::sniff(&first);
    let is_itself = encoding != Encoding::Tar || layer.digest == *diff_id;
    Declared::by_media_type(&layer.media_type) == Declared::Layer(encoding) && is_itself
}

fn blob_name(digest: &Digest) -> String {
    format!("blobs/{}/{}", digest.algorithm().name(), digest.hex())
}
