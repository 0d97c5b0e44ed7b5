//! What a command says: tables and JSON ([`output`]), [`progress`], the log ([`logging`]), and the exit code
//! ([`exit`]).
//!
//! The room uses no other of this crate; every other uses it.

pub mod exit;
pub mod logging;
pub mod output;
pub mod progress;
pub mod signals;
