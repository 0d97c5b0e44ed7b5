//! Writes content into a repository.

use bytes::Bytes;
use futures_util::{FutureExt as _, TryFutureExt as _};

use crate::format::digest::Digest;
use crate::format::manifest::EMPTY_CONFIG;
use crate::format::model::Descriptor;
use crate::format::reference::ManifestName;
use crate::image::ImageSource;
use crate::image::sink::{Sink, Written, source_body};
use crate::registry::{Body, Repository};

impl Sink for Repository {
    /// By the smallest blob that an index needs: what a registry refuses to that (for rights, a quota, or because it is
    /// read-only), it refuses to all.
    fn try_put(&self) -> Written<'_> {
        async move {
            let config = Bytes::from_static(EMPTY_CONFIG);
            self.push_anyway(&Digest::of(&config), config).await?;
            Ok(())
        }
        .boxed()
    }

    fn put<'a>(&'a self, digest: &'a Digest, body: Body) -> Written<'a> {
        self.push_blob(digest, body, None).map_ok(drop).err_into().boxed()
    }

    fn put_manifest<'a>(&'a self, kind: &'a str, digest: &'a Digest, bytes: Bytes) -> Written<'a> {
        async move {
            self.push_manifest(&ManifestName::Digest(*digest), kind, bytes).await?;
            Ok(())
        }
        .boxed()
    }

    /// The registry takes the blob of another of its repositories from there.
    fn copy<'a>(&'a self, source: &'a ImageSource, blob: &'a Descriptor) -> Written<'a> {
        async move {
            let own = |from: &&Self| from.registry().name() == self.registry().name();
            let from = source.repository().filter(own).map(Self::name);
            if from != Some(self.name()) {
                self.push_blob(&blob.digest, source_body(source, blob), from).await?;
            }
            Ok(())
        }
        .boxed()
    }
}
