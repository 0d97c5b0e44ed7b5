//! Indexes that pass every check and show other content than the layers have, as somebody who may push would make them.

use bytes::Bytes;
use soci_index::checkpoint::{WINDOW_BYTES, Window};
use soci_index::compact::{TOC, WINDOWS};
use soci_index::digest::Digest;
use soci_index::image::model::{Descriptor, media_type};
use soci_index::index::Compression;
use soci_index::indexer::{Options, index_bytes};
use soci_index::limits::Limits;
use soci_index::manifest::{EMPTY_CONFIG, SociIndex, ZtocReference};
use soci_index::registry::{Body, Repository};
use soci_index::span_index::{SpanIndex, SpanReference};
use soci_index::ztoc::Spans;

use crate::image::{GZIP, Image, gzip, tar, text};

/// A zTOC of a gzip layer of several spans that yields other content from the last.
///
/// # Panics
/// For a layer that has no index, or one span.
#[must_use]
pub fn ztoc(layer: &[u8], span_bytes: u64) -> Vec<u8> {
    let options = Options { compression: Compression::Gzip, span_bytes, compact: None, limits: Limits::DEFAULT };
    let mut forged = index_bytes(layer, options).expect("a layer").into_ztoc().expect("a zTOC");
    let Spans::Gzip { checkpoints, .. } = &mut forged.spans else { panic!("a gzip layer") };
    let last = checkpoints.last_mut().expect("spans");
    let mut window = last.window.load().to_vec();
    window[WINDOW_BYTES / 2..].iter_mut().for_each(|byte| *byte ^= 0x20);
    last.window = Window::from_bytes(window.into()).expect("a window");
    forged.encode().expect("a zTOC").to_vec()
}

/// Puts a version 1 index with such a zTOC of the first layer beside an image. Answers the zTOC.
///
/// # Panics
/// When the registry refuses it.
pub async fn push_index(repository: &Repository, image: &Image, span_bytes: u64) -> Digest {
    let ztoc = ztoc(&image.blobs[0], span_bytes);
    let reference = ZtocReference {
        digest: Digest::of(&ztoc),
        size: ztoc.len() as u64,
        layer: Digest::of(&image.blobs[0]),
        layer_media_type: GZIP.to_owned(),
        span_bytes,
        disable_xattrs: false,
    };
    push_blobs(repository, &[&ztoc, EMPTY_CONFIG]).await;
    let index = SociIndex::v1(&[reference], &[], &Descriptor::of(media_type::MANIFEST, &image.manifest)).to_json();
    repository.push_referrer(media_type::MANIFEST, index.into()).await.expect("a referrer");
    Digest::of(&ztoc)
}

/// Puts a span index beside an image that gives the first layer the table of another one. Answers the table.
///
/// # Panics
/// When the registry refuses it.
pub async fn push_spans(repository: &Repository, image: &Image, span_bytes: u64) -> Digest {
    let evil = gzip(&tar(&[("evil", text(666, 300_000))]), 6);
    let options =
        Options { compression: Compression::Gzip, span_bytes, compact: Some(span_bytes), limits: Limits::DEFAULT };
    let blobs = index_bytes(&evil, options).expect("a layer").compact.expect("wanted").expect("a span index");
    let describe = |kind: &str, blob: &[u8]| (Descriptor::of(kind, blob).digest, blob.len() as u64);
    let reference = SpanReference {
        layer: Digest::of(&image.blobs[0]),
        toc: describe(TOC, &blobs.toc),
        windows: describe(WINDOWS, &blobs.windows),
        span_bytes,
    };
    push_blobs(repository, &[&blobs.toc, &blobs.windows, EMPTY_CONFIG]).await;
    let toc = reference.toc.0;
    let index = SpanIndex::new(&[reference], &Descriptor::of(media_type::MANIFEST, &image.manifest)).to_json();
    repository.push_referrer(media_type::MANIFEST, index.into()).await.expect("a referrer");
    toc
}

async fn push_blobs(repository: &Repository, blobs: &[&[u8]]) {
    for blob in blobs {
        let body = Body::Bytes(Bytes::copy_from_slice(blob));
        repository.push_blob(&Digest::of(blob), body, None).await.expect("a blob");
    }
}
