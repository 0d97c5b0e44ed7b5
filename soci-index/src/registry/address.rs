//! Where a host is: its base URL, and whether that is `https` or `http`.
//!
//! A registry on this machine (`localhost`, `127.0.0.1`, `[::1]`) may speak either, and its name does not say which. It
//! is asked before the first request: a TLS ClientHello, and behind it an empty line. A server that speaks TLS answers
//! with a TLS record (RFC 8446, section 5.1: type 22 or 21); one that speaks HTTP finds a malformed request and answers
//! or hangs up. No credential and no name of a repository is sent for it, and nothing is verified: certificates are the
//! business of the request that follows.
//!
//! Invariants: an address with something said about its TLS has no plain form, and is never asked in the clear; neither
//! is a server that was seen to speak TLS. That a server speaks HTTP holds until it cannot be reached, and for
//! [`SILENCE_HOLDS`] where only its silence said so. Concurrent requests ask once.

use std::ffi::OsString;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::Instant;
use url::Url;

use crate::registry::certificates;
use crate::registry::error::{TransportError, TransportKind};
use crate::registry::redirect;

/// How long to wait for the first byte of an answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long a server counts as one that speaks HTTP because it did not answer.
const SILENCE_HOLDS: Duration = Duration::from_secs(30);
/// The types of TLS records that answer a ClientHello: a handshake, an alert.
const TLS_RECORDS: [u8; 2] = [22, 21];

/// The base URL of a host. Clones share what was found out.
#[derive(Debug, Clone)]
pub(crate) struct Address(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    url: Url,
    /// The other one, if the host may be there.
    plain: Option<Url>,
    found: Mutex<Option<Probed>>,
    asking: tokio::sync::Mutex<()>,
}

#[derive(Debug, Clone, Copy)]
struct Probed {
    speaks_tls: bool,
    /// Until when it holds, if not until the host cannot be reached.
    until: Option<Instant>,
}

/// What a server answers to a ClientHello.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum HelloReply {
    Tls,
    Other,
    Silence,
    /// Nothing listens there.
    NoServer,
}

impl Address {
    /// A host at `url`; or at `plain`, if it is given and there is no TLS at `url`.
    pub(crate) fn new(url: Url, plain: Option<Url>) -> Self {
        Self(Arc::new(Inner { url, plain, found: Mutex::default(), asking: tokio::sync::Mutex::default() }))
    }

    /// The base URL, as far as is known.
    pub(crate) fn base(&self) -> &Url {
        match (&self.0.plain, self.found()) {
            (Some(plain), None | Some(false)) => plain,
            (Some(_), Some(true)) | (None, _) => &self.0.url,
        }
    }

    /// Finds out how the host is spoken to, and puts a URL right that was made before that was known.
    pub(crate) async fn settle(&self, url: &Url) -> Url {
        let Some(plain) = &self.0.plain else { return url.clone() };
        if self.found().is_none() {
            let _asking = self.0.asking.lock().await;
            if self.found().is_none() {
                self.ask(plain).await;
            }
        }
        if self.found() == Some(true) && redirect::same_origin(plain, url) {
            return self.secured(url);
        }
        url.clone()
    }

    /// Records that the host could not be reached: one that spoke HTTP may come back with TLS.
    pub(crate) fn forget_plain(&self) {
        self.0.found.lock().take_if(|found| !found.speaks_tls);
    }

    async fn ask(&self, plain: &Url) {
        let answer = hello(&self.0.url).await;
        tracing::debug!(host = plain.host_str(), port = plain.port_or_known_default(), ?answer, "asked for TLS");
        let (speaks_tls, until) = match answer {
            HelloReply::Tls => (true, None),
            HelloReply::Other => (false, None),
            HelloReply::Silence => (false, Some(Instant::now() + SILENCE_HOLDS)),
            // Where each scheme has a port of its own the other one may be served.
            HelloReply::NoServer if plain.port().is_none() && self.0.url.port().is_none() => {
                (false, Some(Instant::now() + SILENCE_HOLDS))
            }
            HelloReply::NoServer => return,
        };
        *self.0.found.lock() = Some(Probed { speaks_tls, until });
    }

    fn found(&self) -> Option<bool> {
        let found = (*self.0.found.lock())?;
        found.until.is_none_or(|until| Instant::now() < until).then_some(found.speaks_tls)
    }

    /// A URL of the plain form as one of the other.
    fn secured(&self, url: &Url) -> Url {
        let mut secured = self.0.url.clone();
        secured.set_path(url.path());
        secured.set_query(url.query());
        secured
    }
}

/// Replaces the error of a request over plain HTTP that got no HTTP answer, if the reason is that the server speaks TLS.
/// A server behind a proxy is not asked: this machine may not be allowed to reach it.
pub(crate) async fn explain(error: TransportError, url: &Url) -> TransportError {
    let is_in_question = url.scheme() == "http" && error.kind == TransportKind::Interrupted;
    if !is_in_question || goes_by_proxy(url, |name| std::env::var_os(name)) || hello(url).await != HelloReply::Tls {
        return error;
    }
    let detail = "it speaks TLS on this port, and plain HTTP was asked for: leave out --plain-http".to_owned();
    TransportError { kind: TransportKind::Tls, detail, ..error }
}

/// Whether the environment may have a plain request sent through a proxy.
fn goes_by_proxy(url: &Url, variable: impl Fn(&str) -> Option<OsString>) -> bool {
    let is_set = |name: &&str| variable(name).is_some_and(|value| !value.is_empty());
    !redirect::is_loopback(url) && ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"].iter().any(is_set)
}

