//! One read of a range: over hosts, redirects, cuts and refusals, to the last byte.
//!
//! Not every host serves parts of blobs: some ignore the range and send everything, some refuse it (400, 416, 501),
//! some answer with another part than they say. Where another host serves parts it is asked; else the same host is
//! asked for the whole blob. What comes before the wanted bytes is then passed over, or given to a caller that has use
//! for it ([`Read::begin`]). A host that refuses is for a while not asked for parts; one that ignores a range may serve
//! the next, as a proxy does that fills its cache, and loses nothing by being asked.
//!
//! The bytes come from the first host that has them; when it fails, the next one continues at the byte reached, and
//! when the last one has failed too, all begin anew after a pause, within the deadline and the number of retries. See
//! [`super`] for what is promised.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use crate::registry::blobs::{BlobReader, ByteStream, blob_call};
use crate::registry::error::{RegistryError, TransportError, TransportKind};
use crate::registry::exchange::{ApiResponse, Call, Retries, is_busy};
use crate::registry::failover::HostedRepository;
use crate::registry::headers::{content_range, one_line, unsatisfied_total};
use crate::registry::need::Need;
use crate::registry::redirect::ShownUrl;
use crate::registry::retry::Deadline;
use crate::registry::transport::{Method, Response};

/// How servers and what stands before them say that they serve no parts. A request without a range shows whether that
/// was the reason.
pub(super) const REFUSES_RANGE: [u16; 6] = [400, 405, 406, 412, 417, 501];

/// One read in progress.
pub(super) struct Read {
    reader: BlobReader,
    range: Range<u64>,
    /// The next byte to yield.
    position: u64,
    /// Where to read: the first of these, and then the others. None are left when it is time to begin anew.
    hosts: VecDeque<HostedRepository>,
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

/// What a host did when it was asked.
enum RangeResponse {
    Opened(Source),
    /// It sends elsewhere, and there the permission has run out.
    Expired,
    /// It serves no part of the blob; it may serve the whole.
    NoPart(RegistryError),
    /// It does not give it, and may have asked for a pause.
    Refused(RegistryError, Option<Duration>),
}

impl Read {
    pub(super) fn new(reader: BlobReader, range: Range<u64>) -> Self {
        Self {
            reader,
            position: range.start,
            range,
            hosts: VecDeque::new(),
            deadline: None,
            retry: 0,
            renewed: false,
            source: None,
            yielded: None,
        }
    }

    /// What is left, as it arrives.
    pub(super) fn into_stream(self) -> ByteStream {
        let stream = futures_util::stream::try_unfold(self, |mut read| async move {
            let chunk = read.next().await?;
            Ok(chunk.map(|chunk| (chunk, read)))
        });
        ByteStream(Box::pin(stream))
    }

    /// Asks for the range. If only the whole blob is available, that is what is read from now on, from its first byte;
    /// returns whether that is so.
    pub(super) async fn begin(&mut self) -> Result<bool, RegistryError> {
        let deadline = self.deadline()?;
        if self.position >= self.range.end {
            return Ok(false);
        }
        let source = self.open(&deadline).await?;
        let is_whole = self.is_part() && source.at == 0 && source.end == self.reader.size;
        if is_whole {
            self.range = 0..self.reader.size;
            (self.position, self.deadline) = (0, None);
        }
        self.source = Some(source);
        Ok(is_whole)
    }

    /// The time that is left; it begins with the first call.
    fn deadline(&mut self) -> Result<Deadline, RegistryError> {
        if self.range.start > self.range.end || self.range.end > self.reader.size {
            return Err(self.not_satisfiable(self.reader.repository.registry().name(), Some(self.reader.size)));
        }
        let begin = || self.reader.repository.deadline(self.range.end.saturating_sub(self.range.start));
        Ok(self.deadline.get_or_insert_with(begin).clone())
    }

    /// The next bytes; `None` when all were yielded.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, RegistryError> {
        let deadline = self.deadline()?;
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
    fn hosted(&mut self) -> Result<HostedRepository, RegistryError> {
        if self.hosts.is_empty() {
            self.hosts = match &self.reader.only {
                Some(hosted) => VecDeque::from([hosted.clone()]),
                None => self.reader.repository.hosts(self.need())?.into(),
            };
        }
        // There is always at least one.
        self.hosts.front().cloned().ok_or_else(|| self.reader.missing(self.reader.repository.registry().name()))
    }

    async fn interrupted(&mut self, deadline: &Deadline, error: Option<TransportError>) -> Result<(), RegistryError> {
        let hosted = self.hosted()?;
        let error = error.unwrap_or_else(|| TransportError {
            kind: TransportKind::Interrupted,
            url: ShownUrl::new(&self.call(&hosted, false).url),
            detail: format!("the body ended at byte {}", self.position),
        });
        if !deadline.is_over() {
            hosted.endpoint().note_failure(&error);
        }
        let error = hosted.transport_error(&self.what(), error, deadline);
        self.failed(&hosted, error, None, deadline).await
    }

