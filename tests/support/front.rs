//! A reverse proxy of a registry that injects failures.
//!
//! Each request goes to the registry over a connection of its own, and the client's connection ends with the answer, so
//! what happens to a request is decided when it comes and by nothing before it. Only requests without a body pass:
//! images are pushed to the registry itself.

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// What happens to requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// They are answered.
    None,
    /// The port is closed, and existing connections are cut.
    Stopped,
    /// The answer comes late, and then slowly.
    Slow {
        /// Until its first byte.
        late: Duration,
        /// From then on.
        bytes_per_second: u32,
    },
    /// The connection ends in the middle of the body.
    Cut,
    /// This status, with these lines of the head, each with its end.
    Status(u16, &'static str),
    /// The body has the right length and wrong bytes.
    Garbage,
    /// Bytes from another place than was asked for, which is what `Content-Range` says.
    WrongRange,
    /// Parts of blobs are not served.
    NoParts(NoParts),
    /// Pushes get this status with this body; reads succeed.
    Push(u16, &'static str),
    /// The question for referrers has this status, with these lines of the head, each with its end; all else is well.
    Referrers(u16, &'static str),
}

/// How a server answers a request for a part of a blob that serves none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoParts {
    /// With the whole blob.
    Whole,
    /// With this status.
    Status(u16),
    /// With the part, under a status that says it is the whole.
    PartUnder200,
}

/// A front that listens until it is dropped.
#[derive(Debug)]
pub struct Front {
    address: SocketAddr,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    registry: String,
    fault: watch::Sender<Fault>,
    /// The head of each request.
    requests: Mutex<Vec<String>>,
    /// Requests that met a fault.
    struck: AtomicU64,
    /// Bytes of bodies of blobs that were sent.
    sent: AtomicU64,
    /// Milliseconds between two pieces of a blob, where no parts are served.
    pause: AtomicU64,
}

impl Front {
    /// A front of the registry at this address, without a fault.
    ///
    /// # Errors
    /// When no port can be obtained.
    pub async fn start(registry: &str) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            registry: registry.to_owned(),
            fault: watch::Sender::new(Fault::None),
            requests: Mutex::default(),
            struck: AtomicU64::default(),
            sent: AtomicU64::default(),
            pause: AtomicU64::default(),
        });
        let task = tokio::spawn(listen(listener, address, Arc::clone(&shared)));
        Ok(Self { address, shared, task })
    }

    /// Its name in image references.
    #[must_use]
    pub fn host(&self) -> String {
        self.address.to_string()
    }

    /// What happens from now on. Gives the number of requests that have met a fault until now.
    pub fn set(&self, fault: Fault) -> u64 {
        self.shared.fault.send_replace(fault);
        self.shared.struck.load(Ordering::Relaxed)
    }

    /// Rests for so many milliseconds after each 16 KiB of a blob of which no parts are served.
    pub fn pause(&self, milliseconds: u64) {
        self.shared.pause.store(milliseconds, Ordering::Relaxed);
    }

    /// Bytes of blobs that were sent so far.
    #[must_use]
    pub fn blob_bytes_sent(&self) -> u64 {
        self.shared.sent.load(Ordering::Relaxed)
    }

    /// The number of requests, so far, whose first line contains `what`.
    #[must_use]
    pub fn requests(&self, what: &str) -> usize {
        let requests = self.shared.requests.lock().unwrap_or_else(PoisonError::into_inner);
        requests.iter().filter(|head| head.lines().next().is_some_and(|line| line.contains(what))).count()
    }

    /// The number of requests, so far, with a header line that begins with `what`, in small letters.
    #[must_use]
    pub fn requests_with(&self, what: &str) -> usize {
        let requests = self.shared.requests.lock().unwrap_or_else(PoisonError::into_inner);
        let has = |head: &&String| head.lines().skip(1).any(|line| line.to_ascii_lowercase().starts_with(what));
        requests.iter().filter(has).count()
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn listen(mut listener: TcpListener, address: SocketAddr, shared: Arc<Shared>) {
    let mut fault = shared.fault.subscribe();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            changed = fault.changed() => {
                if changed.is_err() {
                    return;
                }
                if *fault.borrow() == Fault::Stopped {
                    drop(listener);
                    if fault.wait_for(|fault| *fault != Fault::Stopped).await.is_err() {
                        return;
                    }
                    listener = TcpListener::bind(address).await.expect("the port that was ours");
                }
                continue;
            }
        };
        let Ok((client, _)) = accepted else { continue };
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            let mut fault = shared.fault.subscribe();
            let stopped = fault.wait_for(|fault| *fault == Fault::Stopped);
            tokio::select! {
                // A client that is gone is no matter of ours.
                _ = answer(client, &shared) => {}
                _ = stopped => {}
            }
        });
    }
}

