//! Mirrors: which host is asked, in which order, and which host gets which secret.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use serde_json::json;
use soci_index::format::digest::Digest;
use soci_index::format::model::{Descriptor, media_type};
use soci_index::format::reference::ManifestName;
use soci_index::registry::hosts::{Capabilities, Host, HostRules, file};
use soci_index::registry::referrers::FoundBy;
use soci_index::registry::{Body, ClientOptions, HostSource, Part, Registry, RegistryError, Repository};

use crate::wire::server::{Recorded, Reply, Server, options, reply};

mod containers;
mod secrets;
mod unreachable;

const MANIFEST: &str = r#"{"schemaVersion":2,"config":{},"layers":[]}"#;

fn content() -> Vec<u8> {
    (0..1000_u32).flat_map(u32::to_le_bytes).collect()
}

fn blob() -> Digest {
    Digest::of(&content())
}

fn tag() -> ManifestName {
    ManifestName::Tag("t".into())
}

fn by_digest() -> ManifestName {
    ManifestName::Digest(Digest::of(MANIFEST.as_bytes()))
}

fn list(entries: &[&str]) -> Reply {
    let entries = entries.iter().map(|content| Descriptor::of(media_type::MANIFEST, content.as_bytes()));
    let body = json!({"schemaVersion": 2, "mediaType": media_type::INDEX, "manifests": entries.collect::<Vec<_>>()});
    reply(200).header("content-type", media_type::INDEX).body(body.to_string())
}

/// Has everything.
fn all(request: &Recorded) -> Reply {
    if request.target.contains("/manifests/") {
        return reply(200).header("content-type", media_type::MANIFEST).body(MANIFEST);
    }
    if request.target.contains("/referrers/") {
        return list(&["referrer"]);
    }
    let (first, last) = request.range(4000);
    reply(206).header("content-range", format!("bytes {first}-{last}/4000")).body(&content()[first..=last])
}

fn host(address: &str, rules: HostRules) -> Host {
    Host { url: file::url(&format!("http://{address}"), false).unwrap(), plain: None, rules }
}

/// The repository `p/r` on `origin`, with these hosts before it.
fn mirrored(origin: &str, before: Vec<Host>, options: ClientOptions) -> Repository {
    let hosts = HostSource { mirrors: BTreeMap::from([(origin.to_owned(), before)]), ..HostSource::default() };
    Registry::new(origin, ClientOptions { hosts, ..options }).unwrap().repository("p/r")
}

fn behind(mirror: &Server, origin: &Server) -> Repository {
    mirrored(&origin.address, vec![host(&mirror.address, HostRules::default())], options())
}

/// The same by a file.
fn by_file(origin: &str, text: &str, root: &Path, options: ClientOptions) -> Repository {
    let directory = root.join(origin);
    std::fs::create_dir_all(&directory).unwrap();
    std::fs::write(directory.join("hosts.toml"), text).unwrap();
    let hosts = HostSource { directories: vec![root.to_owned()], ..HostSource::default() };
    Registry::new(origin, ClientOptions { hosts, ..options }).unwrap().repository("p/r")
}

