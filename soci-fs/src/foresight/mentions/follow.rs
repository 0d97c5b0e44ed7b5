//! Fetches what the files that a program reads name, ahead of the program.
//!
//! A task receives the files that are read, fetches their beginnings or all of them, scans them, and queues what they
//! name in front of what it has queued before: a program that imports a module reads what that one names before it
//! comes back for the next. Neighbours in a layer that are queued share a request. While a foreground read waits for
//! bytes that were not in flight, this prefetch keeps little in flight.
//!
//! Invariants: what was fetched here and is not read yet is bounded, by a credit and by what was fetched here and read,
//! whatever files say, and so is what is queued; a file is looked through once; nothing is begun for a program that is
//! quiet; nothing that goes wrong here is more than a file that is not fetched ahead; it ends with its [`Follower`].

use std::collections::{HashMap, HashSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures_util::stream::{FuturesUnordered, StreamExt as _};
use parking_lot::Mutex;
use soci_index::format::entry::{Entry, EntryKind};
use soci_index::format::index::LayerIndex;
use soci_index::format::span::SpanId;
use tokio::runtime::Handle;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::JoinHandle;

use crate::foresight::mentions::{FileAt, Mention, Names, elf, python, script};
use crate::layer::readahead::Foresight;
use crate::layer::reader::{LayerReader, Listener};

/// A file of no more compressed bytes is fetched whole when it is named: of most that are read, most is.
const WHOLE_BYTES_MAX: u64 = 1 << 20;
/// The same for a program, of which there are few: what has an interpreter.
const PROGRAM_BYTES_MAX: u64 = 4 << 20;
/// Of a larger one, so many bytes at first.
const HEAD_BYTES: u64 = 64 << 10;
/// Bytes of a file that are looked through.
const LOOK_BYTES_MAX: u64 = 1 << 20;
/// Compressed bytes of one request.
const REQUEST_BYTES_MAX: u64 = 512 << 10;
/// Jobs at a time.
const JOBS_MAX: usize = 16;
/// Compressed bytes in flight at a time are three times what the line holds, which is to be busy, and at most so many.
const FLIGHT_BYTES_MAX: u64 = 8 << 20;
/// During a foreground read of bytes that were not in flight: what the line holds, and at least this many.
const FLIGHT_BYTES_BESIDE_READS: u64 = 256 << 10;
/// How far back in the queue an adjacent span may be to share a request.
const NEIGHBOURS: usize = 128;
/// How often to look whether there is room on the line again.
const LOOK: Duration = Duration::from_millis(2);
/// Works that are queued, and that are remembered of files which were not read yet. A start-up of a thousand modules
/// has some thousands; a layer whose files all name each other, as many as there is memory.
const WORKS_MAX: usize = 1 << 15;

/// How far to run ahead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reach {
    /// Compressed bytes that may be fetched here and not be read, beside as many as were fetched here and read.
    pub credit_bytes: u64,
    /// A program that has read nothing new and waited for nothing for so long computes, or has ended: what it may read
    /// is fetched when it goes on, and the processor is left to the next program.
    pub quiet: Duration,
}

impl Default for Reach {
    /// Measured on starts of Python, numpy, scipy (docs/BENCHMARKS.md): a larger credit brings nothing, a smaller one
    /// is slower where the line is.
    fn default() -> Self {
        Self { credit_bytes: 4 << 20, quiet: Duration::from_millis(100) }
    }
}

