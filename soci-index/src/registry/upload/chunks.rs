//! Sending a blob in chunks, and going on after a break.
//!
//! Each chunk is a PATCH that says which bytes it holds; each answer says where the next one goes. When a chunk breaks,
//! or the registry disagrees about the place (416), it is asked how far it has come, and the source is opened again
//! where that is before what is still in memory. What decides is always what the registry says that it has.
//!
//! One chunk at a time is held in memory, whatever the size of the blob: a registry that wants chunks of more than
//! [`CHUNK_BYTES_MAX`] gets the blob in one piece. Invariants: a chunk is never shorter than the registry wants, the
//! last one apart; every round gets further or counts as a retry.

use std::sync::Arc;

use bytes::{Buf, Bytes, BytesMut};
use futures_util::StreamExt;

use crate::registry::error::RegistryError;
use crate::registry::exchange::{ApiResponse, Retries};
use crate::registry::headers;
use crate::registry::transport::{Body, Chunks, Method};
use crate::registry::upload::{Push, PushedBlob, Setback, UploadMode, UploadSession, location, with_digest};

/// Largest chunk that is put together. The registry names the smallest one: what it names takes memory here.
const CHUNK_BYTES_MAX: usize = 32 << 20;
/// Smallest chunk that is still worth a request, for registries that find everything too large.
const CHUNK_BYTES_MIN: usize = 256 << 10;
/// Bytes handed to the connection at a time, so that progress is seen.
const PIECE_BYTES: usize = 128 << 10;

/// How long chunks are to be; `None` when the registry wants more than can be held.
pub(super) fn size(usual: usize, smallest: Option<u64>) -> Option<usize> {
    let smallest = usize::try_from(smallest.unwrap_or(0)).unwrap_or(usize::MAX);
    (smallest <= CHUNK_BYTES_MAX).then(|| smallest.max(usual).max(1))
}

/// Sends a blob in chunks of `chunk` bytes.
pub(super) async fn send(push: &Push<'_>, opened: UploadSession, chunk: usize) -> Result<PushedBlob, Setback> {
    Sending { push, opened, chunk, source: Source::new(&push.body), done: 0 }.run().await
}

struct Sending<'a> {
    push: &'a Push<'a>,
    opened: UploadSession,
    chunk: usize,
    source: Source<'a>,
    /// Bytes that the registry has.
    done: u64,
}

impl Sending<'_> {
    async fn run(mut self) -> Result<PushedBlob, Setback> {
        let Push { hosted, what, deadline, .. } = self.push;
        let mut retries = Retries::new(hosted, what, deadline);
        loop {
            let step = if self.done < self.push.body.len() { self.patch().await } else { self.finish().await };
            let (error, pause) = match step {
                Ok(None) => {
                    retries.made = 0;
                    continue;
                }
                Ok(Some(pushed)) => return Ok(pushed),
                Err(Setback::Busy(error, pause)) => (error, pause),
                // It has nothing, and still the first chunk is in the wrong place: it takes no chunks.
                Err(Setback::Error(error)) if is_out_of_place(&error) && self.done == 0 && retries.made > 0 => {
                    return Err(Setback::UploadMode(UploadMode::Chunks, error));
                }
                Err(Setback::Error(error)) if error.is_transient() || is_out_of_place(&error) => (error, None),
                Err(setback) => return Err(setback),
            };
            retries.after(error, pause).await.map_err(Setback::Final)?;
            self.ask_how_far().await?;
        }
    }

    /// Sends the next chunk.
    async fn patch(&mut self) -> Result<Option<PushedBlob>, Setback> {
        let bytes = self.source.at(self.done, self.chunk).await;
        let bytes = bytes.map_err(|reason| Setback::Final(self.push.source_error(reason)))?;
        let end = self.done + bytes.len() as u64;
        let (url, scopes) = (self.opened.location.clone(), &self.opened.scopes);
        let call = self.push.sending(Method::Patch, url, scopes, in_pieces(bytes));
        let call = call.with_header("content-range", format!("{}-{}", self.done, end - 1));
        let answer = self.push.try_once(&call).await?;
        self.push.deadline.progress();
        match answer.status() {
            200..=202 | 204 => {
                self.follow(&answer)?;
                self.done = self.taken(&answer, end)?;
                Ok(None)
            }
            413 if self.shrink() => Ok(None),
            404 if self.done > 0 => Err(Setback::Lost(answer.error().await)),
            // The registry takes no chunks; what else is wrong shows when the blob comes in one piece.
            400 | 404 | 405 | 411 | 413 | 415 | 501 if self.done == 0 => {
                Err(Setback::UploadMode(UploadMode::Chunks, answer.error().await))
            }
            _ => Err(Setback::Error(answer.error().await)),
        }
    }

    /// Says that this was all.
    async fn finish(&mut self) -> Result<Option<PushedBlob>, Setback> {
        let url = with_digest(self.opened.location.clone(), self.push.digest);
        let call = self.push.sending(Method::Put, url, &self.opened.scopes, Body::Empty);
        let answer = self.push.try_once(&call).await?;
        self.push.stored(answer, &self.opened.scopes).await.map(Some)
    }

    /// Asks how much the registry has.
    async fn ask_how_far(&mut self) -> Result<(), Setback> {
        let (url, scopes) = (self.opened.location.clone(), &self.opened.scopes);
        let call = self.push.call(Method::Get, url, scopes);
        let answer = self.push.hosted.call(&call, &self.push.deadline).await.map_err(Setback::Final)?;
        let range = answer.header("range").and_then(headers::upload_offset);
        match (answer.status(), range) {
            (200..=204, Some(done)) if done <= self.push.body.len() => {
                if answer.header("location").is_some() {
                    self.follow(&answer)?;
                }
                tracing::debug!(registry = self.push.hosted.host(), blob = %self.push.digest, done, "going on with an upload");
                self.done = done;
                Ok(())
            }
            (200..=204, _) => {
                let reason = "the registry does not report how much of the upload it has";
                Err(Setback::Lost(self.push.hosted.malformed(&self.push.what, reason)))
            }
            _ => Err(Setback::Lost(answer.error().await)),
        }
    }

    /// Where the next request goes.
    fn follow(&mut self, answer: &ApiResponse<'_>) -> Result<(), Setback> {
        let malformed = |reason: String| Setback::Final(self.push.hosted.malformed(&self.push.what, reason));
        self.opened.location = location(answer).map_err(malformed)?;
        Ok(())
    }

    /// How much the registry has after a chunk that ends at `end`. Some count one byte too few or say nothing.
    fn taken(&self, answer: &ApiResponse<'_>, end: u64) -> Result<u64, Setback> {
        match answer.header("range").and_then(headers::upload_offset) {
            Some(offset) if offset <= self.done => {
                let reason = format!("the registry took a chunk and still has only {offset} bytes");
                Err(Setback::Final(self.push.hosted.malformed(&self.push.what, reason)))
            }
            Some(offset) if offset + 1 < end => Ok(offset),
            _ => Ok(end),
        }
    }

    /// Makes chunks smaller, if the registry allows it.
    fn shrink(&mut self) -> bool {
        let smallest = size(CHUNK_BYTES_MIN, self.opened.smallest).unwrap_or(usize::MAX);
        let smaller = self.chunk / 2;
        if smaller < smallest {
            return false;
        }
        self.chunk = smaller;
        true
    }
}