/// An address where no server listens.
fn unreachable() -> String {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

#[tokio::test]
async fn the_mirror_is_asked_first_with_the_registrys_name() {
    let (mirror, origin) = (Server::start(all).await, Server::start(all).await);
    let repository = behind(&mirror, &origin);
    repository.manifest(&tag()).await.unwrap().unwrap();
    repository.manifest(&by_digest()).await.unwrap().unwrap();
    assert_eq!(repository.blob(blob(), 4000).read_bytes(10..20).await.unwrap(), content()[10..20]);
    let found = repository.referrers(&Digest::of(b"s"), Some("")).await.unwrap();
    assert_eq!((found.entries.len(), found.found_by), (1, FoundBy::Api));
    assert_eq!(origin.lines(), [""; 0]);
    let ns = format!("ns={}", origin.address.replace(':', "%3A"));
    let Digests { manifest, blob, subject } = Digests::new();
    assert_eq!(
        mirror.lines(),
        [
            format!("GET /v2/p/r/manifests/t?{ns}"),
            format!("GET /v2/p/r/manifests/{manifest}?{ns}"),
            format!("GET /v2/p/r/blobs/{blob}?{ns}"),
            format!("GET /v2/p/r/referrers/{subject}?{ns}&artifactType="),
        ]
    );
    assert_eq!(repository.registry().traffic().requests, 4);
}

struct Digests {
    manifest: Digest,
    blob: Digest,
    subject: Digest,
}

impl Digests {
    fn new() -> Self {
        Self { manifest: Digest::of(MANIFEST.as_bytes()), blob: blob(), subject: Digest::of(b"s") }
    }
}

#[tokio::test]
async fn whatever_a_mirror_does_wrong_the_origin_does_right() {
    let html = || reply(200).header("content-type", "text/html; charset=utf-8");
    // Long enough to be taken for the bytes that are asked for.
    let chunks = format!("40\r\n{:64}\r\n0\r\n\r\n", "<html>please log in</html>");
    for answer in [
        reply(404),
        reply(400),
        reply(401),
        reply(401).header("www-authenticate", "Bearer realm=\"http://10.0.0.1/token\""),
        reply(403),
        reply(416),
        reply(429).header("retry-after", "3600"),
        reply(500),
        reply(503),
        reply(307).header("location", "http://169.254.169.254/"),
        reply(200).hang_up(),
        html().body("<html>please log in</html>"),
        html().header("transfer-encoding", "chunked").body(chunks),
        reply(206).header("content-range", "bytes 0-9/10").body([0; 10]),
    ] {
        let shown = format!("{answer:?}");
        let (mirror, origin) = (Server::start(move |_| answer.clone()).await, Server::start(all).await);
        let repository = behind(&mirror, &origin);
        let start = Instant::now();
        assert_eq!(repository.manifest(&tag()).await.unwrap().unwrap().bytes, MANIFEST, "{shown}");
        assert_eq!(repository.blob(blob(), 4000).read_bytes(10..20).await.unwrap(), content()[10..20], "{shown}");
        assert_eq!(repository.blob_bytes(&descriptor(), 4000).await.unwrap(), content(), "{shown}");
        assert_eq!(repository.referrers(&Digest::of(b"s"), None).await.unwrap().entries.len(), 1, "{shown}");
        assert!(start.elapsed() < Duration::from_secs(2), "{shown}");
        // Nothing was tried again on the mirror; the fallback tag is another question. A host that refuses a blob is
        // not asked for it again soon.
        let fallback = |line: &&String| line.contains("/sha256-");
        let asked = mirror.lines();
        let expected = if shown.contains("status: 401") { 3 } else { 4 };
        assert_eq!(asked.len() - asked.iter().filter(fallback).count(), expected, "{shown}: {asked:?}");
        assert_eq!(origin.lines().len(), 4, "{shown}");
        assert!(origin.lines().iter().all(|line| !line.contains("ns=")), "{shown}");
    }
}

fn descriptor() -> Descriptor {
    Descriptor::of("application/octet-stream", &content())
}

#[tokio::test]
async fn sizes_are_asked_of_all() {
    let mirror = Server::start(|_| reply(404)).await;
    let origin = Server::start(|_| reply(200).header("content-length", "4000")).await;
    assert_eq!(behind(&mirror, &origin).blob_size(&blob()).await, Ok(Some(4000)));
    assert_eq!((mirror.requests().len(), origin.requests().len()), (1, 1));
}

#[tokio::test]
async fn what_no_host_has_is_missing() {
    let (mirror, origin) = (Server::start(|_| reply(500)).await, Server::start(|_| reply(404)).await);
    let repository = behind(&mirror, &origin);
    assert_eq!(repository.manifest(&tag()).await, Ok(None));
    assert_eq!(repository.blob_size(&blob()).await, Ok(None));
    let error = repository.blob(blob(), 4000).read_bytes(0..10).await.unwrap_err();
    assert!(matches!(&error, RegistryError::Missing { registry, .. } if *registry == origin.address), "{error:?}");
    assert!(matches!(repository.blob_bytes(&descriptor(), 4000).await, Err(RegistryError::Missing { .. })));
}

#[tokio::test]
async fn a_mirror_that_lists_nothing_counts_only_if_no_other_host_answers() {
    let (mirror, origin) = (Server::start(|_| list(&[])).await, Server::start(all).await);
    let found = behind(&mirror, &origin).referrers(&Digest::of(b"s"), None).await.unwrap();
    assert_eq!((found.entries.len(), mirror.requests().len()), (1, 1));
    let repository = mirrored(&unreachable(), vec![host(&mirror.address, HostRules::default())], options());
    let found = repository.referrers(&Digest::of(b"s"), None).await.unwrap();
    assert_eq!((found.entries.len(), found.found_by), (0, FoundBy::Api));
    // One that does not know is not believed.
    let mirror = Server::start(|_| reply(404)).await;
    let repository = mirrored(&unreachable(), vec![host(&mirror.address, HostRules::default())], options());
    let error = repository.referrers(&Digest::of(b"s"), None).await.unwrap_err();
    assert!(matches!(error, RegistryError::NoReferrers { is_refusal: false, .. }), "{error:?}");
}

#[tokio::test]
async fn a_read_goes_on_elsewhere_at_the_byte_reached() {
    let mirror = Server::start(|request| all(request).cut(1000)).await;
    let origin = Server::start(all).await;
    let reader = behind(&mirror, &origin).blob(blob(), 4000);
    assert_eq!(reader.read_bytes(500..4000).await.unwrap(), content()[500..]);
    let ranges = |server: &Server| -> Vec<String> {
        server.requests().iter().map(|request| request.header("range").unwrap_or_default().to_owned()).collect()
    };
    assert_eq!(ranges(&mirror), ["bytes=500-3999"]);
    assert_eq!(ranges(&origin), ["bytes=1500-3999"]);
}

#[tokio::test]
async fn after_the_last_host_all_are_asked_again() {
    let mut count = 0;
    let mirror = Server::start(move |request| {
        count += 1;
        if count == 1 { reply(503) } else { all(request) }
    })
    .await;
    let origin = Server::start(|_| reply(503)).await;
    let reader = behind(&mirror, &origin).blob(blob(), 4000);
    assert_eq!(reader.read_bytes(0..10).await.unwrap(), content()[..10]);
    assert_eq!((mirror.requests().len(), origin.requests().len()), (2, 1));
    // For as often as one host alone would be asked.
    let (mirror, origin) = (Server::start(|_| reply(503)).await, Server::start(|_| reply(503)).await);
    let error = behind(&mirror, &origin).blob(blob(), 4000).read_bytes(0..10).await.unwrap_err();
    assert!(matches!(&error, RegistryError::Status { registry, .. } if *registry == origin.address), "{error:?}");
    assert_eq!((mirror.requests().len(), origin.requests().len()), (5, 5));
}

#[tokio::test]
async fn wrong_bytes_of_a_mirror() {
    let mirror = Server::start(|request| match request.target.contains("/manifests/") {
        true => reply(200).header("content-type", media_type::MANIFEST).body("{}"),
        false => reply(200).body([0; 4000]),
    })
    .await;
    let origin = Server::start(all).await;
    let repository = behind(&mirror, &origin);
    assert_eq!(repository.manifest(&by_digest()).await.unwrap().unwrap().bytes, MANIFEST);
    assert_eq!(repository.blob_bytes(&descriptor(), 4000).await.unwrap(), content());
    assert_eq!((mirror.requests().len(), origin.requests().len()), (2, 2));
}

#[tokio::test]
async fn capabilities_decide_which_host_is_asked() {
    let only = |capabilities| HostRules { capabilities, ..HostRules::default() };
    let (pull, resolve, listing) = (Server::start(all).await, Server::start(all).await, Server::start(all).await);
    let origin = Server::start(all).await;
    let before = vec![
        host(&pull.address, only(Capabilities { pull: true, ..Capabilities::NONE })),
        host(&resolve.address, only(Capabilities { pull: true, resolve: true, ..Capabilities::NONE })),
        host(&listing.address, only(Capabilities { referrers: true, ..Capabilities::NONE })),
    ];
    let repository = mirrored(&origin.address, before, options());
    repository.manifest(&tag()).await.unwrap().unwrap();
    repository.manifest(&by_digest()).await.unwrap().unwrap();
    repository.blob(blob(), 4000).read_bytes(0..10).await.unwrap();
    repository.referrers(&Digest::of(b"s"), None).await.unwrap();
    let counts = [&pull, &resolve, &listing, &origin].map(|server| server.requests().len());
    assert_eq!(counts, [2, 1, 1, 0]);
    assert!(resolve.lines()[0].starts_with("GET /v2/p/r/manifests/t?"));
}

#[tokio::test]
async fn pushing_goes_to_one_host_that_takes_it() {
    let takes = |request: &Recorded| match request.method.as_str() {
        "HEAD" => reply(404),
        "POST" => reply(202).header("location", "/upload?state=1"),
        "GET" => reply(404),
        _ => reply(201),
    };
    let (mirror, origin) = (Server::start(all).await, Server::start(takes).await);
    let rules = HostRules { capabilities: Capabilities::READ, ..HostRules::default() };
    let repository = mirrored(&origin.address, vec![host(&mirror.address, rules)], options());
    let body = Body::Bytes(content().into());
    repository.push_blob(&blob(), body.clone(), None).await.unwrap();
    repository.push_manifest(&tag(), media_type::MANIFEST, MANIFEST.into()).await.unwrap();
    let entry = Descriptor::of(media_type::MANIFEST, b"x");
    // The list of this registry never shows what was written, which is an error, but not before it was written.
    repository.write_fallback(&Digest::of(b"s"), &entry).await.unwrap_err();
    assert_eq!(mirror.lines(), [""; 0]);
    assert!(origin.lines().iter().all(|line| !line.contains("ns=")));

    // A mirror that takes pushes gets them, and says where.
    let mirror = Server::start(takes).await;
    behind(&mirror, &origin).push_blob(&blob(), body.clone(), None).await.unwrap();
    let ns = format!("ns={}", origin.address.replace(':', "%3A"));
    assert_eq!(
        mirror.lines()[1..],
        [format!("POST /v2/p/r/blobs/uploads/?{ns}"), format!("PUT /upload?state=1&digest={}", blob())]
    );

    let root = tempfile::tempdir().unwrap();
    let repository = by_file(&origin.address, "capabilities = ['pull']", root.path(), options());
    let error = repository.push_blob(&blob(), body, None).await.unwrap_err();
    assert!(matches!(&error, RegistryError::Setup { .. }) && error.to_string().contains("capability push"), "{error}");
}

#[tokio::test]
async fn a_server_that_is_named_replaces_the_origin() {
    let (mirror, origin) = (Server::start(|_| reply(404)).await, Server::start(all).await);
    let root = tempfile::tempdir().unwrap();
    let text = format!("server = 'http://{}'\n", mirror.address);
    let repository = by_file(&origin.address, &text, root.path(), options());
    assert_eq!(repository.manifest(&tag()).await, Ok(None));
    assert_eq!((mirror.requests().len(), origin.requests().len()), (1, 0));
}

#[tokio::test]
async fn pages_stay_on_the_mirror() {
    let mut count = 0;
    let mirror = Server::start(move |_| {
        count += 1;
        let page = list(&["a"]);
        if count == 1 { page.header("link", "</v2/p/r/referrers/x?page=2>; rel=\"next\"") } else { page }
    })
    .await;
    let origin = Server::start(all).await;
    let found = behind(&mirror, &origin).referrers(&Digest::of(b"s"), None).await.unwrap();
    assert_eq!((found.entries.len(), origin.requests().len()), (2, 0));
    let ns = origin.address.replace(':', "%3A");
    assert_eq!(mirror.lines()[1], format!("GET /v2/p/r/referrers/x?page=2&ns={ns}"));
}

#[test]
fn files_that_are_missing_stop_the_setup() {
    let root = tempfile::tempdir().unwrap();
    for text in
        ["[host.m]\nca = 'no.pem'", "[host.m]\nclient = 'no.pem'", "ca = 'no.pem'", "[header]\n'not a name' = 'x'"]
    {
        let directory = root.path().join("r.example");
        std::fs::create_dir_all(&directory).unwrap();
        std::fs::write(directory.join("hosts.toml"), text).unwrap();
        let hosts = HostSource { directories: vec![root.path().to_owned()], ..HostSource::default() };
        let error = Registry::new("r.example", ClientOptions { hosts, ..options() }).unwrap_err().to_string();
        assert!(error.contains("no.pem") || error.contains("not a name"), "{error}");
    }
}

/// A mirror that serves no parts goes after a registry that does, and before none.
#[tokio::test]
async fn a_host_that_serves_parts_is_preferred() {
    let partless = |request: &Recorded| match request.header("range") {
        Some(_) => reply(400),
        None => reply(200).body(content()),
    };
    let ignores = |_: &Recorded| reply(200).body(content());
    let (mirror, origin) = (Server::start(partless).await, Server::start(all).await);
    let reader = behind(&mirror, &origin).blob(blob(), 4000);
    for range in [100..110, 200..210, 300..310] {
        assert!(matches!(reader.open_range(range).await.unwrap(), Part::Asked(_)));
    }
    assert_eq!((mirror.requests().len(), origin.requests().len()), (1, 3));
    // What is wanted as a whole is still the mirror's.
    assert!(reader.read_all().all(|chunk| std::future::ready(chunk.is_ok())).await);
    assert_eq!((mirror.requests().len(), origin.requests().len()), (2, 3));

    let (mirror, origin) = (Server::start(ignores).await, Server::start(all).await);
    let reader = behind(&mirror, &origin).blob(blob(), 4000);
    assert!(matches!(reader.open_range(100..110).await.unwrap(), Part::Asked(_)));
    assert_eq!((mirror.requests().len(), origin.requests().len()), (1, 1));

    // Where none does, one of them gives the whole.
    let (mirror, origin) = (Server::start(partless).await, Server::start(ignores).await);
    let reader = behind(&mirror, &origin).blob(blob(), 4000);
    for _ in 0..2 {
        assert!(matches!(reader.open_range(100..110).await.unwrap(), Part::Whole(_)));
        assert_eq!(reader.read_bytes(100..110).await.unwrap(), content()[100..110]);
    }

    // The registry itself serves none, and its mirror is gone.
    let (mirror, origin) = (Server::start(|_: &Recorded| reply(404)).await, Server::start(partless).await);
    let reader = behind(&mirror, &origin).blob(blob(), 4000);
    assert_eq!(reader.read_bytes(100..110).await.unwrap(), content()[100..110]);
    assert!(matches!(reader.open_range(100..110).await.unwrap(), Part::Whole(_)));
}
