//! Streams single layers through the indexer, as what their bytes are.
//!
//! The first bytes decide how a layer is read, not its media type. Invariant: a layer counts as damaged only if its
//! digest is right; bytes that were damaged in flight are an error.

use std::convert::Infallible;

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, TryStreamExt as _};
use tokio::sync::mpsc;

use crate::format::compact;
use crate::format::digest::Algorithm;
use crate::format::encoding::{Declared, Encoding, SNIFF_BYTES};
use crate::format::index::Compression;
use crate::format::model::Descriptor;
use crate::image::urls::UrlFetcher;
use crate::image::{BlobStream, ImageError, ImageSource};
use crate::indexing::pipeline::{PipelineError, index_chunks};
use crate::indexing::{IndexError, Indexed, Options};
use crate::publish::build::{BuildError, BuildOptions, Observer, Progress, Skip, no_compression};

/// Streams one layer through the indexer, and checks its digest; or says why it has no index.
pub(crate) async fn index_layer(
    source: &ImageSource,
    layer: &Descriptor,
    options: &BuildOptions,
    observer: &Observer,
) -> Result<Result<Indexed, Skip>, BuildError> {
    let Declared::Layer(declared) = Declared::by_media_type(&layer.media_type) else {
        return Ok(Err(no_compression(&layer.media_type)));
    };
    let place = match place(source, layer, options).await? {
        Ok(place) => place,
        Err(skip) => return Ok(Err(skip)),
    };
    if declared == Encoding::Zstd && starts_as(&place, layer).await == Some(Encoding::Zstd) {
        return Ok(Err(no_compression(&layer.media_type)));
    }
    // The indexer hashes the layer anyway: to do it twice would be a tenth of all the work.
    let is_hashed = layer.digest.algorithm() == Algorithm::Sha256;
    let (encoding, stream) = peek(if is_hashed { place.part(layer, layer.size) } else { place.whole(layer) }).await?;
    if encoding != declared {
        let (found, media_type) = (encoding.name(), &layer.media_type);
        tracing::warn!(layer = %layer.digest, media_type, "the layer is {found}, whatever its media type says");
    }
    let compression = match encoding {
        Encoding::Gzip => Compression::Gzip,
        Encoding::Tar => Compression::None,
        Encoding::Zstd => return Ok(Err(Skip::Compression { name: encoding.name().to_owned() })),
    };
    let compact = options.format.has_spans().then(|| compact::span_bytes(layer.size, options.index_span_bytes));
    let options = Options { compression, span_bytes: options.span_bytes, compact, limits: options.limits };
    match scan(stream, options, observer).await? {
        Ok(indexed) if is_hashed && indexed.layer_digest != layer.digest => {
            let (expected, found) = (Box::new(layer.digest), Box::new(indexed.layer_digest));
            Err(BuildError::LayerDigest { expected, found })
        }
        Ok(indexed) => Ok(Ok(indexed)),
        Err(error @ (IndexError::SpanSize { .. } | IndexError::CompactSpanSize { .. })) => {
            Err(BuildError::Layer { layer: Box::new(layer.digest), source: error })
        }
        Err(error) => {
            // Ends with an error if these are not the layer's bytes.
            place.whole(layer).try_for_each(|_| std::future::ready(Ok(()))).await?;
            Ok(Err(Skip::Damaged { error }))
        }
    }
}

/// Where a layer is read from.
enum LayerOrigin<'a> {
    Image(&'a ImageSource),
    Urls(&'a UrlFetcher),
}

impl LayerOrigin<'_> {
    /// The first bytes, not checked against the digest.
    fn part(&self, layer: &Descriptor, bytes: u64) -> BlobStream {
        match self {
            Self::Image(source) => source.read_range(layer, 0..bytes),
            Self::Urls(urls) => urls.read(layer, 0..bytes),
        }
    }

    /// All of it, checked.
    fn whole(&self, layer: &Descriptor) -> BlobStream {
        match self {
            Self::Image(source) => source.open_blob(layer),
            Self::Urls(urls) => urls.read(layer, 0..layer.size),
        }
    }
}

/// Where the layer is available: beside the image, or if it is a foreign one and that is allowed, at its URLs.
async fn place<'a>(
    source: &'a ImageSource,
    layer: &Descriptor,
    options: &'a BuildOptions,
) -> Result<Result<LayerOrigin<'a>, Skip>, ImageError> {
    if !layer.is_foreign() || source.has_blob(layer).await? {
        return Ok(Ok(LayerOrigin::Image(source)));
    }
    Ok(match &options.urls {
        Some(urls) if !layer.urls.is_empty() => Ok(LayerOrigin::Urls(urls)),
        _ => Err(Skip::Foreign { urls: layer.urls.clone() }),
    })
}

/// What a blob's first bytes say, by a request of its own. `None` when they cannot be obtained.
async fn starts_as(place: &LayerOrigin<'_>, layer: &Descriptor) -> Option<Encoding> {
    let first: Vec<Bytes> = place.part(layer, layer.size.min(SNIFF_BYTES)).try_collect().await.ok()?;
    Some(Encoding::sniff(&first.concat()))
}

/// What a stream's first bytes say, and the stream from its beginning.
async fn peek(
    mut stream: BlobStream,
) -> Result<(Encoding, impl Stream<Item = Result<Bytes, ImageError>> + Unpin), ImageError> {
    let (mut seen, mut start) = (Vec::new(), Vec::new());
    while (start.len() as u64) < SNIFF_BYTES {
        let Some(chunk) = stream.try_next().await? else { break };
        start.extend(chunk.iter().take(16));
        seen.push(Ok(chunk));
    }
    Ok((Encoding::sniff(&start), futures_util::stream::iter(seen).chain(stream)))
}

async fn scan(
    mut stream: impl Stream<Item = Result<Bytes, ImageError>> + Unpin,
    options: Options,
    observer: &Observer,
) -> Result<Result<Indexed, IndexError>, BuildError> {
    let (send, mut receive) = mpsc::channel::<Bytes>(16);
    let task = tokio::task::spawn_blocking(move || {
        index_chunks(|| Ok::<_, Infallible>(receive.blocking_recv()), options, &mut |_| {})
    });
    let mut broken = None;
    while let Some(chunk) = stream.next().await {
        match chunk {
            Ok(chunk) => {
                observer(Progress::Read { bytes: chunk.len() as u64 });
                // The indexer has stopped listening: it will say why.
                if send.send(chunk).await.is_err() {
                    break;
                }
            }
            Err(error) => {
                broken = Some(error);
                break;
            }
        }
    }
    drop(send);
    let indexed = task.await.map_err(|_| BuildError::Stopped)?;
    match (broken, indexed) {
        (Some(error), _) => Err(error.into()),
        (None, Ok(indexed)) => Ok(Ok(indexed)),
        (None, Err(PipelineError::Index(error))) => Ok(Err(error)),
        (None, Err(PipelineError::Read(never))) => match never {},
    }
}
