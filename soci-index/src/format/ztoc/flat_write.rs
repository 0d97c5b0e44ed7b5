//! Writing the zTOC flatbuffer, byte for byte as the Go runtime of AWS's tools does.
//!
//! That runtime builds a file from its end to its start, never shares texts, and shares a table's layout ("vtable")
//! with any earlier one that has the same field positions. No Rust library does all three, so this is done by hand; the
//! order in which parts are written decides every offset. See [`crate::format::layout`] for the rules.
//!
//! The checkpoints are not written here: the writer steps over their place, and [`Encoded`] puts them in.

use std::collections::HashMap;

use crate::format::entry::{Entry, PaxRecord};
use crate::format::ztoc::{Encoded, Spans, Ztoc, rfc3339, zinfo};

/// Why a zTOC cannot be written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// A sparse file: the format knows only files that lie in one piece.
    #[error("the sparse file {name:?} cannot be represented in a zTOC")]
    Sparse { name: String },
    /// The file would be larger than a flatbuffer can be.
    #[error("the zTOC would be larger than {limit} bytes")]
    TooLarge { limit: u64 },
}

/// Largest file that the Go runtime reads.
const BYTES_MAX: u64 = 1 << 31;

pub(super) fn encode(ztoc: &Ztoc) -> Result<Encoded, EncodeError> {
    let too_large = || EncodeError::TooLarge { limit: BYTES_MAX };
    if let Some(entry) = ztoc.entries.iter().find(|entry| entry.sparse().is_some()) {
        return Err(EncodeError::Sparse { name: String::from_utf8_lossy(&entry.name).into_owned() });
    }
    let mut writer = Writer::default();
    let version = writer.text(ztoc.version.as_bytes());
    let tool = writer.text(ztoc.build_tool.as_bytes());
    let files: Vec<u32> = ztoc.entries.iter().rev().map(|entry| file(&mut writer, entry)).collect();
    // Written last to first; the vector runs first to last.
    let files: Vec<u32> = files.into_iter().rev().collect();
    let metadata = writer.offsets(&files);
    let toc = writer.table(&[(0, Field::Offset(metadata))]);

    let pieces = match &ztoc.spans {
        Spans::Gzip { span_bytes, checkpoints, first_implied } => {
            zinfo::Pieces::gzip(*span_bytes, checkpoints, *first_implied).ok_or_else(too_large)?
        }
        Spans::Plain { span_bytes, size } => zinfo::Pieces::Plain(plain(*span_bytes, *size)),
    };
    if writer.length() as u64 + pieces.len() as u64 + 128 * ztoc.digests.len() as u64 + 1024 > BYTES_MAX {
        return Err(too_large());
    }
    let checkpoints = writer.gap(pieces.len());
    let digests: Vec<u32> =
        ztoc.digests.iter().map(|digest| writer.text(digest_text(digest.as_ref()).as_bytes())).collect();
    let digests = writer.offsets(&digests);
    let algorithm = if matches!(ztoc.spans, Spans::Gzip { .. }) { None } else { Some(2u8) };
    let mut fields =
        vec![(1, Field::I32(ztoc.max_span_id)), (2, Field::Offset(digests)), (3, Field::Offset(checkpoints))];
    fields.extend(algorithm.map(|algorithm| (0, Field::U8(algorithm))));
    let info = writer.table(&fields);
    let root = writer.table(&[
        (0, Field::Offset(version)),
        (1, Field::Offset(tool)),
        (4, Field::Offset(toc)),
        (2, Field::I64(ztoc.compressed_size)),
        (3, Field::I64(ztoc.uncompressed_size)),
        (5, Field::Offset(info)),
    ]);
    let (before, after) = writer.finish(root);
    Ok(Encoded { before: before.into(), checkpoints: pieces, after: after.into() })
}

fn digest_text(digest: Option<&[u8; 32]>) -> String {
    digest.map_or_else(String::new, |digest| crate::format::digest::Digest::from_sha256(*digest).to_string())
}

fn file(writer: &mut Writer, entry: &Entry) -> u32 {
    let name = writer.text(&entry.name);
    let kind = writer.text(crate::format::ztoc::kind_name(entry.kind).as_bytes());
    let link = writer.text(&entry.link);
    let user = writer.text(&entry.user_name);
    let group = writer.text(&entry.group_name);
    let time = writer.text(entry.modified.map(rfc3339::format).unwrap_or_default().as_bytes());
    let record = |record: &PaxRecord| {
        let (key, value) = (writer.text(&record.key), writer.text(&record.value));
        writer.table(&[(0, Field::Offset(key)), (1, Field::Offset(value))])
    };
    let records: Vec<u32> = entry.pax().iter().map(record).collect();
    let records = writer.offsets(&records);
    let (major, minor) = entry.device();
    writer.table(&[
        (0, Field::Offset(name)),
        (1, Field::Offset(kind)),
        (2, Field::I64(entry.data_offset.cast_signed())),
        (3, Field::I64(entry.size.cast_signed())),
        (4, Field::Offset(link)),
        (5, Field::I64(entry.mode)),
        (6, Field::U32(entry.uid)),
        (7, Field::U32(entry.gid)),
        (8, Field::Offset(user)),
        (9, Field::Offset(group)),
        (10, Field::Offset(time)),
        (11, Field::I64(major)),
        (12, Field::I64(minor)),
        (13, Field::Offset(records)),
    ])
}

