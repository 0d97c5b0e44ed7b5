//! Reading blobs, whole or in part.
//!
//! A range read survives what registries and storage do to it: a redirect (its target is kept for a short while, so
//! that the registry is not asked for every span), a signed URL that has expired, a server that ignores the range, a
//! legal answer that is too short, a connection cut in the middle. Each continues at the byte reached. Invariants: the
//! bytes yielded are exactly the range asked for, in order; a `Content-Range` that says anything else ends the read
//! with an error; bytes of a range are *not* checked against the digest (whoever has span digests does that), bytes of
//! a whole blob are, before the stream ends.

use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::{Stream, StreamExt, TryStreamExt};
use tokio::time::Instant;

use crate::digest::{Digest, Hasher};
use crate::image::model::Descriptor;
use crate::registry::Repository;
use crate::registry::auth::Scopes;
use crate::registry::error::{RegistryError, TransportError, TransportKind};
use crate::registry::exchange::{Answer, Call, asked_pause, is_busy};
use crate::registry::headers::{content_range, one_line, unsatisfied_total};
use crate::registry::redirect::{self, ShownUrl};
use crate::registry::retry::Deadline;
use crate::registry::transport::{Body, Method, Response};

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

/// Reads ranges of one blob.
#[derive(Debug, Clone)]
pub struct BlobReader {
    repository: Repository,
    digest: Digest,
    size: u64,
    deadline: Duration,
}

impl Repository {
    /// A reader of the blob `digest`, which has `size` bytes (its descriptor says). Nothing is sent.
    #[must_use]
    pub fn blob(&self, digest: Digest, size: u64) -> BlobReader {
        BlobReader { repository: self.clone(), digest, size, deadline: self.registry().options().deadline }
    }

    /// The size of a blob, or `None` if there is no such blob.
    ///
    /// # Errors
    /// [`RegistryError`] when the registry cannot be asked or does not tell.
    pub async fn blob_size(&self, digest: &Digest) -> Result<Option<u64>, RegistryError> {
        let what = format!("asking for the size of {digest}");
        let mut call = self.blob_call(Method::Head, digest, what.clone());
        let deadline = self.deadline(0);
        let answer = self.call(&call, &deadline).await?;
        match answer.status() {
            200 => {}
            404 => return Ok(None),
            _ => return Err(self.status_error(answer, &what).await),
        }
        if let Some(size) = answer.response.content_length() {
            return Ok(Some(size));
        }
        call.method = Method::Get;
        call.headers.push(("range", "bytes=0-0".to_owned()));
        let answer = self.call(&call, &deadline).await?;
        let range = answer.response.header("content-range").and_then(content_range);
        match (answer.status(), range.and_then(|range| range.total), answer.response.content_length()) {
            (206, Some(total), _) | (200, _, Some(total)) => Ok(Some(total)),
            (404, ..) => Ok(None),
            _ => Err(self.malformed(&what, "the registry does not tell")),
        }
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
        collect(self.blob(descriptor.digest, descriptor.size).read_all()).await
    }

    pub(crate) fn blob_call(&self, method: Method, digest: &Digest, what: String) -> Call {
        Call {
            method,
            url: self.url(&format!("blobs/{digest}")),
            // Anything but the bytes themselves would make offsets and digests meaningless.
            headers: vec![("accept-encoding", "identity".to_owned())],
            body: Body::Empty,
            scopes: Scopes::pull(self.name()),
            what,
        }
    }

    pub(crate) fn malformed(&self, what: &str, reason: &str) -> RegistryError {
        RegistryError::Malformed {
            registry: self.registry().name().to_owned(),
            repository: self.name().to_owned(),
            what: what.to_owned(),
            reason: reason.to_owned(),
        }
    }
}

async fn collect(mut stream: ByteStream) -> Result<Bytes, RegistryError> {
    let mut whole = BytesMut::new();
    while let Some(chunk) = stream.try_next().await? {
        whole.extend_from_slice(&chunk);
    }
    Ok(whole.freeze())
}

impl BlobReader {
    /// The blob's digest.
    #[must_use]
    pub fn digest(&self) -> &Digest {
        &self.digest
    }

