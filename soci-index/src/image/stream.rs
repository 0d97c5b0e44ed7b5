//! The bytes of a blob as they arrive, wherever they come from.

use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_util::{Stream, StreamExt};

use crate::format::digest::Hasher;
use crate::format::model::Descriptor;
use crate::image::store::{Store, read_piece};
use crate::image::{ImageError, blocking};

/// Bytes of a blob as they arrive.
pub struct BlobStream(Pin<Box<dyn Stream<Item = Result<Bytes, ImageError>> + Send>>);

impl BlobStream {
    pub(super) fn new(stream: impl Stream<Item = Result<Bytes, ImageError>> + Send + 'static) -> Self {
        Self(Box::pin(stream))
    }
}

impl Stream for BlobStream {
    type Item = Result<Bytes, ImageError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_next_unpin(context)
    }
}

impl std::fmt::Debug for BlobStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("BlobStream")
    }
}

/// A stored blob, piece by piece.
pub(super) fn stored(
    store: &Store,
    descriptor: &Descriptor,
    range: Range<u64>,
    hasher: Option<Hasher>,
) -> impl Stream<Item = Result<Bytes, ImageError>> + Send + use<> {
    let start = (store.clone(), descriptor.clone(), range, None, hasher);
    futures_util::stream::try_unfold(start, |(store, descriptor, mut range, located, mut hasher)| async move {
        blocking(move || {
            let located = match located {
                Some(located) => located,
                None => store.locate(&descriptor.digest)?.ok_or_else(|| store.missing(&descriptor.digest))?,
            };
            store.check_size(&descriptor, located.length)?;
            store.check_range(&descriptor, &range)?;
            if range.start >= range.end {
                return match hasher.map(Hasher::finish) {
                    Some(found) if found != descriptor.digest => {
                        Err(store.wrong_digest(&descriptor.digest, found).into())
                    }
                    _ => Ok(None),
                };
            }
            let piece = read_piece(store.path(), &located, range.start, range.end)?;
            range.start += piece.len() as u64;
            if let Some(hasher) = &mut hasher {
                hasher.update(&piece);
            }
            Ok(Some((piece, (store, descriptor, range, Some(located), hasher))))
        })
        .await
    })
}