/// A task that runs ahead of an image's readers. It ends with this value.
#[derive(Debug)]
pub struct Follower {
    task: JoinHandle<()>,
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Follower {
    /// Begins to follow what is read by `readers`, which are those of the layers that `names` was made of.
    #[must_use]
    pub fn start(names: Names, readers: Vec<LayerReader>, reach: Reach, runtime: &Handle) -> Self {
        let (sender, receiver) = unbounded_channel();
        for (layer, reader) in readers.iter().enumerate() {
            let index = Arc::clone(reader.index());
            let seen = index.entries.chunks(64).map(|_| AtomicU64::new(0)).collect();
            reader.listen(Box::new(OfLayer { layer, index, seen, sender: sender.clone() }));
        }
        let plans: Vec<_> = readers.iter().map(|reader| reader.follow_plan(Foresight::Files)).collect();
        let following = Following::new(names, readers, reach);
        Self {
            task: runtime.spawn(async move {
                let _plans = plans;
                following.run(receiver).await;
            }),
        }
    }
}

/// Reports which files of a layer are read.
#[derive(Debug)]
struct OfLayer {
    layer: usize,
    index: Arc<LayerIndex>,
    /// One bit per entry: it was reported.
    seen: Box<[AtomicU64]>,
    sender: UnboundedSender<FileAt>,
}

impl Listener for OfLayer {
    fn on_read(&self, offset: u64, _length: usize) -> bool {
        // Entries are in the order of the layer.
        let behind = self.index.entries.partition_point(|entry| entry.header_offset <= offset);
        let Some(entry) = behind.checked_sub(1) else { return true };
        let bit = 1 << (entry % 64);
        let is_new = self.seen.get(entry / 64).is_some_and(|word| word.fetch_or(bit, Ordering::Relaxed) & bit == 0);
        let entry = u32::try_from(entry).unwrap_or(u32::MAX);
        if is_new { self.sender.send(FileAt { layer: self.layer, entry }).is_ok() } else { !self.sender.is_closed() }
    }
}

/// Something to be fetched.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Work {
    /// A file, which is looked through then.
    File(FileAt),
    /// A part of a layer.
    Spans(usize, Range<SpanId>),
}

/// What is fetched by one request, and then looked through.
#[derive(Debug)]
struct Batch {
    layer: usize,
    spans: Range<SpanId>,
    files: Vec<FileAt>,
}

/// What came of one.
#[derive(Debug)]
struct Landed {
    bytes: u64,
    files: Vec<(FileAt, Looked)>,
}

/// What was found in a file.
#[derive(Debug, Default)]
struct Looked {
    mentions: Vec<Mention>,
    /// Parts of the file that will be read, as bytes of the layer.
    ranges: Vec<Range<u64>>,
}

#[derive(Debug)]
struct Following {
    names: Arc<Mutex<Names>>,
    readers: Vec<LayerReader>,
    reach: Reach,
    queue: VecDeque<Work>,
    /// What was taken from the queue.
    taken: HashSet<Work>,
    /// What files that were not read yet name.
    named: HashMap<FileAt, Vec<Work>>,
    named_works: usize,
    read: HashSet<FileAt>,
    /// When a new file was read last.
    last_read: Option<Instant>,
    in_flight: u64,
}

impl Following {
    fn new(names: Names, readers: Vec<LayerReader>, reach: Reach) -> Self {
        let (queue, taken, named, read) = (VecDeque::new(), HashSet::new(), HashMap::new(), HashSet::new());
        let (names, last_read) = (Arc::new(Mutex::new(names)), None);
        Self { names, readers, reach, queue, taken, named, named_works: 0, read, last_read, in_flight: 0 }
    }

    async fn run(mut self, mut receiver: UnboundedReceiver<FileAt>) {
        let mut jobs = FuturesUnordered::new();
        loop {
            while let Some(batch) = self.next_batch(jobs.len()) {
                let (reader, names) = (self.readers[batch.layer].clone(), Arc::clone(&self.names));
                let bytes = reader.ahead().foresee(batch.spans.clone(), Foresight::Files);
                self.in_flight += bytes;
                jobs.push(async move { Landed { bytes, files: work(&reader, &names, batch).await } });
            }
            tokio::select! {
                file = receiver.recv() => {
                    let Some(file) = file else { return };
                    self.is_read(file);
                }
                Some(landed) = jobs.next(), if !jobs.is_empty() => self.landed(landed).await,
                // Credit comes with the next file that is read; only the line has to be looked at.
                () = tokio::time::sleep(LOOK), if !self.queue.is_empty() && self.is_going_on() && self.has_credit() => {}
            }
        }
    }

