//! Reading blobs, whole or in part.
//!
//! A range read survives what registries and storage do to it: a redirect (its target is kept for a short while, so
//! that the registry is not asked for every span), a signed URL that has expired, a server that knows no ranges, a
//! legal answer that is too short, a connection cut in the middle, a mirror that fails (see `read`). Each continues at
//! the byte reached. Invariants: the bytes yielded are exactly the range asked for, in order; a `Content-Range` that
//! says anything else ends the read with an error; bytes of a range are *not* checked against the digest (the span
//! decoder does that), bytes of a whole blob are, before the stream ends.

use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use futures_util::{Stream, StreamExt, TryStreamExt};

use crate::format::digest::{Digest, Hasher};
use crate::format::model::Descriptor;
use crate::registry::Repository;
use crate::registry::error::RegistryError;
use crate::registry::exchange::Call;
use crate::registry::failover::HostedRepository;
use crate::registry::headers::content_range;
use crate::registry::need::Need;
use crate::registry::retry::Deadline;
use crate::registry::scopes::Scopes;
use crate::registry::transport::Method;

mod read;

use read::Read;

/// Bytes of a blob as they arrive. After an error it yields nothing more.
pub struct ByteStream(Pin<Box<dyn Stream<Item = Result<Bytes, RegistryError>> + Send>>);

impl Stream for ByteStream {
    type Item = Result<Bytes, RegistryError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_next_unpin(context)
    }
}

impl std::fmt::Debug for ByteStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ByteStream")
    }
}

/// What comes when a part of a blob is asked for.
#[derive(Debug)]
pub enum Part<S> {
    /// The bytes that were asked for.
    Asked(S),
    /// The whole blob, from its first byte on: the host serves no parts.
    Whole(S),
}

impl<S> Part<S> {
    /// The same of another stream.
    pub(crate) fn map<T>(self, change: impl FnOnce(S) -> T) -> Part<T> {
        match self {
            Self::Asked(stream) => Part::Asked(change(stream)),
            Self::Whole(stream) => Part::Whole(change(stream)),
        }
    }
}

/// Reads ranges of one blob.
#[derive(Debug, Clone)]
pub struct BlobReader {
    repository: Repository,
    /// Where to read, if not where it is available.
    only: Option<HostedRepository>,
    digest: Digest,
    size: u64,
}

impl Repository {
    /// A reader of the blob `digest`, which has `size` bytes (its descriptor says). Nothing is sent.
    #[must_use]
    pub fn blob(&self, digest: Digest, size: u64) -> BlobReader {
        BlobReader { repository: self.clone(), only: None, digest, size }
    }

    /// Whether the host that is asked first for a part of a blob is known to serve such.
    #[must_use]
    pub(crate) fn serves_parts(&self) -> bool {
        let hosts = self.hosts(Need::Part).unwrap_or_default();
        hosts.first().is_some_and(|hosted| hosted.endpoint().serves_parts())
    }

    /// The size of a blob, or `None` if there is no such blob.
    ///
    /// # Errors
    /// [`RegistryError`] when the registry cannot be reached or does not report it.
    pub async fn blob_size(&self, digest: &Digest) -> Result<Option<u64>, RegistryError> {
        let deadline = &self.deadline(0);
        self.first(Need::Content, |hosted| async move { size(&hosted, digest, deadline).await }).await
    }

    /// A whole blob of at most `limit` bytes, checked against its descriptor.
    ///
    /// # Errors
    /// [`RegistryError`] when it is missing, too large, or not what the descriptor says.
    pub async fn blob_bytes(&self, descriptor: &Descriptor, limit: u64) -> Result<Bytes, RegistryError> {
        if descriptor.size > limit {
            return Err(RegistryError::TooLarge {
                registry: self.registry().name().to_owned(),
                repository: self.name().to_owned(),
                what: format!("blob {}", descriptor.digest),
                limit,
            });
        }
        let reader = &self.blob(descriptor.digest, descriptor.size);
        // Host by host, so that a mirror's wrong bytes do not fail the read.
        let read = self.first(Need::Content, |hosted| async move {
            let reader = BlobReader { only: Some(hosted), ..reader.clone() };
            collect(reader.read_all()).await.map(Some)
        });
        read.await?.ok_or_else(|| reader.missing(self.registry().name()))
    }
}

