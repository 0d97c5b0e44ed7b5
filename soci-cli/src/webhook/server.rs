//! The HTTP side: events in, state out.
//!
//! `POST /webhook` takes events, `GET /jobs` shows the queue (both want the token), `GET /metrics` the sums, `GET
//! /healthz` liveness; the last two also on a listener of their own, which untrusted clients need not reach. Untrusted
//! clients can connect, too, so everything has a bound: bytes of a body, bytes of all bodies at the same time, and what
//! a [`Door`] bounds, connections and their lives, in which one request is answered.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::Router;
use axum::body::{Body, BodyDataStream};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use futures_util::StreamExt as _;
use serde_json::{Value, json};
use soci_fs::layer::glob::is_like;
use soci_index::format::digest::Digest;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, SemaphorePermit, watch};

use crate::webhook::clerk::{Gone, Mailbox, Receipt};
use crate::webhook::door::{Door, Places, one_request_each};
use crate::webhook::event::{Events, Push};
use crate::webhook::queue::QueueStatus;

/// Bytes of a body. Harbor's events have some hundred; a registry's notifications come in batches.
const BODY_BYTES_MAX: usize = 1 << 20;
/// Bytes of all bodies that are coming in. More is refused, to be sent again.
const BODIES_BYTES_MAX: usize = 32 << 20;
/// Connections for events. Those of one peer may be a registry's, or all of them through a reverse proxy.
const EVENT_PLACES: Places = Places { all: 256, per_peer: 64 };
/// Connections that ask whether all is well.
const HEALTH_PLACES: Places = Places { all: 32, per_peer: 8 };
/// Letters of a path that are logged.
const SHOWN_MAX: usize = 200;
/// When to come again, if too many wait.
const RETRY_AFTER_SECONDS: &str = "60";

/// Options of the server.
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
    /// A permit for each byte of a body that is held.
    room: Semaphore,
    received: AtomicU64,
    ignored: AtomicU64,
    refused: AtomicU64,
}

/// Where the server is reached.
#[derive(Debug)]
pub struct Listeners {
    /// By registries.
    pub events: TcpListener,
    /// For monitoring, if that is a separate address.
    pub health: Option<TcpListener>,
}

/// Serves until `end` changes, and some moments longer for requests that are in progress.
///
/// # Errors
/// When connections cannot be taken any more.
pub async fn serve(
    listeners: Listeners,
    manners: Manners,
    mailbox: Mailbox,
    end: watch::Receiver<bool>,
) -> io::Result<()> {
    let room = Semaphore::new(BODIES_BYTES_MAX);
    let server = Server { manners, mailbox, room, received: 0.into(), ignored: 0.into(), refused: 0.into() };
    let server = Arc::new(server);
    let watched = Router::new().route("/metrics", get(metrics)).route("/healthz", get(async || "ok\n"));
    let events = watched.clone().route("/webhook", post(webhook)).route("/jobs", get(jobs));
    let (events, watched) =
        (events.method_not_allowed_fallback(other_method).fallback(other_path), watched.fallback(other_path));
    let (events, watched) = (events.with_state(Arc::clone(&server)), watched.with_state(server));
    let ended = |mut end: watch::Receiver<bool>| async move {
        // A sender that is gone means the same.
        let _ = end.wait_for(|is_over| *is_over).await;
    };
    let door = Door::new(listeners.events, EVENT_PLACES);
    let serving = axum::serve(door, one_request_each(events)).with_graceful_shutdown(ended(end.clone()));
    let Some(health) = listeners.health else { return serving.await };
    let door = Door::new(health, HEALTH_PLACES);
    let beside = axum::serve(door, one_request_each(watched)).with_graceful_shutdown(ended(end));
    let (served, beside) = tokio::join!(serving, beside);
    served.and(beside)
}

/// Answers with one line, in JSON.
fn say(status: StatusCode, message: &impl ToString) -> Response {
    document(status, &json!({ "message": message.to_string() }))
}

