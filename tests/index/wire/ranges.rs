//! Range reads under every kind of answer.

use std::time::{Duration, Instant};

use futures_util::StreamExt;
use soci_index::format::digest::Digest;
use soci_index::registry::{Backoff, BlobReader, ClientOptions, Part, Registry, RegistryError};

use crate::wire::server::{Recorded, Reply, Server, options, reply};

fn content() -> Vec<u8> {
    (0..1000_u32).flat_map(u32::to_le_bytes).collect()
}

fn reader(server: &Server) -> BlobReader {
    server.repository().blob(Digest::of(&content()), 4000)
}

/// A right answer.
fn part(request: &Recorded) -> Reply {
    let (first, last) = request.range(4000);
    reply(206).header("content-range", format!("bytes {first}-{last}/4000")).body(&content()[first..=last])
}

#[tokio::test]
async fn a_plain_range() {
    let server = Server::start(part).await;
    let reader = reader(&server);
    assert_eq!(reader.read_bytes(100..1500).await.unwrap(), content()[100..1500]);
    assert_eq!(reader.read_bytes(7..7).await.unwrap(), b""[..]);
    let requests = server.requests();
    assert_eq!(requests.len(), 1);
    assert_eq!(requests[0].header("range"), Some("bytes=100-1499"));
    assert_eq!(requests[0].header("accept-encoding"), Some("identity"));
    let traffic = server.repository().registry().traffic();
    assert_eq!(traffic.requests, 0);
}

#[tokio::test]
async fn traffic_is_counted() {
    let server = Server::start(part).await;
    let repository = server.repository();
    let reader = repository.blob(Digest::of(&content()), 4000);
    reader.read_bytes(0..10).await.unwrap();
    reader.clone().read_bytes(10..30).await.unwrap();
    let traffic = repository.registry().clone().traffic();
    assert_eq!((traffic.requests, traffic.bytes_received, traffic.bytes_sent), (2, 30, 0));
}

#[tokio::test]
async fn the_range_is_ignored() {
    let server = Server::start(|_| reply(200).body(content())).await;
    for range in [0..10, 3990..4000, 1..3999, 0..4000] {
        let expected = content()[range.start as usize..range.end as usize].to_vec();
        assert_eq!(reader(&server).read_bytes(range).await.unwrap(), expected);
    }
}

/// How a server answers that serves no parts of blobs.
#[derive(Debug, Clone, Copy)]
enum Partless {
    Refuses(u16),
    Ignores,
    /// The right bytes under a status that says they are the whole.
    PartUnder200,
    /// The same without a length.
    OtherPart,
    Multipart,
}

const PARTLESS: [Partless; 11] = [
    Partless::Refuses(400),
    Partless::Refuses(405),
    Partless::Refuses(406),
    Partless::Refuses(412),
    Partless::Refuses(416),
    Partless::Refuses(417),
    Partless::Refuses(501),
    Partless::Ignores,
    Partless::PartUnder200,
    Partless::OtherPart,
    Partless::Multipart,
];

fn partless(manner: Partless, request: &Recorded) -> Reply {
    if request.header("range").is_none() {
        return reply(200).body(content());
    }
    let (first, last) = request.range(4000);
    let body = &content()[first..=last];
    match manner {
        Partless::Refuses(status) => reply(status),
        Partless::Ignores => reply(200).body(content()),
        Partless::PartUnder200 => reply(200).body(body),
        Partless::OtherPart => reply(206).header("content-range", "bytes 0-9/4000").body([0; 10]),
        Partless::Multipart => reply(206).header("content-type", "multipart/byteranges; boundary=x").body(body),
    }
}

/// What comes of a range, and whether it is the whole blob.
async fn opened(reader: &BlobReader, range: std::ops::Range<u64>) -> (bool, Vec<u8>) {
    let (is_whole, stream) = match reader.open_range(range).await.unwrap() {
        Part::Asked(stream) => (false, stream),
        Part::Whole(stream) => (true, stream),
    };
    (is_whole, stream.map(|chunk| chunk.unwrap()).collect::<Vec<_>>().await.concat())
}

