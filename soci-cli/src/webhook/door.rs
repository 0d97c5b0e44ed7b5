//! A listener for HTTP whose connections have bounds, however many peers connect and however slowly they speak.
//!
//! A connection that sends nothing costs its peer nothing, so it must cost others nothing, either. One request is
//! answered per connection; its head has a few seconds and some kilobytes, all of it has half a minute. Connections are
//! counted in all and per peer: one address of IPv4, one network of 64 bits of IPv6. When there are too many, the
//! oldest one whose head has not come ends in favour of the new one: requests of a reverse proxy, which all come from
//! one address, are served even if an untrusted client sends silent connections through it. Only when all of them are
//! being answered is a new one turned away.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::http::{HeaderValue, header};
use axum::middleware;
use axum::response::Response;
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::time::{Instant, Sleep};

/// How long the head of a request may take. It is one packet.
const HEAD_LIFE: Duration = Duration::from_secs(5);
/// How long a connection lives.
const LIFE: Duration = Duration::from_secs(30);
/// Bytes of a request's head. A token file has 8 KiB at most; proxies add some headers.
const HEAD_BYTES_MAX: usize = 32 << 10;

/// How many connections there are at the same time.
#[derive(Debug, Clone, Copy)]
pub struct Places {
    /// Of all peers.
    pub all: usize,
    /// Of one.
    pub per_peer: usize,
}

/// A listener that keeps these bounds.
#[derive(Debug)]
pub struct Door {
    listener: TcpListener,
    connections: Arc<Mutex<Connections>>,
}

impl Door {
    /// Takes connections of a listener.
    #[must_use]
    pub fn new(listener: TcpListener, places: Places) -> Self {
        let connections = Connections { places, last: 0, open: BTreeMap::new() };
        Self { listener, connections: Arc::new(Mutex::new(connections)) }
    }
}

/// Has each connection closed after its answer, as the bounds on time want it.
pub fn one_request_each(router: Router) -> Router {
    router.layer(middleware::map_response(async |mut response: Response| {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        response
    }))
}