    /// A program reads a file.
    fn is_read(&mut self, file: FileAt) {
        self.last_read = Some(Instant::now());
        if !self.read.insert(file) {
            return;
        }
        let named = self.named.remove(&file).unwrap_or_default();
        self.named_works -= named.len();
        for work in named.into_iter().rev() {
            self.queue_first(work);
        }
        let kind = self.entry(file).and_then(kind);
        if matches!(kind, Some(Kind::Compiled | Kind::Source)) {
            // Before what others name is looked for.
            self.names.lock().learn(file);
        }
        if kind.is_some() {
            self.queue_first(Work::File(file));
        }
    }

    fn queue_first(&mut self, work: Work) {
        if !self.taken.contains(&work) {
            self.queue.push_front(work);
            // What was queued first is the least likely by now.
            self.queue.truncate(WORKS_MAX);
        }
    }

    /// Remembers what a file names until it is read.
    fn remember(&mut self, file: FileAt, works: Vec<Work>) {
        if self.named_works + works.len() > WORKS_MAX {
            self.named.clear();
            self.named_works = 0;
        }
        self.named_works += works.len();
        if let Some(old) = self.named.insert(file, works) {
            self.named_works -= old.len();
        }
    }

    async fn landed(&mut self, landed: Landed) {
        self.in_flight -= landed.bytes;
        for (file, looked) in landed.files.into_iter().rev() {
            let (near, far) = self.found(file, looked.mentions).await;
            let index = Arc::clone(self.readers[file.layer].index());
            let parts = looked.ranges.into_iter().map(|bytes| index.spans.covering(bytes));
            let parts = parts.flat_map(|spans| pieces(&index, spans)).map(|spans| Work::Spans(file.layer, spans));
            // A loader opens all libraries first.
            let mut works: Vec<Work> = near.into_iter().map(Work::File).chain(parts).collect();
            let far = far.into_iter().map(Work::File);
            if self.read.contains(&file) {
                works.extend(far);
            } else {
                self.remember(file, works.iter().cloned().chain(far).collect());
            }
            for work in works.into_iter().rev() {
                self.queue_first(work);
            }
        }
    }

    /// The files that are meant: surely, and perhaps.
    async fn found(&self, file: FileAt, mentions: Vec<Mention>) -> (Vec<FileAt>, Vec<FileAt>) {
        if mentions.is_empty() {
            return Default::default();
        }
        let names = Arc::clone(&self.names);
        let finding = tokio::task::spawn_blocking(move || {
            let mut names = names.lock();
            let (mut seen, mut found) = (HashSet::new(), (Vec::new(), Vec::new()));
            for mention in &mentions {
                let meant = names.find(file, mention);
                let files = meant.files.into_iter().filter(|file| seen.insert(*file));
                if meant.is_far { found.1.extend(files) } else { found.0.extend(files) }
            }
            found
        });
        finding.await.unwrap_or_default()
    }

    fn entry(&self, file: FileAt) -> Option<&Entry> {
        self.readers.get(file.layer)?.index().entries.get(file.entry as usize)
    }

    /// What to fetch next, if there is room for it.
    fn next_batch(&mut self, jobs: usize) -> Option<Batch> {
        let is_waited_for = self.readers.iter().any(|reader| reader.waits().any_unforeseen());
        let line = self.readers.iter().map(|reader| reader.fetching().line().bytes_per_round_trip()).max().unwrap_or(0);
        let limit = if is_waited_for {
            line.clamp(FLIGHT_BYTES_BESIDE_READS, FLIGHT_BYTES_MAX)
        } else {
            line.saturating_mul(3).clamp(2 * FLIGHT_BYTES_BESIDE_READS, FLIGHT_BYTES_MAX)
        };
        if jobs >= JOBS_MAX || self.in_flight >= limit || !self.is_going_on() || !self.has_credit() {
            return None;
        }
        loop {
            let work = self.queue.pop_front()?;
            if !self.taken.insert(work.clone()) {
                continue;
            }
            let Some((layer, spans)) = self.spans(&work) else { continue };
            let mut batch = Batch { layer, spans, files: Vec::new() };
            batch.files.extend(file_of(&work));
            self.add_neighbours(&mut batch);
            return Some(batch);
        }
    }

