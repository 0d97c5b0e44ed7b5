//! The local index store as commands see it: the indexes that its index.json lists, and where their parts are.
//!
//! The list is what counts, as AWS's database does for its tool: an index whose manifest was deleted is still listed,
//! by what the list says of it, until `soci rebuild-db` looks for it. Parts are in the store itself, or where the
//! entry's [`KEPT_IN`] says.

use std::cmp::Reverse;

use soci_index::find::choose::Created;
use soci_index::format::digest::Digest;
use soci_index::format::index_manifest::IndexManifest;
use soci_index::format::limits::Limits;
use soci_index::format::manifest::{INDEX_V1, INDEX_V2};
use soci_index::format::model::{Descriptor, annotation};
use soci_index::format::reference::Reference;
use soci_index::format::span_index::SPAN_INDEX;
use soci_index::image::ImageSource;
use soci_index::image::layout::Layout;
use soci_index::image::store::Store as _;
use soci_index::publish::local::{IMAGE_NAME, KEPT_IN, containerd_namespace};
use soci_index::registry::ClientOptions;

use crate::args::Global;
use crate::args::config::Config;
use crate::commands::{containerd, image};

/// An index of the store.
pub(super) struct IndexEntry {
    pub(super) descriptor: Descriptor,
    /// The manifest; `None` if it is gone, or damaged.
    pub(super) index: Option<IndexManifest>,
}

impl IndexEntry {
    pub(super) fn annotation(&self, key: &str) -> &str {
        self.descriptor.annotations.get(key).map_or("", String::as_str)
    }

    pub(super) fn platform(&self) -> String {
        self.descriptor.platform.as_ref().map(ToString::to_string).unwrap_or_default()
    }

    pub(super) fn is_span_index(&self) -> bool {
        self.descriptor.kind() == SPAN_INDEX
    }

    /// The name of its form, for display.
    pub(super) fn form(&self) -> &'static str {
        match self.descriptor.kind() {
            SPAN_INDEX => "spans",
            INDEX_V2 => "v2",
            _ => "v1",
        }
    }

    /// The image manifest that it names.
    pub(super) fn subject(&self) -> Option<Digest> {
        self.index.as_ref()?.subject().map(|subject| subject.digest)
    }

    /// The blobs that it refers to.
    pub(super) fn blobs(&self) -> &[Descriptor] {
        self.index.as_ref().map_or(&[], IndexManifest::blobs)
    }

    /// Its zTOCs, each with its layer.
    pub(super) fn ztocs(&self) -> Vec<(Digest, &Descriptor)> {
        self.index.as_ref().map(IndexManifest::ztocs).unwrap_or_default()
    }
}

/// Whether an entry of index.json is an index.
pub(super) fn is_index(entry: &Descriptor) -> bool {
    matches!(entry.kind(), INDEX_V1 | INDEX_V2 | SPAN_INDEX)
}

pub(crate) fn layout(config: &Config) -> anyhow::Result<Option<Layout>> {
    let directory = config.index_store();
    // A store that does not exist yet is empty, not broken.
    if !directory.exists() { Ok(None) } else { Ok(Some(Layout::open(&directory)?)) }
}

/// All indexes, newest first.
pub(super) fn entries(config: &Config) -> anyhow::Result<Vec<IndexEntry>> {
    config.check_listed()?;
    let Some(layout) = layout(config)? else { return Ok(Vec::new()) };
    let listed = layout.entries()?.into_iter().filter(is_index);
    let mut entries: Vec<IndexEntry> = listed.map(|descriptor| read(&layout, descriptor)).collect();
    entries.sort_by_cached_key(|entry| Reverse(Created::parse(entry.annotation(annotation::CREATED))));
    Ok(entries)
}

fn read(layout: &Layout, descriptor: Descriptor) -> IndexEntry {
    let digest = descriptor.digest;
    let bytes = layout.blob_bytes(&descriptor, Limits::DEFAULT.manifest_bytes_max);
    let index = match bytes {
        Ok(Some(bytes)) => {
            IndexManifest::parse(descriptor.kind(), &bytes, &Limits::DEFAULT).map_err(|error| error.to_string())
        }
        Ok(None) => Err("its manifest is missing".to_owned()),
        Err(error) => Err(error.to_string()),
    };
    let index = index.map_err(|reason| {
        tracing::warn!("index {digest} of the local store: {reason}; `soci rebuild-db` brings the list up to date");
    });
    IndexEntry { descriptor, index: index.ok() }
}

/// The place that a listed index is kept in, if that is another one and can be reached.
pub(super) async fn kept_elsewhere(
    layout: &Layout,
    digest: &Digest,
    options: &ClientOptions,
    global: &Global,
) -> anyhow::Result<Option<ImageSource>> {
    let entry = layout.entries()?.into_iter().find(|entry| entry.digest == *digest);
    let Some(place) = entry.and_then(|entry| entry.annotations.get(KEPT_IN).cloned()) else { return Ok(None) };
    Ok(match containerd_namespace(&place) {
        Some(namespace) => in_containerd(global, namespace).await,
        None => Some(ImageSource::of_repository(&image::repository(&place, options)?)),
    })
}

/// Places that may have the parts of an index, the likeliest first: the local store, where the entry says, containerd.
pub(super) async fn places_of_parts(
    layout: &Layout,
    entry: Option<&IndexEntry>,
    options: &ClientOptions,
    global: &Global,
) -> Vec<ImageSource> {
    let mut places = vec![ImageSource::of_layout(layout)];
    let kept_in = entry.map(|entry| entry.annotation(KEPT_IN)).filter(|place| !place.is_empty());
    let namespace = kept_in.and_then(containerd_namespace);
    places.extend(in_containerd(global, namespace.unwrap_or(global.containerd_namespace())).await);
    if let (Some(place), None) = (kept_in, namespace) {
        match image::repository(place, options) {
            Ok(repository) => places.push(ImageSource::of_repository(&repository)),
            Err(error) => tracing::debug!("{place}: {error:#}"),
        }
    }
    places
}

/// Places that may have the layers of an image that an index is of: the local store, containerd, and where the image
/// was when it was indexed.
pub(super) async fn places_of_layers(
    layout: &Layout,
    entry: Option<&IndexEntry>,
    options: &ClientOptions,
    global: &Global,
) -> Vec<ImageSource> {
    let mut places = places_of_parts(layout, entry, options, global).await;
    let name = entry.map(|entry| entry.annotation(IMAGE_NAME)).filter(|name| !name.is_empty());
    match name.map(str::parse::<Reference>) {
        Some(Ok(reference)) if !matches!(reference, Reference::Containerd { .. }) => {
            match ImageSource::open(&reference, options).await {
                Ok(source) => places.push(source),
                Err(error) => tracing::debug!("{reference}: {error}"),
            }
        }
        _ => {}
    }
    places
}

/// containerd's content, if a containerd answers.
async fn in_containerd(global: &Global, namespace: &str) -> Option<ImageSource> {
    match containerd::content(global, namespace).await {
        Ok(content) => Some(ImageSource::foreign(content)),
        Err(error) => {
            tracing::debug!("containerd is not asked: {error:#}");
            None
        }
    }
}

/// The first of `places` that has a blob, of the size that its descriptor says.
pub(super) async fn first_with(places: Vec<ImageSource>, blob: &Descriptor) -> Option<ImageSource> {
    for place in places {
        match place.has_blob(blob).await {
            Ok(true) => return Some(place),
            Ok(false) => {}
            Err(error) => tracing::debug!(%error, digest = %blob.digest, "cannot be looked for in {}", place.place()),
        }
    }
    None
}
