//! Indexes for gzip container layers: everything a build job needs, and nothing that needs a mount or root.
//!
//! Five words carry the crate: a **layer** is one compressed tar blob of an image; a **checkpoint** is a deflate block
//! boundary at which decoding may begin; a **span** is the compressed bytes between two checkpoints; the **TOC** is the
//! layer's file table; a **zTOC** is the file in which AWS's tools keep the TOC and the checkpoints of one layer.
//!
//! # What a program does with it
//!
//! | to | use |
//! |---|---|
//! | index a layer from chunks of its bytes | [`Indexer`] |
//! | publish an image's index beside it in a registry | [`publish()`], given a [`Job`] |
//! | open a layer by its index | [`LayerIndex`]: just made, or read from a [`Ztoc`](format::ztoc::Ztoc) |
//! | read a range of a file, given ranges of the layer | [`LayerReader`] |
//! | check an index against its layers | [`verify()`] |
//!
//! ```
//! use std::io::Write as _;
//!
//! use soci_index::format::index::Compression;
//! use soci_index::indexing::Options;
//! use soci_index::{Indexer, LayerReader};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let mut tar = tar::Builder::new(Vec::new());
//! # let mut header = tar::Header::new_gnu();
//! # header.set_size(5);
//! # tar.append_data(&mut header, "etc/greeting", &b"hello"[..])?;
//! # let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
//! # gzip.write_all(&tar.into_inner()?)?;
//! # let layer = gzip.finish()?;
//! // Index a layer, in chunks of any size.
//! let mut indexer = Indexer::new(Options::of(Compression::Gzip))?;
//! for chunk in layer.chunks(4096) {
//!     indexer.push(chunk, &mut |_| {})?;
//! }
//! let indexed = indexer.finish()?;
//! println!("layer {}, diff_id {}", indexed.layer_digest, indexed.diff_id);
//!
//! // Read one file: only the spans that hold it are asked for.
//! let index = &indexed.index;
//! let entry = index.entries.iter().find(|entry| &*entry.name == b"etc/greeting").ok_or("no such file")?;
//! let fetch = |range: std::ops::Range<u64>| {
//!     let (start, end) = (range.start as usize, range.end as usize);
//!     Ok::<_, std::io::Error>(bytes::Bytes::copy_from_slice(&layer[start..end]))
//! };
//! let mut content = Vec::new();
//! LayerReader::new(index, fetch).read_file(entry, 0..entry.size, &mut |part| content.extend_from_slice(part))?;
//! assert_eq!(content, b"hello");
//! # Ok(())
//! # }
//! ```
//!
//! # Rooms
//!
//! Each uses only those before it: [`format`](mod@format) is pure and turns bytes into values, [`indexing`] makes an
//! index of a layer, [`registry`] speaks the distribution protocol, [`image`] knows where images are, [`trust`] checks
//! signatures, [`find`] chooses an index, [`publish`](mod@publish) makes, stores and checks them. They hold what this
//! project's other crates use, too, and change with them. [`clock`] is the system's.
//!
//! With the feature `oci-client` its references, credentials and manifests are taken in place of this crate's
//! (`registry::oci_client`).
//!
//! What this crate does not do: mount anything (see `soci-fs`), or print anything (see `soci-cli`).

pub mod clock;
pub mod find;
pub mod format;
pub mod image;
pub mod indexing;
pub mod publish;
pub mod registry;
pub mod trust;

#[doc(inline)]
pub use crate::format::access::LayerReader;
#[doc(inline)]
pub use crate::format::index::LayerIndex;
#[doc(inline)]
pub use crate::indexing::Indexer;
#[doc(inline)]
pub use crate::publish::verify::verify;
#[doc(inline)]
pub use crate::publish::{Job, publish};
