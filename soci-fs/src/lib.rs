//! Lazy file systems over indexed container layers: everything a node needs to read an image without unpacking it.
//!
//! From the bytes up: a [`source`] delivers ranges of a layer blob, the [`store`] keeps what was decoded of them, the
//! [`reader`] joins the two, a [`tree`] says which files a layer has, the [`view`] merges an image's layers, and an
//! [`image`] answers every question a file system is asked. [`mount`] hands it to the kernel.

pub mod attributes;
pub mod errno;
mod fuse;
pub mod grpc;
pub mod image;
pub mod mount;
pub mod open;
pub mod proof;
pub mod readahead;
pub mod reader;
pub mod snapshots;
pub mod source;
pub mod status;
pub mod store;
pub mod tree;
pub mod unpack;
pub mod view;