    /// Turns to the next host; after the last one, waits before all are asked again, or gives up.
    async fn failed(
        &mut self,
        hosted: &HostedRepository,
        error: RegistryError,
        pause: Option<Duration>,
        deadline: &Deadline,
    ) -> Result<(), RegistryError> {
        // The trouble may be the storage's, and the registry may know another one.
        hosted.endpoint().set_target(hosted.name(), &self.reader.digest, None);
        let busy = matches!(error, RegistryError::Status { status, .. } if is_busy(status));
        if self.hosts.len() > 1 && !hosted.decides(&error) {
            hosted.given_up(&error);
            self.hosts.pop_front();
            self.renewed = false;
            return Ok(());
        }
        if !error.is_transient() && !busy {
            return Err(error);
        }
        let what = self.what();
        let mut retries = Retries::new(hosted, &what, deadline);
        retries.made = self.retry;
        retries.after(error, pause).await?;
        self.retry = retries.made;
        self.hosts.clear();
        Ok(())
    }

    /// Asks for what is left of the range, until a host begins to answer.
    async fn open(&mut self, deadline: &Deadline) -> Result<Source, RegistryError> {
        loop {
            let hosted = self.hosted()?;
            let as_part = self.is_part() && !hosted.endpoint().serves_whole_only();
            let (error, pause) = match self.ask(&hosted, as_part, deadline).await {
                Ok(RangeResponse::Opened(source)) if as_part && source.end > self.range.end => {
                    hosted.endpoint().note_part(false);
                    if !self.has_better(&hosted)? {
                        return Ok(source);
                    }
                    hosted.endpoint().note_whole_only("it ignores the range");
                    self.hosts.clear();
                    continue;
                }
                Ok(RangeResponse::Opened(source)) => {
                    if as_part {
                        hosted.endpoint().note_part(true);
                    }
                    return Ok(source);
                }
                Ok(RangeResponse::Expired) => {
                    self.renewed = true;
                    hosted.endpoint().set_target(hosted.name(), &self.reader.digest, None);
                    continue;
                }
                Ok(RangeResponse::NoPart(error)) => match self.open_whole(&hosted, &error, deadline).await? {
                    Some(source) => return Ok(source),
                    None => (error, None),
                },
                Ok(RangeResponse::Refused(error, pause)) => (error, pause),
                Err(error) => (error, None),
            };
            self.failed(&hosted, error, pause, deadline).await?;
        }
    }

    /// Asks a host that serves no parts for the whole blob, unless another one may serve parts.
    async fn open_whole(
        &self,
        hosted: &HostedRepository,
        why: &RegistryError,
        deadline: &Deadline,
    ) -> Result<Option<Source>, RegistryError> {
        if self.hosts.iter().any(|other| !other.is_on_host_of(hosted) && !other.endpoint().serves_whole_only()) {
            hosted.endpoint().note_whole_only(why);
            return Ok(None);
        }
        match self.ask(hosted, false, deadline).await {
            Ok(RangeResponse::Opened(source)) => {
                hosted.endpoint().note_whole_only(why);
                Ok(Some(source))
            }
            Err(error @ RegistryError::Deadline { .. }) => Err(error),
            Ok(_) | Err(_) => Ok(None),
        }
    }

    /// Whether another host may serve parts, where this one has sent the whole blob.
    fn has_better(&self, hosted: &HostedRepository) -> Result<bool, RegistryError> {
        let serves_parts =
            |other: &HostedRepository| !other.is_on_host_of(hosted) && !other.endpoint().serves_whole_only();
        let is_free = self.reader.only.is_none();
        Ok(is_free && self.reader.repository.hosts(Need::Part)?.iter().any(serves_parts))
    }

