//! Fetches what a profile names before a program asks for it.
//!
//! Without a pack: the profile's spans in its order, adjacent ones joined to large requests, with enough in flight to
//! keep the line busy. While a foreground read waits for bytes that were not in flight there are fewer, so that its
//! request comes first. With a pack: one request, see [`crate::foresight::profile::pack`]; when that ends early, spans
//! take over.
//!
//! The budget is for what proves wrong: bytes that were fetched and are not read yet. A profile that is right may name
//! more than that, and goes on as its bytes are read; one that is of something else ends there.
//!
//! Invariants: never more compressed bytes are asked for than the budget and what of them was read; the first failure
//! ends it, with one line in the log; it ends when its [`Replay`] is dropped.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use soci_index::format::digest::Digest;
use soci_index::format::profile::Profile;
use soci_index::format::profile::artifact::{self, Published};
use soci_index::format::span::SpanId;
use soci_index::image::ImageSource;
use soci_index::publish::profiles::{self, ProfilesError};
use soci_index::registry::referrers::Listing;
use tokio::runtime::Handle;
use tokio::task::JoinHandle;

use crate::foresight::profile::pack::Unpacking;
use crate::layer::readahead::Foresight;
use crate::layer::reader::LayerReader;

/// Compressed bytes of one request.
const REQUEST_BYTES_MAX: u64 = 1 << 20;
/// Requests at a time. Most are small, since what a program reads lies here and there.
const REQUESTS_MAX: usize = 16;
/// Compressed bytes in flight at a time: several times what a line of 1 Gbit/s and 2 ms, or of 100 Mbit/s and 20 ms,
/// holds, since they count until they are decoded.
const FLIGHT_BYTES: u64 = 2 << 20;
/// The same during a foreground read of bytes that were not in flight: as much as the line holds, so that it is not
/// idle while the program's request is in flight, nor that request behind much.
const FLIGHT_BYTES_BESIDE_READS: u64 = 256 << 10;
/// How far ahead in the profile an adjacent span may be to share a request.
const NEIGHBOURS: usize = 256;
/// How often to look whether programs still wait.
const LOOK: Duration = Duration::from_millis(2);
/// How long nothing of what was fetched may be read before a profile whose budget is spent is given up.
const PATIENCE: Duration = Duration::from_secs(90);

/// Which profile of an image to use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Choice {
    /// The published default, else what the node remembers.
    Default,
    /// The published one of this name.
    Named(String),
    None,
}

/// A profile that was found.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// What it is called.
    pub name: String,
    /// What it says.
    pub profile: Arc<Profile>,
    /// Where it is published, when it is.
    pub published: Option<Published>,
}

/// How much may be fetched, and how.
#[derive(Debug, Clone, Copy)]
pub struct ReplayOptions {
    /// Compressed bytes at most that are fetched and not read, about.
    pub budget_bytes: u64,
}

/// Default budget of compressed bytes that a profile may fetch without their being read, by the image's size: a quarter
/// of the image, at least 16 MiB, since small images are often needed whole, and at most 512 MiB.
#[must_use]
pub fn budget(image_bytes: u64) -> u64 {
    (image_bytes / 4).clamp(16 << 20, 512 << 20)
}

/// Finds a published profile's manifest, by the list that was asked for early if there is one.
///
/// # Errors
/// [`ProfilesError`] when the registry cannot be asked.
pub async fn find_published(
    source: &ImageSource,
    image: &Digest,
    listing: Option<&Listing>,
    choice: &Choice,
) -> Result<Option<Published>, ProfilesError> {
    let name = match choice {
        Choice::None => return Ok(None),
        Choice::Default => None,
        Choice::Named(name) => Some(name.as_str()),
    };
    let listed = match listing {
        Some(listing) => profiles::list_early(listing).await?,
        None => profiles::list(source, image).await?,
    };
    Ok(artifact::choose(&listed, name).cloned())
}

/// Fetches a profile that was found.
///
/// # Errors
/// [`ProfilesError`] when it cannot be obtained, or is none.
pub async fn fetch(source: &ImageSource, published: &Published) -> Result<Wanted, ProfilesError> {
    let profile = Arc::new(profiles::fetch(source, published).await?);
    Ok(Wanted { name: published.name.clone(), profile, published: Some(published.clone()) })
}

/// A replay that is in progress. It ends with this value.
#[derive(Debug)]
pub struct Replay {
    task: JoinHandle<()>,
}

