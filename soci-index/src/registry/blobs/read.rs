//! One read of a range: over hosts, redirects, cuts and refusals, to the last byte.
//!
//! The bytes come from the first host that has them; when it fails, the next one continues at the byte reached, and when
//! the last one has failed too, all begin anew after a pause, within the deadline and the number of retries. See
//! [`super`] for what is promised.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use super::BlobReader;
use crate::registry::error::{RegistryError, TransportError, TransportKind};
use crate::registry::exchange::{Answer, Call, asked_pause, is_busy};
use crate::registry::failover::{Need, Place};
use crate::registry::headers::{content_range, one_line, unsatisfied_total};
use crate::registry::redirect::ShownUrl;
use crate::registry::retry::Deadline;
use crate::registry::transport::{Method, Response};

/// One read under way.
pub(super) struct Read {
    reader: BlobReader,
    range: Range<u64>,
    /// The next byte to yield.
    position: u64,
    /// Where to read: the first of these, and then the others. None are left when it is time to begin anew.
    places: VecDeque<Place>,
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

/// What a place did when it was asked.
enum Asked {
    Opened(Source),
    /// It sends elsewhere, and there the permission has run out.
    Expired,
    /// It does not give it, and may have asked for a pause.
    Refused(RegistryError, Option<Duration>),
}

impl Read {
    pub(super) fn new(reader: BlobReader, range: Range<u64>) -> Self {
        Self {
            reader,
            position: range.start,
            range,
            places: VecDeque::new(),
            deadline: None,
            retry: 0,
            renewed: false,
            source: None,
            yielded: None,
        }
    }

