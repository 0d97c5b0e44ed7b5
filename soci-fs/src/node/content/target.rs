//! An image that is written into containerd's content store.
//!
//! containerd's garbage collector keeps what an image's name leads to, by labels on the content, and what a lease
//! holds. So a lease is made first; content that is there already is added to it, and each document gets labels that
//! name its parts as containerd's own clients write them. When the name is set the lease ends. Invariants: no foreign
//! label is removed; what is uploaded is in the store only with the right digest, which containerd checks.

use std::path::PathBuf;
use std::sync::Arc;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use soci_index::format::digest::Digest;
use soci_index::format::model::Descriptor;
use soci_index::image::foreign::{ContentSink, ContentStore, ContentTarget, ForeignError, Incoming, References};
use soci_index::publish::local::containerd_place;

use crate::node::content::ContainerdImage;
use crate::node::grpc::containerd::{Containerd, ContainerdError, Labels, Lease};

/// What the label of a part begins with.
const PART: &str = "containerd.io/gc.ref.content.";

/// The label of an image by which AWS's tool has containerd's collector keep its index.
pub const INDEX_LABEL: &str = "containerd.io/gc.ref.content.soci-index";

/// A name in a containerd. Nothing is connected yet.
#[derive(Debug, Clone)]
pub struct ContainerdTarget {
    socket: PathBuf,
    namespace: String,
    image: String,
    shown: String,
}

impl ContainerdTarget {
    /// The name `image` in a namespace of the containerd at `socket`.
    #[must_use]
    pub fn new(socket: PathBuf, namespace: &str, image: &str) -> Self {
        let shown = format!("containerd:{image}");
        Self { socket, namespace: namespace.to_owned(), image: image.to_owned(), shown }
    }

    fn failed(&self) -> impl Fn(ContainerdError) -> ForeignError + Send + use<> {
        let image = self.shown.clone();
        move |error| ForeignError::Store { image: image.clone(), reason: error.to_string() }
    }

    async fn begin(&self) -> Result<Sink, ContainerdError> {
        let containerd = Containerd::connect(&self.socket, &self.namespace).await?;
        let root = match containerd.image(&self.image).await {
            Ok(root) => Some(root),
            Err(ContainerdError::NoImage { .. }) => None,
            Err(error) => return Err(error),
        };
        let lease = Lease::begin(&containerd, "convert").await?.with_own_uploads();
        let store = Arc::new(ContainerdImage { containerd, shown: self.shown.clone(), root });
        Ok(Sink { target: self.clone(), lease, store })
    }
}

impl ContentTarget for ContainerdTarget {
    fn name(&self) -> &str {
        &self.shown
    }

    fn place(&self) -> String {
        containerd_place(&self.namespace)
    }

    fn open(&self) -> BoxFuture<'_, Result<Arc<dyn ContentSink>, ForeignError>> {
        async move {
            let sink = self.begin().await.map_err(self.failed())?;
            Ok(Arc::new(sink) as Arc<dyn ContentSink>)
        }
        .boxed()
    }
}

#[derive(Debug)]
struct Sink {
    target: ContainerdTarget,
    lease: Lease,
    store: Arc<ContainerdImage>,
}

impl Sink {
    async fn write(&self, digest: &Digest, size: u64, content: Incoming) -> Result<(), ContainerdError> {
        let (containerd, blob) = (self.lease.containerd(), Descriptor::new("", *digest, size));
        if containerd.upload_offset(&blob).await?.is_some() {
            containerd.upload(&blob, 0, content, &Labels::new()).await?;
        }
        Ok(())
    }
}

impl ContentSink for Sink {
    fn store(&self) -> Arc<dyn ContentStore> {
        Arc::clone(&self.store) as Arc<dyn ContentStore>
    }

    fn keep<'a>(&'a self, digest: &'a Digest) -> BoxFuture<'a, Result<bool, ForeignError>> {
        async move {
            // In this order: what is seen then is held already.
            self.lease.add_content(digest).await.map_err(self.target.failed())?;
            let size = self.lease.containerd().content_size(digest).await.map_err(self.target.failed())?;
            Ok(size.is_some())
        }
        .boxed()
    }

    fn put<'a>(&'a self, digest: &'a Digest, size: u64, content: Incoming) -> BoxFuture<'a, Result<(), ForeignError>> {
        async move { self.write(digest, size, content).await.map_err(self.target.failed()) }.boxed()
    }

    fn link<'a>(&'a self, document: &'a Digest, needs: &'a References) -> BoxFuture<'a, Result<(), ForeignError>> {
        async move {
            let label = |(part, needed): &(String, Digest)| (format!("{PART}{part}"), needed.to_string());
            let labels: Labels = needs.iter().map(label).collect();
            // containerd takes "no labels" for "remove all labels".
            if labels.is_empty() {
                return Ok(());
            }
            let labelled = self.lease.containerd().label_content(document, &labels).await;
            if labelled.map_err(self.target.failed())? {
                return Ok(());
            }
            Err(ForeignError::missing(&*self.store, document))
        }
        .boxed()
    }

    fn name_image<'a>(&'a self, root: &'a Descriptor) -> BoxFuture<'a, Result<(), ForeignError>> {
        let named = self.lease.containerd().put_image(&self.target.image, root);
        async move { named.await.map_err(self.target.failed()) }.boxed()
    }

    fn close(&self) -> BoxFuture<'_, Result<(), ForeignError>> {
        async move { self.lease.end().await.map_err(self.target.failed()) }.boxed()
    }
}
