//! Span indexes for gzip container layers: everything a build job needs, and nothing that needs a mount or root.
//!
//! Five words carry the crate:
//!
//! * a **layer** is one compressed tar blob of an image;
//! * a **checkpoint** is a deflate block boundary at which decoding may begin;
//! * a **span** is the compressed bytes between two checkpoints;
//! * the **TOC** is the layer's file table;
//! * a **zTOC** is the file in which AWS's tools keep the TOC and the checkpoints of one layer.
//!
//! The modules fall in two halves. The *pure* half turns bytes into values and back: it knows no file, socket, clock,
//! environment, thread or runtime, and a test in `tests/` holds it to that. The *edges* (`image`, `registry`,
//! [`publish`], [`find`]) move bytes between it and the world.
//!
//! What this crate does not do: mount anything (see `soci-fs`), or print anything (see `soci-cli`).

pub mod access;
pub mod build;
pub mod checkpoint;
pub mod compact;
pub mod convert;
pub mod decode;
pub mod digest;
pub mod discover;
pub mod encoding;
pub mod entry;
pub mod find;
pub mod format;
pub mod gojson;
pub mod gotime;
pub mod gzip;
pub mod icon;
pub mod image;
pub mod index;
pub mod index_manifest;
pub mod indexer;
mod inflate;
pub mod known;
pub mod limits;
pub mod manifest;
pub mod output;
pub mod pipeline;
pub mod prefetch;
pub mod profile;
pub mod publish;
pub mod registry;
pub mod signature;
pub mod sink;
pub mod span;
pub mod span_index;
pub mod tar;
pub mod v2;
pub mod verify;
pub mod ztoc;
