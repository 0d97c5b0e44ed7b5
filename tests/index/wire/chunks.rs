//! Large blobs, sent in chunks: what registries want of chunks, and what breaks.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures_util::StreamExt as _;
use soci_index::format::digest::Digest;
use soci_index::registry::upload::PushedBlob;
use soci_index::registry::{Body, Chunks, ClientOptions, RegistryError, UploadSizes};

use crate::wire::server::{Recorded, Reply, Server, options, reply, with_password};

/// Bytes of a blob; it is sent in chunks of 1000.
const LENGTH: usize = 4500;

fn content() -> Vec<u8> {
    (0..LENGTH).map(|at| (at % 251) as u8).collect()
}

fn small_chunks(options: ClientOptions) -> ClientOptions {
    ClientOptions { upload: UploadSizes { whole_bytes_max: 2000, chunk_bytes: 1000 }, ..options }
}

/// The blob in pieces of 300 bytes, and how often it was opened.
fn body() -> (Body, Arc<AtomicUsize>) {
    let opened = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&opened);
    let open = Arc::new(move || {
        count.fetch_add(1, Ordering::Relaxed);
        let pieces: Vec<_> = content().chunks(300).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect();
        let pieces: Chunks = Box::pin(futures_util::stream::iter(pieces));
        pieces
    });
    (Body::Chunks { length: LENGTH as u64, open }, opened)
}

