//! Where the blobs of an index are: asked in order, the next place when one fails or is silent ([`hedge`]).
//!
//! An index may be copied without its blobs, or lose them to a clean-up, and what is missing in one place is no error
//! while another place has it. A place that the image can do without is not waited for: one that has not delivered
//! within its time is asked for no further blob, for the layer can be opened another way.

use std::fmt::{self, Display};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::future::BoxFuture;

use crate::find::{PATIENCE, hedge};
use crate::image::ImageSource;

/// Slowest delivery that is waited for, in bytes per second, beyond [`PATIENCE`].
const SLOWEST: u64 = 50_000;

/// The places of an index's blobs. Clones share their state.
#[derive(Debug, Clone)]
pub struct Parts(Arc<[PartPlace]>);

#[derive(Debug)]
struct PartPlace {
    name: String,
    source: ImageSource,
    /// Whether the image itself is there: it is of no use without this one.
    is_own: bool,
    /// Whether it has let a request pass without an answer.
    is_silent: AtomicBool,
}

/// No place has a blob.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct NoPlace {
    /// What each place said, in the order in which they did.
    pub tried: Vec<(String, String)>,
}

impl Display for NoPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, (place, error)) in self.tried.iter().enumerate() {
            let separator = if position == 0 { "" } else { "; " };
            write!(f, "{separator}{place}: {error}")?;
        }
        Ok(())
    }
}

impl Parts {
    /// `own` is where the image is. Of several sources in one place the first counts.
    #[must_use]
    pub fn new<'a>(sources: impl IntoIterator<Item = &'a ImageSource>, own: &ImageSource) -> Self {
        let mut places: Vec<PartPlace> = Vec::new();
        for source in sources {
            let name = source.place();
            if !places.iter().any(|known| known.name == name) {
                let is_own = name == own.place();
                places.push(PartPlace { name, source: source.clone(), is_own, is_silent: AtomicBool::new(false) });
            }
        }
        Self(places.into())
    }

    /// All places, in the order in which they are asked.
    pub fn sources(&self) -> impl Iterator<Item = &ImageSource> {
        self.0.iter().map(|place| &place.source)
    }

    /// What `ask` gets from the first place that has it; it is about `bytes` long.
    ///
    /// # Errors
    /// [`NoPlace`] with the answer of every place.
    pub async fn first<'a, T, E: Display>(
        &'a self,
        bytes: u64,
        ask: impl Fn(&'a ImageSource) -> BoxFuture<'a, Result<T, E>>,
    ) -> Result<T, NoPlace> {
        let patience = PATIENCE + Duration::from_secs(bytes / SLOWEST);
        let attempts: Vec<_> = self.0.iter().map(|place| place.ask(patience, &ask)).collect();
        hedge::first(attempts).await.map_err(|tried| NoPlace { tried })
    }
}

impl PartPlace {
    async fn ask<'a, T, E: Display>(
        &'a self,
        patience: Duration,
        ask: &impl Fn(&'a ImageSource) -> BoxFuture<'a, Result<T, E>>,
    ) -> Result<T, (String, String)> {
        let failed = |why: String| (self.name.clone(), why);
        if self.is_own {
            return ask(&self.source).await.map_err(|error| failed(error.to_string()));
        }
        if self.is_silent.load(Ordering::Relaxed) {
            return Err(failed("it did not answer before".to_owned()));
        }
        match tokio::time::timeout(patience, ask(&self.source)).await {
            Ok(answer) => answer.map_err(|error| failed(error.to_string())),
            Err(_) => {
                self.is_silent.store(true, Ordering::Relaxed);
                Err(failed(format!("it did not answer within {patience:?}")))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;
    use tokio::time::Instant;

    use super::*;
    use crate::registry::{ClientOptions, Registry};

    /// What a place does when it is asked.
    #[derive(Debug, Clone, Copy)]
    enum Manner {
        Well,
        Fails,
        Silent,
    }

    fn source(host: &str) -> ImageSource {
        ImageSource::of_repository(&Registry::new(host, ClientOptions::default()).unwrap().repository("team/app"))
    }

    async fn ask(parts: &Parts, manners: &[(&str, Manner)], bytes: u64) -> Result<String, NoPlace> {
        let ask = |source: &ImageSource| {
            let place = source.place();
            let manner = manners.iter().find(|(host, _)| place.contains(host)).unwrap().1;
            async move {
                match manner {
                    Manner::Well => Ok(place),
                    Manner::Fails => Err("it is gone"),
                    Manner::Silent => std::future::pending().await,
                }
            }
            .boxed()
        };
        parts.first(bytes, ask).await
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_place_is_given_up_and_not_asked_again() {
        let (own, index) = (source("own.example"), source("index.example"));
        let parts = Parts::new([&index, &own, &index], &own);
        assert_eq!(parts.sources().count(), 2);
        let manners = [("index.example", Manner::Silent), ("own.example", Manner::Fails)];
        let start = Instant::now();
        let error = ask(&parts, &manners, 2 * SLOWEST).await.unwrap_err().to_string();
        assert_eq!(start.elapsed(), PATIENCE + Duration::from_secs(2));
        assert!(error.contains("own.example") && error.contains("it is gone"), "{error}");
        assert!(error.contains("index.example") && error.contains("did not answer within 12s"), "{error}");
        let start = Instant::now();
        assert!(ask(&parts.clone(), &manners, 0).await.is_err());
        assert_eq!(start.elapsed(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn the_place_of_the_image_is_waited_for() {
        let (own, index) = (source("own.example"), source("index.example"));
        let parts = Parts::new([&index, &own], &own);
        let manners = [("index.example", Manner::Fails), ("own.example", Manner::Silent)];
        let waiting = tokio::time::timeout(Duration::from_secs(3600), ask(&parts, &manners, 0));
        assert!(waiting.await.is_err(), "how long to wait for the image's own registry is the client's matter");
        let manners = [("index.example", Manner::Well), ("own.example", Manner::Silent)];
        assert!(ask(&parts, &manners, 0).await.unwrap().contains("index.example"));
        let manners = [("index.example", Manner::Silent), ("own.example", Manner::Well)];
        assert!(ask(&parts, &manners, 0).await.unwrap().contains("own.example"));
    }
}