/// The checkpoint blob of a plain tar is a flatbuffer of its own.
fn plain(span_bytes: i64, size: i64) -> Vec<u8> {
    let mut writer = Writer::default();
    let root = writer.table(&[(0, Field::I32(2)), (1, Field::I64(span_bytes)), (2, Field::I64(size))]);
    writer.finish(root).1
}

/// A field of a table. Numbers equal to 0 and fields that are not added are left out.
#[derive(Debug, Clone, Copy)]
enum Field {
    Offset(u32),
    I64(i64),
    I32(i32),
    U32(u32),
    U8(u8),
}

/// A file that grows from its end to its start. Kept reversed: the last byte of the file comes first. All offsets are
/// counted from the end of the file, as the Go runtime counts them.
#[derive(Debug, Default)]
struct Writer {
    reversed: Vec<u8>,
    /// Length of `reversed` when the gap was made, and how long the gap is: bytes that are counted but not held.
    gap: Option<(usize, usize)>,
    alignment: usize,
    /// Field positions of each layout so far -> where it stands.
    layouts: HashMap<Vec<u16>, u32>,
}

impl Writer {
    fn length(&self) -> usize {
        self.reversed.len() + self.gap.map_or(0, |(_, length)| length)
    }

    /// Where the writer stands. Files above 2 GiB are refused before they are written.
    fn here(&self) -> u32 {
        self.length() as u32
    }

    fn put(&mut self, bytes: &[u8]) {
        self.reversed.extend(bytes.iter().rev());
    }

    /// Pads so that, after `extra` more bytes, a value of `size` bytes is aligned.
    fn align(&mut self, size: usize, extra: usize) {
        self.alignment = self.alignment.max(size);
        let padding = (self.length() + extra).wrapping_neg() % size;
        self.reversed.resize(self.reversed.len() + padding, 0);
    }

    fn text(&mut self, text: &[u8]) -> u32 {
        self.align(4, text.len() + 1);
        self.put(&[0]);
        self.put(text);
        self.number(text.len());
        self.here()
    }

    fn number(&mut self, number: usize) {
        self.put(&(number as u32).to_le_bytes());
    }

    /// Leaves room for a byte vector.
    fn gap(&mut self, length: usize) -> u32 {
        self.align(4, length);
        assert!(self.gap.is_none(), "one gap is enough");
        self.gap = Some((self.reversed.len(), length));
        self.number(length);
        self.here()
    }

    fn offsets(&mut self, targets: &[u32]) -> u32 {
        self.align(4, 4 * targets.len());
        for target in targets.iter().rev() {
            self.offset(*target);
        }
        self.number(targets.len());
        self.here()
    }

    fn offset(&mut self, target: u32) {
        self.align(4, 0);
        let distance = self.here() - target + 4;
        self.put(&distance.to_le_bytes());
    }

    fn table(&mut self, fields: &[(usize, Field)]) -> u32 {
        let end = self.here();
        let mut slots: Vec<u32> = Vec::with_capacity(14);
        for (slot, field) in fields {
            if self.field(*field) {
                if slots.len() <= *slot {
                    slots.resize(slot + 1, 0);
                }
                slots[*slot] = self.here();
            }
        }
        self.align(4, 0);
        self.put(&[0; 4]);
        let object = self.here();
        // Tables have a few hundred bytes at the most.
        let positions: Vec<u16> =
            slots.iter().map(|slot| if *slot == 0 { 0 } else { (object - slot) as u16 }).collect();
        let layout = match self.layouts.get(&positions) {
            Some(layout) => *layout,
            None => self.layout(positions, object - end),
        };
        // A signed distance from the table back to its layout.
        let distance = layout.cast_signed() - object.cast_signed();
        let at = self.reversed.len() - (self.here() - object) as usize;
        for (index, byte) in distance.to_le_bytes().iter().enumerate() {
            self.reversed[at - 1 - index] = *byte;
        }
        object
    }

    /// Writes a number unless it is 0; says whether it did.
    fn field(&mut self, field: Field) -> bool {
        match field {
            Field::Offset(target) => self.offset(target),
            Field::I64(0) | Field::I32(0) | Field::U32(0) | Field::U8(0) => return false,
            Field::I64(number) => self.scalar(&number.to_le_bytes()),
            Field::I32(number) => self.scalar(&number.to_le_bytes()),
            Field::U32(number) => self.scalar(&number.to_le_bytes()),
            Field::U8(number) => self.scalar(&[number]),
        }
        true
    }

    fn scalar(&mut self, bytes: &[u8]) {
        self.align(bytes.len(), 0);
        self.put(bytes);
    }

    fn layout(&mut self, positions: Vec<u16>, object_bytes: u32) -> u32 {
        for position in positions.iter().rev() {
            self.align(2, 0);
            self.put(&position.to_le_bytes());
        }
        self.align(2, 0);
        self.put(&(object_bytes as u16).to_le_bytes());
        self.align(2, 0);
        self.put(&(2 * (positions.len() + 2) as u16).to_le_bytes());
        let here = self.here();
        self.layouts.insert(positions, here);
        here
    }

    /// The bytes before the gap and those behind it; without a gap all are behind it.
    fn finish(mut self, root: u32) -> (Vec<u8>, Vec<u8>) {
        self.align(self.alignment, 4);
        self.offset(root);
        let split = self.gap.map_or(self.reversed.len(), |(at, _)| at);
        let mut before = self.reversed.split_off(split);
        before.reverse();
        self.reversed.reverse();
        (before, self.reversed)
    }
}
