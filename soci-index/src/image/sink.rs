//! Where an index goes: a repository, an OCI layout, another program's store, or nowhere (a dry run).
//!
//! An edge. What is put here is there, whole and checked, when the call returns; what is there already is not sent
//! again. zTOCs leave memory piece by piece, blobs of other places pass through it. Invariant: nothing is put in the
//! place of anything, but for the root of a layout or a tag, which come last.

mod foreign;

use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use tokio::io::AsyncReadExt;
use tokio::sync::mpsc;

use crate::format::class::{Class, Classified};
use crate::format::digest::Digest;
use crate::format::manifest::EMPTY_CONFIG;
use crate::format::model::Descriptor;
use crate::format::reference::ManifestName;
use crate::image::foreign::ContentSink;
use crate::image::layout::Layout;
use crate::image::store::StoreError;
use crate::image::{BlobStream, ImageError, ImageSource};

use crate::format::ztoc::Encoded;
use crate::registry::pieces::Pieces;
use crate::registry::{Body, Chunks, RegistryError, Repository};

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

/// Where an index goes.
#[derive(Debug, Clone)]
pub enum Sink {
    /// Into a repository.
    Registry(Repository),
    /// Into an OCI layout directory.
    Layout(Layout),
    /// Into another program's store, where an image is being written.
    Foreign(Arc<dyn ContentSink>),
    Nowhere,
}

impl Sink {
    /// Finds out whether anything may be put there, by the smallest blob that an index needs: what a registry refuses
    /// to that (for rights, a quota, or because it is read-only), it refuses to all.
    pub(crate) async fn try_put(&self) -> Result<(), SinkError> {
        match self {
            Self::Registry(repository) => {
                let config = Bytes::from_static(EMPTY_CONFIG);
                repository.push_anyway(&Digest::of(&config), config).await?;
                Ok(())
            }
            Self::Layout(_) | Self::Foreign(_) | Self::Nowhere => Ok(()),
        }
    }

    /// Puts a zTOC.
    pub(crate) async fn add_ztoc(&self, digest: &Digest, encoded: &Arc<Encoded>) -> Result<(), SinkError> {
        match self {
            Self::Registry(repository) => {
                repository.push_blob(digest, ztoc_body(encoded), None).await?;
            }
            Self::Layout(layout) => {
                let (layout, encoded) = (layout.clone(), Arc::clone(encoded));
                let write = move || {
                    let pieces = (0..encoded.piece_count()).map(|piece| Ok(encoded.piece(piece)));
                    layout.lock()?.add_blob_from(Pieces::new(pieces)).map(|_| ())
                };
                on_disk(write).await?;
            }
            Self::Foreign(sink) => {
                foreign::add(sink, digest, encoded.len(), ztoc_chunks(encoded)).await?;
            }
            Self::Nowhere => {}
        }
        Ok(())
    }

    /// Puts a small blob, or a manifest by its digest in a layout.
    pub(crate) async fn add_bytes(&self, bytes: Bytes) -> Result<(), SinkError> {
        match self {
            Self::Registry(repository) => {
                repository.push_blob(&Digest::of(&bytes), Body::Bytes(bytes), None).await?;
            }
            Self::Layout(layout) => {
                let layout = layout.clone();
                on_disk(move || layout.lock()?.add_blob(&bytes).map(|_| ())).await?;
            }
            Self::Foreign(sink) => {
                let (digest, size) = (Digest::of(&bytes), bytes.len() as u64);
                foreign::add(sink, &digest, size, Box::pin(futures_util::stream::iter([Ok(bytes)]))).await?;
            }
            Self::Nowhere => {}
        }
        Ok(())
    }

    /// Puts a manifest, known by its digest only.
    pub(crate) async fn add_manifest(&self, kind: &str, digest: Digest, bytes: Bytes) -> Result<(), SinkError> {
        match self {
            Self::Registry(repository) => {
                repository.push_manifest(&ManifestName::Digest(digest), kind, bytes).await?;
                Ok(())
            }
            Self::Foreign(sink) => {
                self.add_bytes(bytes.clone()).await?;
                foreign::link(sink, &digest, &bytes).await
            }
            Self::Layout(_) | Self::Nowhere => self.add_bytes(bytes).await,
        }
    }

    /// Puts a blob that another place has.
    pub(crate) async fn copy(&self, source: &ImageSource, blob: &Descriptor) -> Result<(), SinkError> {
        match self {
            Self::Registry(repository) => {
                let from = match source {
                    ImageSource::Registry { repository: from, .. } if same_registry(from, repository) => {
                        if from.name() == repository.name() {
                            return Ok(());
                        }
                        Some(from.name().to_owned())
                    }
                    _ => None,
                };
                repository.push_blob(&blob.digest, source_body(source, blob), from.as_deref()).await?;
            }
            Self::Layout(layout) if !layout.has_blob(&blob.digest) => {
                let (layout, digest) = (layout.clone(), blob.digest);
                read_blocking(source.open_blob(blob), move |reader| layout.lock()?.copy_blob(&digest, reader)).await?;
            }
            Self::Foreign(sink) => foreign::copy(sink, source, blob).await?,
            Self::Layout(_) | Self::Nowhere => {}
        }
        Ok(())
    }
}

impl Sink {
    /// Ends the writing. What was named stays, what was not may go.
    pub(crate) async fn close(&self) {
        let Self::Foreign(sink) = self else { return };
        if let Err(error) = sink.close().await {
            tracing::warn!(%error, "what was written is kept for longer than it need be");
        }
    }
}

fn same_registry(one: &Repository, other: &Repository) -> bool {
    one.registry().name() == other.registry().name()
}

/// A zTOC as a request's body: its pieces are unpacked one at a time, as they are sent.
fn ztoc_body(encoded: &Arc<Encoded>) -> Body {
    let (length, encoded) = (encoded.len(), Arc::clone(encoded));
    Body::Chunks { length, open: Arc::new(move || ztoc_chunks(&encoded)) }
}

fn ztoc_chunks(encoded: &Arc<Encoded>) -> Chunks {
    let encoded = Arc::clone(encoded);
    Box::pin(futures_util::stream::iter((0..encoded.piece_count()).map(move |index| Ok(encoded.piece(index)))))
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
pub(crate) async fn read_blocking<T: Send + 'static>(
    mut stream: BlobStream,
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