/// A registry that takes chunks. What it has is in `kept`; `disturb` may answer in its place, before it looks.
async fn registry(
    mut disturb: impl FnMut(&Recorded, &mut Vec<u8>) -> Option<Reply> + Send + 'static,
) -> (Server, Arc<Mutex<Vec<u8>>>) {
    let kept = Arc::new(Mutex::new(Vec::new()));
    let (shared, mut states) = (Arc::clone(&kept), 0);
    let server = Server::start(move |request| {
        let mut kept = shared.lock().unwrap();
        if let Some(answer) = disturb(request, &mut kept) {
            return answer;
        }
        states += 1;
        let state = move |answer: Reply, length: usize| {
            let answer = answer.header("location", format!("/up?_state=s{states}%2B"));
            answer.header("range", format!("0-{}", length.saturating_sub(1)))
        };
        match request.method.as_str() {
            "HEAD" => reply(404),
            "POST" => {
                kept.clear();
                state(reply(202), 0)
            }
            "GET" => state(reply(204), kept.len()),
            "PATCH" => {
                let (first, last) = request.header("content-range").unwrap().split_once('-').unwrap();
                let (first, last): (usize, usize) = (first.parse().unwrap(), last.parse().unwrap());
                assert_eq!(last - first + 1, request.body.len());
                if first != kept.len() {
                    return state(reply(416), kept.len());
                }
                kept.extend(&request.body);
                state(reply(202), kept.len())
            }
            _ => {
                kept.extend(&request.body);
                if *kept == content() {
                    reply(201)
                } else {
                    reply(400).body(r#"{"errors":[{"code":"DIGEST_INVALID"}]}"#)
                }
            }
        }
    })
    .await;
    (server, kept)
}

async fn push(server: &Server, options: ClientOptions) -> Result<PushedBlob, RegistryError> {
    server.repository_with(small_chunks(options)).push_blob(&Digest::of(&content()), body().0, None).await
}

fn ranges(server: &Server) -> Vec<String> {
    let patches = server.requests().into_iter().filter(|request| request.method == "PATCH");
    patches.map(|request| request.header("content-range").unwrap().to_owned()).collect()
}

#[tokio::test]
async fn chunk_by_chunk() {
    let (server, _) = registry(|_, _| None).await;
    let (body, opened) = body();
    let digest = Digest::of(&content());
    let repository = server.repository_with(small_chunks(options()));
    assert_eq!(repository.push_blob(&digest, body, None).await, Ok(PushedBlob::Uploaded));
    assert_eq!(ranges(&server), ["0-999", "1000-1999", "2000-2999", "3000-3999", "4000-4499"]);
    // Each goes where the answer before it says, with its state untouched.
    let targets: Vec<_> = server.lines().into_iter().filter(|line| line.contains("/up?")).collect();
    let expected: Vec<_> = (2..7).map(|state| format!("PATCH /up?_state=s{state}%2B")).collect();
    assert_eq!(targets[..5], expected);
    assert_eq!(targets[5], format!("PUT /up?_state=s7%2B&digest={digest}"));
    assert_eq!(server.requests().last().unwrap().header("content-length"), Some("0"));
    assert_eq!(opened.load(Ordering::Relaxed), 1);
    assert_eq!(repository.registry().traffic().bytes_sent, LENGTH as u64);
}

#[tokio::test]
async fn a_registry_names_the_smallest_chunk() {
    let (server, _) = registry(|request, _| {
        let answer = reply(202).header("location", "/up").header("oci-chunk-min-length", "1500");
        (request.method == "POST").then_some(answer)
    })
    .await;
    assert_eq!(push(&server, options()).await, Ok(PushedBlob::Uploaded));
    assert_eq!(ranges(&server), ["0-1499", "1500-2999", "3000-4499"]);
    // More than can be held: in one piece then.
    for smallest in ["1000000000", "99999999999999999999"] {
        let (server, _) = registry(move |request, _| {
            let answer = reply(202).header("location", "/up").header("oci-chunk-min-length", smallest);
            (request.method == "POST").then_some(answer)
        })
        .await;
        let whole = push(&server, options()).await;
        // A number that is none is not believed.
        let expected = if smallest.len() < 12 { 0 } else { 5 };
        assert_eq!((whole, ranges(&server).len()), (Ok(PushedBlob::Uploaded), expected));
    }
}

#[tokio::test]
async fn a_broken_chunk_is_continued() {
    // The third chunk breaks: after all of it, after a part of it, after nothing. Twice the registry is busy as well.
    for (arrived, next) in [(1000, "3000-3999"), (400, "2400-3399"), (0, "2000-2999")] {
        let (mut patches, mut busy) = (0, 2);
        let (server, _) = registry(move |request, kept| {
            if request.method == "GET" && busy > 0 {
                busy -= 1;
                return Some(reply(503).header("retry-after", "0"));
            }
            patches += usize::from(request.method == "PATCH");
            (request.method == "PATCH" && patches == 3).then(|| {
                kept.extend(&request.body[..arrived]);
                reply(202).hang_up()
            })
        })
        .await;
        assert_eq!(push(&server, options()).await, Ok(PushedBlob::Uploaded), "{arrived}");
        assert_eq!(ranges(&server)[3], next);
        assert_eq!(server.lines().iter().filter(|line| line.starts_with("POST")).count(), 1);
    }
}

#[tokio::test]
async fn what_was_lost_is_read_again() {
    // The registry has forgotten all but the first 100 bytes, which are in no chunk that is held any more.
    let mut done = false;
    let (server, _) = registry(move |request, kept| {
        let now = request.method == "PATCH" && kept.len() == 3000 && !done;
        done |= now;
        now.then(|| {
            kept.truncate(100);
            reply(416)
        })
    })
    .await;
    let (body, opened) = body();
    let repository = server.repository_with(small_chunks(options()));
    assert_eq!(repository.push_blob(&Digest::of(&content()), body, None).await, Ok(PushedBlob::Uploaded));
    assert_eq!(ranges(&server)[4..], ["100-1099", "1100-2099", "2100-3099", "3100-4099", "4100-4499"]);
    assert_eq!(opened.load(Ordering::Relaxed), 2);
}

#[tokio::test]
async fn part_of_a_chunk_may_be_taken() {
    let (server, _) = registry(|request, kept| {
        (request.method == "PATCH" && kept.is_empty()).then(|| {
            kept.extend(&request.body[..250]);
            reply(202).header("location", "/up").header("range", "0-249")
        })
    })
    .await;
    assert_eq!(push(&server, options()).await, Ok(PushedBlob::Uploaded));
    assert_eq!(ranges(&server)[1], "250-1249");
}

#[tokio::test]
async fn a_forgotten_upload_begins_again() {
    let mut posts = 0;
    let (server, _) = registry(move |request, kept| {
        posts += usize::from(request.method == "POST");
        (request.method == "PATCH" && posts == 1 && kept.len() == 2000).then(|| reply(404))
    })
    .await;
    assert_eq!(push(&server, options()).await, Ok(PushedBlob::Uploaded));
    assert_eq!(server.lines().iter().filter(|line| line.starts_with("POST")).count(), 2);
}

#[tokio::test]
async fn a_broken_end_is_asked_for_again() {
    let mut puts = 0;
    let (server, _) = registry(move |request, _| {
        puts += usize::from(request.method == "PUT");
        (request.method == "PUT" && puts == 1).then(|| reply(201).hang_up())
    })
    .await;
    assert_eq!(push(&server, options()).await, Ok(PushedBlob::Uploaded));
    assert_eq!(ranges(&server).len(), 5);
}

#[tokio::test]
async fn no_chunks_means_one_piece() {
    for status in [404, 405, 501] {
        let (server, _) = registry(move |request, _| (request.method == "PATCH").then(|| reply(status))).await;
        assert_eq!(push(&server, options()).await, Ok(PushedBlob::Uploaded), "{status}");
        assert_eq!(server.requests().last().unwrap().body, content());
    }
}

#[tokio::test]
async fn too_large_for_one_request() {
    let refuses_whole = |request: &Recorded, _: &mut Vec<u8>| {
        (request.method == "PUT" && !request.body.is_empty()).then(|| reply(413).body("<html>too large</html>"))
    };
    let (server, _) = registry(refuses_whole).await;
    let upload = UploadSizes { whole_bytes_max: 1 << 20, chunk_bytes: 1000 };
    let repository = server.repository_with(ClientOptions { upload, ..options() });
    let digest = Digest::of(&content());
    assert_eq!(repository.push_blob(&digest, body().0, None).await, Ok(PushedBlob::Uploaded));
    assert_eq!(ranges(&server).len(), 5);
    // Neither way: the first word counts, and there is an end.
    let (server, _) =
        registry(|request, _| matches!(request.method.as_str(), "PUT" | "PATCH").then(|| reply(413))).await;
    let error = push(&server, options()).await.unwrap_err();
    assert!(matches!(error, RegistryError::Status { status: 413, .. }), "{error:?}");
    assert!(server.requests().len() < 12, "{:?}", server.lines());
}

#[tokio::test]
async fn a_registry_that_never_gets_further() {
    let (server, _) = registry(|request, _| {
        (request.method == "PATCH").then(|| reply(202).header("location", "/up").header("range", "0-0"))
    })
    .await;
    let error = push(&server, options()).await.unwrap_err();
    assert!(matches!(error, RegistryError::Malformed { .. }), "{error:?}");
    // One that always disagrees about the place, from the beginning or later.
    let (server, _) = registry(|request, _| (request.method == "PATCH").then(|| reply(416))).await;
    assert_eq!(push(&server, options()).await, Ok(PushedBlob::Uploaded));
    assert_eq!((ranges(&server).len(), server.requests().last().unwrap().body.len()), (2, LENGTH));
    let (server, _) =
        registry(|request, kept| (request.method == "PATCH" && kept.len() == 1000).then(|| reply(416))).await;
    let error = push(&server, options()).await.unwrap_err();
    assert!(matches!(error, RegistryError::Status { status: 416, .. }), "{error:?}");
    assert!(server.requests().len() < 20, "{:?}", server.lines());
}

#[tokio::test]
async fn chunks_elsewhere_get_no_credentials() {
    let (storage, kept) = registry(|_, _| None).await;
    let target = storage.url("/up?sig=1");
    let server = Server::start(move |request| match (request.header("authorization"), request.method.as_str()) {
        (None, _) => reply(401).header("www-authenticate", "Basic realm=\"x\""),
        (Some(_), "HEAD") => reply(404),
        (Some(_), _) => reply(202).header("location", target.clone()),
    })
    .await;
    assert_eq!(push(&server, with_password()).await, Ok(PushedBlob::Uploaded));
    storage.assert_no_credentials();
    assert_eq!(*kept.lock().unwrap(), content());
}

#[tokio::test]
async fn a_source_that_fails_in_the_middle() {
    let (server, _) = registry(|_, _| None).await;
    for (last, expected) in [(Some("disk on fire"), "disk on fire"), (None, "ends before byte")] {
        let open = Arc::new(move || {
            let pieces = std::iter::once(Ok(Bytes::from(vec![0; 1500])));
            let pieces = pieces.chain(last.map(|text| Err(std::io::Error::other(text))));
            let pieces: Chunks = Box::pin(futures_util::stream::iter(pieces.collect::<Vec<_>>()));
            pieces
        });
        let repository = server.repository_with(small_chunks(options()));
        let pushed = repository.push_blob(&Digest::of(b"x"), Body::Chunks { length: 4500, open }, None).await;
        let error = pushed.unwrap_err();
        assert!(matches!(&error, RegistryError::Source { reason, .. } if reason.contains(expected)), "{error:?}");
    }
}

/// However large the blob is: no more is read of it than one chunk beyond what the registry has, and the piece in which
/// that one ends.
#[tokio::test]
async fn one_chunk_is_held_at_a_time() {
    let read = Arc::new(AtomicUsize::new(0));
    let (count, seen) = (Arc::clone(&read), Arc::clone(&read));
    let open = Arc::new(move || {
        let count = Arc::clone(&count);
        let pieces = futures_util::stream::iter(0..15).map(move |at| {
            count.fetch_add(300, Ordering::Relaxed);
            Ok(Bytes::copy_from_slice(&content()[at * 300..(at + 1) * 300]))
        });
        let pieces: Chunks = Box::pin(pieces);
        pieces
    });
    let (server, _) = registry(move |request, kept| {
        let ahead = seen.load(Ordering::Relaxed) - kept.len();
        assert!(ahead <= 1300, "{}: {ahead} bytes ahead", request.line());
        None
    })
    .await;
    let repository = server.repository_with(small_chunks(options()));
    let body = Body::Chunks { length: LENGTH as u64, open };
    assert_eq!(repository.push_blob(&Digest::of(&content()), body, None).await, Ok(PushedBlob::Uploaded));
    assert_eq!(read.load(Ordering::Relaxed), LENGTH);
}