#[tokio::test]
async fn the_whole_is_read_where_there_are_no_parts() {
    for manner in PARTLESS {
        let server = Server::start(move |request| partless(manner, request)).await;
        let reader = reader(&server);
        assert_eq!(reader.read_bytes(100..200).await.unwrap(), content()[100..200], "{manner:?}");
        let first = server.requests().len();
        assert_eq!(first, if matches!(manner, Partless::Ignores) { 1 } else { 2 }, "{manner:?}");
        // It is known from then on, for every blob of the host.
        assert_eq!(opened(&reader, 300..310).await, (true, content()), "{manner:?}");
        assert_eq!(reader.read_bytes(3990..4000).await.unwrap(), content()[3990..], "{manner:?}");
        let later = server.requests().split_off(first);
        let is_asked = matches!(manner, Partless::Ignores);
        assert!(later.iter().all(|request| request.header("range").is_some() == is_asked), "{manner:?}");
        assert_eq!(later.len(), 2, "{manner:?}");
    }
}

/// The answer that showed it is the whole blob already: nothing is asked twice.
#[tokio::test]
async fn a_whole_that_came_instead_of_a_part_is_used() {
    let server = Server::start(|request| partless(Partless::Ignores, request)).await;
    assert_eq!((opened(&reader(&server), 0..10).await, server.requests().len()), ((true, content()), 1));
    let server = Server::start(part).await;
    assert_eq!(opened(&reader(&server), 20..30).await, (false, content()[20..30].to_vec()));
}

/// A refusal that has another cause stays what it is.
#[tokio::test]
async fn a_server_that_gives_nothing_is_not_taken_for_one_without_parts() {
    for status in [400, 412, 501] {
        let server = Server::start(move |_| reply(status).body("no")).await;
        let error = reader(&server).read_bytes(0..10).await.unwrap_err();
        assert!(matches!(error, RegistryError::Status { status: found, .. } if found == status), "{error:?}");
        assert!(reader(&server).read_bytes(0..10).await.is_err());
        let asked: Vec<_> = server.requests().iter().map(|request| request.header("range").is_some()).collect();
        assert_eq!(asked, [true, false, true, false]);
    }
}

/// A whole blob that is cut is read on from where it was cut, though it comes from its beginning again.
#[tokio::test]
async fn a_cut_whole_is_continued() {
    let mut count = 0;
    let server = Server::start(move |request| {
        count += 1;
        let reply = partless(Partless::Refuses(400), request);
        if count == 2 { reply.cut(1500) } else { reply }
    })
    .await;
    assert_eq!(opened(&reader(&server), 100..110).await, (true, content()));
}

#[tokio::test]
async fn a_shorter_part_is_continued() {
    let server = Server::start(|request| {
        let (first, last) = request.range(4000);
        let last = last.min(first + 99);
        reply(206).header("content-range", format!("bytes {first}-{last}/*")).body(&content()[first..=last])
    })
    .await;
    assert_eq!(reader(&server).read_bytes(50..350).await.unwrap(), content()[50..350]);
    let asked: Vec<_> = server.requests().iter().map(|r| r.header("range").unwrap().to_owned()).collect();
    assert_eq!(asked, ["bytes=50-349", "bytes=150-349", "bytes=250-349"]);
}

#[tokio::test]
async fn a_wrong_part_is_refused() {
    for header in ["bytes 0-9/4000", "bytes 100-120/4000", "bytes 100-109/5000", "bytes 110-100/4000", "100-109", ""] {
        let server = Server::queue([reply(206).header("content-range", header).body([0; 10])]).await;
        let error = reader(&server).read_bytes(100..110).await.unwrap_err();
        assert!(
            matches!(&error, RegistryError::WrongRange { range, .. } if *range == (100..110)),
            "{header}: {error:?}"
        );
    }
    for refused in [
        reply(206).header("content-range", "bytes 100-109/4000").body([0; 9]),
        reply(206).header("content-range", "bytes 100-109/4000").header("content-encoding", "gzip").body([0; 10]),
        reply(206).body([0; 9]),
        reply(206).header("content-type", "multipart/byteranges; boundary=x").body([0; 10]),
    ] {
        let server = Server::queue([refused]).await;
        let error = reader(&server).read_bytes(100..110).await.unwrap_err();
        assert!(matches!(error, RegistryError::WrongRange { .. }), "{error:?}");
    }
}

