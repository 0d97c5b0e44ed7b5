//! Bounds on every size that untrusted input can choose.
//!
//! Each cap names the attack that it stops. The defaults admit every layer known to us with a wide margin; a caller
//! with less memory may lower them. A value beyond a cap is an error with the cap's name, never a truncation.

/// The caps that all parsers of this crate obey.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Entries of one layer. Stops a small zTOC (entries may share bytes) or a highly compressed tar from filling the
    /// memory with a file table. Default 4 million (the largest images known to us hold under one million).
    pub entries_max: usize,
    /// Bytes of names, link targets, PAX records and maps of sparse files of one layer, added up. Stops the same attack
    /// through long texts, or through many short ones. Default 1 GiB.
    pub text_bytes_max: usize,
    /// Bytes of one extended tar header. Stops a header that claims gigabytes. Default 1 MiB, the limit of Go's
    /// archive/tar, on which the AWS tools rest.
    pub extended_header_bytes_max: u64,
    /// Bytes of one zTOC. Stops a registry from making us hold an endless blob. Default 2 GiB, the flatbuffer limit.
    pub ztoc_bytes_max: u64,
    /// Spans of one layer. Stops a span table that outweighs the layer. Default 1 million.
    pub spans_max: usize,
    /// Decoded bytes of one span, all of which are held while it is decoded. Stops a decompression bomb behind one
    /// read; a stored span table entry above this is refused. Default 64 MiB, sixteen times what AWS's tools make.
    /// Operators know it as `max_span_bytes`.
    pub span_bytes_max: u64,
    /// Bytes of memory that the tables of one layer may take: entries, their texts, and spans. Stops a table that a few
    /// kilobytes unpack to. No bound by default: what a layer can account for is known with the layer, see
    /// [`Limits::for_layer`].
    pub table_bytes_max: u64,
    /// What [`Limits::for_layer`] allows for the tables of a layer of no size. Default 64 MiB. Operators know it as
    /// `max_table_bytes`.
    pub table_bytes_least: u64,
    /// Bytes that a layer may have uncompressed. Stops a table of files that there is no room for in the layer.
    /// No bound by default, see [`Limits::for_layer`].
    pub uncompressed_bytes_max: u64,
    /// Bytes of one manifest, index or token answer. Default 4 MiB, the size that registries must accept.
    pub manifest_bytes_max: u64,
    /// Length of one path inside a layer in bytes. Default 64 KiB.
    pub path_bytes_max: usize,
    /// Pieces of one sparse file. Stops a sparse map that outweighs the file. Default 1 million.
    pub sparse_pieces_max: usize,
    /// Ranges of one profile, and layers of it. Stops a profile that outweighs the image. Default 256 thousand; a
    /// start-up of a large program has some ten thousand.
    pub profile_ranges_max: usize,
    /// Bytes that one profile may name. Stops a profile, or its pack, from filling the disk. Default 8 GiB.
    pub profile_bytes_max: u64,
}

impl Limits {
    /// The defaults, as constants.
    pub const DEFAULT: Self = Self {
        entries_max: 4_000_000,
        text_bytes_max: 1 << 30,
        extended_header_bytes_max: 1 << 20,
        ztoc_bytes_max: 1 << 31,
        spans_max: 1_000_000,
        span_bytes_max: 64 << 20,
        table_bytes_max: u64::MAX,
        table_bytes_least: 64 << 20,
        uncompressed_bytes_max: u64::MAX,
        manifest_bytes_max: 4 << 20,
        path_bytes_max: 64 << 10,
        sparse_pieces_max: 1_000_000,
        profile_ranges_max: 1 << 18,
        profile_bytes_max: 8 << 30,
    };

    /// The defaults for building an index of a layer: a span has no natural upper limit, since one deflate block may be
    /// as long as it likes, and is not decoded as one here.
    pub(crate) const INDEXING: Self = Self { span_bytes_max: 1 << 30, ..Self::DEFAULT };

    /// The caps for what is said of a layer blob of so many bytes. Its tables are bounded by it: deflate yields at most
    /// `INFLATION_MAX` times what it is given, every entry of a tar takes a block of it, and real layers spend at
    /// least a hundred compressed bytes on a file once they have very many. A forged index, or a layer made to be
    /// nothing but headers, thereby takes memory in proportion to itself.
    #[must_use]
    pub fn for_layer(self, layer_bytes: u64) -> Self {
        let uncompressed = layer_bytes.saturating_mul(INFLATION_MAX).saturating_add(64 << 10);
        Self {
            table_bytes_max: self
                .table_bytes_max
                .min(self.table_bytes_least.saturating_add(layer_bytes.saturating_mul(2))),
            uncompressed_bytes_max: self.uncompressed_bytes_max.min(uncompressed),
            ztoc_bytes_max: self.ztoc_bytes_max.min(layer_bytes.saturating_mul(8).saturating_add(64 << 20)),
            ..self
        }
    }

