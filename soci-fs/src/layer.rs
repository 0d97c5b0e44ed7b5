//! One layer's bytes: fetched, decoded, verified and kept.
//!
//! A [`source`] delivers ranges of a layer blob, the [`store`] keeps what was decoded of them, the [`reader`] joins the
//! two and plans [`readahead`], [`unpack`] takes layers whole, and [`proof`] compares a layer with its diff_id.
//! [`status`] and [`stages`] are what is counted. [`private`] and [`lock`] guard the directories, [`limits`] and
//! `budget` the memory.
//!
//! The room uses `soci-index` alone; every other room but `tree` uses it.

pub(crate) mod budget;
pub mod glob;
pub(crate) mod incoming;
pub mod limits;
pub mod lock;
pub mod private;
pub mod proof;
pub mod readahead;
pub mod reader;
pub mod source;
pub mod stages;
pub mod status;
pub mod store;
pub mod unpack;