async fn size(hosted: &HostedRepository, digest: &Digest, deadline: &Deadline) -> Result<Option<u64>, RegistryError> {
    let mut call = blob_call(hosted, Method::Head, digest, format!("asking for the size of {digest}"));
    let answer = hosted.call(&call, deadline).await?;
    match answer.status() {
        200 => {}
        404 => return Ok(None),
        _ => return Err(answer.error().await),
    }
    if let Some(size) = answer.response.content_length() {
        return Ok(Some(size));
    }
    call.method = Method::Get;
    let part = call.clone().with_header("range", "bytes=0-0");
    let mut answer = hosted.call(&part, deadline).await?;
    if read::REFUSES_RANGE.contains(&answer.status()) || answer.status() == 416 {
        answer = hosted.call(&call, deadline).await?;
    }
    let range = answer.header("content-range").and_then(content_range);
    match (answer.status(), range.and_then(|range| range.total), answer.response.content_length()) {
        (206, Some(total), _) | (200, _, Some(total)) => Ok(Some(total)),
        (404, ..) => Ok(None),
        _ => Err(hosted.malformed(&call.what, "the registry does not report it")),
    }
}

pub(crate) fn blob_call(hosted: &HostedRepository, method: Method, digest: &Digest, what: impl Into<String>) -> Call {
    let call = Call::new(method, hosted.url(&format!("blobs/{digest}")), Scopes::pull(hosted.name()), what);
    // Anything but the bytes themselves would make offsets and digests meaningless.
    call.with_header("accept-encoding", "identity")
}

async fn collect(mut stream: ByteStream) -> Result<Bytes, RegistryError> {
    let mut whole = BytesMut::new();
    while let Some(chunk) = stream.try_next().await? {
        whole.extend_from_slice(&chunk);
    }
    Ok(whole.freeze())
}

impl BlobReader {
    /// The bytes `range`, as they arrive. Nothing is sent before the stream is polled. Where the registry serves no
    /// parts of blobs, each such read transfers the blob up to the end of the range.
    #[must_use]
    pub fn read_range(&self, range: Range<u64>) -> ByteStream {
        Read::new(self.clone(), range).into_stream()
    }

    /// Asks for the bytes `range` and gives them as they arrive; or the whole blob, where the registry serves no parts.
    ///
    /// # Errors
    /// [`RegistryError`] when no host begins to answer.
    pub async fn open_range(&self, range: Range<u64>) -> Result<Part<ByteStream>, RegistryError> {
        let mut read = Read::new(self.clone(), range);
        let is_whole = read.begin().await?;
        let stream = read.into_stream();
        Ok(if is_whole { Part::Whole(stream) } else { Part::Asked(stream) })
    }

    /// The bytes `range` in one piece. The caller vouches for the length: it is held in memory.
    ///
    /// # Errors
    /// [`RegistryError`] when they cannot be read.
    pub async fn read_bytes(&self, range: Range<u64>) -> Result<Bytes, RegistryError> {
        collect(self.read_range(range)).await
    }

    /// The whole blob. The stream ends with an error instead of an end when the digest is not right.
    #[must_use]
    pub fn read_all(&self) -> ByteStream {
        let start = (self.read_range(0..self.size), Some(Hasher::new(self.digest.algorithm())), self.clone());
        let stream = futures_util::stream::try_unfold(start, |(mut stream, mut hasher, reader)| async move {
            if let Some(chunk) = stream.try_next().await? {
                if let Some(hasher) = &mut hasher {
                    hasher.update(&chunk);
                }
                return Ok(Some((chunk, (stream, hasher, reader))));
            }
            match hasher.map(Hasher::finish) {
                Some(found) if found != reader.digest => Err(reader.wrong_digest(found)),
                _ => Ok(None),
            }
        });
        ByteStream(Box::pin(stream))
    }

    fn missing(&self, host: &str) -> RegistryError {
        RegistryError::Missing {
            registry: host.to_owned(),
            repository: self.repository.name().to_owned(),
            what: format!("blob {}", self.digest),
        }
    }

    fn wrong_digest(&self, found: Digest) -> RegistryError {
        RegistryError::Digest {
            registry: self.repository.registry().name().to_owned(),
            repository: self.repository.name().to_owned(),
            what: "a blob".to_owned(),
            expected: Box::new(self.digest),
            found: found.to_string(),
        }
    }
}
