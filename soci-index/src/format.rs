//! The formats, as values: bytes in, values out, and back. Pure: no file, socket, clock, thread or runtime.
//!
//! | what | modules |
//! |---|---|
//! | a layer's bytes | [`gzip`] and `inflate` (members, blocks, checkpoints), [`tar`], [`decode`] (one span), [`access`] (one file) |
//! | what is known of a layer | [`entry`], [`checkpoint`], [`span`], and [`index`] (`LayerIndex`), which all tables decode to |
//! | AWS's index | [`layout`] (documentation), [`ztoc`], [`manifest`], [`v2_document`], [`prefetch`] |
//! | this project's index | [`compact`], [`span_index`], [`profile`] |
//! | either | [`index_manifest`] |
//! | images | [`mod@reference`], [`digest`], [`model`] (manifests, descriptors, media types), [`platform`], [`encoding`] |
//! | peers' habits | [`gojson`], [`gotime`] (JSON and durations as Go writes them) |
//!
//! Everything from outside is bounded by [`limits`]. The room uses no other; every other room uses it.

pub mod access;
pub mod checkpoint;
pub mod class;
pub mod compact;
pub mod decode;
pub mod digest;
pub mod encoding;
pub mod entry;
pub(crate) mod folded;
pub mod gojson;
pub mod gotime;
pub mod gzip;
pub mod icon;
pub mod index;
pub mod index_manifest;
pub(crate) mod inflate;
pub mod layout;
pub mod limits;
pub mod manifest;
pub mod model;
pub mod platform;
pub mod prefetch;
pub mod profile;
pub mod reference;
pub mod span;
pub mod span_index;
pub mod tar;
pub mod v2_document;
pub mod ztoc;