impl Drop for Replay {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Replay {
    /// Begins to fetch what `wanted` names, for an image in `source` whose layers these are.
    #[must_use]
    pub fn start(
        wanted: Wanted,
        source: ImageSource,
        readers: Vec<LayerReader>,
        options: ReplayOptions,
        runtime: &Handle,
    ) -> Self {
        let mut seen = HashSet::new();
        let readers: Vec<LayerReader> = readers.into_iter().filter(|reader| seen.insert(reader.digest())).collect();
        // Readers must know of a pack before the first read, not when the task gets to run.
        let unpacking = pack_of(&wanted, &readers, options)
            .and_then(|pack| Some((Unpacking::new(Arc::clone(&wanted.profile), pack.digest, &readers)?, pack)));
        let plans: Vec<_> = readers.iter().map(|reader| reader.follow_plan(Foresight::Bytes)).collect();
        Self {
            task: runtime.spawn(async move {
                let _plans = plans;
                let mut budget = options.budget_bytes;
                if let Some((unpacking, pack)) = unpacking {
                    budget = budget.saturating_sub(pack.size);
                    match unpacking.run(source.open_blob(&pack)).await {
                        Ok(()) => return,
                        Err(error) => {
                            tracing::warn!(profile = wanted.name, pack = %pack.digest, %error, "a start-up pack failed; fetching spans instead");
                        }
                    }
                }
                by_spans(&wanted, &readers, budget).await;
            }),
        }
    }

    /// Waits for its end.
    pub async fn finished(mut self) {
        // A panic in it has been reported; what it did not fetch is fetched when it is read.
        let _ = (&mut self.task).await;
    }
}

/// The pack, where that is the cheaper way: not when most of what it brings is here.
fn pack_of(
    wanted: &Wanted,
    readers: &[LayerReader],
    options: ReplayOptions,
) -> Option<soci_index::format::model::Descriptor> {
    let pack = wanted.published.as_ref()?.pack.clone()?;
    let has_digests = !wanted.profile.digests().is_empty();
    let by_spans: u64 = lacking(wanted, readers).into_iter().map(|span| size(readers, span)).sum();
    (has_digests && pack.size <= options.budget_bytes.min(by_spans)).then_some(pack)
}

/// The spans of a profile that cannot be read yet, in its order.
fn lacking(wanted: &Wanted, readers: &[LayerReader]) -> Vec<(usize, SpanId)> {
    let tables: Vec<_> = readers.iter().map(|reader| (reader.digest(), &reader.index().spans)).collect();
    let mut spans = wanted.profile.spans(&tables);
    spans.retain(|(place, span)| !readers[*place].store().is_readable(*span));
    spans
}

/// Compressed bytes of a span.
fn size(readers: &[LayerReader], (place, span): (usize, SpanId)) -> u64 {
    readers[place].index().spans.span(span).map_or(0, |span| span.compressed.end - span.compressed.start)
}

async fn by_spans(wanted: &Wanted, readers: &[LayerReader], budget_bytes: u64) {
    // A request that does not fit into what is left of the budget is not made: none may be most of it.
    let largest = REQUEST_BYTES_MAX.min(budget_bytes / 8);
    let requests = requests(&lacking(wanted, readers), |span| size(readers, span), largest);
    let (mut plan, mut planned_bytes) = (requests.iter().peekable(), 0);
    let mut requests = requests.iter().cloned().peekable();
    let (mut fetching, mut in_flight) = (FuturesUnordered::new(), 0);
    let mut budget = Budget::new(budget_bytes, Instant::now());
    loop {
        let is_waited_for = readers.iter().any(|reader| reader.waits().any_unforeseen());
        let limit = if is_waited_for { FLIGHT_BYTES_BESIDE_READS } else { FLIGHT_BYTES };
        let read = readers.iter().map(|reader| reader.ahead().foreseen_bytes().0).sum();
        budget.record_read(read, Instant::now());
        // What the budget will never reach is not prepared for.
        while let Some((place, spans)) = plan.next_if(|(place, spans)| {
            let bytes = bytes_of(readers, *place, spans);
            budget.reaches(planned_bytes + bytes)
        }) {
            planned_bytes += bytes_of(readers, *place, spans);
            readers[*place].fetching().plan(spans.clone());
        }
        let next = requests.peek().map(|(place, spans)| bytes_of(readers, *place, spans));
        let is_spent = next.is_some_and(|bytes| !budget.has(bytes));
        if is_spent && budget.is_given_up(Instant::now()) {
            tracing::info!(profile = wanted.name, budget_bytes, "what the profile names is not read; stopping");
            return;
        }
        while let Some((place, spans)) = requests.next_if(|(place, spans)| {
            let bytes = bytes_of(readers, *place, spans);
            let fits = in_flight == 0 || in_flight + bytes <= limit && fetching.len() < REQUESTS_MAX;
            fits && budget.has(bytes)
        }) {
            let bytes = readers[place].ahead().foresee(spans.clone(), Foresight::Bytes);
            budget.spend(bytes);
            in_flight += bytes;
            fetching.push(async move { (bytes, readers[place].fetching().fetch_spans(spans).await) });
        }
        let fetched = tokio::select! {
            Some(fetched) = fetching.next() => fetched,
            () = tokio::time::sleep(if is_spent { LOOK * 10 } else { LOOK }), if next.is_some() => continue,
            else => return,
        };
        match fetched {
            (bytes, Ok(())) => in_flight -= bytes,
            (_, Err(error)) => {
                tracing::warn!(profile = wanted.name, %error, "what the profile names is not fetched ahead any more");
                return;
            }
        }
    }
}

/// What may still be asked for.
#[derive(Debug)]
struct Budget {
    /// For what is not read.
    bytes: u64,
    asked: u64,
    /// What of it was read, about, and when that became more last.
    read: u64,
    since: Instant,
}

impl Budget {
    const fn new(bytes: u64, now: Instant) -> Self {
        Self { bytes, asked: 0, read: 0, since: now }
    }

