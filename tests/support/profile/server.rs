//! The front: requests in, the demonstration's registry behind, the profile's manners in between.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};
use soci_cli::demo::registry::DemoRegistry;
use soci_index::format::model::media_type;
use soci_index::registry::credentials::Secret;
use soci_index::registry::{ClientOptions, CredentialSource, Registry};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use super::login::{Door, IDENTITY, PASSWORD, USER};
use super::{Api, Profile, Quirks};
use crate::front::head;

/// What follows the place of an upload. It is no longer valid after a parser has read and rewritten it.
const UPLOAD_STATE: &str = "?_state=state-of-the-upload%2B+==";

/// A registry with a profile, until it is dropped.
#[derive(Debug)]
pub struct ProfiledRegistry {
    /// `127.0.0.1:PORT`.
    pub address: String,
    shared: Arc<Shared>,
    tasks: [JoinHandle<()>; 2],
}

#[derive(Debug)]
struct Shared {
    quirks: Quirks,
    /// Whether what is broken is broken by now.
    is_broken: AtomicBool,
    content: DemoRegistry,
    storage: String,
    door: Door,
    log: Mutex<Vec<String>>,
    /// What came to the storage with a login.
    leaks: Mutex<Vec<String>>,
}

impl ProfiledRegistry {
    /// What must never be shown: every secret that a profile knows.
    pub const SECRETS: [&'static str; 5] =
        [PASSWORD, IDENTITY, "-of-the-profile", "signature-of-the-storage", "state-of-the-upload"];

    /// Starts one.
    ///
    /// # Panics
    /// When no port can be obtained.
    pub async fn start(profile: Profile) -> Self {
        Self::with(profile.quirks()).await
    }

    /// Starts one with manners of its own.
    ///
    /// # Panics
    /// When no port can be obtained.
    pub async fn with(quirks: Quirks) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let storage = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = |listener: &TcpListener| listener.local_addr().expect("an address").to_string();
        let shared = Arc::new(Shared {
            quirks,
            is_broken: AtomicBool::new(false),
            content: DemoRegistry::start(quirks.latency).await.expect("a port"),
            storage: address(&storage),
            door: Door::default(),
            log: Mutex::default(),
            leaks: Mutex::default(),
        });
        let address = address(&listener);
        let tasks = [
            tokio::spawn(listen(listener, Arc::clone(&shared), false)),
            tokio::spawn(listen(storage, Arc::clone(&shared), true)),
        ];
        Self { address, shared, tasks }
    }

    /// A client with the right login.
    ///
    /// # Panics
    /// Never for such an address.
    #[must_use]
    pub fn client(&self, docker_config: &Path) -> Registry {
        self.write_login(docker_config);
        let credentials = CredentialSource::File(docker_config.join("config.json"));
        Registry::new(&self.address, ClientOptions { credentials, ..ClientOptions::default() }).expect("an address")
    }

    /// A client with this password.
    ///
    /// # Panics
    /// Never for such an address.
    #[must_use]
    pub fn client_with_password(&self, password: &str) -> Registry {
        let credentials = CredentialSource::Password { user: USER.to_owned(), password: Secret::new(password) };
        Registry::new(&self.address, ClientOptions { credentials, ..ClientOptions::default() }).expect("an address")
    }

