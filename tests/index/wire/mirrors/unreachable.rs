//! Hosts that do not answer: passed over, left aside for a while, and asked as a last resort.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use soci_index::format::digest::Digest;
use soci_index::registry::hosts::HostRules;
use soci_index::registry::{Backoff, ClientOptions, RegistryError};

use super::{all, blob, by_digest, content, descriptor, host, mirrored, tag, unreachable};
use crate::wire::server::{Server, options, reply};

#[tokio::test]
async fn a_dead_mirror_is_passed_over() {
    let origin = Server::start(all).await;
    let repository = mirrored(&origin.address, vec![host(&unreachable(), HostRules::default())], options());
    repository.manifest(&tag()).await.unwrap().unwrap();
    assert_eq!(repository.blob(blob(), 4000).read_bytes(0..10).await.unwrap(), content()[..10]);
}

#[tokio::test]
async fn a_mirror_serves_while_the_origin_is_away() {
    let mirror = Server::start(all).await;
    let repository = mirrored(&unreachable(), vec![host(&mirror.address, HostRules::default())], options());
    repository.manifest(&tag()).await.unwrap().unwrap();
    repository.manifest(&by_digest()).await.unwrap().unwrap();
    assert_eq!(repository.blob_bytes(&descriptor(), 4000).await.unwrap(), content());
    assert_eq!(repository.referrers(&Digest::of(b"s"), None).await.unwrap().entries.len(), 1);
}

#[tokio::test]
async fn a_silent_mirror_is_not_asked_again_at_once() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let accepted = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&accepted);
    tokio::spawn(async move {
        let mut open = Vec::new();
        while let Ok((stream, _)) = listener.accept().await {
            counted.fetch_add(1, Ordering::Relaxed);
            open.push(stream);
        }
    });
    let origin = Server::start(all).await;
    let rules = HostRules { silence: Some(Duration::from_millis(200)), ..HostRules::default() };
    let repository = mirrored(&origin.address, vec![host(&address, rules)], options());
    let start = Instant::now();
    for number in 0..5 {
        let range = number * 10..number * 10 + 10;
        repository.blob(blob(), 4000).read_bytes(range).await.unwrap();
    }
    repository.manifest(&tag()).await.unwrap().unwrap();
    assert!(start.elapsed() < Duration::from_millis(900), "{:?}", start.elapsed());
    assert_eq!((accepted.load(Ordering::Relaxed), origin.requests().len()), (1, 6));
    // Without a limit of its own it may use up half of the time at most.
    let options = ClientOptions { deadline: Duration::from_millis(600), ..options() };
    let repository = mirrored(&origin.address, vec![host(&address, HostRules::default())], options);
    repository.manifest(&tag()).await.unwrap().unwrap();
}

/// Where only the mirror can be reached, a moment without it must not last.
#[tokio::test]
async fn a_mirror_that_was_left_aside_is_the_last_hope() {
    let (mirror, origin) = (unreachable(), unreachable());
    let repository = mirrored(&origin, vec![host(&mirror, HostRules::default())], options());
    repository.manifest(&tag()).await.unwrap_err();
    let mirror = Server::start_at(&mirror, all).await;
    repository.manifest(&tag()).await.unwrap().unwrap();
    assert_eq!(repository.blob(blob(), 4000).read_bytes(0..10).await.unwrap(), content()[..10]);
    assert_eq!(mirror.requests().len(), 2);
    // The origin is back and knows better.
    let origin = Server::start_at(&origin, |_| reply(404)).await;
    repository.manifest(&tag()).await.unwrap().unwrap();
    assert_eq!(origin.requests().len(), 0);
}

#[tokio::test]
async fn the_last_hope_is_asked_after_one_attempt_elsewhere() {
    let mut count = 0;
    let address = unreachable();
    let origin = Server::start(move |request| {
        count += 1;
        if count == 1 { all(request) } else { reply(503) }
    })
    .await;
    let repository = mirrored(&origin.address, vec![host(&address, HostRules::default())], options());
    repository.manifest(&tag()).await.unwrap().unwrap();
    let mirror = Server::start_at(&address, all).await;
    repository.manifest(&tag()).await.unwrap().unwrap();
    assert_eq!((origin.requests().len(), mirror.requests().len()), (2, 1));
    // It answers, so it is first again.
    repository.manifest(&tag()).await.unwrap().unwrap();
    assert_eq!((origin.requests().len(), mirror.requests().len()), (2, 2));
}

#[tokio::test]
async fn a_last_host_that_has_nothing_decides_while_a_mirror_is_aside() {
    let (address, origin) = (unreachable(), Server::start(|_| reply(404)).await);
    let repository = mirrored(&origin.address, vec![host(&address, HostRules::default())], options());
    assert_eq!(repository.manifest(&tag()).await, Ok(None));
    let mirror = Server::start_at(&address, all).await;
    assert_eq!(repository.manifest(&tag()).await, Ok(None));
    let error = repository.blob(blob(), 4000).read_bytes(0..10).await.unwrap_err();
    assert!(matches!(error, RegistryError::Missing { .. }), "{error:?}");
    assert_eq!((origin.requests().len(), mirror.requests().len()), (3, 0));
}

/// The last host's patience is the client's; a mirror has none.
#[tokio::test]
async fn waits_are_for_the_last_host() {
    let (mirror, origin) = (Server::start(|_| reply(503)).await, Server::start(|_| reply(503)).await);
    let before = vec![host(&mirror.address, HostRules::default())];
    let backoff = Backoff { retries_max: 2, ..options().backoff };
    let repository = mirrored(&origin.address, before, ClientOptions { backoff, ..options() });
    let error = repository.manifest(&tag()).await.unwrap_err();
    assert!(matches!(&error, RegistryError::Status { status: 503, registry, .. } if *registry == origin.address));
    assert_eq!((mirror.requests().len(), origin.requests().len()), (1, 3));
}