    /// The caps that go with a table of so many spans and entries of a layer of so many uncompressed bytes, if it keeps
    /// to these. What is left of the tables' memory is for texts, which the tar must have room for, too.
    ///
    /// # Errors
    /// The cap that is passed, with its value.
    pub(crate) fn for_table(self, spans: u64, entries: u64, uncompressed: u64) -> Result<Self, (&'static str, u64)> {
        if uncompressed > self.uncompressed_bytes_max {
            return Err(("uncompressed_bytes_max", self.uncompressed_bytes_max));
        }
        let blocks = uncompressed / 512;
        if entries > blocks {
            return Err(("entries in its tar", blocks));
        }
        let fixed = spans.saturating_mul(SPAN_MEMORY).saturating_add(entries.saturating_mul(ENTRY_MEMORY));
        let Some(left) = self.table_bytes_max.checked_sub(fixed) else {
            return Err(("max_table_bytes", self.table_bytes_max));
        };
        // A name is held in the table and in the tree.
        let text = usize::try_from((left / 2).min(uncompressed)).unwrap_or(usize::MAX);
        Ok(Self { text_bytes_max: self.text_bytes_max.min(text), ..self })
    }
}

/// Deflate's best: a match of 258 bytes in two bits.
pub(crate) const INFLATION_MAX: u64 = 1032;
/// Bytes of memory that an entry takes with its node in the tree and what allocating costs, but for texts.
pub const ENTRY_MEMORY: u64 = 320;
/// Bytes of memory that a span takes with its window's place and what a store has of it.
pub const SPAN_MEMORY: u64 = 192;

impl Default for Limits {
    fn default() -> Self {
        Self::DEFAULT
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::index::Compression;
    use crate::format::ztoc::{Ztoc, ZtocError};
    use crate::indexing::{Options, index_bytes};

    #[test]
    fn tables_are_bounded_by_their_layer() {
        let of = |layer: u64| Limits::DEFAULT.for_layer(layer);
        assert_eq!(of(0).table_bytes_max, 64 << 20);
        assert_eq!(of(100 << 20).table_bytes_max, 264 << 20);
        assert_eq!(of(u64::MAX), Limits::DEFAULT);
        let table = |layer, spans, entries, bytes| of(layer).for_table(spans, entries, bytes).map(|_| ());
        assert_eq!(table(1000, 1, 10, 512 * 10), Ok(()));
        assert_eq!(table(1000, 1, 11, 512 * 10), Err(("entries in its tar", 10)));
        assert_eq!(
            table(1000, 1, 1, 1000 * 1032 + (64 << 10) + 1),
            Err(("uncompressed_bytes_max", 1000 * 1032 + (64 << 10)))
        );
        // What large images have, and what an image of nothing but headers has.
        assert_eq!(table(1 << 30, 20_000, 1_000_000, 8 << 30), Ok(()));
        assert_eq!(table(10 << 20, 100, 1_000_000, 1_000_000 * 512), Err(("max_table_bytes", 84 << 20)));
        // Texts have what is left, and the tar has room for them.
        let any = Limits { uncompressed_bytes_max: u64::MAX, ..of(0) };
        let texts = |entries, bytes| any.for_table(0, entries, bytes).unwrap().text_bytes_max;
        assert_eq!((texts(0, 1 << 30), texts(1, 1024)), (32 << 20, 1024));
    }

    /// Entries of a zTOC may share all their bytes.
    #[test]
    fn a_ztoc_has_no_more_files_than_its_tar() {
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(0);
        header.set_cksum();
        builder.append_data(&mut header, "file", &b""[..]).unwrap();
        let tar = builder.into_inner().unwrap();
        let mut ztoc = index_bytes(&tar, Options::of(Compression::None)).unwrap().into_ztoc().unwrap();
        ztoc.entries = vec![ztoc.entries[0].clone(); 5000];
        let bytes = bytes::Bytes::from(ztoc.encode().unwrap().to_vec());
        let error = Ztoc::decode(&bytes, &Limits::DEFAULT).unwrap_err();
        assert!(matches!(error, ZtocError::Limit { limit: "entries in its tar", .. }), "{error}");
    }
}
