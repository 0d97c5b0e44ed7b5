//! Lazy file systems over indexed container layers: everything a node needs to read an image without unpacking it.
//!
//! From the bytes up: a [`source`] delivers ranges of a layer blob, the [`store`] keeps what was decoded of them, the
//! [`reader`] joins the two, a [`tree`] says which files a layer has, the [`view`] merges an image's layers, and an
//! [`image`] answers every question a file system is asked. A [`forest`] does so for all layers of a node, side by side
//! and unmerged, for overlayfs to stack. [`mount`] hands either to the kernel, and a [`supervisor`] keeps the mount
//! alive while the process that serves it comes and goes.

pub mod attributes;
mod budget;
mod descriptor;
pub mod errno;
pub mod forest;
mod fuse;
pub mod glob;
pub mod grpc;
pub mod id_map;
pub mod image;
mod kernel_cache;
pub mod keychain;
pub mod limits;
pub mod lock;
pub mod mentions;
pub mod metrics;
pub mod mount;
pub mod open;
pub mod private;
pub mod profile;
pub mod proof;
pub mod readahead;
pub mod reader;
pub mod remote;
pub mod rpull;
pub mod snapshots;
pub mod source;
pub mod status;
pub mod store;
pub mod supervisor;
pub mod tree;
pub mod trust;
pub mod unpack;
pub mod view;
