//! Writes content into another program's store and records the references between its documents.
//!
//! Such a store collects what nothing refers to. While an image is written a lease keeps its content; each document is
//! linked to its parts as soon as it is there, so that in the end the image's name keeps the whole.

use std::io;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::{FutureExt as _, StreamExt as _, TryFutureExt as _};
use parking_lot::Mutex;

use crate::format::digest::Digest;
use crate::format::limits::Limits;
use crate::format::manifest::SociIndex;
use crate::format::model::{Descriptor, ImageIndex, ImageManifest};
use crate::image::foreign::{ContentSink, ForeignError, Incoming, References};
use crate::image::sink::{Sink, SinkError, Written};
use crate::image::{ImageError, ImageSource};
use crate::registry::Body;

/// Another program's store, where an image is being written.
#[derive(Debug)]
pub(crate) struct ForeignSink(pub(crate) Arc<dyn ContentSink>);

impl ForeignSink {
    /// Puts a blob, unless it is there.
    async fn add(&self, digest: &Digest, size: u64, content: Incoming) -> Result<(), ForeignError> {
        if self.0.keep(digest).await? { Ok(()) } else { self.0.put(digest, size, content).await }
    }

    /// Records in the store what an existing document refers to. Of an index's manifests those that are there: an image
    /// that was pulled for one platform names the others all the same.
    async fn link(&self, digest: &Digest, document: &[u8]) -> Result<(), ForeignError> {
        let mut needs = References::new();
        for (part, needed) in references(document) {
            if !part.starts_with("m.") || self.0.keep(&needed).await? {
                needs.push((part, needed));
            }
        }
        self.0.link(digest, &needs).await
    }
}

impl Sink for ForeignSink {
    fn put<'a>(&'a self, digest: &'a Digest, body: Body) -> Written<'a> {
        self.add(digest, body.len(), body.pieces()).map_err(failed).boxed()
    }

    fn put_manifest<'a>(&'a self, _: &'a str, digest: &'a Digest, bytes: Bytes) -> Written<'a> {
        async move {
            self.put(digest, Body::Bytes(bytes.clone())).await?;
            self.link(digest, &bytes).await.map_err(failed)
        }
        .boxed()
    }

    /// What breaks the reading is what is reported.
    fn copy<'a>(&'a self, source: &'a ImageSource, blob: &'a Descriptor) -> Written<'a> {
        async move {
            let broken = Arc::new(Mutex::new(None));
            let noted = Arc::clone(&broken);
            let content = source.open_blob(blob).map(move |piece| {
                piece.map_err(|error| {
                    let copy = io::Error::other(error.to_string());
                    *noted.lock() = Some(error);
                    copy
                })
            });
            let added = self.add(&blob.digest, blob.size, Box::pin(content)).await;
            let broken = broken.lock().take();
            broken.map_or(added.map_err(failed), |error| Err(error.into()))
        }
        .boxed()
    }
}

fn failed(error: ForeignError) -> SinkError {
    ImageError::from(error).into()
}

/// What a document refers to, by the names that containerd's clients use, and AWS's tool for zTOCs.
fn references(document: &[u8]) -> References {
    let numbered = |part: &'static str, descriptors: Vec<Descriptor>| {
        let name = move |(number, needed): (usize, Descriptor)| (format!("{part}.{number}"), needed.digest);
        descriptors.into_iter().enumerate().map(name)
    };
    if let Ok(manifest) = serde_json::from_slice::<ImageManifest>(document) {
        let part = if SociIndex::parse(document, &Limits::DEFAULT).is_ok() { "ztoc" } else { "l" };
        let config = ("config".to_owned(), manifest.config.digest);
        return std::iter::once(config).chain(numbered(part, manifest.layers)).collect();
    }
    match serde_json::from_slice::<ImageIndex>(document) {
        Ok(index) => numbered("m", index.manifests).collect(),
        // The caller that wrote such a document has to list its references.
        Err(_) => References::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_parts() {
        let digest = |text: &str| Digest::of(text.as_bytes());
        let entry = |text: &str| format!(r#"{{"mediaType":"m","digest":"{}","size":1}}"#, digest(text));
        let config = entry("c");
        let layers = format!("[{},{}]", entry("x"), entry("y"));
        for (document, expected) in [
            (
                format!(r#"{{"schemaVersion":2,"config":{config},"layers":{layers}}}"#),
                &[("config", "c"), ("l.0", "x"), ("l.1", "y")][..],
            ),
            (format!(r#"{{"schemaVersion":2,"manifests":{layers}}}"#), &[("m.0", "x"), ("m.1", "y")]),
            (format!(r#"{{"schemaVersion":2,"config":{config}}}"#), &[("config", "c")]),
            ("{}".to_owned(), &[]),
            ("?".to_owned(), &[]),
        ] {
            let expected: References = expected.iter().map(|(part, text)| ((*part).to_owned(), digest(text))).collect();
            assert_eq!(references(document.as_bytes()), expected, "{document}");
        }
        let soci = SociIndex::v2(&[], &[]).to_json();
        assert_eq!(references(&soci), [("config".to_owned(), Digest::of(crate::format::manifest::EMPTY_CONFIG))]);
    }
}