impl axum::serve::Listener for Door {
    type Io = Visitor;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Visitor, SocketAddr) {
        loop {
            let (stream, address) = axum::serve::Listener::accept(&mut self.listener).await;
            let admitted = self.connections.lock().admit(peer(address.ip()));
            // One that is turned away is closed here.
            let Some((number, ended, has_head)) = admitted else { continue };
            let connections = Arc::clone(&self.connections);
            let until = Instant::now() + HEAD_LIFE;
            let place = ConnectionSlot { connections, number, has_head };
            let head = Some(Head::default());
            return (Visitor { stream, end: Box::pin(tokio::time::sleep_until(until)), ended, head, place }, address);
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// What counts as one peer: an IPv6 client usually has a whole /64.
fn peer(address: IpAddr) -> u128 {
    match address.to_canonical() {
        // Below the first network of IPv6 that is ever given out.
        IpAddr::V4(address) => u128::from(u32::from(address)),
        IpAddr::V6(address) => u128::from(address) & !u128::from(u64::MAX),
    }
}

/// The connections that there are, by their number: the oldest first.
#[derive(Debug)]
struct Connections {
    places: Places,
    last: u64,
    open: BTreeMap<u64, Connection>,
}

#[derive(Debug)]
struct Connection {
    peer: u128,
    has_head: Arc<AtomicBool>,
    /// When this is dropped, the connection ends.
    _alive: oneshot::Sender<Infallible>,
}

/// Number of a connection, what ends it, and whether its head has come.
type Admitted = (u64, oneshot::Receiver<Infallible>, Arc<AtomicBool>);

impl Connections {
    fn admit(&mut self, peer: u128) -> Option<Admitted> {
        let of_peer = self.open.values().filter(|connection| connection.peer == peer).count();
        if of_peer >= self.places.per_peer {
            self.make_room(|connection| connection.peer == peer)?;
        } else if self.open.len() >= self.places.all {
            self.make_room(|_| true)?;
        }
        self.last += 1;
        let (alive, ended) = oneshot::channel();
        let has_head = Arc::new(AtomicBool::new(false));
        self.open.insert(self.last, Connection { peer, has_head: Arc::clone(&has_head), _alive: alive });
        Some((self.last, ended, has_head))
    }

    /// Ends the oldest of these connections whose head has not come.
    fn make_room(&mut self, among: impl Fn(&Connection) -> bool) -> Option<()> {
        let silent = |connection: &Connection| among(connection) && !connection.has_head.load(Ordering::Relaxed);
        let oldest = self.open.iter().find(|(_, connection)| silent(connection)).map(|(number, _)| *number)?;
        self.open.remove(&oldest).map(|_| ())
    }
}

/// A connection's place, free again when this is dropped.
#[derive(Debug)]
struct ConnectionSlot {
    connections: Arc<Mutex<Connections>>,
    number: u64,
    has_head: Arc<AtomicBool>,
}

impl Drop for ConnectionSlot {
    fn drop(&mut self) {
        self.connections.lock().open.remove(&self.number);
    }
}

/// A head that is coming: it ends with an empty line.
#[derive(Debug, Default)]
struct Head {
    bytes: usize,
    has_begun: bool,
    is_line_empty: bool,
}

impl Head {
    /// Takes what has come; whether the head is complete.
    fn take(&mut self, bytes: &[u8]) -> bool {
        for byte in bytes {
            self.bytes += 1;
            match byte {
                b'\r' => {}
                b'\n' if self.has_begun && self.is_line_empty => return true,
                b'\n' => self.is_line_empty = true,
                _ => (self.has_begun, self.is_line_empty) = (true, false),
            }
        }
        false
    }
}

/// A connection that ends after a time, or for another one.
#[derive(Debug)]
pub struct Visitor {
    stream: TcpStream,
    end: Pin<Box<Sleep>>,
    ended: oneshot::Receiver<Infallible>,
    head: Option<Head>,
    place: ConnectionSlot,
}

impl Visitor {
    fn is_over(&mut self, context: &mut Context<'_>) -> bool {
        let ended = self.head.is_some() && Pin::new(&mut self.ended).poll(context).is_ready();
        ended || self.end.as_mut().poll(context).is_ready()
    }

    fn check_head(&mut self, bytes: &[u8]) -> io::Result<()> {
        let Some(head) = &mut self.head else { return Ok(()) };
        if head.take(bytes) {
            self.head = None;
            self.place.has_head.store(true, Ordering::Relaxed);
            let until = self.end.deadline() + (LIFE - HEAD_LIFE);
            self.end.as_mut().reset(until);
        } else if head.bytes > HEAD_BYTES_MAX {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(())
    }
}

impl AsyncRead for Visitor {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, to: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.is_over(context) {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        let before = to.filled().len();
        std::task::ready!(Pin::new(&mut self.stream).poll_read(context, to))?;
        Poll::Ready(self.check_head(to.filled().get(before..).unwrap_or_default()))
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
    fn heads_end_with_an_empty_line() {
        for (text, ends) in [
            ("GET / HTTP/1.1\r\nHost: h\r\n\r\n", true),
            ("GET / HTTP/1.1\nHost: h\n\n", true),
            ("\r\n\r\nGET / HTTP/1.1\r\n\r\nbody", true),
            ("\r\n\r\n\r\n", false),
            ("GET / HTTP/1.1\r\nHost: h\r\n", false),
            ("", false),
        ] {
            assert_eq!(Head::default().take(text.as_bytes()), ends, "{text:?}");
            // However it is cut.
            let mut head = Head::default();
            assert_eq!(text.bytes().any(|byte| head.take(&[byte])), ends, "{text:?}");
        }
    }

    #[test]
    fn silent_connections_give_way() {
        let mut connections = Connections { places: Places { all: 4, per_peer: 2 }, last: 0, open: BTreeMap::new() };
        let mut admitted: BTreeMap<u64, Admitted> = BTreeMap::new();
        let mut admit = |connections: &mut Connections, peer, has_head| {
            let (number, ended, head) = connections.admit(peer)?;
            head.store(has_head, Ordering::Relaxed);
            admitted.insert(number, (number, ended, head));
            Some(number)
        };
        let numbers = |connections: &Connections| connections.open.keys().copied().collect::<Vec<_>>();
        assert_eq!(admit(&mut connections, 1, true), Some(1));
        assert_eq!(admit(&mut connections, 1, false), Some(2));
        // A third one of the same peer: the silent one goes, then none is left that could.
        assert_eq!(admit(&mut connections, 1, true), Some(3));
        assert_eq!(numbers(&connections), [1, 3]);
        assert_eq!(admit(&mut connections, 1, true), None);
        // Others are not affected until all places are taken.
        assert_eq!(admit(&mut connections, 2, false), Some(4));
        assert_eq!(admit(&mut connections, 3, true), Some(5));
        assert_eq!(admit(&mut connections, 4, true), Some(6));
        assert_eq!(numbers(&connections), [1, 3, 5, 6]);
        assert_eq!(admit(&mut connections, 5, true), None);
    }

    #[test]
    fn peers() {
        let peer = |text: &str| super::peer(text.parse().unwrap());
        assert_eq!(peer("2001:db8:1:2::1"), peer("2001:db8:1:2:ffff::9"));
        assert_ne!(peer("2001:db8:1:2::1"), peer("2001:db8:1:3::1"));
        assert_eq!(peer("::ffff:10.0.0.1"), peer("10.0.0.1"));
        assert_ne!(peer("10.0.0.1"), peer("10.0.0.2"));
    }
}