async fn answer(mut client: TcpStream, shared: &Shared) -> io::Result<()> {
    let mut request = head(&mut client).await?;
    let first = request.lines().next().unwrap_or_default().to_owned();
    shared.requests.lock().unwrap_or_else(PoisonError::into_inner).push(request.clone());
    let is_reading = first.starts_with("GET ") || first.starts_with("HEAD ");
    let fault = *shared.fault.borrow();
    if let (false, Fault::Push(status, body)) = (is_reading, fault) {
        let length = body.len();
        let head = format!("HTTP/1.1 {status} As told\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n");
        return client.write_all(format!("{head}{body}").as_bytes()).await;
    }
    if !is_reading {
        return client.write_all(b"HTTP/1.1 405 Only reading\r\ncontent-length: 0\r\nconnection: close\r\n\r\n").await;
    }
    let fault = match fault {
        Fault::Referrers(status, lines) if first.contains("/referrers/") => Fault::Status(status, lines),
        Fault::Referrers(..) | Fault::Push(..) => Fault::None,
        other => other,
    };
    if let Fault::Status(status, lines) = fault {
        shared.struck.fetch_add(1, Ordering::Relaxed);
        let head = format!("HTTP/1.1 {status} As told\r\n{lines}content-length: 0\r\nconnection: close\r\n\r\n");
        return client.write_all(head.as_bytes()).await;
    }
    let has_range = request.lines().any(|line| line.to_ascii_lowercase().starts_with("range:"));
    let fault = match fault {
        Fault::NoParts(NoParts::Status(status)) if has_range => {
            shared.struck.fetch_add(1, Ordering::Relaxed);
            let head = format!("HTTP/1.1 {status} No parts\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
            return client.write_all(head.as_bytes()).await;
        }
        Fault::NoParts(NoParts::Whole) => {
            let lines = request.split_inclusive("\r\n");
            request = lines.filter(|line| !line.to_ascii_lowercase().starts_with("range:")).collect();
            fault
        }
        Fault::NoParts(NoParts::PartUnder200) if !has_range => Fault::None,
        other => other,
    };
    let mut answer = ask(&shared.registry, &request).await?;
    if strike(fault, &mut answer) {
        shared.struck.fetch_add(1, Ordering::Relaxed);
    }
    client.write_all(answer.head.as_bytes()).await?;
    let piece = match fault {
        Fault::Slow { late, .. } => {
            tokio::time::sleep(late).await;
            4 << 10
        }
        // What a client does not read is not sent.
        Fault::NoParts(_) => 16 << 10,
        _ => answer.body.len().max(1),
    };
    let is_blob = first.contains("/blobs/");
    for bytes in answer.body.chunks(piece) {
        client.write_all(bytes).await?;
        if is_blob {
            shared.sent.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        }
        let pause = shared.pause.load(Ordering::Relaxed);
        if is_blob && pause > 0 && matches!(fault, Fault::NoParts(_)) {
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
        if let Fault::Slow { bytes_per_second, .. } = fault {
            tokio::time::sleep(Duration::from_secs(1) * u32::try_from(piece).unwrap_or(u32::MAX) / bytes_per_second)
                .await;
        }
    }
    client.shutdown().await
}

/// What the registry has answered.
struct Answer {
    head: String,
    body: Vec<u8>,
}

/// Does to an answer what is done to it at once; returns whether it could be applied.
fn strike(fault: Fault, answer: &mut Answer) -> bool {
    match fault {
        Fault::None | Fault::Stopped | Fault::Status(..) | Fault::Referrers(..) | Fault::Push(..) => false,
        Fault::NoParts(NoParts::PartUnder200) => {
            answer.head = answer.head.replacen(" 206 ", " 200 ", 1).replace("content-range", "x-range");
            true
        }
        Fault::NoParts(_) => true,
        Fault::Slow { .. } => true,
        Fault::Cut => {
            let half = answer.body.len() / 2;
            let has_body = !answer.body.is_empty();
            answer.body.truncate(half);
            has_body
        }
        Fault::Garbage => {
            answer.body.iter_mut().for_each(|byte| *byte ^= 0x55);
            !answer.body.is_empty()
        }
        Fault::WrongRange => match another_range(&answer.head) {
            Some(head) => {
                answer.head = head;
                true
            }
            None => false,
        },
    }
}

/// The head of a partial answer with the range before the one that it has.
fn another_range(head: &str) -> Option<String> {
    let (before, rest) = head.split_once("content-range: bytes ")?;
    let (range, rest) = rest.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last) = (first.parse::<u64>().ok()?, last.parse::<u64>().ok()?);
    let (first, last) = if first == 0 { (1, last + 1) } else { (first - 1, last - 1) };
    Some(format!("{before}content-range: bytes {first}-{last}/{rest}"))
}

/// Asks the registry what the client has asked, and reads the answer to its end.
async fn ask(registry: &str, request: &str) -> io::Result<Answer> {
    let mut registry = TcpStream::connect(registry).await?;
    let lines = request.trim_end().lines().filter(|line| !line.to_ascii_lowercase().starts_with("connection:"));
    let mut text: String = lines.flat_map(|line| [line, "\r\n"]).collect();
    text.push_str("connection: close\r\n\r\n");
    registry.write_all(text.as_bytes()).await?;
    let head = head(&mut registry).await?;
    let mut body = Vec::new();
    registry.read_to_end(&mut body).await?;
    Ok(Answer { head, body })
}

/// Reads up to the empty line, that one included.
pub(crate) async fn head(stream: &mut TcpStream) -> io::Result<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        // Byte by byte: what follows is not ours. Heads are short.
        head.push(stream.read_u8().await?);
    }
    String::from_utf8(head).map_err(io::Error::other)
}