    /// Asks one host for what is left of the range, or for the whole blob.
    async fn ask(
        &self,
        hosted: &HostedRepository,
        as_part: bool,
        deadline: &Deadline,
    ) -> Result<RangeResponse, RegistryError> {
        let mut call = self.call(hosted, as_part);
        let asked = call.url.clone();
        let cached = hosted.endpoint().target(hosted.name(), &self.reader.digest);
        let was_cached = cached.is_some();
        if let Some(target) = cached {
            call.url = target;
        }
        let answer = hosted.attempt(&call, deadline).await?;
        let elsewhere = !hosted.endpoint().is_home(&answer.url);
        match answer.status() {
            200 | 206 => {
                let target = answer.url.clone();
                let accepted = self.accept(hosted, as_part, answer)?;
                if matches!(accepted, RangeResponse::Opened(_)) && !was_cached && target != asked {
                    hosted.endpoint().set_target(hosted.name(), &self.reader.digest, Some(target));
                }
                Ok(accepted)
            }
            416 => {
                let total = answer.response.header("content-range").and_then(unsatisfied_total);
                let error = self.not_satisfiable(hosted.host(), total);
                let is_shorter = total.is_some_and(|total| total != self.reader.size);
                if is_shorter || !as_part { Err(error) } else { Ok(RangeResponse::NoPart(error)) }
            }
            // A signed URL that has expired: 403, 401, or 400 with ExpiredToken.
            400 | 401 | 403 | 404 if (was_cached || elsewhere) && !self.renewed => Ok(RangeResponse::Expired),
            404 => Err(self.reader.missing(hosted.host())),
            status => {
                let pause = answer.asked_pause();
                let error = answer.error().await;
                match as_part && REFUSES_RANGE.contains(&status) {
                    true => Ok(RangeResponse::NoPart(error)),
                    false => Ok(RangeResponse::Refused(error, pause)),
                }
            }
        }
    }

    /// Checks that the answer is what was asked for.
    fn accept(
        &self,
        hosted: &HostedRepository,
        as_part: bool,
        answer: ApiResponse<'_>,
    ) -> Result<RangeResponse, RegistryError> {
        let (response, size) = (answer.response, self.reader.size);
        let length = response.content_length();
        let encoding = response.header("content-encoding").unwrap_or("identity");
        if !encoding.trim().eq_ignore_ascii_case("identity") {
            return Err(self.wrong_range(hosted, format!("encoded as {}", one_line(encoding))));
        }
        // An HTML page instead of a blob. What the last host calls a page must be taken for what it is.
        if !hosted.is_last() && response.media_type() == "text/html" {
            return Err(self.wrong_range(hosted, "a web page".to_owned()));
        }
        let no_part = |error| if as_part { Ok(RangeResponse::NoPart(error)) } else { Err(error) };
        if response.status() == 200 {
            // The range was ignored, or none was sent. The body starts at byte 0, unless its length says that it is a
            // part.
            return match length {
                Some(length) if length != size => no_part(self.wrong_size(hosted, length)),
                None if as_part => no_part(self.wrong_range(hosted, "an answer without a length".to_owned())),
                _ => Ok(RangeResponse::Opened(Source { response, at: 0, end: size })),
            };
        }
        let Some(text) = response.header("content-range") else {
            // Old servers leave it out. Nothing but an exact length makes such an answer believable.
            let multipart = response.media_type().starts_with("multipart/");
            if length != Some(self.range.end - self.position) || multipart {
                return no_part(self.wrong_range(hosted, "a part without Content-Range".to_owned()));
            }
            return Ok(RangeResponse::Opened(Source { response, at: self.position, end: self.range.end }));
        };
        let right = content_range(text).filter(|range| {
            let is_wanted = range.first == self.position && range.last < self.range.end;
            let is_whole = !as_part && range.first == 0 && range.last + 1 == size;
            (is_wanted || is_whole)
                && range.total.is_none_or(|total| total == size)
                && length.is_none_or(|length| length == range.last - range.first + 1)
        });
        match right {
            Some(range) => Ok(RangeResponse::Opened(Source { response, at: range.first, end: range.last + 1 })),
            None => no_part(self.wrong_range(hosted, format!("Content-Range: {}", one_line(text)))),
        }
    }

    /// Whether less than the whole blob is left to read.
    fn is_part(&self) -> bool {
        self.position > 0 || self.range.end < self.reader.size
    }

    fn need(&self) -> Need {
        if self.is_part() { Need::Part } else { Need::Content }
    }

    fn call(&self, hosted: &HostedRepository, as_part: bool) -> Call {
        let mut call = blob_call(hosted, Method::Get, &self.reader.digest, self.what());
        // A plain request for a whole blob works everywhere, also where ranges do not.
        if as_part {
            call.headers.push(("range", format!("bytes={}-{}", self.position, self.range.end - 1)));
        }
        call
    }

    fn what(&self) -> String {
        format!("reading bytes {}..{} of {}", self.position, self.range.end, self.reader.digest)
    }

    fn wrong_range(&self, hosted: &HostedRepository, found: String) -> RegistryError {
        RegistryError::WrongRange {
            registry: hosted.host().to_owned(),
            repository: self.reader.repository.name().to_owned(),
            digest: Box::new(self.reader.digest),
            range: self.position..self.range.end,
            found,
        }
    }

    fn wrong_size(&self, hosted: &HostedRepository, found: u64) -> RegistryError {
        RegistryError::Size {
            registry: hosted.host().to_owned(),
            repository: self.reader.repository.name().to_owned(),
            what: format!("blob {}", self.reader.digest),
            expected: self.reader.size,
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
