//! `soci serve-webhook` from the outside: events in by plain HTTP, indexes out in a registry.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
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
use soci_tests::profile::{Profile, ProfiledRegistry};
use soci_tests::registry::{DockerRegistry, client, free_address};
use soci_tests::soci;

mod queue;
mod requests;

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
