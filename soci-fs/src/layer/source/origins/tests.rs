//! Origins that fail, are silent, break off and lie, each beside one that is well.

use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use soci_index::find::hedge::HEDGE;

use super::*;
use crate::layer::source::memory::MemorySource;

/// How an origin behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Manner {
    Well,
    Fails,
    Silent,
    BreaksOff,
}

#[derive(Debug)]
struct Scripted {
    manner: Manner,
    asked: AtomicUsize,
}

impl Scripted {
    fn new(manner: Manner) -> Arc<Self> {
        Arc::new(Self { manner, asked: AtomicUsize::new(0) })
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::Relaxed)
    }
}

fn denied() -> SourceError {
    SourceError::Denied { origin: "scripted".to_owned(), what: "no".to_owned() }
}

impl Source for Scripted {
    fn read(&self, range: Range<u64>) -> BoxFuture<'_, Result<Chunks, SourceError>> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let half = Bytes::from(vec![7; usize::try_from((range.end - range.start) / 2).unwrap()]);
        async move {
            match self.manner {
                Manner::Well => MemorySource::new(vec![7; 100]).read(range).await,
                Manner::Fails => Err(denied()),
                Manner::Silent => std::future::pending().await,
                Manner::BreaksOff => Ok(futures_util::stream::iter([Ok(half), Err(denied())]).boxed()),
            }
        }
        .boxed()
    }
}

async fn all(origins: &Origins) -> Result<usize, SourceError> {
    let mut chunks = origins.read(0..100).await?;
    let mut length = 0;
    while let Some(chunk) = chunks.next().await {
        length += chunk?.len();
    }
    Ok(length)
}

#[tokio::test]
async fn another_origin_delivers() {
    for manner in [Manner::Fails, Manner::Silent] {
        let (bad, good) = (Scripted::new(manner), Scripted::new(Manner::Well));
        let origins = Origins::new("bad", Arc::clone(&bad) as Arc<dyn Source>);
        origins.add("good", Arc::clone(&good) as Arc<dyn Source>);
        let start = Instant::now();
        assert_eq!(all(&origins).await.unwrap(), 100, "{manner:?}");
        assert!(start.elapsed() < 2 * HEDGE, "{manner:?}");
        // And is asked first from then on.
        let start = Instant::now();
        assert_eq!(all(&origins).await.unwrap(), 100);
        assert!(start.elapsed() < HEDGE, "{manner:?}");
        assert_eq!((bad.asked(), good.asked()), (1, 2), "{manner:?}");
    }
}

#[tokio::test]
async fn what_broke_off_or_lied_is_passed_over() {
    let (bad, good) = (Scripted::new(Manner::BreaksOff), Scripted::new(Manner::Well));
    let origins = Origins::new("bad", Arc::clone(&bad) as Arc<dyn Source>);
    origins.add("good", Arc::clone(&good) as Arc<dyn Source>);
    assert!(all(&origins).await.is_err(), "half of it came");
    assert_eq!((all(&origins).await.unwrap(), bad.asked()), (100, 1));
    let liar = origins.fetch(0..100).await.unwrap().from.unwrap();
    origins.blame(liar);
    assert!(all(&origins).await.is_err(), "the other one is no better");
    assert_eq!(all(&origins).await.unwrap(), 100, "of two that rest, the one that rests less");
}

#[tokio::test]
async fn a_failure_of_all_names_all_and_is_tried_again() {
    let bad = Scripted::new(Manner::Fails);
    let origins = Origins::new("one", Arc::clone(&bad) as Arc<dyn Source>);
    assert!(matches!(all(&origins).await, Err(SourceError::Denied { .. })), "one origin's error is its own");
    origins.add("two", Arc::clone(&bad) as Arc<dyn Source>);
    let error = all(&origins).await.unwrap_err();
    assert!(matches!(&error, SourceError::Everywhere { causes } if causes.len() == 2), "{error}");
    assert!(error.is_refusal());
    let before = bad.asked();
    assert!(all(&origins).await.is_err());
    assert_eq!(bad.asked(), before + 2, "resting is no refusal to try");
    // A name that failed gets another source, and with it new credentials.
    let good = Scripted::new(Manner::Well);
    origins.add("one", Arc::clone(&good) as Arc<dyn Source>);
    assert_eq!((all(&origins).await.unwrap(), origins.choices()), (100, 2));
    let range = origins.read(0..101).await;
    assert!(matches!(range, Err(SourceError::OutOfRange { .. })));
}

#[test]
fn the_list_is_bounded() {
    let source = Scripted::new(Manner::Well);
    let origins = Origins::new("0", Arc::clone(&source) as Arc<dyn Source>);
    for number in 1..200 {
        origins.add(number.to_string(), Arc::clone(&source) as Arc<dyn Source>);
    }
    assert_eq!(origins.choices(), ORIGINS_MAX);
    assert_eq!(origins.names().last().map(String::as_str), Some("199"));
}

/// Finds one origin, each time it is asked.
#[derive(Debug)]
struct Finder(Arc<Scripted>, AtomicUsize);

impl MoreOrigins for Finder {
    fn search(&self) -> BoxFuture<'_, Vec<(String, Arc<dyn Source>)>> {
        self.1.fetch_add(1, Ordering::Relaxed);
        async move { vec![("found".to_owned(), Arc::clone(&self.0) as Arc<dyn Source>)] }.boxed()
    }
}

#[tokio::test]
async fn more_are_searched_for_when_none_delivers() {
    let (bad, good) = (Scripted::new(Manner::Fails), Scripted::new(Manner::Well));
    let origins = Origins::new("bad", Arc::clone(&bad) as Arc<dyn Source>);
    let finder = Arc::new(Finder(Arc::clone(&good), AtomicUsize::new(0)));
    origins.search_by(Arc::clone(&finder) as Arc<dyn MoreOrigins>);
    for _ in 0..3 {
        assert_eq!(all(&origins).await.unwrap(), 100);
    }
    assert_eq!((finder.1.load(Ordering::Relaxed), origins.names()), (1, vec!["found".to_owned(), "bad".to_owned()]));
    // It fails, and is not retried at once.
    let origins = Origins::new("bad", Arc::clone(&bad) as Arc<dyn Source>);
    let finder = Arc::new(Finder(bad, AtomicUsize::new(0)));
    origins.search_by(Arc::clone(&finder) as Arc<dyn MoreOrigins>);
    for _ in 0..3 {
        assert!(all(&origins).await.is_err());
    }
    assert_eq!(finder.1.load(Ordering::Relaxed), 1);
}