#[tokio::test]
async fn a_part_without_content_range_counts_if_its_length_is_right() {
    let server = Server::queue([reply(206).body(&content()[100..110])]).await;
    assert_eq!(reader(&server).read_bytes(100..110).await.unwrap(), content()[100..110]);
}

#[tokio::test]
async fn beyond_the_end() {
    // The server announces the whole blob and sends little: its body is not waited for.
    let server = Server::queue([reply(416)
        .header("content-range", "bytes */2000")
        .header("content-length", "2000")
        .body("oops")
        .stall(4)])
    .await;
    let start = Instant::now();
    let error = reader(&server).read_bytes(3000..3100).await.unwrap_err();
    assert!(matches!(error, RegistryError::RangeNotSatisfiable { size: Some(2000), .. }), "{error:?}");
    assert!(start.elapsed() < Duration::from_secs(1));
    let error = reader(&server).read_bytes(3990..4001).await.unwrap_err();
    assert!(matches!(error, RegistryError::RangeNotSatisfiable { size: Some(4000), .. }), "{error:?}");
    assert_eq!(server.requests().len(), 1);
}

#[tokio::test]
async fn busy_servers() {
    let mut count = 0;
    let server = Server::start(move |request| {
        count += 1;
        match count {
            1 => reply(429).header("retry-after", "0"),
            2 => reply(500),
            3 => reply(503).body("<html>"),
            _ => part(request),
        }
    })
    .await;
    assert_eq!(reader(&server).read_bytes(0..10).await.unwrap(), content()[..10]);
    assert_eq!(server.requests().len(), 4);
}

#[tokio::test]
async fn busy_for_ever() {
    let server = Server::start(|_| reply(503)).await;
    let error = reader(&server).read_bytes(0..10).await.unwrap_err();
    assert!(matches!(error, RegistryError::Status { status: 503, .. }), "{error:?}");
    assert_eq!(server.requests().len(), 5);
    // A pause beyond the deadline is not begun.
    let server = Server::start(|_| reply(429).header("retry-after", "3600")).await;
    let start = Instant::now();
    let error = reader(&server).read_bytes(0..10).await.unwrap_err();
    assert!(matches!(error, RegistryError::Deadline { .. }), "{error:?}");
    assert!(start.elapsed() < Duration::from_secs(1) && error.to_string().contains("429"), "{error}");
    let server = Server::start(|_| reply(501)).await;
    let error = reader(&server).read_bytes(0..10).await.unwrap_err();
    assert!(matches!(error, RegistryError::Status { status: 501, .. }), "{error:?}");
    // With the range and without.
    assert_eq!(server.requests().len(), 2);
}

#[tokio::test]
async fn a_pause_that_was_asked_for_is_kept() {
    let mut count = 0;
    let server = Server::start(move |request| {
        count += 1;
        if count == 1 { reply(429).header("retry-after", "1") } else { part(request) }
    })
    .await;
    let start = Instant::now();
    reader(&server).read_bytes(0..10).await.unwrap();
    assert!(start.elapsed() >= Duration::from_secs(1));
}

#[tokio::test]
async fn a_cut_body_is_resumed() {
    let mut count = 0;
    let server = Server::start(move |request| {
        count += 1;
        if count <= 2 { part(request).cut(1000) } else { part(request) }
    })
    .await;
    assert_eq!(reader(&server).read_bytes(0..4000).await.unwrap(), content());
    let asked: Vec<_> = server.requests().iter().map(|r| r.header("range").map(str::to_owned)).collect();
    assert_eq!(asked[0], None);
    assert_eq!(asked[1].as_deref(), Some("bytes=1000-3999"));
    assert_eq!(asked[2].as_deref(), Some("bytes=2000-3999"));
}

