//! Messages and services, as generated from the definitions in this directory.
#![allow(
    missing_docs,
    unreachable_pub,
    dead_code,
    clippy::all,
    clippy::too_many_lines,
    clippy::use_self,
    reason = "generated; `tests/house/generated.rs` compares it with its definitions"
)]

#[rustfmt::skip]
pub(super) mod client;
#[rustfmt::skip]
pub(super) mod snapshots;
#[rustfmt::skip]
pub(super) mod types;
