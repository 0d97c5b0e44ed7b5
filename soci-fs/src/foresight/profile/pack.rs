//! Packs: the bytes that a profile names, as one zstd stream, in the profile's order. Made here, and unpacked into the
//! layer store while they arrive.
//!
//! A range is compared with its SHA-256 in the profile before any byte of it is used; the first one that differs ends
//! the pack. Unpacking runs on the blocking pool, one range of at most 1 MiB at a time, so its memory is bounded by
//! that and by zstd's window.

use std::io::{self, Read, Write};
use std::sync::Arc;

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use soci_index::format::class::{Class, Classified};
use soci_index::format::digest::Digest;
use soci_index::format::profile::{Profile, Touched};
use soci_index::image::BlobStream;
use soci_index::registry::pieces::Pieces;
use tokio::sync::{mpsc, watch};

use crate::layer::budget;
use crate::layer::incoming::{Incoming, Progress};
use crate::layer::reader::{LayerReader, ReadError};
use crate::layer::store::StoreError;

/// zstd's effort. A pack is made once, by a build job, and fetched by every node while a program waits. Of 27.6 MB of
/// shared libraries and Python files 15 makes 8.08 MB in 5.0 s, 19 makes 7.28 MB in 12.2 s, 22 makes 7.26 MB in 15.0 s;
/// of 51.4 MB of pieces of such files 12.9 MB in 8.1 s, 11.4 MB in 20.5 s and 11.3 MB in 27.0 s. So 19 saves a tenth of
/// what is fetched, and still unpacks at 1 GB/s, faster than it comes.
const LEVEL: i32 = 19;
/// Largest window of a pack, as a power of two: 16 MiB, twice that of the effort that packs are made with. Stops a
/// stream from making us hold gigabytes.
const WINDOW_LOG_MAX: u32 = 24;
/// Ranges that are read at a time while a pack is made: as many as a start-up has requests in progress, so that a
/// registry far away does not make each range wait for the one before. They are held until their turn comes, at most 1
/// MiB each.
const READS_MAX: usize = 16;
/// Pieces of the stream that wait to be unpacked.
const PIECES_WAITING: usize = 16;

/// Why a pack could not be made or used.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// The bytes of a range could not be read.
    #[error(transparent)]
    Read(#[from] Box<ReadError>),
    /// The pack could not be written.
    #[error("cannot write the pack: {0}")]
    Write(io::Error),
    /// It did not come, or is no zstd stream, or ends too early.
    #[error("range {number} of {of}, of layer {layer} at {offset}, could not be fetched: {cause}")]
    Stream { number: usize, of: usize, layer: Box<Digest>, offset: u64, cause: io::Error },
    /// The bytes are not those that the profile says.
    #[error("range {number} of {of}, of layer {layer} at {offset}, is not what the profile says")]
    Range { number: usize, of: usize, layer: Box<Digest>, offset: u64 },
    /// The layer store does not take them.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The work was cut off.
    #[error("unpacking was abandoned")]
    Abandoned,
}

impl Classified for PackError {
    fn class(&self) -> Class {
        match self {
            Self::Read(_) | Self::Abandoned => Class::Other,
            Self::Write(_) | Self::Store(_) => Class::Local,
            Self::Stream { .. } => Class::Registry,
            Self::Range { .. } => Class::Content,
        }
    }
}

/// Writes the pack of a profile to `output`, and gives the profile that goes with it: only what the layers really have,
/// with digests.
///
/// # Errors
/// [`PackError`].
pub async fn make(profile: &Profile, readers: &[LayerReader], output: impl Write + Send) -> Result<Profile, PackError> {
    let places = profile.places(&readers.iter().map(LayerReader::digest).collect::<Vec<_>>());
    let mut encoder = zstd::stream::write::Encoder::new(output, LEVEL).map_err(PackError::Write)?;
    let there = profile.ranges().iter().filter_map(|range| {
        let reader = readers.get(*places.get(&range.layer)?)?;
        let bytes = range.bytes.start..range.bytes.end.min(reader.store().size());
        (!bytes.is_empty()).then_some((reader, Touched { layer: range.layer, bytes }))
    });
    let reads = there.map(|(reader, range)| async move {
        let length = usize::try_from(range.length()).unwrap_or(0);
        let content = reader.read(range.bytes.start, length).await.map_err(Box::new)?;
        Ok::<_, PackError>((range, content))
    });
    let mut reads = stream::iter(reads).buffered(READS_MAX);
    let (mut ranges, mut digests) = (Vec::new(), Vec::new());
    while let Some(read) = reads.next().await {
        let (range, content) = read?;
        digests.push(sha256(&content));
        encoder.write_all(&content).map_err(PackError::Write)?;
        ranges.push(range);
    }
    encoder.finish().and_then(|mut output| output.flush()).map_err(PackError::Write)?;
    let limits = soci_index::format::limits::Limits::DEFAULT;
    let failed = |error| PackError::Write(io::Error::other(format!("{error}")));
    Profile::new(profile.layers().to_vec(), ranges, &limits).and_then(|made| made.with_digests(digests)).map_err(failed)
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    Digest::of(bytes).bytes().try_into().unwrap_or([0; 32])
}