/// Whether the registry has another opinion of where the next chunk begins.
fn is_out_of_place(error: &RegistryError) -> bool {
    matches!(error, RegistryError::Status { status: 416, .. })
}

/// A chunk in pieces, so that the deadline sees it leave.
fn in_pieces(chunk: Bytes) -> Body {
    let length = chunk.len() as u64;
    let open = Arc::new(move || {
        let pieces = futures_util::stream::unfold(chunk.clone(), |mut rest| async move {
            let piece = rest.split_to(rest.len().min(PIECE_BYTES));
            (!piece.is_empty()).then_some((Ok(piece), rest))
        });
        let pieces: Chunks = Box::pin(pieces);
        pieces
    });
    Body::Chunks { length, open }
}

/// What a blob holds, from any place on.
struct Source<'a> {
    body: &'a Body,
    stream: Chunks,
    /// The chunk that was handed out last: the registry may want some of it again.
    given: Bytes,
    /// Where that begins.
    start: u64,
    /// What was read beyond it.
    beyond: BytesMut,
}

impl<'a> Source<'a> {
    fn new(body: &'a Body) -> Self {
        Self { body, stream: body.pieces(), given: Bytes::new(), start: 0, beyond: BytesMut::new() }
    }

    /// `length` bytes from `offset` on, fewer at the end only. The error is a reason in words.
    async fn at(&mut self, offset: u64, length: usize) -> Result<Bytes, String> {
        if offset < self.start {
            *self = Self::new(self.body);
        }
        let wanted = length.min(to_usize(self.body.len() - offset));
        let past = self.given.len().min(to_usize(offset - self.start));
        let mut again = BytesMut::from(&self.given[past..]);
        self.given = Bytes::new();
        if !again.is_empty() {
            again.extend_from_slice(&self.beyond);
            self.beyond = again;
        }
        self.start += past as u64;
        loop {
            let past = self.beyond.len().min(to_usize(offset - self.start));
            self.beyond.advance(past);
            self.start += past as u64;
            if self.start == offset && self.beyond.len() >= wanted {
                self.given = self.beyond.split_to(wanted).freeze();
                return Ok(self.given.clone());
            }
            match self.stream.next().await {
                Some(piece) => self.beyond.extend_from_slice(&piece.map_err(|error| error.to_string())?),
                None => return Err(format!("it ends before byte {}", offset + wanted as u64)),
            }
        }
    }
}

/// As many as fit: what is compared with it is smaller.
fn to_usize(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (usual, smallest, expected) in [
            (8, None, Some(8)),
            (8, Some(5), Some(8)),
            (8, Some(9), Some(9)),
            (8, Some(CHUNK_BYTES_MAX as u64), Some(CHUNK_BYTES_MAX)),
            (8, Some(CHUNK_BYTES_MAX as u64 + 1), None),
            (8, Some(u64::MAX), None),
            (0, None, Some(1)),
        ] {
            assert_eq!(size(usual, smallest), expected, "{usual} {smallest:?}");
        }
    }

    #[tokio::test]
    async fn any_place_again_and_again() {
        let content: Vec<u8> = (0..100).collect();
        let whole = content.clone();
        let open = Arc::new(move || {
            let pieces: Vec<_> = whole.chunks(7).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect();
            let pieces: Chunks = Box::pin(futures_util::stream::iter(pieces));
            pieces
        });
        let body = Body::Chunks { length: 100, open };
        let mut source = Source::new(&body);
        let places = [(0, 10), (0, 10), (3, 10), (13, 20), (20, 20), (90, 20), (5, 1), (5, 95), (99, 9), (100, 1)];
        for (offset, length) in places {
            let expected = &content[offset..(offset + length).min(100)];
            assert_eq!(source.at(offset as u64, length).await.unwrap(), expected, "{offset} {length}");
        }
        let body = Body::Chunks {
            length: 101,
            open: match body {
                Body::Chunks { open, .. } => open,
                _ => unreachable!(),
            },
        };
        assert_eq!(Source::new(&body).at(95, 10).await, Err("it ends before byte 101".to_owned()));
    }
}