    /// Whether a program has read something new or waited for something just now.
    fn is_going_on(&self) -> bool {
        let has_read = self.last_read.is_some_and(|last_read| last_read.elapsed() < self.reach.quiet);
        has_read || self.readers.iter().any(|reader| reader.waits().any_within(self.reach.quiet))
    }

    /// Whether what was fetched here and is not read yet leaves room for more.
    fn has_credit(&self) -> bool {
        let foreseen = self.readers.iter().map(|reader| reader.ahead().foreseen_bytes());
        let (read, unread) = foreseen.fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
        unread <= self.reach.credit_bytes + read
    }

    /// The spans of a layer that something needs.
    fn spans(&self, work: &Work) -> Option<(usize, Range<SpanId>)> {
        match work {
            Work::Spans(layer, spans) => Some((*layer, spans.clone())),
            Work::File(file) => {
                let (entry, index) = (self.entry(*file)?, self.readers.get(file.layer)?.index());
                if entry.kind != EntryKind::Regular {
                    return None;
                }
                let end = entry.data_offset.saturating_add(entry.size);
                let all = index.spans.covering(entry.header_offset..end);
                let head = entry.header_offset..end.min(entry.data_offset.saturating_add(HEAD_BYTES));
                // Of a program a few places are looked at, before the rest is fetched.
                let is_whole = kind(entry) != Some(Kind::Program) && compressed(index, &all) <= WHOLE_BYTES_MAX;
                Some((file.layer, if is_whole { all } else { index.spans.covering(head) }))
            }
        }
    }

    /// Adds what is queued and lies in the same spans, or in those that follow.
    fn add_neighbours(&mut self, batch: &mut Batch) {
        let index = Arc::clone(self.readers[batch.layer].index());
        for place in 0..self.queue.len().min(NEIGHBOURS) {
            let Some(work) = self.queue.get(place).filter(|work| !self.taken.contains(*work)) else { continue };
            let Some((layer, spans)) = self.spans(work) else { continue };
            let joined = batch.spans.start..batch.spans.end.max(spans.end);
            let is_near = layer == batch.layer && batch.spans.start <= spans.start && spans.start <= batch.spans.end;
            if is_near && compressed(&index, &joined) <= REQUEST_BYTES_MAX {
                let work = work.clone();
                batch.spans = joined;
                batch.files.extend(file_of(&work));
                self.taken.insert(work);
            }
        }
    }
}

const fn file_of(work: &Work) -> Option<FileAt> {
    match work {
        Work::File(file) => Some(*file),
        Work::Spans(..) => None,
    }
}

/// Runs of spans of about the size of a request.
fn pieces(index: &LayerIndex, spans: Range<SpanId>) -> Vec<Range<SpanId>> {
    let mut pieces: Vec<Range<SpanId>> = Vec::new();
    for span in spans {
        match pieces.last_mut() {
            Some(piece) if compressed(index, &(piece.start..span + 1)) <= REQUEST_BYTES_MAX => piece.end = span + 1,
            _ => pieces.push(span..span + 1),
        }
    }
    pieces
}

fn compressed(index: &LayerIndex, spans: &Range<SpanId>) -> u64 {
    let first = index.spans.span(spans.start).map_or(0, |span| span.compressed.start);
    let last = spans.end.checked_sub(1).and_then(|last| index.spans.span(last));
    last.map_or(0, |span| span.compressed.end.saturating_sub(first))
}

/// What names are looked for in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Program,
    Compiled,
    Source,
}

fn kind(entry: &Entry) -> Option<Kind> {
    let name = &entry.name;
    if entry.kind != EntryKind::Regular {
        None
    } else if name.ends_with(b".pyc") {
        Some(Kind::Compiled)
    } else if name.ends_with(b".py") {
        Some(Kind::Source)
    } else {
        let is_library = name.windows(3).any(|part| part == b".so");
        (is_library || entry.permissions() & 0o111 != 0).then_some(Kind::Program)
    }
}