#[tokio::test]
async fn a_cut_body_of_a_server_without_ranges_is_skipped_to_the_same_place() {
    let mut count = 0;
    let server = Server::start(move |_| {
        count += 1;
        let whole = reply(200).body(content());
        if count == 1 { whole.cut(1500) } else { whole }
    })
    .await;
    assert_eq!(reader(&server).read_bytes(1000..4000).await.unwrap(), content()[1000..]);
}

#[tokio::test]
async fn a_stall_ends_at_the_deadline() {
    let server = Server::start(|request| part(request).stall(100)).await;
    let options = ClientOptions { deadline: Duration::from_millis(400), ..options() };
    let reader = server.repository_with(options).blob(Digest::of(&content()), 4000);
    let start = Instant::now();
    let mut stream = reader.read_range(0..200);
    assert_eq!(stream.next().await.unwrap().unwrap(), content()[..100]);
    let error = stream.next().await.unwrap().unwrap_err();
    assert!(matches!(error, RegistryError::Deadline { .. }), "{error:?}");
    assert!(stream.next().await.is_none());
    assert!(start.elapsed() < Duration::from_secs(2));
}

#[tokio::test]
async fn a_silent_connection_is_given_up_for_another() {
    let mut count = 0;
    let server = Server::start(move |request| {
        count += 1;
        if count == 1 { part(request).stall(100) } else { part(request) }
    })
    .await;
    let options = ClientOptions { stall: Duration::from_millis(100), ..options() };
    let reader = server.repository_with(options).blob(Digest::of(&content()), 4000);
    assert_eq!(reader.read_bytes(0..200).await.unwrap(), content()[..200]);
}

#[tokio::test]
async fn a_slow_consumer_is_not_a_slow_registry() {
    let mut count = 0;
    let server = Server::start(move |request| {
        count += 1;
        if count == 1 { part(request).cut(100) } else { part(request) }
    })
    .await;
    let options = ClientOptions { deadline: Duration::from_millis(200), ..options() };
    let mut stream = server.repository_with(options).blob(Digest::of(&content()), 4000).read_range(0..300);
    assert_eq!(stream.next().await.unwrap().unwrap(), content()[..100]);
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(stream.next().await.unwrap().unwrap(), content()[100..300]);
}

/// Whatever mixture of faults comes, the bytes are right.
#[tokio::test]
async fn any_mixture_of_faults() {
    let mut random = fastrand::Rng::with_seed(7);
    let mut troubles = 0;
    let mut faulty = random.fork();
    let server = Server::start(move |request| {
        let (first, last) = request.range(4000);
        // At most three in a row without a byte: more is rightly an error.
        troubles = if troubles >= 3 { 0 } else { troubles + 1 };
        let fault = if troubles == 0 { 9 } else { faulty.u32(0..10) };
        let some = faulty.usize(0..=last - first);
        match fault {
            0 => reply(503),
            1 => part(request).hang_up(),
            2 => part(request).cut(some),
            3 => reply(200).body(content()),
            4 => reply(200).body(content()).cut(some),
            5 => {
                let last = first + some;
                reply(206).header("content-range", format!("bytes {first}-{last}/*")).body(&content()[first..=last])
            }
            6 => reply(307).header("location", format!("{}/x", request.target)),
            7 => reply(206).body(&content()[first..=last]),
            _ => part(request),
        }
    })
    .await;
    let options = ClientOptions { redirect_life: Duration::from_millis(20), ..options() };
    let reader = server.repository_with(options).blob(Digest::of(&content()), 4000);
    for _ in 0..300 {
        let start = random.u64(0..4000);
        let end = random.u64(start + 1..=4000);
        let read = reader.read_bytes(start..end).await.unwrap();
        assert_eq!(read, content()[start as usize..end as usize], "{start}..{end}");
    }
}

#[tokio::test]
async fn an_unreachable_registry() {
    let server = Server::start(part).await;
    let dead = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let repository = soci_index::registry::Registry::new(&dead, options()).unwrap().repository("p/r");
    let error = repository.blob(Digest::of(b""), 10).read_bytes(0..10).await.unwrap_err();
    assert!(matches!(error, RegistryError::Transport { attempts: 5, .. }) && error.to_string().contains(&dead));
    drop(server);
}

