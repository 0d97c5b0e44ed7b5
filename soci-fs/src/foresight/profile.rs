//! Profiles on a node: noting what a start-up reads, and fetching it ahead of the next one.
//!
//! What a profile is, and its form, is in [`soci_index::format::profile`]. Here a [`Recorder`] listens to the readers
//! of an image's layers, a [`Memory`] keeps the recording for the next time, and [`Replay`] has the readers fetch what
//! a profile names before a program asks for it: span by span, or all at once from a [`pack`].
//!
//! A profile is a hint. It may come from any client with push access, like an unsigned index: so spans are checked as
//! always, and what a wrong profile costs is bounded by a budget of bytes. The bytes of a pack go only to layers whose
//! claim names that pack, which no image has that would not have chosen it by itself; they are compared when their span
//! comes, and a difference condemns the pack.

mod memory;
pub mod pack;
mod recorder;
mod replay;

pub use memory::{Memory, MemoryError};
pub use recorder::Recorder;
pub use replay::{Choice, Replay, ReplayOptions, Wanted, budget, fetch, find_published};
