//! Reading the zTOC flatbuffer.
//!
//! Planus does the pointer work, bounds-checked and lazy; the four tables of the schema are few enough to be named here
//! by hand. Entries may share bytes in a hostile file, so texts are counted against [`Limits`] as they are copied.

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;
use planus::errors::ErrorKind;
use planus::table_reader::Table;
use planus::{SliceWithStartOffset, TableRead};

use crate::format::entry::{Entry, EntryKind, Extra, PaxRecord};
use crate::format::limits::Limits;
use crate::format::ztoc::{Spans, Ztoc, ZtocError, rfc3339, zinfo};

/// A table of the schema, with its name for messages.
#[derive(Clone, Copy)]
struct Named<'a> {
    table: Table<'a>,
    name: &'static str,
    offset: usize,
}

/// A table field that is a table.
struct Child<'a>(Table<'a>, usize);

impl<'a> TableRead<'a> for Child<'a> {
    fn from_buffer(buffer: SliceWithStartOffset<'a>, offset: usize) -> Result<Self, ErrorKind> {
        Ok(Self(Table::from_buffer(buffer, offset)?, buffer.offset_from_start + offset))
    }
}

/// A vector of offsets, to tables or texts.
#[derive(Clone, Copy)]
struct Offsets<'a> {
    elements: SliceWithStartOffset<'a>,
    length: usize,
}

impl<'a> TableRead<'a> for Offsets<'a> {
    fn from_buffer(buffer: SliceWithStartOffset<'a>, offset: usize) -> Result<Self, ErrorKind> {
        let target = u32::from_buffer(buffer, offset)? as usize;
        let vector = buffer.advance(offset)?.advance(target)?;
        let length = u32::from_buffer(vector, 0)? as usize;
        let elements = vector.advance(4)?;
        if length.checked_mul(4).is_none_or(|bytes| bytes > elements.len()) {
            return Err(ErrorKind::InvalidLength);
        }
        Ok(Self { elements, length })
    }
}

impl<'a> Offsets<'a> {
    fn get<T: TableRead<'a>>(&self, index: usize, table: &'static str, field: &'static str) -> Result<T, ZtocError> {
        let at = self.elements.offset_from_start + index * 4;
        T::from_buffer(self.elements, index * 4).map_err(|cause| malformed(table, field, at, cause))
    }
}

impl<'a> Named<'a> {
    fn of(child: &Child<'a>, name: &'static str) -> Self {
        Self { table: child.0, name, offset: child.1 }
    }

    fn field<T: TableRead<'a>>(&self, slot: usize, field: &'static str) -> Result<Option<T>, ZtocError> {
        let value = self.table.access(slot, self.name, field);
        value.map_err(|error| malformed(self.name, field, self.offset, error.error_kind))
    }

    fn required<T: TableRead<'a>>(&self, slot: usize, field: &'static str) -> Result<T, ZtocError> {
        let missing = || malformed(self.name, field, self.offset, ErrorKind::MissingRequired);
        self.field(slot, field)?.ok_or_else(missing)
    }

    fn text(&self, slot: usize, field: &'static str) -> Result<&'a [u8], ZtocError> {
        Ok(self.field::<&[u8]>(slot, field)?.unwrap_or_default())
    }

    fn string(&self, slot: usize, field: &'static str) -> Result<String, ZtocError> {
        // Two short texts that are only displayed: sanitised and truncated rather than refused.
        Ok(String::from_utf8_lossy(self.text(slot, field)?).chars().take(200).collect())
    }

    fn number<T: TableRead<'a> + Default>(&self, slot: usize, field: &'static str) -> Result<T, ZtocError> {
        Ok(self.field(slot, field)?.unwrap_or_default())
    }
}

fn malformed(table: &'static str, field: &'static str, offset: usize, cause: ErrorKind) -> ZtocError {
    ZtocError::Malformed { table, field, offset, cause: cause.to_string() }
}