/// A pack that is about to be unpacked.
pub(super) struct Unpacking {
    profile: Arc<Profile>,
    /// The reader of each layer of the profile that the image has.
    readers: Vec<Option<LayerReader>>,
    progress: watch::Sender<Progress>,
}

impl Unpacking {
    /// Announces to the readers what will come; `None` if none of them takes bytes of this pack.
    pub(super) fn new(profile: Arc<Profile>, pack: Digest, readers: &[LayerReader]) -> Option<Self> {
        let (progress, watching) = watch::channel(Progress::new());
        let places = profile.places(&readers.iter().map(LayerReader::digest).collect::<Vec<_>>());
        let taking: Vec<bool> = readers.iter().map(|reader| reader.health().takes_pack(pack)).collect();
        let takes = |place: &&usize| taking.get(**place).is_some_and(|takes| *takes);
        let of_layer = |number: u32| places.get(&number).filter(takes).and_then(|place| readers.get(*place)).cloned();
        let by_layer: Vec<Option<LayerReader>> = (0_u32..).map(of_layer).take(profile.layers().len()).collect();
        let mut promised = vec![Vec::new(); by_layer.len()];
        let mut position = 0;
        for range in profile.ranges() {
            position += range.length();
            promised[range.layer as usize].push((range.bytes.clone(), position));
        }
        for (reader, ranges) in by_layer.iter().zip(promised) {
            if let Some(reader) = reader {
                reader.store().expect_parts();
                reader.ahead().expect(Arc::new(Incoming::new(ranges, watching.clone())));
            }
        }
        by_layer.iter().any(Option::is_some).then_some(Self { profile, readers: by_layer, progress })
    }

    /// Unpacks a stream as it arrives.
    pub(super) async fn run(self, mut stream: BlobStream) -> Result<(), PackError> {
        let (send, mut receive) = mpsc::channel::<io::Result<Bytes>>(PIECES_WAITING);
        let pieces = std::iter::from_fn(move || receive.blocking_recv());
        let _turn = budget::pack().await;
        self.count(1, 0);
        let task = tokio::task::spawn_blocking(move || self.unpack(Pieces::new(pieces)));
        while let Some(piece) = stream.next().await {
            // If the receiver is gone, it reports the reason.
            if send.send(piece.map_err(|error| io::Error::other(error.to_string()))).await.is_err() {
                break;
            }
        }
        drop(send);
        task.await.map_err(|_| PackError::Abandoned)?
    }

    /// Counts what is of no single layer, with the first one that the image has.
    fn count(&self, requests: u64, bytes: u64) {
        if let Some(reader) = self.readers.iter().flatten().next() {
            reader.fetching().count(requests, bytes);
        }
    }

    fn unpack(self, arriving: impl Read) -> Result<(), PackError> {
        let mut counted = 0;
        let result = self.unpack_ranges(arriving, &mut counted);
        let packed = self.progress.borrow().packed;
        self.count(0, packed - counted);
        self.progress.send_modify(|progress| progress.ended = true);
        result
    }

    /// Packed bytes are counted with the layers that they are of, up to what the decoder has read ahead; `counted` is
    /// how many were.
    fn unpack_ranges(&self, arriving: impl Read, counted: &mut u64) -> Result<(), PackError> {
        let arriving = Counted { inner: arriving, progress: &self.progress };
        let mut decoder = zstd::stream::read::Decoder::new(arriving).map_err(PackError::Write)?;
        decoder.window_log_max(WINDOW_LOG_MAX).map_err(PackError::Write)?;
        let (ranges, mut buffer) = (self.profile.ranges(), Vec::new());
        for (number, (range, digest)) in ranges.iter().zip(self.profile.digests()).enumerate() {
            let (of, offset) = (ranges.len(), range.bytes.start);
            let layer = || Box::new(self.profile.layers()[range.layer as usize]);
            buffer.resize(usize::try_from(range.length()).unwrap_or(0), 0);
            let read = decoder.read_exact(&mut buffer);
            read.map_err(|cause| PackError::Stream { number, of, layer: layer(), offset, cause })?;
            if sha256(&buffer) != *digest {
                return Err(PackError::Range { number, of, layer: layer(), offset });
            }
            // One that was condemned meanwhile brings no more.
            if let Some(reader) =
                self.readers[range.layer as usize].as_ref().filter(|reader| reader.health().pack().is_some())
            {
                reader.store().write_part(offset, &buffer)?;
            }
            if let Some(reader) = &self.readers[range.layer as usize] {
                let packed = self.progress.borrow().packed;
                reader.fetching().count(0, packed - *counted);
                *counted = packed;
            }
            self.progress.send_modify(|progress| progress.unpacked += range.length());
        }
        Ok(())
    }
}

/// Counts what comes by.
struct Counted<'a, R> {
    inner: R,
    progress: &'a watch::Sender<Progress>,
}

impl<R: Read> Read for Counted<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.inner.read(buffer)?;
        self.progress.send_if_modified(|progress| {
            progress.packed += length as u64;
            false
        });
        Ok(length)
    }
}