/// An interactive client soon reports a host that never answered, and waits for one that has answered before.
#[tokio::test]
async fn an_interactive_client_tries_twice() {
    let backoff = Backoff { first: Duration::from_millis(200), ..Backoff::default() };
    let options = ClientOptions { is_interactive: true, backoff, ..options() };
    let dead = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    for name in [&dead, "no-such-host.invalid"] {
        let start = Instant::now();
        let repository = Registry::new(name, options.clone()).unwrap().repository("p/r");
        let error = repository.blob(Digest::of(b""), 10).read_bytes(0..10).await.unwrap_err();
        assert!(matches!(error, RegistryError::Transport { attempts: 2, .. }), "{name}: {error:?}");
        assert!(start.elapsed() < Duration::from_secs(2), "{name}: {:?}", start.elapsed());
    }
}

/// The same goes for the hosts that a registry sends its clients to: the registry's answers do not make these known.
#[tokio::test]
async fn an_interactive_client_tries_the_hosts_behind_a_registry_twice() {
    let backoff = Backoff { first: Duration::from_millis(200), ..Backoff::default() };
    let dead = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let token = reply(401).header("www-authenticate", format!("Bearer realm=\"http://{dead}/token\""));
    let storage = reply(307).header("location", format!("http://{dead}/blob"));
    for (answer, is_interactive, expected) in [(&token, true, 2), (&storage, true, 2), (&token, false, 7)] {
        let answer = answer.clone();
        let server = Server::start(move |_| answer.clone()).await;
        let backoff = if is_interactive { backoff } else { Backoff { first: Duration::from_millis(2), ..backoff } };
        let repository = server.repository_with(ClientOptions { is_interactive, backoff, ..options() });
        let start = Instant::now();
        let error = repository.blob(Digest::of(b""), 10).read_bytes(0..10).await.unwrap_err();
        let RegistryError::Transport { attempts, error, .. } = &error else { panic!("{error:?}") };
        assert_eq!(*attempts, expected, "{error}");
        assert!(error.to_string().contains(&dead), "{error}");
        assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    }
}

#[tokio::test]
async fn whole_blobs_are_checked() {
    let server = Server::start(|_| reply(200).body(content())).await;
    assert_eq!(server.repository().blob_bytes(&descriptor(&content()), 4000).await.unwrap(), content());
    let wrong = server.repository().blob(Digest::of(b"other"), 4000).read_all();
    let last = wrong.collect::<Vec<_>>().await.pop().unwrap();
    assert!(matches!(last, Err(RegistryError::Digest { .. })));
    let error = server.repository().blob(Digest::of(b"other"), 3999).read_bytes(0..10).await.unwrap_err();
    assert!(matches!(error, RegistryError::Size { expected: 3999, found: 4000, .. }), "{error:?}");
    let error = server.repository().blob_bytes(&descriptor(&content()), 3999).await.unwrap_err();
    assert!(matches!(error, RegistryError::TooLarge { limit: 3999, .. }));
}

#[tokio::test]
async fn missing_blobs_and_sizes() {
    let server = Server::queue([
        reply(404),
        reply(404),
        reply(200).header("content-length", "4000"),
        reply(200).header("transfer-encoding", "chunked"),
        reply(206).header("content-range", "bytes 0-0/4000").body("x"),
    ])
    .await;
    let repository = server.repository();
    let digest = Digest::of(b"");
    let error = repository.blob(digest, 10).read_bytes(0..10).await.unwrap_err();
    assert!(matches!(error, RegistryError::Missing { .. }));
    assert_eq!(repository.blob_size(&digest).await, Ok(None));
    assert_eq!(repository.blob_size(&digest).await, Ok(Some(4000)));
    assert_eq!(repository.blob_size(&digest).await, Ok(Some(4000)));
}

fn descriptor(content: &[u8]) -> soci_index::format::model::Descriptor {
    soci_index::format::model::Descriptor::of("application/octet-stream", content)
}
