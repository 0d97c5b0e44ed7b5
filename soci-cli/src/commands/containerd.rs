//! containerd as a place of images and indexes, for commands that work on images: the one file that knows how it is reached.
//!
//! A program without the feature `node` has `without_node.rs` in its place.

use std::sync::Arc;

use soci_fs::node::content::ContainerdImage;
use soci_fs::node::content::target::{ContainerdTarget, INDEX_LABEL};
use soci_fs::node::grpc::containerd::Containerd;
use soci_index::format::digest::Digest;
use soci_index::format::model::{Descriptor, media_type};
use soci_index::format::reference::Reference;
use soci_index::image::ImageError;
use soci_index::image::foreign::{ContentSink, ContentStore, ContentTarget};
use soci_index::publish::Report;
use soci_index::publish::local::{Keep, containerd_place};

use crate::args::Global;

/// What every index in containerd has, whether our tool has made it or AWS's.
const ZTOC_LABEL: &str = "containerd.io/gc.ref.content.ztoc.0";

/// An image of containerd by its name, as it was typed or spelt out.
///
/// # Errors
/// When containerd cannot be reached, or does not have it.
pub async fn image(name: &str, global: &Global) -> anyhow::Result<Arc<dyn ContentStore>> {
    Ok(Arc::new(find(name, global).await?))
}

async fn find(name: &str, global: &Global) -> anyhow::Result<ContainerdImage> {
    let containerd = connect(global, global.containerd_namespace()).await?;
    // A name may be in containerd as it was typed, or spelt out.
    let spelt_out = match name.parse() {
        Ok(Reference::Registry(plain)) => plain.to_string(),
        _ => name.to_owned(),
    };
    Ok(ContainerdImage::find(containerd, name, &spelt_out).await?)
}

async fn connect(global: &Global, namespace: &str) -> anyhow::Result<Containerd> {
    Ok(Containerd::connect(global.containerd_socket(), namespace).await?)
}

/// All content of a namespace.
///
/// # Errors
/// When containerd cannot be reached.
pub async fn content(global: &Global, namespace: &str) -> anyhow::Result<Arc<dyn ContentStore>> {
    let containerd = connect(global, namespace).await?;
    Ok(Arc::new(ContainerdImage::content(containerd, containerd_place(namespace))))
}

/// Deletes content; containerd's collector takes what nothing else needs.
///
/// # Errors
/// When containerd cannot be reached, or refuses.
pub async fn delete(digest: &Digest, global: &Global, namespace: &str) -> anyhow::Result<()> {
    Ok(connect(global, namespace).await?.delete_content(digest).await?)
}

/// The indexes among the content of a namespace, as containerd's clients label them.
///
/// # Errors
/// When containerd cannot be reached, or refuses.
pub async fn indexes(global: &Global, namespace: &str) -> anyhow::Result<Vec<Descriptor>> {
    let containerd = connect(global, namespace).await?;
    let mut found = Vec::new();
    for digest in containerd.content_with_label(ZTOC_LABEL).await? {
        let size = containerd.content_size(&digest).await?;
        found.extend(size.map(|size| Descriptor::new(media_type::MANIFEST, digest, size)));
    }
    Ok(found)
}

/// An image's name in containerd, to be written to.
///
/// # Errors
/// Only in a program that knows no containerd.
pub fn target(image: &str, global: &Global) -> anyhow::Result<Arc<dyn ContentTarget>> {
    let (socket, namespace) = (global.containerd_socket().to_owned(), global.containerd_namespace());
    Ok(Arc::new(ContainerdTarget::new(socket, namespace, image)))
}

/// An image of containerd whose indexes are put beside it.
#[derive(Debug)]
pub struct ContainerdIndexStore {
    sink: Arc<dyn ContentSink>,
    containerd: Containerd,
    image: String,
    place: String,
}

impl ContainerdIndexStore {
    /// Opens the image with this name.
    ///
    /// # Errors
    /// When containerd cannot be reached, or does not have it.
    pub async fn open(name: &str, global: &Global) -> anyhow::Result<Self> {
        let (socket, namespace) = (global.containerd_socket(), global.containerd_namespace());
        let image = find(name, global).await?.image_name().to_owned();
        let target = ContainerdTarget::new(socket.to_owned(), namespace, &image);
        let sink = target.open().await.map_err(ImageError::from)?;
        let containerd = connect(global, namespace).await?;
        Ok(Self { sink, containerd, image, place: target.place() })
    }

    /// Where indexes are kept.
    #[must_use]
    pub fn keep(&self) -> Keep {
        Keep::There { sink: Arc::clone(&self.sink), place: self.place.clone() }
    }

    /// Has containerd's collector keep the indexes as long as the image: the first by the label of AWS's tool, those of
    /// other platforms by labels of their own, which that tool would overwrite.
    ///
    /// # Errors
    /// When containerd refuses.
    pub async fn close(&self, reports: &[(String, Report)]) -> anyhow::Result<()> {
        let label = |(number, (_, report)): (usize, &(String, Report))| {
            let key = if number == 0 { INDEX_LABEL.to_owned() } else { format!("{INDEX_LABEL}.{number}") };
            (key, report.index.to_string())
        };
        self.containerd.label_image(&self.image, &reports.iter().enumerate().map(label).collect()).await?;
        Ok(self.sink.close().await.map_err(ImageError::from)?)
    }
}
