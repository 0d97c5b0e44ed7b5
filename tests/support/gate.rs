//! A gate before a registry that lets a number of requests through and then kills their sender.
//!
//! Each request goes to the registry over a connection of its own, bodies included, so the count is exact and a process
//! that dies at the gate leaves no half request behind: it dies before one, or after the registry has carried it out
//! and before the answer is known. Those are the moments at which a publish can be cut.

use std::io;
use std::net::SocketAddr;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::front::head;

/// The moment at which the sender dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// The registry does not get the request.
    Before,
    /// The registry carries it out, but the sender gets no response.
    After,
}

/// A gate that listens until it is dropped.
#[derive(Debug)]
pub struct Gate {
    address: SocketAddr,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    registry: String,
    /// First lines of the requests since the last run began.
    seen: Mutex<Vec<String>>,
    limit: Mutex<Option<(usize, Moment)>>,
    /// Turns true when the sender has to die.
    reached: watch::Sender<bool>,
}

impl Gate {
    /// A gate of the registry at this address.
    ///
    /// # Errors
    /// When no port can be obtained.
    pub async fn start(registry: &str) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            registry: registry.to_owned(),
            seen: Mutex::default(),
            limit: Mutex::default(),
            reached: watch::Sender::new(false),
        });
        let (listened, task) = (Arc::clone(&shared), listener);
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = task.accept().await {
                let shared = Arc::clone(&listened);
                // A sender that is gone is no matter of ours.
                tokio::spawn(async move { drop(pass(client, &shared).await) });
            }
        });
        Ok(Self { address, shared, task })
    }

    /// Its name in image references.
    #[must_use]
    pub fn host(&self) -> String {
        self.address.to_string()
    }

    /// Runs `command` and kills it at its `limit`th request, counted from 1. Gives how it ended and what it asked.
    ///
    /// # Panics
    /// When it cannot be started, or does not end in a minute.
    pub async fn run(&self, command: &mut Command, limit: Option<(usize, Moment)>) -> (ExitStatus, Vec<String>) {
        lock(&self.shared.seen).clear();
        *lock(&self.shared.limit) = limit;
        self.shared.reached.send_replace(false);
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("a process");
        let mut reached = self.shared.reached.subscribe();
        let start = Instant::now();
        loop {
            if *reached.borrow_and_update() {
                child.kill().expect("a process that can be killed");
                break;
            }
            if child.try_wait().expect("a child").is_some() {
                break;
            }
            assert!(start.elapsed() < Duration::from_secs(60), "{command:?} does not end");
            // Whichever comes first; a change is only a reason to look sooner.
            let _ = tokio::time::timeout(Duration::from_millis(5), reached.changed()).await;
        }
        let status = child.wait().expect("a child");
        (status, lock(&self.shared.seen).clone())
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn pass(mut client: TcpStream, shared: &Shared) -> io::Result<()> {
    let request = head(&mut client).await?;
    let at_limit = {
        let mut seen = lock(&shared.seen);
        seen.push(request.lines().next().unwrap_or_default().to_owned());
        lock(&shared.limit).filter(|(limit, _)| *limit == seen.len()).map(|(_, moment)| moment)
    };
    if at_limit == Some(Moment::Before) {
        return stop(client, shared).await;
    }
    let mut registry = TcpStream::connect(&shared.registry).await?;
    let lines = request.trim_end().lines();
    let lines = lines.filter(|line| !line.to_ascii_lowercase().starts_with("connection:"));
    let mut text: String = lines.flat_map(|line| [line, "\r\n"]).collect();
    text.push_str("connection: close\r\n\r\n");
    registry.write_all(text.as_bytes()).await?;
    let mut body = (&mut client).take(length(&request));
    tokio::io::copy(&mut body, &mut registry).await?;
    let mut answer = Vec::new();
    registry.read_to_end(&mut answer).await?;
    if at_limit == Some(Moment::After) {
        return stop(client, shared).await;
    }
    client.write_all(&answer).await?;
    client.shutdown().await
}

/// Has the sender killed, and holds its connection until it is.
async fn stop(mut client: TcpStream, shared: &Shared) -> io::Result<()> {
    shared.reached.send_replace(true);
    let mut rest = [0; 1024];
    while client.read(&mut rest).await? > 0 {}
    Ok(())
}

fn length(head: &str) -> u64 {
    let lines = head.lines().filter_map(|line| line.split_once(':'));
    let mut lengths = lines.filter(|(name, _)| name.eq_ignore_ascii_case("content-length"));
    lengths.next().and_then(|(_, value)| value.trim().parse().ok()).unwrap_or(0)
}
