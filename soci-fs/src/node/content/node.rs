//! The content of a node's containerd, in whichever of its namespaces.
//!
//! The daemon looks for indexes and their parts here if its operator says that they are kept in containerd. The
//! question may come while containerd waits for our answer to `Prepare`. It holds no transaction then, and what is
//! asked takes one for reading that ends with the answer; nothing is written. A containerd that is silent costs two
//! seconds, once in half a minute, and counts as one that has nothing.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use futures_util::{FutureExt as _, StreamExt as _, TryStreamExt as _};
use parking_lot::Mutex;
use soci_index::format::digest::Digest;
use soci_index::format::model::Descriptor;
use soci_index::image::ImageSource;
use soci_index::image::foreign::{ContentStore, ForeignError, Pieces};

use crate::node::grpc::containerd::{Containerd, ContainerdError};

/// How long containerd may take to say whether it has something.
const PATIENCE: Duration = Duration::from_secs(2);
/// Backoff after it did not answer.
const REST: Duration = Duration::from_secs(30);

/// What messages call it.
const NAME: &str = "containerd's content store";

/// All content of a containerd.
#[derive(Debug)]
pub struct NodeContent {
    socket: PathBuf,
    failed: Mutex<Option<Instant>>,
}

impl NodeContent {
    /// The content of the containerd at `socket`, as a place for parts of indexes.
    #[must_use]
    pub fn source(socket: PathBuf) -> ImageSource {
        ImageSource::foreign(Arc::new(Self { socket, failed: Mutex::default() }))
    }

    fn rests(&self) -> bool {
        let failed = *self.failed.lock();
        failed.is_some_and(|since| since.elapsed() < REST)
    }

    /// The namespace that has some content, and how long it is.
    async fn find(&self, digest: &Digest) -> Option<(Containerd, u64)> {
        if self.rests() {
            return None;
        }
        let why = match tokio::time::timeout(PATIENCE, search(&self.socket, digest)).await {
            Ok(Ok(found)) => return found,
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("it did not answer within {PATIENCE:?}"),
        };
        tracing::warn!(%digest, error = why, "containerd cannot be asked for parts of indexes");
        *self.failed.lock() = Some(Instant::now());
        None
    }
}

async fn search(socket: &std::path::Path, digest: &Digest) -> Result<Option<(Containerd, u64)>, ContainerdError> {
    let containerd = Containerd::connect(socket, "default").await?;
    for namespace in containerd.namespaces().await? {
        let there = containerd.in_namespace(&namespace)?;
        if let Some(size) = there.content_size(digest).await? {
            return Ok(Some((there, size)));
        }
    }
    Ok(None)
}

impl ContentStore for NodeContent {
    fn name(&self) -> &'static str {
        NAME
    }

    fn root(&self) -> Option<&Descriptor> {
        None
    }

    fn size<'a>(&'a self, digest: &'a Digest) -> BoxFuture<'a, Result<Option<u64>, ForeignError>> {
        async move { Ok(self.find(digest).await.map(|(_, size)| size)) }.boxed()
    }

    fn read(&self, digest: &Digest, range: Range<u64>) -> Pieces {
        let (socket, digest) = (self.socket.clone(), *digest);
        let failed =
            move |reason: String| ForeignError::Failed { image: NAME.to_owned(), digest: Box::new(digest), reason };
        let open = async move {
            let found = tokio::time::timeout(PATIENCE, search(&socket, &digest)).await;
            let found = found.map_err(|_| failed(format!("it did not answer within {PATIENCE:?}")))?;
            let found = found.map_err(|error| failed(error.to_string()))?;
            let (there, _) = found.ok_or_else(|| failed("it is gone".to_owned()))?;
            Ok(there.read_content(&digest, range).map_err(move |error| failed(error.to_string())))
        };
        futures_util::stream::once(open).try_flatten().boxed()
    }
}
