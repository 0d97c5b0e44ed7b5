//! A blob that can be obtained from several places: each image that uses a layer adds the one that it came from.
//!
//! A repository may be removed, its registry be down, a secret be revoked, a mirror deliver wrong bytes. None of that
//! may touch an image that is elsewhere as well, so an origin that fails is passed over while another one delivers:
//!
//! * an error, a refusal or a missing blob turns to the next origin at once;
//! * a request to a silent origin is hedged ([`hedge`]): the next one is asked concurrently, and the first response
//!   wins;
//! * one that broke off, or whose bytes did not agree with the index ([`Source::blame`]), goes to the end of the line;
//! * one that serves whole blobs only is asked when the others have failed, and for a while after them.
//!
//! An origin that failed rests, longer each time, and is asked all the same when nothing else is left: a failure of all
//! is an error, never the lack of a try. Credentials belong to the origin that they came with, and never leave it.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::{FutureExt as _, StreamExt as _};
use parking_lot::Mutex;
use soci_index::find::hedge;
use tokio::time::Instant;

use crate::layer::source::{Chunks, Delivery, OriginId, Source, SourceError};

/// How long an origin rests after its first failure; twice as long after each further one.
const REST_FIRST: Duration = Duration::from_secs(5);
/// No rest is longer.
const REST_LONGEST: Duration = Duration::from_secs(300);
/// Origins that are kept: the oldest that failed goes first. Stops a thousand images on one layer from making a list of
/// a thousand places.
const ORIGINS_MAX: usize = 64;

/// How long an origin that serves whole blobs only is asked after the others.
const WHOLE_FOR: Duration = Duration::from_secs(600);
/// How long a search for more origins is not made again.
const SEARCH_PAUSE: Duration = Duration::from_secs(30);

/// Origins that are asked one after the other.
type OriginList = Vec<(OriginId, Arc<dyn Source>)>;

/// What one origin gives; the outer error leads to the next one.
type Attempt<'a> = BoxFuture<'a, Result<Result<Delivery, SourceError>, SourceError>>;

/// Several places that have the same blob, the best first. Clones share everything.
#[derive(Clone)]
pub struct Origins(Arc<Mutex<OriginState>>);

struct OriginState {
    origins: Vec<Origin>,
    next: u64,
    more: Option<Arc<dyn MoreOrigins>>,
    searched: Option<Instant>,
}

/// Finds origins that are not known yet, when none of those that are delivers.
pub trait MoreOrigins: fmt::Debug + Send + Sync + 'static {
    /// All that are to be found, by name; known ones may be among them.
    fn search(&self) -> BoxFuture<'_, Vec<(String, Arc<dyn Source>)>>;
}

struct Origin {
    id: OriginId,
    name: String,
    source: Arc<dyn Source>,
    failures: u32,
    rests_until: Option<Instant>,
    /// Until when it is asked last, since it serves whole blobs only.
    whole_until: Option<Instant>,
}

impl Origin {
    fn serves_whole_only(&self, now: Instant) -> bool {
        self.whole_until.is_some_and(|until| now < until)
    }

    fn rests(&self, now: Instant) -> bool {
        self.rests_until.is_some_and(|until| now < until)
    }
}

impl Origins {
    /// One origin; more may be added. Names distinguish origins and appear in messages.
    #[must_use]
    pub fn new(name: impl Into<String>, source: Arc<dyn Source>) -> Self {
        let origins =
            Self(Arc::new(Mutex::new(OriginState { origins: Vec::new(), next: 0, more: None, searched: None })));
        origins.add(name, source);
        origins
    }

    /// Adds an origin, unless there is one of this name; a name that failed gets its new source, which may have other
    /// credentials, and another try.
    pub fn add(&self, name: impl Into<String>, source: Arc<dyn Source>) {
        let name = name.into();
        let mut state = self.0.lock();
        if let Some(known) = state.origins.iter_mut().find(|origin| origin.name == name) {
            if known.failures > 0 {
                (known.source, known.failures, known.rests_until) = (source, 0, None);
            }
            return;
        }
        if state.origins.len() >= ORIGINS_MAX {
            let worst =
                state.origins.iter().enumerate().max_by_key(|(place, origin)| (origin.failures, ORIGINS_MAX - place));
            if let Some(place) = worst.map(|(place, _)| place) {
                state.origins.remove(place);
            }
        }
        state.next += 1;
        let id = OriginId(state.next);
        state.origins.push(Origin { id, name, source, failures: 0, rests_until: None, whole_until: None });
    }