    /// Writes a `config.json` with the right login into a directory.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn write_login(&self, directory: &Path) {
        let auth = BASE64.encode(format!("{USER}:{PASSWORD}"));
        let entry = match self.shared.quirks.form {
            None => json!({ "auth": auth }),
            Some(_) => json!({ "identitytoken": IDENTITY }),
        };
        let document = json!({ "auths": { self.address.clone(): entry } });
        std::fs::write(directory.join("config.json"), document.to_string()).expect("a file");
    }

    /// From now on what is broken does not work.
    pub fn break_down(&self) {
        self.shared.is_broken.store(true, Ordering::Relaxed);
    }

    /// And now it does again.
    pub fn heal(&self) {
        self.shared.is_broken.store(false, Ordering::Relaxed);
    }

    /// Method and path of every request so far.
    #[must_use]
    pub fn requests(&self) -> Vec<String> {
        self.shared.log.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Requests to the storage that carried a login, which must not reach it.
    #[must_use]
    pub fn leaks(&self) -> Vec<String> {
        self.shared.leaks.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for ProfiledRegistry {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

/// A request.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) method: String,
    /// Path and query.
    target: String,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

impl Request {
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// The values of a parameter.
    pub(super) fn query(&self, name: &str) -> Vec<String> {
        let (_, query) = self.target.split_once('?').unwrap_or_default();
        let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
        let unescape = |text: &str| {
            [("%3A", ":"), ("%2F", "/"), ("%2C", ","), ("%2B", "+")]
                .iter()
                .fold(text.to_owned(), |text, (from, to)| text.replace(from, to))
        };
        pairs.filter(|(key, _)| *key == name).map(|(_, value)| unescape(value)).collect()
    }

    /// The repository of the path.
    pub(super) fn repository(&self) -> &str {
        let path = self.path().strip_prefix("/v2/").unwrap_or_default();
        let end = ["/blobs/", "/manifests/", "/referrers/", "/tags/"].iter().find_map(|part| path.find(part));
        &path[..end.unwrap_or(path.len())]
    }

    fn path(&self) -> &str {
        self.target.split('?').next().unwrap_or_default()
    }

    /// The last part of the path below this one.
    fn below(&self, part: &str) -> Option<&str> {
        self.path().rsplit_once('/').filter(|(front, _)| front.ends_with(part)).map(|(_, last)| last)
    }

    fn reads(&self) -> bool {
        matches!(self.method.as_str(), "GET" | "HEAD")
    }
}

/// An answer.
#[derive(Debug)]
pub(super) struct Reply {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

impl Reply {
    fn new(status: u16) -> Self {
        Self { status, headers: Vec::new(), body: Vec::new() }
    }

    pub(super) fn json(status: u16, body: &str) -> Self {
        Self { body: body.into(), ..Self::new(status).header("content-type", "application/json") }
    }

    pub(super) fn error(status: u16, code: &str, message: &str) -> Self {
        Self::json(status, &json!({ "errors": [{ "code": code, "message": message }] }).to_string())
    }

    pub(super) fn header(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }

    fn without(&mut self, name: &str) {
        self.headers.retain(|(key, _)| key != name);
    }
}

async fn listen(listener: TcpListener, shared: Arc<Shared>, is_storage: bool) {
    while let Ok((client, _)) = listener.accept().await {
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            // A client that is gone is no matter of ours.
            let _ = serve(client, &shared, is_storage).await;
        });
    }
}

/// One request for each connection.
async fn serve(mut client: TcpStream, shared: &Shared, is_storage: bool) -> io::Result<()> {
    client.set_nodelay(true)?;
    let request = receive(&mut client).await?;
    let head_only = request.method == "HEAD";
    let reply = if is_storage { shared.storage(request).await? } else { shared.registry(request).await? };
    send(&mut client, reply, head_only).await
}

async fn send(client: &mut TcpStream, mut reply: Reply, head_only: bool) -> io::Result<()> {
    if !head_only {
        reply.without("content-length");
        let length = reply.body.len().to_string();
        reply = reply.header("content-length", length);
    }
    let headers: String = reply.headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    let head = format!("HTTP/1.1 {} As profiled\r\n{headers}connection: close\r\n\r\n", reply.status);
    let body = if head_only { &[][..] } else { &reply.body };
    client.write_all(&[head.as_bytes(), body].concat()).await?;
    client.shutdown().await
}

async fn receive(client: &mut TcpStream) -> io::Result<Request> {
    let head = head(client).await?;
    let (first, headers) = parse(&head);
    let mut words = first.split(' ').map(str::to_owned);
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let mut request = Request { method, target, headers, body: Vec::new() };
    let length = request.header("content-length").and_then(|text| text.parse().ok()).unwrap_or(0);
    request.body = vec![0; length];
    client.read_exact(&mut request.body).await?;
    Ok(request)
}

/// The first line, and the headers by their names in small letters.
fn parse(head: &str) -> (&str, Vec<(String, String)>) {
    let mut lines = head.split("\r\n");
    let first = lines.next().unwrap_or_default();
    let headers = lines.filter_map(|line| line.split_once(':'));
    (first, headers.map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned())).collect())
}