/// Refuses an event that its sender may retry.
fn later(reason: &str) -> Response {
    let mut full = say(StatusCode::SERVICE_UNAVAILABLE, &format!("{reason}; send it again later"));
    full.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static(RETRY_AFTER_SECONDS));
    full
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
    if !events.stirred.is_empty()
        && let Err(gone) = server.mailbox.stirred(events.stirred).await
    {
        return gone.into();
    }
    if events.pushes.is_empty() {
        return document(StatusCode::ACCEPTED, &accepted);
    }
    match server.mailbox.pushed(events.pushes).await {
        Ok(Receipt::Accepted) => document(StatusCode::ACCEPTED, &accepted),
        Ok(Receipt::Full) => later("too many images wait"),
        Ok(Receipt::NotKept(_)) => {
            say(StatusCode::INTERNAL_SERVER_ERROR, &"it could not be written down; the log says why; send it again")
        }
        Err(gone) => gone.into(),
    }
}

/// Most likely a webhook's address without its path, whose events would be lost without a word.
async fn other_path(method: Method, uri: Uri) -> Response {
    elsewhere(StatusCode::NOT_FOUND, &method, &uri)
}

async fn other_method(method: Method, uri: Uri) -> Response {
    elsewhere(StatusCode::METHOD_NOT_ALLOWED, &method, &uri)
}

fn elsewhere(status: StatusCode, method: &Method, uri: &Uri) -> Response {
    let path: String = uri.path().chars().take(SHOWN_MAX).collect();
    tracing::warn!("{method} {path} is answered with {status}: events are taken by POST /webhook");
    say(status, &"events are taken by POST /webhook")
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
        let (body, _held) = self.read(body.into_data_stream()).await?;
        let events = Events::parse(&body).map_err(|error| {
            tracing::warn!(%error, "an event was not understood");
            say(StatusCode::BAD_REQUEST, &error)
        })?;
        Ok(events.only(|push| self.is_wanted(push)))
    }

    /// Reads a body, and takes a permit for each of its bytes.
    async fn read(&self, mut body: BodyDataStream) -> Result<(Vec<u8>, Vec<SemaphorePermit<'_>>), Response> {
        let (mut bytes, mut held) = (Vec::new(), Vec::new());
        while let Some(piece) = body.next().await {
            let piece =
                piece.map_err(|error| say(StatusCode::BAD_REQUEST, &format!("the body did not arrive: {error}")))?;
            if bytes.len() + piece.len() > BODY_BYTES_MAX {
                let message = format!("the body has more than {BODY_BYTES_MAX} bytes");
                return Err(say(StatusCode::PAYLOAD_TOO_LARGE, &message));
            }
            let wanted = u32::try_from(piece.len()).unwrap_or(u32::MAX);
            held.push(self.room.try_acquire_many(wanted).map_err(|_| later("too many events come at the same time"))?);
            bytes.extend_from_slice(&piece);
        }
        Ok((bytes, held))
    }

    fn is_wanted(&self, push: &Push) -> bool {
        let patterns = &self.manners.patterns;
        patterns.is_empty() || patterns.iter().any(|pattern| is_like(pattern.as_bytes(), push.repository.as_bytes()))
    }

    fn text(&self, seen: &QueueStatus) -> String {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let sums = seen.counters;
        let mut text = String::new();
        for (name, help, value) in [
            ("events_received_total", "Bodies that came in.", load(&self.received)),
            ("events_refused_total", "Requests with a wrong token.", load(&self.refused)),
            ("pushes_ignored_total", "Announced pushes that are no images.", load(&self.ignored)),
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

/// Compares in constant time: it reveals neither where they differ, nor how long the right one is.
fn is_token(given: &[u8], expected: &Digest) -> bool {
    let given = Digest::of(given);
    let pairs = given.bytes().iter().zip(expected.bytes());
    std::hint::black_box(pairs.fold(0, |difference, (one, other)| difference | (one ^ other))) == 0
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
