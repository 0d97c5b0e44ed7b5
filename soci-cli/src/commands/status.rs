//! `soci status`: what the snapshotter of this machine serves.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;

use crate::args::Status;
use crate::config::Config;
use crate::daemon::operations::{DaemonStatus, STATUS_SOCKET};
use crate::exit::{Exit, fail};
use crate::output;

/// How long a daemon may take to answer: it has all figures at hand.
const ANSWER_SECONDS_MAX: u64 = 10;
/// More than this is no status.
const ANSWER_BYTES_MAX: u64 = 64 << 20;

/// Runs `status`.
///
/// # Errors
/// When no daemon answers.
pub fn run(arguments: &Status, config: &Config) -> anyhow::Result<()> {
    let status = ask(&config.root)?;
    if arguments.json {
        return output::json(&status);
    }
    let rows = status.layers.iter().map(|held| {
        let layer = &held.layer;
        vec![
            held.slot.to_string(),
            layer.digest.clone(),
            format!("{} of {}", output::size(layer.present_bytes), output::size(layer.uncompressed_bytes)),
            output::size(layer.fetched_bytes),
            layer.requests.to_string(),
            layer.failures.to_string(),
            if layer.proven { "proven" } else { "provisional" }.to_owned(),
            held.image.split('@').next().unwrap_or_default().to_owned(),
        ]
    });
    let rows: Vec<Vec<String>> = rows.collect();
    output::table(&["SLOT", "LAYER", "HERE", "FETCHED", "REQUESTS", "ERRORS", "TRUST", "FROM"], &rows)?;
    for held in &status.layers {
        if let Some(error) = &held.layer.last_error {
            output::line(format!("slot {}: {error}", held.slot))?;
        }
    }
    let closed = status.slots.saturating_sub(status.layers.len());
    output::line(format!(
        "soci-snapshotter-grpc {} (process {}): {} layers open, {closed} more on first use",
        status.version,
        status.pid,
        status.layers.len(),
    ))
}

/// Asks the daemon of a root.
///
/// # Errors
/// When none answers, or not as one of ours does.
pub fn ask(root: &Path) -> anyhow::Result<DaemonStatus> {
    let socket = root.join(STATUS_SOCKET);
    let shown = socket.display();
    let answer = exchange(&socket).map_err(|error| {
        fail(Exit::Local, format!("{shown}: {error}; is soci-snapshotter-grpc running, and is --root its root?"))
    })?;
    let body = answer
        .strip_prefix("HTTP/1.")
        .filter(|rest| rest.get(1..5) == Some(" 200"))
        .and_then(|rest| rest.split_once("\r\n\r\n"));
    let (_, body) = body.with_context(|| format!("{shown} did not answer as soci-snapshotter-grpc does"))?;
    serde_json::from_str(body).with_context(|| format!("the answer of {shown}"))
}

/// One question over HTTP 1.0, whose answer ends with the connection: a client library would bring nothing.
fn exchange(socket: &Path) -> std::io::Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(Duration::from_secs(ANSWER_SECONDS_MAX)))?;
    stream.set_write_timeout(Some(Duration::from_secs(ANSWER_SECONDS_MAX)))?;
    stream.write_all(b"GET /status HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
    let mut answer = String::new();
    stream.take(ANSWER_BYTES_MAX).read_to_string(&mut answer)?;
    Ok(answer)
}