impl Shared {
    async fn registry(&self, request: Request) -> io::Result<Reply> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).push(format!("{} {}", request.method, request.path()));
        if request.path() == "/service/token" {
            return Ok(self.door.token(&self.quirks, &request));
        }
        if let Some(refusal) = self.door.refusal(&self.quirks, &request) {
            return Ok(refusal);
        }
        let broken = self.quirks.broken.filter(|_| self.is_broken.load(Ordering::Relaxed));
        if let Some(broken) = broken.filter(|broken| broken.meets(&request.method, request.path())) {
            let error = || match broken.status {
                412 => Reply::error(412, "PROJECTPOLICYVIOLATION", "The image is not signed by cosign."),
                status => Reply::error(status, "UNKNOWN", "as profiled"),
            };
            return if broken.status == 0 { Err(io::ErrorKind::ConnectionAborted.into()) } else { Ok(error()) };
        }
        match self.instead(&request) {
            Some(reply) => Ok(reply),
            None => self.changed(request).await,
        }
    }

    /// What is answered without a look at the content.
    fn instead(&self, request: &Request) -> Option<Reply> {
        let quirks = &self.quirks;
        if request.below("/referrers").is_some() {
            return match quirks.api {
                Api::Native | Api::Json => None,
                Api::Absent => {
                    let reply = Reply::new(404).header("content-type", "text/plain; charset=utf-8");
                    Some(Reply { body: b"404 page not found\n".to_vec(), ..reply })
                }
                Api::LoginPage => Some(Reply::new(302).header("location", format!("http://{}/login", self.storage))),
            };
        }
        if request.method == "DELETE" && !request.path().contains("/blobs/uploads/") {
            return Some(Reply::error(405, "UNSUPPORTED", "The operation is unsupported."));
        }
        if let (Some(digest), true) = (request.below("/blobs").filter(|_| request.reads()), quirks.storage) {
            let (storage, name) = (&self.storage, request.repository());
            let location = format!("http://{storage}/bucket/{name}/{digest}?X-Amz-Signature=signature-of-the-storage");
            return (request.method == "GET").then(|| Reply::new(307).header("location", location));
        }
        let reference = request.below("/manifests").filter(|_| request.method == "PUT")?;
        if quirks.refuses_docker_types && request.header("content-type").is_some_and(|kind| kind.contains("docker")) {
            return Some(Reply::error(415, "MANIFEST_INVALID", "unsupported media type"));
        }
        if let Some(status) = quirks.refuses_artifacts.filter(|_| is_artifact(&request.body)) {
            return Some(Reply::error(status, "MANIFEST_INVALID", "unsupported config media type"));
        }
        let status = quirks.refuses_tag.filter(|_| reference.starts_with("sha256-"))?;
        Some(Reply::error(status, "MANIFEST_INVALID", "manifest invalid"))
    }

    /// What the content answers, as this registry would say it.
    async fn changed(&self, mut request: Request) -> io::Result<Reply> {
        let quirks = &self.quirks;
        let is_list = request.below("/referrers").is_some();
        let is_manifest = request.method == "PUT" && request.below("/manifests").is_some();
        if quirks.dash_is_colon && request.reads() && request.below("/manifests").is_some() {
            request.target = request.target.replace("/sha256-", "/sha256:");
        }
        // The state of an upload is a secret of the registry's, and must come back as it was given.
        let continues =
            matches!(request.method.as_str(), "PUT" | "PATCH" | "DELETE") && request.path().contains("/blobs/uploads/");
        if continues && !request.target.contains(UPLOAD_STATE) {
            return Ok(Reply::error(404, "BLOB_UPLOAD_UNKNOWN", "blob upload unknown to registry"));
        }
        let mut reply = forward(&self.content.host(), &request).await?;
        for (_, value) in reply.headers.iter_mut().filter(|(name, _)| name == "location") {
            if value.contains("/blobs/uploads/") {
                value.push_str(UPLOAD_STATE);
            }
        }
        if is_manifest && !quirks.says_subject {
            reply.without("oci-subject");
        }
        if is_manifest && quirks.no_location {
            reply.without("location");
        }
        if is_list && quirks.api == Api::Json {
            reply.without("content-type");
            reply = reply.header("content-type", "application/json; charset=utf-8");
        }
        if is_list && quirks.wrong_sizes {
            reply.body = with_wrong_sizes(&reply.body);
        }
        Ok(reply)
    }

    /// Another site: storage, and a login page.
    async fn storage(&self, mut request: Request) -> io::Result<Reply> {
        if ["authorization", "cookie"].iter().any(|name| request.header(name).is_some()) {
            self.leaks.lock().unwrap_or_else(PoisonError::into_inner).push(request.target.clone());
        }
        let Some((name, digest)) = request.path().strip_prefix("/bucket/").and_then(|path| path.rsplit_once('/'))
        else {
            let page = b"<!DOCTYPE html><html><body>Sign in</body></html>".to_vec();
            return Ok(Reply { body: page, ..Reply::new(200).header("content-type", "text/html") });
        };
        if !request.target.ends_with("?X-Amz-Signature=signature-of-the-storage") {
            return Ok(Reply::new(403));
        }
        request.target = format!("/v2/{name}/blobs/{digest}");
        forward(&self.content.host(), &request).await
    }
}