pub(super) fn decode(bytes: &Bytes, limits: &Limits) -> Result<Ztoc, ZtocError> {
    if bytes.len() as u64 > limits.ztoc_bytes_max {
        return Err(ZtocError::Limit { limit: "ztoc_bytes_max", cap: limits.ztoc_bytes_max });
    }
    let root = SliceWithStartOffset { buffer: bytes, offset_from_start: 0 };
    let root = Child::from_buffer(root, 0).map_err(|cause| malformed("Ztoc", "root", 0, cause))?;
    let root = Named::of(&root, "Ztoc");
    let toc = Named::of(&root.required::<Child<'_>>(4, "toc")?, "TOC");
    let info = Named::of(&root.required::<Child<'_>>(5, "compression_info")?, "CompressionInfo");
    let uncompressed_size: i64 = root.number(3, "uncompressed_archive_size")?;
    let count = |table: &Named<'_>, slot, field| {
        Ok::<_, ZtocError>(table.field::<Offsets<'_>>(slot, field)?.map_or(0, |vector| vector.length as u64))
    };
    let (spans, files) = (count(&info, 2, "span_digests")?, count(&toc, 0, "metadata")?);
    if files > limits.entries_max as u64 {
        return Err(ZtocError::Limit { limit: "entries_max", cap: limits.entries_max as u64 });
    }
    // Entries may share bytes, so this comes before any of them is read.
    let narrow = limits.for_table(spans, files, uncompressed_size.cast_unsigned());
    let limits = &narrow.map_err(|(limit, cap)| ZtocError::Limit { limit, cap })?;
    let (digests, spans) = compression(&info, bytes, limits)?;
    Ok(Ztoc {
        version: root.string(0, "version")?,
        build_tool: root.string(1, "build_tool_identifier")?,
        compressed_size: root.number(2, "compressed_archive_size")?,
        uncompressed_size,
        entries: entries(&toc, limits)?,
        max_span_id: info.number(1, "max_span_id")?,
        digests,
        spans,
    })
}

/// A span digest; `None` for a text that is none.
type SpanDigest = Option<[u8; 32]>;

fn compression(info: &Named<'_>, bytes: &Bytes, limits: &Limits) -> Result<(Vec<SpanDigest>, Spans), ZtocError> {
    let texts = info.field::<Offsets<'_>>(2, "span_digests")?;
    let count = texts.map_or(0, |texts| texts.length);
    if count > limits.spans_max {
        return Err(ZtocError::Limit { limit: "spans_max", cap: limits.spans_max as u64 });
    }
    let mut digests = Vec::with_capacity(count);
    for index in 0..count {
        if let Some(texts) = &texts {
            digests.push(sha256(texts.get::<&[u8]>(index, "CompressionInfo", "span_digests")?));
        }
    }
    let blob: &[u8] = info.required(3, "checkpoints")?;
    // The algorithm is left out when it is gzip.
    let spans = match info.field::<i8>(0, "compression_algorithm")?.unwrap_or(1) {
        1 => zinfo::decode_gzip(&bytes.slice_ref(blob), limits)?,
        2 => zinfo::decode_plain(blob)?,
        other => {
            return Err(ZtocError::Number { what: "the compression algorithm", value: other.into() });
        }
    };
    Ok((digests, spans))
}

fn sha256(text: &[u8]) -> Option<[u8; 32]> {
    let digest: crate::format::digest::Digest = std::str::from_utf8(text).ok()?.parse().ok()?;
    digest.bytes().try_into().ok()
}

fn entries(toc: &Named<'_>, limits: &Limits) -> Result<Vec<Entry>, ZtocError> {
    let Some(files) = toc.field::<Offsets<'_>>(0, "metadata")? else { return Ok(Vec::new()) };
    let mut texts = Texts { left: limits.text_bytes_max, names: BTreeSet::new(), limits };
    let mut entries = Vec::with_capacity(files.length);
    for index in 0..files.length {
        let file = files.get::<Child<'_>>(index, "TOC", "metadata")?;
        entries.push(entry(&Named::of(&file, "FileMetadata"), &mut texts)?);
    }
    Ok(entries)
}

/// Copies texts as long as the limit allows.
struct Texts<'l> {
    left: usize,
    names: BTreeSet<Arc<[u8]>>,
    limits: &'l Limits,
}

impl Texts<'_> {
    fn count<'t>(&mut self, text: &'t [u8]) -> Result<&'t [u8], ZtocError> {
        let limit = |limit, cap: usize| ZtocError::Limit { limit, cap: cap as u64 };
        let left = self.left.checked_sub(text.len());
        self.left = left.ok_or_else(|| limit("text_bytes_max", self.limits.text_bytes_max))?;
        Ok(text)
    }

    fn path(&mut self, text: &[u8]) -> Result<Box<[u8]>, ZtocError> {
        if text.len() > self.limits.path_bytes_max {
            return Err(ZtocError::Limit { limit: "path_bytes_max", cap: self.limits.path_bytes_max as u64 });
        }
        Ok(self.count(text)?.into())
    }

    fn share(&mut self, text: &[u8]) -> Result<Arc<[u8]>, ZtocError> {
        self.count(text)?;
        if let Some(known) = self.names.get(text) {
            return Ok(Arc::clone(known));
        }
        let name: Arc<[u8]> = text.into();
        self.names.insert(Arc::clone(&name));
        Ok(name)
    }
}