    /// Has more origins searched for when none delivers.
    pub fn search_by(&self, more: Arc<dyn MoreOrigins>) {
        self.0.lock().more = Some(more);
    }

    /// Searches for more origins; the new ones.
    async fn search(&self) -> OriginList {
        let more = {
            let mut state = self.0.lock();
            let is_due = state.searched.is_none_or(|searched| searched.elapsed() >= SEARCH_PAUSE);
            let more = state.more.clone().filter(|_| is_due);
            if more.is_some() {
                state.searched = Some(Instant::now());
            }
            more
        };
        let Some(more) = more else { return Vec::new() };
        let before = self.0.lock().next;
        for (name, source) in more.search().await {
            self.add(name, source);
        }
        let state = self.0.lock();
        let new = state.origins.iter().filter(|origin| origin.id.0 > before);
        new.map(|origin| (origin.id, Arc::clone(&origin.source))).collect()
    }

    /// The names of all origins, the one that is asked first first.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        self.0.lock().origins.iter().map(|origin| origin.name.clone()).collect()
    }

    /// All origins in the order in which they are asked, those that serve parts and those that do not; those that rest
    /// last.
    fn order(&self) -> (OriginList, OriginList) {
        let (state, now) = (self.0.lock(), Instant::now());
        let mut all: Vec<&Origin> = state.origins.iter().collect();
        all.sort_by_key(|origin| (origin.rests(now), origin.rests_until.filter(|_| origin.rests(now))));
        let (whole, parts): (Vec<_>, Vec<_>) = all.into_iter().partition(|origin| origin.serves_whole_only(now));
        let asked = |origins: Vec<&Origin>| -> OriginList {
            origins.into_iter().map(|origin| (origin.id, Arc::clone(&origin.source))).collect()
        };
        (asked(parts), asked(whole))
    }

    fn serves_whole_only(&self, id: OriginId) {
        if let Some(origin) = self.0.lock().origins.iter_mut().find(|origin| origin.id == id) {
            origin.whole_until = Some(Instant::now() + WHOLE_FOR);
        }
    }

    fn failed(&self, id: OriginId, why: &dyn fmt::Display) {
        let mut state = self.0.lock();
        let others = state.origins.len() > 1;
        let Some(origin) = state.origins.iter_mut().find(|origin| origin.id == id) else { return };
        let rest = REST_FIRST.saturating_mul(1 << origin.failures.min(10)).min(REST_LONGEST);
        origin.failures += 1;
        origin.rests_until = Some(Instant::now() + rest);
        if others {
            let seconds = rest.as_secs();
            tracing::warn!(origin = origin.name, %why, seconds, "an origin of a layer is passed over for a while");
        }
    }

    /// The origin that has delivered is asked first from now on.
    fn delivered(&self, id: OriginId) {
        let mut state = self.0.lock();
        if let Some(place) = state.origins.iter().position(|origin| origin.id == id) {
            let origin = &mut state.origins[place];
            (origin.failures, origin.rests_until) = (0, None);
            state.origins[..=place].rotate_right(1);
        }
    }

    /// Asks one origin after the other, the next one when one fails or is silent: those that serve parts, then those
    /// that serve the whole blob, then those that are to be found.
    async fn first(&self, range: Range<u64>) -> Result<Delivery, SourceError> {
        let (parts, whole) = self.order();
        let is_alone = parts.len() + whole.len() == 1;
        let asked: Vec<_> = whole.iter().map(|(id, _)| *id).collect();
        let attempts = self.attempts(parts, &range, is_alone).chain(self.attempts(whole, &range, true));
        let mut errors = match hedge::first(attempts.collect::<Vec<_>>()).await {
            Ok(delivery) => return delivery,
            Err(errors) => errors,
        };
        // One that was found to serve the whole only, while there were others.
        let mut more = self.order().1;
        more.retain(|(id, _)| !asked.contains(id));
        if more.is_empty() {
            more = self.search().await;
        }
        match hedge::first(self.attempts(more, &range, true).collect::<Vec<_>>()).await {
            Ok(delivery) => delivery,
            Err(others) => {
                errors.extend(others);
                Err(together(errors))
            }
        }
    }

    /// One attempt for each of these origins.
    fn attempts<'a>(
        &'a self,
        origins: OriginList,
        range: &Range<u64>,
        whole_too: bool,
    ) -> impl Iterator<Item = Attempt<'a>> + use<'a> {
        let range = range.clone();
        origins.into_iter().map(move |(id, source)| self.attempt(id, source, range.clone(), whole_too).boxed())
    }

    async fn attempt(
        &self,
        id: OriginId,
        source: Arc<dyn Source>,
        range: Range<u64>,
        whole_too: bool,
    ) -> Result<Result<Delivery, SourceError>, SourceError> {
        match begin(&*source, range).await {
            Ok(delivery) if delivery.is_whole && !whole_too => {
                self.serves_whole_only(id);
                Err(SourceError::NoParts)
            }
            Ok(delivery) => {
                self.delivered(id);
                Ok(Ok(Delivery { chunks: self.watched(id, delivery.chunks), from: Some(id), ..delivery }))
            }
            // Our own mistake, which every origin would find.
            Err(error @ SourceError::OutOfRange { .. }) => Ok(Err(error)),
            Err(error) => {
                self.failed(id, &error);
                Err(error)
            }
        }
    }

    /// Notes when an answer breaks off.
    fn watched(&self, id: OriginId, chunks: Chunks) -> Chunks {
        let origins = self.clone();
        chunks
            .inspect(move |chunk| {
                if let Err(error) = chunk {
                    origins.failed(id, error);
                }
            })
            .boxed()
    }
}

