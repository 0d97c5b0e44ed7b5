//! `soci serve-webhook` from the outside: events in by plain HTTP, indexes out in a registry.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use soci_index::find::discover::{Discovery, Which, on_registry, preferred_on_registry};
use soci_index::format::digest::Digest;
use soci_index::format::model::media_type;
use soci_index::format::reference::ManifestName;
use soci_index::format::span_index::SPAN_INDEX;
use soci_index::registry::Repository;
use soci_tests::forge::{Lie, push_spans, push_ztoc};
use soci_tests::image::{Image, tar, text};
use soci_tests::profile::{Broken, Profile, ProfiledRegistry, Quirks};
use soci_tests::registry::{DockerRegistry, client, free_address};
use soci_tests::{run, soci};

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// What Harbor is configured to send.
const TOKEN: &str = "Bearer of-the-webhook-s3cret";

/// A server that runs until it is dropped.
struct Server {
    child: Child,
    address: String,
    said: Arc<Mutex<String>>,
}

impl Server {
    fn start(registry: &str, root: &Path, options: &[&str]) -> Self {
        let mut command = serve(registry, root, options);
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap());
        let mut said = String::new();
        let address = loop {
            let mut line = String::new();
            assert!(lines.read_line(&mut line).unwrap() > 0, "it ended: {said}");
            said += &line;
            if let Some((_, rest)) = line.split_once("listening at ") {
                break rest.split(' ').next().unwrap().to_owned();
            }
        };
        let said = Arc::new(Mutex::new(said));
        let written = Arc::clone(&said);
        std::thread::spawn(move || listen(lines, &written));
        Self { child, address, said }
    }

    fn request(&self, method: &str, path: &str, authorization: Option<&str>, body: &str) -> (u16, String) {
        Self::request_at(&self.address, method, path, authorization, body)
    }

    fn request_at(address: &str, method: &str, path: &str, authorization: Option<&str>, body: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let authorization = authorization.map(|text| format!("Authorization: {text}\r\n")).unwrap_or_default();
        let head =
            format!("{method} {path} HTTP/1.1\r\nHost: h\r\n{authorization}Content-Length: {}\r\n\r\n", body.len());
        // What is refused early may not be read to its end.
        let _ = stream.write_all(&[head.as_bytes(), body.as_bytes()].concat());
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        let answer = String::from_utf8(answer).unwrap();
        let status = answer.split(' ').nth(1).unwrap_or_else(|| panic!("{method} {path}: {answer:?}"));
        (status.parse().unwrap(), answer)
    }

    fn send(&self, event: &Value) -> (u16, String) {
        self.request("POST", "/webhook", Some(TOKEN), &event.to_string())
    }

    fn jobs(&self) -> Value {
        let (status, answer) = self.request("GET", "/jobs", Some(TOKEN), "");
        assert_eq!(status, 200, "{answer}");
        serde_json::from_str(answer.split("\r\n\r\n").nth(1).unwrap()).unwrap()
    }

    /// Waits until so many jobs have ended, and answers their outcomes, the last one first.
    fn outcomes(&self, count: usize) -> Vec<String> {
        let start = Instant::now();
        loop {
            let jobs = self.jobs();
            let ended = jobs["ended"].as_array().unwrap();
            if ended.len() >= count {
                return ended.iter().map(|ended| ended["outcome"].as_str().unwrap().to_owned()).collect();
            }
            assert!(start.elapsed() < PATIENCE, "{jobs}: {}", self.said.lock().unwrap());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn metric(&self, name: &str) -> u64 {
        let (_, answer) = self.request("GET", "/metrics", None, "");
        let line = answer.lines().find_map(|line| line.strip_prefix(&format!("soci_webhook_{name} ")));
        line.unwrap_or_else(|| panic!("{name}: {answer}")).parse().unwrap()
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Asks it to end and waits for that.
    fn end(&mut self) -> Option<i32> {
        self.signal(Signal::TERM);
        self.child.wait().unwrap().code()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn listen(mut lines: BufReader<ChildStderr>, written: &Mutex<String>) {
    let mut line = String::new();
    while matches!(lines.read_line(&mut line), Ok(1..)) {
        written.lock().unwrap().push_str(&line);
        line.clear();
    }
}

fn serve(registry: &str, root: &Path, options: &[&str]) -> Command {
    let mut command = soci();
    command.args(["serve-webhook", "--registry", registry, "--listen", "127.0.0.1:0", "--root"]).arg(root);
    command.args(["--min-layer-size", "1000", "--span-size", "262144"]).args(options).env("DOCKER_CONFIG", root);
    // As talkative as it gets: secrets are looked for in all of it.
    command.env("SOCI_LOG", "trace");
    command
}

fn harbor(repository: &str, tag: &str, digest: &Digest) -> Value {
    json!({
        "type": "PUSH_ARTIFACT", "occur_at": 1_680_501_893, "operator": "robot$team+ci",
        "event_data": {
            "resources": [{ "digest": digest, "tag": tag, "resource_url": format!("h.example/{repository}:{tag}") }],
            "repository": { "name": "app", "namespace": "team", "repo_full_name": repository, "repo_type": "private" },
        },
    })
}

fn image(seed: u64) -> Image {
    Image::gzip(vec![tar(&[("bin/tool", text(seed, 900_000)), ("etc/conf", text(2, 500))])])
}

async fn index_of(repository: &Repository, image: &Image) -> Digest {
    let found = on_registry(repository, &image.digest(), Which::Newest).await.unwrap();
    let Discovery::Found(found) = found else { panic!("{found:?}") };
    assert_eq!(found.others, 0);
    found.digest
}

/// A push to Harbor leads to an index; the event about the index leads to nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_push_to_harbor_is_indexed() {
    let registry = ProfiledRegistry::start(Profile::Harbor215).await;
    let root = tempfile::tempdir().unwrap();
    let repository = registry.client(root.path()).repository("team/app");
    let server = Server::start(&registry.address, root.path(), &[]);
    let image = image(1);
    image.push(&repository, "v1").await;
    let (status, answer) = server.send(&harbor("team/app", "v1", &image.digest()));
    assert_eq!(status, 202, "{answer}");
    assert_eq!(server.outcomes(1), ["published"]);
    let index = index_of(&repository, &image).await;

    let (status, answer) = server.send(&harbor("team/app", &index.to_string(), &index));
    assert_eq!(status, 202);
    assert!(answer.contains(r#""queued":0"#) && answer.contains("has no tag"), "{answer}");
    // Under a tag it is no image.
    let raw = repository.manifest(&ManifestName::Digest(index)).await.unwrap().unwrap();
    repository.push_manifest(&ManifestName::Tag("index".into()), media_type::MANIFEST, raw.bytes).await.unwrap();
    let before = registry.requests().len();
    assert_eq!(server.send(&harbor("team/app", "index", &index)).0, 202);
    assert_eq!(server.outcomes(2)[0], "nothing", "{}", server.jobs());
    assert_eq!(server.send(&harbor("team/app", "v1", &image.digest())).0, 202);
    assert_eq!(server.outcomes(3)[0], "up-to-date");
    let requests = registry.requests().split_off(before);
    assert!(requests.iter().all(|line| !line.starts_with("PUT ")), "{requests:?}");
    assert_eq!(server.metric("jobs_published_total"), 1);
    assert_eq!(server.metric("pushes_ignored_total"), 1);
    assert_eq!(server.metric("jobs_waiting") + server.metric("jobs_running"), 0);
    let said = server.said.lock().unwrap();
    let shown: Vec<&str> = ProfiledRegistry::SECRETS.into_iter().filter(|secret| said.contains(secret)).collect();
    assert!(said.contains("TRACE") && shown.is_empty(), "{shown:?}");
}

/// A real registry sends its notifications by itself, those of our own pushes too, and it all comes to rest.
#[tokio::test(flavor = "multi_thread")]
async fn a_push_to_docker_registry_is_indexed() {
    let (address, root) = (free_address(), tempfile::tempdir().unwrap());
    let token = root.path().join("token");
    std::fs::write(&token, format!("{TOKEN}\n")).unwrap();
    let server = Server::start(&address, root.path(), &["--token-file", token.to_str().unwrap()]);
    let url = format!("http://{}/webhook", server.address);
    let Some(registry) = DockerRegistry::start_telling(&address, &url, TOKEN) else { return };
    let repository = client(&registry.address).repository("team/app");
    let images = [image(1), image(2)];
    for (image, tag) in images.iter().zip(["v1", "v2"]) {
        image.push(&repository, tag).await;
    }
    assert_eq!(server.outcomes(2), ["published", "published"], "{}", server.said.lock().unwrap());
    for image in &images {
        index_of(&repository, image).await;
    }
    // There were events for the fallback tags, too: each is written once.
    let start = Instant::now();
    while server.metric("pushes_ignored_total") < 6 {
        assert!(start.elapsed() < PATIENCE, "{}", server.said.lock().unwrap());
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(server.metric("jobs_queued_total"), 2, "nothing of ours is work");
    let said = server.said.lock().unwrap();
    assert!(!said.contains("s3cret"), "{said}");
}

/// The same for version 2, where our own push has a tag: it is up to date. A tag that has moved on is left alone.
#[tokio::test(flavor = "multi_thread")]
async fn version_2_comes_to_rest() {
    let registry = ProfiledRegistry::start(Profile::Quay).await;
    let root = tempfile::tempdir().unwrap();
    let repository = registry.client(root.path()).repository("team/app");
    let server = Server::start(&registry.address, root.path(), &["--v2"]);
    let (old, new) = (image(1), image(2));
    old.push(&repository, "v1").await;
    assert_eq!(server.send(&harbor("team/app", "v1", &old.digest())).0, 202);
    assert_eq!(server.outcomes(1), ["published"], "{}", server.jobs());
    let tag = ManifestName::Tag("v1".into());
    let enabled = repository.manifest(&tag).await.unwrap().unwrap().digest;
    assert_ne!(enabled, old.digest());
    assert_eq!(server.send(&harbor("team/app", "v1", &enabled)).0, 202);
    assert_eq!(server.outcomes(2)[0], "up-to-date", "{}", server.jobs());

    new.push(&repository, "v1").await;
    assert_eq!(server.send(&harbor("team/app", "v1", &old.digest())).0, 202);
    assert_eq!(server.outcomes(3)[0], "superseded", "{}", server.jobs());
    assert_eq!(repository.manifest(&tag).await.unwrap().unwrap().digest, new.digest(), "the newer image is there");
    assert_eq!(server.send(&harbor("team/app", "v1", &new.digest())).0, 202);
    assert_eq!(server.outcomes(4)[0], "published", "{}", server.jobs());
}

/// Indexes go elsewhere if they are to, and are signed there: also what is in place already, for no option says whose
/// signature would do.
#[tokio::test(flavor = "multi_thread")]
async fn indexes_go_elsewhere_and_are_signed() {
    let (registry, indexes) =
        (ProfiledRegistry::start(Profile::Quay).await, ProfiledRegistry::start(Profile::Zot).await);
    let root = tempfile::tempdir().unwrap();
    let mut logins: Value = json!({ "auths": {} });
    for one in [&registry, &indexes] {
        one.write_login(root.path());
        let login: Value = serde_json::from_slice(&std::fs::read(root.path().join("config.json")).unwrap()).unwrap();
        logins["auths"][&one.address] = login["auths"][&one.address].clone();
    }
    let repository = registry.client(root.path()).repository("team/app");
    let image = image(1);
    image.push(&repository, "v1").await;
    let before = registry.requests().len();
    let elsewhere = indexes.client(root.path()).repository("soci/index");
    std::fs::write(root.path().join("config.json"), logins.to_string()).unwrap();
    let place = format!("{}/soci/index", indexes.address);
    let note = root.path().join("note");
    let sign = format!("sh -c 'echo \"$1\" >> {}' sh {{}}", note.display());
    let server = Server::start(&registry.address, root.path(), &["--to", &place, "--sign-with", &sign]);
    for count in 1..=2 {
        assert_eq!(server.send(&harbor("team/app", "v1", &image.digest())).0, 202);
        server.outcomes(count);
    }
    assert_eq!(server.outcomes(2), ["up-to-date", "published"], "{}", server.jobs());
    let index = index_of(&elsewhere, &image).await;
    let spans = preferred_on_registry(&elsewhere, &image.digest(), Which::Newest, &[SPAN_INDEX]).await.unwrap();
    let Discovery::Found(spans) = spans else { panic!("no span index: {spans:?}") };
    let expected = format!("{place}@{index}\n{place}@{}\n", spans.digest);
    assert_eq!(std::fs::read_to_string(note).unwrap(), expected.repeat(2));
    let requests = registry.requests().split_off(before);
    assert!(requests.iter().all(|line| line.starts_with("GET ") || line.starts_with("HEAD ")), "{requests:?}");
}

/// What any client may have put beside an image, or beside that of a neighbouring tag, is neither signed nor made part
/// of one.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_forged_is_not_signed() {
    for (version_2, is_neighbour) in [(false, false), (false, true), (true, false), (true, true)] {
        let registry = ProfiledRegistry::start(Profile::Zot).await;
        let root = tempfile::tempdir().unwrap();
        registry.write_login(root.path());
        let repository = registry.client(root.path()).repository("team/app");
        let base = tar(&[("base", text(1, 1_500_000))]);
        let of = |top: &str| Image::gzip(vec![base.clone(), tar(&[(top, text(2, 200_000))])]);
        let (image, neighbour) = (of("one"), of("two"));
        image.push(&repository, "v2").await;
        neighbour.push(&repository, "v1").await;
        let beside = if is_neighbour { &neighbour } else { &image };
        let ztoc = push_ztoc(&repository, beside, 262_144, Lie::Window).await.table;
        let toc = push_spans(&repository, beside, 262_144, Lie::Layer).await.table;
        let note = root.path().join("note");
        let sign = format!("sh -c 'echo \"$1\" >> {}' sh {{}}", note.display());
        let more: &[&str] = if version_2 { &["--v2", "--format", "both"] } else { &[] };
        let server = Server::start(&registry.address, root.path(), &[&["--sign-with", &sign], more].concat());
        assert_eq!(server.send(&harbor("team/app", "v2", &image.digest())).0, 202);
        assert_eq!(server.outcomes(1), ["published"], "{}", server.jobs());
        let signed = std::fs::read_to_string(&note).unwrap();
        assert_eq!(signed.lines().count(), if version_2 { 4 } else { 2 }, "{signed}");
        for line in signed.lines() {
            let name = ManifestName::Digest(line.split_once('@').unwrap().1.parse().unwrap());
            let manifest = repository.manifest(&name).await.unwrap().unwrap();
            let manifest = String::from_utf8(manifest.bytes.to_vec()).unwrap();
            assert!(!manifest.contains(&ztoc.hex()) && !manifest.contains(&toc.hex()), "{manifest}");
        }
    }
}

/// Without the right header nothing is taken and nothing shown; open addresses need a token.
#[test]
fn only_authorized_events_are_accepted() {
    let root = tempfile::tempdir().unwrap();
    let token = root.path().join("token");
    std::fs::write(&token, TOKEN).unwrap();
    let server = Server::start("registry.invalid", root.path(), &["--token-file", token.to_str().unwrap()]);
    let event = harbor("team/app", "v1", &Digest::of(b"x")).to_string();
    for wrong in [None, Some(""), Some("Bearer"), Some("of-the-webhook-s3cret"), Some("Basic of-the-webhook-s3cret")] {
        assert_eq!(server.request("POST", "/webhook", wrong, &event).0, 401, "{wrong:?}");
        assert_eq!(server.request("GET", "/jobs", wrong, "").0, 401, "{wrong:?}");
    }
    assert_eq!(server.request("GET", "/healthz", None, "").0, 200);
    assert_eq!(server.metric("events_refused_total"), 10);
    assert_eq!(server.jobs()["waiting"], json!([]));
    assert!(!server.said.lock().unwrap().contains("s3cret"));

    let place = tempfile::tempdir().unwrap();
    let mut open = soci();
    open.args(["serve-webhook", "--registry", "registry.invalid", "--listen", "0.0.0.0:0", "--root"]).arg(place.path());
    let output = run(&mut open);
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(message.contains("--token-file") && message.contains("--no-auth"), "{message}");
}

/// Whatever a body names, only the registry of the command line is spoken to.
#[tokio::test(flavor = "multi_thread")]
async fn no_other_registry_is_contacted() {
    let trap = TcpListener::bind("127.0.0.1:0").unwrap();
    trap.set_nonblocking(true).unwrap();
    let elsewhere = trap.local_addr().unwrap().to_string();
    let registry = ProfiledRegistry::start(Profile::Harbor215).await;
    let root = tempfile::tempdir().unwrap();
    registry.write_login(root.path());
    let server = Server::start(&registry.address, root.path(), &["--match", "team/*"]);
    let digest = Digest::of(b"x");
    let mut event = harbor("team/app", "v1", &digest);
    event["event_data"]["resources"][0]["resource_url"] = format!("{elsewhere}/team/app:v1").into();
    event["event_data"]["repository"]["namespace"] = elsewhere.clone().into();
    let notification = json!({ "events": [{
        "action": "push", "request": { "host": elsewhere },
        "target": { "mediaType": media_type::MANIFEST, "digest": digest, "repository": "team/app", "tag": "v2",
            "url": format!("http://{elsewhere}/v2/team/app/manifests/{digest}") },
    }] });
    for event in [event, notification] {
        assert_eq!(server.send(&event).0, 202, "{event}");
    }
    for repository in [format!("{elsewhere}/team/app"), format!("team/app@{elsewhere}"), "../team/app".to_owned()] {
        let (status, answer) = server.send(&harbor(&repository, "v1", &digest));
        assert!(status == 202 && answer.contains(r#""queued":0"#), "{answer}");
    }
    let (_, answer) = server.send(&harbor("others/app", "v1", &digest));
    assert!(answer.contains(r#""queued":0"#) && answer.contains("--match"), "{answer}");
    // The images are not there, which may change: they are tried again later.
    let start = Instant::now();
    while server.metric("jobs_retried_total") < 2 {
        assert!(start.elapsed() < PATIENCE, "{}", server.jobs());
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(registry.requests().iter().any(|line| line.contains("/team/app/manifests/")));
    assert!(trap.accept().is_err(), "a host that a body names was contacted");
}

#[test]
fn what_is_no_event() {
    let root = tempfile::tempdir().unwrap();
    let server = Server::start("registry.invalid", root.path(), &[]);
    for (body, status, said) in [
        ("{", 400, "no JSON"),
        ("{}", 400, "no event of Harbor's"),
        (r#"{"type":"PUSH_ARTIFACT"}"#, 400, "malformed"),
        (r#"{"type":"SCANNING_COMPLETED"}"#, 202, "is no push"),
        (&" ".repeat(2 << 20), 413, "bytes"),
    ] {
        let (got, answer) = server.request("POST", "/webhook", None, body);
        assert!(got == status && answer.contains(said), "{status} {said}: {answer}");
    }
    assert_eq!(server.request("GET", "/webhook", None, "").0, 405);
    assert_eq!(server.request("GET", "/", None, "").0, 404);
}

/// A registry that takes its time.
async fn slow() -> ProfiledRegistry {
    ProfiledRegistry::with(Quirks { latency: Duration::from_millis(400), ..Profile::Harbor215.quirks() }).await
}

/// Connections that send nothing, or half a head, keep no client out: neither events, nor probes, there or beside.
#[test]
fn silent_connections_shut_nothing() {
    let root = tempfile::tempdir().unwrap();
    let server = Server::start("registry.invalid", root.path(), &["--health-listen", "127.0.0.1:0"]);
    let probes = {
        let said = server.said.lock().unwrap();
        let rest = said.split_once("probes at ").expect("a second address").1;
        rest.split_whitespace().next().unwrap().to_owned()
    };
    let mut silent = Vec::new();
    for number in 0..300 {
        for address in [&server.address, &probes] {
            let mut stream = TcpStream::connect(address).unwrap();
            if number % 2 == 0 {
                // It may be turned away already.
                let _ = stream.write_all(b"POST /webhook HTTP/1.1\r\nHost: h\r\n");
            }
            silent.push(stream);
        }
    }
    let start = Instant::now();
    for address in [&server.address, &probes] {
        let (status, answer) = Server::request_at(address, "GET", "/healthz", None, "");
        assert!(status == 200 && answer.ends_with("ok\n"), "{answer}");
    }
    assert_eq!(server.send(&harbor("team/app", "v1", &Digest::of(b"x"))).0, 202);
    assert!(start.elapsed() < Duration::from_secs(6), "{:?}", start.elapsed());
    // No connection is kept for longer than a head may take.
    let mut last = silent.pop().unwrap();
    last.set_read_timeout(Some(Duration::from_secs(8))).unwrap();
    assert!(matches!(last.read(&mut [0; 1]), Ok(0) | Err(_)));
    assert!(start.elapsed() < Duration::from_secs(7), "{:?}", start.elapsed());
    // Probes get no further than they need to.
    assert_eq!(Server::request_at(&probes, "GET", "/jobs", Some(TOKEN), "").0, 404);
    assert_eq!(Server::request_at(&probes, "GET", "/metrics", None, "").0, 200);
}

/// Heads and bodies that go on and on are cut off.
#[test]
fn endless_requests_end() {
    let root = tempfile::tempdir().unwrap();
    let server = Server::start("registry.invalid", root.path(), &[]);
    let endless = |begin: &str, piece: &[u8]| {
        let mut stream = TcpStream::connect(&server.address).unwrap();
        stream.write_all(begin.as_bytes()).unwrap();
        let mut sent = 0_usize;
        while sent < 64 << 20 && stream.write_all(piece).is_ok() {
            sent += piece.len();
        }
        sent
    };
    let header = format!("X-More: {}\r\n", "x".repeat(1000));
    let sent = endless("POST /webhook HTTP/1.1\r\nHost: h\r\n", header.as_bytes());
    // What is sent may be ahead of what is read by the buffers between.
    assert!(sent < 16 << 20, "{sent} bytes of a head are taken");
    let chunk = format!("{:x}\r\n{}\r\n", 1 << 16, " ".repeat(1 << 16));
    let begin = "POST /webhook HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n";
    let sent = endless(begin, chunk.as_bytes());
    assert!(sent < 16 << 20, "{sent} bytes of a body are taken");
    assert_eq!(server.request("GET", "/healthz", None, "").0, 200);
}

/// More than may wait is refused, to be sent again; a second push of what waits is not more.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue() {
    let registry = slow().await;
    let root = tempfile::tempdir().unwrap();
    registry.write_login(root.path());
    let server = Server::start(&registry.address, root.path(), &["--jobs", "1", "--queue", "1"]);
    let digest = Digest::of(b"x");
    assert_eq!(server.send(&harbor("team/app", "v1", &digest)).0, 202);
    assert_eq!(server.send(&harbor("team/app", "v2", &digest)).0, 202);
    let (status, answer) = server.send(&harbor("team/app", "v3", &digest));
    assert!(status == 503 && answer.to_lowercase().contains("retry-after: 60"), "{answer}");
    assert_eq!(server.send(&harbor("team/app", "v2", &digest)).0, 202);
    let jobs = server.jobs();
    let tags = |what: &str| jobs[what].as_array().unwrap().iter().map(|job| job["tag"].clone()).collect::<Vec<_>>();
    assert_eq!((tags("running"), tags("waiting")), (vec![json!("v1")], vec![json!("v2")]), "{jobs}");
}

/// What was accepted survives the server's death, whether it waited or ran.
#[tokio::test(flavor = "multi_thread")]
async fn killed_with_work_to_do() {
    let registry = slow().await;
    let root = tempfile::tempdir().unwrap();
    let repository = registry.client(root.path()).repository("team/app");
    let images = [image(1), image(2), image(3)];
    for (image, tag) in images.iter().zip(["v1", "v2", "v3"]) {
        image.push(&repository, tag).await;
    }
    let mut server = Server::start(&registry.address, root.path(), &["--jobs", "1"]);
    for (image, tag) in images.iter().zip(["v1", "v2", "v3"]) {
        assert_eq!(server.send(&harbor("team/app", tag, &image.digest())).0, 202);
    }
    server.signal(Signal::KILL);
    server.child.wait().unwrap();
    let left: Value = serde_json::from_slice(&std::fs::read(root.path().join("webhook/queue.json")).unwrap()).unwrap();
    assert_eq!(left["jobs"].as_array().unwrap().len(), 3, "{left}");

    let mut server = Server::start(&registry.address, root.path(), &["--jobs", "3"]);
    // No other process may have the queue meanwhile.
    let output = run(&mut serve(&registry.address, root.path(), &[]));
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(7), "{message}");
    assert!(message.contains(&format!("process {}", server.child.id())), "{message}");
    assert_eq!(server.outcomes(3), ["published"; 3]);
    for image in &images {
        index_of(&repository, image).await;
    }
    assert_eq!(server.end(), Some(0));
    let left = std::fs::read_to_string(root.path().join("webhook/queue.json")).unwrap();
    assert!(left.contains(r#""jobs": []"#), "{left}");
}

/// On SIGTERM it finishes what runs and keeps what waits; what does not end in time is kept, too.
#[tokio::test(flavor = "multi_thread")]
async fn graceful_shutdown() {
    let registry = slow().await;
    for (drain, jobs_left) in [("60s", 1), ("0s", 2)] {
        let root = tempfile::tempdir().unwrap();
        let repository = registry.client(root.path()).repository(&format!("team/app-{drain}"));
        let images = [image(1), image(2)];
        for (image, tag) in images.iter().zip(["v1", "v2"]) {
            image.push(&repository, tag).await;
        }
        let mut server = Server::start(&registry.address, root.path(), &["--jobs", "1", "--drain", drain]);
        for (image, tag) in images.iter().zip(["v1", "v2"]) {
            assert_eq!(server.send(&harbor(repository.name(), tag, &image.digest())).0, 202);
        }
        assert_eq!(server.end(), Some(0));
        let left = std::fs::read(root.path().join("webhook/queue.json")).unwrap();
        let left: Value = serde_json::from_slice(&left).unwrap();
        assert_eq!(left["jobs"].as_array().unwrap().len(), jobs_left, "{drain}: {left}");
    }
}

/// A webhook whose address lacks its path loses every event: the log says so.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_to_another_path_is_logged() {
    let root = tempfile::tempdir().unwrap();
    let server = Server::start("127.0.0.1:1", root.path(), &["--no-auth"]);
    for (method, path, expected) in
        [("POST", "/", 404), ("POST", "/webhooks?token=s3cret", 404), ("GET", "/webhook", 405)]
    {
        let (status, answer) = server.request(method, path, None, "{}");
        assert_eq!(status, expected, "{answer}");
        assert!(answer.contains("POST /webhook"), "{answer}");
    }
    let start = Instant::now();
    loop {
        let said = server.said.lock().unwrap().clone();
        if ["POST / is answered", "POST /webhooks is answered", "GET /webhook is answered"]
            .iter()
            .all(|line| said.contains(line))
        {
            assert!(!said.contains("s3cret"), "{said}");
            break;
        }
        assert!(start.elapsed() < PATIENCE, "{said}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A project that admits nothing for now: the job rests, and an event of the repository that is no push of an image, a
/// signature for example, has it tried again.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_policy_forbids_is_tried_again_after_the_next_event() {
    let broken = Some(Broken { method: "GET", path: "/manifests/", status: 412 });
    let registry = ProfiledRegistry::with(Quirks { broken, ..Profile::Harbor215.quirks() }).await;
    let root = tempfile::tempdir().unwrap();
    let repository = registry.client(root.path()).repository("team/app");
    let image = Image::gzip(vec![tar(&[("a", text(1, 300_000))])]);
    image.push(&repository, "v1").await;
    registry.break_down();
    let server = Server::start(&registry.address, root.path(), &["--no-auth"]);
    assert_eq!(server.send(&harbor("team/app", "v1", &image.digest())).0, 202);
    let start = Instant::now();
    while server.metric("jobs_retried_total") == 0 {
        assert!(start.elapsed() < PATIENCE, "{}", server.jobs());
        std::thread::sleep(Duration::from_millis(50));
    }
    let waiting = &server.jobs()["waiting"][0];
    assert_eq!((&waiting["rests"], &waiting["attempts"]), (&true.into(), &1.into()), "{waiting}");
    registry.heal();
    let signature = format!("sha256-{}.sig", image.digest().hex());
    assert_eq!(server.send(&harbor("team/app", &signature, &image.digest())).0, 202);
    assert_eq!(server.outcomes(1), ["published"]);
}