    /// The next bytes; `None` when all were yielded.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, RegistryError> {
        if self.range.start > self.range.end || self.range.end > self.reader.size {
            return Err(self.not_satisfiable(self.reader.repository.registry().name(), Some(self.reader.size)));
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

    /// Where to read now.
    fn place(&mut self) -> Result<Place, RegistryError> {
        if self.places.is_empty() {
            self.places = match &self.reader.only {
                Some(place) => VecDeque::from([place.clone()]),
                None => self.reader.repository.places(Need::Content)?.into(),
            };
        }
        // There is always at least one.
        self.places.front().cloned().ok_or_else(|| self.reader.missing(self.reader.repository.registry().name()))
    }

    async fn interrupted(&mut self, deadline: &Deadline, error: Option<TransportError>) -> Result<(), RegistryError> {
        let place = self.place()?;
        let error = error.unwrap_or_else(|| TransportError {
            kind: TransportKind::Interrupted,
            url: ShownUrl::new(&self.call(&place).url),
            detail: format!("the body ended at byte {}", self.position),
        });
        if !deadline.is_over() {
            place.unreachable(&error);
        }
        let error = place.transport_error(&self.what(), error, deadline);
        self.failed(&place, error, None, deadline).await
    }

    /// Turns to the next place; after the last one, waits before all are asked again, or gives up.
    async fn failed(
        &mut self,
        place: &Place,
        error: RegistryError,
        pause: Option<Duration>,
        deadline: &Deadline,
    ) -> Result<(), RegistryError> {
        // The trouble may be the storage's, and the registry may know another one.
        place.set_target(&self.reader.digest, None);
        let busy = matches!(error, RegistryError::Status { status, .. } if is_busy(status));
        if self.places.len() > 1 && !place.decides(&error) {
            place.given_up(&error);
            self.places.pop_front();
            self.renewed = false;
            return Ok(());
        }
        if !error.is_transient() && !busy {
            return Err(error);
        }
        let what = self.what();
        place.pause(&mut self.retry, pause, &what, error, deadline).await?;
        self.places.clear();
        Ok(())
    }

    /// Asks for what is left of the range, until somebody begins to answer.
    async fn open(&mut self, deadline: &Deadline) -> Result<Source, RegistryError> {
        loop {
            let place = self.place()?;
            let (error, pause) = match self.ask(&place, deadline).await {
                Ok(Asked::Opened(source)) => return Ok(source),
                Ok(Asked::Expired) => {
                    self.renewed = true;
                    place.set_target(&self.reader.digest, None);
                    continue;
                }
                Ok(Asked::Refused(error, pause)) => (error, pause),
                Err(error) => (error, None),
            };
            self.failed(&place, error, pause, deadline).await?;
        }
    }

    /// Asks one place for what is left of the range.
    async fn ask(&self, place: &Place, deadline: &Deadline) -> Result<Asked, RegistryError> {
        let mut call = self.call(place);
        let asked = call.url.clone();
        let cached = place.target(&self.reader.digest);
        let was_cached = cached.is_some();
        if let Some(target) = cached {
            call.url = target;
        }
        let answer = place.attempt(&call, deadline).await?;
        let elsewhere = !place.endpoint().is_home(&answer.url);
        match answer.status() {
            200 | 206 => {
                if !was_cached && answer.url != asked {
                    place.set_target(&self.reader.digest, Some(answer.url.clone()));
                }
                self.accept(place, answer).map(Asked::Opened)
            }
            416 => {
                let total = answer.response.header("content-range").and_then(unsatisfied_total);
                Err(self.not_satisfiable(place.host(), total))
            }
            // A signed URL that has expired: 403, 401, or 400 with ExpiredToken.
            400 | 401 | 403 | 404 if (was_cached || elsewhere) && !self.renewed => Ok(Asked::Expired),
            404 => Err(self.reader.missing(place.host())),
            _ => {
                let pause = asked_pause(&answer.response);
                Ok(Asked::Refused(place.status_error(answer, &call.what).await, pause))
            }
        }
    }

    /// Checks that the answer is what was asked for.
    fn accept(&self, place: &Place, answer: Answer) -> Result<Source, RegistryError> {
        let (response, size) = (answer.response, self.reader.size);
        let length = response.content_length();
        let encoding = response.header("content-encoding").unwrap_or("identity");
        if !encoding.trim().eq_ignore_ascii_case("identity") {
            return Err(self.wrong_range(place, format!("encoded as {}", one_line(encoding))));
        }
        // A page for people instead of a blob. What the last host calls a page must be taken for what it is.
        if !place.is_last() && response.media_type() == "text/html" {
            return Err(self.wrong_range(place, "a web page".to_owned()));
        }
        if response.status() == 200 {
            // The range was ignored, or none was sent. The body starts at byte 0.
            return match length {
                Some(length) if length != size => Err(RegistryError::Size {
                    registry: place.host().to_owned(),
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
                return Err(self.wrong_range(place, "a part without Content-Range".to_owned()));
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
            None => Err(self.wrong_range(place, format!("Content-Range: {}", one_line(text)))),
        }
    }

    fn call(&self, place: &Place) -> Call {
        let mut call = place.blob_call(Method::Get, &self.reader.digest, self.what());
        // A plain request for a whole blob works everywhere, also where ranges do not.
        if self.position > 0 || self.range.end < self.reader.size {
            call.headers.push(("range", format!("bytes={}-{}", self.position, self.range.end - 1)));
        }
        call
    }

    fn what(&self) -> String {
        format!("reading bytes {}..{} of {}", self.position, self.range.end, self.reader.digest)
    }

    fn wrong_range(&self, place: &Place, found: String) -> RegistryError {
        RegistryError::WrongRange {
            registry: place.host().to_owned(),
            repository: self.reader.repository.name().to_owned(),
            digest: Box::new(self.reader.digest),
            range: self.position..self.range.end,
            found,
        }
    }

    fn not_satisfiable(&self, host: &str, size: Option<u64>) -> RegistryError {
        RegistryError::RangeNotSatisfiable {
            registry: host.to_owned(),
            repository: self.reader.repository.name().to_owned(),
            digest: Box::new(self.reader.digest),
            range: self.range.clone(),
            size,
        }
    }
}