/// Whether a manifest is that of something else than an image, by its configuration.
fn is_artifact(manifest: &[u8]) -> bool {
    let manifest: Value = serde_json::from_slice(manifest).unwrap_or_default();
    let config = manifest["config"]["mediaType"].as_str();
    config.is_some_and(|kind| ![media_type::CONFIG, media_type::DOCKER_CONFIG].contains(&kind))
}

fn with_wrong_sizes(list: &[u8]) -> Vec<u8> {
    let Ok(mut list) = serde_json::from_slice::<Value>(list) else { return list.to_vec() };
    for entry in list["manifests"].as_array_mut().into_iter().flatten() {
        entry["size"] = json!(entry["size"].as_u64().unwrap_or(0) + 123_456);
    }
    list.to_string().into_bytes()
}

/// Asks the registry that keeps the content.
async fn forward(content: &str, request: &Request) -> io::Result<Reply> {
    let mut stream = TcpStream::connect(content).await?;
    stream.set_nodelay(true)?;
    let passed = request.headers.iter().filter(|(name, _)| !matches!(name.as_str(), "connection" | "authorization"));
    let headers: String = passed.map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    let head_text = format!("{} {} HTTP/1.1\r\n{headers}connection: close\r\n\r\n", request.method, request.target);
    stream.write_all(&[head_text.as_bytes(), &request.body].concat()).await?;
    let answered = head(&mut stream).await?;
    let (first, mut headers) = parse(&answered);
    let status = first.split(' ').nth(1).and_then(|text| text.parse().ok()).unwrap_or(500);
    headers.retain(|(name, _)| !matches!(name.as_str(), "connection" | "transfer-encoding"));
    let chunked = parse(&answered).1.iter().any(|(name, _)| name == "transfer-encoding");
    assert!(!chunked, "the registry behind announces lengths");
    let mut body = Vec::new();
    stream.read_to_end(&mut body).await?;
    Ok(Reply { status, headers, body })
}