/// Asks one origin, and waits for the first bytes: only these show that it has the blob.
async fn begin(source: &dyn Source, range: Range<u64>) -> Result<Delivery, SourceError> {
    let is_empty = range.is_empty();
    let mut delivery = source.fetch(range).await?;
    let chunks = match delivery.chunks.next().await.transpose()? {
        Some(first) => futures_util::stream::iter([Ok(first)]).chain(delivery.chunks).boxed(),
        None if is_empty => delivery.chunks,
        None => return Err(SourceError::Empty),
    };
    Ok(Delivery { chunks, ..delivery })
}

/// The errors of all origins as one.
fn together(mut errors: Vec<SourceError>) -> SourceError {
    match errors.len() {
        0 => SourceError::Empty,
        1 => errors.remove(0),
        _ => SourceError::Everywhere { causes: errors.into() },
    }
}

impl Source for Origins {
    fn read(&self, range: Range<u64>) -> BoxFuture<'_, Result<Chunks, SourceError>> {
        async move { Ok(self.first(range.clone()).await?.part(range)) }.boxed()
    }

    fn fetch(&self, range: Range<u64>) -> BoxFuture<'_, Result<Delivery, SourceError>> {
        self.first(range).boxed()
    }

    fn blame(&self, from: OriginId) {
        self.failed(from, &"its bytes are not those that were indexed");
    }

    fn serves_parts(&self) -> bool {
        self.0.lock().origins.iter().all(|origin| origin.source.serves_parts())
    }

    fn choices(&self) -> usize {
        self.0.lock().origins.len()
    }
}

impl<S: Source> From<Arc<S>> for Origins {
    /// A single origin without a name.
    fn from(source: Arc<S>) -> Self {
        Self::new("", source)
    }
}

impl From<Arc<dyn Source>> for Origins {
    /// A single origin without a name.
    fn from(source: Arc<dyn Source>) -> Self {
        Self::new("", source)
    }
}

impl fmt::Debug for Origins {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.names()).finish()
    }
}

#[cfg(test)]
mod tests;
