//! Unpacking the frame of a TOC blob, which may hold any number of bytes in a few: its head is unpacked first, and says
//! how many there can be.

use zstd::zstd_safe;

use crate::format::compact::file::{File, HEAD_BYTES};
use crate::format::compact::{Column, CompactError};
use crate::format::limits::Limits;

/// Bytes of the fixed part with the lengths of all columns.
const LEAST_BYTES: u64 = HEAD_BYTES as u64 + 8 * Column::ALL.len() as u64;
/// The largest window that zstd knows.
const WINDOW_LOG_MAX: u32 = 31;
/// Most bytes of a span, and of an entry without texts, in the content: two and thirteen numbers of ten bytes each, and
/// what has a fixed length. An entry's rarities count as texts.
const SPAN_CONTENT: u64 = 2 * 10 + 1 + 32 + 10 + 32;
const ENTRY_CONTENT: u64 = 1 + 14 * 10;

/// Bytes of texts, and of the file, that even the smallest layer may have.
pub(super) const FREE_BYTES: usize = 64 << 10;

/// Unpacks the frame, and narrows the limits to what the head allows.
pub(super) fn unpack(toc: &[u8], limits: &Limits) -> Result<(Vec<u8>, Limits), CompactError> {
    let frame = |reason: String| CompactError::Frame { reason };
    let size = zstd_safe::get_frame_content_size(toc).map_err(|_| frame("it is no zstd frame".to_owned()))?;
    let size = size.ok_or_else(|| frame("its frame does not state its size".to_owned()))?;
    // No row takes more in the file than in memory.
    let limit = limits.ztoc_bytes_max.min(limits.table_bytes_max.saturating_add(LEAST_BYTES));
    if size > limit {
        return Err(CompactError::TooLarge { what: "bytes", found: size, limit });
    }
    let mut head = [0; HEAD_BYTES];
    begin(toc, &mut head).map_err(|error| frame(format!("it has no whole header ({error})")))?;
    let file = File::open(&head, limits)?;
    let (spans, entries) = (file.span_count as u64, file.entry_count as u64);
    let narrow = limits.for_table(spans, entries, file.uncompressed_size);
    let narrow = narrow.map_err(|(cap, limit)| CompactError::Cap { cap, limit })?;
    let rows = spans.saturating_mul(SPAN_CONTENT).saturating_add(entries.saturating_mul(ENTRY_CONTENT));
    let texts = narrow.text_bytes_max.saturating_add(FREE_BYTES) as u64;
    let limit = rows.saturating_add(texts).saturating_add(LEAST_BYTES);
    if size > limit {
        return Err(CompactError::TooLarge { what: "bytes", found: size, limit });
    }
    let size = usize::try_from(size).map_err(|_| CompactError::TooLarge { what: "bytes", found: size, limit })?;
    Ok((zstd::bulk::decompress(toc, size).map_err(|error| frame(error.to_string()))?, narrow))
}

/// Unpacks the first bytes of the content.
fn begin(toc: &[u8], head: &mut [u8]) -> Result<(), &'static str> {
    let mut context = zstd_safe::DCtx::create();
    // The whole content is the window of a frame that states its size, which is bounded.
    let allowed = context.set_parameter(zstd_safe::DParameter::WindowLogMax(WINDOW_LOG_MAX));
    allowed.map_err(zstd_safe::get_error_name)?;
    let length = head.len();
    let (mut input, mut output) = (zstd_safe::InBuffer::around(toc), zstd_safe::OutBuffer::around(head));
    while output.pos() < length {
        let before = (input.pos(), output.pos());
        let left = context.decompress_stream(&mut output, &mut input).map_err(zstd_safe::get_error_name)?;
        if output.pos() < length && (left == 0 || (input.pos(), output.pos()) == before) {
            return Err("it ends too early");
        }
    }
    Ok(())
}
