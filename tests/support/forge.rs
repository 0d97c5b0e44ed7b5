//! Indexes, honest and forged, of layers in images that tests have made, and pushing them beside an image.

use bytes::Bytes;
use soci_index::format::checkpoint::{WINDOW_BYTES, Window};
use soci_index::format::compact;
use soci_index::format::digest::Digest;
use soci_index::format::entry::EntryKind;
use soci_index::format::icon;
use soci_index::format::index::{Compression, LayerIndex};
use soci_index::format::limits::Limits;
use soci_index::format::manifest::{EMPTY_CONFIG, SociIndex, ZtocReference};
use soci_index::format::model::{Descriptor, media_type};
use soci_index::format::span_index::{SpanIndex, SpanReference};
use soci_index::format::ztoc::{Spans, Ztoc};
use soci_index::indexing::{Indexed, Indexer, Options};
use soci_index::registry::{Body, Repository};

use crate::image::{GZIP, Image, gzip, tar, text};

/// Spans of these indexes, unless a test wants others.
pub const SPAN_BYTES: u64 = 65_536;

/// An index that was pushed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pushed {
    /// Its manifest.
    pub index: Digest,
    /// The zTOC, or the TOC.
    pub table: Digest,
}

/// What an index says that is not so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lie {
    /// Nothing.
    None,
    /// Another history of the last span: its files have other bytes, all digests are right. For zTOCs only.
    Window,
    /// Every symbolic link leads to `evil`.
    Link,
    /// The table of another layer altogether. For span indexes only.
    Layer,
}

fn indexed(blob: &[u8], span_bytes: u64) -> Indexed {
    let options =
        Options { compression: Compression::Gzip, span_bytes, compact: Some(span_bytes), limits: Limits::DEFAULT };
    let mut indexer = Indexer::new(options).expect("options");
    indexer.push(blob, &mut |_| {}).expect("a layer");
    indexer.finish().expect("a layer")
}

/// The zTOC of a layer, with a lie in it.
///
/// # Panics
/// When the blob is no gzip layer.
#[must_use]
pub fn ztoc(blob: &[u8], span_bytes: u64, lie: Lie) -> Ztoc {
    let mut ztoc = indexed(blob, span_bytes).into_ztoc().expect("a layer that a zTOC can represent");
    match lie {
        Lie::None => {}
        Lie::Window => {
            let Spans::Gzip { checkpoints, .. } = &mut ztoc.spans else { panic!("a gzip layer") };
            let last = checkpoints.last_mut().expect("spans");
            let mut window = last.window.load().to_vec();
            window[WINDOW_BYTES / 2..].iter_mut().for_each(|byte| *byte ^= 0x20);
            last.window = Window::from_bytes(window.into()).expect("a window");
        }
        Lie::Link => {
            let links = ztoc.entries.iter_mut().filter(|entry| entry.kind == EntryKind::Symlink);
            links.for_each(|entry| entry.link = b"evil"[..].into());
        }
        Lie::Layer => panic!("a zTOC says of which size its layer is"),
    }
    ztoc
}

async fn push_blob(repository: &Repository, blob: &[u8]) {
    let body = Body::Bytes(Bytes::copy_from_slice(blob));
    repository.push_blob(&Digest::of(blob), body, None).await.expect("a blob is taken");
}

/// Pushes AWS's index of the first layer of an image.
///
/// # Panics
/// When the registry refuses it.
pub async fn push_ztoc(repository: &Repository, image: &Image, span_bytes: u64, lie: Lie) -> Pushed {
    let ztoc = ztoc(&image.blobs[0], span_bytes, lie).encode().expect("a zTOC").to_vec();
    let reference = ZtocReference {
        digest: Digest::of(&ztoc),
        size: ztoc.len() as u64,
        layer: Digest::of(&image.blobs[0]),
        layer_media_type: GZIP.to_owned(),
        span_bytes,
        disable_xattrs: false,
    };
    push_blob(repository, &ztoc).await;
    push_blob(repository, EMPTY_CONFIG).await;
    let index = SociIndex::v1(&[reference], &[], &Descriptor::of(media_type::MANIFEST, &image.manifest)).to_json();
    let pushed = Pushed { index: Digest::of(&index), table: Digest::of(&ztoc) };
    repository.push_referrer(media_type::MANIFEST, index.into()).await.expect("an index is taken");
    pushed
}

/// Pushes the span index of the first layer of an image.
///
/// # Panics
/// When the registry refuses it.
pub async fn push_spans(repository: &Repository, image: &Image, span_bytes: u64, lie: Lie) -> Pushed {
    let other = || gzip(&tar(&[("evil", text(666, 300_000))]), 6).into();
    let blob = if lie == Lie::Layer { other() } else { image.blobs[0].clone() };
    let compact = indexed(&blob, span_bytes).compact.expect("asked for").expect("a layer that it can represent");
    let limits = Limits::DEFAULT;
    let mut index: LayerIndex = compact::decode(&Bytes::from(compact.toc), &limits).expect("our own");
    if lie == Lie::Link {
        let links = index.entries.iter_mut().filter(|entry| entry.kind == EntryKind::Symlink);
        links.for_each(|entry| entry.link = b"evil"[..].into());
    }
    let toc = compact::encode(&index).expect("an index");
    let reference = SpanReference {
        layer: Digest::of(&image.blobs[0]),
        toc: (Digest::of(&toc), toc.len() as u64),
        windows: (Digest::of(&compact.windows), compact.windows.len() as u64),
        span_bytes,
    };
    for blob in [&toc[..], &compact.windows[..], EMPTY_CONFIG, icon::PNG] {
        push_blob(repository, blob).await;
    }
    let index = SpanIndex::new(&[reference], &Descriptor::of(media_type::MANIFEST, &image.manifest)).to_json();
    let pushed = Pushed { index: Digest::of(&index), table: Digest::of(&toc) };
    repository.push_referrer(media_type::MANIFEST, index.into()).await.expect("an index is taken");
    pushed
}
