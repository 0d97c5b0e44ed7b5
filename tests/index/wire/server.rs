//! The scripted server.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use soci_index::registry::{Backoff, ClientOptions, CredentialSource, Registry, Repository, Secret};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// A request as it arrived.
#[derive(Debug, Clone)]
pub(crate) struct Recorded {
    pub(crate) method: String,
    /// Path and query.
    pub(crate) target: String,
    headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Recorded {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// Method and target in one text.
    pub(crate) fn line(&self) -> String {
        format!("{} {}", self.method, self.target)
    }

    /// The range asked for, end inclusive; the whole of `length` without one.
    pub(crate) fn range(&self, length: usize) -> (usize, usize) {
        let Some(range) = self.header("range") else { return (0, length - 1) };
        let (first, last) = range.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
        (first.parse().unwrap(), last.parse().unwrap())
    }
}

/// How much of the body is really sent.
#[derive(Debug, Clone, Copy)]
enum End {
    Whole,
    /// Close without a word.
    Nothing,
    /// Close after so many bytes.
    Cut(usize),
    /// Say nothing more after so many bytes.
    Stall(usize),
}

/// What to answer.
#[derive(Debug, Clone)]
pub(crate) struct Reply {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    end: End,
}

pub(crate) fn reply(status: u16) -> Reply {
    Reply { status, headers: Vec::new(), body: Vec::new(), end: End::Whole }
}

impl Reply {
    pub(crate) fn header(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }

    pub(crate) fn body(mut self, body: impl AsRef<[u8]>) -> Self {
        self.body = body.as_ref().to_vec();
        self
    }

    pub(crate) fn cut(mut self, after: usize) -> Self {
        self.end = End::Cut(after);
        self
    }

    pub(crate) fn hang_up(mut self) -> Self {
        self.end = End::Nothing;
        self
    }

    pub(crate) fn stall(mut self, after: usize) -> Self {
        self.end = End::Stall(after);
        self
    }

    fn head(&self) -> String {
        let mut head = format!("HTTP/1.1 {} -\r\n", self.status);
        for (name, value) in &self.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        let given = |name: &str| self.headers.iter().any(|(key, _)| key.eq_ignore_ascii_case(name));
        if !given("content-length") && !given("transfer-encoding") {
            head.push_str(&format!("content-length: {}\r\n", self.body.len()));
        }
        head + "\r\n"
    }
}

type Handler = Box<dyn FnMut(&Recorded) -> Reply + Send>;

pub(crate) struct Server {
    pub(crate) address: String,
    log: Arc<Mutex<Vec<Recorded>>>,
}

impl Server {
    /// Answers with `handler`.
    pub(crate) async fn start(handler: impl FnMut(&Recorded) -> Reply + Send + 'static) -> Self {
        Self::start_at("127.0.0.1:0", handler).await
    }

    /// The same at an address that is free.
    pub(crate) async fn start_at(address: &str, handler: impl FnMut(&Recorded) -> Reply + Send + 'static) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let log: Arc<Mutex<Vec<Recorded>>> = Arc::default();
        let handler: Arc<Mutex<Handler>> = Arc::new(Mutex::new(Box::new(handler)));
        let records = Arc::clone(&log);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(connection(stream, Arc::clone(&handler), Arc::clone(&records)));
            }
        });
        Self { address, log }
    }

    /// Answers with these in turn, then with 500.
    pub(crate) async fn queue(replies: impl IntoIterator<Item = Reply>) -> Self {
        let mut replies: Vec<Reply> = replies.into_iter().collect();
        replies.reverse();
        Self::start(move |_| replies.pop().unwrap_or_else(|| reply(500).body("the script has ended"))).await
    }

    pub(crate) fn requests(&self) -> Vec<Recorded> {
        self.log.lock().unwrap().clone()
    }

    pub(crate) fn lines(&self) -> Vec<String> {
        self.requests().iter().map(Recorded::line).collect()
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// The repository `p/r` on this server, without credentials.
    pub(crate) fn repository(&self) -> Repository {
        self.repository_with(options())
    }

    pub(crate) fn repository_with(&self, options: ClientOptions) -> Repository {
        Registry::new(&self.address, options).unwrap().repository("p/r")
    }

    /// Asserts that no secret ever came here.
    pub(crate) fn assert_no_credentials(&self) {
        for request in self.requests() {
            assert_eq!(request.header("authorization"), None, "{}", request.line());
            assert_eq!(request.header("cookie"), None, "{}", request.line());
        }
    }
}

/// Quick and without credentials.
pub(crate) fn options() -> ClientOptions {
    ClientOptions {
        credentials: CredentialSource::Anonymous,
        plain_http: true,
        deadline: Duration::from_secs(5),
        stall: Duration::from_secs(3),
        backoff: Backoff { first: Duration::from_millis(4), longest: Duration::from_millis(20), retries_max: 4 },
        ..ClientOptions::default()
    }
}

/// With the user `me` and the password `hunter2`.
pub(crate) fn with_password() -> ClientOptions {
    let credentials = CredentialSource::Password { user: "me".into(), password: Secret::new("hunter2") };
    ClientOptions { credentials, ..options() }
}

/// `me:hunter2` in a header.
pub(crate) const BASIC: &str = "Basic bWU6aHVudGVyMg==";

async fn connection(mut stream: TcpStream, handler: Arc<Mutex<Handler>>, log: Arc<Mutex<Vec<Recorded>>>) {
    let mut buffer = Vec::new();
    while let Some(request) = read_request(&mut stream, &mut buffer).await {
        let head_only = request.method == "HEAD";
        let reply = {
            log.lock().unwrap().push(request.clone());
            (handler.lock().unwrap())(&request)
        };
        let body = if head_only { &[][..] } else { &reply.body };
        let sent = match reply.end {
            End::Whole => body,
            End::Nothing => return,
            End::Cut(length) | End::Stall(length) => &body[..length.min(body.len())],
        };
        // In one piece: two would wait for each other's acknowledgement.
        if stream.write_all(&[reply.head().as_bytes(), sent].concat()).await.is_err() {
            return;
        }
        match reply.end {
            End::Whole | End::Nothing => {}
            End::Cut(_) => return,
            End::Stall(_) => std::future::pending().await,
        }
    }
}

async fn read_request(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> Option<Recorded> {
    let head_end = loop {
        if let Some(end) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
            break end;
        }
        if stream.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    };
    // A question for TLS is no text.
    let head = String::from_utf8(buffer[..head_end].to_vec()).ok()?;
    let mut lines = head.split("\r\n");
    let mut first = lines.next()?.split(' ');
    let (method, target) = (first.next()?.to_owned(), first.next()?.to_owned());
    let headers: Vec<(String, String)> = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
        .collect();
    let mut request = Recorded { method, target, headers, body: Vec::new() };
    let length: usize = request.header("content-length").map_or(0, |text| text.parse().unwrap());
    while buffer.len() < head_end + 4 + length {
        if stream.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    }
    request.body = buffer[head_end + 4..head_end + 4 + length].to_vec();
    buffer.drain(..head_end + 4 + length);
    Some(request)
}
