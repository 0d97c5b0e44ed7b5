//! Bounds on every size that a stranger can choose.
//!
//! Each cap names the attack that it stops. The defaults admit every layer we have heard of with room to spare; a
//! caller with less memory may lower them. A value beyond a cap is an error with the cap's name, never a truncation.

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
    /// Decoded bytes of one span. Stops a decompression bomb behind one read; a stored span table entry above this is
    /// refused. Default 1 GiB: a span has no natural upper limit, since one deflate block may be as long as it likes.
    pub span_bytes_max: u64,
    /// Bytes of one manifest, index or token answer. Default 4 MiB, the size that registries must accept.
    pub manifest_bytes_max: u64,
    /// Length of one path inside a layer in bytes. Default 64 KiB.
    pub path_bytes_max: usize,
    /// Pieces of one sparse file. Stops a sparse map that outweighs the file. Default 1 million.
    pub sparse_pieces_max: usize,
    /// Ranges of one profile, and layers of it. Stops a profile that outweighs the image. Default 256 thousand; a start-up
    /// of a large program has some ten thousand.
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
        span_bytes_max: 1 << 30,
        manifest_bytes_max: 4 << 20,
        path_bytes_max: 64 << 10,
        sparse_pieces_max: 1_000_000,
        profile_ranges_max: 1 << 18,
        profile_bytes_max: 8 << 30,
    };
}

impl Default for Limits {
    fn default() -> Self {
        Self::DEFAULT
    }
}
