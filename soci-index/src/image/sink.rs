//! Where content goes: a repository, an OCI layout, another program's store, or nowhere (a dry run).
//!
//! An edge. What is put here is there, whole and checked, when the call returns; what is there already is not sent
//! again. zTOCs leave memory piece by piece, blobs of other places pass through it. Invariant: nothing is put in the
//! place of anything: a name is given elsewhere ([`crate::publish::convert`]), and last.

mod foreign;
mod layout;
mod registry;

use std::fmt::{Debug, Display};
use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures_util::future::BoxFuture;
use futures_util::{FutureExt as _, Stream, StreamExt as _};
use tokio::io::AsyncReadExt as _;
use tokio::sync::mpsc;

use crate::format::class::{Class, Classified};
use crate::format::digest::Digest;
use crate::format::model::Descriptor;
use crate::format::ztoc::Encoded;
use crate::image::store::StoreError;
use crate::image::{ImageError, ImageSource};
use crate::registry::pieces::Pieces;
use crate::registry::{Body, Chunks, RegistryError};

pub(crate) use self::foreign::ForeignSink;

/// Why something could not be put where it goes.
#[derive(Debug, thiserror::Error)]
pub enum SinkError {
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// What should be copied cannot be read, or the store of another program does not take it.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The layout.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The background task was stopped.
    #[error("writing was stopped")]
    Stopped,
}

impl Classified for SinkError {
    fn class(&self) -> Class {
        match self {
            Self::Registry(error) => error.class(),
            Self::Image(error) => error.class(),
            Self::Store(error) => error.class(),
            Self::Stopped => Class::Other,
        }
    }
}

/// What becomes of a call that writes.
pub(crate) type Written<'a, E = SinkError> = BoxFuture<'a, Result<(), E>>;

/// Nothing had to be written.
pub(crate) fn written<'a, E: Send + 'a>() -> Written<'a, E> {
    std::future::ready(Ok(())).boxed()
}

/// A place that content is written to.
pub(crate) trait Sink: Debug + Send + Sync {
    /// Finds out whether anything may be put there.
    fn try_put(&self) -> Written<'_> {
        written()
    }

    /// Puts a blob.
    fn put<'a>(&'a self, digest: &'a Digest, body: Body) -> Written<'a>;

    /// Puts a small blob.
    fn put_bytes(&self, bytes: Bytes) -> Written<'_> {
        async move { self.put(&Digest::of(&bytes), Body::Bytes(bytes)).await }.boxed()
    }

    /// Puts a manifest, known by its digest only.
    fn put_manifest<'a>(&'a self, _kind: &'a str, digest: &'a Digest, bytes: Bytes) -> Written<'a> {
        self.put(digest, Body::Bytes(bytes))
    }

    /// Puts a blob that another place has.
    fn copy<'a>(&'a self, source: &'a ImageSource, blob: &'a Descriptor) -> Written<'a>;
}

/// No place: what is put there is not kept.
#[derive(Debug)]
pub(crate) struct Nowhere;

impl Sink for Nowhere {
    fn put<'a>(&'a self, _: &'a Digest, _: Body) -> Written<'a> {
        written()
    }

    fn copy<'a>(&'a self, _: &'a ImageSource, _: &'a Descriptor) -> Written<'a> {
        written()
    }
}

/// A zTOC as a request's body: its pieces are unpacked one at a time, as they are sent.
pub(crate) fn ztoc_body(encoded: &Arc<Encoded>) -> Body {
    let (length, encoded) = (encoded.len(), Arc::clone(encoded));
    let open = move || -> Chunks {
        let encoded = Arc::clone(&encoded);
        Box::pin(futures_util::stream::iter((0..encoded.piece_count()).map(move |index| Ok(encoded.piece(index)))))
    };
    Body::Chunks { length, open: Arc::new(open) }
}

/// A blob of another place as a request's body.
pub(crate) fn source_body(source: &ImageSource, blob: &Descriptor) -> Body {
    let (source, blob, length) = (source.clone(), blob.clone(), blob.size);
    let open = move || -> Chunks { Box::pin(source.open_blob(&blob).map(|piece| piece.map_err(io::Error::other))) };
    Body::Chunks { length, open: Arc::new(open) }
}

/// A file as a request's body: read while it is sent.
pub(crate) fn file_body(path: PathBuf, length: u64) -> Body {
    const PIECE_BYTES: usize = 256 << 10;
    enum Reading {
        NotOpen(PathBuf),
        Open(tokio::fs::File),
    }
    let open = move || -> Chunks {
        Box::pin(futures_util::stream::try_unfold(Reading::NotOpen(path.clone()), |reading| async {
            let mut file = match reading {
                Reading::NotOpen(path) => tokio::fs::File::open(path).await?,
                Reading::Open(file) => file,
            };
            let mut piece = BytesMut::with_capacity(PIECE_BYTES);
            let length = file.read_buf(&mut piece).await?;
            Ok((length > 0).then(|| (piece.freeze(), Reading::Open(file))))
        }))
    };
    Body::Chunks { length, open: Arc::new(open) }
}

/// Runs disk access where it may block.
pub(crate) async fn on_disk<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, SinkError> {
    Ok(tokio::task::spawn_blocking(work).await.map_err(|_| SinkError::Stopped)??)
}

/// Hands a stream to code that reads in the blocking way. What breaks the stream is what is reported.
pub(crate) async fn read_blocking<T: Send + 'static, E: Display + Into<SinkError>>(
    mut stream: impl Stream<Item = Result<Bytes, E>> + Unpin,
    work: impl FnOnce(&mut dyn Read) -> Result<T, StoreError> + Send + 'static,
) -> Result<T, SinkError> {
    let (send, mut receive) = mpsc::channel::<io::Result<Bytes>>(4);
    let pieces = std::iter::from_fn(move || receive.blocking_recv());
    let task = tokio::task::spawn_blocking(move || work(&mut Pieces::new(pieces)));
    let mut broken = None;
    while let Some(piece) = stream.next().await {
        let piece = piece.map_err(|error| {
            let copy = io::Error::other(error.to_string());
            broken = Some(error);
            copy
        });
        // A reader that has stopped listening will say why.
        if send.send(piece).await.is_err() {
            break;
        }
    }
    drop(send);
    let done = task.await.map_err(|_| SinkError::Stopped)?;
    match broken {
        Some(error) => Err(error.into()),
        None => Ok(done?),
    }
}
