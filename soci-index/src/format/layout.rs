//! The on-disk formats, byte by byte. Documentation only.
//!
//! What is written down here was worked out from files that AWS's tools made (soci 0.15 and 0.16 give the same bytes)
//! and is held by the golden tests. Numbers are little-endian.
//!
//! # zTOC 0.9
//!
//! One file per layer: a flatbuffer without file identifier or size prefix.
//!
//! | table | slots, in order |
//! |---|---|
//! | `Ztoc` (root) | version, build tool, compressed size, uncompressed size, TOC, compression info |
//! | `TOC` | vector of files |
//! | `FileMetadata` | name, type, uncompressed offset, uncompressed size, link name, mode, uid, gid, user, group, modification time, device major, device minor, PAX records |
//! | `Xattr` | key, value: one PAX record (the name is historical) |
//! | `CompressionInfo` | algorithm (1 gzip, the default; 2 none), last span number, span digests, checkpoints |
//!
//! Sizes, offsets, mode and device numbers are `i64`, ids `u32`, the span number `i32`, the algorithm `i8`; everything
//! else is text or a vector. Text is bytes: names need not be UTF-8.
//!
//! ## Values
//!
//! * Files stand in tar order, duplicates included; names are as in the tar. The offset is that of the data.
//! * `uncompressed size` of the layer is where the tar ends (behind its two zero blocks), not the length of the stream.
//! * Times are RFC 3339 in UTC with up to nine digits of fraction, trailing zeros dropped; empty for years that RFC 3339
//!   cannot say. (AWS's tools write the *local* zone of the building machine; equal bytes need a builder in UTC.)
//! * Span digests are `sha256:` and hex, over the span's *compressed* bytes.
//!
//! ## Writer
//!
//! Equal bytes need the Go runtime's habits: built from the end of the file to its start; no text is shared; every
//! table shares the newest layout ("vtable") with the same *positions* of fields, wherever it stands; numbers equal to
//! their default are left out; alignment padding is zero. The order in which parts are written fixes all offsets:
//!
//! 1. version, build tool;
//! 2. the files from last to first, each: name, type, link, user, group, time; then its PAX records, keys ascending (key,
//!    value, table), their vector (always, even if empty), and the file's table, slots in order;
//! 3. the vector of files, the TOC;
//! 4. the checkpoints, the span digests from first to last, their vector;
//! 5. compression info (last span number, digests, checkpoints, algorithm);
//! 6. the root (version, build tool, TOC, compressed size, uncompressed size, compression info).
//!
//! # Checkpoints of gzip
//!
//! `i32` count, `i64` span size, then per checkpoint 32,785 bytes:
//!
//! | bytes | what |
//! |--:|---|
//! | 8 | offset in the layer of the first byte not yet touched |
//! | 8 | bytes of output before the checkpoint |
//! | 1 | how many top bits of the byte before that offset belong to what follows, 0 to 7 |
//! | 32,768 | window: the output before, oldest first, zeros before the start of the layer |
//!
//! An older layout leaves the first checkpoint out (it stood behind a ten-byte gzip header); the two are distinguished
//! by their length alone. A checkpoint may stand behind a member's header and behind every block that is not a member's
//! last; one is set there when *more than* the span size has come out since the last. The window is not reset between
//! members.
//!
//! A span's compressed bytes go from its checkpoint (one byte earlier if bits are not 0) to the next checkpoint's
//! offset, for the last span to the end of the layer. So adjacent spans share a byte when a block ends inside it.
//!
//! # Checkpoints of a plain tar
//!
//! A flatbuffer of its own: `i32` version (2), `i64` span size, `i64` layer size. Span *i* begins at *i* times the span
//! size.
//!
//! # SOCI index, version 1
//!
//! An OCI image manifest with the configuration media type `application/vnd.amazon.soci.index.v1+json`, the two bytes
//! `{}` as configuration, the zTOCs as layers (`application/octet-stream`, annotated with layer digest, layer media
//! type and span size), and the image's manifest as `subject`. Compact JSON as Go writes it; see
//! [`crate::format::manifest`] for why not a byte may differ.
//!
//! # Where we differ from AWS's tools, on purpose
//!
//! | input | AWS | here |
//! |---|---|---|
//! | first blocks or first members without output | several checkpoints at 0, which AWS's daemon then refuses | one checkpoint, the last of them |
//! | link, directory, device or fifo with a size field | later offsets wrong, refused by AWS's reader | size 0 |
//! | PAX sparse files | offsets wrong, refused by AWS's reader | no zTOC, with the reason; read right when streamed |
//! | global PAX header, volume label, contiguous file, old sparse file | the whole image is refused | no zTOC for that layer, with the reason; read right when streamed |
//! | zero bytes behind the last gzip member | the whole image is refused | padding, ignored |
//! | gzip header with a name above 512 bytes | the whole image is refused | accepted |
//! | span digest right, output elsewhere (shifted checkpoint) | wrong content | refused while decoding |
//! | forged window | wrong content | wrong content until the layer is proven against its `diff_id`; see `soci-fs` |
//! | last span of a plain tar that ends with its last file | its reader reads past the end | nothing is read there |
