//! A relay before a registry, on the loopback address: it counts, and is as slow and as far away as configured.
//!
//! Threads that block, not a runtime: what is simulated is a fraction of a millisecond, and a runtime's timers have
//! whole ones. Per connection and direction there is a reader, which asks the [`Link`] when each piece arrives, and a
//! writer, which waits until then. A reader waits until the line is nearly free before it reads on, so that connections
//! take turns piece by piece and none waits behind a long queue of another. A new connection costs a round trip before
//! its first byte, as it does on a network.
//!
//! Invariants: bytes are passed on unchanged and in order; what is counted has been passed on or is in flight.

use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::bench::link::Link;

/// Bytes that are sent in one piece.
const PIECE_BYTES: usize = 16 << 10;
/// Pieces of a connection that are in flight at most: three times what 1 Gbit/s and 20 ms have.
const PIECES_MAX: usize = 512;
/// How long the line may be busy ahead of time: less than sleeping threads are late.
const AHEAD: Duration = Duration::from_millis(1);
/// How long the registry may take to accept a connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// What the network is like.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Network {
    /// From here to the registry and back.
    pub round_trip: Duration,
    /// Bytes per second in each direction; `None` is as fast as the machine.
    pub rate: Option<u64>,
}

/// A relay that runs until it is dropped.
#[derive(Debug)]
pub struct Relay {
    address: SocketAddr,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    registry: SocketAddr,
    network: Network,
    start: Instant,
    /// From the registry.
    down: Direction,
    /// To the registry.
    up: Direction,
    connections: AtomicU64,
    ended: AtomicBool,
}

#[derive(Debug)]
struct Direction {
    link: Mutex<Link>,
    bytes: AtomicU64,
}

impl Relay {
    /// Starts one before a registry.
    ///
    /// # Errors
    /// When no port of the loopback address can be obtained.
    pub fn start(registry: SocketAddr, network: Network) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let half = u64::try_from(network.round_trip.as_nanos() / 2).unwrap_or(u64::MAX);
        let direction = || Direction { link: Mutex::new(Link::new(half, network.rate)), bytes: AtomicU64::new(0) };
        let shared = Arc::new(Shared {
            registry,
            network,
            start: Instant::now(),
            down: direction(),
            up: direction(),
            connections: AtomicU64::new(0),
            ended: AtomicBool::new(false),
        });
        let serving = Arc::clone(&shared);
        thread::Builder::new().name("relay".to_owned()).spawn(move || serve(&listener, &serving))?;
        Ok(Self { address, shared })
    }

    /// Where it listens: the registry's new name.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Bytes from the registry so far, with the heads of answers.
    #[must_use]
    pub fn bytes_down(&self) -> u64 {
        self.shared.down.bytes.load(Ordering::Relaxed)
    }

    /// Bytes to the registry so far.
    #[must_use]
    pub fn bytes_up(&self) -> u64 {
        self.shared.up.bytes.load(Ordering::Relaxed)
    }

    /// Connections so far.
    #[must_use]
    pub fn connections(&self) -> u64 {
        self.shared.connections.load(Ordering::Relaxed)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Relaxed);
        // Wakes the thread that accepts; connections end with their clients.
        let _ = TcpStream::connect_timeout(&self.address, CONNECT_LIMIT);
    }
}

fn serve(listener: &TcpListener, shared: &Arc<Shared>) {
    loop {
        let accepted = listener.accept();
        if shared.ended.load(Ordering::Relaxed) {
            return;
        }
        match accepted {
            Ok((client, _)) => {
                if let Err(error) = connect(&client, shared) {
                    tracing::warn!(registry = %shared.registry, %error, "the relay cannot connect");
                    let _ = client.shutdown(Shutdown::Both);
                }
            }
            Err(error) => {
                tracing::warn!(%error, "the relay cannot accept a connection");
                thread::sleep(AHEAD);
            }
        }
    }
}

