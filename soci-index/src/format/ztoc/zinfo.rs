//! The checkpoint blob inside a zTOC ("zinfo"): fixed-size records for gzip, a tiny flatbuffer for plain tar.
//!
//! gzip, little-endian: `i32 count`, `i64 span size`, then per checkpoint `i64 in`, `i64 out`, `u8 bits`, 32,768 bytes
//! of window. An older layout leaves the first checkpoint out; the two are distinguished by their length alone.

use bytes::{BufMut, Bytes, BytesMut};
use planus::table_reader::Table;
use planus::{SliceWithStartOffset, TableRead};

use crate::format::checkpoint::{Checkpoint, WINDOW_BYTES, Window};
use crate::format::limits::Limits;
use crate::format::ztoc::{Spans, ZtocError};

const HEADER: usize = 12;
const RECORD: usize = 17 + WINDOW_BYTES;

/// A checkpoint that the older layout leaves out: behind a gzip header of ten bytes.
const IMPLIED: Checkpoint = Checkpoint { compressed: 10, uncompressed: 0, bits: 0, window: Window::EMPTY };

/// Reads the blob of a gzip layer.
pub(super) fn decode_gzip(blob: &Bytes, limits: &Limits) -> Result<Spans, ZtocError> {
    let bytes = blob.len();
    let error = |what| ZtocError::Checkpoints { what, bytes };
    let (Some(count), Some(span_bytes)) = (blob.first_chunk::<4>(), blob.get(4..).and_then(<[u8]>::first_chunk::<8>))
    else {
        return Err(error("shorter than their header"));
    };
    let count = usize::try_from(i32::from_le_bytes(*count)).map_err(|_| error("their count is negative"))?;
    if count == 0 {
        return Err(error("their count is 0"));
    }
    if count > limits.spans_max {
        return Err(ZtocError::Limit { limit: "spans_max", cap: limits.spans_max as u64 });
    }
    let records = bytes - HEADER;
    let first_implied = records == (count - 1) * RECORD;
    if !first_implied && records != count * RECORD {
        return Err(error("their length does not fit their count"));
    }
    let mut checkpoints = Vec::with_capacity(count);
    if first_implied {
        checkpoints.push(IMPLIED);
    }
    for start in (HEADER..bytes).step_by(RECORD) {
        checkpoints.push(record(blob, start).ok_or_else(|| error("an offset is negative"))?);
    }
    Ok(Spans::Gzip { span_bytes: i64::from_le_bytes(*span_bytes), checkpoints, first_implied })
}

/// The record that begins at `start`; `None` when one of its offsets is negative.
fn record(blob: &Bytes, start: usize) -> Option<Checkpoint> {
    let number = |at: usize| {
        let field = blob.get(start + at..)?.first_chunk::<8>()?;
        u64::try_from(i64::from_le_bytes(*field)).ok()
    };
    let window = blob.slice(start + 17..start + RECORD);
    let zero = window.iter().all(|byte| *byte == 0);
    let window = if zero { Window::EMPTY } else { Window::from_bytes(window)? };
    Some(Checkpoint { compressed: number(0)?, uncompressed: number(8)?, bits: *blob.get(start + 16)?, window })
}

/// Reads the blob of a plain tar layer: a flatbuffer `{version: i32, span_size: i64, size: i64}`.
pub(super) fn decode_plain(blob: &[u8]) -> Result<Spans, ZtocError> {
    let malformed = |cause: planus::errors::ErrorKind| ZtocError::Malformed {
        table: "TarZinfo",
        field: "root",
        offset: 0,
        cause: cause.to_string(),
    };
    let slice = SliceWithStartOffset { buffer: blob, offset_from_start: 0 };
    let table = <Root<'_> as TableRead>::from_buffer(slice, 0).map_err(malformed)?.0;
    let field = |slot, field| {
        let value = table.access::<i64>(slot, "TarZinfo", field);
        value.map(Option::unwrap_or_default).map_err(|error| malformed(error.error_kind))
    };
    Ok(Spans::Plain { span_bytes: field(1, "span_size")?, size: field(2, "size")? })
}

struct Root<'a>(Table<'a>);

impl<'a> TableRead<'a> for Root<'a> {
    fn from_buffer(buffer: SliceWithStartOffset<'a>, offset: usize) -> Result<Self, planus::errors::ErrorKind> {
        Table::from_buffer(buffer, offset).map(Self)
    }
}

/// The blob of a gzip layer, unpacked record by record as it is read.
#[derive(Debug, Clone)]
pub(super) enum Pieces {
    Gzip { header: [u8; HEADER], checkpoints: Vec<Checkpoint> },
    Plain(Vec<u8>),
}

impl Pieces {
    pub(super) fn gzip(span_bytes: i64, checkpoints: &[Checkpoint], first_implied: bool) -> Option<Self> {
        let count = i32::try_from(checkpoints.len()).ok()?;
        let mut header = [0; HEADER];
        header[..4].copy_from_slice(&count.to_le_bytes());
        header[4..].copy_from_slice(&span_bytes.to_le_bytes());
        let checkpoints = checkpoints[usize::from(first_implied && !checkpoints.is_empty())..].to_vec();
        Some(Self::Gzip { header, checkpoints })
    }

    pub(super) fn len(&self) -> usize {
        match self {
            Self::Gzip { checkpoints, .. } => HEADER + checkpoints.len() * RECORD,
            Self::Plain(bytes) => bytes.len(),
        }
    }

    /// How many pieces there are: the header, then one per checkpoint.
    pub(super) fn count(&self) -> usize {
        match self {
            Self::Gzip { checkpoints, .. } => 1 + checkpoints.len(),
            Self::Plain(_) => 1,
        }
    }

    pub(super) fn piece(&self, index: usize) -> Bytes {
        match self {
            Self::Plain(bytes) => Bytes::copy_from_slice(bytes),
            Self::Gzip { header, checkpoints } => match index.checked_sub(1) {
                None => Bytes::copy_from_slice(header),
                Some(index) => checkpoints.get(index).map(packed).unwrap_or_default(),
            },
        }
    }
}

fn packed(checkpoint: &Checkpoint) -> Bytes {
    let mut record = BytesMut::with_capacity(RECORD);
    record.put_u64_le(checkpoint.compressed);
    record.put_u64_le(checkpoint.uncompressed);
    record.put_u8(checkpoint.bits);
    record.put_slice(&checkpoint.window.load()[..]);
    record.freeze()
}
