//! The HTTP side: events in, state out.
//!
//! `POST /webhook` takes events, `GET /jobs` shows the queue (both want the token), `GET /metrics` the sums, `GET
//! /healthz` that we are there. Registries and strangers alike can connect, so everything has a bound: bytes of a body,
//! connections, and the life of each of them, in which one request is answered.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Router, middleware};
use serde_json::{Value, json};
use soci_fs::glob::is_like;
use soci_index::digest::Digest;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Sleep;

use super::clerk::{Answer, Gone, Mailbox};
use super::event::{Events, Push};
use super::queue::Seen;

/// Bytes of a body. Harbor's events have some hundred; a registry's notifications come in batches.
const BODY_BYTES_MAX: usize = 1 << 20;
/// How long a connection lives. Whoever sends slowly does not hold a place for longer.
const CONNECTION_LIFE: Duration = Duration::from_secs(30);
/// Connections at the same time.
const CONNECTIONS_MAX: usize = 256;
/// When to come again, if too many wait.
const RETRY_AFTER_SECONDS: &str = "60";

/// What the server is told.
#[derive(Debug)]
pub struct Manners {
    /// Digest of what the header `Authorization` must be, if anything. The secret itself is not kept.
    pub token: Option<Digest>,
    /// Repositories that are indexed: patterns, all if there are none.
    pub patterns: Vec<String>,
}

#[derive(Debug)]
struct Server {
    manners: Manners,
    mailbox: Mailbox,
    received: AtomicU64,
    ignored: AtomicU64,
    refused: AtomicU64,
}

/// Serves until `end` comes, and some moments longer for requests that are under way.
///
/// # Errors
/// When connections cannot be taken any more.
pub async fn serve(
    listener: TcpListener,
    manners: Manners,
    mailbox: Mailbox,
    end: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let server = Server { manners, mailbox, received: 0.into(), ignored: 0.into(), refused: 0.into() };
    let server = Arc::new(server);
    let router = Router::new()
        .route("/webhook", post(webhook))
        .route("/jobs", get(jobs))
        .route("/metrics", get(metrics))
        .route("/healthz", get(async || "ok\n"))
        .layer(middleware::map_response(async |mut response: Response| {
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            response
        }))
        .with_state(server);
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    axum::serve(Door { listener, places }, router).with_graceful_shutdown(end).await
}

/// Answers with one line, in JSON.
fn say(status: StatusCode, message: &impl ToString) -> Response {
    document(status, &json!({ "message": message.to_string() }))
}

fn document(status: StatusCode, value: &Value) -> Response {
    (status, [(header::CONTENT_TYPE, "application/json")], format!("{value}\n")).into_response()
}

impl From<Gone> for Response {
    fn from(gone: Gone) -> Self {
        say(StatusCode::SERVICE_UNAVAILABLE, &gone)
    }
}

async fn webhook(State(server): State<Arc<Server>>, request: Request) -> Response {
    if let Some(refusal) = server.refusal(request.headers()) {
        return refusal;
    }
    server.received.fetch_add(1, Ordering::Relaxed);
    let events = match server.events(request.into_body()).await {
        Ok(events) => events,
        Err(refusal) => return refusal,
    };
    server.ignored.fetch_add(events.ignored.len() as u64, Ordering::Relaxed);
    events.ignored.iter().for_each(|reason| tracing::debug!("ignored: {reason}"));
    let ignored: Vec<String> = events.ignored.iter().map(ToString::to_string).collect();
    let accepted = json!({ "queued": events.pushes.len(), "ignored": ignored });
    if events.pushes.is_empty() {
        return document(StatusCode::ACCEPTED, &accepted);
    }
    match server.mailbox.pushed(events.pushes).await {
        Ok(Answer::Accepted) => document(StatusCode::ACCEPTED, &accepted),
        Ok(Answer::Full) => {
            let mut full = say(StatusCode::SERVICE_UNAVAILABLE, &"too many images wait; send it again later");
            full.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static(RETRY_AFTER_SECONDS));
            full
        }
        Ok(Answer::NotKept(_)) => {
            say(StatusCode::INTERNAL_SERVER_ERROR, &"it could not be written down; the log says why; send it again")
        }
        Err(gone) => gone.into(),
    }
}

async fn jobs(State(server): State<Arc<Server>>, headers: HeaderMap) -> Response {
    if let Some(refusal) = server.refusal(&headers) {
        return refusal;
    }
    match server.mailbox.look().await {
        Ok(seen) => match serde_json::to_value(&seen) {
            Ok(value) => document(StatusCode::OK, &value),
            Err(error) => say(StatusCode::INTERNAL_SERVER_ERROR, &error),
        },
        Err(gone) => gone.into(),
    }
}

async fn metrics(State(server): State<Arc<Server>>) -> Response {
    match server.mailbox.look().await {
        Ok(seen) => ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], server.text(&seen)).into_response(),
        Err(gone) => gone.into(),
    }
}

