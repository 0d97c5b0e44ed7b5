//! Runs the indexer on two cores: one inflates and reads the tar, the other hashes and hands the tar on.
//!
//! An edge: the only part of the indexing that knows threads. Hashing costs nearly half of what inflating does, so
//! doing both in turn would leave the second core idle; and writing the tar to a file is better done on the less busy
//! core. Memory is bounded: a fixed set of buffers goes round between the two.

use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};

use bytes::Bytes;

use crate::format::class::{Class, Classified};
use crate::indexing::{Hashed, Hasher, IndexError, Indexed, Marks, Options, Scanner};

/// Why a layer could not be indexed.
#[derive(Debug, thiserror::Error)]
pub enum PipelineError<E> {
    /// The bytes did not come.
    #[error("reading the layer: {0}")]
    Read(E),
    /// They are not a layer that can be indexed.
    #[error(transparent)]
    Index(#[from] IndexError),
}

impl Classified for PipelineError<std::io::Error> {
    fn class(&self) -> Class {
        match self {
            Self::Read(_) => Class::Local,
            Self::Index(error) => error.class(),
        }
    }
}

/// Size of the pieces in which output goes to the hasher.
const PIECE_BYTES: usize = 256 << 10;
/// Size of the pieces in which input is read. Small enough that memory is reused: larger blocks are mapped anew each
/// time, and to have their pages made took as long as a quarter of the inflating.
const READ_BYTES: usize = 64 << 10;
/// How many of them there are.
const PIECES: usize = 8;

enum Message {
    Compressed(Bytes, Marks),
    Uncompressed(Vec<u8>),
}

/// Indexes the layer whose bytes `next` yields, piece by piece, until it says `None`. `tar` sees the uncompressed bytes
/// in order, each once, in pieces of 256 KiB, on another thread; all of them when this succeeds, else those up to some
/// place.
///
/// # Errors
/// [`PipelineError`]: what `next` says, or why the bytes cannot be indexed.
///
/// # Panics
/// Only when the operating system refuses a thread.
pub fn index_chunks<E>(
    mut next: impl FnMut() -> Result<Option<Bytes>, E>,
    options: Options,
    tar: &mut (dyn FnMut(&[u8]) + Send),
) -> Result<Indexed, PipelineError<E>> {
    let mut scanner = Scanner::new(options)?;
    std::thread::scope(|scope| {
        let (send, receive) = sync_channel(PIECES);
        let (give_back, empty) = channel();
        for _ in 0..PIECES {
            // The receiver lives until the end of this scope.
            let _ = give_back.send(Vec::with_capacity(PIECE_BYTES));
        }
        let hasher = scope.spawn(move || hash(&receive, &give_back, &options, tar));
        let mut handoff = Handoff { send, empty, piece: Vec::with_capacity(PIECE_BYTES) };
        while let Some(chunk) = next().map_err(PipelineError::Read)? {
            let marks = scanner.push(&chunk, &mut |output| handoff.uncompressed(output))?;
            handoff.send(Message::Compressed(chunk, marks));
        }
        handoff.finish();
        let hashed = hasher.join().expect("the hasher does not panic");
        Ok(Indexed::new(scanner.finish()?, hashed, &options)?)
    })
}

/// Indexes what a reader yields.
///
/// # Errors
/// [`PipelineError`].
pub fn index_reader(
    mut reader: impl std::io::Read,
    options: Options,
    progress: &mut dyn FnMut(u64),
) -> Result<Indexed, PipelineError<std::io::Error>> {
    let mut total = 0;
    let next = || {
        let mut buffer = bytes::BytesMut::zeroed(READ_BYTES);
        let length = loop {
            match reader.read(&mut buffer) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                result => break result?,
            }
        };
        buffer.truncate(length);
        total += length as u64;
        progress(total);
        Ok((length > 0).then(|| buffer.freeze()))
    };
    index_chunks(next, options, &mut |_| {})
}

/// Collects output into larger pieces and sends them over.
struct Handoff {
    send: SyncSender<Message>,
    empty: Receiver<Vec<u8>>,
    piece: Vec<u8>,
}

impl Handoff {
    fn uncompressed(&mut self, mut output: &[u8]) {
        while !output.is_empty() {
            let length = output.len().min(PIECE_BYTES - self.piece.len());
            self.piece.extend_from_slice(&output[..length]);
            output = &output[length..];
            if self.piece.len() == PIECE_BYTES {
                let fresh = self.empty.recv().unwrap_or_default();
                let full = std::mem::replace(&mut self.piece, fresh);
                self.send(Message::Uncompressed(full));
            }
        }
    }

    /// The hasher ends only when this end is dropped, so nothing sent is lost.
    fn send(&self, message: Message) {
        self.send.send(message).expect("the hasher listens until this end is dropped");
    }

    fn finish(mut self) {
        let rest = std::mem::take(&mut self.piece);
        self.send(Message::Uncompressed(rest));
    }
}

fn hash(
    messages: &Receiver<Message>,
    give_back: &Sender<Vec<u8>>,
    options: &Options,
    tar: &mut (dyn FnMut(&[u8]) + Send),
) -> Hashed {
    let mut hasher = Hasher::new(options);
    for message in messages {
        match message {
            Message::Compressed(chunk, marks) => hasher.compressed(&chunk, marks),
            Message::Uncompressed(mut piece) => {
                hasher.uncompressed(&piece);
                tar(&piece);
                piece.clear();
                // The receiver is gone once the other side has finished.
                let _ = give_back.send(piece);
            }
        }
    }
    hasher.finish()
}
