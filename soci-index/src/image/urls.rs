//! Layers that registries need not have (foreign, non-distributable ones), fetched from the URLs of their descriptors.
//!
//! An image chooses these URLs, so fetching from them lets the image's author choose the hosts that this machine
//! contacts: nothing here runs unless the operator has allowed it. Invariants: only http and https are spoken; no
//! credential, header or client certificate of a registry is ever sent; redirects are followed under the rules for
//! registries; a blob has the size and the digest of its descriptor, or its stream ends with an error.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, TryStreamExt as _};
use url::Url;

use crate::format::digest::{Digest, Hasher};
use crate::format::model::Descriptor;
use crate::image::error::ImageError;
pub use crate::image::error::UrlError;
use crate::image::place::BlobStream;
use crate::registry::redirect::{ShownUrl, TargetError, is_loopback, target};
use crate::registry::retry::Deadline;
use crate::registry::transport::{Body, Home, Method, Request, Response, Setup, Transport};

/// URLs of one layer that are tried.
const URLS_MAX: usize = 10;
/// Redirects of one request.
const REDIRECTS_MAX: usize = 5;
/// Longest silence of a server before the request fails.
const SILENCE: Duration = Duration::from_secs(20);
/// An operation without any progress ends after this.
const DEADLINE: Duration = Duration::from_secs(60);

/// Fetches layers from their URLs. To have one is the operator's leave to do so.
#[derive(Debug, Clone)]
pub struct UrlFetcher(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// Proxies are for others than this machine.
    loopback: Transport,
    elsewhere: Transport,
}

impl UrlFetcher {
    /// Gets ready; nothing is asked yet.
    ///
    /// # Errors
    /// [`UrlError::Setup`].
    pub fn new() -> Result<Self, UrlError> {
        let transport = |loopback| {
            let setup = Setup {
                ca_files: Vec::new(),
                loopback,
                connect: SILENCE,
                head: SILENCE,
                stall: SILENCE,
                home: Home::default(),
            };
            Transport::new(&setup).map_err(|reason| UrlError::Setup { reason })
        };
        Ok(Self(Arc::new(Inner { loopback: transport(true)?, elsewhere: transport(false)? })))
    }

    /// Bytes of a layer, from the first of its URLs that has them. All of them are checked against its digest, a part
    /// is not.
    #[must_use]
    pub fn read(&self, layer: &Descriptor, range: Range<u64>) -> BlobStream {
        let (this, layer) = (self.clone(), layer.clone());
        let digest = Box::new(layer.digest);
        let opened = async move { this.open(&layer, range).await };
        let stream = futures_util::stream::once(opened).try_flatten();
        BlobStream::new(stream.map_err(move |source| ImageError::Urls { layer: digest.clone(), source }))
    }

    async fn open(
        &self,
        layer: &Descriptor,
        range: Range<u64>,
    ) -> Result<impl Stream<Item = Result<Bytes, UrlError>> + Send + use<>, UrlError> {
        let mut failed = UrlError::None;
        for text in layer.urls.iter().take(URLS_MAX) {
            let deadline = Deadline::new(DEADLINE, layer.size);
            match self.ask(text, layer, &range, &deadline).await {
                Ok((response, url)) => {
                    tracing::info!(layer = %layer.digest, %url, "a foreign layer is fetched from its URL");
                    return Ok(Incoming::new(response, url, layer, &range, deadline).stream());
                }
                Err(error) => {
                    tracing::debug!(layer = %layer.digest, %error, "a URL of a foreign layer does not deliver");
                    failed = error;
                }
            }
        }
        Err(failed)
    }