/// Fetches a batch and looks through its files.
async fn work(reader: &LayerReader, names: &Arc<Mutex<Names>>, batch: Batch) -> Vec<(FileAt, Looked)> {
    if let Err(error) = reader.fetching().fetch_spans(batch.spans).await {
        tracing::debug!(%error, "a file that another one names is not fetched ahead");
        return Vec::new();
    }
    let mut files = Vec::new();
    for file in batch.files {
        let entry = {
            let names = names.lock();
            names.entry(file).map(|entry| (kind(entry), entry.data_offset, entry.size))
        };
        let Some((Some(kind), offset, size)) = entry else { continue };
        let looked = match kind {
            Kind::Program => program(reader, offset, size).await,
            Kind::Compiled | Kind::Source => {
                let bytes = reader.peek(offset..offset + size.min(LOOK_BYTES_MAX)).await;
                let look = move |bytes: Vec<u8>| {
                    let mentions =
                        if kind == Kind::Compiled { python::compiled(&bytes) } else { python::source(&bytes) };
                    Looked { mentions, ranges: Vec::new() }
                };
                match bytes {
                    Some(bytes) => tokio::task::spawn_blocking(move || look(bytes)).await.unwrap_or_default(),
                    None => Looked::default(),
                }
            }
        };
        files.push((file, looked));
    }
    files
}

/// What an executable, a library or a script names.
async fn program(reader: &LayerReader, offset: u64, size: u64) -> Looked {
    let (mut machine, mut step) = elf::Elf::new();
    let mut is_first = true;
    loop {
        match step {
            elf::Step::Read(range) => {
                let range = range.start.min(size)..range.end.min(size);
                let bytes = reader.peek(offset + range.start..offset + range.end).await;
                let Some(bytes) = bytes else { return Looked::default() };
                if let Some(interpreter) = script(&bytes).filter(|_| is_first) {
                    return Looked { mentions: vec![interpreter], ranges: Vec::new() };
                }
                is_first = false;
                step = machine.step(&bytes);
            }
            elf::Step::Done(found) => {
                let within = |range: Range<u64>| offset + range.start.min(size)..offset + range.end.min(size);
                let index = reader.index();
                let is_program = found.mentions.iter().any(|mention| matches!(mention, Mention::Path(_)));
                let whole_bytes_max = if is_program { PROGRAM_BYTES_MAX } else { WHOLE_BYTES_MAX };
                let is_small = compressed(index, &index.spans.covering(offset..offset + size)) <= whole_bytes_max;
                // What a loader reads for sure comes first.
                let whole = is_small.then_some(0..size);
                let ranges = found.ranges.into_iter().chain(whole).map(within).filter(|range| !range.is_empty());
                return Looked { mentions: found.mentions, ranges: ranges.collect() };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever files name, what is queued and remembered is bounded, and the newest is kept.
    #[test]
    fn works_are_bounded() {
        let mut following = Following::new(Names::of_layers(Vec::new()), Vec::new(), Reach::default());
        let file = |entry| FileAt { layer: 0, entry };
        let count = u32::try_from(WORKS_MAX).unwrap();
        for entry in 0..count + 10 {
            following.queue_first(Work::File(file(entry)));
        }
        assert_eq!(following.queue.len(), WORKS_MAX);
        assert_eq!(following.queue.front(), Some(&Work::File(file(count + 9))));
        for entry in 0..100 {
            following.remember(file(entry), vec![Work::File(file(0)); 1000]);
            let remembered: usize = following.named.values().map(Vec::len).sum();
            assert!(remembered == following.named_works && remembered <= WORKS_MAX, "{remembered}");
        }
        // What is remembered of a file goes when it is read.
        let before = following.named_works;
        following.is_read(file(99));
        assert_eq!(following.named_works, before - 1000);
    }
}
