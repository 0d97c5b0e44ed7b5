//! The files of one layer: reading what is present, writing what was fetched, punching out what must go.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::RwLock;
use rustix::fs::{FallocateFlags, fallocate};
use soci_index::format::index::LayerIndex;
use soci_index::format::span::SpanId;

use crate::layer::store::claim::Claim;
use crate::layer::store::error::{StoreError, io_error};
use crate::layer::store::partial::{PACKED, Partial, Parts};
use crate::layer::store::present::{BootId, Checksum, Header, load};
use crate::layer::store::proven;
use crate::layer::store::record::{self, Record};

mod parts;
mod proof;

/// How a read of the store went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reading {
    /// The buffer is filled.
    Done,
    /// This span is needed and not there.
    Absent(SpanId),
}

/// What the layers of a store have in common.
#[derive(Debug)]
pub(super) struct Common {
    pub(super) root: PathBuf,
    /// Counts uses, for eviction of what was not used for longest.
    pub(super) ticks: AtomicU32,
    pub(super) removals: AtomicU64,
    pub(super) written: AtomicU64,
    pub(super) proven: proven::Proven,
}

/// One claim's part of the store.
#[derive(Debug)]
pub struct LayerStore {
    claim: Claim,
    directory: PathBuf,
    pub(super) data: File,
    present: File,
    pub(super) header: Header,
    /// Set once the claim is proven.
    pub(super) proof: OnceLock<proven::OpenProof>,
    pinned: AtomicBool,
    /// Whether a file system in the kernel reads `data` by itself.
    lent: AtomicBool,
    /// Where each span ends in the uncompressed layer; it begins where the one before ends.
    ends: Box<[u64]>,
    checksums: Box<[AtomicU64]>,
    used: Box<[AtomicU32]>,
    pub(super) present_bytes: AtomicU64,
    /// Pages of spans that are not present.
    pub(super) partial: Partial,
    /// Which of these spans a pack has filled; for claims with a pack.
    pub(super) packed: Option<File>,
    /// Counts evictions: a read that saw it change saw, perhaps, a hole.
    generation: AtomicU64,
    /// Shared by writers of spans, exclusive for eviction, so that no span is written into a range being punched out.
    /// Held only over local file calls.
    pub(super) writing: RwLock<()>,
    pub(super) common: Arc<Common>,
}

impl LayerStore {
    pub(super) fn open(
        directory: &Path,
        claim: &Claim,
        index: &LayerIndex,
        fingerprint: u64,
        boot: BootId,
        common: Arc<Common>,
    ) -> Result<Self, StoreError> {
        let open = |name| {
            let path = directory.join(name);
            let options = File::options().read(true).write(true).create(true).truncate(false).clone();
            options.open(&path).map_err(io_error("open", &path))
        };
        let (data, present) = (open("data")?, open("present")?);
        let packed = claim.pack.map(|_| open(PACKED)).transpose()?;
        let ends: Box<[u64]> = index.spans.spans().iter().map(|span| span.uncompressed.end).collect();
        let size = ends.last().copied().unwrap_or(0);
        let data_path = directory.join("data");
        if data.metadata().map_err(io_error("examine", &data_path))?.len() < size {
            data.set_len(size).map_err(io_error("extend", &data_path))?;
        }
        #[expect(clippy::cast_possible_truncation, reason = "Limits::spans_max is far below 2^32")]
        let header = Header { spans: index.spans.len() as u32, fingerprint, boot };
        let stored = load(&present, &header).map_err(io_error("read", &directory.join("present")))?;
        let proof = proven::open(directory, header.spans).map(OnceLock::from).unwrap_or_default();
        let layer = Self {
            claim: *claim,
            directory: directory.to_owned(),
            data,
            present,
            header,
            proof,
            pinned: AtomicBool::new(false),
            lent: AtomicBool::new(false),
            used: ends.iter().map(|_| AtomicU32::new(0)).collect(),
            present_bytes: AtomicU64::new(0),
            checksums: stored.into_iter().map(|checksum| AtomicU64::new(checksum.0)).collect(),
            ends,
            partial: Partial::default(),
            packed,
            generation: AtomicU64::new(0),
            writing: RwLock::new(()),
            common,
        };
        let present: u64 =
            (0..header.spans).filter(|span| layer.is_present(*span)).map(|span| layer.length(span)).sum();
        layer.present_bytes.store(present, Ordering::Relaxed);
        layer.restore_packed()?;
        Ok(layer)
    }

