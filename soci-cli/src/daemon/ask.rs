//! Questions to the snapshotter of this machine, over the status socket below its root.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;

use crate::daemon::operations::{DaemonStatus, STATUS_SOCKET};
use crate::report::exit::{Exit, fail};

/// The timeout of a daemon's answer, which it gives from memory.
const ANSWER_SECONDS_MAX: u64 = 10;
/// More than this is no answer.
const ANSWER_BYTES_MAX: u64 = 64 << 20;

/// What a daemon answers.
#[derive(Debug)]
pub struct DaemonResponse {
    /// The status of HTTP.
    pub status: u16,
    /// What comes with it.
    pub body: Vec<u8>,
}

/// Asks the daemon of a root for `path`.
///
/// # Errors
/// When none answers, or not as one of ours does.
pub fn get(root: &Path, path: &str) -> anyhow::Result<DaemonResponse> {
    let socket = root.join(STATUS_SOCKET);
    let shown = socket.display();
    let answer = exchange(&socket, path).map_err(|error| {
        fail(Exit::Local, format!("{shown}: {error}; is soci-snapshotter-grpc running, and is --root its root?"))
    })?;
    parse(&answer).with_context(|| format!("{shown} did not answer as soci-snapshotter-grpc does"))
}

/// Asks the daemon of a root.
///
/// # Errors
/// When none answers, or not as one of ours does.
pub fn status(root: &Path) -> anyhow::Result<DaemonStatus> {
    let answer = get(root, "/status")?;
    let shown = root.join(STATUS_SOCKET);
    let shown = shown.display();
    anyhow::ensure!(answer.status == 200, "{shown} answered with status {}", answer.status);
    serde_json::from_slice(&answer.body).with_context(|| format!("the answer of {shown}"))
}

fn parse(answer: &[u8]) -> Option<DaemonResponse> {
    let end = answer.windows(4).position(|part| part == b"\r\n\r\n")?;
    let head = std::str::from_utf8(&answer[..end]).ok()?;
    let status = head.strip_prefix("HTTP/1.")?.get(2..5)?.parse().ok()?;
    Some(DaemonResponse { status, body: answer[end + 4..].to_vec() })
}

/// One question over HTTP 1.0, whose answer ends with the connection: a client library would bring nothing.
fn exchange(socket: &Path, path: &str) -> std::io::Result<Vec<u8>> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(Duration::from_secs(ANSWER_SECONDS_MAX)))?;
    stream.set_write_timeout(Some(Duration::from_secs(ANSWER_SECONDS_MAX)))?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n").as_bytes())?;
    let mut answer = Vec::new();
    stream.take(ANSWER_BYTES_MAX).read_to_end(&mut answer)?;
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers() {
        let answer = parse(b"HTTP/1.0 404 Not Found\r\nA: b\r\n\r\nnone\r\n\r\n").unwrap();
        assert_eq!((answer.status, answer.body), (404, b"none\r\n\r\n".to_vec()));
        for bad in ["", "HTTP/1.1 200 OK\r\n", "HTTP/1.1 2xx OK\r\n\r\n", "SSH-2.0\r\n\r\n"] {
            assert!(parse(bad.as_bytes()).is_none(), "{bad}");
        }
    }
}