/// Says hello to the server of a URL.
async fn hello(url: &Url) -> HelloReply {
    let Some(hello) = client_hello(url) else { return HelloReply::Silence };
    let (Some(host), Some(port)) = (url.host_str(), url.port_or_known_default()) else { return HelloReply::NoServer };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let Ok(Ok(mut stream)) = tokio::time::timeout(PATIENCE, TcpStream::connect((host, port))).await else {
        return HelloReply::NoServer;
    };
    let exchange = async {
        stream.write_all(&hello).await?;
        stream.read_u8().await
    };
    match tokio::time::timeout(PATIENCE, exchange).await {
        Ok(Ok(first)) if TLS_RECORDS.contains(&first) => HelloReply::Tls,
        Ok(Ok(_)) => HelloReply::Other,
        Ok(Err(_)) | Err(_) => HelloReply::Silence,
    }
}

/// A ClientHello, and an empty line for a server that reads lines: it would wait for one. To a TLS server these four
/// bytes are less than the head of a record.
fn client_hello(url: &Url) -> Option<Vec<u8>> {
    let mut hello = certificates::client_hello(url.host_str()?)?;
    hello.extend_from_slice(b"\r\n\r\n");
    Some(hello)
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::TcpListener;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn only_hosts_elsewhere_are_behind_a_proxy() {
        let goes = |url: &str, set: &str, value: &str| {
            goes_by_proxy(&Url::parse(url).unwrap(), |name| (name == set).then(|| value.into()))
        };
        for name in ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"] {
            assert!(goes("http://r.example:5000/", name, "http://proxy.example:3128"), "{name}");
            assert!(!goes("http://127.0.0.1:5000/", name, "http://proxy.example:3128"), "{name}");
            assert!(!goes("http://r.example:5000/", name, ""), "{name}");
        }
        assert!(!goes("http://r.example:5000/", "HTTPS_PROXY", "http://proxy.example:3128"));
    }

    /// A server that says `answer` to whatever it is sent, and how often it was asked.
    fn server(answer: &'static [u8], hangs: bool) -> (u16, Arc<AtomicUsize>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let asked = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&asked);
        std::thread::spawn(move || {
            let mut held = Vec::new();
            while let Ok((mut stream, _)) = listener.accept() {
                count.fetch_add(1, Ordering::Relaxed);
                let mut first = [0; 5];
                stream.read_exact(&mut first).unwrap();
                // A handshake record that holds a ClientHello.
                assert_eq!((first[0], first[1]), (22, 3));
                stream.write_all(answer).unwrap();
                if hangs {
                    held.push(stream);
                }
            }
        });
        (port, asked)
    }

    fn address(port: u16) -> Address {
        let url = |scheme: &str| Url::parse(&format!("{scheme}://127.0.0.1:{port}/v2")).unwrap();
        Address::new(url("https"), Some(url("http")))
    }

    fn url(text: &str) -> Url {
        Url::parse(text).unwrap()
    }

    #[tokio::test]
    async fn what_servers_say() {
        for (answer, hangs, scheme) in [
            (&[22, 3, 3][..], true, "https"),
            // A server that wants another version, or another name.
            (&[21, 3, 1], false, "https"),
            (b"HTTP/1.1 400 Bad Request\r\n\r\n", false, "http"),
            (b"", false, "http"),
            (b"", true, "http"),
        ] {
            let (port, asked) = server(answer, hangs);
            let address = address(port);
            assert_eq!(address.base().scheme(), "http");
            let early = url(&format!("http://127.0.0.1:{port}/v2/a/b?c=d"));
            let [first, second] = [address.settle(&early).await, address.settle(&early).await];
            assert_eq!(first.as_str(), format!("{scheme}://127.0.0.1:{port}/v2/a/b?c=d"), "{answer:?}");
            assert_eq!((&second, address.base().scheme()), (&first, scheme));
            assert_eq!(asked.load(Ordering::Relaxed), 1);
            // URLs of others are left alone.
            let other = url("http://storage.example/x");
            assert_eq!(address.settle(&other).await, other);
            // One that went away may come back with TLS, never without.
            address.forget_plain();
            assert_eq!(address.settle(&early).await, first);
            assert_eq!(asked.load(Ordering::Relaxed), if scheme == "http" { 2 } else { 1 });
        }
    }

    #[tokio::test]
    async fn concurrent_requests_ask_once() {
        let (port, asked) = server(&[22], true);
        let address = address(port);
        let early = url(&format!("http://127.0.0.1:{port}/v2/"));
        let settled = futures_util::future::join_all((0..20).map(|_| address.settle(&early))).await;
        assert!(settled.iter().all(|url| url.scheme() == "https"));
        assert_eq!(asked.load(Ordering::Relaxed), 1);
    }

    #[tokio::test]
    async fn nothing_is_learnt_where_nothing_listens() {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let address = address(port);
        let early = url(&format!("http://127.0.0.1:{port}/v2/"));
        assert_eq!(address.settle(&early).await, early);
        assert_eq!(address.found(), None);
    }

    #[tokio::test]
    async fn an_address_without_a_plain_form_is_not_asked() {
        let (port, asked) = server(b"HTTP/1.1 400 -\r\n\r\n", false);
        let secure = url(&format!("https://127.0.0.1:{port}/v2"));
        let address = Address::new(secure.clone(), None);
        assert_eq!(address.settle(&secure).await, secure);
        assert_eq!((address.base(), asked.load(Ordering::Relaxed)), (&secure, 0));
    }
}