    /// What is claimed of the layer.
    #[must_use]
    pub const fn claim(&self) -> &Claim {
        &self.claim
    }

    /// What its directory says of the layer.
    #[must_use]
    pub fn record(&self) -> Option<Record> {
        record::read(&self.directory)
    }

    /// Where the layer's files are.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Size of the uncompressed layer as far as it is indexed.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.ends.last().copied().unwrap_or(0)
    }

    /// Number of spans.
    #[must_use]
    pub const fn spans(&self) -> u32 {
        self.header.spans
    }

    /// How many bytes of the layer are present.
    #[must_use]
    pub fn present_bytes(&self) -> u64 {
        self.present_bytes.load(Ordering::Relaxed)
    }

    #[must_use]
    pub fn present_spans(&self) -> u32 {
        (0..self.spans()).map(|span| u32::from(self.is_present(span))).sum()
    }

    /// Whether every span is present.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        (0..self.spans()).all(|span| self.is_present(span))
    }

    /// Whether the span is present, as far as is known without reading it.
    #[must_use]
    pub fn is_present(&self, span: SpanId) -> bool {
        !self.checksum(span).is_absent()
    }

    /// Fills `buffer` with the bytes of the uncompressed layer from `offset` on, which lie inside it.
    ///
    /// Never waits for anything but the local disk. A span whose checksum turns out wrong counts as absent from then
    /// on.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<Reading, StoreError> {
        loop {
            let generation = self.generation.load(Ordering::Acquire);
            if let Some(absent) = self.first_absent(offset..offset + buffer.len() as u64)? {
                return Ok(Reading::Absent(absent));
            }
            self.data.read_exact_at(buffer, offset).map_err(self.failed("read", "data"))?;
            if self.generation.load(Ordering::Acquire) == generation {
                return Ok(Reading::Done);
            }
        }
    }

    /// Stores a span's bytes, which were checked against the index. Says whether pages of it that a pack has brought
    /// were the same.
    ///
    /// # Errors
    /// [`StoreError::Io`], [`StoreError::Length`], [`StoreError::Unproven`].
    pub fn write(&self, span: SpanId, bytes: &[u8]) -> Result<Parts, StoreError> {
        let place = self.place(span);
        if place.end - place.start != bytes.len() as u64 {
            let (expected, found) = (place.end - place.start, bytes.len() as u64);
            return Err(StoreError::Length { span, expected, found });
        }
        if !self.agrees(span, bytes)? {
            return Err(StoreError::Unproven { layer: self.claim.layer, span });
        }
        let _shared = self.writing.read();
        let _filling = self.partial.filling();
        if self.is_present(span) && self.checksum(span).matches(bytes) && self.checksum(span).is_fresh() {
            return Ok(Parts::Agree);
        }
        let parts = self.compare_parts(span, &place, bytes)?;
        self.data.write_all_at(bytes, place.start).map_err(self.failed("write", "data"))?;
        let was_absent = self.set(span, Checksum::of(bytes))?.is_absent();
        if was_absent {
            self.present_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        }
        self.partial.forget(span);
        self.note_packed(span, Checksum::ABSENT)?;
        self.common.written.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        self.touch(span);
        Ok(parts)
    }

    /// Records that a span is used now.
    pub(super) fn touch(&self, span: SpanId) {
        let now = self.common.ticks.fetch_add(1, Ordering::Relaxed);
        if let Some(used) = self.used.get(span as usize) {
            used.store(now, Ordering::Relaxed);
        }
    }

    /// Gives the span's space back. Readers that are on it notice and see it as absent.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn evict(&self, span: SpanId) -> Result<(), StoreError> {
        let place = self.place(span);
        let _exclusive = self.writing.write();
        let had_parts = self.partial.forget(span);
        // Before the hole: what is recorded as filled is believed in this boot.
        self.note_packed(span, Checksum::ABSENT)?;
        match self.set(span, Checksum::ABSENT)?.is_absent() {
            true if !had_parts => return Ok(()),
            true => {}
            false => {
                self.present_bytes.fetch_sub(place.end - place.start, Ordering::Relaxed);
            }
        }
        // After the record and before the hole: a reader that sees zeros finds the count changed.
        self.generation.fetch_add(1, Ordering::AcqRel);
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&self.data, flags, place.start, place.end - place.start)
            .map_err(|errno| self.failed("punch a hole into", "data")(errno.into()))
    }

    /// Forgets a span that cannot be read back, so that it is fetched again. The disk may be broken, so nothing is
    /// written to the file.
    pub fn distrust(&self, span: SpanId) {
        let Some(value) = self.checksums.get(span as usize) else {
            return;
        };
        self.partial.forget(span);
        // A record that stays is compared with the disk in the next boot, or names bytes that are there.
        let _ = self.note_packed(span, Checksum::ABSENT);
        if !Checksum(value.swap(Checksum::ABSENT.0, Ordering::AcqRel)).is_absent() {
            self.present_bytes.fetch_sub(self.length(span), Ordering::Relaxed);
        }
    }

    /// Publishes all spans at once, after the whole of `data` was written and verified.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn adopt(&self) -> Result<(), StoreError> {
        let _shared = self.writing.read();
        let mut bytes = Vec::new();
        for span in 0..self.spans() {
            let place = self.place(span);
            bytes.resize(usize::try_from(place.end - place.start).unwrap_or(0), 0);
            self.data.read_exact_at(&mut bytes, place.start).map_err(self.failed("read", "data"))?;
            if self.set(span, Checksum::of(&bytes))?.is_absent() {
                self.present_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            }
            self.touch(span);
        }
        Ok(())
    }

    /// Keeps evictions away from the layer: its bytes could not be fetched again span by span.
    pub fn pin(&self) {
        self.pinned.store(true, Ordering::Relaxed);
    }

    /// Lets evictions have the layer again.
    pub fn unpin(&self) {
        self.pinned.store(false, Ordering::Relaxed);
    }

    /// Whether evictions pass the layer by.
    #[must_use]
    pub fn is_pinned(&self) -> bool {
        self.pinned.load(Ordering::Relaxed)
    }

    /// The file with all of the layer, for a file system in the kernel that reads it without this process. `None` unless
    /// every span is there and was written or compared since this machine started, and the layer is proven. From now on
    /// no span of it is evicted, for as long as the store is open.
    pub(crate) fn lend(&self) -> Option<PathBuf> {
        let is_fresh = |span| self.checksum(span).is_fresh();
        if !self.is_proven() || !(0..self.spans()).all(is_fresh) {
            return None;
        }
        self.lent.store(true, Ordering::Relaxed);
        Some(self.directory.join("data"))
    }

    pub(super) fn is_lent(&self) -> bool {
        self.lent.load(Ordering::Relaxed)
    }

    pub(super) const fn fingerprint(&self) -> u64 {
        self.header.fingerprint
    }

    /// When the span was used last, by the store's clock.
    pub(super) fn last_used(&self, span: SpanId) -> u32 {
        self.used[span as usize].load(Ordering::Relaxed)
    }

    pub(super) fn length(&self, span: SpanId) -> u64 {
        let place = self.place(span);
        place.end - place.start
    }

    /// The first span of the range that is not there. Compares the checksums of those that were written in another
    /// boot.
    fn first_absent(&self, range: Range<u64>) -> Result<Option<SpanId>, StoreError> {
        if range.is_empty() {
            return Ok(None);
        }
        let now = self.common.ticks.fetch_add(1, Ordering::Relaxed);
        let first = self.ends.partition_point(|end| *end <= range.start);
        let last = self.ends.partition_point(|end| *end < range.end);
        for index in first..=last {
            #[expect(clippy::cast_possible_truncation, reason = "below the number of spans")]
            let span = index as SpanId;
            let checksum = self.checksum(span);
            if !checksum.is_fresh() && !self.refresh(span, checksum)? && !self.has_part(span, &range) {
                return Ok(Some(span));
            }
            self.used[index].store(now, Ordering::Relaxed);
        }
        Ok(None)
    }

    /// Whether that of a range which lies in an absent span is there nevertheless.
    fn has_part(&self, span: SpanId, range: &Range<u64>) -> bool {
        let place = self.place(span);
        self.partial.has(span, &(range.start.max(place.start)..range.end.min(place.end)))
    }

    /// The span that holds a byte, and its place.
    pub(super) fn span_at(&self, offset: u64) -> Option<(SpanId, Range<u64>)> {
        let index = self.ends.partition_point(|end| *end <= offset);
        let span = SpanId::try_from(index).ok().filter(|span| *span < self.spans())?;
        Some((span, self.place(span)))
    }

    /// Compares a span with its checksum; a span that does not match is absent from now on.
    fn refresh(&self, span: SpanId, checksum: Checksum) -> Result<bool, StoreError> {
        if checksum.is_absent() {
            return Ok(false);
        }
        let place = self.place(span);
        let Ok(length) = usize::try_from(place.end - place.start) else {
            return Ok(false);
        };
        // As a writer: the span must not be punched out while it is compared.
        let _shared = self.writing.read();
        let mut bytes = vec![0; length];
        match self.data.read_exact_at(&mut bytes, place.start) {
            Ok(()) => {}
            // The disk lost it. That is what the checksums are for.
            Err(cause) => {
                tracing::warn!(directory = %self.directory.display(), span, %cause, "a stored span cannot be read back");
                bytes.clear();
            }
        }
        if checksum.matches(&bytes) {
            self.exchange(span, checksum, checksum.fresh());
            return Ok(true);
        }
        tracing::warn!(directory = %self.directory.display(), span, "a stored span was damaged; it will be fetched again");
        if self.exchange(span, checksum, Checksum::ABSENT) {
            self.present_bytes.fetch_sub(place.end - place.start, Ordering::Relaxed);
        }
        Ok(false)
    }

    pub(super) fn place(&self, span: SpanId) -> Range<u64> {
        let index = span as usize;
        let end = self.ends.get(index).copied().unwrap_or(self.size());
        let start = index.checked_sub(1).map_or(0, |before| self.ends.get(before).copied().unwrap_or(end));
        start..end
    }

    fn checksum(&self, span: SpanId) -> Checksum {
        self.checksums.get(span as usize).map_or(Checksum::ABSENT, |value| Checksum(value.load(Ordering::Acquire)))
    }

    /// Records a span in memory and in the file, and gives the record it replaces.
    pub(super) fn set(&self, span: SpanId, checksum: Checksum) -> Result<Checksum, StoreError> {
        let Some(value) = self.checksums.get(span as usize) else {
            return Ok(Checksum::ABSENT);
        };
        self.present
            .write_all_at(&checksum.0.to_le_bytes(), Checksum::position(span))
            .map_err(self.failed("write", "present"))?;
        Ok(Checksum(value.swap(checksum.0, Ordering::AcqRel)))
    }

    /// Changes a record unless it was changed concurrently. What the file misses is only compared once more.
    fn exchange(&self, span: SpanId, from: Checksum, to: Checksum) -> bool {
        let Some(value) = self.checksums.get(span as usize) else {
            return false;
        };
        let changed = value.compare_exchange(from.0, to.0, Ordering::AcqRel, Ordering::Acquire).is_ok();
        if changed && let Err(cause) = self.present.write_all_at(&to.0.to_le_bytes(), Checksum::position(span)) {
            tracing::warn!(directory = %self.directory.display(), span, %cause, "cannot record a span");
        }
        changed
    }

    pub(super) fn failed(&self, operation: &'static str, name: &str) -> impl FnOnce(io::Error) -> StoreError + use<> {
        let path = self.directory.join(name);
        move |cause| StoreError::Io { operation, path, cause: Arc::new(cause) }
    }
}
