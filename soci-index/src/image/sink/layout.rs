//! Writes content into a layout directory.

use futures_util::{FutureExt as _, TryStreamExt as _};

use crate::format::digest::Digest;
use crate::format::model::Descriptor;
use crate::image::ImageSource;
use crate::image::layout::Layout;
use crate::image::sink::{Sink, Written, read_blocking, written};
use crate::image::store::StoreError;
use crate::registry::Body;

impl Sink for Layout {
    /// Large content is written again if it is there: it may be damaged.
    fn put<'a>(&'a self, digest: &'a Digest, body: Body) -> Written<'a> {
        if matches!(body, Body::Bytes(_)) && self.has_blob(digest) {
            return written();
        }
        let (layout, digest) = (self.clone(), *digest);
        let failed = |error| StoreError::io(self.directory(), "cannot write a blob", &error);
        read_blocking(body.pieces().map_err(failed), move |reader| layout.lock()?.copy_blob(&digest, reader)).boxed()
    }

    fn copy<'a>(&'a self, source: &'a ImageSource, blob: &'a Descriptor) -> Written<'a> {
        if self.has_blob(&blob.digest) {
            return written();
        }
        let (layout, digest) = (self.clone(), blob.digest);
        read_blocking(source.open_blob(blob), move |reader| layout.lock()?.copy_blob(&digest, reader)).boxed()
    }
}