impl Server {
    /// What keeps a request out, if anything does.
    fn refusal(&self, headers: &HeaderMap) -> Option<Response> {
        let token = self.manners.token.as_ref()?;
        let given = headers.get(header::AUTHORIZATION).map_or(&b""[..], HeaderValue::as_bytes);
        if is_token(given, token) {
            return None;
        }
        self.refused.fetch_add(1, Ordering::Relaxed);
        Some(say(StatusCode::UNAUTHORIZED, &"the Authorization header is not the one expected"))
    }

    async fn events(&self, body: Body) -> Result<Events, Response> {
        let body = to_bytes(body, BODY_BYTES_MAX).await.map_err(|error| {
            let message = format!("the body did not arrive, or has more than {BODY_BYTES_MAX} bytes: {error}");
            say(StatusCode::PAYLOAD_TOO_LARGE, &message)
        })?;
        let events = Events::parse(&body).map_err(|error| {
            tracing::warn!(%error, "an event was not understood");
            say(StatusCode::BAD_REQUEST, &error)
        })?;
        Ok(events.only(|push| self.is_wanted(push)))
    }

    fn is_wanted(&self, push: &Push) -> bool {
        let patterns = &self.manners.patterns;
        patterns.is_empty() || patterns.iter().any(|pattern| is_like(pattern.as_bytes(), push.repository.as_bytes()))
    }

    fn text(&self, seen: &Seen) -> String {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let sums = seen.counters;
        let mut text = String::new();
        for (name, help, value) in [
            ("events_received_total", "Bodies that came in.", load(&self.received)),
            ("events_refused_total", "Requests with a wrong token.", load(&self.refused)),
            ("pushes_ignored_total", "What bodies told of and is no image.", load(&self.ignored)),
            ("jobs_queued_total", "Images accepted.", sums.queued),
            ("jobs_published_total", "Jobs that published an index.", sums.published),
            ("jobs_up_to_date_total", "Jobs with nothing to do.", sums.up_to_date),
            ("jobs_nothing_total", "Jobs with nothing to index.", sums.nothing),
            ("jobs_superseded_total", "Jobs that a newer push made needless.", sums.superseded),
            ("jobs_failed_total", "Jobs that failed for good.", sums.failed),
            ("jobs_retried_total", "Attempts that failed and are repeated.", sums.retried),
        ] {
            text += &format!("# HELP soci_webhook_{name} {help}\n# TYPE soci_webhook_{name} counter\n");
            text += &format!("soci_webhook_{name} {value}\n");
        }
        for (name, help, value) in [
            ("jobs_waiting", "Jobs that wait.", seen.waiting.len()),
            ("jobs_running", "Jobs that run.", seen.running.len()),
        ] {
            text += &format!("# HELP soci_webhook_{name} {help}\n# TYPE soci_webhook_{name} gauge\n");
            text += &format!("soci_webhook_{name} {value}\n");
        }
        text
    }
}

/// Compares in a time that tells nothing: neither where they differ, nor how long the right one is.
fn is_token(given: &[u8], expected: &Digest) -> bool {
    let given = Digest::of(given);
    let pairs = given.bytes().iter().zip(expected.bytes());
    std::hint::black_box(pairs.fold(0, |difference, (one, other)| difference | (one ^ other))) == 0
}

/// Lets so many in.
struct Door {
    listener: TcpListener,
    places: Arc<Semaphore>,
}

impl axum::serve::Listener for Door {
    type Io = Visitor;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Visitor, SocketAddr) {
        // The semaphore is never closed; if it were, nobody would come in.
        let Ok(place) = Arc::clone(&self.places).acquire_owned().await else { std::future::pending().await };
        let (stream, address) = axum::serve::Listener::accept(&mut self.listener).await;
        (Visitor { stream, end: Box::pin(tokio::time::sleep(CONNECTION_LIFE)), _place: place }, address)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A connection that ends after a time.
struct Visitor {
    stream: TcpStream,
    end: Pin<Box<Sleep>>,
    _place: OwnedSemaphorePermit,
}

impl Visitor {
    fn is_over(&mut self, context: &mut Context<'_>) -> bool {
        self.end.as_mut().poll(context).is_ready()
    }
}

impl AsyncRead for Visitor {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, to: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.is_over(context) {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        Pin::new(&mut self.stream).poll_read(context, to)
    }
}

impl AsyncWrite for Visitor {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.is_over(context) {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens() {
        let expected = Digest::of(b"Bearer s3cret");
        assert!(is_token(b"Bearer s3cret", &expected));
        for wrong in [&b""[..], b"Bearer", b"Bearer s3cret ", b"bearer s3cret", b"Bearer s3creT"] {
            assert!(!is_token(wrong, &expected));
        }
    }
}