fn connect(client: &TcpStream, shared: &Arc<Shared>) -> io::Result<()> {
    let registry = TcpStream::connect_timeout(&shared.registry, CONNECT_LIMIT)?;
    shared.connections.fetch_add(1, Ordering::Relaxed);
    // Else the system waits for more to send, or for the other side's word, and adds its own delay to ours.
    client.set_nodelay(true)?;
    registry.set_nodelay(true)?;
    let opened = Instant::now() + shared.network.round_trip;
    for is_down in [false, true] {
        let (from, to) = if is_down { (&registry, client) } else { (client, &registry) };
        let (from, to, shared) = (from.try_clone()?, to.try_clone()?, Arc::clone(shared));
        let (send, receive) = sync_channel(PIECES_MAX);
        thread::Builder::new().name("relay-write".to_owned()).spawn(move || write(&receive, to))?;
        thread::Builder::new()
            .name("relay-read".to_owned())
            .spawn(move || read(from, &shared, is_down, opened, &send))?;
    }
    Ok(())
}

/// A piece, and when it arrives.
type Piece = (Instant, Vec<u8>);

fn read(mut from: TcpStream, shared: &Shared, is_down: bool, opened: Instant, send: &SyncSender<Piece>) {
    let direction = if is_down { &shared.down } else { &shared.up };
    let mut buffer = vec![0; PIECE_BYTES];
    // An end, orderly or not, is passed on by the writer when this is over.
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        let now = Instant::now().max(opened).saturating_duration_since(shared.start);
        let now = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
        let passage = direction.link.lock().send(now, length as u64);
        direction.bytes.fetch_add(length as u64, Ordering::Relaxed);
        let arrives = shared.start + Duration::from_nanos(passage.arrives);
        if send.send((arrives, buffer[..length].to_vec())).is_err() {
            break;
        }
        let busy = Duration::from_nanos(passage.leaves).saturating_sub(shared.start.elapsed());
        if busy > AHEAD {
            thread::sleep(busy.saturating_sub(AHEAD / 2));
        }
    }
    let _ = from.shutdown(Shutdown::Read);
}

fn write(receive: &Receiver<Piece>, mut to: TcpStream) {
    while let Ok((arrives, piece)) = receive.recv() {
        thread::sleep(arrives.saturating_duration_since(Instant::now()));
        if to.write_all(&piece).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends back what it gets.
    fn echo() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            for client in listener.incoming().take(2) {
                let client = client.unwrap();
                thread::spawn(move || io::copy(&mut &client, &mut &client));
            }
        });
        address
    }

    fn through(relay: &Relay, data: &[u8]) -> (Vec<u8>, Duration) {
        let start = Instant::now();
        let stream = TcpStream::connect(relay.address()).unwrap();
        let mut writer = stream.try_clone().unwrap();
        let sent = data.to_vec();
        let sending = thread::spawn(move || {
            writer.write_all(&sent).unwrap();
            writer.shutdown(Shutdown::Write).unwrap();
        });
        let mut received = Vec::new();
        (&stream).read_to_end(&mut received).unwrap();
        sending.join().unwrap();
        (received, start.elapsed())
    }

    #[test]
    fn bytes_come_through_in_order_and_are_counted() {
        let relay = Relay::start(echo(), Network::default()).unwrap();
        let data: Vec<u8> = (0..300_000_u32).flat_map(u32::to_le_bytes).collect();
        assert_eq!(through(&relay, &data).0, data);
        assert_eq!((relay.bytes_up(), relay.bytes_down(), relay.connections()), (1_200_000, 1_200_000, 1));
    }

    #[test]
    fn the_network_is_as_slow_as_configured() {
        let network = Network { round_trip: Duration::from_millis(20), rate: Some(2_000_000) };
        let relay = Relay::start(echo(), network).unwrap();
        // A connection and an answer: two round trips.
        let (_, time) = through(&relay, b"x");
        assert!(time >= Duration::from_millis(40), "{time:?}");
        // 200 kB at 2 MB/s, both ways at the same time.
        let (received, time) = through(&relay, &[7; 200_000]);
        assert_eq!(received.len(), 200_000);
        assert!(time >= Duration::from_millis(140), "{time:?}");
    }
}