    async fn ask(
        &self,
        text: &str,
        layer: &Descriptor,
        range: &Range<u64>,
        deadline: &Deadline,
    ) -> Result<(Response, ShownUrl), UrlError> {
        let refuse =
            |source| UrlError::Target { url: text.chars().take(200).flat_map(char::escape_default).collect(), source };
        let mut url = Url::parse(text).map_err(|_| refuse(TargetError::Malformed))?;
        // Under the rules for redirects, from itself.
        url = target(&url, text).map_err(refuse)?;
        let mut headers = Vec::new();
        if *range != (0..layer.size) {
            headers.push(("range", format!("bytes={}-{}", range.start, range.end.saturating_sub(1))));
        }
        for _ in 0..=REDIRECTS_MAX {
            let transport = if is_loopback(&url) { &self.0.loopback } else { &self.0.elsewhere };
            let request = Request {
                method: Method::Get,
                url: &url,
                headers: &headers,
                more: None,
                authorization: None,
                body: &Body::Empty,
                home: false,
                silence_max: None,
            };
            let response = transport.send(&request, deadline).await?;
            let (status, shown) = (response.status(), ShownUrl::new(&url));
            let location = response.header("location").map(str::to_owned);
            match (status, location) {
                (301 | 302 | 303 | 307 | 308, Some(location)) => url = target(&url, &location).map_err(refuse)?,
                (200, _) => match response.content_length() {
                    Some(found) if found != layer.size => {
                        return Err(UrlError::Size { url: shown, expected: layer.size, found });
                    }
                    _ => return Ok((response, shown)),
                },
                (206, _) if begins_at(&response, range.start) => return Ok((response, shown)),
                (status, _) => return Err(UrlError::Status { url: shown, status }),
            }
        }
        Err(UrlError::Status { url: ShownUrl::new(&url), status: 310 })
    }
}

/// Whether a partial answer begins where it was asked to.
fn begins_at(response: &Response, start: u64) -> bool {
    let range = response.header("content-range").and_then(|text| text.trim().strip_prefix("bytes "));
    range.and_then(|range| range.split_once('-')).is_some_and(|(first, _)| first.trim().parse() == Ok(start))
}

/// An answer in flight.
struct Incoming {
    response: Response,
    url: ShownUrl,
    deadline: Deadline,
    expected: Digest,
    size: u64,
    /// Bytes before the wanted ones, from a server that sends everything.
    skip: u64,
    left: u64,
    /// Of a whole blob.
    hasher: Option<Hasher>,
}

impl Incoming {
    fn new(response: Response, url: ShownUrl, layer: &Descriptor, range: &Range<u64>, deadline: Deadline) -> Self {
        let is_whole = *range == (0..layer.size);
        Self {
            skip: if response.status() == 200 { range.start } else { 0 },
            left: range.end.saturating_sub(range.start),
            hasher: is_whole.then(|| Hasher::new(layer.digest.algorithm())),
            expected: layer.digest,
            size: layer.size,
            response,
            url,
            deadline,
        }
    }

    fn stream(self) -> impl Stream<Item = Result<Bytes, UrlError>> + Send + use<> {
        futures_util::stream::try_unfold(self, |mut incoming| async move {
            Ok(incoming.next().await?.map(|piece| (piece, incoming)))
        })
    }

    async fn next(&mut self) -> Result<Option<Bytes>, UrlError> {
        while let Some(mut piece) = self.response.chunk(&self.deadline).await? {
            let skipped = self.skip.min(piece.len() as u64);
            self.skip -= skipped;
            drop(piece.split_to(usize::try_from(skipped).unwrap_or(usize::MAX)));
            if piece.is_empty() {
                continue;
            }
            if piece.len() as u64 > self.left {
                if self.hasher.is_some() {
                    return Err(self.wrong_size(self.size + (piece.len() as u64 - self.left)));
                }
                piece.truncate(usize::try_from(self.left).unwrap_or(usize::MAX));
            }
            self.left -= piece.len() as u64;
            if let Some(hasher) = &mut self.hasher {
                hasher.update(&piece);
            }
            return Ok((!piece.is_empty()).then_some(piece));
        }
        if self.left > 0 {
            return Err(self.wrong_size(self.size - self.left));
        }
        match self.hasher.take().map(Hasher::finish) {
            Some(found) if found != self.expected => {
                Err(UrlError::Digest { url: self.url.clone(), found: Box::new(found) })
            }
            _ => Ok(None),
        }
    }

    fn wrong_size(&self, found: u64) -> UrlError {
        UrlError::Size { url: self.url.clone(), expected: self.size, found }
    }
}