    const fn has(&self, bytes: u64) -> bool {
        self.reaches(self.asked.saturating_add(bytes))
    }

    /// Whether so many bytes in all may be asked for, as far as is known now.
    const fn reaches(&self, bytes: u64) -> bool {
        bytes <= self.bytes.saturating_add(self.read)
    }

    const fn spend(&mut self, bytes: u64) {
        self.asked = self.asked.saturating_add(bytes);
    }

    /// Notes how much was read until now.
    const fn record_read(&mut self, read: u64, now: Instant) {
        if read > self.read {
            (self.read, self.since) = (read, now);
        }
    }

    /// Whether nothing more was read for so long that nothing will be.
    fn is_given_up(&self, now: Instant) -> bool {
        now.duration_since(self.since) > PATIENCE
    }
}

fn bytes_of(readers: &[LayerReader], place: usize, spans: &Range<SpanId>) -> u64 {
    spans.clone().map(|span| size(readers, (place, span))).sum()
}

/// The requests for `spans`, which are in the order of the profile. Adjacent spans that follow soon in the profile
/// share the request, up to `largest` compressed bytes in all.
fn requests(
    spans: &[(usize, SpanId)],
    size: impl Fn((usize, SpanId)) -> u64,
    largest: u64,
) -> Vec<(usize, Range<SpanId>)> {
    let (mut requests, mut taken) = (Vec::new(), HashSet::new());
    for (number, first) in spans.iter().enumerate() {
        if taken.contains(first) {
            continue;
        }
        let mut bytes = size(*first);
        let soon = &spans[number..spans.len().min(number + NEIGHBOURS)];
        let (place, mut end) = (first.0, first.1 + 1);
        while let Some(next) = soon.iter().find(|next| **next == (place, end) && !taken.contains(*next)) {
            let more = bytes + size(*next);
            if more > largest {
                break;
            }
            (bytes, end) = (more, end + 1);
        }
        taken.extend((first.1..end).map(|span| (place, span)));
        requests.push((place, first.1..end));
    }
    requests
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_keep_order_and_join_neighbours() {
        let size = |_| 1 << 19;
        let spans = [(0, 5), (1, 0), (0, 6), (0, 7), (0, 4), (1, 1)];
        assert_eq!(requests(&spans, size, 1 << 20), [(0, 5..7), (1, 0..2), (0, 7..8), (0, 4..5)]);
        assert_eq!(requests(&spans, size, 1).len(), spans.len());
        assert!(requests(&[], size, 1 << 20).is_empty());
    }

    #[test]
    fn what_is_read_is_no_loss() {
        let start = Instant::now();
        let mut budget = Budget::new(100, start);
        assert!(budget.has(100) && !budget.has(101));
        budget.spend(80);
        assert!(budget.has(20) && !budget.has(21));
        let later = start + PATIENCE;
        budget.record_read(50, later);
        assert!(budget.has(70) && !budget.has(71));
        budget.record_read(50, later + PATIENCE);
        assert!(!budget.is_given_up(later + PATIENCE));
        assert!(budget.is_given_up(later + PATIENCE + LOOK));
    }

    #[test]
    fn budgets() {
        for (image, expected) in [(0, 16 << 20), (100 << 20, 25 << 20), (10 << 30, 512 << 20)] {
            assert_eq!(budget(image), expected);
        }
    }
}