    /// The blob's size as its descriptor says.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The same reader with another time limit (see [`super::ClientOptions::deadline`]).
    #[must_use]
    pub fn with_deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// The bytes `range`, as they arrive. Nothing is sent before the stream is polled.
    #[must_use]
    pub fn read_range(&self, range: Range<u64>) -> ByteStream {
        let read = Read {
            reader: self.clone(),
            position: range.start,
            range,
            deadline: None,
            retry: 0,
            renewed: false,
            source: None,
            yielded: None,
        };
        let stream = futures_util::stream::try_unfold(read, |mut read| async move {
            let chunk = read.next().await?;
            Ok(chunk.map(|chunk| (chunk, read)))
        });
        ByteStream(Box::pin(stream))
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

/// One read under way.
struct Read {
    reader: BlobReader,
    range: Range<u64>,
    /// The next byte to yield.
    position: u64,
    /// Begins with the first poll.
    deadline: Option<Deadline>,
    /// Attempts since the last byte.
    retry: u32,
    /// Whether the redirect target was renewed since the last byte.
    renewed: bool,
    source: Option<Source>,
    /// When the last bytes were yielded.
    yielded: Option<Instant>,
}

/// An open response body.
struct Source {
    response: Response,
    /// Offset in the blob of the next byte of the body.
    at: u64,
    /// Where the body ends by its own account.
    end: u64,
}

impl Read {
    async fn next(&mut self) -> Result<Option<Bytes>, RegistryError> {
        if self.range.start > self.range.end || self.range.end > self.reader.size {
            return Err(self.not_satisfiable(Some(self.reader.size)));
        }
        let deadline = self.deadline.get_or_insert_with(|| {
            Deadline::new(self.reader.deadline, self.range.end.saturating_sub(self.range.start))
        });
        let deadline = deadline.clone();
        // A slow consumer is not a slow registry.
        if let Some(yielded) = self.yielded.take() {
            deadline.postpone(yielded.elapsed());
        }
        while self.position < self.range.end {
            let mut source = match self.source.take() {
                Some(source) => source,
                None => self.open(&deadline).await?,
            };
            match source.response.chunk(&deadline).await {
                Ok(Some(chunk)) => {
                    let wanted = self.take(&mut source, chunk);
                    self.source = Some(source);
                    if !wanted.is_empty() {
                        (self.retry, self.renewed) = (0, false);
                        deadline.progress();
                        self.yielded = Some(Instant::now());
                        return Ok(Some(wanted));
                    }
                }
                // As long as it said, though shorter than asked for: ask for the rest.
                Ok(None) if source.at >= source.end => {}
                Ok(None) => self.interrupted(&deadline, None).await?,
                Err(error) => self.interrupted(&deadline, Some(error)).await?,
            }
        }
        Ok(None)
    }

    /// The part of a chunk that was asked for.
    fn take(&mut self, source: &mut Source, mut chunk: Bytes) -> Bytes {
        let start = source.at;
        source.at += chunk.len() as u64;
        let end = source.at.min(source.end).min(self.range.end);
        if end <= self.position {
            return Bytes::new();
        }
        // Both differences are at most the length of the chunk.
        let skip = usize::try_from(self.position.saturating_sub(start)).unwrap_or(usize::MAX);
        let keep = usize::try_from(end - start).unwrap_or(usize::MAX);
        chunk.truncate(keep);
        self.position = end;
        chunk.split_off(skip.min(chunk.len()))
    }

    async fn interrupted(&mut self, deadline: &Deadline, error: Option<TransportError>) -> Result<(), RegistryError> {
        let error = error.unwrap_or_else(|| TransportError {
            kind: TransportKind::Interrupted,
            url: ShownUrl::new(&self.call().url),
            detail: format!("the body ended at byte {}", self.position),
        });
        let what = self.what();
        let error = self.reader.repository.transport_error(&what, error, deadline);
        self.again(error, None, deadline).await
    }

    /// Waits before the next attempt, or gives up.
    async fn again(
        &mut self,
        error: RegistryError,
        pause: Option<Duration>,
        deadline: &Deadline,
    ) -> Result<(), RegistryError> {
        if !error.is_transient() && !matches!(error, RegistryError::Status { .. }) {
            return Err(error);
        }
        // The trouble may be the storage's, and the registry may know another one.
        self.reader.repository.set_target(&self.reader.digest, None);
        let what = self.what();
        self.reader.repository.pause(&mut self.retry, pause, &what, error, deadline).await
    }

    /// Asks for what is left of the range.
    async fn open(&mut self, deadline: &Deadline) -> Result<Source, RegistryError> {
        let repository = self.reader.repository.clone();
        loop {
            let mut call = self.call();
            let cached = repository.target(&self.reader.digest);
            let was_cached = cached.is_some();
            let asked = call.url.clone();
            if let Some(target) = cached {
                call.url = target;
            }
            let answer = match repository.attempt(&call, deadline).await {
                Ok(answer) => answer,
                Err(error) => {
                    self.again(error, None, deadline).await?;
                    continue;
                }
            };
            let elsewhere = !redirect::same_origin(repository.registry().base(), &answer.url);
            match answer.status() {
                200 | 206 => {
                    if !was_cached && answer.url != asked {
                        repository.set_target(&self.reader.digest, Some(answer.url.clone()));
                    }
                    return self.accept(answer);
                }
                416 => {
                    let total = answer.response.header("content-range").and_then(unsatisfied_total);
                    return Err(self.not_satisfiable(total));
                }
                // A signed URL that has expired: 403, 401, or 400 with ExpiredToken.
                400 | 401 | 403 | 404 if (was_cached || elsewhere) && !self.renewed => {
                    self.renewed = true;
                    repository.set_target(&self.reader.digest, None);
                }
                404 => {
                    return Err(RegistryError::Missing {
                        registry: repository.registry().name().to_owned(),
                        repository: repository.name().to_owned(),
                        what: format!("blob {}", self.reader.digest),
                    });
                }
                status => {
                    let pause = asked_pause(&answer.response);
                    let error = repository.status_error(answer, &call.what).await;
                    if !is_busy(status) {
                        return Err(error);
                    }
                    self.again(error, pause, deadline).await?;
                }
            }
        }
    }

    /// Checks that the answer is what was asked for.
    fn accept(&self, answer: Answer) -> Result<Source, RegistryError> {
        let (response, size) = (answer.response, self.reader.size);
        let length = response.content_length();
        let encoding = response.header("content-encoding").unwrap_or("identity");
        if !encoding.trim().eq_ignore_ascii_case("identity") {
            return Err(self.wrong_range(format!("encoded as {}", one_line(encoding))));
        }
        if response.status() == 200 {
            // The range was ignored, or none was sent. The body starts at byte 0.
            return match length {
                Some(length) if length != size => Err(RegistryError::Size {
                    registry: self.reader.repository.registry().name().to_owned(),
                    repository: self.reader.repository.name().to_owned(),
                    what: format!("blob {}", self.reader.digest),
                    expected: size,
                    found: length,
                }),
                _ => Ok(Source { response, at: 0, end: size }),
            };
        }
        let Some(text) = response.header("content-range") else {
            // Old servers leave it out. Nothing but an exact length makes such an answer believable.
            let multipart = response.media_type().starts_with("multipart/");
            if length != Some(self.range.end - self.position) || multipart {
                return Err(self.wrong_range("a part without Content-Range".to_owned()));
            }
            return Ok(Source { response, at: self.position, end: self.range.end });
        };
        let right = content_range(text).filter(|range| {
            range.first == self.position
                && range.last < self.range.end
                && range.total.is_none_or(|total| total == size)
                && length.is_none_or(|length| length == range.last - range.first + 1)
        });
        match right {
            Some(range) => Ok(Source { response, at: range.first, end: range.last + 1 }),
            None => Err(self.wrong_range(format!("Content-Range: {}", one_line(text)))),
        }
    }

    fn call(&self) -> Call {
        let mut call = self.reader.repository.blob_call(Method::Get, &self.reader.digest, self.what());
        // A plain request for a whole blob works everywhere, also where ranges do not.
        if self.position > 0 || self.range.end < self.reader.size {
            call.headers.push(("range", format!("bytes={}-{}", self.position, self.range.end - 1)));
        }
        call
    }

    fn what(&self) -> String {
        format!("reading bytes {}..{} of {}", self.position, self.range.end, self.reader.digest)
    }

    fn wrong_range(&self, found: String) -> RegistryError {
        RegistryError::WrongRange {
            registry: self.reader.repository.registry().name().to_owned(),
            repository: self.reader.repository.name().to_owned(),
            digest: Box::new(self.reader.digest),
            range: self.position..self.range.end,
            found,
        }
    }

    fn not_satisfiable(&self, size: Option<u64>) -> RegistryError {
        RegistryError::RangeNotSatisfiable {
            registry: self.reader.repository.registry().name().to_owned(),
            repository: self.reader.repository.name().to_owned(),
            digest: Box::new(self.reader.digest),
            range: self.range.clone(),
            size,
        }
    }
}