fn entry(file: &Named<'_>, texts: &mut Texts<'_>) -> Result<Entry, ZtocError> {
    let name = texts.path(file.text(0, "name")?)?;
    let kind = kind(file.text(1, "type")?, &name)?;
    let number = |what, value: i64| u64::try_from(value).map_err(|_| ZtocError::Number { what, value });
    let extra = extra(file, texts)?;
    Ok(Entry {
        link: texts.path(file.text(4, "linkname")?)?,
        user_name: texts.share(file.text(8, "uname")?)?,
        group_name: texts.share(file.text(9, "gname")?)?,
        header_offset: 0,
        data_offset: number("the offset of a file", file.number(2, "uncompressed_offset")?)?,
        size: number("the size of a file", file.number(3, "uncompressed_size")?)?,
        mode: file.number(5, "mode")?,
        modified: rfc3339::parse(file.text(10, "mod_time")?),
        uid: file.number(6, "uid")?,
        gid: file.number(7, "gid")?,
        name,
        kind,
        extra,
    })
}

fn kind(text: &[u8], name: &[u8]) -> Result<EntryKind, ZtocError> {
    crate::format::ztoc::KINDS.iter().find(|(_, known)| known.as_bytes() == text).map(|(kind, _)| *kind).ok_or_else(
        || ZtocError::Kind {
            name: String::from_utf8_lossy(name).chars().take(200).collect(),
            kind: String::from_utf8_lossy(text).chars().take(50).collect(),
        },
    )
}

fn extra(file: &Named<'_>, texts: &mut Texts<'_>) -> Result<Option<Box<Extra>>, ZtocError> {
    let (device_major, device_minor) = (file.number(11, "devmajor")?, file.number(12, "devminor")?);
    let records = file.field::<Offsets<'_>>(13, "xattrs")?;
    let count = records.map_or(0, |records| records.length);
    let mut pax = Vec::new();
    for index in 0..count {
        let Some(records) = &records else { break };
        let record = records.get::<Child<'_>>(index, "FileMetadata", "xattrs")?;
        let record = Named::of(&record, "Xattr");
        // Empty records cost a file nothing and us some memory each.
        texts.count(&[0; 32])?;
        let (key, value) = (texts.count(record.text(0, "key")?)?, texts.count(record.text(1, "value")?)?);
        pax.push(PaxRecord { key: key.into(), value: value.into() });
    }
    if pax.is_empty() && device_major == 0 && device_minor == 0 {
        return Ok(None);
    }
    pax.sort();
    pax.dedup_by(|a: &mut PaxRecord, b| a.key == b.key);
    Ok(Some(Box::new(Extra { device_major, device_minor, pax: pax.into(), sparse: None })))
}
